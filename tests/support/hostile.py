"""A model folder as a stranger might make it: its config.json leads to a pickle, and the pickle runs code."""

import json
from pathlib import Path
from typing import Any

import torch


class Payload:
    """Unpickled, it writes a file: what a stranger's pickle could do with anything of the user's."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.marker, "ran")


def plant(folder: Path, name: str, marker: Path) -> None:
    """Put a pickle under this name into a saved folder, and have the config.json ask for it as a checkpoint."""
    (folder / name).parent.mkdir(exist_ok=True)
    torch.save(Payload(marker), folder / name)
    edit(folder, "model_args", checkpoint_path=str(folder / name))


def edit(folder: Path, section: str, **values: Any) -> None:
    """Set entries of `model_args` or `pretrained_cfg` in a saved folder's config.json."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config[section] = config.get(section, {}) | values
    file.write_text(json.dumps(config))


def load_any_pickle(net: torch.nn.Module, path: str, **options: Any) -> None:
    """Stand-in for timm's `load_checkpoint`, which up to 1.0.25 unpickled whatever file it was given."""
    torch.load(path, weights_only=False)
