"""`grouped_linear`, the one product that experts are made of, in several ways behind one switch.

Axes: R units given, U rows of a unit, S places sorted by expert, I channels in, O channels out, N experts.

All ways are operators of torch (`vimoe::grouped_linear` and its two derivatives), so that torch.compile and
torch.export need not see the loop over experts, whose bounds only the data tells. The backward pass gathers its input
again where the forward pass did, because a sorted copy of the input would be kept for it otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vimoe.errors import ConfigError
from vimoe.moe.autocast import in_type_of_autocast, own_type

Backend = Literal["auto", "loop", "grouped_mm", "bmm"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


def grouped_linear(
    x_RUI: Tensor, weight_NOI: Tensor, bias_NO: Tensor | None, source_S: Tensor | None, load_N: Tensor, backend: Backend
) -> Tensor:
    """(R, U, I) to (S, U, O), in the type of x or of the autocast (not of float64), whatever that of the weights.

    Args:
        x_RUI: units.
        weight_NOI: a matrix for each expert.
        bias_NO: or None.
        source_S: int64, which unit of x stands at each place. The places are sorted by expert, and each unit has S / R
            of them, no two at one expert. None where x is sorted already, so that S = R.
        load_N: int64, the number of places of each expert.
        backend: how; "auto" is `choose`.

    Raises:
        ConfigError: for a backend that cannot compute this.
    """
    x_RUI = in_type_of_autocast(x_RUI)
    if backend == "auto":
        backend = choose(x_RUI, weight_NOI)
    elif backend == "grouped_mm" and (why := unfit_for_grouped_mm(x_RUI, weight_NOI)):
        raise ConfigError(f"backend 'grouped_mm' with {why}; choose 'loop' or 'auto'")
    y_SUO: Tensor = _product(x_RUI, weight_NOI, bias_NO, source_S, load_N, backend)
    return y_SUO


def choose(x: Tensor, weight: Tensor) -> Backend:
    """The backend for these operands: on a CPU by measurement, on a GPU by reasoning alone.

    On a CPU `grouped_mm` is a loop too, and padding costs more than a loop saves unless loads are equal (`vimoe bench
    layer`, with `--bench.load zipf` and without). On a GPU the loop has to wait for the loads; `grouped_mm` need not,
    and in bfloat16 has a kernel of its own on Hopper and data-centre Blackwell (elsewhere torch loops).
    """
    if x.is_cuda and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device)[0] in (9, 10):
        return "loop" if unfit_for_grouped_mm(x, weight) else "grouped_mm"
    return "loop"


def unfit_for_grouped_mm(x: Tensor, weight: Tensor) -> str | None:
    """What torch's grouped product cannot do here and what it could, or None."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{x.dtype}: expected float32, bfloat16 or float16"
    if any(size * x.itemsize % 16 for size in weight.shape[1:]):
        return f"matrices of {tuple(weight.shape[1:])} in {x.dtype}: expected rows and columns of whole 16 bytes"
    return None


class _Way(Protocol):
    """How a backend computes the product and its derivatives; x, dy and what is returned are contiguous."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, source: Tensor | None, load: Tensor) -> Tensor:
        """(S, U, O)."""

    def input_gradient(self, dy: Tensor, weight: Tensor, source: Tensor | None, load: Tensor, units: int) -> Tensor:
        """(R, U, I), in the type of dy."""

    def weight_gradient(self, dy: Tensor, x: Tensor, source: Tensor | None, load: Tensor, weight: Tensor) -> Tensor:
        """(N, O, I), in the type of the weights; 0 for idle experts."""


class _Loop:
    """One expert after the other, its rows gathered just before they are multiplied. Idle experts cost nothing."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, source: Tensor | None, load: Tensor) -> Tensor:
        y = x.new_empty(_places(x, source), x.shape[1], weight.shape[1])
        for e, at in experts_with_units(load):
            rows, w, out = rows_at(x, source, at), weight[e].to(x.dtype).T, rows_at(y, None, at)
            if bias is None:
                torch.mm(rows, w, out=out)
            else:
                torch.addmm(bias[e].to(x.dtype), rows, w, out=out)
        return y

    def input_gradient(self, dy: Tensor, weight: Tensor, source: Tensor | None, load: Tensor, units: int) -> Tensor:
        dx = dy.new_empty(units, dy.shape[1], weight.shape[2])
        if source is not None and len(source) > units:
            dx.zero_()
        for e, at in experts_with_units(load):
            rows, w = rows_at(dy, None, at), weight[e].to(dy.dtype)
            if source is None:
                torch.mm(rows, w, out=rows_at(dx, None, at))
            elif len(source) == units:
                dx.index_copy_(0, source[at], (rows @ w).view(-1, *dx.shape[1:]))
            else:
                dx.index_add_(0, source[at], (rows @ w).view(-1, *dx.shape[1:]))
        return dx

    def weight_gradient(self, dy: Tensor, x: Tensor, source: Tensor | None, load: Tensor, weight: Tensor) -> Tensor:
        dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
        idle = set(range(len(dw)))
        for e, at in experts_with_units(load):
            left, right = rows_at(dy, None, at).T, rows_at(x, source, at)
            if dw.dtype == dy.dtype:
                torch.mm(left, right, out=dw[e])
            else:
                dw[e] = left @ right
            idle.remove(e)
        for e in idle:
            dw[e].zero_()
        return dw


class _GroupedMM:
    """torch's grouped matrix product, which knows no bias. It never waits for the loads."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, source: Tensor | None, load: Tensor) -> Tensor:
        rows, w = rows_at(x, source), weight.to(x.dtype).transpose(1, 2)
        y = F.grouped_mm(rows, w, offs=self._ends(load, x)).view(-1, x.shape[1], weight.shape[1])
        return y if bias is None else y.add_(bias.to(x.dtype)[_expert_of(load, len(y)), None])

    def input_gradient(self, dy: Tensor, weight: Tensor, source: Tensor | None, load: Tensor, units: int) -> Tensor:
        dx = F.grouped_mm(rows_at(dy, None), weight.to(dy.dtype), offs=self._ends(load, dy))
        return _home(dx.view(*dy.shape[:2], -1), source, units)

    def weight_gradient(self, dy: Tensor, x: Tensor, source: Tensor | None, load: Tensor, weight: Tensor) -> Tensor:
        dw = F.grouped_mm(rows_at(dy, None).T, rows_at(x, source), offs=self._ends(load, dy))
        # on Blackwell torch leaves those of idle experts as memory was (pytorch/pytorch issue 172439)
        return dw.to(weight.dtype).masked_fill_((load == 0)[:, None, None], 0)

    @staticmethod
    def _ends(load: Tensor, like: Tensor) -> Tensor:
        return (load * like.shape[1]).cumsum(0).to(torch.int32)


class _BMM:
    """One batched product of experts padded to the largest load; nothing is padded where loads are equal."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, source: Tensor | None, load: Tensor) -> Tensor:
        rows, slots = self._pad(x, source, load)
        w = weight.to(x.dtype).transpose(1, 2)
        y = torch.bmm(rows, w) if bias is None else torch.baddbmm(bias.to(x.dtype)[:, None], rows, w)
        return self._unpad(y, slots, x.shape[1])

    def input_gradient(self, dy: Tensor, weight: Tensor, source: Tensor | None, load: Tensor, units: int) -> Tensor:
        rows, slots = self._pad(dy, None, load)
        return _home(self._unpad(torch.bmm(rows, weight.to(dy.dtype)), slots, dy.shape[1]), source, units)

    def weight_gradient(self, dy: Tensor, x: Tensor, source: Tensor | None, load: Tensor, weight: Tensor) -> Tensor:
        left, _ = self._pad(dy, None, load)
        right, _ = self._pad(x, source, load)
        return torch.bmm(left.transpose(1, 2), right).to(weight.dtype)

    @staticmethod
    def _pad(x: Tensor, source: Tensor | None, load: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N, largest load * U, I), and the slot of each place where something is padded."""
        places, experts = _places(x, source), len(load)
        largest = int(load.max())
        if largest * experts == places:
            return rows_at(x, source).view(experts, largest * x.shape[1], -1), None
        expert = _expert_of(load, places)
        first = load.cumsum(0) - load
        slots = expert * largest + torch.arange(places, device=load.device) - first[expert]
        padded = x.new_zeros(experts * largest, *x.shape[1:])
        padded[slots] = x if source is None else x[source]
        return padded.view(experts, largest * x.shape[1], -1), slots

    @staticmethod
    def _unpad(y: Tensor, slots: Tensor | None, rows: int) -> Tensor:
        y = y.reshape(-1, rows, y.shape[-1])
        return y if slots is None else y[slots]


_WAYS: dict[str, _Way] = {"loop": _Loop(), "grouped_mm": _GroupedMM(), "bmm": _BMM()}


def _places(x: Tensor, source: Tensor | None) -> int:
    return x.shape[0] if source is None else source.shape[0]  # no len(): it would fix a size that is dynamic


def rows_at(x: Tensor, source: Tensor | None, at: slice = slice(None)) -> Tensor:
    """The rows of x that stand at these places: a view where x is sorted, or where they are one whole image."""
    if source is not None and not x.is_cuda and at.stop == (at.start or 0) + 1:  # a GPU would be waited for
        return x[int(source[at.start or 0])]
    units = x[at] if source is None else x.index_select(0, source[at])
    return units.view(-1, x.shape[-1])


def experts_with_units(load: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has units, and its places."""
    start = 0
    for e, units in enumerate(load.tolist()):
        if units:
            yield e, slice(start, start + units)
        start += units


def _expert_of(load: Tensor, places: int) -> Tensor:
    """(S,) the expert of each place."""
    return torch.repeat_interleave(load, output_size=places)


def _home(dx: Tensor, source: Tensor | None, units: int) -> Tensor:
    """(S, U, I) to (R, U, I): the sum over the places of each unit, in an order that is always the same."""
    if source is None:
        return dx
    at = source.argsort(stable=True)
    return dx.index_select(0, at).view(units, -1, *dx.shape[1:]).sum(1) if len(at) > units else dx.index_select(0, at)


_operator = functools.partial(
    torch.library.custom_op,
    mutates_args=(),
    tags=(torch.Tag.cudagraph_unsafe,),  # some backends wait for the loads, which a captured graph could not
)


@_operator("vimoe::grouped_linear")
def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, source: Tensor | None, load: Tensor, backend: str
) -> Tensor:
    if not x.numel():
        return x.new_zeros(_places(x, source), x.shape[1], weight.shape[1])
    return _WAYS[backend].product(x.contiguous(), weight, bias, source, load)


@_operator("vimoe::grouped_linear_input_gradient")
def _input_gradient(
    dy: Tensor, weight: Tensor, source: Tensor | None, load: Tensor, units: int, backend: str
) -> Tensor:
    if not dy.numel():
        return dy.new_zeros(units, dy.shape[1], weight.shape[2])
    with own_type(dy):
        return _WAYS[backend].input_gradient(dy.contiguous(), weight, source, load, units)


@_operator("vimoe::grouped_linear_weight_gradient")
def _weight_gradient(
    dy: Tensor, x: Tensor, source: Tensor | None, load: Tensor, weight: Tensor, backend: str
) -> Tensor:
    if not dy.numel():
        return torch.zeros_like(weight, memory_format=torch.contiguous_format)
    with own_type(dy):
        return _WAYS[backend].weight_gradient(dy.contiguous(), x.contiguous(), source, load, weight)


@_operator("vimoe::grouped_sum")
def _grouped_sum(dy: Tensor, load: Tensor) -> Tensor:
    """(S, U, O) to (N, O), summed over the rows of each expert."""
    sums = dy.new_zeros(len(load), dy.shape[-1])
    if dy.is_cuda:  # a product, so that nothing waits for the loads, and the order of the sum is always the same
        precise = torch.promote_types(dy.dtype, torch.float32)
        mine = F.one_hot(_expert_of(load, len(dy)), len(load)).to(precise)
        return sums.copy_(mine.T @ dy.sum(1, dtype=precise))
    for e, at in experts_with_units(load):
        torch.sum(dy[at], dim=(0, 1), out=sums[e])
    return sums


@_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, source: Tensor | None, load: Tensor, backend: str) -> Tensor:
    return x.new_empty(_places(x, source), x.shape[1], weight.shape[1])


@_input_gradient.register_fake
def _(dy: Tensor, weight: Tensor, source: Tensor | None, load: Tensor, units: int, backend: str) -> Tensor:
    return dy.new_empty(units, dy.shape[1], weight.shape[2])


@_weight_gradient.register_fake
def _(dy: Tensor, x: Tensor, source: Tensor | None, load: Tensor, weight: Tensor, backend: str) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@_grouped_sum.register_fake
def _(dy: Tensor, load: Tensor) -> Tensor:
    return dy.new_empty(load.shape[0], dy.shape[-1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, source, load, ctx.backend = inputs
    ctx.bias_type = None if bias is None else bias.dtype
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, source, load)
    ctx.units = x.shape[0]


def _derive(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, source, load = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    return (
        _input_gradient(dy, weight, source, load, ctx.units, ctx.backend) if needs_x else None,
        _weight_gradient(dy, x, source, load, weight, ctx.backend) if needs_weight else None,
        _grouped_sum(dy, load).to(ctx.bias_type) if needs_bias else None,
        None,
        None,
        None,
    )


_product.register_autograd(_derive, setup_context=_keep)


@register_flop_formula([torch.ops.vimoe.grouped_linear, torch.ops.vimoe.grouped_linear_input_gradient])
def _flops(rows: torch.Size, weight: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
    """For torch's counter: of x and y, or of dy and dx, those that stand sorted by expert tell the number of rows."""
    return 2 * max(rows[:2].numel(), out_shape[:2].numel()) * weight[1:].numel()


@register_flop_formula(torch.ops.vimoe.grouped_linear_weight_gradient)
def _weight_flops(dy: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
    return 2 * dy[:2].numel() * out_shape[1:].numel()
