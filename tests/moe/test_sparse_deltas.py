"""Experts with sparse changes: the formula, their places, and what is kept of them."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.changed import CASES, assert_layer_agrees, ffn
from helpers.layers import make, tokens
from torch import Tensor

import vimoe
from vimoe.moe.ffn import read


def full(own: dict[str, Tensor], layer: vimoe.MoE, name: str, e: int) -> Tensor:
    """The change of a matrix, written out value by value."""
    weight = read(layer.experts.base)[f"{name}.weight"]
    change = torch.zeros_like(weight).flatten()
    places = getattr(layer.experts, name).places[e].long()
    for place, value in zip(places, own[f"{name}.values"][e], strict=True):
        change = change + value * torch.eye(len(change), dtype=change.dtype)[place]
    return change.view_as(weight)


def delta(own: dict[str, Tensor], base: dict[str, Tensor], x: Tensor, e: int, layer: vimoe.MoE) -> Tensor:
    """The FFN with the matrices W1 + D1 and W2 + D2."""
    return ffn(base, x, layer, full(own, layer, "fc1", e), full(own, layer, "fc2", e))


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize(("dense", "layout"), [*CASES, ("mlp, norm", "token")])
def test_it_is_the_formula(dense: str, layout: str, shared: int) -> None:
    assert_layer_agrees("delta", dense, layout, shared, delta, delta_density=0.1)


@pytest.mark.parametrize(("density", "changed"), [(0.0, 1), (0.001, 1), (0.1, 10), (1.0, 96)])
def test_places_are_as_many_as_asked_for_at_least_one_and_differ(density: float, changed: int) -> None:
    experts = make(experts="delta", delta_density=density).experts
    for part in (experts.fc1, experts.fc2):
        assert part.places.shape == part.values.shape == (4, changed)
        assert all(len(set(places.tolist())) == changed and places.max() < 96 for places in part.places)
        drawn = {tuple(places.tolist()) for places in part.places}
        assert len(drawn) > 1 or changed == 96


def test_places_follow_the_seed_and_are_saved_but_not_trained() -> None:
    one, same, other = (make(experts="delta", delta_density=0.1).experts.fc1.places for _ in range(3))
    assert torch.equal(one, same)
    torch.manual_seed(7)
    layer = make(experts="delta", delta_density=0.1)
    other = type(layer.experts)(copy.deepcopy(layer.shared), layer.config).fc1.places  # the next draw
    assert not torch.equal(one, other)
    assert {"experts.fc1.places", "experts.fc2.places"} <= set(layer.state_dict())
    assert not any("places" in name for name, _ in layer.named_parameters())


@torch.no_grad()
def test_experts_that_stay_keep_their_places() -> None:
    layer = make(experts="delta", delta_density=0.2)
    x, load = tokens().flatten(0, 1)[:, None], torch.tensor([0, 4, 0, 2])
    before = layer.experts(x[:6], None, load)
    layer.keep_experts([3, 1])
    assert len(layer.experts.fc1.places) == len(layer.experts.fc2.places) == 2
    after = layer.experts(x[[4, 5, 0, 1, 2, 3]], None, torch.tensor([2, 4]))
    torch.testing.assert_close(torch.cat([after[2:], after[:2]]), before)


@torch.no_grad()
def test_merging_gives_the_mean_of_the_full_weights() -> None:
    layer = make(experts="delta", shared=1, delta_density=0.2).double()
    mass, base = torch.tensor([0.1, 0.4, 0.0, 0.3]), dict(layer.experts.base.named_parameters())
    own, merged = dict(layer.experts.named_parameters()), read(layer.merged(mass))
    for name in ("fc1", "fc2"):
        mean = sum(m * full(own, layer, name, e) for e, m in enumerate(mass.tolist()))
        torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + mean)
