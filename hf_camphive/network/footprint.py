"""Measure the cost of a network: MACs, parameters, latency and the size of its file.

Units: MACs per image (1 MAC = 2 FLOPs), counted from the shapes that are really computed; milliseconds; bytes.
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
    """Return the number of parameters, trainable or not; buffers such as running statistics are not counted."""
    return sum(p.numel() for p in net.parameters())


def count_macs(net: nn.Module, input_size: Sequence[int]) -> int:
    """Return the multiply-accumulates per image of `input_size` [C, H, W]: half the FLOPs of torch's own counter.

    Counts convolutions, linear layers and attention, on a copy on the meta device, from shapes alone. As is usual, norms,
    activations and biases are not counted.
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
    """Time the forward pass of each network; return {name: {batch size: latency in milliseconds}}.

    The networks are timed in turns, in alternating order, so that other load on the machine affects all of them alike and
    ratios are fair. Each turn starts with an untimed run, because the caches still hold the previous network: refilling
    them costs all networks the same, and would hide what small networks save. Copies are timed, in eval mode, in
    channels_last, without gradients, on the network's own device. Each batch size takes about `seconds`, or the time of
    three rounds if that is longer.
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
    """Return the cost of a network for images of `input_size` [C, H, W].

    `latency` is the network's entry in the result of `measure_latency`, `folded` that of the folded network.
    """
    tensors = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    file_bytes = len(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    return Footprint(
        count_parameters(net), count_macs(net, input_size), file_bytes, dict(latency or {}), dict(folded or {})
    )


def _time_rounds(
    nets: Mapping[str, nn.Module], inputs: Mapping[str, torch.Tensor], most: int, seconds: float, least: int
) -> dict[str, list[float]]:
    """Return the times of the forward passes of each network in milliseconds.

    Runs at most `most` rounds, and stops after `seconds` once `least` rounds are done.
    """
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
    """Return the time of one forward pass in milliseconds."""
    _wait_for(images.device)
    began = time.perf_counter()
    net(images)
    _wait_for(images.device)
    return 1000 * (time.perf_counter() - began)


def _wait_for(device: torch.device) -> None:
    """Wait until the device has finished all work that was queued on it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _like_parameters(images: torch.Tensor, net: nn.Module) -> torch.Tensor:
    """Return images with the device and dtype of the network's parameters."""
    parameter = next(net.parameters(), images)
    return images.to(device=parameter.device, dtype=parameter.dtype)
