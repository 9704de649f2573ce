"""Tokens on a grid: hierarchical ViTs hand (B, H, W, D) to their FFNs, and those of 1x1 convolutions (B, D, H, W).

Axes: B images, T tokens of an image, D channels, H rows and W columns of the grid, T = HW.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

from torch import Tensor, nn

from vimoe.moe import ffn


class Grid(NamedTuple):
    """The shape of what an FFN takes and gives: images first, and any number of axes for the tokens of an image.

    Args:
        channels: axis of the channels, 1 or -1.

    Example:
        >>> import torch
        >>> x, grid = torch.randn(2, 8, 3, 4), Grid(channels=1)
        >>> grid.tokens(x).shape, torch.equal(grid.placed(grid.tokens(x), x.shape), x)
        (torch.Size([2, 12, 8]), True)
    """

    channels: int

    @classmethod
    def of(cls, dense: nn.Module) -> Self:
        """Return the shape that an FFN takes and gives."""
        return cls(1 if ffn.of_convolutions(dense) else -1)

    def tokens(self, x: Tensor) -> Tensor:
        """Return (B, T, D), row by row; tokens (T, D) are those of one image."""
        if x.ndim <= 3:
            return x if x.ndim == 3 else x[None]
        return x.movedim(self.channels, -1).flatten(1, -2)

    def placed(self, y_BTD: Tensor, shape: Sequence[int]) -> Tensor:
        """Return tokens (B, T, D) on a grid of this shape; the number of images is their own."""
        if len(shape) <= 3:
            return y_BTD if len(shape) == 3 else y_BTD[0]
        positions = shape[2:] if self.channels == 1 else shape[1:-1]
        return y_BTD.unflatten(1, tuple(positions)).movedim(-1, self.channels)
