"""Tiny segmenters and images for them."""

from __future__ import annotations

import torch
from helpers.tiny import randomise, vit
from torch import Tensor

from vimoe.models.segmenter import Segmenter


def segmenter(family: str = "vit", decoder: str = "linear", palette: object = None, **changes: object) -> Segmenter:
    torch.manual_seed(0)
    backbone = vit(family, **{"num_classes": 0, "dynamic_img_size": True, "depth": 4, **changes})
    return randomise(Segmenter(backbone, 3, decoder, palette=palette), seed=1, scale=0.3).eval()


def pictures(model: Segmenter, batch: int = 2, size: tuple[int, int] | None = None, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, *(size or model.crop), generator=torch.Generator().manual_seed(seed))
