"""The cosine router against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.layers import assert_agrees, make, tokens
from helpers.routers import GATES, SETTINGS, top_k
from helpers.tiny import config, layers, upcycle, vit
from timm.layers import Mlp
from torch import Tensor

import vimoe
from vimoe.moe.router import TokenLayout


def cosine(own: dict[str, Tensor], feature: Tensor, place: int) -> Tensor:
    projected = (own["projection"] * feature).sum(dim=1)
    scale = own["log_scale"].exp() if own["log_scale"] < math.log(100) else 100
    norms = (own["weight"] ** 2).sum(dim=1).sqrt() * (projected**2).sum().sqrt()
    return scale * (own["weight"] * projected).sum(dim=1) / norms


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("layout", ["image by mean", "token"])
def test_it_agrees_with_the_loop(layout: str, settings: dict, gate: dict) -> None:
    layer, x = make(layout=layout, router="cosine", **settings, **gate).double(), tokens().double()
    assert_agrees(layer, x, all_used=False, score=cosine, decide=top_k())
    for name in ("weight", "projection", "log_scale"):
        assert layer.router.get_parameter(name).grad.abs().max() > 1e-3, name


def test_it_starts_at_a_scale_of_2_which_counts_as_100_at_most() -> None:
    layer = vimoe.MoE(Mlp(8, 12), config(router="cosine", routing="token"), TokenLayout(1, True))
    assert layer.router.log_scale.exp().item() == pytest.approx(2)
    x = tokens(1, 500)
    sizes = []
    for scale in (2.0, 100.0, 1e6):
        with torch.no_grad():
            layer.router.log_scale.fill_(math.log(scale))
        logits = layer.router(x).logits
        sizes.append(logits.abs().max().item())
    assert 1.5 < sizes[0] <= 2 and sizes[1] == pytest.approx(50 * sizes[0], rel=1e-5) and sizes[2] == sizes[1]
    logits.sum().backward()
    assert layer.router.log_scale.grad == 0 and layer.router.projection.grad.abs().max() > 0


def test_lengths_of_tokens_and_of_directions_do_not_matter() -> None:
    router, x = make(router="cosine").router, tokens()
    logits = router(x).logits
    with torch.no_grad():
        router.weight *= torch.tensor([0.1, 1.0, 2.0, 30.0])[:, None]
    torch.testing.assert_close(router(5 * x).logits, logits)


@pytest.mark.parametrize(("dim", "channels"), [(1, 1), (3, 1), (24, 12), (768, 256)])
def test_the_projection_has_half_of_the_channels_256_at_most(dim: int, channels: int) -> None:
    router = vimoe.MoE(Mlp(dim, 4), config(router="cosine"), TokenLayout(1, True)).router
    assert router.weight.shape == (4, channels) and router.projection.shape == (channels, dim)


@pytest.mark.parametrize("routing", ["image", "token"])
def test_count_knows_the_projection(routing: str) -> None:
    plain, cosine = (upcycle(vit(), config(routing=routing, router=router)) for router in ("softmax", "cosine"))
    rows = (1 + plain.patch_embed.num_patches) if routing == "token" else 1
    more = 12 * 24 + 4 * 12 - 4 * 24
    assert vimoe.count(cosine).macs - vimoe.count(plain).macs == 2 * rows * more
    assert vimoe.count(cosine).params - vimoe.count(plain).params == 2 * (more + 1)


def test_a_token_of_zeros_has_no_direction_and_scores_zero() -> None:
    layer = make(router="cosine")
    routing = layer.router(torch.zeros(1, 2, 8, requires_grad=True))
    assert not routing.logits.any()
    routing.gates.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.router.parameters())


def test_all_of_its_parameters_are_those_of_a_router() -> None:
    """So that they have the router's rate, and pruning keeps the projection that all experts share."""
    model = upcycle(vit(), config(router="cosine"))
    router = layers(model)[0].router
    before = router.projection
    layers(model)[0].keep_experts([2, 0])
    assert router.projection is before and router.weight.shape == (2, 12)
    assert {name for name, _ in router.named_parameters()} == {"weight", "projection", "log_scale"}
