"""Division of a dataset's rows among roles: calibration, training, validation and test.

Every choice is stratified and seeded. Calibration rows are training rows or taken from the evaluation rows; all other
roles are disjoint. No image is read, except to divide a stream.
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
    """Settings of the division, from the config and `DataOptions`."""

    calibration_size: int
    seed: int
    calibration_split: str | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None


@dataclass(frozen=True)
class RowSubset:
    """Rows of a split that have one role, in reading order; `total` counts all rows of the split."""

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
    """Filter of streamed rows: by the content of its image, one row in ten is held out, whatever the order.

    Passes the rows held out if `wanted` is set, else the others.
    """

    image_column: str
    seed: int
    wanted: bool

    def __call__(self, row: Mapping[str, Any]) -> bool:
        value = row[self.image_column]
        content = value["bytes"] or str(value["path"]).encode()
        return (zlib.crc32(content, self.seed) % _HELD_OUT_SHARE == 0) is self.wanted


def stratified(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` rows, each label's share to within one row, and return their positions in random order.

    Shares are rounded down, and the remaining rows go to the labels with the largest remainders (ties at random).
    """
    classes, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    share = min(count, len(labels)) * sizes / max(len(labels), 1)
    quota = np.floor(share + 1e-9).astype(int)
    order = np.lexsort((rng.random(len(classes)), -(share - quota).round(9)))
    quota[order[: min(count, len(labels)) - quota.sum()]] += 1
    chosen = [rng.choice(np.flatnonzero(inverse == c), quota[c], replace=False) for c in range(len(classes))]
    return rng.permutation(np.concatenate(chosen)) if chosen else np.empty(0, int)


def divide(labels: Mapping[str, np.ndarray], options: SplitOptions) -> dict[str, RowSubset]:
    """Divide the rows of all splits among roles, given the labels [N] of each split.

    Calibration rows are training rows, or are taken away from the evaluation rows where there is no training split.

    Raises:
        DataError: Labels are missing, or a role gets no row.
    """
    roles = _roles(
        {split: bool(len(y)) and bool((y >= 0).all()) for split, y in labels.items()}, options.calibration_split
    )
    train, validation, test = (roles.get(role) for role in USUAL_SPLITS)
    pool = roles["calibration"]
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
    """Divide streams among roles, as `divide` does rows: return the rows and a description of each role.

    Where one split has two roles, a tenth of the images is held out by their content (`HeldOut`).

    Raises:
        DataError: Labels are missing, or there is no row to calibrate on.
    """
    first = {split: _labels_of(list(rows.take(16)), label) for split, rows in splits.items()}
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
    pool = roles["calibration"]
    if not (seen := _first_rows(data["calibration"], options)):
        raise DataError(f"split {pool!r} yields no row to calibrate on; give more rows")
    chosen = _stratified_rows(seen, label, options)
    data["calibration"] = datasets.Dataset.from_list(chosen, features=splits[pool].features)
    described["calibration"] = f"{len(chosen):,} rows of {pool}"
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


def _first_rows(stream: datasets.IterableDataset, options: SplitOptions) -> list[dict[str, Any]]:
    """Return enough rows of the shuffled stream for a stratified choice of calibration rows."""
    shuffled = stream.shuffle(seed=options.seed, buffer_size=_SHUFFLE_BUFFER)
    return list(islice(shuffled, 4 * options.calibration_size))


def _stratified_rows(rows: list[dict[str, Any]], label: str, options: SplitOptions) -> list[dict[str, Any]]:
    rng = np.random.default_rng([options.seed, _CALIBRATION])
    return [rows[i] for i in stratified(_labels_of(rows, label), options.calibration_size, rng)]


def _labels_of(rows: list[dict[str, Any]], label: str) -> np.ndarray:
    return np.array([-1 if row[label] is None else row[label] for row in rows], np.int64)


def _roles(labelled: Mapping[str, bool], calibration_split: str | None) -> dict[str, str]:
    """Return the split of each role, given which splits have labels; calibration always has one.

    Raises:
        DataError: No split suits a role that is needed, or rows of such a split have no labels.
    """
    names = ", ".join(labelled)
    roles = {role: next((s for s in usual if s in labelled), None) for role, usual in USUAL_SPLITS.items()}
    if not any(roles.values()):
        if len(labelled) > 1:
            raise DataError(f"the splits are {names}: none is named train, validation or test; rename them so")
        roles["train"] = next(iter(labelled))
    for role in ("validation", "test"):
        if (split := roles[role]) and not labelled[split]:
            logger.warning("split %r has rows without a label and is not used", split)
            roles[role] = None
    pool = calibration_split or roles["train"] or roles["validation"] or roles["test"]
    if calibration_split is not None and calibration_split not in labelled:
        raise DataError(f"there is no split {calibration_split!r} to calibrate on; the splits are {names}")
    for split in dict.fromkeys((roles["train"], pool)):
        if split and not labelled[split]:
            raise DataError(
                f"split {split!r} has no labels in some of its rows (missing or -1); give labels, or remove those rows"
            )
    if pool is None:
        raise DataError(f"no split has labels (splits: {names}; labels are missing or -1); give a split with labels")
    if not any(roles.values()):
        raise DataError(f"no split to evaluate on has labels (splits: {names}); give a split with labels")
    return {role: split for role, split in {**roles, "calibration": pool}.items() if split}
