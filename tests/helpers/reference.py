"""The MoE layer as its definition reads: one image, one token, one expert after the other.

Shares no code with vimoe. Weights are plain tensors of any type, and autograd goes through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class FFN:
    """fc2(norm(act(fc1(x)))), or fc2(norm(act(gate(x)) * fc1(x))) where there is a gate. Pairs are (weight, bias)."""

    fc1: tuple[Tensor, Tensor | None]
    fc2: tuple[Tensor, Tensor | None]
    act: Callable[[Tensor], Tensor]
    gate: tuple[Tensor, Tensor | None] | None = None
    norm: tuple[Tensor, Tensor] | None = None
    eps: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        hidden = affine(x, *self.fc1)
        hidden = self.act(hidden) if self.gate is None else self.act(affine(x, *self.gate)) * hidden
        if self.norm is not None:
            deviation = hidden - hidden.mean()
            hidden = deviation / ((deviation**2).mean() + self.eps).sqrt() * self.norm[0] + self.norm[1]
        return affine(hidden, *self.fc2)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = (weight * x).sum(dim=1)
    return y if bias is None else y + bias


def moe(
    x: Tensor,
    router: Tensor,
    experts: Sequence[FFN],
    shared: FFN | None,
    *,
    top_k: int,
    routing: str,
    class_token: bool,
    num_prefix_tokens: int,
    combine: str,
    normalize_gates: bool,
    chosen: Sequence[Sequence[int]] | None = None,
    score: Callable[[Tensor, int], Tensor] | None = None,
    decide: Callable[[list[Tensor], int], list[dict[int, Tensor]]] | None = None,
    gate: str = "probability",
    gate_weight: float = 0.5,
    gate_bias: Tensor | float = 0.0,
) -> Tensor:
    """(B, T, D) to (B, T, D). `chosen` replaces the router's choice (where scores tie, any choice is right).

    `score` replaces the linear map: it gives the scores of a feature, and of its place in the image. `decide` replaces
    softmax and top-k: for the scores of each token of an image (or of the image, alone) and k it gives the router's own
    weights of the chosen experts.
    """
    normal = normalize_gates or (combine == "mix" and shared is None)
    outputs = []
    for b, image in enumerate(x):
        features = list(image) if routing == "token" else [image[0] if class_token else mean(image[num_prefix_tokens:])]
        scores = [score(feature, t) if score else affine(feature, router, None) for t, feature in enumerate(features)]
        if decide is not None:
            own = decide(scores, top_k)
        else:
            best = chosen[b * len(scores) :] if chosen else [None] * len(scores)
            own = [_softmax(each, top_k, best[i]) for i, each in enumerate(scores)]
        gates = [gated(*each, gate, gate_weight, gate_bias, normal) for each in zip(own, scores, strict=True)]
        for t, token in enumerate(image):
            outputs.append(_combine(token, gates[t if routing == "token" else 0], experts, shared, combine))
    return torch.stack(outputs).view_as(x)


def gated(
    own: dict[int, Tensor], scores: Tensor, kind: str, weight: float, bias: Tensor | float, normal: bool
) -> dict[int, Tensor]:
    """The gates of a row's chosen experts, from the router's own weights of them, and the scores of all experts."""
    if kind == "choice":
        return {i: weight / len(own) * p / p.detach() for i, p in own.items()}
    if kind == "sigmoid":
        own = {i: 1 / (1 + (-scores[i] - bias).exp()) for i in own}
    return {i: gate / sum(own.values()) for i, gate in own.items()} if normal else own


def _softmax(scores: Tensor, top_k: int, chosen: Sequence[int] | None) -> dict[int, Tensor]:
    exponentials = (scores - scores.max()).exp()
    probabilities = list(exponentials / exponentials.sum())
    best = chosen or sorted(range(len(probabilities)), key=lambda i: -probabilities[i].item())
    return {i: probabilities[i] for i in best[:top_k]}


def mean(vectors: Tensor) -> Tensor:
    return sum(vectors[1:], vectors[0]) / len(vectors)


def _combine(
    token: Tensor, gates: dict[int, Tensor], experts: Sequence[FFN], shared: FFN | None, combine: str
) -> Tensor:
    y = torch.zeros_like(token) if shared is None else shared(token)
    for i, gate in gates.items():
        change = experts[i](token)
        if combine == "mix" and shared is not None:
            change = change - shared(token)
        y = y + gate * change
    return y
