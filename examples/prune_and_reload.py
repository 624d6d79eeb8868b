"""Prune a network, save it, and read it back with three readers. Runs offline, in a few seconds on a CPU.

    python examples/prune_and_reload.py

With a network of your own, change the names of the model and the dataset: a Hub id or a folder each.
"""

import tempfile
from pathlib import Path

import timm
import torch
from transformers import AutoModelForImageClassification

import hf_camphive
from hf_camphive import CampHiVeConfig, CampHiVePruner, load_base, load_loaders

base = load_base("digits_resnet")  # bundled; or "timm/resnet18.a1_in1k"
config = CampHiVeConfig(target_macs=0.5, calibration_size=100, num_train_epochs=0, polish_steps=0)
loaders = load_loaders("digits", base.net, config)  # bundled; or "imagenet-1k", or a folder

pruner = CampHiVePruner(base, config)
report = pruner.run(loaders)
print(report.table())

with tempfile.TemporaryDirectory() as parent:
    folder = pruner.save_pretrained(Path(parent, "digits_resnet-half"))
    print("\nThe folder holds", ", ".join(sorted(path.name for path in folder.iterdir())))
    ours = hf_camphive.from_pretrained(folder)
    transformers_model = AutoModelForImageClassification.from_pretrained(folder)
    timm_model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

images = next(iter(loaders.validation))["pixel_values"][:8]
with torch.no_grad():
    logits = ours(images).logits
    assert torch.equal(logits, transformers_model(images).logits)
    assert torch.allclose(logits, timm_model(images), atol=1e-5)
print("All three readers give the same digits:", logits.argmax(1).tolist())
