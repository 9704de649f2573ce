"""Random crops of a whole batch, resized on the device that trains.

A resize is linear and separable: out = V image H^T, with one small matrix per axis that depends on the crop's size
alone. So two batched matrix products resize (and mirror) crops of all sizes at once. The filters are Pillow's:
antialiased, and without influence of pixels beyond the crop. (Pillow also rounds and clips after each axis.)

Axes: B images, S side of the output, P side of the padded crops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor, nn

from vimoe.config.train import TrainConfig
from vimoe.data.decoded import Pixels

Box = tuple[int, int, bool]  # height, width, mirrored


class RandomCrops:
    """Cut a random part out of an image: the same part as timm's transforms for one image with the same seed."""

    def __init__(self, config: TrainConfig) -> None:
        whole = config.min_crop == 1
        self.scale, self.ratio = (config.min_crop, 1.0), (1.0, 1.0) if whole else (3 / 4, 4 / 3)
        self.hflip = config.hflip

    def __call__(self, image: Pixels) -> tuple[Pixels, Box]:
        size = torch.empty(image.shape[:2], device="meta")  # timm only looks at the size
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(size, self.scale, self.ratio)
        mirrored = self.hflip > 0 and bool(torch.rand(1) < self.hflip)
        return image[top : top + height, left : left + width], (height, width, mirrored)


def pad(crops: Sequence[tuple[Pixels, Box]]) -> tuple[Tensor, Tensor]:
    """Put crops into the upper left corners of one array.

    Args:
        crops: (pixels, box) of each crop.

    Returns:
        Padded crops (B, P, P', 3) uint8, and their boxes (B, 3): height, width and mirrored.
    """
    boxes = torch.tensor([box for _, box in crops])
    height, width = boxes[:, :2].amax(dim=0).tolist()
    padded = np.zeros((len(crops), height, width, 3), np.uint8)
    for corner, (pixels, _) in zip(padded, crops, strict=True):
        corner[: pixels.shape[0], : pixels.shape[1]] = pixels
    return torch.from_numpy(padded), boxes


class Finish(nn.Module):
    """Resize and normalise padded crops (`pad`) to images (B, 3, S, S), and erase random parts."""

    mean: Tensor
    std: Tensor

    def __init__(self, prepared: dict[str, Any], config: TrainConfig) -> None:
        super().__init__()
        self.size, self.interpolation = prepared["input_size"][1:], prepared["interpolation"]
        for name in ("mean", "std"):
            self.register_buffer(name, 255 * torch.tensor(prepared[name])[:, None, None])
        self.erasing = config.random_erasing

    @torch.no_grad()
    def forward(self, padded: Tensor, boxes: Tensor) -> Tensor:
        heights, widths, mirrored = boxes.unbind(dim=1)
        vertical = weights(heights, padded.shape[1], self.size[0], self.interpolation)
        horizontal = weights(widths, padded.shape[2], self.size[1], self.interpolation)
        horizontal = torch.where(mirrored.bool()[:, None, None], horizontal.flip(1), horizontal)
        channels = padded.permute(0, 3, 1, 2).float()  # (B, 3, P, P')
        resized = vertical[:, None] @ (channels @ horizontal.mT[:, None])
        images = (
            resized.clamp(0, 255) - self.mean
        ) / self.std  # clamped, because filters with negative lobes overshoot
        if self.erasing:
            images = RandomErasing(self.erasing, mode="pixel", device=images.device)(images)
        return images


def weights(lengths: Tensor, padded: int, size: int, interpolation: str) -> Tensor:
    """Return the matrices that resize one axis of padded crops as Pillow does.

    Args:
        lengths: (B,) number of pixels of each crop; the rest is padding, whose weights are 0.
        padded: number of pixels with padding.
        size: number of pixels of the result.
        interpolation: one of `KERNELS`.

    Returns:
        Matrices (B, size, padded), whose rows sum to 1.
    """
    kernel, support = KERNELS[interpolation]
    scale = (lengths / size)[:, None, None]
    centre = (torch.arange(size, device=lengths.device)[:, None] + 0.5) * scale
    pixel = torch.arange(padded, device=lengths.device) + 0.5
    distance = (pixel - centre) / scale.clamp(min=1)  # a wider filter when shrinking is the antialiasing
    inside = (distance.abs() <= support) & (pixel < lengths[:, None, None])
    values = kernel(distance) * inside
    return values / values.sum(dim=-1, keepdim=True)


def _cubic(x: Tensor) -> Tensor:
    x = x.abs()
    near, far = (
        (1.5 * x - 2.5) * x * x + 1,
        ((-0.5 * x + 2.5) * x - 4) * x + 2,
    )  # Keys' cubic with a = -0.5, as in Pillow
    return torch.where(x < 1, near, far)


# the continuous filters, each with its support: the distance beyond which it is 0
KERNELS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "bilinear": (lambda x: 1 - x.abs(), 1.0),
    "hamming": (lambda x: torch.sinc(x) * (0.54 + 0.46 * torch.cos(math.pi * x)), 1.0),
    "bicubic": (_cubic, 2.0),
    "lanczos": (lambda x: torch.sinc(x) * torch.sinc(x / 3), 3.0),
}
