"""The router "soft" beside its formula, and what its layers do in every verb."""

from __future__ import annotations

from pathlib import Path

import helpers.kinds  # noqa: F401  registers kinds of routers and experts
import pytest
import torch
from helpers import mixing
from helpers.mixing import DIM, EXPERTS, ffn, layer, of, tokens
from helpers.tiny import config, layers, vit
from torch import Tensor

import vimoe
from vimoe.bench.step import force_routing
from vimoe.errors import ConfigError, VimoeError

SOFT = {"router": "soft", "routing": "token"}


def reference(layer: vimoe.MoE, x: Tensor) -> Tensor:
    """Soft MoE image by image, from its formula."""
    outputs = []
    phi = layer.router.weight.view(-1, DIM)
    for image in x:
        cosine = (image / image.norm(dim=1, keepdim=True)) @ (phi / phi.norm(dim=1, keepdim=True)).T
        scores = layer.router.scale * cosine
        filled = (scores.exp() / scores.exp().sum(dim=0)).T @ image
        shares = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
        y = torch.zeros_like(image) if layer.shared is None else ffn(of(layer, "shared"), image)
        for slot, mixed in enumerate(filled):
            change = ffn(of(layer, "experts", slot * EXPERTS // len(filled)), mixed)
            if layer.shared is not None and layer.config.combine == "mix":
                change = change - ffn(of(layer, "shared"), mixed)
            y = y + shares[:, slot, None] * change
        outputs.append(y)
    return torch.stack(outputs)


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize(("combine", "shared"), [("mix", 1), ("mix", 0), ("sum", 1)])
def test_outputs_and_gradients_are_those_of_the_formula(combine: str, shared: int, slots: int) -> None:
    made = layer(**SOFT, combine=combine, num_shared_experts=shared, slots_per_expert=slots)
    cancels = "shared.fc2.bias" if combine == "mix" and shared else ""
    mixing.assert_equal_with_gradients(made, reference, cancels)


def test_the_record_holds_the_share_of_each_expert_in_a_token() -> None:
    made, x = layer(**SOFT, slots_per_expert=2), tokens()
    with vimoe.record(made) as routings:
        made(x)
    (routing,) = routings
    shares = routing.slots.softmax(dim=2).view(8, EXPERTS, 2).sum(dim=2)
    torch.testing.assert_close(routing.expert_gates, shares)
    torch.testing.assert_close(routing.probabilities, shares)
    torch.testing.assert_close(routing.slots.softmax(dim=1).sum(dim=1), torch.ones(2, 2 * EXPERTS).double())
    assert routing.load.tolist() == [8] * EXPERTS and routing.gates[:, 0].ge(routing.gates[:, -1]).all()
    assert vimoe.balance_loss(routings).item() == pytest.approx(EXPERTS)
    assert not routing.detach().slots.requires_grad


def test_noise_moves_the_slots_in_training_alone_and_leaves_the_recorded_scores() -> None:
    noisy, x = layer(**SOFT, router_noise=1.0), tokens()
    calm = layer(**SOFT)
    assert not torch.equal(noisy(x), calm(x))
    torch.testing.assert_close(noisy.router(x).logits, calm.router(x).logits)
    torch.testing.assert_close(noisy.eval()(x), calm.eval()(x))


@pytest.mark.parametrize(("shared", "slots"), [(1, 1), (2, 2)])
def test_a_model_keeps_its_function_and_its_copies_agree(shared: int, slots: int, tmp_path: Path) -> None:
    mixing.check_step_0_and_copies(config(**SOFT, num_shared_experts=shared, slots_per_expert=slots), tmp_path)


def test_it_compiles_and_exports() -> None:
    mixing.check_program(config(**SOFT, slots_per_expert=2))


@pytest.mark.parametrize("combine", ["mix", "sum"])
def test_the_cost_is_that_of_the_slots(combine: str) -> None:
    dense = vit()
    tokens, dim, n, p = 5, 24, 4, 3
    expert = 2 * dim * 96
    plan = vimoe.plan(dense, config(**SOFT, layers=[1], slots_per_expert=p, combine=combine))
    computed = n * p * expert * (2 if combine == "mix" else 1)
    products = 3 * tokens * n * p * dim  # scores, slots and outputs
    assert plan.moe.macs - plan.dense.macs == computed + products
    assert plan.moe.params - plan.dense.params == n * (expert + 96 + dim) + n * p * dim + 1
    assert plan.moe.activated_params == plan.moe.params


def test_removed_experts_take_their_slots_along() -> None:
    made, x = layer(**SOFT, slots_per_expert=2), tokens()
    rows = made.router.weight.detach().clone()
    made.keep_experts([0, 2])
    assert torch.equal(made.router.weight, rows[[0, 2]])
    phi = made.router.weight.view(-1, DIM)
    assert made.router(x).slots.shape == (2, 4, 4) and len(phi) == 4
    assert made(x).isfinite().all()


def test_analysis_replaces_layers_and_overrules_no_decision() -> None:
    model, loader, evidence = mixing.analysed(config(**SOFT))
    for each in evidence.layers:
        assert each.permuted is None and each.frozen is None and each.experts == () and each.draws == 0
    with pytest.raises(VimoeError, match="experts=True, and blocks.0.mlp has moe.router='soft': expected routers"):
        vimoe.prune(model, evidence, loader, experts=True)
    assert len(layers(model)) == 2
    assert "blocks.0.mlp" in str(evidence)
    mixing.check_pruning(config(**SOFT))


def test_layers_that_nothing_can_replace_are_analysed_by_numbers_alone() -> None:
    """Neither their decisions can be overruled, nor are they made dense."""
    model, loader, evidence = mixing.analysed(config(**SOFT, experts="scaled", num_shared_experts=0))
    assert all(each.dense == {} and each.permuted is None for each in evidence.layers)
    assert vimoe.prune(model, evidence, loader).without_method == ("blocks.0.mlp", "blocks.1.mlp")


def test_a_benchmark_that_forces_a_load_refuses_it() -> None:
    with pytest.raises(ConfigError, match="moe.router='soft': expected a router that sends tokens to experts"):
        force_routing(layer(**SOFT), torch.zeros(8, 1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"routing": "image"}, "router='soft' with routing='image': expected routing='token'"),
        ({"gate": "choice"}, "gate='choice' with router='soft': expected 'probability'"),
        ({"router_gradient": "dense"}, "router_gradient='dense' with router='soft': expected 'chosen'"),
        ({"bias_update_rate": 0.1}, "bias_update_rate=0.1 with router='soft': expected 0"),
    ],
)
def test_what_it_does_not_do_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layer(**{**SOFT, **settings})
