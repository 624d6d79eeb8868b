"""The table of the method's numbers: complete, truly sourced, and the one that the modules use."""

import ast
import json
import re
from pathlib import Path

from hf_camphive.pruning import tuning

ROOT = Path(__file__).parent.parent.parent


def test_each_constant_has_the_value_of_its_row():
    others = {"TABLE", "NOT_ABLATED"}
    constants = {name: value for name, value in vars(tuning).items() if name[0] != "_" and name.isupper()}
    assert constants.keys() - others == tuning.TABLE.keys()
    assert all(row.name == name and row.value == constants[name] for name, row in tuning.TABLE.items())


def test_each_row_says_what_the_number_does_and_what_chose_it():
    page = (ROOT / "docs/ablation.md").read_text(encoding="utf-8")
    headings = set(re.findall(r"^#+ (.+)$", page, flags=re.MULTILINE))
    for row in tuning.TABLE.values():
        source = row.chosen_by.partition(";")[0]
        heading = source.removeprefix("docs/ablation.md: ")
        assert source == tuning.NOT_ABLATED or source.startswith("arXiv:") or heading in headings, row
        assert row.meaning.endswith(".") and len(row.meaning) > 20, row


def test_no_other_module_defines_or_ignores_a_number_of_the_table():
    used: set[str] = set()
    for path in (ROOT / "hf_camphive").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.name == "tuning.py":
            continue
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in tuning.TABLE]
        if path.is_relative_to(ROOT / "hf_camphive/pruning"):
            assert not [node.id for node in names if isinstance(node.ctx, ast.Store)], path
        used |= {node.id for node in names if isinstance(node.ctx, ast.Load)}
    assert used == set(tuning.TABLE)


def test_the_values_are_plain_json():
    values = tuning.as_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["EARLY_WEIGHTS"] == [0.25, 0.0625] and values["MAX_GRID_POINTS"] == {"1": 16, "2": 8}
