"""Rows divided into roles: disjoint, stratified, repeatable; a pure function of labels."""

import logging
from collections import Counter

import numpy as np
import pytest

from hf_camphive.core.errors import DataError
from hf_camphive.training.data.splits import HeldOut, SplitOptions, divide, stratified


def labels_of(*counts, seed=0):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


def test_stratified_counts_are_exact():
    labels = labels_of(600, 300, 100)
    chosen = stratified(labels, 50, np.random.default_rng(0))
    assert Counter(labels[chosen].tolist()) == {0: 30, 1: 15, 2: 5}
    assert len(set(chosen.tolist())) == 50
    uneven = stratified(labels_of(5, 5, 5), 7, np.random.default_rng(0))
    assert sorted(Counter(labels_of(5, 5, 5)[uneven].tolist()).values()) == [2, 2, 3]


def test_what_is_left_over_goes_to_the_largest_remainders():
    # Shares of 8 among 60, 25 and 15: 4.8, 2.0 and 1.2, so the one left over goes to the first class.
    labels = labels_of(60, 25, 15)
    for seed in range(5):
        chosen = stratified(labels, 8, np.random.default_rng(seed))
        assert Counter(labels[chosen].tolist()) == {0: 5, 1: 2, 2: 1}


def test_shares_that_are_whole_numbers_stay_whole():
    # 300 * 0.1 and the like come out a hair below a whole number in floating point.
    for counts in ((30, 70), (3, 7, 90), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)):
        total = sum(counts)
        for count in range(1, total):
            labels = labels_of(*counts)
            got = Counter(labels[stratified(labels, count, np.random.default_rng(0))].tolist())
            assert all(abs(got[c] - count * n / total) < 1 for c, n in enumerate(counts))


def test_a_prefix_of_the_calibration_rows_holds_every_class():
    labels = np.repeat(np.arange(10), 100)
    chosen = stratified(labels, 500, np.random.default_rng(3))
    assert set(labels[chosen[:100]].tolist()) == set(range(10))


def test_more_rows_than_there_are_gives_all_of_them():
    assert sorted(stratified(labels_of(3, 4), 100, np.random.default_rng(0))) == list(range(7))


def test_one_row_a_class_is_divided_too():
    labels = np.arange(100)
    parts = divide({"validation": labels}, SplitOptions(calibration_size=1024, seed=0))
    assert len(parts["calibration"].rows) == 60 and len(parts["validation"].rows) == 40
    assert not set(parts["calibration"].rows) & set(parts["validation"].rows)
    assert "train" not in parts and "test" not in parts
    assert str(parts["calibration"]) == "60 of 100 rows of validation"


def test_validation_comes_out_of_train_and_never_out_of_test():
    labels = {"train": labels_of(300, 200, 100), "test": labels_of(30, 30, 30)}
    parts = divide(labels, SplitOptions(calibration_size=120, seed=0))
    assert {role: part.split for role, part in parts.items()} == {
        "calibration": "train",
        "train": "train",
        "validation": "train",
        "test": "test",
    }
    validation, train, calibration = (set(parts[r].rows.tolist()) for r in ("validation", "train", "calibration"))
    assert Counter(labels["train"][sorted(validation)].tolist()) == {0: 30, 1: 20, 2: 10}
    assert Counter(labels["train"][sorted(calibration)].tolist()) == {0: 60, 1: 40, 2: 20}
    assert not validation & train and not validation & calibration
    assert calibration <= train and len(train) == 540
    assert str(parts["test"]) == "test" and str(parts["validation"]) == "60 of 600 rows of train"


def test_the_validation_split_carved_is_at_most_5000_rows():
    parts = divide({"train": np.zeros(80_000, int)}, SplitOptions(calibration_size=100, seed=0))
    assert len(parts["validation"].rows) == 5000 and len(parts["train"].rows) == 75_000


def test_the_seed_decides_and_repeats():
    labels = {"train": labels_of(300, 200, 100), "test": labels_of(9, 9, 9)}
    first, again, other = (divide(labels, SplitOptions(calibration_size=60, seed=seed)) for seed in (0, 0, 1))
    for role, part in first.items():
        assert np.array_equal(part.rows, again[role].rows)
        assert np.array_equal(part.rows, other[role].rows) == (role == "test")


def test_limits_are_stratified_and_reach_every_evaluation_split():
    labels = {"train": labels_of(300, 200, 100), "validation": labels_of(60, 60), "test": labels_of(90, 30)}
    parts = divide(labels, SplitOptions(calibration_size=30, seed=0, max_train_samples=12, max_eval_samples=20))
    assert {role: len(part.rows) for role, part in parts.items()} == {
        "calibration": 30,
        "train": 12,
        "validation": 20,
        "test": 20,
    }
    assert Counter(labels["test"][parts["test"].rows].tolist()) == {0: 15, 1: 5}
    carved = divide({"train": labels["train"]}, SplitOptions(calibration_size=30, seed=0, max_eval_samples=6))
    assert len(carved["validation"].rows) == 6


def test_a_calibration_split_that_is_evaluated_gives_up_its_calibration_rows():
    labels = {"train": labels_of(60, 60), "validation": labels_of(50, 50), "test": labels_of(30, 30)}
    parts = divide(labels, SplitOptions(calibration_size=40, seed=0, calibration_split="validation"))
    assert len(parts["calibration"].rows) == 40 and len(parts["validation"].rows) == 60
    assert not set(parts["calibration"].rows) & set(parts["validation"].rows)
    assert len(parts["train"].rows) == 120 and len(parts["test"].rows) == 60


def test_a_lone_test_split_is_divided_into_calibration_and_validation():
    parts = divide({"test": labels_of(50, 50)}, SplitOptions(calibration_size=20, seed=0))
    assert {role: (part.split, len(part.rows)) for role, part in parts.items()} == {
        "calibration": ("test", 20),
        "validation": ("test", 80),
    }


def test_a_test_split_without_real_labels_is_not_evaluated(caplog):
    labels = {"train": labels_of(30, 30), "validation": labels_of(9, 9), "test": np.full(20, -1)}
    with caplog.at_level(logging.WARNING):
        parts = divide(labels, SplitOptions(calibration_size=20, seed=0))
    assert set(parts) == {"calibration", "train", "validation"}
    assert "'test' has rows without a label" in caplog.text


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ({"train": np.array([0, 1, -1])}, {}, "'train' has no labels in some of its rows"),
        ({"test": np.full(5, -1)}, {}, "no split has labels"),
        ({"spring": np.zeros(5, int), "autumn": np.zeros(5, int)}, {}, "none is named train, validation or test"),
        ({"train": np.zeros(9, int)}, {"calibration_split": "trian"}, "no split 'trian' to calibrate on"),
        ({"train": np.zeros(1, int)}, {}, "no row is left"),
        ({"train": np.zeros(0, int)}, {}, "'train' has no labels|no row"),
        (
            {"train": np.zeros(50, int), "extra": np.full(5, -1)},
            {"calibration_split": "extra"},
            "'extra' has no labels",
        ),
    ],
)
def test_labels_that_cannot_be_divided(labels, options, message):
    with pytest.raises(DataError, match=message):
        divide(labels, SplitOptions(calibration_size=20, seed=0, **options))


def test_a_streamed_row_is_held_out_by_its_content_in_any_order():
    held = [HeldOut("img", 0, True)({"img": {"bytes": bytes([i]), "path": None}}) for i in range(256)]
    rest = [HeldOut("img", 0, False)({"img": {"bytes": bytes([i]), "path": None}}) for i in range(256)]
    assert held == [not kept for kept in rest]
    assert 10 < sum(held) < 45
    assert held != [HeldOut("img", 1, True)({"img": {"bytes": bytes([i]), "path": None}}) for i in range(256)]
    assert isinstance(HeldOut("img", 0, True)({"img": {"bytes": None, "path": "a/b.png"}}), bool)
