"""Softmax top-k routing of whole images or of single tokens.

Axes: B images, T tokens of an image, D channels, R routed units (B, or B * T), N experts, K chosen experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimoe.config import MoEConfig
from vimoe.errors import VimoeError
from vimoe.moe.routing import Routing

INIT_STD = 0.02  # as ViTs initialise their linear maps; zero would send every image to the same expert


@dataclass(frozen=True)
class TokenLayout:
    """Which tokens of a ViT are no patches. An FFN cannot know this; surgery tells the router."""

    num_prefix_tokens: int
    class_token: bool  # whether the first token is the class token


class Router(nn.Module):
    """A linear map from the routed feature to N scores, softmax, and the k best (Shazeer et al., 2017).

    With "image" routing the feature is the class token where the model has one, else the mean of the patch tokens
    (ViMoE, section 3). Scores and gates are float32 at least, whatever the autocast.
    """

    def __init__(self, dim: int, config: MoEConfig, layout: TokenLayout, like: Tensor) -> None:
        super().__init__()
        self.config, self.layout = config, layout
        self.weight = nn.Parameter(torch.empty(config.num_experts, dim, dtype=like.dtype, device=like.device))
        nn.init.trunc_normal_(self.weight, std=INIT_STD)

    def forward(self, x_BTD: Tensor) -> Routing:
        """Decides where the tokens (B, T, D) go."""
        if x_BTD.ndim != 3:
            raise VimoeError(f"MoE input of shape {tuple(x_BTD.shape)}: expected (images, tokens, channels)")
        batch = (x_BTD.shape[0], x_BTD.shape[1])
        with torch.autocast(x_BTD.device.type, enabled=False):
            feature_RD = self._feature(x_BTD)
            precise = torch.promote_types(feature_RD.dtype, torch.float32)
            logits_RN = F.linear(feature_RD.to(precise), self.weight.to(precise))
            return self.decide(logits_RN, batch)

    def decide(self, logits_RN: Tensor, batch: tuple[int, int]) -> Routing:
        """The decisions that follow from the scores. A score of -inf keeps an expert from being chosen."""
        gates_RK, experts_RK = logits_RN.softmax(dim=-1).topk(self.config.top_k, dim=-1)
        if self.config.gates_sum_to_one:
            gates_RK = gates_RK / gates_RK.sum(dim=-1, keepdim=True)
        return Routing(logits_RN, gates_RK, experts_RK, self.config.routing, batch)

    def _feature(self, x_BTD: Tensor) -> Tensor:
        if self.config.routing == "token":
            return x_BTD.flatten(0, 1)
        if self.layout.class_token:
            return x_BTD[:, 0]
        patches = x_BTD[:, self.layout.num_prefix_tokens :]
        return patches.mean(dim=1, dtype=torch.promote_types(x_BTD.dtype, torch.float32))

    def extra_repr(self) -> str:
        num_experts, dim = self.weight.shape
        return f"{dim} -> {num_experts}, top_k={self.config.top_k}, routing={self.config.routing!r}"
