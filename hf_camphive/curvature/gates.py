"""Define channel gates, the S numbers in whose space channels are scored, and networks as functions of their gates.

A gate m_c = 1 multiplies the input that the consumers of channel c read; removing channel c means m_c = 0. A vector in
gate space has one entry for each channel. The loss depends on m only through the consumer weights m_c * theta_c, which
are linear in m:

    gate gradient  g_c = <theta_c, dL/dtheta>          theta_c: the consumer slices of channel c
    gate Hessian   A   = lift^T H lift,  lift(u) = sum_c u_c theta_c

`GatedNetwork` is a traced network as a function of these gates. It is always in eval mode, so that the loss does not
depend on dropout, stochastic depth or batch statistics.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from hf_camphive.curvature.cotangents import softmax_factors
from hf_camphive.curvature.gate_autograd import Affine, Gate
from hf_camphive.network.graph.program import TracedProgram, argument_of, compute, operation, weight_of
from hf_camphive.network.graph.tracing import Trace


@dataclass(frozen=True)
class GateSpace:
    """The assignment of gates to channel groups and to the inputs of layers.

    `size` is S, the number of gates. `slices[group]` selects the group's gates among all S. `inputs[weight]` is [C_in], the
    gate of each input channel of the layers that use this weight, S for an input channel without a gate.
    """

    size: int
    slices: Mapping[str, slice]
    inputs: Mapping[str, Tensor]

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Split values of all gates [S] into one tensor [C] for each group."""
        return {name: values[where] for name, where in self.slices.items()}


def gate_space(trace: Trace, state: Mapping[str, Tensor]) -> GateSpace:
    """Return the space that has one gate for each channel of every group that is not frozen."""
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
    """Return lift(u) = sum_c u_c theta_c: a direction in weight space, {consumer weight: tensor}, for u [S]."""
    padded = torch.cat([u, u.new_zeros(1)])  # inputs without a gate have no direction
    return {
        name: state[name] * padded[index].view(1, -1, *[1] * (state[name].dim() - 2))
        for name, index in gates.inputs.items()
    }


def restrict(gates: GateSpace, state: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> Tensor:
    """Return lift^T d [S]: <theta_c, d> for every gate and a direction d in weight space."""
    total = torch.zeros(gates.size + 1, dtype=next(iter(direction.values())).dtype)
    for name, index in gates.inputs.items():
        products = (state[name] * direction[name]).movedim(1, 0).flatten(1).sum(1)
        total.index_add_(0, index, products)
    return total[:-1]


@dataclass(frozen=True)
class GatedRun:
    """The values of a network on a batch of images with all gates at 1, to be differentiated with respect to the gates.

    `m` are the gates: [S] shared by all images, or [N, S], one set for each image. `logits` [N, K] require gradients with
    respect to `m`, but to no weight. `values` holds the result of each operation.
    """

    m: Tensor
    logits: Tensor
    network: "GatedNetwork"
    values: Mapping[fx.Node, object]

    def transposed(self, z: Tensor) -> Tensor:
        """Return J^T z, of the shape of m, for z [N, K], by one backward pass."""
        return torch.autograd.grad(self.logits, self.m, z.to(self.logits), retain_graph=True)[0]

    def tangent(self, u: Tensor) -> Tensor:
        """Return J u [N, K] for u [S] or [N, S], by one forward pass over derivatives only."""
        program, maps = self.network.trace.graph, self.network.maps
        padded = torch.cat([u, torch.zeros_like(u[..., :1])], dim=-1)
        tangents: dict[fx.Node, Tensor] = {}
        last_reader = {source: node for node in program.operations for source in node.all_input_nodes}
        for node in program.operations:
            moving = {source: tangents[source] for source in node.all_input_nodes if source in tangents}
            if (index := self.network.gates_read_by(node)) is not None:
                source = node.args[0]
                change = self.values[source].detach() * _aligned(padded, index, node, self.values[source])
                moving[source] = change + moving[source] if source in moving else change
            if moving and node in maps:
                tangents[node] = maps[node].linear(moving[node.args[0]])
            elif moving:
                tangents[node] = self._tangent_of(node, moving)
            for source in moving:
                if last_reader[source] is node:
                    tangents.pop(source, None)
        return tangents[program.logits]

    def _tangent_of(self, node: fx.Node, moving: Mapping[fx.Node, Tensor]) -> Tensor:
        """Return the derivative of one operation's result, from the derivatives `moving` of its inputs."""
        at = {source: self.values[source].detach() for source in moving}

        def value(*inputs: Tensor) -> object:
            return compute(node, {**self.values, **dict(zip(moving, inputs))})

        with torch.no_grad():
            return torch.func.jvp(value, tuple(at.values()), tuple(moving.values()))[1]


@dataclass(frozen=True, eq=False)
class GatedNetwork:
    """A traced network with the weights `state` (`named_tensors`), as a function of its channel gates.

    Everything that does not depend on images (gates, norms folded into convolutions) is computed once.
    """

    trace: Trace
    state: Mapping[str, Tensor]

    @cached_property
    def gates(self) -> GateSpace:
        """Gates of every group that is not frozen."""
        return gate_space(self.trace, self.state)

    @cached_property
    def maps(self) -> dict[fx.Node, "AffineMap | _FoldedNorm"]:
        """Affine maps of the convolutions; a norm that is the only reader of a convolution is folded into it."""
        return _affine_maps(self.trace.graph, self.state)

    def run(self, images: Tensor, each: bool = False) -> GatedRun:
        """Run images [N, C, H, W] with all gates at 1; with `each`, every image has its own set of gates."""
        program, maps = self.trace.graph, self.maps
        shape = (len(images), self.gates.size) if each else (self.gates.size,)
        m = torch.ones(shape, dtype=images.dtype, device=images.device, requires_grad=True)
        values: dict[fx.Node, object] = program.bind(self.state) | {program.image: images}
        with torch.enable_grad():
            padded = torch.cat([m, torch.ones_like(m[..., :1])], dim=-1)
            for node in program.operations:
                seen = values
                if (index := self.gates_read_by(node)) is not None:
                    x = values[node.args[0]]
                    seen = values | {node.args[0]: Gate.apply(x, _aligned(padded, index, node, x))}
                values[node] = maps[node](seen[node.args[0]]) if node in maps else compute(node, seen)
        return GatedRun(m, values[program.logits], self, values)

    def gradients(self, images: Tensor, cotangent: Callable[[Tensor], Tensor]) -> Tensor:
        """Return g_n = J_n^T z_n for each image, [N, S], by one backward pass without a loop over images.

        J_n is the Jacobian of image n's logits with respect to its gates, and z = cotangent(logits) [N, K] is taken as a
        constant. With `label_cotangent`, g_n is the gate gradient of the image's own cross-entropy.
        """
        run = self.run(images, each=True)
        return run.transposed(cotangent(run.logits.detach()))

    def factor(self, images: Tensor, passes: int, signs: Tensor) -> Tensor:
        """Return rows Z [min(passes, K - 1) * N, S] with E[Z^T Z] = J^T R J, summed over the images.

        R = diag(p) - p p^T is the Hessian of the cross-entropy with respect to the logits. Takes one backward pass for each
        vector that `softmax_factors` returns; `signs` [N, K] are its random signs.
        """
        run = self.run(images, each=True)
        return torch.cat([run.transposed(z) for z in softmax_factors(run.logits.detach(), signs, passes)])

    def gates_read_by(self, node: fx.Node) -> Tensor | None:
        """Return the gate of each input channel of a layer, [C_in]; None for an operation that reads no gated channel."""
        return self.gates.inputs.get(self.trace.graph.tensors.get(weight_of(node)))


def _aligned(padded: Tensor, index: Tensor, node: fx.Node, x: Tensor) -> Tensor:
    """Return the gate of each channel of x, in a shape that broadcasts against x.

    `padded` [..., S + 1] are the gates with 1 or 0 appended, `index` [C_in] selects among them. The inputs of a grouped
    convolution share the gates of its weight's input axis, so these are repeated for each convolution group.
    """
    scale = padded[..., index]
    if scale.dim() > 1 and len(scale) < len(x):  # attention windows: those of one image are adjacent
        scale = scale.repeat_interleave(len(x) // len(scale), dim=0)
    if operation(node) == "linear":
        return scale.view(*scale.shape[:-1], *[1] * (x.dim() - scale.dim()), -1)
    return scale.repeat(*[1] * (scale.dim() - 1), x.shape[1] // len(index))[..., None, None]


@dataclass(frozen=True)
class AffineMap:
    """An affine map f(x) = linear(x) + bias: a convolution of the graph, with a norm folded in where `then` was used.

    `weight` is [C_out, C_in, kH, kW], `geometry` holds stride, padding, dilation and groups.
    """

    weight: Tensor
    bias: Tensor | None
    geometry: Mapping[str, object]

    def linear(self, x: Tensor) -> Tensor:
        """Return f(x) without the bias."""
        return F.conv2d(x, self.weight, **self.geometry)

    def __call__(self, x: Tensor) -> Tensor:
        affine = partial(F.conv2d, weight=self.weight, bias=self.bias, **self.geometry)
        return Affine.apply(x, affine, self.linear, partial(self._adjoint, tuple(x.shape)))

    def _adjoint(self, shape: tuple[int, ...], z: Tensor) -> Tensor:
        """Return the adjoint of `linear` applied to z, for an input of this shape."""
        return torch.nn.grad.conv2d_input(shape, self.weight, z, **self.geometry)

    def then(self, gain: Tensor, shift: Tensor) -> "AffineMap":
        """Return the map gain * f(x) + shift, for `gain` and `shift` [C_out]."""
        bias = shift if self.bias is None else shift + gain * self.bias
        return AffineMap(self.weight * gain.view(-1, 1, 1, 1), bias, self.geometry)


class _FoldedNorm:
    """The identity that replaces a norm which was folded into the convolution before it."""

    @staticmethod
    def linear(x: Tensor) -> Tensor:
        """Return x, which the convolution before has normalised."""
        return x

    __call__ = staticmethod(linear)


def _affine_maps(graph: TracedProgram, state: Mapping[str, Tensor]) -> dict[fx.Node, AffineMap | _FoldedNorm]:
    """Return the affine map of each convolution, with a norm that is its only reader folded in, and identities for such norms.

    Gates multiply the input of a convolution, so folding leaves the network's dependence on the gates unchanged and saves
    the norms in each pass. `Affine` gives autograd the linear part and its adjoint, because differentiating `conv2d` itself
    would spend further passes on weights that are constant.
    """
    users = Counter(used for node in graph.operations for used in node.all_input_nodes)
    maps: dict[fx.Node, AffineMap | _FoldedNorm] = {}
    for node in graph.operations:
        if operation(node) == "conv2d" and not isinstance(argument_of(node, 4, 0), str):
            weight, bias = (_tensor(graph, state, argument_of(node, i)) for i in (1, 2))
            if weight is not None and (bias is None) == (argument_of(node, 2) is None):
                keys = (("stride", 3, 1), ("padding", 4, 0), ("dilation", 5, 1), ("groups", 6, 1))
                maps[node] = AffineMap(weight, bias, {key: argument_of(node, i, default) for key, i, default in keys})
        elif operation(node) == "batch_norm" and isinstance(before := maps.get(node.args[0]), AffineMap):
            gain, shift, mean, variance = (_tensor(graph, state, argument_of(node, i)) for i in (1, 2, 3, 4))
            if users[node.args[0]] == 1 and None not in (gain, shift, mean, variance):
                gain = gain * torch.rsqrt(variance + node.args[7])
                maps[node.args[0]], maps[node] = before.then(gain, shift - gain * mean), _FoldedNorm()
    return maps


def _tensor(graph: TracedProgram, state: Mapping[str, Tensor], node: object) -> Tensor | None:
    """Return the weight or buffer that an operation's argument refers to; None for any other argument."""
    return state[graph.tensors[node]] if isinstance(node, fx.Node) and node in graph.tensors else None
