"""Change the widths of timm networks in place, and read the widths, shortcuts and attributes of changed networks.

Self-contained (torch, timm and `.layers` only): a copy of this file is shipped inside saved folders as remote code. The code
reads the shapes of tensors but not their values, because transformers builds networks on the meta device.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from timm.layers import SpaceToDepth
from torch import Tensor, nn

from .layers import ImplantedConv2d, Shortcut

Widths = Mapping[str, Sequence[int]]
Shortcuts = Mapping[str, Mapping[str, Sequence[str]]]
Attributes = Mapping[str, Mapping[str, int | Sequence[int]]]
_SIZED = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
_ATTRIBUTES = "camphive_attributes"
# What a forward pass raises if widths do not fit one another.
_UNFIT = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)


def widths_of(net: nn.Module) -> dict[str, list[int]]:
    """Return the weight shape of every convolution, linear layer, norm and `Shortcut` (its constant), by module name.

    Tensors of other modules, such as layer scales and position embeddings, are listed by their own names.
    """
    widths = {}
    for name, module in net.named_modules():
        if isinstance(module, Shortcut):
            widths[name] = list(module.constant.shape)
        elif isinstance(module, _SIZED):
            widths[name] = _shape(module)
        else:
            widths |= {f"{name}.{key}".lstrip("."): list(tensor.shape) for key, tensor in _loose(module)}
    return widths


def attributes_of(net: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the attributes of modules that `resize` has changed: {module: {attribute: value}}."""
    return {name: dict(values) for name, values in getattr(net, _ATTRIBUTES, {}).items()}


def shortcuts_of(net: nn.Module) -> dict[str, dict[str, list[str]]]:
    """Return the names of the children that each `Shortcut` of a network has kept, by module name."""
    return {
        name: {"shortcut": list(module.shortcut_names), "after": list(module.after_names)}
        for name, module in net.named_modules()
        if isinstance(module, Shortcut)
    }


def resize(net: nn.Module, widths: Widths, shortcuts: Shortcuts, attributes: Attributes | None = None) -> None:
    """Give the named layers these weight shapes, in place; blocks named in `shortcuts` become `Shortcut`s first.

    A resized tensor holds the leading corner of the old tensor, and zeros elsewhere: load the weights next. Layers that
    are not named are not changed. `attributes` gives new values of other attributes of modules, such as `num_heads`. The
    widths that timm networks publish (num_features, head_hidden_size, feature_info) are updated by one forward pass on the
    meta device. A convolution becomes an `ImplantedConv2d` if the widths name its `reads` or `makes`.

    Raises:
        ValueError: The network lacks a name, or a shape or attribute does not fit a layer, or shapes do not fit one another.
    """
    _replace_blocks(net, widths, shortcuts)
    _implant(net, widths)
    tied = _tied(net)
    for name, shape in widths.items():
        owner, _, key = name.rpartition(".")
        if key in dict(_loose(_module(net, owner))):
            _resize_tensor(name, _module(net, owner), key, list(shape))
        else:
            _resize_module(name, _module(net, name), list(shape))
    for first, *others in tied:
        for name in others:
            owner, _, key = name.rpartition(".")
            setattr(_module(net, owner), key, net.get_parameter(first))
    changed = attributes_of(net)
    for name, values in (attributes or {}).items():
        for key, value in values.items():
            _set_number(name, _module(net, name), key, value)
        changed[name] = changed.get(name, {}) | dict(values)
    if changed:
        setattr(net, _ATTRIBUTES, changed)
    if hasattr(net, "forward_features"):
        _update_features(net)


def with_ends_of(net: nn.Module, widths: Widths) -> dict[str, list[int]]:
    """Return the saved widths with the input channels and the classes of `net`; without those of a removed classifier."""
    fitted = {name: list(shape) for name, shape in widths.items()}
    for name in _names(net.pretrained_cfg.get("first_conv")):
        if name in fitted:
            fitted[name][1] = _shape(_module(net, name))[1]
    for name in _names(net.pretrained_cfg.get("classifier")):
        if isinstance(_module(net, name), nn.Identity):
            fitted.pop(name, None)
        elif name in fitted:
            fitted[name][0] = _shape(_module(net, name))[0]
    return fitted


def input_channels(net: nn.Module) -> int:
    """Return the number of channels of an image: those of the first convolution, before any space-to-depth stem."""
    folded = math.prod(module.bs**2 for module in net.modules() if isinstance(module, SpaceToDepth))
    for name in _names(net.pretrained_cfg.get("first_conv")):
        first: Any = net.get_submodule(name)
        return first.in_channels // folded
    return net.pretrained_cfg.get("input_size", (3,))[0]


def _shape(module: nn.Module) -> list[int]:
    """Return the weight shape of a layer; for a norm without affine parameters that of the weight it would have."""
    if module.weight is not None:
        return list(module.weight.shape)
    if isinstance(module, nn.LayerNorm):
        return list(module.normalized_shape)
    return [module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features]


def _loose(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the floating-point tensors, by name, that a module holds itself, unless it is a sized layer or a `Shortcut`."""
    if isinstance(module, (Shortcut, *_SIZED)):
        return []
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return [(key, tensor) for key, tensor in tensors if tensor.ndim and tensor.is_floating_point()]


def _tied(net: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that a network holds under several names."""
    names: dict[int, list[str]] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [same for same in names.values() if len(same) > 1]


def _resize_tensor(name: str, module: nn.Module, key: str, shape: list[int]) -> None:
    """Resize a tensor of a module that is not a sized layer; its number of axes cannot change.

    Raises:
        ValueError: `shape` has another number of axes.
    """
    old = list(getattr(module, key).shape)
    if len(shape) != len(old):
        raise ValueError(f"{name}: shape {old} cannot become {shape}")
    if shape != old:
        setattr(module, key, _resized(getattr(module, key), shape))


def _set_number(name: str, module: nn.Module, key: str, value: Any) -> None:
    """Set an attribute that holds a number, or a list or tuple of numbers, to a value of the same kind.

    Raises:
        ValueError: The module has no such attribute, or it holds another kind of value.
    """
    old = vars(module).get(key)
    if isinstance(value, int) and isinstance(old, int):
        setattr(module, key, value)
    elif isinstance(old, (list, tuple)) and not isinstance(value, int) and len(old) == len(value):
        setattr(module, key, type(old)(value))
    else:
        raise ValueError(f"{name} ({type(module).__name__}) holds {key}={old!r}, which cannot become {value!r}")


def _module(net: nn.Module, name: str) -> nn.Module:
    """Return a module by name.

    Raises:
        ValueError: The network has no such module.
    """
    try:
        return net.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{type(net).__name__} has no module {name!r}: {error}") from error


def _replace_blocks(net: nn.Module, widths: Widths, shortcuts: Shortcuts) -> None:
    """Replace the blocks named in `shortcuts` by a `Shortcut` each, unless they are such shortcuts already.

    Raises:
        ValueError: A block is a `Shortcut` that kept other children, or the widths do not give the size of its constant.
    """
    for name, kept in shortcuts.items():
        block = _module(net, name)
        if isinstance(block, Shortcut):
            if (tuple(kept["shortcut"]), tuple(kept["after"])) != (block.shortcut_names, block.after_names):
                raise ValueError(f"{name} is already a shortcut, which kept {shortcuts_of(net)[name]}, not {kept}")
        elif name not in widths:
            raise ValueError(f"{name} is to become a shortcut, but the widths do not say how many channels it has")
        else:
            net.set_submodule(name, Shortcut(block, kept["shortcut"], kept["after"], widths[name][0]))


def _implant(net: nn.Module, widths: Widths) -> None:
    """Replace each convolution for whose `reads` or `makes` there are widths by an `ImplantedConv2d` with these children."""
    parents = {name.rpartition(".")[0] for name in widths if name.rpartition(".")[2] in ("reads", "makes")}
    for name in sorted(parents):
        conv = _module(net, name)
        if isinstance(conv, nn.Conv2d):
            asked = [f"{name}.{child}" in widths for child in ("reads", "makes")]
            has = [getattr(conv, child, None) is not None for child in ("reads", "makes")]
            if asked != has:
                implanted = ImplantedConv2d(conv, *asked)
                for child in ("reads", "makes"):
                    if (old := getattr(conv, child, None)) is not None and getattr(implanted, child) is not None:
                        setattr(implanted, child, old)
                net.set_submodule(name, implanted)


def _resize_module(name: str, module: nn.Module, shape: list[int]) -> None:
    """Give a sized layer this weight shape, or the constant of a `Shortcut` this shape, in place.

    Raises:
        ValueError: The module is of another kind, or cannot have this shape.
    """
    if isinstance(module, Shortcut):
        module.constant = _resized(module.constant, shape)
        return
    if not isinstance(module, _SIZED):
        raise ValueError(
            f"{name} is a {type(module).__name__}; only convolutions, linear layers and norms have widths"
        )
    old = _shape(module)
    if shape == old:
        return
    if len(shape) != len(old) or shape[2:] != old[2:]:
        raise ValueError(f"{name}: weight shape {old} cannot become {shape}; only its first two sizes may change")
    if isinstance(module, nn.Conv2d):
        module.groups = _groups(name, module, shape)
        module.in_channels, module.out_channels = shape[1] * module.groups, shape[0]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = _norm_groups(name, module, shape[0])
        module.num_channels = shape[0]
    else:
        module.num_features = shape[0]
    # Other tensors with one entry for each output channel (bias, running statistics) follow the weight's first axis.
    for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if key == "weight":
            module.weight = _resized(tensor, shape)
        elif tensor.ndim and tensor.shape[0] == old[0]:
            setattr(module, key, _resized(tensor, [shape[0], *tensor.shape[1:]]))


def _groups(name: str, conv: nn.Conv2d, shape: list[int]) -> int:
    """Return the number of groups for this weight shape: that of a depthwise convolution follows its channels, others are kept.

    Raises:
        ValueError: The output channels cannot be split evenly into the groups.
    """
    if conv.groups == 1:
        return 1
    groups = conv.groups
    if conv.weight.shape[1] == 1:
        groups = shape[0] // (conv.out_channels // conv.groups)
    elif shape[1] == 1 and shape[0] % groups:
        groups = shape[
            0
        ]  # one cut left one input channel per group, which made it depthwise; a later cut removed groups
    if groups < 1 or shape[0] % groups:
        raise ValueError(f"{name}: {shape[0]} output channels cannot be split into its {conv.groups} groups evenly")
    return groups


def _norm_groups(name: str, norm: nn.GroupNorm, channels: int) -> int:
    """Return the number of groups of a GroupNorm for this number of channels: groups keep their size, a single group is kept.

    Raises:
        ValueError: The channels cannot be split into groups of that size.
    """
    if norm.num_groups == 1:
        return 1
    size = norm.num_channels // norm.num_groups
    if channels % size:
        raise ValueError(f"{name}: {channels} channels cannot be split into its norm groups of {size}")
    return channels // size


def _resized(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor of this shape with the leading corner of the old one and zeros elsewhere; parameters stay parameters."""
    new = tensor.detach().new_zeros(shape)
    corner = tuple(slice(min(a, b)) for a, b in zip(tensor.shape, shape))
    new[corner] = tensor.detach()[corner]
    return nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def _update_features(net: nn.Module) -> None:
    """Set num_features, head_hidden_size and feature_info from a forward pass on the meta device.

    Raises:
        ValueError: The network does not run with its widths.
    """
    twin = _meta_copy(net)

    def channels(x: Tensor) -> int:
        return x.shape[1 if x.ndim == 4 and getattr(net, "output_fmt", "NCHW") == "NCHW" else -1]

    def note(info: dict, output: Any) -> None:
        if isinstance(output, Tensor):  # some blocks return several
            info["num_chs"] = channels(output)

    infos = [dict(info) for info in getattr(net, "feature_info", ())]
    modules = dict(twin.named_modules())
    for info in infos:
        if info["module"] in modules:  # some networks list modules that they do not have
            modules[info["module"]].register_forward_hook(lambda module, inputs, output, info=info: note(info, output))
    size = (input_channels(net), *net.pretrained_cfg.get("input_size", (3, 224, 224))[1:])
    try:
        with torch.no_grad():
            dtype = [*twin.parameters(), *twin.buffers()][0].dtype
            features = twin.forward_features(torch.empty(1, *size, device="meta", dtype=dtype))
            hidden = twin.forward_head(features, pre_logits=True)
            twin.forward_head(features)
    except _UNFIT as error:
        raise ValueError(f"{type(net).__name__} does not run with these widths: {error}") from error
    if getattr(net, "embed_dim", None) == net.num_features:
        net.embed_dim = channels(features)
    net.num_features = channels(features)
    if hasattr(net, "head_hidden_size"):
        net.head_hidden_size = channels(hidden)
    if infos:
        net.feature_info = infos


def _meta_copy(net: nn.Module) -> nn.Module:
    """Return a copy of a network in eval mode on the meta device, which shares no tensor with it and needs no memory."""
    memo: dict[int, Any] = {id(tensor): tensor.detach().to("meta") for tensor in (*net.parameters(), *net.buffers())}
    memo |= {id(p): nn.Parameter(memo[id(p)], requires_grad=p.requires_grad) for p in net.parameters()}
    return copy.deepcopy(net, memo).eval()


def _names(value: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return one name, several names or None as a tuple of names."""
    return (value,) if isinstance(value, str) else tuple(value or ())
