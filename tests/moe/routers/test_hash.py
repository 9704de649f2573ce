"""The hash router: a fixed table decides by place, and nothing is learnt."""

from __future__ import annotations

import pytest
import torch
from helpers.layers import assert_agrees, make, tokens
from helpers.routers import GATES, SETTINGS, top_k
from helpers.tiny import config, images, layers, perturb_experts, upcycle, vit
from torch import Tensor

import vimoe


def column(own: dict[str, Tensor], feature: Tensor, place: int) -> Tensor:
    return own["weight"][:, place % 4096]


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_agrees_with_the_loop(settings: dict, gate: dict) -> None:
    layer, x = make(router="hash", **settings, **gate).double(), tokens().double()
    assert_agrees(layer, x, all_used=False, score=column, decide=top_k())


def test_the_table_is_normal_and_the_same_for_all_layers_and_runs() -> None:
    torch.manual_seed(1)
    first = make(router="hash").router.weight
    model = upcycle(vit(), config(router="hash", routing="token"))
    assert all(torch.equal(layer.router.weight, first) for layer in layers(model))
    assert first.shape == (4, 4096) and first.dtype == torch.float32
    assert abs(first.mean()) < 0.03 and abs(first.std() - 1) < 0.03
    assert first[:, 0].tolist() == pytest.approx([-1.1258, 1.9476, 0.2652, -1.089], abs=1e-4)


def test_the_place_alone_decides_and_places_repeat_after_the_table() -> None:
    router = make(router="hash").router
    routing = router(torch.randn(2, 4100, 8))
    by_image = routing.experts.view(2, 4100, 2)
    assert torch.equal(by_image[0], by_image[1]) and torch.equal(by_image[0, :4], by_image[0, 4096:])
    assert len(by_image[0, :, 0].unique()) == 4
    assert torch.equal(router(torch.randn(1, 5, 8)).experts, by_image[0, :5])
    assert torch.equal(routing.experts[:4096, 0], router.weight.argmax(dim=0))


def test_it_has_no_parameters_no_arithmetic_and_needs_no_gradient() -> None:
    layer = make(router="hash")
    assert not list(layer.router.parameters()) and layer.router.macs == 0
    routing = layer.router(tokens().requires_grad_())
    assert not routing.gates.requires_grad and not routing.logits.requires_grad
    layer(tokens()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.experts.parameters())
    model, plain = (upcycle(vit(), config(router=router, routing="token")) for router in ("hash", "softmax"))
    assert vimoe.count(plain).params - vimoe.count(model).params == 2 * 4 * 24
    assert vimoe.count(plain).macs - vimoe.count(model).macs == 2 * 5 * 4 * 24


def test_exports_and_compiles_with_any_number_of_images() -> None:
    model = perturb_experts(upcycle(vit(), config(router="hash", routing="token")))
    x = images(model, 2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("images", min=2, max=64)},))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for batch in (x, images(model, 5)):
        torch.testing.assert_close(program.module()(batch), model(batch))
        torch.testing.assert_close(compiled(batch), model(batch))
