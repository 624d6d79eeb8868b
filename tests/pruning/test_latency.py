"""Predicted latency against arithmetic by hand, with a timer that is made up; the table on disk; folding."""

import json
import logging
import multiprocessing
import re
from math import ceil
from pathlib import Path

import pytest
import timm
import torch
from filelock import FileLock
from support.plans import analysis_of
from support.toys import Block, Chain, ToyResNet, images, randomise, relative_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.plan import ChannelCut, PrunePlan
from hf_camphive.network.graph.blocks import droppable_branches
from hf_camphive.network.graph.tracing import Trace, trace_network
from hf_camphive.network.modeling.layers import Shortcut
from hf_camphive.network.surgery.cutting import apply_plan
from hf_camphive.network.surgery.folding import ChannelwiseMaximum, fold, fold_batchnorm
from hf_camphive.pruning.planning.latency import timing
from hf_camphive.pruning.planning.latency.operations import network_operations
from hf_camphive.pruning.planning.latency.prediction import Axis, Grid, LatencyRequest, fit, latency_terms
from hf_camphive.pruning.planning.latency.timing import LatencyTable, typical_times
from hf_camphive.pruning.planning.limits import floors

SCALE, OVERHEAD = 3.0, 0.05  # what running in a row takes, in this timer's world


class Timer:
    """Convolutions and linear layers take 0.01 ms for each input channel and started eight output channels, all else 0.01.

    A network takes SCALE * the sum of the operations that it runs + OVERHEAD * their number.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, works, device, progress) -> dict[str, float]:
        self.asked += works
        return {key: whole(prepare()) if key.startswith("network") else alone(key) for key, prepare in works.items()}


class Operations(TorchDispatchMode):
    """Milliseconds of all operations that really run, apart from views and copies."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name in ("convolution", "addmm"):
            images, weight = (args[0], args[1]) if name == "convolution" else (args[1], args[2].mT)
            self.found.append(0.01 * images.shape[1] * ceil(weight.shape[0] / 8))
        elif name not in ("view", "_unsafe_view", "t", "detach", "_to_copy", "clone", "empty", "as_strided_"):
            self.found.append(0.01)
        return func(*args, **kwargs or {})

    def __enter__(self):
        self.found: list[float] = []
        return super().__enter__()


def whole(run) -> float:
    with torch.no_grad(), Operations() as operations:
        run()
    return SCALE * sum(operations.found) + OVERHEAD * len(operations.found)


def alone(key: str) -> float:
    shapes = [json.loads(found) for found in re.findall(r'"shape": (\[[^]]*\])', key)]
    if key.startswith(("conv2d", "linear")):
        return 0.01 * shapes[0][-1 if key.startswith("linear") else 1] * ceil(shapes[1][0] / 8)
    return 0.01


def parts_of(net: nn.Module, table: LatencyTable, step: int = 1, size: int = 8, **options):
    trace = trace_network(net, (3, size, size))
    analysis = analysis_of(net, trace)
    floor = floors(trace.groups, analysis.branches, frozenset(), {}, CampHiVeConfig(scope="all"))
    parts = latency_terms(net, analysis, table, LatencyRequest(floor, **{"batch": 2, "step": step} | options))
    return parts, {group.name: group.size for group in trace.groups}


def predicted(parts, kept, dropped=()) -> float:
    return sum(part.at(kept, dropped) for part in parts)


@pytest.fixture
def table(tmp_path) -> LatencyTable:
    return LatencyTable(folder=tmp_path, timer=Timer())


# Prediction


def test_the_prediction_adds_up(table):
    # conv1 3 -> 8, relu, conv2 8 -> 8, relu, linear 128 -> 3 (8 channels of 16 positions): five operations, alone
    #   0.03 + 0.01 + 0.08 + 0.01 + 1.28 = 1.41
    parts, sizes = parts_of(Chain(), table)
    assert len(parts) == 5 and sizes["conv1"] == sizes["conv2"] == 8
    assert predicted(parts, sizes) == pytest.approx(3 * 1.41 + 0.05 * 5)
    half = predicted(parts, sizes | {"conv1": 4})
    # conv2 reads four channels fewer; conv1's step stays
    assert predicted(parts, sizes) - half == pytest.approx(3 * 0.04)
    assert half - predicted(parts, sizes | {"conv1": 4, "conv2": 3}) == pytest.approx(3 * 0.8)


@pytest.mark.parametrize("act", [nn.SiLU, nn.ReLU])  # what a dropped block leaves folds into ReLUs only
@pytest.mark.parametrize("folded", [False, True])
def test_the_prediction_is_that_of_the_network_that_is_cut(table, folded, act):
    net = randomise(ToyResNet(act))
    parts, sizes = parts_of(net, table, folded=folded)
    trace = trace_network(net, (3, 8, 8))
    branches = droppable_branches(trace)
    inner = {name for branch in branches if branch.module == "block1" for name in branch.groups}
    left = {name: 0 if name in inner else size // 2 for name, size in sizes.items() if name != "head"}
    cuts = tuple(ChannelCut(name, tuple(range(kept))) for name, kept in left.items())
    plan = PrunePlan(trace.groups, branches, cuts, ("block1",), "magnitude", "none", 2, 1)
    small = apply_plan(net, plan, trace)
    ready = fold(small, (3, 8, 8)) if folded else small.eval()
    batch = images(2)
    assert predicted(parts, sizes | left, ["block1"]) == pytest.approx(whole(lambda: ready(batch)))
    assert predicted(parts, sizes) > predicted(parts, sizes | left, ["block1"])


def test_a_dropped_branch_takes_its_operations_along(table):
    parts, sizes = parts_of(ToyResNet(), table)
    branches = {part.branch for part in parts}
    assert branches == {None, "block1", "block2"}
    inside = [part for part in parts if part.branch == "block1"]
    assert len(inside) == 5  # conv1 bn1 act1 conv2 bn2; the add and what follows it stay
    gone = predicted(parts, sizes) - predicted(parts, sizes, ["block1"])
    assert gone == pytest.approx(predicted(inside, sizes)) and gone > 0


def test_folded_networks_have_no_norms_but_biases():
    net = ToyResNet()
    analysis, names = analysis_of(net, trace_network(net, (3, 8, 8))), {}
    for folded in (False, True):
        found = network_operations(analysis, 2, folded)
        names[folded] = [op.target._schema.name for op in found]
        convolutions = [op for op in found if op.target._schema.name == "aten::conv2d"]
        assert all((op.args[2] is not None) == folded for op in convolutions[:3])
    assert names[False].count("aten::batch_norm") == 6 and "aten::batch_norm" not in names[True]


def test_depthwise_convolutions_keep_a_group_a_channel(table):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(144, 2)
    )
    parts_of(net, table)
    depthwise = [json.loads(key.split(" ", 2)[2]) for key in table.ms if key.startswith("conv2d") and ", 3, 3]" in key]
    assert {(args[0]["shape"][1], args[1]["shape"][0], args[-1]) for args in depthwise} == {
        (n, n, n) for n in (1, 7, 8)
    }


@pytest.mark.parametrize(
    "name",
    ["efficientnet_b0", *(pytest.param(name, marks=pytest.mark.slow) for name in ("densenet121", "resnet50"))],
)
def test_sizes_at_reduced_widths_are_those_of_the_network_cut_to_them(name):
    net = timm.create_model(name).eval()
    trace = trace_network(net, (3, 64, 64))
    kept = {group.name: group.size if group.frozen else max(1, group.size // 2) for group in trace.groups}
    cuts = tuple(ChannelCut(g.name, tuple(range(kept[g.name]))) for g in trace.groups if not g.frozen)
    small = apply_plan(net, PrunePlan(trace.groups, (), cuts, (), "magnitude", "none", 1, 1), trace)
    found = operations_at(net, trace, kept)
    after = trace_network(small, (3, 64, 64))
    assert found == operations_at(small, after, {group.name: group.size for group in after.groups})
    assert found != operations_at(net, trace, {group.name: group.size for group in trace.groups})


def test_tensors_that_belong_to_no_layer_become_narrow_too(table):
    class Scaled(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(8, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.conv2(self.conv1(x).relu() * self.gamma).relu().flatten(1))

    parts_of(Scaled(), table)
    assert sum(key.startswith("network") for key in table.ms) == 4  # each could be made


def operations_at(net: nn.Module, trace: Trace, kept: dict[str, int]) -> list[str]:
    """Every operation with the sizes of its arguments, where so many channels of each group are kept."""
    operations = network_operations(analysis_of(net, trace), 2, False)
    return [op.at([width.at(kept) for width in op.widths], torch.float32)[0] for op in operations]


@pytest.mark.parametrize(
    ("totals", "measured", "expected"),
    [
        ([(10, 10), (2, 10)], [13.0, 5.0], (1.0, 0.3)),
        ([(10, 10), (2, 10), (4, 5)], [13.0, 5.0, 5.5], (1.0, 0.3)),
        ([(10, 10), (2, 10)], [20.0, 1.0], (2.5 / 4.25, 0.0)),  # no time below zero: s with s/2 and 2 s nearest to 1
        ([(10, 10)], [20.0], (2.0, 0.0)),  # cannot be made narrow
        ([(10, 10), (9.99, 10)], [20.0, 19.98], (2.0, 0.0)),  # too much alike
    ],
)
def test_scale_and_overhead_by_hand(totals, measured, expected):
    assert fit(totals, measured) == pytest.approx(expected, rel=1e-3)


# The grid


def test_times_between_grid_points_are_interpolated():
    grid = Grid((Axis((8, 16, 64), (1, 7, 9, 64), 0, 8), Axis((10,))))
    at = {point: float(point[0]) ** 2 for point in grid.points()}.__getitem__
    assert grid.interpolate((16, 10), at) == 256
    assert grid.interpolate((40, 10), at) == (256 + 4096) / 2  # half way from 16 to 64
    assert grid.interpolate((4, 10), at) == (1 + 49) / 2  # ragged: half way from 1 to 7
    assert grid.interpolate((7, 10), at) == 49


def test_two_widths_are_interpolated_in_both():
    grid = Grid((Axis((8, 16), (), 0, 8), Axis((8, 24), (), 0, 8)))
    assert grid.interpolate((12, 16), lambda point: point[0] * point[1]) == 12 * 16
    assert len(grid.points()) == 4


# The table


def test_what_was_timed_is_not_timed_again(tmp_path):
    first = LatencyTable(folder=tmp_path, timer=Timer())
    parts, sizes = parts_of(Chain(), first)
    again = LatencyTable(folder=tmp_path, timer=Timer())
    assert [predicted(parts_of(Chain(), again)[0], kept) for kept in (sizes,)] == [predicted(parts, sizes)]
    assert first.timer.asked and all(key.startswith("network") for key in again.timer.asked)
    parts_of(Chain(), again, batch=3)
    parts_of(Chain(), again, batch=3)
    twice = [key for key in set(again.timer.asked) if again.timer.asked.count(key) > 1]
    assert twice == again.timer.asked[:1]  # the yardstick
    assert {path.suffix for path in tmp_path.iterdir()} - {".lock"} == {".json"}  # nothing half-written is left


def test_a_machine_that_became_slower_is_noticed(tmp_path):
    parts, sizes = parts_of(ToyResNet(), LatencyTable(folder=tmp_path, timer=Timer()))
    slower = Timer()
    today = LatencyTable(folder=tmp_path, timer=lambda *works: {key: 1.5 * ms for key, ms in slower(*works).items()})
    assert predicted(parts_of(ToyResNet(), today)[0], sizes) == pytest.approx(1.5 * predicted(parts, sizes))
    assert all(key.startswith("network") for key in slower.asked)


def test_a_machine_that_becomes_slower_in_a_run_does_not_change_what_budgets_mean(tmp_path):
    timer, pace = Timer(), 1.0
    steady = LatencyTable(folder=tmp_path / "steady", timer=Timer())
    tired = LatencyTable(
        folder=tmp_path / "tired", timer=lambda *works: {key: pace * ms for key, ms in timer(*works).items()}
    )
    parts_of(ToyResNet(), steady)
    parts_of(ToyResNet(), tired)
    pace = 1.5
    (expected, sizes), (found, _) = (parts_of(ToyResNet(), table, batch=4) for table in (steady, tired))
    assert predicted(found, sizes) == pytest.approx(predicted(expected, sizes))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 3}', '{"schema": 3, "ms": {"a": "b"}}', "\x00"], ids=repr)
def test_a_damaged_table_is_measured_again(tmp_path, text, caplog):
    LatencyTable(folder=tmp_path, timer=Timer()).measure({"relu": lambda: None})
    (path,) = tmp_path.glob("*.json")
    path.write_text(text)
    with caplog.at_level(logging.WARNING, "hf_camphive"):
        table = LatencyTable(folder=tmp_path, timer=Timer())
    assert "is damaged" in caplog.text and str(path) in caplog.text
    table.measure({"relu": lambda: None})
    assert LatencyTable(folder=tmp_path, timer=Timer()).ms == {"relu": 0.01}


def test_tables_of_two_runs_at_once_are_joined(tmp_path):
    tables = [LatencyTable(folder=tmp_path, timer=Timer()) for _ in range(2)]
    for table, key in zip(tables, ("relu", "add")):
        table.measure({key: lambda: None})
    assert LatencyTable(folder=tmp_path).ms == {"relu": 0.01, "add": 0.01}


def keep(folder: Path, keys: list[str]) -> None:
    table = LatencyTable(folder=folder, timer=lambda works, *_: dict.fromkeys(works, 0.5))
    for key in keys:
        table.measure({key: lambda: None})


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    """Four processes, 100 entries each, every one written by itself."""
    fork = multiprocessing.get_context("fork")
    names = [[f"{process} {number}" for number in range(100)] for process in range(4)]
    writers = [fork.Process(target=keep, args=(tmp_path, keys)) for keys in names]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    found = LatencyTable(folder=tmp_path).ms
    assert len(found) == 400 and found == {key: 0.5 for keys in names for key in keys}


def test_a_lock_that_cannot_be_taken_costs_no_run(tmp_path, caplog, monkeypatch):
    table = LatencyTable(folder=tmp_path, timer=Timer())
    monkeypatch.setattr(timing, "LOCK_SECONDS", 0.05)
    with FileLock(table.path.with_suffix(".lock")):  # another run, which hangs
        table.measure({"relu": lambda: None})
    assert table.ms == {"relu": 0.01} and "could not be kept" in caplog.text and not table.path.exists()
    caplog.clear()
    monkeypatch.setattr(timing, "FileLock", no_locks_here)
    table.measure({"add": lambda: None})
    assert table.ms == {"relu": 0.01, "add": 0.01} and "could not be kept" in caplog.text and not table.path.exists()


def no_locks_here(*args: object, **kwargs: object) -> None:
    raise NotImplementedError("FileSystem does not appear to support flock")


def test_a_folder_that_cannot_be_written_costs_no_run(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    table = LatencyTable(folder=tmp_path / "file" / "folder", timer=Timer())
    table.measure({"relu": lambda: None})
    assert table.ms == {"relu": 0.01} and "could not be kept" in caplog.text


def test_every_device_and_number_of_threads_has_a_table(tmp_path, monkeypatch):
    one = LatencyTable(folder=tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert LatencyTable(folder=tmp_path).path != one.path
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    assert LatencyTable(folder=tmp_path).path != one.path
    assert LatencyTable().path.parent == Path(timing.constants.HF_HOME, "camphive")


def test_the_median_counts_and_works_take_turns(monkeypatch):
    turns = []
    monkeypatch.setattr(timing, "_milliseconds", lambda run, device: run())
    monkeypatch.setattr(timing, "CALLS", 2)
    monkeypatch.setattr(timing, "MAX_ROUNDS", 7)

    def work(name, *a_round):
        times = iter(a_round * 7)
        return lambda: turns.append(name) or (lambda: next(times))

    works = {"a": work("a", 99.0, 3.0, 5.0), "b": work("b", 99.0, 1.0, 1.0)}  # the first call of a round warms up
    assert typical_times(works, torch.device("cpu")) == {"a": 4.0, "b": 1.0}
    assert turns == ["a", "b"] * 7


def test_real_times_are_positive(tmp_path):
    table = LatencyTable(folder=tmp_path)
    parts, sizes = parts_of(Chain(), table)
    whole_network = next(ms for key, ms in table.ms.items() if "network" in key)
    assert 0.2 < predicted(parts, sizes) / whole_network < 5  # other work on the machine may come in between


# Folding


def dropped(net: nn.Module, modules: tuple[str, ...]) -> nn.Module:
    """The network without these blocks, with random constants in their place."""
    trace = trace_network(net, (3, 8, 8))
    branches = droppable_branches(trace)
    inner = {name for branch in branches if branch.module in modules for name in branch.groups}
    cuts = tuple(ChannelCut(name, ()) for name in sorted(inner))
    small = apply_plan(net, PrunePlan(trace.groups, branches, cuts, modules, "magnitude", "none", 2, 1), trace)
    generator = torch.Generator().manual_seed(0)
    for module in modules:
        constant = small.get_submodule(module).constant
        constant.data = torch.randn(constant.shape, generator=generator, dtype=constant.dtype)
    return small.eval()


class ThreeBlocks(nn.Module):
    """A stem and three blocks that all keep their width: any of them can be dropped."""

    def __init__(
        self, act: type[nn.Module] = nn.ReLU, first: type[nn.Module] = nn.ReLU, read_twice: bool = False
    ) -> None:
        super().__init__()
        self.stem, self.bn, self.act = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), first()
        self.blocks = nn.Sequential(*(Block(6, 5, 6, act) for _ in range(3)))
        self.head, self.read_twice = nn.Linear(6, 3), read_twice

    def forward(self, x):
        stem = self.act(self.bn(self.stem(x)))
        x = self.blocks(stem)
        return self.head((x + stem if self.read_twice else x).mean((2, 3)))


@pytest.mark.parametrize(
    ("modules", "maxima"),
    [
        (("blocks.0",), 1),  # into the stem
        (("blocks.1", "blocks.2"), 1),  # two in a row come to one maximum, after the first block
        (("blocks.0", "blocks.2"), 2),
        (("blocks.0", "blocks.1", "blocks.2"), 1),
    ],
)
def test_dropped_blocks_fold_into_what_comes_before(modules, maxima):
    net = dropped(randomise(ThreeBlocks()), modules)
    folded = fold(net, (3, 8, 8))
    kinds = [type(module) for module in folded.modules()]
    assert (kinds.count(ChannelwiseMaximum), kinds.count(Shortcut)) == (maxima, 0)
    assert relative_error(folded(images(4)), net(images(4))) < 1e-12
    before = [type(module) for module in net.modules()]
    assert before.count(Shortcut) == len(modules)  # the network itself is as it was


def test_constants_that_are_not_positive_leave_the_relu():
    net = dropped(randomise(ThreeBlocks()), ("blocks.1",))
    net.get_submodule("blocks.1").constant.data.clamp_(max=0)
    folded = fold(net, (3, 8, 8))
    assert not any(isinstance(module, (ChannelwiseMaximum, Shortcut)) for module in folded.modules())
    assert relative_error(folded(images(4)), net(images(4))) < 1e-12


@pytest.mark.parametrize(
    "net",
    [ThreeBlocks(nn.SiLU, nn.SiLU), ThreeBlocks(nn.SiLU), ThreeBlocks(first=nn.SiLU), ThreeBlocks(read_twice=True)],
    ids=["SiLU", "SiLU after it", "SiLU before it", "read twice"],
)
def test_constants_that_cannot_go_elsewhere_stay(net):
    small = dropped(randomise(net), ("blocks.0",))
    folded = fold(small, (3, 8, 8))
    assert any(isinstance(module, Shortcut) for module in folded.modules())
    assert relative_error(folded(images(4)), small(images(4))) < 1e-12


def test_a_linear_stream_takes_constants_into_its_bias():
    net = timm.create_model("cifar_mobilenetv2").double()
    randomise(net)
    trace = trace_network(net, (3, 32, 32))
    branch = droppable_branches(trace)[0]
    cuts = tuple(ChannelCut(name, ()) for name in branch.groups)
    plan = PrunePlan(trace.groups, (branch,), cuts, (branch.module,), "magnitude", "none", 2, 1)
    small = apply_plan(net, plan, trace)
    small.get_submodule(branch.module).constant.data.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    folded = fold(small, (3, 32, 32))
    assert not any(isinstance(module, (ChannelwiseMaximum, Shortcut)) for module in folded.modules())
    assert relative_error(folded(images(2, 32)), small.eval()(images(2, 32))) < 1e-12


@pytest.mark.parametrize("act", [nn.SiLU, nn.ReLU])
def test_folding_leaves_the_function(act):
    net = randomise(ToyResNet(act))
    folded = fold_batchnorm(net, (3, 8, 8))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert sum(isinstance(module, nn.BatchNorm2d) for module in net.modules()) == 6
    assert relative_error(folded(images(2)), net(images(2))) < 1e-12


def test_norms_with_an_activation_keep_it():
    net = randomise(timm.create_model("cifar_mobilenetv2"))
    folded = fold_batchnorm(net, (3, 32, 32))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert relative_error(folded(images(2, 32)), net(images(2, 32))) < 1e-12


def test_a_constant_does_not_go_before_a_norm_that_stays():
    """A norm that two convolutions share cannot be folded, and would scale a bias of the convolution."""
    net = randomise(ThreeBlocks())
    net.blocks[0].bn2 = net.blocks[2].bn2
    small = dropped(net, ("blocks.1",))
    folded = fold(small, (3, 8, 8))
    assert any(isinstance(module, Shortcut) for module in folded.modules())
    assert relative_error(folded(images(4)), small(images(4))) < 1e-12


def test_what_runs_twice_is_not_folded():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv(self.norm(self.conv(x))))

    net = randomise(Twice())
    folded = fold_batchnorm(net, (3, 8, 8))
    assert isinstance(folded.norm, nn.BatchNorm2d)
    assert relative_error(folded(images(2)), net(images(2))) < 1e-12
