"""The contract of experts: N functions of tokens that start as one dense FFN.

Axes: N experts, R rows that are routed (images or tokens), U tokens of a row, S slots in the order of their experts, D
channels, F hidden units.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimoe.config.moe import MoEConfig
from vimoe.moe import ffn
from vimoe.moe.ffn_weights import Weights
from vimoe.moe.grouped_linear import Backend


@dataclass(frozen=True)
class Role:
    """The part that a parameter plays in the experts.

    Attributes:
        matrix: True for a matrix, which has weight decay; False for a vector, such as a bias or a scale, which has
            none. Stacked vectors have two axes, so axes do not tell.
        per_expert: True if the first axis is that of the N experts; False for a base that all of them share.
    """

    matrix: bool
    per_expert: bool = True


class Experts(nn.Module):
    """Base of all kinds of experts: FFNs whose weights a subclass gives.

    A kind of experts is a subclass, and an entry in `vimoe.config.moe.EXPERTS`. The contract:

    - `roles` has a `Role` for each parameter and no other; `MoE` refuses kinds where they differ. Weight decay,
      activated parameters and `keep` follow from it. A tensor that must stay as it is should be a buffer:
      `train.train_only` of "moe" trains all parameters of a layer.
    - Right after `__init__` every expert computes what the dense FFN does, so that upcycling keeps the function.
    - `weights(e)` gives one expert as an FFN in the canonical layout of `vimoe.moe.ffn_weights`, and gradient goes
      through. Merging, packing for inference, comparison and this class's `forward` need no more.
    - A kind whose experts are no FFNs sets `are_ffns` to False and has `forward` and `macs` of its own in place of
      `weights`. It is not merged, not packed, and compared by its outputs alone.
    - A kind that gives each expert all its weights for itself says `separate`, and has `set_weights`, by which a start
      (`moe.init`) makes experts differ. The dense FFN that it gets is a part of the layer's with `moe.expert_width`.
    - With exactly one shared expert, `dense` is the module that becomes it. A kind may read its weights in `forward`;
      it holds the module unregistered, since the layer registers it, and returns it in `reads`.
    - A kind with buffers for each expert names them in `expert_buffers`.
    - Experts may be spread over processes (`vimoe.parallel`): `forward` then runs with the rows of some experts in
      place of the stacked tensors, and with as many loads. So it counts experts by these, not by `num_experts`, and
      every parameter gets a gradient, of zeros where all loads are zero.

    Attributes:
        expert_buffers: names of the buffers whose first axis is that of the N experts.
        are_ffns: True if `weights` is there.
        separate: True if `set_weights` is there.
        keeps_function: True if tests show that experts start as the dense FFN; else `vimoe.plan` measures it.
        num_experts: N.
        kind: the dense FFN apart from its weights.
        act: its activation.
        drop1, drop2: dropout on the hidden units and on the output.
        backend: backend of grouped products (`vimoe.set_backend`); it belongs to this process, and is not saved.

    Args:
        dense: the FFN.
        config: settings of the layer. Its `expert_dropout` holds on the hidden units unless the FFN has a larger rate.

    Raises:
        SurgeryError: if experts could not reproduce a part of the FFN.
    """

    expert_buffers: tuple[str, ...] = ()
    are_ffns = True
    separate = False
    keeps_function = False

    def __init__(self, dense: nn.Module, config: MoEConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        kind = ffn.describe(dense)
        self.act = copy.deepcopy(kind.act)
        self.kind = replace(kind, act=self.act)  # which follows this module to eval mode, other types and devices
        self.backend: Backend = "auto"
        self.drop1 = nn.Dropout(max(self.kind.drop[0], config.expert_dropout))
        self.drop2 = nn.Dropout(self.kind.drop[1])

    @property
    def roles(self) -> dict[str, Role]:
        """Role of each parameter, by its name in `named_parameters`."""
        raise NotImplementedError

    @property
    def reads(self) -> tuple[nn.Module, ...]:
        """Modules whose weights the experts read where they stand, such as the shared expert."""
        return ()

    @property
    def width(self) -> int:
        """Number of hidden units of an expert in `weights`; means are taken of experts as wide as the FFN."""
        return self.kind.hidden

    def weights(self, expert: int) -> Weights:
        """Return the canonical weights of one expert, as views where that can be."""
        raise NotImplementedError

    def stacked_weights(self) -> Weights:
        """Return the canonical weights of all experts, each with the N experts in front."""
        each = [self.weights(e) for e in range(self.num_experts)]
        return {name: torch.stack([weights[name] for weights in each]) for name in each[0]}

    def set_weights(self, expert: int, weights: Weights) -> None:
        """Copy canonical weights of the same shapes into one expert."""
        raise NotImplementedError

    def forward(self, x_RUD: Tensor, source_S: Tensor | None, load_N: Tensor) -> Tensor:
        """(R, U, D) to (S, U, D): the output of each slot's expert for the tokens of its row.

        Args:
            x_RUD: rows.
            source_S: int64, index of the row of each slot; slots are sorted by expert. A row may have any number of
                slots, none too. None if x is sorted already, so that S = R.
            load_N: int64, number of slots of each expert; they sum to S.
        """
        rows = x_RUD if source_S is None else x_RUD.index_select(0, source_S)
        parts = enumerate(rows.split(load_N.tolist()))
        outputs = [self.apply_weights(self.weights(e), part) for e, part in parts if len(part)]
        return torch.cat(outputs or [self.apply_weights(self.weights(0), rows)])

    def apply_weights(self, weights: Weights, x: Tensor) -> Tensor:
        """(..., D) to (..., D): the output of an FFN with these canonical weights, with the experts' dropout."""
        first = F.linear(x, weights["fc1.weight"], weights.get("fc1.bias"))
        hidden = ffn.activated(self.kind, weights, first, self.drop1)
        y: Tensor = self.drop2(F.linear(hidden, weights["fc2.weight"], weights.get("fc2.bias")))
        return y

    @property
    def macs(self) -> int:
        """Multiply-adds of one expert for one token."""
        weights = self.weights(0)
        return weights["fc1.weight"].numel() + weights["fc2.weight"].numel()

    def activated_params(self, experts: float) -> float:
        """Return the number of parameters that a token with this many experts uses; shared ones count once."""
        share = {name: experts / self.num_experts if role.per_expert else 1 for name, role in self.roles.items()}
        return sum(share[name] * p.numel() for name, p in self.named_parameters())

    def keep(self, kept: Sequence[int]) -> None:
        """Remove all other experts, in place."""
        for name in [name for name, role in self.roles.items() if role.per_expert]:
            layer, _, part = name.rpartition(".")
            stacked = self.get_parameter(name)
            chosen = nn.Parameter(stacked.detach()[list(kept)], requires_grad=stacked.requires_grad)
            setattr(self.get_submodule(layer), part, chosen)
        for name in self.expert_buffers:
            layer, _, part = name.rpartition(".")
            setattr(self.get_submodule(layer), part, self.get_buffer(name)[list(kept)])
        self.num_experts = len(kept)
