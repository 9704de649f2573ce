"""The router "cosine": scores are cosines with a learnt direction of each expert, in a space of few channels.

Axes: D channels, P channels of the projection, R rows that are routed (images or tokens), N experts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimoe.config.moe import MoEConfig
from vimoe.moe.router import INIT_STD, TokenLayout, scores
from vimoe.moe.routers.softmax import SoftmaxRouter

MOST_CHANNELS = 256  # as GMoE has
FIRST_SCALE, LARGEST_SCALE = 2.0, 100.0


class CosineRouter(SoftmaxRouter):
    """The softmax router on scores s cos(W x, w_i): of X-MoE (arXiv 2204.09179) and GMoE (arXiv 2206.04046).

    W projects to P = D / 2 channels, 256 at most. The scale s = exp(`log_scale`) is learnt, starts at 2, and counts as
    100 where it is larger. The length of a token does not matter, so that scores draw tokens less towards the rows of
    experts (the representation collapse of X-MoE).

    P and the scales are GMoE's; X-MoE has P = N / 2. There is no bias in the projection, as in X-MoE. In domain one
    comparison found it the worst router (arXiv 2411.18322); out of domain GMoE found it better than a linear one.

    Attributes:
        weight: (N, P), a direction for each expert.
        projection: (P, D).
        log_scale: scalar, natural logarithm of s.
    """

    def __init__(self, dim: int, config: MoEConfig, layout: TokenLayout, like: Tensor) -> None:
        channels = max(1, min(MOST_CHANNELS, dim // 2))
        super().__init__(channels, config, layout, like)
        self.projection = nn.Parameter(torch.empty(channels, dim, dtype=like.dtype, device=like.device))
        nn.init.trunc_normal_(self.projection, std=INIT_STD)
        self.log_scale = nn.Parameter(torch.full((), math.log(FIRST_SCALE), dtype=like.dtype, device=like.device))

    def score(self, feature_RD: Tensor) -> Tensor:
        """Return (R, N) cosines times the scale, float32 at least."""
        projected_RP = F.normalize(scores(feature_RD, self.projection, few=self.config.routing == "image"), dim=1)
        directions_NP = F.normalize(self.weight.to(projected_RP.dtype), dim=1)
        scale = self.log_scale.to(projected_RP.dtype).clamp(max=math.log(LARGEST_SCALE)).exp()
        return scale * F.linear(projected_RP, directions_NP)

    @property
    def macs(self) -> int:
        return self.projection.numel() + self.weight.numel()
