"""Implants: masked = shrunk with them too, zero weights equal removal, and MACs, readers and exports count them in."""

import copy
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import timm
import torch
from support.brief import time_briefly
from support.plans import analysis_of
from support.toys import ToyResNet, images, randomise, relative_error
from transformers import AutoModelForImageClassification

import hf_camphive
from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import ConfigError, PlanError
from hf_camphive.core.plan import ChannelCut, PrunePlan, plans_from_json, plans_to_json
from hf_camphive.hub.loading import load_base
from hf_camphive.network.footprint import count_macs
from hf_camphive.network.graph.blocks import droppable_branches, exterior_groups
from hf_camphive.network.graph.program import named_tensors
from hf_camphive.network.graph.tracing import trace_network
from hf_camphive.network.modeling.layers import ImplantedConv2d
from hf_camphive.network.surgery.cutting import apply_plan, mask_state
from hf_camphive.network.surgery.verification import check_groups
from hf_camphive.pruning.merging.reconstruction import reconstruct
from hf_camphive.pruning.merging.rules import merge
from hf_camphive.pruning.merging.task import MergeTask
from hf_camphive.pruning.planning.costs import CostModel
from hf_camphive.pruning.planning.greedy import make_plan
from hf_camphive.pruning.planning.implants import implantable_groups, macs_after, with_implants
from hf_camphive.runs.pruner import CampHiVePruner
from hf_camphive.training.data.loaders import DataOptions, load_loaders

CUTS = (
    ChannelCut("stem", (1, 2, 5), (), (0,)),
    ChannelCut("block1.conv1", (0, 3), (), (1, 4)),
    ChannelCut("block2.conv1", (1, 2, 5), (), (0,)),
    ChannelCut("block2.conv2", (1, 2, 5, 7), (), (0, 6)),
)


def shapes(net) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(net).items()}


def planned(net, trace, share: float, ratio: float, seed: int = 0) -> tuple[PrunePlan, dict, int]:
    """A plan by random scores over all groups, its scores and its budget."""
    generator = torch.Generator().manual_seed(seed)
    scores = {group.name: torch.rand(group.size, generator=generator) for group in trace.groups}
    network = CostModel(trace.groups, droppable_branches(trace), exterior_groups(trace), trace.positions, shapes(net))
    target, config = int(share * network.macs), CampHiVeConfig(scope="all")
    plan_for = partial(make_plan, network, scores, config=config)
    plan = with_implants(lambda macs: plan_for(targets=macs), target, ratio, scores, analysis_of(net, trace))
    return plan, scores, target


@pytest.fixture(scope="module")
def toy():
    """The toy network, its trace, a plan with implants in every group, and what the plan makes of it."""
    net = randomise(ToyResNet())
    trace = trace_network(net, (3, 8, 8))
    plan = PrunePlan(trace.groups, droppable_branches(trace), CUTS, (), "random", "none", 2, 1)
    return net, trace, plan, apply_plan(net, plan, trace)


def test_masked_is_shrunk(toy):
    net, trace, plan, small = toy
    masked = mask_state(named_tensors(net), plan)
    with torch.no_grad():
        expected = trace.graph.run(masked, images(2))[0]
        assert relative_error(small(images(2)), expected) < 1e-12
        removed = trace.graph.run(mask_state(named_tensors(net), plan.without_implants()), images(2))[0]
        assert relative_error(removed, expected) > 1e-3  # the implants do something
    kernel = masked["block1.conv2.weight"][0, 1]
    assert kernel[1, 1] == net.block1.conv2.weight[0, 1, 1, 1] != 0 and kernel.count_nonzero() == 1
    conv = small.block1.conv1
    assert conv.weight.shape == (2, 3, 3, 3) and conv.reads.weight.shape == (2, 1, 1, 1)
    assert conv.makes.weight.shape == (2, 4, 1, 1) and small.block1.bn1.num_features == 4
    assert isinstance(small.block2.downsample[0], torch.nn.Conv2d) and small.block2.downsample[0].in_channels == 4


def test_implants_with_zero_weights_equal_removal(toy):
    net, trace, plan, small = toy
    removed = apply_plan(net, plan.without_implants(), trace)
    silenced = copy.deepcopy(small)
    with torch.no_grad():
        for module in silenced.modules():
            if isinstance(module, ImplantedConv2d) and module.reads is not None:
                module.reads.weight.zero_()
                if module.makes is not None:  # what makes an implant may read implants too
                    module.makes.weight[:, module.in_channels :] = 0
        silenced.block2.downsample[0].weight[:, 3:] = 0
        silenced.head.weight[:, 4:] = 0
        assert relative_error(silenced(images(2)), removed(images(2))) < 1e-12
    merged = merge(MergeTask(named_tensors(net), plan, trace))
    with torch.no_grad():  # merging leaves implants unread
        assert relative_error(apply_plan(net, plan, trace, merged)(images(2)), removed(images(2))) < 1e-12


def test_macs_are_those_of_the_network(toy):
    net, trace, plan, small = toy
    assert macs_after(plan, trace.positions, shapes(net)) == count_macs(small, (3, 8, 8))
    bare = apply_plan(net, plan.without_implants(), trace)
    assert macs_after(plan.without_implants(), trace.positions, shapes(net)) == count_macs(bare, (3, 8, 8))


def test_an_implanted_network_is_pruned_and_implanted_again(toy):
    _, _, _, small = toy
    trace = trace_network(small, (3, 8, 8))
    names = {group.name for group in trace.groups}
    assert {"block1.conv1", "block1.conv1.makes", "stem.makes"} <= names
    assert "block1.conv1" not in exterior_groups(trace)
    assert check_groups(small, trace, torch.Generator().manual_seed(0)) == trace
    cuts = (
        ChannelCut("stem", (0,), (), (1,)),
        ChannelCut("block1.conv1", (0,), (), (1,)),
        ChannelCut("block2.conv2", (1, 2), (), (0,)),
        ChannelCut("block2.conv2.makes", (1,)),
    )
    plan = PrunePlan(trace.groups, (), cuts, (), "random", "none", 2, 1)
    again = apply_plan(small, plan, trace)
    with torch.no_grad():
        expected = trace.graph.run(mask_state(named_tensors(small), plan), images(2))[0]
        assert relative_error(again(images(2)), expected) < 1e-12
    assert again.block1.conv1.makes.weight.shape == (3, 3, 1, 1)
    assert macs_after(plan, trace.positions, shapes(small)) == count_macs(again, (3, 8, 8))


def test_convolutions_with_a_bias_and_a_stride_are_implanted():
    net = timm.create_model("cifar_resnet20").double().eval()
    net.layer2[0].conv1.bias = torch.nn.Parameter(torch.randn(32, dtype=torch.float64))
    randomise(net)
    trace = trace_network(net, (3, 16, 16))
    cut = ChannelCut("layer2.0.conv1", tuple(range(20)), (), (25, 31))
    small = apply_plan(net, PrunePlan(trace.groups, (), (cut,), (), "random", "none", 2, 1), trace)
    conv = small.layer2[0].conv1
    assert conv.makes.stride == (2, 2) and torch.equal(conv.makes.bias, net.layer2[0].conv1.bias[[25, 31]])


@pytest.mark.parametrize("ratio", [0.1, 1.0])
def test_the_budget_is_met_with_implants_counted(ratio):
    net = randomise(timm.create_model("cifar_resnet20"))
    trace = trace_network(net, (3, 16, 16))
    plan, scores, target = planned(net, trace, 0.4, ratio)
    small = apply_plan(net, plan, trace)
    assert 0.98 * target < plan.macs_after == count_macs(small, (3, 16, 16)) <= target
    sizes = {group.name: group.size for group in plan.groups}
    gone = {name for b in plan.branches if b.module in plan.dropped for name in b.groups}
    victims = {
        (cut.group, c): float(scores[cut.group][c])
        for cut in plan.cuts
        for c in set(range(sizes[cut.group])) - set(cut.keep)
        if cut.group not in gone
    }
    chosen = [(name, c) for name, channels in plan.implants.items() for c in channels]
    assert len(chosen) == round(ratio * len(victims)) > 0
    assert sorted(victims[key] for key in chosen) == sorted(victims.values())[-len(chosen) :]
    assert plans_from_json(plans_to_json([plan])) == (plan,)
    assert "keep 1x1 kernels" in plan.summary()


def test_networks_without_large_dense_kernels_are_refused():
    net = timm.create_model("mobilenetv2_035").eval()
    trace = trace_network(net, (3, 32, 32))
    # The stem's group runs on through a depthwise convolution, which an implant would have to enter as well.
    assert not implantable_groups(trace)
    with pytest.raises(PlanError, match="implants would save nothing; set implant_ratio to 0"):
        planned(net, trace, 0.5, 0.1)


@pytest.mark.parametrize(("keep", "implants"), [((0, 1), (1,)), ((0, 1), (9,))])
def test_plans_that_contradict_themselves_are_refused(toy, keep, implants):
    _, trace, _, _ = toy
    with pytest.raises(PlanError, match=r"group 'stem': implants must be channels of 0\.\.5 that are not kept"):
        PrunePlan(trace.groups, (), (ChannelCut("stem", keep, (), implants),), (), "random", "none", 2, 1)
    with pytest.raises(ConfigError, match="implant_ratio is 2"):
        CampHiVeConfig(implant_ratio=2.0)


def test_implants_train_from_zero(toy):
    net, trace, plan, _ = toy
    merged = merge(MergeTask(named_tensors(net), plan, trace))
    small = apply_plan(net, plan, trace, merged).train()
    conv = small.block1.conv2
    before = conv.reads.weight.detach().clone(), small.block1.conv1.makes.weight.detach().clone()
    assert not before[0].any()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(small(images(4, seed=step)), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    assert conv.reads.weight.all() and not torch.equal(small.block1.conv1.makes.weight, before[1])


def test_reconstruction_fits_implants_like_numpys_least_squares():
    net = randomise(ToyResNet())
    trace, state = trace_network(net, (3, 8, 8)), {name: t.detach() for name, t in named_tensors(net).items()}
    keep, implants, x = [0, 2, 3], [1, 4], images(6)
    plan = PrunePlan(
        trace.groups, (), (ChannelCut("block1.conv1", tuple(keep), (), tuple(implants)),), (), "random", "none", 2, 1
    )
    after = reconstruct(MergeTask(state, plan, trace, [x[:4], x[4:]], ridge=1e-14))
    assert all(torch.equal(tensor, after[name]) for name, tensor in mask_state(after, plan).items())

    def fitted(rows, target):
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1).numpy()
        return np.linalg.lstsq(rows, target.permute(0, 2, 3, 1).flatten(0, 2).numpy(), rcond=None)[0]

    def pixels(value):
        return value.permute(0, 2, 3, 1).flatten(0, 2)

    block = net.block1
    with torch.no_grad():
        stem = net.act(net.bn(net.stem(x)))
        dense = block.conv1(stem)
        made = fitted(pixels(stem), dense[:, implants])
        np.testing.assert_allclose(after["block1.conv1.weight"][implants, :, 1, 1].T, made[:-1], rtol=1e-6, atol=1e-8)
        shift = state["block1.bn1.running_mean"] - after["block1.bn1.running_mean"]
        np.testing.assert_allclose(shift[implants], made[-1], atol=1e-8)
        torch.testing.assert_close(after["block1.conv1.weight"][keep], state["block1.conv1.weight"][keep])

        target = block.conv2(block.act1(block.bn1(dense)))
        values = [node for node in trace.graph.operations if node.target is torch.ops.aten.conv2d.default]
        (inner,) = trace.graph.run(after, x, [values[2].args[0]])  # what block1.conv2 reads
        patches = torch.nn.functional.unfold(inner[:, keep], 3, padding=1).transpose(1, 2).reshape(-1, 27)
        read = fitted(torch.cat([patches, pixels(inner[:, implants])], 1), target)
    weight = after["block1.conv2.weight"]
    np.testing.assert_allclose(weight[:, keep].flatten(1).T, read[:27], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(weight[:, implants, 1, 1].T, read[27:29], rtol=1e-6, atol=1e-8)


# Whole runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A pruner that has run with implants in two cycles on the bundled network, and its folder."""
    config = CampHiVeConfig(
        implant_ratio=0.2, calibration_size=64, num_train_epochs=0, mixed_precision="no", merge="none", cycles=2
    )
    with pytest.MonkeyPatch.context() as patch:
        time_briefly(patch)
        job = CampHiVePruner("digits_resnet", config)
        options = DataOptions(workers=0, max_train_samples=128, max_eval_samples=50)
        job.run(load_loaders("digits", job.base.net, config, options))
        job.net.layer1[0].conv2.reads.weight.data.normal_(std=0.1)  # implants that say something
        return job, job.save_pretrained(tmp_path_factory.mktemp("implants") / "saved")


MAX_PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
ALONE = """
import sys, torch
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_camphive":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
torch.save(model(pixels).logits.detach(), sys.argv[2])
"""


@pytest.mark.slow
def test_every_reader_loads_implants(run, tmp_path):
    job, folder = run
    with torch.no_grad():
        expected = copy.deepcopy(job.net).cpu().eval()(MAX_PIXELS)
        for net in (
            hf_camphive.from_pretrained(folder).timm_model,
            AutoModelForImageClassification.from_pretrained(folder).timm_model,
            timm.create_model(f"local-dir:{folder}", pretrained=True),
            load_base(str(folder)).net,
        ):
            torch.testing.assert_close(net.eval()(MAX_PIXELS), expected, rtol=1e-5, atol=1e-5)
            assert count_macs(net, (3, 16, 16)) == job.plans[-1].macs_after
    subprocess.run([sys.executable, "-c", ALONE, folder, tmp_path / "logits.pt"], check=True, timeout=120)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_run_with_implants_keeps_its_budget_and_says_so(run):
    job, folder = run
    assert len(job.plans) == 2 and all(plan.implants for plan in job.plans)
    dense, final = job.report.stages[0].footprint, job.report.stages[-1].footprint
    assert final.macs == job.plans[-1].macs_after <= 0.5 * dense.macs
    assert final.parameters == sum(p.numel() for p in job.net.parameters())
    assert "neural implants" in (folder / "README.md").read_text()
    assert plans_from_json((folder / "prune_plan.json").read_text()) == tuple(job.plans)


@pytest.mark.slow
def test_implants_are_exported(run, tmp_path):
    job, _ = run
    net = copy.deepcopy(job.net).cpu().eval()
    exported = torch.export.export(net, (MAX_PIXELS,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(MAX_PIXELS), net(MAX_PIXELS), rtol=1e-5, atol=1e-5)
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.onnx.export(net, (MAX_PIXELS,), tmp_path / "net.onnx", dynamo=True, input_names=["x"])
    (found,) = onnxruntime.InferenceSession(tmp_path / "net.onnx").run(None, {"x": MAX_PIXELS.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), net(MAX_PIXELS).detach(), rtol=1e-4, atol=1e-4)
