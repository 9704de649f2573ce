"""Each alarm fires on a training made to fail in that way, and none on a healthy one."""

from __future__ import annotations

import csv
import json
import logging
import math
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers.kinds import Threshold as Threshold  # registers it
from helpers.tiny import images, layers
from helpers.trainings import data as data  # the fixture
from helpers.trainings import model, rows, run
from torch import nn

import vimoe
import vimoe.training.routing_health
from vimoe.config.moe import MoEConfig
from vimoe.config.train import TrainConfig
from vimoe.data.labelled_images import Data
from vimoe.errors import VimoeError
from vimoe.moe.layer import moe_layers
from vimoe.training import checkpoint
from vimoe.training.routing_health import Health

STILL = {"epochs": 1, "warmup_epochs": 0, "lr": 0.0, "min_lr": 0.0}


def alarms(data: Data, out: Path, network: nn.Module, **changes: object) -> list[str]:
    return run(data, out, network, **{**STILL, **changes})[1]["alarms"]


def scaled(factor: float, **settings: object) -> nn.Module:
    network = model(**settings)
    with torch.no_grad():
        for layer in layers(network):
            layer.router.weight.mul_(factor)
    return network


def test_a_healthy_training_raises_none(data: Data, tmp_path: Path) -> None:
    """Four experts for 24 images, with a router that spreads them."""
    _, summary = run(data, tmp_path, scaled(30, num_experts=3), epochs=4, balance_loss=1.0, router_lr_scale=3.0)
    assert [alarm for alarm in summary["alarms"] if alarm.startswith("epoch 4")] == []
    health = rows(tmp_path / "health.csv")
    assert len(health) == 8 and float(health[-1]["effective_experts"]) > 1.5
    assert all(float(row["router_gradient"]) > 0 and float(row["expert_gradient"]) > 0 for row in health)


@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
def test_gradients_are_told_without_the_scale_of_fp16(
    data: Data, tmp_path: Path, clip_grad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale is Accelerate's own, here on any device; products in float16 round the gradients."""
    norms = []
    for name in ("float32", "scaled"):
        run(data, tmp_path / name, **STILL, clip_grad=clip_grad, precision="no")
        health = rows(tmp_path / name / "health.csv")
        norms.append([float(row[key]) for row in health for key in ("router_gradient", "expert_gradient")])
        monkeypatch.setattr("vimoe.training.distributed.Accelerator", ScaledGradients)
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_what_follows_an_update_waits_where_gradients_of_fp16_overflowed(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do in each of the six steps, after which the scale is still a 64th of the largest number."""
    monkeypatch.setattr("vimoe.training.distributed.Accelerator", ScaledGradients)
    monkeypatch.setattr(ScaledGradients, "SCALE", 3e38)
    network = model(bias_update_rate=0.1)
    followed = []
    monkeypatch.setattr(vimoe.training.loop, "update_bias", lambda *args: followed.append(args))
    run(data, tmp_path, network, epochs=1, warmup_epochs=0, batch_size=4, precision="no")
    health = rows(tmp_path / "health.csv")
    assert all(math.isfinite(float(row[key])) for row in health for key in ("router_gradient", "expert_gradient"))
    assert not followed


class ScaledGradients(Accelerator):
    """Accelerate as it is for fp16, with a scale that no gradient overflows."""

    SCALE = 1024.0

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.scaler, self.native_amp = torch.amp.GradScaler(self.device.type, init_scale=self.SCALE), True
        self.state._mixed_precision = "fp16"


@pytest.mark.parametrize(("groups", "told"), [([1, 1], False), ([1, 3], True)])
def test_pools_of_one_expert_are_not_told_to_be_saturated(groups: list[int], told: bool) -> None:
    network = scaled(1e4, groups=groups, num_experts=sum(groups), routing="token")
    health = Health()
    with vimoe.record(network) as routings:
        network(images(network))
    vimoe.balance_loss(routings).backward()
    health.add(routings)
    health.add_gradients(moe_layers(network))
    assert any("saturated" in alarm for alarm in health.alarms(moe_layers(network))) == told


def test_an_idle_expert_is_named_and_a_busy_one_is_not(
    data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = model(num_experts=4, top_k=1)
    with torch.no_grad():
        layers(network)[0].router.weight[2] = 0  # never the largest logit unless all others are negative
        layers(network)[0].router.weight[1] = 10 * layers(network)[0].router.weight[0]
        layers(network)[0].router.weight[3] = -layers(network)[0].router.weight[1]
    with caplog.at_level(logging.WARNING, "vimoe"):
        found = alarms(data, tmp_path, network)
    load = {(row["layer"], row["expert"]): float(row["share"]) for row in rows(tmp_path / "load.csv")}
    assert load["blocks.0.mlp", "2"] == 0 and load["blocks.0.mlp", "1"] > 0
    assert [record.getMessage() for record in caplog.records if record.name == "vimoe.training.state"] == found
    checked = []
    for layer in ("blocks.0.mlp", "blocks.1.mlp"):
        named = " ".join(re.findall(rf"{layer}: experts? ([\d, ]+) got nothing", " ".join(found)))
        if "collapsed" not in " ".join(alarm for alarm in found if layer in alarm):
            idle = [expert for (name, expert), share in load.items() if name == layer and share == 0]
            assert re.findall(r"\d", named) == idle
            checked += idle
    assert checked  # a layer that has not collapsed has idle experts, and all of them were named


def of_decisions(experts: list[list[int]], num_experts: int) -> list[str]:
    """Alarms after a step with these decisions of a router that may leave slots empty."""
    chosen = torch.tensor(experts)
    network = model(num_experts=num_experts, router="threshold")
    logits = torch.zeros(len(experts), num_experts)
    health = Health()
    health.add([vimoe.Routing(logits, chosen.float(), chosen, "image", (len(experts), 5), "blocks.0.mlp", ragged=True)])
    layers(network)[0].requires_grad_(False)
    health.add_gradients({"blocks.0.mlp": layers(network)[0]})
    return health.alarms(moe_layers(network))


def test_a_collapse_is_judged_by_the_number_of_experts_that_an_image_gets() -> None:
    (always_three,) = of_decisions([[1, 4, 6, -1]] * 5, num_experts=8)
    assert "has collapsed: in effect 3.00 of its 8 experts" in always_three
    assert not of_decisions([[0, 1, 2, -1], [3, -1, -1, -1]], num_experts=4)


def test_nobody_getting_an_expert_is_told_and_is_no_collapse() -> None:
    (idle,) = of_decisions([[-1, -1]] * 5, num_experts=3)
    assert "experts 0, 1, 2 got nothing" in idle


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({}, "raise train.balance_loss or moe.bias_update_rate, set train.router_warmup_epochs=1, or use fewer"),
        ({"router": "random"}, "raise moe.bias_update_rate, or use fewer experts"),
        ({"router": "expert_choice", "routing": "token"}, "got nothing; use fewer experts"),
    ],
    ids=["softmax", "random", "expert_choice"],
)
def test_a_remedy_is_one_that_this_router_knows(settings: dict, remedy: str) -> None:
    network, health = model(num_experts=4, **settings), Health()
    chosen = torch.tensor([[0], [1], [2]])
    health.add([vimoe.Routing(torch.zeros(3, 4), chosen.float(), chosen, "image", (3, 5), "blocks.0.mlp")])
    health.add_gradients({"blocks.0.mlp": layers(network)[0]})
    idle = next(alarm for alarm in health.alarms(moe_layers(network)) if "got nothing" in alarm)
    assert remedy in idle


def test_a_layer_that_is_not_trained_raises_no_alarm(data: Data, tmp_path: Path) -> None:
    """Its load is in the table all the same."""
    assert any("blocks.0.mlp" in alarm for alarm in alarms(data, tmp_path / "all", scaled(10_000)))
    found = alarms(data, tmp_path / "last", scaled(10_000), train_only="last:1")
    assert found and not any("blocks.0.mlp" in alarm for alarm in found)
    assert not alarms(data, tmp_path / "head", scaled(10_000), train_only="head")
    assert {row["layer"] for row in rows(tmp_path / "head" / "load.csv")} == {"blocks.0.mlp", "blocks.1.mlp"}


def test_a_collapse_is_told(data: Data, tmp_path: Path) -> None:
    network = model()
    with torch.no_grad():
        for block in network.blocks:
            block.norm2.bias[0] = 50.0  # what all images have in common decides
            block.mlp.router.weight.zero_()
            block.mlp.router.weight[1, 0] = 1.0
    (first, *_) = alarms(data, tmp_path, network)
    assert re.search(
        r"epoch 1: blocks.0.mlp has collapsed: in effect 1.00 of its 4 experts get everything; raise", first
    )


def test_a_saturated_router_is_told(data: Data, tmp_path: Path) -> None:
    found = " ".join(alarms(data, tmp_path, scaled(10_000)))
    assert "blocks.0.mlp: the router is saturated" in found and "set train.z_loss=0.001" in found
    assert "saturated" not in " ".join(alarms(data, tmp_path / "calm", scaled(1)))


def test_a_router_without_gradient_is_told(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a loss is computed from what was detached."""
    real = vimoe.training.distributed.record

    def detached(network: nn.Module, **options: bool) -> object:
        for layer in layers(network):
            layer.router.register_forward_hook(
                lambda _r, _a, out: replace(out, logits=out.logits.detach(), gates=out.gates.detach())
            )
        monkeypatch.setattr(vimoe.training.distributed, "record", real)
        return real(network, **options)

    monkeypatch.setattr(vimoe.training.distributed, "record", detached)
    network = model()
    monkeypatch.setattr(vimoe.training.loop, "auxiliary_losses", lambda *_: (0.0, {}))
    found = alarms(data, tmp_path, network)
    assert sum("the router got no gradient" in alarm for alarm in found) == 2
    assert not any("gradient" in alarm for alarm in alarms(data, tmp_path / "blind", blind()))


def blind() -> nn.Module:
    """One gate that is always 1: upcycle warned of it already."""
    with pytest.warns(UserWarning, match="always 1"):
        return vimoe.upcycle(vimoe.densify(model()), vimoe.MoEConfig(layers="all", num_shared_experts=0))


def test_a_loss_that_is_not_finite_stops_it_with_the_names_of_the_images(data: Data, tmp_path: Path) -> None:
    network = model()
    with torch.no_grad():
        network.head.bias[0] = float("nan")
    with pytest.raises(VimoeError, match=r"the loss is nan in epoch 1, step 1, of .*\.png.*lower train.lr") as raised:
        run(data, tmp_path, network)
    stored = checkpoint.read(tmp_path)
    assert str(raised.value).count("\n") == 0 and (stored["epoch"], stored["step"]) == (1, 0)


def test_the_named_images_are_those_of_the_batch(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second epoch's second step, with the checkpoint of the step before kept."""
    seen: list[torch.Tensor] = []
    network = model()

    def poison(_module: nn.Module, args: tuple) -> tuple | None:
        if network.training:
            seen.append(args[0])
        return (args[0] * float("nan"),) if len(seen) == 5 else None  # three steps an epoch

    network.register_forward_pre_hook(poison)
    with pytest.raises(VimoeError, match="in epoch 2, step 2, of ") as raised:
        run(data, tmp_path, network, checkpoint_minutes=0, hflip=0.0)
    named = re.findall(r"[^ ,]+\.png", str(raised.value))
    from vimoe.data.loaders import eval_loader, preprocessing

    samples = {str(path): (path, label) for path, label in data.train}
    prepared = preprocessing(network)
    (pictures, _) = next(iter(eval_loader([samples[name] for name in named], {**prepared, "crop_pct": 1.0}, 8, 0)))
    assert len(named) == 3 and torch.allclose(pictures, seen[4][:3], atol=1e-5)
    assert ".png and 5 more: expected a number" in str(raised.value)
    state = checkpoint.read(tmp_path)
    assert (state["epoch"], state["step"]) == (2, 1)
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_rows_are_means_over_the_steps() -> None:
    network = model(num_experts=2)
    (name, layer), *_ = moe_layers(network).items()
    health = Health()
    for seed in (0, 1):
        torch.manual_seed(seed)
        with vimoe.record(network) as routings:
            network(torch.randn(6, 3, 16, 16)).sum().backward()
        health.add(routings)
        health.add_gradients(moe_layers(network))
    row = health.rows()[0]
    assert row["layer"] == name and sum(health.shares()[name]) == pytest.approx(1)
    assert 0 < row["router_entropy"] <= 0.694 and 0.5 <= row["router_confidence"] <= 1
    assert row["router_gradient"] >= 0 and row["expert_gradient"] > 0
    p = torch.tensor([0.25, 0.75])
    routing = replace(routings[0], logits=p.log().expand(4, 2), experts=torch.tensor([[1], [1], [1], [0]]), layer="x")
    one = Health()
    one.add([routing])
    (found,) = one.rows()
    assert found["router_confidence"] == pytest.approx(0.75) and found["busiest"] == 0.75
    assert found["router_entropy"] == pytest.approx(float(-(p * p.log()).sum()))
    assert found["effective_experts"] == pytest.approx(float(torch.exp(-(p * p.log()).sum())))
    assert found["logit_rms"] == pytest.approx(float(p.log().square().mean().sqrt()))


def test_what_alarms_say_to_set_is_a_setting() -> None:
    named = set(re.findall(r"\b(moe|train)\.(\w+)", Path(vimoe.training.routing_health.__file__).read_text()))
    assert ("moe", "bias_update_rate") in named and ("train", "router_warmup_epochs") in named
    known = {"moe": {f.name for f in fields(MoEConfig)}, "train": {f.name for f in fields(TrainConfig)}}
    assert all(name in known[section] for section, name in named)


def test_alarms_are_in_the_checkpoint_too(data: Data, tmp_path: Path) -> None:
    found = alarms(data, tmp_path, scaled(10_000))
    state = checkpoint.read(tmp_path)
    assert state["alarms"] == found and json.dumps(found)
    with (tmp_path / "health.csv").open(newline="") as file:
        assert [row["layer"] for row in csv.DictReader(file)] == ["blocks.0.mlp", "blocks.1.mlp"]


def test_sums_from_a_checkpoint_go_on_on_the_device_of_the_training() -> None:
    """A checkpoint is read to the CPU; meta stands for a GPU."""
    health = Health()
    health._add("layer", load=torch.ones(4), units=torch.tensor(3))
    health._add("layer", load=torch.ones(4, device="meta"), units=torch.tensor(2))
    assert health.sums["layer"]["load"].device.type == "meta" and health.sums["layer"]["units"] == 5
