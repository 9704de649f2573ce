"""Routers are frozen for a share of the training, to the bit also where it was killed; classes train super-classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.kills import Killed, logs
from helpers.kills import kill_after as kill_after
from helpers.tiny import config, layers, vit
from helpers.trainings import data as data
from helpers.trainings import model, rows, run, weights
from torch import nn

import vimoe
from vimoe.config.train import TrainConfig
from vimoe.data.labelled_images import Data
from vimoe.data.loaders import eval_loader, preprocessing
from vimoe.errors import ConfigError
from vimoe.models.reading import set_reading
from vimoe.models.upcycling import build_layers
from vimoe.moe.layer import moe_layers
from vimoe.training import checkpoint
from vimoe.training.auxiliary_losses import auxiliary_losses
from vimoe.training.settle import settle

STEPS = 3  # of an epoch: 24 images in batches of 8
MOVING = {"router_weight_decay": 9.0, "router_lr_scale": 5.0, "warmup_epochs": 0.0}


def routes(network: nn.Module) -> torch.Tensor:
    return torch.cat([layer.router.weight.detach().cpu().flatten() for layer in layers(network)])


def frozen_until(monkeypatch: pytest.MonkeyPatch, data: Data, out: Path, network: nn.Module, **changes: object) -> list:
    """Whether the rows of the routers have changed, after each update of the weights."""
    start, changed = routes(network), []
    step = torch.optim.AdamW.step

    def see(self: torch.optim.AdamW, *args: object, **kwargs: object) -> object:
        result = step(self, *args, **kwargs)
        changed.append(not torch.equal(routes(network), start))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", see)
        run(data, out, network, **{**MOVING, **changes})
    return changed


@pytest.mark.parametrize(
    ("share", "accumulation", "updates", "still"),
    [(0.0, 1, 6, 0), (0.5, 1, 6, 3), (0.4, 1, 6, 3), (0.34, 1, 6, 3), (0.33, 1, 6, 2), (1.0, 1, 6, 6), (0.5, 2, 4, 2)],
)
def test_the_share_is_of_the_updates_of_the_weights(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    share: float, accumulation: int, updates: int, still: int,
) -> None:  # fmt: skip
    network = model()
    changed = frozen_until(monkeypatch, data, tmp_path, network, router_frozen=share, accumulation=accumulation)
    assert changed == [False] * still + [True] * (updates - still)
    assert all(p.requires_grad for p in network.parameters())  # afterwards


def test_a_frozen_router_raises_no_alarm_and_one_frozen_for_a_part_neither(data: Data, tmp_path: Path) -> None:
    for share in (1.0, 0.5, 0.25):
        network, summary = run(data, tmp_path / str(share), router_frozen=share)
        assert not [alarm for alarm in summary["alarms"] if "router got no gradient" in alarm]
    moving = [float(row["router_gradient"]) > 0 for row in rows(tmp_path / "0.5" / "health.csv")]
    assert moving == [False, False, True, True]  # two layers in two epochs


def test_only_what_was_trained_is_trained_afterwards(data: Data, tmp_path: Path) -> None:
    network = model()
    network.blocks[0].mlp.router.weight.requires_grad_(False)
    start = [layer.router.weight.detach().clone() for layer in layers(network)]
    run(data, tmp_path, network, router_frozen=0.5, **MOVING)
    same = [torch.equal(layer.router.weight, was) for layer, was in zip(layers(network), start, strict=True)]
    assert same == [True, False]
    assert [layer.router.weight.requires_grad for layer in layers(network)] == [False, True]


def test_the_bias_of_a_gate_is_no_route(data: Data, tmp_path: Path) -> None:
    network = model(gate="sigmoid")
    start = routes(network)
    run(data, tmp_path, network, router_frozen=1.0)
    assert torch.equal(routes(network), start)
    assert all(layer.router.gate.bias != 0 for layer in layers(network))


@pytest.mark.parametrize(("killed_after", "accumulation"), [(2, 1), (5, 1), (6, 2), (8, 1)])
def test_a_killed_training_with_frozen_routers_ends_as_if_it_had_not_been(
    data: Data, tmp_path: Path, kill_after: object, killed_after: int, accumulation: int
) -> None:
    """Killed while routers are frozen, at the end of an epoch, when they have just begun, and when all train."""
    settings = {
        **MOVING, "epochs": 3, "router_frozen": 0.6, "ema_decay": 0.8, "checkpoint_minutes": 0,
        "accumulation": accumulation,
    }  # fmt: skip
    whole, summary = run(data, tmp_path / "whole", **settings)
    kill_after(killed_after)
    with pytest.raises(Killed):
        run(data, tmp_path / "killed", **settings)
    kill_after(1000)
    again, resumed = run(data, tmp_path / "killed", **settings)
    assert torch.equal(weights(whole), weights(again))
    assert (summary["val"], summary["alarms"]) == (resumed["val"], resumed["alarms"])
    assert logs(tmp_path / "whole") == logs(tmp_path / "killed")
    for name in ("load.csv", "health.csv"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "killed" / name).read_text()
    stored = [checkpoint.read(tmp_path / name) for name in ("whole", "killed")]
    assert all(torch.equal(stored[0]["model"][k], stored[1]["model"][k]) for k in stored[0]["model"])


def superclasses(data: Data) -> nn.Module:
    torch.manual_seed(0)
    network = vit(num_classes=3, img_size=16, patch_size=8)
    seen = eval_loader(data.train, preprocessing(network), 8, 0)
    return vimoe.upcycle(network, config(router="superclass", num_experts=3), list(seen))


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_the_loss_of_super_classes_is_logged_and_brings_images_to_their_expert(
    data: Data, tmp_path: Path, mixup: float
) -> None:
    def accuracy(network: nn.Module) -> float:
        right = []
        for x, label in eval_loader(data.val, preprocessing(network), 8, 0):
            with torch.no_grad(), vimoe.record(network.eval()) as routings:
                network(x)
            owner = [moe_layers(network)[routing.layer].router.superclass[label] for routing in routings]
            right += [routing.experts[:, 0] == own for routing, own in zip(routings, owner, strict=True)]
        return torch.cat(right).float().mean().item()

    def fresh() -> nn.Module:
        network = superclasses(data)
        for layer in layers(network):
            nn.init.trunc_normal_(layer.router.weight, std=0.02)  # as if it had not been calibrated
        return network

    assert accuracy(superclasses(data)) > 0.9 > accuracy(fresh())
    taught, _ = run(data, tmp_path / "on", fresh(), epochs=4, mixup=mixup, route_loss=1.0)
    metrics = rows(tmp_path / "on" / "metrics.csv")
    assert float(metrics[-1]["train_route_loss"]) < 0.9 * float(metrics[0]["train_route_loss"])
    untaught, _ = run(data, tmp_path / "off", fresh(), epochs=4, mixup=mixup, route_loss=0.0)
    assert accuracy(taught) > accuracy(untaught)
    assert "train_route_loss" not in rows(tmp_path / "off" / "metrics.csv")[0]


def test_the_loss_is_weighted_and_of_all_layers(data: Data, tmp_path: Path) -> None:
    """At the rate 0 each epoch shows the same routers: the loss by hand, of both layers."""
    still = {"epochs": 1, "warmup_epochs": 0, "lr": 0.0, "min_lr": 0.0, "hflip": 0.0}
    network, _ = run(data, tmp_path, superclasses(data), **still)
    logged = float(rows(tmp_path / "metrics.csv")[0]["train_route_loss"])
    losses = []
    for x, label in eval_loader(data.train, preprocessing(network), 24, 0):
        with torch.no_grad(), vimoe.record(network) as routings:
            network(x)
        for routing in routings:
            owner = moe_layers(network)[routing.layer].router.superclass[label]
            losses.append(-routing.logits.log_softmax(dim=1)[torch.arange(len(x)), owner].mean())
    assert len(losses) == 2 and logged == pytest.approx(float(sum(losses) / 2), rel=0.01)  # another resize
    total, parts = auxiliary_losses(routings, TrainConfig(balance_loss=0.0, route_loss=0.5), torch.tensor(3.0))
    assert total == 1.5 and parts["route_loss"] == 3.0


def test_a_killed_training_of_super_classes_goes_on_to_the_same_weights(
    data: Data, tmp_path: Path, kill_after: object
) -> None:
    whole, _ = run(data, tmp_path / "whole", superclasses(data), checkpoint_minutes=0)
    kill_after(4)
    with pytest.raises(Killed):
        run(data, tmp_path / "killed", superclasses(data), checkpoint_minutes=0)
    kill_after(1000)
    torch.manual_seed(0)
    bare = vit(num_classes=3, img_size=16, patch_size=8)  # the checkpoint has the super-classes
    build_layers(bare, config(router="superclass", num_experts=3))
    set_reading(bare)
    again, _ = run(data, tmp_path / "killed", bare, checkpoint_minutes=0)
    states = whole.state_dict(), again.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_weight_of_a_loss_that_no_router_has_is_refused(data: Data) -> None:
    with pytest.raises(ConfigError, match="train.route_loss=0.5 with moe.router='softmax': expected it with"):
        settle(TrainConfig(route_loss=0.5), 100, model())
    settle(TrainConfig(route_loss=0.5), 100, model(layers="none"))  # a dense model is a control of any
    settle(TrainConfig(route_loss=0.5), 100, superclasses(data))
