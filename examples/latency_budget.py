"""Prune for milliseconds on this machine instead of for multiply-accumulates (MACs). Runs offline.

    python examples/latency_budget.py

The first run times the network's operations and keeps the timings under $HF_HOME/camphive, so that later runs are quicker.
Close other programs: whatever they take from the processor ends up in the timings.
"""

from hf_camphive import CampHiVeConfig, CampHiVePruner, fold, load_base, load_loaders
from hf_camphive.network.footprint import measure_latency

base = load_base("digits_resnet")
config = CampHiVeConfig(
    target_latency=0.6,  # at most 60 % of the dense network's milliseconds ...
    latency_batch_size=32,  # ... for 32 images at a time ...
    latency_folded=True,  # ... as deployed, with BatchNorm folded into the convolutions
    calibration_size=128,
)
calibration = load_loaders("digits", base.net, config).calibration

pruner = CampHiVePruner(base, config)
plan = pruner.plan(calibration)
print(plan.summary())
pruner.apply(plan, calibration)

size = pruner.input_size
networks = {"dense": fold(pruner.dense, size), "pruned": fold(pruner.net, size)}
measured = {name: times[32].median for name, times in measure_latency(networks, size, [32]).items()}
print(f"\nMeasured, 32 images: {measured['dense']:.2f} ms dense, {measured['pruned']:.2f} ms pruned")
print(
    f"{measured['dense'] / measured['pruned']:.2f} times faster, with {plan.macs_before / plan.macs_after:.2f} times fewer MACs"
)
