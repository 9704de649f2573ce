"""`low_rank_linear`: one linear map for all slots, and for each expert a change of low rank of its matrix.

Axes: U tokens of a row, S slots in the order of their experts, I channels in, O channels out, N experts, r rank.

One operator (`vimoe::low_rank_linear`) computes both products, so that the second is added in place to the first: a
sum of two results would need one more tensor of the size of the output, which takes longer to fill than the product of
low rank takes to compute. The gradient of x has the same form, W^T changed by A^T B^T, and is the same operator.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vimoe.moe.autocast import in_type_of_autocast, own_type
from vimoe.moe.grouped_linear import (
    PRODUCTS,
    Backend,
    grouped_sum,
    input_gradient,
    operator,
    resolved,
    weight_gradient,
)


def low_rank_linear(
    x_SUI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    a_NrI: Tensor,
    b_NOr: Tensor,
    load_N: Tensor,
    backend: Backend,
) -> Tensor:
    """(S, U, I) to (S, U, O): x (W + B_e A_e)^T + bias with the expert e of each slot; types as in `grouped_linear`.

    Args:
        x_SUI: rows, sorted by expert.
        weight_OI: matrix W that all experts have in common.
        bias_O: bias that they have in common, or None.
        a_NrI: matrix A of each expert.
        b_NOr: matrix B of each expert.
        load_N: int64, number of slots of each expert; they sum to S.
        backend: name of the backend of the products of low rank; see `grouped_linear`.

    Raises:
        ConfigError: if the backend cannot compute this.
    """
    x_SUI = in_type_of_autocast(x_SUI)
    chosen = resolved(backend, x_SUI, a_NrI, b_NOr)
    y_SUO: Tensor = _product(x_SUI, weight_OI, bias_O, a_NrI, b_NOr, load_N, chosen)[0]
    return y_SUO


@operator("vimoe::low_rank_linear")
def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, load: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """Return y, and x A^T (S, U, r), which the gradient of B reads."""
    if not x.numel():
        return x.new_zeros(*x.shape[:2], weight.shape[0]), x.new_zeros(*x.shape[:2], a.shape[1])
    with own_type(x):
        x = x.contiguous()
        low = PRODUCTS[backend].product(x, a, None, None, load)
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        PRODUCTS[backend].add_product(y, low, b, load)
    return y, low


@_product.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, load: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:2], weight.shape[0]), x.new_empty(*x.shape[:2], a.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, a, b, load, ctx.backend = inputs
    _, needs_weight, _, needs_a, needs_b, *_ = ctx.needs_input_grad
    ctx.bias_type = None if bias is None else bias.dtype
    ctx.save_for_backward(x if needs_weight or needs_a else None, weight, a, b, load, output[1] if needs_b else None)
    ctx.mark_non_differentiable(output[1])


def _derive(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, a, b, load, low = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_a, needs_b, *_ = ctx.needs_input_grad
    everyone = load.sum()[None]  # W is the matrix of one expert that has all slots
    dx = dlow = None
    if needs_x:
        dx, dlow = _product(dy, weight.T, None, b.mT, a.mT, load, ctx.backend)
    elif needs_a:
        dlow = input_gradient(dy, b, None, load, dy.shape[0], ctx.backend)
    return (
        dx,
        weight_gradient(dy, x, None, everyone, weight[None], ctx.backend)[0] if needs_weight else None,
        grouped_sum(dy, everyone)[0].to(ctx.bias_type) if needs_bias else None,
        weight_gradient(dlow, x, None, load, a, ctx.backend) if needs_a else None,
        weight_gradient(dy, low, None, load, b, ctx.backend) if needs_b else None,
        None,
        None,
    )


_product.register_autograd(_derive, setup_context=_keep)


@register_flop_formula(torch.ops.vimoe.low_rank_linear)
def _flops(x: torch.Size, weight: torch.Size, _: Any, a: torch.Size, b: torch.Size, *__: Any, **___: Any) -> int:
    return 2 * x[:2].numel() * (weight.numel() + a[1:].numel() + b[1:].numel())
