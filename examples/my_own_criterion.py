"""Register a criterion of your own and prune with it. Runs offline, in seconds.

    python examples/my_own_criterion.py

A criterion is one function: it is given what it may look at, and returns one score for each channel of each group; the
channels with the lowest scores go first. CONTRIBUTING.md says how it becomes one of the built-in ones.
"""

import torch

import hf_camphive
from hf_camphive import CampHiVeConfig, CampHiVePruner, load_base, load_loaders


def filter_norm(context):
    """Score each channel by the L1 norm of the filters that produce it, relative to its group (arXiv:1608.08710)."""
    scores = {}
    for group in context.trace.groups:
        if group.frozen:
            continue
        norms = torch.zeros(group.size, dtype=torch.float64)
        for slot in group.slots:
            if slot.role == "producer":
                filters = context.weight(slot.tensor).abs().flatten(1).sum(1)
                norms += filters[list(slot.index)].view(group.size, -1).sum(1)
        scores[group.name] = norms / norms.mean()
    return scores


hf_camphive.register_criterion("filter-norm", filter_norm, wording="the L1 norm of the filters that produce it")

base = load_base("digits_resnet")
config = CampHiVeConfig(
    criterion="filter-norm", target_macs=0.5, calibration_size=128, num_train_epochs=0, polish_steps=0
)
report = CampHiVePruner(base, config).run(load_loaders("digits", base.net, config))
print(report.table())
