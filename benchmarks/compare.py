"""Every method of ours and of torch-pruning on real networks: same weights, images, budgets, recalibration and finetuning.

    python benchmarks/compare.py --data FOLDER                     everything, which takes many hours
    python benchmarks/compare.py --data FOLDER --list              the runs, and which are done
    python benchmarks/compare.py --data FOLDER --only '2.1x .*seed=0$'     the chosen ones
    python benchmarks/compare.py --render                          docs/comparison.md from the kept results

FOLDER holds cifar10/, imagenet_sample/, imagenette/ (parquet) and weights/*.safetensors. Runs that are done are not
repeated, so a killed job goes on where it was; several processes may work on different runs at a time. Calibration
images are training images, or, where the dataset has one split only, disjoint from those tested.
torch-pruning's methods need `pip install "hf_camphive[benchmarks]"`.
"""

import argparse
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from networks import NETWORKS, Network, base_of, folder_of

from hf_camphive import CampHiVeConfig, DataOptions, load_loaders
from hf_camphive.core.errors import CampHiVeError
from hf_camphive.core.methods import MERGE_RULES
from hf_camphive.core.runtime import keep_freed_memory
from hf_camphive.pruning.scoring.criteria import SCORERS
from hf_camphive.runs.comparison import PLOT, RESULTS, TABLE, Comparison, Method, grid
from hf_camphive.runs.results import Cell, Results, Summary, by_ratio

DOCS = Path(__file__).parent.parent / "docs"
DEFAULT = CampHiVeConfig()
PEERS = [f"tp-{name}{scope}" for scope in ("", "-all") for name in ("magnitude", "group-norm", "lamp", "taylor")]


def reach(network: Network) -> tuple[Cell, ...]:
    """Our default, `merge-joint` and `fisher`, and torch-pruning with BatchNorm recalibrated and with our reconstruction given to its plan."""
    images = {"calibration_sizes": [network.calibration_size]}
    ours = grid([DEFAULT.scored_by, "merge-joint", "fisher"], [DEFAULT.merge, "none"], network.ratios, **images)
    return (*ours, *grid(PEERS, ["none", DEFAULT.merge], network.ratios, **images))


def ablation(network: Network) -> tuple[Cell, ...]:
    """Criterion x merge rule, and cycles x calibration images of the default, at one ratio."""
    if network.ablated_at is None:
        return ()
    ratio, size = [network.ablated_at], network.calibration_size
    rules = grid(SCORERS, MERGE_RULES, ratio, calibration_sizes=[size])
    default = [DEFAULT.scored_by], [DEFAULT.merge]
    return (*rules, *grid(*default, ratio, cycles=[1, 2, 4], calibration_sizes=[size // 4, size, 4 * size]))


JOBS: dict[str, Callable[[Network], tuple[Cell, ...]]] = {"reach": reach, "ablation": ablation}


def main() -> None:
    """Run what is asked for and not done yet, then render the page."""
    options = _parser().parse_args()
    keep_freed_memory()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hf_camphive.runs.comparison").setLevel(logging.INFO)
    results = options.output or DOCS / "results" / "compare"
    for name in options.network if options.data else ():
        cells = [cell for job in options.job for cell in JOBS[job](NETWORKS[name])]
        cells = [cell for cell in dict.fromkeys(cells) if re.search(options.only, str(cell))]
        if cells:
            comparison = open_comparison(name, options, results, _methods(cells))
            if options.list:
                done = comparison.results.done()
                print("\n".join(f"{'done' if cell in done else 'to do'}  {name} {cell}" for cell in cells))
            else:
                print(comparison.run(cells).to_markdown(), flush=True)
    if not options.list and options.output is None:
        (DOCS / "comparison.md").write_text(page(results), encoding="utf-8")


def open_comparison(
    name: str, options: argparse.Namespace, results: Path, methods: Mapping[str, Method]
) -> Comparison:
    """The comparison of a network, with what is kept of it; other polishing, and finetuning, stand in folders of their own."""
    network = NETWORKS[name]
    trained = f"_{options.polish_steps}_steps" if options.polish_steps else ""
    trained += f"_{options.epochs:g}_epochs" if options.epochs else ""
    base = base_of(network, options.data)
    dataset = folder_of(network, options.data)
    return Comparison(
        base,
        CampHiVeConfig(num_train_epochs=options.epochs, polish_steps=options.polish_steps),
        lambda config: load_loaders(dataset, base.net, config, DataOptions(max_eval_samples=options.max_eval_samples)),
        results / f"{name}{trained}",
        data={"dataset": network.dataset, "max_eval_samples": options.max_eval_samples},
        methods=methods,
    )


def page(results: Path) -> str:
    """docs/comparison.md: for each network the comparison at its ratios, then what makes the difference."""
    parts = [
        "# The comparison in full\n",
        "Written by `python benchmarks/compare.py --render` from the results kept in `docs/results/compare/`.\n",
        "- Figures are top-1 accuracies in %: the mean and the sample standard deviation over seeds, each with other "
        "calibration images.\n"
        "- `tp-...` are importances of torch-pruning 1.6.1, applied globally to the channel groups that our default scope "
        "prunes. `tp-...-all` prune every group but the classifier, as torch-pruning does by default.\n"
        "- With merge `none`, networks pruned by torch-pruning have BatchNorm recalibrated. With `reconstruct`, our "
        "reconstruction is applied to torch-pruning's plan.\n",
    ]
    for folder in sorted(path.parent for path in results.glob(f"*/{RESULTS}")):
        kept = Results.from_json((folder / RESULTS).read_text(encoding="utf-8"), str(folder / RESULTS))
        if kept.rows:
            parts += section(folder, kept)
    return "\n".join(parts)


def section(folder: Path, kept: Results) -> Iterable[str]:
    """One network of the page."""
    network = NETWORKS.get(folder.name)
    where = folder.relative_to(DOCS) if folder.is_relative_to(DOCS) else folder
    summaries = kept.summaries()
    yield f"## {title(kept.settings)}\n"
    yield f"![accuracy over MACs]({where}/{PLOT})\n"
    compared = {replace(cell, seed=0) for cell in reach(network)} if network else set()
    table = [summary for summary in summaries if not network or replace(summary.cell, seed=0) in compared]
    if table:
        yield by_ratio(table) + "\n"
    if network and network.ablated_at:
        at = [summary for summary in summaries if summary.cell.ratio == network.ablated_at]
        usual = [s for s in at if (s.cell.cycles, s.cell.calibration_size) == (1, network.calibration_size)]
        usual = [summary for summary in usual if summary.cell.method in SCORERS]
        yield f"Criterion x merge rule at {network.ablated_at:g}x, {network.calibration_size:,} images, one cycle:\n"
        yield matrix(usual, "method", "merge")
        default = [s for s in at if (s.cell.method, s.cell.merge) == (DEFAULT.scored_by, DEFAULT.merge)]
        yield f"Cycles x calibration images of `{DEFAULT.scored_by}` with `{DEFAULT.merge}` at the same ratio:\n"
        yield matrix(default, "cycles", "calibration_size")
    yield f"[Every stage, seconds and parameters]({where}/{TABLE})\n"


def title(settings: Mapping[str, Any]) -> str:
    """The network, and what follows the merge beside recalibration."""
    steps, epochs = settings["polish_steps"], settings["num_train_epochs"]
    after = [f"{steps} steps of polishing"] * bool(steps) + [f"{epochs:g} epochs of finetuning"] * bool(epochs)
    return f"{settings['architecture']} on {settings['dataset']}, {' and '.join(after) or 'no training'}"


def matrix(summaries: Iterable[Summary], down: str, across: str) -> str:
    """A Markdown table of top-1 at the end of each run over two fields of the cells."""
    found = {(getattr(s.cell, down), getattr(s.cell, across)): s.of(lambda row: row.final) for s in summaries}
    columns = sorted({column for _, column in found})
    lines = [[f"{down} \\ {across}".replace("_", " "), *map(str, columns)], ["---"] * (len(columns) + 1)]
    for line in sorted({line for line, _ in found}):
        cells = [found[line, column].percent() if (line, column) in found else "" for column in columns]
        lines.append([f"`{line}`", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _methods(cells: Iterable[Cell]) -> dict[str, Method]:
    """torch-pruning's methods, where a cell asks for one: it need not be installed for ours."""
    if not any(cell.method in PEERS for cell in cells):
        return {}
    try:
        import torch_pruning_peer
    except ImportError as error:
        raise SystemExit(f'{error}; pip install "hf_camphive[benchmarks]", or --only the others') from error
    return torch_pruning_peer.methods()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="folder of the datasets and weights")
    source.add_argument("--render", action="store_true", help="only write docs/comparison.md")
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="only these networks")
    parser.add_argument("--job", nargs="+", choices=JOBS, default=list(JOBS), help="only these jobs")
    parser.add_argument("--only", default="", help="regular expression that a run's name must match; see --list")
    parser.add_argument("--list", action="store_true", help="list the runs instead of running them")
    parser.add_argument("--epochs", type=float, default=0.0, help="epochs of finetuning (default: none)")
    parser.add_argument("--polish-steps", type=int, default=0, help="label-free steps after the cut (0)")
    parser.add_argument("--max-eval-samples", type=int, help="test images for a quick trial; needs --output")
    parser.add_argument("--output", type=Path, help="folder of the results, if not docs/results/compare")
    return parser


if __name__ == "__main__":
    try:
        main()
    except CampHiVeError as error:
        raise SystemExit(f"error: {error}") from error
