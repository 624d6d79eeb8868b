"""The command line: `camphive prune | inspect | evaluate | expand | compare`, and the same job for `accelerate launch scripts/prune.py`.

Arguments -> config -> pruner; prints what a user should see. The only file that prints.
"""

import logging
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hf_camphive.cli.arguments import (
    DEMO,
    CompareArguments,
    DataArguments,
    ExpandArguments,
    ModelArguments,
    RunArguments,
    config_from,
    config_options,
    listed,
    numbers,
    parse,
    preset_options,
)
from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import CampHiVeError, ConfigError, ModelError, PlanError
from hf_camphive.core.runtime import keep_freed_memory

USAGE = """usage: camphive {prune,inspect,evaluate,expand,compare} [options]

Make image classifiers from the Hugging Face Hub smaller for real.

  prune      score, merge, cut, finetune and save; without options, the demo
  inspect    show a network's channel groups, what they cost, and what cannot be cut and why
  evaluate   top-1, top-5, MACs and latency of any model on a dataset
  expand     widen channel groups without changing the function, to train and prune again
  compare    methods, merge rules and ratios side by side over several seeds: table and plot

camphive COMMAND --help lists the options of a command.
"""
NOT_COMPARED = ("target_macs", "target_params", "target_latency", "latency_batch_size", "latency_folded")
NOT_COMPARED += ("granularity", "sparsity", "seed")  # a comparison has ratios of MACs, and counts its seeds
BUNDLED_DATASET = "digits"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `camphive`; returns the exit code: 0, or 2 on an error that the user can mend."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"prune": prune, "inspect": inspect, "evaluate": evaluate, "expand": expand, "compare": compare}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if arguments[0] not in commands:
        print(USAGE, file=sys.stderr)
        print(f"error: there is no command {arguments[0]!r}", file=sys.stderr)
        return 2
    return _guarded(commands[arguments[0]], arguments[1:])


def prune_main() -> int:
    """Entry point of `scripts/prune.py`."""
    return _guarded(prune, sys.argv[1:])


def _guarded(command: Any, arguments: Sequence[str]) -> int:
    keep_freed_memory()
    try:
        command(arguments)
    except CampHiVeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def prune(arguments: Sequence[str]) -> None:
    """Prune a network, finetune it, save it, and print the report; without options, the demo (`make demo`)."""
    model, data, run, config = _prune_arguments(arguments)
    if run.push_to_hub and not run.hub_model_id:
        raise ConfigError("--push-to-hub needs to know where: add --hub-model-id user/name")
    if data.streaming and config.num_train_epochs and not data.max_train_samples:
        raise ConfigError("--streaming: an epoch of a stream has no end; add --max-train-samples, or --epochs 0")
    if run.dry_run and (run.push_to_hub or run.resume):
        raise ConfigError("--dry-run only plans: there is nothing to push or to resume; leave that option out")

    if run.dry_run and not config.cuts_channels:
        raise ConfigError("--dry-run: granularity 'weight' cuts nothing that a plan could show; leave that option out")

    from hf_camphive.core.runtime import Workers, make_accelerator
    from hf_camphive.hub.saving import check_output_folder, push_folder
    from hf_camphive.runs.pruner import CampHiVePruner

    output = run.output_dir or f"outputs/{_short(model.model)}-camphive"
    overwrite = run.overwrite and not run.dry_run  # a plan would not fit a model found there
    accelerator = make_accelerator(config)
    output = Workers(accelerator).on_main(lambda: check_output_folder(output, overwrite))
    work = _work_folder(output, may_hold_state=run.resume or run.overwrite or run.dry_run)
    pruner = CampHiVePruner(_load(model), config, accelerator)
    _log_to_terminal(pruner.accelerator.is_local_main_process)
    pruner.check_budget()
    loaders = _loaders(model, data, pruner.base.net, config)
    if run.dry_run:
        _dry_run(pruner, loaders, output)
        return

    if pruner.accelerator.is_main_process and not run.resume:
        shutil.rmtree(work, ignore_errors=True)
    pruner.accelerator.wait_for_everyone()
    with _resumable(work):
        report = pruner.run(loaders, command=_command_line(arguments), work_dir=work, resume=run.resume)
        folder = pruner.save_pretrained(output, overwrite=run.overwrite)
    if not pruner.accelerator.is_main_process:
        return
    shutil.rmtree(work, ignore_errors=True)
    print(f"\n{report.table()}\n")
    shown = _relative(folder)
    print(f"model  {shown}/model.safetensors\ncard   {shown}/README.md\nplots  {shown}/plots/\n")
    print(f'Load it with\n\n    import hf_camphive\n    model = hf_camphive.from_pretrained("{shown}")\n')
    if run.push_to_hub:
        print(f"Pushed to {push_folder(folder, run.hub_model_id, private=run.hub_private_repo or None)}")


def _prune_arguments(arguments: Sequence[str]) -> tuple[ModelArguments, DataArguments, RunArguments, Any]:
    """Parse the options of `prune`; those of the demo where none says what to prune, on what, or how."""
    kinds = (ModelArguments, DataArguments, RunArguments, preset_options(), config_options())
    model, data, run, preset, options = parse(prune, arguments, *kinds)
    if (model, data, preset, options) == (ModelArguments(), DataArguments(), kinds[3](), kinds[4]()):
        return model, data, run, config_from(replace(options, **DEMO))
    return model, data, run, config_from(options)


def inspect(arguments: Sequence[str]) -> None:
    """Print a network's channel groups with their share of MACs and parameters, and what is frozen and why."""
    (model,) = parse(inspect, arguments, ModelArguments)

    import torch

    from hf_camphive.core.measures import format_count
    from hf_camphive.network.graph.blocks import droppable_branches, exterior_groups
    from hf_camphive.network.graph.program import named_tensors
    from hf_camphive.network.graph.tracing import trace_network
    from hf_camphive.network.surgery.verification import check_groups

    base = _load(model)
    trace = trace_network(base.net, tuple(base.net.pretrained_cfg["input_size"]))
    trace = check_groups(base.net, trace, torch.Generator().manual_seed(0))
    sizes = {name: tensor.numel() for name, tensor in named_tensors(base.net).items()}
    macs = {name: count * sizes[name] for name, count in trace.positions.items()}
    parameters = {name: p.numel() for name, p in base.net.named_parameters()}
    exterior = exterior_groups(trace)
    widest = max(group.size for group in trace.groups)
    rows = [("group", "channels", "MACs", "parameters", "width")]
    for group in trace.groups:
        touched = {slot.tensor for slot in group.slots}
        remark = f"frozen: {group.frozen}" if group.frozen else "between blocks" if group.name in exterior else ""
        bar = ("░" if group.frozen else "█") * max(1, round(16 * group.size / widest))
        rows.append(
            (
                group.name,
                str(group.size),
                f"{sum(macs.get(name, 0) for name in touched) / sum(macs.values()):.1%}",
                f"{sum(parameters.get(name, 0) for name in touched) / sum(parameters.values()):.1%}",
                f"{bar:<16}  {remark}",
            )
        )
    print(f"{base.architecture}: {len(trace.groups)} groups, input {'x'.join(map(str, trace.input_size))}")
    print(f"{format_count(sum(macs.values()))} MACs per image, {format_count(sum(parameters.values()))} parameters\n")
    print(_table(rows))
    branches = droppable_branches(trace)
    print("\nShares are of the layers that a group touches; a layer between two groups counts for both.")
    print(f"Residual branches that can be dropped whole: {', '.join(b.module for b in branches) or 'none'}")


def evaluate(arguments: Sequence[str]) -> None:
    """Print the accuracy and the cost of a model."""
    model, data = parse(evaluate, arguments, ModelArguments, DataArguments)

    from hf_camphive.core.runtime import Workers, environment, make_accelerator
    from hf_camphive.hub.report import Stage, stages_table
    from hf_camphive.network.footprint import footprint, measure_latency
    from hf_camphive.training.evaluation import evaluate_accuracy

    config = CampHiVeConfig()
    base = _load(model)
    accelerator = make_accelerator(config)
    loaders = _loaders(model, data, base.net, config)
    net = base.net.to(accelerator.device)
    if net.num_classes != len(loaders.info.label_names):
        raise ConfigError(
            f"the network has {net.num_classes} classes, the dataset {len(loaders.info.label_names)}; give a dataset "
            "that the network was trained for"
        )
    loader, split = loaders.evaluation
    accuracy = evaluate_accuracy(net, loader, accelerator, split)
    size = tuple(net.pretrained_cfg["input_size"])
    latency = Workers(accelerator).on_main(lambda: measure_latency({"model": net}, size))["model"]
    if accelerator.is_main_process:
        stage = Stage(_short(model.model), footprint(net, size, latency), accuracy)
        print(stages_table([stage], environment(accelerator.device, accelerator.num_processes)))


def expand(arguments: Sequence[str]) -> None:
    """Split the channels of some groups into copies, leave the function as it is, and save the wider network."""
    if arguments and not arguments[0].startswith("-"):  # camphive expand MODEL
        arguments = ["--model", *arguments]
    model, options = parse(expand, arguments, ModelArguments, ExpandArguments)
    if options.groups and options.from_report:
        raise ConfigError("--groups and --from both say what to widen; leave one of them out")

    import torch

    from hf_camphive.core.measures import format_count, published
    from hf_camphive.hub.saving import check_output_folder, save_expanded
    from hf_camphive.network.footprint import count_macs, count_parameters
    from hf_camphive.network.graph.tracing import trace_network
    from hf_camphive.network.surgery.verification import check_groups
    from hf_camphive.network.surgery.widening import Expansion
    from hf_camphive.network.surgery.widening import expand as widen

    output = check_output_folder(options.output_dir or f"outputs/{_short(model.model)}-wide", options.overwrite)
    _log_to_terminal(main_process=True)
    names = (
        _bottlenecks(Path(options.from_report)) if options.from_report else options.groups and listed(options.groups)
    )
    base = _load(model)
    size = tuple(base.net.pretrained_cfg["input_size"])
    trace = check_groups(base.net, trace_network(base.net, size), torch.Generator().manual_seed(options.seed))
    net, widenings = widen(base.net, trace, options.factor, names, spread=options.spread, seed=options.seed)
    record = Expansion(
        model_id=published(base.model_id),
        license=base.license,
        factor=options.factor,
        spread=options.spread,
        seed=options.seed,
        macs_before=count_macs(base.net, size),
        macs_after=count_macs(net, size),
        parameters_before=count_parameters(base.net),
        parameters_after=count_parameters(net),
        widenings=widenings,
    )
    folder = save_expanded(output, net, base, base.plans, record, options.overwrite)
    rows = [
        ("group", "channels", "widened to", ""),
        *((w.group, str(w.size), str(len(w.sources)), "") for w in widenings),
    ]
    print(_table(rows))
    print(f"\nMACs per image: {format_count(record.macs_before)} -> {format_count(record.macs_after)}")
    print(f"parameters: {format_count(record.parameters_before)} -> {format_count(record.parameters_after)}")
    shown = _relative(folder)
    print(f"\nThe function is the same. The model is in {shown}: train it, then camphive prune --model {shown}")


def _bottlenecks(folder: Path) -> list[str]:
    """The bottlenecks that the report in a pruned model's folder names."""
    from hf_camphive.hub.report import REPORT_FILE, PruneReport

    path = folder / REPORT_FILE
    try:
        report = PruneReport.from_json(path.read_bytes())
    except OSError as error:
        raise ModelError(f"there is no {path}; give --from the folder of a model that camphive prune saved") from error
    names = [row.group for row in report.pruning_ratios() if row.bottleneck]
    if not names:
        raise PlanError(f"the report in {folder} names no bottleneck; say what to widen with --groups")
    return names


def compare(arguments: Sequence[str]) -> None:
    """Compare criteria, merge rules and ratios over several seeds; resumable, with a table and a plot."""
    elsewhere = ("criterion", *vars(CompareArguments()), *NOT_COMPARED)
    settings = config_options(without=elsewhere, num_train_epochs=0.0)
    model, data, asked, chosen = parse(compare, arguments, ModelArguments, DataArguments, CompareArguments, settings)
    if data.streaming and chosen.num_train_epochs and not data.max_train_samples:
        raise ConfigError("--streaming: an epoch of a stream has no end; add --max-train-samples, or --epochs 0")

    from hf_camphive.runs.comparison import Comparison, grid

    cells = grid(
        methods=listed(asked.methods),
        merges=listed(asked.merge),
        ratios=numbers("ratios", asked.ratios, float),
        seeds=asked.seeds,
        cycles=numbers("cycles", asked.cycles, int),
        calibration_sizes=numbers("calibration-size", asked.calibration_size, int),
    )
    base = _load(model)
    described = {**asdict(data), "dataset": data.dataset or _usual_dataset(model.model)}
    del described["dataloader_num_workers"]  # changes nothing but time
    folder = asked.output_dir or f"outputs/{_short(model.model)}-comparison"
    config = config_from(chosen, target_macs=0.5)  # each run has its own
    comparison = Comparison(base, config, lambda run: _loaders(model, data, base.net, run), folder, data=described)
    _log_to_terminal(comparison.accelerator.is_local_main_process)
    results = comparison.run(cells)
    if comparison.accelerator.is_main_process:
        print(f"\n{results.to_markdown()}\nThis table, the rows and a plot are in {_relative(comparison.folder)}")


def _work_folder(output: Path, may_hold_state: bool) -> Path:
    """Return the folder beside `output` that keeps the state of a run.

    Raises:
        ConfigError: It holds the state of a run that was cut off, which a new run would discard.
    """
    from hf_camphive.runs.progress import has_state

    work = output.with_name(f".{output.name}.work")
    if has_state(work) and not may_hold_state:
        raise ConfigError(
            f"a run that was cut off left its state in {_relative(work)}; go on with --resume, or start afresh with "
            "--overwrite, which discards it"
        )
    return work


@contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Handle an error that the user can correct, in a run that keeps its state in a folder.

    State that was kept stays, and the error says how to go on from it; a `ConfigError` is about that state itself and
    says so already. Where nothing was kept, the folder and those above it that were made within are removed.

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
                f"{error}; what the run did so far is kept in {_relative(folder)}: fix this and add --resume, or start "
                "afresh with --overwrite"
            ) from error
        if folder in made:
            shutil.rmtree(folder, ignore_errors=True)
        for path in made[1:]:
            with suppress(OSError):  # not empty, or removed by another process
                path.rmdir()
        raise


def _dry_run(pruner: Any, loaders: Any, output: Path) -> None:
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
    print(f"\nNothing was changed. The plan is in {_relative(path)}")


def _load(model: ModelArguments) -> Any:
    from hf_camphive.hub.loading import load_base

    return load_base(model.model, model.checkpoint)


def _loaders(model: ModelArguments, data: DataArguments, net: Any, config: Any) -> Any:
    from hf_camphive.training.data.loaders import DataOptions, load_loaders

    options = DataOptions(
        config_name=data.dataset_config_name,
        image_column=data.image_column_name,
        label_column=data.label_column_name,
        streaming=data.streaming,
        workers=data.dataloader_num_workers,
        max_train_samples=data.max_train_samples,
        max_eval_samples=data.max_eval_samples,
    )
    return load_loaders(data.dataset or _usual_dataset(model.model), net, config, options)


def _usual_dataset(model: str) -> str:
    if model.startswith("digits_"):
        return BUNDLED_DATASET
    return "cifar10" if model.startswith("cifar_") else "imagenet-1k"


def _log_to_terminal(main_process: bool) -> None:
    from transformers.utils.logging import disable_progress_bar

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hf_camphive").setLevel(logging.INFO if main_process else logging.ERROR)
    disable_progress_bar()  # those of reading and writing a file of some MB


def _short(model: str) -> str:
    return Path(model).name.partition("@")[0]


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _command_line(arguments: Sequence[str]) -> str:
    """How this run was started, without the folders of this machine."""
    start = ["python", "scripts/prune.py"] if Path(sys.argv[0]).name == "prune.py" else ["camphive", "prune"]
    return shlex.join([*start, *map(_without_folders, arguments)])


def _without_folders(argument: str) -> str:
    from hf_camphive.core.measures import published

    option, equals, value = argument.rpartition("=")
    return f"{option}{equals}{published(value)}"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *middle, remark = row
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(middle, widths[1:])), remark]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
