"""Comparing methods: a grid of runs on one network, each from the dense weights, kept as it comes and never run twice.

Every run is the pruner's own; only what they can share is shared: the network, the images, and the scores of the dense
network, which do not depend on what is done with them. A method that is not in `SCORERS` is a function that makes a plan.
"""

import copy
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from filelock import FileLock
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import (
    ConfigError,
    OutputError,
    PlanError,
    ReconstructionError,
    TrainingError,
    did_you_mean,
)
from hf_camphive.core.measures import Accuracy, format_share, published
from hf_camphive.core.methods import MERGE_RULES
from hf_camphive.core.plan import PrunePlan
from hf_camphive.core.runtime import environment, make_accelerator
from hf_camphive.hub.loading import BaseModel, weights_fingerprint
from hf_camphive.hub.plots import DPI
from hf_camphive.network.footprint import count_macs, count_parameters
from hf_camphive.network.graph.tracing import Trace
from hf_camphive.pruning.scoring.criteria import SCORERS, Scores
from hf_camphive.runs.comparison_plot import draw_comparison
from hf_camphive.runs.cycle import PruningCycle
from hf_camphive.runs.results import Cell, Results, Row, differences
from hf_camphive.training.data.calibration import Calibration
from hf_camphive.training.data.loaders import Loaders
from hf_camphive.training.evaluation import evaluate_accuracy, recalibrate_batchnorm
from hf_camphive.training.finetuning import finetune

logger = logging.getLogger(__name__)
RESULTS, CSV, TABLE, PLOT = "results.json", "results.csv", "results.md", "results.png"
GRID = ("criterion", "merge", "target_macs", "cycles", "calibration_size", "seed")
"""Fields of the config that the cells of a grid decide; all others are settings that the whole comparison shares."""
MAX_BYTES_IN_MEMORY = 2**30  # test images are decoded once where they take no more memory than this


@dataclass(frozen=True)
class Problem:
    """What a method that is not in `SCORERS` is given: a network, its channel groups, images and MACs per image to leave.

    The network may be used freely, as a copy; the plan is for `trace.groups`.
    """

    net: nn.Module
    trace: Trace
    calibration: Calibration
    target_macs: int
    config: CampHiVeConfig


Method = Callable[[Problem], PrunePlan]


def grid(
    methods: Iterable[str],
    merges: Iterable[str],
    ratios: Iterable[float],
    seeds: int = 3,
    cycles: Iterable[int] = (1,),
    calibration_sizes: Iterable[int] = (1024,),
) -> tuple[Cell, ...]:
    """Every combination once, seed after seed, so that all methods have a first figure soon."""
    combinations = product(range(seeds), calibration_sizes, methods, cycles, merges, ratios)
    cells = (Cell(method, merge, ratio, n, size, seed) for seed, size, method, n, merge, ratio in combinations)
    return tuple(dict.fromkeys(cells))


class Comparison:
    """Runs cells one by one and keeps what they measure in `folder`: results.json, results.csv, results.md, results.png.

    `config` holds the settings that all runs share (its grid fields are ignored); `load` opens the data for a config,
    whose seed and calibration size choose the calibration images; `data` says what data that is, for the files.
    `methods` are methods besides the criteria, by name. The same folder may be filled by several processes at a time.
    Raises `ConfigError` where the folder's results are those of other settings, `OutputError` where it holds other files.
    """

    def __init__(
        self,
        base: BaseModel,
        config: CampHiVeConfig,
        load: Callable[[CampHiVeConfig], Loaders],
        folder: str | Path,
        *,
        data: Mapping[str, Any],
        methods: Mapping[str, Method] | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.base, self.load = base, load
        self.config = replace(config, polish_steps=config.polish_steps or 0)  # unasked, it would hide what methods do
        self.folder = Path(folder).expanduser().resolve()
        self.methods = dict(methods or {})
        self.accelerator = accelerator or make_accelerator(config)
        self.settings = _settings(base, self.config, data)
        self.results = self._kept()
        self.dense = copy.deepcopy(base.net).to(self.accelerator.device, memory_format=torch.channels_last).eval()
        self._images: tuple[tuple[int, int], _Images] | None = None
        self._scores: dict[tuple[str, int, int], tuple[Scores, float]] = {}

    def run(self, cells: Sequence[Cell]) -> Results:
        """Run those cells that are not done yet; a cell that cannot be run is noted with the reason, and tried next time.

        Raises `ConfigError` or `PlanError` on cells that cannot work, before any of them is run.
        """
        self.check(cells)
        todo = [cell for cell in cells if cell not in self.results.done()]
        shown = self.accelerator.is_local_main_process
        with tqdm(total=len(cells), initial=len(cells) - len(todo), unit="run", disable=not shown) as bar:
            for cell in todo:
                bar.set_description(str(cell))
                try:
                    row = self._run(cell)
                except (PlanError, ReconstructionError, TrainingError) as error:
                    logger.warning("%s failed: %s", cell, error)
                    self._keep(lambda results, cell=cell, error=error: results.with_failure(cell, str(error)))
                else:
                    logger.info("%s: top-1 %s in %s", cell, format_share(row.final), _seconds(row))
                    self._keep(lambda results, row=row: results.with_row(row))
                bar.update()
        return self.results

    def check(self, cells: Sequence[Cell]) -> None:
        """Raise `ConfigError` or `PlanError` where a cell cannot work; needs no data."""
        if not cells:
            raise ConfigError("there is nothing to compare; name at least one method, merge rule, ratio and seed")
        if not self.config.cuts_channels:
            raise ConfigError("a comparison is at ratios of MACs, of which single weights save none; cut channels")
        for cell in cells:
            _choice("method", cell.method, {**SCORERS, **self.methods})
            _choice("merge rule", cell.merge, MERGE_RULES)
            if cell.method in self.methods and MERGE_RULES[cell.merge].pairs:
                raise ConfigError(
                    f"merge rule {cell.merge!r} pairs channels by their scores, and {cell.method!r} gives a plan without "
                    "scores; choose reconstruct, lstsq, nearest or none"
                )
            self._config(cell)
        smallest = max(cells, key=lambda cell: cell.ratio)
        PruningCycle(self.base, self._config(smallest), self.accelerator).check_budget()

    # One run

    def _run(self, cell: Cell) -> Row:
        config, images = self._config(cell), self._images_of(cell)
        run = PruningCycle(self.base, config, self.accelerator)
        rule = MERGE_RULES[cell.merge]
        while not run.finished:
            plan = self._plan(run, cell, images.calibration)
            cut = run.apply(plan, images.calibration, recalibrate=False)
            if rule.recalibrates or run.finished:
                recalibrated = copy.deepcopy(cut)
                with run.log.timed("recalibrate"):
                    recalibrate_batchnorm(recalibrated, images.calibration.batches, self.accelerator)
            run.net = recalibrated if rule.recalibrates else cut
        accuracies = [images.accuracy(net, self.accelerator).top1 for net in (cut, recalibrated)]
        polished = None
        if config.label_free_steps:
            polished = images.accuracy(run.polish(images.calibration), self.accelerator).top1
        return Row(
            cell,
            images.dense.top1,
            *accuracies,
            polished=polished,
            finetuned=self._finetuned(run, images) if config.num_train_epochs else None,
            recalibrates=rule.recalibrates,
            images=images.dense.images,
            split=images.split,
            calibration=images.loaders.info.splits["calibration"],
            dense_macs=count_macs(self.dense, run.input_size),
            macs=count_macs(run.net, run.input_size),
            parameters=count_parameters(run.net),
            dropped=sum(len(plan.dropped) for plan in run.plans),
            seconds={step: round(value, 3) for step, value in run.log.seconds.items()},
            environment=environment(self.accelerator.device, self.accelerator.num_processes),
            notes=tuple(run.log.notes),
        )

    def _plan(self, run: PruningCycle, cell: Cell, calibration: Calibration) -> PrunePlan:
        """The next cycle's plan; the scores of the dense network are worked out once for all merge rules and ratios."""
        if cell.method in self.methods:
            return self._foreign_plan(run, cell, calibration)
        key = (cell.method, cell.calibration_size, cell.seed)
        if run.plans:
            return run.plan(calibration)
        if key not in self._scores:
            plan = run.plan(calibration)
            self._scores[key] = run.scores, run.log.seconds["score"]
            return plan
        scores, seconds = self._scores[key]
        plan = run.plan(calibration, scores=scores)
        run.log.seconds["score"] = seconds
        return plan

    def _foreign_plan(self, run: PruningCycle, cell: Cell, calibration: Calibration) -> PrunePlan:
        _, targets = run.next_targets()
        with run.log.timed("plan"):
            problem = Problem(
                copy.deepcopy(run.net), run.analysis.trace, calibration, int(targets["macs"]), run.config
            )
            return replace(self.methods[cell.method](problem), criterion=cell.method, merge=cell.merge)

    def _finetuned(self, run: PruningCycle, images: "_Images") -> float:
        """Top-1 after finetuning what the merge rule delivers, in place; every run sees its images in the same order."""
        net = run.net
        set_seed(run.config.seed)
        if (order := images.loaders.train.generator) is not None:
            order.manual_seed(run.config.seed)
        with run.log.timed("finetune"):
            finetune(net, images.loaders, run.config, self.accelerator, self.dense)
        return images.accuracy(net, self.accelerator).top1

    # What runs share

    def _config(self, cell: Cell) -> CampHiVeConfig:
        if not 1 < cell.ratio < float("inf"):
            raise ConfigError(f"ratio {cell.ratio:g} must be above 1: 2.1 means 2.1 times fewer MACs")
        criterion = self.config.criterion if cell.method in self.methods else cell.method
        return replace(
            self.config,
            criterion=criterion,
            merge=cell.merge,
            target_macs=1 / cell.ratio,
            cycles=cell.cycles,
            calibration_size=cell.calibration_size,
            seed=cell.seed,
        )

    def _images_of(self, cell: Cell) -> "_Images":
        """Calibration and test images of a cell; those of the last cell are kept."""
        key = (cell.seed, cell.calibration_size)
        if self._images is None or self._images[0] != key:
            self._images = None  # frees the memory of the last ones first
            loaders = self.load(self._config(cell))
            self._images = key, _Images.of(loaders, cell.calibration_size, self.dense, self.config, self.accelerator)
        return self._images[1]

    # The folder

    def _kept(self) -> Results:
        """The results in the folder, or none; nothing is written yet."""
        path = self.folder / RESULTS
        if self.folder.exists() and not self.folder.is_dir():
            raise OutputError(f"{self.folder} is a file; choose another --output-dir")
        if not path.exists():
            if taken := [name for name in (CSV, TABLE, PLOT) if (self.folder / name).exists()]:
                raise OutputError(
                    f"{self.folder} holds {taken[0]} but no {RESULTS}, so it is not a comparison of ours; choose another "
                    "--output-dir, so that nothing of yours is lost"
                )
            return Results(self.settings)
        results = Results.from_json(path.read_text(encoding="utf-8"), str(path))
        if changes := differences(results.settings, self.settings):
            raise ConfigError(
                f"the results in {self.folder} are those of other settings ({'; '.join(changes)}); go on with the same "
                "options, or choose another --output-dir"
            )
        return results

    def _keep(self, change: Callable[[Results], Results]) -> None:
        """Change the results on disk, where another process may have added to them meanwhile; each file is replaced whole."""
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / f".{RESULTS}.lock"):
                self.results = change(self._kept())
                self._replace(RESULTS, lambda path: path.write_text(self.results.to_json(), encoding="utf-8"))
                if self.results.rows:
                    self._replace(CSV, lambda path: path.write_text(self.results.to_csv(), encoding="utf-8"))
                    self._replace(TABLE, lambda path: path.write_text(self.results.to_markdown(), encoding="utf-8"))
                    figure = draw_comparison(self.results)
                    self._replace(PLOT, lambda path: figure.savefig(path, dpi=DPI, metadata={"Software": None}))
        else:
            self.results = change(self.results)

    def _replace(self, name: str, write: Callable[[Path], Any]) -> None:
        path = self.folder / name
        temporary = path.with_name(f".{name}.{os.getpid()}{path.suffix}")
        write(temporary)
        os.replace(temporary, path)


@dataclass(frozen=True)
class _Images:
    """The images of a seed: for calibration in memory, for testing in memory where they fit, and the dense accuracy."""

    loaders: Loaders
    calibration: Calibration
    test: DataLoader
    split: str
    dense: Accuracy

    @classmethod
    def of(
        cls, loaders: Loaders, asked: int, net: nn.Module, config: CampHiVeConfig, accelerator: Accelerator
    ) -> "_Images":
        if net.num_classes != len(loaders.info.label_names):
            raise ConfigError(
                f"the network has {net.num_classes} classes, the dataset {len(loaders.info.label_names)}; give a dataset "
                "that the network was trained for"
            )
        if config.num_train_epochs and loaders.train is None:
            raise ConfigError("--epochs: the dataset has no training split to finetune on; use --epochs 0")
        calibration = Calibration.collect(
            loaders.calibration, accelerator.device, accelerator.process_index, accelerator.num_processes
        )
        if calibration.total < asked:
            raise ConfigError(
                f"--calibration-size {asked}: the dataset has {calibration.total} images for calibration; lower it"
            )
        loader, split = loaders.evaluation
        test = _in_memory(loader)
        dense = evaluate_accuracy(net, test, accelerator, split, "Evaluate dense")
        return cls(loaders, calibration, test, split, dense)

    def accuracy(self, net: nn.Module, accelerator: Accelerator) -> Accuracy:
        return evaluate_accuracy(net, self.test, accelerator, self.split)


def _in_memory(loader: DataLoader) -> DataLoader:
    """The loader with its rows decoded once and for all, where they fit into `MAX_BYTES_IN_MEMORY`; else as it is."""
    rows: list[dict[str, Any]] = []
    for batch in loader:
        rows += [
            {"pixel_values": image, "labels": int(label)}
            for image, label in zip(batch["pixel_values"], batch["labels"])
        ]
        if len(rows) * rows[0]["pixel_values"].nbytes > MAX_BYTES_IN_MEMORY:
            return loader
    return DataLoader(rows, batch_size=loader.batch_size, collate_fn=loader.collate_fn)


def _settings(base: BaseModel, config: CampHiVeConfig, data: Mapping[str, Any]) -> dict[str, Any]:
    """What all rows of one file have in common, as JSON has it."""
    shared = {key: value for key, value in config.to_dict().items() if key not in ("schema", *GRID)}
    described = {key: published(value) if isinstance(value, str) else value for key, value in data.items()}
    model = {"model": published(base.model_id), "architecture": base.architecture, "revision": base.revision}
    return {**model, "weights": weights_fingerprint(base.net), **described, **shared}


def _choice(kind: str, name: str, table: Iterable[str]) -> None:
    names = list(table)
    if name not in names:
        raise ConfigError(f"there is no {kind} {name!r}; {did_you_mean(name, names)}")


def _seconds(row: Row) -> str:
    return f"{sum(row.seconds.values()):.0f} s"
