"""Gates against their formulas: values, and the gradients that they give a router."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.layers import assert_agrees, make, tokens
from helpers.reference import gated
from torch import Tensor

import vimoe
from vimoe.config.moe import GATES, MoEConfig
from vimoe.moe.gates import Gate

ROWS = [[2, 0, 1], [3, -1, -1], [-1, -1, -1], [1, 3, -1]]  # 3, 1, 0 and 2 experts of 4


def gate(**settings: object) -> Gate:
    config = MoEConfig(**{"num_experts": 4, "top_k": 3, **settings})
    made = GATES.find(config.gate)(config, torch.zeros((), dtype=torch.float64))
    for parameter in made.parameters():
        parameter.data.fill_(0.3)
    return made


def decided(scores: Tensor, experts: list[list[int]] = ROWS) -> vimoe.Routing:
    """The decisions of a router whose own weights are a softmax."""
    chosen = torch.tensor(experts)
    own = scores.softmax(dim=1).gather(1, chosen.clamp(min=0)) * (chosen >= 0)
    return vimoe.Routing(scores, own, chosen, "token", (1, len(experts)), ragged=True)


def scores() -> Tensor:
    return torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize("sums", [{}, {"num_shared_experts": 0}, {"combine": "sum", "normalize_gates": True}], ids=str)
@pytest.mark.parametrize("kind", ["probability", "choice", "sigmoid"])
def test_gates_and_their_gradients_are_those_of_the_formula(kind: str, sums: dict) -> None:
    made, ours, theirs = gate(gate=kind, **sums), scores(), scores()
    found = made(decided(ours)).gates
    bias, b = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), 1.0 if sums else 0.5
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for r, row in enumerate(ROWS):
        own = {e: theirs[r].softmax(0)[e] for e in row if e >= 0}
        for slot, value in enumerate(gated(own, theirs[r], kind, b, bias, bool(sums)).values()):
            expected[r, slot] = value
    direction = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    assert ours.grad[0].any() and not ours.grad[2].any() and not found[2].any()
    for parameter in made.parameters():
        torch.testing.assert_close(parameter.grad, bias.grad)


@pytest.mark.parametrize("weight", [0.5, 1.0, 0.8, 3.0])
def test_experts_that_are_chosen_share_the_weight_in_equal_parts(weight: float) -> None:
    found = gate(gate="choice", gate_weight=weight)(decided(scores()))
    assert found.gates.tolist() == [[weight / 3] * 3, [weight, 0, 0], [0, 0, 0], [weight / 2, weight / 2, 0]]
    assert torch.equal(found.experts, torch.tensor(ROWS)) and found.ragged


def test_the_router_of_a_choice_learns_by_the_relative_change_of_the_probability() -> None:
    """Of y = S + b g/sg(g) (E - S) the gradient is b/g dg (E - S), with g the softmax's probability."""
    layer, x = make(k=1, gate="choice").double(), tokens().double()
    with vimoe.record(layer) as routings:
        y = layer(x)
    direction = torch.randn(y.shape, dtype=torch.float64)
    (dlogits,) = torch.autograd.grad((y * direction).sum(), routings[0].logits)
    expected = torch.zeros_like(dlogits)
    for r, (token, v) in enumerate(zip(x.flatten(0, 1), direction.flatten(0, 1), strict=True)):
        p, i = routings[0].logits[r].softmax(0).detach(), int(routings[0].experts[r, 0])
        one = torch.tensor([int(e == i) for e in range(4)])
        output = layer.experts(token[None, None], torch.tensor([0]), one)[0, 0]
        dg = p[i] * (one - p)
        expected[r] = 0.5 / p[i] * dg * (v @ (output - layer.shared(token)))
    torch.testing.assert_close(dlogits, expected)


@pytest.mark.parametrize("kind", ["probability", "choice", "sigmoid"])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("shared", [0, 1])
def test_the_layer_agrees_with_the_loop(shared: int, k: int, kind: str) -> None:
    layer, x = make(k=k, shared=shared, gate=kind).double(), tokens().double()
    assert_agrees(layer, x, all_used=False)
    assert bool(layer.router.weight.grad.abs().max() > 1e-3) == (not layer.router.blind)


@pytest.mark.parametrize("kind", ["probability", "choice", "sigmoid"])
@pytest.mark.parametrize("alone", [False, True])
def test_a_weight_that_has_rounded_to_zero_is_a_choice_all_the_same(alone: bool, kind: str) -> None:
    logits = torch.tensor([[500.0, 0.0, -3.0, 4.0]], requires_grad=True)
    made = gate(gate=kind, top_k=2, **({"num_shared_experts": 0} if alone else {}))
    found = made(decided(logits, [[2, 1]]))
    assert not logits.softmax(1)[0, 1:].any()
    total = {("probability", False): 0, ("choice", False): 0.5, ("sigmoid", False): 0.6374}.get((kind, alone), 1)
    assert found.gates.sum().item() == pytest.approx(total, abs=1e-3)
    found.gates[0, 0].backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["probability", "choice", "sigmoid"])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_gates_are_in_the_type_of_the_scores(precision: torch.dtype, kind: str) -> None:
    assert gate(gate=kind)(decided(scores().to(precision))).gates.dtype == precision


@pytest.mark.parametrize(
    ("settings", "weight"),
    [
        ({}, 0.5),
        ({"num_shared_experts": 2}, 0.5),
        ({"combine": "sum"}, 0.5),
        ({"num_shared_experts": 0}, 1),
        ({"num_shared_experts": 0, "combine": "sum"}, 1),
        ({"combine": "sum", "normalize_gates": True}, 1),
        ({"gate_weight": 0.7}, 0.7),
    ],
    ids=str,
)
def test_the_weight_of_a_choice_is_a_half_with_a_shared_expert_and_1_without(settings: dict, weight: float) -> None:
    made = gate(gate="choice", top_k=1, **settings)
    assert made.config.choice_weight == weight
    assert made(decided(scores(), [[0], [1], [2], [3]])).gates.flatten().tolist() == [weight] * 4


def test_a_weight_that_is_no_1_where_gates_sum_to_1_is_refused() -> None:
    for settings in ({"num_shared_experts": 0}, {"combine": "sum", "normalize_gates": True}):
        with pytest.raises(vimoe.VimoeError, match="gate_weight=0.7 where the gates of the chosen experts sum to 1"):
            MoEConfig(gate="choice", gate_weight=0.7, **settings)


def test_gates_of_all_experts_are_those_of_the_formula() -> None:
    logits, probabilities = scores(), scores().softmax(1)
    assert torch.equal(gate().of_all(probabilities, logits), probabilities)
    expected = 1 / (1 + (-logits - 0.3).exp())
    torch.testing.assert_close(gate(gate="sigmoid").of_all(probabilities, logits), expected)


@pytest.mark.parametrize(
    ("kind", "constant_router", "one_slot_that_sums", "otherwise"),
    [("probability", True, True, False), ("choice", True, False, False), ("sigmoid", False, True, False)],
)
def test_a_gate_knows_when_it_is_constant(
    kind: str, constant_router: bool, one_slot_that_sums: bool, otherwise: bool
) -> None:
    with_shared, alone = gate(gate=kind), gate(gate=kind, num_shared_experts=0)
    assert with_shared.blind(slots=1, constant=True) == constant_router
    assert alone.blind(slots=1, constant=False) == one_slot_that_sums
    assert with_shared.blind(slots=1, constant=False) == alone.blind(slots=2, constant=False) == otherwise


def test_a_sigmoid_starts_at_one_half_for_a_score_of_0_and_its_bias_is_the_routers() -> None:
    layer = make(k=1, gate="sigmoid")
    with torch.no_grad():
        layer.router.gate.bias.zero_()
        layer.router.weight.zero_()
    assert (layer.router(tokens()).gates == 0.5).all()
    layer(tokens()).square().sum().backward()
    assert layer.router.gate.bias.grad.abs() > 1e-3
    assert "router.gate.bias" in layer.state_dict()


def test_pruning_tells_the_gate_how_many_experts_are_left() -> None:
    layer = make(k=1, gate="choice")
    layer.keep_experts([1])
    assert layer.router.gate.config == layer.config and layer.router.blind
    assert replace(layer.config, num_experts=4).choice_weight == 0.5
