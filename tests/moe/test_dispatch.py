"""Routers that leave slots empty: the record, the layer against the naive loop, and what follows from the contract."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.kinds import DECIDE, UNITS
from helpers.layers import EXPERTS, IMAGES, LAYOUTS, TOKENS, assert_agrees, make, tokens

import vimoe
from vimoe.moe.dispatch import dispatch

ROUTERS = list(DECIDE)
CASES = [(router, layout) for layout, (unit, *_) in LAYOUTS.items() for router in ROUTERS if (router, unit) in UNITS]


def routing(experts: list[list[int]], unit: str = "token", images: int = 2) -> vimoe.Routing:
    """A record of 3 experts with these decisions; the gate of slot k of row r is r + k / 10."""
    rows, slots = len(experts), len(experts[0])
    chosen = torch.tensor(experts)
    gates = torch.arange(rows)[:, None] + torch.arange(slots) / 10
    batch = (images, rows // images if unit == "token" else 5)
    return vimoe.Routing(torch.zeros(rows, 3), gates * (chosen >= 0), chosen, unit, batch, ragged=True)


def test_a_record_counts_the_filled_slots_alone() -> None:
    found = routing([[2, 0], [-1, -1], [0, -1], [2, 1]])
    assert found.load.tolist() == [2, 1, 2]
    assert found.usage.tolist() == [[1, 0, 1], [1, 1, 1]]
    unit, expert, gate = found.pairs
    assert (unit.tolist(), expert.tolist()) == ([0, 0, 2, 3, 3], [2, 0, 0, 2, 1])
    assert gate.tolist() == pytest.approx([0, 0.1, 2, 3, 3.1])
    of_images = routing([[2, 0], [-1, -1]], "image")
    assert of_images.usage.tolist() == [[1, 0, 1], [0, 0, 0]] and of_images.load.tolist() == [1, 0, 1]


@pytest.mark.parametrize("layout", ["image by class token", "token"])
def test_a_full_record_gives_the_same_pairs_load_and_usage_as_its_rectangle(layout: str) -> None:
    layer, x = make(layout=layout), tokens()
    found = layer.router(x)
    assert torch.equal(found.pairs.expert, found.experts.flatten())
    assert torch.equal(found.pairs.gate, found.gates.flatten())
    assert torch.equal(found.load, found.experts.flatten().bincount(minlength=EXPERTS))
    by_image = found.experts.view(IMAGES, -1)
    assert found.usage.tolist() == [row.bincount(minlength=EXPERTS).tolist() for row in by_image]


@pytest.mark.parametrize("ffn", ["mlp", "glu, gate last, norm"])
@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("combine", ["mix", "sum"])
@pytest.mark.parametrize(("router", "layout"), CASES)
def test_the_layer_agrees_with_the_loop(router: str, layout: str, combine: str, shared: int, ffn: str) -> None:
    layer, x = make(ffn, layout, combine, shared, router=router).double(), tokens().double()
    counts = (layer.router(x).experts >= 0).sum(dim=1)
    assert layout.startswith("image") or len(counts.unique()) > 1
    assert_agrees(layer, x, all_used=False, decide=DECIDE[router])


@pytest.mark.parametrize("backend", ["loop", "grouped_mm", "bmm"])
def test_every_backend_has_the_gradients_where_there_are_as_many_pairs_as_tokens(backend: str) -> None:
    """Each of 4 experts takes a quarter of the tokens: as many slots as rows, some rows twice and some never."""
    layer, x = make(router="expert_choice", k=1), tokens(2, 8)
    found = layer.router(x)
    assert len(found.pairs.row) == len(found.experts) and len(found.pairs.row.unique()) < len(found.experts)
    assert_agrees(vimoe.set_backend(layer, backend), x, all_used=False, decide=DECIDE["expert_choice"])


@pytest.mark.parametrize("layout", ["image by class token", "token"])
@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("experts", ["ffn", "low_rank"])
def test_a_batch_without_any_choice_is_the_shared_expert_or_nothing(experts: str, shared: int, layout: str) -> None:
    layer, x = make("mlp", layout, shared=shared, router="threshold", experts=experts), tokens().abs()
    with torch.no_grad():
        layer.router.weight.fill_(-1)
    y = layer(x)
    assert torch.equal(y, layer.shared(x) if shared else torch.zeros_like(x))
    assert not layer.router(x).load.any()
    if shared:
        y.sum().backward()
        assert not any(p.grad is not None and p.grad.any() for p in layer.experts.parameters())


@pytest.mark.parametrize(("router", "layout"), [*(("softmax", layout) for layout in LAYOUTS), *CASES])
@torch.no_grad()
def test_an_image_gives_the_same_whatever_is_in_its_batch(router: str, layout: str) -> None:
    layer, x = make(layout=layout, router=router).double(), tokens(5).double()
    together = layer(x)
    for i in range(5):
        torch.testing.assert_close(layer(x[i : i + 1])[0], together[i])
        torch.testing.assert_close(layer(x.flip(0))[4 - i], together[i])


@pytest.mark.parametrize("router", ["softmax", *ROUTERS])
def test_a_score_of_minus_infinity_keeps_an_expert_from_being_chosen(router: str) -> None:
    layer, x = make(router=router), tokens()
    logits = layer.router(x).logits.detach()
    for expert in range(EXPERTS):
        assert (layer.router.decide(logits, (IMAGES, TOKENS)).experts == expert).any()
        ruled_out = logits.clone()
        ruled_out[:, expert] = -torch.inf
        assert not (layer.router.decide(ruled_out, (IMAGES, TOKENS)).experts == expert).any()


@pytest.mark.parametrize("router", ["softmax", *ROUTERS])
def test_slots_hold_the_choices_by_falling_gate_and_then_nothing(router: str) -> None:
    layer, x = make(router=router), tokens()
    found = layer.router(x)
    assert found.experts.shape == (IMAGES * TOKENS, layer.router.slots)
    assert found.ragged == layer.router.ragged == bool((found.experts < 0).any())
    assert (found.gates.diff(dim=1) <= 0).all()
    assert torch.equal(found.gates == 0, found.experts < 0)


def test_a_router_that_forgets_to_say_that_slots_can_be_empty_is_told_so() -> None:
    layer, x = make(router="threshold"), tokens()
    layer.router.ragged = False
    with pytest.raises(vimoe.VimoeError, match=r"loads add up to \d+ of 72 slots: expected all.*ragged = True"):
        layer(x)


def test_a_bias_and_chance_act_on_a_router_that_lets_them_and_are_refused_elsewhere() -> None:
    x = tokens()
    biased = make(router="threshold", bias_update_rate=0.01)
    with vimoe.record(biased) as routings:
        biased(x)
    vimoe.update_bias(biased, routings)
    load = routings[0].load
    assert torch.equal(biased.router.choice_bias, 0.01 * (load.sum() - EXPERTS * load).sign())
    biased.router.choice_bias.fill_(1.0)
    assert (biased.router(x).experts >= 0).all()
    vimoe.set_random_share(biased.train(), 1.0)
    biased.router.choice_bias.zero_()
    torch.manual_seed(0)
    assert not torch.equal(biased.router(x).experts, biased.router(x).experts)
    with pytest.raises(vimoe.VimoeError, match="bias_update_rate=0.01 with router='expert_choice': expected 0"):
        make(router="expert_choice", bias_update_rate=0.01)
    with pytest.raises(vimoe.VimoeError, match="share=0.5 with moe.router='expert_choice': expected 0"):
        vimoe.set_random_share(make(router="expert_choice"), 0.5)
    vimoe.set_random_share(make(router="expert_choice"), 0)


def test_a_full_routing_is_dispatched_without_a_look_at_the_data() -> None:
    """So that a GPU need not be waited for: all of it works on fake tensors, which have no data."""
    with torch._subclasses.FakeTensorMode():
        full = vimoe.Routing(torch.zeros(6, 3), torch.ones(6, 2), torch.zeros(6, 2).long(), "token", (2, 3))
        sent = dispatch(full)
        assert sent.source.shape == (12,) and sent.load.shape == (3,)
        with pytest.raises(torch._subclasses.fake_tensor.DynamicOutputShapeException):
            dispatch(replace(full, ragged=True))


def test_losses_count_no_empty_slot() -> None:
    found = routing([[2, 0], [-1, -1], [0, -1], [2, 1]])
    probabilities = found.probabilities.mean(dim=0)
    by_hand = 3 * (torch.tensor([2, 1, 2]) / 4 * probabilities).sum()
    torch.testing.assert_close(vimoe.balance_loss([found]), by_hand)
