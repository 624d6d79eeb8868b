"""From the name or folder of a dataset to loaders with disjoint calibration, training and evaluation images.

Reads through `datasets` only; images are decoded when a batch needs them. All random choices use generators made from the
seed, except the training augmentation, which uses the global generators of torch and Python, as torchvision and timm do.
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchvision import transforms

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import DataError
from hf_camphive.training.data.datasets import (
    ALIASES,
    class_names,
    find_columns,
    open_dataset,
    read_labels,
    revision_read,
)
from hf_camphive.training.data.splits import USUAL_SPLITS, SplitOptions, divide, divide_streams

logger = logging.getLogger(__name__)

SMALL = 64
"""Largest side, in pixels, of images for which a network gets the CIFAR transforms."""

_WRITTEN = {"digits", "ylecun/mnist", "ufldl-stanford/svhn"}  # handwriting is not mirrored in training


@dataclass(frozen=True)
class DataOptions:
    """How a dataset is read, besides its id.

    `config_name` chooses one of several configurations of the dataset; columns that are None are found by type.
    `workers` are loading processes of each loader, `default_workers` where None. Calibration images come from
    `calibration_split`, by default from the training split. `max_train_samples` and `max_eval_samples` limit the
    training images, and those of validation and test each.
    """

    config_name: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    streaming: bool = False
    workers: int | None = None
    calibration_split: str | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None


DEFAULT_OPTIONS = DataOptions()


@dataclass(frozen=True)
class DatasetInfo:
    """Description of the data for the report; `splits` and `rows` are keyed by role.

    Roles are calibration, train, validation and test. Streamed splits are not counted and missing from `rows` and
    `label_digests`, which holds a short SHA-256 of the labels in the order of the rows.
    """

    dataset_id: str
    config_name: str | None
    revision: str | None
    image_column: str
    label_column: str
    label_names: tuple[str, ...]
    splits: dict[str, str]
    rows: dict[str, int]
    label_digests: dict[str, str]


@dataclass(frozen=True)
class Loaders:
    """Loaders of batches {"pixel_values": float [B, C, H, W], "labels": long [B]}; None where the dataset has no such split.

    Calibration images have the evaluation transform and a fixed order.
    """

    calibration: DataLoader
    train: DataLoader | None
    validation: DataLoader
    test: DataLoader | None
    info: DatasetInfo

    @property
    def evaluation(self) -> tuple[DataLoader, str]:
        """The loader on which accuracies are reported, and its split: test if there is one, else validation."""
        role, loader = ("validation", self.validation) if self.test is None else ("test", self.test)
        return loader, self.info.splits[role]


@dataclass(frozen=True)
class RowTransform:
    """Transform rows {column: values} to {"pixel_values": tensors [C, H, W], "labels": ints}; can be pickled.

    Raises:
        DataError: An image is damaged, or a label is not below `classes` (the labels of streams are checked only here).
    """

    image_transform: Any
    image_column: str
    label_column: str
    mode: str
    classes: int
    split: str

    def __call__(self, rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        images, labels = rows[self.image_column], list(rows[self.label_column])
        for value, number in zip(images, labels):
            if number is not None and number >= self.classes:
                raise DataError(
                    f"label {number} of image {_file_name(value)} in {self.split}: there are {self.classes} classes (0 to "
                    f"{self.classes - 1}); correct or remove that row"
                )
        images = [self.image_transform(decode_image(value).convert(self.mode)) for value in images]
        return {"pixel_values": images, "labels": labels}


class Counted(IterableDataset):
    """A stream of at most `count` rows that has a length, which an epoch of training needs."""

    def __init__(self, rows: datasets.IterableDataset, count: int) -> None:
        self.rows, self.count = rows, count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        """Shuffle in the order of this epoch."""
        self.rows.set_epoch(epoch)


def load_loaders(
    dataset_id: str,
    net: nn.Module,
    config: CampHiVeConfig,
    options: DataOptions = DEFAULT_OPTIONS,
) -> Loaders:
    """Open a dataset and divide it into loaders that suit the network `net`.

    `dataset_id` is "digits", an alias, a Hub id (perhaps with "@revision") or a folder (parquet, class folders,
    `save_to_disk`). Accuracies are reported on `test` where its labels are real, else on `validation`; a missing
    validation split is a tenth of `train`, never of `test`. A dataset without `train` is divided into calibration and
    evaluation images. A streamed training split has a length, which training needs, only with `max_train_samples`.

    Raises:
        DataError: The dataset cannot be opened, has no usable columns or labels, or does not suit the network.
    """
    name = ALIASES.get(dataset_id.partition("@")[0], dataset_id.partition("@")[0])
    splits, image, label = _open(dataset_id, options)
    feature = _first_split(splits).features[label]
    divided = _divide(splits, image, label, config, options)
    data, described = divided.data, divided.described
    info = DatasetInfo(
        dataset_id=name,
        config_name=options.config_name,
        revision=revision_read(dataset_id, splits),
        image_column=image,
        label_column=label,
        label_names=class_names(feature, divided.labels, net),
        splits=described,
        rows={role: len(numbers) for role, numbers in divided.known.items()},
        label_digests={
            role: hashlib.sha256(numbers.tobytes()).hexdigest()[:16] for role, numbers in divided.known.items()
        },
    )
    _log(described, len(data["calibration"]), config.calibration_size)
    train_transform, eval_transform = image_transforms(net, name not in _WRITTEN)
    row = partial(RowTransform, image_column=image, label_column=label, mode=_colour_mode(net))
    make = partial(
        _loader, workers=default_workers(net) if options.workers is None else options.workers, config=config
    )
    loaders: dict[str, DataLoader] = {}
    for role, rows in data.items():
        training = role == "train"
        chosen = train_transform if training else eval_transform
        transform = row(chosen, classes=len(info.label_names), split=described[role])
        loaders[role] = make(rows, transform, training=training, count=options.max_train_samples if training else None)
    return Loaders(loaders["calibration"], loaders.get("train"), loaders["validation"], loaders.get("test"), info)


def _open(dataset_id: str, options: DataOptions) -> tuple[dict[str, Any], str, str]:
    """Return the splits that have an image and a label column, reduced to those with images undecoded, and the columns."""
    splits = open_dataset(dataset_id, options.config_name, options.streaming)
    image, label = find_columns(_first_split(splits).features, options.image_column, options.label_column)
    for split in [s for s, rows in splits.items() if not {image, label} <= set(rows.features)]:
        logger.warning("split %r lacks column %r or %r and is not used", split, image, label)
        del splits[split]
    undecoded = datasets.Image(decode=False)
    splits = {s: rows.select_columns([image, label]).cast_column(image, undecoded) for s, rows in splits.items()}
    return splits, image, label


def _first_split(splits: Mapping[str, Any]) -> Any:
    """Return the training split, or the first one if there is none."""
    return next((splits[s] for s in USUAL_SPLITS["train"] if s in splits), next(iter(splits.values())))


@dataclass(frozen=True)
class _Divided:
    """Rows by role, their descriptions, the labels of counted roles, and those of every split in use, by its name."""

    data: dict[str, Any]
    described: dict[str, str]
    known: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]


def _divide(
    splits: Mapping[str, Any], image: str, label: str, config: CampHiVeConfig, options: DataOptions
) -> _Divided:
    """Divide the splits into roles; the first of `labels` is that of the rows that are trained on."""
    division = SplitOptions(
        config.calibration_size,
        config.seed,
        options.calibration_split,
        options.max_train_samples,
        options.max_eval_samples,
    )
    if options.streaming:
        data, described = divide_streams(splits, image, label, division)
        known = {"calibration": read_labels(data["calibration"], label)}
        return _Divided(data, described, known, {f"the {described['calibration']}": known["calibration"]})
    of_split = {split: read_labels(rows, label) for split, rows in splits.items()}
    subsets = divide(of_split, division)
    used = [subsets[role].split for role in ("train", "calibration", "validation", "test") if role in subsets]
    return _Divided(
        {role: splits[subset.split].select(subset.rows) for role, subset in subsets.items()},
        {role: str(subset) for role, subset in subsets.items()},
        {role: of_split[subset.split][subset.rows] for role, subset in subsets.items()},
        {f"split {split!r}": of_split[split] for split in used},
    )


def _log(described: Mapping[str, str], count: int, asked: int) -> None:
    for role in described:
        logger.info("%s: %s", role, described[role])
    if count < asked:
        logger.warning("calibration uses all of the %d rows there are, instead of %d", count, asked)


def image_transforms(net: nn.Module, flip: bool = True) -> tuple[transforms.Compose, transforms.Compose]:
    """Return the training and the evaluation transform of a timm network: PIL image to normalised float [C, H, W].

    Networks for images of up to 64 pixels get the CIFAR transforms: images of the network's own size are not resampled,
    and training takes a random crop from 4 pixels of padding (He et al. 2015, section 4.2; an eighth of the side if that
    is less) and flips at random if `flip` is set. Larger networks get timm's transforms.
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
    """Decode an image {"bytes", "path"} and turn it upright.

    Raises:
        DataError: The image is damaged.
    """
    try:
        return datasets.Image().decode_example(value)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"image {_file_name(value)} cannot be decoded ({error}); restore it or remove its row"
        ) from error


def _file_name(value: Any) -> str:
    return (value.get("path") if isinstance(value, Mapping) else None) or "(without a file name)"


def default_workers(net: nn.Module) -> int:
    """Return the number of loading processes per loader: 0 for small images on a CPU, else up to 8 per training process."""
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
        # A last batch of a few images would give BatchNorm a poor mean. (The length of a stream is not known.)
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
