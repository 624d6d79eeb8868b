"""A model folder from a stranger runs no code: its config.json may say how a network is built, and nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.hostile import Payload, edit, load_any_pickle, plant
from transformers import AutoModelForImageClassification

from hf_camphive.core.errors import ModelError
from hf_camphive.core.plan import PLAN_FILE, plans_to_json
from hf_camphive.hub import loading
from hf_camphive.hub.loading import load_base
from hf_camphive.network.modeling.modeling_camphive import CampHiVeForImageClassification

READERS = {
    "hf_camphive": loading.from_pretrained,
    "transformers": AutoModelForImageClassification.from_pretrained,
    "timm": lambda folder: timm.create_model(f"local-dir:{folder}", pretrained=True),
    "a base to prune": lambda folder: load_base(str(folder)),
}
OURS = [name for name in READERS if name != "timm"]  # timm hands over the arguments of a config, not the config


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Path:
    """The file that a payload writes, under a timm that opens any checkpoint as a pickle (as 1.0.25 and before do)."""
    monkeypatch.setattr(timm.models._factory, "load_checkpoint", load_any_pickle)
    return tmp_path / "marker"


def save(folder: Path, **args: Any) -> Path:
    """A folder as this package saves it, of a network with these arguments."""
    net = timm.create_model("cifar_resnet20", **args)
    CampHiVeForImageClassification.from_timm(net, "cifar_resnet20", args).save_pretrained(folder)
    (folder / PLAN_FILE).write_text(plans_to_json(()))
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of such a folder, to be changed."""
    return shutil.copytree(saved, tmp_path / "saved")


@pytest.fixture
def dense(tmp_path) -> Path:
    """A folder as timm saves it."""
    args = {"act_layer": "silu", "in_chans": 1}
    net = timm.create_model("cifar_resnet20", **args)
    timm.models.save_for_hf(net, tmp_path / "dense", model_args=args, safe_serialization=True)
    return tmp_path / "dense"


@pytest.mark.parametrize("name", ["README.md", "pytorch_model.bin", "plots/widths.png"])
@pytest.mark.parametrize("reader", READERS)
def test_no_pickle_is_opened(reader, name, folder, marker):
    plant(folder, name, marker)
    with pytest.raises(ValueError, match="checkpoint_path"):
        READERS[reader](folder)
    assert not marker.exists()


def test_the_payload_of_these_tests_is_live(tmp_path, marker):
    torch.save(Payload(marker), tmp_path / "README.md")
    timm.create_model("cifar_resnet20", checkpoint_path=tmp_path / "README.md")
    assert marker.read_text() == "ran"


@pytest.mark.parametrize("reader", OURS)
@pytest.mark.parametrize(
    "values",
    [
        {"file": "README.md"},
        {"url": "https://example.com/weights.pth"},
        {"state_dict": {"fc.bias": [0]}},
        {"hf_hub_filename": "README.md"},
        {"custom_load": "hf"},
    ],
)
def test_other_places_of_weights_are_refused(reader, values, folder):
    edit(folder, "pretrained_cfg", **values)
    with pytest.raises(ValueError, match=rf"pretrained_cfg.*{next(iter(values))}"):
        READERS[reader](folder)


def test_timm_is_led_to_no_other_file_of_a_hub_repo():
    cfg = {"source": "hf-hub", "hf_hub_id": "a/b", "hf_hub_filename": "README.md"}
    with pytest.raises(ValueError, match=r"pretrained_cfg.*hf_hub_filename"):
        timm.create_model("camphive", base="cifar_resnet20", pretrained_cfg=cfg)


@pytest.mark.parametrize("reader", OURS)
@pytest.mark.parametrize(
    "name", ["pretrained_strict", "pretrained_cfg_overlay", "cache_dir", "features_only", "wings"]
)
def test_arguments_that_describe_no_architecture_are_refused(reader, name, folder):
    edit(folder, "model_args", **{name: {}})
    with pytest.raises(ValueError, match=rf"model_args.*{name}"):
        READERS[reader](folder)


def test_transformers_builds_no_other_architecture(folder):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architecture": "hf-hub:stranger/net"}))
    with pytest.raises(ValueError, match=r"architecture.*hf-hub:stranger/net"):
        AutoModelForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize("layout", ["nested", "flat"])
def test_a_dense_folder_is_read_as_strictly(dense, layout):
    assert load_base(str(dense)).model_args.items() >= {"in_chans": 1, "act_layer": "silu"}.items()
    edit(dense, "model_args", pretrained_strict=False)  # tensors that are missing would stay random
    with pytest.raises(ModelError, match=r"model_args.*pretrained_strict"):
        load_base(str(dense))
    config = json.loads((dense / "config.json").read_text())
    cfg = config.pop("pretrained_cfg") | {"file": "README.md"}
    config = config | cfg if layout == "flat" else config | {"pretrained_cfg": cfg}
    (dense / "config.json").write_text(json.dumps(config | {"model_args": {}}))
    with pytest.raises(ModelError, match=r"pretrained_cfg.*file"):
        load_base(str(dense))


@pytest.mark.parametrize("section", ["model_args", "pretrained_cfg"])
def test_a_config_whose_parts_are_no_tables_is_refused(section, folder):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {section: ["checkpoint_path"]}))
    for reader in ("hf_camphive", "a base to prune"):  # transformers checks the kinds of values itself
        with pytest.raises(ValueError, match=section):
            READERS[reader](folder)


def test_plain_arguments_are_read_by_all(tmp_path):
    save(tmp_path, drop_rate=0.25, act_layer="silu", in_chans=1)
    for read in READERS.values():
        found = read(tmp_path)
        found = getattr(found, "timm_model", getattr(found, "net", found))
        assert isinstance(found.act1, torch.nn.SiLU) and found.drop_rate == 0.25 and found.conv1.in_channels == 1


def test_weights_are_read_from_safetensors_only(folder):
    state = loading.from_pretrained(folder).timm_model.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        loading.from_pretrained(folder)
