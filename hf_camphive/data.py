"""Datasets to loaders: one name or folder in, disjoint calibration, training and evaluation batches out.

Reads through `datasets` only; images stay encoded until a batch needs them. Draws with generators made from the seed,
save the training augmentation, which follows torch's and Python's global generators (as torchvision and timm do).
"""

import logging
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchvision import transforms

from .config import CampHiVeConfig
from .errors import DataError

logger = logging.getLogger(__name__)

ALIASES = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "imagenet-1k": "ILSVRC/imagenet-1k",
}
SMALL = 64
"""Networks that read images of at most this many pixels a side get the CIFAR transforms."""

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
_IMAGE_NAMES = ("image", "img", "jpg", "png", "pixel_values")
_LABEL_NAMES = ("label", "labels", "fine_label", "fine_labels", "cls", "target", "class")
_WRITTEN = {"digits", "ylecun/mnist", "ufldl-stanford/svhn"}  # a mirrored digit is no digit
_HELD_OUT_SHARE = 10  # one row in ten
_MOST_HELD_OUT = 5000
_SHUFFLE_BUFFER = 10_000
_CALIBRATION, _VALIDATION, _LIMIT = range(3)  # streams of random numbers


@dataclass(frozen=True)
class DatasetInfo:
    """What was read, for the report: `splits` and `rows` are keyed by role (calibration, train, validation, test).

    `rows` leaves out what is not counted, which is every streamed split.
    """

    dataset_id: str
    revision: str | None
    image_column: str
    label_column: str
    label_names: tuple[str, ...]
    splits: dict[str, str]
    rows: dict[str, int]


@dataclass(frozen=True)
class Loaders:
    """Batches {"pixel_values": float [B, C, H, W], "labels": long [B]}; what the dataset lacks is None.

    Calibration has the evaluation transform and a fixed order.
    """

    calibration: DataLoader
    train: DataLoader | None
    validation: DataLoader
    test: DataLoader | None
    info: DatasetInfo

    @property
    def evaluation(self) -> tuple[DataLoader, str]:
        """The loader that accuracies are reported on, and its split: test, else validation."""
        role, loader = ("validation", self.validation) if self.test is None else ("test", self.test)
        return loader, self.info.splits[role]


@dataclass(frozen=True)
class Part:
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
class RowTransform:
    """Rows {column: values} of a dataset to {"pixel_values": tensors [C, H, W], "labels": ints}; can be pickled."""

    image_transform: Any
    image_column: str
    label_column: str
    mode: str

    def __call__(self, rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        images = [self.image_transform(decode_image(value).convert(self.mode)) for value in rows[self.image_column]]
        return {"pixel_values": images, "labels": list(rows[self.label_column])}


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


class Counted(IterableDataset):
    """A stream of at most `count` rows that says so by its length: an epoch of training has to have an end."""

    def __init__(self, rows: datasets.IterableDataset, count: int) -> None:
        self.rows, self.count = rows, count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew."""
        self.rows.set_epoch(epoch)


def load_loaders(
    dataset_id: str,
    net: nn.Module,
    config: CampHiVeConfig,
    *,
    config_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    workers: int | None = None,
    calibration_split: str | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
) -> Loaders:
    """Open a dataset and divide it into loaders that suit the network `net`.

    `dataset_id` is "digits", an alias, a Hub id (perhaps with "@revision") or a folder (parquet, class folders,
    `save_to_disk`). Accuracies are reported on `test` where its labels are real, else on `validation`; a missing
    validation split is a tenth of `train`, never of `test`. A dataset without `train` is divided into calibration and
    evaluation. A streamed training split has a length, as training needs, with `max_train_samples` only.
    Raises `DataError`.
    """
    name = ALIASES.get(dataset_id.partition("@")[0], dataset_id.partition("@")[0])
    splits = open_dataset(dataset_id, config_name, streaming)
    features = next((splits[s] for s in _SPLITS["train"] if s in splits), next(iter(splits.values()))).features
    image, label = find_columns(features, image_column, label_column)
    for split in [s for s, rows in splits.items() if not {image, label} <= set(rows.features)]:
        logger.warning("split %r lacks column %r or %r and is not used", split, image, label)
        del splits[split]
    undecoded = datasets.Image(decode=False)
    splits = {s: rows.select_columns([image, label]).cast_column(image, undecoded) for s, rows in splits.items()}
    train_transform, eval_transform = (
        RowTransform(transform, image, label, _colour_mode(net))
        for transform in image_transforms(net, name not in _WRITTEN)
    )
    options = {
        "calibration_size": config.calibration_size,
        "seed": config.seed,
        "calibration_split": calibration_split,
        "max_train_samples": max_train_samples,
        "max_eval_samples": max_eval_samples,
    }
    if streaming:
        data, described = _divide_streams(splits, image, label, **options)
        known = {"calibration": data["calibration"]}
    else:
        labels = {split: read_labels(rows, label) for split, rows in splits.items()}
        parts = divide(labels, **options)
        data = {role: splits[part.split].select(part.rows) for role, part in parts.items()}
        described = {role: str(part) for role, part in parts.items()}
        known = data
    highest = max(int(read_labels(rows, label).max()) for rows in known.values())
    info = DatasetInfo(
        dataset_id=name,
        revision=_revision(dataset_id, splits),
        image_column=image,
        label_column=label,
        label_names=class_names(features[label], highest, net),
        splits=described,
        rows={role: len(rows) for role, rows in known.items()},
    )
    for role in described:
        logger.info("%s: %s", role, described[role])
    if len(data["calibration"]) < config.calibration_size:
        logger.warning(
            "calibration uses all of the %d rows there are, instead of %d",
            len(data["calibration"]),
            config.calibration_size,
        )
    make = partial(_loader, workers=default_workers(net) if workers is None else workers, config=config)
    return Loaders(
        calibration=make(data["calibration"], eval_transform),
        train=make(data["train"], train_transform, training=True, count=max_train_samples)
        if "train" in data
        else None,
        validation=make(data["validation"], eval_transform),
        test=make(data["test"], eval_transform) if "test" in data else None,
        info=info,
    )


def open_dataset(
    dataset_id: str, config_name: str | None = None, streaming: bool = False
) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
    """The splits of a bundled, Hub or local dataset, by name; raises `DataError` where there is none."""
    if dataset_id == "digits":
        splits = digits()
        return {s: rows.to_iterable_dataset() for s, rows in splits.items()} if streaming else splits
    folder = Path(dataset_id)
    is_folder = folder.is_dir() and dataset_id not in ALIASES
    name, _, revision = (dataset_id, "", "") if is_folder else dataset_id.partition("@")
    try:
        if is_folder and ((folder / "dataset_dict.json").exists() or (folder / "state.json").exists()):
            found = datasets.load_from_disk(dataset_id)
            found = {"train": found} if isinstance(found, datasets.Dataset) else dict(found)
            return {s: rows.to_iterable_dataset() for s, rows in found.items()} if streaming else found
        found = datasets.load_dataset(
            ALIASES.get(name, name), config_name, revision=revision or None, streaming=streaming
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(_cannot_open(dataset_id, is_folder, error)) from error
    return _with_features(found) if streaming else dict(found)


def _with_features(streams: Mapping[str, datasets.IterableDataset]) -> dict[str, datasets.IterableDataset]:
    # Without a header, the columns of a stream are known only from its first rows.
    return {split: rows if rows.features else rows._resolve_features() for split, rows in streams.items()}


def digits() -> dict[str, datasets.Dataset]:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, always divided into the same 1197/300/300 rows."""
    from sklearn.datasets import load_digits  # imported here because it takes a second, and few runs need it

    bunch = load_digits()
    images = [PIL.Image.fromarray(image) for image in (bunch.images * (255 / 16)).round().astype(np.uint8)]
    names = [str(digit) for digit in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = datasets.Dataset.from_dict({"image": images, "label": bunch.target}, features=features)
    rng = np.random.default_rng(0)
    test = stratified(bunch.target, 300, rng)
    rest = np.setdiff1d(np.arange(len(rows)), test)
    validation = rest[stratified(bunch.target[rest], 300, rng)]
    parts = {"train": np.setdiff1d(rest, validation), "validation": validation, "test": test}
    return {split: rows.select(np.sort(part)) for split, part in parts.items()}


def find_columns(features: Mapping[str, Any], image: str | None = None, label: str | None = None) -> tuple[str, str]:
    """The image and the label column: by type first, by usual names among several; given names win.

    Raises `DataError` where there is none, or no way to choose.
    """
    return (
        _find_column(features, image, _is_image, _IMAGE_NAMES, "image", "images"),
        _find_column(features, label, _is_label, _LABEL_NAMES, "label", "whole numbers or class labels"),
    )


def read_labels(rows: datasets.Dataset, label: str) -> np.ndarray:
    """The labels of all rows, int64 [N]; a missing label is -1. No image is read."""
    column = rows.select_columns([label]).with_format("arrow")[:][label]
    return column.fill_null(-1).to_numpy().astype(np.int64)


def class_names(feature: Any, highest: int, net: nn.Module) -> tuple[str, ...]:
    """One name a class: the dataset's where it names all labels up to `highest`, else the network's, else numbers."""
    names = tuple(feature.names or ()) if isinstance(feature, datasets.ClassLabel) else ()
    if highest < len(names):
        return names
    if highest < net.num_classes:
        names = tuple(net.pretrained_cfg.get("label_names") or ())
        return names if len(names) == net.num_classes else tuple(str(i) for i in range(net.num_classes))
    return tuple(str(i) for i in range(highest + 1))


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


def divide(
    labels: Mapping[str, np.ndarray],
    calibration_size: int,
    seed: int,
    calibration_split: str | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
) -> dict[str, Part]:
    """Which rows of which split serve which role, from the labels of every split.

    Every choice is stratified and seeded. Calibration rows are training rows, or else taken away from the evaluation
    rows. Raises `DataError` where labels or rows are missing.
    """
    roles = _roles({split: bool(len(y)) and bool((y >= 0).all()) for split, y in labels.items()}, calibration_split)
    train, validation, test, pool = (roles.get(r) for r in ("train", "validation", "test", "calibration"))
    free = {split: np.arange(len(y)) for split, y in labels.items()}

    def draw(split: str, count: int, stream: int) -> np.ndarray:
        return free[split][stratified(labels[split][free[split]], count, np.random.default_rng([seed, stream]))]

    chosen: dict[str, tuple[str, np.ndarray]] = {}
    if train and not validation:
        count = min(
            _MOST_HELD_OUT, max(1, round(len(free[train]) / _HELD_OUT_SHARE)), max_eval_samples or _MOST_HELD_OUT
        )
        chosen["validation"] = train, np.sort(draw(train, count, _VALIDATION))
        free[train] = np.setdiff1d(free[train], chosen["validation"][1])
    evaluated = pool in (validation, test)
    count = min(calibration_size, len(free[pool]) * 3 // 5) if evaluated else calibration_size
    chosen["calibration"] = pool, draw(pool, count, _CALIBRATION)
    if evaluated:
        free[pool] = np.setdiff1d(free[pool], chosen["calibration"][1])
    for role, split, most in (
        ("train", train, max_train_samples),
        ("validation", validation, max_eval_samples),
        ("test", test, max_eval_samples),
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
    return {role: Part(split, rows, len(labels[split])) for role, (split, rows) in chosen.items()}


def image_transforms(net: nn.Module, flip: bool = True) -> tuple[transforms.Compose, transforms.Compose]:
    """The training and the evaluation transform of a timm network: PIL image to normalised float [C, H, W].

    Up to 64 pixels: images of the network's own size are not resampled, and are trained on with a random crop from 4
    pixels of padding (He et al. 2015, section 4.2; an eighth of the side if that is less) and a flip.
    """
    data_config = resolve_data_config({}, model=net)
    height, width = data_config["input_size"][-2:]
    if max(height, width) > SMALL:
        training = create_transform(**data_config, is_training=True, hflip=0.5 if flip else 0.0)
        return training, create_transform(**data_config)
    evaluation = create_transform(**{**data_config, "crop_pct": 1.0})
    *fit, to_tensor, normalise = evaluation.transforms
    augment = [transforms.RandomCrop((height, width), padding=min(4, height // 8))]
    augment += [transforms.RandomHorizontalFlip()] if flip else []
    return transforms.Compose([*fit, *augment, to_tensor, normalise]), evaluation


def decode_image(value: Mapping[str, Any]) -> PIL.Image.Image:
    """An encoded image {"bytes", "path"}, decoded and turned upright; raises `DataError` on a damaged one."""
    try:
        return datasets.Image().decode_example(value)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError) as error:
        name = value.get("path") if isinstance(value, Mapping) else None
        raise DataError(
            f"image {name or '(without a file name)'} cannot be decoded ({error}); restore it or remove its row"
        ) from error


def default_workers(net: nn.Module) -> int:
    """Loading processes of each loader: none where small images feed a CPU, else up to 8 a training process."""
    small = max(resolve_data_config({}, model=net)["input_size"][-2:]) <= SMALL
    if small and not torch.accelerator.is_available():
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return min(8, cores // processes)


def _loader(
    rows: datasets.Dataset | datasets.IterableDataset,
    transform: RowTransform,
    *,
    workers: int,
    config: CampHiVeConfig,
    training: bool = False,
    count: int | None = None,
) -> DataLoader:
    size = config.per_device_train_batch_size if training else config.per_device_eval_batch_size
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": torch.cuda.is_available()}
    if isinstance(rows, datasets.IterableDataset):
        columns = [transform.image_column, transform.label_column]
        options["num_workers"] = min(workers, rows.num_shards)
        rows = rows.map(transform, batched=True, batch_size=8, remove_columns=columns)
        rows = rows if count is None else Counted(rows, count)
    else:
        # A last batch of a few images would give BatchNorm a poor mean; how long a stream is nobody knows.
        options["drop_last"] = training and len(rows) >= size
        if training:
            options |= {"shuffle": True, "generator": torch.Generator().manual_seed(config.seed)}
        rows = rows.with_transform(transform)
    persistent = training and options["num_workers"] > 0
    return DataLoader(rows, batch_size=size, collate_fn=_collate, persistent_workers=persistent, **options)


def _collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    labels = torch.tensor([row["labels"] for row in rows], dtype=torch.long)
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": labels}


def _colour_mode(net: nn.Module) -> str:
    channels = resolve_data_config({}, model=net)["input_size"][0]
    if channels not in (1, 3):
        raise DataError(
            f"the network reads {channels} channels, images have 1 or 3; give a network with in_chans 1 or 3"
        )
    return "RGB" if channels == 3 else "L"


def _is_image(feature: Any) -> bool:
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _is_label(feature: Any) -> bool:
    is_integer = isinstance(feature, datasets.Value) and re.fullmatch(r"u?int\d+", feature.dtype) is not None
    return is_integer or isinstance(feature, datasets.ClassLabel)


def _find_column(
    features: Mapping[str, Any], given: str | None, fits: Any, usual: Iterable[str], kind: str, content: str
) -> str:
    flag = f"--{kind}-column-name"
    columns = ", ".join(features)
    if given is not None:
        if given not in features:
            close = get_close_matches(given, features, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"pass one of them as {flag}"
            raise DataError(f"there is no {kind} column {given!r} among {columns}; {hint}")
        if not fits(features[given]):
            raise DataError(
                f"column {given!r} holds {_type_name(features[given])}, not {content}; pass another column as "
                f"{flag}, or convert it with `datasets` (cast_column for images, class_encode_column for names)"
            )
        return given
    fitting = [column for column, feature in features.items() if fits(feature)]
    if named := [column for column in usual if column in fitting]:
        return named[0]
    if kind == "label":
        classes = [column for column in fitting if isinstance(features[column], datasets.ClassLabel)]
        fitting = classes or fitting
        if (unfit := [c for c in usual if c in features]) and not classes:
            raise DataError(
                f"column {unfit[0]!r} holds {_type_name(features[unfit[0]])}, not {content}; convert it with "
                f"`datasets` (class_encode_column), or pass another of the columns {columns} as {flag}"
            )
    if len(fitting) == 1:
        return fitting[0]
    found = f"several {kind} columns ({', '.join(fitting)})" if fitting else f"no {kind} column"
    raise DataError(f"the dataset has {found} among {columns}; pass the right one as {flag}")


def _type_name(feature: Any) -> str:
    return f"{feature.dtype} values" if isinstance(feature, datasets.Value) else type(feature).__name__


def _roles(labelled: Mapping[str, bool], calibration_split: str | None) -> dict[str, str]:
    """Role -> split, from which splits carry real labels; the calibration role always has one."""
    names = ", ".join(labelled)
    roles = {role: next((s for s in usual if s in labelled), None) for role, usual in _SPLITS.items()}
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


def _divide_streams(
    splits: Mapping[str, datasets.IterableDataset],
    image: str,
    label: str,
    calibration_size: int,
    seed: int,
    calibration_split: str | None,
    max_train_samples: int | None,
    max_eval_samples: int | None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """What `divide` does, for streams: a part held out is a tenth of the images, told by their content."""

    def labels_of(rows: list[dict[str, Any]]) -> np.ndarray:
        return np.array([-1 if row[label] is None else row[label] for row in rows], np.int64)

    first = {split: labels_of(list(rows.take(16))) for split, rows in splits.items()}
    roles = _roles({split: bool(len(y)) and bool((y >= 0).all()) for split, y in first.items()}, calibration_split)
    data: dict[str, Any] = {role: splits[split] for role, split in roles.items()}
    described = dict(roles)

    def part(role: str, split: str, held_out: bool) -> None:
        data[role] = splits[split].filter(HeldOut(image, seed, held_out))
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
    shuffled = data["calibration"].shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
    seen = list(islice(shuffled, 4 * calibration_size))  # enough to give every class its share
    if not seen:
        raise DataError(f"split {roles['calibration']!r} yields no row to calibrate on; give more rows")
    chosen = stratified(labels_of(seen), calibration_size, np.random.default_rng([seed, _CALIBRATION]))
    features = splits[roles["calibration"]].features
    data["calibration"] = datasets.Dataset.from_list([seen[i] for i in chosen], features=features)
    described["calibration"] = f"{len(chosen):,} rows of {roles['calibration']}"
    for role, most in (("train", max_train_samples), ("validation", max_eval_samples), ("test", max_eval_samples)):
        if role in data and most is not None:
            data[role] = data[role].take(most)
            described[role] = f"at most {most:,} rows of {described[role]}"
    if "train" in data:
        data["train"] = data["train"].shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
    return data, described


def _revision(dataset_id: str, splits: Mapping[str, Any]) -> str | None:
    """The commit that a Hub dataset was read at (a folder in the cache of `datasets`), else the revision asked for."""
    for rows in splits.values():
        for file in getattr(rows, "cache_files", ()):
            if commits := [part for part in Path(file["filename"]).parts if re.fullmatch("[0-9a-f]{40}", part)]:
                return commits[-1]
    return dataset_id.partition("@")[2] or None


def _cannot_open(dataset_id: str, is_folder: bool, error: BaseException) -> str:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, ValueError) and re.search("config", reason, re.IGNORECASE):
        return f"dataset {dataset_id!r} cannot be opened ({reason}); pass --dataset-config-name"
    if is_folder:
        return (
            f"folder {dataset_id!r} cannot be read as a dataset ({reason}); it should hold parquet files, one "
            "folder of images a class (perhaps under train/, validation/, test/), or what `save_to_disk` wrote"
        )
    if Path(dataset_id).is_file():
        return f"{dataset_id!r} is a file; give the folder that holds it"
    close = [name for name in get_close_matches(dataset_id, ["digits", *ALIASES], n=1) if name != dataset_id]
    hint = f"did you mean {close[0]!r}? Otherwise check" if close else "check"
    return (
        f"dataset {dataset_id!r} is neither a folder nor a dataset that can be reached ({reason}); {hint} the id on "
        "https://huggingface.co/datasets and the network (HF_HUB_OFFLINE allows cached datasets only), log in with "
        "`hf auth login` if it is gated, or give a folder"
    )
