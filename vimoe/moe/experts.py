"""N FFNs of one shape with their weights stacked; nothing about routing.

Axes: N experts, R units given, U rows of a unit, S places sorted by expert, D channels, F hidden units.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimoe.moe import ffn
from vimoe.moe.grouped_linear import Backend, grouped_linear


class Stacked(nn.Module):
    """The weights of one layer (a linear map or a LayerNorm) of all experts: weight (N, ...), bias (N, ...)."""

    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None, num_experts: int) -> None:
        super().__init__()
        self.weight = _repeated(weight, num_experts)
        self.register_parameter("bias", None if bias is None else _repeated(bias, num_experts))

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, bias={self.bias is not None}"


class Experts(nn.Module):
    """N copies of a dense FFN, which drift apart as they are trained on different rows.

    Args:
        dense: the FFN.
        num_experts: N.
        dropout: rate on the hidden units; where the FFN has a larger one, that one holds.

    Attributes:
        backend: how products are computed (`vimoe.set_backend`); it is of this process, and not saved.

    Raises:
        SurgeryError: where the FFN has a part that experts could not reproduce.
    """

    def __init__(self, dense: nn.Module, num_experts: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.kind = ffn.describe(dense)
        self.backend: Backend = "auto"
        weights = ffn.read(dense)
        self.fc1 = Stacked(weights["fc1.weight"], weights.get("fc1.bias"), num_experts)
        self.act = copy.deepcopy(self.kind.act)
        self.drop1 = nn.Dropout(max(self.kind.drop[0], dropout))
        has_norm = self.kind.norm_eps is not None
        self.norm = Stacked(weights["norm.weight"], weights["norm.bias"], num_experts) if has_norm else None
        self.fc2 = Stacked(weights["fc2.weight"], weights.get("fc2.bias"), num_experts)
        self.drop2 = nn.Dropout(self.kind.drop[1])

    def forward(self, x_RUD: Tensor, source_S: Tensor, load_N: Tensor) -> Tensor:
        """(R, U, D) to (S, U, D): each expert computes its places; arguments as those of `grouped_linear`."""
        hidden = self._linear(self.fc1, x_RUD, source_S, load_N)
        if self.kind.gated:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = self.act(gate) * value
        else:
            hidden = self.act(hidden)
        hidden = self.drop1(hidden)
        if self.norm is not None:
            hidden = self._normalised(self.norm, hidden, load_N)
        rows: Tensor = self.drop2(self._linear(self.fc2, hidden, None, load_N))
        return rows

    def _linear(self, layer: Stacked, x: Tensor, source: Tensor | None, load: Tensor) -> Tensor:
        return grouped_linear(x, layer.weight, layer.bias, source, load, self.backend)

    def _normalised(self, norm: Stacked, hidden: Tensor, load_N: Tensor) -> Tensor:
        """LayerNorm, with the scale and shift of each place's expert; rounded once, as a LayerNorm is."""
        assert norm.bias is not None
        assert self.kind.norm_eps is not None
        expert_S = torch.repeat_interleave(load_N, output_size=hidden.shape[0])
        precise = torch.promote_types(hidden.dtype, torch.float32)
        scale, shift = (F.embedding(expert_S, part)[:, None].to(precise) for part in (norm.weight, norm.bias))
        normal = F.layer_norm(hidden.to(precise), (self.kind.hidden,), eps=self.kind.norm_eps)
        return torch.addcmul(shift, normal, scale).to(hidden.dtype)

    @property
    def macs(self) -> int:
        """Multiply-adds of one expert for one token."""
        return self.fc1.weight[0].numel() + self.fc2.weight[0].numel()

    def weights(self, expert: int) -> ffn.Weights:
        """The canonical weights of one expert, as views."""
        return {name: stacked.detach()[expert] for name, stacked in self.named_parameters()}


def _repeated(value: Tensor, num_experts: int) -> nn.Parameter:
    return nn.Parameter(value.detach().expand(num_experts, *value.shape).clone(memory_format=torch.contiguous_format))
