"""The locality loss: its formula, whom it trains, and that a killed training has the same distances."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.kills import Killed
from helpers.kills import kill_after as kill_after
from helpers.tiny import layers, perturb_experts
from helpers.trainings import data as data
from helpers.trainings import model, rows, run, weights
from torch import nn

import vimoe
from vimoe.config.train import TrainConfig
from vimoe.data.labelled_images import Data
from vimoe.errors import ConfigError
from vimoe.moe.layer import moe_layers
from vimoe.training.locality import Locality
from vimoe.training.settle import settle

LORA = {"experts": "lora", "rank": 2}


def recorded(network: nn.Module) -> list[vimoe.Routing]:
    with vimoe.record(network) as routings:
        network(torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    return routings


@pytest.mark.parametrize("settings", [{}, LORA], ids=["ffn", "lora"])
def test_the_loss_is_the_formula(settings: dict) -> None:
    """Experts are moved by known distances: 0, 1, 2, 3 in one number of each."""
    network = model(**settings)
    locality = Locality(moe_layers(network))
    name = next(n for n, role in layers(network)[0].experts.roles.items() if role.per_expert)
    with torch.no_grad():
        for layer in layers(network):
            layer.experts.get_parameter(name).flatten(1)[:, 0] += torch.arange(4.0)
    for layer in moe_layers(network):
        torch.testing.assert_close(locality.distances(layer), torch.arange(4.0))
    routings = recorded(network)
    by_hand = [sum(e * r.probabilities[:, e].mean().item() for e in range(4)) for r in routings]
    assert locality.loss(routings).item() == pytest.approx(sum(by_hand) / 2)


def test_what_experts_share_is_no_distance() -> None:
    """The base of low-rank experts is the shared expert, which has no expert's distance."""
    network = model(**LORA)
    locality = Locality(moe_layers(network))
    with torch.no_grad():
        for layer in layers(network):
            for p in layer.shared.parameters():
                p += 1
    assert all(not locality.distances(name).any() for name in moe_layers(network))


def test_it_trains_the_router_and_lowers_the_probability_of_who_has_moved() -> None:
    """No expert has a gradient by its distance; those of the first layer have one through the scores of the second."""
    network = model()
    locality = Locality(moe_layers(network))
    perturb_experts(network)
    with torch.no_grad():
        layers(network)[0].experts.get_parameter("fc1.weight")[2] += 1
    routings = recorded(network)
    locality.loss(routings).backward()
    assert all(p.grad is None or not p.grad.any() for p in layers(network)[1].experts.parameters())
    router = layers(network)[0].router
    before = routings[0].probabilities[:, 2].mean().item()
    with torch.no_grad():
        router.weight -= 0.1 * router.weight.grad
    assert recorded(network)[0].probabilities[:, 2].mean().item() < before


def test_the_loss_is_logged_and_a_training_without_has_none(data: Data, tmp_path: Path) -> None:
    run(data, tmp_path / "on", locality_loss=0.1)
    run(data, tmp_path / "off")
    values = [float(row["train_locality_loss"]) for row in rows(tmp_path / "on" / "metrics.csv")]
    assert 0 < values[0] < values[1]  # experts move on from where they began
    assert "train_locality_loss" not in rows(tmp_path / "off" / "metrics.csv")[0]


@pytest.mark.parametrize("killed_after", [1, 4])
def test_a_killed_training_measures_from_where_it_began(
    data: Data, tmp_path: Path, kill_after: object, killed_after: int
) -> None:
    settings = {"locality_loss": 1.0, "checkpoint_minutes": 0}
    whole, _ = run(data, tmp_path / "whole", **settings)
    kill_after(killed_after)
    with pytest.raises(Killed):
        run(data, tmp_path / "killed", **settings)
    kill_after(1000)
    # as a new process has it: any weights, before those of the checkpoint are loaded
    again, _ = run(data, tmp_path / "killed", perturb_experts(model()), **settings)
    assert torch.equal(weights(whole), weights(again))


def test_a_dense_model_has_no_locality_and_a_constant_router_refuses_it(data: Data, tmp_path: Path) -> None:
    plain, _ = run(data, tmp_path / "plain", model(layers="none"))
    other, _ = run(data, tmp_path / "other", model(layers="none"), locality_loss=1.0)
    assert torch.equal(weights(plain), weights(other))
    with pytest.raises(ConfigError, match="locality_loss=1 with moe.router='hash': expected 0"):
        settle(TrainConfig(locality_loss=1.0), 100, model(router="hash", routing="token"))
