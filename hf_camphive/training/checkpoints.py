"""Checkpoints of a training run: one folder per epoch; only the newest complete one is kept."""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from hf_camphive.core.errors import ConfigError, TrainingError
from hf_camphive.core.measures import format_share
from hf_camphive.training.precision import Precision

logger = logging.getLogger(__name__)

PROGRESS_FILE = "progress.json"
_DAMAGED = (OSError, EOFError, RuntimeError, KeyError, TypeError, ValueError, UnpicklingError, SafetensorError)


@dataclass(frozen=True)
class EpochLog:
    """Measurements of one epoch.

    `epoch` counts epochs from the start of training and is fractional where the last one is cut short. `loss` is the mean
    training loss over the epoch's images, `learning_rate` the rate of its last step, `seconds` its wall-clock time.
    `validation_top1` is a share in [0, 1], or None without a validation split.
    """

    epoch: float
    loss: float
    learning_rate: float
    validation_top1: float | None
    seconds: float

    def __str__(self) -> str:
        top1 = "" if self.validation_top1 is None else f", validation top-1 {format_share(self.validation_top1)}"
        return f"loss {self.loss:.3g}{top1}, {self.seconds:.1f} s"


@dataclass(frozen=True)
class TrainingProgress:
    """State of a training run that Accelerate does not save itself.

    `fingerprint` identifies the run (`_Trainer.fingerprint`), `steps` counts optimizer steps, and `generator` is the state
    of the generator that shuffles the training images, in base64 (None without one).
    """

    fingerprint: dict[str, Any]
    precision: Precision
    steps: int
    epochs: tuple[EpochLog, ...]
    generator: str | None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainingProgress":
        """Rebuild the state from the JSON values that `dataclasses.asdict` gave."""
        return cls(**{**values, "epochs": tuple(EpochLog(**epoch) for epoch in values["epochs"])})


@dataclass(frozen=True)
class CheckpointStore:
    """Store for the newest complete checkpoint of a run.

    A checkpoint is written into a draft folder and renamed when it is complete; older ones are deleted afterwards. All
    processes call `save` and `load` together.
    """

    folder: Path
    accelerator: Accelerator

    def newest(self) -> Path | None:
        """Return the folder of the newest complete checkpoint, or None where there is none."""
        return max(self.folder.glob("epoch-*"), key=lambda path: int(path.name.partition("-")[2]), default=None)

    def save(self, progress: TrainingProgress) -> None:
        """Save everything that Accelerate prepared, and `progress`, as the newest checkpoint."""
        draft, final = self.folder / "unfinished", self.folder / f"epoch-{len(progress.epochs)}"
        if self.accelerator.is_main_process:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(draft))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (draft / PROGRESS_FILE).write_text(json.dumps(asdict(progress)))
            shutil.rmtree(final, ignore_errors=True)
            draft.rename(final)
            for old in set(self.folder.glob("epoch-*")) - {final}:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def load(self, checkpoint: Path, fingerprint: Mapping[str, Any]) -> TrainingProgress | None:
        """Restore everything that Accelerate prepared from a checkpoint, and return the rest of the run's state.

        Where only the learning rate differs, nothing is restored and None is returned: whoever lowers the rate of a run that
        diverged wants neither the weights nor the moments of the higher one.

        Raises:
            ConfigError: The checkpoint belongs to a run with another fingerprint.
            TrainingError: The checkpoint is damaged.
        """
        try:
            progress = TrainingProgress.from_dict(json.loads((checkpoint / PROGRESS_FILE).read_text()))
            before = progress.fingerprint
            if differing := sorted(
                k for k in before.keys() | fingerprint.keys() if before.get(k) != fingerprint.get(k)
            ):
                if differing == ["learning_rate"]:
                    logger.warning(
                        "the checkpoint %s is of a learning rate of %g; finetuning starts afresh with %g",
                        checkpoint,
                        before["learning_rate"],
                        fingerprint["learning_rate"],
                    )
                    return None
                raise ConfigError(
                    f"the checkpoint {checkpoint} is of a run with other settings ({', '.join(differing)}); "
                    "resume with the same command, or delete that folder to finetune afresh"
                )
            self.accelerator.load_state(str(checkpoint))
        except _DAMAGED as error:
            if isinstance(error, ConfigError):
                raise
            raise TrainingError(
                f"the checkpoint {checkpoint} cannot be read ({type(error).__name__}: {error}); "
                "delete it to start finetuning afresh"
            ) from error
        return progress
