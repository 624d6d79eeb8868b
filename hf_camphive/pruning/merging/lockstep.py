"""One program that runs the dense and the masked network side by side, for fits of one to the other."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from hf_camphive.core.plan import PrunePlan
from hf_camphive.network.graph.blocks import ResidualAdd, affine_path, residual_adds
from hf_camphive.network.graph.program import argument_of, compute, operation
from hf_camphive.network.graph.tracing import Trace
from hf_camphive.network.surgery.implants import implanted_slots

Job = tuple[bool, fx.Node]
"""An operation of the pruned (True) or of the dense (False) network."""


@dataclass(frozen=True)
class Fit:
    """Describe one least-squares problem: the layer `node` with this weight, fitted to the dense value `target`.

    With a `residual_add`, the target is the dense sum minus the pruned shortcut, inverted through the norms on `path`.
    """

    node: fx.Node
    weight: str
    target: fx.Node
    path: tuple[fx.Node, ...] = ()
    residual_add: ResidualAdd | None = None


class LockstepProgram:
    """Run the dense and the masked network as one list of operations; those that the plan leaves equal are run once.

    `fits` maps each layer to be fitted to its problem, `order` lists all operations, `stops` the positions of fitted
    layers in it, and `last_use` the position after which each value is no longer needed.
    """

    def __init__(self, trace: Trace, plan: PrunePlan) -> None:
        self.graph, self.tensors = trace.graph, trace.graph.tensors
        self.fits: dict[fx.Node, Fit] = {}
        self.changed: set[fx.Node] = set()
        self._find_fits(plan)
        self.order = self._depth_first()
        self.stops = [i for i, (pruned, node) in enumerate(self.order) if pruned and node in self.fits]
        self.last_use = {need: i for i, job in enumerate(self.order) for need in self.needs(job)}

    def job(self, pruned: bool, node: fx.Node) -> Job:
        """Return the job that computes an operation; both networks share that of an operation the plan does not change."""
        return (pruned and node in self.changed, node)

    def needs(self, job: Job) -> list[Job]:
        """Return the jobs whose values an operation needs, including those that the fit of a fitted layer needs."""
        pruned, node = job
        needs = [self.job(pruned, used) for used in node.all_input_nodes if not self._is_constant(used)]
        if pruned and (fit := self.fits.get(node)):
            needs.append((False, fit.target))
            if fit.residual_add:
                needs.append(self.job(True, fit.residual_add.shortcut))
        return needs

    def advance(
        self, values: Mapping[Job, Tensor], constants: tuple[Mapping, Mapping], start: int, stop: int
    ) -> dict[Job, Tensor]:
        """Compute the values needed from operation `stop` on, given those needed from operation `start` on.

        `constants` holds the bound weights of the dense and of the pruned network.
        """
        values = dict(values)
        for position in range(start, stop):
            pruned, node = job = self.order[position]
            needed = {
                used: values[self.job(pruned, used)] for used in node.all_input_nodes if not self._is_constant(used)
            }
            values[job] = compute(node, {**constants[pruned], **needed})
            for need in self.needs(job):
                if self.last_use[need] == position:
                    del values[need]
        return values

    def _is_constant(self, node: fx.Node) -> bool:
        return node.op == "placeholder" and node is not self.graph.image

    def _find_fits(self, plan: PrunePlan) -> None:
        """Find the operations that the plan changes, and the layers among them to fit.

        A layer is fitted if its weight or input changes, unless it is emptied, runs twice, or pads by name ("same").
        """
        keep = plan.keep
        shrunk = [group for group in plan.groups if len(keep[group.name]) < group.size]
        cut = {s.tensor for group in shrunk for s in group.slots if s.role in ("consumer", "statistics")}
        cut |= {slot.tensor for slot, _ in implanted_slots(plan)}
        emptied = {
            s.tensor for group in plan.groups for s in group.slots if s.role != "consumer" and not keep[group.name]
        }
        uses = Counter(self.tensors[u] for n in self.graph.operations for u in n.all_input_nodes if u in self.tensors)
        repairs = {path[0]: (found, path[1:]) for found in residual_adds(self.graph) if (path := affine_path(found))}
        for node in self.graph.operations:
            if not any(used in self.changed or self.tensors.get(used) in cut for used in node.all_input_nodes):
                continue
            self.changed.add(node)
            weight = self.tensors.get(node.args[1]) if operation(node) in ("conv2d", "linear") else None
            if weight is None or weight in emptied or uses[weight] > 1 or isinstance(argument_of(node, 4), str):
                continue
            residual_add, path = repairs.get(node, (None, ()))
            self.fits[node] = Fit(node, weight, residual_add.add if residual_add else node, tuple(path), residual_add)

    def _depth_first(self) -> list[Job]:
        """Return all operations, each after those it needs; depth first, so that few values are held at a time."""
        order: dict[Job, None] = {}
        pending = [(self.job(True, self.graph.logits), False)]
        while pending:
            job, ready = pending.pop()
            if job in order or job[1] is self.graph.image:
                continue
            if ready:
                order[job] = None
            else:
                pending.append((job, True))
                pending.extend((need, False) for need in reversed(self.needs(job)))
        return list(order)
