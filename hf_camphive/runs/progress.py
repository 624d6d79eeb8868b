"""What a run leaves behind so that a killed one can go on: the network after each cycle, and what was measured so far.

Kept as model folders like any other (no pickle). Beside them lie the block of an iteration that scores this network, and
the training state of the finetuning, and what the run was of: the network's weights and the dataset's rows.
"""

import json
import os
import shutil
from collections.abc import Sequence
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
_FREE = ("learning_rate",)  # only finetuning reads it, so that a run whose loss diverged can go on with a lower one


@dataclass(frozen=True)
class Progress:
    """A run's state between two steps. `dense` is kept only where its classifier was trained by the run itself."""

    net: nn.Module
    dense: nn.Module | None
    plans: tuple[PrunePlan, ...]
    report: PruneReport


def has_state(work_dir: Path) -> bool:
    """Whether a run has kept a network in this folder, be it one that a kill left set aside."""
    return (work_dir / _NETWORK).exists() or any(work_dir.glob(f".{_NETWORK}.old-*"))


def training_folder(work_dir: Path) -> Path:
    """Where a run keeps the training state of its finetuning."""
    return work_dir / _TRAINING


@dataclass(frozen=True)
class IterationCheckpoint:
    """Where an iteration for eigenvectors stands, for the network that `save_progress` kept last.

    All processes read it, and the one with `writes` set writes it.
    """

    work_dir: Path
    writes: bool = True

    def load(self) -> SolverState | None:
        """The last state, or None. Raises `ConfigError` where the file is damaged."""
        path = self.work_dir / _ITERATION
        try:
            return load_file(path) if path.exists() else None
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{path} cannot be read ({error}); remove it, and the iteration starts afresh"
            ) from error

    def save(self, state: SolverState) -> None:
        """Replace the last state whole."""
        if self.writes:
            path = self.work_dir / _ITERATION
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)


def run_identity(base: BaseModel, info: DatasetInfo) -> dict[str, str | int | None]:
    """Return what a run is of, beside its config: the weights that it starts from, and which rows serve which role.

    Of the images only the labels are compared; pixels would have to be read for it.
    """
    of_rows = {"split": info.splits, "rows": info.rows, "labels": info.label_digests}
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
    """Write the state of a run, replacing the last one whole; the dense network goes first, so both are there or none."""
    Path(work_dir, _ITERATION).unlink(missing_ok=True)  # it was that of the network before
    _claim(work_dir, identity)
    nets: Sequence[tuple[str, nn.Module, tuple[PrunePlan, ...]]] = [(_NETWORK, progress.net, progress.plans)]
    if progress.dense is not None:
        nets = [(_DENSE, progress.dense, ()), *nets]
    for name, net, plans in nets:
        model = saving.PrunedModel(net, base, config, plans, progress.report)
        saving.save_folder(work_dir / name, model, overwrite=True)


def put_back(work_dir: Path) -> None:
    """Put back the model folders that a killed run was replacing; for one process, before any reads them.

    Raises:
        OutputError: Where something else stands in their place.
    """
    for name in (_NETWORK, _DENSE):
        saving.check_output_folder(work_dir / name, overwrite=True)


def load_progress(work_dir: Path, config: CampHiVeConfig, identity: dict[str, Any]) -> Progress | None:
    """Read the state of a killed run, after `put_back`; None where it had kept nothing.

    Raises:
        ConfigError: That run was another one: another config (save the learning rate), network or dataset. Or its state
            is damaged, or of a version that did not record what it was of.
    """
    folder = work_dir / _NETWORK
    if not folder.exists():
        return None
    before = _recorded(work_dir)
    if before is None:
        raise ConfigError(
            f"the run in {work_dir} has no {_RUN} that can be read, so that whether it is the same model and dataset "
            "cannot be checked; remove that folder to start afresh"
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
    """Record what the run in this folder is of; networks of another run go first, so that the two never mix."""
    if _recorded(work_dir) == identity:
        return
    for name in (_NETWORK, _DENSE):
        saving.check_output_folder(work_dir / name, overwrite=True)  # puts back what a kill left aside
        shutil.rmtree(work_dir / name, ignore_errors=True)
    work_dir.mkdir(parents=True, exist_ok=True)
    draft = work_dir / f"{_RUN}.tmp"
    draft.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, work_dir / _RUN)


def _recorded(work_dir: Path) -> dict[str, Any] | None:
    """What the state in this folder is of, or None where nothing says so."""
    try:
        found = json.loads((work_dir / _RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
