"""`CampHiVePruner`: load -> prune in cycles -> finetune -> evaluate -> save, and nothing else.

The cycles' own steps are in `steps`, everything else is a function of another module; this one holds what was measured
on the way, and keeps it for a run that has to be resumed.
"""

import copy
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import ConfigError
from hf_camphive.core.measures import Accuracy, Latency, published
from hf_camphive.core.plan import PrunePlan
from hf_camphive.core.runtime import RunLog, environment
from hf_camphive.hub import saving
from hf_camphive.hub.loading import BaseModel, replace_head
from hf_camphive.hub.plots import draw_plots
from hf_camphive.hub.report import GroupRow, PruneReport, Stage
from hf_camphive.network.footprint import footprint, measure_latency
from hf_camphive.network.surgery.folding import fold
from hf_camphive.pruning import tuning
from hf_camphive.pruning.planning.budgets import overall_budgets
from hf_camphive.pruning.scoring.context import Scores
from hf_camphive.runs.cycle import Batches, PruningCycle
from hf_camphive.runs.progress import (
    IterationCheckpoint,
    Progress,
    load_progress,
    put_back,
    run_identity,
    save_progress,
    training_folder,
)
from hf_camphive.training.data.calibration import Calibration
from hf_camphive.training.data.loaders import Loaders
from hf_camphive.training.evaluation import evaluate_accuracy
from hf_camphive.training.finetuning import finetune, train_head

logger = logging.getLogger(__name__)


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
        self.cycle = PruningCycle(model, config, accelerator)
        self.stages: dict[str, Accuracy] = {}
        self.report: PruneReport | None = None
        self._finetune: dict[str, Any] | None = None
        self._head_replaced = False
        self._identity: dict[str, Any] = {}

    @property
    def config(self) -> CampHiVeConfig:
        """Settings of the run."""
        return self.cycle.config

    @property
    def accelerator(self) -> Accelerator:
        """The process's accelerator."""
        return self.cycle.accelerator

    @property
    def base(self) -> BaseModel:
        """The network that the run started from, and where it came from."""
        return self.cycle.base

    @property
    def net(self) -> nn.Module:
        """The network as it is now."""
        return self.cycle.net

    @property
    def dense(self) -> nn.Module:
        """The network before the first cycle."""
        return self.cycle.dense

    @property
    def plans(self) -> list[PrunePlan]:
        """Plans of the cycles so far."""
        return self.cycle.plans

    @property
    def scores(self) -> Scores:
        """Scores of the last plan, [C] for each group."""
        return self.cycle.scores

    @property
    def log(self) -> RunLog:
        """Seconds of each step, and notes."""
        return self.cycle.log

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Size (C, H, W) of the images that the network was made for."""
        return self.cycle.input_size

    def check_budget(self) -> None:
        """Check, without data, that something can be pruned and that the floors allow the budget.

        Raises:
            PlanError: Nothing can be pruned, or the budget cannot be met.
        """
        self.cycle.check_budget()

    def plan(self, calibration: Batches | Calibration) -> PrunePlan:
        """Score the channels of the network as it is now, and plan the next cycle. No weight is touched.

        `calibration` yields {"pixel_values": [N, C, H, W], "labels": [N]}.

        Raises:
            PlanError: The budget cannot be met, or the network has nothing to prune.
        """
        return self.cycle.plan(calibration)

    def apply(self, plan: PrunePlan, calibration: Batches | Calibration | None = None) -> nn.Module:
        """Merge, cut and, where the merge rule asks for it, recalibrate BatchNorm; returns the new `net`.

        Raises:
            PlanError: The plan was made for another network.
            ConfigError: The plan's merge rule reads images and there is no calibration.
        """
        return self.cycle.apply(plan, calibration)

    def polish(self, calibration: Batches | Calibration) -> nn.Module:
        """Bring the logits of `net` nearer to the dense network's by label-free steps, in place."""
        return self.cycle.polish(calibration)

    def run(
        self, loaders: Loaders, *, command: str = "", work_dir: Path | str | None = None, resume: bool = False
    ) -> PruneReport:
        """Prune in `config.cycles` cycles, finetune, evaluate before and after; returns the report (also `report`).

        With a `work_dir`, what was done so far is kept there, and `resume` goes on from it, also in the midst of an
        iteration that scores.
        """
        work = Path(work_dir) if work_dir else None
        set_seed(self.config.seed)
        self._identity = run_identity(self.base, loaders.info) if work else {}
        if resume and work:
            self._restore(work, loaders)
        if not self.plans:
            self.check_budget()
        loader, split = loaders.evaluation
        if "dense" not in self.stages:
            self._fit_head(loaders)
            self._evaluate("dense", self.net, loader, split)
            self._keep(work, loaders, command)
        checkpoint = IterationCheckpoint(work, self.accelerator.is_main_process) if work else None
        to_polish = bool(self.config.label_free_steps) and "polished" not in self.stages
        if len(self.plans) < self.config.cycles or to_polish:
            with self.log.timed("read calibration images"):
                calibration = self.cycle.collected(loaders.calibration)
        while not self.cycle.finished:
            plan = self.cycle.plan(calibration, checkpoint)
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
            self.log.notes.append("Not finetuned: the dataset has no training split.")
        elif self.config.num_train_epochs:
            with self.log.timed("finetune"):
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

        Raises:
            OutputError: Where the folder holds something else, or a model and `overwrite` is not set.
        """
        report = self.report or self._report(None, "", latency=True)

        def save() -> Path:
            scores = {name: values.tolist() for name, values in self.scores.items()}
            plans = [*self.base.plans, *self.plans]
            model = saving.PrunedModel(_on_disk(self.net), self.base, self.config, plans, report)
            return saving.save_folder(folder, model, lambda plots: draw_plots(report, scores, plots), overwrite)

        return self.cycle.workers.on_main(save)

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> str | None:
        """Save and upload in one commit; returns the repo's address (None on all processes but the main one)."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = self.save_pretrained(Path(temporary, repo_id.split("/")[-1]))
            if not self.accelerator.is_main_process:
                return None
            return saving.push_folder(folder, repo_id, private=private, token=token)

    def _fit_head(self, loaders: Loaders) -> None:
        """Replace and train the classifier where the dataset has other classes than the network."""
        names = loaders.info.label_names
        if self.net.num_classes == len(names):
            self.cycle.name_labels(names)
            return
        self.log.note(
            f"The classifier of {self.net.num_classes} classes was replaced by one of {len(names)} and trained for "
            f"{self.config.head_epochs:g} epochs before pruning; 'dense' is that network."
        )
        if loaders.train is None:
            raise ConfigError(
                f"the network has {self.net.num_classes} classes, the dataset {len(names)} and no training split to fit "
                "a new classifier on; choose a dataset with one"
            )
        self.cycle.start_from(replace_head(self.base, names, self.config.seed))
        order = loaders.train.generator
        before = None if order is None else order.get_state()
        with self.log.timed("train the new classifier"):
            train_head(self.net, loaders, self.config, self.accelerator)
        if order is not None:  # a resumed run does not train it again, and must finetune in the same order
            order.set_state(before)
        self.net.eval()
        self._head_replaced = True

    def _evaluate(self, stage: str, net: nn.Module, loader: Batches, split: str) -> None:
        with self.log.timed("evaluate"):
            accuracy = evaluate_accuracy(net, loader, self.accelerator, split, f"Evaluate {stage}")
        self.stages = {**self.stages, stage: accuracy}

    def _keep(self, work: Path | None, loaders: Loaders, command: str) -> None:
        """Put the state of the run on disk, for `resume`."""
        if work is None:
            return

        def save() -> None:
            dense = _on_disk(self.dense) if self._head_replaced else None
            report = self._report(loaders, command, latency=False)
            progress = Progress(_on_disk(self.net), dense, tuple(self.plans), report)
            save_progress(work, progress, self.base, self.config, self._identity)

        self.cycle.workers.on_main(save)

    def _restore(self, work: Path, loaders: Loaders) -> None:
        """Take up the state that a killed run of the same kind left on disk."""
        self.cycle.workers.on_main(lambda: put_back(work))
        progress = load_progress(work, self.config, self._identity)
        if progress is None:
            return
        self._head_replaced = progress.report.head_replaced
        names = loaders.info.label_names
        if progress.dense is None:
            self.cycle.name_labels(names)
        else:
            self.cycle.start_from(replace(self.base, net=progress.dense, label_names=names))
        self.cycle.go_on_with(progress.net, progress.plans)
        self.stages = {stage.name: stage.accuracy for stage in progress.report.stages if stage.accuracy}
        self.log.seconds |= progress.report.seconds
        self.log.notes[:] = progress.report.notes
        logger.info("Resumed after cycle %d of %d", len(self.plans), self.config.cycles)

    def _report(self, loaders: Loaders | None, command: str, latency: bool) -> PruneReport:
        nets = {"dense": self.dense, "pruned": self.net} if self.plans else {"dense": self.dense}
        times: dict[str, Any] = dict.fromkeys(nets)
        if latency:
            with self.log.timed("measure latency"):
                times = self.cycle.workers.on_main(lambda: self._latencies(nets))
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
            config=self.config.as_run(),
            command=command,
            head_replaced=self._head_replaced,
            groups=_group_rows(self.plans, self.cycle.out_of_scope) if self.plans else (),
            dropped=tuple(module for plan in self.plans for module in plan.dropped),
            budgets=overall_budgets(self.plans, self.config),
            notes=tuple(self.log.notes),
            finetune=self._finetune,
            seconds={step: round(seconds, 3) for step, seconds in self.log.seconds.items()},
            environment=environment(self.accelerator.device, self.accelerator.num_processes),
            tuning=tuning.as_dict(),
        )

    def _latencies(self, nets: Mapping[str, nn.Module]) -> dict[str, dict[int, Latency]]:
        """Latency of each network as it is and, as "<name> folded", as it would be deployed."""
        folded = {f"{name} folded": fold(net, self.input_size) for name, net in nets.items()}
        return measure_latency({**nets, **folded}, self.input_size, self._batch_sizes())

    def _batch_sizes(self) -> list[int]:
        """Batch sizes whose latency is measured."""
        return sorted({1, 32} | ({self.config.latency_batch_size} if self.config.target_latency else set()))


def _group_rows(plans: Sequence[PrunePlan], exterior: frozenset[str]) -> tuple[GroupRow, ...]:
    """Width of every group before the first cycle and after the last.

    A group is named after its first layer; where that one went with its branch, what is left has another name.
    """
    last = plans[-1]
    at = {(slot.tensor, slot.axis): group.name for group in last.groups for slot in group.slots}
    rows = []
    for group in plans[0].groups:
        names = [group.name, *(at.get((slot.tensor, slot.axis)) for slot in group.slots)]
        kept = next((last.keep[name] for name in names if name in last.keep), ())
        in_scope = group.name not in exterior
        rows.append(GroupRow(group.name, group.size, len(kept), group.frozen, in_scope))
    return tuple(rows)


def _on_disk(net: nn.Module) -> nn.Module:
    """A copy as it is saved: on the CPU, in plain memory format."""
    return copy.deepcopy(net).cpu().to(memory_format=torch.contiguous_format)
