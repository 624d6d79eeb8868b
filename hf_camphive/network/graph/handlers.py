"""Define the effect of each operation of a traced network on channels, one row of HANDLERS for each operation.

A handler takes the labels found so far and a node, and returns the labels of the node's result. An operation without a row
freezes all channels that it reads.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from hf_camphive.core.errors import ConfigError
from hf_camphive.network.graph.labels import (
    NO_CHANNEL,
    Labels,
    UnsupportedOperation,
    compact,
    shape_of,
    sizes,
    spread,
    thin,
    varies,
)
from hf_camphive.network.graph.program import (
    REMOVED_SUFFIX,
    argument_of,
    module_of,
    operation,
    standardised,
    weight_of,
)

aten = torch.ops.aten
ELEMENTWISE = tuple(
    "add sub rsub mul div relu relu6 hardtanh clamp clamp_min clamp_max silu sigmoid log_sigmoid hardsigmoid hardswish "
    "tanh gelu elu selu leaky_relu prelu mish softplus neg abs exp log sin cos erf pow square sqrt rsqrt reciprocal "
    "maximum minimum where masked_fill dropout feature_dropout alpha_dropout clone contiguous alias detach _to_copy to "
    "type_as lift_fresh_copy".split()
)


def follow(labels: Labels, node: fx.Node) -> Any:
    """Return the labels of a node's result; an operation that is not supported freezes the channels that it reads."""
    if not isinstance(node.meta.get("val"), (Tensor, list, tuple)):
        return node.target(*fx.node.map_arg(node.args, labels.values.__getitem__))  # a size
    if all(used in labels.known or isinstance(labels.values.get(used), int) for used in node.all_input_nodes):
        return _known(labels, node)
    try:
        return HANDLERS.get(operation(node), unknown)(labels, node)
    except UnsupportedOperation as reason:
        return unknown(labels, node, str(reason))


def _known(labels: Labels, node: fx.Node) -> Any:
    """Compute a value that depends on neither image nor weights, since it may select positions later; return its labels."""
    values = labels.values | labels.known
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    labels.known[node] = node.target(*args, **kwargs)
    return _no_channels(node)


def unknown(labels: Labels, node: fx.Node, reason: str = "is not understood") -> Any:
    """Freeze all channels that a node reads, with the reason; its result belongs to no channel."""
    where = f"{operation(node)} in {module_of(node) or 'the network'} {reason}"
    for used in node.all_input_nodes:
        value = labels.of(used)
        for part in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(part, Tensor):
                labels.freeze(part, where)
    return _no_channels(node)


def _no_channels(node: fx.Node) -> Any:
    """Return labels for a node whose result belongs to no channel."""
    value = node.meta["val"]
    if isinstance(value, (tuple, list)):
        return [torch.tensor(NO_CHANNEL).expand(sizes(part)) for part in value]
    return torch.tensor(NO_CHANNEL).expand(sizes(value))


# Layers with weights


def _convolution(labels: Labels, node: fx.Node) -> Tensor:
    """Read the channels of axis 1 and create new ones; a depthwise convolution keeps them.

    Raises:
        UnsupportedOperation: The weight is computed by the network.
    """
    weight, bias, groups = _layer_weight(labels, node), argument_of(node, 2), argument_of(node, 6, 1)
    out_channels, per_group = node.args[1].meta["val"].shape[:2]
    shape = shape_of(node)
    labels.positions[weight] += prod(shape[2:])
    atoms = labels.channels(node.args[0], 1)
    if groups > 1 and per_group == 1:  # depthwise: channel o of the output is channel o // m of the input
        out = atoms.repeat_interleave(out_channels // groups)
        labels.place(out, weight, 0, "affine")
        labels.count(node, groups, spread(atoms, (1, groups), 1), 1)
    else:
        tied = atoms.view(groups, per_group)
        for block in tied[1:]:  # convolution groups keep equal widths if each loses the same offsets
            labels.couple(tied[0], block)
        labels.place(tied[0], weight, 1, "consumer")
        if standardised_in(node):
            labels.place(tied[0], f"{weight}{REMOVED_SUFFIX}", 0, "statistics")
        out = labels.new_atoms(out_channels)
        for block in out.view(groups, -1)[1:]:
            labels.couple(out.view(groups, -1)[0], block)
        labels.place(out, weight, 0, "producer")
    if standardised_in(node):
        gain = node.args[1].args[0].args[1]
        if gain is not None:
            labels.couple(out, labels.channels(gain, 0))
    if bias is not None:
        labels.place(out, labels.name_of(bias), 0, "affine")
    return spread(out, shape, 1)


def _layer_weight(labels: Labels, node: fx.Node) -> str:
    """Return the name of a layer's weight.

    Raises:
        UnsupportedOperation: The weight is computed by the network.
    """
    weight = weight_of(node)
    if weight is None:
        raise UnsupportedOperation("computes its weight")
    return labels.name_of(weight)


def standardised_in(node: fx.Node) -> bool:
    """Return whether a convolution's weight is standardised first."""
    return weight_of(node) is not node.args[1]


def _linear(labels: Labels, node: fx.Node) -> Tensor:
    """Read the channels of the last axis and create new ones, unless the last axis does not hold channels."""
    weight, bias = _layer_weight(labels, node), argument_of(node, 2)
    shape = shape_of(node)
    labels.positions[weight] += prod(shape[:-1])
    found = compact(labels.of(node.args[0]))
    if not varies(found, found.dim() - 1):  # mixes positions, not channels
        return found.narrow(-1, 0, 1).expand(shape)
    labels.place(labels.channels(node.args[0], -1), weight, 1, "consumer")
    out = labels.new_atoms(shape[-1])
    labels.place(out, weight, 0, "producer")
    if bias is not None:
        labels.place(out, labels.name_of(bias), 0, "affine")
    return spread(out, shape, len(shape) - 1)


# Norms


def _batch_norm(labels: Labels, node: fx.Node) -> Tensor:
    """Keep the channels of axis 1, which index the statistics, gain and bias.

    Raises:
        UnsupportedOperation: The statistics are those of the batch.
    """
    if standardised(node) is not None:
        return _no_channels(node)
    if argument_of(node, 5):
        raise UnsupportedOperation("takes its statistics from the batch")
    atoms = labels.channels(node.args[0], 1)
    for tensor in node.args[1:5]:
        if tensor is not None:
            labels.place(atoms, labels.name_of(tensor), 0, "affine")
    return spread(atoms, shape_of(node), 1)


def _layer_norm(labels: Labels, node: fx.Node) -> Tensor:
    """Keep the channels of the last axis, over which the statistics run.

    Raises:
        UnsupportedOperation: The norm runs over several axes.
    """
    if len(node.args[1]) > 1:
        raise UnsupportedOperation("normalises over several axes")
    shape = shape_of(node)
    atoms = labels.channels(node.args[0], -1)
    labels.count(node, node.args[1][0], spread(atoms, (1, len(atoms)), 1), 1)
    affine = node.args[2:4] if operation(node) == "layer_norm" else node.args[2:3]
    return _normed(labels, node, atoms, affine, shape, len(shape) - 1)


def _group_norm(labels: Labels, node: fx.Node) -> Tensor:
    """Keep the channels of axis 1; with several norm groups, all channels of one norm group are joined."""
    groups, atoms = node.args[1], labels.channels(node.args[0], 1)
    if groups > 1:  # only whole norm groups are removed, so that the statistics of the others do not change
        labels.join_along(compact(atoms.view(groups, -1)), 1)
    return _normed(labels, node, atoms, node.args[2:4], shape_of(node), 1)


def _normed(labels: Labels, node: fx.Node, atoms: Tensor, affine: tuple, shape: tuple[int, ...], axis: int) -> Tensor:
    """Record the gain and bias of a norm, and its statistics if they run over channels; return the labels of the result."""
    for tensor in affine:
        if tensor is not None:
            labels.place(atoms, labels.name_of(tensor), 0, "affine")
    if (gone := node.kwargs.get("gone")) is not None:
        labels.place(atoms, labels.graph.tensors[gone], 0, "statistics")
    return spread(atoms, shape, axis)


# Element-wise operations, pooling and reductions


def _elementwise(labels: Labels, node: fx.Node) -> Tensor:
    """Couple the channels of all operands, element by element."""
    joint = torch.tensor(NO_CHANNEL)
    for used in node.all_input_nodes:
        value = labels.of(used)
        if isinstance(value, Tensor):
            joint = labels.couple(joint, value)
    return joint.expand(shape_of(node))


def _pool(labels: Labels, node: fx.Node) -> Tensor:
    """Keep the channels of axis 1.

    Raises:
        UnsupportedOperation: The value is not [N, C, H, W].
    """
    shape = shape_of(node)
    if len(shape) != 4:
        raise UnsupportedOperation("is followed for images only")
    return spread(labels.channels(node.args[0], 1), shape, 1)


def _reduce(labels: Labels, node: fx.Node) -> Tensor:
    """Remove the reduced axes; channels that lie along them are joined if channels also lie along other axes.

    Raises:
        UnsupportedOperation: All axes along which channels lie are reduced.
    """
    found = labels.of(node.args[0])
    axes = argument_of(node, 2 if operation(node) == "linalg_vector_norm" else 1)
    axes = list(range(found.dim())) if not axes and axes != 0 else [axes] if isinstance(axes, int) else axes
    axes = [axis % found.dim() for axis in axes]
    varying = [axis for axis in range(found.dim()) if varies(compact(found), axis)]
    if set(varying) & set(axes):
        if set(varying) <= set(axes):
            raise UnsupportedOperation("averages over channels")
        for axis in axes:  # channels that are added up must be removed together
            found = labels.join_along(found, axis)
    for axis in sorted(axes, reverse=True):
        found = (
            found.select(axis, 0) if len(shape_of(node)) < labels.of(node.args[0]).dim() else found.narrow(axis, 0, 1)
        )
    return found.expand(shape_of(node))


def _softmax(labels: Labels, node: fx.Node) -> Tensor:
    """Join all channels along the axis of the softmax."""
    found = compact(labels.of(node.args[0]))
    return labels.join_along(found, node.args[1] % found.dim()).expand(found.shape)


# Attention: only whole heads can be removed


def _product(labels: Labels, a: Tensor, b: Tensor) -> Tensor:
    """Return the labels of a @ b, after joining all channels that are added up in one sum.

    Raises:
        UnsupportedOperation: An operand is a vector.
    """
    if min(a.dim(), b.dim()) < 2:
        raise UnsupportedOperation("multiplies a vector")
    a, b = compact(a), compact(b)
    rows, columns = a.shape[-2], b.shape[-1]
    a, b = thin(a)[..., :, None, :], thin(b).mT[..., None, :, :]
    joint = labels.join_along(compact(labels.couple(a, b)), -1).squeeze(-1)
    return joint.expand(*joint.shape[:-2], rows, columns)


def _matmul(labels: Labels, node: fx.Node) -> Tensor:
    """Join the channels that are added up in one sum of a matrix product."""
    return _product(labels, labels.of(node.args[0]), labels.of(node.args[1])).expand(shape_of(node))


def _attention(labels: Labels, node: fx.Node) -> Tensor:
    """Join channels as softmax(q k^T + mask) v does when written as separate operations."""
    query, key, value = (labels.of(argument) for argument in node.args[:3])
    weights = _product(labels, query, key.mT)
    if (mask := argument_of(node, 3, node.kwargs.get("attn_mask"))) is not None:
        weights = labels.couple(weights, labels.of(mask))
    weights = compact(weights)
    weights = labels.join_along(weights, weights.dim() - 1).expand(weights.shape)
    return _product(labels, weights, value).expand(shape_of(node))


# Moving data


def _move(labels: Labels, node: fx.Node) -> Any:
    """Run an operation that only moves data on the labels themselves."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: _operand(labels, used))
    target = aten.reshape.default if operation(node) == "view" else node.target
    result = target(*args, **kwargs)
    if isinstance(result, Tensor):
        result = compact(result)
        labels.keep_rectangular(result)
    return result


def _operand(labels: Labels, used: fx.Node) -> Any:
    """Return the labels of an argument, or the number itself for a size."""
    value = labels.values.get(used)
    return value if isinstance(value, (int, list, tuple)) else labels.of(used)


def _reshape(labels: Labels, node: fx.Node) -> Tensor:
    """Reshape the labels, and record the sizes in the arguments that count channels."""
    if any(standardised(user) is not None and user.args[0] is node for user in node.users):
        return _no_channels(node)  # the convolution that reads the weight follows its channels
    result = _move(labels, node)
    asked = node.args[1] if operation(node) in ("view", "reshape", "expand") else argument_of(node, 2, ())
    asked = asked if isinstance(asked, (list, tuple)) else ()
    first = node.args[1] % labels.of(node.args[0]).dim() if operation(node) == "unflatten" else 0
    for offset, number in enumerate(asked):
        labels.count(node, number, result, first + offset)
    return result


def _reshape_as(labels: Labels, node: fx.Node) -> Tensor:
    """Reshape or expand the labels to the shape of the result."""
    found, shape = labels.of(node.args[0]), shape_of(node)
    result = compact(found.expand(shape) if operation(node) == "expand_as" else found.reshape(shape))
    labels.keep_rectangular(result)
    return result


def _split(labels: Labels, node: fx.Node) -> list[Tensor]:
    """Split the labels, and couple parts of equal size, because one number in the network's code gives the size of all.

    Raises:
        UnsupportedOperation: Parts differ in size, and the sizes are not given one by one.
    """
    parts = [compact(part) for part in _move(labels, node)]
    axis = argument_of(node, 2, 0) % parts[0].dim()
    for i, part in enumerate(parts if any(varies(part, axis) for part in parts) else ()):
        twin = next(other for other in parts if other.shape == part.shape)
        if operation(node) == "split_with_sizes":
            labels.count(node, node.args[1][i], part, axis)
        elif part.shape != parts[0].shape:
            raise UnsupportedOperation("makes parts of unequal size")
        labels.couple(twin, part)
    if operation(node) == "split":
        labels.count(node, node.args[1], parts[0], axis)
    return parts


def _slice(labels: Labels, node: fx.Node) -> Tensor:
    """Slice the labels, and record the bounds of the slice, each of which counts the channels before it."""
    result = _move(labels, node)
    whole = compact(labels.of(node.args[0]))
    axis = argument_of(node, 1, 0) % whole.dim()
    for position in (2, 3) if operation(node) == "slice" else ():
        number = argument_of(node, position)
        if isinstance(number, int) and 0 < number < whole.shape[axis]:
            labels.count(node, number, whole.narrow(axis, 0, number), axis)
    return result


def _index(labels: Labels, node: fx.Node) -> Tensor:
    """Select positions by indices that are constants of the network.

    Raises:
        UnsupportedOperation: The indices are computed from the image or from weights.
    """
    if any(used is not None and used not in labels.known for used in node.args[1]):
        raise UnsupportedOperation("chooses positions by what it computes")
    result = compact(aten.index(labels.of(node.args[0]), [used and labels.known[used] for used in node.args[1]]))
    labels.keep_rectangular(result)
    return result


def _resample(labels: Labels, node: fx.Node) -> Tensor:
    """Keep the channels of axis 1: each plane [H, W] is resampled separately."""
    return spread(labels.channels(node.args[0], 1), shape_of(node), 1)


def _pad(labels: Labels, node: fx.Node) -> Tensor:
    """Pad the labels: positions added along an axis on which channels vary belong to no channel."""
    found = compact(labels.of(node.args[0]))
    widths = list(node.args[1])
    for offset in range(len(widths) // 2):
        axis = found.dim() - 1 - offset
        if not varies(found, axis):
            shape = list(found.shape)
            shape[axis] = shape_of(node)[axis]
            found = found.narrow(axis, 0, 1).expand(shape)
            widths[2 * offset : 2 * offset + 2] = [0, 0]
    return aten.constant_pad_nd(found, widths, NO_CHANNEL) if any(widths) else found


Handler = Callable[[Labels, fx.Node], Any]
HANDLERS: dict[str, Handler] = {
    "conv2d": _convolution,
    "linear": _linear,
    **dict.fromkeys(["batch_norm", "standardised_weight"], _batch_norm),
    **dict.fromkeys(["layer_norm", "rms_norm"], _layer_norm),
    "group_norm": _group_norm,
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys("max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d".split(), _pool),
    **dict.fromkeys("mean sum amax amin linalg_vector_norm".split(), _reduce),
    "softmax": _softmax,
    **dict.fromkeys(["matmul", "bmm"], _matmul),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys("view reshape unflatten expand".split(), _reshape),
    **dict.fromkeys("reshape_as view_as expand_as".split(), _reshape_as),
    **dict.fromkeys("split split_with_sizes chunk".split(), _split),
    **dict.fromkeys("slice narrow".split(), _slice),
    **dict.fromkeys(
        "flatten permute transpose unsqueeze squeeze cat stack select unbind getitem roll flip pixel_shuffle "
        "pixel_unshuffle channel_shuffle repeat t mT movedim".split(),
        _move,
    ),
    "index": _index,
    **dict.fromkeys("upsample_nearest2d upsample_bilinear2d upsample_bicubic2d".split(), _resample),
    **dict.fromkeys(["pad", "constant_pad_nd"], _pad),
}


def register_operation(name: str, handler: Handler) -> None:
    """Register a handler for an operation that tracing does not support; `name` is the operation's, such as "conv2d".

    `handler` takes the `Labels` found so far and the operation's node, and returns the labels of the node's result.

    Raises:
        ConfigError: The operation has a handler already.
    """
    if name in HANDLERS:
        raise ConfigError(
            f"operation {name!r} has a handler already; register another name, or change the handler that it has"
        )
    HANDLERS[name] = handler
