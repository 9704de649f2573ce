"""Arithmetic on the weights of FFNs in their canonical layout: hidden units reordered, taken and joined, FFNs averaged.

Axes: D channels, F hidden units, P weights of a hidden unit. The canonical weights of an FFN are

    fc1.weight (F, D) or, gated, (2F, D): the gate's F rows first, then the value's      fc1.bias likewise
    norm.weight, norm.bias (F,): only where the FFN has a LayerNorm between its matrices
    fc2.weight (D, F)    fc2.bias (D,)

and it computes fc2(norm(act(fc1(x)))), or fc2(norm(act(gate) * value)) where it is gated. `vimoe.moe.ffn` reads
them from a module and writes them into one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Weights = dict[str, Tensor]


def by_unit(weights: Weights, gated: bool) -> list[Tensor]:
    """Views of the given weights with a row for each of the F hidden units: all that belongs to one unit alone.

    They are the halves of fc1 (one if it is not gated), the norm, and fc2.weight transposed.
    """
    parts: list[Tensor] = []
    for name, w in sorted(weights.items()):  # FFNs of one shape are compared, whatever order their weights come in
        if name.startswith("fc1."):
            parts += w.chunk(1 + gated)
        elif name.startswith("norm."):
            parts.append(w)
        elif name == "fc2.weight":
            parts.append(w.T)
    return parts


def hidden_units(weights: Weights, gated: bool) -> Tensor:
    """(F, P), float32 at least: row f holds the P weights, of those given, that belong to hidden unit f alone.

    They are its row of fc1 (of both halves where it is gated) and of norm, and its column of fc2.weight.
    """
    parts = by_unit(weights, gated)
    units = torch.cat([part.detach().reshape(len(part), -1) for part in parts], dim=1)
    return units.to(torch.promote_types(units.dtype, torch.float32))


def match(weights: Weights, reference: Weights, gated: bool) -> Weights:
    """The same FFN with its hidden units in the `order` that is nearest to those of `reference`; arguments as there."""
    return take(weights, order(weights, reference, gated)[0], gated)


@torch.no_grad()
def order(weights: Weights, reference: Weights, gated: bool) -> tuple[Tensor, bool]:
    """Return the order (F,) of an FFN's hidden units that is nearest to those of `reference`, and True if it was easy.

    Hidden units may change places without any change of what the FFN computes. Of all orders this one has the least
    sum of squared distances between the two FFNs' `hidden_units`: weight matching (Ainsworth et al., Git Re-Basin,
    arXiv 2209.04836, section 3.2), for one hidden layer a linear assignment and so solved exactly. It is easy where no
    two units of the reference have the same nearest unit, as in trained copies: then that is the best order.

    Args:
        weights: canonical weights; they are not changed.
        reference: canonical weights of an FFN of the same class and shape.
        gated: True for a gated FFN.
    """
    units_FP, target_FP = hidden_units(weights, gated), hidden_units(reference, gated)
    # A common shift changes no distance, and the products of what units have in common would round away the rest.
    shift_P = target_FP.mean(dim=0)
    units_FP, target_FP = units_FP - shift_P, target_FP - shift_P
    # |a - b|^2 = |a|^2 + |b|^2 - 2ab, of which the order changes ab alone
    with torch.autocast(units_FP.device.type, enabled=False):
        similarity_FF = (target_FP @ units_FP.T).nan_to_num()
    found = (units_FP.square().sum(dim=1) / 2 - similarity_FF).argmin(dim=1)
    easy = len(found.unique()) == len(found)
    if not easy:  # the solver is several times faster on the products than on the distances
        solved = linear_sum_assignment(similarity_FF.cpu().numpy(), maximize=True)[1]
        found = torch.from_numpy(solved).to(found.device)
    # units move for a gain only: rounding shall not swap twins, and what has diverged (NaN) has no order
    if not (target_FP - units_FP[found]).square().sum() < (target_FP - units_FP).square().sum():
        found = torch.arange(len(found), device=found.device)
    return found, easy


def take(weights: Weights, units: Tensor, gated: bool) -> Weights:
    """The FFN with some of its hidden units, in an order: unit f becomes what units[f] was."""
    new = dict(weights)
    for name, w in weights.items():
        if name.startswith("fc1."):
            new[name] = torch.cat([half[units] for half in w.chunk(1 + gated)])
        elif name.startswith("norm."):
            new[name] = w[units]
        elif name == "fc2.weight":
            new[name] = w[:, units]
    return new


def scaled(weights: Weights, matrix: float, bias: float) -> Weights:
    """The FFN with its last matrix times `matrix` and its output bias times `bias`."""
    factors = {"fc2.weight": matrix, "fc2.bias": bias}
    return {name: w * factors.get(name, 1.0) for name, w in weights.items()}


def join(parts: Sequence[Weights], gated: bool) -> Weights:
    """One FFN with the hidden units of all parts side by side, which computes the sum of what they do.

    Args:
        parts: canonical weights of FFNs of any widths, without a norm.
        gated: True for gated FFNs.
    """
    joined: Weights = {}
    for name in parts[0]:
        each = [part[name] for part in parts]
        if name.startswith("fc1."):
            joined[name] = torch.cat(
                [torch.cat(half) for half in zip(*(w.chunk(1 + gated) for w in each), strict=True)]
            )
        else:
            joined[name] = torch.cat(each, dim=1) if name == "fc2.weight" else torch.stack(each).sum(dim=0)
    return joined


def average(parts: Sequence[Weights], shares: Sequence[float | Tensor], scale: float = 1.0) -> Weights:
    """The mean of FFNs weighted by `shares`, which sum to 1, with the output multiplied by `scale`.

    Taken as differences to the first one, so that the mean of equal FFNs is that FFN bit for bit.
    """
    first, *others = parts
    mean = {
        name: w + sum(s * (o[name] - w) for s, o in zip(shares[1:], others, strict=True)) for name, w in first.items()
    }
    return {name: w * scale if name.startswith("fc2.") and scale != 1 else w for name, w in mean.items()}
