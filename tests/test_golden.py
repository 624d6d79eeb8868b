"""What the method computes, recorded: plans and weights must not move by a bit when code is only moved or renamed.

`python tests/test_golden.py` records anew, after a change that is meant to change results. Sums of floating-point numbers
depend on the processor's vector instructions and on torch: on another machine than the recording one, plans and weights are
compared with a tolerance.
"""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from support.tiers import slow_ones
from transformers import AutoModelForImageClassification

import hf_camphive
from hf_camphive import CampHiVeConfig, CampHiVePruner, DataOptions, load_base, load_loaders
from hf_camphive.core.plan import PrunePlan, plans_to_json
from hf_camphive.core.runtime import environment
from hf_camphive.hub.report import PruneReport

RECORD = Path(__file__).parent / "golden" / "results.json"
SHARE_OF_EQUAL_CHANNELS, RELATIVE_TOLERANCE = 0.9, 0.05  # on other machines


def machine() -> dict[str, str]:
    """What rounding depends on."""
    about = environment()
    return {key: about[key] for key in ("device", "torch", "python")} | {
        "instructions": torch.backends.cpu.get_cpu_capability()
    }


def digest(net: torch.nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def described(plans: list[PrunePlan], net: torch.nn.Module) -> dict:
    """A result as JSON: hashes for bit-equality, widths and norms for the comparison with a tolerance."""
    return {
        "plans": hashlib.sha256(plans_to_json(plans).encode()).hexdigest(),
        "weights": digest(net),
        "keep": [{name: list(kept) for name, kept in plan.keep.items()} for plan in plans],
        "macs": plans[-1].macs_after,
        "norms": {name: float(t.double().norm()) for name, t in net.state_dict().items() if t.is_floating_point()},
    }


def cifar_resnet20() -> torch.nn.Module:
    """ResNet-20 with drawn weights, no channel of which is silent."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = timm.create_model("cifar_resnet20").eval()
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.uniform_(-0.3, 0.3)
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    return net


def drawn_images(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(count, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return [{"pixel_values": x, "labels": y} for x, y in zip(pixels.split(32), labels.split(32))]


def one_cycle(criterion: str) -> dict:
    config = CampHiVeConfig(
        target_macs=0.5, criterion=criterion, calibration_size=128, num_train_epochs=1, mixed_precision="no"
    )
    pruner = CampHiVePruner(cifar_resnet20(), config)
    images = drawn_images(128)
    plan = pruner.plan(images)
    pruner.apply(plan, images)
    return described([plan], pruner.net)


def two_cycles_of_digits() -> dict:
    config = CampHiVeConfig(
        target_macs=0.4,
        cycles=2,
        calibration_size=128,
        num_train_epochs=1,
        per_device_train_batch_size=32,
        mixed_precision="no",
    )
    base = load_base("digits_resnet")
    loaders = load_loaders(
        "digits", base.net, config, DataOptions(max_train_samples=128, max_eval_samples=64, workers=0)
    )
    pruner = CampHiVePruner(base, config)
    pruner.run(loaders)
    return described(pruner.plans, pruner.net)


CASES = {
    "two cycles of digits": two_cycles_of_digits,
    "merge-aware, ResNet-20": lambda: one_cycle("merge-aware"),
    "merge-joint, ResNet-20": lambda: one_cycle("merge-joint"),
    "fisher, ResNet-20": lambda: one_cycle("fisher"),
    "hive, ResNet-20": lambda: one_cycle("hive"),
}


def computed(case: str) -> dict:
    """The case's result on one thread, so that sums are always taken in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return CASES[case]()
    finally:
        torch.set_num_threads(threads)


def is_close(found: dict, expected: dict) -> bool:
    channels = equal = 0
    for now, then in zip(found["keep"], expected["keep"], strict=True):
        assert now.keys() == then.keys()
        for name in then:
            channels += len(then[name])
            equal += len(set(now[name]) & set(then[name]))
    return equal >= SHARE_OF_EQUAL_CHANNELS * channels and found["macs"] == pytest.approx(
        expected["macs"], rel=RELATIVE_TOLERANCE
    )


@pytest.mark.parametrize("case", slow_ones(CASES, set(CASES) - {"merge-aware, ResNet-20"}))
def test_results_are_those_recorded(case):
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    expected, found = record["cases"][case], computed(case)
    if record["machine"] == machine():
        assert (found["keep"], found["plans"]) == (expected["keep"], expected["plans"])
        assert found["weights"] == expected["weights"]
    assert is_close(found, expected)


def test_the_comparison_notices_another_plan():
    expected = json.loads(RECORD.read_text(encoding="utf-8"))["cases"]["fisher, ResNet-20"]
    other = {name: list(range(len(kept))) for name, kept in expected["keep"][0].items()}
    assert not is_close({**expected, "keep": [other]}, expected)
    assert not is_close({**expected, "macs": 2 * expected["macs"]}, expected)


SAVED = RECORD.parent / "saved_folder"


def image() -> torch.Tensor:
    return torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16).sin()


def saved_logits(net: torch.nn.Module) -> list[float]:
    with torch.no_grad():
        found = net.eval()(image())
    return getattr(found, "logits", found)[0].tolist()


READERS = {
    "hf_camphive": lambda: hf_camphive.from_pretrained(SAVED),
    "transformers": lambda: AutoModelForImageClassification.from_pretrained(SAVED),
    "timm": lambda: timm.create_model(f"local-dir:{SAVED}", pretrained=True),
    "as a base to prune": lambda: load_base(str(SAVED)).net,
}


@pytest.mark.parametrize("reader", READERS)
def test_a_folder_saved_before_the_rooms_still_loads(reader):
    expected = json.loads(RECORD.read_text(encoding="utf-8"))["saved logits"]
    assert saved_logits(READERS[reader]()) == pytest.approx(expected, abs=1e-4)


def test_what_lies_beside_old_weights_is_still_read():
    report = PruneReport.from_json((SAVED / "report.json").read_text(encoding="utf-8"))
    assert report.stages[-1].footprint.macs == load_base(str(SAVED)).plans[-1].macs_after
    assert CampHiVeConfig.from_pretrained(SAVED).target_macs == 0.15


if __name__ == "__main__":
    values = {
        "machine": machine(),
        "saved logits": saved_logits(READERS["timm"]()),
        "cases": {case: computed(case) for case in CASES},
    }
    RECORD.write_text(json.dumps(values) + "\n", encoding="utf-8")
    sys.exit(0)
