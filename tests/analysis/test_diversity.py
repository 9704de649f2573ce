"""Diversity of experts, on outputs whose figures are known."""

from __future__ import annotations

import math

import helpers.kinds  # noqa: F401  registers kinds of routers and experts
import pytest
import torch
from helpers.layers import make, tokens
from helpers.tiny import config, randomise
from timm.layers import Mlp
from torch import Tensor

import vimoe
from vimoe.analysis.diversity import NEAREST, measure_diversity
from vimoe.moe.router import TokenLayout

DIM = 8


def layer_of(additions: Tensor, **settings: object) -> vimoe.MoE:
    """A layer whose expert e adds additions[e] (N, D) to what its shared expert gives."""
    made = vimoe.MoE(randomise(Mlp(DIM, 12)), config(num_experts=len(additions), **settings), TokenLayout(1, True))
    randomise(made.router)
    made.experts.fc2.bias.data += additions
    return made.double().eval()


def figures(additions: list[list[float]], **settings: object) -> dict[str, dict[str, float] | None]:
    padded = torch.zeros(len(additions), DIM)
    padded[:, : len(additions[0])] = torch.tensor(additions)
    return measure_diversity(layer_of(padded, **settings), tokens().double())


@pytest.mark.parametrize("routing", ["image", "token"])
def test_of_known_directions(routing: str) -> None:
    orthogonal = figures([[1, 0, 0], [0, 2, 0], [0, 0, -3]], routing=routing, top_k=2)
    assert orthogonal["all"] == pytest.approx({"cosine": 0, "effective_rank": 3, "energy": 1 / math.sqrt(2)}, abs=1e-6)
    assert orthogonal["chosen"] == pytest.approx({"cosine": 0, "effective_rank": 2, "energy": 0.5**0.5}, abs=1e-6)
    opposite = figures([[1.0], [-2.0]], routing=routing, top_k=2)
    assert (
        opposite["all"]
        == opposite["chosen"]
        == pytest.approx({"cosine": -1, "effective_rank": 1, "energy": 0.5}, abs=1e-6)
    )
    half = figures([[1, 0], [1, math.sqrt(3)]], routing=routing)["all"]  # 60 degrees: singular values^2 1.5 and 0.5
    p = math.sqrt(1.5) / (math.sqrt(1.5) + math.sqrt(0.5))
    rank = math.exp(-p * math.log(p) - (1 - p) * math.log(1 - p))
    assert half == pytest.approx({"cosine": 0.5, "effective_rank": rank, "energy": 1.0}, abs=1e-6)
    alike = figures([[1.0, 1.0], [2.0, 2.0]], routing=routing)["all"]
    assert alike == pytest.approx({"cosine": 1, "effective_rank": 1, "energy": 1 / NEAREST}, rel=1e-5)


def test_copies_and_single_experts_have_no_figures() -> None:
    assert figures([[0.0]] * 3, top_k=2) == {"all": None, "chosen": None}
    assert figures([[1.0], [0.0]], top_k=2) == {"all": None, "chosen": None}  # one alone adds something
    assert figures([[1.0], [-1.0]], top_k=1)["chosen"] is None
    copies = vimoe.MoE(
        randomise(Mlp(DIM, 12)), config(), TokenLayout(1, True)
    ).eval()  # in float32 they round otherwise
    assert measure_diversity(copies, tokens())["all"] is None


def test_a_third_expert_that_adds_nothing_does_not_count() -> None:
    found = figures([[1.0, 0], [0, 1.0], [0, 0]], top_k=3)
    assert (
        found["all"]
        == found["chosen"]
        == pytest.approx({"cosine": 0, "effective_rank": 2, "energy": 0.5**0.5}, abs=1e-6)
    )


def test_without_a_shared_expert_or_with_a_sum_it_is_of_whole_outputs() -> None:
    for settings in ({"num_shared_experts": 0, "top_k": 2}, {"combine": "sum"}):
        found = measure_diversity(layer_of(torch.zeros(3, DIM), **settings), tokens().double())["all"]
        assert found == pytest.approx({"cosine": 1, "effective_rank": 1, "energy": 1 / NEAREST}, rel=1e-5)


def test_chosen_experts_are_those_that_the_layer_mixes() -> None:
    """With orthogonal outputs the chosen ones are orthogonal, and all of them as they were."""
    plain, orthogonal = (
        measure_diversity(make(experts="lora", k=2, orthogonal=form).double().eval(), tokens().double())
        for form in ("none", "outputs")
    )
    assert plain["all"] == orthogonal["all"] and plain["chosen"]["effective_rank"] < 1.99
    assert orthogonal["chosen"] == pytest.approx({"cosine": 0, "effective_rank": 2, "energy": 0.5**0.5}, abs=1e-6)


@pytest.mark.parametrize("settings", [{"router": "threshold"}, {"router": "soft"}, {"experts": "scaled"}], ids=str)
def test_every_kind_of_router_and_experts_has_figures(settings: dict) -> None:
    found = measure_diversity(make(**settings).eval(), tokens())
    assert 1 <= found["all"]["effective_rank"] <= 4 and -1 <= found["all"]["cosine"] <= 1
    assert (found["chosen"] is None) == (settings.get("router") == "soft")
