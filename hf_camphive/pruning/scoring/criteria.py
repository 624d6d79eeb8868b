"""Importance of each channel: one pure function per criterion, and the table `SCORERS` of them by name.

Scores are {group: [C]}, larger is more important. Those of `fisher`, `hive`, `taylor`, `hap`, `sosp-h` and `sosp-i` are
in units of the loss, so that they compare across groups. Adding a criterion takes a function, its entry in `SCORERS`
and its row in `core/methods.py`; `register_criterion` adds both from outside the package.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_camphive.core import methods
from hf_camphive.core.runtime import to_float64
from hf_camphive.curvature.cotangents import curvature_cotangent
from hf_camphive.curvature.eigensolvers import SolverOptions, lanczos, power_iteration
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
EIGENSOLVERS = {"lanczos": lanczos, "power": power_iteration}


def fisher(context: ScoringContext) -> Scores:
    """1/2 mean_n g_nc^2, g_n = J_n^T z_n a gate gradient with E[z z^T] = diag(p) - p p^T: half the true Fisher's diagonal.

    Group Fisher (Liu et al., ICML 2021). Deviation: their gradients are those at the training labels, which vanish in an
    overfitted network; ours have the covariance of gradients at labels drawn from the network itself, with less variance
    (`curvature_cotangent`).
    """
    gates = context.gates
    total = torch.zeros(gates.size, dtype=torch.float64)
    for gradients in context.model_gradients("Score (fisher)"):
        total += gradients.square().sum(0).cpu()
    return gates.split(0.5 * context.workers.sum(total) / context.total)


def merge_aware(context: ScoringContext) -> Scores:
    """1/2 mean_n (z_n^T J_n d)^2, d what a channel's best prediction from those that stay leaves of it (`merge_losses`).

    The idea of 1/2 d^T H d with d the change that the merge makes, H the Gauss-Newton matrix, as in `fisher`. Deviation: the
    logits are divided by a temperature, since on images that an overfitted network is sure of, curvature all but vanishes.
    A group whose consumers do not read its channels one by one is judged by plain removal. All merge rules are judged by
    least squares: the change that each makes itself ranks channels worse (docs/ablation.md).
    """
    names = mergeable(context.network)
    products, seconds, removal = _merge_sums(context, names, "Score (merge-aware)")
    scores = context.gates.split(0.5 * removal.square().sum(0) / context.total)
    for name in sorted(names):
        total = context.workers.sum(products.pop(name)) / context.total**0.5
        scores[name] = merge_losses(total, context.workers.sum(seconds.pop(name)))
    return scores


def merge_joint(context: ScoringContext) -> Scores:
    """`merge_aware` by least squares, with the terms between layers: 1/2 mean_n (z_n^T J_n sum_s d_s)^2 (`joint_losses`).

    SOSP's greedy choice (arXiv:2110.11395, SOSP-I), of merges in place of removals. A channel's cost is the MACs that it
    takes with it at full width where plans are made by score per cost. Groups outside of the run's scope take no part.
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
    """M and S of these groups (`consumer_products`), this process's share, and the gate gradients [R, S] of all processes.

    All are sums of images n with the same n mod R. R is as large as memory allows for each group, and the same for those that
    are looked at `together` and for the gate gradients; R = 0 for these where no group needs them.
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
    """mean_n |g_nc|, g_nc the gate gradient of image n at its true label (Molchanov et al., ICLR 2017)."""
    gates = context.gates
    total = torch.zeros(gates.size, dtype=torch.float64)
    for gradients in context.label_gradients("Score (taylor)"):
        total += gradients.abs().sum(0).cpu()
    return gates.split(context.workers.sum(total) / context.total)


def hive(context: ScoringContext) -> Scores:
    """1/2 sum_k lambda_k u_kc^2 over the top eigenpairs of the gate-space curvature matrix.

    CAMP-HiVe (arXiv:2511.06265): curvature from Hessian-vector products and power iteration. Deviation: the paper takes
    |v_i| of the dominant eigenvector in weight space; the loss of removing channel c is, to second order along the top
    eigenvectors, the quadratic form above. With all eigenpairs of the Gauss-Newton matrix it is `fisher` without its
    random signs.
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
    batches, total = context.curvature_batches()
    return gate_curvature(context.network, batches, total=total, workers=context.workers)


def _gauss_newton(context: ScoringContext) -> Curvature:
    """The Gauss-Newton matrix by its factor: a few backward passes, and eigenpairs for nothing."""
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
    """||theta_c||^2 of the consumer slices, over its mean in the group (sizes of different groups do not compare)."""
    gates = context.gates
    total = torch.zeros(gates.size + 1, dtype=torch.float64)
    for name, index in gates.inputs.items():
        total.index_add_(0, index, context.weight(name).square().movedim(1, 0).flatten(1).sum(1))
    return {name: values / values.mean().clamp_min(1e-300) for name, values in gates.split(total[:-1]).items()}


def bn_scale(context: ScoringContext) -> Scores:
    """|gamma_c| of the channel's BatchNorm, the mean over those of its group (Network Slimming, Liu et al., ICCV 2017).

    Deviation: the paper trains with an L1 penalty on gamma first; here the network is taken as it is. A group without a
    BatchNorm scores 1, the gain of a channel that nothing scales.
    """
    norms = {node.args[1] for node in context.trace.graph.operations if operation(node) == "batch_norm"}
    gains = {context.trace.graph.tensors[weight] for weight in norms if weight is not None}
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
    """Uniform numbers from the seed: the floor under every comparison."""
    gates = context.gates
    generator = torch.Generator().manual_seed(context.config.seed)
    return gates.split(torch.rand(gates.size, generator=generator, dtype=torch.float64))


Criterion = Callable[[ScoringContext], Scores]
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

    `function` maps a `ScoringContext` to scores {group: [C]}, one per channel of every group that is not frozen, larger
    for channels that are more important. `wording` ends the model card's sentence "Channels were ranked by ...";
    `needs` are the other fields of `core.methods.CriterionRow`, such as `source` and `reads_images`.

    Raises:
        ConfigError: The name is taken or holds unusual characters.
    """
    methods.register(methods.CRITERIA, methods.CriterionRow(name, wording, **needs))
    SCORERS[name] = function
