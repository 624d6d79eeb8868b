"""SOSP's criteria (arXiv:2110.11395) in gate space: SOSP-H by one Hessian product, SOSP-I greedily."""

from collections.abc import Callable
from math import inf

import torch
from torch import Tensor

from hf_camphive.core.plan import ChannelGroup
from hf_camphive.curvature.operators import gate_curvature
from hf_camphive.pruning.scoring.context import Scores, ScoringContext
from hf_camphive.pruning.scoring.weight_space import _free


def sosp_h(context: ScoringContext) -> Scores:
    """|g_c| + 1/2 |(A 1)_c|: g the mean gate gradient, A the gate Hessian, one product in all (SOSP, arXiv:2110.11395).

    In the paper's words |theta_s . dL| + 1/2 |theta_s^T H sum_s' theta_s'|, with theta_s the weights of structure s;
    here those that read the channel, so that coupled channels are one structure. H is the matrix that `curvature` names.
    """
    gates = context.gates
    gradient = torch.zeros(gates.size, dtype=torch.float64)
    for gradients in context.label_gradients("Score (sosp-h), gradient"):
        gradient += gradients.sum(0).cpu()
    gradient = context.workers.sum(gradient) / context.total
    batches = list(zip(context.calibration.images, context.calibration.labels))
    options = {"total": context.total, "workers": context.workers}
    matrix = gate_curvature(context.network, batches, context.config.curvature, **options)
    curved = matrix(torch.ones(gates.size, dtype=torch.float64))
    return gates.split(gradient.abs() + 0.5 * curved.abs())


def sosp_i(context: ScoringContext) -> Scores:
    """The greedy marginals of lambda(M) = sum_{s in M} |g_s| + 1/2 sum_{s, s' in M} |G_ss'| (SOSP, arXiv:2110.11395).

    g is the mean gate gradient at the true labels, G the Gauss-Newton gate matrix [S, S] with all terms between layers.
    A channel's score is what its removal adds to lambda after all that the greedy choice removes before it
    (`greedy_marginals`), so that the order of the scores is the greedy order. With `threshold="adaptive"` the choice is
    by marginal per MAC, as the plan's is, else by the marginal itself, as in the paper.

    Deviation: G is mean_n g_n g_n^T with one random g_n an image (`ScoringContext.model_gradients`), which is G in expectation.
    """
    gates = context.gates
    gradient = torch.zeros(gates.size, dtype=torch.float64)
    for gradients in context.label_gradients("Score (sosp-i), gradient"):
        gradient += gradients.sum(0).cpu()
    rows = torch.zeros(context.total, gates.size)
    for gradients, numbers in zip(context.model_gradients("Score (sosp-i), matrix"), context.calibration.indices):
        rows[numbers.cpu()] = gradients.float().cpu()
    gradient, rows = context.workers.sum(gradient) / context.total, context.workers.sum(rows) / context.total**0.5

    def row(s: int) -> Tensor:
        return (rows[:, s] @ rows).abs()

    costs, candidates = torch.ones(gates.size, dtype=torch.float64), torch.zeros(gates.size, dtype=torch.bool)
    for name, cost in channel_costs(context).items():
        costs[gates.slices[name]], candidates[gates.slices[name]] = cost, True
    alone = gradient.abs() + 0.5 * rows.double().square().sum(0)
    return gates.split(greedy_marginals(alone, row, costs, candidates))


def greedy_marginals(alone: Tensor, row: Callable[[int], Tensor], costs: Tensor, candidates: Tensor) -> Tensor:
    """What each structure adds to sum_{s in M} first_s + 1/2 sum_{s, s' in M} G_ss' when greedily it joins M, [S].

    alone_s = first_s + 1/2 G_ss, and row(s) is row s of G. Next to join is the least marginal per cost,
    alone_s + sum_{s' in M} G_ss' over costs_s, among the candidates (others never join, and have the marginal of the first
    to join). With entries that are not negative, marginals per cost never fall along the way: sorting them gives the order
    back. G is never held as a whole: it would take S^2 numbers.
    """
    marginals = alone.clone()
    waiting = candidates.clone()
    for _ in range(int(candidates.sum())):
        chosen = int((marginals / costs).masked_fill(~waiting, inf).argmin())
        waiting[chosen] = False
        marginals += row(chosen).to(marginals) * waiting
    return marginals


def channel_costs(context: ScoringContext) -> dict[str, float]:
    """What a channel of each group in the run's scope costs a greedy choice: its MACs at full width, or 1 with thresholds."""
    exterior = context.analysis.exterior if context.config.scope == "interior" else ()
    adaptive = context.config.threshold == "adaptive"
    return {
        group.name: max(1, _macs_of_a_channel(context, group)) if adaptive else 1
        for group in _free(context.trace)
        if group.name not in exterior
    }


def _macs_of_a_channel(context: ScoringContext, group: ChannelGroup) -> int:
    """MACs per image that removing one channel of the group saves at full width."""
    saved = 0
    for slot in group.slots:
        if slot.tensor in context.trace.positions:
            shape = context.analysis.state[slot.tensor].shape
            elements = shape.numel() // shape[slot.axis] * (len(slot.index) // group.size)
            saved += context.trace.positions[slot.tensor] * elements
    return saved
