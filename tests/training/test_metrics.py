"""Top-1 and top-5 against counts made by hand, and offline."""

import numpy as np
import pytest
import torch

from hf_camphive.training.metrics import TopK


def test_counts_made_by_hand():
    # The label is at rank 1, 2, 5, 6, 1 of the six classes.
    logits = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]).repeat(5, 1)
    labels = torch.tensor([0, 1, 4, 5, 0])
    metric = TopK()
    metric.add_batch(predictions=logits[:3], references=labels[:3])
    metric.add_batch(predictions=logits[3:], references=labels[3:])
    assert metric.compute() == {"top1": 2 / 5, "top5": 4 / 5}


def test_indices_and_logits_agree_and_a_metric_can_be_used_again():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 12, generator=generator)
    labels = torch.randint(12, (200,), generator=generator)
    order = logits.argsort(dim=1, descending=True)
    expected = {
        "top1": (order[:, 0] == labels).double().mean().item(),
        "top5": (order[:, :5] == labels[:, None]).any(1).double().mean().item(),
    }
    metric = TopK()
    for predictions in (logits, order, order[:, :5].numpy(), logits.numpy()):
        metric.add_batch(predictions=predictions, references=labels)
        assert metric.compute() == pytest.approx(expected, abs=1e-12)


def test_few_classes_have_a_perfect_top5():
    result = TopK().compute(predictions=np.array([[0.1, 0.9, 0.0]]), references=np.array([2]))
    assert result == {"top1": 0.0, "top5": 1.0}


def test_logits_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        TopK().add_batch(predictions=torch.tensor([[float("nan"), 1.0]]), references=torch.tensor([0]))


def test_leaves_no_file_behind(tmp_path):
    metric = TopK(cache_dir=str(tmp_path))
    metric.compute(predictions=torch.eye(3), references=torch.arange(3))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
