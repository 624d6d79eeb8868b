"""Numbers of the method that change results and that no setting exposes, each with the experiment that chose it.

Numbers that a user may choose are fields of `core.config`. Limits of memory and time that leave results as they are
stay in the modules that use them. `TABLE` describes every number below, and `as_dict` gives the values that
`report.json` records.

Two numbers here and one setting are temperatures of 4, and are three different things: `SCORE_TEMPERATURE` divides the
logits whose curvature scores use, `POLISH_TEMPERATURE` those of the divergence that decides how far to polish, and the
setting `temperature` those of the distillation loss in finetuning. Likewise `SCORE_RIDGE` damps the predictions that
scores assume, and the setting `ridge` the fits that merging makes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

NOT_ABLATED = "not ablated"
_EARLY = "docs/ablation.md: Weight of early layers"
_HELD_OUT = "docs/ablation.md: The images that decide must be held out of the reconstruction too"
_POLISH = "docs/ablation.md: Polish"

Value = TypeVar("Value")


@dataclass(frozen=True)
class TunedNumber:
    """One number of the method: its value, what it does, and the experiment that chose it.

    `chosen_by` is a page and heading of the documentation, a paper, or `NOT_ABLATED`; a remark may follow a semicolon.
    """

    name: str
    value: Any
    meaning: str
    chosen_by: str


TABLE: dict[str, TunedNumber] = {}


def _tuned(name: str, value: Value, meaning: str, chosen_by: str) -> Value:
    """Add a number to `TABLE` and return its value."""
    TABLE[name] = TunedNumber(name, value, meaning, chosen_by)
    return value


def as_dict() -> dict[str, Any]:
    """Return every number by name as plain JSON values: tuples as lists, keys of mappings as strings."""
    return {name: _plain(entry.value) for name, entry in TABLE.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


# Scores

SCORE_TEMPERATURE = _tuned(
    "SCORE_TEMPERATURE",
    4.0,
    "Divides the logits before merge-aware and merge-joint take the softmax's curvature.",
    "docs/ablation.md: Scores",
)
SCORE_RIDGE = _tuned(
    "SCORE_RIDGE",
    1e-3,
    "Damping of the predictions that merge-aware and merge-joint assume, relative to the mean squared activation.",
    NOT_ABLATED,
)
REMOVAL_STRIDE = _tuned(
    "REMOVAL_STRIDE",
    64,
    "One in this many of a group's remaining channels, rounded up, is removed in a round of the greedy order of merges.",
    NOT_ABLATED,
)
MAX_ELEMENTS_PER_GROUP = _tuned(
    "MAX_ELEMENTS_PER_GROUP",
    2**23,
    "Most numbers in the gradient-activation products of one group; images beyond it share sums, which adds noise.",
    f"{NOT_ABLATED}; set by memory",
)
MAX_ELEMENTS_TOGETHER = _tuned(
    "MAX_ELEMENTS_TOGETHER",
    2**28,
    "The same for all groups that merge-joint scores together.",
    f"{NOT_ABLATED}; set by memory",
)
MAX_ELEMENTS_OF_GATES = _tuned(
    "MAX_ELEMENTS_OF_GATES",
    2**25,
    "The same for the gate gradients of channels scored by plain removal.",
    f"{NOT_ABLATED}; set by memory",
)
MIN_SUMS = _tuned(
    "MIN_SUMS",
    32,
    "Fewest sums that images are distributed over, whatever the three limits above say.",
    NOT_ABLATED,
)
EARLY_WEIGHTS = _tuned(
    "EARLY_WEIGHTS",
    (1 / 4, 1 / 16),
    "Weights of the first group's scores that trial merges compare with 1, in this order.",
    _EARLY,
)
MIN_IMPROVEMENT = _tuned(
    "MIN_IMPROVEMENT",
    0.9,
    "Largest ratio of a trial's loss to the best one so far at which its weight is taken.",
    f"{_EARLY}; smaller gains may be chance among few held-out images",
)

# Trials and held-out images

HOLDOUT_STRIDE = _tuned(
    "HOLDOUT_STRIDE",
    8,
    "One calibration image in this many is held out to compare trials and to limit polishing.",
    _HELD_OUT,
)
TRIAL_STRIDE = _tuned(
    "TRIAL_STRIDE",
    4,
    "One in this many of the other calibration images is used to merge in a trial.",
    _EARLY,
)
MIN_HOLDOUT = _tuned(
    "MIN_HOLDOUT",
    16,
    "Fewest held-out images with which trials are run.",
    NOT_ABLATED,
)

# Merging

CYCLIC_COEFFICIENT = _tuned(
    "CYCLIC_COEFFICIENT",
    0.5,
    "Share of a removed channel or weight that its cyclic partner takes over.",
    "arXiv:2511.06265",
)
RIDGE_FACTORS = _tuned(
    "RIDGE_FACTORS",
    (1.0, 30.0, 1000.0),
    "Multiples of the setting `ridge` among which held-out batches choose, layer by layer.",
    NOT_ABLATED,
)
RIDGE_HOLDOUT_STRIDE = _tuned(
    "RIDGE_HOLDOUT_STRIDE",
    4,
    "One batch in this many is held out of a fit to choose its ridge.",
    NOT_ABLATED,
)
ROWS_PER_UNKNOWN = _tuned(
    "ROWS_PER_UNKNOWN",
    160,
    "Rows sampled for each unknown of a least-squares fit, where there are as many.",
    NOT_ABLATED,
)
MIN_ROWS = _tuned(
    "MIN_ROWS",
    100_000,
    "Fewest rows of a least-squares fit, where there are as many.",
    NOT_ABLATED,
)
SILENT_SCALE = _tuned(
    "SILENT_SCALE",
    1e-4,
    "A channel whose BatchNorm scale is below this share of the median is left out of a fit to a residual sum.",
    NOT_ABLATED,
)

# Polishing

LEARNING_RATES = _tuned(
    "LEARNING_RATES",
    (1e-3, 3e-4),
    "Learning rates of Adam, tried in this order until one lowers the held-out divergence.",
    f"{_POLISH}; the higher wins where much is lost, and does harm where little is",
)
BETAS = _tuned("BETAS", (0.9, 0.99), "Decay rates of Adam's moments.", NOT_ABLATED)
WARMUP = _tuned(
    "WARMUP",
    0.1,
    "Share of the steps over which the learning rate rises linearly.",
    NOT_ABLATED,
)
POLISH_IMAGES = _tuned("POLISH_IMAGES", 64, "Most images of one step.", _POLISH)
POLISH_PIXELS = _tuned(
    "POLISH_PIXELS",
    2**19,
    "Most pixels of one step: 10 images of 224x224.",
    "docs/ablation.md: Where polishing does harm; set by memory",
)
DIVERGENCE_LIMIT = _tuned(
    "DIVERGENCE_LIMIT",
    2.0,
    "Ratio of the held-out divergence half-way to that at the start beyond which an attempt ends.",
    NOT_ABLATED,
)
LINE_SHARES = _tuned(
    "LINE_SHARES",
    (1.0, 0.5, 0.25),
    "Shares of the way from the weights before the steps to those after them that held-out images compare with 0.",
    _HELD_OUT,
)
STATISTICS_SHARES = _tuned(
    "STATISTICS_SHARES",
    (1.0, 0.5),
    "Shares of the way to recalibrated BatchNorm statistics that held-out images compare with 0.",
    "docs/ablation.md: BatchNorm's statistics after reconstruction",
)
POLISH_TEMPERATURE = _tuned(
    "POLISH_TEMPERATURE",
    4.0,
    "Divides the logits in the held-out divergence; at 1, few images of which the dense network is unsure dominate it.",
    NOT_ABLATED,
)
SHIFT = _tuned(
    "SHIFT",
    8,
    "Images are shifted by up to their side divided by this.",
    f"{_POLISH}; shifts as such, not their size",
)
MIX = _tuned("MIX", 0.5, "Largest share of another image that is mixed into an image.", _POLISH)
CONTRAST = _tuned(
    "CONTRAST",
    0.4,
    "Largest relative change of an image's contrast.",
    f"{_POLISH}; changes as such, not their size",
)
BRIGHTNESS = _tuned(
    "BRIGHTNESS",
    0.4,
    "Largest change of an image's brightness, in standard deviations (units of normalised pixels).",
    f"{_POLISH}; changes as such, not their size",
)

# Predicted latency

ALIGNED = _tuned(
    "ALIGNED",
    8,
    "Widths that are multiples of this many channels are timed apart from the others, which many kernels run slower.",
    NOT_ABLATED,
)
MAX_GRID_POINTS = _tuned(
    "MAX_GRID_POINTS",
    {1: 16, 2: 8},
    "Most widths that are timed along each axis of an operation, by the number of axes that vary.",
    NOT_ABLATED,
)
RANK_TOLERANCE = _tuned(
    "RANK_TOLERANCE",
    0.02,
    "Singular values below this share of the largest count as zero in the fit of scale and overhead.",
    NOT_ABLATED,
)
