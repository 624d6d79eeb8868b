"""The README's examples run as they stand, and its figures are those of the kept results."""

import json
import re
from functools import cache
from itertools import zip_longest
from operator import attrgetter
from pathlib import Path

import pytest
from support.brief import time_briefly

from hf_camphive.runs.results import Results, Summary

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_example_runs_and_its_result_loads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    time_briefly(monkeypatch)
    assert len(BLOCKS) == 2 and len(BLOCKS[0].strip().splitlines()) == 10
    names: dict = {}
    exec(BLOCKS[0], names)
    exec(BLOCKS[1], names)
    shown = capsys.readouterr().out
    assert "MACs per image: 10,203,776 ->" in shown and "finetuned" in shown
    assert sum(p.numel() for p in names["model"].parameters()) == names["report"].stages[-1].footprint.parameters


def test_the_demo_table_is_that_of_the_kept_report():
    from hf_camphive.hub.report import PruneReport

    report = PruneReport.from_json((ROOT / "docs/results/demo.json").read_text(encoding="utf-8"))
    assert report.table() in README


# What the results claim: change these tables together with the README.

NETWORKS = {  # as a table's introduction names it: (folder of the kept results, calibration images, seeds of an unmarked cell)
    "ResNet-56": ("cifar_resnet56", 1024, 3),
    "MobileNetV2": ("mobilenetv2_100", 512, 1),
    "ResNet-18": ("resnet18_10_classes", 512, 1),
}
POLISHED = "_100_steps"  # what the folder's name ends in where 100 polishing steps follow
ROWS = {  # labels of a row: (method, merge rule, the folder's suffix)
    ("default", "reconstruct, polish"): ("merge-aware", "reconstruct", POLISHED),
    ("default", "reconstruct"): ("merge-aware", "reconstruct", ""),
    ("merge-joint", "reconstruct"): ("merge-joint", "reconstruct", ""),
    ("torch-pruning, magnitude", "our reconstruct"): ("tp-magnitude", "reconstruct", ""),
    ("torch-pruning, group norm", "our reconstruct"): ("tp-group-norm", "reconstruct", ""),
    ("torch-pruning, LAMP", "our reconstruct"): ("tp-lamp", "reconstruct", ""),
    ("torch-pruning, Taylor", "our reconstruct"): ("tp-taylor", "reconstruct", ""),
    ("default", "none, BatchNorm recalibrated"): ("merge-aware", "none", ""),
    ("torch-pruning, magnitude", "none, BatchNorm recalibrated"): ("tp-magnitude", "none", ""),
    ("torch-pruning, group norm", "none, BatchNorm recalibrated"): ("tp-group-norm", "none", ""),
    ("torch-pruning, LAMP", "none, BatchNorm recalibrated"): ("tp-lamp", "none", ""),
    ("torch-pruning, Taylor", "none, BatchNorm recalibrated"): ("tp-taylor", "none", ""),
}
PLANS = {  # label of a row with milliseconds: row of docs/results/latency.json
    "dense": "dense",
    "2.1x fewer MACs": "macs 2.1x",
    "4.2x fewer MACs": "macs 4.2x",
    "the same, widths in eights": "macs 4.2x in eights",
    "--target-latency 0.6, for batch 32": "latency 0.6",
    "--target-latency 0.5": "latency 0.5",
    "--target-latency 0.45": "latency 0.45",
    "--target-latency 0.35": "latency 0.35",
    "--target-latency 0.6, polished": "latency 0.6 polished",
    "--target-latency 0.5, polished": "latency 0.5 polished",
    "--target-latency 0.45, polished": "latency 0.45 polished",
    "--target-latency 0.35, polished": "latency 0.35 polished",
    "--target-latency 0.4, for batch 1": "latency batch 1 0.4",
    "torch-pruning 1.5x (magnitude, all groups), recalibrated": "torch-pruning 1.5x recalibrated",
    "the same at 4.2x": "torch-pruning 4.2x recalibrated",
}
ENGINES = {
    "torch": "torch folded",
    "ONNX Runtime": "onnxruntime",
}  # a column without one has that of the column before
PROSE = [  # every accuracy between the tables, in the order of the text: (network, suffix, method, merge rule, ratio, stage)
    ("ResNet-56", "", "merge-aware", "reconstruct", 2.1, "dense"),
    ("ResNet-56", "", "random", "reconstruct", 2.1, "final"),
    ("MobileNetV2", POLISHED, "merge-aware", "reconstruct", 1.2, "dense"),
    ("MobileNetV2", POLISHED, "merge-aware", "reconstruct", 1.2, "final"),
    ("MobileNetV2", POLISHED, "merge-aware", "reconstruct", 1.5, "final"),
    ("MobileNetV2", POLISHED, "merge-aware", "reconstruct", 1.2, "pruned"),
    ("MobileNetV2", POLISHED, "merge-aware", "reconstruct", 1.5, "pruned"),
    ("MobileNetV2", "", "tp-taylor", "reconstruct", 1.2, "final"),
    ("MobileNetV2", "", "tp-taylor", "reconstruct", 1.5, "final"),
    ("MobileNetV2", "", "merge-aware", "reconstruct", 1.2, "final"),
    ("MobileNetV2", "", "merge-aware", "reconstruct", 1.5, "final"),
    ("MobileNetV2", "", "tp-taylor", "none", 1.2, "final"),
    ("MobileNetV2", "", "tp-group-norm", "none", 1.5, "final"),
    ("MobileNetV2", "", "merge-aware", "none", 1.2, "final"),
    ("MobileNetV2", "", "merge-aware", "none", 1.5, "final"),
    ("ResNet-18", "", "merge-aware", "reconstruct", 1.2, "dense"),
    ("ResNet-18", "", "merge-aware", "reconstruct", 1.2, "final"),
    ("ResNet-18", "", "merge-aware", "reconstruct", 1.5, "final"),
    ("ResNet-18", "", "tp-group-norm", "reconstruct", 1.2, "final"),
    ("ResNet-18", "", "tp-group-norm", "reconstruct", 1.5, "final"),
    ("cifar_resnet56_finetuned.json", "pruned"),
    ("cifar_resnet56_finetuned.json", "finetuned"),
]

ACCURACY = re.compile(r"(?<![\d.])[1-9]\d{0,2}\.\d\d(?!\d|x|\.\d)")  # 93.10, not 2.65x or --target-latency 0.45
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
def mean(network: str, suffix: str, method: str, merge: str, ratio: float, stage: str = "final") -> tuple[str, int]:
    """Mean top-1 in % of a kept cell, and its number of seeds; ("", 0) where it is not kept."""
    folder, calibration_size, _ = NETWORKS[network]
    summary = kept(folder + suffix, calibration_size).get((method, merge, ratio))
    return (summary.of(attrgetter(stage)).percent().split()[0], len(summary.rows)) if summary else ("", 0)


@cache
def claimed(claim: tuple) -> str:
    """The figure that a claim of `PROSE` stands for."""
    if len(claim) == 2:
        (stage,) = [stage for stage in kept_json(claim[0])["stages"] if stage["name"] == claim[1]]
        return f"{100 * stage['accuracy']['top1']:.2f}"
    return mean(*claim)[0]


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
            figure, seeds = mean(network, suffix, method, merge, ratio)
            expected = figure + (f" ({seeds})" if seeds not in (0, NETWORKS[network][2]) else "")
            cells[labels, ratio] = row[i], float(figure or 0)
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
    found = [m.span() for pattern in (ACCURACY, MILLISECONDS) for m in pattern.finditer(results_of(README))]
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
    assert faults_of(README.replace("ResNet-56, the 10,000", "MobileNetV2, the 10,000"))
    assert faults_of(README.replace("torch-pruning, LAMP | our", "torch-pruning, lamp | our"))
    assert "no table of milliseconds" in faults_of(README.replace("| plan | top-1 |", "plan, top-1"))


def test_the_seconds_are_those_of_the_kept_benchmark():
    rows = json.loads((ROOT / "docs/results/cost.json").read_text(encoding="utf-8"))
    said = " ".join(
        README.split("Scores, trials and plan, and reconstruction take")[1].split("([each step]")[0].split()
    )
    for row in rows.values():
        score, plan, merge = (f"{row['seconds'][step]:.0f}" for step in ("score", "plan", "merge"))
        assert f"{score}, {plan} and {merge} s" in said
    assert f"at most {max(row['peak_bytes']['to the cut'] for row in rows.values()) / 1e9:.1f} GB" in said


def test_the_figures_of_the_zoo_are_those_of_the_kept_sweep(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import zoo

    rows = json.loads(zoo.RESULTS.read_text(encoding="utf-8"))
    passed = {tool: sum(zoo.passed(row[tool]) for row in rows.values()) for tool in zoo.TOOLS}
    assert f"Of {len(rows)} networks from the families of timm, {passed['camphive']} lose at least half" in README
    assert f"with torch-pruning {passed['torch_pruning']} do" in README
    assert zoo.PAGE.read_text(encoding="utf-8") == zoo.page(rows)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_the_page_of_the_comparison_is_that_of_the_kept_results(monkeypatch):
    if not (ROOT / "docs/comparison.md").exists():
        pytest.skip("no comparison is kept yet; python benchmarks/compare.py writes docs/comparison.md")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import compare

    assert (ROOT / "docs/comparison.md").read_text(encoding="utf-8") == compare.page(ROOT / "docs/results/compare")
