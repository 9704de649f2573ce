"""Experts are fused: the layers compute the papers' formulas, and a run is one of the dense model that is left."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import helpers.kinds  # noqa: F401  the experts "scaled"
import pytest
import timm
import torch
from helpers.commands import call, refused
from helpers.kills import Killed
from helpers.kills import kill_after as kill_after
from helpers.pictures import roles
from helpers.slow import one_in
from helpers.tiny import config, images, layers, randomise, upcycle, vit
from helpers.trainings import rows
from safetensors.torch import load_file
from torch import Tensor, nn

from vimoe.cli import main
from vimoe.config.data import DataConfig
from vimoe.config.model import ModelConfig
from vimoe.config.moe import STARTS, MoEConfig
from vimoe.config.settings import Settings
from vimoe.config.train import TrainConfig
from vimoe.errors import ConfigError, SurgeryError
from vimoe.experiments.finished_run import FinishedRun
from vimoe.experiments.train import resume_training, run_training
from vimoe.models.model_folder import load
from vimoe.moe.start import Start
from vimoe.training.fuse import FUSING, AveragedExperts, Fusing, begin, fused
from vimoe.training.loop import train
from vimoe.training.parameter_groups import parameter_groups

KINDS = [*FUSING]
D, N = 6, 3


def network(fuse: str, parent: nn.Module, **moe: object) -> nn.Module:
    model = upcycle(copy.deepcopy(parent), config(num_experts=N, num_shared_experts=0, **moe))
    begin(model, TrainConfig(fuse=fuse))
    return model


def layer(fuse: str, **moe: object) -> Fusing:
    """A layer of experts that differ, in float64."""
    found: Fusing = randomise(network(fuse, vit(embed_dim=D), **moe).blocks[0].mlp.double(), seed=3)
    return found


def by_hand(experts: nn.Module) -> tuple[dict[str, Tensor], Callable[[Tensor, list[Tensor]], Tensor]]:
    """The stacked weights as leaves of their own, and an FFN of plain torch."""
    own = {name: p.detach().clone().requires_grad_() for name, p in experts.named_parameters()}

    def ffn(x: Tensor, w: list[Tensor]) -> Tensor:
        return nn.functional.gelu(x @ w[0].T + w[1]) @ w[2].T + w[3]

    return own, ffn


ORDER = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


@pytest.mark.parametrize("routing", ["token", "image"])
def test_ewa_trains_each_row_by_one_random_expert_in_equal_parts(routing: str) -> None:
    ours = layer("ewa", routing=routing).train()
    x, weight = torch.randn(7, 5, D).double(), torch.randn(7, 5, D).double()
    y = ours(x)
    (y * weight).sum().backward()
    own, ffn = by_hand(ours.experts)
    all_of_them = torch.stack([ffn(x, [own[name][e] for name in ORDER]) for e in range(N)])
    units = (-1, D) if routing == "token" else (7, 5 * D)
    same = torch.stack([(y.view(units) - each.view(units)).abs().amax(-1) < 1e-12 for each in all_of_them])
    assert (same.sum(dim=0) == 1).all()  # each row has one expert, and with no other weight than 1
    counts = same.sum(dim=1)
    assert counts.max() - counts.min() <= 1
    expected = (all_of_them.view(N, *y.view(units).shape) * same[..., None]).sum(dim=0).view_as(x)
    (expected * weight).sum().backward()
    for name, p in ours.experts.named_parameters():
        torch.testing.assert_close(p.grad, own[name].grad, rtol=1e-10, atol=1e-10)


def test_ewa_leaves_no_expert_out_where_rows_are_few() -> None:
    ours, reached = layer("ewa", routing="image").train(), torch.zeros(N, dtype=torch.bool)
    for seed in range(20):
        torch.manual_seed(seed)
        ours.zero_grad()
        ours(torch.randn(2, 5, D).double()).sum().backward()
        reached |= ours.experts.fc2.bias.grad.abs().sum(dim=1) > 0
        assert (ours.experts.fc2.bias.grad.abs().sum(dim=1) > 0).sum() == 2
    assert reached.all()


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_ewa_pulls_every_expert_towards_the_mean(rate: float) -> None:
    ours = layer("ewa")
    own, _ = by_hand(ours.experts)
    ours.pull(rate)
    for name, p in ours.experts.named_parameters():
        w = own[name].detach()
        torch.testing.assert_close(p.detach(), (1 - rate) * w + rate * sum(w) / N, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fuse", KINDS)
def test_one_ffn_has_the_weighted_sum_of_the_weights(fuse: str) -> None:
    """In eval mode, and for ExFusion in training: outputs, gradients of weights and shares; and what is left."""
    ours = layer(fuse).train(fuse == "exfusion")
    x, weight = torch.randn(2, 5, D).double(), torch.randn(2, 5, D).double()
    own, ffn = by_hand(ours.experts)
    logits = ours.logits.detach().clone() if fuse == "exfusion" else torch.zeros(N).double()
    logits.requires_grad_()
    a = logits.exp() / logits.exp().sum()
    expected = ffn(x, [sum(a[e] * own[name][e] for e in range(N)) for name in ORDER])
    y = ours(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.dense()(x), expected, rtol=1e-12, atol=1e-12)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, p in ours.experts.named_parameters():
        torch.testing.assert_close(p.grad, own[name].grad, rtol=1e-10, atol=1e-10)
    if fuse == "exfusion":
        torch.testing.assert_close(ours.logits.grad, logits.grad, rtol=1e-10, atol=1e-10)


def test_shares_of_copies_learn_nothing() -> None:
    model = network("exfusion", vit()).train()
    model(images(model)).square().sum().backward()
    assert float(model.blocks[1].mlp.logits.grad.abs().max()) < 1e-4
    assert float(model.blocks[1].mlp.experts.fc1.weight.grad.abs().max()) > 1e-2


@pytest.mark.parametrize("family", ["vit", "dinov2, packed SwiGLU", "eva02, SwiGLU with inner norm", "no biases"])
@pytest.mark.parametrize("fuse", KINDS)
def test_the_function_is_kept_at_the_start_and_by_the_dense_model(fuse: str, family: str) -> None:
    parent = vit(family)
    model, x = network(fuse, parent, routing="token" if fuse == "ewa" else "image"), images(parent)
    torch.testing.assert_close(model.eval()(x), parent(x), atol=1e-6, rtol=1e-6)
    left = fused(model).state_dict()
    assert all(torch.equal(w, left[name]) for name, w in parent.state_dict().items())  # bit for bit
    torch.testing.assert_close(model.train()(x), parent(x), atol=1e-5, rtol=1e-5)
    for at, each in enumerate(m for m in model.modules() if isinstance(m, Fusing)):
        randomise(each, seed=at)
    dense = fused(model.eval())
    assert not layers(dense) and [*dense.state_dict()] == [*parent.state_dict()]
    assert dense is not model and any(isinstance(m, Fusing) for m in model.modules())
    torch.testing.assert_close(dense(x), model(x))
    assert not torch.allclose(dense(x), parent(x), atol=1e-3)


@pytest.mark.parametrize("fuse", KINDS)
def test_a_fusing_layer_is_copied_cast_and_restored(fuse: str) -> None:
    ours = layer(fuse).eval()
    x = torch.randn(2, 5, D)
    again = layer(fuse).eval()
    again.load_state_dict(randomise(copy.deepcopy(ours), seed=9).state_dict())
    assert not torch.equal(again(x.double()), ours(x.double()))
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(x.double()), ours(x.double()))
    small = copy.deepcopy(ours).to(torch.bfloat16)
    torch.testing.assert_close(small(x.bfloat16()).double(), ours(x.double()), atol=0.3, rtol=0.1)
    assert {p.dtype for p in small.dense().parameters()} == {torch.bfloat16}


def test_stacked_biases_of_fusing_layers_do_not_decay() -> None:
    model = network("exfusion", vit())
    decays = {
        id(p): group["weight_decay"] > 0 for group in parameter_groups(model, TrainConfig()) for p in group["params"]
    }
    found = {name: decays[id(p)] for name, p in model.blocks[0].mlp.named_parameters()}
    assert found == {name: name.endswith("weight") for name in found} and "logits" in found


def test_a_model_whose_layers_were_not_replaced_is_refused(tmp_path: Path) -> None:
    job = SimpleNamespace(names=["a"] * 99, loader=SimpleNamespace(batch_size=TrainConfig.batch_size))
    with pytest.raises(ConfigError, match="train.fuse='ewa': expected a model whose MoE layers"):
        train(upcycle(vit(), config()), job, TrainConfig(fuse="ewa"), tmp_path)


def test_experts_that_share_weights_are_refused() -> None:
    model = upcycle(vit(), config(num_experts=N, num_shared_experts=0, experts="scaled"))
    with pytest.raises(SurgeryError, match="train.fuse with moe.experts='scaled': expected experts with weights of"):
        begin(model, TrainConfig(fuse="exfusion"))
    assert len(layers(model)) == 2


# ---- whole runs


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return roles(tmp_path_factory.mktemp("photos"), train=8, val=3, test=2)


def settings(photos: Path, fuse: str, moe: dict | None = None, data: dict | None = None, **train: object) -> Settings:
    args = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    base = TrainConfig(epochs=3, batch_size=8, lr=3e-3, min_crop=1, tensorboard=False, fuse=fuse)
    if fuse == "ewa":
        base = replace(base, fuse_rate=0.1)  # by default the experts are one at the end
    return Settings(
        model=ModelConfig(name="vit_tiny_patch16_224", pretrained=False, img_size=16, args=args),
        moe=MoEConfig(**{"layers": "last:1", "num_experts": 4, "num_shared_experts": 0, **(moe or {})}),
        data=DataConfig(path=str(photos), workers=0, **(data or {})),
        train=replace(base, **train),
    )


@pytest.mark.parametrize("fuse", KINDS)
def test_a_run_is_one_of_the_dense_model_that_is_saved(
    fuse: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    summary = run_training(settings(photos, fuse), run)
    config_json = json.loads((run / "model/config.json").read_text())
    assert "vimoe" not in config_json
    plain = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True)
    again = load(run / "model", read="all")
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(plain.eval()(x), again(x))
    finished = FinishedRun(run)
    val = finished.task.evaluate(finished.model, finished.task.validation(finished.model, finished.data)).to_dict()
    best = rows(run / "metrics.csv")[summary["best_epoch"] - 1]
    assert val["loss"] == pytest.approx(summary["val"]["loss"], abs=1e-6)
    assert val["loss"] == pytest.approx(float(best["val_loss"]), abs=1e-6)  # what chose the epoch
    (row,) = json.loads((run / "summary.json").read_text())["fused"].values()
    assert sum(row["shares"]) == pytest.approx(1) and len(row["shares"]) == 4
    assert (row["spread"] > 0.01) == (fuse == "ewa")  # copies stay copies where they are fused before each pass
    page = (run / "report.html").read_text()
    assert f"dense, with 4 experts in the last block while it was trained ({fuse})" in page and "spread" in page
    assert call(capsys, "evaluate", run)["images"] == 6
    assert call(capsys, "predict", run, photos / "test")["predictions"]
    for verb in (["analyze", run], ["prune", run, "--out", tmp_path / "pruned"]):
        assert "the model has no MoE layer" in refused(capsys, *verb)
    assert not (tmp_path / "pruned").exists()
    assert main(["report", str(run), str(run), "--out", str(tmp_path / "both.html")]) == 0


@pytest.mark.parametrize(("rate", "together"), [(0.0, False), (1.0, True)])
def test_the_pull_is_strongest_after_the_last_update(photos: Path, tmp_path: Path, rate: float, together: bool) -> None:
    summary = run_training(settings(photos, "ewa", epochs=1, warmup_epochs=0, fuse_rate=rate), tmp_path / "run")
    (row,) = summary["fused"].values()
    assert (row["spread"] < 1e-6) == together


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_rate_rises_linearly_with_the_updates(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    rates: list[float] = []
    monkeypatch.setattr(AveragedExperts, "pull", lambda _self, rate: rates.append(rate))
    run_training(settings(photos, "ewa", fuse_rate=0.4, accumulation=accumulation), tmp_path / "run")
    updates = 9 if accumulation == 1 else 6  # 3 epochs of 3 steps; the last of an epoch is an update of its own
    assert rates == pytest.approx([0.4 * (i + 1) / updates for i in range(updates)])


@pytest.mark.parametrize(("fuse", "killed_after"), one_in(3, itertools.product(KINDS, [1, 5])))
def test_a_killed_training_ends_as_if_it_had_not_been(
    photos: Path, tmp_path: Path, kill_after: object, fuse: str, killed_after: int
) -> None:
    changed = settings(photos, fuse, ema_decay=0.8, accumulation=2, checkpoint_minutes=0)
    whole = run_training(changed, tmp_path / "whole")
    kill_after(killed_after)
    with pytest.raises(Killed):
        run_training(changed, tmp_path / "killed")
    kill_after(1000)
    resumed = resume_training(tmp_path / "killed")
    ours, theirs = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "killed"))
    assert ours.keys() == theirs.keys() and all(torch.equal(w, theirs[name]) for name, w in ours.items())
    assert whole["val"] == resumed["val"] and whole["fused"] == resumed["fused"]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("fuse", KINDS)
def test_copies_that_stay_copies_are_told(
    fuse: str, apart: bool, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    class Apart(Start):
        def __call__(self, experts: nn.Module, *_: object) -> None:
            randomise(experts, scale=0.3)

    monkeypatch.setitem(STARTS, "apart", Apart)
    run = settings(photos, fuse, {"init": "apart" if apart else "copy"}, epochs=1, warmup_epochs=0)
    summary = run_training(run, tmp_path / "run")
    (row,) = summary["fused"].values()
    assert ("start as copies and will stay copies" in caplog.text) == (fuse == "exfusion" and not apart)
    assert (row["spread"] > 0.01) == (apart or fuse == "ewa")
    assert (len(set(row["shares"])) == 4) == (apart and fuse == "exfusion")


def test_exfusion_of_copies_is_the_training_of_the_dense_model(photos: Path, tmp_path: Path) -> None:
    """Gradients of copies are equal, and AdamW divides by their size; a clipped norm would count them otherwise."""
    found = {}
    for fuse, layers_of in (("none", "none"), ("exfusion", "last:1")):
        run_training(settings(photos, fuse, {"layers": layers_of}, clip_grad=0.0), tmp_path / fuse)
        found[fuse] = [float(row["val_loss"]) for row in rows(tmp_path / fuse / "metrics.csv")]
    assert found["exfusion"] == pytest.approx(found["none"], abs=1e-4) and len(set(found["none"])) == 3


def test_layers_are_fused_on_cached_features(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    changed = settings(photos, "exfusion", data={"cache": "features"}, train_only="moe")
    summary = run_training(changed, tmp_path / "run")
    assert summary["features"]["before"] == "blocks.1" and len(summary["fused"]) == 1
    assert not layers(load(tmp_path / "run/model"))


REFUSED = {
    "no layers": ({"moe": {"layers": "none"}}, "with moe.layers='none': expected MoE layers of at least 2 experts"),
    "one expert": ({"moe": {"num_experts": 1}}, "with moe.num_experts=1: expected MoE layers of at least 2"),
    "a dense control": (
        {"moe": {"num_experts": 0, "num_shared_experts": 2}}, "with moe.num_experts=0: expected MoE layers",
    ),
    "a shared expert": ({"moe": {"num_shared_experts": 1}}, "with moe.num_shared_experts=1: expected 0"),
    "wide shared experts": ({"moe": {"num_shared_experts": 2}}, "with moe.num_shared_experts=2: expected 0"),
    "a router's choice": ({"moe": {"top_k": 2}}, "moe.top_k=2 with train.fuse='ewa': expected 1, since its layers"),
    "a kind of router": ({"moe": {"router": "random"}}, "router='random' with train.fuse='ewa': expected 'softmax'"),
    "narrow experts": ({"moe": {"expert_width": 12}}, "moe.expert_width=12 with train.fuse='ewa': expected None"),
    "what fused experts do not route": (
        {"fuse": "exfusion", "moe": {"routing": "token"}}, "moe.routing='token' with train.fuse='exfusion'",
    ),
    "a rate of what is not pulled": ({"fuse": "exfusion", "fuse_rate": 0.5}, "fuse_rate=0.5 with fuse='exfusion'"),
    "a loss of routers": ({"z_loss": 0.1}, "train.z_loss=0.1 with train.fuse='ewa': expected 0.0, since its layers"),
    "a rate of experts": ({"expert_lr_scale": 2.0}, "train.expert_lr_scale=2 with train.fuse='ewa': expected 1.0"),
    "frozen routers": ({"router_frozen": 1.0}, "train.router_frozen=1 with train.fuse='ewa': expected 0.0"),
    "a rate alone": ({"fuse": "none", "fuse_rate": 0.5}, "fuse_rate=0.5 with fuse='none': expected it with fuse='ewa'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_are_not_read_are_refused(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as raised:
        settings(Path("nowhere"), **{"fuse": "ewa", **changes})
    assert "\n" not in str(raised.value)
