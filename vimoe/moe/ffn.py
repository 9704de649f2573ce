"""The FFNs that vimoe can read and write, in one layout for all of them (`vimoe.moe.ffn_weights` describes it).

A new class of FFN is one more entry in `KINDS`; classes of transformers are read from what they compute
(`vimoe.moe.traced_ffn`).

Axes: D channels, F hidden units.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ConvMlp, GluMlp, Mlp, SwiGLU
from torch import Tensor, nn
from torchvision.models.vision_transformer import MLPBlock
from torchvision.ops import MLP

from vimoe.errors import SurgeryError
from vimoe.moe import traced_ffn
from vimoe.moe.ffn_weights import Weights, scaled, take

_NOTED = "_vimoe_ffn_kind"


@dataclass(frozen=True)
class FFN:
    """Shape and parts of an FFN, without its weights.

    Attributes:
        dim: number D of channels.
        hidden: number F of hidden units.
        gated: True if it computes act(gate) * value.
        act: activation.
        norm_eps: epsilon of the LayerNorm between the matrices; None without one.
        drop: rates of the dropouts on the hidden units and on the output.
    """

    dim: int
    hidden: int
    gated: bool
    act: nn.Module
    norm_eps: float | None
    drop: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Names of the parts of one class of FFN, by which its weights are read and written in the canonical layout.

    Args:
        fc1: name of the first nn.Linear or 1x1 nn.Conv2d; for a gated FFN with two of them, the gate's name and the
            value's.
        fc2: name of the last one.
        act: name of the activation, a module.
        norm: name of the LayerNorm or nn.Identity between the matrices; None for a class without one.
        drops: names of the dropouts on the hidden units and on the output; None for a class without one.
        gated: True if it computes act(gate) * value.
        value_first: True for a module whose fc1 has the value's rows before the gate's.

    Example:
        >>> class FeedForward(nn.Sequential): ...
        >>> KINDS[FeedForward] = Kind(fc1=("0",), fc2="2", act="1")
        >>> sorted(read(FeedForward(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))))
        ['fc1.bias', 'fc1.weight', 'fc2.bias', 'fc2.weight']
    """

    fc1: tuple[str] | tuple[str, str] = ("fc1",)
    fc2: str = "fc2"
    act: str = "act"
    norm: str | None = None
    drops: tuple[str | None, str | None] = (None, None)
    gated: bool = False
    value_first: Callable[[Any], bool] = traced_ffn.gate_first

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of all its nn.Linear."""
        return (*self.fc1, self.fc2)

    def read(self, module: nn.Module) -> Weights:
        """Return the canonical weights of a module of this class."""
        own: Weights = {name: w.flatten(1) if w.ndim == 4 else w for name, w in module.named_parameters()}
        found: Weights = {}
        for part in ("weight", "bias"):
            names = [f"{each}.{part}" for each in self.fc1]
            halves = [own[name] for name in names if name in own]  # no := inside, which torch.compile cannot trace
            if halves:
                found[f"fc1.{part}"] = self._ordered(module, halves[0] if len(halves) == 1 else torch.cat(halves))
            for layer, theirs in (("norm", self.norm), ("fc2", self.fc2)):
                if f"{theirs}.{part}" in own:
                    found[f"{layer}.{part}"] = own[f"{theirs}.{part}"]
        return found

    def write(self, module: nn.Module, weights: Weights) -> Weights:
        """Return canonical weights by the names that a module of this class has for them."""
        found: Weights = {}
        for name, w in weights.items():
            layer, part = name.split(".")
            if layer == "fc1":
                halves = self._ordered(module, w).chunk(len(self.fc1))
                found |= {f"{own}.{part}": half for own, half in zip(self.fc1, halves, strict=True)}
            else:
                found[f"{self.norm if layer == 'norm' else self.fc2}.{part}"] = w
        return found

    def _ordered(self, module: nn.Module, w: Tensor) -> Tensor:
        """Change between the module's order of gate and value and the canonical one."""
        return torch.cat(w.chunk(2)[::-1]) if self.value_first(module) else w


_DROPS = ("drop1", "drop2")
_TORCHVISION = Kind(fc1=("0",), fc2="3", act="1", drops=("2", "4"))
KINDS: dict[type[nn.Module], Kind] = {
    ConvMlp: Kind(drops=("drop", None)),
    Mlp: Kind(norm="norm", drops=_DROPS),
    GluMlp: Kind(norm="norm", drops=_DROPS, gated=True, value_first=lambda module: module.gate_last),
    MLP: _TORCHVISION,
    MLPBlock: _TORCHVISION,
    SwiGLU: Kind(fc1=("fc1_g", "fc1_x"), norm="norm", drops=_DROPS, gated=True),
}


def kind_of(module: nn.Module) -> Kind | None:
    """Return the kind of an FFN, None for any other module.

    What has been read from a forward is noted in the module, so that its copies have it and torch.compile finds it; not
    by its class, which may compute something else elsewhere: Gemma3nTextMLP is sparse in some blocks alone.
    """
    kind: Kind | None = KINDS.get(type(module)) or getattr(module, _NOTED, None)
    if kind is None and (parts := traced_ffn.whole(module)) is not None:
        kind = Kind(**parts)
        setattr(module, _NOTED, kind)
    return kind


def is_ffn(module: nn.Module) -> bool:
    """Return True for an FFN of a kind that is known; `describe` finds out if it can be read."""
    return kind_of(module) is not None


def _known(module: nn.Module) -> Kind:
    """Return the kind of a module that is an FFN."""
    kind = kind_of(module)
    assert kind is not None
    return kind


def describe(module: Any) -> FFN:
    """Read the shape and parts of an FFN.

    Raises:
        SurgeryError: if experts could not reproduce a part, such as a quantised or adapted matrix.
    """
    kind, module = _known(module), as_linear(module)
    for name in kind.linears:
        linear = module.get_submodule(name)
        if type(linear) is not nn.Linear or hasattr(linear, "parametrizations"):
            raise SurgeryError(
                f"{name} is a {type(linear).__name__}: expected a plain nn.Linear, or 1x1 convolutions alone; merge "
                f"adapters and remove quantisation or parametrisations first"
            )
    biases = [module.get_submodule(name).bias is not None for name in kind.fc1]
    if len({*biases}) > 1:
        raise SurgeryError(f"one of {' and '.join(kind.fc1)} has a bias: expected one in both, or in none")
    first, last = (module.get_submodule(name) for name in (kind.linears[0], kind.fc2))
    if first.in_features != last.out_features:
        raise SurgeryError(f"it maps {first.in_features} channels to {last.out_features}: expected as many out as in")
    act, norm = module.get_submodule(kind.act), module.get_submodule(kind.norm) if kind.norm else nn.Identity()
    known = {f"{layer}.{part}" for layer in (*kind.linears, kind.norm) for part in ("weight", "bias")}
    if unknown := sorted(name for name, _ in module.named_parameters() if name not in known):
        raise SurgeryError(
            f"it has the parameter {unknown[0]} (its activation is {type(act).__name__}): expected matrices and a norm"
        )
    if not isinstance(norm, (nn.Identity, nn.LayerNorm)):
        raise SurgeryError(f"norm is a {type(norm).__name__}: expected a LayerNorm or none between the matrices")
    if isinstance(norm, nn.LayerNorm) and (norm.weight is None or norm.bias is None):
        raise SurgeryError("norm has no weight or no bias: expected a LayerNorm with both")
    return FFN(
        dim=last.out_features,
        hidden=last.in_features,
        gated=kind.gated,
        act=act,
        norm_eps=norm.eps if isinstance(norm, nn.LayerNorm) else None,
        drop=(_rate(module, kind.drops[0]), _rate(module, kind.drops[1])),
    )


def of_convolutions(module: nn.Module) -> bool:
    """Return True for an FFN of 1x1 convolutions, which maps (B, D, H, W) to (B, D, H, W), each position by itself."""
    kind = kind_of(module)
    return kind is not None and all(_is_pointwise(module.get_submodule(name)) for name in kind.linears)


def as_linear(module: nn.Module) -> nn.Module:
    """Return an FFN of 1x1 convolutions with linear maps in their place, for (..., D); any other FFN as it is.

    `build(module, read(as_linear(module)))` brings the convolutions back.
    """
    if not of_convolutions(module):
        return module
    kind, made = _known(module), copy.deepcopy(module)
    for name in kind.linears:
        conv: Any = made.get_submodule(name)
        linear = nn.Linear(conv.in_channels, conv.out_channels, conv.bias is not None, device="meta")
        linear.weight.requires_grad_(conv.weight.requires_grad)
        if conv.bias is not None:
            linear.bias.requires_grad_(conv.bias.requires_grad)
        made.set_submodule(name, linear.train(conv.training))
    norm = made.get_submodule(kind.norm) if kind.norm else None
    if isinstance(norm, nn.LayerNorm):  # timm's for (B, D, H, W) is a subclass
        norm.__class__ = nn.LayerNorm
    if hasattr(made, "chunk_dim"):  # of GluMlp
        made.chunk_dim = -1  # type: ignore[assignment]
    return build(made, read(module))


def _is_pointwise(module: nn.Module) -> bool:
    if type(module) is not nn.Conv2d:
        return False
    return (module.kernel_size, module.stride, module.padding, module.groups) == ((1, 1), (1, 1), (0, 0), 1)


def _rate(module: nn.Module, drop: str | None) -> float:
    """Return the rate of a dropout by its name; 0 where there is none."""
    return 0.0 if drop is None else float(getattr(module.get_submodule(drop), "p"))  # noqa: B009


def has_hooks(module: nn.Module) -> bool:
    """True if the module or a part of it has forward hooks or a patched `forward`; a replacement would lose them."""
    return any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in module.modules())


def read(module: nn.Module) -> Weights:
    """The canonical weights of an FFN; tensors may be the module's own, so copy before changing them."""
    return _known(module).read(module)


def macs(module: Any) -> int:
    """Multiply-adds of an FFN for one token."""
    return sum(w.numel() for name, w in read(module).items() if name in ("fc1.weight", "fc2.weight"))


def hidden(kind: FFN, weights: Weights, x: Tensor) -> Tensor:
    """(..., D) to (..., F): what the last matrix of an FFN with these weights gets, without dropout."""
    return activated(kind, weights, F.linear(x, weights["fc1.weight"], weights.get("fc1.bias")))


def activated(kind: FFN, weights: Weights, first: Tensor, drop: nn.Module | None = None) -> Tensor:
    """(..., F) or, gated, (..., 2F) to (..., F): what lies between the two matrices, with a dropout of `drop`."""
    if kind.gated:
        gate, value = first.chunk(2, dim=-1)
        units = kind.act(gate) * value
    else:
        units = kind.act(first)
    if drop is not None:
        units = drop(units)
    if kind.norm_eps is None:
        return units
    return F.layer_norm(units, (kind.hidden,), weights["norm.weight"], weights["norm.bias"], kind.norm_eps)


def build(like: nn.Module, weights: Weights) -> nn.Module:
    """A new FFN of the class of `like` that holds these canonical weights; its width F is taken from them.

    The weights are copied bit for bit and keep device and type; parameters are frozen where those of `like` are.
    """
    module = copy.deepcopy(like)
    for name, value in _known(like).write(like, weights).items():
        layer_name, kind = name.rsplit(".", 1)
        layer = module.get_submodule(layer_name)
        copied = value.detach().clone(memory_format=torch.contiguous_format)
        if isinstance(layer, nn.Conv2d) and kind == "weight":
            layer.out_channels, layer.in_channels = value.shape
            copied = copied[..., None, None]
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


def divide(module: nn.Module, width: int) -> list[Weights]:
    """Canonical weights of the parts of an FFN that have `width` hidden units each, in their order.

    Of m parts each has the last matrix times m and the whole output bias, so that their mean is the FFN.

    Raises:
        SurgeryError: if the FFN has no such parts.
    """
    kind = describe(module)
    if not 0 < width <= kind.hidden or kind.hidden % width:
        raise SurgeryError(
            f"expert_width={width} of an FFN with {kind.hidden} hidden units: expected a number that divides them; "
            f"use such as {next(w for w in range(min(max(width, 1), kind.hidden), 0, -1) if kind.hidden % w == 0)}"
        )
    if kind.norm_eps is not None:
        raise SurgeryError(
            f"experts of {width} of the {kind.hidden} hidden units of an FFN with a LayerNorm over all of them: "
            f"expected experts of its width; leave out expert_width, and init='split'"
        )
    weights, parts = read(module), kind.hidden // width
    each = [take(weights, units, kind.gated) for units in torch.arange(kind.hidden).split(width)]
    return [scaled(part, parts, 1) for part in each]
