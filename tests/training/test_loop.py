"""The loop learns, repeats itself for a seed, and does what each setting says."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny import layers, perturb_experts
from helpers.trainings import QUICK, model, rows, run, run_cached, weights
from helpers.trainings import data as data
from torch import nn

import vimoe
import vimoe.data.images
from vimoe.config.train import TrainConfig
from vimoe.data.labelled_images import Data
from vimoe.data.loaders import eval_loader, preprocessing
from vimoe.errors import ConfigError, VimoeError
from vimoe.metrics.base import evaluate
from vimoe.metrics.classification import ImageScore
from vimoe.models.reading import ignoring_hooks
from vimoe.moe.layer import moe_layers
from vimoe.report.curves import curves
from vimoe.tasks.classification_job import job_on_images
from vimoe.training.auxiliary_losses import auxiliary_losses
from vimoe.training.loop import _Steps, train
from vimoe.training.settle import settle
from vimoe.training.state import Best


@pytest.mark.parametrize("ema_decay", [0.0, 0.8])
def test_it_learns_and_writes_as_it_goes(data: Data, tmp_path: Path, ema_decay: float) -> None:
    network, summary = run(data, tmp_path, epochs=6, ema_decay=ema_decay)
    metrics = rows(tmp_path / "metrics.csv")
    assert [int(row["epoch"]) for row in metrics] == [1, 2, 3, 4, 5, 6]
    assert float(metrics[-1]["train_loss"]) < 0.7 * float(metrics[0]["train_loss"])
    assert summary["val"]["top1"] > 0.8
    best = max(metrics, key=lambda row: (float(row["val_top1"]), -float(row["val_loss"])))
    assert summary["best_epoch"] == int(best["epoch"])
    loader = eval_loader(data.val, preprocessing(network), 4, 0)
    assert evaluate(network, loader).to_dict() == pytest.approx(summary["val"])  # it ends with the best weights


def test_the_load_of_every_expert_is_written_each_epoch(data: Data, tmp_path: Path) -> None:
    run(data, tmp_path)
    load = rows(tmp_path / "load.csv")
    assert len(load) == 2 * 2 * 4  # epochs, layers, experts
    shares = [float(row["share"]) for row in load if row["epoch"] == "2" and row["layer"] == "blocks.1.mlp"]
    assert sum(shares) == pytest.approx(1)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(data: Data, tmp_path: Path) -> None:
    changes = {"min_crop": 0.5, "mixup": 0.2, "auto_augment": "rand-m5-inc1"}
    first, again, other = (
        weights(run(data, tmp_path / str(i), **changes, seed=seed)[0]) for i, seed in enumerate((3, 3, 4))
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_model_that_comes_back_computes_in_its_own_precision(data: Data, tmp_path: Path) -> None:
    """Accelerate puts autocast around the forward of the model itself."""
    network, _ = run(data, tmp_path, precision="bf16")
    x = torch.randn(2, 3, 16, 16)
    same = model()
    same.load_state_dict(network.state_dict())
    assert torch.equal(network(x), same.eval()(x))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_last_block_computes_only_what_the_head_reads(data: Data, tmp_path: Path, precision: str) -> None:
    network, tokens = vimoe.set_reading(model()), []
    network.blocks[-1].mlp.register_forward_hook(lambda _module, args, _output: tokens.append(args[0].shape[1]))
    with ignoring_hooks():
        run(data, tmp_path, network, epochs=1, precision=precision)
    assert set(tokens) == {1}


SETTINGS = {
    "epochs": 3, "batch_size": 6, "accumulation": 2, "lr": 1e-3, "min_lr": 1e-3, "warmup_epochs": 1.5,
    "weight_decay": 0.5, "layer_decay": 0.5, "router_lr_scale": 5.0, "router_weight_decay": 9.0, "train_only": "moe",
    "router_warmup_epochs": 1.0, "router_frozen": 0.5, "router_freeze_epochs": 1, "router_freeze_margin": 1e-9,
    "locality_loss": 9.0, "expert_weight_decay": 5.0, "expert_lr_scale": 3.0,
    "entropy_loss": 1.0, "variance_loss": 9.0, "orthogonal_loss": 1.0, "mutual_loss": 9.0, "distill_loss": 5.0,
    "balance_loss": 1.0, "z_loss": 0.1, "importance_loss": 0.5, "label_smoothing": 0.0, "mixup": 0.8, "cutmix": 1.0,
    "auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.9, "min_crop": 0.35, "hflip": 0.0, "ema_decay": 0.9,
    "color_jitter": 0.5,
    "clip_grad": 0.01, "precision": "bf16", "seed": 1,
}  # fmt: skip


def test_every_setting_is_tried_below() -> None:
    assert {field.name for field in fields(TrainConfig)} == {
        *SETTINGS, "tensorboard", "checkpoint_minutes", "early_stopping", "val_interval", "stages",
        "min_scale", "max_scale", "dice_loss", "class_weights",  # of segmentation
        "fuse", "fuse_rate",  # of layers that are fused
        "compile",  # test_compiled.py
        "parallel",  # test_distributed.py
        "route_loss",  # of a router that classes train: test_given_routes.py
        "oracle_loss", "oracle_temperature",  # test_oracle.py
    }  # fmt: skip


NEEDED = {"distill_loss": {"ema_decay": 0.5}}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_changes_the_training(data: Data, tmp_path: Path, name: str) -> None:
    needed, k = NEEDED.get(name, {}), 2 if name in ("orthogonal_loss", "mutual_loss") else 1
    plain, _ = run(data, tmp_path / "plain", model(top_k=k), **needed)
    changed, summary = run(data, tmp_path / "changed", model(top_k=k), **needed, **{name: SETTINGS[name]})
    assert torch.isfinite(weights(changed)).all() and 0 <= summary["val"]["top1"] <= 1
    assert not torch.equal(weights(plain), weights(changed))


MOE_SETTINGS = {"router_noise": 4.0, "bias_update_rate": 0.5, "expert_dropout": 0.5}


@pytest.mark.parametrize("name", MOE_SETTINGS)
def test_every_option_of_the_layer_changes_the_training(data: Data, tmp_path: Path, name: str) -> None:
    plain, _ = run(data, tmp_path / "plain")
    changed, _ = run(data, tmp_path / "changed", model(**{name: MOE_SETTINGS[name]}))
    assert torch.isfinite(weights(changed)).all() and not torch.equal(weights(plain), weights(changed))


def test_tensorboard_is_written_where_it_is_asked_for(data: Data, tmp_path: Path) -> None:
    for tensorboard in (True, False):
        run(data, tmp_path / str(tensorboard), tensorboard=tensorboard)
        assert bool(list((tmp_path / str(tensorboard)).rglob("events.out.tfevents*"))) == tensorboard


def test_accumulated_small_batches_are_one_large_batch(data: Data, tmp_path: Path) -> None:
    """For a dense model: the balance loss of an MoE is a matter of the batch that it is of."""
    changes = {"epochs": 1, "warmup_epochs": 0, "hflip": 0.0, "clip_grad": 0.0}
    large, _ = run(data, tmp_path / "large", model(layers="none"), batch_size=24, **changes)
    small, _ = run(data, tmp_path / "small", model(layers="none"), batch_size=8, accumulation=3, **changes)
    for (name, ours), theirs in zip(small.named_parameters(), large.parameters(), strict=True):
        if not name.endswith("qkv.bias"):  # a key's bias has gradient 0 but for rounding, which AdamW makes a step of
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_the_rate_never_rises_after_its_peak(data: Data, tmp_path: Path) -> None:
    run(data, tmp_path, model(layers="none"), lr=1e-7, epochs=3, warmup_epochs=0)  # below what min_lr is by default
    assert [float(row["lr"]) for row in rows(tmp_path / "metrics.csv")] == pytest.approx([1e-7] * 3)


def norms(data: Data, out: Path, monkeypatch: pytest.MonkeyPatch, network: nn.Module, **changes: object) -> list[float]:
    """Gradient norms of the updates of an epoch in which nothing moves."""
    seen: list[float] = []
    step = torch.optim.AdamW.step

    def see(self: torch.optim.AdamW, *args: object, **kwargs: object) -> object:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            seen.append(float(nn.utils.get_total_norm(gradients)))
        return step(self, *args, **kwargs)

    still = {"epochs": 1, "warmup_epochs": 0, "lr": 0.0, "min_lr": 0.0, "clip_grad": 0.0, "hflip": 0.0}
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", see)
        run(data, out, network, **still, **changes)
    return seen


def test_an_incomplete_window_is_the_mean_of_its_own_steps(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 images: the last 2 of 6 batches of 4 are the last batch of 8, also where 4 are to be accumulated."""
    dense = {"layers": "none"}
    large = norms(data, tmp_path / "large", monkeypatch, model(**dense), batch_size=8)
    small = norms(data, tmp_path / "small", monkeypatch, model(**dense), batch_size=4, accumulation=4)
    assert len(large) == 3 and len(small) == 2
    assert small[1] == pytest.approx(large[2], rel=1e-4)
    whole = norms(data, tmp_path / "whole", monkeypatch, model(**dense), batch_size=4, accumulation=2)
    assert whole == pytest.approx(large, rel=1e-4)
    one = norms(data, tmp_path / "one", monkeypatch, model(**dense), batch_size=8, accumulation=99)
    assert one == pytest.approx(norms(data, tmp_path / "all", monkeypatch, model(**dense), batch_size=24), rel=1e-4)


def test_health_shows_the_gradients_of_an_incomplete_window(data: Data, tmp_path: Path) -> None:
    """Of one image in all batches: each window has the gradient of a single step, however many it adds up."""
    alike = replace(data, train=data.train[:1] * 6)
    still = {"epochs": 1, "warmup_epochs": 0, "lr": 0.0, "min_lr": 0.0, "hflip": 0.0, "batch_size": 1}
    found = []
    for accumulation in (1, 4):  # of 4: a window of 4 steps and one of 2
        run(alike, tmp_path / str(accumulation), perturbed(), accumulation=accumulation, **still)
        (row, _) = rows(tmp_path / str(accumulation) / "health.csv")
        found.append([float(row["router_gradient"]), float(row["expert_gradient"])])
    assert min(found[0]) > 0 and found[1] == pytest.approx(found[0], rel=1e-4)


def perturbed() -> nn.Module:
    return perturb_experts(model())


def test_training_the_moe_layers_alone_leaves_the_trunk(data: Data, tmp_path: Path) -> None:
    before = model(layers=[1])
    frozen = {name: p.clone() for name, p in before.named_parameters()}
    after, _ = run(data, tmp_path, model(layers=[1]), train_only="moe")
    moved = {name for name, p in after.named_parameters() if not torch.equal(p, frozen[name])}
    assert {name.split(".mlp.")[0] for name in moved} == {"blocks.1", "head.weight", "head.bias"}


def test_training_them_alone_is_the_same_budget_for_the_dense_control(data: Data, tmp_path: Path) -> None:
    control = model(layers=[1], num_experts=0, num_shared_experts=2)
    frozen = {name: p.clone() for name, p in control.named_parameters()}
    tmp_path.mkdir(exist_ok=True)
    settings = replace(QUICK, train_only="moe")
    train(control, job_on_images(data, preprocessing(control), settings), settings, tmp_path, ["blocks.1.mlp"])
    control.cpu()
    moved = {name for name, p in control.named_parameters() if not torch.equal(p, frozen[name])}
    assert {name.split(".mlp.")[0] for name in moved} == {"blocks.1", "head.weight", "head.bias"}
    with pytest.raises(ConfigError, match="no MoE layer"):
        run(data, tmp_path, model(layers="none"), train_only="moe")


@pytest.mark.parametrize("only", ["head", "experts", "last:1", (1,), "blocks.1.*"])
def test_what_is_not_named_stays_as_it_is_to_the_bit(data: Data, tmp_path: Path, only: object) -> None:
    """The bias of a router too, which no gradient moves."""
    before = model(layers="all", bias_update_rate=0.1)
    first = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    run(data, tmp_path, before, train_only=only)
    moved = {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, first[name])}
    head, mlp = {"head.weight", "head.bias"}, "blocks.1.mlp."
    parts = {"head": set(), "experts": {"router", "experts"}}.get(only, {"router", "experts", "shared"})
    assert head <= moved
    assert {name.split(".")[3] for name in moved - head} == parts
    if only not in ("head", "experts"):
        assert all(name.startswith(mlp) for name in moved - head)


def test_the_dense_control_trains_the_same_ffns(data: Data, tmp_path: Path) -> None:
    before = {name: p.clone() for name, p in model(layers="none").named_parameters()}
    after, _ = run(data, tmp_path, model(layers="none"), train_only="last:1")
    moved = {name for name, p in after.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.startswith(("blocks.1.mlp.", "head."))}


def test_the_first_step_learns_and_the_rate_ends_low(data: Data, tmp_path: Path) -> None:
    before = model()
    first = weights(before).clone()
    after, _ = run(data, tmp_path, before, epochs=1, batch_size=24, warmup_epochs=0.9, min_lr=1e-5)
    assert not torch.equal(first, weights(after))  # one step in all
    (row,) = rows(tmp_path / "metrics.csv")
    assert float(row["lr"]) == pytest.approx((QUICK.lr + 1e-5) / 2)  # not the lowest, which would learn nothing
    run(data, tmp_path / "longer", epochs=3, warmup_epochs=1)
    rates = [float(row["lr"]) for row in rows(tmp_path / "longer" / "metrics.csv")]
    assert rates[0] == pytest.approx(QUICK.lr) and rates[-1] == pytest.approx(QUICK.min_lr)


@pytest.mark.parametrize(("accumulation", "updates"), [(1, 3), (2, 2), (3, 1)])
def test_the_bias_moves_once_an_update_by_the_load_of_all_its_steps(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int, updates: int
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # the setting holds
    network, seen, real = model(bias_update_rate=0.125), [], vimoe.training.loop.update_bias
    monkeypatch.setattr(vimoe.training.loop, "update_bias", lambda *given: (seen.append(list(given[1])), real(*given)))
    run(data, tmp_path, network, epochs=1, warmup_epochs=0, accumulation=accumulation)
    assert [len(routings) for routings in seen] == [2 * n for n in _parts(3, accumulation)] and len(seen) == updates
    assert not any(routing.logits.requires_grad or routing.gates.requires_grad for step in seen for routing in step)
    for name, layer in moe_layers(network).items():
        expected = torch.zeros(4)
        for step in seen:
            load = sum(routing.load.cpu() for routing in step if routing.layer == name)
            assert load.sum() == 8 * len(step) / 2
            expected += 0.125 * (load.float().mean() - load).sign()
        assert expected.any() and torch.equal(layer.router.choice_bias, expected)


def _parts(steps: int, accumulation: int) -> list[int]:
    return [min(accumulation, steps - done) for done in range(0, steps, accumulation)]


def test_the_routers_warm_up_is_linear_in_steps_and_over_in_the_end(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, shares, real = model(), [], vimoe.training.loop.set_random_share

    def see(plain: nn.Module, share: float) -> None:
        real(plain, share)
        at = layers(plain)[0].router.random_share
        shares.append(0.0 if at is None else float(at))

    monkeypatch.setattr(vimoe.training.loop, "set_random_share", see)
    run(data, tmp_path, network, router_warmup_epochs=1.5)  # two epochs of three steps
    assert shares == pytest.approx([1, 1 - 1 / 4.5, 1 - 2 / 4.5, 1 - 3 / 4.5, 1 - 4 / 4.5, 0, 0])
    assert [layer.router.random_share for layer in layers(network)] == [None, None]


def test_the_warm_up_is_over_where_training_fails_too(data: Data, tmp_path: Path) -> None:
    network = model()
    with torch.no_grad():
        network.head.bias[0] = float("nan")
    with pytest.raises(VimoeError, match="the loss is nan"):
        run(data, tmp_path, network, router_warmup_epochs=1)
    assert [layer.router.random_share for layer in layers(network)] == [None, None]


def test_in_the_warm_up_every_expert_gets_its_part(data: Data, tmp_path: Path) -> None:
    """Of a router that sends all to one expert."""
    for warmup, idle in ((0, 3), (1, 0)):
        network = model(routing="token")
        with torch.no_grad():
            for block in network.blocks:
                block.norm2.bias[0] = 50.0  # what all images have in common decides
                block.mlp.router.weight.zero_()
                block.mlp.router.weight[1, 0] = 1.0
        still = {"epochs": 1, "warmup_epochs": 0, "lr": 0.0, "min_lr": 0.0, "batch_size": 2}
        run(data, tmp_path / str(warmup), network, **still, router_warmup_epochs=warmup)
        load = [float(row["share"]) for row in rows(tmp_path / str(warmup) / "load.csv")[:4]]
        assert sum(share == 0 for share in load) == idle


def scripted(monkeypatch: pytest.MonkeyPatch, scores: list[tuple[float, float]]) -> None:
    """Validation gives these (top1, loss), one an epoch."""
    left = iter(scores)

    def evaluate_next(_model: nn.Module, _loader: object, **_more: object) -> ImageScore:
        top1, loss = next(left)
        return ImageScore(top1, 1.0, loss, 9)

    monkeypatch.setattr(vimoe.tasks.classification_job, "evaluate", evaluate_next)


BETTER_LATE = [(0.5, 1.0), (0.4, 0.5), (0.5, 0.9), (0.5, 0.9), (0.3, 0.1), (0.9, 0.1)]
STOPS = {
    "never without": (None, BETTER_LATE, 6, 6),
    "after one that is no better, whatever its loss": (1, BETTER_LATE, 2, 1),
    "a lower loss at equal top-1 is better, equal ones are not": (2, BETTER_LATE, 5, 3),
    "not while the patience lasts": (3, BETTER_LATE, 6, 6),
    "where all get better": (1, [(i / 10, 1.0) for i in range(6)], 6, 6),
    "where the first is best": (4, [(0.5, 1.0)] * 6, 5, 1),
    "at the end there is nothing to stop": (5, [(0.5, 1.0)] * 6, 6, 1),
}


@pytest.mark.parametrize("case", STOPS)
def test_it_stops_early_when_and_only_when_it_should(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    patience, scores, trained, best = STOPS[case]
    scripted(monkeypatch, scores)
    with caplog.at_level(logging.INFO, "vimoe"):
        _, summary = run(data, tmp_path, model(layers="none"), epochs=6, early_stopping=patience, hflip=0.0)
    assert (summary["epochs"], summary["best_epoch"]) == (trained, best)
    assert summary["stopped_early"] == (trained < 6) and len(rows(tmp_path / "metrics.csv")) == trained
    assert summary["val"]["top1"] == scores[best - 1][0]
    said = [record.getMessage() for record in caplog.records if "stopped" in record.getMessage()]
    why = f"stopped after epoch {trained}, the best is {best}: none of the last {patience} was better"
    assert said == ([why] if trained < 6 else [])


def test_it_ends_with_the_weights_of_the_best_epoch(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [(0.5, 1.0), (0.8, 1.0), (0.1, 1.0), (0.1, 1.0), (0.1, 1.0)])
    early, _ = run(data, tmp_path / "early", epochs=5, early_stopping=2)
    scripted(monkeypatch, [(0.5, 1.0), (0.8, 1.0), (0.1, 1.0), (0.1, 1.0), (0.1, 1.0)])
    whole, _ = run(data, tmp_path / "whole", epochs=5)
    assert torch.equal(weights(early), weights(whole))


def test_images_per_second_are_those_of_steps_alone(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, waited, save = time.perf_counter, [0.0], _Steps.save

    def slow(*args: Any) -> None:
        save(*args)
        waited[0] += 1000

    monkeypatch.setattr(_Steps, "save", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + waited[0])
    run(data, tmp_path, checkpoint_minutes=0.0)
    assert waited[0] > 4000, "no checkpoint was written within an epoch"
    for row in rows(tmp_path / "metrics.csv"):
        assert float(row["images_per_second"]) > len(data.train) / 1000


def test_a_run_whose_stop_is_due_trains_no_further(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [(0.5, 1.0), (0.8, 1.0), (0.1, 1.0), (0.1, 1.0)])
    first, summary = run(data, tmp_path, epochs=6, early_stopping=2)
    monkeypatch.setattr(vimoe.tasks.classification_job, "evaluate", lambda *_, **__: pytest.fail("one more epoch"))
    again, resumed = run(data, tmp_path, epochs=6, early_stopping=2)  # the checkpoint of its last epoch is there
    assert torch.equal(weights(first), weights(again))
    assert {**resumed, "seconds": 0} == {**summary, "seconds": 0} and resumed["epochs"] == 4


INTERVALS = {  # interval, patience, scores of the validated epochs, those epochs, epochs trained, best epoch
    "the last epoch is validated too": (2, None, [0.5, 0.6, 0.7], [2, 4, 5], 5, 5),
    "the best of the validated epochs is kept": (2, None, [0.5, 0.8, 0.7], [2, 4, 5], 5, 4),
    "longer than the training": (9, None, [0.5], [5], 5, 5),
    "it stops at a validation": (2, 1, [0.5, 0.4], [2, 4], 4, 2),
    "it does not stop before there was one": (3, 1, [0.5, 0.6], [3, 5], 5, 5),
}


@pytest.mark.parametrize("case", INTERVALS)
def test_validation_every_few_epochs(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    interval, patience, top1, validated, trained, best = INTERVALS[case]
    scripted(monkeypatch, [(share, 1.0) for share in top1])
    with caplog.at_level(logging.INFO, "vimoe"):
        network, summary = run(data, tmp_path, epochs=5, val_interval=interval, early_stopping=patience)
    logged = rows(tmp_path / "metrics.csv")
    assert [int(row["epoch"]) for row in logged] == list(range(1, trained + 1))
    assert {int(row["epoch"]): float(row["val_top1"]) for row in logged if row["val_top1"]} == dict(
        zip(validated, top1, strict=True)
    )
    assert (summary["epochs"], summary["best_epoch"], summary["val"]["top1"]) == (trained, best, max(top1))
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("epoch 1 of 5")]
    assert len(lines) == 1 and lines[0].endswith("in training") == (1 not in validated)
    curves(tmp_path / "metrics.csv")


def test_validating_less_often_changes_nothing_of_the_last_epoch(data: Data, tmp_path: Path) -> None:
    run(data, tmp_path / "often", epochs=3)
    _, summary = run(data, tmp_path / "seldom", epochs=3, val_interval=3)
    logged = [rows(tmp_path / name / "metrics.csv")[-1] for name in ("often", "seldom")]
    assert summary["best_epoch"] == 3
    for row in logged:
        row.pop("images_per_second")
    assert logged[0] == logged[1]


def test_settings_that_contradict_one_another_are_refused(data: Data, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="warmup_epochs=2 of train.epochs=2"):
        run(data, tmp_path, warmup_epochs=2)
    with pytest.raises(ConfigError, match=r"router_warmup_epochs=2.5 of train.epochs=2: expected at most as many"):
        run(data, tmp_path, router_warmup_epochs=2.5)
    with pytest.raises(ConfigError, match=r"stages=\['head'\] in vimoe.training.loop.train: expected .* of one stage"):
        run(data, tmp_path, stages=("head",))
    job = job_on_images(data, preprocessing(model()), QUICK)
    with pytest.raises(ConfigError, match="batch_size=4 with a job of batches of 8: expected the same"):
        train(model(), job, replace(QUICK, batch_size=4), tmp_path)
    with pytest.raises(ConfigError, match="batch_size=64 with 24 training images"):
        run(data, tmp_path, batch_size=64)
    with pytest.raises(ConfigError, match="expected an even number"):
        TrainConfig(batch_size=7, mixup=0.1)


@pytest.mark.parametrize(
    ("given", "images", "batch"),
    [
        ({}, 36, 36),
        ({}, 64, 64),
        ({}, 2, 2),
        ({"batch_size": 50}, 49, 49),
        ({"mixup": 0.2}, 37, 36),
        ({"cutmix": 1.0}, 3, 2),
    ],
)
def test_no_batch_is_larger_than_the_training_images(
    given: dict, images: int, batch: int, caplog: pytest.LogCaptureFixture
) -> None:
    asked = TrainConfig(precision="no", **given)
    settled = settle(asked, images, model())
    assert settled == replace(asked, batch_size=batch) and settle(settled, images, model()) == settled
    said = f"train.batch_size={asked.batch_size} is lowered to {batch}, of {images} training images"
    assert [record.getMessage() for record in caplog.records] == ([said] if batch < asked.batch_size else [])


def test_a_warm_up_of_a_router_that_cannot_be_random_is_refused_before_the_training() -> None:
    with pytest.raises(ConfigError, match="router_warmup_epochs=1 with moe.router='expert_choice': expected 0"):
        settle(TrainConfig(router_warmup_epochs=1), 100, model(router="expert_choice", routing="token"))


def test_auxiliary_losses_are_weighted_and_none_without_moe() -> None:
    network = model()
    with vimoe.record(network) as routings:
        network(torch.randn(4, 3, 16, 16))
    total, parts = auxiliary_losses(routings, replace(QUICK, balance_loss=0.5, z_loss=0.25))
    torch.testing.assert_close(total, 0.5 * parts["balance_loss"] + 0.25 * parts["z_loss"])
    assert auxiliary_losses([], QUICK) == (0.0, {})


def test_the_losses_of_records_are_in_the_log_by_name(data: Data, tmp_path: Path) -> None:
    weights_ = {"entropy_loss": 0.1, "variance_loss": 0.1, "orthogonal_loss": 0.01, "mutual_loss": 0.1,
                "distill_loss": 0.1}  # fmt: skip
    run(data, tmp_path, model(top_k=2), ema_decay=0.5, **weights_)
    for row in rows(tmp_path / "metrics.csv"):
        assert 0 < float(row["train_entropy_loss"]) <= math.log(4) + 1e-6
        assert -3 / 16 <= float(row["train_variance_loss"]) < 0
        assert float(row["train_orthogonal_loss"]) > 0 and float(row["train_distill_loss"]) > 0
        assert 0 < float(row["train_mutual_loss"]) < float(row["train_orthogonal_loss"])
    run(data, tmp_path / "off")
    assert not {f"train_{name}" for name in weights_} & set(rows(tmp_path / "off" / "metrics.csv")[0])


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_teacher_is_the_moving_average_with_all_experts(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    seen, real = [], vimoe.training.loop._Steps._taught

    def see(self: object, images: torch.Tensor) -> torch.Tensor:
        seen.append((real(self, images), self.ema.module, self.ema.module(images).detach()))
        return seen[-1][0]

    monkeypatch.setattr(vimoe.training.loop._Steps, "_taught", see)
    run(data, tmp_path, perturbed(), epochs=1, ema_decay=0.5, distill_loss=1.0, precision=precision)
    assert len(seen) == 3
    for taught, average, sparse in seen:
        assert not taught.requires_grad and not average.training
        assert taught.shape == sparse.shape and (taught - sparse).abs().max() > 1e-3
        assert [layer.config.top_k for layer in layers(average)] == [1, 1]  # and it is sparse again
        assert torch.isfinite(taught).all()


def test_a_dense_control_can_have_the_same_teacher(data: Data, tmp_path: Path) -> None:
    run(data, tmp_path, model(layers="none"), ema_decay=0.5, distill_loss=1.0)
    assert all(float(row["train_distill_loss"]) >= 0 for row in rows(tmp_path / "metrics.csv"))


@pytest.mark.parametrize("name", ["orthogonal_loss", "mutual_loss"])
def test_losses_of_outputs_need_two_experts_of_a_token(name: str) -> None:
    assert TrainConfig(**{name: 0.1}).reads_outputs and not TrainConfig().reads_outputs
    with pytest.raises(ConfigError, match=f"{name}=0.1 with moe.top_k=1: expected at least 2.*set moe.top_k=2"):
        settle(TrainConfig(**{name: 0.1}), 100, model())
    with pytest.raises(ConfigError, match=f"{name}=0.1 with moe.router='smear': expected 0, since no token has"):
        settle(TrainConfig(**{name: 0.1}), 100, model(router="smear", top_k=2))
    settle(TrainConfig(**{name: 0.1}), 100, model(top_k=2))


def test_without_the_loss_no_output_is_recorded_and_it_is_not_computed(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a training is the one that it was before there was such a loss, to the bit."""
    plain, _ = run(data, tmp_path / "plain", model(top_k=2))
    seen, real = list[bool](), vimoe.balance_loss

    def see(routings: list[vimoe.Routing], over: object = None) -> torch.Tensor:
        seen.extend(routing.outputs is not None for routing in routings)
        return real(routings, over)

    monkeypatch.setitem(vimoe.training.auxiliary_losses.LOSSES, "mutual_loss", None)
    monkeypatch.setattr(vimoe.training.auxiliary_losses, "balance_loss", see)
    off, _ = run(data, tmp_path / "off", model(top_k=2), mutual_loss=0.0)
    assert seen and not any(seen) and torch.equal(weights(plain), weights(off))


def test_a_loss_on_validation_that_is_no_number_is_told_with_the_epoch_over_all_stages() -> None:
    score = SimpleNamespace(columns={"loss": math.nan})
    with pytest.raises(VimoeError, match="the loss is nan on validation in epoch 5: lower train.lr"):
        Best().offer(2, score, dict, before=3)


def rows_but_speed(path: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows(path)]


@pytest.mark.parametrize("cache", ["memory", "disk"])
@pytest.mark.parametrize("policy", [None, "rand-m5-inc1"])
def test_decoded_images_train_the_same_weights_on_a_cpu(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str, policy: str | None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = {"min_crop": 0.5, "auto_augment": policy}
    plain, summary = run(data, tmp_path / "plain", **settings)
    cached, other = run_cached(data, tmp_path / "cached", cache, **settings)
    assert torch.equal(weights(plain), weights(cached))
    assert summary["val"] == other["val"]
    assert rows_but_speed(tmp_path / "plain/metrics.csv") == rows_but_speed(tmp_path / "cached/metrics.csv")
    monkeypatch.setattr(vimoe.data.images, "decode", None)  # nothing is left to be decoded
    if cache == "disk":
        again, _ = run_cached(data, tmp_path / "again", cache, **settings)
        assert torch.equal(weights(plain), weights(again))
