"""Reconstruction against numpy's least squares on explicit rows, and where it must be exact."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from support.plans import plan_with, random_plan
from support.tiers import first_by_default
from support.toys import Chain, ToyResNet, images, randomise, relative_error
from torch import nn

import hf_camphive.pruning.merging.reconstruction as reconstruction
from hf_camphive.core.errors import ReconstructionError
from hf_camphive.network.graph.program import named_tensors
from hf_camphive.network.graph.tracing import trace_network
from hf_camphive.network.surgery.cutting import apply_plan
from hf_camphive.pruning.merging.reconstruction import reconstruct
from hf_camphive.pruning.merging.ridge import NormalEquations
from hf_camphive.pruning.merging.task import MergeTask


def prepared(net: nn.Module, size: int = 8):
    net = randomise(net)
    trace = trace_network(net, (3, size, size))
    return net, trace, {name: tensor.detach() for name, tensor in named_tensors(net).items()}


def test_nothing_cut_changes_nothing():
    _, trace, state = prepared(ToyResNet())
    after = reconstruct(MergeTask(state, plan_with(trace, {}), trace, [images(6)]))
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_first_fit_equals_numpys_least_squares_on_explicit_rows():
    """block1.conv2 reads 3 of 5 channels; its target is the dense sum minus the shortcut, taken back through bn2."""
    net, trace, state = prepared(ToyResNet())
    keep, x = [0, 2, 3], images(6)
    after = reconstruct(
        MergeTask(state, plan_with(trace, {"block1.conv1": tuple(keep)}), trace, [x[:4], x[4:]], ridge=1e-14)
    )
    with torch.no_grad():
        stem = net.act(net.bn(net.stem(x)))
        inner = net.block1.act1(net.block1.bn1(net.block1.conv1(stem)))
        target = net.block1.conv2(inner)  # the shortcut is intact, so the repaired target is the dense one
        rows = F.unfold(inner[:, keep], 3, padding=1).transpose(1, 2).reshape(-1, 27)
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1).numpy()
        solution = np.linalg.lstsq(rows, target.permute(0, 2, 3, 1).reshape(-1, 6).numpy(), rcond=None)[0]
    np.testing.assert_allclose(
        after["block1.conv2.weight"][:, keep].reshape(6, 27).T, solution[:27], rtol=1e-6, atol=1e-8
    )
    np.testing.assert_allclose(
        state["block1.bn2.running_mean"] - after["block1.bn2.running_mean"], solution[27], atol=1e-8
    )
    assert after["block1.conv2.weight"][:, [1, 4]].abs().max() == 0


def test_second_block_repairs_the_error_that_it_inherits():
    """The last layer of block 2 is fitted to dense sum - pruned shortcut on what the pruned network feeds it."""
    _, trace, state = prepared(ToyResNet())
    x = images(6)
    plan = plan_with(trace, {"block1.conv1": (0, 1)})
    after = reconstruct(MergeTask(state, plan, trace, [x], ridge=1e-14))
    nodes = {
        trace.graph.tensors[n.args[1]]: n for n in trace.graph.operations if n.target is torch.ops.aten.conv2d.default
    }
    sums = [n for n in trace.graph.operations if n.target is torch.ops.aten.add.Tensor]
    conv, shortcut = nodes["block2.conv2.weight"], sums[1].args[1]
    norm = next(iter(conv.users))
    with torch.no_grad():
        (dense_sum,) = trace.graph.run(state, x, [sums[1]])
        conv_input, pruned_shortcut, _ = trace.graph.run(after, x, [conv.args[0], shortcut, norm])
        gamma, beta, mean, var = (state[trace.graph.tensors[a]].view(1, -1, 1, 1) for a in norm.args[1:5])
        target = (dense_sum - pruned_shortcut - beta) * (var + 1e-5).sqrt() / gamma + mean
        rows = F.unfold(conv_input, 3, padding=1).transpose(1, 2).reshape(-1, 63)
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1).numpy()
        solution = np.linalg.lstsq(rows, target.permute(0, 2, 3, 1).reshape(-1, 8).numpy(), rcond=None)[0]
    np.testing.assert_allclose(after["block2.conv2.weight"].reshape(8, 63).T, solution[:63], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("broken", ["image", "weight"])
def test_one_number_that_is_none_is_refused_by_the_name_of_the_first_layer_it_reaches(broken):
    _, trace, state = prepared(ToyResNet())
    x = images(6)
    if broken == "image":
        x[3, 0, 2, 2] = float("nan")
    else:
        state["stem.weight"] = state["stem.weight"].index_fill(0, torch.tensor([1]), float("inf"))
    plan = plan_with(trace, {"block1.conv1": (0, 2, 3)})
    with pytest.raises(ReconstructionError, match=r"^the least-squares fit of block1\.conv2 .*NaN or infinite"):
        reconstruct(MergeTask(state, plan, trace, [x[:4], x[4:]]))


@pytest.mark.parametrize("affine", [True, False])
def test_nothing_is_fitted_through_a_norm_that_takes_its_statistics_from_the_batch(affine):
    """block1.conv2 is fitted to its own dense output then, which three of its five input channels do not give."""
    net = ToyResNet()
    net.block1.bn2 = nn.BatchNorm2d(6, affine=affine, track_running_stats=False)
    net, trace, state = prepared(net)
    x, keep = images(6), (0, 2, 3)
    after = reconstruct(MergeTask(state, plan_with(trace, {"block1.conv1": keep}), trace, [x], ridge=1e-14))
    nodes = {trace.graph.tensors.get(n.args[1]): n for n in trace.graph.operations if len(n.args) > 1}
    with torch.no_grad():
        inner, target = trace.graph.run(state, x, [(conv := nodes["block1.conv2.weight"]).args[0], conv])
        rows = F.unfold(inner[:, keep], 3, padding=1).transpose(1, 2).reshape(-1, 27)
        solution = np.linalg.lstsq(rows.numpy(), target.movedim(1, -1).reshape(-1, 6).numpy(), rcond=None)[0]
    np.testing.assert_allclose(after["block1.conv2.weight"][:, keep].reshape(6, 27).T, solution, rtol=1e-6, atol=1e-8)


def make_linearly_dependent(state, group, kept, removed):
    """Channel `removed` becomes a copy of `kept`, scaled by 2 before a ReLU: linear in it wherever it is read."""
    for slot in group.slots:
        if slot.role != "consumer" and "running_var" not in slot.tensor:
            tensor = state[slot.tensor].clone()
            scale = 2.0 if slot.tensor.endswith(("bn1.weight", "bn1.bias")) else 1.0
            tensor.select(slot.axis, removed).copy_(scale * tensor.select(slot.axis, kept))
            state[slot.tensor] = tensor
        elif "running_var" in slot.tensor:
            state[slot.tensor] = state[slot.tensor].clone()
            state[slot.tensor][removed] = state[slot.tensor][kept]


def test_exact_where_removed_channels_are_linear_in_kept_ones():
    net, trace, state = prepared(ToyResNet(nn.ReLU))
    groups = {g.name: g for g in trace.groups}
    for bias in ("block1.bn1.bias", "block2.bn1.bias"):
        state[bias] = state[bias] + 1  # no channel is dead
    make_linearly_dependent(state, groups["block1.conv1"], 0, 3)
    make_linearly_dependent(state, groups["block2.conv1"], 1, 2)
    plan = plan_with(trace, {"block1.conv1": (0, 1, 2, 4), "block2.conv1": (0, 1, 3, 4, 5, 6)})
    x = images(6)
    with torch.no_grad():
        (dense,) = trace.graph.run(state, x)
        small = apply_plan(net, plan, trace, reconstruct(MergeTask(state, plan, trace, [x], ridge=1e-13)))
        assert relative_error(small(x), dense) < 1e-7
        plain = apply_plan(net, plan, trace, state)
        assert relative_error(plain(x), dense) > 1e-4


@pytest.mark.parametrize("name", first_by_default(["cifar_resnet20", "mobilenetv2_100", "regnety_002"]))
def test_reconstruction_brings_every_kind_of_network_nearer_to_the_dense_one(name):
    """Depthwise, grouped and gated layers included: logits of images that the fits never saw."""
    torch.manual_seed(0)
    net, x, unseen = timm.create_model(name), images(48, 64, seed=1).float(), images(16, 64, seed=2).float()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)  # no branch is silent
            module.momentum = None
    with torch.no_grad():
        net.train()(x)  # running statistics of real activations, as after training
        net.eval()
        trace = trace_network(net, (3, 64, 64))
        state = {key: tensor.detach() for key, tensor in named_tensors(net).items()}
        plan = random_plan(net, trace, seed=3, share=0.75, scope="interior")
        fitted = apply_plan(net, plan, trace, reconstruct(MergeTask(state, plan, trace, x.split(8))))
        masked, dense = apply_plan(net, plan, trace), net(unseen)
        errors = [float((small(unseen) - dense).norm() / (dense - dense.mean(0)).norm()) for small in (fitted, masked)]
    assert errors[0] < 0.95 * errors[1], errors


@pytest.mark.parametrize("net", [ToyResNet(), Chain(), Chain(groups=2)], ids=["residual", "flatten", "grouped"])
def test_recomputing_activations_gives_the_same_weights_as_holding_them(net, monkeypatch):
    net, trace, state = prepared(net)
    keep = {
        g.name: tuple(range(g.size // 2))
        for g in trace.groups
        if not g.frozen and g.name not in ("stem", "block2.conv2")
    }
    plan, batches = plan_with(trace, keep), [images(4), images(3, seed=1)]
    held = reconstruct(MergeTask(state, plan, trace, batches))
    monkeypatch.setattr(reconstruction, "ACTIVATION_BYTES", 0)
    again = reconstruct(MergeTask(state, plan, trace, batches))
    for name in state:
        torch.testing.assert_close(held[name], again[name], rtol=1e-12, atol=1e-12)


def test_rows_are_sampled_within_their_bound_and_from_the_seed(monkeypatch):
    _, trace, state = prepared(ToyResNet())
    plan, batches = plan_with(trace, {"block1.conv1": (0, 1)}), [images(20), images(20, seed=1)]
    seen = []
    add = NormalEquations.add
    monkeypatch.setattr(
        NormalEquations,
        "add",
        lambda self, rows, errors, **kw: seen.append(rows.shape[1]) or add(self, rows, errors, **kw),
    )
    monkeypatch.setattr(reconstruction, "MIN_ROWS", 100)
    monkeypatch.setattr(reconstruction, "ROWS_PER_UNKNOWN", 10)
    a, b, c = (reconstruct(MergeTask(state, plan, trace, batches, seed=seed)) for seed in (0, 0, 1))
    assert max(seen) < 20 * 64
    assert all(torch.equal(a[name], b[name]) for name in state)
    assert not torch.equal(a["block1.conv2.weight"], c["block1.conv2.weight"])


def test_an_emptied_branch_leaves_the_mean_of_what_it_added():
    net, trace, state = prepared(ToyResNet())
    plan, x = plan_with(trace, {"block1.conv1": ()}, ("block1",)), images(8)
    with torch.no_grad():
        small = apply_plan(net, plan, trace, reconstruct(MergeTask(state, plan, trace, [x])))
        stem = net.act(net.bn(net.stem(x)))
        branch = net.block1.bn2(net.block1.conv2(net.block1.act1(net.block1.bn1(net.block1.conv1(stem)))))
    torch.testing.assert_close(small.block1.constant, branch.mean((0, 2, 3)), rtol=1e-6, atol=1e-8)
