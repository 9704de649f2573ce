"""A model whose routing and causes are known exactly, and a loader for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import vimoe
from vimoe.config.moe import MoEConfig
from vimoe.moe.router import TokenLayout

CLASSES = 4


class Known(nn.Module):
    """Two MoE layers over "images" that say their class in the first half of the channels; votes add up in the second.

    The first layer sends class c to expert c, which votes for c. The second routes by class as well, but all of its
    experts do nothing: specialised by number, not by cause.
    """

    num_classes = CLASSES

    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.pretrained_cfg: dict = {}
        made = MoEConfig(**{"num_experts": CLASSES, **settings})
        self.blocks = nn.ModuleList(Residual(made) for _ in range(2))
        with torch.no_grad():
            self.blocks[0].mlp.experts.fc2.bias[:CLASSES, CLASSES:] = 5 * torch.eye(CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x[..., CLASSES:].mean(dim=1)


class Residual(nn.Module):
    def __init__(self, made: MoEConfig) -> None:
        super().__init__()
        from timm.layers import Mlp

        silent = Mlp(2 * CLASSES, 2)
        for p in silent.parameters():
            nn.init.zeros_(p)
        self.mlp = vimoe.MoE(silent, made, TokenLayout(0, class_token=False))
        with torch.no_grad():
            self.mlp.router.weight.zero_()
            self.mlp.router.weight[:CLASSES, :CLASSES] = 20 * torch.eye(CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def loader(batch: int = 10, images: int = 60, tokens: int = 3, by_class: bool = False) -> list[tuple[Tensor, Tensor]]:
    labels = torch.randint(CLASSES, (images,), generator=torch.Generator().manual_seed(0))
    labels = labels.sort().values if by_class else labels
    x = torch.eye(CLASSES, 2 * CLASSES)[labels][:, None].expand(-1, tokens, -1)
    return list(zip(x.split(batch), labels.split(batch), strict=True))
