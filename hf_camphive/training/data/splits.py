"""Which rows of which split serve which role: calibration, training, validation, test.

Every choice is stratified and seeded, and no row serves two roles that must not share it. No image is read, save those
that a stream has to be looked through for.
"""

import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets
import numpy as np

from hf_camphive.core.errors import DataError

logger = logging.getLogger(__name__)

USUAL_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
_HELD_OUT_SHARE = 10  # one row in ten
_MOST_HELD_OUT = 5000
_SHUFFLE_BUFFER = 10_000
_CALIBRATION, _VALIDATION, _LIMIT = range(3)  # streams of random numbers


@dataclass(frozen=True)
class SplitOptions:
    """How rows are divided among roles: `DataOptions` and the config say so."""

    calibration_size: int
    seed: int
    calibration_split: str | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None


@dataclass(frozen=True)
class RowSubset:
    """Rows of a split that serve one role, in the order in which they are read."""

    split: str
    rows: np.ndarray
    total: int

    def __str__(self) -> str:
        return (
            self.split
            if len(self.rows) == self.total
            else f"{len(self.rows):,} of {self.total:,} rows of {self.split}"
        )


@dataclass(frozen=True)
class HeldOut:
    """Whether a streamed row is among the tenth held out, by the content of its image: the same in every order."""

    image_column: str
    seed: int
    wanted: bool

    def __call__(self, row: Mapping[str, Any]) -> bool:
        value = row[self.image_column]
        content = value["bytes"] or str(value["path"]).encode()
        return (zlib.crc32(content, self.seed) % _HELD_OUT_SHARE == 0) is self.wanted


def stratified(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Positions of `count` rows in random order, of every label its share to within one row.

    Shares are rounded down, and what is left goes to the largest remainders (ties by chance).
    """
    classes, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    share = min(count, len(labels)) * sizes / max(len(labels), 1)
    quota = np.floor(share + 1e-9).astype(int)
    order = np.lexsort((rng.random(len(classes)), -(share - quota).round(9)))
    quota[order[: min(count, len(labels)) - quota.sum()]] += 1
    chosen = [rng.choice(np.flatnonzero(inverse == c), quota[c], replace=False) for c in range(len(classes))]
    return rng.permutation(np.concatenate(chosen)) if chosen else np.empty(0, int)


def divide(labels: Mapping[str, np.ndarray], options: SplitOptions) -> dict[str, RowSubset]:
    """Which rows of which split serve which role, from the labels of every split.

    Every choice is stratified and seeded. Calibration rows are training rows, or else taken away from the evaluation
    rows. Raises `DataError` where labels or rows are missing.
    """
    roles = _roles(
        {split: bool(len(y)) and bool((y >= 0).all()) for split, y in labels.items()}, options.calibration_split
    )
    train, validation, test, pool = (roles.get(r) for r in ("train", "validation", "test", "calibration"))
    free = {split: np.arange(len(y)) for split, y in labels.items()}

    def draw(split: str, count: int, stream: int) -> np.ndarray:
        return free[split][
            stratified(labels[split][free[split]], count, np.random.default_rng([options.seed, stream]))
        ]

    chosen: dict[str, tuple[str, np.ndarray]] = {}
    if train and not validation:
        count = min(
            _MOST_HELD_OUT,
            max(1, round(len(free[train]) / _HELD_OUT_SHARE)),
            options.max_eval_samples or _MOST_HELD_OUT,
        )
        chosen["validation"] = train, np.sort(draw(train, count, _VALIDATION))
        free[train] = np.setdiff1d(free[train], chosen["validation"][1])
    evaluated = pool in (validation, test)
    count = min(options.calibration_size, len(free[pool]) * 3 // 5) if evaluated else options.calibration_size
    chosen["calibration"] = pool, draw(pool, count, _CALIBRATION)
    if evaluated:
        free[pool] = np.setdiff1d(free[pool], chosen["calibration"][1])
    for role, split, most in (
        ("train", train, options.max_train_samples),
        ("validation", validation, options.max_eval_samples),
        ("test", test, options.max_eval_samples),
    ):
        if split and role not in chosen:
            chosen[role] = split, free[split] if most is None else np.sort(draw(split, most, _LIMIT))
    if "validation" not in chosen:
        chosen["validation"] = chosen.pop("test")
    for role, (split, rows) in chosen.items():
        if not len(rows):
            raise DataError(
                f"no row is left for {role} in split {split!r} of {len(labels[split])} rows; give more rows"
            )
    return {role: RowSubset(split, rows, len(labels[split])) for role, (split, rows) in chosen.items()}


def divide_streams(
    splits: Mapping[str, datasets.IterableDataset],
    image: str,
    label: str,
    options: SplitOptions,
) -> tuple[dict[str, Any], dict[str, str]]:
    """What `divide` does, for streams: a part held out is a tenth of the images, told by their content."""

    def labels_of(rows: list[dict[str, Any]]) -> np.ndarray:
        return np.array([-1 if row[label] is None else row[label] for row in rows], np.int64)

    first = {split: labels_of(list(rows.take(16))) for split, rows in splits.items()}
    roles = _roles(
        {split: bool(len(y)) and bool((y >= 0).all()) for split, y in first.items()}, options.calibration_split
    )
    data: dict[str, Any] = {role: splits[split] for role, split in roles.items()}
    described = dict(roles)

    def part(role: str, split: str, held_out: bool) -> None:
        data[role] = splits[split].filter(HeldOut(image, options.seed, held_out))
        described[role] = f"{1 if held_out else _HELD_OUT_SHARE - 1} of {_HELD_OUT_SHARE} rows of {split}, by content"

    if "train" in roles and "validation" not in roles:
        part("validation", roles["train"], True)
        part("train", roles["train"], False)
        data["validation"] = data["validation"].take(_MOST_HELD_OUT)
    for role in ("validation", "test"):
        if roles.get(role) == roles["calibration"]:
            part(role, roles[role], False)
            part("calibration", roles[role], True)
    if roles["calibration"] == roles.get("train"):
        data["calibration"] = data["train"]
    if "validation" not in data:
        data["validation"], described["validation"] = data.pop("test"), described.pop("test")
    shuffled = data["calibration"].shuffle(seed=options.seed, buffer_size=_SHUFFLE_BUFFER)
    seen = list(islice(shuffled, 4 * options.calibration_size))  # enough to give every class its share
    if not seen:
        raise DataError(f"split {roles['calibration']!r} yields no row to calibrate on; give more rows")
    chosen = stratified(labels_of(seen), options.calibration_size, np.random.default_rng([options.seed, _CALIBRATION]))
    features = splits[roles["calibration"]].features
    data["calibration"] = datasets.Dataset.from_list([seen[i] for i in chosen], features=features)
    described["calibration"] = f"{len(chosen):,} rows of {roles['calibration']}"
    for role, most in (
        ("train", options.max_train_samples),
        ("validation", options.max_eval_samples),
        ("test", options.max_eval_samples),
    ):
        if role in data and most is not None:
            data[role] = data[role].take(most)
            described[role] = f"at most {most:,} rows of {described[role]}"
    if "train" in data:
        data["train"] = data["train"].shuffle(seed=options.seed, buffer_size=_SHUFFLE_BUFFER)
    return data, described


def _roles(labelled: Mapping[str, bool], calibration_split: str | None) -> dict[str, str]:
    """Role -> split, from which splits carry real labels; the calibration role always has one."""
    names = ", ".join(labelled)
    roles = {role: next((s for s in usual if s in labelled), None) for role, usual in USUAL_SPLITS.items()}
    if not any(roles.values()):
        if len(labelled) > 1:
            raise DataError(f"the splits are {names}: none is named train, validation or test; rename them so")
        roles["train"] = next(iter(labelled))
    for role in ("validation", "test"):
        if roles[role] and not labelled[roles[role]]:
            logger.warning("split %r has rows without a label and is not used", roles[role])
            roles[role] = None
    pool = calibration_split or roles["train"] or roles["validation"] or roles["test"]
    if calibration_split is not None and calibration_split not in labelled:
        raise DataError(f"there is no split {calibration_split!r} to calibrate on; the splits are {names}")
    for split in {roles["train"], pool} - {None}:
        if not labelled[split]:
            raise DataError(
                f"split {split!r} has no labels in some of its rows (missing or -1); give labels, or remove those rows"
            )
    if pool is None:
        raise DataError(f"no split has labels (splits: {names}; labels are missing or -1); give a split with labels")
    if not any(roles.values()):
        raise DataError(f"no split to evaluate on has labels (splits: {names}); give a split with labels")
    return {role: split for role, split in {**roles, "calibration": pool}.items() if split}
