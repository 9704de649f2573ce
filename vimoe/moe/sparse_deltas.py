"""The experts "delta": one FFN, and for each expert a sparse change of both matrices.

Axes: N experts, R rows that are routed (images or tokens), U tokens of a row, S slots in the order of their experts, D
channels, I channels in, O channels out, P places of a matrix that an expert changes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vimoe.config.moe import MoEConfig
from vimoe.moe import ffn
from vimoe.moe.ffn_weights import Weights
from vimoe.moe.grouped_linear import grouped_linear
from vimoe.moe.shared_base import SharedBase


class SparseDeltas(nn.Module):
    """Changes of one matrix (O, I): trained values (N, P), zero at the start, at fixed places (N, P) of it, flattened.

    Each expert's places are drawn from torch's generator without replacement: a share `density` of all, at least 1.
    """

    places: Tensor

    def __init__(self, weight_OI: Tensor, num_experts: int, density: float) -> None:
        super().__init__()
        size = weight_OI.numel()
        changed = max(1, round(density * size))
        drawn = [torch.randperm(size, device=weight_OI.device)[:changed].sort().values for _ in range(num_experts)]
        self.register_buffer("places", torch.stack(drawn).to(torch.int32))
        self.values = nn.Parameter(weight_OI.new_zeros(num_experts, changed))

    def forward(self, weight_OI: Tensor, experts: slice = slice(None)) -> Tensor:
        """(O, I) to (N, O, I): the matrices of these experts."""
        values, places = self.values[experts], self.places[experts].long()
        flat = weight_OI.flatten().expand(len(values), -1)
        return flat.scatter_add(1, places, values).view(-1, *weight_OI.shape)

    def extra_repr(self) -> str:
        return f"values={tuple(self.values.shape)}"


class DeltaExperts(SharedBase):
    """Experts whose matrices are W + D_i, with D_i sparse (DeRS, arXiv 2503.01359); see `SharedBase`.

    D_i has a share `config.delta_density` of the weights, at places that stay as they were drawn. Biases and a norm are
    those of the base. The forward pass makes the N matrices of a layer for its own time: a sparse product of the
    tokens would save that memory, and takes longer. Multiply-adds are those of the dense FFN.
    """

    expert_buffers = ("fc1.places", "fc2.places")

    def __init__(self, dense: nn.Module, config: MoEConfig) -> None:
        super().__init__(dense, config)
        weights = ffn.read(dense)
        self.fc1, self.fc2 = (
            SparseDeltas(weights[f"{layer}.weight"].detach(), config.num_experts, config.delta_density)
            for layer in ("fc1", "fc2")
        )

    def forward(self, x_RUD: Tensor, source_S: Tensor | None, load_N: Tensor) -> Tensor:
        """(R, U, D) to (S, U, D) by grouped products with the experts' matrices; see `Experts.forward`."""
        base = ffn.read(self.base)

        def linear(layer: str, deltas: SparseDeltas, x: Tensor, source_S: Tensor | None) -> Tensor:
            weight_NOI, bias = deltas(base[f"{layer}.weight"]), base.get(f"{layer}.bias")
            bias_NO = None if bias is None else bias.expand(len(weight_NOI), -1)
            return grouped_linear(x, weight_NOI, bias_NO, source_S, load_N, self.backend)

        hidden = ffn.activated(self.kind, base, linear("fc1", self.fc1, x_RUD, source_S), self.drop1)
        y_SUD: Tensor = self.drop2(linear("fc2", self.fc2, hidden, None))
        return y_SUD

    def weights(self, expert: int) -> Weights:
        """Return the canonical weights of one expert; its matrices are computed."""
        weights = ffn.read(self.base)
        for layer, deltas in (("fc1.weight", self.fc1), ("fc2.weight", self.fc2)):
            weights[layer] = deltas(weights[layer], slice(expert, expert + 1))[0]
        return weights
