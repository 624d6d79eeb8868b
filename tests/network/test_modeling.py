"""Truths of the readers: resizing is exact, shortcuts equal dense blocks, and every reader gives the same logits."""

import copy
import json

import pytest
import timm
import torch
from support.tensors import aligned
from support.tiers import first_by_default
from timm.layers import SpaceToDepth
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_camphive.network.modeling.layers import Shortcut
from hf_camphive.network.modeling.modeling_camphive import CampHiVeForImageClassification
from hf_camphive.network.modeling.resizing import input_channels, resize, shortcuts_of, widths_of

ZOO = [
    *("resnet18", "resnet50", "seresnet50", "resnext50_32x4d", "densenet121", "cifar_resnet56"),
    *("mobilenetv2_100", "mobilenetv3_large_100", "efficientnet_b0", "tf_efficientnet_b0"),
]
BLOCK = ["conv1:0", "bn1:0", "conv2:1"]
INVERTED = ["conv_pw:0", "bn1:0", "conv_dw:0", "bn2:0", "conv_pwl:1"]
SQUEEZED = [*INVERTED, "se.conv_reduce:1", "se.conv_expand:0"]
# (network, block, layer:axis that carry one group of channels). Consumers are those with axis 1.
GROUPS = [
    ("resnet18", "layer1.0", BLOCK),
    ("resnet50", "layer2.1", BLOCK),
    ("seresnet50", "layer2.1", BLOCK),
    ("seresnet50", "layer1.1.se", ["fc1:0", "fc2:1"]),
    ("mobilenetv2_100", "blocks.2.1", INVERTED),
    ("mobilenetv3_large_100", "blocks.2.1", SQUEEZED),
    ("efficientnet_b0", "blocks.2.1", SQUEEZED),
    ("tf_efficientnet_b0", "blocks.3.0", SQUEEZED),
    ("cifar_resnet56", "layer2.0", BLOCK),
]


def build(name: str, seed: int = 0, **kwargs) -> nn.Module:
    """A timm network whose BatchNorm says something: random affine parameters and statistics."""
    torch.manual_seed(seed)
    net = timm.create_model(name, **kwargs).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_var, 0.5)):
                nn.init.uniform_(tensor, low, low + 1)
            nn.init.normal_(module.running_mean, std=0.1)
    return net


def image(net: nn.Module, size: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1)).to(next(net.parameters()))


def narrowed(net: nn.Module, slots: list[str], keep: list[int]) -> nn.Module:
    """A copy in which the layers "name:axis" keep only these channels, cut by index and rebuilt by `resize`."""
    widths, state = widths_of(net), net.state_dict()
    for slot in slots:
        name, axis = slot.split(":")
        old, axis = widths[name][int(axis)], int(axis)
        widths[name][axis] = len(keep)
        for key in [key for key in state if key.rsplit(".", 1)[0] == name and state[key].ndim > axis]:
            assert axis == 0 or key.endswith("weight")
            if state[key].shape[axis] == old:
                state[key] = state[key].index_select(axis, torch.tensor(keep))
    cut = copy.deepcopy(net)
    resize(cut, widths, {})
    cut.load_state_dict(state)
    return cut


def masked(net: nn.Module, slots: list[str], keep: list[int]) -> nn.Module:
    """A copy at full width whose consumers read nothing from the other channels."""
    twin = copy.deepcopy(net)
    for name in (slot.removesuffix(":1") for slot in slots if slot.endswith(":1")):
        weight = twin.get_submodule(name).weight
        gone = sorted(set(range(weight.shape[1])) - set(keep))
        with torch.no_grad():
            weight[:, gone] = 0
    return twin


@pytest.mark.parametrize("name", first_by_default(ZOO))
def test_resizing_to_its_own_widths_changes_nothing(name):
    net = timm.create_model(name).eval()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    told = copy.deepcopy((net.num_features, net.head_hidden_size, list(net.feature_info)))
    resize(net, widths_of(net), {})
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(net.state_dict()[key], tensor) for key, tensor in before.items())
    assert (net.num_features, net.head_hidden_size, list(net.feature_info)) == told


@pytest.mark.parametrize("name,block,layers", first_by_default(GROUPS))
def test_narrowed_equals_masked(name, block, layers):
    net = build(name, num_classes=10).double()
    slots = [f"{block}.{layer}" for layer in layers]
    size = widths_of(net)[slots[0].split(":")[0]][0]
    keep = sorted(torch.randperm(size, generator=torch.Generator().manual_seed(2))[: size // 3 + 1].tolist())
    cut, mask, x = narrowed(net, slots, keep), masked(net, slots, keep), image(net)
    torch.testing.assert_close(cut(x), mask(x), rtol=0, atol=1e-9)
    assert (cut(x) - net(x)).abs().max() > 1e-3  # the channels mattered
    rebuilt = timm.create_model("camphive", base=name, num_classes=10, widths=widths_of(cut)).double().eval()
    rebuilt.load_state_dict(cut.state_dict())
    assert torch.equal(rebuilt(x), cut(x))
    for key, module in cut.named_modules():
        if isinstance(module, nn.Conv2d):
            twin = rebuilt.get_submodule(key)
            assert (module.in_channels, module.out_channels, module.groups) == (
                twin.in_channels,
                twin.out_channels,
                twin.groups,
            )
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)


def test_narrowed_equals_masked_in_tied_groups_of_resnext():
    """Each of the 32 groups loses the same position, on both sides of the grouped convolution."""
    net = build("resnext50_32x4d", num_classes=10).double()
    out_keep = [4 * g + p for g in range(32) for p in (0, 2, 3)]
    in_keep = [4 * g + p for g in range(32) for p in (1, 3)]
    outer = ["layer1.1.conv2:0", "layer1.1.bn2:0", "layer1.1.conv3:1"]
    cut, mask, x = narrowed(net, outer, out_keep), masked(net, outer, out_keep), image(net)
    torch.testing.assert_close(cut(x), mask(x), rtol=0, atol=1e-9)
    conv = cut.layer1[1].conv2
    assert (conv.groups, conv.out_channels, conv.in_channels) == (32, 96, 128)

    widths, state = widths_of(net), net.state_dict()
    for key in ("conv1", "bn1"):
        widths[f"layer1.1.{key}"][0] = len(in_keep)
    widths["layer1.1.conv2"][1] = 2
    for key in [key for key in state if key.startswith(("layer1.1.conv1", "layer1.1.bn1")) and state[key].ndim]:
        state[key] = state[key][in_keep]
    state["layer1.1.conv2.weight"] = state["layer1.1.conv2.weight"][:, [1, 3]]
    cut = copy.deepcopy(net)
    resize(cut, widths, {})
    cut.load_state_dict(state)
    mask = copy.deepcopy(net)
    with torch.no_grad():
        mask.layer1[1].conv2.weight[:, [0, 2]] = 0
    torch.testing.assert_close(cut(x), mask(x), rtol=0, atol=1e-9)
    assert (cut.layer1[1].conv2.groups, cut.layer1[1].conv2.in_channels) == (32, 64)


def test_grouped_convolution_that_became_depthwise_loses_groups():
    net = timm.create_model("resnext50_32x4d")
    widths = widths_of(net)
    for key, shape in {"conv1": [24, 256, 1, 1], "bn1": [24], "conv2": [24, 1, 3, 3], "bn2": [24]}.items():
        widths[f"layer1.1.{key}"] = shape
    widths["layer1.1.conv3"][1] = 24
    resize(net, widths, {})
    assert net.layer1[1].conv2.groups == net.layer1[1].conv2.in_channels == 24


def test_narrow_stream_tells_its_new_width_and_takes_a_new_head():
    net, keep = timm.create_model("resnet18").eval(), list(range(0, 512, 3))
    stream = ["layer4.0.conv2:0", "layer4.0.bn2:0", "layer4.0.downsample.0:0", "layer4.0.downsample.1:0"]
    stream += ["layer4.1.conv1:1", "layer4.1.conv2:0", "layer4.1.bn2:0", "fc:1"]
    cut = narrowed(net, stream, keep)
    assert cut.num_features == cut.head_hidden_size == cut.feature_info[-1]["num_chs"] == len(keep)
    assert (cut.fc.in_features, cut.fc.out_features) == (len(keep), 1000)
    assert net.feature_info[-1]["num_chs"] == 512
    cut.reset_classifier(4)
    assert cut(image(cut)).shape == (2, 4)


def test_mobilenetv3_tells_both_its_widths():
    net = timm.create_model("mobilenetv3_large_100").eval()
    tail = ["blocks.6.0.conv:0", "blocks.6.0.bn1:0", "conv_head:1"]
    cut = narrowed(net, tail, list(range(100)))
    assert (cut.num_features, cut.head_hidden_size, cut.feature_info[-1]["num_chs"]) == (100, 1280, 100)
    cut = narrowed(net, ["conv_head:0", "classifier:1"], list(range(70)))
    assert (cut.num_features, cut.head_hidden_size) == (960, 70)
    cut.reset_classifier(4)
    assert cut(image(cut)).shape == (2, 4)


def test_resizing_keeps_dtype_device_training_mode_and_frozen_parameters():
    net = timm.create_model("resnet18", device="meta", dtype=torch.bfloat16).train()
    net.layer1[0].conv1.weight.requires_grad_(False)
    widths = widths_of(net) | {"layer1.0.conv1": [5, 64, 3, 3], "layer1.0.bn1": [5], "layer1.0.conv2": [64, 5, 3, 3]}
    resize(net, widths, {})
    conv, norm = net.layer1[0].conv1, net.layer1[0].bn1
    assert conv.weight.is_meta and norm.running_var.is_meta and conv.weight.dtype == torch.bfloat16
    assert not conv.weight.requires_grad and norm.weight.requires_grad and norm.training
    assert norm.num_features == norm.running_mean.numel() == 5


def test_resized_tensors_hold_the_leading_corner():
    net = timm.create_model("resnet18")
    old = net.layer1[0].conv1.weight.detach().clone()
    widths = widths_of(net) | {
        "layer1.0.conv1": [70, 64, 3, 3],
        "layer1.0.bn1": [70],
        "layer1.0.conv2": [64, 70, 3, 3],
    }
    resize(net, widths, {})
    assert torch.equal(net.layer1[0].conv1.weight[:64], old) and not net.layer1[0].conv1.weight[64:].any()


def test_a_network_of_plain_torch_can_be_resized():
    net = nn.Sequential(nn.Conv2d(1, 8, 3, bias=True), nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 4, 1))
    resize(net, {"0": [3, 1, 3, 3], "1": [3], "2": [4, 3, 1, 1]}, {})
    assert net(torch.randn(1, 1, 8, 8)).shape == (1, 4, 6, 6)
    assert net[0].groups == 1 and net[0].bias.shape == (3,) and widths_of(net)["1"] == [3]


@pytest.mark.parametrize(
    "widths,message",
    [
        ({"layer9.conv": [1]}, "no module .layer9"),
        ({"act1": [3]}, "act1 is a ReLU"),
        ({"layer1.0.conv1": [64, 64, 5, 5]}, "layer1.0.conv1: weight shape"),
        ({"layer1.0.conv1": [64, 64]}, "layer1.0.conv1: weight shape"),
        ({"layer1.0.conv1": [5, 64, 3, 3]}, "does not run with these widths"),
        ({"layer1.0.conv2": [97, 4, 3, 3]}, "97 output channels"),
    ],
)
def test_widths_that_do_not_fit_are_refused(widths, message):
    net = timm.create_model("resnext50_32x4d" if "97" in message else "resnet18")
    with pytest.raises(ValueError, match=message):
        resize(net, widths, {})


SHORTCUTS = [
    ("resnet18", "layer1.1", [], ["act2"], "bn2"),
    ("resnet18", "layer2.0", ["downsample"], ["act2"], "bn2"),
    ("resnet50", "layer2.1", [], ["act3"], "bn3"),
    ("mobilenetv2_100", "blocks.2.1", [], [], "bn3"),
    ("cifar_resnet56", "layer2.0", ["downsample"], ["act2"], "bn2"),
]


@pytest.mark.parametrize("name,block,shortcut,after,last", first_by_default(SHORTCUTS))
def test_shortcut_equals_a_block_whose_branch_is_constant(name, block, shortcut, after, last):
    net = build(name, num_classes=10).double()
    norm = net.get_submodule(f"{block}.{last}")
    nn.init.zeros_(norm.weight)
    widths = widths_of(net) | {block: [norm.num_features]}
    kept = {block: {"shortcut": shortcut, "after": after}}
    alive = [f"{block}.{child}" for child in (*shortcut, *after)]
    widths = {
        key: shape
        for key, shape in widths.items()
        if key == block or not key.startswith(block + ".") or any(key.startswith(child) for child in alive)
    }
    cut = copy.deepcopy(net)
    resize(cut, widths, kept)
    with torch.no_grad():
        cut.get_submodule(block).constant.copy_(norm.bias)
    x = image(net)
    torch.testing.assert_close(cut(x), net(x), rtol=0, atol=1e-9)
    assert widths_of(cut) == widths and shortcuts_of(cut) == kept
    assert set(cut.state_dict()) - {f"{block}.constant"} < set(net.state_dict())
    resize(cut, widths_of(cut), shortcuts_of(cut))  # the same again changes nothing
    assert torch.equal(copy.deepcopy(cut)(x), cut(x))
    assert not cut.get_submodule(block).training and cut.train().get_submodule(block).training
    with torch.device("meta"):
        rebuilt = timm.create_model("camphive", base=name, num_classes=10, widths=widths, shortcuts=kept)
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {k: v.shape for k, v in cut.state_dict().items()}


def test_wrapping_leaves_every_module_in_its_mode():
    net = build("resnet18", num_classes=7).train()
    net.layer1[0].bn1.eval()
    modes = {name: module.training for name, module in net.named_modules()}
    model = CampHiVeForImageClassification.from_timm(net, "resnet18", {"num_classes": 7})
    assert {name: module.training for name, module in model.timm_model.named_modules()} == modes and model.training


def test_shortcut_trains_its_constant():
    block = timm.create_model("resnet18").layer1[1]
    shortcut = Shortcut(block, (), ("act2",), 64)
    shortcut(torch.randn(2, 64, 4, 4)).sum().backward()
    assert shortcut.constant.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "kept,message",
    [
        ({"layer1.1": {"shortcut": ["downsampel"], "after": []}}, "downsampel"),
        ({"layer1.2": {"shortcut": [], "after": []}}, "layer1.2"),
        ({"layer1.0": {"shortcut": [], "after": ["act2"]}}, "do not say how many"),
    ],
)
def test_shortcuts_that_do_not_fit_are_refused(kept, message):
    with pytest.raises(ValueError, match=message):
        resize(timm.create_model("resnet18"), {"layer1.1": [64]}, kept)


def test_a_shortcut_that_kept_other_children_is_refused():
    net = timm.create_model("resnet18")
    resize(net, {"layer1.1": [64]}, {"layer1.1": {"shortcut": [], "after": ["act2"]}})
    with pytest.raises(ValueError, match="already a shortcut"):
        resize(net, {}, {"layer1.1": {"shortcut": [], "after": []}})


@pytest.fixture(scope="module")
def pruned() -> nn.Module:
    """A ResNet-18 with seven classes, a narrow block and a shortcut, normalised unlike its base."""
    net = build("resnet18", num_classes=7)
    net = narrowed(net, [f"layer1.0.{layer}" for layer in BLOCK], list(range(0, 64, 3)))
    widths = {key: shape for key, shape in widths_of(net).items() if not key.startswith("layer3.1.")}
    resize(net, widths | {"layer3.1": [256]}, {"layer3.1": {"shortcut": [], "after": ["act2"]}})
    nn.init.normal_(net.layer3[1].constant)
    net.pretrained_cfg = {**net.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "label_offset": 1}
    return net


@pytest.fixture(scope="module")
def folder(pruned, tmp_path_factory):
    labels = {"id2label": dict(enumerate("abcdefg"))}
    model = CampHiVeForImageClassification.from_timm(pruned, "resnet18", {"num_classes": 7}, **labels)
    assert model.timm_model is pruned and not model.training
    path = tmp_path_factory.mktemp("saved")
    model.save_pretrained(path)
    return path


def test_transformers_and_timm_read_the_same_folder(pruned, folder):
    x = image(pruned)
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert type(model) is CampHiVeForImageClassification
    assert torch.equal(aligned(model)(x).logits, pruned(x))
    assert [model.config.id2label[i] for i in range(7)] == list("abcdefg")
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(aligned(net)(x), pruned(x))
    for loaded in (net, model.timm_model):
        assert tuple(loaded.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)
        assert loaded.pretrained_cfg["architecture"] == "camphive"
    assert not {"hf_hub_id", "url", "file"} & model.timm_model.pretrained_cfg.keys()
    processor = AutoImageProcessor.from_pretrained(folder)
    assert tuple(processor.data_config["mean"]) == (0.1, 0.2, 0.3)


def test_the_folder_holds_the_code_and_no_pickle(folder):
    assert {path.name for path in folder.iterdir()} == {
        "cifar.py",
        "config.json",
        "layers.py",
        "model.safetensors",
        "modeling_camphive.py",
        "resizing.py",
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoConfig"] == "modeling_camphive.CampHiVeTimmConfig"
    assert set(config["model_args"]) == {"base", "widths", "shortcuts"}
    assert config["num_classes"] == 7 and "label_offset" not in config["pretrained_cfg"]


def test_saving_what_was_loaded_writes_the_same_files(folder, tmp_path):
    AutoModelForImageClassification.from_pretrained(folder).save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_timm_can_save_what_it_loaded(pruned, folder, tmp_path):
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    timm.models.save_for_hf(net, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(aligned(again)(image(pruned)), pruned(image(pruned)))


def test_timm_takes_another_number_of_classes_or_channels(pruned, folder):
    source, x = f"local-dir:{folder}", image(pruned)
    assert timm.create_model(source, pretrained=True, num_classes=3).eval()(x).shape == (2, 3)
    headless = timm.create_model(source, pretrained=True, num_classes=0).eval()
    torch.testing.assert_close(pruned.fc(headless(x)), pruned(x))
    grey = timm.create_model(source, pretrained=True, in_chans=1).eval()
    one = image(pruned, channels=1)
    torch.testing.assert_close(grey(one), pruned(one.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


def test_transformers_takes_another_number_of_classes_and_a_dtype(folder):
    model = AutoModelForImageClassification.from_pretrained(
        folder, num_labels=5, ignore_mismatched_sizes=True, dtype=torch.bfloat16
    )
    out = model(torch.randn(2, 3, 64, 64), labels=torch.tensor([0, 4]))
    assert out.logits.shape == (2, 5) and out.logits.dtype == torch.bfloat16 and out.loss.isfinite()


def test_a_network_of_one_input_channel_is_saved_as_such(tmp_path):
    net = build("digits_resnet", in_chans=1)
    CampHiVeForImageClassification.from_timm(net, "digits_resnet", {"in_chans": 1}).save_pretrained(tmp_path)
    x = image(net, size=16, channels=1)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(aligned(model)(x).logits, net(x))
    assert torch.equal(aligned(timm.create_model(f"local-dir:{tmp_path}", pretrained=True))(x), net(x))
    assert model.config.pretrained_cfg["input_size"] == [1, 16, 16]


def test_features_only_says_what_to_do_instead():
    with pytest.raises(ValueError, match="forward_intermediates"):
        timm.create_model("camphive", base="resnet18", features_only=True)


def test_intermediate_features_are_those_of_the_pruned_network(pruned):
    features = pruned.forward_intermediates(image(pruned), intermediates_only=True)
    assert [f.shape[1] for f in features] == [info["num_chs"] for info in pruned.feature_info]


def test_images_have_the_channels_that_a_space_to_depth_stem_folds():
    net = nn.Sequential(SpaceToDepth(), nn.Conv2d(48, 4, 3))
    net.pretrained_cfg = {"first_conv": "1", "input_size": (3, 64, 64)}
    assert input_channels(net) == 3
    net[0] = nn.Identity()
    assert input_channels(net) == 48
