"""The card says what the report says: the same numbers, nothing invented, nothing left empty."""

import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.measures import Accuracy, Footprint, Latency
from hf_camphive.core.methods import CRITERIA, MERGE_RULES
from hf_camphive.hub.card import FOLDER_PLACEHOLDER, render_card
from hf_camphive.hub.plots import draw_plots
from hf_camphive.hub.report import GroupRow, PruneReport, Stage

DENSE = Footprint(
    11_689_512, 1_814_073_344, 46_837_096, {1: Latency(20.1, 20, 21, 90), 32: Latency(512.3, 500, 530, 30)}
)
SMALL = Footprint(5_200_000, 905_000_000, 20_911_000, {1: Latency(12.4, 12, 13, 90), 32: Latency(260.7, 255, 270, 30)})
REPORT = PruneReport(
    model_id="timm/resnet18.a1_in1k",
    revision="491b427b45c94c7fb0e78b5474cc919aff584bbf",
    architecture="resnet18",
    license="apache-2.0",
    dataset_id="ILSVRC/imagenet-1k",
    dataset_revision="0123abc",
    splits={"train": "train", "validation": "10% of train", "test": "validation"},
    rows={"train": 1_276_167, "validation": 5_000, "test": 50_000},
    input_size=(3, 224, 224),
    stages=(
        Stage("dense", DENSE, Accuracy(0.7149, 0.9013, 50_000, "validation")),
        Stage("pruned", SMALL, Accuracy(0.6234, 0.8401, 50_000, "validation")),
        Stage("finetuned", SMALL, Accuracy(0.6901, 0.8888, 50_000, "validation")),
    ),
    config=CampHiVeConfig().as_run(),
    command='camphive --model timm/resnet18.a1_in1k --dataset imagenet-1k --note "{{ x }}"',
    groups=(
        GroupRow("conv1", 64, 50, None),
        GroupRow("layer1.0.conv1", 64, 30, None),
        GroupRow("fc", 10, 10, "output"),
    ),
    dropped=("layer1.1",),
    notes=("the validation split was carved from train",),
    finetune={"epochs": [], "mixed_precision": "no", "steps": 10},
    environment={"device": "Some CPU", "threads": "2", "torch": "2.15.0"},
)


UNMEASURED = (Stage("dense", DENSE, None), Stage("pruned", SMALL, None))
EPOCHS = [
    {"epoch": epoch, "loss": 1.0 / epoch, "learning_rate": 0.01, "validation_top1": 0.5, "seconds": 1.0}
    for epoch in (1.0, 2.0)
]


def card(report: PruneReport = REPORT, repo_id: str | None = "me/small", plots: tuple[str, ...] = ()) -> ModelCard:
    return ModelCard(render_card(report, repo_id, plots), ignore_metadata_errors=False)


def cells(text: str, label: str) -> list[str]:
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def test_the_table_holds_the_numbers_of_the_report():
    text = card().text
    assert cells(text, "Top-1 accuracy") == ["71.49 %", "62.34 %", "69.01 %", "-2.48 points"]
    assert cells(text, "Top-5 accuracy") == ["90.13 %", "84.01 %", "88.88 %", "-1.25 points"]
    assert cells(text, "MACs per image") == ["1.814 G", "905.0 M", "905.0 M", "2.00x less"]
    assert cells(text, "Parameters") == ["11.69 M", "5.200 M", "5.200 M", "2.25x less"]
    assert cells(text, "Latency, batch 1") == ["20.1 ms", "12.4 ms", "12.4 ms", "1.62x less"]
    assert cells(text, "Latency, batch 32") == ["512 ms", "261 ms", "261 ms", "1.97x less"]
    assert cells(text, "Weights file") == ["46.8 MB", "20.9 MB", "20.9 MB", "2.24x less"]
    assert "50,000 images of split `validation`" in text and "0.21 points" in text
    assert "median of at least 30 runs on Some CPU, 2 threads" in text
    assert "48 channels removed from 2 of 3 channel groups" in text and "`layer1.1`" in text
    assert cells(text, "validation") == ["10% of train", "5,000"]


@pytest.mark.parametrize(
    ("batch", "folded", "said"),
    [
        (1, False, "a batch of 1 takes 12.4 ms instead of 20.1 ms on Some CPU, 2 threads;"),
        (32, False, "a batch of 32 takes 261 ms instead of 512 ms on Some CPU, 2 threads;"),
        (32, True, "a batch of 32, folded as for deployment, takes 100 ms instead of 400 ms on Some CPU, 2 threads;"),
        (8, False, None),  # not measured
    ],
)
def test_a_budget_in_milliseconds_is_answered_in_milliseconds(batch, folded, said):
    costs = [replace(c, folded_ms={32: Latency(ms, ms, ms, 9)}) for c, ms in ((DENSE, 400.0), (SMALL, 100.0))]
    stages = [replace(stage, footprint=costs[stage.name != "dense"]) for stage in REPORT.stages]
    config = CampHiVeConfig(target_latency=0.5, latency_batch_size=batch, latency_folded=folded).as_run()
    first = card(replace(REPORT, stages=tuple(stages), config=config)).text.split("```")[0]
    assert (said in first) if said else ("a batch of" not in first)
    assert "takes 905.0 M MACs instead of 1.814 G" in first and "a batch of" not in card().text.split("```")[0]


def test_bottlenecks_are_named():
    assert "Bottlenecks" not in card().text
    groups = (*REPORT.groups, *(GroupRow(f"wide{i}", 4, 4, None) for i in range(7)))
    (line,) = [line for line in card(replace(REPORT, groups=groups)).text.splitlines() if "Bottlenecks" in line]
    assert "`wide0` (0 %), `wide1` (0 %)" in line and "`wide4` (0 %) and 2 more" in line and "conv1" not in line


def test_slower_and_more_are_said_as_such():
    heavier = replace(SMALL, parameters=12_000_000)
    report = replace(REPORT, stages=(REPORT.stages[0], Stage("pruned", heavier, Accuracy(0.72, 0.9, 100, "test"))))
    text = card(report).text
    assert cells(text, "Parameters")[-1] == "1.03x more" and cells(text, "Top-1 accuracy")[-1] == "+0.51 points"


def test_metadata_round_trips_and_reports_the_last_stage(tmp_path):
    (tmp_path / "README.md").write_text(render_card(REPORT, "me/small"))
    data = ModelCard.load(tmp_path / "README.md").data
    assert [(r.metric_name, r.metric_value) for r in data.eval_results] == [("Top-1", 0.6901), ("Top-5", 0.8888)]
    first = data.eval_results[0]
    assert (first.dataset_type, first.dataset_split, first.dataset_revision) == (
        "ILSVRC/imagenet-1k",
        "validation",
        "0123abc",
    )
    assert data.base_model == "timm/resnet18.a1_in1k" and data.base_model_relation == "finetune"
    assert data.license == "apache-2.0" and data.datasets == ["ILSVRC/imagenet-1k"]
    assert data.library_name == "transformers" and data.pipeline_tag == "image-classification"
    assert set(data.tags) == {"timm", "pruning", "structured-pruning", "camphive"}
    assert data.model_name == "small"


def test_the_load_snippet_comes_first():
    text = card().text
    assert text.index('model = hf_camphive.from_pretrained("me/small")') < text.index("## ")
    assert f'hf_camphive.from_pretrained("{FOLDER_PLACEHOLDER}")' in card(repo_id=None).text


def test_what_was_not_measured_is_said():
    bare = replace(SMALL, latency_ms={})
    report = replace(REPORT, finetune=None, stages=(Stage("dense", DENSE, None), Stage("pruned", bare, None)))
    made = card(report)
    assert cells(made.text, "Top-1 accuracy") == ["not measured", "not measured", "—"]
    assert cells(made.text, "Latency, batch 32") == ["512 ms", "not measured", "—"]
    assert "Accuracy of the dense network." in made.text and "batch size 1 of the pruned network" in made.text
    assert "No finetuning" in made.text
    assert made.data.eval_results is None and "model-index" not in made.content


def test_an_unknown_license_is_not_invented():
    made = card(replace(REPORT, license=None))
    assert made.data.license is None and "not known here" in made.text and "apache" not in made.content


def test_only_hub_ids_become_links(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "private" / "photos").mkdir(parents=True)
    made = card(replace(REPORT, model_id="runs/mine", dataset_id=str(tmp_path / "private" / "photos"), command="x"))
    assert made.data.base_model is None and made.data.get("base_model_relation") is None
    assert made.data.datasets is None and made.data.eval_results[0].dataset_type == "photos"
    assert str(tmp_path) not in made.content and "huggingface.co/runs" not in made.content
    for bundled in ("digits_resnet", "digits"):
        assert card(replace(REPORT, model_id=bundled)).data.base_model is None


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("merge", MERGE_RULES)
def test_every_method_is_described(criterion, merge):
    config = CampHiVeConfig(criterion=criterion, merge=merge).as_run()
    text = card(replace(REPORT, config=config)).text
    assert f"(`criterion={criterion}`, `merge={merge}`)" in text
    assert f"Channels were ranked by {CRITERIA[criterion].wording.partition('{')[0]}" in text
    assert CRITERIA[criterion].source in text and MERGE_RULES[merge].wording in text
    assert "arxiv.org/abs/2511.06265" in text and "{" not in text.replace("{{ x }}", "").partition("```bibtex")[0]


@pytest.mark.parametrize(
    ("criterion", "eigensolver", "solver"),
    [
        ("hive", "lanczos", "the Lanczos method"),
        ("hive", "power", "power iteration"),
        ("hive-paper", "lanczos", "power iteration"),  # the paper's own, whatever `eigensolver` says
    ],
)
def test_a_card_names_the_solver_that_ran(criterion, eigensolver, solver):
    config = CampHiVeConfig(criterion=criterion, eigensolver=eigensolver).as_run()
    (line,) = [line for line in card(replace(REPORT, config=config)).text.splitlines() if "were ranked" in line]
    assert f"found by {solver}" in line
    assert ("Lanczos" in line) == (solver != "power iteration")


@pytest.mark.parametrize(
    ("settings", "reads_labels"),
    [
        ({"criterion": "fisher"}, False),
        ({"criterion": "fisher", "curvature": "hessian"}, False),
        ({"criterion": "taylor"}, True),
        ({"criterion": "hive"}, False),
        ({"criterion": "hive", "curvature": "hessian"}, True),
    ],
)
def test_a_card_tells_whether_labels_were_read(settings, reads_labels):
    text = card(replace(REPORT, config=CampHiVeConfig(**settings).as_run())).text
    assert ("read the labels of the calibration images" in text) == reads_labels
    assert ("read no labels" in text) == (not reads_labels)


def test_zeroed_weights_are_no_smaller_network():
    config = CampHiVeConfig.from_preset("camphive-paper-weights", sparsity=0.7).as_run()
    stages = tuple(replace(stage, footprint=DENSE) for stage in REPORT.stages)
    made = card(replace(REPORT, config=config, stages=stages, groups=(), dropped=()))
    assert "with 70% of each layer's weights set to zero. It is no smaller and no faster than its base" in made.text
    assert "(`granularity=weight`, `criterion=hive-paper`, `merge=cyclic`)" in made.text
    assert "half of each was added to a kept weight" in made.text and "`sparsity=0.7`" in made.text
    assert "target_macs" not in made.text and "hannels were ranked" not in made.text
    assert "unstructured-pruning" in made.data.tags and "structured-pruning" not in made.data.tags


def test_a_card_says_what_went_first():
    config = CampHiVeConfig(threshold="percentile").as_run()
    assert "every group lost the same share" in card(replace(REPORT, config=config)).text
    assert ", per MAC saved; " in card().text


def test_plots_are_shown_by_relative_path():
    text = card(plots=("other.png", "scores.png", "widths.png")).text
    assert re.findall(r"!\[(.+)\]\((.+)\)", text) == [
        ("Channels kept in each group, in forward order", "plots/widths.png"),
        ("Sorted channel scores of each group", "plots/scores.png"),
        ("other", "plots/other.png"),
    ]
    assert "![" not in card().text


def test_every_plot_has_a_caption(tmp_path):
    report = replace(REPORT, finetune={"epochs": EPOCHS, "mixed_precision": "no", "steps": 10})
    drawn = sorted(path.name for path in draw_plots(report, {"conv1": [0.1, 0.2]}, tmp_path).values())
    captions = re.findall(r"!\[(.+)\]\(plots/(.+)\.png\)", card(report, plots=tuple(drawn)).text)
    assert len(captions) == len(drawn) == 5 and all(caption != name for caption, name in captions)


def test_the_precision_of_finetuning_is_told():
    assert "- Finetuned in fp32 (`num_train_epochs=" in card().text
    half = replace(REPORT, finetune={"epochs": [], "mixed_precision": "bf16", "steps": 10})
    assert "- Finetuned in bf16 (`num_train_epochs=" in card(half).text


def test_an_unchanged_cost_is_said_so():
    assert cells(card(replace(REPORT, stages=REPORT.stages[:1])).text, "Parameters") == ["11.69 M", "unchanged"]


@pytest.mark.parametrize(
    "report",
    [
        REPORT,
        replace(REPORT, license=None, revision=None, dataset_revision=None, notes=(), dropped=(), groups=()),
        replace(REPORT, dataset_id="not given", splits={}, rows={}, finetune=None, stages=UNMEASURED),
        replace(REPORT, environment={}, rows={}, head_replaced=True, model_id="digits_resnet", dataset_id="digits"),
    ],
)
def test_nothing_is_empty_or_left_unrendered(report):
    text = render_card(replace(report, command=""), "me/small", ("widths.png",))
    assert "{{" not in text and "{%" not in text and "None" not in text and "not given" not in text
    sections = re.split(r"^## .*$", text, flags=re.M)[1:]
    assert len(sections) == 7 and all(section.strip() for section in sections)
    assert not re.search(r"^- *$", text, re.M) and not re.search(r"\| *\|$", text, re.M)
    assert "``" not in text.replace("```", "") and "\n\n\n" not in text


def test_braces_in_the_command_stay_as_they_are():
    assert '--note "{{ x }}"' in card().text
