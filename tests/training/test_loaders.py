"""Splits are disjoint, stratified and repeatable; images arrive untouched; every bad input says what to do."""

import logging
import pickle
from collections import Counter
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

import hf_camphive.network.modeling.cifar  # noqa: F401
from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import DataError
from hf_camphive.training.data import loaders as data

DATA = Path(__file__).resolve().parents[2] / "../shared/data"
NAMES = ["ant", "bee", "cat"]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def net():
    return timm.create_model("cifar_resnet20", num_classes=3).eval()


def picture(code, size=32):
    """A picture whose first pixels spell `code`, so that a row can be told from its tensor."""
    pixels = np.random.default_rng(code).integers(0, 256, (size, size, 3), dtype=np.uint8)
    pixels[0, 0] = code // 256, code % 256, 77
    return PIL.Image.fromarray(pixels)


def rows(count, start=0, label="label", feature=None, labels=None, size=32):
    """`count` rows with codes from `start`; labels in the proportion 3:2:1."""
    labels = [[0, 0, 0, 1, 1, 2][i % 6] for i in range(count)] if labels is None else labels
    features = Features({"img": Image(), label: feature or ClassLabel(names=NAMES), "note": Value("string")})
    values = {"img": [picture(start + i, size) for i in range(count)], label: labels, "note": ["x"] * count}
    return Dataset.from_dict(values, features=features)


def save(folder, **splits):
    DatasetDict(splits).save_to_disk(folder)
    return str(folder)


def read_codes(loader, net):
    """The codes of the pictures that a loader with the evaluation transform yields."""
    config = net.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = torch.cat([((batch["pixel_values"] * std + mean) * 255).round()[:, :2, 0, 0] for batch in loader])
    return [int(high) * 256 + int(low) for high, low in pixels.tolist()]


def read_labels(loader):
    return torch.cat([batch["labels"] for batch in loader]).tolist()


def config(**values):
    return CampHiVeConfig(**{"calibration_size": 30, "per_device_eval_batch_size": 32, **values})


# ---- transforms ----


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_an_image_of_the_networks_size_reaches_it_unresampled(crop_pct):
    net = timm.create_model("cifar_resnet20", pretrained_cfg_overlay={"crop_pct": crop_pct})
    _, evaluation = data.image_transforms(net)
    pixels = torch.from_numpy(np.array(picture(5))).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(net.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(evaluation(picture(5)), (pixels - mean) / std, rtol=0, atol=1e-6)


def test_training_on_small_images_is_a_crop_from_four_pixels_of_padding_and_a_flip(net):
    # Each corner of the picture tells where the crop fell; the picture is asymmetric, so a flip shows.
    pixels = np.arange(32 * 32, dtype=np.int32).reshape(32, 32) + 1
    image = PIL.Image.fromarray(np.stack([pixels // 256, pixels % 256, pixels * 0], -1).astype(np.uint8))
    mean, std = (torch.tensor(net.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))

    def seen(flip):
        training, _ = data.image_transforms(net, flip)
        torch.manual_seed(0)
        shifts, flipped = set(), set()
        for _ in range(300):
            tensor = ((training(image) * std + mean) * 255).round().int()
            value = (tensor[0] * 256 + tensor[1])[10:20, 10:20]
            steps = (value[:, 1:] - value[:, :-1]).unique().tolist()
            assert steps in ([1], [-1])  # neighbours stay neighbours: nothing was resampled
            flipped.add(steps[0])
            row, column = divmod(int(value[0, 0]) - 1, 32)
            shifts.add((row - 10, column - 10 if steps[0] == 1 else 31 - column - 10))
        return shifts, flipped

    shifts, flipped = seen(True)
    assert flipped == {1, -1}
    assert {s for pair in shifts for s in pair} == set(range(-4, 5))
    assert seen(False)[1] == {1}


def test_larger_networks_get_timms_own_transforms():
    net = timm.create_model("resnet18", device="meta")
    training, evaluation = data.image_transforms(net)
    expected = timm.data.create_transform(**timm.data.resolve_data_config({}, model=net))
    assert str(evaluation) == str(expected)
    assert "RandomResizedCrop" in str(training) and "HorizontalFlip" in str(training)
    assert "HorizontalFlip" not in str(data.image_transforms(net, flip=False)[0])


def test_row_transforms_can_be_pickled_and_convert_any_mode(net):
    row = data.RowTransform(data.image_transforms(net)[1], "img", "label", "RGB", 3, "test")
    row = pickle.loads(pickle.dumps(row))
    for mode in ("L", "RGBA", "P", "CMYK"):
        encoded = Image().encode_example(picture(3).convert(mode))
        out = row({"img": [encoded], "label": [1]})
        assert out["pixel_values"][0].shape == (3, 32, 32) and out["labels"] == [1]


def test_a_network_for_greyscale_gets_one_channel(tmp_path):
    grey = timm.create_model("cifar_resnet20", in_chans=1, pretrained_cfg_overlay={"input_size": (1, 32, 32)})
    grey.pretrained_cfg |= {"mean": (0.5,), "std": (0.5,)}
    loaders = data.load_loaders(save(tmp_path / "d", train=rows(60)), grey, config())
    assert next(iter(loaders.calibration))["pixel_values"].shape == (30, 1, 32, 32)
    odd = timm.create_model("cifar_resnet20", in_chans=4, pretrained_cfg_overlay={"input_size": (4, 32, 32)})
    with pytest.raises(DataError, match="reads 4 channels"):
        data.load_loaders(str(tmp_path / "d"), odd, config())


# ---- whole datasets ----


def write(kind, folder):
    splits = {"train": rows(120), "validation": rows(30, 1000), "test": rows(30, 2000)}
    if kind == "save_to_disk":
        return save(folder, **splits)
    for split, part in splits.items():
        if kind == "parquet":
            folder.mkdir(exist_ok=True)
            part.to_parquet(folder / f"{split}-00000-of-00001.parquet")
        else:
            for i, row in enumerate(part):
                target = folder / split / NAMES[row["label"]]
                target.mkdir(parents=True, exist_ok=True)
                row["img"].save(target / f"{i:03}.png")
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["save_to_disk", "parquet", "imagefolder"])
def test_every_layout_gives_the_same_rows(kind, streaming, tmp_path, net):
    folder = write(kind, tmp_path / "dataset")
    loaders = data.load_loaders(folder, net, config(), data.DataOptions(streaming=streaming, workers=0))
    assert loaders.info.label_names == tuple(NAMES)
    assert loaders.info.image_column == ("image" if kind == "imagefolder" else "img")
    assert loaders.info.dataset_id == folder and loaders.info.revision is None
    for loader, start, count in ((loaders.validation, 1000, 30), (loaders.test, 2000, 30)):
        found = dict(zip(read_codes(loader, net), read_labels(loader)))
        assert found == {start + i: [0, 0, 0, 1, 1, 2][i % 6] for i in range(count)}
    calibration = read_codes(loaders.calibration, net)
    assert calibration == read_codes(loaders.calibration, net)  # a fixed order
    assert len(set(calibration)) == 30 and set(calibration) <= set(range(120))
    assert Counter(read_labels(loaders.calibration)) == {0: 15, 1: 10, 2: 5}
    batch = next(iter(loaders.train))
    assert batch["pixel_values"].dtype == torch.float32 and batch["labels"].dtype == torch.int64
    assert loaders.info.rows["calibration"] == 30
    assert loaders.info.rows == {"calibration": 30} if streaming else loaders.info.rows["train"] == 120
    assert loaders.evaluation == (loaders.test, "test")


@pytest.mark.parametrize("streaming", [False, True])
def test_carved_splits_are_disjoint_and_repeat(streaming, tmp_path, net):
    folder = save(tmp_path / "d", train=rows(200))

    def load(**values):
        options = config(per_device_train_batch_size=1, **values)
        loaders = data.load_loaders(folder, net, options, data.DataOptions(streaming=streaming, workers=0))
        return loaders, read_codes(loaders.calibration, net), read_codes(loaders.validation, net)

    loaders, calibration, validation = load()
    assert loaders.test is None and loaders.evaluation[0] is loaders.validation
    assert len(validation) > 0 and not set(calibration) & set(validation)
    assert load()[1:] == (calibration, validation)
    assert load(seed=1)[1:] != (calibration, validation)
    # Read the training rows without augmentation, over two epochs of a stream too.
    loaders.train.dataset.set_epoch(1) if streaming else None
    trained = count_labels(loaders.train)
    total = Counter([0, 0, 0, 1, 1, 2][i % 6] for i in range(200))
    assert trained == total - Counter(read_labels(loaders.validation))


def count_labels(loader):
    return Counter(label for batch in loader for label in batch["labels"].tolist())


def test_a_stream_with_only_a_validation_split_is_divided(tmp_path, net):
    folder = save(tmp_path / "d", validation=rows(200))
    loaders = data.load_loaders(folder, net, config(calibration_size=16), data.DataOptions(streaming=True, workers=0))
    calibration, validation = read_codes(loaders.calibration, net), read_codes(loaders.validation, net)
    assert loaders.train is None and loaders.test is None
    assert calibration and not set(calibration) & set(validation)


def test_a_stream_of_which_nothing_is_held_out_cannot_calibrate(tmp_path, net):
    folder = save(tmp_path / "d", validation=rows(2))  # by their content, both rows are for validation
    with pytest.raises(data.DataError, match="split 'validation' yields no row to calibrate on; give more rows"):
        data.load_loaders(folder, net, config(calibration_size=16), data.DataOptions(streaming=True, workers=0))


def test_limits_on_streams(tmp_path, net):
    folder = save(tmp_path / "d", train=rows(100), test=rows(50, 2000))
    options = data.DataOptions(streaming=True, workers=0, max_train_samples=10, max_eval_samples=7)
    loaders = data.load_loaders(folder, net, config(per_device_train_batch_size=5), options)
    assert len(loaders.train) == 2 and sum(count_labels(loaders.train).values()) == 10
    loaders.train.dataset.set_epoch(1)
    assert sum(count_labels(loaders.train).values()) == 10
    assert sum(count_labels(loaders.test).values()) == 7
    assert loaders.info.splits["test"] == "at most 7 rows of test"


def test_training_batches_are_shuffled_by_the_seed(tmp_path, net):
    folder = save(tmp_path / "d", train=rows(64), validation=rows(10, 1000))

    def order(seed):
        loaders = data.load_loaders(
            folder, net, config(seed=seed, per_device_train_batch_size=64), data.DataOptions(workers=0)
        )
        return [read_labels(loaders.train), read_labels(loaders.train)]

    assert order(0) == order(0)
    assert order(0)[0] != order(0)[1] and order(0)[0] != order(1)[0]


def test_worker_processes_give_the_same_batches(tmp_path, net):
    folder = save(tmp_path / "d", train=rows(64), validation=rows(10, 1000))
    none, one = (data.load_loaders(folder, net, config(), data.DataOptions(workers=workers)) for workers in (0, 1))
    assert read_codes(none.calibration, net) == read_codes(one.calibration, net)


def test_images_are_decoded_only_when_a_batch_needs_them(tmp_path, net):
    broken = rows(40).cast_column("img", Image(decode=False))
    broken = broken.map(
        lambda row, i: {"img": {"bytes": b"no image" if i == 7 else row["img"]["bytes"], "path": "7.png"}},
        with_indices=True,
    )
    loaders = data.load_loaders(
        save(tmp_path / "d", train=rows(40), test=broken), net, config(), data.DataOptions(workers=0)
    )
    with pytest.raises(DataError, match=r"image 7.png cannot be decoded .*restore it or remove its row"):
        list(loaders.test)


def test_a_hub_id_an_alias_and_its_revision(tmp_path, net):
    folder = tmp_path / "src"
    folder.mkdir()
    rows(40).to_parquet(folder / "train-00000-of-00001.parquet")
    datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "made"))
    target = tmp_path / "cache" / "uoft-cs___cifar10" / "default" / "0.0.0" / ("a1" * 20)
    made = next((tmp_path / "made").rglob("dataset_info.json")).parent
    made.rename(target.parent.mkdir(parents=True) or target)
    for file in target.glob("src-*.arrow"):
        file.rename(file.with_name(file.name.replace("src-", "cifar10-")))
    info = data.load_loaders("cifar10", net, config(), data.DataOptions(workers=0)).info
    assert (info.dataset_id, info.revision) == ("uoft-cs/cifar10", "a1" * 20)


def test_an_alias_is_never_taken_for_a_folder_of_that_name(tmp_path, net, monkeypatch):
    save(tmp_path / "cifar10", train=rows(40))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="uoft-cs/cifar10"):
        data.load_loaders("cifar10", net, config())
    assert data.load_loaders("./cifar10", net, config(), data.DataOptions(workers=0)).info.dataset_id == "./cifar10"


def test_integer_labels_keep_their_meaning(tmp_path):
    net = timm.create_model("cifar_resnet20", num_classes=1000)
    labels = [0, 217, 482, 497] * 10
    folder = save(tmp_path / "d", train=rows(40, feature=Value("int64"), labels=labels))
    loaders = data.load_loaders(folder, net, config(), data.DataOptions(workers=0))
    assert set(read_labels(loaders.calibration)) == {0, 217, 482, 497}
    assert len(loaders.info.label_names) == 1000


@pytest.mark.parametrize(("split", "label"), [("train", 3), ("train", 10**12), ("test", 3), ("test", 999)])
def test_one_wrong_label_is_refused_and_named(split, label, tmp_path, net):
    parts = {
        name: rows(
            60,
            start,
            feature=Value("int64"),
            labels=[label if name == split and i == 41 else i % 3 for i in range(60)],
        )
        for name, start in (("train", 0), ("test", 1000))
    }
    with pytest.raises(
        DataError, match=rf"label {label} in row 41 \(counted from 0\) of split '{split}': the network"
    ):
        data.load_loaders(save(tmp_path / "d", **parts), net, config(), data.DataOptions(workers=0))


def test_a_wrong_label_of_a_stream_is_refused_where_it_is_read(tmp_path, net):
    train = rows(60, feature=Value("int64"), labels=[i % 3 for i in range(60)])
    test = rows(60, 1000, feature=Value("int64"), labels=[7 if i == 41 else i % 3 for i in range(60)])
    folder = save(tmp_path / "d", train=train, test=test)
    loaders = data.load_loaders(folder, net, config(), data.DataOptions(streaming=True, workers=0))
    assert loaders.info.label_names == ("0", "1", "2")
    with pytest.raises(
        DataError, match=r"label 7 of image .* in test: there are 3 classes \(0 to 2\); correct or remove"
    ):
        list(loaders.test)
    folder = save(tmp_path / "e", train=test)
    with pytest.raises(DataError, match=r"label 7 in row \d+ .* of the \d+ rows of train: the network has 3"):
        data.load_loaders(folder, net, config(calibration_size=60), data.DataOptions(streaming=True, workers=0))


def test_labels_have_a_digest_that_tells_one_changed_label(tmp_path, net):
    labels = [[0, 0, 0, 1, 1, 2][i % 6] for i in range(60)]
    train, test = rows(60, labels=labels), rows(30, 1000)
    first, again = (data.load_loaders(save(tmp_path / x, train=train, test=test), net, config()).info for x in "ab")
    assert first.label_digests == again.label_digests
    assert first.label_digests.keys() == {"calibration", "train", "validation", "test"}
    other = rows(60, labels=[*labels[:-1], 1])
    changed = data.load_loaders(save(tmp_path / "c", train=other, test=test), net, config(calibration_size=60)).info
    assert changed.label_digests["test"] == first.label_digests["test"]
    assert changed.label_digests["train"] != first.label_digests["train"]
    stream = data.load_loaders(str(tmp_path / "a"), net, config(), data.DataOptions(streaming=True, workers=0)).info
    assert stream.label_digests.keys() == {"calibration"}


def test_fewer_rows_than_asked_for_are_all_used_and_said(tmp_path, net, caplog):
    folder = save(tmp_path / "d", train=rows(40), validation=rows(10, 1000))
    with caplog.at_level(logging.WARNING):
        loaders = data.load_loaders(folder, net, config(calibration_size=1024), data.DataOptions(workers=0))
    assert loaders.info.rows["calibration"] == 40
    assert "all of the 40 rows there are, instead of 1024" in caplog.text


def test_a_split_without_the_columns_is_left_out(tmp_path, net, caplog):
    folder = save(tmp_path / "d", train=rows(60), test=rows(10).remove_columns("label"))
    with caplog.at_level(logging.WARNING):
        loaders = data.load_loaders(folder, net, config(), data.DataOptions(workers=0))
    assert loaders.test is None and "split 'test' lacks column" in caplog.text


def test_rows_without_a_label_are_told_in_every_form(tmp_path, net):
    labels = [None if i == 11 else i % 3 for i in range(30)]
    for streaming in (False, True):
        folder = save(tmp_path / f"n{streaming}", train=rows(60), test=rows(30, 1000, labels=labels))
        loaders = data.load_loaders(folder, net, config(), data.DataOptions(workers=0, streaming=streaming))
        assert loaders.test is None
        folder = save(tmp_path / f"t{streaming}", train=rows(30, labels=labels))
        with pytest.raises(DataError, match="'train' has no labels in some of its rows"):
            data.load_loaders(folder, net, config(), data.DataOptions(workers=0, streaming=streaming))


def test_a_single_saved_dataset_is_the_training_split(tmp_path, net):
    rows(60).save_to_disk(tmp_path / "one")
    loaders = data.load_loaders(str(tmp_path / "one"), net, config(), data.DataOptions(workers=0))
    assert loaders.info.splits["train"] == "54 of 60 rows of train"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/nothing", "neither a folder nor a dataset that can be reached.*check the id"),
        ("cifer10", "did you mean 'cifar10'"),
        ("./no/such/folder", "neither a folder"),
    ],
)
def test_unknown_datasets_fail_at_once(name, message, net):
    with pytest.raises(DataError, match=message):
        data.load_loaders(name, net, config())


def test_folders_that_are_no_dataset(tmp_path, net):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be read as a dataset"):
        data.load_loaders(str(tmp_path / "empty"), net, config())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"PAR1 interrupted")
    with pytest.raises(DataError, match="cannot be read as a dataset"):
        data.load_loaders(str(tmp_path / "broken"), net, config())
    with pytest.raises(DataError, match="is a file; give the folder"):
        data.load_loaders(str(tmp_path / "broken" / "train.parquet"), net, config())


def test_an_unknown_config_name_says_which_flag(tmp_path, net):
    folder = write("imagefolder", tmp_path / "d")
    with pytest.raises(DataError, match=r"'nonsense' not found.*pass --dataset-config-name"):
        data.load_loaders(folder, net, config(), data.DataOptions(config_name="nonsense"))


# ---- digits ----


def test_digits_are_not_mirrored_and_fit_the_bundled_network():
    net = timm.create_model("digits_resnet")
    loaders = data.load_loaders("digits", net, CampHiVeConfig(), data.DataOptions(workers=0))
    assert loaders.info.dataset_id == "digits" and loaders.info.label_names == tuple("0123456789")
    assert loaders.info.rows == {"calibration": 1024, "train": 1197, "validation": 300, "test": 300}
    assert next(iter(loaders.train))["pixel_values"].shape == (128, 3, 16, 16)
    # What cannot be seen without mirroring: the training images are crops of the padded originals.
    torch.manual_seed(0)
    originals = [batch["pixel_values"] for batch in loaders.calibration]
    padded = torch.nn.functional.pad(torch.cat(originals), (2, 2, 2, 2), value=-1.0)
    crops = torch.stack([padded[:, :, r : r + 16, c : c + 16] for r in range(5) for c in range(5)]).flatten(0, 1)
    crops = {crop.numpy().tobytes() for crop in (crops * 1000).round()}
    seen = [(image * 1000).round().numpy().tobytes() in crops for image in next(iter(loaders.train))["pixel_values"]]
    assert sum(seen) > 0.7 * len(seen)  # the calibration images are 1,024 of the 1,197 training images


@pytest.mark.realdata
@pytest.mark.skipif(not DATA.is_dir(), reason="real datasets are not beside the project")
def test_real_datasets(net, tmp_path):
    info = data.load_loaders(str(DATA / "cifar10"), net, CampHiVeConfig(), data.DataOptions(workers=0)).info
    assert (info.image_column, info.label_column, len(info.label_names)) == ("img", "label", 10)
    assert info.rows == {"calibration": 1024, "train": 45_000, "validation": 5000, "test": 10_000}
    info = data.load_loaders(str(DATA / "cifar100"), net, CampHiVeConfig(), data.DataOptions(workers=0)).info
    assert info.label_column == "fine_label" and len(info.label_names) == 100
    mobilenet = timm.create_model("mobilenetv2_100", device="meta")
    loaders = data.load_loaders(str(DATA / "imagenette"), mobilenet, CampHiVeConfig(), data.DataOptions(workers=0))
    assert loaders.test is None and loaders.info.rows["validation"] == 250
    assert set(read_labels(loaders.validation)) == {0, 217, 482, 491, 497, 566, 569, 571, 574, 701}
    loaders = data.load_loaders(
        str(DATA / "imagenet_sample"), mobilenet, CampHiVeConfig(), data.DataOptions(workers=0)
    )
    assert loaders.train is None and loaders.info.rows == {"calibration": 600, "validation": 400}
