"""Base networks load from everywhere they may come from, and everything else is refused with the remedy."""

import hashlib
import json
import os
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from support.tiers import first_by_default

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import ModelError
from hf_camphive.core.plan import ChannelCut, ChannelGroup, PrunePlan, Slot, plans_to_json
from hf_camphive.hub import loading as models
from hf_camphive.network.footprint import count_macs, count_parameters
from hf_camphive.network.modeling.modeling_camphive import CampHiVeForImageClassification
from hf_camphive.network.modeling.resizing import resize, widths_of
from hf_camphive.training.data.loaders import DataOptions, load_loaders

WEIGHTS = Path(__file__).resolve().parents[2] / "../shared/data/weights"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty Hub cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    return folder


def fill_cache(cache_dir, repo, files, revision="main"):
    """Files of a repository as huggingface_hub lays them out; returns the commit."""
    commit = hashlib.sha1(
        repr(sorted((k, hashlib.sha256(v).hexdigest()) for k, v in files.items())).encode()
    ).hexdigest()
    root = Path(cache_dir, "models--" + repo.replace("/", "--"))
    for name, content in files.items():
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = root / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    ref = root / "refs" / revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit)
    return commit


def settled(net, seed=0):
    """The same network with random values everywhere, BatchNorm statistics too, so that nothing is trivially equal."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.1 + 0.05)
    return net.eval()


def timm_folder(folder, net, **config):
    """A folder as timm's save_for_hf writes it."""
    timm.models.save_for_hf(net, folder, model_config=config or None, safe_serialization=True)
    return folder


def read(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def edit(folder, **changes):
    file = Path(folder, "config.json")
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def logits(net):
    images = torch.rand(2, *net.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return net(images)


@pytest.fixture(scope="module")
def resnet18():
    return settled(timm.create_model("resnet18"))


@pytest.fixture
def small(tmp_path):
    """A saved CIFAR network, and the network."""
    net = settled(timm.create_model("cifar_resnet20"))
    return timm_folder(tmp_path / "small", net), net


def test_a_hub_id_loads_from_the_cache_with_its_commit(cache, tmp_path, resnet18):
    files = read(timm_folder(tmp_path / "r", resnet18))
    config = json.loads(files["config.json"])
    config.pop("model_args", None)
    config["pretrained_cfg"] = {**config["pretrained_cfg"], "tag": "a1_in1k"}
    config["pretrained_cfg"].pop("license", None)
    files["config.json"] = json.dumps(config).encode()
    commit = fill_cache(cache, "timm/resnet18.a1_in1k", files)
    fill_cache(cache, "timm/resnet18.a1_in1k", files | {"note": b""}, revision="v1")
    for name in ("timm/resnet18.a1_in1k", "hf-hub:timm/resnet18.a1_in1k", "resnet18.a1_in1k", "resnet18"):
        base = models.load_base(name)
        assert torch.equal(logits(base.net), logits(resnet18))
        assert (base.model_id, base.revision, base.architecture) == ("timm/resnet18.a1_in1k", commit, "resnet18")
    assert base.license == "apache-2.0" and base.model_args == {} and base.plans == () and base.pretrained
    assert base.label_names[0].startswith("tench") and len(base.label_names) == 1000
    assert not base.net.training and next(base.net.parameters()).dtype == torch.float32
    assert str(tmp_path) not in str(base.net.pretrained_cfg)
    other = models.load_base("timm/resnet18.a1_in1k@v1")
    assert other.model_id == "timm/resnet18.a1_in1k" and other.revision not in (commit, None)
    assert models.load_base(f"timm/resnet18.a1_in1k@{commit}").revision == commit


def test_a_folder_in_timms_layout_loads_with_its_arguments(tmp_path):
    net = settled(timm.create_model("cifar_resnet20", in_chans=1, num_classes=7))
    names = list("abcdefg")
    args = {"in_chans": 1, "num_classes": 7}
    folder = timm_folder(tmp_path / "m", net, label_names=names, model_args=args)
    Path(folder, "README.md").write_text("---\nlicense: mit\n---\nA card.\n")
    assert json.loads(Path(folder, "config.json").read_text())["model_args"]["num_classes"] == 7
    base = models.load_base(str(folder))
    assert all(torch.equal(tensor, base.net.state_dict()[name]) for name, tensor in net.state_dict().items())
    assert (base.architecture, base.model_args, base.model_id) == (
        "cifar_resnet20",
        {"in_chans": 1, "global_pool": "avg"},
        str(folder),
    )
    assert (base.revision, base.license, base.label_names) == (None, "mit", tuple(names))
    dense = timm.create_model(base.architecture, num_classes=7, **base.model_args)
    dense.load_state_dict(base.net.state_dict())


def test_half_precision_weights_become_fp32(small):
    folder, net = small
    state = {name: t.half() if t.is_floating_point() else t for name, t in net.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    assert {p.dtype for p in models.load_base(str(folder)).net.parameters()} == {torch.float32}


def pruned_folder(folder, net, base="cifar_resnet20", **config):
    """A folder with the network's first block narrowed to 5 channels, saved as this package saves it."""
    widths = {"layer1.0.conv1": [5, 16, 3, 3], "layer1.0.bn1": [5], "layer1.0.conv2": [16, 5, 3, 3]}
    resize(net, widths, {})
    settled(net, 3)
    model = CampHiVeForImageClassification.from_timm(net, base, {}, **config)
    model.save_pretrained(folder)
    slots = (Slot("layer1.0.conv1.weight", 0, "producer", tuple(range(16))),)
    group = ChannelGroup("layer1.0.conv1", 16, slots)
    cut = ChannelCut("layer1.0.conv1", (0, 1, 2, 3, 4))
    plans = (PrunePlan((group,), (), (cut,), (), "magnitude", "none", 100, 50),)
    Path(folder, "prune_plan.json").write_text(plans_to_json(plans))
    return plans


@pytest.mark.parametrize("source", ["folder", "hub"])
def test_a_network_pruned_before_loads_narrow_with_its_plans(source, cache, tmp_path):
    net = timm.create_model("cifar_resnet20", num_classes=4)
    plans = pruned_folder(tmp_path / "p", net, id2label=dict(enumerate("abcd")))
    name = str(tmp_path / "p")
    if source == "hub":
        name, commit = "someone/pruned", fill_cache(cache, "someone/pruned", read(tmp_path / "p"))
    base = models.load_base(name)
    assert widths_of(base.net) == widths_of(net) and base.net.layer1[0].conv1.out_channels == 5
    assert torch.equal(logits(base.net), logits(net))
    assert (base.architecture, base.model_args, base.model_id) == ("cifar_resnet20", {}, name)
    assert base.plans == plans and base.label_names == tuple("abcd")
    assert base.revision == (commit if source == "hub" else None)
    assert models.replace_head(base, ["x", "y"], 0).net.fc.weight.shape == (2, 64)


def test_label_names_that_say_nothing_are_left_out(tmp_path):
    pruned_folder(tmp_path / "p", timm.create_model("cifar_resnet20", num_classes=4))
    assert models.load_base(str(tmp_path / "p")).label_names is None


def test_a_checkpoint_of_a_timm_network_brings_its_number_of_classes(tmp_path):
    net = settled(timm.create_model("resnet18", num_classes=10))
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    base = models.load_base("resnet18", str(tmp_path / "w.safetensors"))
    assert torch.equal(logits(base.net), logits(net))
    assert (base.architecture, base.model_id, base.license, base.label_names) == ("resnet18", "resnet18", None, None)
    assert base.net.pretrained_cfg["num_classes"] == 10 and str(tmp_path) not in str(base.net.pretrained_cfg)


def test_a_public_cifar_checkpoint_loads_under_its_own_names(tmp_path):
    net = settled(timm.create_model("cifar_resnet20", num_classes=100))
    state = {
        name.replace("fc.", "linear."): tensor
        for name, tensor in net.state_dict().items()
        if "downsample" not in name and "num_batches" not in name
    }
    save_file(state, tmp_path / "w.safetensors")
    base = models.load_base("cifar_resnet20", str(tmp_path / "w.safetensors"))
    assert torch.equal(base.net.fc.weight, net.fc.weight) and base.net.num_classes == 100


@pytest.mark.realdata
@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="public weights are not beside the project")
@pytest.mark.parametrize(
    ("name", "file", "classes"),
    [
        ("cifar_resnet56", "cifar10_resnet56", 10),
        ("mobilenetv2_100", "imagenet_mobilenetv2_100", 1000),
        ("resnet18", "imagenette_resnet18", 10),
    ],
)
def test_real_checkpoints(name, file, classes):
    base = models.load_base(name, str(WEIGHTS / f"{file}.safetensors"))
    assert base.net.num_classes == classes
    state = load_file(WEIGHTS / f"{file}.safetensors")
    assert torch.equal(
        base.net.state_dict()["conv_stem.weight" if "mobile" in name else "conv1.weight"],
        next(t.float() for n, t in state.items() if n in ("conv1.weight", "conv_stem.weight")),
    )


@pytest.mark.parametrize("name", models.BUNDLED)
def test_a_bundled_network_is_there_and_its_card_true(name):
    base = models.load_base(name)
    assert (base.model_id, base.architecture, base.license) == (name, name, "apache-2.0")
    assert base.label_names == tuple("0123456789")
    size = tuple(base.net.pretrained_cfg["input_size"])
    card = (Path(__file__).parents[2] / "model_cards" / f"{name}.md").read_text(encoding="utf-8")
    assert f"resized to\n{size[1]}x{size[2]} and" in card and f"`python scripts/train_digits.py {name}`" in card
    assert f"| parameters | {count_parameters(base.net):,} |" in card
    assert f"(1 MAC = 2 FLOPs) | {count_macs(base.net, size):,} |" in card
    loaders = load_loaders("digits", base.net, CampHiVeConfig(), DataOptions(workers=0))
    for split, loader in (("validation", loaders.validation), ("test", loaders.test)):
        with torch.no_grad():
            right = sum((base.net(b["pixel_values"]).argmax(1) == b["labels"]).sum() for b in loader)
        assert f"| top-1, {split} (300 images) | {right / 300:.2%} |" in card


@pytest.mark.parametrize(
    "name", first_by_default(["mobilenetv3_small_050", "resnet18", "mobilenetv2_100", "convnext_atto"])
)
def test_a_new_head_is_drawn_from_the_seed_and_the_old_network_is_left_alone(name):
    net = timm.create_model(name, num_classes=6).eval()
    base = models.BaseModel(net, name, {}, name, None, None, None)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    state = torch.get_rng_state()
    one, same, other = (models.replace_head(base, ["x", "y", "z"], seed).net for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    weight = f"{net.pretrained_cfg['classifier']}.weight"
    assert one.state_dict()[weight].shape[0] == 3
    assert torch.equal(one.state_dict()[weight], same.state_dict()[weight])
    assert not torch.equal(one.state_dict()[weight], other.state_dict()[weight])
    assert one.state_dict()[weight].std() > 0 and not one.training
    assert one.num_classes == one.pretrained_cfg["num_classes"] == 3
    assert net.num_classes == net.pretrained_cfg["num_classes"] or net.pretrained_cfg["num_classes"] == 1000
    for key, tensor in before.items():
        assert torch.equal(net.state_dict()[key], tensor)
        if not key.startswith(net.pretrained_cfg["classifier"]):
            assert torch.equal(one.state_dict()[key], tensor)
    assert models.replace_head(base, ["x", "y"], 0).label_names == ("x", "y")


# ---- what is refused ----


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "no model is named"),
        (
            "timm/resnet81.a1_in1k",
            r"neither in the cache nor can it be downloaded.*did you mean 'timm/resnet18.a1_in1k",
        ),
        ("timm/resnet18.a1_in1k@v9", "'timm/resnet18.a1_in1k@v9' is neither in the cache"),
        ("a/b/c", "Repo id must be in the form"),
        ("resnet-18", "did you mean 'resnet18"),
        ("resnet18.nonsense", "nor a timm network"),
        ("resnet18", "'timm/resnet18.a1_in1k' is neither in the cache"),
        ("cifar_resnet56", "architecture without published weights.*--checkpoint"),
        ("./outputs/model", "there is no folder './outputs/model'"),
        ("~/model", "there is no folder"),
    ],
)
def test_names_that_lead_nowhere(name, message):
    with pytest.raises(ModelError, match=message):
        models.load_base(name)


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"is a file.*--checkpoint"):
        models.load_base(str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("source", ["folder", "hub"])
@pytest.mark.parametrize("left", [0.5, 40, 4, 0])
def test_an_interrupted_download(left, source, small, cache):
    folder, _ = small
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(left * len(content)) if left == 0.5 else left])
    name = str(folder)
    if source == "hub":
        name = "someone/net"
        fill_cache(cache, name, read(folder))
    with pytest.raises(ModelError, match=r"damaged, perhaps by an interrupted download.*get it again"):
        models.load_base(name)
    with pytest.raises(ModelError, match="damaged"):
        models.load_base("cifar_resnet20", str(file))


def test_a_git_lfs_pointer(small):
    folder, _ = small
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(ModelError, match="git lfs pull"):
        models.load_base(str(folder))


@pytest.mark.parametrize("source", ["folder", "hub"])
def test_pickles_are_refused(source, small, cache):
    folder, net = small
    (folder / "model.safetensors").unlink()
    torch.save(net.state_dict(), folder / "pytorch_model.bin")
    name = str(folder)
    if source == "hub":
        name = "someone/net"
        fill_cache(cache, name, read(folder))
    with pytest.raises(ModelError, match=r"pickle pytorch_model.bin, which can run any code"):
        models.load_base(name)
    with pytest.raises(ModelError, match=r"pickle w\.pth"):
        models.load_base("cifar_resnet20", str(folder / "w.pth"))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
        models.load_base(str(folder))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no config.json"),
        ('{"architecture": "cifar_res', "config.json of .* is damaged"),
        ("[1, 2]", "holds no settings"),
        ('{"model_type": "bert", "architectures": ["BertModel"]}', "of type 'bert', not a timm image classifier"),
        ('{"architectures": ["ResNetForImageClassification"]}', "of type 'ResNetForImageClassification'"),
        ('{"architecture": "cifar_resnet2O"}', r"does not know; update timm.*did you mean .*cifar_resnet20"),
        ('{"model_type": "camphive_timm", "architecture": "camphive"}', "architecture None, which timm"),
        ('{"architecture": ["x"]}', "does not know"),
    ],
)
def test_configs_that_are_foreign_or_damaged(text, message, small):
    folder, _ = small
    file = folder / "config.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(ModelError, match=message):
        models.load_base(str(folder))


def test_weights_that_do_not_fit(small):
    folder, net = small
    edit(folder, architecture="cifar_resnet56")
    with pytest.raises(ModelError, match=r"do not fit its config.json .*Missing key"):
        models.load_base(str(folder))
    edit(folder, architecture="cifar_resnet20", model_args={"wings": 2})
    with pytest.raises(ModelError, match=r"model_args .*wings"):
        models.load_base(str(folder))
    edit(folder, model_args=None)
    state = net.state_dict()
    del state["layer2.0.bn1.weight"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"layer2\.0\.bn1\.weight"):
        models.load_base(str(folder))


def test_a_config_without_num_classes_must_not_leave_the_classifier_untrained(small):
    folder, _ = small
    config = json.loads((folder / "config.json").read_text())
    pretrained_cfg = {k: v for k, v in config["pretrained_cfg"].items() if k != "num_classes"}
    edit(folder, num_classes=None, pretrained_cfg=pretrained_cfg)
    with pytest.raises(ModelError, match="does not say num_classes"):
        models.load_base(str(folder))


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("cifar_resnet2O", "w.safetensors", r"name of a timm network.*did you mean .*cifar_resnet20"),
        ("cifar_resnet20", "none.safetensors", "there is no checkpoint"),
        ("cifar_resnet56", "w.safetensors", r"does not fit 'cifar_resnet56' .*name the network that it comes from"),
    ],
)
def test_checkpoints_that_cannot_be(name, file, message, small):
    folder, _ = small
    (folder / "model.safetensors").rename(folder / "w.safetensors")
    with pytest.raises(ModelError, match=message):
        models.load_base(name, str(folder / file))


def test_a_damaged_plan_is_no_model(tmp_path):
    pruned_folder(tmp_path / "p", timm.create_model("cifar_resnet20"))
    (tmp_path / "p" / "prune_plan.json").write_text("{")
    with pytest.raises(ModelError, match=r"prune_plan\.json of .* is missing or damaged"):
        models.load_base(str(tmp_path / "p"))
