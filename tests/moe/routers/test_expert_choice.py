"""Expert choice against its formula, with the exact capacity in each image."""

from __future__ import annotations

import pytest
import torch
from helpers.kinds import DECIDE
from helpers.layers import DIM, HIDDEN, assert_agrees, assert_exports_and_compiles, make, tokens
from helpers.routers import GATES, SETTINGS
from helpers.tiny import config, images, layers, upcycle, vit
from timm.layers import Mlp

import vimoe
from vimoe.moe.router import TokenLayout


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_it_agrees_with_the_loop(k: int, settings: dict, gate: dict) -> None:
    layer, x = make(router="expert_choice", k=k, **settings, **gate).double(), tokens().double()
    assert_agrees(layer, x, all_used=False, decide=DECIDE["expert_choice"])
    assert layer.router.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("equal", [True, False], ids=["ties", "scores"])
@pytest.mark.parametrize(
    ("experts", "k", "length", "capacity"),
    [(4, 1, 8, 2), (4, 2, 8, 4), (4, 4, 8, 8), (4, 1, 3, 1), (8, 1, 3, 1), (8, 3, 5, 2), (3, 2, 5, 3), (8, 2, 197, 49)],
)
def test_each_expert_takes_exactly_its_capacity_of_each_image(
    experts: int, k: int, length: int, capacity: int, equal: bool
) -> None:
    settings = config(router="expert_choice", routing="token", num_experts=experts, top_k=k)
    router = vimoe.MoE(Mlp(DIM, HIDDEN), settings, TokenLayout(1, True)).router
    scores = torch.zeros(3 * length, experts) if equal else torch.randn(3 * length, experts)
    assert router.route(scores, (3, length)).usage.tolist() == [[capacity] * experts] * 3


def test_prefix_tokens_are_tokens_among_others() -> None:
    """Whether the class token comes first or last changes the places of the decisions alone."""
    layer, x = make(router="expert_choice"), tokens()
    found = layer.router(x).experts.view(3, 6, -1)
    assert torch.equal(layer.router(x.roll(1, dims=1)).experts.view(3, 6, -1).roll(-1, dims=1), found)
    assert (found[:, 0] >= 0).any()


def test_a_token_gets_top_k_experts_on_average_and_is_counted_so() -> None:
    parent, model = vit(), upcycle(vit(), config(router="expert_choice", routing="token", top_k=2))
    with vimoe.record(model) as routings:
        model(images(model, 7))
    mean = float((routings[0].experts >= 0).sum(dim=1).float().mean())  # 2 or 3 of 5 tokens for each of 4 experts
    assert mean == pytest.approx(round(2 * 5 / 4) * 4 / 5) and abs(mean - 2) <= 0.5
    expert = sum(p[0].numel() for p in layers(model)[0].experts.parameters())
    router = layers(model)[0].router.weight.numel()
    assert vimoe.count(model).activated_params == vimoe.count(parent).params + 2 * (2 * expert + router)
    plain = upcycle(vit(), config(routing="token", top_k=2))
    assert vimoe.count(model).macs == vimoe.count(plain).macs


def test_it_says_what_its_figures_depend_on() -> None:
    router = make(router="expert_choice", k=1).router
    assert router.slots == 4 and router.num_decisions == (2**4,) and router.ragged and router.tokens_interact


@pytest.mark.parametrize(
    ("settings", "mass"),
    [
        ({}, 0.5),
        ({"gate": "choice"}, 0.5),
        ({"gate": "sigmoid"}, 1.0),
        ({"num_shared_experts": 0}, 1.0),
        ({"num_shared_experts": 0, "gate": "choice"}, 1.0),
    ],
    ids=str,
)
def test_at_equal_scores_experts_weigh_as_with_an_even_choice_of_tokens(settings: dict, mass: float) -> None:
    """As top-k does: k of N experts each, with the weight 1/N, or what the gate makes of that."""
    for kind in ("softmax", "expert_choice"):
        settings = {"routing": "token", "top_k": 2, **settings}
        router = vimoe.MoE(Mlp(DIM, HIDDEN), config(router=kind, **settings), TokenLayout(1, True)).router
        assert router.neutral_gate_mass().tolist() == pytest.approx([mass / 4] * 4)


def test_one_expert_has_constant_weights() -> None:
    layer = vimoe.MoE(
        Mlp(DIM, HIDDEN), config(router="expert_choice", routing="token", num_experts=1), TokenLayout(1, True)
    )
    assert layer.router.blind and not make(router="expert_choice", k=1, shared=0).router.blind


def test_exports_and_compiles_with_any_number_of_images() -> None:
    """Though the number of filled slots depends on the number of images."""
    layer = make(router="expert_choice").eval()
    assert_exports_and_compiles(layer)
