"""Two verbs: `dispatch` says where each unit goes, `combine` brings the experts' outputs home.

Axes: B images, T tokens of an image, D channels, R routed units, K chosen experts, N experts, U tokens of a unit (T
when whole images are routed, 1 when tokens are), S = R * K places sorted by expert. No unit is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vimoe.moe.chunks import blocks
from vimoe.moe.routing import Routing


@dataclass(frozen=True)
class Dispatch:
    """Where the units of a batch go.

    Attributes:
        source: (S,) the unit at each place.
        home: (R, K) the place of each unit's choices.
        load: (N,) places of each expert.
    """

    source: Tensor
    home: Tensor
    load: Tensor


def dispatch(routing: Routing) -> Dispatch:
    """Sorts the choices by expert. Nothing is copied yet."""
    chosen = routing.experts.flatten()
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
    if chosen.shape[0] == 1 and not tracing:  # one image for one expert; a trace would be of one image for ever
        first = torch.zeros_like(chosen)
        return Dispatch(first, first.view_as(routing.experts), routing.load)
    order = chosen.argsort(stable=True)
    home = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    return Dispatch(order // routing.experts.shape[1], home.view_as(routing.experts), routing.load)


def combine(y_SUD: Tensor, gates_RK: Tensor, home_RK: Tensor, shared_RUD: Tensor | None, mix: bool) -> Tensor:
    """(R, U, D), in the type of y: S + sum_k g_k E_k with S the shared expert; with `mix`, S + sum_k g_k (E_k - S).

    The sum is in the type of the gates and rounded once, so that "mix" keeps the parent's function in bfloat16 too.
    For the backward pass one tensor is kept, what the gates multiply; neither y nor S.

    Args:
        y_SUD: what the experts say, place by place.
        gates_RK: the weight of each choice, in float32 or float64.
        home_RK: the place of each choice.
        shared_RUD: what the shared expert says, or None.
        mix: only with a shared expert.
    """
    keep = torch.is_grad_enabled() and gates_RK.requires_grad
    out_RUD: Tensor = _sum(y_SUD, gates_RK, home_RK, shared_RUD, mix, keep)[0]
    return out_RUD


@torch.library.custom_op("vimoe::combine", mutates_args=())
def _sum(y: Tensor, gates: Tensor, home: Tensor, shared: Tensor | None, mix: bool, keep: bool) -> tuple[Tensor, Tensor]:
    """The sum, and (R, K, U, D) what the gates multiplied, where that is to be kept."""
    units, chosen = home.shape
    out = y.new_empty(units, *y.shape[1:])
    terms = y.new_empty(units, chosen, *y.shape[1:]) if keep else y.new_empty(0)
    for at in blocks(out):
        total = start = (torch.zeros_like(out[at]) if shared is None else shared[at]).to(gates.dtype)
        for k in range(chosen):
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
    dout: Tensor, gates: Tensor, home: Tensor, terms: Tensor, of_gates: bool, of_shared: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of y; of the gates, for which the terms are needed; and of the shared expert in a mix."""
    units, chosen = home.shape
    dy = dout.new_empty(units * chosen, *dout.shape[1:])
    dgates = torch.empty_like(gates) if of_gates else gates.new_empty(0)
    dshared = torch.empty_like(dout) if of_shared else dout.new_empty(0)
    for at in blocks(dout):
        d = dout[at].to(gates.dtype)
        for k in range(chosen):
            dy.index_copy_(0, home[at, k], (d * gates[at, k, None, None]).to(dy.dtype))
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
    dout: Tensor, gates: Tensor, home: Tensor, terms: Tensor, of_gates: bool, of_shared: bool
) -> tuple[Tensor, Tensor, Tensor]:
    none = dout.new_empty(0)
    return (
        dout.new_empty(home.numel(), *dout.shape[1:]),
        torch.empty_like(gates) if of_gates else gates.new_empty(0),
        torch.empty_like(dout) if of_shared else none,
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, gates, home, _, ctx.mix, _ = inputs
    ctx.save_for_backward(gates, home, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros as large as the terms


def _derive(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 6
    gates, home, terms = ctx.saved_tensors
    _, needs_gates, _, needs_shared, *_ = ctx.needs_input_grad
    dy, dgates, dshared = _gradient(dout.contiguous(), gates, home, terms, needs_gates, ctx.mix and needs_shared)
    return (
        dy,
        dgates if needs_gates else None,
        None,
        (dshared if ctx.mix else dout) if needs_shared else None,
        None,
        None,
    )


_sum.register_autograd(_derive, setup_context=_keep)
