"""Inference of masks: on a whole image at once, or on windows of the training crop with averaged scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vimoe.errors import VimoeError

Scores = Callable[[Tensor], Tensor]


@torch.no_grad()
def whole(model: Scores | nn.Module, images: Tensor, flip: bool = False) -> Tensor:
    """Return scores (B, classes, H, W) in float32 of images (B, 3, H, W).

    Args:
        model: function that gives scores at the images' resolution; a module should be in eval mode.
        images: normalised, on the model's device.
        flip: take the mean with the scores of the mirrored images, mirrored back.
    """
    logits = model(images).float()
    if flip:
        logits = (logits + model(images.flip(-1)).flip(-1).float()) / 2
    return logits


@torch.no_grad()
def sliding(
    model: Scores | nn.Module,
    images: Tensor,
    window: tuple[int, int],
    stride: tuple[int, int] | None = None,
    flip: bool = False,
    batch: int = 8,
) -> Tensor:
    """Return scores (B, classes, H, W) from windows, with the mean of the logits where windows overlap.

    This is mmsegmentation's "slide" mode. The last window of a row or column ends at the image's edge, and an image
    smaller than the window is one window. With one window the result is that of `whole`. It needs memory for
    H x W x classes float32 numbers of each image.

    Args:
        model, images, flip: arguments of `whole`; each window is mirrored by itself.
        window: (height, width), the model's training crop.
        stride: (height, width) from one window to the next; by default two thirds of the window.
        batch: number of windows that are computed at once.

    Raises:
        VimoeError: if a window or stride is below 1, or the stride would leave gaps.
    """
    places = Windows.of(images.shape[-2:], window, stride)
    (height, width), per_image = places.size, max(1, batch // len(images))

    def scores() -> Iterator[Tensor]:
        for first in range(0, len(places.corners), per_image):
            some = places.corners[first : first + per_image]
            cut = torch.cat([images[..., y : y + height, x : x + width] for y, x in some])
            yield from whole(model, cut, flip).split(len(images))

    return places.mean(scores())


@dataclass(frozen=True)
class Windows:
    """The windows that cover an image, with overlaps.

    Args:
        image: (height, width) of the image.
        size: (height, width) of a window.
        corners: (top, left) of each window, row by row.
    """

    image: tuple[int, int]
    size: tuple[int, int]
    corners: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, image: Sequence[int], window: tuple[int, int], stride: tuple[int, int] | None = None) -> Windows:
        """Return the windows of an image; arguments and errors are those of `sliding`."""
        stride = stride or (max(1, window[0] * 2 // 3), max(1, window[1] * 2 // 3))
        if min(*window, *stride) < 1 or stride[0] > window[0] or stride[1] > window[1]:
            raise VimoeError(f"window={window}, stride={stride}: expected strides of 1 to the window's side")
        (tops, height), (lefts, width) = (_starts(*each) for each in zip(image, window, stride, strict=True))
        corners = tuple((top, left) for top in tops for left in lefts)
        return cls((image[0], image[1]), (height, width), corners)

    def mean(self, scores: Iterable[Tensor]) -> Tensor:
        """Return the scores (B, classes, H, W) of images, with the mean where windows overlap.

        Args:
            scores: scores (B, classes, *size) of each window of the images, in the order of `corners`.
        """
        (height, width), total, times = self.size, None, None
        for (y, x), part in zip(self.corners, scores, strict=True):
            if total is None or times is None:
                total, times = part.new_zeros(*part.shape[:2], *self.image), part.new_zeros(self.image)
            total[..., y : y + height, x : x + width] += part
            times[y : y + height, x : x + width] += 1
        assert total is not None and times is not None  # there is a window at least
        return total / times


def _starts(side: int, window: int, stride: int) -> tuple[list[int], int]:
    """Return the starts of the windows along one side of an image, and their length."""
    last = max(0, side - window)
    return [*range(0, last, stride), last], min(side, window)
