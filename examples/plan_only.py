"""Look at a plan before anything is cut, change its limits, and compare the two plans. Runs offline, in seconds.

    python examples/plan_only.py

A plan is plain data: no weight is touched until `pruner.apply` or `pruner.run`.
"""

from dataclasses import replace

from hf_camphive import CampHiVeConfig, CampHiVePruner, load_base, load_loaders
from hf_camphive.core.plan import plans_from_json, plans_to_json

base = load_base("digits_resnet")
config = CampHiVeConfig(target_macs=0.6, calibration_size=128, criterion="fisher")
calibration = load_loaders("digits", base.net, config).calibration

free = CampHiVePruner(base, config)
plan = free.plan(calibration)
print(plan.summary())

# The first stage stays as it is, no layer loses more than three quarters of its channels, widths are multiples of four.
limits = replace(config, keep=("layer1.*",), max_ratio=0.75, round_to=4)
limited = CampHiVePruner(base, limits).plan(calibration)
print(f"\nWith limits:\n{limited.summary()}")

print("\nChannels that only one of the two plans keeps:")
print(plan.diff(limited))

# A plan survives JSON unchanged. A saved model's folder holds it as prune_plan.json.
assert plans_from_json(plans_to_json([plan])) == (plan,)
