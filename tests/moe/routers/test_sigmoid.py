"""The sigmoid router against its formula."""

from __future__ import annotations

import pytest
import torch
from helpers.layers import EXPERTS, assert_agrees, make, tokens
from helpers.routers import GATES, SETTINGS, top_k
from torch import Tensor


def sigmoid(scores: Tensor) -> Tensor:
    return 1 / (1 + (-scores).exp())


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("layout", ["image by mean", "token"])
def test_it_agrees_with_the_loop(layout: str, settings: dict, gate: dict) -> None:
    layer, x = make(layout=layout, router="sigmoid", **settings, **gate).double(), tokens().double()
    assert_agrees(layer, x, all_used=False, decide=top_k(sigmoid))
    assert layer.router.weight.grad.abs().max() > 1e-3


def test_a_weight_is_the_sigmoid_of_its_own_score_alone() -> None:
    router = make(router="sigmoid").router
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [2.0, 1.9, 0.0, -9.0]])
    routing = router.route(logits, (1, 2))
    assert routing.experts.tolist() == [[0, 1], [0, 1]]
    assert routing.gates[:, 0].tolist() == pytest.approx([0.8807971] * 2)
    assert router.probabilities(logits)[1].tolist() == pytest.approx([0.8807971, 0.8698915, 0.5, 0.0001234], rel=1e-3)


def test_with_gates_that_sum_to_one_it_divides_as_deepseek_v3_does() -> None:
    router = make(router="sigmoid", shared=0).router
    gates = router.route(torch.tensor([[2.0, 1.0, 0.0, -1.0]]), (1, 1)).gates
    assert gates.tolist()[0] == pytest.approx([0.8807971 / (0.8807971 + 0.7310586), 0.7310586 / 1.6118557])


def test_a_bias_is_added_to_the_sigmoid_where_experts_are_chosen() -> None:
    router = make(router="sigmoid", bias_update_rate=0.001).router
    router.choice_bias.copy_(torch.tensor([0.0, 0.0, 0.2, 0.41]))
    routing = router.route(torch.tensor([[2.0, 0.5, 0.0, 0.0]]), (1, 1))  # sigmoids .88, .62, .5, .5
    assert routing.experts.tolist() == [[3, 0]]  # by softmax, .68, .15, .09 and .09, the order is the other
    assert routing.gates[0].tolist() == pytest.approx([0.5, 0.8807971])


@pytest.mark.parametrize(
    ("settings", "blind"),
    [
        ({"k": 1, "shared": 0}, True),
        ({"k": 2, "shared": 0}, False),
        ({"k": 1}, False),
        ({"k": 1, "shared": 0, "gate": "choice"}, False),
        ({"k": 1, "shared": 0, "gate": "sigmoid"}, True),
    ],
    ids=str,
)
def test_it_is_blind_where_its_only_gate_is_always_one(settings: dict, blind: bool) -> None:
    layer = make(router="sigmoid", **settings)
    layer(tokens()).square().sum().backward()
    assert layer.router.blind == blind == (not layer.router.weight.grad.abs().max() > 1e-4)


def test_of_one_expert_it_still_learns_the_weight() -> None:
    alone = make(router="sigmoid", k=1)
    alone.keep_experts([2])
    alone(tokens()).square().sum().backward()
    assert not alone.router.blind and alone.router.weight.grad.abs().max() > 1e-3


def test_chance_chooses_each_expert_alike() -> None:
    layer = make(router="sigmoid").train()
    layer.router.random_share = torch.tensor(1.0)
    torch.manual_seed(0)
    load = layer.router.route(torch.randn(4000, EXPERTS), (1, 4000)).load
    assert (load - 2000).abs().max() < 150
