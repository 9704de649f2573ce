"""Similarity of the experts of a layer in weights, neurons and outputs, and how far the router follows it.

The analyses of "A Closer Look into Mixture-of-Experts in Large Language Models" (Lo et al., arXiv 2406.18219) for one
layer, with two additions. Upcycled experts are copies of one parent. So the changes of their weights are compared too,
and neurons after matching.

Axes: B images, T tokens of an image, M tokens, R rows that are routed (images or tokens), N experts, F hidden units
(neurons), D channels, P pairs of experts, Q references (the shared expert, and the mean of the experts).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from vimoe.moe import MoE, ffn

CHUNK = 1024  # tokens that an expert computes at a time
SPAN = 2**16  # weights of an expert that are compared at a time
MATCHED = 8  # experts whose neurons are matched with one another, at most: pairs are many
ROUNDING = 1e-6  # what differs by less, relative to its size, is taken as equal
_TINY = 1e-30  # size of what is zero


@dataclass(frozen=True)
class ExpertComparison:
    """Figures of `compare_experts`; None for one that is not defined.

    None are the similarities of a single expert, and what needs weights of experts that are no FFNs. A similarity is a
    cosine, in -1..1 and 1 for equal experts; it is a mean over all pairs of experts.

    Attributes:
        num_experts: N.
        weight_similarity: similarity of the experts' weights, all in one vector.
        deviation_similarity: similarity of the experts' deviations from their mean weights. It is -1/(N-1) if they
            moved apart independently. Deviations sum to zero, so it is that for any moves that are equally long: it
            shows how equal they are, and goes up to (N-4)/N if one expert alone has moved. None for copies.
        deviation_directions: number of directions of the deviations, 1..N-1: the participation ratio
            (sum v)^2 / sum v^2 of their variances v along principal axes. N-1 if experts moved independently and
            equally far, 1 if all of them are on a line. None for copies.
        output_similarity: similarity of the experts' outputs for the same token; mean over tokens, routed there or not.
        neuron_similarity: similarity of neuron f of one expert to neuron f of the other, by its rows of fc1 and its
            column of fc2; mean over neurons.
        matched_neuron_similarity: the same, each neuron with its partner in `ffn.match`. Much more than
            neuron_similarity says that experts are in part permutations of each other. Unrelated neurons come out
            above 0 too, as each gets a partner that suits it.
        active_neurons: share of the neurons that make an expert's output, 1/F..1: (sum a)^2 / (F sum a^2) with
            a_f = |h_f| |w_f|, hidden unit times the norm of its column of fc2; mean over tokens and experts. 1 if all
            add equally much.
        score_norm_correlation: Spearman correlation, -1..1, over experts of the router's score with the norm of the
            expert's output (for an image the mean norm over its tokens); mean over rows.
        top1_has_largest_norm: share, 0..1, of the rows with an expert whose first choice has the largest output; t
            experts that share the largest norm count 1/t.
        chance: 1/N, the value of top1_has_largest_norm for a router that knows nothing.
        router_expert_correlation: Pearson correlation, -1..1, over pairs of experts of the cosine of their rows in the
            router with the cosine of their deviations: 1 if the router scores similar experts similarly.
            None below 3 experts, or if all pairs are equally similar.
    """

    num_experts: int
    weight_similarity: float | None
    deviation_similarity: float | None
    deviation_directions: float | None
    output_similarity: float | None
    neuron_similarity: float | None
    matched_neuron_similarity: float | None
    active_neurons: float | None
    score_norm_correlation: float | None
    top1_has_largest_norm: float | None
    chance: float
    router_expert_correlation: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, as JSON knows them."""
        return asdict(self)


@dataclass(frozen=True)
class Distance:
    """Distance of a layer's experts from one function, as means over the experts.

    A distance is |a - b| / sqrt((|a|^2 + |b|^2) / 2), so that it is defined where one of them is zero: 0 for equals,
    about sqrt(2) for what is unrelated and equally large, and 2 for opposites.

    Attributes:
        cosine: cosine of the weights, all in one vector; None for experts that are no FFNs, or of another width.
        weights: distance of the weights; None as above.
        outputs: distance of the outputs for the same tokens, routed there or not, all tokens in one vector.
    """

    cosine: float | None
    weights: float | None
    outputs: float


@torch.no_grad()
def distances(layer: MoE, x_BTD: Tensor) -> tuple[Distance | None, Distance]:
    """Return the distances of a layer's experts from its shared expert (None without one), and from their mean.

    Args:
        layer: the layer, in eval mode.
        x_BTD: (B, T, D) inputs of that layer, on its device; a few images are enough.
    """
    n = layer.config.num_experts
    with torch.autocast(x_BTD.device.type, enabled=False):
        experts = [layer.experts.weights(e) for e in range(n)] if layer.experts.are_ffns else []
        if experts and layer.shared is not None:
            shared = ffn.read(layer.shared)
            same = all(shared[name].shape == w.shape for name, w in experts[0].items())
            experts += [shared] if same else []
        cosines, weights = _apart(_spans(experts), n) if experts else ([], [])
        _, outputs = _apart((_outputs_beside(layer, tokens) for tokens in x_BTD.flatten(0, 1).split(CHUNK)), n)

    def distance(last: int) -> Distance:
        known = len(cosines) >= last
        return Distance(cosines[-last] if known else None, weights[-last] if known else None, outputs[-last])

    return None if layer.shared is None else distance(2), distance(1)


@torch.no_grad()
def compare_experts(layer: MoE, x_BTD: Tensor) -> ExpertComparison:
    """Compare the experts of a layer on some of its inputs, as if in eval mode, and change nothing.

    All experts compute all tokens, at most `CHUNK` tokens at a time. The neurons of the first 8 experts are matched,
    pair by pair.

    Args:
        layer: the layer, in eval mode if its experts are no FFNs.
        x_BTD: (B, T, D) inputs of that layer, on its device; a few images are enough.
    """
    n = layer.config.num_experts
    with torch.autocast(x_BTD.device.type, enabled=False):
        weights = [layer.experts.weights(e) for e in range(n)] if layer.experts.are_ffns else []
        weights_NN, deviations_NN = _weight_grams(weights, n)
        deviations_P = _cosines(deviations_NN.to(x_BTD.device))
        observed = [_observe(layer, weights, tokens) for tokens in x_BTD.flatten(0, 1).split(CHUNK)]
        norms_MN, cosines_MP, active_MN = (torch.cat(each) for each in zip(*observed, strict=True))
        neurons_PF, matched_PF = _neuron_cosines(weights[:MATCHED], layer.experts.kind.gated)
        routing = layer.router(x_BTD)
        norms_RN = norms_MN.unflatten(0, (len(routing.logits), routing.tokens_per_unit)).mean(dim=1)
        correlation_R, hit_R = _follows_norms(routing.logits, routing.experts[:, 0], norms_RN)
        router_ND = _precise(layer.router.weight)
        router_P = _cosines(router_ND @ router_ND.T)
    return ExpertComparison(
        num_experts=n,
        weight_similarity=_mean(_cosines(weights_NN)),
        deviation_similarity=_mean(deviations_P),
        deviation_directions=_mean(deviations_NN.trace() ** 2 / deviations_NN.square().sum()),
        output_similarity=_mean(cosines_MP),
        neuron_similarity=_mean(neurons_PF),
        matched_neuron_similarity=_mean(matched_PF),
        active_neurons=_mean(active_MN),
        score_norm_correlation=_mean(correlation_R),
        top1_has_largest_norm=_mean(hit_R),
        chance=1 / n,
        router_expert_correlation=_mean(_pearson(router_P, deviations_P)) if n > 2 else None,
    )


def _weight_grams(experts: Sequence[ffn.Weights], n: int) -> tuple[Tensor, Tensor]:
    """(N, N) inner products of the experts' weights, and of their deviations from the mean expert; NaN without any."""
    weights, deviations = [], []
    for span in _spans(experts):
        to_first = span - span[:1]  # so that copies have no deviation, to the last bit
        deviation = to_first - to_first.mean(dim=0)
        weights.append(span @ span.T)
        deviations.append(deviation @ deviation.T)
    if not weights:
        return torch.full((n, n), torch.nan), torch.full((n, n), torch.nan)
    return torch.stack(weights).sum(dim=0), torch.stack(deviations).sum(dim=0)


def _spans(experts: Sequence[ffn.Weights]) -> Iterator[Tensor]:
    """Yield all weights of the experts beside one another, (N, SPAN) at a time."""
    for name in experts[0] if experts else ():
        flat = [expert[name].flatten() for expert in experts]
        for spans in zip(*(each.split(SPAN) for each in flat), strict=True):
            yield _precise(torch.stack(spans))


def _outputs(layer: MoE, x_MD: Tensor) -> Tensor:
    """(N, M, D), the output of each expert for each token, by the experts' own forward."""
    m, n = len(x_MD), layer.config.num_experts
    load_N, source = torch.full((n,), m), torch.arange(m).repeat(n)
    y = layer.experts(x_MD[:, None], source.to(x_MD.device), load_N.to(x_MD.device))
    return _precise(y[:, 0]).unflatten(0, (n, m))


def _outputs_beside(layer: MoE, x_MD: Tensor) -> Tensor:
    """(N, M * D) the outputs of the experts; in one more row that of the shared expert, if there is one."""
    y_NMD = _outputs(layer, x_MD)
    rows = [y_NMD] if layer.shared is None else [y_NMD, _precise(layer.shared(x_MD[None]))]
    return torch.cat(rows).flatten(1)


def _apart(pieces: Iterable[Tensor], n: int) -> tuple[list[float], list[float]]:
    """Return cosines with, and distances from, each reference, as means over n vectors.

    Args:
        pieces: the vectors piece by piece: n rows, then those of references. The last reference is the rows' mean.
        n: N.
    """
    total = torch.zeros((), dtype=torch.float64)
    for rows in pieces:
        own, others = rows[:n], torch.cat([rows[n:], rows[:n].mean(dim=0, keepdim=True)])
        apart_NQ = torch.stack([(own - other).square().sum(dim=1) for other in others], dim=1)
        sizes = own.square().sum(dim=1, keepdim=True), others.square().sum(dim=1)[None]
        total = total + torch.stack(torch.broadcast_tensors(*sizes, own @ others.T, apart_NQ)).double().cpu()
    own_NQ, others_NQ, both_NQ, apart_NQ = total
    cosines_NQ = both_NQ / (own_NQ * others_NQ).sqrt().clamp(min=_TINY)
    distances_NQ = (apart_NQ / ((own_NQ + others_NQ) / 2).clamp(min=_TINY)).sqrt()
    return cosines_NQ.mean(dim=0).tolist(), distances_NQ.mean(dim=0).tolist()


def _neuron_cosines(experts: Sequence[ffn.Weights], gated: bool) -> tuple[Tensor, Tensor]:
    """(P, F) cosines of the neurons of two experts, in their own order and matched."""

    def cosines(one: ffn.Weights, other: ffn.Weights) -> Tensor:
        a, b = (ffn.hidden_units({k: w[k] for k in ("fc1.weight", "fc2.weight")}, gated) for w in (one, other))
        return ((a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1))).clamp(-1, 1)

    own, matched = [torch.empty(0)], [torch.empty(0)]
    for i, one in enumerate(experts):
        for other in experts[:i]:
            own.append(cosines(one, other).cpu())
            matched.append(cosines(one, ffn.match(other, one, gated)).cpu())
    return torch.cat(own), torch.cat(matched)


def _observe(layer: MoE, experts: Sequence[ffn.Weights], x_MD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the experts' outputs for some tokens: norms (M, N), cosines (M, P), active share (M, N).

    Experts without weights compute by their own forward; their active share is NaN.
    """
    outputs, active = [], []
    for weights in ({name: _precise(w) for name, w in each.items()} for each in experts):
        hidden_MF = ffn.hidden(layer.experts.kind, weights, x_MD.to(weights["fc1.weight"].dtype))
        part_MF = hidden_MF.abs() * weights["fc2.weight"].norm(dim=0)
        active.append(part_MF.mean(dim=1).square() / part_MF.square().mean(dim=1))
        outputs.append(F.linear(hidden_MF, weights["fc2.weight"], weights.get("fc2.bias")))
    if not experts:
        outputs = list(_outputs(layer, x_MD))
        active = [torch.full((len(x_MD),), torch.nan)] * layer.config.num_experts
    y_MND = torch.stack(outputs, dim=1)
    return y_MND.norm(dim=2), _cosines(y_MND @ y_MND.mT), torch.stack(active, dim=1)


def _follows_norms(scores_RN: Tensor, best_R: Tensor, norms_RN: Tensor) -> tuple[Tensor, Tensor]:
    """Return for rows whose norms differ the rank correlation of scores and norms, and 1 if the best has the largest.

    The scores are logits, which have the order of the probabilities and do not underflow. Rows without an expert (-1)
    have no best one.
    """
    largest_R1 = norms_RN.amax(dim=1, keepdim=True)
    differ_R = (largest_R1 - norms_RN).amax(dim=1) > ROUNDING * largest_R1[:, 0]
    ranks = (torch.from_numpy(stats.rankdata(v.cpu().numpy(), axis=1)) for v in (scores_RN, norms_RN))
    is_largest_RN = norms_RN >= (1 - ROUNDING) * largest_R1
    hit_R = is_largest_RN.gather(1, best_R.clamp(min=0)[:, None])[:, 0] / is_largest_RN.sum(dim=1)
    return _pearson(*ranks)[differ_R.cpu()], hit_R[differ_R & (best_R >= 0)]


def _cosines(gram: Tensor) -> Tensor:
    """(..., N, N) inner products to (..., P) cosines of all pairs; NaN where a vector is zero."""
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    i, j = torch.triu_indices(gram.shape[-1], gram.shape[-1], offset=1, device=gram.device)
    return (gram[..., i, j] / (norms[..., i] * norms[..., j])).clamp(-1, 1)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """(...,) correlations over the last axis of cosines or ranks; NaN where one is constant to rounding."""
    a, b = a - a.mean(dim=-1, keepdim=True), b - b.mean(dim=-1, keepdim=True)
    spread = torch.minimum(a.abs().amax(dim=-1), b.abs().amax(dim=-1))
    correlation = (a * b).sum(dim=-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    return torch.where(spread > ROUNDING, correlation.clamp(-1, 1), torch.nan)


def _mean(values: Tensor) -> float | None:
    """Return the mean of the defined values, None without any."""
    defined = values[values.isfinite()]
    return defined.mean().item() if defined.numel() else None


def _precise(w: Tensor) -> Tensor:
    return w.detach().to(torch.promote_types(w.dtype, torch.float32))
