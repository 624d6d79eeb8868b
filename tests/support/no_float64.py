"""An accelerator without float64, such as Apple's, imitated on the CPU: no test has one.

Tensors on it compute as those on the CPU do, and say that they are elsewhere. What such a device refuses is refused: float64,
and operations on tensors of two devices. `torch.export` and `torch.func` cannot be imitated so.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hf_camphive.core.runtime import float64_device

DEVICE = torch.device("lazy")  # PyTorch knows this name, and has nothing behind it
_FROM_THE_CPU = ("_to_copy", "copy_", "index", "index_put", "index_put_", "_index_put_impl_")  # take such operands


class Elsewhere(Tensor):
    """A tensor on `DEVICE`, whose numbers are `held` on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Elsewhere":
        tensor = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        tensor.held = held
        return tensor

    __torch_dispatch__ = classmethod(lambda cls, func, types, args=(), kwargs=None: _run(func, args, kwargs or {}))


class _Imitated(TorchDispatchMode):
    """Makes tensors on `DEVICE` where they are asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        asked = kwargs.get("device")
        if (asked is not None and torch.device(asked) == DEVICE) or _elsewhere(args, kwargs):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


class _FromLists(TorchFunctionMode):
    """What makes a tensor from Python's numbers does so on the CPU first, unseen by the mode above."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") is not None and torch.device(kwargs["device"]) == DEVICE:
            del kwargs["device"]
            return func(*args, **kwargs).to(DEVICE)
        if func is Tensor.new_tensor and isinstance(args[0], Elsewhere):
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to(DEVICE)
        if func is torch.unravel_index and isinstance(args[0], Elsewhere):
            return tuple(found.to(DEVICE) for found in func(args[0].cpu(), *args[1:], **kwargs))
        return func(*args, **kwargs)


def _autocast(device_type: str, *args: object, enabled: bool = True, **kwargs: object) -> AbstractContextManager:
    if device_type == DEVICE.type and not enabled:
        return nullcontext()
    return torch.amp.autocast(device_type, *args, enabled=enabled, **kwargs)


@contextmanager
def imitated() -> Iterator[None]:
    """Inside, "lazy" is a device without float64."""
    float64_device.cache_clear()
    try:
        with patch.object(torch, "autocast", _autocast), _FromLists(), _Imitated():
            yield
    finally:
        float64_device.cache_clear()


def there(value: object) -> object:
    """Tensors, or sequences and mappings of them, moved to the device."""
    if isinstance(value, Mapping):
        return {key: there(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return type(value)(map(there, value))
    return value.detach().to(DEVICE)


def _elsewhere(args: tuple, kwargs: dict) -> bool:
    return any(isinstance(leaf, Elsewhere) for leaf in tree_leaves((args, kwargs)))


def _run(func, args: tuple, kwargs: dict) -> object:
    name = func._schema.name.split("::")[1]
    mixed = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
    if _elsewhere(args, kwargs) and name not in _FROM_THE_CPU and not all(isinstance(t, Elsewhere) for t in mixed):
        raise RuntimeError(
            f"{name}: expected all tensors on one device, but some are on {DEVICE} and others on the CPU"
        )
    stays = isinstance(args[0], Elsewhere) if name in _FROM_THE_CPU else _elsewhere(args, kwargs)
    if (asked := kwargs.get("device")) is not None:
        stays, kwargs = torch.device(asked) == DEVICE, {**kwargs, "device": "cpu"}
    args, kwargs, into = *tree_map(lambda x: x.held if isinstance(x, Elsewhere) else x, (args, kwargs)), args
    result = func(*args, **kwargs)
    if name.endswith("_") and not name.endswith("__"):
        return into[0]
    return tree_map(_placed, result) if stays else result


def _placed(value: object) -> object:
    if isinstance(value, Tensor) and value.dtype == torch.float64:
        raise TypeError(f"{DEVICE} has no float64")
    return Elsewhere(value) if isinstance(value, Tensor) else value
