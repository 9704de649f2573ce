"""Decoders: class scores on a grid from a ViT's feature maps.

A decoder is made of D, the ViT's depth and the number of classes, and of arguments of its own that JSON knows. It names
the blocks whose output it reads (`blocks`), and takes their outputs as maps (B, D, h, w).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vimoe.errors import ConfigError
from vimoe.models.prompted import Prompted

UPERNET_CHANNELS = 512  # as in mmsegmentation and transformers


class Linear(nn.Module):
    """BatchNorm and one linear map for each patch, on the last layers side by side (DINOv2, arXiv 2304.07193, 7.4).

    Args:
        dim: number D of channels of the ViT.
        depth: number of its blocks.
        classes: number of scores of a patch.
        layers: number of blocks that are read, the last ones.
    """

    def __init__(self, dim: int, depth: int, classes: int, layers: int = 1) -> None:
        super().__init__()
        if depth < layers:
            raise ConfigError(
                f"a decoder of the last {layers} layers: expected as many blocks, got {depth}; use 'linear'"
            )
        self.blocks = tuple(range(depth - layers, depth))
        self.norm = nn.BatchNorm2d(dim * layers)
        self.classifier = nn.Conv2d(dim * layers, classes, kernel_size=1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.constant_(self.classifier.bias, 0)  # type: ignore[arg-type]  # there is one

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map `layers` maps (B, D, h, w) to scores (B, classes, h, w)."""
        return self.classifier(self.norm(torch.cat(list(maps), dim=1)))


class UPerNet(nn.Module):
    """UPerNet (arXiv 1807.10221) on four layers of a ViT, in equal steps of depth, as in BEiT (arXiv 2106.08254).

    The head is transformers' `UperNetHead`. A ViT has one scale, so transposed convolutions and pooling bring the four
    maps to strides of a quarter, a half, one and two patches. Its batch norms need training batches of at least two
    images, because the coarsest pooling leaves one number for each channel of an image.

    Args:
        dim: number D of channels of the ViT.
        depth: number of its blocks.
        classes: number of scores of a patch.

    Raises:
        ConfigError: if transformers is not installed, or there are fewer than four blocks.
    """

    def __init__(self, dim: int, depth: int, classes: int) -> None:
        super().__init__()
        if depth < 4:
            raise ConfigError(
                f"decoder='upernet' reads four layers: expected as many blocks, got {depth}; use 'linear'"
            )
        try:
            from transformers import UperNetConfig
            from transformers.models.upernet.modeling_upernet import UperNetHead
        except ImportError as error:
            raise ConfigError(
                "decoder='upernet' needs transformers, which is not installed: pip install 'transformers>=5'"
            ) from error
        self.blocks = tuple((i + 1) * depth // 4 - 1 for i in range(4))
        twice = (nn.ConvTranspose2d(dim, dim, 2, 2), nn.BatchNorm2d(dim), nn.GELU(), nn.ConvTranspose2d(dim, dim, 2, 2))
        self.pyramid = nn.ModuleList(
            [
                nn.Sequential(*twice),
                nn.ConvTranspose2d(dim, dim, 2, 2),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),  # a grid may be odd
            ]
        )
        settings: dict[str, Any] = {"hidden_size": UPERNET_CHANNELS, "num_labels": classes}
        self.head = UperNetHead(UperNetConfig(**settings), [dim] * 4)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map four maps (B, D, h, w) to scores (B, classes, 4 h, 4 w)."""
        return self.head([level(x) for level, x in zip(self.pyramid, maps, strict=True)])


def _linear4(dim: int, depth: int, classes: int) -> Linear:
    return Linear(dim, depth, classes, layers=4)


DECODERS: dict[str, Callable[..., nn.Module]] = {
    "linear": Linear, "linear4": _linear4, "upernet": UPerNet, "prompted": Prompted,
}  # fmt: skip
