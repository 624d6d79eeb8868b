"""The small-image networks compute what the papers and the public checkpoints say."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.tiers import first_by_default
from timm.models import load_pretrained
from torch import Tensor

import hf_camphive
from hf_camphive.network.modeling import cifar

WEIGHTS = Path(__file__).resolve().parents[2] / "../shared/data/weights"


def reference_logits(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """He et al. 2015, section 4.2, in functions only; `state` has the names of the public checkpoints."""

    def norm(x, name):
        moments = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, *moments, state[f"{name}.weight"], state[f"{name}.bias"])

    x = F.relu(norm(F.conv2d(images, state["conv1.weight"], padding=1), "bn1"))
    for stage in (1, 2, 3):
        for i in range(200):
            block = f"layer{stage}.{i}"
            if f"{block}.conv1.weight" not in state:
                break
            stride = 2 if stage > 1 and i == 0 else 1
            shortcut = x
            if stride == 2:
                added = x.shape[1] // 2
                shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, added, added))
            x = F.relu(norm(F.conv2d(x, state[f"{block}.conv1.weight"], stride=stride, padding=1), f"{block}.bn1"))
            x = norm(F.conv2d(x, state[f"{block}.conv2.weight"], padding=1), f"{block}.bn2")
            x = F.relu(x + shortcut)
    return F.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])


def random_public_state(depth: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random tensors under the names and shapes of the public checkpoint of that depth."""
    state = {}
    for name, tensor in timm.create_model(f"cifar_resnet{depth}").state_dict().items():
        if "downsample" in name or name.endswith("num_batches_tracked"):
            continue
        values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            values = values.abs() + 0.5
        elif tensor.ndim == 4:
            values /= tensor[0].numel() ** 0.5
        state[name.replace("fc.", "linear.")] = values
    return state


def load(net, state):
    return net.load_state_dict(cifar.checkpoint_filter(state, net), strict=True)


@pytest.mark.parametrize("depth", first_by_default([20, 56]))
def test_logits_equal_an_independent_reference_on_random_weights(depth):
    generator = torch.Generator().manual_seed(depth)
    state = random_public_state(depth, generator)
    net = timm.create_model(f"cifar_resnet{depth}").double().eval()
    load(net, {f"module.{name}": tensor for name, tensor in state.items()})
    images = torch.randn(3, 3, 32, 32, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(net(images), reference_logits(state, images), rtol=1e-10, atol=1e-10)


@pytest.mark.realdata
@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="the public CIFAR weights are not beside the project")
@pytest.mark.parametrize("depth", first_by_default([20, 32, 56]))
def test_public_checkpoints_load_exactly_and_equal_the_reference(depth):
    file = WEIGHTS / f"cifar10_resnet{depth}.safetensors"
    state = load_file(file)
    net = timm.create_model(f"cifar_resnet{depth}").eval()
    load_pretrained(net, {**net.pretrained_cfg, "file": str(file)}, 10, 3, cifar.checkpoint_filter)
    for name, tensor in state.items():
        assert torch.equal(net.state_dict()[name.replace("linear.", "fc.")], tensor)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(net(images), reference_logits(state, images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "parameters"),
    # Published counts of the ResNets (they have no shortcut parameters); He et al., table 6, in millions.
    [
        ("cifar_resnet20", 269_722),
        ("cifar_resnet32", 464_154),
        ("cifar_resnet44", 658_586),
        ("cifar_resnet56", 853_018),
        ("cifar_resnet110", 1_727_962),
        ("cifar_resnet18", 11_173_962),
        ("cifar_mobilenetv2", 2_236_682),
    ],
)
def test_parameter_counts_are_the_published_ones(name, parameters):
    net = timm.create_model(name, device="meta")
    embeddings = sum(p.numel() for n, p in net.named_parameters() if len(p.shape) == 4 and is_embedding(net, n))
    assert sum(p.numel() for p in net.parameters()) - embeddings == parameters


def is_embedding(net, name):
    return name.endswith("downsample.0.weight") and len(net.get_submodule(name.removesuffix(".0.weight"))) == 1


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("cifar_resnet20", (64, 8, 8)),
        ("cifar_resnet18", (512, 4, 4)),
        ("cifar_mobilenetv2", (1280, 4, 4)),
        ("digits_resnet", (64, 4, 4)),
        ("digits_wide_resnet", (128, 8, 8)),
    ],
)
def test_resolution_is_kept_as_the_papers_keep_it(name, features):
    net = timm.create_model(name).eval()
    images = torch.zeros(1, *net.pretrained_cfg["input_size"])
    with torch.no_grad():
        assert net.forward_features(images).shape[1:] == features
        assert net(images).shape == (1, net.pretrained_cfg["num_classes"])
    last = net.feature_info[-1]
    assert last["reduction"] * features[-1] == images.shape[-1]


def test_names_are_those_of_timm_and_the_shortcut_is_an_ordinary_convolution():
    net = timm.create_model("cifar_resnet20", in_chans=1, num_classes=7)
    names = set(net.state_dict())
    assert {"conv1.weight", "bn1.weight", "layer2.0.downsample.0.weight", "layer3.2.conv2.weight", "fc.bias"} <= names
    assert not any("downsample.1" in name or "layer4" in name for name in names)
    assert net.conv1.weight.shape == (16, 1, 3, 3) and net.fc.weight.shape == (7, 64)
    conv = net.layer2[0].downsample[0]
    assert conv.bias is None and conv.weight.requires_grad and conv.stride == (2, 2)
    images = torch.randn(2, 16, 6, 6)
    assert torch.equal(conv(images), F.pad(images[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8)))


@pytest.mark.parametrize(("name", "most"), [("digits_resnet", 2e6), ("digits_wide_resnet", 4e6)])
def test_small_enough_to_be_bundled(name, most):
    folder = Path(hf_camphive.__file__).parent / "assets" / name
    assert sum(path.stat().st_size for path in folder.iterdir()) < most


def test_building_on_the_meta_device_touches_no_values():
    with torch.device("meta"):
        assert all(p.is_meta for p in timm.create_model("cifar_resnet20").parameters())


def test_gradient_checkpointing_reaches_three_stages():
    net = timm.create_model("cifar_resnet20")
    net.set_grad_checkpointing()
    net(torch.zeros(1, 3, 32, 32)).sum().backward()
    assert net.conv1.weight.grad is not None


def test_a_second_copy_of_the_file_registers_nothing(recwarn):
    # Saved folders ship a copy of cifar.py as remote code, beside the installed package.
    source = Path(cifar.__file__).read_text()
    before = timm.models.model_entrypoint("cifar_resnet20")
    exec(compile(source, "copy_of_cifar.py", "exec"), {"__name__": "copy_of_cifar"})
    assert timm.models.model_entrypoint("cifar_resnet20") is before
    assert not [w for w in recwarn if "Overwriting" in str(w.message)]
