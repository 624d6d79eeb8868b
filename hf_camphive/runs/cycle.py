"""The steps of a pruning cycle: trace -> score -> plan -> merge -> cut, and the polishing after the last cycle.

Each step is a function of another module; `PruningCycle` holds the state between steps: the current network and the plans
that were applied to it. It opens no dataset, measures no accuracy and writes no file.
"""

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import ConfigError, PlanError
from hf_camphive.core.methods import MERGE_RULES
from hf_camphive.core.plan import PrunePlan
from hf_camphive.core.runtime import RunLog, Workers, make_accelerator
from hf_camphive.hub.loading import BaseModel, as_base
from hf_camphive.network.analysis import NetworkAnalysis
from hf_camphive.network.surgery.cutting import apply_plan
from hf_camphive.network.timm_interface import input_size
from hf_camphive.pruning.merging.rules import merge, with_pairs
from hf_camphive.pruning.merging.task import MergeTask
from hf_camphive.pruning.merging.weights import zero_share, zero_weights
from hf_camphive.pruning.planning.budgets import dense_sizes, is_finished, next_targets
from hf_camphive.pruning.planning.costs import CostModel, CostTerm
from hf_camphive.pruning.planning.greedy import make_plan
from hf_camphive.pruning.planning.implants import with_implants
from hf_camphive.pruning.planning.latency.prediction import LatencyRequest, latency_terms
from hf_camphive.pruning.planning.latency.timing import LatencyTable
from hf_camphive.pruning.polish import Polished, PolishOptions, polish
from hf_camphive.pruning.scoring.context import Scores, ScoringContext, SolverCheckpoint
from hf_camphive.pruning.scoring.criteria import SCORERS
from hf_camphive.pruning.scoring.depth_weighting import weighed
from hf_camphive.pruning.trials import Trial
from hf_camphive.pruning.tuning import HOLDOUT_STRIDE
from hf_camphive.training.data.calibration import Calibration
from hf_camphive.training.evaluation import recalibrate_batchnorm
from hf_camphive.training.precision import polish_precision

logger = logging.getLogger(__name__)
_IMPLANTS_START = {True: "fitted by least squares", False: "which nothing reads before finetuning"}
_NO_IMAGES = Calibration((), (), (), 0)
Batches = Iterable[Mapping[str, Tensor]]


class PruningCycle:
    """Prune a copy of a network in cycles, one step at a time.

    `net` is the current network and `dense` the network before the first cycle; `plans` are the plans applied in between.
    `scores` are those of the last plan, [C] per group of C channels. `log` holds the seconds of each step, and notes for the
    report.

    Raises:
        ModelError: The network cannot be found, read or pruned.
        ConfigError: The processes were launched in a way that cannot work (`make_accelerator`).
    """

    def __init__(
        self,
        model: BaseModel | nn.Module | str,
        config: CampHiVeConfig | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.config = config or CampHiVeConfig()
        self.accelerator = accelerator or make_accelerator(self.config)
        self.workers = Workers(self.accelerator)
        self.log = RunLog()
        self.scores: Scores = {}
        self._table: LatencyTable | None = None
        self.start_from(as_base(model))

    def start_from(self, base: BaseModel) -> None:
        """Restart from a copy of this network, without plans."""
        self.base = base
        self.net = self.dense = self.placed(copy.deepcopy(base.net))
        self.plans: list[PrunePlan] = []
        self._analysed: tuple[nn.Module, NetworkAnalysis] | None = None
        self._goal: tuple[NetworkAnalysis, CostModel, dict[str, float]] | None = None
        self._exterior: frozenset[str] | None = None

    def continue_from(self, net: nn.Module, plans: Iterable[PrunePlan]) -> None:
        """Continue with the network of an interrupted run, and the plans that were applied to it."""
        self.net, self.plans = self.placed(net), list(plans)

    def name_labels(self, names: Iterable[str]) -> None:
        """Set the names of the classes, unless the base model has names already."""
        if self.base.label_names is None:
            self.base = replace(self.base, label_names=tuple(names))

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Size (C, H, W) of the images that the network was made for."""
        return input_size(self.base.net)

    @property
    def finished(self) -> bool:
        """True when every cycle has run, or when the budget is already met (dropping a branch can overshoot a cycle's share)."""
        return is_finished(self.plans, self.config)

    @property
    def analysis(self) -> NetworkAnalysis:
        """Structure of the current network, with its channel groups tested by experiment; computed once per network."""
        if self._analysed is None or self._analysed[0] is not self.net:
            with self.log.timed("trace"):
                self._analysed = self.net, NetworkAnalysis.of(self.net, self.input_size, self.config.seed)
        return self._analysed[1]

    @property
    def out_of_scope(self) -> frozenset[str]:
        """Names of the dense network's groups that `config.scope` excludes from pruning; a resumed run traces it to find them."""
        if self.config.scope == "all":
            return frozenset()
        if self._exterior is None:
            self._exterior = NetworkAnalysis.of(self.dense, self.input_size, self.config.seed).exterior
        return self._exterior

    def check_budget(self) -> None:
        """Check, without data, that something can be pruned and that the budget can be met within the width limits.

        Raises:
            PlanError: Nothing can be pruned, or the budget cannot be met.
        """
        self.next_targets()

    def next_targets(self) -> tuple[CostModel, dict[str, float]]:
        """Return the cost model of the current network and, by cost, the value that the next cycle should reach.

        Raises:
            PlanError: Nothing can be pruned, or the budget cannot be met.
        """
        analysis = self.analysis
        if self._goal is None or self._goal[0] is not analysis:
            costs = CostModel.of(analysis, dense_sizes(analysis.groups, self.plans))
            if self.config.target_latency:
                costs = replace(costs, operations=self._operations(analysis, costs))
            targets = next_targets(costs, self.plans, self.config) if self.config.cuts_channels else {}
            self._goal = analysis, costs, targets
        return self._goal[1:]

    def plan(
        self,
        calibration: Batches | Calibration,
        checkpoint: SolverCheckpoint | None = None,
        scores: Scores | None = None,
    ) -> PrunePlan:
        """Score the channels of the current network and plan the next cycle, without changing a weight.

        `calibration` yields {"pixel_values": [N, C, H, W], "labels": [N]}. An iterative criterion saves its state in
        `checkpoint` and starts from the state found there. `scores` computed before, on the same network and images,
        replace the scoring. With granularity "weight" the plan cuts nothing; `apply` then scores weights and sets some to
        zero.

        Raises:
            PlanError: The budget cannot be met, or the network has nothing to prune.
        """
        calibration = self.collected(calibration)
        costs, targets = self.next_targets()
        if not self.config.cuts_channels:
            kind = (self.config.scored_by, self.config.merge)
            return PrunePlan(costs.groups, costs.branches, (), (), *kind, costs.macs, costs.macs)
        if not self.plans:
            self._exterior = costs.exterior
        with self.log.timed("score"), torch.no_grad():
            self.scores = scores or SCORERS[self.config.scored_by](self._context(calibration, checkpoint))
        with self.log.timed("plan"):
            return self._planned(costs, targets, self._early_weight(costs, targets, calibration))

    def apply(
        self, plan: PrunePlan, calibration: Batches | Calibration | None = None, recalibrate: bool = True
    ) -> nn.Module:
        """Merge and cut the channels of a plan, recalibrate BatchNorm if the merge rule does, and return the new `net`.

        With `recalibrate` unset, the caller does the last step.

        Raises:
            PlanError: The plan was made for another network.
            ConfigError: The plan's merge rule reads images and there is no calibration.
        """
        rule = MERGE_RULES[plan.merge]
        if calibration is None and (rule.reads_images or rule.recalibrates):
            raise ConfigError(f"merge rule {plan.merge!r} reads images; pass the calibration loader to apply as well")
        images = _NO_IMAGES if calibration is None else self._fitted(self.collected(calibration))
        if plan.groups != self.analysis.groups:
            raise PlanError(
                "this plan was made for another network: its channel groups differ from those of this one; call plan again"
            )
        if not self.config.cuts_channels:
            self.net = self._with_zeros(images)
        else:
            with self.log.timed("merge"):
                state = merge(self._task(plan, images.images))
            with self.log.timed("cut"):
                self.net = apply_plan(self.net, plan, self.analysis.trace, state)
        if rule.recalibrates and recalibrate:
            with self.log.timed("recalibrate"):
                recalibrate_batchnorm(self.net, images.batches, self.accelerator)
        self.plans.append(plan)
        if plan.implants:
            self.log.notes.append(
                f"{sum(map(len, plan.implants.values()))} of the removed channels of cycle {len(self.plans)} keep 1x1 "
                f"kernels (neural implants), {_IMPLANTS_START[rule.fits_implants]}."
            )
        return self.net

    def polish(self, calibration: Batches | Calibration) -> nn.Module:
        """Bring the logits of `net` closer to the dense network's by label-free steps, in place.

        A step is kept only as far as it lowers the error on the images that `apply` held out of the merge.
        """
        fitted, held_out = self.collected(calibration).split(HOLDOUT_STRIDE)
        with self.log.timed("polish"):
            options = PolishOptions(
                self.config.label_free_steps,
                self.config.seed,
                polish_precision(self.config.mixed_precision),
            )
            recalibrated = self._recalibrated(fitted)
            polished = polish(
                self.net, self.dense, fitted, held_out, options, recalibrated=recalibrated, workers=self.workers
            )
        self.log.notes.append(_polish_note(polished, options, held_out.total))
        return self.net

    def placed(self, net: nn.Module) -> nn.Module:
        """Move a network to this process's device, in channels-last format and eval mode."""
        return net.to(self.accelerator.device).to(memory_format=torch.channels_last).eval()

    def collected(self, calibration: Batches | Calibration) -> Calibration:
        """Return this process's share of the calibration images, held in memory."""
        if isinstance(calibration, Calibration):
            return calibration
        return Calibration.collect(calibration, self.workers.device, self.workers.index, self.workers.count)

    def _task(self, plan: PrunePlan, images: Iterable[Tensor] = ()) -> MergeTask:
        analysis, config = self.analysis, self.config
        return MergeTask(analysis.state, plan, analysis.trace, tuple(images), config.ridge, config.seed, self.workers)

    def _recalibrated(self, calibration: Calibration) -> nn.Module | None:
        """Return a copy with recalibrated BatchNorm, or None if the merge rule has recalibrated `net` already."""
        if MERGE_RULES[self.config.merge].recalibrates:
            return None
        net = copy.deepcopy(self.net)
        recalibrate_batchnorm(net, calibration.batches, self.accelerator)
        return net

    def _fitted(self, calibration: Calibration) -> Calibration:
        """Return the images that a merge may fit: all, except those held out for the polishing if there is one."""
        return calibration.split(HOLDOUT_STRIDE)[0] if self.config.label_free_steps else calibration

    def _context(self, calibration: Calibration, checkpoint: SolverCheckpoint | None = None) -> ScoringContext:
        return ScoringContext(self.analysis, calibration, self.config, self.workers, checkpoint)

    def _with_zeros(self, calibration: Calibration) -> nn.Module:
        """Return a copy of the network with its least important weights merged and set to zero, and note their share."""
        net, positions = copy.deepcopy(self.net), self.analysis.trace.positions
        with self.log.timed("score and merge"), torch.no_grad():
            for name, weight in zero_weights(self._context(calibration)).items():
                net.get_parameter(name).copy_(weight)
        self.log.note(
            f"{zero_share(net, positions):.1%} of the weights of {len(positions)} convolutions and linear "
            "layers are zero, and finetuning keeps them so; nothing was cut: zeros save neither MACs nor time."
        )
        return net

    def _operations(self, analysis: NetworkAnalysis, costs: CostModel) -> tuple[CostTerm, ...]:
        """Return the latency terms of the network's operations, timed on the main process so that all plans are equal."""
        table = self._table = self._table or LatencyTable(self.accelerator.device)
        config = self.config
        request = LatencyRequest(
            costs.floors(config), config.latency_batch_size, config.latency_folded, config.width_step
        )
        with self.log.timed("time layers"):
            if self.workers.count > 1:
                if self.workers.is_main:
                    latency_terms(self.net, analysis, table, request, self.workers)
                table.ms = self.workers.broadcast(table.ms)
            return latency_terms(self.net, analysis, table, request, self.workers)

    def _planned(self, costs: CostModel, targets: dict[str, float], early_weight: float) -> PrunePlan:
        """Return the plan by the last scores, weighted by depth, with implants and merge pairs where they are configured."""
        scores = weighed(self.scores, costs.groups, early_weight)

        def plan_for(macs: float) -> PrunePlan:
            return make_plan(costs, scores, {**targets, "macs": macs}, self.config)

        if ratio := self.config.implant_ratio:
            plan = with_implants(plan_for, int(targets["macs"]), ratio, scores, self.analysis)
        else:
            plan = make_plan(costs, scores, targets, self.config)
        return with_pairs(plan, scores)

    def _early_weight(self, costs: CostModel, targets: dict[str, float], calibration: Calibration) -> float:
        """Return the weight of the first group's scores relative to the last group's: as configured, or the best of trial merges."""
        unmerged = PrunePlan(costs.groups, costs.branches, (), (), "none", "none", costs.macs, costs.macs)
        trial = Trial(self.net, self.dense, self._task(unmerged), calibration)
        if not self.config.tries_early_weights or not trial.is_possible:
            return self.config.early_weight or 1.0
        weight, count = trial.early_weight(lambda weight: self._planned(costs, targets, weight))
        if weight < 1:
            self.log.notes.append(
                f"Scores of the first group were weighted by {weight:g}, those of later groups by up to 1: the weight with "
                f"the smallest error on {count} calibration images held out of trial merges."
            )
        return weight


def _polish_note(polished: Polished, options: PolishOptions, held_out: int) -> str:
    """Return a sentence that says what the polishing changed."""
    if not held_out:
        return f"Not polished: of fewer than {HOLDOUT_STRIDE} calibration images, none can be held out."
    moves = {
        "BatchNorm's statistics moved {:.0%} of the way to those of the calibration images": polished.statistics,
        f"the weights moved {{:.0%}} of the way of {options.steps} gradient steps towards the base's logits": polished.weights,
    }
    by = f"chosen by the error on {held_out} calibration images held out of the merge"
    done = " and ".join(move.format(share) for move, share in moves.items() if share)
    how = "without labels" + ("" if options.precision == "no" else f", in {options.precision}")
    if not done:
        return f"Not polished: no step lowered the error on {held_out} calibration images held out of the merge."
    return f"Polished {how}: {done}, {by}."
