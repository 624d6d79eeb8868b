"""The calibration set: images and labels in memory, divided among processes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_camphive.core.errors import DataError

_PIXELS_PER_BATCH = 2**20  # keeps a backward pass of a common network within a few GB
_MOST_PER_BATCH = 128


@dataclass(frozen=True)
class Calibration:
    """One process's share of the calibration images, in batches.

    Each batch has images [N, C, H, W], labels [N] and indices [N], which number the `total` images of all processes.
    """

    images: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    indices: tuple[Tensor, ...]
    total: int

    @classmethod
    def collect(
        cls,
        batches: Iterable[Mapping[str, Tensor]],
        device: torch.device | str = "cpu",
        process: int = 0,
        processes: int = 1,
    ) -> "Calibration":
        """Read a loader once and keep this process's share: batch i belongs to process i mod `processes`.

        Raises:
            DataError: The loader has fewer images than there are processes, or its batches are not dictionaries with
                "pixel_values" and "labels".
        """
        try:
            pairs = [(batch["pixel_values"], batch["labels"]) for batch in batches]
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(
                "a calibration batch must be a dictionary with 'pixel_values' [N, C, H, W] and 'labels' [N]; "
                f"got one without {error}"
            ) from error
        if not pairs:
            raise DataError("the calibration loader is empty; give it some training images")
        images, labels = (torch.cat(parts) for parts in zip(*pairs))
        if len(images) < processes:
            raise DataError(
                f"{len(images)} calibration images leave some of {processes} processes without any; use more images or "
                "fewer processes"
            )
        fitting = _PIXELS_PER_BATCH // (images.shape[-1] * images.shape[-2])
        size = max(1, min(_MOST_PER_BATCH, fitting, len(images) // processes))

        def share(values: Tensor) -> tuple[Tensor, ...]:
            return tuple(part.to(device) for part in values.split(size)[process::processes])

        images = images.contiguous(memory_format=torch.channels_last)
        return cls(share(images), share(labels), share(torch.arange(len(images))), len(images))

    @property
    def batches(self) -> list[dict[str, Tensor]]:
        """This process's share as batches of a loader."""
        return [{"pixel_values": x, "labels": y} for x, y in zip(self.images, self.labels)]

    def split(self, every: int) -> tuple["Calibration", "Calibration"]:
        """Hold out every `every`-th image: return the others and those held out, each numbered from 0.

        The division does not depend on how images are spread over processes.
        """
        left_out = [indices % every == every - 1 for indices in self.indices]
        count = self.total // every
        fitted = self._chosen(
            [~mask for mask in left_out], lambda numbers: numbers - numbers // every, self.total - count
        )
        return fitted, self._chosen(left_out, lambda numbers: numbers // every, count)

    def _chosen(self, masks: Sequence[Tensor], renumber: Callable[[Tensor], Tensor], total: int) -> "Calibration":
        batches = [
            (images[mask].contiguous(memory_format=torch.channels_last), labels[mask], renumber(indices[mask]))
            for images, labels, indices, mask in zip(self.images, self.labels, self.indices, masks)
            if mask.any()
        ]
        images, labels, indices = zip(*batches) if batches else ((), (), ())
        return Calibration(images, labels, indices, total)
