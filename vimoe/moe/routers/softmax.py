"""The router "softmax": every row goes to the k experts with the largest probability.

Axes: R rows that are routed (images or tokens), N experts, K = k slots of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vimoe.moe.router import Router
from vimoe.moe.routing import Routing


class SoftmaxRouter(Router):
    """Softmax over the scores, and the k best (Shazeer et al., 2017). All slots are filled."""

    adjustable = True

    def decide(self, logits_RN: Tensor, batch: tuple[int, int]) -> Routing:
        """Return the k best experts of each row, with their probabilities as gates."""
        probabilities_RN = logits_RN.softmax(dim=-1)
        preferred_RN = logits_RN.detach()
        if self.overrules:
            preferred_RN = self.preferences(probabilities_RN.detach()).masked_fill(logits_RN == -torch.inf, -torch.inf)
        experts_RK = preferred_RN.topk(self.config.top_k).indices
        gates_RK = probabilities_RN.gather(-1, experts_RK)
        divides = self.config.gates_sum_to_one and self.config.gate == "probability"
        if divides and self.overrules:  # of unlikely experts all k gates may have rounded to 0
            gates_RK = logits_RN.gather(-1, experts_RK).softmax(dim=-1)
        elif divides:
            gates_RK = gates_RK / gates_RK.sum(dim=-1, keepdim=True)
        return Routing(logits_RN, gates_RK, experts_RK, self.config.routing, batch)

    @property
    def blind(self) -> bool:
        """True if its gates are constant, such as the only one that is always 1."""
        return bool(self.gate.blind)
