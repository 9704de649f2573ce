"""The router "hash": a fixed table decides by a token's place in the image, and nothing is learnt.

Axes: B images, T tokens of an image, D channels, R = B * T rows, N experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vimoe.config.moe import MoEConfig
from vimoe.moe.router import TokenLayout
from vimoe.moe.routers.softmax import SoftmaxRouter

PLACES = 4096  # columns of the table
SEED = 0


class HashRouter(SoftmaxRouter):
    """The softmax router on scores from a fixed table: the token at place t has those of column t mod 4096.

    After Hash Layers (arXiv 2106.04426), whose hash is of a word's id. A token of an image has no id but its place, so
    here all images are routed alike, and prefix tokens have places too. The table is drawn once from a normal
    distribution with a fixed seed, the same for all layers; it is saved with the model, and no training changes it. So
    it has no parameters, no multiply-adds, and needs no gradient. Its weights are the probabilities of these scores;
    the paper gives its one expert the weight 1, as `moe.gate="choice"` with `moe.gate_weight=1` does.

    Attributes:
        weight: (N, 4096) scores, a buffer.
    """

    units = ("token",)
    fixed = constant = True

    def __init__(self, dim: int, config: MoEConfig, layout: TokenLayout, like: Tensor) -> None:
        super().__init__(PLACES, config, layout, like)
        drawn = torch.randn(config.num_experts, PLACES, generator=torch.Generator().manual_seed(SEED))
        self.weight.copy_(drawn)  # drawn on the CPU, so that it is the same on all devices

    def feature(self, x_BTD: Tensor) -> Tensor:
        """(R,) int64, the column of each token."""
        images, tokens, _ = x_BTD.shape
        return (torch.arange(tokens, device=x_BTD.device) % PLACES).repeat(images)

    def score(self, feature_R: Tensor) -> Tensor:
        """Return (R, N) the scores of these columns, float32 at least."""
        precise = torch.promote_types(self.weight.dtype, torch.float32)
        return self.weight.T[feature_R].to(precise)

    @property
    def macs(self) -> int:
        return 0
