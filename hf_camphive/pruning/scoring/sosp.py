"""SOSP's criteria (arXiv:2110.11395) in gate space: SOSP-H by one curvature product, SOSP-I by a greedy choice."""

from collections.abc import Callable
from math import inf

import torch
from torch import Tensor

from hf_camphive.core.plan import ChannelGroup
from hf_camphive.curvature.operators import gate_curvature
from hf_camphive.pruning.scoring.context import Scores, ScoringContext
from hf_camphive.pruning.scoring.weight_space import unfrozen_groups


def sosp_h(context: ScoringContext) -> Scores:
    """Score channels by the gradient of the loss in their gate and one product with its curvature.

        score_c = |g_c| + 1/2 |(A 1)_c|

    g is the mean gate gradient at the true labels, A the gate-space matrix that `curvature` names. This is SOSP-H
    (arXiv:2110.11395), |theta_s . dL| + 1/2 |theta_s^T H sum_s' theta_s'| with theta_s the weights of structure s.

    Deviation: a structure is the weights that read a channel, so that coupled channels are one structure.
    """
    gates = context.gates
    gradient = torch.zeros(gates.size, dtype=torch.float64)
    for gradients in context.label_gradients("Score (sosp-h), gradient"):
        gradient += gradients.sum(0).cpu()
    gradient = context.workers.sum(gradient) / context.total
    batches = list(zip(context.calibration.images, context.calibration.labels))
    curvature, workers = context.config.curvature, context.workers
    matrix = gate_curvature(context.network, batches, curvature, total=context.total, workers=workers)
    curved = matrix(torch.ones(gates.size, dtype=torch.float64))
    return gates.split(gradient.abs() + 0.5 * curved.abs())


def sosp_i(context: ScoringContext) -> Scores:
    """Score channels by what each adds to a second-order bound of the loss when it is removed greedily.

        lambda(M) = sum_{s in M} |g_s| + 1/2 sum_{s, s' in M} |G_ss'|

    g is the mean gate gradient at the true labels, G the Gauss-Newton gate matrix [S, S] with all terms between layers
    (SOSP-I, arXiv:2110.11395). A channel's score is the increase of lambda when it joins the set M of channels that the
    greedy choice removed before (`greedy_marginals`), so that the order of the scores is the greedy order. With
    `threshold="adaptive"` the choice is by increase per MAC, like that of plans, else by the increase itself, as in the
    paper.

    Deviation: G is estimated by mean_n g_n g_n^T with one random g_n per image (`ScoringContext.model_gradients`), which
    has the expectation G.
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
    """Return what each structure adds to a quadratic set function when structures join the set M greedily, [S].

        F(M) = sum_{s in M} first_s + 1/2 sum_{s, s' in M} G_ss'
        marginal_s = F(M + s) - F(M) = alone_s + sum_{s' in M} G_ss',   alone_s = first_s + 1/2 G_ss

    `alone` is [S], and `row(s)` returns row s of G, [S], so that the S^2 numbers of G are never held at once. The
    candidate with the least marginal / costs_s joins next. Structures that are no candidates never join, and get
    alone_s + sum over all candidates of G_ss'. If no entry of G is negative, marginals per cost never fall along the way,
    and sorting them gives the greedy order back.
    """
    marginals = alone.clone()
    waiting = candidates.clone()
    for _ in range(int(candidates.sum())):
        chosen = int((marginals / costs).masked_fill(~waiting, inf).argmin())
        waiting[chosen] = False
        marginals += row(chosen).to(marginals) * waiting
    return marginals


def channel_costs(context: ScoringContext) -> dict[str, float]:
    """Return, for each group in the run's scope, the cost of one channel in a greedy choice.

    That is its MACs per image at full width (at least 1) with `threshold="adaptive"`, else 1.
    """
    exterior = context.analysis.exterior if context.config.scope == "interior" else ()
    adaptive = context.config.threshold == "adaptive"
    return {
        group.name: max(1, _macs_of_a_channel(context, group)) if adaptive else 1
        for group in unfrozen_groups(context.trace)
        if group.name not in exterior
    }


def _macs_of_a_channel(context: ScoringContext, group: ChannelGroup) -> int:
    """Return the MACs per image that removing one channel of the group saves at full width."""
    saved = 0
    for slot in group.slots:
        if slot.tensor in context.trace.positions:
            shape = context.analysis.state[slot.tensor].shape
            elements = shape.numel() // shape[slot.axis] * (len(slot.index) // group.size)
            saved += context.trace.positions[slot.tensor] * elements
    return saved
