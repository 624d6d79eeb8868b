"""`TopK`: top-1 and top-5 accuracy as an `evaluate.Metric` that needs no download.

It works on plain arrays of one process; the caller gathers batches over processes.
"""

from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from numpy.typing import ArrayLike

_DESCRIPTION = "Share of images whose label is the first, or one of the first five, of the predicted classes."


class TopK(evaluate.Metric):
    """Compute top-1 and top-5 accuracy, as shares in [0, 1].

    `predictions` are logits [B, classes] (floating point) or class numbers [B, k] with the best class first (integers);
    `references` are labels [B]. With fewer than five classes, top-5 takes all of them into account.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.List(datasets.Value("int64")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=TopK.__doc__ or "",
            features=datasets.Features(features),
        )

    def add_batch(self, *, predictions: ArrayLike | torch.Tensor, references: ArrayLike | torch.Tensor) -> None:
        """Add one batch.

        Raises:
            ValueError: Some logits are not finite.
        """
        super().add_batch(predictions=best_classes(predictions), references=torch.as_tensor(references).tolist())

    def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, float]:
        hits = np.asarray(predictions) == np.asarray(references)[:, None]
        return {"top1": float(hits[:, 0].mean()), "top5": float(hits[:, :5].any(axis=1).mean())}


def best_classes(predictions: ArrayLike | torch.Tensor, k: int = 5) -> list[list[int]]:
    """Return the k classes with the largest logits of each row, best first; integers [B, k] are returned unchanged.

    Raises:
        ValueError: Some logits are not finite.
    """
    scores = torch.as_tensor(predictions)
    if not scores.is_floating_point():
        return scores.tolist()
    if not torch.isfinite(scores).all():
        raise ValueError("the logits hold values that are not finite numbers, so no accuracy can be measured")
    return scores.topk(min(k, scores.shape[1]), dim=1).indices.tolist()
