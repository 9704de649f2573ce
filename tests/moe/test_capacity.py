"""Capacity of experts: never exceeded, and what is left over are the lowest gates."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from helpers.layers import DIM, HIDDEN, assert_agrees, assert_exports_and_compiles, make, tokens
from helpers.routers import routing_of, softmax
from helpers.tiny import config, images, layers, perturb_experts, upcycle, vit
from timm.layers import Mlp
from torch import Tensor, nn

import vimoe
from vimoe.analysis.interventions import Without
from vimoe.moe.router import TokenLayout

LENGTH = 12


def layer_of(factor: float | None, k: int = 1, experts: int = 4, prefix: int = 1, **settings: object) -> vimoe.MoE:
    torch.manual_seed(0)
    given = {"capacity_factor": factor, "num_experts": experts, "top_k": k, "routing": "token", **settings}
    layer = vimoe.MoE(Mlp(DIM, HIDDEN), vimoe.MoEConfig(**given), TokenLayout(prefix, True))
    nn.init.normal_(layer.router.weight)
    for name, parameter in layer.experts.named_parameters():
        nn.init.normal_(parameter, std=0.3) if "weight" in name else None
    return layer


def prioritized(factor: float) -> object:
    """Algorithm 1 of V-MoE over the tokens of an image, as it reads."""

    def decide(scores: list[Tensor], k: int) -> list[dict[int, Tensor]]:
        n = len(scores[0])
        weights = [softmax(row) for row in scores]
        room = {e: math.ceil(factor * k * len(scores) / n) for e in range(n)}
        best = [sorted(range(n), key=lambda e, w=w: -w[e].item())[:k] for w in weights]
        first = sorted(range(len(scores)), key=lambda t: -weights[t][best[t][0]].item())
        decided: list[dict[int, Tensor]] = [{} for _ in scores]
        for choice in range(k):
            for t in first:
                expert = best[t][choice]
                if room[expert]:
                    room[expert] -= 1
                    decided[t][expert] = weights[t][expert]
        return decided

    return decide


@pytest.mark.parametrize("settings", [{}, {"num_shared_experts": 0}, {"combine": "sum"}, {"gate": "choice"}], ids=str)
@pytest.mark.parametrize(("factor", "k"), [(0.3, 1), (1.0, 1), (1.5, 1), (0.5, 2), (1.0, 2), (1.0, 3)])
def test_it_agrees_with_the_loop_in_outputs_and_gradients(factor: float, k: int, settings: dict) -> None:
    layer, x = layer_of(factor, k, **settings).double(), tokens(3, LENGTH).double()
    assert_agrees(layer, x, all_used=False, decide=prioritized(factor))
    assert layer.router.blind or layer.router.weight.grad.abs().max() > 1e-3
    dropped = layer.router(x).experts < 0
    assert dropped.any() and not dropped.all()


@pytest.mark.parametrize("equal", [True, False], ids=["ties", "scores"])
@pytest.mark.parametrize(
    ("experts", "k", "length", "factor", "capacity"),
    [(4, 1, 8, 1.0, 2), (4, 2, 8, 1.0, 4), (4, 1, 9, 1.0, 3), (3, 1, 6, 1.0, 2), (7, 3, 49, 1.0, 21),
     (8, 1, 197, 1.05, 26), (4, 1, 8, 0.01, 1), (4, 1, 8, 0.5, 1), (3, 2, 5, 0.6, 2),
     (7, 1, 196, 1.0, 28), (3, 1, 198, 1.0, 66), (5, 1, 1025, 1.0, 205)],
)  # fmt: skip
def test_no_load_exceeds_the_capacity_in_any_image(
    experts: int, k: int, length: int, factor: float, capacity: int, equal: bool
) -> None:
    router = layer_of(factor, k, experts).router
    scores = torch.zeros(5 * length, experts) if equal else 3 * torch.randn(5 * length, experts)
    scores[length:, 0] += 9  # all tokens of the other images want the same expert
    usage = router.route(scores, (5, length)).usage
    assert usage.max() == capacity and (usage[1:, 0] == capacity).all()


def test_only_the_lowest_gates_are_left_over() -> None:
    plain, limited = layer_of(None), layer_of(0.75)
    x = tokens(40, LENGTH)
    free, held = routing_of(plain, x), routing_of(limited, x)
    left = (held.experts[:, 0] < 0).view(40, LENGTH)
    assert left.any() and not left.all()
    gates, wanted = free.gates[:, 0].view(40, LENGTH), free.experts[:, 0].view(40, LENGTH)
    for image in range(40):
        for expert in range(4):
            own = gates[image][wanted[image] == expert]
            kept = gates[image][(wanted[image] == expert) & ~left[image]]
            assert len(kept) == min(len(own), math.ceil(0.75 * LENGTH / 4))
            assert torch.equal(kept.sort().values, own.sort().values[len(own) - len(kept) :])


@pytest.mark.parametrize("shared", [0, 1])
def test_a_token_that_is_left_over_gets_the_shared_expert_alone(shared: int) -> None:
    layer, x = layer_of(0.5, num_shared_experts=shared), tokens(3, LENGTH)
    left = (layer.router(x).experts[:, 0] < 0).view(3, LENGTH)
    y = layer(x)
    torch.testing.assert_close(y[left], layer.shared(x)[left] if shared else torch.zeros_like(y[left]))
    assert left.any() and (not shared or not torch.allclose(y[~left], layer.shared(x)[~left]))


def test_the_result_of_an_image_does_not_depend_on_its_batch() -> None:
    layer, x = layer_of(0.75).eval(), tokens(6, LENGTH)
    assert layer.router.tokens_interact and layer.router.needs_patches
    torch.testing.assert_close(layer(x), torch.cat([layer(x[i : i + 1]) for i in range(6)]))


@pytest.mark.parametrize("k", [1, 2])
def test_a_capacity_for_all_tokens_is_none_to_the_bit(k: int) -> None:
    x, found = tokens(3, LENGTH), []
    for factor in (None, 4 / k, 100.0):
        layer = layer_of(factor, k)
        assert not layer.router.ragged and not layer.router.tokens_interact
        y = layer(x)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in layer.parameters())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_where_nothing_is_left_over_it_computes_the_same() -> None:
    plain, limited, x = layer_of(None), layer_of(3.9), tokens(3, LENGTH)
    with torch.no_grad():
        for layer in (plain, limited):
            layer.router.weight.mul_(0.1)
    assert limited.router.ragged and (limited.router(x).experts >= 0).all()
    torch.testing.assert_close(limited(x), plain(x))


def test_pools_have_capacities_of_their_own() -> None:
    """Two prefix tokens for two experts, and ten patches for two: of factor 1 they take one and five each."""
    layer = layer_of(1.0, prefix=2, groups=[2, 2])
    scores = torch.zeros(LENGTH, 4)
    scores[:, [0, 2]] = 9.0  # of either pool, all tokens want the first expert
    scores[:2, 2:], scores[2:, :2] = -torch.inf, -torch.inf
    assert layer.router.route(scores, (1, LENGTH)).load.tolist() == [1, 0, 5, 0]
    assert layer.router.ragged and not layer_of(2.0, prefix=2, groups=[2, 2]).router.ragged


def test_a_factor_below_one_lowers_what_is_counted() -> None:
    def cost(factor: float | None) -> vimoe.models.cost.Cost:
        return vimoe.count(upcycle(vit(), config(routing="token", capacity_factor=factor, top_k=2)))

    full, half = cost(None), cost(0.5)
    expert = sum(p[0].numel() for p in layers(upcycle(vit(), config()))[0].experts.parameters())
    assert full.activated_params - half.activated_params == 2 * expert and half.macs < full.macs
    assert (cost(1.0).activated_params, cost(1.0).macs) == (full.activated_params, full.macs)
    router = layer_of(0.5, 2).router
    assert router.experts_per_token == 1 and router.slots == 2 and router.num_decisions == (1 + 4 + 6,)


def test_what_the_bias_and_chance_choose_is_limited_too() -> None:
    layer = layer_of(1.0, bias_update_rate=0.1).train()
    layer.router.choice_bias.copy_(torch.tensor([9.0, 0, 0, 0]))
    assert routing_of(layer, tokens(5, LENGTH)).usage.tolist() == [[3, 0, 0, 0]] * 5
    vimoe.set_random_share(layer, 1.0)
    usage = routing_of(layer, tokens(50, LENGTH)).usage
    assert usage.max() == 3 and usage.sum() > 300


def test_a_model_keeps_its_function_is_saved_analysed_and_pruned(tmp_path: Path) -> None:
    parent = vit()
    model = upcycle(copy.deepcopy(parent), config(routing="token", capacity_factor=0.5))
    x = images(parent, 10)
    torch.testing.assert_close(model(x), parent(x), rtol=1e-4, atol=1e-4)
    perturb_experts(model)
    again = vimoe.load(vimoe.save(model, tmp_path / "m"))
    with torch.no_grad(), vimoe.record(again) as routings:
        assert torch.equal(again(x), model(x))
    assert all((each.experts < 0).any() and each.usage.max() == 1 for each in routings)
    assert len(routings[1].experts) == 50  # the last block needs all patches
    batches = [(x, torch.arange(10) % 5)]
    evidence = vimoe.analyze(model, batches, draws=2)
    assert all(layer.load.sum() == pytest.approx(1) for layer in evidence.layers)
    assert vimoe.prune(model, evidence, batches, tolerance=9, experts=True).steps and not layers(model)


def test_without_an_expert_the_others_have_more_room() -> None:
    layer, x = layer_of(1.0), tokens(4, LENGTH)
    without = Without(3)(layer, layer.router(x), torch.arange(4))
    assert without.load[3] == 0 and without.usage.max() == 4
    layer.keep_experts([0, 1, 2])
    assert torch.equal(layer.router(x).experts, without.experts)
    layer.keep_experts([0])
    assert not layer.router.ragged  # the one expert that is left has room for all


def test_exports_and_compiles_with_any_number_of_images() -> None:
    layer = layer_of(0.75, 2).eval()
    assert_exports_and_compiles(layer)


@pytest.mark.parametrize("router", ["sigmoid", "cosine", "hash", "random"])
def test_other_routers_of_the_k_best_have_it_too(router: str) -> None:
    layer = make(router=router, capacity_factor=0.5, k=1)
    usage = layer.router(tokens(20)).usage
    assert usage.max() == 1 and usage.sum() > 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"routing": "image"}, "capacity_factor=1 with routing='image': expected routing='token'"),
        ({"router": "expert_choice"}, "capacity_factor=1.0 with router='expert_choice': expected None"),
        ({"router": "soft"}, "capacity_factor=1.0 with router='soft': expected None"),
    ],
)
def test_what_has_no_capacity_refuses_it_in_one_line(settings: dict, message: str) -> None:
    with pytest.raises(vimoe.VimoeError, match=message):
        vimoe.upcycle(vit(), config(**{"routing": "token", "capacity_factor": 1.0, **settings}))


def test_a_model_of_no_images_is_refused() -> None:
    """Of a language model, the decision for a token would depend on later ones."""
    model = nn.Sequential(nn.Linear(DIM, DIM), Mlp(DIM, HIDDEN))
    with pytest.raises(vimoe.VimoeError, match="router='softmax' with capacity_factor=1 compares the tokens of an"):
        vimoe.upcycle(model, vimoe.MoEConfig(layers=["1"], routing="token", capacity_factor=1.0))
