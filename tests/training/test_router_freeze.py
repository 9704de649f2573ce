"""Routers change no more from an epoch on, or once they are sure: to the bit, also where the training was killed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.kills import Killed, logs
from helpers.kills import kill_after as kill_after
from helpers.slow import one_in
from helpers.tiny import layers
from helpers.trainings import data as data
from helpers.trainings import model, rows, run, weights
from torch import Tensor, nn

import vimoe
from vimoe.config.data import DataConfig
from vimoe.config.settings import Settings
from vimoe.config.train import TrainConfig
from vimoe.data.labelled_images import Data
from vimoe.errors import ConfigError
from vimoe.moe.layer import moe_layers
from vimoe.training import checkpoint
from vimoe.training.parameter_groups import parameter_groups
from vimoe.training.routing_health import margins
from vimoe.training.settle import settle

MOVING = {
    "router_weight_decay": 9.0,
    "router_lr_scale": 5.0,
    "warmup_epochs": 0.0,
    "epochs": 4,
    "checkpoint_minutes": 0,
}
NAMES = ["blocks.0.mlp", "blocks.1.mlp"]
FIRST, SECOND = NAMES
STEPS = 3  # of an epoch: 24 images in batches of 8


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Each checkpoint of a training, as it is written."""
    kept: list[dict] = []
    real = checkpoint.write

    def write(out: Path, state: dict) -> None:
        real(out, state)
        kept.append(checkpoint.read(out))

    monkeypatch.setattr(checkpoint, "write", write)
    return kept


def router_of(state: dict, network: nn.Module, layer: str) -> list[Tensor]:
    """All tensors of a router in a checkpoint, and those that the optimiser has for it."""
    order = [id(p) for group in parameter_groups(network, TrainConfig(**MOVING)) for p in group["params"]]
    router = moe_layers(network)[layer].router
    kept = [state["optimizer"]["state"].get(order.index(id(p)), {}) for p in router.parameters()]
    own = [t for name, t in state["model"].items() if name.startswith(f"{layer}.router.")]
    return [*own, *(each[name] for each in kept for name in sorted(each))]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "settings", [{}, {"gate": "sigmoid", "bias_update_rate": 0.01}], ids=["plain", "gate and bias"]
)
def test_after_an_epoch_routers_and_their_optimiser_stay_to_the_bit(
    data: Data, tmp_path: Path, written: list[dict], settings: dict
) -> None:
    network, summary = run(data, tmp_path, model(**settings), **MOVING, router_freeze_epochs=2)
    assert summary["router_freeze"] == dict.fromkeys(NAMES, 2)
    ends = [written[STEPS * epoch + epoch] for epoch in range(5)]  # one at the start, and one more at each epoch's end
    assert [state["epoch"] for state in ends] == [1, 2, 3, 4, 5]
    for layer in NAMES:
        zero, one, two, three, four = (router_of(state, network, layer) for state in ends)
        assert len(two) == 1 + 3 if not settings else len(two) == 3 + 6  # weight, gate's bias and choice bias; AdamW's
        assert not same(zero, one) and not same(one, two)
        assert same(two, three) and same(three, four)
    after = [state for state in written if state["epoch"] > 2]
    assert len(after) == 2 * STEPS + 3
    assert all(same(router_of(state, network, FIRST), router_of(ends[2], network, FIRST)) for state in after)
    experts = f"{FIRST}.experts.fc1.weight"
    assert not torch.equal(ends[2]["model"][experts], ends[4]["model"][experts])  # all else learns
    assert all(p.requires_grad for p in network.parameters())  # afterwards


def test_before_the_freeze_nothing_is_different(data: Data, tmp_path: Path, written: list[dict]) -> None:
    run(data, tmp_path / "plain", **MOVING)
    count = len(written)
    run(data, tmp_path / "frozen", **MOVING, router_freeze_epochs=2)
    for plain, frozen in zip(written[: 2 * STEPS + 2], written[count:], strict=False):
        assert all(torch.equal(plain["model"][k], frozen["model"][k]) for k in plain["model"])


def test_a_margin_that_is_never_reached_is_the_training_without_to_the_bit(data: Data, tmp_path: Path) -> None:
    plain, one = run(data, tmp_path / "plain", **MOVING)
    other, two = run(data, tmp_path / "other", **MOVING, router_freeze_margin=1e9)
    assert torch.equal(weights(plain), weights(other)) and "router_freeze" not in {**one, **two}
    assert (tmp_path / "plain/health.csv").read_text() == (tmp_path / "other/health.csv").read_text()


def test_a_margin_freezes_each_layer_when_its_router_is_sure(data: Data, tmp_path: Path, written: list[dict]) -> None:
    run(data, tmp_path / "plain", sure(), **MOVING)
    found = {(row["epoch"], row["layer"]): float(row["router_margin"]) for row in rows(tmp_path / "plain/health.csv")}
    gap = found["1", FIRST] / 2
    assert max(found[str(epoch), SECOND] for epoch in range(1, 5)) < gap
    written.clear()
    network, summary = run(data, tmp_path / "frozen", sure(), **MOVING, router_freeze_margin=gap)
    assert summary["router_freeze"] == {FIRST: 1}
    first, last = written[STEPS + 1], written[-1]
    assert same(router_of(first, network, FIRST), router_of(last, network, FIRST))
    assert not same(router_of(first, network, SECOND), router_of(last, network, SECOND))


def sure() -> nn.Module:
    """A model whose first router has scores of a hundred times the size."""
    network = model()
    with torch.no_grad():
        layers(network)[0].router.weight.mul_(100)
    return network


def test_the_remedy_for_a_frozen_router_that_collapsed_is_to_let_it_learn(data: Data, tmp_path: Path) -> None:
    network = model()
    with torch.no_grad():
        for layer in layers(network):
            layer.router.weight.copy_(layer.router.weight[0] * torch.tensor([[100.0], [1.0], [1.0], [1.0]]))
    _, summary = run(data, tmp_path, network, epochs=2, router_freeze_epochs=1, lr=0.0, min_lr=0.0)
    before, after = ([alarm for alarm in summary["alarms"] if alarm.startswith(f"epoch {e}: {SECOND}")] for e in (1, 2))
    learning, longer = "raise train.balance_loss or moe.bias_update_rate", "let its router learn longer"
    assert learning in " ".join(before) and longer not in " ".join(before)
    assert longer in " ".join(after) and "bias_update_rate" not in " ".join(after)


def test_the_margin_is_between_the_last_chosen_score_and_the_next() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.5, 0.0], [0.0, 4.0, 4.0, 1.0]])
    for k, expected in ((1, [2.0, 0.0]), (2, [0.5, 3.0]), (4, [0.0, 0.0])):
        chosen = logits.topk(k).indices
        routing = vimoe.Routing(logits, torch.ones_like(chosen, dtype=torch.float32), chosen, "image", (2, 5))
        assert margins(routing).tolist() == expected


@pytest.mark.parametrize("killed_after", one_in(5, [5, 2, 6, 8, 11]))
@pytest.mark.parametrize("freeze", [{"router_freeze_epochs": 2}, {"router_freeze_margin": 1e-4}], ids=str)
def test_a_killed_training_ends_as_if_it_had_not_been(
    data: Data, tmp_path: Path, kill_after: object, killed_after: int, freeze: dict
) -> None:
    """Killed before the freeze, at the end of its epoch, and after it."""
    settings = {**MOVING, **freeze, "ema_decay": 0.8, "router_frozen": 0.1}
    whole, summary = run(data, tmp_path / "whole", **settings)
    kill_after(killed_after)
    with pytest.raises(Killed):
        run(data, tmp_path / "killed", **settings)
    kill_after(1000)
    again, resumed = run(data, tmp_path / "killed", **settings)
    assert torch.equal(weights(whole), weights(again))
    assert summary["router_freeze"] == resumed["router_freeze"] and len(summary["router_freeze"]) > 0
    assert logs(tmp_path / "whole") == logs(tmp_path / "killed")
    stored = [checkpoint.read(tmp_path / name) for name in ("whole", "killed")]
    for layer in NAMES:
        assert same(*(router_of(state, network, layer) for state, network in zip(stored, (whole, again), strict=True)))


def test_what_would_freeze_nothing_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="router_freeze_margin=1 with moe.router='hash': expected 0, since it has noth"
    ):
        settle(TrainConfig(router_freeze_margin=1.0), 100, model(router="hash", routing="token"))
    with pytest.raises(
        ConfigError, match="router_freeze_epochs=1 with moe.router='random': expected 0, since it has no"
    ):
        settle(TrainConfig(router_freeze_epochs=1), 100, model(router="random"))
    for moe in ({"router": "smear"}, {"num_experts": 2, "top_k": 2}):
        with pytest.raises(
            ConfigError, match="router_freeze_margin=1 with moe.router=.* and all experts chosen: expected 0"
        ):
            settle(TrainConfig(router_freeze_margin=1.0), 100, model(**moe))
        settle(TrainConfig(router_freeze_epochs=1), 100, model(**moe))
    with pytest.raises(ConfigError, match="router_freeze_epochs=10 of 10 epochs in all: expected less"):
        Settings(train=TrainConfig(router_freeze_epochs=10))
    Settings(train=TrainConfig(router_freeze_epochs=10), data=DataConfig(tasks=2))  # 20 in all
