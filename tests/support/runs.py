"""Short whole runs on the bundled digits, and ways to kill them."""

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.runs import cycle as steps
from hf_camphive.runs import pruner
from hf_camphive.runs.pruner import CampHiVePruner
from hf_camphive.training import checkpoints
from hf_camphive.training import finetuning as training
from hf_camphive.training.data.loaders import DataOptions, load_loaders

CONFIG = CampHiVeConfig(
    calibration_size=64, num_train_epochs=0, mixed_precision="no", curvature_images=16, polish_steps=0
)


class Killed(BaseException):
    """Stands for whatever ends a process: not an error that anything catches."""


def digits(net, config=CONFIG):
    return load_loaders("digits", net, config, DataOptions(workers=0, max_train_samples=256, max_eval_samples=100))


def pruned(config=CONFIG, model="digits_resnet", **options) -> CampHiVePruner:
    """A pruner that has run."""
    job = CampHiVePruner(model, config)
    job.run(digits(job.base.net, config), **options)
    return job


def kill_after(monkeypatch, owner, name, count):
    """Let `owner.name` do its work `count` times, and end the process after that."""
    real, calls = getattr(owner, name), []

    def deadly(*args, **kwargs):
        found = real(*args, **kwargs)
        calls.append(name)
        if len(calls) == count:
            raise Killed
        return found

    monkeypatch.setattr(owner, name, deadly)


KILLS = {
    "before the first cycle": (pruner, "save_progress", 1),
    "after the first cycle": (pruner, "save_progress", 2),
    "before the second cycle is kept": (steps, "apply_plan", 2),
    "after the last cycle": (pruner, "save_progress", 3),
    "before finetuning": (pruner, "save_progress", 4),
    "in the first epoch": (training._Trainer, "run_epoch", 1),
    "after the first epoch": (checkpoints.CheckpointStore, "save", 1),
    "after finetuning": (pruner, "finetune", 1),
}
