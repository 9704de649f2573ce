"""The FFNs that vimoe can read and write, in one layout for all of them.

Axes: D channels, F hidden units. The canonical weights of an FFN are

    fc1.weight (F, D) or, gated, (2F, D): the gate's F rows first, then the value's      fc1.bias likewise
    norm.weight, norm.bias (F,): only where the FFN has a LayerNorm between its matrices
    fc2.weight (D, F)    fc2.bias (D,)

and it computes fc2(norm(act(fc1(x)))), or fc2(norm(act(gate) * value)) where it is gated. A new kind of FFN is one
more entry in `_KINDS`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from vimoe.errors import SurgeryError

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class FFN:
    """What an FFN is, apart from its weights."""

    dim: int
    hidden: int
    gated: bool
    act: nn.Module
    norm_eps: float | None
    drop: tuple[float, float]


@dataclass(frozen=True)
class _Kind:
    """How one class of FFN maps to the canonical layout and back."""

    linears: tuple[str, ...]
    gated: bool
    read: Callable[[nn.Module], Weights]
    write: Callable[[nn.Module, Weights], Weights]  # canonical weights -> the module's own names


def _own(module: nn.Module) -> Weights:
    return dict(module.named_parameters())


def _halves_swapped(weights: Weights) -> Weights:
    swap = {name: torch.cat(w.chunk(2)[::-1]) for name, w in weights.items() if name.startswith("fc1.")}
    return {**weights, **swap}


def _glu(module: nn.Module, weights: Weights) -> Weights:
    return _halves_swapped(weights) if module.gate_last else dict(weights)


def _join_swiglu(module: nn.Module) -> Weights:
    own = _own(module)
    joined = {f"fc1.{k}": torch.cat([own.pop(f"fc1_g.{k}"), own.pop(f"fc1_x.{k}")]) for k in _kinds_of("fc1_g", own)}
    return {**joined, **own}


def _split_swiglu(module: nn.Module, weights: Weights) -> Weights:
    own = dict(weights)
    for k in _kinds_of("fc1", weights):
        own[f"fc1_g.{k}"], own[f"fc1_x.{k}"] = own.pop(f"fc1.{k}").chunk(2)
    return own


def _kinds_of(layer: str, weights: Weights) -> list[str]:
    return [k for k in ("weight", "bias") if f"{layer}.{k}" in weights]


_KINDS: dict[type[nn.Module], _Kind] = {
    Mlp: _Kind(("fc1", "fc2"), False, _own, lambda module, weights: dict(weights)),
    GluMlp: _Kind(("fc1", "fc2"), True, lambda module: _glu(module, _own(module)), _glu),
    SwiGLU: _Kind(("fc1_g", "fc1_x", "fc2"), True, _join_swiglu, _split_swiglu),
}


def is_ffn(module: nn.Module) -> bool:
    """Whether the module is of a known class, whatever stands in it; `describe` says whether it can be read."""
    return type(module) in _KINDS


def describe(module: Any) -> FFN:
    """Reads what an FFN is.

    Raises:
        SurgeryError: for a part that experts could not reproduce, such as a quantised or adapted matrix.
    """
    kind = _KINDS[type(module)]
    for name in kind.linears:
        linear = getattr(module, name)
        if type(linear) is not nn.Linear or hasattr(linear, "parametrizations"):
            raise SurgeryError(
                f"{name} is a {type(linear).__name__}: expected a plain nn.Linear; merge adapters and remove "
                f"quantisation or parametrisations first"
            )
    first = getattr(module, kind.linears[0])
    if first.in_features != module.fc2.out_features:
        raise SurgeryError(
            f"it maps {first.in_features} channels to {module.fc2.out_features}: expected as many out as in"
        )
    known = {f"{layer}.{part}" for layer in (*kind.linears, "norm") for part in ("weight", "bias")}
    if unknown := sorted(name for name, _ in module.named_parameters() if name not in known):
        act = type(module.act).__name__
        raise SurgeryError(f"it has the parameter {unknown[0]} (its activation is {act}): expected matrices and a norm")
    norm = module.norm
    if not isinstance(norm, (nn.Identity, nn.LayerNorm)):
        raise SurgeryError(f"norm is a {type(norm).__name__}: expected a LayerNorm or none between the matrices")
    if isinstance(norm, nn.LayerNorm) and (norm.weight is None or norm.bias is None):
        raise SurgeryError("norm has no weight or no bias: expected a LayerNorm with both")
    return FFN(
        dim=module.fc2.out_features,
        hidden=module.fc2.in_features,
        gated=kind.gated,
        act=module.act,
        norm_eps=norm.eps if isinstance(norm, nn.LayerNorm) else None,
        drop=(module.drop1.p, module.drop2.p),
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called with the module's forward, or a part's, that a module in its place would not call."""
    return any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in module.modules())


def read(module: nn.Module) -> Weights:
    """The canonical weights of an FFN; tensors may be the module's own, so copy before changing them."""
    return _KINDS[type(module)].read(module)


def macs(module: Any) -> int:
    """Multiply-adds of an FFN for one token."""
    return sum(w.numel() for name, w in read(module).items() if name in ("fc1.weight", "fc2.weight"))


def hidden(kind: FFN, weights: Weights, x: Tensor) -> Tensor:
    """(..., D) to (..., F): what the last matrix of an FFN with these weights gets, without dropout."""
    first = F.linear(x, weights["fc1.weight"], weights.get("fc1.bias"))
    if kind.gated:
        gate, value = first.chunk(2, dim=-1)
        first = kind.act(gate) * value
    else:
        first = kind.act(first)
    if kind.norm_eps is None:
        return first
    return F.layer_norm(first, (kind.hidden,), weights["norm.weight"], weights["norm.bias"], kind.norm_eps)


def build(like: nn.Module, weights: Weights) -> nn.Module:
    """A new FFN of the class of `like` that holds these canonical weights; its width F is taken from them.

    The weights become its parameters bit for bit, on their own device and in their own type, and are trained where
    those of `like` are.
    """
    module = copy.deepcopy(like)
    for name, value in _KINDS[type(like)].write(like, weights).items():
        layer_name, kind = name.rsplit(".", 1)
        layer = module.get_submodule(layer_name)
        copied = value.detach().clone(memory_format=torch.contiguous_format)
        setattr(layer, kind, nn.Parameter(copied, requires_grad=getattr(layer, kind).requires_grad))
        if isinstance(layer, nn.Linear) and kind == "weight":
            layer.out_features, layer.in_features = value.shape
        if isinstance(layer, nn.LayerNorm):
            layer.normalized_shape = tuple(value.shape)
    return module


def widen(module: nn.Module, times: int) -> nn.Module:
    """An FFN of `times` the width that computes what this one does.

    The first matrix is tiled and the last one filled up with zeros, so that the result is exact and the copies
    drift apart in training: had each of them 1/times of the last matrix, they would get equal gradients for ever.
    A LayerNorm between the matrices sees tiled hidden units, whose mean and variance are the same.
    """
    halves = 1 + describe(module).gated
    wide = dict(read(module))
    for name, w in wide.items():
        if name.startswith("fc1."):
            wide[name] = torch.cat([part for half in w.chunk(halves) for part in [half] * times])
        elif name.startswith("norm."):
            wide[name] = torch.cat([w] * times)
        elif name == "fc2.weight":
            wide[name] = torch.cat([w] + [torch.zeros_like(w)] * (times - 1), dim=1)
    return build(module, wide)


def narrow(module: nn.Module, times: int) -> nn.Module:
    """The inverse of `widen` as long as the added units say nothing; once they do, the module itself."""
    if times == 1:
        return module
    ffn, slim = describe(module), dict(read(module))
    halves = 1 + ffn.gated
    first, *added = slim["fc2.weight"].chunk(times, dim=1)
    say_nothing = not any(part.any() for part in added)
    tiled = True
    slim["fc2.weight"] = first
    for name, w in slim.items():
        if name.startswith(("fc1.", "norm.")):
            tiles = [half.chunk(times) for half in w.chunk(halves if name.startswith("fc1.") else 1)]
            tiled &= all(torch.equal(tile, half[0]) for half in tiles for tile in half[1:])
            slim[name] = torch.cat([half[0] for half in tiles])
    # silent units still count in the mean and variance of a LayerNorm over all of them, unless they are copies
    return build(module, slim) if say_nothing and (tiled or ffn.norm_eps is None) else module


def hidden_units(weights: Weights, gated: bool) -> Tensor:
    """(F, P), float32 at least: row f holds the P weights, of those given, that belong to hidden unit f alone.

    They are its row of fc1 (of both halves where it is gated) and of norm, and its column of fc2.weight.
    """
    parts: list[Tensor] = []
    for name, w in sorted(weights.items()):  # FFNs of one shape are compared, whatever order their weights come in
        if name.startswith("fc1."):
            parts += w.chunk(1 + gated)
        elif name.startswith("norm."):
            parts.append(w)
        elif name == "fc2.weight":
            parts.append(w.T)
    units = torch.cat([part.detach().reshape(len(part), -1) for part in parts], dim=1)
    return units.to(torch.promote_types(units.dtype, torch.float32))


@torch.no_grad()
def match(weights: Weights, reference: Weights, gated: bool) -> Weights:
    """The same FFN with its hidden units in the order that is nearest to those of `reference`.

    Hidden units may change places without any change of what the FFN computes. Of all orders this one has the least
    sum of squared distances between the two FFNs' `hidden_units`: weight matching (Ainsworth et al., Git Re-Basin,
    arXiv 2209.04836, section 3.2), for one hidden layer a linear assignment and so solved exactly.

    Args:
        weights: canonical weights; they are not changed.
        reference: canonical weights of an FFN of the same class and shape.
        gated: as in `FFN`.
    """
    units_FP, target_FP = hidden_units(weights, gated), hidden_units(reference, gated)
    # A common shift changes no distance, and the products of what units have in common would round away the rest.
    shift_P = target_FP.mean(dim=0)
    units_FP, target_FP = units_FP - shift_P, target_FP - shift_P
    # |a - b|^2 = |a|^2 + |b|^2 - 2ab, of which the order changes ab alone
    with torch.autocast(units_FP.device.type, enabled=False):
        similarity_FF = (target_FP @ units_FP.T).nan_to_num()
    order = torch.from_numpy(linear_sum_assignment(similarity_FF.cpu().numpy(), maximize=True)[1]).to(units_FP.device)
    # units move for a gain only: rounding shall not swap twins, and what has diverged (NaN) has no order
    if not (target_FP - units_FP[order]).square().sum() < (target_FP - units_FP).square().sum():
        return weights
    return _reordered(weights, order, gated)


def _reordered(weights: Weights, order: Tensor, gated: bool) -> Weights:
    """Hidden unit f becomes what unit order[f] was."""
    new = dict(weights)
    for name, w in weights.items():
        if name.startswith("fc1."):
            new[name] = torch.cat([half[order] for half in w.chunk(1 + gated)])
        elif name.startswith("norm."):
            new[name] = w[order]
        elif name == "fc2.weight":
            new[name] = w[:, order]
    return new


def average(parts: Sequence[Weights], shares: Sequence[float], scale: float = 1.0) -> Weights:
    """The mean of FFNs weighted by `shares`, which sum to 1, with the output multiplied by `scale`.

    Taken as differences to the first one, so that the mean of equal FFNs is that FFN bit for bit.
    """
    first, *others = parts
    mean = {
        name: w + sum(s * (o[name] - w) for s, o in zip(shares[1:], others, strict=True)) for name, w in first.items()
    }
    return {name: w * scale if name.startswith("fc2.") and scale != 1 else w for name, w in mean.items()}
