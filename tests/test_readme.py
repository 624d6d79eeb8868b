"""The README's examples run as they stand, and its figures are those of the kept results."""

import importlib
import json
import re
from functools import cache
from itertools import zip_longest
from operator import attrgetter
from pathlib import Path

import pytest
from PIL import Image
from support.brief import time_briefly

from hf_camphive.runs.results import Results, Summary

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


REFRESH = "run python benchmarks/readme.py, which makes pictures and tables of the README anew from docs/results"


@pytest.fixture
def readme(monkeypatch):
    """The script that writes the README's picture and tables."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("readme")


@pytest.mark.slow
def test_the_python_blocks_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    time_briefly(monkeypatch)
    assert len(BLOCKS) == 3 and len(BLOCKS[0].strip().splitlines()) == 5
    names: dict = {}
    for block in BLOCKS:
        exec(block, names)
    shown = capsys.readouterr().out
    assert re.search(r"MACs per image +10\.20 M .* 2\.\d\dx fewer", shown) and "finetuned" in shown
    last = names["pruner"].report.stages[-1].footprint
    assert sum(p.numel() for p in names["model"].parameters()) == last.parameters < 272_474
    assert names["fast"] is not names["model"].timm_model


def test_the_targets_of_make_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    said = set(
        re.findall(r"\bmake ([a-z-]+)", " ".join(re.findall(r"^make \S+|`make \S+`", README, flags=re.MULTILINE)))
    )
    assert said >= {"demo", "test"} and said <= set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))


def test_the_word_of_other_tools_for_a_score_is_said_once():
    assert len(re.findall("importance", README, flags=re.IGNORECASE)) == 1


# Picture and tables that benchmarks/readme.py writes


def test_the_tables_of_the_demo_and_of_supported_networks_are_those_of_the_kept_results(readme):
    assert readme.refreshed(README) == README, REFRESH


def test_tables_made_anew_replace_those_of_other_results(readme):
    for name, block in readme.blocks().items():
        changed = README.replace(block, "old")
        assert changed != README and readme.refreshed(changed) == README
        with pytest.raises(ValueError, match=f"begin {name}"):
            readme.refreshed(README.replace(f"<!-- end {name} -->", ""))


def test_supported_networks_add_up_to_those_of_the_zoo(readme):
    rows = readme.kept("zoo")
    passed = {tool: sum(readme.zoo.passed(row[tool]) for row in rows.values()) for tool in readme.zoo.TOOLS}
    (table,) = [table for _, table in tables(README) if table and table[0][0] == "kind"]
    assert [sum(int(row[column]) for row in table[1:]) for column in (2, 3, 4)] == [len(rows), *passed.values()]
    said = f"Of {len(rows)} networks of timm, {passed['camphive']} lose at least half of their MACs"
    assert said in README and f"{passed['torch_pruning']} do with torch-pruning" in README
    frozen = [name for name, row in rows.items() if row["camphive"].get("frozen")]
    assert sorted(re.findall(r"(\w+) \(\d+%\)", " ".join(row[5] for row in table[1:]))) == sorted(frozen)
    with pytest.raises(ValueError, match="unheard_of is of 0 kinds"):
        readme.kind_of("unheard_of")
    assert readme.zoo.PAGE.read_text(encoding="utf-8") == readme.zoo.page(rows)


def test_the_pictures_show_the_kept_milliseconds(readme):
    shown = re.findall(r'(?:src|srcset)="([^"]+)"', README)
    assert shown == [f"docs/results/{file}" for file in ("front_dark.png", "front.png")]
    assert {Path(file).name for file in shown} == set(readme.THEMES)
    for file in shown:
        with Image.open(ROOT / file) as picture:
            assert picture.info["Description"] == readme.fingerprint(readme.kept("latency")), REFRESH


def test_a_picture_says_by_its_fingerprint_what_it_shows(readme):
    rows = readme.kept("latency")
    changed = json.loads(json.dumps(rows))
    changed["latency 0.5"]["test_top1"] += 0.0001
    assert readme.fingerprint(changed) != readme.fingerprint(rows)


# What the results claim: change these tables together with the README.

NETWORKS = {  # as a table's heading names it: (folder of the kept results, calibration images)
    "ResNet-56": ("cifar_resnet56", 1024),
    "MobileNetV2": ("mobilenetv2_100", 512),
    "ResNet-18": ("resnet18_10_classes", 512),
}
POLISHED = "_100_steps"  # what the folder's name ends in where 100 polishing steps follow
ROWS = {  # labels of a row: (method, merge rule, the folder's suffix)
    ("default", "reconstruct, polish"): ("merge-aware", "reconstruct", POLISHED),
    ("default", "reconstruct"): ("merge-aware", "reconstruct", ""),
    ("torch-pruning, magnitude", "our reconstruct"): ("tp-magnitude", "reconstruct", ""),
    ("torch-pruning, group norm", "our reconstruct"): ("tp-group-norm", "reconstruct", ""),
    ("torch-pruning, Taylor (reads labels)", "our reconstruct"): ("tp-taylor", "reconstruct", ""),
    ("default", "none"): ("merge-aware", "none", ""),
    ("torch-pruning, magnitude", "none"): ("tp-magnitude", "none", ""),
    ("torch-pruning, group norm", "none"): ("tp-group-norm", "none", ""),
    ("torch-pruning, Taylor (reads labels)", "none"): ("tp-taylor", "none", ""),
}
PLANS = {  # label of a row with milliseconds: row of docs/results/latency.json
    "dense": "dense",
    "2.1x fewer MACs": "macs 2.1x",
    "4.2x fewer MACs": "macs 4.2x",
    "4.2x fewer MACs, widths in eights": "macs 4.2x in eights",
    "--target-latency 0.6": "latency 0.6",
    "--target-latency 0.5": "latency 0.5",
    "--target-latency 0.35": "latency 0.35",
    "--target-latency 0.6, polished": "latency 0.6 polished",
    "--target-latency 0.5, polished": "latency 0.5 polished",
    "--target-latency 0.35, polished": "latency 0.35 polished",
    "torch-pruning, 1.5x fewer MACs": "torch-pruning 1.5x recalibrated",
    "torch-pruning, 4.2x fewer MACs": "torch-pruning 4.2x recalibrated",
}
ENGINES = {
    "torch": "torch folded",
    "ONNX Runtime": "onnxruntime",
}  # a column without one has that of the column before
PROSE = [  # every accuracy between the tables, in the order of the text: (network, suffix, method, merge rule, ratio, stage)
    ("ResNet-56", "", "merge-aware", "reconstruct", 2.1, "dense"),
    ("ResNet-56", "", "random", "none", 2.1, "final"),
    ("ResNet-56", "", "random", "reconstruct", 2.1, "final"),
    ("cifar_resnet56_finetuned.json", "pruned"),
    ("cifar_resnet56_finetuned.json", "finetuned"),
    ("MobileNetV2", POLISHED, "merge-aware", "reconstruct", 1.2, "dense"),
    ("MobileNetV2", "", "merge-aware", "reconstruct", 1.2, "dense"),
    ("ResNet-18", "", "merge-aware", "reconstruct", 1.2, "dense"),
]

ACCURACY = re.compile(r"(?<![\d.])[1-9]\d{0,2}\.\d\d(?!\d|x|\.\d)")  # 93.10, not 2.65x or --target-latency 0.45
SPREAD = re.compile(r"(?<=± )\d+\.\d\d")
MILLISECONDS = re.compile(r"(?<![\d.])\d+\.\d(?= ms\b)")
Table = list[list[str]]


def results_of(text: str) -> str:
    return text.split("\n## Results\n")[1].split("\n## ")[0]


def tables(section: str) -> list[tuple[str, Table]]:
    """Each table with the text before it, cells without Markdown's marks but for the bold ones; at last the text after all."""
    found, text, table = [], "", []
    for line in [*section.splitlines(), ""]:
        if line.startswith("|"):
            table.append([cell.strip().replace("`", "") for cell in line.strip().strip("|").split("|")])
        else:
            if table:
                found.append((text, [table[0], *table[2:]]))
                text, table = "", []
            text += line + "\n"
    return [*found, (text, [])]


@cache
def kept(folder: str, calibration_size: int) -> dict[tuple[str, str, float], Summary]:
    path = ROOT / "docs" / "results" / "compare" / folder / "results.json"
    summaries = Results.from_json(path.read_text(encoding="utf-8"), str(path)).summaries()
    mine = [s for s in summaries if (s.cell.cycles, s.cell.calibration_size) == (1, calibration_size)]
    return {(s.cell.method, s.cell.merge, s.cell.ratio): s for s in mine}


@cache
def kept_json(name: str) -> dict:
    return json.loads((ROOT / "docs" / "results" / name).read_text(encoding="utf-8"))


@cache
def figure_of(network: str, suffix: str, method: str, merge: str, ratio: float, stage: str = "final") -> str:
    """Mean top-1 in % of a kept cell, with its deviation over several seeds; "" where it is not kept."""
    folder, calibration_size = NETWORKS[network]
    summary = kept(folder + suffix, calibration_size).get((method, merge, ratio))
    return summary.of(attrgetter(stage)).percent() if summary else ""


@cache
def claimed(claim: tuple) -> str:
    """The figure that a claim of `PROSE` stands for."""
    if len(claim) == 2:
        (stage,) = [stage for stage in kept_json(claim[0])["stages"] if stage["name"] == claim[1]]
        return f"{100 * stage['accuracy']['top1']:.2f}"
    return figure_of(*claim).split()[0]


def accuracy_faults(introduction: str, table: Table) -> list[str]:
    """Where a table of accuracies by ratio does not say what the kept rows that it names do."""
    network = max(NETWORKS, key=introduction.rfind)
    if network not in introduction:
        return ["the text before a table of accuracies names no network of NETWORKS"]
    ratios = {i: float(found[1]) for i, cell in enumerate(table[0]) if (found := re.match(r"([\d.]+)x", cell))}
    faults, cells = [], {}
    for row in table[1:]:
        labels = tuple(cell.strip("*") for i, cell in enumerate(row) if i not in ratios)
        if labels not in ROWS:
            faults.append(f"{labels} is no row of ROWS")
            continue
        method, merge, suffix = ROWS[labels]
        for i, ratio in ratios.items():
            expected = figure_of(network, suffix, method, merge, ratio)
            cells[labels, ratio] = row[i], float(expected.split()[0]) if expected else 0.0
            if row[i].replace("*", "") != expected:
                faults.append(f"{labels} at {ratio:g}x is {row[i]}, kept is {expected}")
    for ratio in ratios.values():
        best = max((value for (_, at), (_, value) in cells.items() if at == ratio), default=0.0)
        for (labels, at), (cell, value) in cells.items():
            if at == ratio and (cell.startswith("**") != (value == best)):
                faults.append(f"{labels} at {ratio:g}x: bold is the best of a column, and no other")
    return faults


def latency_faults(table: Table) -> list[str]:
    """Where a table of milliseconds does not say what docs/results/latency.json does."""
    columns, engine = {}, ""
    for i, cell in enumerate(table[0]):
        if found := re.fullmatch(r"(?:(.+), )?batch (\d+)", cell):
            engine = ENGINES[found[1]] if found[1] else engine
            columns[i] = engine, found[2]
    top = table[0].index("top-1")
    faults = []
    for row in table[1:]:
        labels = [cell.strip("*") for i, cell in enumerate(row) if i not in columns and i != top]
        if len(labels) != 1 or labels[0] not in PLANS:
            faults.append(f"{labels} is no row of PLANS")
            continue
        plan = kept_json("latency.json")[PLANS[labels[0]]]
        expected = {i: f"{plan['ms'][engine][batch]['median']:.1f} ms" for i, (engine, batch) in columns.items()}
        expected[top] = f"{100 * plan['test_top1']:.2f}"
        faults += [
            f"{labels[0]}: {row[i]}, kept is {cell}" for i, cell in expected.items() if row[i].strip("*") != cell
        ]
    return faults


def faults_of(text: str) -> list[str]:
    """Every figure of the results that is not the kept one of the row, column or place where it stands."""
    parts = tables(results_of(text))
    faults, kinds = [], []
    for introduction, table in parts:
        if table and "top-1" in table[0]:
            kinds.append("milliseconds")
            faults += latency_faults(table)
        elif table:
            kinds.append("accuracy")
            faults += accuracy_faults(introduction, table)
    prose = "\n".join(introduction for introduction, _ in parts)
    faults += [f"no table of {kind}" for kind in ("accuracy", "milliseconds") if kind not in kinds]
    said, expected = ACCURACY.findall(prose), [claimed(claim) for claim in PROSE]
    faults += [f"the text says {a}, kept is {b}" for a, b in zip_longest(said, expected) if a != b]
    return faults + [f"{ms} ms stands in no table" for ms in MILLISECONDS.findall(prose)]


def test_every_figure_of_the_results_is_that_of_the_kept_row_it_claims_to_be():
    assert faults_of(README) == []


def places() -> list[tuple[int, int]]:
    """Where the figures of the results stand in the README."""
    start = README.index("\n## Results\n")
    found = [m.span() for pattern in (ACCURACY, SPREAD, MILLISECONDS) for m in pattern.finditer(results_of(README))]
    offset = README.index(results_of(README), start)
    return [(offset + a, offset + b) for a, b in found]


def test_one_wrong_figure_is_found():
    """Another last digit, and, as a slip in copying makes it, another figure of the same kind that is kept too."""
    assert len(places()) > 100
    for start, end in places():
        figure = README[start:end]
        others = {
            README[a:b] for a, b in places() if (b - a, README[b : b + 3]) == (end - start, README[end : end + 3])
        }
        for wrong in [figure[:-1] + str((int(figure[-1]) + 1) % 10), *sorted(others - {figure})[:3]]:
            assert faults_of(README[:start] + wrong + README[end:]), f"{wrong} in place of {figure} at {start}"


def test_figures_in_another_row_column_or_table_are_found():
    section = results_of(README)
    for _, table in tables(section)[:-1]:
        for number, row in enumerate(table[1:], 1):
            for other in table[number + 1 :]:  # two rows, each under the label of the other
                lines = [f"| {' | '.join(cells)} |" for cells in (row, other)]
                where = [
                    next(line for line in section.splitlines() if line.replace("`", "") == text) for text in lines
                ]
                labels = [line.split("|")[1:3] if "top-1" not in table[0] else line.split("|")[1:2] for line in where]
                swapped = [
                    line.replace("|".join(labels[i]), "|".join(labels[1 - i]), 1) for i, line in enumerate(where)
                ]
                changed = README.replace(where[0], "\0").replace(where[1], swapped[1]).replace("\0", swapped[0])
                assert faults_of(changed), labels
    assert faults_of(README.replace("| 1.5x | 2.1x |", "| 2.1x | 1.5x |"))
    assert faults_of(README.replace("### ResNet-56 on", "### MobileNetV2 on"))
    assert faults_of(README.replace("torch-pruning, Taylor", "torch-pruning, taylor"))
    assert "no table of milliseconds" in faults_of(README.replace("| plan | top-1 |", "plan, top-1"))


def test_the_rows_of_torch_pruning_are_its_two_best_in_the_last_column():
    for introduction, table in tables(results_of(README)):
        network = max(NETWORKS, key=introduction.rfind)
        if not table or "top-1" in table[0]:
            continue
        folder, calibration_size = NETWORKS[network]
        last = float(re.match(r"[\d.]+", table[0][-1])[0])
        for merge in {ROWS[tuple(row[:2])][1] for row in table[1:] if row[0].startswith("torch-pruning")}:
            tried = {
                method: summary.of(attrgetter("final")).mean
                for (method, rule, ratio), summary in kept(folder, calibration_size).items()
                if (rule, ratio) == (merge, last) and re.fullmatch(r"tp-(magnitude|group-norm|lamp|taylor)", method)
            }
            shown = {ROWS[tuple(row[:2])][0] for row in table[1:] if ROWS[tuple(row[:2])][1] == merge}
            assert {m for m in shown if m.startswith("tp-")} == set(sorted(tried, key=tried.get)[-2:]), (
                network,
                merge,
            )


def faster(row: str) -> str:
    rows = kept_json("latency.json")
    dense, pruned = (rows[name]["ms"]["torch folded"]["32"]["median"] for name in ("dense", row))
    return f"{dense / pruned:.1f}x"


def test_the_answers_give_the_figures_of_the_kept_results():
    answers = " ".join(README.split("\n## Questions\n")[1].split("\n## ")[0].split())
    rows = kept_json("latency.json")
    fewer = rows["dense"]["macs"] / rows["latency 0.6"]["macs"]
    assert f"2.1x fewer MACs are {faster('macs 2.1x')} faster at batch 32 in torch" in answers
    assert f"with {fewer:.1f}x fewer MACs, `--target-latency 0.6` is {faster('latency 0.6')} faster" in answers
    seconds = kept_json("cost.json")["resnet18_10_classes"]["seconds"]
    total = sum(seconds[step] for step in ("score", "plan", "merge"))
    assert f"Scoring, planning and merging ResNet-18 takes {total:.0f} s on 2 CPU cores" in answers


def test_the_page_of_the_comparison_is_that_of_the_kept_results(monkeypatch):
    if not (ROOT / "docs/comparison.md").exists():
        pytest.skip("no comparison is kept yet; python benchmarks/compare.py writes docs/comparison.md")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import compare

    assert (ROOT / "docs/comparison.md").read_text(encoding="utf-8") == compare.page(ROOT / "docs/results/compare")
