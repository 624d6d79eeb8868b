"""Accuracies and running statistics against ones worked out by hand, on one process; test_training has two."""

import copy
import math
from pathlib import Path

import pytest
import torch
from support.training import CONFIG, Images, Net, accuracy_by_hand, same
from torch import nn
from torch.utils.data import DataLoader

from hf_camphive.core.errors import DataError, TrainingError
from hf_camphive.training.evaluation import evaluate_accuracy, recalibrate_batchnorm


@pytest.mark.parametrize("rows", [1, 8, 21])
def test_accuracy_counts_every_row_once(accelerator, rows):
    net, dataset = Net().train(), Images(rows)
    top1, top5 = accuracy_by_hand(copy.deepcopy(net), dataset)
    found = evaluate_accuracy(net, DataLoader(dataset, batch_size=8), accelerator, "test")
    assert (found.images, found.split) == (rows, "test")
    assert (found.top1, found.top5) == pytest.approx((top1, top5), abs=1e-12)
    assert net.training and same(net, Net())


def test_outputs_that_are_no_numbers_are_not_called_accuracy(accelerator):
    net = Net()
    net.fc.bias.data[3] = math.nan
    with pytest.raises(TrainingError, match=r"not numbers on 21 of 21 images of 'test'"):
        evaluate_accuracy(net, DataLoader(Images(21), batch_size=8), accelerator, "test")


def test_an_empty_split_is_refused(accelerator):
    with pytest.raises(DataError, match="no images"):
        evaluate_accuracy(Net(), DataLoader(Images(0)), accelerator, "test")


@pytest.mark.realdata
def test_a_published_network_has_its_published_accuracy(accelerator):
    folder = Path(__file__).parents[3] / "shared" / "data"
    weights = folder / "weights" / "cifar10_resnet20.safetensors"
    if not weights.exists():
        pytest.skip(f"CIFAR-10 and its weights are not in {folder}")
    from hf_camphive.hub.loading import load_base
    from hf_camphive.training.data.loaders import load_loaders

    net = load_base("cifar_resnet20", str(weights)).net
    test = load_loaders(str(folder / "cifar10"), net, CONFIG).test
    found = evaluate_accuracy(net, test, accelerator, "test")
    assert found.images == 10_000 and found.top1 == pytest.approx(0.9173, abs=2e-4)


# BatchNorm


@pytest.mark.parametrize("batch", [5, 8, 20])
def test_recalibration_is_exact_for_one_norm(accelerator, batch):
    dataset, net = Images(21), Net().train()  # the last batch is a single image
    dataset.images[-1] += 30
    recalibrate_batchnorm(net, DataLoader(dataset, batch_size=batch), accelerator)
    x = net.conv(dataset.images).double()
    torch.testing.assert_close(net.norm.running_mean.double(), x.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.norm.running_var.double(), x.var((0, 2, 3)), rtol=1e-5, atol=1e-6)
    assert net.training and net.norm.num_batches_tracked == 0
    assert not net.norm._forward_pre_hooks


def test_recalibration_of_many_norms_is_that_of_training_mode(accelerator):
    import timm

    net = timm.create_model("efficientnet_lite0", num_classes=3, drop_rate=0.5).double()
    expected, images = copy.deepcopy(net).eval(), torch.randn(6, 3, 64, 64, dtype=torch.float64)
    for module in expected.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
            module.training = True
    with torch.no_grad():
        expected(images)
    rows = [{"pixel_values": image, "labels": 0} for image in images]
    recalibrate_batchnorm(net, DataLoader(rows, batch_size=6), accelerator)
    for (name, found), wanted in zip(net.state_dict().items(), expected.state_dict().values()):
        if "num_batches" not in name:
            torch.testing.assert_close(found, wanted, msg=name)
