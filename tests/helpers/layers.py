"""MoE layers beside the naive loop: cases, inputs, and comparisons of outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers import reference
from helpers.tiny import randomise
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

import vimoe
from vimoe.moe.router import TokenLayout

DIM, HIDDEN, IMAGES, TOKENS, EXPERTS = 8, 12, 3, 6, 4


FFNS = {
    "mlp": lambda: Mlp(DIM, HIDDEN),
    "mlp, norm": lambda: Mlp(DIM, HIDDEN, norm_layer=nn.LayerNorm),
    "mlp, no biases": lambda: Mlp(DIM, HIDDEN, bias=False),
    "mlp, first bias only": lambda: Mlp(DIM, HIDDEN, bias=(True, False)),
    "mlp, relu": lambda: Mlp(DIM, HIDDEN, act_layer=nn.ReLU),
    "glu, gate last": lambda: GluMlp(DIM, 2 * HIDDEN),
    "glu, gate last, norm": lambda: GluMlp(DIM, 2 * HIDDEN, norm_layer=nn.LayerNorm),
    "glu, gate first": lambda: GluMlp(DIM, 2 * HIDDEN, act_layer=nn.SiLU, gate_last=False),
    "glu, no biases": lambda: GluMlp(DIM, 2 * HIDDEN, bias=False),
    "swiglu": lambda: SwiGLU(DIM, HIDDEN),
    "swiglu, norm": lambda: SwiGLU(DIM, HIDDEN, norm_layer=nn.LayerNorm),
    "swiglu, no biases": lambda: SwiGLU(DIM, HIDDEN, bias=False),
}


# what is routed, by what: routing, class token, number of prefix tokens
LAYOUTS = {
    "image by class token": ("image", True, 1),
    "image by class token, registers": ("image", True, 3),
    "image by mean": ("image", False, 0),
    "image by mean without registers": ("image", False, 2),
    "token": ("token", True, 1),
}


COMBINE = {"mix": ("mix", False), "sum": ("sum", False), "sum, normalised": ("sum", True)}


Score = Callable[[dict[str, Tensor], Tensor, int], Tensor]
Decide = Callable[[list[Tensor], int], list[dict[int, Tensor]]]
OfExpert = Callable[[dict[str, Tensor], int], dict[str, Tensor]]


def make(
    ffn: str = "mlp", layout: str = "token", combine: str = "mix", shared: int = 1, k: int = 2, **settings: object
) -> vimoe.MoE:
    """A layer all of whose experts differ; `settings` are further ones."""
    routing, class_token, prefix = LAYOUTS[layout]
    rule, normalised = COMBINE[combine]
    config = vimoe.MoEConfig(
        num_experts=EXPERTS,
        top_k=k,
        routing=routing,
        num_shared_experts=shared,
        combine=rule,
        normalize_gates=normalised,
        **settings,
    )
    torch.manual_seed(0)
    return randomise(vimoe.MoE(FFNS[ffn](), config, TokenLayout(prefix, class_token)))


def tokens(images: int = IMAGES, length: int = TOKENS) -> Tensor:
    return torch.randn(images, length, DIM, generator=torch.Generator().manual_seed(1))


def by_reference(
    layer: vimoe.MoE, x: Tensor, weights: dict[str, Tensor], chosen: list | None = None, score: Score | None = None,
    decide: Decide | None = None, of_expert: OfExpert = lambda own, e: {name: w[e] for name, w in own.items()},
) -> Tensor:  # fmt: skip
    """Output of the reference for these weights of the layer, which are named as in the layer.

    `score` gives the scores of a feature and its place in the image, by the router's weights. `of_expert` gives the
    canonical weights of an expert, by default those stacked at its index.
    """
    config, layout = layer.config, layer.router.layout
    experts = [
        expert(
            of_expert({n.removeprefix("experts."): w for n, w in weights.items() if n.startswith("experts.")}, e), layer
        )
        for e in range(config.num_experts)
    ]
    shared = {n.removeprefix("shared."): w for n, w in weights.items() if n.startswith("shared.")}
    of_router = {n.removeprefix("router."): w for n, w in weights.items() if n.startswith("router.")}
    return reference.moe(
        x,
        weights["router.weight"],
        experts,
        shared_expert(shared, layer) if shared else None,
        top_k=config.top_k,
        routing=config.routing,
        class_token=layout.class_token,
        num_prefix_tokens=layout.num_prefix_tokens,
        combine=config.combine,
        normalize_gates=config.normalize_gates,
        chosen=chosen,
        score=None if score is None else lambda feature, place: score(of_router, feature, place),
        decide=decide,
        gate=config.gate,
        gate_weight=config.gate_weight or (0.5 if shared and not config.normalize_gates else 1.0),
        gate_bias=of_router.get("gate.bias", 0.0),
    )


def expert(weights: dict[str, Tensor], layer: vimoe.MoE) -> reference.FFN:
    """Experts hold the rows of the gate before those of the value, whatever their FFN did."""
    gated = weights["fc1.weight"].shape[0] == 2 * weights["fc2.weight"].shape[1]
    first = halves(weights, "fc1") if gated else [None, pair(weights, "fc1")]
    return _ffn(weights, *first, layer)


def shared_expert(weights: dict[str, Tensor], layer: vimoe.MoE) -> reference.FFN:
    """The shared expert is an FFN of timm's, with timm's names and order."""
    if isinstance(layer.shared, SwiGLU):
        return _ffn(weights, pair(weights, "fc1_g"), pair(weights, "fc1_x"), layer)
    if isinstance(layer.shared, GluMlp):
        first, second = halves(weights, "fc1")
        return _ffn(weights, *((second, first) if layer.shared.gate_last else (first, second)), layer)
    return _ffn(weights, None, pair(weights, "fc1"), layer)


def _ffn(weights: dict[str, Tensor], gate: tuple | None, fc1: tuple, layer: vimoe.MoE) -> reference.FFN:
    norm = pair(weights, "norm") if "norm.weight" in weights else None
    return reference.FFN(fc1=fc1, fc2=pair(weights, "fc2"), gate=gate, norm=norm, eps=1e-5, act=layer.experts.act)


def pair(weights: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor | None]:
    return weights[f"{name}.weight"], weights.get(f"{name}.bias")


def halves(weights: dict[str, Tensor], name: str) -> list[tuple[Tensor, Tensor | None]]:
    weight, bias = pair(weights, name)
    return list(zip(weight.chunk(2), [None, None] if bias is None else bias.chunk(2), strict=True))


def assert_agrees(layer: vimoe.MoE, x: Tensor, all_used: bool = True, **reference: Any) -> None:
    """Output and every gradient of the layer are those of the reference in float64, to the rounding of their type.

    `reference` has further arguments of `by_reference`.
    """
    x = x.detach().requires_grad_()
    exact = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    exact_x = x.detach().double().requires_grad_()
    fixed = {name: b.double() for name, b in layer.named_buffers()}
    y, exact_y = layer(x), by_reference(layer, exact_x, {**exact, **fixed}, **reference)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    (y * direction).sum().backward()
    (exact_y * direction).sum().backward()
    assert_close(y, exact_y)
    assert_close(x.grad, exact_x.grad)
    for name, p in layer.named_parameters():
        assert_close(p.grad, exact[name].grad, name)
        if all_used and not (name == "router.weight" and layer.router.blind):
            assert exact[name].grad.abs().max() > 1e-3, f"{name}: the comparison would be of zeros"


def assert_close(actual: Tensor, exact: Tensor, name: str = "") -> None:
    rounding = 1 if actual.dtype == torch.float32 else 1e-7
    assert actual.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(
        actual.double(), exact, rtol=1e-5 * rounding, atol=5e-6 * rounding, msg=lambda text: f"{name}: {text}"
    )


def assert_exports_and_compiles(layer: nn.Module) -> None:
    """One exported program and one compiled graph give what the layer gives, for more than one number of images."""
    dynamic = ({0: torch.export.Dim("images", min=2, max=64)},)
    program = torch.export.export(layer, (tokens(),), dynamic_shapes=dynamic)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for count in (2, 5):
        torch.testing.assert_close(program.module()(tokens(count)), layer(tokens(count)))
        torch.testing.assert_close(compiled(tokens(count)), layer(tokens(count)))
