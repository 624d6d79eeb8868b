"""Train a bundled network on scikit-learn's handwritten digits, and write its model card.

    python scripts/train_digits.py digits_wide_resnet

A few minutes on two cores; needs no network and no data. The last epoch counts, and the test split is looked at once.
"""

import argparse
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from accelerate.utils import set_seed
from huggingface_hub import EvalResult, ModelCardData
from safetensors.torch import save_file

import hf_camphive.network.modeling.cifar  # noqa: F401  (registers the networks in timm)
from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.measures import Accuracy
from hf_camphive.core.runtime import make_accelerator
from hf_camphive.network.footprint import count_macs, count_parameters
from hf_camphive.training.data.loaders import DataOptions, Loaders, load_loaders
from hf_camphive.training.evaluation import evaluate_accuracy
from hf_camphive.training.finetuning import finetune

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "hf_camphive" / "assets"
CARDS = ROOT / "model_cards"
CONFIG = CampHiVeConfig(
    num_train_epochs=30,
    learning_rate=0.1,
    warmup_ratio=0.1,
    per_device_train_batch_size=64,
    distillation=0.0,
    mixed_precision="no",
)


@dataclass(frozen=True)
class Wording:
    """What the card of a network says beside the figures."""

    purpose: str
    architecture: str


NETWORKS = {
    "digits_resnet": Wording(
        """A small residual network that reads handwritten digits. It comes with hf_camphive, so that pruning can be tried without
a network connection and in a minute. It is no good for anything else.""",
        """the ResNet-20 of [He et al. 2015](https://arxiv.org/abs/1512.03385) for CIFAR
(three stages of three basic blocks, 16, 32 and 64 channels) with 1x1 convolutions and batch normalisation as shortcuts.""",
    ),
    "digits_wide_resnet": Wording(
        """A residual network that reads handwritten digits: the one that hf_camphive's demo prunes. It is far wider than its task
needs, and large enough that a processor spends its time on convolutions: pruning it saves time that can be measured. It
needs no network connection, and is no good for anything else.""",
        """a ResNet for small images after [He et al. 2015](https://arxiv.org/abs/1512.03385), wide and
shallow (three stages of two basic blocks, 32, 64 and 128 channels) with 1x1 convolutions and batch normalisation as
shortcuts.""",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS)
    name = parser.parse_args().network
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    set_seed(CONFIG.seed)
    net = timm.create_model(name)
    loaders = load_loaders("digits", net, CONFIG, DataOptions(workers=0))
    accelerator = make_accelerator(CONFIG)
    finetune(net, loaders, CONFIG, accelerator)
    accuracies = [
        evaluate_accuracy(net, loader, accelerator, split)
        for split, loader in (("validation", loaders.validation), ("test", loaders.test))
    ]
    save(name, net.cpu().eval(), loaders.info.label_names)
    (CARDS / f"{name}.md").write_text(card(name, net, loaders, accuracies), encoding="utf-8")


def save(name: str, net: torch.nn.Module, label_names: tuple[str, ...]) -> None:
    """Write the two files that timm reads, in its own layout."""
    keys = (
        "input_size",
        "pool_size",
        "crop_pct",
        "crop_mode",
        "interpolation",
        "mean",
        "std",
        "first_conv",
        "classifier",
    )
    config = {
        "architecture": name,
        "num_classes": net.num_classes,
        "num_features": net.num_features,
        "label_names": label_names,
        "pretrained_cfg": {key: net.pretrained_cfg[key] for key in keys} | {"license": "apache-2.0"},
    }
    folder = ASSETS / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = {key: tensor.contiguous() for key, tensor in net.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def card(name: str, net: torch.nn.Module, loaders: Loaders, accuracies: list[Accuracy]) -> str:
    """The model card, from what was measured."""
    test = accuracies[-1]
    data = ModelCardData(
        license="apache-2.0",
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["timm", "image-classification", "hf_camphive"],
        metrics=["accuracy"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type="digits",
                dataset_name="scikit-learn handwritten digits",
                dataset_split="test",
                metric_type="accuracy",
                metric_name="Top-1",
                metric_value=round(test.top1, 4),
            )
        ],
    )
    rows = "\n".join(f"| top-1, {a.split} ({a.images} images) | {a.top1:.2%} |" for a in accuracies)
    size = tuple(net.pretrained_cfg["input_size"])
    weights = (ASSETS / name / "model.safetensors").stat().st_size
    return f"""---
{data.to_yaml()}
---

# {name}

{NETWORKS[name].purpose}

| | |
|---|---|
{rows}
| parameters | {count_parameters(net):,} |
| multiply-accumulates for one image (1 MAC = 2 FLOPs) | {count_macs(net, size):,} |
| `model.safetensors` | {weights / 1e6:.2f} MB |

```python
from hf_camphive.hub.loading import load_base
net = load_base("{name}").net  # a timm network
```

## Architecture

`{name}` of `hf_camphive/cifar.py`: {NETWORKS[name].architecture}

## Data

The {sum(loaders.info.rows[r] for r in ("train", "validation", "test")):,} images of scikit-learn's `load_digits` (8x8 pixels,
greyscale; the test set of the UCI "Optical Recognition of Handwritten Digits" data, CC BY 4.0), resized to
{size[1]}x{size[2]} and repeated over three channels. They are divided by label into {loaders.info.rows["train"]:,} training,
{loaders.info.rows["validation"]} validation and {loaders.info.rows["test"]} test images, always the same. Writers are not
kept apart between the splits, so a new writer's digits are harder than these figures say.

## Training

`python scripts/train_digits.py {name}`: {CONFIG.num_train_epochs:g} epochs of SGD with Nesterov momentum 0.9, batch
{CONFIG.per_device_train_batch_size}, peak learning rate {CONFIG.learning_rate:g} with warm-up and cosine decay, weight decay
{CONFIG.weight_decay:g}, random crops from {min(4, size[1] // 8)} pixels of padding, no mirroring, seed {CONFIG.seed}. The last epoch is what is
saved; nothing was chosen on the test images.
"""


if __name__ == "__main__":
    main()
