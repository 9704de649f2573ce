"""Similarity of the experts of a layer in weights, neurons and outputs, and how far the router follows it.

The analyses of "A Closer Look into Mixture-of-Experts in Large Language Models" (Lo et al., arXiv 2406.18219) for one
layer, those of single matrices in `vimoe.analysis.expert_weights`. Upcycled experts are copies of one parent. So the
changes of their weights are compared too, and the experts with the parent where it is known.

Axes: B images, T tokens of an image, M tokens, R rows that are routed (images or tokens), N experts, F hidden units
(neurons), D channels, P pairs of experts, Q references (the parent, and the mean of the experts).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from vimoe.analysis.cosines import ROUNDING, cosines, mean, pearson, precise
from vimoe.analysis.expert_weights import WeightComparison, compare_pairs, compare_weights
from vimoe.analysis.permutations import Permuted, exchange_moments
from vimoe.moe import MoE, ffn
from vimoe.moe.ffn_weights import Weights

CHUNK = 1024  # tokens that an expert computes at a time
SPAN = 2**16  # weights of an expert that are compared at a time
EXCHANGED = 256  # tokens that are exchanged for a chance level, at most
EXCHANGING = 8  # experts whose outputs are exchanged, at most
_TINY = 1e-30  # size of what is zero


@dataclass(frozen=True)
class OutputComparison:
    """Comparison of the outputs of all experts for the same tokens, routed there or not.

    Attributes:
        angular: 1 - arccos(c) / pi, 0..1, with c the cosine of two experts' outputs; mean over tokens and pairs.
            Permuted are the tokens of each expert, among at most 256 tokens and 8 experts. It lies above 1/2 if outputs
            have a direction in common, whatever the token. None if no output has a direction.
        ranks: (N, N) number of times that an expert had rank i in the router's scores (row) and rank j in the norms of
            the outputs (column), 0 the smallest; over the rows of `score_norm_correlation`, which are N times their
            number in all. Ties are broken by index.
        diagonal: share of these on the diagonal, 1/N for a router that knows nothing. Relabelled are the experts on
            one side, which keeps how often an expert has each rank. None without rows.
    """

    angular: Permuted | None
    ranks: list[list[int]]
    diagonal: Permuted | None


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
        matched_neuron_similarity: the same, each neuron with its partner in `ffn_weights.match`. Much more than
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
        weights: comparison of the weights, matrix by matrix; None for experts that are no FFNs.
        outputs: comparison of the outputs; None for a single expert.
        parent: distance from the parent; None where none is known.
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
    weights: WeightComparison | None
    outputs: OutputComparison | None
    parent: ParentDistance | None

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


@dataclass(frozen=True)
class ParentDistance(Distance):
    """Distance of a layer's experts from their parent.

    Attributes:
        what: "given" (the dense model's FFN), "shared" (the shared expert, which began as the same FFN and has been
            trained since) or "base" (the FFN that the experts have in common, and change).
    """

    what: str


def parent_of(layer: MoE, given: nn.Module | None = None) -> tuple[str, nn.Module] | None:
    """Return a layer's parent and its name in `ParentDistance.what`; None where none is known."""
    known = {"given": given, "shared": layer.shared, "base": next(iter(layer.experts.reads), None)}
    return next(((what, module) for what, module in known.items() if module is not None), None)


@torch.no_grad()
def distances(layer: MoE, x_BTD: Tensor, reference: nn.Module | None) -> tuple[Distance | None, Distance]:
    """Return the distances of a layer's experts from another FFN (None without one), and from their mean.

    Args:
        layer: the layer, in eval mode.
        x_BTD: (B, T, D) inputs of that layer, on its device; a few images are enough.
        reference: the other FFN, such as the shared expert, in eval mode and on the same device.
    """
    n = layer.config.num_experts
    with torch.autocast(x_BTD.device.type, enabled=False):
        experts = [layer.experts.weights(e) for e in range(n)] if layer.experts.are_ffns else []
        other = experts and _of_their_shape(experts, reference)
        similar, weights = _apart(_spans([*experts, other] if other else experts), n) if experts else ([], [])
        chunks = x_BTD.flatten(0, 1).split(CHUNK)
        _, outputs = _apart((_outputs_beside(layer, experts, tokens, reference) for tokens in chunks), n)

    def distance(last: int) -> Distance:
        known = len(similar) >= last
        return Distance(similar[-last] if known else None, weights[-last] if known else None, outputs[-last])

    return None if reference is None else distance(2), distance(1)


def _of_their_shape(experts: Sequence[Weights], module: nn.Module | None) -> Weights | None:
    """Return the canonical weights of an FFN if they have the shapes of the experts'."""
    weights = None if module is None else ffn.read(module)
    same = weights and all(w.shape == weights[name].shape for name, w in experts[0].items())
    return weights if same else None


@torch.no_grad()
def compare_experts(layer: MoE, x_BTD: Tensor, parent: nn.Module | None = None) -> ExpertComparison:
    """Compare the experts of a layer on some of its inputs, as if in eval mode, and change nothing.

    All experts compute all tokens, at most `CHUNK` tokens at a time. The neurons of the first 8 experts are matched,
    pair by pair (`vimoe.analysis.expert_weights`).

    Args:
        layer: the layer, in eval mode if its experts are no FFNs.
        x_BTD: (B, T, D) inputs of that layer, on its device; a few images are enough.
        parent: FFN that the experts were copied from, in eval mode and on their device; by default what `parent_of`
            finds in the layer.
    """
    n, known = layer.config.num_experts, parent_of(layer, parent)
    with torch.autocast(x_BTD.device.type, enabled=False):
        weights = [layer.experts.weights(e) for e in range(n)] if layer.experts.are_ffns else []
        weights_NN, deviations_NN = _weight_grams(weights, n)
        deviations_P = cosines(deviations_NN.to(x_BTD.device))
        x_MD = x_BTD.flatten(0, 1)
        observed = [_observe(*_all_outputs(layer, weights, tokens)) for tokens in x_MD.split(CHUNK)]
        norms_MN, cosines_MP, active_MN = (torch.cat(each) for each in zip(*observed, strict=True))
        pairs = compare_pairs(weights, layer.experts.kind.gated)
        routing = layer.router(x_BTD)
        norms_RN = norms_MN.unflatten(0, (len(routing.logits), routing.tokens_per_unit)).mean(dim=1)
        correlation_R, hit_R, differ_R = _follows_norms(routing.logits, routing.experts[:, 0], norms_RN)
        router_ND = precise(layer.router.weight)
        router_P = cosines(router_ND @ router_ND.T)
        sample_MND, _ = _all_outputs(layer, weights, x_MD[:: -(-len(x_MD) // EXCHANGED)])
        apart = distances(layer, x_BTD, known[1])[0] if known else None
        finite = apart is not None and math.isfinite(apart.outputs)
        return ExpertComparison(
            num_experts=n,
            weight_similarity=mean(cosines(weights_NN)),
            deviation_similarity=mean(deviations_P),
            deviation_directions=mean(deviations_NN.trace() ** 2 / deviations_NN.square().sum()),
            output_similarity=mean(cosines_MP),
            neuron_similarity=mean(pairs.own),
            matched_neuron_similarity=mean(pairs.found),
            active_neurons=mean(active_MN),
            score_norm_correlation=mean(correlation_R),
            top1_has_largest_norm=mean(hit_R),
            chance=1 / n,
            router_expert_correlation=mean(pearson(router_P, deviations_P)) if n > 2 else None,
            weights=compare_weights(
                weights, layer.experts.kind.gated, pairs, router_ND @ router_ND.T,
                _of_their_shape(weights, known[1] if known else None),
            ) if weights else None,
            outputs=None if n < 2 else OutputComparison(
                angular=_angular(cosines_MP, sample_MND),
                **_rank_table(routing.logits[differ_R], norms_RN[differ_R]),
            ),
            parent=ParentDistance(**vars(apart), what=known[0]) if known and finite else None,
        )  # fmt: skip


def _weight_grams(experts: Sequence[Weights], n: int) -> tuple[Tensor, Tensor]:
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


def _spans(experts: Sequence[Weights]) -> Iterator[Tensor]:
    """Yield all weights of the experts beside one another, (N, SPAN) at a time."""
    for name in experts[0] if experts else ():
        flat = [expert[name].flatten() for expert in experts]
        for spans in zip(*(each.split(SPAN) for each in flat), strict=True):
            yield precise(torch.stack(spans))


def _outputs(layer: MoE, x_MD: Tensor) -> Tensor:
    """(N, M, D), the output of each expert for each token, by the experts' own forward."""
    m, n = len(x_MD), layer.config.num_experts
    load_N, source = torch.full((n,), m), torch.arange(m).repeat(n)
    y = layer.experts(x_MD[:, None], source.to(x_MD.device), load_N.to(x_MD.device))
    return precise(y[:, 0]).unflatten(0, (n, m))


def _outputs_beside(layer: MoE, experts: Sequence[Weights], x_MD: Tensor, reference: nn.Module | None) -> Tensor:
    """(N, M * D) the outputs of the experts; in one more row that of the reference, if there is one."""
    rows = [_all_outputs(layer, experts, x_MD)[0].transpose(0, 1)]
    if reference is not None:
        rows.append(_run(ffn.describe(reference), ffn.read(reference), x_MD)[1][None])
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
    similar_NQ = both_NQ / (own_NQ * others_NQ).sqrt().clamp(min=_TINY)
    distances_NQ = (apart_NQ / ((own_NQ + others_NQ) / 2).clamp(min=_TINY)).sqrt()
    return similar_NQ.mean(dim=0).tolist(), distances_NQ.mean(dim=0).tolist()


def _all_outputs(layer: MoE, experts: Sequence[Weights], x_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the experts' outputs (M, N, D) for some tokens, and the share of their neurons that make them (M, N).

    Experts without weights compute by their own forward; their active share is NaN.
    """
    outputs, active = [], []
    for weights in experts:
        hidden_MF, output_MD = _run(layer.experts.kind, weights, x_MD)
        part_MF = hidden_MF.abs() * precise(weights["fc2.weight"]).norm(dim=0)
        active.append(part_MF.mean(dim=1).square() / part_MF.square().mean(dim=1))
        outputs.append(output_MD)
    if not experts:
        outputs = list(_outputs(layer, x_MD))
        active = [torch.full((len(x_MD),), torch.nan)] * layer.config.num_experts
    return torch.stack(outputs, dim=1), torch.stack(active, dim=1)


def _run(kind: ffn.FFN, weights: Weights, x_MD: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the last matrix of an FFN gets (M, F), and its output (M, D), in float32 at least."""
    weights = {name: precise(w) for name, w in weights.items()}
    hidden_MF = ffn.hidden(kind, weights, x_MD.to(weights["fc1.weight"].dtype))
    return hidden_MF, F.linear(hidden_MF, weights["fc2.weight"], weights.get("fc2.bias"))


def _observe(y_MND: Tensor, active_MN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what is kept of outputs: norms (M, N), cosines (M, P), active share (M, N)."""
    return y_MND.norm(dim=2), cosines(y_MND @ y_MND.mT), active_MN


def _angular(cosines_MP: Tensor, sample_MND: Tensor) -> Permuted | None:
    """Return the mean angular similarity, beside that of outputs for exchanged tokens of a sample."""
    value = mean(_similar(cosines_MP))
    y_NMD = F.normalize(sample_MND[:, :EXCHANGING], dim=2).transpose(0, 1)
    found = [
        exchange_moments(_similar((y_NMD[i] @ y_NMD[j].T).clamp(-1, 1)).nan_to_num())
        for i in range(len(y_NMD)) for j in range(i)
        if y_NMD.shape[1] > 1
    ]  # fmt: skip
    if value is None or not found:
        return None
    means, variances = np.array(found).T
    return Permuted.normal(value, float(means.mean()), float(variances.sum()) / len(found) ** 2)


def _similar(cosine: Tensor) -> Tensor:
    """Return angular similarities in 0..1."""
    return 1 - cosine.arccos() / math.pi


def _rank_table(scores_RN: Tensor, norms_RN: Tensor) -> dict[str, Any]:
    """Return `ranks` and `diagonal` of an OutputComparison."""
    n = scores_RN.shape[1]
    by_score, by_norm = (values.cpu().argsort(dim=1, stable=True).argsort(dim=1) for values in (scores_RN, norms_RN))

    def counted(one_RN: Tensor, other_RN: Tensor) -> np.ndarray:
        counts = torch.bincount((one_RN * n + other_RN).flatten(), minlength=n * n)
        return counts.view(n, n).numpy()

    # how often the score of one expert had the rank that the norm of another had
    met_NN = counted(by_score.argsort(dim=1), by_norm.argsort(dim=1))
    rows, total, all_experts = counted(by_score, by_norm), by_score.numel(), np.arange(n)
    diagonal = (
        Permuted.relabelled(n, lambda labels: float(met_NN[all_experts, labels].sum() / total)) if total else None
    )
    return {"ranks": rows.tolist(), "diagonal": diagonal}


def _follows_norms(scores_RN: Tensor, best_R: Tensor, norms_RN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return for rows whose norms differ the rank correlation of scores and norms, and 1 if the best has the largest.

    The third tensor (R,) says which rows these are. The scores are logits, which have the order of the probabilities
    and do not underflow. Rows without an expert (-1) have no best one.
    """
    largest_R1 = norms_RN.amax(dim=1, keepdim=True)
    differ_R = (largest_R1 - norms_RN).amax(dim=1) > ROUNDING * largest_R1[:, 0]
    ranks = (torch.from_numpy(stats.rankdata(v.cpu().numpy(), axis=1)) for v in (scores_RN, norms_RN))
    is_largest_RN = norms_RN >= (1 - ROUNDING) * largest_R1
    hit_R = is_largest_RN.gather(1, best_R.clamp(min=0)[:, None])[:, 0] / is_largest_RN.sum(dim=1)
    return pearson(*ranks)[differ_R.cpu()], hit_R[differ_R & (best_R >= 0)], differ_R
