"""A config refuses what cannot work, and says what would; what it accepts survives being written down."""

import json
from dataclasses import fields, replace

import pytest

from hf_camphive.core.config import CONFIG_FILE, CampHiVeConfig, choices, without_texts
from hf_camphive.core.errors import CampHiVeError, ConfigError
from hf_camphive.core.methods import PRESETS

WHOLE = [f.name for f in fields(CampHiVeConfig) if f.type is int]
REAL = [f.name for f in fields(CampHiVeConfig) if f.type is float]
OPTIONAL_WHOLE = [f.name for f in fields(CampHiVeConfig) if f.type == int | None]
OPTIONAL_REAL = [f.name for f in fields(CampHiVeConfig) if f.type == float | None]
CHOICES = [f.name for f in fields(CampHiVeConfig) if choices(f.name)]
SWITCHES = [f.name for f in fields(CampHiVeConfig) if f.type is bool]
WEIGHTS = dict(PRESETS["camphive-paper-weights"].settings)
OTHER = CampHiVeConfig(
    **{"target_macs": 123456.0, "cycles": 3, "criterion": "hive", "merge": "cyclic", "scope": "all", "round_to": 8},
    **{"seed": 7, "calibration_size": 99, "curvature": "hessian", "optimizer": "adamw", "mixed_precision": "bf16"},
    **{"num_train_epochs": 0.5, "label_smoothing": 0.1, "distillation": 1.0, "warmup_ratio": 0},
    **{"keep": ("layer4.*", "conv1"), "layer_max_ratio": {"layer1.*": 0.3}},
)


def test_every_field_is_checked_by_its_type():
    kinds = WHOLE + REAL + OPTIONAL_WHOLE + OPTIONAL_REAL + CHOICES + SWITCHES + ["keep", "layer_max_ratio"]
    assert sorted(kinds) == sorted(f.name for f in fields(CampHiVeConfig))
    assert all(f.metadata["help"] for f in fields(CampHiVeConfig))


@pytest.mark.parametrize(
    ("settings", "criterion"),
    [
        ({}, "merge-aware"),
        ({"target_latency": 0.5}, "merge-joint"),
        ({"target_latency": 0.5, "target_macs": 0.4}, "merge-joint"),
        ({"target_latency": 0.5, "criterion": "merge-aware"}, "merge-aware"),
        ({"criterion": "hive"}, "hive"),
    ],
)
def test_the_usual_criterion_suits_the_budget(settings, criterion):
    assert CampHiVeConfig(**settings).scored_by == criterion


@pytest.mark.parametrize("name", OPTIONAL_WHOLE)
@pytest.mark.parametrize("value", [True, 1.5, "3"], ids=repr)
def test_optional_whole_numbers(name, value):
    assert getattr(CampHiVeConfig(**{name: None}), name) is None
    with pytest.raises(ConfigError, match=f"^{name} is {value!r}; it must be a whole number"):
        CampHiVeConfig(**{name: value})


@pytest.mark.parametrize("name", OPTIONAL_REAL)
@pytest.mark.parametrize("value", [True, "0.5", float("nan"), float("inf")], ids=repr)
def test_optional_real_numbers(name, value):
    assert getattr(CampHiVeConfig(**{name: None}), name) is None
    with pytest.raises(ConfigError, match="it must be a finite number"):
        CampHiVeConfig(**{name: value})


@pytest.mark.parametrize("name", SWITCHES)
def test_switches(name):
    with pytest.raises(ConfigError, match=f"^{name} is 1; it must be true or false"):
        CampHiVeConfig(**{name: 1})


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [True, 1.5, 2.0, "3", None, float("nan")], ids=repr)
def test_whole_numbers(name, value):
    with pytest.raises(ConfigError, match=f"^{name} is {value!r}; it must be a whole number"):
        CampHiVeConfig(**{name: value})


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("value", [True, "0.5", None, float("nan"), float("inf"), -float("inf"), [1.0]], ids=repr)
def test_real_numbers(name, value):
    with pytest.raises(ConfigError, match="it must be a finite number"):
        CampHiVeConfig(**{name: value})


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name):
    options = choices(name)
    for option in options:
        start = WEIGHTS if option == "weight" else {}
        assert getattr(CampHiVeConfig(**{**start, name: option}), name) == option
    with pytest.raises(ConfigError, match=f"^{name} is '{options[0]}x'; did you mean '{options[0]}'"):
        CampHiVeConfig(**{name: options[0] + "x"})
    for value in ("zzzz", 1):
        with pytest.raises(ConfigError, match=f"^{name} is {value!r}; choose from {', '.join(options)}$"):
            CampHiVeConfig(**{name: value})
    for value in (None, True, [options[0]]):
        with pytest.raises(ConfigError, match=f"^{name} is "):
            CampHiVeConfig(**{name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_macs": 0}, "target_macs is 0; give a fraction such as 0.5, or a number of MACs per image"),
        ({"target_macs": -0.5}, "target_macs is -0.5; give a fraction"),
        ({"target_macs": 2.0}, "target_macs is 2.0: .* for a 2.0x reduction write 0.5"),
        ({"target_macs": 3}, "for a 3x reduction write 0.333"),
        (
            {"target_params": 7.0},
            "target_params is 7.0: above 1 it counts parameters; for a 7.0x reduction write 0.143",
        ),
        ({"target_latency": 0.0}, "target_latency is 0.0; give a fraction such as 0.5, or a number of milliseconds"),
        ({"latency_batch_size": 0}, "latency_batch_size is 0; it must be at least 1"),
        ({"max_ratio": 1.2}, "max_ratio is 1.2; it is a share between 0 and 1"),
        ({"layer_max_ratio": {"conv1": 1.2}}, "layer_max_ratio is 1.2 for 'conv1'; it is a share between 0 and 1"),
        ({"layer_max_ratio": {"conv1": "half"}}, "layer_max_ratio is {'conv1': 'half'}; it must be a table of shares"),
        ({"layer_max_ratio": {"conv1": True}}, "it must be a table of shares by pattern"),
        ({"layer_max_ratio": {1: 0.5}}, "it must be a table of shares by pattern, such as {'layer1.*': 0.3}"),
        ({"layer_max_ratio": "conv1=0.5"}, "layer_max_ratio is 'conv1=0.5'; it must be a table"),
        ({"keep": "conv1"}, r"keep is 'conv1'; it must be a tuple of patterns, such as \('layer4"),
        ({"keep": ("conv1", 2)}, "it must be a tuple of patterns"),
        ({"keep": None}, "it must be a tuple of patterns"),
        ({"cycles": 0}, "cycles is 0; it must be at least 1"),
        ({"round_to": 0}, "round_to is 0; it must be at least 1"),
        ({"min_channels": -3}, "min_channels is -3; it must be at least 1"),
        ({"per_device_train_batch_size": 0}, "it must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "it must be at least 1"),
        ({"seed": -1}, "seed is -1; it must not be negative"),
        ({"seed": 2**32}, r"seed is 4294967296; it must be below 2\^32"),
        ({"num_train_epochs": -1.0}, "num_train_epochs is -1.0; it must not be negative"),
        ({"learning_rate": -1e-3}, "it must not be negative"),
        ({"warmup_ratio": 1.5}, "warmup_ratio is 1.5; it is a share between 0 and 1"),
        ({"distillation": 1.01}, "distillation is 1.01; it is a share between 0 and 1"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1, which leaves no label; 0.1 is usual"),
        ({"temperature": 0.0}, r"temperature is 0.0; it must be positive \(4 is usual\)"),
        (
            {"calibration_size": 15},
            "criterion 'merge-aware' with merge 'reconstruct' needs at least 16 images; raise it, or use magnitude, bn-scale or random with",
        ),
        ({"calibration_size": 8, "criterion": "magnitude"}, "criterion 'magnitude' with merge 'reconstruct' needs"),
        ({"calibration_size": 8, "merge": "none"}, "criterion 'merge-aware' with merge 'none' needs"),
    ],
    ids=repr,
)
def test_refusals_say_what_would_work(values, message):
    with pytest.raises(ConfigError, match=message):
        CampHiVeConfig(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"target_macs": 1},
        {"target_macs": 1000},
        {"calibration_size": 1, "criterion": "random", "merge": "cyclic"},
        {"num_train_epochs": 0, "head_epochs": 0, "learning_rate": 0},
        {"seed": 2**32 - 1},
        {"distillation": 1, "warmup_ratio": 1},
    ],
    ids=repr,
)
def test_the_edges_of_what_works(values):
    assert {name: getattr(CampHiVeConfig(**values), name) for name in values} == values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"granularity": "weight"},
            "criterion 'hive-paper' with merge .* not 'merge-aware' .* preset camphive-paper-weights",
        ),
        (WEIGHTS | {"criterion": "hap"}, "not 'hap' with 'cyclic'; start from preset camphive-paper-weights"),
        (WEIGHTS | {"merge": "reconstruct"}, "not 'hive-paper' with 'reconstruct'"),
        (
            WEIGHTS | {"target_macs": 0.4},
            "target_macs is 0.4, but granularity 'weight' cuts nothing.*leave it out and",
        ),
        (WEIGHTS | {"cycles": 2}, "cycles is 2, but"),
        (WEIGHTS | {"threshold": "percentile"}, "threshold is 'percentile', but"),
        (WEIGHTS | {"scope": "all"}, "scope is 'all', but"),
        (
            WEIGHTS | {"round_to": 8},
            "round_to is 8, but .* leave it out and set sparsity, or set granularity to channel",
        ),
        (WEIGHTS | {"min_channels": 2}, "min_channels is 2, but"),
        (WEIGHTS | {"sparsity": 1}, "sparsity is 1; it is a share between 0 and 1, such as 0.5"),
        ({"sparsity": 0}, "sparsity is 0; it is a share"),
        ({"sparsity": 0.7}, "sparsity is 0.7, but granularity 'channel' leaves no zeros; set target_macs instead"),
    ],
    ids=repr,
)
def test_granularities_that_do_not_fit_their_options(values, message):
    with pytest.raises(ConfigError, match=message):
        CampHiVeConfig(**values)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = CampHiVeConfig.from_preset(name)
    assert config == CampHiVeConfig(**PRESETS[name].settings)
    assert CampHiVeConfig.from_dict(config.to_dict()) == config
    changed = CampHiVeConfig.from_preset(name, seed=3, distillation=0.25)
    assert changed == replace(config, seed=3, distillation=0.25)
    assert (config == CampHiVeConfig()) == (name == "default")


def test_a_preset_that_is_none():
    with pytest.raises(ConfigError, match="there is no preset 'sosp-j'; did you mean 'sosp-"):
        CampHiVeConfig.from_preset("sosp-j")
    with pytest.raises(
        ConfigError, match="no preset 'zzz'; choose from default, camphive-paper, camphive-paper-weights, "
    ):
        CampHiVeConfig.from_preset("zzz")


def test_budgets_are_those_given_or_half_the_macs():
    assert CampHiVeConfig().budgets == {"macs": 0.5}
    assert CampHiVeConfig(target_latency=3.5).budgets == {"latency": 3.5}
    several = CampHiVeConfig(target_latency=0.5, target_macs=0.4, target_params=1e6)
    assert several.budgets == {"macs": 0.4, "params": 1e6, "latency": 0.5}


def test_widths_are_in_eights_where_time_counts():
    assert [CampHiVeConfig(**options).width_step for options in ({}, {"target_latency": 0.5})] == [1, 8]
    assert CampHiVeConfig(target_latency=0.5, round_to=4).width_step == 4


def test_patterns_are_values():
    given = {"keep": ["layer4.*", "conv1"], "layer_max_ratio": {"layer1.*": 0.3, "fc": 0}}
    config = CampHiVeConfig(**given)
    assert config.keep == ("layer4.*", "conv1") and config.layer_max_ratio == {"layer1.*": 0.3, "fc": 0}
    assert config.to_dict()["keep"] == ["layer4.*", "conv1"] == config.as_run()["keep"]
    given["layer_max_ratio"]["fc"] = 1  # the config has its own
    assert config.layer_max_ratio["fc"] == 0 and CampHiVeConfig().layer_max_ratio == {}


def test_patterns_in_older_files_are_texts(tmp_path):
    texts = {"schema": 1, "keep": "layer4.*, conv1", "layer_max_ratio": "layer1.*=0.3, fc=0"}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(texts))
    expected = CampHiVeConfig(keep=("layer4.*", "conv1"), layer_max_ratio={"layer1.*": 0.3, "fc": 0.0})
    assert CampHiVeConfig.from_dict(texts) == CampHiVeConfig.from_pretrained(tmp_path) == expected
    assert CampHiVeConfig.from_dict({"keep": "", "layer_max_ratio": ""}) == CampHiVeConfig()
    assert without_texts({"keep": "a", "seed": 1, "model": "x,y"}) == {"keep": ["a"], "seed": 1, "model": "x,y"}
    for text, item in (("conv1=0.5,fc", "fc"), ("=0.5", "=0.5"), ("conv1=half", "conv1=half")):
        with pytest.raises(ConfigError, match=f"layer_max_ratio has '{item}'; write PATTERN=SHARE, such as"):
            CampHiVeConfig.from_dict({"layer_max_ratio": text})


def test_refusals_are_of_the_common_kinds():
    assert issubclass(ConfigError, CampHiVeError) and issubclass(ConfigError, ValueError)


@pytest.mark.parametrize("config", [CampHiVeConfig(), OTHER], ids=["default", "other"])
def test_round_trips(config, tmp_path):
    assert CampHiVeConfig.from_dict(config.to_dict()) == config
    assert CampHiVeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config.save_pretrained(tmp_path)
    assert CampHiVeConfig.from_pretrained(tmp_path) == config
    stored = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert stored.pop("schema") == 1 and stored == {**vars(config), "keep": list(config.keep)}


def test_configs_are_values():
    assert replace(OTHER, seed=8) != OTHER == replace(OTHER)
    assert hash(OTHER) == hash(replace(OTHER))
    with pytest.raises(AttributeError):
        OTHER.seed = 1


def test_missing_keys_have_their_defaults():
    assert CampHiVeConfig.from_dict({"seed": 3}) == CampHiVeConfig(seed=3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"taget_macs": 0.5}, "unknown key 'taget_macs' in the config; did you mean 'target_macs'"),
        ({"zzz": 1}, "unknown key 'zzz' in the config; known keys: target_macs, target_params, "),
        ({"schema": 2}, "config.json has schema 2, not 1; install the version of hf_camphive that wrote it"),
        ({"schema": None}, "has schema None, not 1"),
        ({"cycles": "two"}, "cycles is 'two'"),
        ([], "table of keys and values"),
        ("text", "table of keys and values"),
        (None, "table of keys and values"),
    ],
    ids=repr,
)
def test_what_is_no_config(values, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        CampHiVeConfig.from_dict(values)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message):
        CampHiVeConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b'{"seed": 1'], ids=repr)
def test_damaged_files(content, tmp_path):
    with pytest.raises(ConfigError, match="was it saved by hf_camphive"):
        CampHiVeConfig.from_pretrained(tmp_path)
    (tmp_path / CONFIG_FILE).write_bytes(content)
    with pytest.raises(ConfigError, match=r"not valid JSON.*restore it from the run that wrote it"):
        CampHiVeConfig.from_pretrained(tmp_path)
