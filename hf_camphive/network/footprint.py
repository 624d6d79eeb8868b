"""What a network costs: MACs, parameters, latency and the size of its file, measured and never changed.

Units: 1 MAC = 2 FLOPs, counted per image from the shapes that are really computed; milliseconds; bytes.
"""

import copy
import time
from collections.abc import Mapping, Sequence

import numpy as np
import safetensors.torch
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_camphive.core.measures import Footprint, Latency

MIN_ROUNDS = 3


def count_parameters(net: nn.Module) -> int:
    """Number of parameters, trainable or not; buffers such as running statistics are not counted."""
    return sum(p.numel() for p in net.parameters())


def count_macs(net: nn.Module, input_size: Sequence[int]) -> int:
    """Multiply-accumulates per image of `input_size` [C, H, W]: half the FLOPs of torch's own counter.

    Counted on shapes alone (a copy on the meta device): convolutions, linear layers and attention; as is usual,
    norms, activations and biases are not counted.
    """
    ghost = copy.deepcopy(net).to("meta").eval()
    dtype = next((p.dtype for p in ghost.parameters()), torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ghost(torch.empty(1, *input_size, device="meta", dtype=dtype))
    return counter.get_total_flops() // 2


def measure_latency(
    nets: Mapping[str, nn.Module],
    input_size: Sequence[int],
    batch_sizes: Sequence[int] = (1, 32),
    runs: int = 100,
    seconds: float = 5.0,
) -> dict[str, dict[int, Latency]]:
    """Time the forward pass of each network, by name and batch size.

    The networks take turns, in alternating order, so that whatever else the machine does disturbs all of them alike
    and ratios are fair. A turn starts with a run that does not count, which finds the caches full of the network before:
    that costs all alike, and would hide what small ones save. Copies are timed: in eval mode, channels_last, without
    gradients, on the network's own device. A batch size takes about `seconds`, or three rounds where that is longer.
    """
    timed = {name: copy.deepcopy(net).eval().to(memory_format=torch.channels_last) for name, net in nets.items()}
    results: dict[str, dict[int, Latency]] = {name: {} for name in nets}
    for batch in batch_sizes:
        images = torch.randn(batch, *input_size, generator=torch.Generator().manual_seed(0))
        images = images.contiguous(memory_format=torch.channels_last)
        inputs = {name: _like_parameters(images, net) for name, net in timed.items()}
        _time_rounds(timed, inputs, MIN_ROUNDS, seconds / 5, least=1)
        for name, times in _time_rounds(timed, inputs, runs, seconds, least=MIN_ROUNDS).items():
            low, median, high = np.percentile(times, (10, 50, 90))
            results[name][batch] = Latency(float(median), float(low), float(high), len(times))
    return results


def footprint(
    net: nn.Module,
    input_size: Sequence[int],
    latency: Mapping[int, Latency] | None = None,
    folded: Mapping[int, Latency] | None = None,
) -> Footprint:
    """Cost of a network for images of `input_size` [C, H, W]; `latency` is its row of `measure_latency`.

    `folded` is the row of the folded network.
    """
    tensors = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    file_bytes = len(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    return Footprint(
        count_parameters(net), count_macs(net, input_size), file_bytes, dict(latency or {}), dict(folded or {})
    )


def _time_rounds(
    nets: Mapping[str, nn.Module], inputs: Mapping[str, torch.Tensor], most: int, seconds: float, least: int
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in nets}
    began = time.perf_counter()
    for round_ in range(most):
        if round_ >= least and time.perf_counter() - began > seconds:
            break
        for name in list(nets) if round_ % 2 == 0 else reversed(list(nets)):
            _forward_ms(nets[name], inputs[name])
            times[name].append(_forward_ms(nets[name], inputs[name]))
    return times


@torch.no_grad()
def _forward_ms(net: nn.Module, images: torch.Tensor) -> float:
    _wait_for(images.device)
    began = time.perf_counter()
    net(images)
    _wait_for(images.device)
    return 1000 * (time.perf_counter() - began)


def _wait_for(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _like_parameters(images: torch.Tensor, net: nn.Module) -> torch.Tensor:
    parameter = next(net.parameters(), images)
    return images.to(device=parameter.device, dtype=parameter.dtype)
