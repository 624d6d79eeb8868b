"""Columns and classes are found by what they hold; every dataset that is unclear says what to do."""

from collections import Counter

import datasets
import numpy as np
import pytest
import timm
from datasets import ClassLabel, Image, Value

import hf_camphive.network.modeling.cifar  # noqa: F401
from hf_camphive.core.errors import DataError
from hf_camphive.training.data.datasets import _with_features, class_names, digits, find_columns

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


def every(*counts):
    """Labels 0, 1, ... with so many rows each."""
    return np.repeat(np.arange(len(counts)), counts)


def network(classes=3, **config):
    return timm.create_model("cifar_resnet20", num_classes=classes, pretrained_cfg_overlay=config)


def test_class_names_follow_the_dataset_then_the_network_then_the_training_labels():
    net, numbers = network(), Value("int64")
    assert class_names(ClassLabel(names=["a", "b"]), {"split 'train'": every(3, 3)}, net) == ("a", "b")
    assert class_names(ClassLabel(names=NAMES), {"split 'train'": every(3, 3)}, net) == tuple(NAMES)
    assert class_names(numbers, {"split 'train'": every(3, 3)}, net) == ("0", "1", "2")
    assert class_names(numbers, {"split 'train'": every(3, 3)}, network(label_names=NAMES)) == tuple(NAMES)
    splits = {"split 'train'": every(9, 9, 9, 2, 9), "split 'test'": every(1, 1, 1, 1, 1)}
    assert class_names(numbers, splits, net) == ("0", "1", "2", "3", "4")


def test_a_class_that_the_network_knows_needs_no_training_rows():
    splits = {"split 'train'": every(3, 3), "split 'validation'": every(1, 1, 1)}
    assert class_names(Value("int64"), splits, network()) == ("0", "1", "2")
    assert class_names(ClassLabel(names=NAMES), splits, network()) == tuple(NAMES)


@pytest.mark.parametrize("stray", [3, 999, 10**12])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_stray_label_is_refused_and_named(stray, split):
    splits = {"split 'train'": every(30, 30, 30), "split 'test'": every(30, 30, 30)}
    splits[f"split {split!r}"][[7, 80]] = stray
    with pytest.raises(DataError) as refused:
        class_names(Value("int64"), splits, network())
    assert str(refused.value) == (
        f"label {stray} in rows 7, 80 (counted from 0) of split {split!r}: the network has 3 classes (0 to 2) and the "
        "dataset names none; correct or remove such rows or, if the dataset has other classes, name them (`cast_column` "
        "to a ClassLabel of `datasets`), and the classifier is replaced"
    )
    located = rf"labels? {stray}.* in rows 7, 80.* of split '{split}': "
    with pytest.raises(DataError, match=rf"{located}the dataset names 3 classes \(0 to 2\); correct or remove"):
        class_names(ClassLabel(names=NAMES), splits, network())
    with pytest.raises(DataError, match=located):  # the other labels are three classes, where the network has two
        class_names(Value("int64"), splits, network(classes=2))


def test_integer_labels_with_gaps_are_no_classes():
    labels = np.repeat([0, 2, 4, 6], 20)
    with pytest.raises(DataError, match=r"labels 4, 6 in rows 40, 41, 42 and 37 more .*the network has 3 classes"):
        class_names(Value("int64"), {"split 'train'": labels}, network())
    with pytest.raises(DataError, match="the network has 3 classes"):  # a number of each row, say
        class_names(Value("int64"), {"split 'train'": np.arange(50)}, network())
    with pytest.raises(DataError, match="the network has 3 classes"):
        class_names(Value("int64"), {"split 'train'": np.repeat(np.arange(150_000), 2)}, network())


@pytest.mark.parametrize("feature", [Value("int64"), ClassLabel(names=list("abcd"))])
def test_a_new_classifier_needs_training_rows_of_every_class_that_is_tested(feature):
    extra = 3  # of the four classes that the feature names, or of no class that numbers make up
    splits = {"split 'train'": every(9, 9, 9), "split 'test'": np.array([0, extra, 1, extra])}
    with pytest.raises(DataError) as refused:
        class_names(feature, splits, network(classes=2))
    assert str(refused.value) == (
        f"label {extra} in rows 1, 3 (counted from 0) of split 'test': split 'train' has no such row to train a new "
        "classifier on, and the network's 2 classes are others; add such rows to split 'train', or remove them from "
        "split 'test'"
    )


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
