"""Similarity of the experts of a layer in their weights, matrix by matrix, and of the router's rows to them.

These are the static analyses of "A Closer Look into Mixture-of-Experts in Large Language Models" (Lo et al., arXiv
2406.18219), by the definitions of its notebooks (kamanphoebe/Look-into-MoEs), and rho of UniF-MoE. A matrix of an FFN
is one of fc1 (keys) and fc2 (values), or of gate, value and fc2 where the FFN is gated.

Axes: N experts, F hidden units, D channels, P pairs of experts, C vectors that are compared (experts, and a parent).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from vimoe.analysis.cosines import ROUNDING, cosines, mean, pearson, precise
from vimoe.analysis.permutations import Permuted
from vimoe.moe import ffn_weights
from vimoe.moe.ffn_weights import Weights

SPAN = 2**16  # weights of an expert that are compared at a time
MATCHED = 8  # experts whose hidden units are matched with one another, at most: pairs are many
UNLIKE = 4  # the same where an assignment has to be solved for each pair, which takes ten times as long
SAME_UNIT = 0.98  # cosine of two value rows from which on they count as one (UniF-MoE)


@dataclass(frozen=True)
class MatrixComparison:
    """Comparison of one matrix of the experts; means are over pairs of experts, None for a single one.

    Attributes:
        cosine: cosine of the flattened matrices; permuted are the hidden units of each expert.
        neuron_mean: cosine of the means over hidden units, (D,) each.
        reordered: cosine after the hidden units of one expert got the order of `ffn_weights.order`.
        parent: mean over experts of the cosine with the parent's matrix; None without one of the same shape.
        router: R squared of a linear regression, over pairs of experts, between the cosine of the router's rows and
            that of the means over hidden units; relabelled are the router's rows. None below 3 experts, or where all
            pairs are equally similar.
        pca: two coordinates of each expert, then of the parent, on the principal axes of the matrices. Each weight is
            standardised over these points (0 if it is equal in all), and a unit is one standard deviation of a weight.
            None for copies.
        explained: shares of the variance on the two axes.
    """

    cosine: Permuted | None
    neuron_mean: float | None
    reordered: float | None
    parent: float | None
    router: Permuted | None
    pca: list[list[float]] | None
    explained: list[float] | None


@dataclass(frozen=True)
class WeightComparison:
    """Comparison of the experts' weights.

    Attributes:
        matrices: comparison of each matrix, by its name.
        tau: Kendall's tau, -1..1, of the order of the hidden units in `ffn_weights.order` with their own; mean over
            pairs. It is 1 if no unit has moved, as in trained copies. Permuted are the hidden units.
        rho: share of the hidden units whose value rows (columns of fc2) have a cosine of at least 0.98; mean over
            pairs. It is 1 for copies.
        rho_parent: the same of an expert and its parent, mean over experts; None without one.
        matched: number of experts behind `reordered` and `tau`: 8 at most, 4 where units have no partners that are
            nearest to them alone.
    """

    matrices: dict[str, MatrixComparison]
    tau: Permuted | None
    rho: float | None
    rho_parent: float | None
    matched: int


@dataclass(frozen=True)
class Pairs:
    """Figures of pairs of experts, unit by unit.

    Attributes:
        own, found: (P, F) cosines of hidden units with the same index, and of those that were matched.
        reordered: (P,) cosine after matching, by name of the matrix.
        tau: (P,) Kendall's tau of the order.
        rho: (P,) share of units whose value rows are the same.
        matched: number of experts that were matched.
    """

    own: Tensor
    found: Tensor
    reordered: dict[str, Tensor]
    tau: Tensor
    rho: Tensor
    matched: int


def matrices(weights: Weights, gated: bool) -> dict[str, Tensor]:
    """Return the matrices of an FFN by name, (F, D) each: rows of fc1 (gate and value if gated), columns of fc2."""
    names = ("gate", "value", "fc2") if gated else ("fc1", "fc2")
    parts = ffn_weights.by_unit({name: weights[name] for name in ("fc1.weight", "fc2.weight")}, gated)
    return {name: precise(part) for name, part in zip(names, parts, strict=True)}


def compare_pairs(experts: Sequence[Weights], gated: bool) -> Pairs:
    """Compare the first experts unit by unit, and match their hidden units."""
    experts = experts[:MATCHED]
    units = [matrices(each, gated) for each in experts]
    own, found, tau, rho, most = [torch.empty(0)], [torch.empty(0)], [], [], len(experts)
    reordered: dict[str, list[Tensor]] = {name: [] for name in (units[0] if units else ())}
    f = len(units[0]["fc2"]) if units else 0
    for i, j in sorted(itertools.combinations(range(len(experts)), 2), key=lambda pair: pair[1]):
        one, other = units[j], units[i]
        own.append(_by_unit(one, other).cpu())
        rho.append(_same(one["fc2"], other["fc2"]))
        if j >= most:
            continue
        order, easy = ffn_weights.order(experts[i], experts[j], gated)
        most = most if easy else min(most, max(UNLIKE, j + 1))
        moved = {name: part[order] for name, part in other.items()}
        found.append(_by_unit(one, moved).cpu())
        tau.append(stats.kendalltau(order.cpu().numpy(), np.arange(f)).statistic if f > 1 else math.nan)
        for name, cosine in reordered.items():
            cosine.append(torch.cosine_similarity(one[name].flatten(), moved[name].flatten(), dim=0).cpu())
    return Pairs(
        torch.cat(own), torch.cat(found), {name: torch.tensor(each) for name, each in reordered.items()},
        torch.tensor(tau), torch.tensor(rho), most,
    )  # fmt: skip


def compare_weights(
    experts: Sequence[Weights], gated: bool, pairs: Pairs, router_NN: Tensor, parent: Weights | None
) -> WeightComparison:
    """Compare the weights of the experts of a layer.

    Args:
        experts: canonical weights of each expert.
        gated: True for gated FFNs.
        pairs: result of `compare_pairs` for these.
        router_NN: inner products of the router's rows.
        parent: canonical weights of the FFN that the experts are compared with too, of their shapes.
    """
    each, n = [matrices(expert, gated) for expert in experts], len(experts)
    origin = None if parent is None else matrices(parent, gated)
    compared = {}
    for name in each[0]:
        own = [parts[name] for parts in each]
        means_NN = torch.stack([units_FD.mean(dim=0) for units_FD in own])
        means_NN = means_NN @ means_NN.T
        gram_CC, standard_CC = _grams(own if origin is None else [*own, origin[name]])
        axes = _principal(standard_CC)
        to_parent = gram_CC[:n, -1] / (gram_CC.diagonal()[:n] * gram_CC[-1, -1]).sqrt()
        compared[name] = MatrixComparison(
            cosine=_against_exchanged(mean(cosines(gram_CC[:n, :n])), own),
            neuron_mean=mean(cosines(means_NN)),
            reordered=mean(pairs.reordered[name]),
            parent=None if origin is None else mean(to_parent),
            router=_explained_by(means_NN, router_NN),
            pca=axes and axes[0],
            explained=axes and axes[1],
        )
    f, p, tau = len(each[0]["fc2"]), len(pairs.tau), mean(pairs.tau)
    return WeightComparison(
        matrices=compared,
        # of a random order (Kendall, 1938); orders of different pairs are uncorrelated
        tau=None if tau is None else Permuted.normal(tau, 0.0, 2 * (2 * f + 5) / (9 * f * (f - 1)) / p),
        rho=mean(pairs.rho),
        rho_parent=None if origin is None else mean(torch.tensor([_same(own["fc2"], origin["fc2"]) for own in each])),
        matched=pairs.matched,
    )


def _by_unit(one: dict[str, Tensor], other: dict[str, Tensor]) -> Tensor:
    """(F,) cosines of all weights of the units with the same index."""
    dots, a, b = (
        torch.stack([(x[name] * y[name]).sum(dim=1) for name in one]).sum(dim=0)
        for x, y in ((one, other), (one, one), (other, other))
    )
    return (dots / (a * b).sqrt()).clamp(-1, 1)


def _same(one_FD: Tensor, other_FD: Tensor) -> float:
    """Return the share of the rows with a cosine of at least 0.98; NaN where no row has a cosine."""
    cosine_F = (one_FD * other_FD).sum(dim=1) / (one_FD.norm(dim=1) * other_FD.norm(dim=1))
    defined = cosine_F[cosine_F.isfinite()]
    return (defined >= SAME_UNIT).float().mean().item()


def _grams(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(C, C) inner products of the flattened matrices, and of these with each weight standardised over them."""
    raw, standard = [], []
    for span in _spans(parts):
        to_first = span - span[:1]  # so that copies are equal to the last bit
        deviation = to_first - to_first.mean(dim=0)
        spread = deviation.square().mean(dim=0).sqrt()
        scaled = torch.where(spread > 0, deviation / spread, 0.0)
        raw.append(span @ span.T)
        standard.append(scaled @ scaled.T)
    return torch.stack(raw).sum(dim=0), torch.stack(standard).sum(dim=0) / parts[0].numel()


def _spans(parts: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the flattened matrices beside one another, (C, SPAN) at a time."""
    for spans in zip(*(part.flatten().split(SPAN) for part in parts), strict=True):
        yield torch.stack(spans)


def _principal(gram_CC: Tensor) -> tuple[list[list[float]], list[float]] | None:
    """Return two principal coordinates of each point, and the shares of these axes; None where all points are one.

    The sign of an axis is such that its largest coordinate is above 0.
    """
    gram = gram_CC.double().cpu().nan_to_num()
    total = gram.trace()
    if total <= ROUNDING or len(gram) < 2:
        return None
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0)[:2].clamp(min=0), vectors.flip(1)[:, :2]
    signs = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    return (vectors * signs * values.sqrt()).tolist(), (values / total).tolist()


def _against_exchanged(value: float | None, parts: Sequence[Tensor]) -> Permuted | None:
    """Return the mean cosine of all pairs of matrices beside that for permuted rows, pair by pair.

    Be m_A the mean row of a matrix A of norm 1, and C_A its rows without it. The inner product of A with B, whose rows
    are permuted, has the mean F m_A m_B and the variance tr(C_A^T C_A C_B^T C_B) / (F - 1): `exchange_moments`, written
    with channels. Sums over all pairs follow from sums over all matrices, so that no two of them have to be multiplied.
    """
    if value is None:
        return None
    f, p = len(parts[0]), len(parts) * (len(parts) - 1) / 2
    normed = [(part / part.norm()).nan_to_num() for part in parts]
    rows = torch.stack([part.mean(dim=0) for part in normed]).double()
    total, squares = torch.zeros((), dtype=torch.float64), 0.0
    for part in normed:
        centred = part - part.mean(dim=0)
        spread_DD = (centred.T @ centred).double().cpu()
        total, squares = total + spread_DD, squares + spread_DD.square().sum().item()
    expected = f * (rows.sum(dim=0).square().sum() - rows.square().sum()).item() / 2 / p
    variance = (total.square().sum().item() - squares) / 2 / max(f - 1, 1) / p**2
    return Permuted.normal(value, expected, variance)


def _explained_by(means_NN: Tensor, router_NN: Tensor) -> Permuted | None:
    """Return R squared of the regression between the cosines of two Gram matrices over the pairs of experts."""
    n, pairs = len(means_NN), (cosines(gram).double().cpu() for gram in (means_NN, router_NN))
    experts_P, rows_P = pairs
    if n < 3 or not pearson(experts_P, rows_P).isfinite():
        return None
    i, j = np.triu_indices(n, 1)
    rows_NN, standard_P = np.zeros((n, n)), stats.zscore(experts_P.numpy())
    rows_NN[i, j] = rows_NN[j, i] = stats.zscore(rows_P.numpy())  # a mean over all pairs is that for any labels
    return Permuted.relabelled(n, lambda labels: float((standard_P @ rows_NN[labels[i], labels[j]] / len(i)) ** 2))
