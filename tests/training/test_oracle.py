"""The oracle's lessons: routes that experts made for clusters ask for, honest labels, and off to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.kills import Killed
from helpers.kills import kill_after as kill_after
from helpers.tiny import config, images, layers, perturb_experts
from helpers.trainings import QUICK, model, rows, run, weights
from helpers.trainings import data as data
from timm.layers import Mlp
from torch import Tensor, nn

import vimoe
from vimoe.config.data import DataConfig
from vimoe.config.settings import Settings
from vimoe.config.train import TrainConfig
from vimoe.data.labelled_images import Data
from vimoe.data.loaders import preprocessing
from vimoe.errors import ConfigError
from vimoe.moe.layer import moe_layers
from vimoe.moe.router import TokenLayout
from vimoe.tasks.classification_job import job_on_images
from vimoe.training import loop
from vimoe.training.loop import train
from vimoe.training.oracle import Oracle, sent_to, teaching
from vimoe.training.settle import settle

CLUSTERS = 4


class Clusters(nn.Module):
    """Images of one token, that say their cluster and, in a code of the cluster, their class; expert e knows code e."""

    def __init__(self) -> None:
        super().__init__()
        width = 2 * CLUSTERS
        made = vimoe.MoEConfig(num_experts=CLUSTERS, num_shared_experts=0, gate="choice", gate_weight=1.0)
        self.mlp = vimoe.MoE(Mlp(width, 1, act_layer=nn.Identity), made, TokenLayout(1, class_token=True))
        with torch.no_grad():
            for p in self.mlp.experts.parameters():
                p.zero_()
            for e in range(CLUSTERS):  # the sum of the code's channel, with the sign that the cluster has
                self.mlp.experts.fc1.weight[e, 0, CLUSTERS:] = torch.tensor([1.0 if c == e else -1.0 for c in range(4)])
                self.mlp.experts.fc2.weight[e, :, 0] = 5

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(x)[:, 0, 0]
        return torch.stack([y, -y], dim=1)


def clusters(number: int, seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    cluster = torch.randint(CLUSTERS, (number,), generator=random)
    label = torch.randint(2, (number,), generator=random)
    told, code = F.one_hot(cluster, CLUSTERS).float(), torch.zeros(number, CLUSTERS)
    code[torch.arange(number), cluster] = 1 - 2.0 * label
    return torch.cat([told, code], dim=1)[:, None], label


def regret(network: Clusters, x: Tensor, labels: Tensor, expert: Tensor) -> float:
    """Mean loss of each image's expert beyond the least of all experts'."""
    _, losses = Oracle(network, lambda m, x: m(x), 1.0).tried("mlp", x, labels)
    return float((losses.gather(1, expert[:, None])[:, 0] - losses.amin(dim=1)).mean())


def test_routes_of_known_clusters_are_learnt_and_regret_falls_under_a_tenth_of_random_routes() -> None:
    torch.manual_seed(0)
    network = Clusters()
    fixed = {name: p.clone() for name, p in network.mlp.experts.named_parameters()}
    teacher = Oracle(network, lambda m, x: m(x), 0.1)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    (x, labels), (new, truth) = clusters(200, 1), clusters(200, 2)
    for _ in range(60):
        optimizer.zero_grad()
        teacher.loss(x, labels, ["mlp"]).backward()
        optimizer.step()
    chosen = network.mlp.router(new).experts[:, 0]
    random = torch.randint(CLUSTERS, (200,), generator=torch.Generator().manual_seed(3))
    assert regret(network, new, truth, random) > 1
    assert regret(network, new, truth, chosen) < 0.1 * regret(network, new, truth, random)
    assert all(torch.equal(p, fixed[name]) for name, p in network.mlp.experts.named_parameters())


def test_the_loss_is_the_formula() -> None:
    network = perturb_experts(model())
    x, labels, tau = images(network, 5), torch.tensor([0, 1, 2, 1, 0]), 0.3
    expected = []
    for name, layer in moe_layers(network).items():
        with torch.no_grad(), vimoe.record(network) as routings:
            network(x)
        scores = next(each.logits for each in routings if each.layer == name)
        losses = []
        for e in range(4):
            with torch.no_grad(), sent_to(layer, e), vimoe.record(network) as forced:
                losses.append(F.cross_entropy(network(x), labels, reduction="none"))
            (there,) = [each for each in forced if each.layer == name]
            assert (there.experts == e).all()
            torch.testing.assert_close(there.gates.sum(1), layer.router.route(scores, there.batch).gates.sum(1))
        q = (-torch.stack(losses, dim=1) / tau).softmax(dim=1)
        assert q.std(dim=1).min() > 1e-3  # experts differ, so that a wrong q is seen
        expected.append(-(q * scores.log_softmax(dim=1)).sum(dim=1).mean())
    found = Oracle(network, lambda m, x: m(x), tau).loss(x, labels, list(moe_layers(network)))
    torch.testing.assert_close(found, torch.stack(expected).mean())


def test_it_trains_routers_alone_and_leaves_the_model_as_it_was() -> None:
    network = perturb_experts(model()).train()
    Oracle(network, lambda m, x: m(x), 0.1).loss(
        images(network, 4), torch.tensor([0, 1, 2, 0]), list(moe_layers(network))
    ).backward()
    trained = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {f"{name}.router.weight" for name in moe_layers(network)}
    assert network.training and all("route" not in vars(layer.router) for layer in layers(network))


def test_without_images_it_is_nothing() -> None:
    network = model()
    none = images(network, 4)[:0]
    assert Oracle(network, lambda m, x: m(x), 0.1).loss(none, torch.zeros(0).long(), list(moe_layers(network))) == 0


def mislabelled(data: Data, odd: bool) -> Data:
    """Images with other labels: of those that teach, or of the others."""
    train = [(image, (label + (number % 2 == odd)) % 3) for number, (image, label) in enumerate(data.train)]
    return replace(data, train=tuple(train))


@pytest.mark.parametrize("odd", [True, False])
def test_labels_of_the_half_that_teaches_reach_routers_alone(data: Data, tmp_path: Path, odd: bool) -> None:
    """After one step, with experts that differ from the start; in the second step routers choose other experts."""
    changed = []
    for number, own in enumerate((data, mislabelled(data, odd))):
        network = perturb_experts(model())
        settings = replace(QUICK, epochs=1, batch_size=24, oracle_loss=1.0, warmup_epochs=0.0, clip_grad=0.0)
        (tmp_path / str(number)).mkdir()
        train(network, job_on_images(own, preprocessing(network), settings), settings, tmp_path / str(number))
        changed.append(dict(network.cpu().named_parameters()))
    other = {name for name in changed[0] if not torch.equal(changed[0][name], changed[1][name])}
    routers = {name for name in changed[0] if ".router." in name}
    assert other == routers if odd else other > {"head.weight"}


@pytest.mark.parametrize(
    "further",
    [
        {"balance_loss": 1.0, "z_loss": 1.0},
        {"mutual_loss": 1.0, "balance_loss": 0.0},
        {"distill_loss": 1.0, "ema_decay": 0.5, "balance_loss": 0.0},
        {"route_loss": 1.0, "balance_loss": 0.0},
    ],
    ids=str,
)
def test_images_that_teach_train_nothing_else_by_any_loss(
    data: Data, tmp_path: Path, further: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of batches that teach as a whole, only routers learn."""
    monkeypatch.setattr(loop, "teaching", lambda places: torch.ones(len(places), dtype=torch.bool))
    network = model(top_k=2)
    if "route_loss" in further:
        network = vimoe.densify(network)
        seen = [(images(network, 12), torch.arange(12) % 3)]
        vimoe.upcycle(network, config(router="superclass", num_experts=3), seen)
    perturb_experts(network)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    network, _ = run(data, tmp_path, network, oracle_loss=1.0, weight_decay=0.0, **further)
    moved = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".router." in name}


def test_half_of_the_images_teach_until_routers_are_frozen(data: Data, tmp_path: Path) -> None:
    """After that they train the model too: other labels of theirs change it."""
    assert teaching([4, 7, 0, 1]).tolist() == [False, True, False, True]
    trainings = {}
    for freeze in (0, 1):
        for number, own in enumerate((data, mislabelled(data, odd=True))):
            out = tmp_path / f"{freeze}{number}"
            out.mkdir()
            network = perturb_experts(model())
            settings = replace(QUICK, oracle_loss=1e-9, router_freeze_epochs=freeze)  # it teaches next to nothing
            train(network, job_on_images(own, preprocessing(network), settings), settings, out)
            trainings[freeze, number] = network.cpu().head.weight.detach()
    distance = [float((trainings[f, 0] - trainings[f, 1]).abs().max()) for f in (0, 1)]
    assert distance[0] < 0.01 * distance[1]
    logged = [row.get("train_oracle_loss", "") for row in rows(tmp_path / "10" / "metrics.csv")]
    assert float(logged[0]) > 0 and logged[1] == ""


def test_off_is_off_to_the_bit_and_a_dense_model_has_no_oracle(data: Data, tmp_path: Path, monkeypatch: object) -> None:
    plain, _ = run(data, tmp_path / "plain")
    assert "train_oracle_loss" not in rows(tmp_path / "plain" / "metrics.csv")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vimoe.training.loop.Oracle", None)  # would be called
        patch.setattr("vimoe.training.loop.teaching", None)
        again, _ = run(data, tmp_path / "again")
    assert torch.equal(weights(plain), weights(again))
    dense, _ = run(data, tmp_path / "dense", model(layers="none"))
    other, _ = run(data, tmp_path / "other", model(layers="none"), oracle_loss=1.0)
    assert torch.equal(weights(dense), weights(other))


def test_a_killed_training_goes_on_to_the_same_weights(data: Data, tmp_path: Path, kill_after: object) -> None:
    settings = {"oracle_loss": 1.0, "router_freeze_epochs": 1, "checkpoint_minutes": 0}
    whole, _ = run(data, tmp_path / "whole", **settings)
    kill_after(2)
    with pytest.raises(Killed):
        run(data, tmp_path / "killed", **settings)
    kill_after(1000)
    again, _ = run(data, tmp_path / "killed", perturb_experts(model()), **settings)
    assert torch.equal(weights(whole), weights(again))


def test_what_contradicts_it_is_refused() -> None:
    for changes, said in (
        ({"mixup": 0.2}, "oracle_loss=1 with mixup=0.2: expected mixup=0"),
        ({"router_frozen": 0.5}, "oracle_loss=1 with router_frozen=0.5: expected"),
        ({"compile": True}, "oracle_loss=1 with compile=True: expected compile=False"),
    ):
        with pytest.raises(ConfigError, match=said):
            TrainConfig(oracle_loss=1.0, **changes)
    with pytest.raises(ConfigError, match="oracle_temperature=1 with oracle_loss=0"):
        TrainConfig(oracle_temperature=1.0)
    with pytest.raises(ConfigError, match="train.oracle_loss=1.0 with data.task='segmentation'"):
        Settings(train=TrainConfig(oracle_loss=1.0), data=DataConfig(task="segmentation"))
    for changes, said in (
        ({"routing": "token"}, "moe.routing='token'"),
        ({"router": "soft", "routing": "token"}, "moe.router='soft'"),
        ({"router": "random"}, "train.oracle_loss=1 with moe.router='random': expected 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            settle(TrainConfig(oracle_loss=1.0), 100, model(**changes))
    assert settle(TrainConfig(oracle_loss=1.0), 100, model(router="smear")).oracle_loss and config()
