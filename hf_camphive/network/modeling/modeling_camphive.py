"""Load a pruned timm network as a transformers model or as a timm architecture.

Self-contained (torch, timm, transformers, `.cifar`, `.layers` and `.resizing` only): copies of these files are shipped inside
every saved folder as remote code. This file imports all others directly, because older versions of transformers load from a
local folder only the files that the main one imports itself.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import timm
import torch
from timm.models import is_model, load_pretrained, register_model
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperForImageClassification

from .cifar import CifarResNet  # noqa: F401  (importing it registers the small networks in timm)
from .layers import ImplantedConv2d, Shortcut  # noqa: F401  (older transformers load only direct imports)
from .resizing import (
    Attributes,
    Shortcuts,
    Widths,
    attributes_of,
    input_channels,
    resize,
    shortcuts_of,
    widths_of,
    with_ends_of,
)

__all__ = [
    "CampHiVeForImageClassification",
    "CampHiVeTimmConfig",
    "check_config",
]

MODEL_TYPE = "camphive_timm"
ARCHITECTURE = "camphive"
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
    resize(net, with_ends_of(net, widths or {}), shortcuts or {}, attributes)
    if pretrained:
        load_pretrained(
            net, net.pretrained_cfg, num_classes=net.num_classes, in_chans=input_channels(net), cache_dir=cache_dir
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
        pretrained_cfg["input_size"] = [input_channels(net), *pretrained_cfg.get("input_size", (3, 224, 224))[1:]]
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


if not is_model(ARCHITECTURE):  # a copy of this file may have been imported from a saved folder before
    register_model(camphive)
AutoConfig.register(MODEL_TYPE, CampHiVeTimmConfig, exist_ok=True)
AutoModelForImageClassification.register(CampHiVeTimmConfig, CampHiVeForImageClassification, exist_ok=True)
AutoImageProcessor.register(
    CampHiVeTimmConfig,
    image_processor_classes={"torchvision": TimmWrapperImageProcessor, "pil": TimmWrapperImageProcessor},
    exist_ok=True,
)
# save_pretrained then copies this file and those that it imports beside the weights, and names the classes in config.json.
CampHiVeTimmConfig.register_for_auto_class("AutoConfig")
CampHiVeForImageClassification.register_for_auto_class("AutoModelForImageClassification")
