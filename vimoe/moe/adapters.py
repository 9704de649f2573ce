"""The experts "adapter": one FFN, and beside it for each expert a small one.

Axes: N experts, R rows that are routed (images or tokens), U tokens of a row, S slots in the order of their experts, D
channels, F hidden units of the FFN, r of an adapter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimoe.config.moe import MoEConfig
from vimoe.errors import SurgeryError
from vimoe.moe import ffn
from vimoe.moe.ffn_weights import Weights
from vimoe.moe.grouped_linear import grouped_linear
from vimoe.moe.shared_base import SharedBase, rows_of
from vimoe.moe.stacked_ffns import Stacked


class AdapterExperts(SharedBase):
    """Experts E_i(x) = FFN(x) + up_i(act(down_i(x))), with r = `config.rank` hidden units; see `SharedBase`.

    The adapter (after arXiv 1902.00751, in parallel to the FFN) is of the FFN's own kind: it has the same activation,
    is gated where the FFN is, and has a bias on its hidden units where the FFN has one; up_i has none. So E_i is an FFN
    of width F + r, which is what `weights` returns. down_i starts as nn.Linear does, its bias and up_i at zero.

    Raises:
        SurgeryError: if the FFN has a norm between its matrices, which no further hidden units can stand beside.
    """

    def __init__(self, dense: nn.Module, config: MoEConfig) -> None:
        super().__init__(dense, config)
        if self.kind.norm_eps is not None:
            raise SurgeryError(
                "the FFN has a norm between its matrices: expected none with experts='adapter'; use 'lora' or 'delta'"
            )
        weights, n = ffn.read(dense), config.num_experts
        units = config.rank * (1 + self.kind.gated)
        weight, bias = weights["fc2.weight"].detach(), weights.get("fc1.bias")
        self.down = Stacked(weight.new_empty(units, self.kind.dim), None if bias is None else bias.new_zeros(units), n)
        nn.init.uniform_(self.down.weight, -(self.kind.dim**-0.5), self.kind.dim**-0.5)
        self.up = Stacked(weight.new_zeros(self.kind.dim, config.rank), None, n)

    def forward(self, x_RUD: Tensor, source_S: Tensor | None, load_N: Tensor) -> Tensor:
        """(R, U, D) to (S, U, D): all slots through the base, and grouped products for the adapters; see `Experts`."""
        base, x_SUD = ffn.read(self.base), rows_of(x_RUD, source_S)
        down = grouped_linear(x_SUD, self.down.weight, self.down.bias, None, load_N, self.backend)
        added = self.drop1(ffn.activated(self.kind, base, down))
        y_SUD = grouped_linear(added, self.up.weight, None, None, load_N, self.backend)
        hidden = self.drop1(ffn.hidden(self.kind, base, x_SUD))
        result: Tensor = self.drop2(F.linear(hidden, base["fc2.weight"], base.get("fc2.bias")).add_(y_SUD))
        return result

    def weights(self, expert: int) -> Weights:
        """Return the canonical weights of one expert, an FFN of width F + r."""
        weights = ffn.read(self.base)
        for name, own in self.down.named_parameters():
            halves = (part.chunk(1 + self.kind.gated) for part in (weights[f"fc1.{name}"], own[expert]))
            weights[f"fc1.{name}"] = torch.cat([part for pair in zip(*halves, strict=True) for part in pair])
        weights["fc2.weight"] = torch.cat([weights["fc2.weight"], self.up.weight[expert]], dim=1)
        return weights

    @property
    def width(self) -> int:
        """F + r, the number of hidden units of an expert."""
        return self.kind.hidden + self.up.weight.shape[2]
