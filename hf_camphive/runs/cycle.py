"""The steps of a cycle: trace -> score -> plan -> merge -> cut, and the polish after the last one.

Each step is a function of another module; this one holds what lies between them: the network as it is now and the plans
that led to it. Of datasets, accuracies and folders it knows nothing.
"""

import copy
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import ConfigError, PlanError
from hf_camphive.core.plan import PrunePlan
from hf_camphive.core.runtime import make_accelerator
from hf_camphive.hub.loading import BaseModel, as_base
from hf_camphive.network.graph.blocks import droppable_branches, exterior_groups
from hf_camphive.network.graph.program import named_tensors
from hf_camphive.network.graph.tracing import Trace, trace_network
from hf_camphive.network.surgery.cutting import State, apply_plan
from hf_camphive.network.surgery.verification import check_groups
from hf_camphive.pruning.merging.rules import MERGE_RULES, merge, with_pairs
from hf_camphive.pruning.merging.weights import zero_share, zero_weights
from hf_camphive.pruning.planning.budgets import dense_sizes, is_finished, next_targets
from hf_camphive.pruning.planning.costs import CostModel, CostTerm
from hf_camphive.pruning.planning.greedy import make_plan
from hf_camphive.pruning.planning.implants import with_implants
from hf_camphive.pruning.planning.latency.prediction import latency_parts
from hf_camphive.pruning.planning.latency.timing import LatencyTable
from hf_camphive.pruning.polish import Polished, polish
from hf_camphive.pruning.scoring.context import Scores, ScoringContext, SolverCheckpoint
from hf_camphive.pruning.scoring.criteria import CRITERIA
from hf_camphive.pruning.scoring.depth_weighting import best_early_weight, weighed
from hf_camphive.training.data.calibration import Calibration
from hf_camphive.training.evaluation import recalibrate_batchnorm
from hf_camphive.training.precision import polish_precision

logger = logging.getLogger(__name__)
HOLDOUT_STRIDE = 8  # one calibration image in so many judges trials and the polishing
TRIAL_STRIDE, MIN_HOLDOUT = 4, 16  # of the others one in so many is fitted in trials; fewer judges are left to luck
_IMPLANTS_START = {True: "fitted by least squares", False: "which nothing reads before finetuning"}
Batches = Iterable[Mapping[str, Tensor]]


class PruningSteps:
    """A copy of a network under way: `net` as it is now, `dense` as it was, and the `plans` in between.

    `scores` are those of the last plan, `seconds` what each step took, `notes` what a reader should know.
    """

    def __init__(
        self,
        model: BaseModel | nn.Module | str,
        config: CampHiVeConfig | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.config = config or CampHiVeConfig()
        self.accelerator = accelerator or make_accelerator(self.config)
        self.base = as_base(model)
        self.net = self._placed(copy.deepcopy(self.base.net))
        self.dense = self.net
        self.plans: list[PrunePlan] = []
        self.scores: Scores = {}
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self._traced: tuple[nn.Module, Trace] | None = None
        self._exterior: frozenset[str] | None = None
        self._table: LatencyTable | None = None

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Size (C, H, W) of the images that the network was made for."""
        return tuple(self.base.net.pretrained_cfg["input_size"])

    def check_budget(self) -> None:
        """Raise `PlanError` where nothing can be pruned or the floors do not allow the budget; needs no data."""
        self.next_target()

    def next_target(self) -> tuple[Trace, int]:
        """Channel groups of the network as it is now, and the MACs per image that the next cycle should leave."""
        trace = self._trace()
        network = self._budgeted(trace, named_tensors(self.net))
        if not self.config.cuts_channels:
            return trace, network.macs
        return trace, int(next_targets(network, self.plans, self.config).get("macs", network.macs))

    @property
    def finished(self) -> bool:
        """Whether all cycles are done, or earlier ones left nothing to do: a branch that goes whole may save more."""
        return is_finished(self.plans, self.config)

    def plan(
        self, calibration: Batches | Calibration, memory: SolverCheckpoint | None = None, scores: Scores | None = None
    ) -> PrunePlan:
        """Score the channels of the network as it is now, and plan the next cycle. No weight is touched.

        With granularity "weight" the plan cuts nothing; `apply` then scores and zeroes weights.
        `calibration` yields {"pixel_values": [N, C, H, W], "labels": [N]}. A criterion that iterates keeps where it
        stands in `memory`, and goes on from there; `scores` that were worked out before on the same network and images
        are taken as they are. Raises `PlanError` on a budget that cannot be
        met, and on a network with nothing to prune.
        """
        calibration = self._collected(calibration)
        trace = self._trace()
        state = named_tensors(self.net)
        network = self._budgeted(trace, state)
        if not self.config.cuts_channels:
            kind = (self.config.scored_by, self.config.merge)
            return PrunePlan(network.groups, network.branches, (), (), *kind, network.macs, network.macs)
        targets = next_targets(network, self.plans, self.config)
        if not self.plans:
            self._exterior = network.exterior
        with self._timed("score"), torch.no_grad():
            self.scores = (
                scores
                if scores is not None
                else CRITERIA[self.config.scored_by](self._context(trace, calibration, memory))
            )
        with self._timed("plan"):
            early_weight = self._early_weight(network, targets, trace, calibration)
            return self._planned(network, targets, trace, early_weight)

    def apply(
        self, plan: PrunePlan, calibration: Batches | Calibration | None = None, recalibrate: bool = True
    ) -> nn.Module:
        """Merge, cut and, where the merge rule asks for it, recalibrate BatchNorm; returns the new `net`.

        Without `recalibrate` the last step is left to the caller.

        Raises `PlanError` where the plan was made for another network, `ConfigError` where its merge rule looks at data
        and there is no calibration.
        """
        rule = MERGE_RULES[plan.merge]
        if calibration is None and (rule.looks_at_data or rule.recalibrate):
            raise ConfigError(
                f"merge rule {plan.merge!r} looks at images; pass the calibration loader to apply as well"
            )
        calibration = None if calibration is None else self._fitted(self._collected(calibration))
        trace = self._trace()
        if plan.groups != trace.groups:
            raise PlanError(
                "this plan was made for another network: its channel groups differ from those of this one; call plan again"
            )
        if not self.config.cuts_channels:
            self.net = self._with_zeros(trace, calibration)
        else:
            with self._timed("merge"):
                state = self._merged(plan, trace, calibration)
            with self._timed("cut"):
                self.net = apply_plan(self.net, plan, trace, state)
        if rule.recalibrate and recalibrate:
            with self._timed("recalibrate"):
                recalibrate_batchnorm(self.net, calibration.batches, self.accelerator)
        self.plans.append(plan)
        if plan.implants:
            self.notes.append(
                f"{sum(map(len, plan.implants.values()))} of the removed channels of cycle {len(self.plans)} keep 1x1 "
                f"kernels (neural implants), {_IMPLANTS_START[rule.mix is None]}."
            )
        return self.net

    def _merged(self, plan: PrunePlan, trace: Trace, calibration: Calibration | None) -> State:
        images = calibration.images if calibration else ()
        return merge(
            named_tensors(self.net), plan, trace, images, self.config, reduce=self._reduce, progress=self._progress
        )

    def polish(self, calibration: Batches | Calibration) -> nn.Module:
        """Bring the logits of `net` nearer to the dense network's by label-free steps, in place.

        The images that judge are those that `apply` held out of the merge.
        """
        fitted, held_out = self._collected(calibration).split(HOLDOUT_STRIDE)
        steps = self.config.label_free_steps
        with self._timed("polish"):
            polished = polish(
                self.net,
                self.dense,
                fitted,
                held_out,
                steps,
                recalibrated=self._recalibrated(fitted),
                seed=self.config.seed,
                precision=polish_precision(self.net, fitted.batches[0], self.config, self.accelerator),
                reduce=self._reduce,
                progress=self._progress,
            )
        self.notes.append(_polish_note(polished, steps, held_out.total))
        return self.net

    def _recalibrated(self, calibration: Calibration) -> nn.Module | None:
        """A copy with BatchNorm recalibrated, where the merge rule left its statistics as they were."""
        if MERGE_RULES[self.config.merge].recalibrate:
            return None
        net = copy.deepcopy(self.net)
        recalibrate_batchnorm(net, calibration.batches, self.accelerator)
        return net

    def _fitted(self, calibration: Calibration) -> Calibration:
        """What a merge may fit: all but the images that judge the polishing, where there is one."""
        return calibration.split(HOLDOUT_STRIDE)[0] if self.config.label_free_steps else calibration

    @property
    def _progress(self) -> bool:
        return self.accelerator.is_local_main_process

    def _placed(self, net: nn.Module) -> nn.Module:
        return net.to(self.accelerator.device, memory_format=torch.channels_last).eval()

    def _reduce(self, tensor: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return tensor
        return self.accelerator.reduce(tensor.to(self.accelerator.device), reduction="sum").to(tensor.device)

    def _collected(self, calibration: Batches | Calibration) -> Calibration:
        if isinstance(calibration, Calibration):
            return calibration
        accelerator = self.accelerator
        return Calibration.collect(
            calibration, accelerator.device, accelerator.process_index, accelerator.num_processes
        )

    def _trace(self) -> Trace:
        """Groups of the network as it is now, each guarded by experiment."""
        if self._traced is None or self._traced[0] is not self.net:
            with self._timed("trace"):
                trace = trace_network(self.net, self.input_size)
                trace = check_groups(self.net, trace, torch.Generator().manual_seed(self.config.seed))
            self._traced = (self.net, trace)
        return self._traced[1]

    def _context(
        self, trace: Trace, calibration: Calibration, memory: SolverCheckpoint | None = None
    ) -> ScoringContext:
        return ScoringContext(
            trace,
            named_tensors(self.net),
            calibration.images,
            calibration.labels,
            calibration.indices,
            calibration.total,
            self.config,
            self._reduce,
            self._progress,
            memory,
        )

    def _with_zeros(self, trace: Trace, calibration: Calibration) -> nn.Module:
        """A copy of the network with its less significant weights merged and zeroed, and a note of how many are."""
        net = copy.deepcopy(self.net)
        with self._timed("score and merge"), torch.no_grad():
            for name, weight in zero_weights(self._context(trace, calibration)).items():
                net.get_parameter(name).copy_(weight)
        self.notes.append(
            f"{zero_share(net, trace.positions):.1%} of the weights of {len(trace.positions)} convolutions and linear "
            "layers are zero, and finetuning keeps them so; nothing was cut: zeros save neither MACs nor time."
        )
        logger.info(self.notes[-1])
        return net

    def _budgeted(self, trace: Trace, state: Mapping[str, Tensor]) -> CostModel:
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        network = CostModel(
            trace.groups,
            droppable_branches(trace),
            exterior_groups(trace),
            trace.positions,
            shapes,
            frozenset(name for name, _ in self.net.named_parameters()),
            dense_sizes=dense_sizes(trace.groups, self.plans),
        )
        return replace(network, operations=self._operations(network, trace)) if self.config.target_latency else network

    def _operations(self, network: CostModel, trace: Trace) -> tuple[CostTerm, ...]:
        """What takes the network's time; measured by the main process, so that all plan by the same table."""
        table = self._table = self._table or LatencyTable(self.accelerator.device)
        arguments = (self.net, trace, network.branches, network.floors(self.config), table)
        options = {
            "batch": self.config.latency_batch_size,
            "folded": self.config.latency_folded,
            "step": self.config.width_step,
        }
        with self._timed("time layers"):
            if self.accelerator.num_processes > 1:
                if self.accelerator.is_main_process:
                    latency_parts(*arguments, **options, progress=self._progress)
                table.ms = broadcast_object_list([table.ms])[0]
            return latency_parts(*arguments, **options, progress=self._progress)

    def _planned(self, network: CostModel, targets: dict[str, float], trace: Trace, early_weight: float) -> PrunePlan:
        scores = weighed(self.scores, trace.groups, early_weight)

        def plan_for(macs: float) -> PrunePlan:
            return make_plan(network, scores, {**targets, "macs": macs}, self.config)

        if self.config.implant_ratio:
            ratio = self.config.implant_ratio
            plan = with_implants(plan_for, int(targets["macs"]), ratio, scores, trace, network.shapes)
        else:
            plan = make_plan(network, scores, targets, self.config)
        return with_pairs(plan, scores)

    @torch.no_grad()
    def _early_weight(
        self, network: CostModel, targets: dict[str, float], trace: Trace, calibration: Calibration
    ) -> float:
        """What scores of the first group count next to the last's: as told, or as trials on some of the images say.

        A trial plans, merges and cuts a copy of the network. Images held out of it tell how far its logits are from the
        dense network's, as a mean of distances: a few images make up most of a divergence.
        """
        if not self.config.tries_early_weights or calibration.total < HOLDOUT_STRIDE * MIN_HOLDOUT:
            return self.config.early_weight or 1.0
        fitted, judges = calibration.split(HOLDOUT_STRIDE)
        some = fitted.split(TRIAL_STRIDE)[1]
        targeted = [self.dense(images) for images in judges.images]

        def loss(weight: float) -> float:
            plan = self._planned(network, targets, trace, weight)
            net = apply_plan(self.net, plan, trace, self._merged(plan, trace, some))
            total = torch.zeros(1, dtype=torch.float64, device=self.accelerator.device)
            for images, given in zip(judges.images, targeted):
                total += torch.linalg.vector_norm((net(images) - given).double(), dim=1).sum()
            mean = float(self._reduce(total)) / judges.total
            logger.info("Trial with early weight %g: logits are %.4g from the dense network's", weight, mean)
            return mean

        weight = best_early_weight(loss)
        if weight < 1:
            self.notes.append(
                f"Scores of the first group counted {weight:g} times, those of later ones more, as {judges.total} "
                "calibration images held out of trial merges say."
            )
        return weight

    def _out_of_scope(self) -> frozenset[str]:
        """Groups of the dense network that the run was asked to leave alone."""
        if self.config.scope == "all":
            return frozenset()
        if self._exterior is None:  # a resumed run never traced the dense network
            self._exterior = exterior_groups(trace_network(self.dense, self.input_size))
        return self._exterior

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start


def _polish_note(polished: Polished, steps: int, judges: int) -> str:
    """What became of the polishing, in a sentence."""
    if not judges:
        return f"Not polished: fewer than {HOLDOUT_STRIDE} calibration images leave none to judge by."
    moves = {
        "BatchNorm's statistics went {:.0%} of the way to those of the calibration images": polished.statistics,
        f"the weights went {{:.0%}} of the way of {steps} gradient steps towards the base's logits": polished.weights,
    }
    by = f"as {judges} calibration images held out of the merge say"
    done = " and ".join(move.format(share) for move, share in moves.items() if share)
    return f"Polished without labels: {done}, {by}." if done else f"Not polished: no step helped, {by}."
