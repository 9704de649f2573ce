"""The experts "ffn": N FFNs of one shape, each with weights of its own, stacked.

Axes: N experts, R rows that are routed (images or tokens), U tokens of a row, S slots in the order of their experts, D
channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimoe.config.moe import MoEConfig
from vimoe.moe import ffn
from vimoe.moe.experts import Experts, Role
from vimoe.moe.ffn_weights import Weights
from vimoe.moe.grouped_linear import grouped_linear


class Stacked(nn.Module):
    """Weights of one layer (a linear map or a LayerNorm) of all experts: weight (N, ...), bias (N, ...)."""

    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None, num_experts: int) -> None:
        super().__init__()
        self.weight = _repeated(weight, num_experts)
        self.register_parameter("bias", None if bias is None else _repeated(bias, num_experts))

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, bias={self.bias is not None}"


class StackedFFNs(Experts):
    """N copies of a dense FFN, which drift apart as they are trained on different tokens; see `Experts`."""

    separate = keeps_function = True

    def __init__(self, dense: nn.Module, config: MoEConfig) -> None:
        super().__init__(dense, config)
        weights, n = ffn.read(dense), config.num_experts
        self.fc1 = Stacked(weights["fc1.weight"], weights.get("fc1.bias"), n)
        has_norm = self.kind.norm_eps is not None
        self.norm = Stacked(weights["norm.weight"], weights["norm.bias"], n) if has_norm else None
        self.fc2 = Stacked(weights["fc2.weight"], weights.get("fc2.bias"), n)

    def forward(self, x_RUD: Tensor, source_S: Tensor | None, load_N: Tensor) -> Tensor:
        """(R, U, D) to (S, U, D) by grouped products; see `Experts.forward`."""
        hidden = self._linear(self.fc1, x_RUD, source_S, load_N)
        if self.kind.gated:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = self.act(gate) * value
        else:
            hidden = self.act(hidden)
        hidden = self.drop1(hidden)
        if self.norm is not None:
            hidden = self._normalised(self.norm, hidden, load_N)
        y_SUD: Tensor = self.drop2(self._linear(self.fc2, hidden, None, load_N))
        return y_SUD

    def _linear(self, layer: Stacked, x: Tensor, source: Tensor | None, load: Tensor) -> Tensor:
        return grouped_linear(x, layer.weight, layer.bias, source, load, self.backend)

    def _normalised(self, norm: Stacked, hidden: Tensor, load_N: Tensor) -> Tensor:
        """LayerNorm with the scale and shift of each slot's expert; rounded once, as a LayerNorm is."""
        assert norm.bias is not None
        assert self.kind.norm_eps is not None
        expert_S = torch.repeat_interleave(load_N, output_size=hidden.shape[0])
        precise = torch.promote_types(hidden.dtype, torch.float32)
        scale, shift = (F.embedding(expert_S, part)[:, None].to(precise) for part in (norm.weight, norm.bias))
        normal = F.layer_norm(hidden.to(precise), (self.kind.hidden,), eps=self.kind.norm_eps)
        return torch.addcmul(shift, normal, scale).to(hidden.dtype)

    @property
    def roles(self) -> dict[str, Role]:
        """Matrices are the weights of the two linear maps; biases and the norm's scale are vectors."""
        return {name: Role(matrix=name in ("fc1.weight", "fc2.weight")) for name, _ in self.named_parameters()}

    def weights(self, expert: int) -> Weights:
        """Return the canonical weights of one expert, as views."""
        return {name: stacked[expert] for name, stacked in self.named_parameters()}

    def stacked_weights(self) -> Weights:
        """Return the canonical weights of all experts, without a copy."""
        return dict(self.named_parameters())

    @torch.no_grad()
    def set_weights(self, expert: int, weights: Weights) -> None:
        """Copy canonical weights into one expert."""
        for name, stacked in self.named_parameters():
            stacked[expert] = weights[name]


def _repeated(value: Tensor, num_experts: int) -> nn.Parameter:
    return nn.Parameter(value.detach().expand(num_experts, *value.shape).clone(memory_format=torch.contiguous_format))
