"""The calibration set: every process has a share of it, and all shares together are the whole."""

import pytest
import torch
from support.toys import images

from hf_camphive.core.errors import DataError
from hf_camphive.training.data.calibration import Calibration


def loader(count: int, size: int = 8) -> list[dict[str, torch.Tensor]]:
    """One batch of so many images, each labelled with its number."""
    return [{"pixel_values": images(count, size=size), "labels": torch.arange(count)}]


@pytest.mark.parametrize(("count", "processes"), [(20, 1), (20, 8), (300, 2), (9, 9)])
def test_no_process_goes_without_images(count, processes):
    shares = [Calibration.collect(loader(count), process=i, processes=processes) for i in range(processes)]
    assert all(share.images and share.total == count for share in shares)
    for share in shares:
        assert torch.equal(torch.cat(share.images), images(count, size=8)[torch.cat(share.indices)])
        assert torch.equal(torch.cat(share.labels), torch.cat(share.indices))
    assert torch.cat([torch.cat(share.labels) for share in shares]).sort().values.tolist() == list(range(count))


def test_batches_do_not_depend_on_the_processes_where_all_have_some():
    one, two = Calibration.collect(loader(300)), Calibration.collect(loader(300), process=1, processes=2)
    assert [len(labels) for labels in one.labels] == [128, 128, 44]
    assert [len(labels) for labels in two.labels] == [128]


def test_fewer_images_than_processes_are_refused():
    with pytest.raises(DataError, match="3 calibration images leave some of 4 processes without any"):
        Calibration.collect(loader(3), processes=4)


def test_a_calibration_is_split_the_same_way_on_all_processes():
    whole = Calibration(
        (images(7), images(4)), (torch.arange(7), torch.arange(7, 11)), (torch.arange(7), torch.arange(7, 11)), 11
    )
    fitted, left_out = whole.split(4)
    assert torch.cat(fitted.labels).tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10] and fitted.total == 9
    assert torch.cat(left_out.labels).tolist() == [3, 7] and left_out.total == 2
    assert torch.cat(fitted.indices).tolist() == list(range(9)) and torch.cat(left_out.indices).tolist() == [0, 1]
    assert torch.equal(torch.cat(left_out.images), torch.cat(whole.images)[[3, 7]])
    second = Calibration(whole.images[1:], whole.labels[1:], whole.indices[1:], 11)
    own, judged = second.split(4)
    assert torch.cat(own.indices).tolist() == [6, 7, 8] and torch.cat(judged.indices).tolist() == [1]
    assert (own.total, judged.total) == (9, 2)
    assert Calibration((), (), (), 11).split(4)[0] == Calibration((), (), (), 9)
