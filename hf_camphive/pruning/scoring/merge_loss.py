"""The loss of a merge: the cost of replacing a channel by its best linear prediction from the remaining channels.

Plain removal replaces the activation a_s of a channel by 0. Merging replaces it by sum_t b_st a_t + b_s1, so only the
residual d_s = a_s - sum_t b_st a_t - b_s1 is lost. To first order it changes the logits of image n by J_n d_s: a channel
that the others predict well costs little, even if the network depends on it. All functions here are pure; they compute
from products of gradients and activations at the inputs of the channels' consumers.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from math import inf, nextafter
from typing import cast

import torch
from torch import Tensor, fx

from hf_camphive.core.runtime import to_float64
from hf_camphive.curvature.gates import GatedNetwork
from hf_camphive.network.graph.program import compute, operation
from hf_camphive.network.graph.tracing import Trace
from hf_camphive.pruning.tuning import REMOVAL_STRIDE, SCORE_RIDGE

Product = tuple[Tensor, Tensor]


def mergeable(network: GatedNetwork) -> frozenset[str]:
    """Return the names of the groups whose merges can be scored.

    Each consumer of such a group reads one input position per channel (no flattened maps), runs once in a forward pass,
    and has no convolution groups.
    """
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
    """Yield (group, M [N, C, C + 1], S [C + 1, C + 1]) for each consumer of each group in `names`.

    With a the group's channels as the consumer reads them, followed by a constant 1, and g = J^T z their gradients for
    the cotangent z of each image's logits:

        M_nst = sum over positions of g_s a_t           (image n)
        S_st  = sum over images and positions of a_s a_t
    """
    trace = network.trace
    slots: dict[str, list[tuple[str, Tensor]]] = {
        slot.tensor: [] for group in trace.groups if group.name in names for slot in group.consumers()
    }
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
    """Return the loss of merging each channel into those that remain at its turn in a greedy order, [C] in float64.

    score_s = 1/2 sum_n move_sn^2 with the order and moves of `merge_moves`, replaced by its running maximum along the
    order, so that sorting by score gives the greedy order back.
    """
    order, moves = merge_moves(products, second, ridge)
    scores = torch.zeros(len(order), dtype=torch.float64)
    scores[order] = (0.5 * moves[order].square().sum(1)).cummax(0).values.cpu()
    return scores


def merge_moves(products: Tensor, second: Tensor, ridge: float = SCORE_RIDGE) -> tuple[Tensor, Tensor]:
    """Merge channels one after another, cheapest first, and return their order [C] and the moves of the logits [C, N].

    The move of channel s is the first-order change of z_n^T logits_n when its best prediction from the channels t that
    remain at its turn replaces it:

        move_sn = M_nss - sum_t b_st M_nst - b_s1 M_ns1

    with b the ridge regression of a_s on the a_t and a constant (`ridge` is relative to the mean squared activation; the
    constant is not damped). Each round removes the 1 / `REMOVAL_STRIDE` of the remaining channels with the least
    1/2 sum_n move_sn^2. Consumers then read the predictions, so the gradients of the remaining channels become
    g_t + b_st g_s in all later rounds.

    `products` is M [N, C, C + 1] divided by the square root of the number of images, `second` is S [C + 1, C + 1]
    (`consumer_products`).
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
        coefficients = precision[:-1] / precision.diagonal()[:-1, None]  # row s: 1 at s, -b_st at t
        moved = to_float64(torch.einsum("nst,st->ns", products, coefficients.to(products)))
        going = moved.square().sum(0).cpu().argsort(stable=True)[: -(-len(left) // REMOVAL_STRIDE)]
        moves[left[going]] = moved.cpu()[:, going].T
        order.append(left[going])
        stay = torch.ones(len(left), dtype=torch.bool)
        stay[going] = False
        kept, gone = (where.nonzero()[:, 0].to(precision.device) for where in (stay, ~stay))
        read = torch.cat([kept, kept.new_tensor([len(left)])])
        solved = torch.linalg.solve(
            precision[gone][:, gone], precision[gone][:, read]
        )  # -b of the channels removed in this round
        passed = torch.einsum("st,nsu->ntu", solved[:, :-1].to(products), products[:, gone][:, :, read])
        products = products[:, kept][:, :, read] - passed
        precision = precision[read][:, read] - precision[read][:, gone] @ solved
        left = left[stay]
    return torch.cat(order), moves


def joint_losses(descents: Mapping[str, tuple[Tensor, Tensor]], costs: Mapping[str, float]) -> dict[str, Tensor]:
    """Score the channels of several groups by the loss that each merge adds to those before it, in any layer.

    With X [N] the sum of all moves so far, over all groups, merging channel s adds

        1/2 |X + move_s|^2 - 1/2 |X|^2 = X . move_s + 1/2 |move_s|^2

    so that errors of different layers may cancel or add up (the greedy choice of SOSP-I, arXiv:2110.11395, for merges in
    place of removals). Within a group channels follow the order of `merge_moves`. The group whose next channel adds the
    least loss per cost is next. A channel's score is that loss per cost, raised to just above the previous one where it
    is not larger, times the cost.

    `descents` holds (order [C], moves [C, N]) by group, `costs` the cost of one channel of each group. Returns scores
    [C] in float64 by group.
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
        price = nextafter(max(price, float(prices[next_])), inf)  # strictly rising, so that sorting keeps the order
        scores[name][descents[name][0][at[name]]] = price * costs[name]
        moved = moved + heads[next_]
        at[name] += 1
        if at[name] == len(scores[name]):
            names.remove(name)
    return scores


def _weight(trace: Trace, node: fx.Node) -> str | None:
    """Return the name of the weight of a convolution or linear layer, None for any other operation."""
    return trace.graph.tensors.get(node.args[1]) if operation(node) in ("conv2d", "linear") else None


def _run(
    trace: Trace, state: Mapping[str, Tensor], images: Tensor, wanted: Mapping[str, object]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the network and return its logits, and the inputs of the layers whose weight is in `wanted`, by weight.

    The inputs require gradients, so that the logits can be differentiated in each of them.
    """
    graph = trace.graph
    inputs: dict[str, Tensor] = {}
    values = graph.bind(state) | {graph.image: images}
    for node in graph.operations:
        weight = _weight(trace, node)
        if weight in wanted:
            x = values[node.args[0]]
            inputs[weight] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            values[node] = compute(node, values | {node.args[0]: inputs[weight]})
        else:
            values[node] = compute(node, values)
    return cast(Tensor, values[graph.logits]), inputs


def _channels_first(value: Tensor) -> Tensor:
    """Reshape a layer's input [N, C, H, W] or [N, ..., C] to [N, C, positions]."""
    return value.flatten(2) if value.dim() == 4 else value.reshape(len(value), -1, value.shape[-1]).mT
