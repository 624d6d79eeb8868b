"""Columns and classes are found by what they hold; every dataset that is unclear says what to do."""

from collections import Counter

import datasets
import numpy as np
import pytest
import timm
from datasets import ClassLabel, Image, Value

import hf_camphive.cifar  # noqa: F401
from hf_camphive.errors import DataError
from hf_camphive.sources import _with_features, class_names, digits, find_columns

NAMES = ["ant", "bee", "cat"]
FEATURES = {"img": Image(), "fine_label": ClassLabel(names=NAMES), "coarse_label": ClassLabel(names=["x"])}


def test_columns_are_found_by_type_then_by_name():
    assert find_columns(FEATURES) == ("img", "fine_label")
    assert find_columns(FEATURES, label="coarse_label") == ("img", "coarse_label")
    assert find_columns({"photo": Image(), "species": ClassLabel(names=NAMES), "id": Value("int64")}) == (
        "photo",
        "species",
    )
    untyped = {"picture": {"bytes": Value("binary"), "path": Value("string")}, "label": Value("int32")}
    assert find_columns(untyped) == ("picture", "label")
    assert find_columns({"mask": Image(), "image": Image(), "label": Value("uint8")}) == ("image", "label")


@pytest.mark.parametrize(
    ("features", "given", "message"),
    [
        (
            {"text": Value("string"), "label": Value("int64")},
            {},
            "no image column among text, label.*--image-column-name",
        ),
        ({"image": Image(), "text": Value("string")}, {}, "no label column among image, text.*--label-column-name"),
        ({"left": Image(), "right": Image(), "label": Value("int64")}, {}, r"several image columns \(left, right\)"),
        (
            {"image": Image(), "a": ClassLabel(names=["x"]), "b": ClassLabel(names=["x"])},
            {},
            r"several label columns \(a, b\)",
        ),
        ({"image": Image(), "label": Value("string")}, {}, "'label' holds string values.*class_encode_column"),
        (FEATURES, {"image": "image"}, "no image column 'image' among img, fine_label, coarse_label.*'img'"),
        (FEATURES, {"label": "fine_labels"}, "did you mean 'fine_label'"),
        (FEATURES, {"image": "fine_label"}, "'fine_label' holds ClassLabel, not images.*--image-column-name"),
        (FEATURES, {"label": "img"}, "'img' holds Image, not whole numbers.*--label-column-name"),
    ],
)
def test_columns_that_are_missing_or_unclear(features, given, message):
    with pytest.raises(DataError, match=message):
        find_columns(features, **given)


def test_class_names_follow_the_dataset_then_the_network():
    net = timm.create_model("cifar_resnet20", num_classes=3)
    names = ClassLabel(names=["a", "b"])
    assert class_names(names, 1, net) == ("a", "b")
    assert class_names(names, 2, net) == ("0", "1", "2")  # labels beyond the names: they are the network's
    assert class_names(Value("int64"), 1, net) == ("0", "1", "2")
    assert class_names(Value("int64"), 5, net) == ("0", "1", "2", "3", "4", "5")
    named = timm.create_model("cifar_resnet20", num_classes=3, pretrained_cfg_overlay={"label_names": NAMES})
    assert class_names(Value("int64"), 2, named) == ("ant", "bee", "cat")


def test_a_stream_whose_columns_are_known_only_from_its_rows():
    row = {"img": {"bytes": b"", "path": "a"}, "label": 1}
    stream = datasets.IterableDataset.from_generator(lambda: iter([row] * 3))
    assert stream.features is None
    assert _with_features({"train": stream})["train"].features["label"] == Value("int64")


def test_digits_are_always_divided_alike():
    splits, again = digits(), digits()
    assert {split: len(part) for split, part in splits.items()} == {"train": 1197, "validation": 300, "test": 300}
    images = {split: [np.asarray(i).tobytes() for i in part["image"]] for split, part in splits.items()}
    # All of the 1,797 images are in, none twice (no two of them are equal).
    assert len({i for part in images.values() for i in part}) == 1797
    assert images["test"] == [np.asarray(i).tobytes() for i in again["test"]["image"]]
    for part in splits.values():
        counts = Counter(part["label"]).values()
        assert max(counts) - min(counts) <= 0.05 * len(part) * 0.5
