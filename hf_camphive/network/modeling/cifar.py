"""Networks for small images, registered in timm: the CIFAR ResNets of He et al. (arXiv:1512.03385) and similar networks.

Self-contained (torch and timm only): a copy of this file is shipped inside saved folders as remote code.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn


class CifarResNet(ResNet):
    """timm's basic-block ResNet for small images: 3x3 stem of stride 1, no max-pooling, one stage per width.

    With `option_a`, a block that changes the shape has the parameter-free shortcut of He et al. 2015
    (https://arxiv.org/abs/1512.03385, section 4.2): subsample by 2 and add zero channels, half before and half after.

    Deviation: the shortcut is a 1x1 convolution of stride 2 whose weight is initialised to that embedding, so that it can be
    pruned. Its weight is a parameter, and is trained.
    """

    def __init__(
        self,
        layers: tuple[int, ...],
        widths: tuple[int, ...],
        option_a: bool,
        in_chans: int = 3,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        placement = {"device": device, "dtype": dtype}
        # With the deep stem, `stem_width` sets the width that the first stage reads; the stem itself is replaced below.
        stem = {"stem_type": "deep", "stem_width": widths[0] // 2}
        super().__init__(BasicBlock, layers, channels=widths, in_chans=in_chans, **stem, **placement, **kwargs)
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False, **placement)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()
        for stage in range(len(widths) + 1, 5):
            self.add_module(f"layer{stage}", nn.Sequential())  # timm's forward runs four stages
        for info in self.feature_info[1:]:
            info["reduction"] //= 4
        self.feature_info[0]["reduction"] = 1
        if option_a:
            for block in self.modules():
                if isinstance(block, BasicBlock) and block.downsample is not None:
                    shape = block.conv1.in_channels, block.conv2.out_channels
                    conv = nn.Conv2d(*shape, 1, stride=block.stride, bias=False, **placement)
                    block.downsample = nn.Sequential(conv)
                    with torch.no_grad():
                        conv.weight.copy_(zero_padding_weight(*shape))


class CifarMobileNetV2(EfficientNet):
    """timm's MobileNetV2 with the usual strides for 32x32 images: the stem and the second stage have stride 1."""

    def __init__(self, **kwargs: Any) -> None:
        stages = [["ds_r1_k3_s1_c16"], ["ir_r2_k3_s1_e6_c24"], ["ir_r3_k3_s2_e6_c32"], ["ir_r4_k3_s2_e6_c64"]]
        stages += [["ir_r3_k3_s1_e6_c96"], ["ir_r3_k3_s2_e6_c160"], ["ir_r1_k3_s1_e6_c320"]]
        super().__init__(decode_arch_def(stages), **{"act_layer": nn.ReLU6, **kwargs})
        self.conv_stem.stride = (1, 1)
        for info in self.feature_info:
            info["reduction"] //= 2


def zero_padding_weight(inputs: int, outputs: int) -> Tensor:
    """Return the weight [C_out, C_in, 1, 1] of the 1x1 convolution that adds zero channels, half before and half after."""
    weight = torch.zeros(outputs, inputs, 1, 1)
    rows = torch.arange(inputs) + (outputs - inputs) // 2
    weight[rows, torch.arange(inputs)] = 1.0
    return weight


def checkpoint_filter(state: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Rename the tensors of public CIFAR checkpoints to timm's names, and add the weights of parameter-free shortcuts.

    The names in these checkpoints are `conv1 bn1 layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2} linear`, possibly with the prefix
    `module.`.
    """
    state = {
        name.removeprefix("module.").replace("linear.", "fc."): tensor
        for name, tensor in state.get("state_dict", state).items()
    }
    for name, block in net.named_modules():
        if isinstance(block, BasicBlock) and block.downsample is not None and len(block.downsample) == 1:
            conv = block.downsample[0]
            state.setdefault(f"{name}.downsample.0.weight", zero_padding_weight(conv.in_channels, conv.out_channels))
    return state


def _config(**values: Any) -> dict[str, Any]:
    """Return timm's pretrained_cfg of a network for 32x32 images and 10 classes, with the given values changed."""
    defaults = {"num_classes": 10, "input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bicubic"}
    layers = {"first_conv": "conv1", "classifier": "fc"}
    return {**defaults, **layers, "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, **values}


_RESNETS: dict[str, dict[str, Any]] = {
    f"cifar_resnet{depth}": {"layers": ((depth - 2) // 6,) * 3, "widths": (16, 32, 64), "option_a": True}
    for depth in (20, 32, 44, 56, 110)
}
_RESNETS["cifar_resnet18"] = {"layers": (2, 2, 2, 2), "widths": (64, 128, 256, 512), "option_a": False}
_RESNETS["digits_resnet"] = {"layers": (3, 3, 3), "widths": (16, 32, 64), "option_a": False}
_RESNETS["digits_wide_resnet"] = {"layers": (2, 2, 2), "widths": (32, 64, 128), "option_a": False}

default_cfgs = generate_default_cfgs(
    {name: _config(pool_size=(8, 8) if spec["option_a"] else (4, 4)) for name, spec in _RESNETS.items()}
    | {
        "cifar_mobilenetv2": _config(pool_size=(4, 4), first_conv="conv_stem", classifier="classifier"),
        "digits_resnet": _config(pool_size=(4, 4), input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3),
        "digits_wide_resnet": _config(pool_size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3),
    }
)


def _register(name: str, network: type[nn.Module], **fixed: Any) -> Callable[..., nn.Module]:
    """Register a class in timm as the architecture `name` with the `fixed` arguments; return the entry point."""

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(
            network, name, pretrained, pretrained_filter_fn=checkpoint_filter, **{**fixed, **kwargs}
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"timm entry point of {name}."
    # A copy of this file may have been imported from a saved folder before; timm keeps the first registration.
    return build if is_model(name) else register_model(build)


for _name, _spec in _RESNETS.items():
    globals()[_name] = _register(_name, CifarResNet, **_spec)
cifar_mobilenetv2 = _register("cifar_mobilenetv2", CifarMobileNetV2)
