"""Counts against published truths, and the fairness of latencies."""

import time

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from hf_camphive.network.footprint import count_macs, count_parameters, footprint, measure_latency


def test_counts_of_resnet18():
    net = timm.create_model("resnet18").train()
    assert count_macs(net, (3, 224, 224)) == 1_814_073_344
    assert count_parameters(net) == 11_689_512
    assert net.training and next(net.parameters()).device.type == "cpu"


def test_macs_of_a_grouped_convolution_by_hand():
    net = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4), nn.Flatten(), nn.Linear(8 * 5 * 5, 7))
    assert count_macs(net, (4, 10, 10)) == 8 * 5 * 5 * 9 * 1 + 8 * 5 * 5 * 7


def test_file_bytes_are_those_of_the_file(tmp_path):
    net = timm.create_model("resnet10t", num_classes=3).to(memory_format=torch.channels_last)
    tensors = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert footprint(net, (3, 64, 64)).file_bytes == (tmp_path / "model.safetensors").stat().st_size


class Witness(nn.Module):
    calls: list[tuple[str, int]] = []  # noqa: RUF012

    def __init__(self, name):
        super().__init__()
        self.name, self.norm = name, nn.BatchNorm2d(3)

    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        assert x.shape[0] == 1 or x.is_contiguous(memory_format=torch.channels_last)
        Witness.calls.append((self.name, x.shape[0]))
        return self.norm(x)


def test_latency_takes_turns_and_leaves_the_networks_alone():
    Witness.calls = []
    nets = {"dense": Witness("dense"), "pruned": Witness("pruned")}
    measured = measure_latency(nets, (3, 4, 4), batch_sizes=(1, 2), runs=7)
    for batch in (1, 2):
        names = [name for name, size in Witness.calls if size == batch]
        assert names[::2] == names[1::2]  # the first run of each turn does not count
        pairs = [tuple(names[i : i + 4 : 2]) for i in range(0, len(names), 4)]
        assert set(pairs) == {("dense", "pruned"), ("pruned", "dense")}
        assert all(measured[name][batch].runs == 7 for name in nets)
    latency = measured["dense"][2]
    assert 0 < latency.low <= latency.median <= latency.high
    assert all(net.training and net.norm.num_batches_tracked == 0 for net in nets.values())


class Slow(nn.Module):
    def forward(self, x):
        time.sleep(0.05)
        return x


def test_latency_keeps_to_its_time():
    latency = measure_latency({"slow": Slow()}, (1, 1, 1), batch_sizes=(1,), runs=1000, seconds=0.2)["slow"][1]
    assert 3 <= latency.runs <= 6
    assert latency.median >= 50
