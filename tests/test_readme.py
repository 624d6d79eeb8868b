"""The README's examples run as they stand, and its figures are those of the kept results."""

import json
import re
from pathlib import Path

import pytest
from support.brief import time_briefly

from hf_camphive.runs.results import Results

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


def test_the_results_are_those_of_the_kept_benchmark():
    kept = set()
    for path in (ROOT / "docs/results/compare").glob("*/results.json"):
        results = Results.from_json(path.read_text(encoding="utf-8"), str(path))
        for stage in (
            lambda row: row.dense,
            lambda row: row.pruned,
            lambda row: row.recalibrated,
            lambda row: row.final,
        ):
            kept |= {summary.of(stage).percent().split()[0] for summary in results.summaries()}
        kept |= {f"{100 * share:.2f}" for row in results.rows for share in (row.dense, row.pruned, row.final)}
    timed = json.loads((ROOT / "docs/results/latency.json").read_text(encoding="utf-8")).values()
    kept |= {f"{100 * row['test_top1']:.2f}" for row in timed}
    finetuned = json.loads((ROOT / "docs/results/cifar_resnet56_finetuned.json").read_text(encoding="utf-8"))
    kept |= {f"{100 * stage['accuracy']['top1']:.2f}" for stage in finetuned["stages"]}
    table = README.split("## Results")[1].split("## Limits")[0]
    figures = re.findall(r"\b\d\d\.\d\d\b", table)
    assert figures and not [figure for figure in figures if figure not in kept]
    medians = {f"{ms['median']:.1f}" for row in timed for engine in row["ms"].values() for ms in engine.values()}
    milliseconds = re.findall(r"\b(\d+\.\d) ms\b", table)
    assert milliseconds and not [figure for figure in milliseconds if figure not in medians]


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
