"""Training against loops written out by hand, resuming against not stopping, two processes against one."""

import copy
import json
import math
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import GradientState
from support.tiers import first_by_default
from support.training import (
    CLASSES,
    CONFIG,
    Images,
    Net,
    accuracy_by_hand,
    fresh_accelerator,
    interrupted,
    loaders,
    same,
)
from torch import nn
from torch.utils.data import DataLoader

from hf_camphive.core.errors import ConfigError, DataError, TrainingError
from hf_camphive.core.runtime import make_accelerator
from hf_camphive.training import finetuning as training
from hf_camphive.training.evaluation import evaluate_accuracy, recalibrate_batchnorm
from hf_camphive.training.finetuning import finetune, train_head
from hf_camphive.training.optimization import classification_loss, warmup_cosine
from hf_camphive.training.precision import choose_precision, polish_precision

# ---- loss and schedule


def test_distillation_by_hand():
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 5, CLASSES, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 6])
    config = replace(CONFIG, distillation=0.3, temperature=2.0, label_smoothing=0.1)
    p, q = (teacher / 2).softmax(1), (logits / 2).softmax(1)
    kl = (p * (p / q).log()).sum(1).mean()
    target = 0.9 * F.one_hot(labels, CLASSES).double() + 0.1 / CLASSES
    ce = -(target * logits.softmax(1).log()).sum(1).mean()
    found = classification_loss(logits, labels, teacher, config)
    assert found.item() == pytest.approx((0.7 * ce + 0.3 * 4 * kl).item(), abs=1e-12)
    assert classification_loss(logits, labels, None, config).item() == pytest.approx(ce.item(), abs=1e-12)
    assert classification_loss(logits.bfloat16(), labels, None, config).dtype == torch.float32


def test_warmup_then_cosine():
    rates = [warmup_cosine(step, 3, 11) for step in range(11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[7] == pytest.approx(0.5)
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.05
    assert warmup_cosine(0, 0, 1) == 1.0
    assert warmup_cosine(11, 3, 11) == warmup_cosine(12, 3, 11) == 0.0


# ---- finetuning


def test_finetune_is_the_loop_written_by_hand():
    config = replace(
        CONFIG,
        gradient_accumulation_steps=2,
        distillation=0.5,
        label_smoothing=0.1,
        warmup_ratio=0.25,
        weight_decay=0.1,
    )
    accelerator = fresh_accelerator(config)
    net, teacher = Net(), Net()
    teacher.fc.weight.data.mul_(3)
    given = copy.deepcopy(teacher)
    log = finetune(net, loaders(), config, accelerator, teacher.train())

    expected, optimal = Net().train(), loaders().train
    weights = [p for p in expected.parameters() if p.ndim > 1]
    vectors = [p for p in expected.parameters() if p.ndim == 1]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    step, losses = 0, []
    for _ in range(2):  # 7 batches: 4 steps an epoch, the last of a single batch
        epoch, rows = 0.0, 0
        for i, batch in enumerate(optimal):
            for group in optimizer.param_groups:
                rate = group["lr"] = 0.05 * (
                    (step + 1) / 3 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 6))
                )
            with torch.no_grad():
                soft = given.eval()(batch["pixel_values"])
            loss = classification_loss(expected(batch["pixel_values"]), batch["labels"], soft, config)
            (loss / 2).backward()
            epoch, rows = epoch + loss.item() * len(batch["labels"]), rows + len(batch["labels"])
            if i % 2 == 1 or i == 6:
                optimizer.step()
                optimizer.zero_grad()
                step += 1
        losses.append(epoch / rows)

    assert log.steps == step == 8 and log.mixed_precision == "no"
    assert [epoch.loss for epoch in log.epochs] == pytest.approx(losses, rel=1e-5)
    assert [epoch.epoch for epoch in log.epochs] == [1.0, 2.0]
    assert log.epochs[-1].learning_rate == pytest.approx(rate, rel=1e-6)
    top1, _ = accuracy_by_hand(expected, Images(20, seed=2))
    assert log.epochs[-1].validation_top1 == pytest.approx(top1)
    for found, wanted in zip(net.state_dict().values(), expected.state_dict().values()):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert same(teacher, given)
    json.dumps(log.to_dict(), allow_nan=False)


def test_the_network_comes_back_as_it_went_in(accelerator):
    net = Net().eval()
    keys = set(net.__dict__)
    finetune(net, loaders(), CONFIG, accelerator)
    assert not net.training and not net.norm.training and set(net.__dict__) == keys
    assert net.conv.weight.is_contiguous()
    assert not accelerator._models and GradientState().dataloader_references == [None]


def test_the_seed_decides(accelerator):
    nets = [Net() for _ in range(3)]
    for net, seed in zip(nets, (0, 0, 1)):
        finetune(net, loaders(jitter=True), replace(CONFIG, seed=seed), accelerator)
    assert same(nets[0], nets[1]) and not same(nets[0], nets[2])


@pytest.mark.parametrize(("epochs", "steps"), [(0.0, 0), (0.25, 2), (1.5, 11), (2.0, 14)])
def test_fractional_epochs(accelerator, epochs, steps):
    net = Net()
    log = finetune(net, loaders(), replace(CONFIG, num_train_epochs=epochs), accelerator)
    assert log.steps == steps == net.norm.num_batches_tracked
    assert len(log.epochs) == math.ceil(epochs)
    if steps:
        assert log.epochs[-1].epoch == pytest.approx(steps / 7, abs=1e-4)
        assert log.epochs[-1].learning_rate == pytest.approx(
            0.05 * warmup_cosine(steps - 1, round(0.05 * steps), steps)
        )
    assert GradientState().dataloader_references == [None]


def test_adamw_learns(accelerator):
    config = replace(CONFIG, optimizer="adamw", learning_rate=0.01, num_train_epochs=6.0)
    log = finetune(Net(), loaders(rows=120), config, accelerator)
    assert log.epochs[-1].loss < 0.5 * log.epochs[0].loss and log.epochs[-1].validation_top1 > 0.8


def test_bf16_trains_near_fp32_and_leaves_fp32_weights(accelerator):
    exact, rough = Net(), Net()
    finetune(exact, loaders(), CONFIG, accelerator)
    log = finetune(rough, loaders(), replace(CONFIG, mixed_precision="bf16"), accelerator)
    assert log.mixed_precision == "bf16" and rough.conv.weight.dtype == torch.float32
    gap = max((a - b).abs().max().item() for a, b in zip(exact.parameters(), rough.parameters()))
    assert 0 < gap < 0.05


class Explodes(Net):
    """Well-behaved until its `fuse` burns down; then the logits overflow."""

    def __init__(self, fuse: int):
        super().__init__()
        self.fuse, self.seen = fuse, None

    def forward(self, x):
        logits = super().forward(x)
        if self.training:
            self.fuse -= 1
            if self.fuse < 0:
                self.seen = {name: p.detach().clone() for name, p in self.named_parameters()}
                return logits * math.inf
        return logits


def test_a_loss_that_is_no_number_stops_before_the_step(accelerator):
    net = Explodes(fuse=9)
    with pytest.raises(
        TrainingError, match=r"loss is nan in epoch 2, step 10 of 14 \(learning rate 0\.0\d+\).*[Ll]ower"
    ):
        finetune(net, loaders(), CONFIG, accelerator)
    assert all(torch.equal(p, net.seen[name]) for name, p in net.named_parameters())
    assert GradientState().dataloader_references == [None] and not accelerator._models
    assert evaluate_accuracy(net, DataLoader(Images(21), batch_size=8), accelerator, "test").images == 21


class Steep(Net):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return super().forward(x) * (1 + self.scale.sqrt())


def test_a_gradient_that_is_no_number_stops_before_the_step(accelerator):
    net, start = Steep(), Steep()
    with pytest.raises(TrainingError, match=r"gradient has norm (inf|nan) in epoch 1, step 1 of 14"):
        finetune(net, loaders(), CONFIG, accelerator)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), start.parameters()))


def test_no_training_images_are_refused(accelerator):
    with pytest.raises(DataError, match="no training images"):
        finetune(Net(), replace(loaders(), train=None), CONFIG, accelerator)


# ---- checkpoints


def test_a_resumed_run_ends_where_an_uninterrupted_one_ends(accelerator, tmp_path, monkeypatch):
    config = replace(CONFIG, num_train_epochs=3.5, distillation=0.5)
    whole = Net()
    expected = finetune(whole, loaders(jitter=True), config, accelerator, Net())
    interrupted(Net(), config, accelerator, tmp_path, 2, monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-2"]

    random.seed(1), torch.manual_seed(1), np.random.seed(1)
    net = Net()
    log = finetune(net, loaders(jitter=True), config, accelerator, Net(), tmp_path, resume=True)
    assert same(net, whole)
    assert [replace(e, seconds=0) for e in log.epochs] == [replace(e, seconds=0) for e in expected.epochs]
    assert log.steps == expected.steps == 25

    again = Net()  # nothing is left to do
    assert finetune(again, loaders(), config, accelerator, Net(), tmp_path, resume=True) == log
    assert same(again, whole)


class Streamlike(Images):
    """A dataset that shuffles by the number of the epoch, as streamed ones do."""

    def set_epoch(self, epoch):
        self.epochs = [*getattr(self, "epochs", []), epoch]


def test_a_resumed_run_goes_on_with_the_next_epoch_of_a_stream(accelerator, tmp_path, monkeypatch):
    dataset = Streamlike(16)
    given = replace(loaders(), train=DataLoader(dataset, batch_size=8))
    config = replace(CONFIG, num_train_epochs=3.0)
    interrupted(Net(), config, accelerator, tmp_path, 2, monkeypatch, given)
    assert list(dict.fromkeys(dataset.epochs)) == [0, 1]
    dataset.epochs = []
    finetune(Net(), given, config, accelerator, Net(), tmp_path, resume=True)
    assert set(dataset.epochs) == {2}


@pytest.mark.parametrize("left", first_by_default([1, 2]))
def test_without_resume_a_run_starts_afresh(accelerator, tmp_path, monkeypatch, left):
    config = replace(CONFIG, num_train_epochs=3.0)
    interrupted(Net(), config, accelerator, tmp_path, left, monkeypatch)
    net, whole = Net(), Net()
    finetune(whole, loaders(jitter=True), config, accelerator, Net())
    interrupted(Net(), config, accelerator, tmp_path, 1, monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-1"]
    assert len(finetune(net, loaders(jitter=True), config, accelerator, Net(), tmp_path).epochs) == 3
    assert same(net, whole)


def test_a_checkpoint_of_another_run_is_refused(accelerator, tmp_path, monkeypatch):
    interrupted(Net(), CONFIG, accelerator, tmp_path, 1, monkeypatch)
    with pytest.raises(ConfigError, match=r"other settings \(seed, weight_decay\).*delete that folder"):
        other = replace(CONFIG, weight_decay=0.1, seed=4)
        finetune(Net(), loaders(), other, accelerator, checkpoint_dir=tmp_path, resume=True)
    with pytest.raises(ConfigError, match="network"):
        finetune(Net(norm=False), loaders(), CONFIG, accelerator, checkpoint_dir=tmp_path, resume=True)


def test_another_learning_rate_starts_finetuning_afresh_and_says_so(accelerator, tmp_path, monkeypatch, caplog):
    """A run that diverged after some epochs is resumed with a lower rate, as its error advises."""
    interrupted(Net(), CONFIG, accelerator, tmp_path, 1, monkeypatch)
    lower = replace(CONFIG, learning_rate=CONFIG.learning_rate / 10)
    fresh, resumed = Net(), Net()
    finetune(fresh, loaders(), lower, accelerator)
    with caplog.at_level("WARNING"):
        finetune(resumed, loaders(), lower, accelerator, checkpoint_dir=tmp_path, resume=True)
    assert same(fresh, resumed)
    assert "starts afresh" in caplog.text and str(lower.learning_rate) in caplog.text


@pytest.mark.parametrize("file", ["progress.json", "model.safetensors", "optimizer.bin"])
def test_a_damaged_checkpoint_is_named(accelerator, tmp_path, monkeypatch, file):
    interrupted(Net(), CONFIG, accelerator, tmp_path, 1, monkeypatch)
    path = tmp_path / "epoch-1" / file
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(TrainingError, match=r"epoch-1 cannot be read.*delete it"):
        finetune(Net(), loaders(), CONFIG, accelerator, checkpoint_dir=tmp_path, resume=True)


# ---- the head


def test_only_the_head_learns(accelerator):
    net, start = Net(), Net()
    net.conv.weight.requires_grad_(False)
    log = train_head(net, loaders(rows=200), replace(CONFIG, head_epochs=8.0), accelerator)
    changed = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, start.state_dict()[name])}
    assert changed == {"fc.weight", "fc.bias"}
    assert log.epochs[-1].validation_top1 > log.epochs[0].validation_top1
    assert [p.requires_grad for p in net.parameters()] == [False, *[True] * 5]
    assert all(p.grad is None for p in net.parameters())


# ---- precision


class SlowInFp32(Net):
    """A network that is faster in bf16, as some are on some processors."""

    def forward(self, x):
        if not torch.is_autocast_enabled("cpu"):
            time.sleep(0.02)
        return super().forward(x)


def test_auto_is_fp32_on_the_cpu_whatever_is_faster(accelerator, caplog):
    net, expected = SlowInFp32(), Net()
    finetune(expected, loaders(), CONFIG, accelerator)
    with caplog.at_level("INFO", "hf_camphive"):
        log = finetune(net, loaders(), replace(CONFIG, mixed_precision="auto"), accelerator)
    assert log.mixed_precision == "no" and same(net, expected)
    assert "Finetune in fp32" in caplog.text


@pytest.mark.parametrize(("native", "found"), [(True, "bf16"), (False, "no")])
def test_auto_is_bf16_where_a_gpu_has_it(monkeypatch, native, found):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert choose_precision("auto", torch.device("cuda")) == found
    assert choose_precision("auto", torch.device("cpu")) == choose_precision("auto", torch.device("mps")) == "no"
    for asked in ("no", "bf16", "fp16"):
        assert choose_precision(asked, torch.device("cuda")) == choose_precision(asked, torch.device("cpu")) == asked


def test_a_resumed_run_keeps_its_precision(accelerator, tmp_path, monkeypatch):
    config = replace(CONFIG, mixed_precision="auto")
    with monkeypatch.context() as patch:
        patch.setattr(training, "choose_precision", lambda asked, device: "bf16")
        interrupted(Net(), config, accelerator, tmp_path, 1, monkeypatch)
    log = finetune(Net(), loaders(jitter=True), config, accelerator, Net(), tmp_path, resume=True)
    assert log.mixed_precision == "bf16"


def test_polishing_is_in_fp32_unless_bf16_is_asked_for():
    found = {asked: polish_precision(asked) for asked in ("auto", "no", "fp16", "bf16")}
    assert found == {"auto": "no", "no": "no", "fp16": "no", "bf16": "bf16"}


# ---- two processes


def everything(accelerator: Accelerator, folder: Path, accumulation: int) -> dict:
    """What is compared between one process and two; two see twice the images a step, one accumulates."""
    config = replace(CONFIG, distillation=0.5, num_train_epochs=2.5)
    accelerator.gradient_accumulation_steps = accumulation
    found = {}
    for rows in (1, 3, 16, 21, 40):
        result = evaluate_accuracy(Net(), DataLoader(Images(rows), batch_size=8), accelerator, "test")
        found[f"accuracy of {rows}"] = [result.top1, result.top5, result.images]
    for rows in (5, 21, 40):
        net = Net()
        recalibrate_batchnorm(net, DataLoader(Images(rows), batch_size=8), accelerator)
        found[f"statistics of {rows}"] = net.norm.running_mean.tolist() + net.norm.running_var.tolist()
    net = Net(norm=False)
    log = finetune(net, loaders(rows=48), config, accelerator, Net(norm=False), folder)
    found["weights"] = torch.cat([p.detach().flatten() for p in net.parameters()]).tolist()
    found["log"] = [x for e in log.epochs for x in (e.epoch, e.loss, e.learning_rate, e.validation_top1)]
    found["steps"] = [log.steps]
    resumed = Net(norm=False)
    finetune(resumed, loaders(rows=48), config, accelerator, Net(norm=False), folder, resume=True)
    found["resumed"] = torch.cat([p.detach().flatten() for p in resumed.parameters()]).tolist()
    normed = Net()
    finetune(normed, loaders(), CONFIG, accelerator)
    found["norms agree"] = [float(same_everywhere(normed.norm.running_mean, accelerator))]
    broken = Explodes(fuse=2 if accelerator.process_index == 0 else 10**6)
    with pytest.raises(TrainingError):
        finetune(broken, loaders(), CONFIG, accelerator)
    return found


def same_everywhere(x: torch.Tensor, accelerator: Accelerator) -> bool:
    return bool((accelerator.gather(x[None]) == x).all())


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two.json").read_text())
    one = everything(fresh_accelerator(replace(CONFIG, gradient_accumulation_steps=2)), tmp_path / "one", 2)
    assert one.keys() == two.keys()
    for key in one:
        assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), key


if __name__ == "__main__":
    accelerator = make_accelerator(CONFIG)
    assert accelerator.num_processes == 2
    found = everything(accelerator, Path(sys.argv[1]) / "two", 1)
    if accelerator.is_main_process:
        (Path(sys.argv[1]) / "two.json").write_text(json.dumps(found))
