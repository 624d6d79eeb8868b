"""A widened model is the same to every reader; mistakes leave nothing."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from support.cli import expand
from transformers import AutoModelForImageClassification

import hf_camphive
from hf_camphive.hub.loading import load_base
from hf_camphive.hub.report import REPORT_FILE, PruneReport
from hf_camphive.network.footprint import count_macs


def test_a_widened_model_is_the_same_to_every_reader(capsys):
    assert expand("digits_resnet", "--factor", "1.5", "--output-dir", "wide") == 0
    told = capsys.readouterr()
    assert re.search(r"^layer3.2.conv1 +64 +96$", told.out, re.M) and "shards" not in told.err
    net, x = load_base("digits_resnet").net, torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    readers = [
        hf_camphive.from_pretrained("wide").timm_model,
        AutoModelForImageClassification.from_pretrained("wide").timm_model,
        timm.create_model("local-dir:wide", pretrained=True),
        load_base("wide").net,
    ]
    for wide in readers:
        assert wide.layer3[2].conv1.weight.shape[0] == 96
        with torch.no_grad():
            torch.testing.assert_close(wide.eval()(x), net(x), rtol=1e-4, atol=1e-4)
    record = json.loads(Path("wide", "expansion.json").read_text())
    assert (record["macs_before"], record["macs_after"]) == (
        count_macs(net, (3, 16, 16)),
        count_macs(wide, (3, 16, 16)),
    )
    assert "the same function in more channels" in Path("wide", "README.md").read_text()
    assert expand("digits_resnet", "--output-dir", "wide") == 2  # it holds a model
    assert expand("wide", "--groups", "layer1.0.conv1,layer1.1.conv1", "--output-dir", "wide", "--overwrite") == 0
    assert load_base("wide").net.layer1[1].conv1.weight.shape[:2] == (48, 24)


def test_bottlenecks_are_widened_from_a_report(saved):
    found = PruneReport.from_json((saved / REPORT_FILE).read_text())
    rows = tuple(replace(row, kept=row.size if row.name == "layer2.1.conv1" else 1) for row in found.groups)
    Path("first").mkdir()
    Path("first", REPORT_FILE).write_text(replace(found, groups=rows).to_json())
    assert expand("digits_resnet", "--from", "first", "--output-dir", "wide") == 0
    net, wide = load_base("digits_resnet").net, load_base("wide").net
    changed = {n for (n, a), b in zip(net.named_parameters(), wide.parameters()) if a.shape != b.shape}
    assert changed == {f"layer2.1.{n}" for n in ("conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight")}
    assert expand(saved, "--groups", "layer3.1.conv1", "--output-dir", "again") == 0
    assert load_base("again").plans == load_base(str(saved)).plans != ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--groups", "layer1.0.conv1", "--from", "first"], "leave one of them out"),
        (["--from", "nowhere"], "there is no nowhere/report.json; give --from the folder"),
        (["--groups", "layer1.0.conv"], "did you mean 'layer1.0.conv1'"),
        (["--factor", "0.5"], "factor is 0.5; widening needs one above 1"),
    ],
)
def test_mistakes_in_widening_leave_nothing(capsys, arguments, message):
    assert expand("digits_resnet", *arguments) == 2
    assert message in capsys.readouterr().err and not list(Path.cwd().iterdir())
