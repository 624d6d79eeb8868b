"""`camphive expand`: widen channel groups without changing the function, to train and prune again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_camphive.cli.arguments import option, parse, split_list
from hf_camphive.cli.inputs import ModelArguments, load_model
from hf_camphive.cli.output import format_table, log_to_terminal, relative, short_name
from hf_camphive.core.errors import ConfigError, ModelError, PlanError


@dataclass
class ExpandArguments:
    """What to widen, and how far."""

    factor: float = option(2.0, "Channels of a widened group, relative to its present number.")
    groups: str | None = option(
        None,
        "Channel groups to widen, by name and separated by commas (see camphive inspect); by default all that can be.",
    )
    from_report: str | None = option(
        None, "Folder of a pruned model: widen the bottlenecks that its report names.", aliases=["--from"]
    )
    spread: float = option(
        0.2,
        "Relative difference between the weights that a channel's copies get, so that training can tell them apart.",
    )
    seed: int = option(0, "Seed of the choice of channels and of those weights.")
    output_dir: str | None = option(None, "Folder of the widened model; outputs/<model>-wide by default.")
    overwrite: bool = option(False, "Replace the model in the output folder, if there is one.")


def expand(arguments: Sequence[str]) -> None:
    """Split the channels of some groups into copies, which leaves the function as it is, and save the wider network.

    Raises:
        ConfigError: Options contradict one another.
        ModelError: The network, or the report that names bottlenecks, cannot be read.
        PlanError: A group cannot be widened, or there is no bottleneck.
        OutputError: The output folder must not be written.
    """
    if arguments and not arguments[0].startswith("-"):  # camphive expand MODEL
        arguments = ["--model", *arguments]
    model, options = parse(expand, arguments, ModelArguments, ExpandArguments)
    if options.groups and options.from_report:
        raise ConfigError("--groups and --from both say what to widen; leave one of them out")

    from hf_camphive.core.config import CampHiVeConfig
    from hf_camphive.core.runtime import Workers, make_accelerator
    from hf_camphive.hub.saving import check_output_folder, save_expanded

    workers = Workers(make_accelerator(CampHiVeConfig()))
    folder = options.output_dir or f"outputs/{short_name(model.model)}-wide"
    output = workers.on_main(lambda: check_output_folder(folder, options.overwrite))
    log_to_terminal(workers.is_main)
    names = _group_names(options)
    base = load_model(model)
    net, record = _widen(base, names, options)
    saved = workers.on_main(lambda: save_expanded(output, net, base, base.plans, record, options.overwrite))
    if workers.is_main:
        _print_outcome(record, relative(saved))


def _print_outcome(record: Any, folder: Path) -> None:
    from hf_camphive.core.measures import format_count

    rows = [(w.group, str(w.size), str(len(w.sources)), "") for w in record.widenings]
    print(format_table([("group", "channels", "widened to", ""), *rows]))
    print(f"\nMACs per image: {format_count(record.macs_before)} -> {format_count(record.macs_after)}")
    print(f"parameters: {format_count(record.parameters_before)} -> {format_count(record.parameters_after)}")
    print(f"\nThe function is the same. The model is in {folder}: train it, then camphive prune --model {folder}")


def _widen(base: Any, names: Sequence[str] | None, options: ExpandArguments) -> tuple[Any, Any]:
    """Return the widened network and the record of its widening."""
    from hf_camphive.core.measures import published
    from hf_camphive.network.analysis import NetworkAnalysis
    from hf_camphive.network.footprint import count_macs, count_parameters
    from hf_camphive.network.surgery.widening import Expansion
    from hf_camphive.network.surgery.widening import expand as widen
    from hf_camphive.network.timm_interface import input_size

    size = input_size(base.net)
    trace = NetworkAnalysis.of(base.net, size, options.seed).trace
    net, widenings = widen(base.net, trace, options.factor, names, spread=options.spread, seed=options.seed)
    return net, Expansion(
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


def _group_names(options: ExpandArguments) -> list[str] | None:
    if options.from_report:
        return _bottlenecks(Path(options.from_report))
    return split_list(options.groups) if options.groups else None


def _bottlenecks(folder: Path) -> list[str]:
    """Return the bottlenecks that the report in a pruned model's folder names.

    Raises:
        ModelError: The folder holds no report.
        PlanError: The report names no bottleneck.
    """
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
