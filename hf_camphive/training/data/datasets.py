"""Opening a bundled, Hub or local dataset, and finding its columns and classes."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
from torch import nn

from hf_camphive.core.errors import DataError, did_you_mean
from hf_camphive.network.timm_interface import timm_interface
from hf_camphive.training.data.splits import stratified

ALIASES = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "imagenet-1k": "ILSVRC/imagenet-1k",
}
_IMAGE_NAMES = ("image", "img", "jpg", "png", "pixel_values")
_LABEL_NAMES = ("label", "labels", "fine_label", "fine_labels", "cls", "target", "class")
_MOST_CLASSES = 100_000  # that integer labels make up; ImageNet-21k has 21,841
_LEAST_ROWS, _LEAST_SHARE = 2, 0.1  # of an integer that is a class: rows, and rows relative to those of the mean class
_NAMED = "the dataset names {0} classes (0 to {1}); correct or remove such rows, or name their class too"
_UNNAMED = (
    "the network has {0} classes (0 to {1}) and the dataset names none; correct or remove such rows or, if the dataset "
    "has other classes, name them (`cast_column` to a ClassLabel of `datasets`), and the classifier is replaced"
)


def open_dataset(
    dataset_id: str, config_name: str | None = None, streaming: bool = False
) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
    """Open a bundled, Hub or local dataset and return its splits by name.

    Raises:
        DataError: There is no such dataset, or it cannot be read.
    """
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


def digits() -> dict[str, datasets.Dataset]:
    """Return scikit-learn's 1,797 handwritten digits of 8x8 pixels, always divided into the same 1197/300/300 rows."""
    from sklearn.datasets import load_digits  # takes a second, and few runs need it

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
    """Find the image and the label column by type, and by common names if there are several; given names are used as is.

    Raises:
        DataError: There is no such column, several cannot be told apart, or a given one has another type.
    """
    return (
        _find_column(features, image, _is_image, _IMAGE_NAMES, "image", "images"),
        _find_column(features, label, _is_label, _LABEL_NAMES, "label", "whole numbers or class labels"),
    )


def read_labels(rows: datasets.Dataset, label: str) -> np.ndarray:
    """Return the labels of all rows, int64 [N], with -1 for a missing one; reads no image."""
    column = rows.select_columns([label]).with_format("arrow")[:][label]
    return column.fill_null(-1).to_numpy().astype(np.int64)


def class_names(feature: Any, labels: Mapping[str, np.ndarray], net: nn.Module) -> tuple[str, ...]:
    """Return one name per class: the dataset's, else the network's, else the numbers of the training labels.

    `labels` holds those of every split in use, under the name that an error gives it; the first is trained on. The names
    of the column decide, whatever labels there are. Without names the network's classes hold if the training labels are
    among them; else these labels must be numbers 0 .. K-1 without a gap and without a rare one. No other label decides.

    Raises:
        DataError: A label is outside the classes, or a new classifier would have no training rows of it.
    """
    training, classes = next(iter(labels)), timm_interface(net).num_classes
    if names := tuple(feature.names or ()) if isinstance(feature, datasets.ClassLabel) else ():
        _check_range(labels, len(names), _NAMED)
    elif labels[training].max(initial=-1) < classes or not _are_classes(labels[training]):
        names = tuple(timm_interface(net).pretrained_cfg.get("label_names") or ())
        names = names if len(names) == classes else tuple(str(i) for i in range(classes))
        _check_range(labels, len(names), _UNNAMED)
    else:
        names = tuple(str(i) for i in range(labels[training].max() + 1))
    if len(names) != classes:
        _check_trained(labels, training, net)
    return names


def revision_read(dataset_id: str, splits: Mapping[str, Any]) -> str | None:
    """Return the commit of a Hub dataset (a folder in the cache of `datasets`), else the revision in its id, else None."""
    for rows in splits.values():
        for file in getattr(rows, "cache_files", ()):
            if commits := [part for part in Path(file["filename"]).parts if re.fullmatch("[0-9a-f]{40}", part)]:
                return commits[-1]
    return dataset_id.partition("@")[2] or None


def _are_classes(labels: np.ndarray) -> bool:
    """Whether integers [rows] are the classes 0 .. K-1 of a dataset, rather than other numbers or some mistakes."""
    values, rows = np.unique(labels, return_counts=True)
    least = max(_LEAST_ROWS, _LEAST_SHARE * rows.mean())
    return values[0] == 0 and values[-1] == len(values) - 1 < _MOST_CLASSES and bool((rows >= least).all())


def _check_range(labels: Mapping[str, np.ndarray], classes: int, reason: str) -> None:
    for place, values in labels.items():
        if (wrong := values >= classes).any():
            raise DataError(f"{_located(values, wrong, place)}: {reason.format(classes, classes - 1)}")


def _check_trained(labels: Mapping[str, np.ndarray], training: str, net: nn.Module) -> None:
    known = np.append(np.unique(labels[training]), -1)  # -1 is a row without a label
    for place, values in labels.items():
        if (wrong := ~np.isin(values, known)).any():
            raise DataError(
                f"{_located(values, wrong, place)}: {training} has no such row to train a new classifier on, and the "
                f"network's {net.num_classes} classes are others; add such rows to {training}, or remove them from {place}"
            )


def _located(labels: np.ndarray, wrong: np.ndarray, place: str) -> str:
    """Labels where `wrong` holds and their rows, in words; the rarest label first, as it is the likeliest mistake."""
    values, inverse, count = np.unique(labels[wrong], return_inverse=True, return_counts=True)
    rows = np.flatnonzero(wrong)[np.argsort(count[inverse], kind="stable")]
    values = values[np.argsort(count, kind="stable")]
    return f"{_few('label', values)} in {_few('row', rows)} (counted from 0) of {place}"


def _few(kind: str, numbers: np.ndarray) -> str:
    more = f" and {len(numbers) - 3:,} more" if len(numbers) > 3 else ""
    return f"{kind}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:3]))}{more}"


def _with_features(streams: Mapping[str, datasets.IterableDataset]) -> dict[str, datasets.IterableDataset]:
    # A stream without a header has no known columns until its first rows are read.
    return {split: rows if rows.features else rows._resolve_features() for split, rows in streams.items()}


def _cannot_open(dataset_id: str, is_folder: bool, error: BaseException) -> str:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, ValueError) and re.search("config", reason, re.IGNORECASE):
        return f"dataset {dataset_id!r} cannot be opened ({reason}); pass --dataset-config-name"
    if is_folder:
        return (
            f"folder {dataset_id!r} cannot be read as a dataset ({reason}); it should hold parquet files, one "
            "folder of images per class (perhaps under train/, validation/, test/), or what `save_to_disk` wrote"
        )
    if Path(dataset_id).is_file():
        return f"{dataset_id!r} is a file; give the folder that holds it"
    hint = did_you_mean(dataset_id, ["digits", *ALIASES], otherwise="")
    check = f"{hint} Otherwise check" if hint else "check"
    return (
        f"dataset {dataset_id!r} is neither a folder nor a dataset that can be reached ({reason}); {check} the id on "
        "https://huggingface.co/datasets and the network (HF_HUB_OFFLINE allows cached datasets only), log in with "
        "`hf auth login` if it is gated, or give a folder"
    )


def _find_column(
    features: Mapping[str, Any], given: str | None, fits: Any, usual: Iterable[str], kind: str, content: str
) -> str:
    flag = f"--{kind}-column-name"
    columns = ", ".join(features)
    if given is not None:
        if given not in features:
            hint = did_you_mean(given, features, otherwise=f"pass one of them as {flag}")
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


def _is_image(feature: Any) -> bool:
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _is_label(feature: Any) -> bool:
    is_integer = isinstance(feature, datasets.Value) and re.fullmatch(r"u?int\d+", feature.dtype) is not None
    return is_integer or isinstance(feature, datasets.ClassLabel)


def _type_name(feature: Any) -> str:
    return f"{feature.dtype} values" if isinstance(feature, datasets.Value) else type(feature).__name__
