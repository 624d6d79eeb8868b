"""Lack of memory, told apart from all other errors: it says nothing about the network that asked for too much."""

import torch

_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device had no memory left; PyTorch raises a plain `RuntimeError` on CPUs."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)
