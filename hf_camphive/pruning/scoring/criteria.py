"""Score each channel: one pure function per criterion, and the table `SCORERS` of them by name.

A criterion maps a `ScoringContext` to scores {group: [C]} in float64, larger for channels that are more important.
Scores of `merge-aware`, `merge-joint`, `fisher`, `hive`, `taylor`, `hap`, `sosp-h` and `sosp-i` are estimates of a loss,
so that they compare across groups.

To add a criterion inside the package, write its function here (or, if it is long, in a file beside
this one, like `sosp.py`), enter it in `SCORERS` under its name, and add the row of
that name to `CRITERIA` in `core/methods.py`. From outside the package, one call of `register_criterion` does both.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from hf_camphive.core import methods
from hf_camphive.core.runtime import to_float64
from hf_camphive.curvature.cotangents import curvature_cotangent
from hf_camphive.curvature.eigensolvers import Eigenpairs, SolverOptions, lanczos, power_iteration
from hf_camphive.curvature.operators import Curvature, factored_curvature, gate_curvature
from hf_camphive.network.graph.program import operation
from hf_camphive.pruning.scoring.context import Scores, ScoringContext
from hf_camphive.pruning.scoring.merge_loss import (
    consumer_products,
    joint_losses,
    merge_losses,
    merge_moves,
    mergeable,
)
from hf_camphive.pruning.scoring.sosp import channel_costs, sosp_h, sosp_i
from hf_camphive.pruning.scoring.weight_space import hap, hive_paper
from hf_camphive.pruning.tuning import (
    MAX_ELEMENTS_OF_GATES,
    MAX_ELEMENTS_PER_GROUP,
    MAX_ELEMENTS_TOGETHER,
    MIN_SUMS,
    SCORE_TEMPERATURE,
)

logger = logging.getLogger(__name__)
MAX_PIXELS = 2**19  # of the images whose gradients are computed in one pass, which bounds memory
EIGENSOLVERS: dict[str, Callable[..., Eigenpairs]] = {"lanczos": lanczos, "power": power_iteration}


def fisher(context: ScoringContext) -> Scores:
    """Score channels by half the diagonal of the Fisher information of their gates.

        score_c = 1/2 mean_n g_nc^2,   g_n = J_n^T z_n,   E[z_n z_n^T] = diag(p_n) - p_n p_n^T

    Group Fisher (Liu et al., ICML 2021).

    Deviation: the paper's gradients are taken at the training labels, where they vanish in an overfitted network; these
    have the covariance of gradients at labels drawn from the network, with less variance (`curvature_cotangent`).
    """
    gates = context.gates
    total = torch.zeros(gates.size, dtype=torch.float64)
    for gradients in context.model_gradients("Score (fisher)"):
        total += gradients.square().sum(0).cpu()
    return gates.split(0.5 * context.workers.sum(total) / context.total)


def merge_aware(context: ScoringContext) -> Scores:
    """Score channels by the loss of replacing each by its best linear prediction from the channels that remain.

        score_s = 1/2 mean_n (z_n^T J_n d_s)^2,   d_s = a_s - sum_t b_st a_t - b_s1

    d_s is the residual of the ridge regression of activation a_s on the remaining channels t (`merge_losses`), J_n d_s
    the first-order change of image n's logits, and z_n as in `fisher`: the score is 1/2 d^T H d with the Gauss-Newton
    matrix H, estimated with one random vector per image. p_n is the softmax of the logits divided by
    `SCORE_TEMPERATURE`, since curvature nearly vanishes on images of which an overfitted network is sure.

    A group whose consumers read a channel at several positions (`mergeable`) is scored by plain removal, d_s = a_s. The
    residual of least squares is used with every merge rule: scoring the change that a rule itself makes ranks channels
    worse (docs/ablation.md, "Scoring the merge that is really made").
    """
    names = mergeable(context.network)
    products, seconds, removal = _merge_sums(context, names, "Score (merge-aware)")
    scores = context.gates.split(0.5 * removal.square().sum(0) / context.total)
    for name in sorted(names):
        total = context.workers.sum(products.pop(name)) / context.total**0.5
        scores[name] = merge_losses(total, context.workers.sum(seconds.pop(name)))
    return scores


def merge_joint(context: ScoringContext) -> Scores:
    """Score channels by the loss that replacing each adds to the error of all channels replaced before it, in any layer.

        loss(M) = 1/2 mean_n (z_n^T J_n sum_{s in M} d_s)^2

    with d_s and z_n as in `merge_aware`. Channels join the set M greedily, by added loss per cost, and score what they
    add (`joint_losses`): the greedy choice of SOSP-I (arXiv:2110.11395) for merges in place of removals. The cost of a
    channel is its MACs at full width if plans are made by score per cost, else 1 (`channel_costs`). Groups outside the
    run's scope do not join, and score the loss of replacing their channels alone.
    """
    gates = context.gates
    names = mergeable(context.network)
    costs = channel_costs(context)
    products, seconds, removal = _merge_sums(context, names, "Score (merge-joint)", together=frozenset(costs))
    descents = {}
    for name in sorted(gates.slices):
        if name in names:
            total = context.workers.sum(products.pop(name)) / context.total**0.5
            descents[name] = merge_moves(total, context.workers.sum(seconds.pop(name)))
        else:
            moves = removal[:, gates.slices[name]].T / context.total**0.5
            descents[name] = moves.square().sum(1).argsort(stable=True), moves
    inside = {name: descent for name, descent in descents.items() if name in costs}
    alone = {name: 0.5 * moves.square().sum(1) for name, (_, moves) in descents.items()}
    return alone | joint_losses(inside, costs)


def _merge_sums(
    context: ScoringContext, names: frozenset[str], description: str, together: frozenset[str] = frozenset()
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Accumulate, over the calibration images, the products that merge losses need.

    Returns, with R the number of sums and C the channels of a group,

        products  {group: M [R, C, C + 1]}     of `consumer_products`, for the groups `names`; this process's share
        seconds   {group: S [C + 1, C + 1]}    of `consumer_products`, for the same groups; this process's share
        removal   [R, S]                       gate gradients of all groups, summed over all processes

    Entry r sums the images whose index is r modulo R. With one image per sum nothing is lost; beyond that the random
    signs of different images leave the expectation as it is and add variance. R is at most the number of images, and
    for each group as large as `MAX_ELEMENTS_PER_GROUP` allows, but at least `MIN_SUMS`. Groups that are scored
    `together` share one R with `removal`, limited by `MAX_ELEMENTS_TOGETHER` and `MAX_ELEMENTS_OF_GATES`, so that their
    rows can be added. `removal` has no rows if every group is in `names`.
    """
    gates, signs = context.gates, context.signs()
    sizes = {name: where.stop - where.start for name, where in gates.slices.items() if name in names}

    def fitting(numbers: int, each: int) -> int:
        return min(context.total, max(MIN_SUMS, numbers // each))

    rows = {name: fitting(MAX_ELEMENTS_PER_GROUP, size**2) for name, size in sizes.items()}
    of_gates = fitting(MAX_ELEMENTS_OF_GATES, gates.size)
    if together & names:
        of_gates = min(of_gates, fitting(MAX_ELEMENTS_TOGETHER, sum(sizes[name] ** 2 for name in together & names)))
        rows |= dict.fromkeys(together & names, of_gates)
    of_gates *= len(names) < len(gates.slices)
    products: dict[str, Tensor] = {}
    seconds: dict[str, Tensor] = {}
    removal = torch.zeros(of_gates, gates.size, dtype=torch.float64)
    for batch, _, numbers in context.batches(description):
        some = max(1, MAX_PIXELS // (batch.shape[-1] * batch.shape[-2]))
        for images, indices in zip(batch.split(some), numbers.split(some)):
            drawn = signs[indices.cpu()].to(images.device)
            cotangent = partial(curvature_cotangent, signs=drawn, temperature=SCORE_TEMPERATURE)
            for name, m, s in consumer_products(context.network, names, images, cotangent):
                if name not in products:
                    products[name] = m.new_zeros(rows[name], *m.shape[1:])
                    seconds[name] = to_float64(torch.zeros_like(s))
                products[name].index_add_(0, indices.to(m.device) % rows[name], m)
                seconds[name] += s.to(seconds[name].device)
            if of_gates:
                gradients = context.network.gradients(images, cotangent)
                removal.index_add_(0, indices.cpu() % of_gates, gradients.cpu().double())
    return products, seconds, context.workers.sum(removal)


def taylor(context: ScoringContext) -> Scores:
    """Score channels by the mean size of the first-order change of the loss when their gate closes.

        score_c = mean_n |g_nc|

    g_n is the gate gradient of image n at its true label (Molchanov et al., ICLR 2017).
    """
    gates = context.gates
    total = torch.zeros(gates.size, dtype=torch.float64)
    for gradients in context.label_gradients("Score (taylor)"):
        total += gradients.abs().sum(0).cpu()
    return gates.split(context.workers.sum(total) / context.total)


def hive(context: ScoringContext) -> Scores:
    """Score channels by the curvature at their gates along the top eigenvectors of the gate-space matrix.

        score_c = 1/2 sum_k lambda_k u_kc^2

    over the `num_eigenpairs` top eigenpairs (lambda_k, u_k) of the matrix that `curvature` names. After CAMP-HiVe
    (arXiv:2511.06265), which finds curvature with Hessian-vector products and power iteration. With all eigenpairs of
    the Gauss-Newton matrix this is `fisher` without its random signs.

    Deviation: the paper takes |v_i| of the dominant eigenvector in weight space; the sum above is the loss of removing
    channel c to second order, restricted to the top eigenvectors.
    """
    config, gates = context.config, context.gates
    matrix = _gauss_newton(context) if config.curvature == "gauss-newton" else _hessian(context)
    found = EIGENSOLVERS[config.eigensolver](
        matrix,
        gates.size,
        config.num_eigenpairs,
        # Vectors of a few thousand entries cost nothing in float64; products stay in the network's precision.
        SolverOptions(
            steps=config.power_steps,
            tolerance=config.power_tolerance,
            generator=torch.Generator().manual_seed(config.seed),
            dtype=torch.float64,
            checkpoint=context.checkpoint,
        ),
        workers=context.workers,
    )
    if not found.converged:
        logger.warning("hive: %s (power_steps, power_tolerance)", found.verdict)
    return gates.split(0.5 * (found.vectors.double().square() * found.values.double()).sum(1))


def _hessian(context: ScoringContext) -> Curvature:
    """Return the Hessian of the loss in the gates, applied by automatic differentiation."""
    batches, total = context.curvature_batches()
    return gate_curvature(context.network, batches, total=total, workers=context.workers)


def _gauss_newton(context: ScoringContext) -> Curvature:
    """Return the gates' Gauss-Newton matrix as the product of its factor, which takes `curvature_passes` backward passes."""
    batches, total = context.curvature_batches()
    signs, passes = context.signs(), context.config.curvature_passes
    rows = []
    for (images, _), numbers in zip(
        context.workers.track(batches, "Score (hive)", "batch"), context.calibration.indices
    ):
        drawn = signs[numbers[: len(images)].cpu()].to(images.device)
        rows.append(context.network.factor(images, passes, drawn))
    return factored_curvature(rows, context.gates.size, total, workers=context.workers)


def magnitude(context: ScoringContext) -> Scores:
    """Score channels by the squared norm of the weights that read them, relative to the mean of their group.

        score_c = ||theta_c||^2 / mean_c' ||theta_c'||^2

    The mean makes groups comparable, whose weights differ in number and scale.
    """
    gates = context.gates
    total = torch.zeros(gates.size + 1, dtype=torch.float64)
    for name, index in gates.inputs.items():
        total.index_add_(0, index, context.weight(name).square().movedim(1, 0).flatten(1).sum(1))
    return {name: values / values.mean().clamp_min(1e-300) for name, values in gates.split(total[:-1]).items()}


def bn_scale(context: ScoringContext) -> Scores:
    """Score channels by |gamma_c| of their BatchNorm, averaged over the norms of their group.

    Network Slimming (Liu et al., ICCV 2017). Channels without a BatchNorm score 1, the gain of a channel that nothing
    scales.

    Deviation: the paper first trains with an L1 penalty on gamma; here the network is taken as it is.
    """
    norms = {node.args[1] for node in context.trace.graph.operations if operation(node) == "batch_norm"}
    gains = {context.trace.graph.tensors[weight] for weight in norms if isinstance(weight, fx.Node)}
    scores = {}
    for group in context.trace.groups:
        if not group.frozen:
            found = [
                context.weight(slot.tensor).abs()[list(slot.index)].view(group.size, -1).mean(1)
                for slot in group.slots
                if slot.tensor in gains
            ]
            scores[group.name] = torch.stack(found or [torch.ones(group.size, dtype=torch.float64)]).mean(0)
    return scores


def random(context: ScoringContext) -> Scores:
    """Score channels by uniform random numbers from the config's seed, as a baseline for other criteria."""
    gates = context.gates
    generator = torch.Generator().manual_seed(context.config.seed)
    return gates.split(torch.rand(gates.size, generator=generator, dtype=torch.float64))


Criterion = Callable[[ScoringContext], Scores]
"""A criterion: from a context to scores {group: [C]} for every group that is not frozen."""

SCORERS: dict[str, Criterion] = {
    "merge-aware": merge_aware,
    "merge-joint": merge_joint,
    "fisher": fisher,
    "hive": hive,
    "hive-paper": hive_paper,
    "hap": hap,
    "sosp-h": sosp_h,
    "sosp-i": sosp_i,
    "taylor": taylor,
    "magnitude": magnitude,
    "bn-scale": bn_scale,
    "random": random,
}


def register_criterion(name: str, function: Criterion, *, wording: str, **needs: Any) -> None:
    """Add a criterion from outside the package; `criterion=name` and `--criterion name` then choose it.

        >>> def first(context):
        ...     return {g.name: -torch.arange(g.size).double() for g in context.trace.groups if not g.frozen}
        >>> register_criterion("first", first, wording="their position", reads_images=False)

    `function` maps a `ScoringContext` to scores {group: [C]}, one per channel of every group that is not frozen, larger
    for channels that are more important. `wording` ends the model card's sentence "Channels were ranked by ...";
    `needs` are the other fields of `core.methods.CriterionRow`, such as `source` and `reads_images`.

    Raises:
        ConfigError: The name is taken or holds unusual characters.
    """
    methods.register(methods.CRITERIA, methods.CriterionRow(name, wording, **needs))
    SCORERS[name] = function
