"""`CampHiVeConfig`: all settings of a pruning run, validated when it is made and saved beside the model.

Pure data without heavy imports. The command line's options and `camphive_config.json` are both made from these fields;
criteria, merge rules and presets are those of `core/methods.py`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from hf_camphive.core.errors import ConfigError, did_you_mean
from hf_camphive.core.methods import AUTO, CRITERIA, MERGE_RULES, PRESETS
from hf_camphive.core.records import RecordFormat

CONFIG_FILE = "camphive_config.json"
FORMAT = RecordFormat(CONFIG_FILE, ConfigError, indent=2, schema_required=False)
USUAL_POLISH_STEPS = 100
MIN_CALIBRATION = 16  # images, where a criterion or merge rule reads any


def _option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class CampHiVeConfig:
    """Settings of a pruning run: what to remove, how to repair the network and how to finetune it.

    Fields are plain values, and a config equals the one read back from its JSON.

    Raises:
        ConfigError: A value has the wrong type or range, or contradicts another one.
    """

    # What to remove
    target_macs: float | None = _option(
        None,
        "Budget: a fraction of the network's MACs if at most 1, else MACs per image (1 MAC = 2 FLOPs). Without any budget "
        "it is 0.5; several budgets are all met.",
    )
    target_params: float | None = _option(
        None, "Budget: a fraction of the network's parameters if at most 1, else their number."
    )
    target_latency: float | None = _option(
        None, "Budget: a fraction of the network's latency on this device if below 1, else milliseconds per batch."
    )
    latency_batch_size: int = _option(1, "Images per batch for which target_latency holds.")
    latency_folded: bool = _option(
        False,
        "Apply target_latency to the network as deployed: BatchNorm, and what dropped blocks leave, folded into "
        "convolutions (`fold`).",
    )
    cycles: int = _option(1, "Score, merge and cut this many times, each towards an equal share of the budget.")
    criterion: str = _option(
        AUTO,
        "Importance of a channel. `hive` is CAMP-HiVe's curvature score; `merge-aware` estimates the error that remains "
        "after merging, `merge-joint` also its terms between layers. `auto` takes `merge-joint` with target_latency and "
        "`merge-aware` otherwise, as measures best.",
    )
    merge: str = _option("reconstruct", "How kept channels replace the removed ones. `cyclic` is CAMP-HiVe's rule.")
    threshold: Literal["adaptive", "global", "percentile"] = _option(
        "adaptive",
        "Order of removal: lowest score per cost saved, lowest score, or the same share of every group (CAMP-HiVe).",
    )
    early_weight: float | None = _option(
        None,
        "Weight of the first group's scores relative to the last group's, since later layers repair early errors. By "
        "default 1, or the best value found by trial merges where merge is `reconstruct` and the criterion is one of "
        f"{', '.join(f'`{name}`' for name, row in CRITERIA.items() if row.judges_merges)}.",
    )
    scope: Literal["interior", "all"] = _option(
        "interior", "Prune inside blocks only, or also between them (residual streams, stem, features)."
    )
    round_to: int | None = _option(
        None, "Keep a multiple of this number of channels; by default 8 with target_latency, else 1."
    )
    implant_ratio: float = _option(
        0.0, "Share of the removed channels that are replaced by 1x1 kernels (HAP's neural implants)."
    )
    min_channels: int = _option(1, "Fewest channels to keep in a group outside residual branches.")
    max_ratio: float = _option(1.0, "Largest share of its channels that a group may lose.")
    layer_max_ratio: dict[str, float] = field(
        default_factory=dict, hash=False, metadata={"help": "Largest share for single layers, by name pattern."}
    )
    keep: tuple[str, ...] = _option((), "Layers to leave unpruned, by name pattern.")
    granularity: Literal["channel", "weight"] = _option(
        "channel", "Cut channels, or set single weights to zero as in CAMP-HiVe, which saves neither MACs nor time."
    )
    sparsity: float = _option(0.5, "Share of each tensor's weights that is set to zero, with granularity weight.")
    seed: int = _option(0, "Seed of all random numbers; the same seed gives the same plan.")

    # Curvature and reconstruction
    calibration_size: int = _option(1024, "Training images used by scoring, merging and polishing.")
    curvature: Literal["gauss-newton", "hessian"] = _option(
        "gauss-newton",
        "Matrix used as the loss's curvature by "
        f"{', '.join(f'`{name}`' for name, row in CRITERIA.items() if row.uses_curvature)}.",
    )
    curvature_passes: int = _option(
        2, "Backward passes per image for `gauss-newton` in `hive`; unbiased with any number, exact with classes - 1."
    )
    num_eigenpairs: int = _option(8, "Leading eigenpairs used by `hive`.")
    eigensolver: Literal["lanczos", "power"] = _option(
        "lanczos",
        "Eigensolver of `hive`: Lanczos with full reorthogonalisation, or CAMP-HiVe's power iteration, which needs more "
        "products.",
    )
    hutchinson_probes: int = _option(32, "Random vectors in the trace estimate of `hap`.")
    power_steps: int = _option(20, "Largest number of eigensolver steps.")
    power_tolerance: float = _option(0.05, "Residual ||Av - lambda v|| / |lambda| at which the eigensolver stops.")
    curvature_images: int = _option(256, "Calibration images used for curvature products; at most calibration_size.")
    ridge: float = _option(1e-4, "Ridge of the least-squares fits, relative to the mean squared input.")
    polish_steps: int | None = _option(
        None,
        "Label-free steps after the cut that pull the logits towards the dense network's; kept only as far as they lower "
        f"the error on held-out images. By default {USUAL_POLISH_STEPS} where no finetuning follows, else 0.",
    )

    # Finetuning
    num_train_epochs: float = _option(
        3.0, "Epochs of finetuning after the last cycle; 0 skips it.", aliases=["--epochs"]
    )
    learning_rate: float = _option(0.005, "Peak learning rate.")
    weight_decay: float = _option(5e-4, "Weight decay of weights with at least two axes.")
    optimizer: Literal["sgd", "adamw"] = _option("sgd", "SGD with Nesterov momentum 0.9, or AdamW.")
    warmup_ratio: float = _option(0.05, "Share of the steps over which the learning rate rises to its peak.")
    label_smoothing: float = _option(0.0, "Label smoothing of the cross-entropy.")
    distillation: float = _option(0.5, "Weight of the distillation loss towards the dense network; 0 turns it off.")
    temperature: float = _option(4.0, "Temperature of the distillation loss.")
    per_device_train_batch_size: int = _option(128, "Training images per batch and process.")
    per_device_eval_batch_size: int = _option(128, "Evaluation images per batch and process.")
    gradient_accumulation_steps: int = _option(1, "Batches per optimizer step.")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = _option(
        "auto",
        "Precision of finetuning: `auto` is bf16 on a GPU that has it natively, fp32 elsewhere. Polishing runs in fp32 unless `bf16` is given.",
    )
    head_epochs: float = _option(2.0, "Epochs of training a replaced classifier before pruning.")

    def __post_init__(self) -> None:
        _check_patterns(self)
        object.__setattr__(self, "keep", tuple(self.keep))
        object.__setattr__(self, "layer_max_ratio", dict(self.layer_max_ratio))
        _check_types(self)
        _check_ranges(self)
        _check_calibration(self)
        _require(
            self.implant_ratio == 0 or "macs" in self.budgets,
            f"implant_ratio is {self.implant_ratio}, and implants are fitted into a budget of MACs; set target_macs too",
        )
        _check_granularity(self)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "CampHiVeConfig":
        """Return the config of a preset, with changes.

        Raises:
            ConfigError: There is no preset of that name, or a change cannot work.
        """
        _require(name in PRESETS, f"there is no preset {name!r}; {did_you_mean(name, PRESETS)}")
        return cls(**{**PRESETS[name].settings, **changes})

    @property
    def budgets(self) -> dict[str, float]:
        """Targets by cost ("macs", "params", "latency"): those that are set, or half the MACs if none is."""
        given = {"macs": self.target_macs, "params": self.target_params, "latency": self.target_latency}
        return {cost: target for cost, target in given.items() if target is not None} or {"macs": 0.5}

    @property
    def scored_by(self) -> str:
        """Name of the criterion that scores: `criterion`, or for "auto" the one that measures best for the budget."""
        if self.criterion != AUTO:
            return self.criterion
        return "merge-aware" if self.target_latency is None else "merge-joint"

    @property
    def width_step(self) -> int:
        """Number that widths are multiples of: `round_to`, or the default for the budget."""
        return self.round_to or (1 if self.target_latency is None else 8)

    @property
    def tries_early_weights(self) -> bool:
        """True if trial merges choose `early_weight`.

        That needs scores that estimate the error of a merge, and a merge rule whose later layers repair part of it.
        """
        judges_merges = CRITERIA[self.scored_by].judges_merges and self.threshold != "percentile"
        return self.early_weight is None and judges_merges and self.merge == "reconstruct"

    @property
    def cuts_channels(self) -> bool:
        """True if channels are cut; otherwise single weights are set to zero and stay zero."""
        return self.granularity == "channel"

    @property
    def label_free_steps(self) -> int:
        """Number of polishing steps: `polish_steps` or its default; 0 where single weights are set to zero."""
        if not self.cuts_channels:
            return 0
        usual = 0 if self.num_train_epochs else USUAL_POLISH_STEPS
        return usual if self.polish_steps is None else self.polish_steps

    def as_run(self) -> dict[str, Any]:
        """Return the settings as a report holds them: plain values, with the criterion that scored."""
        return replace(self, criterion=self.scored_by)._plain()

    def to_dict(self) -> dict[str, Any]:
        """Return the settings and the number of their layout, as `camphive_config.json` holds them."""
        return {"schema": FORMAT.schema, **self._plain()}

    def _plain(self) -> dict[str, Any]:
        return {**asdict(self), "keep": list(self.keep)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CampHiVeConfig":
        """Rebuild a config from `to_dict`; fields that are missing have their defaults, and so has the schema.

        Raises:
            ConfigError: A key is unknown, the schema is another one, or a value cannot work.
        """
        return FORMAT.restore(values, cls._from_fields)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `camphive_config.json` into an existing folder."""
        Path(folder, CONFIG_FILE).write_text(FORMAT.write(self._plain()), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "CampHiVeConfig":
        """Read `camphive_config.json` from a folder.

        Raises:
            ConfigError: There is no such file, it is damaged, or `from_dict` refuses its values.
        """
        path = Path(folder, CONFIG_FILE)
        try:
            text = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"no {CONFIG_FILE} in {folder}; was it saved by hf_camphive?") from error
        return FORMAT.read(text, cls._from_fields, str(path))

    @classmethod
    def _from_fields(cls, values: dict[str, Any]) -> "CampHiVeConfig":
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                hint = did_you_mean(key, known, otherwise=f"known keys: {', '.join(known)}")
                raise ConfigError(f"unknown key {key!r} in the config; {hint}")
        return cls(**without_texts(values))


# Fields without effect where single weights are set to zero.
_CUTTING = ("target_macs", "cycles", "threshold", "early_weight", "scope", "round_to", "min_channels")
_AT_LEAST_ONE = (
    "cycles",
    "round_to",
    "latency_batch_size",
    "min_channels",
    "calibration_size",
    "num_eigenpairs",
    "hutchinson_probes",
    "power_steps",
    "curvature_images",
    "curvature_passes",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)
_NOT_NEGATIVE = (
    "seed",
    "power_tolerance",
    "ridge",
    "polish_steps",
    "num_train_epochs",
    "learning_rate",
    "weight_decay",
    "head_epochs",
)
_SHARES = ("max_ratio", "warmup_ratio", "label_smoothing", "distillation", "implant_ratio")
_BUDGETS = {  # option: least number that counts units, example of a fraction, unit
    "target_macs": (1000, "0.5", "MACs per image"),
    "target_params": (1000, "0.5", "parameters"),
    "target_latency": (0, "0.5", "milliseconds per batch"),
}


def without_texts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in which `keep` is a list and `layer_max_ratio` a table, where they are comma-separated texts.

    Texts are what the command line gives and what older files hold: "layer4.*,conv1" and "layer1.*=0.3,conv1=0".

    Raises:
        ConfigError: An item of `layer_max_ratio` is not PATTERN=SHARE.
    """
    return {
        key: FROM_TEXT[key](value) if key in FROM_TEXT and type(value) is str else value
        for key, value in values.items()
    }


def _patterns(text: str) -> list[str]:
    return [pattern.strip() for pattern in text.split(",") if pattern.strip()]


def _ratios(text: str) -> dict[str, float]:
    ratios = {}
    for item in text.split(",") if text else ():
        pattern, _, share = (part.strip() for part in item.rpartition("="))
        try:
            ratios[pattern] = float(share)
        except ValueError:
            pattern = ""
        _require(pattern != "", f"layer_max_ratio has {item!r}; write PATTERN=SHARE, such as 'layer1.*=0.3'")
    return ratios


FROM_TEXT: dict[str, Callable[[str], Any]] = {"keep": _patterns, "layer_max_ratio": _ratios}


def _check_budget(name: str, value: float, least: float, example: str, unit: str) -> None:
    _require(value > 0, f"{name} is {value}; give a fraction such as {example}, or a number of {unit}")
    _require(
        value <= 1 or value >= least,
        f"{name} is {value}: above 1 it counts {unit}; for a {value}x reduction write {1 / value:.3g}",
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_calibration(config: CampHiVeConfig) -> None:
    if config.calibration_size >= MIN_CALIBRATION:
        return
    criteria = [name for name, row in CRITERIA.items() if not row.reads_images]
    rules = [name for name, row in MERGE_RULES.items() if not row.reads_images]
    _require(
        config.scored_by in criteria and config.merge in rules,
        f"calibration_size is {config.calibration_size}: criterion {config.scored_by!r} with merge {config.merge!r} "
        f"needs at least {MIN_CALIBRATION} images; raise it, or use {_either(criteria)} with {_either(rules)}",
    )


def _either(names: Iterable[str]) -> str:
    """Join names as in "a, b or c"."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def _check_ranges(config: CampHiVeConfig) -> None:
    for name, (least, example, unit) in _BUDGETS.items():
        if (value := getattr(config, name)) is not None:
            _check_budget(name, value, least, example, unit)
    for name in _AT_LEAST_ONE:
        value = getattr(config, name)
        _require(value is None or value >= 1, f"{name} is {value}; it must be at least 1")
    for name in _NOT_NEGATIVE:
        value = getattr(config, name)
        _require(value is None or value >= 0, f"{name} is {value}; it must not be negative")
    for name in _SHARES:
        value = getattr(config, name)
        _require(0 <= value <= 1, f"{name} is {value}; it is a share between 0 and 1")
    for pattern, ratio in config.layer_max_ratio.items():
        _require(0 <= ratio <= 1, f"layer_max_ratio is {ratio} for {pattern!r}; it is a share between 0 and 1")
    _require(
        config.early_weight is None or 0 < config.early_weight <= 1,
        f"early_weight is {config.early_weight}; it is a share above 0 and at most 1, where 1 leaves scores unchanged",
    )
    _require(config.seed < 2**32, f"seed is {config.seed}; it must be below 2^32")
    _require(config.label_smoothing < 1, "label_smoothing is 1, which leaves no label; 0.1 is usual")
    _require(config.temperature > 0, f"temperature is {config.temperature}; it must be positive (4 is usual)")


def _check_granularity(config: CampHiVeConfig) -> None:
    usual = {f.name: f.default for f in fields(config)}
    _require(0 < config.sparsity < 1, f"sparsity is {config.sparsity}; it is a share between 0 and 1, such as 0.5")
    if config.cuts_channels:
        _require(
            config.sparsity == usual["sparsity"],
            f"sparsity is {config.sparsity}, but granularity 'channel' leaves no zeros; set target_macs instead, or "
            "granularity to weight",
        )
        return
    rules = [name for name, row in MERGE_RULES.items() if row.weight_wording]
    _require(
        config.scored_by == "hive-paper" and config.merge in rules,
        f"granularity 'weight' knows criterion 'hive-paper' with merge {_either(map(repr, rules))}, not "
        f"{config.scored_by!r} with {config.merge!r}; start from preset camphive-paper-weights, or set granularity to "
        "channel",
    )
    for name in _CUTTING:
        value = getattr(config, name)
        _require(
            value == usual[name],
            f"{name} is {value!r}, but granularity 'weight' cuts nothing, so that it cannot matter; leave it out and set "
            "sparsity, or set granularity to channel",
        )


def choices(name: str) -> tuple[str, ...]:
    """Return the values that the field `name` may have, methods from outside included; () where it is no choice."""
    if name == "criterion":
        return (AUTO, *CRITERIA)
    if name == "merge":
        return tuple(MERGE_RULES)
    kind = CampHiVeConfig.__annotations__[name]
    return get_args(kind) if get_origin(kind) is Literal else ()


def _check_patterns(config: CampHiVeConfig) -> None:
    keep, ratios = config.keep, config.layer_max_ratio
    _require(
        isinstance(keep, (tuple, list)) and all(isinstance(pattern, str) for pattern in keep),
        f"keep is {keep!r}; it must be a tuple of patterns, such as ('layer4.*', 'conv1')",
    )
    _require(
        isinstance(ratios, Mapping)
        and all(isinstance(pattern, str) and _is_number(share) for pattern, share in ratios.items()),
        f"layer_max_ratio is {ratios!r}; it must be a table of shares by pattern, such as {{'layer1.*': 0.3}}",
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def _check_types(config: CampHiVeConfig) -> None:
    for f in fields(config):
        value = getattr(config, f.name)
        kind = type(config).__annotations__[f.name]  # f.type is changed by HfArgumentParser
        kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)  # `_check_patterns` has checked the others
        if value is None and NoneType in kinds:
            continue
        if names := choices(f.name):
            _require(value in names, f"{f.name} is {value!r}; {did_you_mean(str(value), names)}")
        elif str in kinds:
            _require(isinstance(value, str), f"{f.name} is {value!r}; it must be text")
        elif bool in kinds:
            _require(isinstance(value, bool), f"{f.name} is {value!r}; it must be true or false")
        elif int in kinds:
            _require(type(value) is int, f"{f.name} is {value!r}; it must be a whole number")
        elif float in kinds:
            _require(_is_number(value), f"{f.name} is {value!r}; it must be a finite number")
