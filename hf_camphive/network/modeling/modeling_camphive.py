"""Load a pruned timm network as a transformers model or as a timm architecture.

Self-contained (torch, timm, transformers and `.cifar` only): a copy of this file is shipped inside every saved folder
as remote code. The code reads the shapes of tensors but not their values, because transformers builds networks on the meta
device.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import timm
import torch
from timm.layers import SpaceToDepth
from timm.models import is_model, load_pretrained, register_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperForImageClassification

from .cifar import CifarResNet  # noqa: F401  (importing it registers the small networks in timm)

__all__ = [
    "CampHiVeForImageClassification",
    "CampHiVeTimmConfig",
    "ImplantedConv2d",
    "Shortcut",
    "attributes_of",
    "check_config",
    "resize",
    "shortcuts_of",
    "widths_of",
]

MODEL_TYPE = "camphive_timm"
ARCHITECTURE = "camphive"
Widths = Mapping[str, Sequence[int]]
Shortcuts = Mapping[str, Mapping[str, Sequence[str]]]
Attributes = Mapping[str, Mapping[str, int | Sequence[int]]]
_SIZED = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
_ATTRIBUTES = "camphive_attributes"
# Keys that a saved pretrained_cfg omits: the source of the dense weights, and values stored elsewhere in config.json.
_NOT_SAVED = {
    *("architecture", "url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load"),
    *("num_classes", "label_names", "label_descriptions", "label_offset"),
}
# The arguments that a config.json may give: those of `camphive`, and those that describe the layers of timm's networks.
# Other arguments can reach file loaders: `timm.create_model(checkpoint_path=...)` opens any file, before timm 1.0.26 as a
# pickle.
_MODEL_ARGS = frozenset(
    (
        "base widths shortcuts attributes "
        # inputs and outputs
        "num_classes in_chans img_size global_pool output_stride num_features feature_dim head_hidden_size "
        "head_bias head_norm head_norm_first head_init_scale head_conv_bias final_norm fc_norm use_fc_norm "
        "distillation distilled strict_img_size dynamic_img_size dynamic_img_pad pool_size pool_include_prefix "
        # dropout
        "drop_rate drop_path_rate drop_block_rate attn_drop_rate proj_drop_rate pos_drop_rate patch_drop_rate "
        "head_drop_rate "
        # kinds of layers: timm looks their names up in its own tables
        "act_layer norm_layer norm_layer_cl norm_eps aa_layer se_layer attn_layer attn_type attn_types pad_type "
        "bn_tf bn_eps bn_momentum init_values ls_init_value weight_init layer_scale_init_value "
        "layer_scale_init_values zero_init_last fix_init conv_init "
        # convolutional networks
        "layers depths dims channels cardinality base_width groups growth_rate bn_size kernel_size kernel_sizes "
        "expand_ratio expand_ratios bottle_ratio rd_ratio rd_divisor width width_mult width_factor depth_mult "
        "widen_factor deepen_factor ch_div se_ratio stem_type stem_size stem_width stem_chs stem_stride "
        "stem_kernel_size stem_bias fix_stem avg_down down_kernel_size replace_stem_pool block_reduce_first "
        "block_args conv_bias conv_mlp use_grn token_mixers mlp_bias memory_efficient inference_mode reparam "
        # transformers
        "patch_size depth embed_dim embed_dims num_heads heads head_dim mlp_ratio mlp_ratios qkv_bias qkv_fused "
        "proj_bias qk_norm class_token no_embed_class reg_tokens num_reg_tokens pre_norm use_post_norm pos_embed "
        "use_pos_embed use_abs_pos_emb use_rel_pos_bias rope_type use_shared_rel_pos_bias use_rot_pos_emb "
        "rope_temperature rope_grid_offset rope_grid_indexing rope_rotate_half ref_feat_shape window_size "
        "window_sizes window_ratio pretrained_window_sizes always_partition patch_norm sr_ratios swiglu_mlp "
        "scale_mlp scale_attn_inner"
    ).split()
)
# Arguments that `timm.create_model` adds when it calls `camphive`; a config.json cannot set them.
_FROM_TIMM = {"pretrained_cfg", "pretrained_cfg_overlay", "device", "dtype"}
# The keys of a pretrained_cfg that make timm read other weights than those beside the config.json.
_OTHER_WEIGHTS = ("file", "url", "state_dict", "hf_hub_filename")


class Shortcut(nn.Module):
    """Replace a residual block whose branch was dropped: y = after(shortcut(x) + constant), [N, C, H, W].

    `shortcut` and `after` name children of `block`, which are applied in order and keep their names, so the names of their
    tensors do not change. `constant` [C] is initialised to zero.

    Raises:
        ValueError: `block` lacks a named child.
    """

    def __init__(self, block: nn.Module, shortcut: Sequence[str], after: Sequence[str], channels: int) -> None:
        super().__init__()
        children = dict(block.named_children())
        if unknown := [name for name in (*shortcut, *after) if name not in children]:
            raise ValueError(f"{type(block).__name__} has no children {unknown}; it has {list(children)}")
        self.shortcut_names, self.after_names = tuple(shortcut), tuple(after)
        for name in (*shortcut, *after):
            self.add_module(name, children[name])
        like = next(block.parameters(), torch.empty(0))
        self.constant = nn.Parameter(like.new_zeros(channels))
        self.training = block.training  # the children keep their own modes

    def forward(self, x: Tensor) -> Tensor:
        for name in self.shortcut_names:
            x = self.get_submodule(name)(x)
        x = x + self.constant.view(1, -1, 1, 1)
        for name in self.after_names:
            x = self.get_submodule(name)(x)
        return x


class ImplantedConv2d(nn.Conv2d):
    """A convolution that uses 1x1 kernels for some of its channels (HAP's neural implants, arXiv:2101.08940).

    y = [W * x_main + R * x_implanted, M * x] with x = [x_main, x_implanted]. The main channels have the weight W
    [C_main_out, C_main_in, kH, kW]; `reads` R [C_main_out, I, 1, 1] reads the I implanted inputs, and `makes` M
    [J, C_main_in + I, 1, 1] computes the J implanted outputs, which are the last ones. `reads` or `makes` is None if there are
    no such channels. The convolution must have no groups, and a padding that keeps the size up to the stride.
    """

    def __init__(self, conv: nn.Conv2d, reads: bool, makes: bool) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            bias=conv.bias is not None,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.reads = self._pointwise(conv.out_channels, bias=False) if reads else None
        self.makes = self._pointwise(1, bias=conv.bias is not None) if makes else None
        self.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x if self.reads is None else x[:, : self.in_channels])
        if self.reads is not None:
            y = y + self.reads(x[:, self.in_channels :])
        return y if self.makes is None else torch.cat([y, self.makes(x)], dim=1)

    def _pointwise(self, outputs: int, bias: bool) -> nn.Conv2d:
        """Return a 1x1 convolution of one input channel with zero weights, to be resized later."""
        placement = {"device": self.weight.device, "dtype": self.weight.dtype}
        conv = nn.utils.skip_init(nn.Conv2d, 1, outputs, 1, self.stride, bias=bias, **placement)
        for parameter in conv.parameters():
            nn.init.zeros_(parameter).requires_grad_(self.weight.requires_grad)
        return conv


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


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a config.json by which timm would open other files than the weights beside it.

    Checks `model_args` and `pretrained_cfg` in the values of a config.json, in timm's layout or this package's.

    Raises:
        ValueError: `model_args` names anything but arguments of an architecture, or `pretrained_cfg` another source of
            weights.
    """
    args, cfg = config.get("model_args") or {}, config.get("pretrained_cfg", config) or {}
    for name, values in (("model_args", args), ("pretrained_cfg", cfg)):
        if not isinstance(values, Mapping):
            raise ValueError(f"{name} in config.json is a {type(values).__name__}, not a table; get the file again")
    _check_arguments(args)
    places = [name for name in _OTHER_WEIGHTS if cfg.get(name)]
    if not isinstance(cfg.get("custom_load", False), (bool, type(None))):
        places.append("custom_load")
    if places:
        raise ValueError(
            f"pretrained_cfg in config.json gives another place of weights ({', '.join(places)}), which may hold code; "
            "only the model.safetensors beside it is read: remove these entries if you trust the rest"
        )


def _check_arguments(args: Iterable[str]) -> None:
    """Check that all names are arguments that describe an architecture.

    Raises:
        ValueError: A name is not in `_MODEL_ARGS`.
    """
    if foreign := sorted(set(args) - _MODEL_ARGS):
        raise ValueError(
            f"model_args in config.json holds {', '.join(foreign)}, which does not describe a network and might make timm "
            "open other files; remove it if you trust the rest"
        )


def camphive(
    pretrained: bool = False,
    *,
    base: str,
    widths: Widths | None = None,
    shortcuts: Shortcuts | None = None,
    attributes: Attributes | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build the timm architecture `base` with these widths, shortcuts and attributes (entry point for timm).

    `num_classes` and `in_chans` may differ from the saved network's, as for any timm architecture.

    Raises:
        ValueError: The widths do not fit `base`, timm does not know `base`, `features_only` is set, or `check_config` refuses
            the arguments.
    """
    if kwargs.pop("features_only", False):
        raise ValueError("features_only is not available for pruned networks; call forward_intermediates instead")
    if not is_model(base):
        raise ValueError(f"timm {timm.__version__} does not know the architecture {base!r}; a newer timm may")
    cache_dir = kwargs.pop("cache_dir", None)
    kwargs.pop("pretrained_model_args", None)
    _check_arguments(kwargs.keys() - _FROM_TIMM)
    cfg = kwargs.get("pretrained_cfg")
    if isinstance(cfg, Mapping) and cfg.get("source"):  # read from a config.json; timm itself has set `file`
        check_config({"pretrained_cfg": {name: value for name, value in cfg.items() if name != "file"}})
    net = timm.create_model(base, pretrained=False, **kwargs)
    net.pretrained_cfg["architecture"] = ARCHITECTURE
    resize(net, _with_ends_of(net, widths or {}), shortcuts or {}, attributes)
    if pretrained:
        load_pretrained(
            net, net.pretrained_cfg, num_classes=net.num_classes, in_chans=_input_channels(net), cache_dir=cache_dir
        )
    return net


class CampHiVeTimmConfig(TimmWrapperConfig):
    """Configuration of a pruned timm network: `model_args` holds base, widths, shortcuts, attributes and timm's arguments."""

    model_type = MODEL_TYPE
    architecture: str = ARCHITECTURE


class CampHiVeForImageClassification(TimmWrapperForImageClassification):
    """A pruned timm network (`timm_model`) with the loading, saving, loss and output of transformers.

    Raises:
        ValueError: `check_config` refuses the configuration, its architecture is not "camphive", or its widths do not fit.
    """

    config: CampHiVeTimmConfig
    config_class = CampHiVeTimmConfig

    def __init__(self, config: CampHiVeTimmConfig) -> None:
        check_config({"model_args": config.model_args, "pretrained_cfg": getattr(config, "pretrained_cfg", None)})
        if config.architecture != ARCHITECTURE:  # "hf-hub:..." would make timm read a config from elsewhere
            raise ValueError(f"architecture in config.json is {config.architecture!r}, not {ARCHITECTURE!r}")
        super().__init__(config)
        # transformers builds the network without its pretrained_cfg; timm's transforms would then use that of the base.
        net = self.timm_model
        own = {"architecture": config.architecture, "num_classes": config.num_labels}
        net.pretrained_cfg = net.default_cfg = (
            _portable(net.pretrained_cfg) | getattr(config, "pretrained_cfg", {}) | own
        )

    @classmethod
    def from_timm(
        cls, net: nn.Module, base: str, model_args: Mapping[str, Any] | None = None, **config: Any
    ) -> "CampHiVeForImageClassification":
        """Wrap a network that `resize` can rebuild from the timm architecture `base`; its tensors are shared, not copied.

        `model_args` are the timm arguments of the dense network; `config` is passed to `CampHiVeTimmConfig`.

        Raises:
            ValueError: The network cannot be rebuilt from `base` and its widths.
        """
        args = {name: value for name, value in (model_args or {}).items() if name != "num_classes"}
        pretrained_cfg = {k: v for k, v in _portable(net.pretrained_cfg).items() if v is not None}
        pretrained_cfg["input_size"] = [_input_channels(net), *pretrained_cfg.get("input_size", (3, 224, 224))[1:]]
        shape: dict[str, Any] = {"widths": widths_of(net), "shortcuts": shortcuts_of(net)}
        if attributes := attributes_of(net):
            shape["attributes"] = attributes
        values: dict[str, Any] = {
            "num_labels": net.num_classes,
            "num_features": net.num_features,
            "model_args": {**args, "base": base, **shape},
            "pretrained_cfg": pretrained_cfg,
            "image_processor_type": "TimmWrapperImageProcessor",
        }
        # On a real device __init__ would draw new weights; on meta it only checks that the widths rebuild the network.
        with torch.device("meta"):
            model = cls(cls.config_class(**values, **config))
        model.timm_model = net
        model.training = net.training  # its modules keep their own modes
        return model

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Save as transformers does, but with timm's own tensor names, so that timm can read the file too."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        state_dict = {name.removeprefix("timm_model."): tensor for name, tensor in state_dict.items()}
        return super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)


def _portable(pretrained_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pretrained_cfg without the keys that are not saved."""
    return {name: value for name, value in pretrained_cfg.items() if name not in _NOT_SAVED}


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


# What a forward pass raises if widths do not fit one another.
_UNFIT = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)


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
    size = (_input_channels(net), *net.pretrained_cfg.get("input_size", (3, 224, 224))[1:])
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


def _with_ends_of(net: nn.Module, widths: Widths) -> dict[str, list[int]]:
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


def _input_channels(net: nn.Module) -> int:
    """Return the number of channels of an image: those of the first convolution, before any space-to-depth stem."""
    folded = math.prod(module.bs**2 for module in net.modules() if isinstance(module, SpaceToDepth))
    for name in _names(net.pretrained_cfg.get("first_conv")):
        first: Any = net.get_submodule(name)
        return first.in_channels // folded
    return net.pretrained_cfg.get("input_size", (3,))[0]


def _names(value: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return one name, several names or None as a tuple of names."""
    return (value,) if isinstance(value, str) else tuple(value or ())


if not is_model(ARCHITECTURE):  # a copy of this file may have been imported from a saved folder before
    register_model(camphive)
AutoConfig.register(MODEL_TYPE, CampHiVeTimmConfig, exist_ok=True)
AutoModelForImageClassification.register(CampHiVeTimmConfig, CampHiVeForImageClassification, exist_ok=True)
AutoImageProcessor.register(
    CampHiVeTimmConfig,
    image_processor_classes={"torchvision": TimmWrapperImageProcessor, "pil": TimmWrapperImageProcessor},
    exist_ok=True,
)
# save_pretrained then copies this file and cifar.py beside the weights, and names the classes in config.json.
CampHiVeTimmConfig.register_for_auto_class("AutoConfig")
CampHiVeForImageClassification.register_for_auto_class("AutoModelForImageClassification")
