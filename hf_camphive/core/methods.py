"""The methods by name: one row per criterion, merge rule and preset.

A row holds what the config, the command line and the model card need to know of a method; the function that computes
it is elsewhere (`pruning/scoring/criteria.py`, `pruning/merging/rules.py`). Methods from outside the package are added
by `hf_camphive.register_criterion` and its siblings, which call `register`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from hf_camphive.core.errors import ConfigError

AUTO = "auto"  # the criterion that stands for the one that measures best for the budget
PAPER = "[CAMP-HiVe](https://arxiv.org/abs/2511.06265)"
EIGENSOLVERS = {  # as the card words them
    "lanczos": "the Lanczos method with full reorthogonalisation",
    "power": "power iteration",
}


@dataclass(frozen=True)
class CriterionRow:
    """What is known of a criterion besides its function.

    `wording` ends the card's sentence "Channels were ranked by ..."; "{eigensolver}" in it is replaced by the solver
    that ran. `source` names the paper. `reads_labels` is for `curvature="gauss-newton"`; a criterion that
    `uses_curvature` reads labels with `curvature="hessian"` as well. `judges_merges`: its scores estimate the error
    that merging a channel leaves, not the error of removing it.
    """

    name: str
    wording: str
    source: str = ""
    reads_images: bool = True
    reads_labels: bool = False
    uses_curvature: bool = False
    judges_merges: bool = False


@dataclass(frozen=True)
class MergeRuleRow:
    """What is known of a merge rule besides its function.

    `wording` is a clause of the card; `weight_wording` the one for granularity "weight", or None where the rule does
    not merge single weights. `pairs`: the rule needs (removed, receiver) pairs in the plan. `recalibrates`: BatchNorm
    statistics are recalibrated after it. `fits_implants`: the weights of neural implants are fitted, where they else
    start at zero.
    """

    name: str
    wording: str
    reads_images: bool = False
    pairs: bool = False
    recalibrates: bool = True
    fits_implants: bool = False
    weight_wording: str | None = None


@dataclass(frozen=True)
class PresetRow:
    """A recipe: the config's settings that it sets, and the paper that it follows."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


CRITERIA: dict[str, CriterionRow] = {
    row.name: row
    for row in (
        CriterionRow(
            "merge-aware",
            "how far the logits move when the channel is replaced by its best linear prediction from those that stay",
            judges_merges=True,
        ),
        CriterionRow(
            "merge-joint",
            "what replacing the channel by its best linear prediction adds to the error of the logits, together with "
            "the channels replaced before it in any layer",
            source="a greedy choice as in SOSP-I, arXiv:2110.11395",
            judges_merges=True,
        ),
        CriterionRow(
            "fisher",
            "the Fisher information of a gate on the channel, half the mean squared gradient",
            source="Group Fisher, Liu et al., ICML 2021",
        ),
        CriterionRow(
            "hive",
            "the curvature of the loss at the channel's gate along the leading eigenvectors, found by {eigensolver}",
            source=PAPER,
            uses_curvature=True,
        ),
        CriterionRow(
            "hive-paper",
            "the entries of the dominant eigenvector of the loss's curvature at the channel's filters, found by power "
            "iteration",
            source=PAPER,
            uses_curvature=True,
        ),
        CriterionRow(
            "hap",
            "the trace of the loss's curvature over the channel's filters, times the filters' squared norm",
            source="HAP, arXiv:2101.08940",
            uses_curvature=True,
        ),
        CriterionRow(
            "sosp-h",
            "the loss's gradient and one product with its curvature",
            source="SOSP-H, arXiv:2110.11395",
            reads_labels=True,
            uses_curvature=True,
        ),
        CriterionRow(
            "sosp-i",
            "the loss's gradient and curvature, greedily, with the terms between channels",
            source="SOSP-I, arXiv:2110.11395",
            reads_labels=True,
        ),
        CriterionRow(
            "taylor",
            "the first-order change of the loss when the channel's gate closes",
            source="Molchanov et al., ICLR 2017",
            reads_labels=True,
        ),
        CriterionRow("magnitude", "the norm of the weights that read the channel", reads_images=False),
        CriterionRow(
            "bn-scale",
            "the gain of the channel's BatchNorm",
            source="Network Slimming, Liu et al., ICCV 2017",
            reads_images=False,
        ),
        CriterionRow("random", "chance, as a baseline", reads_images=False),
    )
}

MERGE_RULES: dict[str, MergeRuleRow] = {
    row.name: row
    for row in (
        MergeRuleRow(
            "reconstruct",
            "the kept channels were refitted by least squares to reproduce the dense network's outputs",
            reads_images=True,
            recalibrates=False,
            fits_implants=True,
        ),
        MergeRuleRow(
            "lstsq", "each removed channel was merged into all kept ones by least squares", reads_images=True
        ),
        MergeRuleRow(
            "nearest", "each removed channel was merged into the kept one that explains it best", reads_images=True
        ),
        MergeRuleRow(
            "cyclic-ls",
            f"removed channels were merged into kept ones in the cyclic pairs of {PAPER}, weighted by the data",
            reads_images=True,
            pairs=True,
        ),
        MergeRuleRow(
            "cyclic",
            f"removed channels were merged into kept ones in the cyclic pairs of {PAPER}, with weight 0.5",
            pairs=True,
            weight_wording="half of each was added to a kept weight of the same tensor, in cyclic pairs by rank",
        ),
        MergeRuleRow("none", "removed channels were dropped without merging", weight_wording="nothing was merged"),
    )
}

# Each paper's own choices; the budget is set by `target_macs` (or `sparsity`), and finetuning is ours, without a teacher.
_AS_IN_PAPERS = {"distillation": 0.0, "polish_steps": 0}
_HESSIAN = {"curvature": "hessian", **_AS_IN_PAPERS}
PRESETS: dict[str, PresetRow] = {
    row.name: row
    for row in (
        PresetRow("default"),
        PresetRow(
            "camphive-paper",
            {"criterion": "hive-paper", "merge": "cyclic", "threshold": "percentile", "scope": "all", **_HESSIAN},
            source="CAMP-HiVe on channels, arXiv:2511.06265",
        ),
        PresetRow(
            "camphive-paper-weights",
            {"granularity": "weight", "criterion": "hive-paper", "merge": "cyclic", **_HESSIAN},
            source="CAMP-HiVe on single weights, arXiv:2511.06265",
        ),
        PresetRow(
            "hap",
            {"criterion": "hap", "merge": "none", "threshold": "global", "scope": "all", **_HESSIAN},
            source="HAP, arXiv:2101.08940",
        ),
        PresetRow(
            "sosp-h",
            {"criterion": "sosp-h", "merge": "none", "threshold": "global", "scope": "all", **_HESSIAN},
            source="SOSP-H, arXiv:2110.11395",
        ),
        PresetRow(
            "sosp-i",
            {"criterion": "sosp-i", "merge": "none", "threshold": "global", "scope": "all", **_AS_IN_PAPERS},
            source="SOSP-I, arXiv:2110.11395",
        ),
        PresetRow(
            "group-fisher",
            {"criterion": "fisher", "merge": "none", "threshold": "adaptive", "scope": "all", **_AS_IN_PAPERS},
            source="Group Fisher, Liu et al., ICML 2021",
        ),
    )
}


class _Named(Protocol):
    @property
    def name(self) -> str: ...


_Row = TypeVar("_Row", bound=_Named)


def register(table: dict[str, _Row], row: _Row) -> None:
    """Add a row to `CRITERIA`, `MERGE_RULES` or `PRESETS` under its name.

    Raises:
        ConfigError: The name is taken, or holds other characters than letters, digits, `-`, `_` and `.` (lists of
            names are separated by commas on the command line).
    """
    if not re.fullmatch(r"[\w.-]+", row.name):
        raise ConfigError(f"the name {row.name!r} cannot be registered; use letters, digits, '-', '_' and '.' only")
    if row.name in table or row.name == AUTO:
        raise ConfigError(f"the name {row.name!r} is taken; register under another one")
    table[row.name] = row
