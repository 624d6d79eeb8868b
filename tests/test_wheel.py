"""The wheel, installed alone: it holds all that the package reads at run time, and runs without the checkout."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
SAVE = """
import sys
import torch
import hf_camphive
from hf_camphive.hub.loading import BUNDLED
assert hf_camphive.__file__.startswith(sys.argv[1]), hf_camphive.__file__
for name in BUNDLED:
    assert hf_camphive.load_base(name).net.num_classes == 10
config = hf_camphive.CampHiVeConfig(target_macs=0.5, criterion="magnitude", merge="none", polish_steps=0)
pruner = hf_camphive.CampHiVePruner("digits_resnet", config)
images = torch.randn(16, *pruner.input_size, generator=torch.Generator().manual_seed(0))
batches = [{"pixel_values": images, "labels": torch.arange(16) % 10}]
pruner.apply(pruner.plan(batches), batches)
pruner.save_pretrained("small")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package as its wheel installs it."""
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "installed"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "hf_camphive", source / "hf_camphive", ignore=shutil.ignore_patterns("__pycache__"))
    offline = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check")
    pip("wheel", str(source), "--no-build-isolation", "--wheel-dir", str(wheels), *offline)
    (wheel,) = wheels.glob("*.whl")
    pip("install", str(wheel), "--target", str(target), *offline)
    return target


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True, timeout=900)


def python(installed: Path, folder: Path, *arguments: str) -> str:
    """What a fresh process prints that finds the package in `installed` and runs in an empty folder."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_loads_bundled_networks_and_saves_a_whole_folder(installed, tmp_path):
    python(installed, tmp_path, "-c", SAVE, str(installed))
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "modeling_camphive.py", "cifar.py"} <= names
    assert "camphive" in (tmp_path / "small" / "README.md").read_text()
    assert (installed / "hf_camphive" / "py.typed").is_file()


def test_its_command_line_plans(installed, tmp_path):
    options = ("--criterion", "magnitude", "--target-macs", "0.5", "--calibration-size", "16", "--dry-run")
    told = python(installed, tmp_path, "-m", "hf_camphive", "prune", *options, "--output-dir", "plan")
    assert "Nothing was changed" in told
    assert json.loads((tmp_path / "plan" / "prune_plan.json").read_text())
