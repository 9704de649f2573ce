"""What moves a router's choice besides its scores: noise in training and a bias; and dropout in the experts."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.kinds import UNITS
from helpers.layers import DIM, HIDDEN, assert_close, by_reference, tokens
from helpers.routers import MANY, make, routing_of
from helpers.tiny import config, images, layers, perturb_experts, upcycle, vit
from timm.layers import Mlp
from timm.utils import ModelEmaV3
from torch import Tensor

import vimoe
from vimoe.analysis.interventions import Subjects, Without, measure
from vimoe.moe.router import TokenLayout


@pytest.mark.parametrize(
    ("settings", "blind"),
    [
        ({}, False),
        ({"num_experts": 1}, True),
        ({"num_shared_experts": 0}, True),
        ({"num_shared_experts": 0, "top_k": 2}, False),
        ({"num_shared_experts": 0, "combine": "sum"}, False),
        ({"combine": "sum", "normalize_gates": True}, True),
        ({"combine": "sum", "normalize_gates": True, "top_k": 2}, False),
    ],
    ids=str,
)
def test_a_router_is_blind_where_its_only_gate_is_always_one(settings: dict, blind: bool) -> None:
    router = make(**settings).router
    gates = router.route(torch.randn(9, router.config.num_experts), (9, 1)).gates
    assert router.blind == blind == bool((gates == 1).all())


def with_bias(layer: vimoe.MoE, *bias: float) -> vimoe.MoE:
    layer.router.choice_bias.copy_(torch.tensor(bias))
    return layer


@pytest.mark.parametrize("settings", [{}, {"top_k": 2, "num_shared_experts": 0}], ids=str)
def test_without_options_a_router_is_softmax_and_top_k_to_the_bit_and_draws_nothing(settings: dict) -> None:
    layer, x = make(**settings), tokens()
    before = torch.get_rng_state()
    routing = layer.router(x)
    assert torch.equal(torch.get_rng_state(), before)
    gates, experts = routing.logits.softmax(-1).topk(layer.config.top_k)
    gates = gates / gates.sum(-1, keepdim=True) if layer.config.gates_sum_to_one else gates
    assert torch.equal(routing.gates, gates) and torch.equal(routing.experts, experts)
    direction = torch.randn(gates.shape)
    ours, theirs = (
        torch.autograd.grad((g * direction).sum(), layer.router.weight, retain_graph=True)[0]
        for g in (routing.gates, gates)
    )
    assert torch.equal(ours, theirs) and ours.any() == (layer.config.top_k > 1 or layer.shared is not None)
    assert not [name for name, _ in layer.named_buffers()]


@pytest.mark.parametrize("noise", [1.0, 3.0])
def test_noise_has_the_stated_standard_deviation_and_is_not_recorded(noise: float) -> None:
    """With k = N the gates are the softmax of the noisy scores, so their logarithms give the noise up to a shift."""
    x = tokens(1, MANY)
    layer, plain = make(top_k=4, router_noise=noise), make(top_k=4)
    routing = routing_of(layer, x).detach()
    assert torch.equal(routing.logits, routing_of(plain, x).logits)
    moved = torch.zeros_like(routing.gates).scatter(1, routing.experts, routing.gates.log()) - routing.logits
    pairs = (moved[:, 0] - moved[:, 1]) / 2**0.5, (moved[:, 2] - moved[:, 3]) / 2**0.5
    found = torch.stack(pairs).flatten()
    assert float(found.std()) == pytest.approx(noise / 4, rel=0.05) and abs(float(found.mean())) < 0.02 * noise
    assert not torch.equal(routing_of(layer, x, seed=1).gates, routing.gates)


def test_noise_changes_choices_in_training_only() -> None:
    layer, x = make(router_noise=4.0), tokens(1, MANY)
    favourite = routing_of(layer, x).logits.argmax(-1)
    changed = (routing_of(layer, x).experts[:, 0] != favourite).float().mean()
    assert 0.05 < changed < 0.9
    layer.eval()
    assert torch.equal(routing_of(layer, x).experts[:, 0], favourite)
    assert torch.equal(routing_of(layer, x, seed=1).gates, routing_of(layer, x).gates)


@pytest.mark.parametrize("combine", ["mix", "sum"])
@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("routing", ["image", "token"])
def test_a_bias_moves_the_choice_and_no_gate(routing: str, shared: int, combine: str) -> None:
    """Against the loop with the choice written out: output and gradients, the router's among them."""
    settings = {"routing": routing, "top_k": 2, "num_shared_experts": shared, "combine": combine}
    layer, x = with_bias(make(**settings, bias_update_rate=0.001), 0.5, -0.3, 0.0, 0.2).eval(), tokens()
    found = routing_of(layer, x)
    chosen, unbiased = [], []
    for scores in found.logits.tolist():
        p = torch.tensor(scores).softmax(0).tolist()
        preferred = [p_i + b_i for p_i, b_i in zip(p, (0.5, -0.3, 0.0, 0.2), strict=True)]
        chosen.append(sorted(range(4), key=lambda i: -preferred[i])[:2])
        unbiased.append(sorted(range(4), key=lambda i: -p[i])[:2])
    assert found.experts.tolist() == chosen
    assert [set(each) for each in chosen] != [set(each) for each in unbiased]
    exact = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    y, exact_y = layer(x), by_reference(layer, x.double(), exact, chosen=chosen)
    assert_close(y, exact_y)
    direction = torch.randn(y.shape)
    (y * direction).sum().backward()
    (exact_y * direction).sum().backward()
    assert_close(layer.router.weight.grad, exact["router.weight"].grad)
    assert layer.router.weight.grad.any()


@pytest.mark.parametrize("expert", range(4))
@pytest.mark.parametrize("share", [None, 1.0])
def test_an_excluded_expert_is_not_chosen_for_its_bias_nor_by_chance(expert: int, share: float | None) -> None:
    layer, x = make(top_k=2, bias_update_rate=0.001), tokens(1, 200)
    with_bias(layer, *(9.0 if i == expert else 0.1 * i for i in range(4)))
    if share:
        vimoe.set_random_share(layer, share)
        logits = layer.router(x).logits.detach()
    else:
        routing = routing_of(layer.eval(), x)
        assert (routing.experts == expert).any(dim=1).all()
        logits = routing.logits
    decided = Without(expert)(layer, replace(layer.router(x), logits=logits), torch.zeros(1))
    assert not (decided.experts == expert).any()
    assert (decided.experts[:, 0] != decided.experts[:, 1]).all()


def test_leaving_an_expert_out_is_removing_it_with_its_bias() -> None:
    model = perturb_experts(upcycle(vit(), config(top_k=2, bias_update_rate=0.01)))
    x = images(model, 6)
    for layer in layers(model):
        with_bias(layer, 0.3, -0.2, 0.4, 0.1)
    smaller = copy.deepcopy(model)
    layers(smaller)[1].keep_experts([3, 0, 1])
    assert layers(smaller)[1].router.choice_bias.tolist() == pytest.approx([0.1, 0.3, -0.2])
    batch, place = [(x, torch.arange(6) % 5)], "blocks.1.mlp"
    left_out = measure(Subjects(model, batch, [place]), {place: [Without(2)]})[place].loss[:, 0]
    with torch.no_grad():
        before, after = (F.cross_entropy(m(x), batch[0][1], reduction="none") for m in (model, smaller))
    assert abs(left_out).max() > 1e-3
    assert left_out == pytest.approx((after - before).numpy(), abs=1e-5)
    vimoe.update_bias(smaller, [])
    with vimoe.record(smaller) as routings:
        smaller(x)
    vimoe.update_bias(smaller, routings)  # three experts now, with the router's own rate


def test_gates_of_experts_that_the_router_rules_out_still_sum_to_one() -> None:
    """A probability may round to 0, and 0 / 0 would end the training."""
    for k in (1, 2):
        settings = config(top_k=k, num_shared_experts=0, routing="token", bias_update_rate=0.001)
        layer = with_bias(vimoe.MoE(Mlp(DIM, HIDDEN), settings, TokenLayout(1, True)), 0.0, 0.0, 3.0, 2.0)
        logits = torch.tensor([[500.0, 0.0, -3.0, 4.0]], requires_grad=True)
        routing = layer.router.route(logits, (1, 1))
        assert routing.experts.tolist() == [[2, 3][:k]] and not routing.probabilities[0, 2:].any()
        assert routing.gates.detach().sum().item() == pytest.approx(1)
        routing.gates[:, 0].sum().backward()
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_a_cast_leaves_the_bias_in_float32(cast: str) -> None:
    model = upcycle(vit(), config(bias_update_rate=0.001))
    for layer in layers(model):
        with_bias(layer, 0.1234567, -1.0001, 0.0, 3.0)
    before = layers(model)[0].router.choice_bias.clone()
    getattr(model, cast)()
    bias = layers(model)[0].router.choice_bias
    assert layers(model)[0].router.weight.dtype != torch.float32
    assert bias.dtype == torch.float32 and torch.equal(bias, before)
    assert model.to("meta") is model and layers(model)[0].router.choice_bias.is_meta
    assert layers(model.to_empty(device="cpu"))[0].router.choice_bias.dtype == torch.float32
    made = upcycle(vit().to(getattr(torch, cast)), config(bias_update_rate=0.001))
    assert layers(made)[0].router.choice_bias.dtype == torch.float32
    if cast != "half":  # which some operations on the CPU lack
        assert made(images(vit()).to(getattr(torch, cast))).isfinite().all()


def test_a_folder_keeps_the_bias_and_one_without_is_as_before(tmp_path: Path) -> None:
    model = perturb_experts(upcycle(vit(), config(bias_update_rate=0.01, router_noise=1.0, expert_dropout=0.2)))
    for layer in layers(model):
        with_bias(layer, 0.3, -0.2, 0.4, 0.1)
    vimoe.save(model, tmp_path / "m")
    again = vimoe.load(tmp_path / "m")
    assert torch.equal(layers(again)[0].router.choice_bias, torch.tensor([0.3, -0.2, 0.4, 0.1]))
    ours, settings = layers(again)[0].config, layers(model)[0].config
    assert replace(ours, layers="all") == replace(settings, layers="all") and ours.expert_dropout == 0.2
    torch.testing.assert_close(again(images(model)), model(images(model)))
    with_bias(layers(again)[0], 0, 0, 0, 0)
    assert not torch.allclose(again(images(model)), model(images(model)))
    plain = upcycle(vit(), config())
    assert not [name for name in plain.state_dict() if "bias" in name.split(".router.")[-1] and ".router." in name]


def test_a_folder_from_before_these_settings_is_loaded(tmp_path: Path) -> None:
    model = perturb_experts(upcycle(vit(), config()))
    vimoe.save(model, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    written = json.loads(path.read_text())
    for row in written["vimoe"]["layers"].values():
        for name in ("router_noise", "bias_update_rate", "expert_dropout"):
            del row[name]
    path.write_text(json.dumps(written))
    torch.testing.assert_close(vimoe.load(tmp_path / "m")(images(model)), model(images(model)))


def test_a_moving_average_averages_the_bias_with_the_weights_that_it_belongs_to() -> None:
    model = upcycle(vit(), config(bias_update_rate=0.01))
    ema = ModelEmaV3(model, decay=0.5)
    with_bias(layers(model)[0], 0.4, -0.4, 0.0, 0.2)
    ema.update(model)
    assert layers(ema.module)[0].router.choice_bias.tolist() == pytest.approx([0.2, -0.2, 0.0, 0.1])


@pytest.mark.parametrize("own", [0.0, 0.2, 0.7])
def test_dropout_is_in_the_routed_experts_alone_and_the_larger_one_holds(own: float) -> None:
    dense = Mlp(DIM, HIDDEN, drop=(own, 0.0))
    layer, x = make(dense, num_experts=1, expert_dropout=0.5), tokens(1, MANY)
    rate = max(own, 0.5)
    hidden: list[Tensor] = []
    layer.experts.drop1.register_forward_hook(lambda _m, _a, out: hidden.append(out))
    layer(x)
    assert float((hidden[0] == 0).float().mean()) == pytest.approx(rate, abs=0.02)
    assert torch.equal(layer.shared(x), layer.shared(x)) == (own == 0)
    assert not torch.equal(layer(x), layer(x))
    for dense_again in (layer.without_experts(), layer.merged(torch.ones(1))):
        assert dense_again.drop1.p == own
    layer.eval()
    assert torch.equal(layer(x), layer(x))


ON = {"router_noise": 1.0, "bias_update_rate": 0.01, "expert_dropout": 0.5}


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("routing", ["image", "token"])
@torch.no_grad()
def test_with_all_options_mix_computes_what_the_parent_did(routing: str, shared: int) -> None:
    parent = vit()
    model = upcycle(copy.deepcopy(parent), config(routing=routing, num_shared_experts=shared, top_k=2, **ON)).eval()
    for layer in layers(model):
        with_bias(layer, 0.3, -0.2, 0.4, 0.1)
    vimoe.set_random_share(model, 0.5)
    x = images(parent)
    torch.testing.assert_close(model(x), parent(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))  # in training the options do something
    vimoe.densify(model, how="merge" if shared < 2 else "shared")
    assert all(torch.equal(w, parent.state_dict()[name]) for name, w in model.state_dict().items())


@pytest.mark.parametrize("option", [*ON, "random_share"])
def test_the_task_teaches_the_router_under_each_option(option: str) -> None:
    layer = make(**({option: ON[option]} if option in ON else {}))
    if option == "random_share":
        vimoe.set_random_share(layer, 1.0)
    layer(tokens()).square().sum().backward()
    assert layer.router.weight.grad.abs().max() > 1e-3


def test_a_backward_pass_under_an_autocast_computes_scores_in_float32() -> None:
    layer, gradients = make(), []
    for autocast in (False, True):
        x = tokens().bfloat16().requires_grad_()
        logits = layer.router(x).logits
        layer.router.weight.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits.sin().sum().backward()
        gradients.append((x.grad, layer.router.weight.grad))
    for plain, under_autocast in zip(*gradients, strict=True):
        assert torch.equal(plain, under_autocast)


def test_an_expert_that_is_ruled_out_fills_no_slot_though_it_was_chosen() -> None:
    router = make(router="threshold").router
    logits = torch.tensor([[0.1, -torch.inf, 0.3, 0.2]])
    routing = router.assign(logits, torch.tensor([[0.1, 0.9, 0.3, 0.2]]), torch.ones(1, 4, dtype=torch.bool), (1, 1))
    assert routing.experts.tolist() == [[2, 3, 0, -1]]
    torch.testing.assert_close(routing.gates, torch.tensor([[0.3, 0.2, 0.1, 0.0]]))


@pytest.mark.parametrize("trained", [True, False])
def test_pruning_leaves_a_router_frozen_or_trained_as_it_was(trained: bool) -> None:
    layer = make()
    layer.router.requires_grad_(trained)
    layer.keep_experts([2, 0])
    assert layer.router.weight.requires_grad == trained


def test_slots_that_no_expert_is_left_for_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make(router="threshold"), tokens()
    monkeypatch.setattr("helpers.kinds.Threshold.slots", 4)  # the same before and after pruning
    before = layer.router(x)
    layer.keep_experts([3, 1])
    after = layer.router(x)
    assert after.experts.shape == after.gates.shape == before.experts.shape
    assert (after.experts[:, 2:] == -1).all() and not after.gates[:, 2:].any()
    for old, new in zip(before.experts.tolist(), after.experts.tolist(), strict=True):
        assert [e for e in old if e in (3, 1)] == [(3, 1)[e] for e in new if e >= 0]
    assert layer(x).isfinite().all()


@pytest.mark.parametrize(("router", "routing"), [("softmax", "image"), ("softmax", "token"), *UNITS])
def test_every_router_takes_an_empty_batch(router: str, routing: str) -> None:
    layer = make(router=router, routing=routing)
    assert layer(tokens(images=0)).shape == tokens(images=0).shape


@torch.no_grad()
def test_gates_at_equal_scores_follow_from_no_bias_and_no_chance() -> None:
    layer = with_bias(make(router="threshold", bias_update_rate=0.01), 1.0, 1.0, 1.0, 1.0)
    vimoe.set_random_share(layer, 1.0)
    before = torch.get_rng_state()
    assert layer.router.neutral_gate_mass().tolist() == [0.0] * 4  # sigmoid(0) is not above a half
    assert torch.equal(torch.get_rng_state(), before)
    assert layer.router.training and layer.router.choice_bias.tolist() == [1.0] * 4
