"""Upcycling changes nothing at the start, training changes it, and densify brings the parent back."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers.slow import one_in
from helpers.tiny import FAMILIES, config, images, layers, perturb_experts, randomise, upcycle, vit
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

import vimoe
from vimoe.models.upcycling import convert
from vimoe.moe import ffn

EXPERTS_AND_K = {"8 experts, top 2": (8, 2), "1 expert": (1, 1), "4 experts, top 1": (4, 1)}


@pytest.fixture(scope="module", params=FAMILIES)
def parent(request: pytest.FixtureRequest) -> nn.Module:
    return vit(request.param)


@pytest.fixture(params=["image", "token"])
def routing(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[0, 1, 2], ids="{} shared".format)
def shared(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(params=one_in(3, EXPERTS_AND_K))
def mixture(request: pytest.FixtureRequest, routing: str, shared: int) -> vimoe.MoEConfig:
    experts, k = EXPERTS_AND_K[request.param]
    return config(num_experts=experts, top_k=k, routing=routing, num_shared_experts=shared)


@torch.no_grad()
def test_mix_computes_what_the_parent_did(parent: nn.Module, mixture: vimoe.MoEConfig) -> None:
    model, x = upcycle(copy.deepcopy(parent), mixture), images(parent)
    assert len(layers(model)) >= 2
    assert_equal_to_rounding(model(x), parent(x))


@torch.no_grad()
def test_perturbed_experts_change_the_output(parent: nn.Module, routing: str, shared: int) -> None:
    model = upcycle(copy.deepcopy(parent), config(routing=routing, num_shared_experts=shared))
    for layer in layers(model):  # each one alone: none of the comparisons above is blind to a layer
        before = layer.experts.state_dict()
        kept = {name: w.clone() for name, w in before.items()}
        randomise(layer.experts, seed=1)
        change = (model(images(model)) - parent(images(parent))).abs().max()
        assert change > 1e-3 * parent(images(parent)).abs().max()
        layer.experts.load_state_dict(kept)


@pytest.mark.parametrize("case", one_in(3, EXPERTS_AND_K))
def test_densify_gives_back_the_parent_bit_for_bit(parent: nn.Module, shared: int, case: str) -> None:
    """Whatever is routed: a dense FFN has no route."""
    experts, k = EXPERTS_AND_K[case]
    model = upcycle(copy.deepcopy(parent), config(num_experts=experts, top_k=k, num_shared_experts=shared))
    if shared:
        perturb_experts(model)  # they are dropped, so they may have become anything
    vimoe.densify(model, how="shared" if shared else "merge")
    assert_same_state(model, parent)
    assert torch.equal(vimoe.set_reading(model, "all")(images(model)), parent(images(parent)))


@pytest.mark.parametrize("experts", [4, 8])
def test_merge_right_after_upcycle_gives_back_the_parent_bit_for_bit(parent: nn.Module, experts: int) -> None:
    model = upcycle(copy.deepcopy(parent), config(num_experts=experts, num_shared_experts=1, top_k=2))
    assert_same_state(vimoe.densify(model, how="merge"), parent)


def test_densify_shared_without_a_shared_expert_is_refused_and_changes_nothing(parent: nn.Module) -> None:
    model = upcycle(copy.deepcopy(parent), config(num_shared_experts=0, top_k=2))
    before = copy.deepcopy(model)
    with pytest.raises(vimoe.VimoeError, match="has no shared expert"):
        vimoe.densify(model, how="shared")
    assert_same_state(model, before)


@torch.no_grad()
def test_a_dense_control_of_twice_the_width_computes_what_the_parent_did(parent: nn.Module) -> None:
    control = upcycle(copy.deepcopy(parent), config(num_experts=0, num_shared_experts=2))
    assert not layers(control)
    wide = [m for m in control.modules() if isinstance(m, (Mlp, GluMlp, SwiGLU)) and ffn.is_ffn(m)]
    slim = [m for m in parent.modules() if isinstance(m, (Mlp, GluMlp, SwiGLU)) and ffn.is_ffn(m)]
    in_blocks = [(w, s) for w, s in zip(wide, slim, strict=True) if w.fc2.in_features != s.fc2.in_features]
    assert len(in_blocks) >= 2
    assert all(w.fc2.in_features == 2 * s.fc2.in_features for w, s in in_blocks)
    assert_equal_to_rounding(control(images(control)), parent(images(parent)))


@torch.no_grad()
def test_in_bfloat16_mix_rounds_no_more_than_once(parent: nn.Module, routing: str, shared: int) -> None:
    low = copy.deepcopy(parent).bfloat16()
    model = upcycle(copy.deepcopy(low), config(routing=routing, num_shared_experts=shared, top_k=2))
    x = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    for layer, dense in zip(layers(model), (m for m in low.modules() if ffn.is_ffn(m)), strict=False):
        exact = dense(x)
        # one unit in the last place of bfloat16 is 1/128 of a value at most
        assert ((layer(x) - exact).abs() <= exact.abs() / 128 + 1e-6).all()


def test_the_loss_of_the_first_step_is_the_parents(parent: nn.Module, routing: str, shared: int) -> None:
    model = upcycle(copy.deepcopy(parent), config(routing=routing, num_shared_experts=shared)).train()
    parent = copy.deepcopy(parent).train()
    torch.testing.assert_close(loss(model), loss(parent), rtol=2e-6, atol=0)


def test_random_parts_outside_of_the_ffns_draw_what_they_did_in_the_parent() -> None:
    parent = vit(pos_drop_rate=0.2, attn_drop_rate=0.2).train()
    model = vimoe.set_reading(upcycle(copy.deepcopy(parent), config()).train(), "all")  # else there are fewer to draw
    torch.testing.assert_close(loss(model, seed=3), loss(parent, seed=3), rtol=2e-6, atol=0)
    assert not torch.isclose(loss(parent, seed=3), loss(parent, seed=4))


def two_steps(model: nn.Module) -> Iterator[nn.Linear]:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimiser.zero_grad()
        loss(model).backward()
        optimiser.step()
    optimiser.zero_grad()
    loss(model).backward()
    return (block.mlp.fc1 for block in model.blocks)


def test_added_units_of_the_dense_control_learn_something_of_their_own_after_two_steps() -> None:
    control = upcycle(vit(), config(num_experts=0, num_shared_experts=2)).train()
    for fc1 in two_steps(control):
        original, added = fc1.weight.chunk(2)
        assert (original - added).abs().max() > 1e-4
        original, added = fc1.weight.grad.chunk(2)
        assert (original - added).abs().max() > 1e-2 * original.abs().max()


def test_equal_shares_of_the_last_matrix_would_have_added_nothing() -> None:
    """Shows that the test above can fail: each tile then gets the same gradient for ever."""
    naive = vit().train()
    for block in naive.blocks:
        weights = dict(ffn.read(block.mlp))
        tiled = {name: torch.cat([weights[name]] * 2) for name in ("fc1.weight", "fc1.bias")}
        block.mlp = ffn.build(
            block.mlp, {**weights, **tiled, "fc2.weight": torch.cat([weights["fc2.weight"] / 2] * 2, 1)}
        )
    for fc1 in two_steps(naive):
        original, added = fc1.weight.grad.chunk(2)
        assert (original - added).abs().max() < 1e-4 * original.abs().max()


def loss(model: nn.Module, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return F.cross_entropy(model(images(model, batch=5)), torch.arange(5))


def assert_equal_to_rounding(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-6 * expected.abs().max().item())


def assert_same_state(model: nn.Module, parent: nn.Module) -> None:
    state, expected = model.state_dict(), parent.state_dict()
    assert list(state) == list(expected)
    differing = [name for name, value in expected.items() if not torch.equal(state[name], value)]
    assert not differing


@pytest.mark.parametrize("experts", [4, 0], ids=["experts", "widened FFN"])
def test_convert_returns_the_names_of_the_ffns_that_it_replaced(experts: int) -> None:
    model = vit(depth=4)
    before = dict(model.named_modules())
    names = convert(model, config(layers=[-1, 1], num_experts=experts, num_shared_experts=2))
    assert names == ["blocks.1.mlp", "blocks.3.mlp"]
    assert [f"blocks.{i}.mlp" for i, b in enumerate(model.blocks) if b.mlp is not before[f"blocks.{i}.mlp"]] == names
    assert convert(model, config(layers="none")) == []
