"""Windows are the whole image where one covers it, and their scores a mean where they overlap."""

from __future__ import annotations

import pytest
import torch
from helpers.segmenters import pictures, segmenter
from torch import Tensor

import vimoe
from vimoe.tasks.windows import sliding, whole


def by_hand(model: object, x: Tensor, window: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """As mmsegmentation's slide_inference: a grid of windows, the last moved back to the edge."""
    height, width = x.shape[-2:]
    rows = max(height - window[0] + stride[0] - 1, 0) // stride[0] + 1
    columns = max(width - window[1] + stride[1] - 1, 0) // stride[1] + 1
    total, times = 0.0, torch.zeros(height, width)
    for row in range(rows):
        for column in range(columns):
            bottom, right = min(row * stride[0] + window[0], height), min(column * stride[1] + window[1], width)
            top, left = max(bottom - window[0], 0), max(right - window[1], 0)
            placed = torch.zeros(1, 3, height, width)
            placed[..., top:bottom, left:right] = model(x[..., top:bottom, left:right])
            total = total + placed
            times[top:bottom, left:right] += 1
    assert times.min() >= 1
    return total / times


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (32, 20), (17, 9)], ids=str)
def test_one_window_is_the_whole_image(size: tuple[int, int], flip: bool) -> None:
    model = segmenter()
    x = pictures(model, 2, size)
    assert torch.equal(sliding(model, x, (32, 32), flip=flip), whole(model, x, flip=flip))


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("stride", [(32, 32), (16, 10), (1, 31)], ids=str)
@pytest.mark.parametrize("size", [(33, 32), (50, 70), (64, 20)], ids=str)
@torch.no_grad()
def test_windows_are_averaged_where_they_overlap(size: tuple, stride: tuple, batch: int) -> None:
    model = segmenter(depth=1)
    x = pictures(model, 2, size)
    got = sliding(model, x, (32, 32), stride, batch=batch)
    for i in range(2):
        torch.testing.assert_close(got[i : i + 1], by_hand(model, x[i : i + 1], (32, 32), stride), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_default_stride_is_two_thirds_and_every_score_is_kept() -> None:
    """Of a model that scores each pixel by its own value, windows change nothing."""
    x = torch.randn(1, 3, 40, 50)
    seen = []

    def model(images: Tensor) -> Tensor:
        seen.append(images.shape)
        return images * 2

    torch.testing.assert_close(sliding(model, x, (30, 30), batch=1), x * 2)
    assert len(seen) == 4 and set(seen) == {(1, 3, 30, 30)}
    torch.testing.assert_close(sliding(model, x, (30, 30)), sliding(model, x, (30, 30), (20, 20)))


@torch.no_grad()
def test_flip_is_the_mean_of_both_directions() -> None:
    model = segmenter()
    x = pictures(model)
    torch.testing.assert_close(whole(model, x, flip=True), (model(x) + model(x.flip(-1)).flip(-1)) / 2)
    mirrored = whole(model, x.flip(-1), flip=True).flip(-1)
    torch.testing.assert_close(mirrored, whole(model, x, flip=True))
    assert (whole(model, x.flip(-1)).flip(-1) - whole(model, x)).abs().max() > 0.01


@torch.no_grad()
def test_a_vit_of_fixed_size_infers_any_image_by_windows() -> None:
    model = segmenter(dynamic_img_size=False)
    assert sliding(model, pictures(model, 1, (40, 70)), model.crop).shape == (1, 3, 40, 70)


def test_scores_are_float32_and_without_gradient() -> None:
    model = segmenter().bfloat16()
    got = sliding(model, pictures(model, 1, (40, 40)).bfloat16(), (32, 32))
    assert got.dtype == torch.float32 and not got.requires_grad


@pytest.mark.parametrize("arguments", [((0, 8),), ((8, 8), (9, 8)), ((8, 8), (0, 8))], ids=str)
def test_gaps_are_refused(arguments: tuple) -> None:
    with pytest.raises(vimoe.VimoeError, match="expected strides of 1 to the window's side"):
        sliding(lambda x: x, torch.zeros(1, 3, 20, 20), *arguments)
