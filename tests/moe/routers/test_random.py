"""The random router, and trainings of routers that nothing trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.layers import assert_agrees, make, tokens
from helpers.routers import GATES, SETTINGS, top_k
from helpers.tiny import config, images, layers, perturb_experts, upcycle, vit
from helpers.trainings import data as data  # the fixture
from helpers.trainings import model, rows, run

import vimoe
from vimoe.config.train import TrainConfig
from vimoe.data.labelled_images import Data
from vimoe.training.parameter_groups import freeze_all_but, parameter_groups

FIXED = ["random", "hash"]


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("layout", ["image by mean", "token"])
def test_it_agrees_with_the_loop(layout: str, settings: dict, gate: dict) -> None:
    layer, x = make(layout=layout, router="random", **settings, **gate).double(), tokens().double()
    assert_agrees(layer, x, all_used=False, decide=top_k())


@pytest.mark.parametrize("routing", ["image", "token"])
def test_with_the_same_rows_it_is_the_softmax_router_without_their_gradient(routing: str) -> None:
    fixed, learnt = (
        make(layout={"image": "image by mean"}.get(routing, routing), router=r) for r in ("random", "softmax")
    )
    learnt.router.weight.data.copy_(fixed.router.weight)
    x, again = tokens().requires_grad_(), tokens().requires_grad_()
    ours, theirs = fixed.router(x), learnt.router(again)
    assert torch.equal(ours.gates, theirs.gates) and torch.equal(ours.experts, theirs.experts)
    ours.gates[:, 0].sum().backward()
    theirs.gates[:, 0].sum().backward()
    assert torch.equal(x.grad, again.grad) and x.grad.any()  # blocks before the layer do get one
    assert fixed.router.weight.grad is None and not list(fixed.router.parameters())


def test_layers_and_seeds_have_rows_of_their_own() -> None:
    first, second = (layer.router.weight for layer in layers(upcycle(vit(), config(router="random"))))
    assert not torch.equal(first, second) and 0.01 < first.std() < 0.03


@pytest.mark.parametrize("router", FIXED)
def test_nothing_unfreezes_its_rows(router: str) -> None:
    network = model(router=router, routing="token").requires_grad_(True)
    freeze_all_but(network, ["blocks.0.mlp", "blocks.1.mlp"])
    assert not any(layer.router.weight.requires_grad for layer in layers(network))
    trained = {id(p) for group in parameter_groups(network, TrainConfig()) for p in group["params"]}
    assert not any(id(layer.router.weight) in trained for layer in layers(network)) and trained
    layers(network)[0].keep_experts([3, 0, 1])
    assert not isinstance(layers(network)[0].router.weight, torch.nn.Parameter)
    assert "blocks.0.mlp.router.weight" in network.state_dict()


@pytest.mark.parametrize("train_only", ["all", "moe"])
@pytest.mark.parametrize("router", FIXED)
def test_experts_are_trained_under_a_router_that_is_not(
    router: str, train_only: str, data: Data, tmp_path: Path
) -> None:
    """The balance loss is a constant where nothing can move the load, and says nothing against the training."""
    network = model(router=router, routing="token")
    rows_before = [layer.router.weight.clone() for layer in layers(network)]
    experts_before = [layer.experts.fc1.weight.detach().clone() for layer in layers(network)]
    _, summary = run(data, tmp_path, network, train_only=train_only)
    for layer, fixed, experts in zip(layers(network), rows_before, experts_before, strict=True):
        assert torch.equal(layer.router.weight, fixed)
        assert (layer.experts.fc1.weight - experts).abs().amax(dim=(1, 2)).min() > 0
    assert not any("no gradient" in alarm for alarm in summary["alarms"])
    assert all(
        float(row["router_gradient"]) == 0 < float(row["expert_gradient"]) for row in rows(tmp_path / "health.csv")
    )


@pytest.mark.filterwarnings("error")
def test_upcycling_does_not_warn_that_it_will_not_learn() -> None:
    settings = {"num_shared_experts": 0, "routing": "token"}
    for router in FIXED:
        vimoe.upcycle(vit(), config(router=router, **settings))
    with pytest.warns(UserWarning, match="never trains the router"):  # the gate's bias, then
        vimoe.upcycle(vit(), config(router="random", gate="sigmoid", **settings))


@pytest.mark.parametrize("router", FIXED)
@torch.no_grad()
def test_prepared_for_inference_its_rows_stay_as_exact_as_those_of_others(router: str) -> None:
    network = perturb_experts(upcycle(vit(), config(router=router, routing="token")))
    x, fixed = images(network), layers(network)[0].router.weight.clone()
    expected = network(x)
    vimoe.optimize(network, dtype=torch.float64)
    assert layers(network)[0].router.weight.dtype == torch.float32 and torch.equal(
        layers(network)[0].router.weight, fixed
    )
    torch.testing.assert_close(network(x).float(), expected, rtol=1e-4, atol=1e-4)
