"""The decisions of routers that give each row its k best experts.

Axes: R rows that are routed (images or tokens), N experts, K = k slots of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vimoe.config.moe import MoEConfig
from vimoe.moe.capacity import within_capacity
from vimoe.moe.router import Router, TokenLayout
from vimoe.moe.routing import Routing


class TopKRouter(Router):
    """Base of the routers that send each row to the k experts with the largest scores.

    All slots are filled, unless `capacity_factor` leaves tokens over (`within_capacity`). Where a bias or chance
    overrules the scores, the k largest `preferences` decide. The router's own weight of a chosen expert is that of
    `probabilities`, which grow with the scores.
    """

    adjustable = has_capacity = True

    def __init__(self, dim: int, config: MoEConfig, layout: TokenLayout, like: Tensor) -> None:
        super().__init__(dim, config, layout, like)
        self._limit()

    def decide(self, logits_RN: Tensor, batch: tuple[int, int]) -> Routing:
        """Return the k best experts of each row, with their `probabilities` for gates."""
        weights_RN = self.probabilities(logits_RN)
        preferred_RN = logits_RN.detach()
        if self.overrules:
            preferred_RN = self.preferences(weights_RN.detach()).masked_fill(logits_RN == -torch.inf, -torch.inf)
        experts_RK = preferred_RN.topk(self.config.top_k).indices
        routing = Routing(logits_RN, weights_RN.gather(-1, experts_RK), experts_RK, self.config.routing, batch)
        if not self.ragged:
            return routing
        return self.assign(logits_RN, weights_RN, within_capacity(routing, self._factor), batch)

    @property
    def experts_per_token(self) -> float:
        """k, or C k with a capacity factor C below 1, to the rounding of capacities to whole tokens."""
        return self.config.top_k * min(1.0, self._factor) if self.ragged else self.config.top_k

    def keep(self, kept: Sequence[int]) -> None:
        super().keep(kept)
        self._limit()

    @property
    def _factor(self) -> float:
        return self.config.capacity_factor or 0.0

    def _limit(self) -> None:
        """Note if an expert may have to leave tokens over, which it cannot where it has room for all of its pool."""
        self.ragged = self.tokens_interact = 0 < self._factor * self.config.top_k < max(self.config.pools)
