"""Second derivatives of the loss with respect to channel gates, by their products with vectors.

A gate m_c = 1 multiplies what the consumers of channel c read; removing c is m_c: 1 -> 0. In gate space a vector has one
entry a channel (S in all), and

    gate gradient  g_c = <theta_c, dL/dtheta>          theta_c: the consumer slices of channel c
    gate Hessian   A = lift^T H lift,  lift(u) = sum_c u_c theta_c

because the loss depends on m only through the consumer weights m_c * theta_c, which are linear in m. Pure functions of a
traced network's graph (always in eval mode, so that dropout, stochastic depth and batch statistics cannot move H).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .graph import compute, operation
from .tracing import Trace


@dataclass(frozen=True)
class GateSpace:
    """Which gate multiplies which input position of which layer.

    `slices[group]` are the group's gates among all S; `inputs[weight]` is [C_in] with the gate of each input channel of
    the layers that use this weight, S where it has none.
    """

    size: int
    slices: Mapping[str, slice]
    inputs: Mapping[str, Tensor]

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Values of all gates [S] as one tensor [C] a group."""
        return {name: values[where] for name, where in self.slices.items()}


def gate_space(trace: Trace, state: Mapping[str, Tensor]) -> GateSpace:
    """Gates for every group that is not frozen."""
    free = [group for group in trace.groups if not group.frozen]
    size = sum(group.size for group in free)
    slices: dict[str, slice] = {}
    inputs: dict[str, Tensor] = {}
    start = 0
    for group in free:
        slices[group.name] = slice(start, start + group.size)
        for slot in group.consumers():
            gates = inputs.setdefault(slot.tensor, torch.full((state[slot.tensor].shape[1],), size))
            gates[torch.tensor(slot.index)] = torch.arange(start, start + group.size).repeat_interleave(
                len(slot.index) // group.size
            )
        start += group.size
    return GateSpace(size, slices, inputs)


def lift(gates: GateSpace, state: Mapping[str, Tensor], u: Tensor) -> dict[str, Tensor]:
    """lift(u) = sum_c u_c theta_c: a direction in weight space, {consumer weight: tensor}, from one in gate space [S]."""
    padded = torch.cat([u, u.new_zeros(1)])  # inputs without a gate have no direction
    return {
        name: state[name] * padded[index].view(1, -1, *[1] * (state[name].dim() - 2))
        for name, index in gates.inputs.items()
    }


def restrict(gates: GateSpace, state: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> Tensor:
    """lift^T: <theta_c, direction> for every gate, [S]."""
    total = torch.zeros(gates.size + 1, dtype=next(iter(direction.values())).dtype)
    for name, index in gates.inputs.items():
        products = (state[name] * direction[name]).movedim(1, 0).flatten(1).sum(1)
        total.index_add_(0, index, products)
    return total[:-1]


def gated_logits(trace: Trace, state: Mapping[str, Tensor], gates: GateSpace, m: Tensor, images: Tensor) -> Tensor:
    """Logits [N, K] with gates m, [S] for all images or [N, S] for each."""
    graph = trace.graph
    padded = torch.cat([m, torch.ones_like(m[..., :1])], dim=-1)
    values: dict[fx.Node, object] = graph.bind(state) | {graph.image: images}
    last_use = {used: node for node in graph.operations for used in node.all_input_nodes}
    for node in graph.operations:
        index = gates.inputs.get(graph.tensors.get(node.args[1])) if operation(node) in ("conv2d", "linear") else None
        if index is None:
            values[node] = compute(node, values)
        else:
            source = node.args[0]
            values[node] = compute(node, values | {source: _gated(values[source], padded, index, node)})
        for used in node.all_input_nodes:
            if last_use[used] is node and used is not graph.logits:
                del values[used]
    return values[graph.logits]


def _gated(x: Tensor, padded: Tensor, index: Tensor, node: fx.Node) -> Tensor:
    """x times the gate of each of its channels; a grouped convolution reads its gates once per convolution group."""
    scale = padded[..., index]
    if operation(node) == "linear":
        return x * (scale if scale.dim() == 1 else scale.view(len(scale), *[1] * (x.dim() - 2), -1))
    repeats = x.shape[1] // len(index)
    return x * scale.repeat(*[1] * (scale.dim() - 1), repeats)[..., None, None]


def gate_gradients(
    trace: Trace,
    state: Mapping[str, Tensor],
    gates: GateSpace,
    images: Tensor,
    cotangent: Callable[[Tensor], Tensor],
) -> Tensor:
    """g_n = J_n^T z_n for each image, [N, S], in one backward pass without a loop over images.

    J_n is the Jacobian of image n's logits in its gates, z = cotangent(logits) [N, K] (not differentiated); with
    `label_cotangent` g_n is the gate gradient of the image's own cross-entropy.
    """
    m = torch.ones(len(images), gates.size, dtype=images.dtype, device=images.device, requires_grad=True)
    with torch.enable_grad():
        logits = gated_logits(trace, state, gates, m, images)
        return torch.autograd.grad(logits, m, cotangent(logits.detach()).to(logits))[0]


def label_cotangent(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient of each image's cross-entropy in its logits: p - onehot(label), [N, K]."""
    return logits.softmax(1) - F.one_hot(labels, logits.shape[1])


def curvature_cotangent(logits: Tensor, signs: Tensor) -> Tensor:
    """z = (diag(sqrt p) - p sqrt(p)^T) s for random signs s [N, K]: E[z z^T] = diag(p) - p p^T, the curvature R.

    Like drawing a label from the model (z = p - onehot(y), Martens 2020, section 5) it gives R in expectation; but where
    the model is sure, a drawn label is nearly always the same one and says nothing.
    """
    p = logits.double().softmax(1)
    s = p.sqrt() * signs
    return s - p * s.sum(1, keepdim=True)


def hessian_product(
    trace: Trace, state: Mapping[str, Tensor], gates: GateSpace, images: Tensor, labels: Tensor, u: Tensor
) -> Tensor:
    """A @ u [S] for the summed cross-entropy of a batch, by forward-over-reverse differentiation."""

    def gradient(m: Tensor) -> Tensor:
        return torch.func.grad(
            lambda m: F.cross_entropy(gated_logits(trace, state, gates, m, images), labels, reduction="sum")
        )(m)

    return torch.func.jvp(gradient, (torch.ones_like(u),), (u,))[1]


def gauss_newton_product(
    trace: Trace, state: Mapping[str, Tensor], gates: GateSpace, images: Tensor, labels: Tensor, u: Tensor
) -> Tensor:
    """J^T R J @ u [S], summed over a batch: J the Jacobian of the logits, R = diag(p) - p p^T. Labels play no part."""

    def logits(m: Tensor) -> Tensor:
        return gated_logits(trace, state, gates, m, images)

    ones = torch.ones_like(u)
    outputs, forward = torch.func.jvp(logits, (ones,), (u,))
    p = outputs.softmax(dim=1)
    inner = p * (forward - (p * forward).sum(dim=1, keepdim=True))
    return torch.func.vjp(logits, ones)[1](inner)[0]


PRODUCTS = {"hessian": hessian_product, "gauss-newton": gauss_newton_product}
