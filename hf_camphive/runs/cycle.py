"""The steps of a cycle: trace -> score -> plan -> merge -> cut, and the polish after the last one.

Each step is a function of another module; `PruningCycle` holds what lies between them: the network as it is now and the
plans that led to it. It reads no dataset, measures no accuracy and writes no file.
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
from hf_camphive.network.surgery.cutting import State, apply_plan
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
Batches = Iterable[Mapping[str, Tensor]]


class PruningCycle:
    """A copy of a network on its way through the cycles.

    `net` is the network as it is now, `dense` as it was, `plans` what was done in between. `scores` are those of the last
    plan; `log` holds the seconds of each step and notes for the reader.
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
        """Begin anew with a copy of this network."""
        self.base = base
        self.net = self.dense = self.placed(copy.deepcopy(base.net))
        self.plans: list[PrunePlan] = []
        self._analysed: tuple[nn.Module, NetworkAnalysis] | None = None
        self._goal: tuple[NetworkAnalysis, CostModel, dict[str, float]] | None = None
        self._exterior: frozenset[str] | None = None

    def go_on_with(self, net: nn.Module, plans: Iterable[PrunePlan]) -> None:
        """Go on with a network that an interrupted run left, and the plans that led to it."""
        self.net, self.plans = self.placed(net), list(plans)

    def name_labels(self, names: Iterable[str]) -> None:
        """Name the classes after those of the dataset, where the base does not name them."""
        if self.base.label_names is None:
            self.base = replace(self.base, label_names=tuple(names))

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Size (C, H, W) of the images that the network was made for."""
        return tuple(self.base.net.pretrained_cfg["input_size"])

    @property
    def finished(self) -> bool:
        """True when every cycle has run, or when the budget is already met (dropping a branch can overshoot a cycle's share)."""
        return is_finished(self.plans, self.config)

    @property
    def analysis(self) -> NetworkAnalysis:
        """Structure of the network as it is now, its channel groups tested by experiment; worked out once per network."""
        if self._analysed is None or self._analysed[0] is not self.net:
            with self.log.timed("trace"):
                self._analysed = self.net, NetworkAnalysis.of(self.net, self.input_size, self.config.seed)
        return self._analysed[1]

    @property
    def out_of_scope(self) -> frozenset[str]:
        """Groups of the dense network that the run was asked to leave alone; a resumed run has to trace it for them."""
        if self.config.scope == "all":
            return frozenset()
        if self._exterior is None:
            self._exterior = NetworkAnalysis.of(self.dense, self.input_size, self.config.seed).exterior
        return self._exterior

    def check_budget(self) -> None:
        """Check, without data, that something can be pruned and that the floors allow the budget.

        Raises:
            PlanError: Nothing can be pruned, or the budget cannot be met.
        """
        self.next_targets()

    def next_targets(self) -> tuple[CostModel, dict[str, float]]:
        """Return the costs of the network as it is now, and what the next cycle should leave of each; worked out once.

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
        """Score the channels of the network as it is now, and plan the next cycle. No weight is touched.

        `calibration` yields {"pixel_values": [N, C, H, W], "labels": [N]}. A criterion that iterates keeps its state in
        `checkpoint` and starts from what is there. `scores` worked out before, on the same network and images, are used
        as they are. With granularity "weight" the plan cuts nothing; `apply` then scores and zeroes weights.

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
        """Merge, cut and, where the merge rule asks for it, recalibrate BatchNorm; returns the new `net`.

        Without `recalibrate` the last step is left to the caller.

        Raises:
            PlanError: The plan was made for another network.
            ConfigError: The plan's merge rule reads images and there is no calibration.
        """
        rule = MERGE_RULES[plan.merge]
        if calibration is None and (rule.reads_images or rule.recalibrates):
            raise ConfigError(
                f"merge rule {plan.merge!r} looks at images; pass the calibration loader to apply as well"
            )
        calibration = None if calibration is None else self._fitted(self.collected(calibration))
        if plan.groups != self.analysis.groups:
            raise PlanError(
                "this plan was made for another network: its channel groups differ from those of this one; call plan again"
            )
        if not self.config.cuts_channels:
            self.net = self._with_zeros(calibration)
        else:
            with self.log.timed("merge"):
                state = self._merged(plan, calibration)
            with self.log.timed("cut"):
                self.net = apply_plan(self.net, plan, self.analysis.trace, state)
        if rule.recalibrates and recalibrate:
            with self.log.timed("recalibrate"):
                recalibrate_batchnorm(self.net, calibration.batches, self.accelerator)
        self.plans.append(plan)
        if plan.implants:
            self.log.notes.append(
                f"{sum(map(len, plan.implants.values()))} of the removed channels of cycle {len(self.plans)} keep 1x1 "
                f"kernels (neural implants), {_IMPLANTS_START[rule.fits_implants]}."
            )
        return self.net

    def polish(self, calibration: Batches | Calibration) -> nn.Module:
        """Bring the logits of `net` nearer to the dense network's by label-free steps, in place.

        The images that judge are those that `apply` held out of the merge.
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
        """Move a network to this process's device, channels last, in eval mode."""
        return net.to(self.accelerator.device, memory_format=torch.channels_last).eval()

    def collected(self, calibration: Batches | Calibration) -> Calibration:
        """Return this process's share of the calibration images, held in memory."""
        if isinstance(calibration, Calibration):
            return calibration
        return Calibration.collect(calibration, self.workers.device, self.workers.index, self.workers.count)

    def _task(self, plan: PrunePlan, images: Iterable[Tensor] = ()) -> MergeTask:
        analysis, config = self.analysis, self.config
        return MergeTask(analysis.state, plan, analysis.trace, tuple(images), config.ridge, config.seed, self.workers)

    def _merged(self, plan: PrunePlan, calibration: Calibration | None) -> State:
        return merge(self._task(plan, calibration.images if calibration else ()))

    def _recalibrated(self, calibration: Calibration) -> nn.Module | None:
        """Return a copy with BatchNorm recalibrated, where the merge rule left its statistics as they were."""
        if MERGE_RULES[self.config.merge].recalibrates:
            return None
        net = copy.deepcopy(self.net)
        recalibrate_batchnorm(net, calibration.batches, self.accelerator)
        return net

    def _fitted(self, calibration: Calibration) -> Calibration:
        """Return the images that a merge may fit: all but those that judge the polishing, where there is one."""
        return calibration.split(HOLDOUT_STRIDE)[0] if self.config.label_free_steps else calibration

    def _context(self, calibration: Calibration, checkpoint: SolverCheckpoint | None = None) -> ScoringContext:
        return ScoringContext(self.analysis, calibration, self.config, self.workers, checkpoint)

    def _with_zeros(self, calibration: Calibration) -> nn.Module:
        """Return a copy of the network with its less significant weights merged and zeroed, and note how many are."""
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
        """Return what takes the network's time, measured by the main process, so that all plan by the same table."""
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
        scores = weighed(self.scores, costs.groups, early_weight)

        def plan_for(macs: float) -> PrunePlan:
            return make_plan(costs, scores, {**targets, "macs": macs}, self.config)

        if ratio := self.config.implant_ratio:
            plan = with_implants(plan_for, int(targets["macs"]), ratio, scores, self.analysis)
        else:
            plan = make_plan(costs, scores, targets, self.config)
        return with_pairs(plan, scores)

    def _early_weight(self, costs: CostModel, targets: dict[str, float], calibration: Calibration) -> float:
        """Weight of the first group's scores relative to the last group's: the configured value, or the best one found by trial merges."""
        unmerged = PrunePlan(costs.groups, costs.branches, (), (), "none", "none", costs.macs, costs.macs)
        trial = Trial(self.net, self.dense, self._task(unmerged), calibration)
        if not self.config.tries_early_weights or not trial.is_possible:
            return self.config.early_weight or 1.0
        weight, judges = trial.early_weight(lambda weight: self._planned(costs, targets, weight))
        if weight < 1:
            self.log.notes.append(
                f"Scores of the first group counted {weight:g} times, those of later ones more, as {judges} "
                "calibration images held out of trial merges say."
            )
        return weight


def _polish_note(polished: Polished, options: PolishOptions, judges: int) -> str:
    """Say in a sentence what the polishing changed."""
    if not judges:
        return f"Not polished: fewer than {HOLDOUT_STRIDE} calibration images leave none to judge by."
    moves = {
        "BatchNorm's statistics went {:.0%} of the way to those of the calibration images": polished.statistics,
        f"the weights went {{:.0%}} of the way of {options.steps} gradient steps towards the base's logits": polished.weights,
    }
    by = f"as {judges} calibration images held out of the merge say"
    done = " and ".join(move.format(share) for move, share in moves.items() if share)
    how = "without labels" + ("" if options.precision == "no" else f", in {options.precision}")
    return f"Polished {how}: {done}, {by}." if done else f"Not polished: no step helped, {by}."
