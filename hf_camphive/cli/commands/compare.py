"""`camphive compare`: criteria, merge rules and ratios side by side over several seeds."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from hf_camphive.cli.arguments import config_from, config_options, option, parse, split_list, split_numbers
from hf_camphive.cli.inputs import DataArguments, ModelArguments, check_stream, dataset_name, load_data, load_model
from hf_camphive.cli.output import log_to_terminal, relative, short_name

# A comparison has ratios of MACs in place of budgets, cuts channels, and counts its seeds.
NOT_COMPARED = (
    *("target_macs", "target_params", "target_latency", "latency_batch_size", "latency_folded"),
    *("granularity", "sparsity", "seed"),
)


@dataclass
class CompareArguments:
    """Which runs; several values are separated by commas, and every combination is run."""

    methods: str = option(
        "merge-aware,fisher,magnitude", "Criteria to compare: choices of --criterion of `camphive prune`."
    )
    merge: str = option("reconstruct", "Merge rules.")
    ratios: str = option("1.5,2.1,2.6,4.2", "How many times fewer MACs.")
    seeds: int = option(3, "Number of runs of each, with other calibration images and random numbers.")
    cycles: str = option("1", "Numbers of cycles.")
    calibration_size: str = option("1024", "Numbers of calibration images.")
    output_dir: str | None = option(
        None,
        "Folder of results.json, .csv, .md and .png; outputs/<model>-comparison by default. Runs whose results are "
        "there already are not repeated, so the same command goes on with a comparison that was interrupted.",
    )


def compare(arguments: Sequence[str]) -> None:
    """Compare criteria, merge rules and ratios over several seeds; resumable, with a table and a plot.

    Raises:
        CampHiVeError: Options cannot work, or the network, the dataset or the folder cannot be used.
    """
    settings = config_options(without=("criterion", *vars(CompareArguments()), *NOT_COMPARED), num_train_epochs=0.0)
    model, data, asked, chosen = parse(compare, arguments, ModelArguments, DataArguments, CompareArguments, settings)
    check_stream(data, chosen)

    from hf_camphive.runs.comparison import Comparison, grid

    cells = grid(
        methods=split_list(asked.methods),
        merges=split_list(asked.merge),
        ratios=split_numbers("ratios", asked.ratios, float),
        seeds=asked.seeds,
        cycles=split_numbers("cycles", asked.cycles, int),
        calibration_sizes=split_numbers("calibration-size", asked.calibration_size, int),
    )
    base = load_model(model)
    described = {**asdict(data), "dataset": dataset_name(model, data)}
    del described["dataloader_num_workers"]  # changes nothing but time
    folder = asked.output_dir or f"outputs/{short_name(model.model)}-comparison"
    config = config_from(chosen, target_macs=0.5)  # each run has its own
    comparison = Comparison(base, config, lambda run: load_data(model, data, base.net, run), folder, data=described)
    log_to_terminal(comparison.accelerator.is_local_main_process)
    results = comparison.run(cells)
    if comparison.accelerator.is_main_process:
        print(f"\n{results.to_markdown()}\nThis table, the rows and a plot are in {relative(comparison.folder)}")
