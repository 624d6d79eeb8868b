"""State of a run on disk, from which a killed run is resumed: the network after each cycle, and all measurements so far.

Networks are kept as ordinary model folders (no pickle). The same folder holds the state of the solver that is scoring the
current network, the training state of the finetuning, and the identity of the run: the network's weights and the dataset's
rows.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import ConfigError, ModelError
from hf_camphive.core.measures import published
from hf_camphive.core.plan import PrunePlan
from hf_camphive.curvature.eigensolvers import SolverState
from hf_camphive.hub import saving
from hf_camphive.hub.loading import BaseModel, load_base, weights_fingerprint
from hf_camphive.hub.report import REPORT_FILE, PruneReport
from hf_camphive.training.data.loaders import DatasetInfo

_ITERATION, _RUN = "iteration.safetensors", "run.json"
_NETWORK, _DENSE, _TRAINING = "network", "dense", "training"
_FREE = ("learning_rate",)  # may differ: only finetuning reads it, and starts afresh with another one


@dataclass(frozen=True)
class Progress:
    """State of a run between two steps; `dense` is None unless the run itself trained the dense network's classifier."""

    net: nn.Module
    dense: nn.Module | None
    plans: tuple[PrunePlan, ...]
    report: PruneReport


def has_state(work_dir: Path) -> bool:
    """Return whether the folder holds a network of a run, perhaps one that was being replaced when the run was killed."""
    return (work_dir / _NETWORK).exists() or any(work_dir.glob(f".{_NETWORK}.old-*"))


def training_folder(work_dir: Path) -> Path:
    """Return the folder in which a run keeps the training state of its finetuning."""
    return work_dir / _TRAINING


@dataclass(frozen=True)
class IterationCheckpoint:
    """File that holds the state of the eigensolver, for the network that `save_progress` saved last.

    All processes read it; only the process with `writes` set writes it.
    """

    work_dir: Path
    writes: bool = True

    def load(self) -> SolverState | None:
        """Return the last state, or None where there is none.

        Raises:
            ConfigError: The file is damaged.
        """
        path = self.work_dir / _ITERATION
        try:
            return load_file(path) if path.exists() else None
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); remove it to start the iteration afresh") from error

    def save(self, state: SolverState) -> None:
        """Replace the last state in one step, so that a killed process leaves the old state or the new one."""
        if self.writes:
            path = self.work_dir / _ITERATION
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)


def run_identity(base: BaseModel, info: DatasetInfo) -> dict[str, str | int | None]:
    """Return what identifies a run besides its config: the weights that it starts from, and the rows of each role.

    Rows are identified by their labels; comparing pixels would mean reading all images.
    """
    of_rows: dict[str, Mapping[str, str | int]] = {
        "split": info.splits,
        "rows": info.rows,
        "labels": info.label_digests,
    }
    return {
        "model": published(base.model_id),
        "weights": weights_fingerprint(base.net),
        "dataset": published(info.dataset_id),
        "dataset configuration": info.config_name,
        "dataset revision": info.revision,
        "image column": info.image_column,
        "label column": info.label_column,
        **{f"{role} {what}": value for what, values in of_rows.items() for role, value in values.items()},
    }


def save_progress(
    work_dir: Path, progress: Progress, base: BaseModel, config: CampHiVeConfig, identity: dict[str, Any]
) -> None:
    """Write the state of a run in place of its last one; networks that another run left in the folder are removed.

    The dense network is written first, so that it is there whenever the current one is.

    Raises:
        OutputError: The folder holds something else, or cannot be written.
    """
    Path(work_dir, _ITERATION).unlink(missing_ok=True)  # belongs to the network before
    _claim(work_dir, identity)
    nets: Sequence[tuple[str, nn.Module, tuple[PrunePlan, ...]]] = [(_NETWORK, progress.net, progress.plans)]
    if progress.dense is not None:
        nets = [(_DENSE, progress.dense, ()), *nets]
    for name, net, plans in nets:
        model = saving.PrunedModel(net, base, config, plans, progress.report)
        saving.save_folder(work_dir / name, model, overwrite=True)


def put_back(work_dir: Path) -> None:
    """Restore the model folders that a killed run was replacing; one process calls this before any process reads them.

    Raises:
        OutputError: Something else is in their place.
    """
    for name in (_NETWORK, _DENSE):
        saving.check_output_folder(work_dir / name, overwrite=True)


def load_progress(work_dir: Path, config: CampHiVeConfig, identity: dict[str, Any]) -> Progress | None:
    """Read the state of a killed run, after `put_back`; return None where there is none.

    Raises:
        ConfigError: The run had another config (apart from the learning rate), network or dataset, or its state is damaged
            or does not identify the run.
    """
    folder = work_dir / _NETWORK
    if not folder.exists():
        return None
    before = _recorded(work_dir)
    if before is None:
        raise ConfigError(
            f"the run in {work_dir} has no readable {_RUN}, so whether its model and dataset are the same cannot be "
            "checked; remove that folder to start afresh"
        )
    report = PruneReport.from_json((folder / REPORT_FILE).read_text(encoding="utf-8"))
    saved = CampHiVeConfig.from_pretrained(folder)
    settings = [(key, value, config.to_dict()[key]) for key, value in saved.to_dict().items() if key not in _FREE]
    same = [(name, before.get(name), identity.get(name)) for name in sorted(before.keys() | identity.keys())]
    if changes := [f"{name}: {old!r} then, {new!r} now" for name, old, new in (*same, *settings) if old != new]:
        raise ConfigError(
            f"the run in {work_dir} was another one ({'; '.join(changes)}); resume it with its own options, or remove "
            "that folder to start afresh"
        )
    try:
        found = load_base(str(folder))
        dense = load_base(str(work_dir / _DENSE)).net if report.head_replaced else None
    except ModelError as error:
        raise ConfigError(
            f"the run in {work_dir} cannot be resumed: {error}; remove that folder to start afresh"
        ) from error
    return Progress(found.net, dense, found.plans, report)


def _claim(work_dir: Path, identity: dict[str, Any]) -> None:
    """Record the identity of the run in this folder, after removing the networks of another run."""
    if _recorded(work_dir) == identity:
        return
    for name in (_NETWORK, _DENSE):
        saving.check_output_folder(work_dir / name, overwrite=True)  # restores a folder that was being replaced
        shutil.rmtree(work_dir / name, ignore_errors=True)
    work_dir.mkdir(parents=True, exist_ok=True)
    draft = work_dir / f"{_RUN}.tmp"
    draft.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, work_dir / _RUN)


def _recorded(work_dir: Path) -> dict[str, Any] | None:
    """Return the identity recorded in this folder, or None where there is none that can be read."""
    try:
        found = json.loads((work_dir / _RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
