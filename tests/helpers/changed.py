"""Layers whose experts change one FFN, as the formulas read: all experts compute all tokens, in plain torch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from helpers.layers import make, tokens
from torch import Tensor, nn

import vimoe

Weights = dict[str, Tensor]
OfExpert = Callable[[Weights, Tensor, int], Tensor]  # its own weights, tokens, index -> output


def ffn(p: Weights, x: Tensor, layer: vimoe.MoE, change1: Tensor | float = 0, change2: Tensor | float = 0) -> Tensor:
    """An FFN of timm's with these weights and changes of its matrices; of a gated one, the gate's rows come first."""
    weight, bias = (torch.cat([p[f"fc1_g.{n}"], p[f"fc1_x.{n}"]]) if f"fc1_g.{n}" in p else p.get(f"fc1.{n}") for n in (
        "weight", "bias"))  # fmt: skip
    if getattr(layer.experts.base, "gate_last", False):
        weight, bias = (w if w is None else torch.cat(w.chunk(2)[::-1]) for w in (weight, bias))
    hidden = activated(x @ (weight + change1).T + (0 if bias is None else bias), layer)
    if "norm.weight" in p:
        deviation = hidden - hidden.mean(-1, keepdim=True)
        normal = deviation / (deviation.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        hidden = normal * p["norm.weight"] + p["norm.bias"]
    return hidden @ (p["fc2.weight"] + change2).T + p.get("fc2.bias", 0)


def activated(first: Tensor, layer: vimoe.MoE) -> Tensor:
    if not layer.experts.kind.gated:
        return layer.experts.act(first)
    gate, value = first.chunk(2, dim=-1)
    return layer.experts.act(gate) * value


def under(p: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): w for name, w in p.items() if name.startswith(prefix)}


def mixture(p: Weights, x: Tensor, layer: vimoe.MoE, of_expert: OfExpert) -> Tensor:
    """S + sum g_i (E_i - S), or sum g_i E_i with gates that sum to 1; routed by the class token or token by token."""
    probabilities = F.softmax((x if layer.config.routing == "token" else x[:, :1]) @ p["router.weight"].T, dim=-1)
    gates, chosen = probabilities.topk(layer.config.top_k)
    shared = ffn(under(p, "shared."), x, layer) if layer.shared is not None else torch.zeros_like(x)
    if layer.shared is None:
        gates = gates / gates.sum(-1, keepdim=True)
    outputs = [of_expert(under(p, "experts."), x, e) for e in range(layer.config.num_experts)]
    weights = [(gates * (chosen == e)).sum(-1, keepdim=True) for e in range(len(outputs))]
    return shared + sum(w * (y - shared) for w, y in zip(weights, outputs, strict=True))


CASES = [("mlp", "token"), ("mlp, no biases", "image by class token"), ("swiglu", "token"),
         ("swiglu, no biases", "image by class token"), ("glu, gate last", "token")]  # fmt: skip


def assert_layer_agrees(kind: str, dense: str, layout: str, shared: int, expert: Callable, **settings: object) -> None:
    """Output and all gradients are those of the formula in float64; `expert(own, base, x, e, layer)` is one expert."""
    layer = make(dense, layout, experts=kind, shared=shared, **settings).double()
    x = tokens().double().requires_grad_()
    assert len(list(layer.experts.base.parameters())) > 1
    base = "shared." if shared == 1 else "experts.own."
    p = {name: w.detach().clone().requires_grad_() for name, w in layer.named_parameters()}
    exact_x = x.detach().clone().requires_grad_()
    y = layer(x)
    exact = mixture(p, exact_x, layer, lambda own, x, e: expert(own, under(p, base), x, e, layer))
    torch.testing.assert_close(y, exact)
    ours = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    theirs = torch.autograd.grad(exact.square().sum(), [exact_x, *p.values()])
    for name, a, b in zip(["x", *p], ours, theirs, strict=True):
        assert b.abs().max() > 1e-3, f"{name}: the comparison would be of zeros"
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def trained(kind: str, shared: int = 1) -> nn.Module:
    """A small ViT of timm's in eval mode whose last FFN became experts of this kind, after five steps of training."""
    return copy.deepcopy(_trained(kind, shared))


@functools.cache
@torch.enable_grad()
def _trained(kind: str, shared: int) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    settings = vimoe.MoEConfig(
        layers="last:1", num_experts=4, top_k=2, routing="token", num_shared_experts=shared, experts=kind
    )
    vimoe.upcycle(model, settings)
    x, labels = batch()
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(5):
        optimiser.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimiser.step()
    return model.eval()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3
