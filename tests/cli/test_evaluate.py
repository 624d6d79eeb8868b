"""What `camphive evaluate` prints is true."""

import re

import datasets
import numpy as np
from PIL import Image

from hf_camphive.cli import main as cli
from hf_camphive.core.measures import format_count, format_share
from hf_camphive.hub.report import REPORT_FILE, PruneReport


def test_evaluate_tells_the_truth(capsys, saved):
    for model in ("digits_resnet", str(saved)):
        arguments = ["evaluate", "--model", model, "--dataset", "digits", "--dataloader-num-workers", "0"]
        assert cli.main([*arguments, "--max-eval-samples", "100"]) == 0
        told = capsys.readouterr().out
        found = PruneReport.from_json((saved / REPORT_FILE).read_text())
        stage = found.stages[0 if model == "digits_resnet" else -1]
        assert re.search(rf"^top-1 +{re.escape(format_share(stage.accuracy.top1))}$", told, re.M)
        assert re.search(rf"^MACs per image +{format_count(stage.footprint.macs)}$", told, re.M)
        assert "Accuracy on 100 images of '100 of 300 rows of test'" in told and "latency, batch 32" in told


def test_evaluate_on_another_number_of_classes_is_refused(capsys, tmp_path):
    pictures = [Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)) for i in range(20)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1] * 10}, features=features)
    datasets.DatasetDict({"test": rows}).save_to_disk("two")
    assert cli.main(["evaluate", "--dataset", "two"]) == 2
    assert "the network has 10 classes, the dataset 2" in capsys.readouterr().err
