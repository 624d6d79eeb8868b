"""Comparison of methods: a grid of runs on one network, each from the dense weights, saved as they finish, never repeated.

Runs use the pruner's own cycle (`PruningCycle`). They share the network, the images, and the scores of the dense network,
which depend on neither merge rule nor ratio. A method that is not in `SCORERS` is a function that makes a plan.
"""

import copy
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from filelock import FileLock
from torch import nn
from torch.utils.data import DataLoader, Dataset
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
from hf_camphive.network.timm_interface import timm_interface
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
"""Fields of the config that the cells of a grid set; all runs of a comparison share the others."""
MAX_BYTES_IN_MEMORY = 2**30  # test images are decoded once if they take no more memory than this


@dataclass(frozen=True)
class Problem:
    """Input of a method that is not in `SCORERS`: a network, its trace, images, and the MACs per image to leave.

    `net` is a copy that the method may change. The plan must be made for the groups `trace.groups`.
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
    """Return every combination once, one seed after the other, so that all methods have a first result soon."""
    combinations = product(range(seeds), calibration_sizes, methods, cycles, merges, ratios)
    cells = (Cell(method, merge, ratio, n, size, seed) for seed, size, method, n, merge, ratio in combinations)
    return tuple(dict.fromkeys(cells))


class Comparison:
    """Run cells one by one and save their measurements in `folder`: results.json, results.csv, results.md, results.png.

    `config` holds the settings that all runs share (its grid fields are ignored). `load` opens the data for a config,
    whose seed and calibration size choose the calibration images; `data` describes that data in the files. `methods` are
    methods besides the criteria, by name. Several launches may fill the same folder at a time.

    Raises:
        ConfigError: The results in the folder have other settings.
        OutputError: The folder holds other files, or damaged results.
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
        self.config = replace(
            config, polish_steps=config.polish_steps or 0
        )  # by default no polishing, which would hide differences between methods
        self.folder = Path(folder).expanduser().resolve()
        self.methods = dict(methods or {})
        self.accelerator = accelerator or make_accelerator(config)
        self.settings = _settings(base, self.config, data)
        self.results = self._kept()
        self.dense = copy.deepcopy(base.net).to(self.accelerator.device).to(memory_format=torch.channels_last).eval()
        self._images: tuple[tuple[int, int], _Images] | None = None
        self._scores: dict[tuple[str, int, int], tuple[Scores, float]] = {}

    def run(self, cells: Sequence[Cell]) -> Results:
        """Run the cells that have no row yet, and return all results.

        A cell that fails is recorded with the reason, and tried again next time.

        Raises:
            ConfigError: A cell cannot work (checked before any cell is run), or the data do not suit the network.
            PlanError: The budget of a cell cannot be met (checked before any cell is run).
        """
        self.check(cells)
        todo = [cell for cell in cells if cell not in self.results.done()]
        shown = self.accelerator.is_local_main_process
        with tqdm(total=len(cells), initial=len(cells) - len(todo), unit="run", disable=not shown) as bar:
            for cell in todo:
                bar.set_description(str(cell))
                self._try(cell)
                bar.update()
        return self.results

    def check(self, cells: Sequence[Cell]) -> None:
        """Check, without data, that all cells can work.

        Raises:
            ConfigError: A cell names an unknown method or merge rule, or its settings contradict one another.
            PlanError: The budget of the largest ratio cannot be met.
        """
        if not cells:
            raise ConfigError("there is nothing to compare; name at least one method, merge rule, ratio and seed")
        if not self.config.cuts_channels:
            raise ConfigError("a comparison is by ratios of MACs, and zeroing single weights saves none; cut channels")
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

    def _try(self, cell: Cell) -> None:
        """Run one cell, and save its row, or the reason why it failed."""
        try:
            row = self._run(cell)
        except (PlanError, ReconstructionError, TrainingError) as error:
            reason = str(error)
            logger.warning("%s failed: %s", cell, reason)
            self._save(lambda results: results.with_failure(cell, reason))
        else:
            logger.info("%s: top-1 %s in %s", cell, format_share(row.final), _seconds(row))
            self._save(lambda results: results.with_row(row))

    def _run(self, cell: Cell) -> Row:
        config, images = self._config(cell), self._images_of(cell)
        run = PruningCycle(self.base, config, self.accelerator)
        pruned, recalibrated = self._prune(run, cell, images)
        polished = None
        if config.label_free_steps:
            polished = images.accuracy(run.polish(images.calibration), self.accelerator).top1
        return Row(
            cell=cell,
            dense=images.dense.top1,
            pruned=pruned,
            recalibrated=recalibrated,
            polished=polished,
            finetuned=self._finetuned(run, images) if config.num_train_epochs else None,
            recalibrates=MERGE_RULES[cell.merge].recalibrates,
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

    def _prune(self, run: PruningCycle, cell: Cell, images: "_Images") -> tuple[float, float]:
        """Run all cycles; return the last network's top-1 as it was cut, and with recalibrated BatchNorm.

        Afterwards `run.net` is the one of the two that the merge rule delivers.
        """
        rule = MERGE_RULES[cell.merge]
        while not run.finished:
            plan = self._plan(run, cell, images.calibration)
            cut = run.apply(plan, images.calibration, recalibrate=False)
            if rule.recalibrates or run.finished:
                recalibrated = copy.deepcopy(cut)
                with run.log.timed("recalibrate"):
                    recalibrate_batchnorm(recalibrated, images.calibration.batches, self.accelerator)
            run.net = recalibrated if rule.recalibrates else cut
        return images.accuracy(cut, self.accelerator).top1, images.accuracy(recalibrated, self.accelerator).top1

    def _plan(self, run: PruningCycle, cell: Cell, calibration: Calibration) -> PrunePlan:
        """Return the next cycle's plan; the dense network is scored once for all merge rules and ratios."""
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
        """Return the next cycle's plan by a method from `methods`."""
        _, targets = run.next_targets()
        with run.log.timed("plan"):
            problem = Problem(
                copy.deepcopy(run.net), run.analysis.trace, calibration, int(targets["macs"]), run.config
            )
            return replace(self.methods[cell.method](problem), criterion=cell.method, merge=cell.merge)

    def _finetuned(self, run: PruningCycle, images: "_Images") -> float:
        """Finetune `run.net` in place, with the images in the same order for every run, and return its top-1."""
        net = run.net
        set_seed(run.config.seed)
        train = images.loaders.train
        if train is not None and train.generator is not None:
            train.generator.manual_seed(run.config.seed)
        with run.log.timed("finetune"):
            finetune(net, images.loaders, run.config, self.accelerator, self.dense)
        return images.accuracy(net, self.accelerator).top1

    # What runs share

    def _config(self, cell: Cell) -> CampHiVeConfig:
        """Return the config of a cell's run.

        Raises:
            ConfigError: The cell's settings cannot work.
        """
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
        """Return the calibration and test images of a cell; those of the last cell are kept in memory."""
        key = (cell.seed, cell.calibration_size)
        if self._images is None or self._images[0] != key:
            self._images = None  # frees the memory of the last images first
            loaders = self.load(self._config(cell))
            self._images = key, _Images.of(loaders, cell.calibration_size, self.dense, self.config, self.accelerator)
        return self._images[1]

    # The folder

    def _kept(self) -> Results:
        """Return the results in the folder, or results without rows; writes nothing.

        Raises:
            ConfigError: The results have other settings.
            OutputError: The folder holds other files, or damaged results.
        """
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
                f"the results in {self.folder} are those of other settings ({'; '.join(changes)}); continue with the same "
                "options, or choose another --output-dir"
            )
        return results

    def _save(self, change: Callable[[Results], Results]) -> None:
        """Apply a change to the results on disk, to which other launches may have added rows, and rewrite all files.

        Raises:
            ConfigError: Another launch has written results with other settings.
            OutputError: The results on disk are damaged.
        """
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
        """Have `write` write a temporary file, and rename it to `name`, so that no reader finds half a file."""
        path = self.folder / name
        temporary = path.with_name(f".{name}.{os.getpid()}{path.suffix}")
        write(temporary)
        os.replace(temporary, path)


@dataclass(frozen=True)
class _Images:
    """Images of a seed, and the accuracy of the dense network on them.

    Calibration images are held in memory, test images as far as `MAX_BYTES_IN_MEMORY` allows.
    """

    loaders: Loaders
    calibration: Calibration
    test: DataLoader
    split: str
    dense: Accuracy

    @classmethod
    def of(
        cls, loaders: Loaders, asked: int, net: nn.Module, config: CampHiVeConfig, accelerator: Accelerator
    ) -> "_Images":
        """Collect the calibration images, of which `asked` are needed, and evaluate the dense network.

        Raises:
            ConfigError: The dataset has other classes, no training split to finetune on, or too few images.
        """
        classes = timm_interface(net).num_classes
        if classes != len(loaders.info.label_names):
            raise ConfigError(
                f"the network has {classes} classes, the dataset {len(loaders.info.label_names)}; give a dataset "
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
        """Evaluate a network on the test images."""
        return evaluate_accuracy(net, self.test, accelerator, self.split)


def _in_memory(loader: DataLoader) -> DataLoader:
    """Return a loader of the same rows, decoded in memory; the given one if they exceed `MAX_BYTES_IN_MEMORY`."""
    rows: list[dict[str, Any]] = []
    for batch in loader:
        rows += [
            {"pixel_values": image, "labels": int(label)}
            for image, label in zip(batch["pixel_values"], batch["labels"])
        ]
        if len(rows) * rows[0]["pixel_values"].nbytes > MAX_BYTES_IN_MEMORY:
            return loader
    return DataLoader(cast(Dataset[dict[str, Any]], rows), batch_size=loader.batch_size, collate_fn=loader.collate_fn)


def _settings(base: BaseModel, config: CampHiVeConfig, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return, as JSON values, the settings that all rows of one file share."""
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
