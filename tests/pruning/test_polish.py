"""Polishing: nearer to the dense network, without labels, and the same on any number of processes."""

import copy
from dataclasses import replace
from itertools import islice
from threading import Barrier, Thread

import pytest
import torch
import torch.nn.functional as F
from support.polishing import calibration, dense_and_damaged, held_out
from support.toys import ToyResNet, images, randomise
from support.workers import Summing
from torch import nn

from hf_camphive.pruning.polish import Polished, PolishOptions, _draw, _moved, polish
from hf_camphive.pruning.tuning import LINE_SHARES, POLISH_TEMPERATURE
from hf_camphive.training.data.calibration import Calibration
from hf_camphive.training.evaluation import batchnorms


def distance(net: nn.Module, dense: nn.Module) -> float:
    x = images(24)
    with torch.no_grad():
        return float((net(x) - dense(x)).square().mean())


@pytest.fixture(scope="module")
def polished() -> nn.Module:
    dense, net = dense_and_damaged()
    polish(net, dense, calibration(), held_out(), PolishOptions(60))
    return net


def test_logits_come_nearer_without_a_label(polished):
    dense, damaged = dense_and_damaged()
    assert distance(polished, dense) < 0.3 * distance(damaged, dense)  # the labels are all -1


def test_only_weights_change(polished):
    _, damaged = dense_and_damaged()
    before, after = dict(damaged.named_buffers()), dict(polished.named_buffers())
    assert all(torch.equal(after[name], values) for name, values in before.items())
    assert not any(p.grad is not None or not p.requires_grad for p in polished.parameters())


def test_the_state_of_both_networks_is_given_back():
    dense, net = dense_and_damaged()
    net.stem.requires_grad_(False)
    net.train().block1.eval()
    polish(net, dense.train(), calibration(), held_out(), PolishOptions(1))
    assert net.training and not net.block1.training and dense.training
    assert not net.stem.weight.requires_grad and net.head.weight.requires_grad
    assert all(p.requires_grad and p.grad is None for p in dense.parameters())


def test_a_network_that_is_the_dense_one_stays_as_it_is():
    dense = randomise(ToyResNet())
    net = copy.deepcopy(dense)
    polish(net, dense, calibration(), held_out(), PolishOptions(3))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), dense.parameters()))


def test_the_seed_decides():
    dense, first = dense_and_damaged()
    second, other = copy.deepcopy(first), copy.deepcopy(first)
    for net, seed in ((first, 1), (second, 1), (other, 2)):
        polish(net, dense, calibration(), held_out(), PolishOptions(30, seed))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert not torch.equal(first.stem.weight, other.stem.weight)


def test_no_steps_change_nothing():
    dense, net = dense_and_damaged()
    polish(net, dense, calibration(), held_out(), PolishOptions(0))
    assert torch.equal(net.stem.weight, dense_and_damaged()[1].stem.weight)


def test_processes_end_with_the_weights_of_one():
    """Three processes share 24 images; the last steps of an epoch may leave one of them without any."""
    processes, steps = 3, 24
    dense, alone = dense_and_damaged()
    before = copy.deepcopy(alone)
    polish(alone, dense, calibration(), held_out(), PolishOptions(steps))
    assert not torch.equal(alone.stem.weight, before.stem.weight)
    together = [copy.deepcopy(dense_and_damaged()[1]) for _ in range(processes)]
    messages, barrier = [torch.empty(0)] * processes, Barrier(processes, timeout=60)

    def work(process: int) -> None:
        def reduce(tensor: torch.Tensor) -> torch.Tensor:
            messages[process] = tensor
            barrier.wait()
            total = sum(messages)
            barrier.wait()
            return total

        own = calibration(process=process, processes=processes)
        polish(
            together[process],
            copy.deepcopy(dense),
            own,
            held_out(process, processes),
            PolishOptions(steps),
            workers=Summing(reduce),
        )

    threads = [Thread(target=work, args=(process,)) for process in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for net in together:
        for a, b in zip(net.parameters(), alone.parameters()):
            assert torch.allclose(a, b, rtol=0, atol=1e-7)


def test_views_are_shifted_and_mirrored_images():
    x = images(3, size=5)
    shifts, mirrored = torch.tensor([[0, 0], [2, -1], [-1, 1]]), torch.tensor([False, False, True])
    found = _moved(x, shifts, mirrored)
    for n, (down, right) in enumerate(shifts.tolist()):
        for row in range(5):
            for column in range(5):
                at = (4 - column if mirrored[n] else column) + right
                expected = x[n, :, min(max(row + down, 0), 4), min(max(at, 0), 4)]
                assert torch.equal(found[n, :, row, column], expected)


@pytest.mark.parametrize("total", [1, 10, 24, 64, 65, 100, 128, 190])
def test_every_image_comes_once_before_any_comes_again(total):
    """Steps of at most 64 images, also where a step takes the last of one round and the first of the next."""
    steps = 4 * total // min(total, 64) + 1
    first, again = (list(islice(_draw(total, (8, 8), seed=3), steps)) for _ in range(2))
    shown = torch.cat([views.indices for views in first])
    rounds = [some for some in shown.split(total) if len(some) == total]
    assert len(rounds) >= 4 and all(torch.equal(some.sort().values, torch.arange(total)) for some in rounds)
    assert all(len(views.indices) == min(total, 64) == len(views.indices.unique()) for views in first)
    assert torch.equal(shown, torch.cat([views.indices for views in again]))  # and so on every process
    assert total == 1 or len({tuple(some.tolist()) for some in rounds}) > 1


def test_labels_are_not_read():
    dense, first = dense_and_damaged()
    second, some = copy.deepcopy(first), calibration()
    polish(first, dense, some, held_out(), PolishOptions(20))
    polish(second, dense, replace(some, labels=()), replace(held_out(), labels=()), PolishOptions(20))
    assert torch.equal(first.stem.weight, second.stem.weight)


def divergence(net: nn.Module, dense: nn.Module, some: Calibration) -> float:
    with torch.no_grad():
        found, given = ((f(torch.cat(some.images)) / POLISH_TEMPERATURE).log_softmax(1) for f in (net, dense))
    return float(F.kl_div(found, given, reduction="sum", log_target=True))


def test_where_steps_do_harm_the_weights_come_back():
    """A network that is all but the dense one already: any step of these learning rates only makes it worse."""
    dense = randomise(ToyResNet())
    net = copy.deepcopy(dense)
    net.head.weight.data *= 1 + 1e-6
    before = copy.deepcopy(net)
    assert polish(net, dense, calibration(), held_out(), PolishOptions(20)) == Polished()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters()))


@pytest.mark.parametrize("shares", [(1.0,), (0.5,), (0.25,)])
def test_it_ends_at_a_share_of_the_way(shares, monkeypatch):
    dense, start = dense_and_damaged()
    ends = {}
    for share in (1.0, *shares):
        monkeypatch.setattr("hf_camphive.pruning.polish.LINE_SHARES", (share,))
        ends[share] = copy.deepcopy(start)
        assert polish(ends[share], dense, calibration(), held_out(), PolishOptions(30)) == Polished(weights=share)
    (share,) = shares
    for a, b, c in zip(start.parameters(), ends[share].parameters(), ends[1.0].parameters()):
        torch.testing.assert_close(b, torch.lerp(a, c, share), rtol=0, atol=0)


def test_the_share_is_that_with_the_least_divergence_of_the_images_held_out(monkeypatch):
    dense, start = dense_and_damaged()
    found = {}
    for share in LINE_SHARES:
        net = copy.deepcopy(start)
        monkeypatch.setattr("hf_camphive.pruning.polish.LINE_SHARES", (share,))
        polish(net, dense, calibration(), held_out(), PolishOptions(30))
        found[share] = divergence(net, dense, held_out())
    monkeypatch.setattr("hf_camphive.pruning.polish.LINE_SHARES", LINE_SHARES)
    net = copy.deepcopy(start)
    best = polish(net, dense, calibration(), held_out(), PolishOptions(30)).weights
    assert found[best] == min(found.values()) == pytest.approx(divergence(net, dense, held_out()), rel=1e-9)
    assert found[best] < divergence(start, dense, held_out())


def with_statistics(net: nn.Module, off: float) -> nn.Module:
    """A copy in which every BatchNorm expects means and standard deviations that are off by a share of the latter."""
    net = copy.deepcopy(net)
    for norm in batchnorms(net).values():
        norm.running_mean += off * norm.running_var.sqrt()
        norm.running_var *= (1 + off) ** 2
    return net


@pytest.mark.parametrize(("off", "recalibrated", "share"), [(1.0, 0.0, 1.0), (1.0, -1.0, 0.5), (0.0, 1.0, 0.0)])
def test_statistics_go_as_far_as_helps(off, recalibrated, share, monkeypatch):
    """The right ones lie at the end of the line, half-way, or at its start."""
    monkeypatch.setattr("hf_camphive.pruning.polish.LEARNING_RATES", ())
    dense = randomise(ToyResNet())
    net = with_statistics(dense, 0.5 * off)
    found = polish(
        net,
        dense,
        calibration(),
        held_out(),
        PolishOptions(1),
        recalibrated=with_statistics(dense, 0.5 * recalibrated),
    )
    assert found == Polished(statistics=share)
    for norm, right in zip(batchnorms(net).values(), batchnorms(dense).values()):
        torch.testing.assert_close(norm.running_mean, right.running_mean)
        torch.testing.assert_close(norm.running_var, right.running_var)


def test_the_descent_starts_from_the_restored_statistics():
    dense = randomise(ToyResNet())
    net = with_statistics(dense, 1.0)
    found = polish(net, dense, calibration(), held_out(), PolishOptions(20), recalibrated=with_statistics(dense, 0.2))
    restored = with_statistics(dense, 0.2)
    assert found.statistics == 1 and found.weights > 0
    assert divergence(net, dense, held_out()) < divergence(restored, dense, held_out())


def test_without_images_to_judge_by_nothing_changes():
    dense, net = dense_and_damaged()
    nothing = Calibration((), (), (), 0)
    assert polish(net, dense, calibration(), nothing, PolishOptions(20)) == Polished()
    assert torch.equal(net.stem.weight, dense_and_damaged()[1].stem.weight)
