"""Gradients of a router from the experts that were not chosen (`moe.router_gradient`); no output changes.

With g_j the gate of expert j as if all had been chosen (`Gate.of_all`), sg the stop of the gradient and v_j what stands
for the expert, the layer adds to its output the value 0,

    sum over experts j that were not chosen of (g_j - sg(g_j)) sg(v_j)

so the router learns what a token would have gained by another expert. The gates of chosen experts keep their values and
have the gradients of their g_i. So the router has the gradient of the dense mixture sum_j g_j v_j over all experts:
where gates sum to 1, experts that do the same give it none. In a "mix" with a shared expert v_j stands for E_j(x) -
S(x), else for E_j(x). It acts in training with gradient alone. Gates g come from scores without `router_noise`.

Axes: R rows that are routed (images or tokens), U tokens of a row, S filled slots in the order of their experts, N
experts, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from vimoe.moe.dispatch import Dispatch, RaggedDispatch
from vimoe.moe.experts import Experts
from vimoe.moe.routing import Routing, recomputing

DECAY = 0.99  # of the mean outputs, for each training step


def through(routing: Routing, gates_RN: Tensor) -> Routing:
    """Return the decisions with the same gates, whose gradient is that of these gates of all experts."""
    own_RK = gates_RN.gather(-1, routing.experts.clamp(min=0)) * (routing.experts >= 0)
    return replace(routing, gates=routing.gates.detach() + (own_RK - own_RK.detach()))


class Unchosen(nn.Module):
    """Base of what stands for the experts that were not chosen.

    Args:
        num_experts: N.
        dim: D.
        like: a weight of the FFN, for type and device.

    Attributes:
        moves: True if `forward` moves buffers, so that each process of a job has others.
    """

    moves = False

    def __init__(self, num_experts: int, dim: int, like: Tensor) -> None:
        super().__init__()

    def forward(
        self, gates_RN: Tensor, x_RUD: Tensor, y_SUD: Tensor, base_RUD: Tensor | None,
        sent: Dispatch | RaggedDispatch, experts: Experts,
    ) -> Tensor:  # fmt: skip
        """Return (R, U, D) or (R, 1, D) the value 0 that is to be added to the output.

        Args:
            gates_RN: gates of the experts that were not chosen, 0 for the others.
            x_RUD: rows.
            y_SUD: outputs of the chosen experts.
            base_RUD: what the experts' differences are taken to; None for 0.
            sent: order of the slots.
            experts: experts of the layer.
        """
        raise NotImplementedError

    def keep(self, kept: Sequence[int]) -> None:
        """Remove what belongs to all other experts, in place."""


class DefaultVectors(Unchosen):
    """v_j is a running mean of what expert j gave its tokens, one vector for all (Default MoE, arXiv 2504.12463).

    Each forward in training moves v_j from 0 towards the mean of the tokens that expert j got, by 1 - `DECAY`, and then
    uses it. An expert without tokens keeps its vector. Gradient checkpointing uses the vectors of the last forward, so
    with it each forward needs its backward before the next one. The source has no shared expert and means of E_j(x).
    With several processes the first one's vectors hold for all, as torch's data parallelism does with buffers.

    Attributes:
        mean: (N, D) v, float32 at least; a part of the model as weights are.
    """

    moves = True
    mean: Tensor

    def __init__(self, num_experts: int, dim: int, like: Tensor) -> None:
        super().__init__(num_experts, dim, like)
        precise = torch.promote_types(like.dtype, torch.float32)
        self.register_buffer("mean", torch.zeros(num_experts, dim, dtype=precise, device=like.device))

    def forward(
        self, gates_RN: Tensor, x_RUD: Tensor, y_SUD: Tensor, base_RUD: Tensor | None,
        sent: Dispatch | RaggedDispatch, experts: Experts,
    ) -> Tensor:  # fmt: skip
        """Return (R, 1, D) the value 0; see `Unchosen.forward`."""
        vectors_ND = self.mean.clone() if recomputing() else self._moved(y_SUD, base_RUD, sent)
        zero_RN = (gates_RN - gates_RN.detach()).to(vectors_ND.dtype)
        with torch.autocast(x_RUD.device.type, enabled=False):
            return (zero_RN @ vectors_ND)[:, None].to(x_RUD.dtype)

    @torch.no_grad()
    def _moved(self, y_SUD: Tensor, base_RUD: Tensor | None, sent: Dispatch | RaggedDispatch) -> Tensor:
        """Move the vectors. Return a copy, which the next step does not change."""
        sums_SD = y_SUD.sum(dim=1, dtype=self.mean.dtype)
        if base_RUD is not None:
            sums_SD = sums_SD - base_RUD.sum(dim=1, dtype=self.mean.dtype).index_select(0, sent.source)
        expert_S = torch.repeat_interleave(sent.load, output_size=sums_SD.shape[0])
        sums_ND = torch.zeros_like(self.mean).index_add_(0, expert_S, sums_SD)
        load_N1 = sent.load[:, None]
        moved_ND = self.mean.lerp(sums_ND / (load_N1 * y_SUD.shape[1]).clamp(min=1), 1 - DECAY)
        moved_ND = torch.where(load_N1 > 0, moved_ND, self.mean)
        self.mean.copy_(moved_ND)
        return moved_ND

    def keep(self, kept: Sequence[int]) -> None:
        """Remove the vectors of all other experts, in place."""
        self.mean = self.mean[list(kept)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.mean
        super()._apply(fn, recurse)
        if self.mean.dtype != torch.promote_types(self.mean.dtype, torch.float32):
            self.mean = before.to(self.mean.device)  # in bfloat16 its steps would be rounded away
        return self


class AllOutputs(Unchosen):
    """v_j is the output of expert j itself: all experts compute all rows, those for v without gradient (DenseMixer).

    A training step costs N passes through experts more, and keeps their outputs. Dropout in experts draws anew.
    """

    def forward(
        self, gates_RN: Tensor, x_RUD: Tensor, y_SUD: Tensor, base_RUD: Tensor | None,
        sent: Dispatch | RaggedDispatch, experts: Experts,
    ) -> Tensor:  # fmt: skip
        """Return (R, U, D) the value 0; see `Unchosen.forward`."""
        rows, n = gates_RN.shape
        with torch.no_grad():
            source_S = torch.arange(rows, device=x_RUD.device).repeat(n)
            v_NRUD = experts(x_RUD, source_S, torch.full_like(sent.load, rows)).view(n, *x_RUD.shape)
            if base_RUD is not None:
                v_NRUD = v_NRUD - base_RUD
        zero_RN = gates_RN - gates_RN.detach()
        total = torch.zeros_like(x_RUD, dtype=gates_RN.dtype)
        for zero_R, v_RUD in zip(zero_RN.unbind(dim=1), v_NRUD, strict=True):
            total = torch.addcmul(total, zero_R[:, None, None], v_RUD)
        return total.to(x_RUD.dtype)


KINDS: dict[str, type[Unchosen]] = {"default_vectors": DefaultVectors, "dense": AllOutputs}
