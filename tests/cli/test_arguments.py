"""Options become a config: presets, choices, lists of patterns."""

import re
from typing import get_args, get_type_hints

import pytest

from hf_camphive.cli import main as cli
from hf_camphive.cli.arguments import config_from, config_options, parse, preset_options
from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.methods import PRESETS


def parsed(*arguments: str) -> CampHiVeConfig:
    return config_from(parse(cli.prune, [*map(str, arguments)], preset_options(), config_options())[1])


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_a_recipe_that_flags_override(name):
    assert parsed("--preset", name) == parsed(f"--preset={name}") == CampHiVeConfig.from_preset(name)
    changed = parsed("--learning-rate", 0.5, "--preset", name, "--distillation", 0.5, "--curvature", "gauss-newton")
    changes = {"learning_rate": 0.5, "distillation": 0.5, "curvature": "gauss-newton"}
    assert changed == CampHiVeConfig.from_preset(name, **changes)


def test_presets_are_offered_by_name(capsys):
    assert get_args(get_type_hints(preset_options())["preset"]) == tuple(PRESETS)
    for arguments in (["--preset", "happ"], ["--preset"]):
        with pytest.raises(SystemExit, match="2"):
            parsed(*arguments)
    assert "invalid choice: 'happ'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        parsed("--preset", "hap", "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "Recipe that sets several of the options below" in shown and "Importance of a channel." in shown
    assert re.search(r"--criterion .*?\(default: hap\)", shown) and re.search(r"--merge .*?\(default: none\)", shown)


def test_patterns_are_listed_with_commas():
    config = parsed("--keep", "layer4.*, conv1", "--layer-max-ratio", "layer1.*=0.3,fc=0")
    assert config == CampHiVeConfig(keep=("layer4.*", "conv1"), layer_max_ratio={"layer1.*": 0.3, "fc": 0})
    assert parsed() == CampHiVeConfig()
