"""The decisions of routers that give each row its k best experts.

Axes: R rows that are routed (images or tokens), N experts, K = k slots of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vimoe.moe.router import Router
from vimoe.moe.routing import Routing


class TopKRouter(Router):
    """Base of the routers that send each row to the k experts with the largest scores. All slots are filled.

    Where a bias or chance overrules the scores, the k largest `preferences` decide. The router's own weight of a chosen
    expert is that of `probabilities`, which grow with the scores.
    """

    adjustable = True

    def decide(self, logits_RN: Tensor, batch: tuple[int, int]) -> Routing:
        """Return the k best experts of each row, with their `probabilities` for gates."""
        weights_RN = self.probabilities(logits_RN)
        preferred_RN = logits_RN.detach()
        if self.overrules:
            preferred_RN = self.preferences(weights_RN.detach()).masked_fill(logits_RN == -torch.inf, -torch.inf)
        experts_RK = preferred_RN.topk(self.config.top_k).indices
        return Routing(logits_RN, weights_RN.gather(-1, experts_RK), experts_RK, self.config.routing, batch)
