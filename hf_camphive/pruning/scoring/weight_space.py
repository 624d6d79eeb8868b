"""Criteria computed from curvature in weight space: those of CAMP-HiVe and HAP, each a pure function of `ScoringContext`.

Weight space holds the P weights of all convolutions and linear layers. The *filters* of a channel are the rows of the
weights that produce it, depthwise kernels included; both criteria sum over them.
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from hf_camphive.core.plan import ChannelGroup
from hf_camphive.curvature.eigensolvers import Product, SolverOptions, power_iteration
from hf_camphive.curvature.estimators import SamplingOptions, hutchinson
from hf_camphive.curvature.operators import weight_curvature
from hf_camphive.network.graph.tracing import Trace
from hf_camphive.pruning.scoring.context import Scores, ScoringContext

logger = logging.getLogger(__name__)


def hive_paper(context: ScoringContext) -> Scores:
    """Score channels by the entries of the dominant eigenvector of the curvature at the channel's filters.

        score_c = sum over the weights i of the filters of c of |v_i|

    v is the eigenvector of the largest |eigenvalue| of H in weight space, of norm 1 (CAMP-HiVe, arXiv:2511.06265).

    Deviation: the paper ranks single weights, as `granularity="weight"` does. The authors' code differentiates g.v in v,
    which gives the gradient, and normalises v for each tensor.
    """
    return _over_filters(context.trace, {name: v.abs() for name, v in dominant_eigenvector(context).items()})


def hap(context: ScoringContext) -> Scores:
    """Score channels by the trace of the curvature over their filters, times the filters' squared norm.

        score_c = Tr(H_cc) / (2 p_c) * ||w_c||^2

    w_c are the p_c weights of the channel's filters (HAP, arXiv:2101.08940), H the matrix that `curvature` names. The
    trace is Hutchinson's estimate, mean_j z_jc . (H z_j)_c over `hutchinson_probes` vectors z_j of random signs.

    Deviation: coupled filters are one channel; the authors' code prunes each filter and scatters the results back to
    full width.
    """
    config = context.config
    weights = {name: context.weight(name) for name in context.trace.positions}
    estimate = hutchinson(
        weight_product(context),
        sum(weight.numel() for weight in weights.values()),
        config.hutchinson_probes,
        SamplingOptions(torch.Generator().manual_seed(config.seed)),
        workers=context.workers,
    )
    diagonal = estimate.diagonal.value
    traces = _over_filters(context.trace, _split(diagonal, weights))
    norms = _over_filters(context.trace, {name: weight.square() for name, weight in weights.items()})
    sizes = _over_filters(context.trace, {name: torch.ones_like(weight) for name, weight in weights.items()})
    return {name: trace / (2 * sizes[name]) * norms[name] for name, trace in traces.items()}


# Weight space


def dominant_eigenvector(context: ScoringContext) -> dict[str, Tensor]:
    """Return the eigenvector of the largest |eigenvalue| in weight space, by power iteration, as {weight: tensor of its shape}."""
    config = context.config
    weights = {name: context.analysis.state[name] for name in context.trace.positions}
    found = power_iteration(
        weight_product(context),
        sum(weight.numel() for weight in weights.values()),
        1,
        SolverOptions(
            steps=config.power_steps,
            tolerance=config.power_tolerance,
            generator=torch.Generator().manual_seed(config.seed),
            checkpoint=context.checkpoint,
        ),
        workers=context.workers,
    )
    if not found.converged:
        logger.warning("eigenvector in weight space: %s (power_steps, power_tolerance)", found.verdict)
    return _split(found.vectors[:, 0].cpu().double(), weights)


def weight_product(context: ScoringContext) -> Product:
    """Return the function V [P, k] -> H V [P, k], with H averaged over the curvature images of all processes.

    H is the matrix that `curvature` names: the Hessian or the Gauss-Newton matrix.
    """
    trace, state = context.trace, context.analysis.state
    batches, total = context.curvature_batches()

    def logits(weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
        return trace.graph.run({**state, **weights}, images)[0]

    weights = {name: state[name] for name in trace.positions}
    curvature, workers = context.config.curvature, context.workers
    return weight_curvature(logits, weights, batches, curvature, total=total, workers=workers)[0]


def _split(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split a vector of weight space [P] into tensors of the shapes of `like`, by name."""
    parts = flat.split([tensor.numel() for tensor in like.values()])
    return {name: part.reshape(tensor.shape) for (name, tensor), part in zip(like.items(), parts)}


def _over_filters(trace: Trace, values: Mapping[str, Tensor]) -> Scores:
    """Sum values that every weight has over each channel's filters; [C] for each group that is not frozen."""
    sums = {}
    for group in unfrozen_groups(trace):
        rows = [
            values[slot.tensor].flatten(1).sum(1)[list(slot.index)].view(group.size, -1).sum(1)
            for slot in group.slots
            if slot.role != "consumer" and slot.axis == 0 and slot.tensor in values
        ]
        sums[group.name] = torch.stack(rows).sum(0)
    return sums


def unfrozen_groups(trace: Trace) -> list[ChannelGroup]:
    """Return the channel groups that can be pruned, in forward order."""
    return [group for group in trace.groups if not group.frozen]
