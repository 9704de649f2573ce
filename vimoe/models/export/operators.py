"""vimoe's own operators in terms of torch's, so that an exported program needs torch alone, and translates to ONNX.

Axes: R rows that are routed (images or tokens), U tokens of a row, S slots in the order of their experts, I channels
in, O channels out, D channels, K slots of a row, N experts, r rank.

Sorted slots are split by the experts' loads, and each expert gets its part, be it empty: an empty matrix product costs
nothing, so only chosen experts compute, at any batch, without control flow. Each matrix is a constant of the program,
so a runtime can pack or quantise it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vimoe.moe.dispatch
import vimoe.moe.low_rank_linear
import vimoe.moe.router  # noqa: F401  these modules register the operators


def grouped_linear(
    x_RUI: Tensor, weight_NOI: Tensor, bias_NO: Tensor | None, source_S: Tensor | None, load_N: Tensor, backend: str
) -> Tensor:
    """(R, U, I) to (S, U, O); see `vimoe.moe.grouped_linear.grouped_linear`."""
    x_SUI = x_RUI if source_S is None else x_RUI.index_select(0, source_S)
    biases = [None] * len(weight_NOI) if bias_NO is None else list(bias_NO.unbind())
    parts = zip(split(x_SUI, load_N), weight_NOI.unbind(), biases, strict=True)
    return torch.cat([F.linear(part, weight, bias) for part, weight, bias in parts])


def low_rank_linear(
    x_SUI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_NrI: Tensor, b_NOr: Tensor, load_N: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """(S, U, I) to (S, U, O), and the product of low rank; see `vimoe.moe.low_rank_linear.low_rank_linear`."""
    low_SUr = grouped_linear(x_SUI, a_NrI, None, None, load_N, backend)
    change_SUO = grouped_linear(low_SUr, b_NOr, None, None, load_N, backend)
    return F.linear(x_SUI, weight_OI, bias_O) + change_SUO, low_SUr


def combine(
    y_SUD: Tensor, gates_RK: Tensor, home_RK: Tensor, shared_RUD: Tensor | None, mix: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """(R, U, D), and no terms, as there is no gradient; see `vimoe.moe.dispatch.combine`."""
    start_RUD = None if shared_RUD is None else shared_RUD.to(gates_RK.dtype)
    total_RUD = start_RUD
    for home_R, gate_R in zip(home_RK.unbind(1), gates_RK.unbind(1), strict=True):
        term_RUD = y_SUD.index_select(0, home_R).to(gates_RK.dtype)
        if mix and start_RUD is not None:
            term_RUD = term_RUD - start_RUD
        term_RUD = gate_R[:, None, None] * term_RUD
        total_RUD = term_RUD if total_RUD is None else total_RUD + term_RUD
    assert total_RUD is not None
    return total_RUD.to(y_SUD.dtype), y_SUD.new_empty(0)


def scores(feature_RD: Tensor, weight_ND: Tensor) -> Tensor:
    """(R, N), in the type of the weight; see `vimoe.moe.router.scores`."""
    return F.linear(feature_RD.to(weight_ND.dtype), weight_ND)


def split(x_SUI: Tensor, load_N: Tensor) -> tuple[Tensor, ...]:
    """Return the part (load, U, I) of each expert."""
    sizes: list[Any] = load_N.tolist()
    for size in sizes:
        torch._check(size >= 0)
    return x_SUI.split(sizes)


PLAIN: dict[torch._ops.OperatorBase, Callable[..., Any]] = {
    torch.ops.vimoe.grouped_linear.default: grouped_linear,
    torch.ops.vimoe.low_rank_linear.default: low_rank_linear,
    torch.ops.vimoe.combine.default: combine,
    torch.ops.vimoe.scores.default: scores,
}
