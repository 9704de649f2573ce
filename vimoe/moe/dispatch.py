"""Dispatch: sort the filled slots by expert. Combine: add the experts' outputs up, row by row.

Axes: D channels, R rows that are routed (images or tokens), K slots of a row, N experts, U tokens of a row (1 if tokens
are routed), S filled slots in the order of their experts. No token is dropped here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vimoe.moe.chunks import chunks
from vimoe.moe.routing import Routing


@dataclass(frozen=True)
class Dispatch:
    """Order of the slots by expert, where every row fills all of its K slots.

    Attributes:
        source: (S,) index of the row that each sorted slot belongs to; S = R * K.
        load: (N,) number of slots of each expert.
        gates: (R, K) weight of each slot, in float32 or float64.
        position: (R, K) index of each slot in the sorted order.
    """

    source: Tensor
    load: Tensor
    gates: Tensor
    position: Tensor

    def combine(self, y_SUD: Tensor, shared_RUD: Tensor | None, mix: bool) -> Tensor:
        """Return the outputs (R, U, D) of all rows; see `combine`."""
        return combine(y_SUD, self.gates, self.position, shared_RUD, mix)


@dataclass(frozen=True)
class RaggedDispatch:
    """Order of the filled slots by expert, where rows may fill any number of their slots.

    Attributes:
        source: (S,) index of the row that each sorted slot belongs to.
        load: (N,) number of slots of each expert.
        gates: (S,) weight of each sorted slot, in float32 or float64.
        rows: R.
    """

    source: Tensor
    load: Tensor
    gates: Tensor
    rows: int

    def combine(self, y_SUD: Tensor, shared_RUD: Tensor | None, mix: bool) -> Tensor:
        """Return the outputs (R, U, D) of all rows: the formula of `combine`, where the sum may have no term."""
        terms = y_SUD.to(self.gates.dtype)
        if shared_RUD is None:
            start = terms.new_zeros(self.rows, *terms.shape[1:])
        else:
            start = shared_RUD.to(self.gates.dtype)
        if mix:
            terms = terms - start.index_select(0, self.source)
        return start.index_add(0, self.source, self.gates[:, None, None] * terms).to(y_SUD.dtype)


def dispatch(routing: Routing) -> Dispatch | RaggedDispatch:
    """Sort the slots of a batch by expert. No token is copied yet."""
    if routing.ragged:
        pairs = routing.pairs
        order = pairs.expert.argsort(stable=True)
        return RaggedDispatch(pairs.row[order], routing.load, pairs.gate[order], routing.experts.shape[0])
    chosen = routing.experts.flatten()
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    if chosen.shape[0] == 1 and not tracing:  # one image for one expert; a trace would be of one image for ever
        first = torch.zeros_like(chosen)
        return Dispatch(first, routing.load, routing.gates, first.view_as(routing.experts))
    order = chosen.argsort(stable=True)
    position = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    source = order // routing.experts.shape[1]
    return Dispatch(source, routing.load, routing.gates, position.view_as(routing.experts))


def combine(y_SUD: Tensor, gates_RK: Tensor, position_RK: Tensor, shared_RUD: Tensor | None, mix: bool) -> Tensor:
    """(R, U, D), in the type of y: S + sum_k g_k E_k with S the shared expert; with `mix`, S + sum_k g_k (E_k - S).

    The sum is in the type of the gates and rounded once, so that "mix" keeps the parent's function in bfloat16 too.
    For the backward pass one tensor is kept, the factors of the gates; neither y nor S.

    Args:
        y_SUD: outputs of the experts.
        gates_RK: weight of each slot, in float32 or float64.
        position_RK: index in y of each slot; no index occurs twice if y needs a gradient.
        shared_RUD: outputs of the shared expert, or None.
        mix: True only with a shared expert.
    """
    keep = torch.is_grad_enabled() and gates_RK.requires_grad
    out_RUD: Tensor = _sum(y_SUD, gates_RK, position_RK, shared_RUD, mix, keep)[0]
    return out_RUD


@torch.library.custom_op("vimoe::combine", mutates_args=())
def _sum(y: Tensor, gates: Tensor, home: Tensor, shared: Tensor | None, mix: bool, keep: bool) -> tuple[Tensor, Tensor]:
    """Return the sum, and with `keep` the factors (R, K, U, D) of the gates.

    `home` is `position_RK`: exported programs know the argument by that name.
    """
    rows, slots = home.shape
    out = y.new_empty(rows, *y.shape[1:])
    terms = y.new_empty(rows, slots, *y.shape[1:]) if keep else y.new_empty(0)
    for at in chunks(out):
        total = start = (torch.zeros_like(out[at]) if shared is None else shared[at]).to(gates.dtype)
        for k in range(slots):
            term = y.index_select(0, home[at, k]).to(gates.dtype)
            if mix:
                term.sub_(start)
            if keep:
                terms[at, k] = term
            total = torch.addcmul(total, term, gates[at, k, None, None])
        out[at] = total
    return out, terms


@torch.library.custom_op("vimoe::combine_gradient", mutates_args=())
def _gradient(
    dout: Tensor, gates: Tensor, position: Tensor, terms: Tensor, of_gates: bool, of_shared: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of y, of the gates (from the kept terms), and of the shared expert in a mix."""
    rows, slots = position.shape
    dy = dout.new_empty(rows * slots, *dout.shape[1:])
    dgates = torch.empty_like(gates) if of_gates else gates.new_empty(0)
    dshared = torch.empty_like(dout) if of_shared else dout.new_empty(0)
    for at in chunks(dout):
        d = dout[at].to(gates.dtype)
        for k in range(slots):
            dy.index_copy_(0, position[at, k], (d * gates[at, k, None, None]).to(dy.dtype))
            if of_gates:
                dgates[at, k] = (d * terms[at, k]).sum((1, 2))
        if of_shared:
            dshared[at] = d * (1 - gates[at].sum(1))[:, None, None]
    return dy, dgates, dshared


@_sum.register_fake
def _(y: Tensor, gates: Tensor, home: Tensor, shared: Tensor | None, mix: bool, keep: bool) -> tuple[Tensor, Tensor]:
    return y.new_empty(home.shape[0], *y.shape[1:]), y.new_empty(*home.shape, *y.shape[1:]) if keep else y.new_empty(0)


@_gradient.register_fake
def _(
    dout: Tensor, gates: Tensor, position: Tensor, terms: Tensor, of_gates: bool, of_shared: bool
) -> tuple[Tensor, Tensor, Tensor]:
    none = dout.new_empty(0)
    return (
        dout.new_empty(position.numel(), *dout.shape[1:]),
        torch.empty_like(gates) if of_gates else gates.new_empty(0),
        torch.empty_like(dout) if of_shared else none,
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, gates, position, _, ctx.mix, _ = inputs
    ctx.save_for_backward(gates, position, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros as large as the terms


def _derive(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 6
    gates, position, terms = ctx.saved_tensors
    _, needs_gates, _, needs_shared, *_ = ctx.needs_input_grad
    dy, dgates, dshared = _gradient(dout.contiguous(), gates, position, terms, needs_gates, ctx.mix and needs_shared)
    return (
        dy,
        dgates if needs_gates else None,
        None,
        (dshared if ctx.mix else dout) if needs_shared else None,
        None,
        None,
    )


_sum.register_autograd(_derive, setup_context=_keep)
