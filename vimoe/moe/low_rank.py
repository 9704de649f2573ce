"""The experts "lora": one FFN, and for each expert a change of low rank of both matrices.

Axes: N experts, R rows that are routed (images or tokens), U tokens of a row, S slots in the order of their experts, D
channels, I channels in, O channels out, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vimoe.config.moe import MoEConfig
from vimoe.moe import ffn
from vimoe.moe.ffn_weights import Weights
from vimoe.moe.grouped_linear import Backend
from vimoe.moe.low_rank_linear import low_rank_linear
from vimoe.moe.shared_base import SharedBase, rows_of


class LowRank(nn.Module):
    """Changes B_e A_e of one matrix (O, I): a (N, r, I), b (N, O, r).

    As PEFT starts them: A Kaiming-uniform with a = sqrt(5), which is uniform within 1 / sqrt(I), and B zero.
    """

    def __init__(self, weight_OI: Tensor, num_experts: int, rank: int) -> None:
        super().__init__()
        outputs, inputs = weight_OI.shape
        self.a = nn.Parameter(weight_OI.new_empty(num_experts, rank, inputs).uniform_(-(inputs**-0.5), inputs**-0.5))
        self.b = nn.Parameter(weight_OI.new_zeros(num_experts, outputs, rank))

    def forward(
        self, x_SUI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, load_N: Tensor, backend: Backend
    ) -> Tensor:
        """(S, U, I) to (S, U, O): the linear map with this matrix, changed for each slot's expert, and this bias."""
        return low_rank_linear(x_SUI, weight_OI, bias_O, self.a, self.b, load_N, backend)

    def extra_repr(self) -> str:
        return f"a={tuple(self.a.shape)}, b={tuple(self.b.shape)}"


class LoRAExperts(SharedBase):
    """Experts whose matrices are W1 + B1_i A1_i and W2 + B2_i A2_i (LoRA, arXiv 2106.09685); see `SharedBase`.

    The rank r is `config.rank`. LoRA's factor alpha / r is 1, PEFT's with lora_alpha = r. Biases and a norm are those
    of the base. A gated FFN's first matrix is one here, gate and value together, so both have A1_i in common.
    """

    def __init__(self, dense: nn.Module, config: MoEConfig) -> None:
        super().__init__(dense, config)
        weights = ffn.read(dense)
        self.fc1, self.fc2 = (
            LowRank(weights[f"{layer}.weight"].detach(), config.num_experts, config.rank) for layer in ("fc1", "fc2")
        )

    def forward(self, x_RUD: Tensor, source_S: Tensor | None, load_N: Tensor) -> Tensor:
        """(R, U, D) to (S, U, D): products of all slots with the base, and grouped ones of rank r; see `Experts`."""
        base = ffn.read(self.base)

        def linear(layer: str, change: LowRank, x_SUI: Tensor) -> Tensor:
            y_SUO: Tensor = change(x_SUI, base[f"{layer}.weight"], base.get(f"{layer}.bias"), load_N, self.backend)
            return y_SUO

        x_SUD = rows_of(x_RUD, source_S)
        hidden = ffn.activated(self.kind, base, linear("fc1", self.fc1, x_SUD), self.drop1)
        y_SUD: Tensor = self.drop2(linear("fc2", self.fc2, hidden))
        return y_SUD

    def weights(self, expert: int) -> Weights:
        """Return the canonical weights of one expert; its matrices are computed."""
        weights = ffn.read(self.base)
        for layer, change in (("fc1.weight", self.fc1), ("fc2.weight", self.fc2)):
            weights[layer] = torch.addmm(weights[layer], change.b[expert], change.a[expert])
        return weights

    @property
    def macs(self) -> int:
        """Multiply-adds of one expert for one token: the base and the changes."""
        return ffn.macs(self.base) + sum(p[0].numel() for change in (self.fc1, self.fc2) for p in change.parameters())
