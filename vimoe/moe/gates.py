"""Gates: how much the chosen experts weigh, given the router's decision.

Axes: R rows that are routed (images or tokens), N experts, K slots of a row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from vimoe.config.moe import MoEConfig
from vimoe.moe.routing import Routing

_TINY = 1e-30  # a weight that has rounded to 0 is a choice all the same, and 0/0 is none


class Gate(nn.Module):
    """The gate "probability", and the base of the others: the router's own weights.

    They are divided by their sum over the chosen experts where `MoEConfig.gates_sum_to_one`.

    A gate turns a `Routing` into one with other `gates`, and the same experts. The contract: empty slots keep the gate
    0, and gates depend on the scores of their row alone.

    Args:
        config: settings of the layer.
        like: a weight of the FFN, for type and device.
    """

    def __init__(self, config: MoEConfig, like: Tensor) -> None:
        super().__init__()
        self.config = config

    def forward(self, routing: Routing) -> Routing:
        """Return the decisions with the weights of this gate; `routing.logits` are those that decided."""
        return replace(routing, gates=self.divided(routing.gates, routing.experts >= 0))

    def divided(self, gates: Tensor, filled: Tensor | bool = True) -> Tensor:
        """Return the gates of filled slots, divided by their sum in the row where the settings say so."""
        if not self.config.gates_sum_to_one:
            return gates
        gates = (gates + _TINY) * filled
        return gates / gates.sum(dim=-1, keepdim=True).clamp(min=_TINY)

    def of_all(self, probabilities_RN: Tensor, logits_RN: Tensor) -> Tensor:
        """Return (R, N) the gates as if all experts were chosen, through which `moe.router_gradient` trains a router.

        Args:
            probabilities_RN: probability of each expert, as the router has it.
            logits_RN: scores.
        """
        return self.divided(probabilities_RN)

    def blind(self, slots: int, constant: bool) -> bool:
        """Return True if the gates are constant, so that they train no router.

        Args:
            slots: K, the most experts that a row can get.
            constant: True if the router's own weights are constant.
        """
        return constant or self.is_one(slots)

    def is_one(self, slots: int) -> bool:
        """Return True if the only gate that has a gradient is always 1."""
        return slots == 1 and self.config.gates_sum_to_one and self.config.router_gradient == "chosen"


class ChoiceGate(Gate):
    """The gate as a choice: the chosen experts share the weight b, in equal parts, whatever the scores.

    Of c chosen experts each has the gate b/c p/sg(p), with sg the stop of the gradient. So its value is b/c, and its
    gradient is b/c times that of log p. The weight b is `MoEConfig.choice_weight`. With `moe.router_gradient` the
    gradient is that of b p, for all experts.
    """

    def forward(self, routing: Routing) -> Routing:
        p_RK = routing.gates + _TINY
        filled_RK = (routing.experts >= 0).to(p_RK.dtype)
        share_RK = filled_RK * (self.config.choice_weight / filled_RK.sum(dim=-1, keepdim=True).clamp(min=1))
        return replace(routing, gates=share_RK * (p_RK / p_RK.detach()))

    def of_all(self, probabilities_RN: Tensor, logits_RN: Tensor) -> Tensor:
        return self.config.choice_weight * self.divided(probabilities_RN)

    def blind(self, slots: int, constant: bool) -> bool:
        return constant


class SigmoidGate(Gate):
    """A sigmoid of each chosen expert's own score and a learnt bias: 1/2 at the start for a score of 0.

    A weight does not fall when another expert's score rises, as it does with a softmax. Llama 4's code has such gates
    without a bias, on the inputs of experts.
    """

    def __init__(self, config: MoEConfig, like: Tensor) -> None:
        super().__init__(config, like)
        self.bias = nn.Parameter(torch.zeros((), dtype=like.dtype, device=like.device))

    def forward(self, routing: Routing) -> Routing:
        filled_RK = routing.experts >= 0
        gates_RK = self._sigmoid(routing.logits.gather(-1, routing.experts.clamp(min=0))) * filled_RK
        return replace(routing, gates=self.divided(gates_RK, filled_RK))

    def of_all(self, probabilities_RN: Tensor, logits_RN: Tensor) -> Tensor:
        return self.divided(self._sigmoid(logits_RN))

    def _sigmoid(self, logits: Tensor) -> Tensor:
        return (logits + self.bias.to(logits.dtype)).sigmoid()

    def blind(self, slots: int, constant: bool) -> bool:
        return self.is_one(slots)
