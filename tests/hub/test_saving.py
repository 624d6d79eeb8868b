"""Saving is all or nothing, every reader gives the same logits, and damage is named with its remedy."""

import copy
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from support.fake_hub import FakeHub
from support.hostile import plant
from support.tensors import aligned
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

import hf_camphive
from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import ModelError, OutputError
from hf_camphive.core.plan import ChannelGroup, PrunePlan, plans_from_json
from hf_camphive.hub import saving as hub
from hf_camphive.hub.report import PruneReport, Stage
from hf_camphive.network.footprint import footprint
from hf_camphive.network.modeling.resizing import resize, widths_of

LABELS = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FILES = {
    *("README.md", "camphive_config.json", "cifar.py", "config.json", "model.safetensors"),
    *("layers.py", "modeling_camphive.py", "resizing.py", "plots", "prune_plan.json", "report.json"),
}


@dataclass(frozen=True)
class Base:
    architecture: str = "cifar_resnet20"
    model_args: dict[str, Any] = field(default_factory=dict)
    label_names: tuple[str, ...] | None = LABELS


def small_network() -> nn.Module:
    """A CIFAR ResNet-20 with a narrow block, a removed branch and statistics that say something."""
    torch.manual_seed(0)
    net = timm.create_model("cifar_resnet20").eval()
    widths = {key: shape for key, shape in widths_of(net).items() if not key.startswith("layer2.1.")}
    widths |= {"layer1.0.conv1": [5, 16, 3, 3], "layer1.0.bn1": [5], "layer1.0.conv2": [16, 5, 3, 3], "layer2.1": [32]}
    resize(net, widths, {"layer2.1": {"shortcut": [], "after": ["act2"]}})
    for name, tensor in net.state_dict().items():
        if name.endswith(("running_mean", "constant", "bias")):
            nn.init.normal_(tensor, std=0.1)
    return net


NET = small_network()
PLAN = PrunePlan((ChannelGroup("conv1", 16, ()),), (), (), (), "fisher", "reconstruct", 100, 50)
REPORT = PruneReport(
    **{"model_id": "cifar_resnet20", "revision": None, "architecture": "cifar_resnet20", "license": None},
    **{"dataset_id": "digits", "dataset_revision": None, "splits": {"test": "test"}, "rows": {"test": 300}},
    **{"input_size": (3, 32, 32), "config": CampHiVeConfig().as_run(), "command": "camphive"},
    stages=(Stage("dense", footprint(NET, (3, 32, 32)), None), Stage("pruned", footprint(NET, (3, 32, 32)), None)),
)


def model(net: nn.Module = NET) -> hub.PrunedModel:
    return hub.PrunedModel(net, Base(), CampHiVeConfig(), (PLAN,), REPORT)


def save(folder: Path, plots_from=lambda plots: Path(plots, "widths.png").write_bytes(b"png"), **kwargs) -> Path:
    return hub.save_folder(folder, model(), plots_from, **kwargs)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("hub") / "deep" / "saved")


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    noise = torch.randint(0, 256, (40, 48, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


@pytest.fixture(scope="module")
def pixels(folder, photo) -> torch.Tensor:
    return AutoImageProcessor.from_pretrained(folder)(photo)["pixel_values"]


@pytest.fixture(scope="module")
def logits(pixels) -> torch.Tensor:
    with torch.no_grad():
        return NET(pixels)


def test_the_folder_holds_what_the_design_says(folder):
    assert {path.name for path in folder.iterdir()} == FILES
    assert {path.name for path in folder.parent.iterdir()} == {"saved"}
    assert CampHiVeConfig.from_pretrained(folder) == CampHiVeConfig()
    assert plans_from_json((folder / "prune_plan.json").read_text()) == (PLAN,)
    assert PruneReport.from_json((folder / "report.json").read_text()) == REPORT
    assert "plots/widths.png" in (folder / "README.md").read_text()
    assert json.loads((folder / "config.json").read_text())["label_names"] == list(LABELS)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_every_reader_gives_the_same_logits(folder, photo, pixels, logits):
    readers = {
        "hub": hf_camphive.from_pretrained(folder).timm_model,
        "transformers": AutoModelForImageClassification.from_pretrained(folder).timm_model,
        "timm": timm.create_model(f"local-dir:{folder}", pretrained=True),
    }
    for name, net in readers.items():
        assert net.state_dict().keys() == NET.state_dict().keys(), name
        assert all(torch.equal(net.state_dict()[key], tensor) for key, tensor in NET.state_dict().items()), name
        with torch.no_grad():
            assert torch.equal(aligned(net)(pixels), logits), name
    scores = {
        row["label"]: row["score"] for row in pipeline("image-classification", model=str(folder))(photo, top_k=10)
    }
    expected = dict(zip(LABELS, logits[0].softmax(0).tolist()))
    assert scores == pytest.approx(expected, abs=1e-7)


def test_kwargs_reach_transformers(folder):
    assert hf_camphive.from_pretrained(folder, dtype=torch.float16).dtype == torch.float16
    resized = hf_camphive.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True)
    assert resized(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 3)


def test_a_network_on_channels_last_is_saved_alike(folder, tmp_path):
    net = copy.deepcopy(NET).to(memory_format=torch.channels_last).train()
    hub.save_folder(tmp_path, model(net))
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert net.training


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    assert save(tmp_path / "empty", plots_from=None) == tmp_path / "empty"
    assert {path.name for path in (tmp_path / "empty").iterdir()} == FILES - {"plots"}
    assert "![" not in (tmp_path / "empty" / "README.md").read_text()


def test_a_foreign_folder_is_never_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"was not saved by hf_camphive.*notes\.txt"):
            save(tmp_path, overwrite=overwrite)
    assert snapshot(tmp_path) == {"notes.txt": b"mine"}
    assert not [path for path in tmp_path.parent.iterdir() if path.name.startswith(f".{tmp_path.name}")]


def test_a_project_that_holds_our_settings_is_never_touched(tmp_path):
    CampHiVeConfig().save_pretrained(tmp_path)
    (tmp_path / "thesis.tex").write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match=r"was not saved by hf_camphive.*camphive_config\.json, thesis\.tex"):
        save(tmp_path, overwrite=True)
    assert snapshot(tmp_path) == before


def test_a_model_of_another_kind_is_never_touched(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(OutputError, match="was not saved by hf_camphive"):
        save(tmp_path, overwrite=True)
    assert snapshot(tmp_path) == {"config.json": b'{"model_type": "resnet"}'}


@pytest.mark.parametrize(
    "name",
    ["thesis.tex", "checkpoints/epoch-1.pt", "plots/photo.jpg", "plots/more/widths.png", ".git/HEAD", "report.json/x"],
)
def test_what_lies_beside_a_model_of_ours_is_named_and_kept(tmp_path, name):
    target = save(tmp_path / "x")
    (target / "report.json").unlink()
    (target / name).parent.mkdir(exist_ok=True)
    (target / name).write_text("mine")
    before = snapshot(target)
    shown = name if name.startswith("plots/p") else "plots/more" if name.startswith("plots") else name.split("/")[0]
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=rf"{re.escape(shown)}, which hf_camphive did not write"):
            save(target, overwrite=overwrite)
    assert snapshot(target) == before
    assert {path.name for path in tmp_path.iterdir()} == {"x"}


def test_our_folder_is_replaced_only_when_asked(tmp_path):
    target = save(tmp_path / "x")
    (target / "README.md").write_text("old")
    with pytest.raises(OutputError, match="overwrite"):
        save(target)
    assert (target / "README.md").read_text() == "old"
    save(target, overwrite=True)
    assert (target / "README.md").read_text() != "old"
    assert {path.name for path in target.iterdir()} == FILES
    assert {path.name for path in tmp_path.iterdir()} == {"x"}


def test_a_widened_model_is_replaced_too(tmp_path):
    (save(tmp_path / "x") / "expansion.json").write_text("{}")
    save(tmp_path / "x", overwrite=True)
    assert {path.name for path in (tmp_path / "x").iterdir()} == FILES


@pytest.mark.parametrize("name", [".x.old-backup", ".x.old-20240101", ".x.tmp-mine", ".x.tmp-0123456789", ".x.old-"])
def test_folders_of_similar_names_are_never_touched(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("mine")
    target = hub.check_output_folder(tmp_path / "x")
    assert not target.exists()
    save(save(target), overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {name, "x"}
    assert snapshot(tmp_path / name) == {"thesis.tex": b"mine"}


def test_places_that_cannot_be_written_are_refused_up_front(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        hub.check_output_folder(tmp_path / "file")
    with pytest.raises(OutputError, match="cannot write into"):
        hub.check_output_folder(tmp_path / "file" / "x")
    if Path("/proc/self").exists():
        with pytest.raises(OutputError, match="cannot write into"):
            hub.check_output_folder("/proc/x/y")
    assert hub.check_output_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()


def test_a_failure_while_saving_leaves_the_old_folder(tmp_path):
    target = save(tmp_path / "x")
    before = snapshot(target)

    def full_disk(plots: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        save(target, plots_from=full_disk, overwrite=True)
    assert snapshot(target) == before
    assert {path.name for path in tmp_path.iterdir()} == {"x"}


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    target = save(tmp_path / "x")
    before, real_rename = snapshot(target), os.rename

    def rename(source: Path, to: Path) -> None:
        if ".tmp-" in source.name:
            raise OSError(16, "Device or resource busy")
        real_rename(source, to)

    monkeypatch.setattr(hub.os, "rename", rename)
    with pytest.raises(OutputError, match="busy"):
        save(target, plots_from=None, overwrite=True)
    assert snapshot(target) == before and {path.name for path in tmp_path.iterdir()} == {"x"}


def killed_save(target: Path, moment: str) -> None:
    """Save over `target` in a child process that kills itself at this moment."""

    def die(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def rename_then_die(source: Path, to: Path) -> None:
        real_rename(source, to)
        die()

    def die_at_the_old_one(path: Path, **kwargs: Any) -> None:
        die() if ".old-" in path.name else real_rmtree(path, **kwargs)

    real_rename, real_rmtree = os.rename, shutil.rmtree
    if (child := os.fork()) == 0:
        try:
            torch.set_num_threads(1)
            if moment == "after the first rename":
                hub.os.rename = rename_then_die
            elif moment == "before the old one is deleted":
                hub.shutil.rmtree = die_at_the_old_one
            save(target, plots_from=die if moment == "while writing" else None, overwrite=True)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    while (status := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGTERM)
            os.waitpid(child, 0)
            pytest.fail("the child hung")
        time.sleep(0.05)
    assert os.WIFSIGNALED(status[1]) and os.WTERMSIG(status[1]) == signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "moment,before,after,found",
    [  # what stands at the folder's place before the run, after its death, and when the next run looks
        ("while writing", None, None, None),
        ("while writing", "old", "old", "old"),
        ("after the first rename", None, "new", "new"),
        ("after the first rename", "old", None, "old"),
        ("before the old one is deleted", "old", "new", "new"),
    ],
)
def test_a_killed_run_leaves_a_whole_folder_or_none(tmp_path, moment, before, after, found):
    target, old = tmp_path / "x", None
    if before:
        save(target)
        (target / "README.md").write_text("old")
        old = snapshot(target)

    def state() -> str | None:
        if not target.exists():
            return None
        assert snapshot(target) == old or {path.name for path in target.iterdir()} == FILES - {"plots"}
        assert hf_camphive.from_pretrained(target)
        return "old" if (target / "README.md").read_text() == "old" else "new"

    killed_save(target, moment)
    assert state() == after
    hub.check_output_folder(target, overwrite=True)
    assert state() == found
    save(target, plots_from=None, overwrite=True)
    assert state() == "new" and {path.name for path in tmp_path.iterdir()} == {"x"}


def damaged(folder: Path, tmp_path: Path, name: str, change) -> Path:
    for file, data in snapshot(folder).items():
        if file == name:
            data = change(data)
        if data is not None and "/" not in file:
            (tmp_path / file).write_bytes(data)
    return tmp_path


def edited(**changes: Any):
    return lambda data: json.dumps(json.loads(data) | changes).encode()


def without(name: str):
    def change(data: bytes) -> bytes:
        tensors = safetensors.torch.load(data)
        del tensors[name]
        return safetensors.torch.save(tensors, {"format": "pt"})

    return change


def reshaped(name: str):
    def change(data: bytes) -> bytes:
        tensors = safetensors.torch.load(data)
        tensors[name] = tensors[name][:-1].clone()
        return safetensors.torch.save(tensors, {"format": "pt"})

    return change


def renamed(data: bytes) -> bytes:
    tensors = safetensors.torch.load(data)
    tensors["extra.weight"] = torch.zeros(1)
    return safetensors.torch.save(tensors, {"format": "pt"})


@pytest.mark.parametrize(
    "name,change,message",
    [
        ("config.json", lambda data: data[:100], "config.json"),
        ("config.json", lambda data: None, "config.json"),
        ("config.json", edited(model_type="resnet"), "'resnet' that was not saved by hf_camphive"),
        ("config.json", edited(model_args={"base": "no_such_net", "widths": {}}), "damaged.*no_such_net"),
        ("config.json", edited(model_args={"base": "cifar_resnet20", "widths": {"convx": [1]}}), "damaged.*convx"),
        ("config.json", edited(model_args=None), "damaged"),
        ("model.safetensors", lambda data: data[: len(data) // 2], "damaged"),
        ("model.safetensors", lambda data: b"", "damaged"),
        ("model.safetensors", lambda data: None, "damaged.*model.safetensors"),
        ("model.safetensors", without("layer2.1.constant"), r"damaged.*lacks layer2\.1\.constant\)"),
        ("model.safetensors", renamed, r"damaged.*no place for extra\.weight\)"),
        ("model.safetensors", reshaped("layer1.0.conv1.weight"), r"damaged.*other shapes.*layer1\.0\.conv1\.weight\)"),
    ],
)
def test_damage_is_named(folder, tmp_path, name, change, message):
    with pytest.raises(ModelError, match=f"(?s){message}") as caught:
        hf_camphive.from_pretrained(damaged(folder, tmp_path, name, change))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_model_at_all_is_named(tmp_path):
    with pytest.raises(ModelError, match="no/where"):
        hf_camphive.from_pretrained("no/where")
    with pytest.raises(ModelError, match=r"config\.json"):
        hf_camphive.from_pretrained(tmp_path)


def test_pushing_a_foreign_folder_is_refused(tmp_path):
    with pytest.raises(OutputError, match="not saved by hf_camphive"):
        hub.push_folder(tmp_path, "me/x")


def test_pushing_without_a_hub_names_the_remedy(folder, monkeypatch):
    with pytest.raises(OutputError, match="hf auth login"):
        hub.push_folder(folder, "me/x", token="hf_x")


# ---- over a Hub, in fresh processes: huggingface_hub reads its address once, at import

ALIGNED = "import torch\n" + inspect.getsource(aligned).replace("nn.Module", "torch.nn.Module")
WITH_PACKAGE = f"""
import huggingface_hub, json, sys, timm
{ALIGNED}
import hf_camphive
from hf_camphive.core.errors import ModelError
from hf_camphive.hub import saving as hub
from transformers import AutoModelForImageClassification, pipeline
folder, pixels = sys.argv[1], torch.load(sys.argv[2])
url = hub.push_folder(folder, "tester/small", commit_message="First")
hub.push_folder(folder, "tester/again", commit_message="Second")
hub.push_folder(huggingface_hub.snapshot_download("tester/small", local_dir="downloaded"), "tester/fork")
read = {{
    "hub.from_pretrained": hf_camphive.from_pretrained("tester/small").timm_model,
    "AutoModel": AutoModelForImageClassification.from_pretrained("tester/small").timm_model,
    "pipeline": pipeline("image-classification", model="tester/small").model.timm_model,
    "timm": timm.create_model("hf-hub:tester/small", pretrained=True),
}}
try:
    hf_camphive.from_pretrained("tester/absent")
    error = ""
except ModelError as caught:
    error = str(caught)
logits = {{name: aligned(net)(pixels).tolist() for name, net in read.items()}}
print("RESULT" + json.dumps({{"url": url, "error": error, "logits": logits}}))
"""

WITHOUT_PACKAGE = f"""
import json, sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_camphive":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
{ALIGNED}
from transformers import AutoModelForImageClassification, pipeline
folder, pixels = sys.argv[1], torch.load(sys.argv[2])
logits = {{}}
for source in (folder, "tester/small"):
    model = AutoModelForImageClassification.from_pretrained(source, trust_remote_code=True)
    logits["AutoModel " + source] = aligned(model)(pixels).logits.tolist()
    made = pipeline("image-classification", model=source, trust_remote_code=True)
    logits["pipeline " + source] = aligned(made.model)(pixels).logits.tolist()
labels = [model.config.id2label[i] for i in range(10)]
result = {{"module": type(model).__module__, "labels": labels, "logits": logits, "refused": ""}}
import timm
timm.models._factory.load_checkpoint = lambda net, path, **options: torch.load(path, weights_only=False)  # timm 1.0.25
try:
    AutoModelForImageClassification.from_pretrained(sys.argv[3], trust_remote_code=True)
except ValueError as error:
    result["refused"] = str(error)
print("RESULT" + json.dumps(result))
"""


@pytest.fixture(scope="module")
def served(folder, pixels, tmp_path_factory):
    """Results of both scripts against one loopback Hub, and what the Hub then holds."""
    home = tmp_path_factory.mktemp("home")
    torch.save(pixels, home / "pixels.pt")
    local = home / "local"
    for name, data in snapshot(folder).items():
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_bytes(data)
    (local / "checkpoints").mkdir()
    (local / "checkpoints" / "optimizer.bin").write_bytes(b"pickle")
    (local / "trained.pt").write_bytes(b"pickle")
    plant(shutil.copytree(folder, home / "hostile"), "README.md", home / "marker")
    with FakeHub() as fake:
        env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        env |= {"HF_ENDPOINT": fake.url, "HF_HOME": str(home / "hf"), "HF_TOKEN": "hf_x", "OMP_NUM_THREADS": "1"}
        results = []
        for script in (WITH_PACKAGE, WITHOUT_PACKAGE):
            command = [sys.executable, "-c", script, str(local), str(home / "pixels.pt"), str(home / "hostile")]
            run = subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, timeout=240)
            assert run.returncode == 0, run.stderr[-4000:]
            results.append(json.loads(run.stdout.partition("RESULT")[2]))
    return results, fake, local


def test_over_the_hub_every_reader_gives_the_same_logits(served, logits):
    (result, _), fake, _ = served
    assert len(result["logits"]) == 4
    for name, value in result["logits"].items():
        assert torch.equal(torch.tensor(value), logits), name
    assert result["url"] == f"{fake.url}/tester/small"
    assert "tester/absent" in result["error"]


def test_without_the_package_remote_code_gives_the_same_logits(served, logits):
    (_, result), _, _ = served
    assert result["module"].startswith("transformers_modules.")
    assert result["labels"] == list(LABELS)
    assert len(result["logits"]) == 4
    for name, value in result["logits"].items():
        assert torch.equal(torch.tensor(value), logits), name


def test_the_code_in_a_saved_folder_opens_no_pickle_either(served):
    (_, result), _, local = served
    assert "checkpoint_path" in result["refused"]
    assert not (local.parent / "marker").exists()


def test_a_push_is_one_commit_of_our_files(served):
    _, fake, local = served
    assert fake.commits == [
        *(("tester/small", "First"), ("tester/again", "Second")),
        ("tester/fork", "Upload pruned model"),
    ]
    files = snapshot(local)
    for repo in fake.repos.values():
        assert set(repo) == set(files) - {"checkpoints/optimizer.bin", "trained.pt"}
        assert all(data == files[name] for name, data in repo.items() if name != "README.md")


def test_a_push_changes_nothing_on_disk(served, folder):
    _, _, local = served
    others = {"checkpoints/optimizer.bin": b"pickle", "trained.pt": b"pickle"}
    assert snapshot(local) == snapshot(folder) | others


def test_an_uploaded_card_names_its_own_repo_whatever_was_pushed_before(served):
    _, fake, _ = served
    for repo, files in fake.repos.items():
        readme = files["README.md"].decode()
        assert f'hf_camphive.from_pretrained("{repo}")' in readme and f'"hf-hub:{repo}"' in readme
        assert "path/to/this" not in readme and "Model Card for" not in readme
        assert not [other for other in fake.repos if other != repo and other in readme]
