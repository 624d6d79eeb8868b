"""The papers' own second-order criteria: CAMP-HiVe's, HAP's and SOSP's, each a pure function of `ScoringContext`.

Weight space holds the weights of all convolutions and linear layers, P in all. A channel's *filters* are the rows of
those that write it, depthwise kernels included; HAP's and CAMP-HiVe's scores look at these. SOSP's live in gate space.
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
    """sum over the weights i of the channel's filters of |v_i|, v the dominant eigenvector of H in weight space.

    CAMP-HiVe (arXiv:2511.06265). Deviation: the paper ranks single weights (`granularity="weight"` does); the authors'
    code differentiates g.v in v, which gives the gradient, and norms v per tensor. Here v is an eigenvector, of norm 1.
    """
    return _over_filters(context.trace, {name: v.abs() for name, v in dominant_eigenvector(context).items()})


def hap(context: ScoringContext) -> Scores:
    """Tr(H_cc) / (2 p_c) * ||w_c||^2, w_c the p_c weights of the channel's filters (HAP, arXiv:2101.08940).

    The trace is Hutchinson's estimate, mean_j z_jc . (H z_j)_c over `hutchinson_probes` vectors of random signs; H is
    the matrix that `curvature` names. Deviation: coupled filters are one channel, where the authors' code prunes each
    and scatters the results back to full width.
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
    """The eigenvector of the largest |eigenvalue| in weight space, as {weight: tensor of its shape}, by power iteration."""
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
    """V [P, k] -> the mean over the curvature images of (H or the Gauss-Newton matrix) V, [P, k]."""
    trace, state = context.trace, context.analysis.state
    batches, total = context.curvature_batches()

    def logits(weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
        return trace.graph.run({**state, **weights}, images)[0]

    weights = {name: state[name] for name in trace.positions}
    options = {"total": total, "workers": context.workers}
    return weight_curvature(logits, weights, batches, context.config.curvature, **options)[0]


def _split(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = flat.split([tensor.numel() for tensor in like.values()])
    return {name: part.reshape(tensor.shape) for (name, tensor), part in zip(like.items(), parts)}


def _over_filters(trace: Trace, values: Mapping[str, Tensor]) -> Scores:
    """Sums over each channel's filters of values that every weight has, [C] a group."""
    sums = {}
    for group in _free(trace):
        rows = [
            values[slot.tensor].flatten(1).sum(1)[list(slot.index)].view(group.size, -1).sum(1)
            for slot in group.slots
            if slot.role != "consumer" and slot.axis == 0 and slot.tensor in values
        ]
        sums[group.name] = torch.stack(rows).sum(0)
    return sums


def _free(trace: Trace) -> list[ChannelGroup]:
    return [group for group in trace.groups if not group.frozen]
