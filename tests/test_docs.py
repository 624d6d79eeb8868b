"""The documentation is true: its code runs, its commands, files and names exist, its figures are those of the kept results."""

import ast
import doctest
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from support.brief import time_briefly
from support.scoring import context
from support.tiers import slow_ones

import hf_camphive
from hf_camphive.cli.main import main
from hf_camphive.core.methods import CRITERIA, MERGE_RULES, PRESETS
from hf_camphive.network.footprint import count_parameters
from hf_camphive.pruning.merging import rules
from hf_camphive.pruning.scoring import criteria

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    {*DOCS.glob("*.md"), *DOCS.glob("api/*.md"), ROOT / "CONTRIBUTING.md", ROOT / "README.md", ROOT / "SECURITY.md"}
)
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MKDOCS = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def id_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(text: str, *languages: str) -> list[str]:
    """Contents of the fenced blocks in these languages."""
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def section(text: str, heading: str) -> str:
    """What stands under a heading of the second level."""
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """Cells of all rows of all tables."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# Code


ELSEWHERE = {
    ROOT / "CONTRIBUTING.md",
    ROOT / "README.md",
}  # recipes are run one by one below, the README in test_readme.py
TO_RUN = [page for page in PAGES if page not in ELSEWHERE and blocks(text_of(page), "python")]


@pytest.mark.parametrize("page", slow_ones(TO_RUN, {DOCS / "guide.md"}), ids=id_of)
def test_python_blocks_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    time_briefly(monkeypatch)
    names: dict = {}
    for block in blocks(text_of(page), "python"):
        exec(block, names)
    assert names.keys() > {"__builtins__"}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(text_of(page), "py")], ids=id_of)
def test_blocks_that_are_not_run_are_valid_python(page):
    for block in blocks(text_of(page), "py"):
        assert ast.parse(block).body


def test_the_criterion_of_the_recipe_scores_every_channel():
    names: dict = {}
    exec(blocks(section(CONTRIBUTING, "Add a criterion"), "python")[0], names)
    subject = context()
    sizes = {group.name: (group.size,) for group in subject.trace.groups if not group.frozen}
    scores = names["filter_norm"](subject)
    assert {name: tuple(values.shape) for name, values in scores.items()} == sizes
    assert scores["block1.conv1"].unique().numel() == 5


def run_recipe(heading: str) -> dict:
    """Run a recipe's blocks in order; returns their names."""
    code = blocks(section(CONTRIBUTING, heading), "python")
    assert code
    names: dict = {}
    for block in code:
        exec(block, names)
    return names


def test_the_recipe_for_a_criterion_runs(registrations):
    assert run_recipe("Add a criterion")["plan"].criterion == "filter-norm"


def test_the_recipe_for_a_merge_rule_runs(registrations):
    names = run_recipe("Add a merge rule")
    assert names["plan"].merge == "mean-value"
    assert count_parameters(names["small"]) < count_parameters(names["base"].net)


def test_the_recipe_for_an_operation_runs(registrations):
    names = run_recipe("Add an operation handler")
    assert names["reason"](names["net"]) is None
    assert names["small"].first.out_channels < names["net"].first.out_channels


@pytest.mark.parametrize(("module", "door"), [(criteria, "register_criterion"), (rules, "register_merge_rule")])
def test_the_examples_of_the_doors_run(module, door, registrations):
    example = doctest.DocTestFinder(recurse=False).find(getattr(module, door), globs=dict(vars(module)))[0]
    assert len(example.examples) == 2 and doctest.DocTestRunner().run(example).failed == 0


# Commands


def commands(text: str) -> list[list[str]]:
    """The calls of `camphive` and of scripts/prune.py in shell blocks, as words."""
    found = []
    for block in blocks(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "scripts/prune.py" in words:
                found.append(["prune", *words[words.index("scripts/prune.py") + 1 :]])
            elif words[:1] == ["camphive"]:
                found.append(words[1:])
    return found


@pytest.fixture(scope="module")
def options():
    """Options of each command, as its --help names them."""
    return {name: help_of(name) for name in ("prune", "inspect", "evaluate", "expand", "compare")}


def help_of(command: str) -> set[str]:
    import io
    from contextlib import redirect_stdout

    printed = io.StringIO()
    with redirect_stdout(printed), pytest.raises(SystemExit):
        main([command, "--help"])
    return set(re.findall(r"--[a-z][a-z-]*", printed.getvalue()))


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_commands_exist_with_all_their_options(page, options):
    for command, *words in commands(text_of(page)):
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert command == "--help" or given <= options[command], (command, given - options[command])


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_options_in_the_text_exist(page, options):
    prose = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    spans = [span for span in re.findall(r"`([^`\n]+)`", prose) if re.match(r"--[a-z]|camphive ", span)]
    given = {word for span in spans for word in re.findall(r"(?<![\w-])--[a-z][a-z-]*", span)}
    elsewhere = {"--threads", "--rounds", "--render", "--help"}  # of benchmarks
    assert given <= set().union(elsewhere, *options.values()), given - set().union(elsewhere, *options.values())


# Files and names


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_files_in_the_text_exist(page):
    spans = re.findall(r"`((?:hf_camphive|tests|docs|benchmarks|examples|scripts)/[^`\s]*)", text_of(page))
    assert not [span for span in spans if not (ROOT / span.partition("::")[0]).exists()]


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text_of(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            slugs = {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings(text_of(target))}
            assert anchor in slugs, link


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)


@pytest.mark.parametrize("page", sorted(DOCS.glob("api/*.md")), ids=id_of)
def test_names_of_the_api_exist(page):
    for name in re.findall(r"^::: (\S+)$", text_of(page), flags=re.MULTILINE):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name


def test_every_public_name_is_in_the_api():
    page = text_of(DOCS / "api/index.md")
    described = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", page, flags=re.MULTILINE)}
    from_errors = {"CampHiVeError"}  # its module is described whole
    assert set(hf_camphive.__all__) - {"__version__"} <= described | from_errors


def test_every_criterion_rule_and_preset_is_described():
    method = text_of(DOCS / "method.md")
    assert {row[0] for row in rows(section(method, "2. Score: what each channel is worth"))} >= {
        f"`{name}`" for name in CRITERIA
    }
    described = {
        row[0].partition(" ")[0] for row in rows(section(method, "4. Merge: what the remaining channels take over"))
    }
    assert described >= {f"`{name}`" for name in MERGE_RULES}
    assert {row[0] for row in rows(section(method, "Presets"))} >= {f"`{name}`" for name in PRESETS}


def test_the_picture_of_the_rooms_shows_the_rooms():
    titles = re.findall(r'class="title"[^>]*>(\w+)<', (DOCS / "assets/rooms.svg").read_text(encoding="utf-8"))
    rooms = {path.name for path in (ROOT / "hf_camphive").iterdir() if (path / "__init__.py").exists()}
    assert set(titles) == rooms
    described = {row[0].strip("`") for row in rows(text_of(DOCS / "architecture.md"))}
    assert rooms <= described


def test_the_table_of_tasks_names_at_most_three_files():
    table = rows(section(CONTRIBUTING, "Where things live"))[2:]
    assert len(table) > 8 and all(1 <= len(re.findall(r"`[^`]+/[^`]+`", files)) <= 3 for _, files in table)


# The site


def pages_of(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [page for entry in entries for page in pages_of(entry)]


def test_every_page_is_in_the_navigation():
    named = pages_of(MKDOCS["nav"])
    assert sorted(named) == sorted(set(named)) and all((DOCS / page).exists() for page in named)
    assert {str(page.relative_to(DOCS)) for page in PAGES if page.is_relative_to(DOCS)} <= set(named)


def test_the_site_needs_no_network():
    assert MKDOCS["theme"]["font"] is False
    plugins = {name for plugin in MKDOCS["plugins"] for name in ([plugin] if isinstance(plugin, str) else plugin)}
    assert plugins == {"search", "mkdocstrings"}  # `offline`, `privacy` and `social` load something from elsewhere
    assert not [value for key in ("extra_css", "extra_javascript") for value in MKDOCS.get(key, ()) if "//" in value]


# What runs where


def test_the_workflow_tests_the_oldest_python_and_the_lowest_versions():
    import tomllib

    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))["jobs"]
    assert jobs["tests"]["strategy"]["matrix"]["python"][0] == oldest
    lowest = [step.get("run", "") for step in jobs["lowest-versions"]["steps"]]
    assert f"uv venv --python {oldest}" in lowest and any("--resolution lowest-direct" in run for run in lowest)


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)[1].split())
    assert set(re.findall(r'echo "make ([a-z-]+) ', makefile)) == targets - {"help", "clean"}


# Figures


RESULTS = text_of(DOCS / "results.md")


@pytest.mark.parametrize("heading", ["ResNet-56 on CIFAR-10", "MobileNetV2", "ResNet-18 on ten classes"])
def test_accuracies_are_rows_of_the_comparison(heading):
    network = {"ResNet-56 on CIFAR-10": "cifar_resnet56 ", "MobileNetV2": "mobilenetv2_100 "}.get(heading, "resnet18 ")
    parts = [part for part in text_of(DOCS / "comparison.md").split("\n## ")[1:] if part.startswith(network)]
    kept = rows("\n".join(parts))
    table = [row for row in rows(section(RESULTS, heading)) if row[0].startswith("`")]
    assert table and not [row for row in table if row not in kept]


def test_milliseconds_are_those_of_the_kept_benchmark():
    timed = json.loads((DOCS / "results/latency.json").read_text(encoding="utf-8"))
    table = [row for row in rows(section(RESULTS, "Milliseconds")) if row[0].startswith("`")]
    assert len(table) == 8
    for name, *cells in table:
        row = timed[name.strip("`")]
        medians = [
            row["ms"][engine][batch]["median"] for engine in ("torch folded", "onnxruntime") for batch in ("1", "32")
        ]
        assert cells == [f"{100 * row['test_top1']:.2f}", *(f"{ms:.1f} ms" for ms in medians)], name


def test_costs_are_those_of_the_kept_benchmark():
    measured = json.loads((DOCS / "results/cost.json").read_text(encoding="utf-8"))
    table = {row[0].strip("`"): row[1:] for row in rows(section(RESULTS, "What it costs")) if row[0].startswith("`")}
    assert table == {
        name: [
            f"{row['calibration_images']:,}",
            *(f"{row['seconds'][step]:.1f} s" for step in ("score", "plan", "merge", "polish")),
            f"{row['peak_bytes']['to the cut'] / 1e9:.2f} GB",
        ]
        for name, row in measured.items()
    }


def test_costs_of_curvature_are_those_of_the_kept_benchmark():
    figures = json.loads((DOCS / "results/curvature.json").read_text(encoding="utf-8"))
    medians = {
        f"{figure['median']:.3g}"
        for part in figures.values()
        for figure in part["figures"]
        if figure.get("median") is not None
    }
    table = [row for row in rows(section(text_of(DOCS / "curvature.md"), "What it costs")) if re.match(r"\d", row[1])]
    assert len(table) == 13
    assert not [cell for row in table for cell in row[1:] if cell.rstrip("x") not in medians]
