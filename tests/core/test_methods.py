"""One row per method: what the config, the command line and the card know of it, and how rows are added."""

import pytest

from hf_camphive.core.config import CampHiVeConfig, choices
from hf_camphive.core.errors import ConfigError, did_you_mean
from hf_camphive.core.methods import CRITERIA, MERGE_RULES, PRESETS, CriterionRow, MergeRuleRow, register
from hf_camphive.pruning.merging import rules
from hf_camphive.pruning.scoring.criteria import SCORERS


def test_every_row_has_its_function_and_the_other_way_round():
    assert CRITERIA.keys() == SCORERS.keys() and MERGE_RULES.keys() == rules.MERGERS.keys()


@pytest.mark.parametrize("table", [CRITERIA, MERGE_RULES, PRESETS], ids=["criteria", "merge rules", "presets"])
def test_rows_stand_under_their_own_names(table):
    assert all(name == row.name for name, row in table.items())


@pytest.mark.parametrize("name", ["fisher", "auto"])
def test_a_name_is_given_once(name):
    before = dict(CRITERIA)
    with pytest.raises(ConfigError, match=f"the name '{name}' is taken; register under another one"):
        register(CRITERIA, CriterionRow(name, "something else"))
    assert before == CRITERIA


@pytest.mark.parametrize("name", ["", "a,b", "a b"])
def test_a_name_can_be_written_in_a_list(name):
    with pytest.raises(ConfigError, match="use letters, digits"):
        register(MERGE_RULES, MergeRuleRow(name, "something"))


def test_the_config_follows_the_tables(monkeypatch):
    with pytest.raises(ConfigError, match="criterion is 'mine'; choose from auto, merge-aware"):
        CampHiVeConfig(criterion="mine")
    monkeypatch.setitem(CRITERIA, "mine", CriterionRow("mine", "my wish", reads_images=False, judges_merges=True))
    monkeypatch.setitem(MERGE_RULES, "ours", MergeRuleRow("ours", "it was so"))
    config = CampHiVeConfig(criterion="mine", merge="ours", calibration_size=1)
    assert (config.scored_by, config.merge) == ("mine", "ours")
    assert "mine" in choices("criterion") and "ours" in choices("merge")
    assert CampHiVeConfig(criterion="mine").tries_early_weights
    with pytest.raises(ConfigError, match="criterion is 'mime'; did you mean 'mine'"):
        CampHiVeConfig(criterion="mime")
    with pytest.raises(ConfigError, match="use magnitude, bn-scale, random or mine with cyclic, none or ours"):
        CampHiVeConfig(calibration_size=1)


@pytest.mark.parametrize(
    ("name", "options", "hint"),
    [
        ("fishr", {}, "did you mean 'fisher'?"),
        ("zzz", {}, "choose from fisher, fish, hive"),
        ("zzz", {"otherwise": "look it up"}, "look it up"),
        ("fishe", {"most": 2}, "did you mean 'fisher' or 'fish'?"),
        ("fish", {"otherwise": ""}, ""),  # a name that exists is not misspelled
    ],
)
def test_hints(name, options, hint):
    assert did_you_mean(name, ["fisher", "fish", "hive"], **options) == hint
