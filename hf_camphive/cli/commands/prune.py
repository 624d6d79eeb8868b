"""`camphive prune`: plan, cut, finetune, save and push one network."""

import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_camphive.cli.arguments import config_from, config_options, option, parse, preset_options
from hf_camphive.cli.inputs import DataArguments, ModelArguments, check_stream, load_data, load_model
from hf_camphive.cli.output import log_to_terminal, relative, short_name
from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import CampHiVeError, ConfigError

DEMO: dict[str, Any] = {"target_latency": 0.45, "latency_batch_size": 32}
"""Settings of `camphive prune` where no option says what to prune, on what, or how."""


@dataclass
class RunArguments:
    """What to do with the result."""

    output_dir: str | None = option(None, "Folder of the pruned model; outputs/<model>-camphive by default.")
    overwrite: bool = option(
        False,
        "Replace the pruned model in the output folder; without --resume, discard what a run that was cut off kept.",
    )
    dry_run: bool = option(False, "Only plan: print the plan and write prune_plan.json into the output folder.")
    resume: bool = option(
        False, "Go on with a run that was killed or ended in an error, from its last finished cycle or epoch."
    )
    push_to_hub: bool = option(False, "Upload the result (log in with `hf auth login` first).")
    hub_model_id: str | None = option(None, "Repository to upload to: user/name.")
    hub_private_repo: bool = option(False, "Make the repository private if it is created.")


def prune(arguments: Sequence[str]) -> None:
    """Prune a network, finetune it, save it, and print the report; without options, the demo (`make demo`).

    Raises:
        CampHiVeError: Options contradict one another, or a step of the run fails for a reason that the user can correct.
    """
    model, data, run, config = prune_arguments(arguments)
    _check_together(data, run, config)

    from hf_camphive.core.runtime import Workers, make_accelerator
    from hf_camphive.hub.saving import check_output_folder
    from hf_camphive.runs.pruner import CampHiVePruner

    folder = run.output_dir or f"outputs/{short_name(model.model)}-camphive"
    overwrite = run.overwrite and not run.dry_run  # a plan would not fit a model found there
    accelerator = make_accelerator(config)
    output = Workers(accelerator).on_main(lambda: check_output_folder(folder, overwrite))
    work = _work_folder(output, may_hold_state=run.resume or run.overwrite or run.dry_run)
    pruner = CampHiVePruner(load_model(model), config, accelerator)
    log_to_terminal(pruner.accelerator.is_local_main_process)
    pruner.check_budget()
    loaders = load_data(model, data, pruner.base.net, config)
    if run.dry_run:
        _plan_only(pruner, loaders, output)
        return
    if pruner.accelerator.is_main_process and not run.resume:
        shutil.rmtree(work, ignore_errors=True)
    pruner.accelerator.wait_for_everyone()
    with _resumable(work):
        pruner.run(loaders, command=_command_line(arguments), work_dir=work, resume=run.resume)
        saved = pruner.save_pretrained(output, overwrite=run.overwrite)
    if pruner.accelerator.is_main_process:
        shutil.rmtree(work, ignore_errors=True)
        _print_outcome(pruner, saved, run)


def prune_arguments(arguments: Sequence[str]) -> tuple[ModelArguments, DataArguments, RunArguments, CampHiVeConfig]:
    """Parse the options of `prune`; where none says what to prune, on what, or how, the settings are those of the demo."""
    preset_kind, config_kind = preset_options(), config_options()
    kinds = (ModelArguments, DataArguments, RunArguments, preset_kind, config_kind)
    model, data, run, preset, options = parse(prune, arguments, *kinds)
    if (model, data, preset, options) == (ModelArguments(), DataArguments(), preset_kind(), config_kind()):
        options = replace(options, **DEMO)
    return model, data, run, config_from(options)


def _check_together(data: DataArguments, run: RunArguments, config: CampHiVeConfig) -> None:
    """Refuse options that contradict one another, before anything is loaded.

    Raises:
        ConfigError: Two options contradict one another.
    """
    if run.push_to_hub and not run.hub_model_id:
        raise ConfigError("--push-to-hub needs to know where: add --hub-model-id user/name")
    check_stream(data, config)
    if run.dry_run and (run.push_to_hub or run.resume):
        raise ConfigError("--dry-run only plans: there is nothing to push or to resume; leave that option out")
    if run.dry_run and not config.cuts_channels:
        raise ConfigError("--dry-run: granularity 'weight' cuts nothing that a plan could show; leave that option out")


def _plan_only(pruner: Any, loaders: Any, output: Path) -> None:
    from hf_camphive.core.plan import PLAN_FILE, plans_to_json

    plan = pruner.plan(loaders.calibration)
    if not pruner.accelerator.is_main_process:
        return
    output.mkdir(parents=True, exist_ok=True)
    path = output / PLAN_FILE
    path.write_text(plans_to_json([*pruner.base.plans, plan]), encoding="utf-8")
    print(plan.summary())
    if pruner.config.cycles > 1:
        print(f"This is the first of {pruner.config.cycles} cycles; later ones depend on the network that it leaves.")
    print(f"\nNothing was changed. The plan is in {relative(path)}")


def _work_folder(output: Path, may_hold_state: bool) -> Path:
    """Return the folder beside `output` that keeps the state of a run.

    Raises:
        ConfigError: It holds the state of a run that was cut off, which a new run would discard.
    """
    from hf_camphive.runs.progress import has_state

    work = output.with_name(f".{output.name}.work")
    if has_state(work) and not may_hold_state:
        raise ConfigError(
            f"a run that was cut off left its state in {relative(work)}; go on with --resume, or start afresh with "
            "--overwrite, which discards it"
        )
    return work


@contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Handle an error that the user can correct, in a run that keeps its state in a folder.

    State that was kept stays, and the error says how to go on from it; a `ConfigError` is about that state itself and
    says so already. Where nothing was kept, the folder and its parents that were made in the block are removed.

    Raises:
        CampHiVeError: The error that ended the run.
    """
    from hf_camphive.runs.progress import has_state

    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except CampHiVeError as error:
        if has_state(folder):
            if isinstance(error, ConfigError):
                raise
            raise type(error)(
                f"{error}; what the run did so far is kept in {relative(folder)}: fix this and add --resume, or start "
                "afresh with --overwrite"
            ) from error
        if folder in made:
            shutil.rmtree(folder, ignore_errors=True)
        for path in made[1:]:
            with suppress(OSError):  # not empty, or removed by another process
                path.rmdir()
        raise


def _print_outcome(pruner: Any, folder: Path, run: RunArguments) -> None:
    """Print the report and where the model is, and push it where that was asked for."""
    from hf_camphive.hub.saving import push_folder

    shown = relative(folder)
    print(f"\n{pruner.report.table()}\n")
    print(f"model  {shown}/model.safetensors\ncard   {shown}/README.md\nplots  {shown}/plots/\n")
    print(f'Load it with\n\n    import hf_camphive\n    model = hf_camphive.from_pretrained("{shown}")\n')
    if run.push_to_hub and run.hub_model_id:
        print(f"Pushed to {push_folder(folder, run.hub_model_id, private=run.hub_private_repo or None)}")


def _command_line(arguments: Sequence[str]) -> str:
    """Return the command that started this run, without the folders of this machine."""
    start = ["python", "scripts/prune.py"] if Path(sys.argv[0]).name == "prune.py" else ["camphive", "prune"]
    return shlex.join([*start, *map(_without_folders, arguments)])


def _without_folders(argument: str) -> str:
    from hf_camphive.core.measures import published

    name, equals, value = argument.rpartition("=")
    return f"{name}{equals}{published(value)}"
