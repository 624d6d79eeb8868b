"""`CampHiVePruner`: one whole run, which prunes a network in cycles, finetunes, evaluates and saves it.

The steps of a cycle are in `cycle`, and the other steps are functions of other modules. The pruner holds what was measured
in between, and saves it so that an interrupted run can be resumed (`progress`).
"""

import copy
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import ConfigError
from hf_camphive.core.measures import Accuracy, Footprint, Latency, published
from hf_camphive.core.plan import PrunePlan
from hf_camphive.core.runtime import RunLog, environment
from hf_camphive.hub import saving
from hf_camphive.hub.loading import BaseModel, replace_head
from hf_camphive.hub.plots import draw_plots
from hf_camphive.hub.report import GroupRow, PruneReport, Stage
from hf_camphive.network.footprint import footprint, measure_latency
from hf_camphive.network.surgery.folding import fold
from hf_camphive.network.timm_interface import timm_interface
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


@dataclass(frozen=True)
class _RunInputs:
    """Arguments of `CampHiVePruner.run`; without a folder `work`, no state is saved for resuming."""

    loaders: Loaders
    command: str
    work: Path | None


class CampHiVePruner:
    """Prune one network.

    `model` is a `BaseModel`, a timm network, or anything that `load_base` accepts. `run` does all steps; `plan` and `apply`
    do one cycle, and the plan can be inspected in between. The given network is never changed: `net` is a copy.

    Raises:
        ModelError: The network cannot be found, read or pruned.
        ConfigError: The processes were launched in a way that cannot work.
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
        self._finetune_log: dict[str, Any] | None = None
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
        """The network that the run started from, and its origin."""
        return self.cycle.base

    @property
    def net(self) -> nn.Module:
        """The current network."""
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
        """Scores of the last plan, [C] per group of C channels."""
        return self.cycle.scores

    @property
    def log(self) -> RunLog:
        """Seconds of each step, and notes for the report."""
        return self.cycle.log

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Size (C, H, W) of the images that the network was made for."""
        return self.cycle.input_size

    def check_budget(self) -> None:
        """Check, without data, that something can be pruned and that the budget can be met within the width limits.

        Raises:
            PlanError: Nothing can be pruned, or the budget cannot be met.
        """
        self.cycle.check_budget()

    def plan(self, calibration: Batches | Calibration) -> PrunePlan:
        """Score the channels of the current network and plan the next cycle, without changing a weight.

        `calibration` yields {"pixel_values": [N, C, H, W], "labels": [N]}.

        Raises:
            PlanError: The budget cannot be met, or the network has nothing to prune.
        """
        return self.cycle.plan(calibration)

    def apply(self, plan: PrunePlan, calibration: Batches | Calibration | None = None) -> nn.Module:
        """Merge and cut the channels of a plan, recalibrate BatchNorm if the merge rule does, and return the new `net`.

        Raises:
            PlanError: The plan was made for another network.
            ConfigError: The plan's merge rule reads images and there is no calibration.
        """
        return self.cycle.apply(plan, calibration)

    def polish(self, calibration: Batches | Calibration) -> nn.Module:
        """Bring the logits of `net` closer to the dense network's by label-free steps, in place."""
        return self.cycle.polish(calibration)

    def run(
        self, loaders: Loaders, *, command: str = "", work_dir: Path | str | None = None, resume: bool = False
    ) -> PruneReport:
        """Prune in `config.cycles` cycles, polish and finetune as configured, measure each stage, and return the report.

        The report is also kept as `report`, with `command` as the command line to reproduce it. With a `work_dir`, the state
        of the run is saved there after each step; `resume` continues from it, also within an iterative scoring.

        Raises:
            PlanError: Nothing can be pruned, or the budget cannot be met.
            ConfigError: The state in `work_dir` is damaged or belongs to another run, or a new classifier has no training
                split.
            DataError: There are too few images.
            TrainingError: Training diverged, or the outputs of a network are not finite.
            OutputError: The state of the run cannot be saved.
        """
        inputs = _RunInputs(loaders, command, Path(work_dir) if work_dir else None)
        set_seed(self.config.seed)
        self._identity = run_identity(self.base, loaders.info) if inputs.work else {}
        if resume and inputs.work:
            self._restore(inputs.work, loaders)
        if not self.plans:
            self.check_budget()
        if "dense" not in self.stages:
            self._fit_head(loaders)
            self._measure("dense", inputs)
        self._prune(inputs)
        self._finetune(inputs, resume)
        self.report = self._report(loaders, command, latency=True)
        return self.report

    def _prune(self, inputs: _RunInputs) -> None:
        """Run the cycles and the polishing that are left to do."""
        to_polish = bool(self.config.label_free_steps) and "polished" not in self.stages
        if len(self.plans) < self.config.cycles or to_polish:
            with self.log.timed("read calibration images"):
                calibration = self.cycle.collected(inputs.loaders.calibration)
        checkpoint = IterationCheckpoint(inputs.work, self.accelerator.is_main_process) if inputs.work else None
        while not self.cycle.finished:
            plan = self.cycle.plan(calibration, checkpoint)
            logger.info("Cycle %d of %d:\n%s", len(self.plans) + 1, self.config.cycles, plan.summary())
            self.apply(plan, calibration)
            self._save_progress(inputs)
        if "pruned" not in self.stages:
            self._measure("pruned", inputs)
        if to_polish:
            self.polish(calibration)
            self._measure("polished", inputs)

    def _finetune(self, inputs: _RunInputs, resume: bool) -> None:
        """Finetune and evaluate, if that is configured and there are training images."""
        if not self.config.num_train_epochs:
            return
        if inputs.loaders.train is None:
            self.log.notes.append("Not finetuned: the dataset has no training split.")
            return
        checkpoints = training_folder(inputs.work) if inputs.work else None
        with self.log.timed("finetune"):
            log = finetune(
                self.net, inputs.loaders, self.config, self.accelerator, self.dense, checkpoints, resume=resume
            )
        self._finetune_log = log.to_dict()
        self._evaluate("finetuned", inputs.loaders)

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the model folder (safetensors, configs, plan, report, card, plots) and return it.

        The main process writes; all processes return or raise the same.

        Raises:
            OutputError: The folder holds something else, or a model and `overwrite` is not set, or it cannot be written.
        """
        report = self.report or self._report(None, "", latency=True)

        def save() -> Path:
            scores = {name: values.tolist() for name, values in self.scores.items()}
            plans = [*self.base.plans, *self.plans]
            model = saving.PrunedModel(_on_disk(self.net), self.base, self.config, plans, report)
            return saving.save_folder(folder, model, lambda plots: draw_plots(report, scores, plots), overwrite)

        return self.cycle.workers.on_main(save)

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
        """Save the model and upload it in one commit; return the repository's address.

        The main process uploads; all processes return or raise the same.

        Raises:
            OutputError: The upload fails.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = self.save_pretrained(Path(temporary, repo_id.split("/")[-1]))
            return self.cycle.workers.on_main(
                lambda: saving.push_folder(folder, repo_id, private=private, token=token)
            )

    def _fit_head(self, loaders: Loaders) -> None:
        """Replace and train the classifier if the dataset has another number of classes than the network.

        Raises:
            ConfigError: There is no training split to train it on.
        """
        names = loaders.info.label_names
        classes = timm_interface(self.net).num_classes
        if classes == len(names):
            self.cycle.name_labels(names)
            return
        self.log.note(
            f"The classifier of {classes} classes was replaced by one of {len(names)} and trained for "
            f"{self.config.head_epochs:g} epochs before pruning; 'dense' is that network."
        )
        if loaders.train is None:
            raise ConfigError(
                f"the network has {classes} classes, the dataset {len(names)} and no training split to fit "
                "a new classifier on; choose a dataset with one"
            )
        self.cycle.start_from(replace_head(self.base, names, self.config.seed))
        order = loaders.train.generator
        before = None if order is None else order.get_state()
        with self.log.timed("train the new classifier"):
            train_head(self.net, loaders, self.config, self.accelerator)
        if (
            order is not None and before is not None
        ):  # a resumed run skips this training and must finetune in the same order
            order.set_state(before)
        self.net.eval()
        self._head_replaced = True

    def _measure(self, stage: str, inputs: _RunInputs) -> None:
        """Evaluate the current network as a stage of the report, and save the state of the run."""
        self._evaluate(stage, inputs.loaders)
        self._save_progress(inputs)

    def _evaluate(self, stage: str, loaders: Loaders) -> None:
        loader, split = loaders.evaluation
        with self.log.timed("evaluate"):
            accuracy = evaluate_accuracy(self.net, loader, self.accelerator, split, f"Evaluate {stage}")
        self.stages = {**self.stages, stage: accuracy}

    def _save_progress(self, inputs: _RunInputs) -> None:
        """Save the state of the run for `resume`, if the run has a folder for it."""
        if (work := inputs.work) is None:
            return

        def save() -> None:
            dense = _on_disk(self.dense) if self._head_replaced else None
            report = self._report(inputs.loaders, inputs.command, latency=False)
            progress = Progress(_on_disk(self.net), dense, tuple(self.plans), report)
            save_progress(work, progress, self.base, self.config, self._identity)

        self.cycle.workers.on_main(save)

    def _restore(self, work: Path, loaders: Loaders) -> None:
        """Restore the state that an interrupted run left in the folder `work`, if there is any.

        Raises:
            ConfigError: The state is damaged, or belongs to another run.
            OutputError: The folder holds something else.
        """
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
        self.cycle.continue_from(progress.net, progress.plans)
        self.stages = {stage.name: stage.accuracy for stage in progress.report.stages if stage.accuracy}
        self.log.seconds |= progress.report.seconds
        self.log.notes[:] = progress.report.notes
        logger.info("Resumed after cycle %d of %d", len(self.plans), self.config.cycles)

    def _report(self, loaders: Loaders | None, command: str, latency: bool) -> PruneReport:
        """Return the report of the run so far; `latency` tells whether to measure it."""
        costs = self._costs(latency)
        stages = {**dict.fromkeys(costs), **self.stages}
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
            finetune=self._finetune_log,
            seconds={step: round(seconds, 3) for step, seconds in self.log.seconds.items()},
            environment=environment(self.accelerator.device, self.accelerator.num_processes),
            tuning=tuning.as_dict(),
        )

    def _costs(self, latency: bool) -> dict[str, Footprint]:
        """Return the footprints of the dense network and, after the first cycle, of the pruned one."""
        nets = {"dense": self.dense, "pruned": self.net} if self.plans else {"dense": self.dense}
        times: Mapping[str, dict[int, Latency]] = {}
        if latency:
            with self.log.timed("measure latency"):
                times = self.cycle.workers.on_main(lambda: self._latencies(nets))
        return {
            name: footprint(net, self.input_size, times.get(name), times.get(f"{name} folded"))
            for name, net in nets.items()
        }

    def _latencies(self, nets: Mapping[str, nn.Module]) -> dict[str, dict[int, Latency]]:
        """Measure the latency of each network and, under "<name> folded", of its folded form for deployment."""
        folded = {f"{name} folded": fold(net, self.input_size) for name, net in nets.items()}
        return measure_latency({**nets, **folded}, self.input_size, self._batch_sizes())

    def _batch_sizes(self) -> list[int]:
        """Return the batch sizes whose latency is measured."""
        return sorted({1, 32} | ({self.config.latency_batch_size} if self.config.target_latency else set()))


def _group_rows(plans: Sequence[PrunePlan], exterior: frozenset[str]) -> tuple[GroupRow, ...]:
    """Return the width of every group before the first cycle and after the last; groups in `exterior` are out of scope.

    A group is named after its first layer. Once that layer is dropped with its branch, the rest of the group has another
    name, under which the last plan lists it.
    """
    last = plans[-1]
    at = {(slot.tensor, slot.axis): group.name for group in last.groups for slot in group.slots}
    rows = []
    for group in plans[0].groups:
        names = [group.name, *(at.get((slot.tensor, slot.axis), "") for slot in group.slots)]
        kept = next((last.keep[name] for name in names if name in last.keep), ())
        in_scope = group.name not in exterior
        rows.append(GroupRow(group.name, group.size, len(kept), group.frozen, in_scope))
    return tuple(rows)


def _on_disk(net: nn.Module) -> nn.Module:
    """Return a copy for saving: on the CPU, in contiguous memory format."""
    return copy.deepcopy(net).cpu().to(memory_format=torch.contiguous_format)
