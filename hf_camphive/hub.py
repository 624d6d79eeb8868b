"""Saved models: the only file that writes model folders or talks to the Hub.

A folder is complete or absent: it is written beside its place under a hidden name and renamed.
"""

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError  # of httpx or its successor, whichever this version uses
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig

from .card import FOLDER_PLACEHOLDER, render_card, render_expansion_card
from .config import CONFIG_FILE, CampHiVeConfig
from .errors import ModelError, OutputError
from .expansion import EXPANSION_FILE, Expansion
from .modeling_camphive import MODEL_TYPE, CampHiVeForImageClassification, check_config
from .plan import PLAN_FILE, PrunePlan, plans_to_json
from .report import REPORT_FILE, PruneReport

CARD_FILE = "README.md"
PLOTS_FOLDER = "plots"
# Training checkpoints are pickles; they serve to resume a run on the machine that wrote them.
_NEVER_PUSHED = ["checkpoints/*", "*.bin", "*.ckpt", "*.pickle", "*.pkl", "*.pt", "*.pth"]


class Base(Protocol):
    """What saving needs to know of the dense network; `models.BaseModel` has it."""

    architecture: str
    model_args: dict[str, Any]
    label_names: tuple[str, ...] | None


def save_folder(
    folder: str | Path,
    net: nn.Module,
    base: Base,
    config: CampHiVeConfig,
    plans: Iterable[PrunePlan],
    report: PruneReport,
    plots_from: Callable[[Path], Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the pruned network and all that is known about it, and return the folder.

    `plots_from` draws pictures into the folder that it is given. A folder saved before is replaced whole when
    `overwrite` is set. Raises OutputError where `check_output_folder` does, or when the disk refuses.
    """

    def fill(temporary: Path) -> None:
        _model(net, base).save_pretrained(temporary)
        config.save_pretrained(temporary)
        Path(temporary, PLAN_FILE).write_text(plans_to_json(plans), encoding="utf-8")
        Path(temporary, REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
        plots = Path(temporary, PLOTS_FOLDER)
        if plots_from is not None:
            plots.mkdir()
            plots_from(plots)
        pictures = sorted(path.name for path in plots.glob("*.png"))
        Path(temporary, CARD_FILE).write_text(render_card(report, None, pictures), encoding="utf-8")

    return _written(folder, fill, overwrite)


def save_expanded(
    folder: str | Path,
    net: nn.Module,
    base: Base,
    plans: Iterable[PrunePlan],
    expansion: Expansion,
    overwrite: bool = False,
) -> Path:
    """Write a widened network, to train and prune again; `plans` tell what had been cut before. As `save_folder`."""

    def fill(temporary: Path) -> None:
        _model(net, base).save_pretrained(temporary)
        Path(temporary, PLAN_FILE).write_text(plans_to_json(plans), encoding="utf-8")
        Path(temporary, EXPANSION_FILE).write_text(expansion.to_json(), encoding="utf-8")
        Path(temporary, CARD_FILE).write_text(render_expansion_card(expansion), encoding="utf-8")

    return _written(folder, fill, overwrite)


def check_output_folder(folder: str | Path, overwrite: bool = False) -> Path:
    """Resolve a folder that `save_folder` may write, and prove it before any work is done.

    An absent or empty folder will do, and with `overwrite` one of ours. Puts a folder back that a run killed in the
    midst of replacing it left aside. Raises OutputError.
    """
    folder = Path(folder).expanduser().resolve()
    aside = _siblings(folder, "old")
    if aside and not folder.exists():
        os.rename(aside.pop(), folder)
    for stale in aside:
        shutil.rmtree(stale, ignore_errors=True)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; the model needs a folder of its own: choose another name")
    if folder.is_dir() and any(path.name != PLAN_FILE for path in folder.iterdir()):  # a dry run leaves a plan alone
        if not _is_ours(folder):
            raise OutputError(
                f"{folder} is not empty and was not saved by hf_camphive (it has no {CONFIG_FILE}); choose another "
                "folder, so that nothing of yours is lost"
            )
        if not overwrite:
            raise OutputError(f"{folder} holds a pruned model; choose another folder, or overwrite it (--overwrite)")
    try:
        existing = next(parent for parent in folder.parents if parent.exists())
        os.rmdir(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=existing))
    except OSError as error:
        raise OutputError(f"cannot write into {existing} ({error.strerror}); choose a folder elsewhere") from error
    return folder


def _model(net: nn.Module, base: Base) -> CampHiVeForImageClassification:
    labels = {} if base.label_names is None else {"id2label": dict(enumerate(base.label_names))}
    return CampHiVeForImageClassification.from_timm(net, base.architecture, base.model_args, **labels)


def _written(folder: str | Path, fill: Callable[[Path], None], overwrite: bool) -> Path:
    """Let `fill` write a folder beside its place, and put it there whole."""
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
            f"could not write {folder} ({error}); what stood there before is untouched: free some space or choose "
            "another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _is_ours(folder: Path) -> bool:
    return any(Path(folder, name).is_file() for name in (CONFIG_FILE, EXPANSION_FILE))


def from_pretrained(
    path_or_id: str | Path, revision: str | None = None, **kwargs: Any
) -> CampHiVeForImageClassification:
    """Load a pruned model from a folder or the Hub; runs no code from there.

    Weights come from safetensors only. `kwargs` go to transformers' `from_pretrained` (dtype, device_map, token, ...).

    Raises:
        ModelError: On anything that is not a whole model of ours, or whose config.json asks for other files.
    """
    source = str(path_or_id)
    where = {"revision": revision} if revision else {}
    try:
        values, _ = PreTrainedConfig.get_config_dict(source, **where, **kwargs)
        if not values:
            raise OSError("there is none")
    except (OSError, ValueError, HTTPError) as error:
        raise ModelError(
            f"cannot read config.json of {source} ({_first_line(error)}); give a folder that hf_camphive saved, or "
            "the Hub id of one"
        ) from error
    if values.get("model_type") != MODEL_TYPE:
        kind = values.get("model_type") or values.get("architecture") or "unknown"
        raise ModelError(
            f"{source} is a model of type {kind!r} that was not saved by hf_camphive; load it with "
            "transformers.AutoModelForImageClassification or timm.create_model"
        )
    try:
        check_config(values)
    except ValueError as error:
        raise ModelError(f"{source} is refused: {error}") from error
    resized = kwargs.pop("ignore_mismatched_sizes", False)
    how = {**kwargs, **where, "output_loading_info": True, "ignore_mismatched_sizes": True, "use_safetensors": True}
    try:
        model, found = CampHiVeForImageClassification.from_pretrained(source, **how)
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError, HTTPError) as error:
        raise _damaged(source, _first_line(error)) from error
    if found["missing_keys"]:
        raise _damaged(source, f"model.safetensors lacks {_listed(found['missing_keys'])}")
    if found["unexpected_keys"]:
        raise _damaged(source, f"the network has no place for {_listed(found['unexpected_keys'])}")
    if found["mismatched_keys"] and not resized:
        raise _damaged(
            source, f"other shapes than config.json says: {_listed(k[0] for k in found['mismatched_keys'])}"
        )
    return model


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload pruned model",
) -> str:
    """Upload a saved folder to the Hub in one commit, and return its address.

    The repo is created when it does not exist; the card's load snippet then names it. Training checkpoints and pickles
    are left out. Raises OutputError.
    """
    folder = Path(folder)
    if not _is_ours(folder):
        raise OutputError(f"{folder} was not saved by hf_camphive (it has no {CONFIG_FILE}); push a folder that was")
    card = Path(folder, CARD_FILE)
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if card.is_file():
            text = card.read_text(encoding="utf-8")
            card.write_text(text.replace(FOLDER_PLACEHOLDER, url.repo_id), encoding="utf-8")
        api.upload_folder(
            folder_path=folder, repo_id=url.repo_id, commit_message=commit_message, ignore_patterns=_NEVER_PUSHED
        )
    except (OSError, ValueError, HTTPError) as error:
        raise OutputError(
            f"could not push {folder} to {repo_id} ({_first_line(error)}); it is whole on disk: log in with "
            "`hf auth login`, make sure that you may write to that repo, and push again"
        ) from error
    return str(url)


def _put_in_place(temporary: Path, folder: Path) -> None:
    # A folder cannot be renamed onto one that has files, so the old one steps aside first. Killed before: the old one
    # stands. Between the two renames: both are whole, and `check_output_folder` puts the old one back. After: the new.
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
    prefix = f".{folder.name}.{kind}-"
    return [path for path in folder.parent.glob(".*") if path.name.startswith(prefix)]


def _damaged(source: str, fault: str) -> ModelError:
    return ModelError(
        f"{source} is damaged: its weights do not fit the network that its config.json describes ({fault}); download "
        "or copy it again, or save it again from the run that made it"
    )


def _listed(keys: Iterable[str]) -> str:
    names = sorted(key.removeprefix("timm_model.") for key in keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
