"""Writing model folders and pushing them to the Hub.

A folder is either complete or absent: it is written beside its place under a hidden name and renamed.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HTTPError  # of httpx or its successor, whichever this version uses
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects
from torch import nn

from hf_camphive.core.config import CONFIG_FILE, CampHiVeConfig
from hf_camphive.core.errors import OutputError
from hf_camphive.core.plan import PLAN_FILE, PrunePlan, plans_to_json
from hf_camphive.hub.card import name_source, render_card, render_expansion_card
from hf_camphive.hub.report import REPORT_FILE, PruneReport
from hf_camphive.network.modeling.modeling_camphive import MODEL_TYPE, CampHiVeForImageClassification
from hf_camphive.network.surgery.widening import EXPANSION_FILE, Expansion

CARD_FILE = "README.md"
PLOTS_FOLDER = "plots"
MODEL_CONFIG_FILE = "config.json"
# Every file that saving writes, of this package and of transformers; the code is shipped for those without the package.
_WRITTEN = {
    *(MODEL_CONFIG_FILE, "model.safetensors", "modeling_camphive.py", "cifar.py", "layers.py", "resizing.py"),
    *(CONFIG_FILE, PLAN_FILE, REPORT_FILE, EXPANSION_FILE, CARD_FILE),
}
# Training checkpoints are pickles; they serve to resume a run on the machine that wrote them.
_NEVER_PUSHED = ["checkpoints/*", "*.bin", "*.ckpt", "*.pickle", "*.pkl", "*.pt", "*.pth"]


class Base(Protocol):
    """The parts of `hub.loading.BaseModel` that saving needs."""

    @property
    def architecture(self) -> str:
        """Name of the timm architecture."""

    @property
    def model_args(self) -> dict[str, Any]:
        """Arguments of `timm.create_model`."""

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """Name of each class."""


@dataclass(frozen=True)
class PrunedModel:
    """Contents of a model folder: the pruned network, the dense one, settings, plans of all cycles, and the report."""

    net: nn.Module
    base: Base
    config: CampHiVeConfig
    plans: Sequence[PrunePlan]
    report: PruneReport


def save_folder(
    folder: str | Path,
    model: PrunedModel,
    plots_from: Callable[[Path], Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a pruned model's folder (weights, configs, plan, report, card, plots) and return it.

    `plots_from` draws pictures into the folder that it is given. With `overwrite` a folder saved before is replaced as a
    whole.

    Raises:
        OutputError: `check_output_folder` refuses the folder, or it cannot be written.
    """

    def fill(temporary: Path) -> None:
        _transformers_model(model.net, model.base).save_pretrained(temporary)
        model.config.save_pretrained(temporary)
        Path(temporary, PLAN_FILE).write_text(plans_to_json(model.plans), encoding="utf-8")
        Path(temporary, REPORT_FILE).write_text(model.report.to_json(), encoding="utf-8")
        plots = Path(temporary, PLOTS_FOLDER)
        if plots_from is not None:
            plots.mkdir()
            plots_from(plots)
        pictures = sorted(path.name for path in plots.glob("*.png"))
        Path(temporary, CARD_FILE).write_text(render_card(model.report, None, pictures), encoding="utf-8")

    return _written(folder, fill, overwrite)


def save_expanded(
    folder: str | Path,
    net: nn.Module,
    base: Base,
    plans: Iterable[PrunePlan],
    expansion: Expansion,
    overwrite: bool = False,
) -> Path:
    """Write the folder of a widened network, which is to be trained and pruned again, and return it.

    `plans` are those that made the network before it was widened.

    Raises:
        OutputError: `check_output_folder` refuses the folder, or it cannot be written.
    """

    def fill(temporary: Path) -> None:
        _transformers_model(net, base).save_pretrained(temporary)
        Path(temporary, PLAN_FILE).write_text(plans_to_json(plans), encoding="utf-8")
        Path(temporary, EXPANSION_FILE).write_text(expansion.to_json(), encoding="utf-8")
        Path(temporary, CARD_FILE).write_text(render_expansion_card(expansion), encoding="utf-8")

    return _written(folder, fill, overwrite)


def check_output_folder(folder: str | Path, overwrite: bool = False) -> Path:
    """Return the absolute path of a folder after checking, before any work, that `save_folder` may write it.

    The folder may be absent or empty, or with `overwrite` a model folder that holds nothing but what this package
    writes. If a run was killed while replacing the folder, the old one is put back first.

    Raises:
        OutputError: The folder holds anything else, or its place cannot be written.
    """
    folder = Path(folder).expanduser().resolve()
    _clear_remains(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; the model needs a folder of its own: choose another name")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names - {PLAN_FILE}:  # a dry run leaves a plan alone
        _check_replaceable(folder, overwrite)
    try:
        existing = next(parent for parent in folder.parents if parent.exists())
        probe = _sibling(existing / folder.name, "tmp")
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise OutputError(f"cannot write into {existing} ({error.strerror}); choose a folder elsewhere") from error
    return folder


def _clear_remains(folder: Path) -> None:
    """Put back what a killed run moved aside from this folder's place, or delete it where a newer one stands."""
    aside = _siblings(folder, "old")
    whole = [path for path in aside if _is_model(path)]
    if whole and not folder.exists():
        os.rename(whole[-1], folder)
        aside.remove(whole[-1])
    for stale in aside:
        shutil.rmtree(stale, ignore_errors=True)


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    if not _is_model(folder):
        raise OutputError(
            f"{folder} is not empty and was not saved by hf_camphive: it holds {_several(sorted(os.listdir(folder)))}; "
            "choose another folder, so that nothing of yours is lost"
        )
    if foreign := _foreign(folder):
        raise OutputError(
            f"{folder} holds a pruned model, but also {_several(foreign)}, which hf_camphive did not write; move that "
            "elsewhere or choose another folder, so that nothing of yours is lost"
        )
    if not overwrite:
        raise OutputError(f"{folder} holds a pruned model; choose another folder, or overwrite it (--overwrite)")


def _transformers_model(net: nn.Module, base: Base) -> CampHiVeForImageClassification:
    labels = {} if base.label_names is None else {"id2label": dict(enumerate(base.label_names))}
    return CampHiVeForImageClassification.from_timm(net, base.architecture, base.model_args, **labels)


def _written(folder: str | Path, fill: Callable[[Path], None], overwrite: bool) -> Path:
    """Let `fill` write a temporary folder beside `folder`, and move it there when it is complete.

    Raises:
        OutputError: The folder may not be replaced, or cannot be written.
    """
    folder = check_output_folder(folder, overwrite)
    for stale in _siblings(folder, "tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = _sibling(folder, "tmp")
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        _put_in_place(temporary, folder)
    except OSError as error:
        raise OutputError(
            f"could not write {folder} ({error}); what it held before is unchanged: free some space or choose another "
            "folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _is_model(folder: Path) -> bool:
    """Whether a folder holds a model that this package saved, perhaps beside other things."""
    try:
        config = json.loads(Path(folder, MODEL_CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE


def _foreign(folder: Path) -> list[str]:
    """What lies in a folder that saving does not write."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.name == PLOTS_FOLDER and path.is_dir() and not path.is_symlink():
            plots = sorted(path.iterdir())
            found += [f"{PLOTS_FOLDER}/{plot.name}" for plot in plots if plot.suffix != ".png" or not plot.is_file()]
        elif path.name not in _WRITTEN or not path.is_file():
            found.append(path.name)
    return found


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload pruned model",
) -> str:
    """Upload a saved folder to the Hub in one commit, and return the repository's address.

    The repository is created if it does not exist. The uploaded card names it; the folder itself stays as it is.
    Training checkpoints and pickles are left out.

    Raises:
        OutputError: The folder holds no model of this package, or the upload fails.
    """
    folder = Path(folder)
    if not _is_model(folder):
        raise OutputError(
            f"{folder} was not saved by hf_camphive ({MODEL_CONFIG_FILE} is not of a {MODEL_TYPE}); push a folder that was"
        )
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.create_commit(url.repo_id, _additions(folder, url.repo_id), commit_message=commit_message)
    except (OSError, ValueError, HTTPError) as error:
        raise OutputError(
            f"could not push {folder} to {repo_id} ({first_line(error)}); it is complete on disk: log in "
            "with `hf auth login`, make sure that you may write to that repository, and push again"
        ) from error
    return str(url)


def _additions(folder: Path, repo_id: str) -> list[CommitOperationAdd]:
    """The files of a folder as they are uploaded to a repo, the card under the repo's name."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    pushed = filter_repo_objects(names, ignore_patterns=[*_NEVER_PUSHED, *DEFAULT_IGNORE_PATTERNS])
    card = Path(folder, CARD_FILE)
    content = {CARD_FILE: name_source(card.read_text(encoding="utf-8"), repo_id).encode()} if card.is_file() else {}
    return [CommitOperationAdd(name, content.get(name, folder / name)) for name in pushed]


def _put_in_place(temporary: Path, folder: Path) -> None:
    # A folder cannot be renamed onto one that has files, so the old one is moved aside first. If the process is killed
    # before that, the old folder is in place; between the two renames both are complete, and `check_output_folder` puts
    # the old one back; afterwards the new one is in place.
    aside = _sibling(folder, "old")
    if folder.exists():
        os.rename(folder, aside)
    try:
        os.rename(temporary, folder)
    except OSError:
        if aside.exists():
            os.rename(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sibling(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}-{secrets.token_hex(4)}")


def _siblings(folder: Path, kind: str) -> list[Path]:
    """Folders that `_sibling` named and saving filled; anything else beside the folder is the user's."""
    name = re.compile(rf"\.{re.escape(folder.name)}\.{kind}-[0-9a-f]{{8}}")
    found = [path for path in sorted(folder.parent.glob(".*")) if name.fullmatch(path.name)]
    return [path for path in found if path.is_dir() and not path.is_symlink() and not _foreign(path)]


def _several(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
