"""Softmax top-k routing of whole images or of single tokens.

Axes: B images, T tokens of an image, D channels, R routed units (B, or B * T), N experts, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from vimoe.config.moe import MoEConfig
from vimoe.errors import VimoeError
from vimoe.moe.autocast import own_type
from vimoe.moe.chunks import blocks
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
    (ViMoE, section 3). Scores and gates are float32 at least, whatever the autocast, and of tokens as the experts see
    them, in its type (the selective precision of Switch Transformer, section 2.4). Where torch is told that float32
    products may be TF32, these are too.

    In training `router_noise` moves scores, and by them choices and gates. What is recorded are the scores without it:
    losses are to shape what the router thinks (V-MoE's importance loss, too, is of these).

    Attributes:
        choice_bias: (N,) float32, added to the probabilities where experts are chosen, and nowhere else; None where
            `bias_update_rate` is 0. It is a part of the model as weights are; `vimoe.update_bias` moves it.
        random_share: scalar, the share of the decisions that is random in training; None for none. Not saved, and a
            tensor, because torch.compile would compile again for each number; `vimoe.set_random_share` sets it.
    """

    choice_bias: Tensor | None
    random_share: Tensor | None

    def __init__(self, dim: int, config: MoEConfig, layout: TokenLayout, like: Tensor) -> None:
        super().__init__()
        self.config, self.layout = config, layout
        self.weight = nn.Parameter(torch.empty(config.num_experts, dim, dtype=like.dtype, device=like.device))
        nn.init.trunc_normal_(self.weight, std=INIT_STD)
        bias_N = torch.zeros(config.num_experts, dtype=torch.float32, device=like.device)
        self.register_buffer("choice_bias", bias_N if config.bias_update_rate else None)
        self.register_buffer("random_share", None, persistent=False)

    def forward(self, x_BTD: Tensor) -> Routing:
        """Decides where the tokens (B, T, D) go."""
        if x_BTD.ndim != 3:
            raise VimoeError(f"MoE input of shape {tuple(x_BTD.shape)}: expected (images, tokens, channels)")
        batch = (x_BTD.shape[0], x_BTD.shape[1])
        with own_type(x_BTD):
            feature_RD = self._feature(x_BTD)
            logits_RN = scores(feature_RD, self.weight, few=self.config.routing == "image")
            noisy_RN = logits_RN
            if self.training and self.config.router_noise:
                std = self.config.router_noise / self.config.num_experts
                noisy_RN = logits_RN + std * torch.randn_like(logits_RN)
            return replace(self.decide(noisy_RN, batch), logits=logits_RN)

    def decide(self, logits_RN: Tensor, batch: tuple[int, int]) -> Routing:
        """The decisions that follow from the scores. A score of -inf keeps an expert from being chosen."""
        probabilities_RN = logits_RN.softmax(dim=-1)
        preferred_RN = logits_RN.detach()
        if self._overrules:
            preferred_RN = self._preferred(probabilities_RN.detach()).masked_fill(logits_RN == -torch.inf, -torch.inf)
        experts_RK = preferred_RN.topk(self.config.top_k).indices
        gates_RK = probabilities_RN.gather(-1, experts_RK)
        if self.config.gates_sum_to_one and self._overrules:  # of unlikely experts all k gates may have rounded to 0
            gates_RK = logits_RN.gather(-1, experts_RK).softmax(dim=-1)
        elif self.config.gates_sum_to_one:
            gates_RK = gates_RK / gates_RK.sum(dim=-1, keepdim=True)
        return Routing(logits_RN, gates_RK, experts_RK, self.config.routing, batch)

    @property
    def _overrules(self) -> bool:
        """Whether experts may be chosen by something else than their probabilities."""
        return self.choice_bias is not None or (self.training and self.random_share is not None)

    def _preferred(self, probabilities_RN: Tensor) -> Tensor:
        """(R, N) what the k largest of are chosen: k distinct experts too where the choice is random."""
        preferred_RN = probabilities_RN if self.choice_bias is None else probabilities_RN + self.choice_bias
        if not self.training or self.random_share is None:
            return preferred_RN
        random_R1 = torch.rand(preferred_RN.shape[0], 1, device=preferred_RN.device) < self.random_share
        return torch.where(random_R1, torch.rand_like(preferred_RN), preferred_RN)

    def _feature(self, x_BTD: Tensor) -> Tensor:
        if self.config.routing == "token":
            return x_BTD.flatten(0, 1)
        if self.layout.class_token:
            return x_BTD[:, 0]
        patches = x_BTD[:, self.layout.num_prefix_tokens :]
        return patches.mean(dim=1, dtype=torch.promote_types(x_BTD.dtype, torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        bias_N = self.choice_bias
        super()._apply(fn, recurse)
        if bias_N is not None and self.choice_bias is not None and self.choice_bias.dtype != bias_N.dtype:
            self.choice_bias = bias_N.to(self.choice_bias.device)  # in bfloat16 its steps would be rounded away
        return self

    def extra_repr(self) -> str:
        num_experts, dim = self.weight.shape
        return f"{dim} -> {num_experts}, top_k={self.config.top_k}, routing={self.config.routing!r}"


def scores(feature_RD: Tensor, weight_ND: Tensor, few: bool = False) -> Tensor:
    """(R, N) float32 at least. Unless they are few, no wide copy of low precision is kept, nor made whole on a CPU."""
    precise = torch.promote_types(feature_RD.dtype, torch.float32)
    if few or feature_RD.dtype == precise:
        return F.linear(feature_RD.to(precise), weight_ND.to(precise))
    logits_RN: Tensor = _scores(feature_RD, weight_ND.to(precise))
    return logits_RN


@torch.library.custom_op("vimoe::scores", mutates_args=())
def _scores(feature: Tensor, weight: Tensor) -> Tensor:
    logits = weight.new_empty(len(feature), len(weight))
    for at in blocks(feature):
        torch.mm(feature[at].to(weight.dtype), weight.T, out=logits[at])
    return logits


@torch.library.custom_op("vimoe::scores_gradient", mutates_args=())
def _scores_gradient(dlogits: Tensor, feature: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dfeature, dweight = torch.empty_like(feature), torch.zeros_like(weight)
    with own_type(dlogits):
        for at in blocks(feature):
            dfeature[at] = dlogits[at] @ weight
            dweight.addmm_(dlogits[at].T, feature[at].to(weight.dtype))
    return dfeature, dweight


@_scores.register_fake
def _(feature: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(feature.shape[0], weight.shape[0])


@_scores_gradient.register_fake
def _(dlogits: Tensor, feature: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(feature), torch.empty_like(weight)


_scores.register_autograd(
    lambda ctx, dlogits: _scores_gradient(dlogits, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@register_flop_formula(torch.ops.vimoe.scores)
def _flops(feature: torch.Size, weight: torch.Size, **_: Any) -> int:
    return 2 * feature[0] * weight.numel()


@register_flop_formula(torch.ops.vimoe.scores_gradient)
def _gradient_flops(dlogits: torch.Size, feature: torch.Size, weight: torch.Size, **_: Any) -> int:
    return 4 * feature[0] * weight.numel()
