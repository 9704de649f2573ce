"""The order of images follows from seed and epoch; processes cut the same images out of each batch."""

from __future__ import annotations

import pytest
import torch

from vimoe.data.order import Shuffled


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 12])
def test_a_batch_has_the_same_images_for_any_number_of_processes(count: int) -> None:
    alone, divided = Shuffled(40, 3), Shuffled(40, 3)
    divided.divide(12, count)
    for order in (alone, divided):
        order.start(2, 12)
    ours, theirs = list(alone), list(divided)
    assert sorted(ours) == sorted(theirs) and (count > 1 or ours == theirs)
    for first in (0, 12):
        assert set(ours[first : first + 12]) == set(theirs[first : first + 12])
    assert [index for index, _ in theirs] == divided.images_at(12, 28)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_images_that_are_mixed_are_in_one_share_and_mirror_one_another(count: int) -> None:
    """timm's Mixup mixes image i of a batch with image B - 1 - i."""
    alone, divided = Shuffled(12, 0), Shuffled(12, 0)
    divided.divide(12, count)
    order = torch.tensor(alone.images_at(0, 12))
    partner = dict(zip(order.tolist(), order.flip(0).tolist(), strict=True))
    for share in torch.tensor(divided.images_at(0, 12)).view(count, -1):
        assert [partner[index] for index in share.tolist()] == share.flip(0).tolist()
