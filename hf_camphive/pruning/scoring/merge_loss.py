"""The loss of a merge: what it costs to replace a channel by its best prediction from those that stay.

A removal is judged by a_s -> 0, but merging puts a_s -> sum_t b_st a_t in its place. To first order that moves the logits
of image n by J_n d with d the merge's residual, so that a channel that the others explain costs little however much is
made of it. Pure functions on the products of gradients and activations where consumers read them.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from math import inf, nextafter

import torch
from torch import Tensor, fx

from hf_camphive.core.runtime import to_float64
from hf_camphive.curvature.gates import GatedNetwork
from hf_camphive.network.graph.program import compute, operation
from hf_camphive.network.graph.tracing import Trace
from hf_camphive.pruning.tuning import REMOVAL_STRIDE, SCORE_RIDGE

Product = tuple[Tensor, Tensor]


def mergeable(network: GatedNetwork) -> frozenset[str]:
    """Groups whose channels are read one by one, by layers that are used once and are not grouped."""
    trace, gates = network.trace, network.gates
    uses = Counter(_weight(trace, node) for node in trace.graph.operations)
    grouped = {
        _weight(trace, node)
        for node in trace.graph.operations
        if operation(node) == "conv2d" and len(node.args) > 6 and node.args[6] > 1
    }
    return frozenset(
        group.name
        for group in trace.groups
        if group.name in gates.slices
        and group.consumers()
        and all(
            len(slot.index) == group.size and uses[slot.tensor] == 1 and slot.tensor not in grouped
            for slot in group.consumers()
        )
    )


def consumer_products(
    network: GatedNetwork, names: frozenset[str], images: Tensor, cotangent: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(group, M [N, C, C + 1], S [C + 1, C + 1]) of each of these groups, one for each of its consumers.

    M_nst = sum over positions of g_s a_t and S_st = sum over images and positions of a_s a_t, where a are the channels as
    the consumer reads them, the last one a constant 1, and g = dL/da for the cotangent dL/dlogits of each image.
    """
    trace = network.trace
    slots = {slot.tensor: [] for group in trace.groups if group.name in names for slot in group.consumers()}
    for group in trace.groups:
        for slot in group.consumers() if group.name in names else ():
            slots[slot.tensor].append((group.name, torch.tensor(slot.index, device=images.device)))
    with torch.enable_grad():
        logits, inputs = _run(trace, network.state, images, slots)
        gradients = torch.autograd.grad(logits, list(inputs.values()), cotangent(logits.detach()).to(logits))
    for (tensor, value), gradient in zip(inputs.items(), gradients):
        a, g = (_channels_first(v.detach()) for v in (value, gradient))
        for name, index in slots[tensor]:
            some = torch.cat([a[:, index], torch.ones_like(a[:, :1])], dim=1)
            flat = some.transpose(0, 1).flatten(1)
            yield name, g[:, index] @ some.mT, flat @ flat.mT


def merge_losses(products: Tensor, second: Tensor, ridge: float = SCORE_RIDGE) -> Tensor:
    """Scores [C]: the loss of merging each channel away, when its turn comes in a greedy descent (`merge_moves`).

    A channel never scores less than those that went before it.
    """
    order, moves = merge_moves(products, second, ridge)
    scores = torch.zeros(len(order), dtype=torch.float64)
    scores[order] = (0.5 * moves[order].square().sum(1)).cummax(0).values.cpu()
    return scores


def merge_moves(products: Tensor, second: Tensor, ridge: float = SCORE_RIDGE) -> tuple[Tensor, Tensor]:
    """(order [C], moves [C, N]): the channels in the order of a greedy descent, and how far each, at its turn, moves z_n^T logits_n.

    move_sn = M_nss - sum_t b_st M_nst - b_s1 M_ns1 over channels t that are left, with b the ridge regression of a_s on
    them and a constant; the channels with the least 1/2 sum_n move_sn^2 go first, a 64th of those left at a time. What reads
    them then reads their predictions, g_t += b_st g_s.
    `products` is M [N, C, C + 1] (divided by the square root of the number of images), `second` is S [C + 1, C + 1].
    """
    count = products.shape[1]
    moves, order = torch.zeros(count, len(products), dtype=torch.float64), []
    second = to_float64(second)
    second = second / second[-1, -1].clamp_min(1e-300)
    damping = (ridge * second.diagonal()[:-1].mean()).clamp_min(1e-12) * torch.ones(count + 1).to(second)
    damping[-1] = 0  # the constant is not damped
    precision = torch.linalg.inv(second + torch.diag(damping))
    left = torch.arange(count)
    while len(left):
        coefficients = precision[:-1] / precision.diagonal()[:-1, None]  # 1 at s, -b_st elsewhere
        moved = to_float64(torch.einsum("nst,st->ns", products, coefficients.to(products)))
        going = moved.square().sum(0).cpu().argsort(stable=True)[: -(-len(left) // REMOVAL_STRIDE)]
        moves[left[going]] = moved.cpu()[:, going].T
        order.append(left[going])
        stay = torch.ones(len(left), dtype=torch.bool)
        stay[going] = False
        kept, gone = (where.nonzero()[:, 0].to(precision.device) for where in (stay, ~stay))
        read = torch.cat([kept, kept.new_tensor([len(left)])])
        solved = torch.linalg.solve(precision[gone][:, gone], precision[gone][:, read])  # -b, of those that go
        passed = torch.einsum("st,nsu->ntu", solved[:, :-1].to(products), products[:, gone][:, :, read])
        products = products[:, kept][:, :, read] - passed
        precision = precision[read][:, read] - precision[read][:, gone] @ solved
        left = left[stay]
    return torch.cat(order), moves


def joint_losses(descents: Mapping[str, tuple[Tensor, Tensor]], costs: Mapping[str, float]) -> dict[str, Tensor]:
    """Scores of groups whose merges are judged together, by group, each [C]: greedy, with the terms between layers.

    1/2 |X + move_s|^2 - 1/2 |X|^2 = X . move_s + 1/2 |move_s|^2 is what a merge adds to the loss when X is the sum of all
    moves so far, in any layer: errors may cancel or add up. The group whose next channel (in the order of `merge_moves`) adds
    least per cost goes next; a channel's score is what it adds per cost, never less than those before it, times its cost.
    """
    at = dict.fromkeys(descents, 0)
    scores = {name: torch.zeros(len(order), dtype=torch.float64) for name, (order, _) in descents.items()}
    names = list(descents)
    moved = torch.zeros_like(descents[names[0]][1][0])
    price = 0.0
    while names:
        heads = torch.stack([descents[name][1][descents[name][0][at[name]]] for name in names])
        added = heads @ moved + 0.5 * heads.square().sum(1)
        prices = added / torch.tensor([costs[name] for name in names], dtype=torch.float64)
        next_ = int(prices.argmin())
        name = names[next_]
        price = nextafter(max(price, float(prices[next_])), inf)  # else the order would be lost among equals
        scores[name][descents[name][0][at[name]]] = price * costs[name]
        moved = moved + heads[next_]
        at[name] += 1
        if at[name] == len(scores[name]):
            names.remove(name)
    return scores


def _weight(trace: Trace, node: fx.Node) -> str | None:
    return trace.graph.tensors.get(node.args[1]) if operation(node) in ("conv2d", "linear") else None


def _run(
    trace: Trace, state: Mapping[str, Tensor], images: Tensor, wanted: Mapping
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and what the layers with these weights read, as values of their own that gradients can be taken in."""
    graph, inputs = trace.graph, {}
    values = graph.bind(state) | {graph.image: images}
    for node in graph.operations:
        weight = _weight(trace, node)
        if weight in wanted:
            x = values[node.args[0]]
            inputs[weight] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            values[node] = compute(node, values | {node.args[0]: inputs[weight]})
        else:
            values[node] = compute(node, values)
    return values[graph.logits], inputs


def _channels_first(value: Tensor) -> Tensor:
    """[N, C, positions] from [N, C, H, W] or [N, ..., C]."""
    return value.flatten(2) if value.dim() == 4 else value.reshape(len(value), -1, value.shape[-1]).mT
