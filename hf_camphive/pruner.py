"""`CampHiVePruner`: load -> trace -> score -> plan -> merge -> cut -> finetune -> evaluate -> save, and nothing else.

Each step is a function of another module; this one holds the state between them: the network as it is now, the plans
that led to it, and what was measured on the way.
"""

import copy
import logging
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import hub
from .branches import droppable_branches, exterior_groups
from .calibration import Calibration
from .config import CampHiVeConfig
from .criteria import CRITERIA
from .data import Loaders
from .errors import ConfigError, ModelError, PlanError
from .evaluation import evaluate_accuracy, recalibrate_batchnorm
from .evidence import Evidence, Memory, Scores
from .folding import fold_batchnorm
from .graph import named_tensors
from .implants import with_implants
from .latency import LatencyTable, latency_parts
from .launch import make_accelerator
from .merging import MERGE_RULES, merge, with_pairs
from .models import BaseModel, load_base, replace_head
from .plan import Budget, PrunePlan, format_cost
from .planning import Budgeted, Part, how_to_reach_lower, make_plan, smallest
from .plots import draw_plots
from .polish import polish
from .precision import polish_precision
from .report import Accuracy, GroupRow, PruneReport, Stage, environment, footprint, measure_latency, published
from .resume import IterationMemory, Progress, load_progress, save_progress, training_folder
from .surgery import apply_plan, check_groups
from .tracing import Trace, trace_network
from .training import finetune, train_head
from .weight_pruning import zero_share, zero_weights

logger = logging.getLogger(__name__)
_IMPLANTS_START = {True: "fitted by least squares", False: "which nothing reads before finetuning"}
Batches = Iterable[Mapping[str, Tensor]]


class CampHiVePruner:
    """Prune one network.

    `model` is a `BaseModel`, a timm network, or anything that `load_base` accepts. `run` does the whole job; `plan` and
    `apply` are its two halves, for a look at the plan in between. The given network is never changed: `net` is a copy.
    """

    def __init__(
        self,
        model: BaseModel | nn.Module | str,
        config: CampHiVeConfig | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.config = config or CampHiVeConfig()
        self.accelerator = accelerator or make_accelerator(self.config)
        self.base = _as_base(model)
        self.net = self._placed(copy.deepcopy(self.base.net))
        self.dense = self.net
        self.plans: list[PrunePlan] = []
        self.scores: Scores = {}
        self.stages: dict[str, Accuracy] = {}
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self.report: PruneReport | None = None
        self._finetune: dict[str, Any] | None = None
        self._head_replaced = False
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
        if self.config.granularity == "weight":
            return trace, network.macs
        return trace, int(self._targets(network).get("macs", network.macs))

    @property
    def _cuts(self) -> bool:
        """Whether channels are cut; single weights are zeroed otherwise, and stay zero."""
        return self.config.granularity == "channel"

    @property
    def finished(self) -> bool:
        """Whether all cycles are done, or earlier ones left nothing to do: a branch that goes whole may save more."""
        return len(self.plans) >= self.config.cycles or self._budgets_met()

    # The two halves of a cycle

    def plan(
        self, calibration: Batches | Calibration, memory: Memory | None = None, scores: Scores | None = None
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
        if self.config.granularity == "weight":
            kind = (self.config.criterion, self.config.merge)
            return PrunePlan(network.groups, network.branches, (), (), *kind, network.macs, network.macs)
        targets = self._targets(network)
        if not self.plans:
            self._exterior = network.exterior
        with self._timed("score"), torch.no_grad():
            self.scores = (
                scores
                if scores is not None
                else CRITERIA[self.config.criterion](self._evidence(trace, calibration, memory))
            )
        with self._timed("plan"):
            return with_pairs(self._planned(network, targets, trace), self.scores)

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
        calibration = None if calibration is None else self._collected(calibration)
        trace = self._trace()
        if plan.groups != trace.groups:
            raise PlanError(
                "this plan was made for another network: its channel groups differ from those of this one; call plan again"
            )
        if self.config.granularity == "weight":
            self.net = self._with_zeros(trace, calibration)
        else:
            with self._timed("merge"):
                state = merge(
                    named_tensors(self.net),
                    plan,
                    trace,
                    calibration.images if calibration else (),
                    self.config,
                    reduce=self._reduce,
                    progress=self._progress,
                )
            with self._timed("cut"):
                self.net = apply_plan(self.net, plan, trace, state)
        if rule.recalibrate and recalibrate:
            with self._timed("recalibrate"):
                batches = [{"pixel_values": x, "labels": y} for x, y in zip(calibration.images, calibration.labels)]
                recalibrate_batchnorm(self.net, batches, self.accelerator)
        self.plans.append(plan)
        if plan.implants:
            self.notes.append(
                f"{sum(map(len, plan.implants.values()))} of the removed channels of cycle {len(self.plans)} keep 1x1 "
                f"kernels (neural implants), {_IMPLANTS_START[rule.mix is None]}."
            )
        return self.net

    def polish(self, calibration: Batches | Calibration) -> nn.Module:
        """Bring the logits of `net` nearer to the dense network's by `config.polish_steps` label-free steps, in place."""
        calibration = self._collected(calibration)
        with self._timed("polish"):
            batch = {"pixel_values": calibration.images[0], "labels": calibration.labels[0]}
            polish(
                self.net,
                self.dense,
                calibration,
                self.config.polish_steps,
                seed=self.config.seed,
                precision=polish_precision(self.net, batch, self.config, self.accelerator),
                reduce=self._reduce,
                progress=self._progress,
            )
        return self.net

    # The whole job

    def run(
        self, loaders: Loaders, *, command: str = "", work_dir: Path | str | None = None, resume: bool = False
    ) -> PruneReport:
        """Prune in `config.cycles` cycles, finetune, evaluate before and after; returns the report (also `report`).

        With a `work_dir`, what was done so far is kept there, and `resume` goes on from it, also in the midst of an
        iteration that scores.
        """
        work = Path(work_dir) if work_dir else None
        set_seed(self.config.seed)
        if resume and work:
            self._restore(work, loaders)
        if not self.plans:
            self.check_budget()
        loader, split = loaders.evaluation
        if "dense" not in self.stages:
            self._fit_head(loaders)
            self._evaluate("dense", self.net, loader, split)
            self._keep(work, loaders, command)
        memory = IterationMemory(work, self.accelerator.is_main_process) if work else None
        to_polish = bool(self.config.polish_steps) and self._cuts and "polished" not in self.stages
        if len(self.plans) < self.config.cycles or to_polish:
            with self._timed("read calibration images"):
                calibration = self._collected(loaders.calibration)
        while not self.finished:
            plan = self.plan(calibration, memory)
            logger.info("Cycle %d of %d:\n%s", len(self.plans) + 1, self.config.cycles, plan.summary())
            self.apply(plan, calibration)
            self._keep(work, loaders, command)
        if "pruned" not in self.stages:
            self._evaluate("pruned", self.net, loader, split)
            self._keep(work, loaders, command)
        if to_polish:
            self.polish(calibration)
            self._evaluate("polished", self.net, loader, split)
            self._keep(work, loaders, command)
        if self.config.num_train_epochs and loaders.train is None:
            self.notes.append("Not finetuned: the dataset has no training split.")
        elif self.config.num_train_epochs:
            with self._timed("finetune"):
                checkpoints = training_folder(work) if work else None
                log = finetune(
                    self.net, loaders, self.config, self.accelerator, self.dense, checkpoints, resume=resume
                )
            self._finetune = log.to_dict()
            self._evaluate("finetuned", self.net, loader, split)
        self.report = self._report(loaders, command, latency=True)
        return self.report

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the model folder (safetensors, configs, plan, report, card, plots); returns it.

        Raises `OutputError` where the folder holds something else, or a model and `overwrite` is not set.
        """
        report = self.report or self._report(None, "", latency=True)
        path = Path(folder).expanduser().resolve()
        if self.accelerator.is_main_process:
            scores = {name: values.tolist() for name, values in self.scores.items()}
            path = hub.save_folder(
                folder,
                _on_disk(self.net),
                self.base,
                self.config,
                [*self.base.plans, *self.plans],
                report,
                lambda plots: draw_plots(report, scores, plots),
                overwrite,
            )
        self.accelerator.wait_for_everyone()
        return path

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> str | None:
        """Save and upload in one commit; returns the repo's address (None on all processes but the main one)."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = self.save_pretrained(Path(temporary, repo_id.split("/")[-1]))
            if not self.accelerator.is_main_process:
                return None
            return hub.push_folder(folder, repo_id, private=private, token=token)

    # What the steps share

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

    def _evidence(self, trace: Trace, calibration: Calibration, memory: Memory | None = None) -> Evidence:
        return Evidence(
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
            for name, weight in zero_weights(self._evidence(trace, calibration)).items():
                net.get_parameter(name).copy_(weight)
        self.notes.append(
            f"{zero_share(net, trace.positions):.1%} of the weights of {len(trace.positions)} convolutions and linear "
            "layers are zero, and finetuning keeps them so; nothing was cut: zeros save neither MACs nor time."
        )
        logger.info(self.notes[-1])
        return net

    def _budgeted(self, trace: Trace, state: Mapping[str, Tensor]) -> Budgeted:
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        network = Budgeted(
            trace.groups,
            droppable_branches(trace),
            exterior_groups(trace),
            trace.positions,
            shapes,
            frozenset(name for name, _ in self.net.named_parameters()),
            dense_sizes=self._dense_sizes(trace),
        )
        return replace(network, operations=self._operations(network, trace)) if self.config.target_latency else network

    def _dense_sizes(self, trace: Trace) -> dict[str, int]:
        """Width before the first cycle of each group."""
        groups = self.plans[0].groups if self.plans else trace.groups
        at = {(slot.tensor, slot.axis): group.size for group in groups for slot in group.slots}
        slots = {group.name: group.slots[0] for group in trace.groups}
        return {name: at[slot.tensor, slot.axis] for name, slot in slots.items() if (slot.tensor, slot.axis) in at}

    def _operations(self, network: Budgeted, trace: Trace) -> tuple[Part, ...]:
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

    def _asked(self, dense: Mapping[str, float]) -> dict[str, float]:
        """What each budget comes to, for a network with these costs before the first cycle."""
        return {
            cost: target * dense[cost] if target < 1 or (target == 1 and cost != "latency") else target
            for cost, target in self.config.budgets.items()
        }

    def _budgets_met(self) -> bool:
        """Whether earlier cycles left nothing to do: a branch that goes whole may save more than was asked for."""
        return bool(self.plans) and all(budget.after <= budget.target for budget in self._budgets())

    def _budgets(self) -> tuple[Budget, ...]:
        """Each budget from the network before the first cycle to the last plan's."""
        if not self.plans or not self.plans[0].budgets:
            return ()
        dense = {budget.cost: budget.before for budget in self.plans[0].budgets}
        after = {budget.cost: budget.after for budget in self.plans[-1].budgets}
        return tuple(Budget(cost, dense[cost], target, after[cost]) for cost, target in self._asked(dense).items())

    def _targets(self, network: Budgeted) -> dict[str, float]:
        """The costs after the next cycle: every cycle removes the same share of what is left."""
        now = network.costs()
        dense = {budget.cost: budget.before for budget in self.plans[0].budgets} if self.plans else now
        asked = self._asked(dense)
        least = smallest(network, asked, self.config)
        for cost, target in asked.items():
            if target >= dense[cost]:
                raise PlanError(
                    f"the budget of {format_cost(cost, target)} is no less than the network's {format_cost(cost, dense[cost])}; lower it"
                )
            if least[cost] > target:
                raise PlanError(
                    f"a budget of {format_cost(cost, target)} ({target / dense[cost]:.1%}) is below the smallest that the "
                    f"floors allow, {format_cost(cost, least[cost])} ({least[cost] / dense[cost]:.1%}); raise target_{cost}"
                    + how_to_reach_lower(self.config)
                )
        to_go = max(1, self.config.cycles - len(self.plans))
        return {
            cost: target if to_go == 1 or now[cost] <= target else now[cost] * (target / now[cost]) ** (1 / to_go)
            for cost, target in asked.items()
        }

    def _planned(self, network: Budgeted, targets: dict[str, float], trace: Trace) -> PrunePlan:
        def plan_for(macs: float) -> PrunePlan:
            return make_plan(network, self.scores, {**targets, "macs": macs}, self.config)

        if not self.config.implant_ratio:
            return make_plan(network, self.scores, targets, self.config)
        return with_implants(
            plan_for, int(targets["macs"]), self.config.implant_ratio, self.scores, trace, network.shapes
        )

    def _fit_head(self, loaders: Loaders) -> None:
        """Replace and train the classifier where the dataset has other classes than the network."""
        names = loaders.info.label_names
        if self.net.num_classes == len(names):
            if self.base.label_names is None:
                self.base = replace(self.base, label_names=names)
            return
        self.notes.append(
            f"The classifier of {self.net.num_classes} classes was replaced by one of {len(names)} and trained for "
            f"{self.config.head_epochs:g} epochs before pruning; 'dense' is that network."
        )
        logger.info(self.notes[-1])
        if loaders.train is None:
            raise ConfigError(
                f"the network has {self.net.num_classes} classes, the dataset {len(names)} and no training split to fit "
                "a new classifier on; choose a dataset with one"
            )
        self.base = replace_head(self.base, names, self.config.seed)
        self.net = self.dense = self._placed(copy.deepcopy(self.base.net))
        order = loaders.train.generator
        before = None if order is None else order.get_state()
        with self._timed("train the new classifier"):
            train_head(self.net, loaders, self.config, self.accelerator)
        if order is not None:  # a resumed run does not train it again, and must finetune in the same order
            order.set_state(before)
        self.net.eval()
        self._head_replaced = True

    def _evaluate(self, stage: str, net: nn.Module, loader: Batches, split: str) -> None:
        with self._timed("evaluate"):
            self.stages[stage] = evaluate_accuracy(net, loader, self.accelerator, split, f"Evaluate {stage}")

    def _keep(self, work: Path | None, loaders: Loaders, command: str) -> None:
        """Put the state of the run on disk, for `resume`."""
        if work and self.accelerator.is_main_process:
            dense = _on_disk(self.dense) if self._head_replaced else None
            report = self._report(loaders, command, latency=False)
            save_progress(work, Progress(_on_disk(self.net), dense, tuple(self.plans), report), self.base, self.config)
        self.accelerator.wait_for_everyone()

    def _restore(self, work: Path, loaders: Loaders) -> None:
        """Take up the state that a killed run of the same kind left on disk."""
        progress = load_progress(work, self.config, self.base.model_id, loaders.info.dataset_id)
        if progress is None:
            return
        self._head_replaced = progress.report.head_replaced
        if progress.dense is not None:
            self.base = replace(self.base, net=progress.dense, label_names=loaders.info.label_names)
            self.dense = self._placed(progress.dense)
        elif self.base.label_names is None:
            self.base = replace(self.base, label_names=loaders.info.label_names)
        self.net = self._placed(progress.net)
        self.plans = list(progress.plans)
        self.stages = {stage.name: stage.accuracy for stage in progress.report.stages if stage.accuracy}
        self.seconds = dict(progress.report.seconds)
        self.notes = list(progress.report.notes)
        logger.info("Resumed after cycle %d of %d", len(self.plans), self.config.cycles)

    def _report(self, loaders: Loaders | None, command: str, latency: bool) -> PruneReport:
        nets = {"dense": self.dense, "pruned": self.net} if self.plans else {"dense": self.dense}
        times: dict[str, Any] = dict.fromkeys(nets)
        if latency:
            with self._timed("measure latency"):
                folded = {f"{name} folded": fold_batchnorm(net, self.input_size) for name, net in nets.items()}
                times = measure_latency(nets | folded, self.input_size, self._batch_sizes())
        costs = {
            name: footprint(net, self.input_size, times[name], times.get(f"{name} folded"))
            for name, net in nets.items()
        }
        stages = {**dict.fromkeys(nets), **self.stages}
        info = loaders.info if loaders else None
        return PruneReport(
            model_id=published(self.base.model_id),
            revision=self.base.revision,
            architecture=self.base.architecture,
            license=self.base.license,
            dataset_id=published(info.dataset_id) if info else "not given",
            dataset_revision=info.revision if info else None,
            splits=dict(info.splits) if info else {},
            rows=dict(info.rows) if info else {},
            input_size=self.input_size,
            stages=tuple(
                Stage(name, costs["dense" if name == "dense" else "pruned"], accuracy)
                for name, accuracy in stages.items()
            ),
            config=asdict(self.config),
            command=command,
            head_replaced=self._head_replaced,
            groups=self._group_rows(),
            dropped=tuple(module for plan in self.plans for module in plan.dropped),
            budgets=self._budgets(),
            notes=tuple(self.notes),
            finetune=self._finetune,
            seconds={step: round(seconds, 3) for step, seconds in self.seconds.items()},
            environment=environment(self.accelerator.device, self.accelerator.num_processes),
        )

    def _batch_sizes(self) -> list[int]:
        """Batch sizes whose latency is measured."""
        return sorted({1, 32} | ({self.config.latency_batch_size} if self.config.target_latency else set()))

    def _group_rows(self) -> tuple[GroupRow, ...]:
        """Width of every group before the first cycle and after the last.

        A group is named after its first layer; where that one went with its branch, what is left has another name.
        """
        if not self.plans:
            return ()
        last, exterior = self.plans[-1], self._out_of_scope()
        at = {(slot.tensor, slot.axis): group.name for group in last.groups for slot in group.slots}
        rows = []
        for group in self.plans[0].groups:
            names = [group.name, *(at.get((slot.tensor, slot.axis)) for slot in group.slots)]
            kept = next((last.keep[name] for name in names if name in last.keep), ())
            in_scope = group.name not in exterior
            rows.append(GroupRow(group.name, group.size, len(kept), group.frozen, in_scope))
        return tuple(rows)

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


def _on_disk(net: nn.Module) -> nn.Module:
    """A copy as it is saved: on the CPU, in plain memory format."""
    return copy.deepcopy(net).cpu().to(memory_format=torch.contiguous_format)


def _as_base(model: BaseModel | nn.Module | str) -> BaseModel:
    if isinstance(model, BaseModel):
        return model
    if isinstance(model, str):
        return load_base(model)
    model = getattr(model, "timm_model", model)  # transformers' wrapper of timm networks
    if isinstance(model, PreTrainedModel):
        raise ModelError(
            f"{type(model).__name__} is written by transformers itself, which builds it from one width for all layers, so "
            "that it could not be read back at others; give the same network from timm"
        )
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(model, nn.Module) or not config or not config.get("architecture"):
        raise ModelError(
            f"cannot prune a {type(model).__name__}; give a network of timm.create_model, a Hub id or a folder"
        )
    return BaseModel(
        net=model,
        architecture=config["architecture"],
        model_args={},
        model_id=config.get("hf_hub_id") or config["architecture"],
        revision=None,
        license=config.get("license"),
        label_names=tuple(config["label_names"]) if config.get("label_names") else None,
    )
