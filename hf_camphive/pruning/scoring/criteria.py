"""How important each channel is: one pure function a criterion, and the table `CRITERIA`.

Scores are {group: [C]}, larger is more important. Those of `fisher`, `hive`, `taylor`, `hap`, `sosp-h` and `sosp-i` are
in units of the loss, so that they compare across groups. Adding a criterion is a function and a row.
"""

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_camphive.curvature.eigensolvers import lanczos, power_iteration
from hf_camphive.curvature.gates import gate_gradients
from hf_camphive.curvature.operators import (
    Curvature,
    curvature_cotangent,
    factored_curvature,
    gate_curvature,
    gauss_newton_factor,
)
from hf_camphive.network.graph.program import operation
from hf_camphive.pruning.scoring.context import Evidence, Scores
from hf_camphive.pruning.scoring.merge_loss import (
    consumer_products,
    joint_losses,
    merge_losses,
    merge_moves,
    mergeable,
)
from hf_camphive.pruning.scoring.sosp import channel_costs, sosp_h, sosp_i
from hf_camphive.pruning.scoring.weight_space import hap, hive_paper

logger = logging.getLogger(__name__)
SCORE_TEMPERATURE = 4.0
PIXELS = 2**19  # of images whose gradients are taken at once
# Products are summed over images, random signs and all, so that a group holds so many numbers (but sums so many at least),
# all groups that are looked at together so many, and all gate gradients so many.
SUMS, LEAST_SUMS = 2**23, 32
SUMS_TOGETHER, SUMS_OF_GATES = 2**28, 2**25
EIGENSOLVERS = {"lanczos": lanczos, "power": power_iteration}


def fisher(evidence: Evidence) -> Scores:
    """1/2 mean_n g_nc^2, g_n = J_n^T z_n a gate gradient with E[z z^T] = diag(p) - p p^T: half the true Fisher's diagonal.

    Group Fisher (Liu et al., ICML 2021). Deviation: their gradients are those at the training labels, which vanish in an
    overfitted network; ours have the covariance of gradients at labels drawn from the network itself, with less variance
    (`curvature_cotangent`).
    """
    gates = evidence.gates
    total = torch.zeros(gates.size, dtype=torch.float64)
    for gradients in evidence.model_gradients("Score (fisher)"):
        total += gradients.square().sum(0).cpu()
    return gates.split(0.5 * evidence.reduce(total) / evidence.total)


def merge_aware(evidence: Evidence) -> Scores:
    """1/2 mean_n (z_n^T J_n d)^2, d what a channel's best prediction from those that stay leaves of it (`merge_losses`).

    The idea of 1/2 d^T H d with d the change that the merge makes, H the Gauss-Newton matrix, as in `fisher`. Deviation: the
    logits are divided by a temperature, since on images that an overfitted network is sure of, curvature all but vanishes.
    A group whose consumers do not read its channels one by one is judged by plain removal. All merge rules are judged by
    least squares: the change that each makes itself ranks channels worse (docs/ablation.md).
    """
    names = mergeable(evidence.trace, evidence.gates)
    products, seconds, removal = _merge_sums(evidence, names, "Score (merge-aware)")
    scores = evidence.gates.split(0.5 * removal.square().sum(0) / evidence.total)
    for name in sorted(names):
        total = evidence.reduce(products.pop(name)) / evidence.total**0.5
        scores[name] = merge_losses(total, evidence.reduce(seconds.pop(name)))
    return scores


def merge_joint(evidence: Evidence) -> Scores:
    """`merge_aware` by least squares, with the terms between layers: 1/2 mean_n (z_n^T J_n sum_s d_s)^2 (`joint_losses`).

    SOSP's greedy choice (arXiv:2110.11395, SOSP-I), of merges in place of removals. A channel's cost is the MACs that it
    takes with it at full width where plans are made by score per cost. Groups outside of the run's scope take no part.
    """
    gates = evidence.gates
    names = mergeable(evidence.trace, gates)
    costs = channel_costs(evidence)
    products, seconds, removal = _merge_sums(evidence, names, "Score (merge-joint)", together=frozenset(costs))
    descents = {}
    for name in sorted(gates.slices):
        if name in names:
            total = evidence.reduce(products.pop(name)) / evidence.total**0.5
            descents[name] = merge_moves(total, evidence.reduce(seconds.pop(name)))
        else:
            moves = removal[:, gates.slices[name]].T / evidence.total**0.5
            descents[name] = moves.square().sum(1).argsort(stable=True), moves
    inside = {name: descent for name, descent in descents.items() if name in costs}
    alone = {name: 0.5 * moves.square().sum(1) for name, (_, moves) in descents.items()}
    return alone | joint_losses(inside, costs)


def _merge_sums(
    evidence: Evidence, names: frozenset[str], description: str, together: frozenset[str] = frozenset()
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """M and S of these groups (`consumer_products`), this process's share, and the gate gradients [R, S] of all processes.

    All are sums of images n with the same n mod R. R is as large as memory allows for each group, and the same for those that
    are looked at `together` and for the gate gradients; R = 0 for these where no group needs them.
    """
    gates, signs = evidence.gates, evidence.signs()
    sizes = {name: where.stop - where.start for name, where in gates.slices.items() if name in names}

    def fitting(numbers: int, each: int) -> int:
        return min(evidence.total, max(LEAST_SUMS, numbers // each))

    rows = {name: fitting(SUMS, size**2) for name, size in sizes.items()}
    of_gates = fitting(SUMS_OF_GATES, gates.size)
    if together & names:
        of_gates = min(of_gates, fitting(SUMS_TOGETHER, sum(sizes[name] ** 2 for name in together & names)))
        rows |= dict.fromkeys(together & names, of_gates)
    of_gates *= len(names) < len(gates.slices)
    products: dict[str, Tensor] = {}
    seconds: dict[str, Tensor] = {}
    removal = torch.zeros(of_gates, gates.size, dtype=torch.float64)
    for batch, _, numbers in evidence.batches(description):
        some = max(1, PIXELS // (batch.shape[-1] * batch.shape[-2]))
        for images, indices in zip(batch.split(some), numbers.split(some)):
            drawn = signs[indices.cpu()].to(images.device)
            cotangent = partial(curvature_cotangent, signs=drawn, temperature=SCORE_TEMPERATURE)
            for name, m, s in consumer_products(evidence.trace, evidence.state, names, images, cotangent):
                if name not in products:
                    products[name] = m.new_zeros(rows[name], *m.shape[1:])
                    seconds[name] = torch.zeros_like(s, dtype=torch.float64)
                products[name].index_add_(0, indices.to(m.device) % rows[name], m)
                seconds[name] += s
            if of_gates:
                gradients = gate_gradients(evidence.trace, evidence.state, gates, images, cotangent)
                removal.index_add_(0, indices.cpu() % of_gates, gradients.double().cpu())
    return products, seconds, evidence.reduce(removal)


def taylor(evidence: Evidence) -> Scores:
    """mean_n |g_nc|, g_nc the gate gradient of image n at its true label (Molchanov et al., ICLR 2017)."""
    gates = evidence.gates
    total = torch.zeros(gates.size, dtype=torch.float64)
    for gradients in evidence.label_gradients("Score (taylor)"):
        total += gradients.abs().sum(0).cpu()
    return gates.split(evidence.reduce(total) / evidence.total)


def hive(evidence: Evidence) -> Scores:
    """1/2 sum_k lambda_k u_kc^2 over the top eigenpairs of the gate-space curvature matrix.

    CAMP-HiVe (arXiv:2511.06265): curvature from Hessian-vector products and power iteration. Deviation: the paper takes
    |v_i| of the dominant eigenvector in weight space; the loss of removing channel c is, to second order along the top
    eigenvectors, the quadratic form above. With all eigenpairs of the Gauss-Newton matrix it is `fisher` without its
    random signs.
    """
    config, gates, memory = evidence.config, evidence.gates, evidence.memory
    matrix = _gauss_newton(evidence) if config.curvature == "gauss-newton" else _hessian(evidence)
    found = EIGENSOLVERS[config.eigensolver](
        matrix,
        gates.size,
        config.num_eigenpairs,
        steps=config.power_steps,
        tolerance=config.power_tolerance,
        generator=torch.Generator().manual_seed(config.seed),
        dtype=torch.float64,  # vectors of a few thousand entries cost nothing; products stay in the network's precision
        start=memory and memory.load(),
        keep=memory and memory.save,
        progress=evidence.progress,
    )
    if not found.converged:
        logger.warning("hive: %s (power_steps, power_tolerance)", found.verdict)
    return gates.split(0.5 * (found.vectors.double().square() * found.values.double()).sum(1))


def _hessian(evidence: Evidence) -> Curvature:
    batches, total = evidence.curvature_batches()
    options = {"total": total, "reduce": evidence.reduce, "progress": evidence.progress}
    return gate_curvature(evidence.trace, evidence.state, evidence.gates, batches, **options)


def _gauss_newton(evidence: Evidence) -> Curvature:
    """The Gauss-Newton matrix by its factor: a few backward passes, and eigenpairs for nothing."""
    batches, total = evidence.curvature_batches()
    signs, passes = evidence.signs(), evidence.config.curvature_passes
    rows = []
    for (images, _), numbers in zip(
        tqdm(batches, "Score (hive)", unit="batch", disable=not evidence.progress, leave=False), evidence.indices
    ):
        drawn = signs[numbers[: len(images)].cpu()].to(images.device)
        rows.append(gauss_newton_factor(evidence.trace, evidence.state, evidence.gates, images, passes, drawn))
    return factored_curvature(rows, evidence.gates.size, total, reduce=evidence.reduce)


def magnitude(evidence: Evidence) -> Scores:
    """||theta_c||^2 of the consumer slices, over its mean in the group (sizes of different groups do not compare)."""
    gates = evidence.gates
    total = torch.zeros(gates.size + 1, dtype=torch.float64)
    for name, index in gates.inputs.items():
        total.index_add_(
            0, index, evidence.state[name].detach().cpu().double().square().movedim(1, 0).flatten(1).sum(1)
        )
    return {name: values / values.mean().clamp_min(1e-300) for name, values in gates.split(total[:-1]).items()}


def bn_scale(evidence: Evidence) -> Scores:
    """|gamma_c| of the channel's BatchNorm, the mean over those of its group (Network Slimming, Liu et al., ICCV 2017).

    Deviation: the paper trains with an L1 penalty on gamma first; here the network is taken as it is. A group without a
    BatchNorm scores 1, the gain of a channel that nothing scales.
    """
    norms = {node.args[1] for node in evidence.trace.graph.operations if operation(node) == "batch_norm"}
    gains = {evidence.trace.graph.tensors[weight] for weight in norms if weight is not None}
    scores = {}
    for group in evidence.trace.groups:
        if not group.frozen:
            found = [
                evidence.state[slot.tensor]
                .detach()
                .cpu()
                .double()
                .abs()[list(slot.index)]
                .view(group.size, -1)
                .mean(1)
                for slot in group.slots
                if slot.tensor in gains
            ]
            scores[group.name] = torch.stack(found or [torch.ones(group.size, dtype=torch.float64)]).mean(0)
    return scores


def random(evidence: Evidence) -> Scores:
    """Uniform numbers from the seed: the floor under every comparison."""
    gates = evidence.gates
    generator = torch.Generator().manual_seed(evidence.config.seed)
    return gates.split(torch.rand(gates.size, generator=generator, dtype=torch.float64))


Criterion = Callable[[Evidence], Scores]
CRITERIA: dict[str, Criterion] = {
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
