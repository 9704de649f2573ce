"""The router "expert_choice": experts choose tokens, each of them the same number in each image.

Axes: B images, T tokens of an image, R = B * T rows, N experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vimoe.moe.router import Router
from vimoe.moe.routing import Routing


class ExpertChoiceRouter(Router):
    """Each expert takes its best max(1, round(k T / N)) tokens of each image: Zhou et al., arXiv 2202.09368.

    Affinity and weight are the softmax of a token's scores over the experts. The load is even by construction, and a
    token gets k experts on average, 0 to N of them. Prefix tokens count among the T, and may get none.

    It departs from the paper in the pool: experts choose in each image, not in the batch, so that an image's output
    depends on it alone. `moe.bias_update_rate` and random decisions are refused, as nothing is left to balance.
    """

    units = ("token",)
    even = ragged = True
    tokens_interact = True

    @property
    def slots(self) -> int:
        return self.config.num_experts

    @property
    def experts_per_token(self) -> float:
        """k, to the rounding of k T / N to whole tokens."""
        return self.config.top_k

    def decide(self, logits_RN: Tensor, batch: tuple[int, int]) -> Routing:
        """Return the experts that took each token, with their probabilities for gates."""
        gates_RN = self.probabilities(logits_RN)
        affinity_BTN = self.by_image(gates_RN.detach(), batch)
        capacity = max(1, round(self.config.top_k * batch[1] / self.config.num_experts))
        taken_BCN = affinity_BTN.topk(capacity, dim=1).indices
        chosen_BTN = torch.zeros_like(affinity_BTN, dtype=torch.bool).scatter(1, taken_BCN, True)
        return self.assign(logits_RN, gates_RN, chosen_BTN.flatten(0, 1), batch)

    @property
    def blind(self) -> bool:
        return bool(self.gate.blind(self.slots, constant=self.config.num_experts == 1))
