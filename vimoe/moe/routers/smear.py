"""The router "smear": one FFN for each image, whose weights are a mean of the experts' weights (SMEAR).

Axes: B images, T tokens of an image, D channels, R = B rows, N experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimoe.moe.experts import Experts
from vimoe.moe.router import Router
from vimoe.moe.routing import Routing

_TINY = 1e-30  # all gates may have rounded to 0, which leaves the shared expert alone


class SmearRouter(Router):
    """Experts merged for each image by the router's probabilities p (arXiv 2306.03745): M(x) has sum_i p_i W_i.

    Without a shared expert the layer computes M(x), as in the paper. With "sum" it is S(x) + M(x). In a "mix" the
    shared expert S takes part in the softmax with a score of 0, so that it keeps a weight and a gradient:

        g_i = exp(l_i) / (1 + sum_j exp(l_j))    b = sum_i g_i, N / (N + 1) for scores of 0
        y = S(x) + b (M(x) - S(x))               M with the weights sum_i g_i W_i / b

    While all experts are copies of the dense FFN, the layer computes what it did, in a "mix" and without a shared
    expert. An image costs the merging, N times the size of an expert, and one FFN for all tokens, whatever N is; and
    memory for its merged weights.

    `Routing.gates` are g, of all experts. All of them get all images, so loads are even and `balance_loss` is the
    constant N, without a gradient. `moe.top_k` is the least number of experts that pruning leaves.
    """

    units = ("image",)
    gated = False
    even = mixes = reads_weights = True

    def probabilities(self, logits_RN: Tensor) -> Tensor:
        """Return (R, N) gates, which leave the share of the score 0 to the shared expert of a mix."""
        if self._with_shared:
            return F.pad(logits_RN, (0, 1)).softmax(dim=-1)[:, :-1]
        return logits_RN.softmax(dim=-1)

    def decide(self, logits_RN: Tensor, batch: tuple[int, int]) -> Routing:
        """Return for each image all experts."""
        return self.all_experts(logits_RN, self.probabilities(logits_RN), batch)

    def compute(self, x_BTD: Tensor, routing: Routing, experts: Experts, shared: nn.Module | None) -> Tensor:
        """Return (B, T, D): merge the experts for each image, and compute all its tokens with the result."""
        gates_BN = routing.expert_gates
        sum_B1 = gates_BN.sum(dim=1, keepdim=True)
        share_BN = gates_BN / sum_B1.clamp(min=_TINY)
        merged = {
            name: (share_BN.to(w.dtype) @ w.flatten(1)).view(-1, *w.shape[1:])
            for name, w in experts.stacked_weights().items()
        }
        y_BTD: Tensor = torch.vmap(experts.apply_weights, randomness="different")(merged, x_BTD)
        if shared is None:
            return y_BTD
        shared_BTD = shared(x_BTD)
        change_BTD = sum_B1[..., None] * (y_BTD - shared_BTD) if self._with_shared else y_BTD
        return shared_BTD + change_BTD.to(shared_BTD.dtype)

    def compute_macs(self, tokens: int, experts: Experts, shared: int) -> float:
        """Multiply-adds of one image after its scores: the merging, and one FFN for all tokens."""
        return self.slots * sum(w.numel() for w in experts.weights(0).values()) + tokens * experts.macs

    @property
    def slots(self) -> int:
        """N: each image gets something of all experts."""
        return self.config.num_experts

    @property
    def blind(self) -> bool:
        """True for a single expert that has no shared expert beside it in the mean."""
        return self.config.num_experts == 1 and not self._with_shared

    @property
    def _with_shared(self) -> bool:
        """True if the shared expert takes part in the mean of outputs."""
        return self.config.combine == "mix" and self.config.num_shared_experts > 0
