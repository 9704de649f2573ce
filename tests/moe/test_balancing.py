"""Between steps: the bias by hand and against a loop, and decisions at random that are uniform and as many as said."""

from __future__ import annotations

from itertools import combinations

import pytest
import scipy.stats
import torch
from helpers.layers import assert_close, by_reference, tokens
from helpers.routers import MANY, make, routing_of
from helpers.tiny import config, images, layers, upcycle, vit
from torch import nn

import vimoe
from vimoe.config.train import TrainConfig
from vimoe.errors import VimoeError
from vimoe.training.loop import random_share


def of_load(load: list[int], layer: str = "") -> vimoe.Routing:
    """A record in which each expert got so many units."""
    experts = torch.tensor([[e] for e, units in enumerate(load) for _ in range(units)])
    units = (len(experts), len(load))
    return vimoe.Routing(torch.zeros(units), torch.ones(len(experts), 1), experts, "image", (units[0], 5), layer)


def bias_after(*loads: list[int], rate: float = 0.25) -> list[float]:
    layer = make(num_experts=len(loads[0]), bias_update_rate=rate)
    vimoe.update_bias(layer, [of_load(load) for load in loads])
    return layer.router.choice_bias.tolist()


def test_the_update_by_hand() -> None:
    assert bias_after([3, 1, 0, 0]) == [-0.25, 0.0, 0.25, 0.25]  # mean load 1
    assert bias_after([2, 1, 1]) == [-0.25, 0.25, 0.25]  # mean load 4/3
    assert bias_after([2, 2]) == [0.0, 0.0]
    assert bias_after([2, 0], [0, 2]) == [0.0, 0.0]  # of two accumulated steps the sum counts
    assert bias_after([5, 0], [0, 2]) == [-0.25, 0.25]  # and once
    layer = make(num_experts=2, bias_update_rate=0.25)
    for _ in range(3):
        vimoe.update_bias(layer, [of_load([1, 0])])
    assert layer.router.choice_bias.tolist() == [-0.75, 0.75]


def test_each_layer_has_its_own_load_and_one_without_a_bias_is_passed_over() -> None:
    model = upcycle(vit(), config(layers=[0], num_experts=2, bias_update_rate=0.5))
    upcycle(model, config(layers=[1], num_experts=2))
    vimoe.update_bias(model, [of_load([3, 1], "blocks.0.mlp"), of_load([0, 9], "blocks.1.mlp")])
    first, second = layers(model)
    assert first.router.choice_bias.tolist() == [-0.5, 0.5] and second.router.choice_bias is None
    with pytest.raises(VimoeError, match=r"layer 'blocks.7.mlp': expected one of blocks.0.mlp, .*pass the model"):
        vimoe.update_bias(model, [of_load([1, 1], "blocks.7.mlp")])


@pytest.mark.parametrize("k", [1, 2])
def test_the_bias_evens_a_skewed_load_and_is_that_of_a_naive_loop(k: int) -> None:
    """The naive loop, in plain numbers: choose by p + b, count, move by the sign. Gates stay the probabilities."""
    rate, x = 1 / 256, tokens(1, 200)
    layer = make(num_experts=4, top_k=k, bias_update_rate=rate)
    with torch.no_grad():
        layer.router.weight.mul_(0.5)
        layer.router.weight[:, 0] = torch.tensor([2.0, 0.5, 0.0, -2.0])
        x[..., 0] = 1.0  # what all tokens have in common prefers expert 0
    skewed = routing_of(layer, x).load
    assert skewed.max() > 0.9 * len(x[0]) and skewed.min() == 0
    probabilities = routing_of(layer, x).probabilities.tolist()
    naive = [0.0] * 4
    for _ in range(300):
        routing = routing_of(layer, x)
        vimoe.update_bias(layer, [routing])
        load = [0] * 4
        for p in probabilities:
            for i in sorted(range(4), key=lambda i: -(p[i] + naive[i]))[:k]:
                load[i] += 1
        mean = sum(load) / 4
        naive = [b + rate * (1 if n < mean else -1 if n > mean else 0) for b, n in zip(naive, load, strict=True)]
        torch.testing.assert_close(layer.router.choice_bias, torch.tensor(naive), rtol=0, atol=1e-6)
    shares = routing_of(layer, x).load / (k * len(x[0]))
    assert shares.max() < 0.35 and shares.min() > 0.15
    routing = routing_of(layer, x)
    assert torch.equal(routing.gates, routing.probabilities.gather(1, routing.experts))


def skewed(**settings: object) -> vimoe.MoE:
    """A layer whose router by itself sends nearly all tokens to expert 0."""
    layer = make(**settings)
    with torch.no_grad():
        layer.router.weight.mul_(0.2)
        layer.router.weight[0, 0] = 5.0
    return layer


def skewed_tokens() -> torch.Tensor:
    x = tokens(1, MANY)
    x[..., 0] = 1.0
    return x


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_the_share_of_random_decisions_is_as_said(share: float) -> None:
    layer, x = skewed(), skewed_tokens()
    assert (routing_of(layer, x).experts == 0).all()
    vimoe.set_random_share(layer, share)
    elsewhere = float((routing_of(layer, x).experts != 0).float().mean())
    assert elsewhere == pytest.approx(share * 3 / 4, abs=0.025)  # three standard errors are at most 0.024
    layer.eval()
    assert (routing_of(layer, x).experts == 0).all()
    vimoe.set_random_share(layer.train(), 0)
    assert (routing_of(layer, x).experts == 0).all() and layer.router.random_share is None


@pytest.mark.parametrize("k", [1, 2, 3])
def test_random_decisions_are_of_k_distinct_experts_all_alike_likely(k: int) -> None:
    layer, x = skewed(top_k=k, num_experts=5), skewed_tokens()
    vimoe.set_random_share(layer, 1.0)
    experts = routing_of(layer, x).experts.sort(dim=1).values
    assert all((experts[:, i] < experts[:, i + 1]).all() for i in range(k - 1))
    sets = list(combinations(range(5), k))
    found = [tuple(each) for each in experts.tolist()]
    assert scipy.stats.chisquare([found.count(each) for each in sets]).pvalue > 0.01
    first = routing_of(layer, x).experts[:, 0]  # the order, too
    assert scipy.stats.chisquare(torch.bincount(first, minlength=5).numpy()).pvalue > 0.01
    vimoe.set_random_share(layer, 0.9)  # the check can fail
    found = [tuple(sorted(each)) for each in routing_of(layer, x).experts.tolist()]
    assert scipy.stats.chisquare([found.count(each) for each in sets]).pvalue < 0.01


@pytest.mark.parametrize("combine", ["mix", "sum"])
@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("shared", [0, 1])
def test_the_gates_of_random_experts_are_the_routers_probabilities(routing: str, shared: int, combine: str) -> None:
    layer, x = make(routing=routing, top_k=2, num_shared_experts=shared, combine=combine), tokens()
    vimoe.set_random_share(layer, 1.0)
    torch.manual_seed(5)
    with vimoe.record(layer) as routings:
        y = layer(x)
    chosen = routings[0].experts
    assert not torch.equal(chosen, routings[0].logits.topk(2).indices)
    exact = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    exact_y = by_reference(layer, x.double(), exact, chosen=chosen.tolist())
    assert_close(y, exact_y)
    direction = torch.randn(y.shape)
    (y * direction).sum().backward()
    (exact_y * direction).sum().backward()
    assert layer.router.weight.grad.any()
    assert_close(layer.router.weight.grad, exact["router.weight"].grad)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_is_from_0_to_1(share: float) -> None:
    with pytest.raises(VimoeError, match="expected 0 to 1"):
        vimoe.set_random_share(make(), share)


def test_another_share_does_not_compile_again() -> None:
    layer = make()
    vimoe.set_random_share(layer, 0.9)
    compiled = torch.compile(layer.router, backend="eager")
    x, chosen = tokens(1, MANY), []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for share in (0.9, 0.5, 0.1):
            vimoe.set_random_share(layer, share)
            routing = compiled(x)
            chosen.append(float((routing.experts[:, 0] != routing.logits.argmax(-1)).float().mean()))
    assert chosen == pytest.approx([0.675, 0.375, 0.075], abs=0.03)


def test_a_model_without_moe_layers_is_left_alone() -> None:
    model = vit()
    vimoe.set_random_share(model, 0.5)
    vimoe.update_bias(model, [])
    assert model(images(model)).isfinite().all() and not list(nn.Module.buffers(model))


def test_the_share_falls_linearly_and_ends() -> None:
    settings = TrainConfig(epochs=4, router_warmup_epochs=2.0)
    shares = [random_share(settings, epochs) for epochs in (0, 0.5, 1, 1.75, 2, 3.5)]
    assert shares == pytest.approx([1, 0.75, 0.5, 0.125, 0, 0])
    assert random_share(TrainConfig(), 0) == 0
