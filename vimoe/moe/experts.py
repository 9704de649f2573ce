"""N FFNs of one shape with their weights stacked; nothing about routing.

Axes: N experts, M rows sorted by expert, D channels, F hidden units.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimoe import ffn

Layer = tuple[Tensor, Tensor | None]  # weight and bias


class Stacked(nn.Module):
    """The weights of one layer (a linear map or a LayerNorm) of all experts: weight (N, ...), bias (N, ...)."""

    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None, num_experts: int) -> None:
        super().__init__()
        self.weight = _repeated(weight, num_experts)
        self.register_parameter("bias", None if bias is None else _repeated(bias, num_experts))

    def unbind(self) -> list[Layer]:
        """Weight and bias of each expert. One unbind, because N selects would have N full-size gradients."""
        biases = [None] * len(self.weight) if self.bias is None else self.bias.unbind()
        return list(zip(self.weight.unbind(), biases, strict=True))

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, bias={self.bias is not None}"


class Experts(nn.Module):
    """N copies of a dense FFN, which drift apart as they are trained on different rows.

    Args:
        dense: the FFN.
        num_experts: N.
        dropout: rate on the hidden units; where the FFN has a larger one, that one holds.

    Raises:
        SurgeryError: where the FFN has a part that experts could not reproduce.
    """

    def __init__(self, dense: nn.Module, num_experts: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.kind = ffn.describe(dense)
        weights = ffn.read(dense)
        self.fc1 = Stacked(weights["fc1.weight"], weights.get("fc1.bias"), num_experts)
        self.act = copy.deepcopy(self.kind.act)
        self.drop1 = nn.Dropout(max(self.kind.drop[0], dropout))
        has_norm = self.kind.norm_eps is not None
        self.norm = Stacked(weights["norm.weight"], weights["norm.bias"], num_experts) if has_norm else None
        self.fc2 = Stacked(weights["fc2.weight"], weights.get("fc2.bias"), num_experts)
        self.drop2 = nn.Dropout(self.kind.drop[1])

    def forward(self, x_MD: Tensor, counts: list[int]) -> Tensor:
        """Expert e computes the next counts[e] rows of x (M, D); returns (M, D) in the same order."""
        fc1, fc2 = self.fc1.unbind(), self.fc2.unbind()
        norm = self.norm.unbind() if self.norm else [None] * len(counts)
        return torch.cat([self._expert(*each) for each in zip(x_MD.split(counts), fc1, norm, fc2, strict=True)])

    def _expert(self, x: Tensor, fc1: Layer, norm: Layer | None, fc2: Layer) -> Tensor:
        hidden = F.linear(x, *fc1)
        if self.kind.gated:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = self.act(gate) * value
        else:
            hidden = self.act(hidden)
        hidden = self.drop1(hidden)
        if norm is not None and self.kind.norm_eps is not None:
            hidden = F.layer_norm(hidden, (self.kind.hidden,), norm[0], norm[1], self.kind.norm_eps)
        rows: Tensor = self.drop2(F.linear(hidden, *fc2))
        return rows

    @property
    def macs(self) -> int:
        """Multiply-adds of one expert for one token."""
        return self.fc1.weight[0].numel() + self.fc2.weight[0].numel()

    def weights(self, expert: int) -> ffn.Weights:
        """The canonical weights of one expert, as views."""
        return {name: stacked.detach()[expert] for name, stacked in self.named_parameters()}


def _repeated(value: Tensor, num_experts: int) -> nn.Parameter:
    return nn.Parameter(value.detach().expand(num_experts, *value.shape).clone(memory_format=torch.contiguous_format))
