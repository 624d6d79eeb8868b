"""The attributes of timm's image classifiers that this package uses, for type checkers: `nn.Module` does not declare them."""

from typing import Any, Protocol, cast

from torch import nn


class TimmInterface(Protocol):
    """Attributes and methods that every timm image classifier has besides those of `nn.Module`."""

    pretrained_cfg: dict[str, Any]
    default_cfg: dict[str, Any]
    num_classes: int

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one."""


def timm_interface(net: nn.Module) -> TimmInterface:
    """Return the same network, typed by its timm attributes."""
    return cast(TimmInterface, net)


def input_size(net: nn.Module) -> tuple[int, int, int]:
    """Return the size (C, H, W) of the images that a timm network was made for."""
    channels, height, width = timm_interface(net).pretrained_cfg["input_size"]
    return channels, height, width
