"""The router "soft": experts get mixtures of tokens, and tokens get mixtures of the experts' outputs (Soft MoE).

Axes: B images, T tokens of an image, D channels, R = B * T rows, N experts, P slots of an expert, S = N * P slots of an
image, ordered by expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vimoe.config.moe import MoEConfig
from vimoe.moe.autocast import own_type
from vimoe.moe.experts import Experts
from vimoe.moe.router import Router, TokenLayout, batch_of, scores
from vimoe.moe.routing import Routing

_SMALLEST = 1e-12  # length of a token or slot that is taken as zero


@dataclass(frozen=True, kw_only=True)
class SlotRouting(Routing):
    """Decisions of a soft router. A token's gates are the shares in its output that come from each expert's slots.

    Attributes:
        slots: (B, T, S) score of each token for each slot, in training with the router's noise.
    """

    slots: Tensor

    def detach(self) -> SlotRouting:
        """Return the same decisions without gradient."""
        return replace(self, logits=self.logits.detach(), gates=self.gates.detach(), slots=self.slots.detach())


class SoftRouter(Router):
    """Mixtures of all tokens of an image for each slot, and of all slots for each token (arXiv 2308.00951).

    With phi_s the vector of slot s, z the learnt `scale` (1 at the start) and i(s) the expert of the slot:

        l_ts = z x_t.phi_s / (|x_t| |phi_s|)
        slot_s = sum_t softmax_t(l_ts) x_t        over the tokens of the image, class token and registers among them
        C_ts = softmax_s(l_ts)                    over all slots
        "mix":  y_t = S(x_t) + sum_s C_ts (E_i(s)(slot_s) - S(slot_s))      what the dense FFN did, at the start
        "sum":  y_t = S(x_t) + sum_s C_ts E_i(s)(slot_s)

    The shared expert's output bias cancels in a mix, as C_t sums to 1; the rest of it is trained by S(x) and S(slot).
    The paper has no shared expert, and y_t = sum_s C_ts E_i(s)(slot_s): then the function of the dense FFN is not kept.
    A `Routing` records for each token and expert the log-sum-exp of its P scores; so its softmax is the share of the
    expert's slots in the token's output, the gate. All experts get something of all tokens: loads are even by
    themselves, and `balance_loss` is the constant N, without a gradient. `moe.top_k` is the least number of experts
    that pruning leaves. `moe.router_noise` is added to l.

    Attributes:
        weight: (N, P * D), the vectors of each expert's slots side by side.
        scale: scalar z.
    """

    units = ("token",)
    gated = overrulable = False
    even = mixes = tokens_interact = True

    def __init__(self, dim: int, config: MoEConfig, layout: TokenLayout, like: Tensor) -> None:
        super().__init__(dim * config.slots_per_expert, config, layout, like)
        self.scale = nn.Parameter(torch.ones((), dtype=like.dtype, device=like.device))

    def forward(self, x_BTD: Tensor) -> SlotRouting:
        """Return the scores of all slots for tokens (B, T, D), and the decisions that sum them up."""
        batch = batch_of(x_BTD)
        with own_type(x_BTD):
            scores_RS = self.score(self.feature(x_BTD))
            noisy_RS = self.noisy(scores_RS)
            routing = self.decide(self._of_experts(noisy_RS), batch)
            logits_RN = self._of_experts(scores_RS)
        slots = noisy_RS.view(*batch, noisy_RS.shape[1])
        return SlotRouting(logits_RN, routing.gates, routing.experts, routing.unit, batch, slots=slots)

    def score(self, feature_RD: Tensor) -> Tensor:
        """Return (R, S), the scaled cosine of each token with each slot's vector."""
        phi_SD = self.weight.view(-1, feature_RD.shape[1])
        precise = torch.promote_types(feature_RD.dtype, torch.float32)
        length_R1 = torch.linalg.vector_norm(feature_RD, dim=1, keepdim=True, dtype=precise).clamp(min=_SMALLEST)
        unit_SD = nn.functional.normalize(phi_SD.to(precise), dim=1, eps=_SMALLEST) * self.scale.to(precise)
        return scores(feature_RD, unit_SD) / length_R1

    def decide(self, logits_RN: Tensor, batch: tuple[int, int]) -> Routing:
        """Return for each token all experts, with their shares in its output."""
        return self.all_experts(logits_RN, logits_RN.softmax(dim=-1), batch)

    def compute(self, x_BTD: Tensor, routing: Routing, experts: Experts, shared: nn.Module | None) -> Tensor:
        """Return (B, T, D): fill the slots, let each expert compute its own, and mix the results for each token."""
        assert isinstance(routing, SlotRouting)
        images, _, dim = x_BTD.shape
        n, p = self.config.num_experts, self.config.slots_per_expert
        slots_BSD = routing.slots.softmax(dim=1).to(x_BTD.dtype).transpose(1, 2) @ x_BTD
        slots_RPD = slots_BSD.view(images, n, p, dim).transpose(0, 1).reshape(n * images, p, dim)  # sorted by expert
        y_RPD = experts(slots_RPD, None, torch.full((n,), images, device=x_BTD.device))
        if shared is not None and self.config.combine == "mix":
            y_RPD = y_RPD - shared(slots_RPD)
        y_BSD = y_RPD.view(n, images, p, dim).transpose(0, 1).reshape(images, n * p, dim)
        change_BTD = routing.slots.softmax(dim=2).to(y_BSD.dtype) @ y_BSD
        return change_BTD if shared is None else shared(x_BTD) + change_BTD

    def compute_macs(self, tokens: int, experts: Experts, shared: int) -> float:
        """Multiply-adds of one image after its scores: the slots, the experts (in a mix beside S), and the outputs."""
        slots = self.config.num_experts * self.config.slots_per_expert
        beside = shared if self.config.combine == "mix" else 0
        return slots * (experts.macs + beside) + 2 * tokens * slots * experts.kind.dim

    @property
    def slots(self) -> int:
        """N: each token gets something of all experts."""
        return self.config.num_experts

    def _of_experts(self, scores_RS: Tensor) -> Tensor:
        """(R, S) to (R, N): one score for each expert, whose softmax is the sum of its slots' softmax."""
        return scores_RS.unflatten(-1, (-1, self.config.slots_per_expert)).logsumexp(dim=-1)
