"""A training that was killed at any moment ends as if it had not been."""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import processes
from helpers.jobs import finish, start
from helpers.kills import Killed, arm, logs
from helpers.kills import kill_after as kill_after
from helpers.pictures import roles
from helpers.slow import one_in
from helpers.trainings import QUICK, model, resumed_apart, run, weights
from safetensors.torch import load_file
from torch import nn

import vimoe.tasks.classification_job
import vimoe.training.loop
from vimoe.cli import main
from vimoe.config.data import DataConfig
from vimoe.config.train import TrainConfig
from vimoe.data.classification import load_data
from vimoe.data.labelled_images import Data
from vimoe.data.loaders import preprocessing, train_loader
from vimoe.data.order import Shuffled, mix, seed_everything
from vimoe.errors import FolderError, Stopped
from vimoe.files import TEMPORARY
from vimoe.run_folder import locked
from vimoe.tasks.classification_job import job_on_images
from vimoe.training import checkpoint
from vimoe.training.loop import train
from vimoe.training.parameter_groups import parameter_groups

ALL = {"epochs": 3, "ema_decay": 0.8, "mixup": 0.4, "hflip": 0.5, "min_crop": 0.5, "checkpoint_minutes": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return load_data(DataConfig(path=str(roles(tmp_path_factory.mktemp("pictures"), train=14))))


class Whole(NamedTuple):
    """A training that nothing stopped."""

    out: Path
    weights: torch.Tensor
    summary: dict


@pytest.fixture(scope="module")
def wholes(data: Data, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Whole]:
    """Trainings with the settings ALL, by the accumulation."""

    def whole(accumulation: int) -> Whole:
        out = tmp_path_factory.mktemp("whole")
        network, summary = run(data, out, **ALL, accumulation=accumulation)
        return Whole(out, weights(network), summary)

    return {accumulation: whole(accumulation) for accumulation in (1, 2)}


@pytest.mark.parametrize(("killed_after", "accumulation"), one_in(3, itertools.product([0, 1, 5, 8, 13], [1, 2])))
def test_a_killed_training_ends_as_if_it_had_not_been(
    data: Data, wholes: dict[int, Whole], tmp_path: Path, kill_after: object, killed_after: int, accumulation: int
) -> None:
    """Killed in the first epoch, at the end of one (5 steps), in the midst of the last; twice."""
    settings, whole = {**ALL, "accumulation": accumulation}, wholes[accumulation]
    for steps in (killed_after, 1):
        kill_after(steps)
        with pytest.raises(Killed):
            run(data, tmp_path / "killed", **settings)
    kill_after(1000)
    again, resumed = run(data, tmp_path / "killed", **settings)
    assert torch.equal(whole.weights, weights(again))
    assert all(whole.summary[each] == resumed[each] for each in ("val", "best_epoch"))
    assert logs(whole.out) == logs(tmp_path / "killed")
    assert (whole.out / "load.csv").read_text() == (tmp_path / "killed" / "load.csv").read_text()
    stored = [checkpoint.read(out) for out in (whole.out, tmp_path / "killed")]
    for name in ("model", "ema"):
        assert all(torch.equal(stored[0][name][k], stored[1][name][k]) for k in stored[0][name])


def test_a_job_can_be_trained_with_again_where_it_was_interrupted(
    data: Data, wholes: dict[int, Whole], tmp_path: Path, kill_after: object
) -> None:
    """As in a notebook; the second time in the epoch that it had resumed."""
    settings, network = replace(QUICK, **ALL), model()
    job = job_on_images(data, preprocessing(network), settings)
    for steps in (6, 1):
        kill_after(steps)
        with pytest.raises(Killed):
            train(network, job, settings, tmp_path)
    kill_after(1000)
    train(network, job, settings, tmp_path)
    assert torch.equal(wholes[1].weights, weights(network.cpu()))


def test_so_does_a_moving_average_in_bfloat16(data: Data, tmp_path: Path, kill_after: object) -> None:
    """Which is rounded at random."""

    def trained(out: Path) -> None:
        network, settings = model().bfloat16(), replace(QUICK, **{**ALL, "mixup": 0.0})
        job = job_on_images(data, preprocessing(network), settings)
        out.mkdir(exist_ok=True)
        train(network, replace(job, prepare=lambda images, labels: (images.bfloat16(), labels)), settings, out)

    trained(tmp_path / "whole")
    kill_after(6)
    with pytest.raises(Killed):
        trained(tmp_path / "killed")
    kill_after(1000)
    trained(tmp_path / "killed")
    whole, killed = (checkpoint.read(tmp_path / out)["ema"] for out in ("whole", "killed"))
    assert {w.dtype for w in whole.values() if w.is_floating_point()} == {torch.bfloat16}
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


OPTIONS = {"router_noise": 1.0, "bias_update_rate": 0.05, "expert_dropout": 0.3}


@pytest.mark.parametrize(("killed_after", "accumulation"), [(2, 1), (7, 2)])
def test_with_all_options_of_routing_too(
    data: Data, tmp_path: Path, kill_after: object, killed_after: int, accumulation: int
) -> None:
    """Killed while decisions are partly random; the bias counts, and is another one in each epoch."""
    settings = {**ALL, "accumulation": accumulation, "router_warmup_epochs": 2.5, "expert_weight_decay": 0.2}
    whole, summary = run(data, tmp_path / "whole", model(**OPTIONS), **settings)
    kill_after(killed_after)
    with pytest.raises(Killed):
        run(data, tmp_path / "killed", model(**OPTIONS), **settings)
    kill_after(1000)
    shutil.copytree(tmp_path / "killed", tmp_path / "broken")
    again, resumed = run(data, tmp_path / "killed", model(**OPTIONS), **settings)
    states = whole.state_dict(), again.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert sum(name.endswith("choice_bias") and bool(bias.any()) for name, bias in states[0].items()) == 2
    assert summary["val"] == resumed["val"] and logs(tmp_path / "whole") == logs(tmp_path / "killed")
    assert (tmp_path / "whole" / "load.csv").read_text() == (tmp_path / "killed" / "load.csv").read_text()
    state = checkpoint.read(tmp_path / "broken")  # the check would see a bias that was not restored
    state["model"] = {n: torch.zeros_like(w) if n.endswith("choice_bias") else w for n, w in state["model"].items()}
    checkpoint.write(tmp_path / "broken", state)
    assert not torch.equal(weights(whole), weights(run(data, tmp_path / "broken", model(**OPTIONS), **settings)[0]))


LOSSES = {"entropy_loss": 0.1, "variance_loss": 1.0, "orthogonal_loss": 0.01, "mutual_loss": 0.1, "distill_loss": 1.0}


@pytest.mark.parametrize(("killed_after", "accumulation", "only"), [(2, 1, "all"), (7, 2, "experts")])
def test_with_all_losses_and_rates_too(
    data: Data, tmp_path: Path, kill_after: object, killed_after: int, accumulation: int, only: str
) -> None:
    """The teacher of the distillation is the moving average, which the checkpoint has."""
    settings = {**ALL, **LOSSES, "accumulation": accumulation, "expert_lr_scale": 2.0, "train_only": only}
    whole, summary = run(data, tmp_path / "whole", model(top_k=2), **settings)
    kill_after(killed_after)
    with pytest.raises(Killed):
        run(data, tmp_path / "killed", model(top_k=2), **settings)
    kill_after(1000)
    again, resumed = run(data, tmp_path / "killed", model(top_k=2), **settings)
    assert torch.equal(weights(whole), weights(again)) and summary["val"] == resumed["val"]
    assert logs(tmp_path / "whole") == logs(tmp_path / "killed")


def test_a_training_goes_on_with_the_kernel_it_began_with(
    data: Data, wholes: dict[int, Whole], tmp_path: Path, kill_after: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW was not always fused; the two round differently."""

    def as_it_was(network: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
        groups = parameter_groups(network, config)
        return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)

    fused = wholes[1].weights
    with monkeypatch.context() as patch:
        patch.setattr(vimoe.training.loop, "adamw", as_it_was)
        whole, _ = run(data, tmp_path / "whole", **ALL)
        kill_after(7)
        with pytest.raises(Killed):
            run(data, tmp_path / "killed", **ALL)
        kill_after(1000)
    again, _ = run(data, tmp_path / "killed", **ALL)
    assert torch.equal(weights(whole), weights(again)) and not torch.equal(weights(whole), fused)
    torch.testing.assert_close(weights(whole), fused, rtol=0, atol=1e-2)


VALIDATED = {  # settings, and epochs that are trained
    "no epoch is better than the first": ({"epochs": 6, "lr": 0.0, "min_lr": 0.0, "early_stopping": 2}, 3),
    "killed between two validations": ({"epochs": 5, "val_interval": 3}, 5),
}


@pytest.mark.parametrize("case", VALIDATED)
def test_a_killed_training_validates_and_stops_where_it_would_have(
    data: Data, tmp_path: Path, kill_after: object, case: str
) -> None:
    changes, epochs = VALIDATED[case]
    whole, summary = run(data, tmp_path / "whole", **{**ALL, **changes})
    kill_after(12)
    with pytest.raises(Killed):
        run(data, tmp_path / "killed", **{**ALL, **changes})
    kill_after(1000)
    again, resumed = run(data, tmp_path / "killed", **{**ALL, **changes})
    assert [s["epochs"] for s in (summary, resumed)] == [epochs] * 2
    assert resumed["stopped_early"] == (epochs < changes["epochs"])
    assert torch.equal(weights(whole), weights(again)) and logs(tmp_path / "whole") == logs(tmp_path / "killed")


def test_a_checkpoint_that_one_process_alone_sees_ends_all(data: Data, tmp_path: Path, kill_after: object) -> None:
    """They would wait for one another in different places."""
    kill_after(4)
    with pytest.raises(Killed):
        run(data, tmp_path / "0", checkpoint_minutes=0)
    for told in processes.run(resumed_apart, 2, data.root, tmp_path, timeout=60):
        assert "has a checkpoint that not all processes see" in told and "shared disk" in told


def test_it_would_be_seen_if_the_state_were_not_restored(
    data: Data, wholes: dict[int, Whole], tmp_path: Path, kill_after: object
) -> None:
    """Without the moments of the optimiser, or with a step repeated, the end is another."""
    for broken in ("optimizer", "step"):
        kill_after(7)
        with pytest.raises(Killed):
            run(data, tmp_path / broken, **ALL)
        kill_after(1000)
        state = checkpoint.read(tmp_path / broken)
        if broken == "optimizer":
            state["optimizer"]["state"] = {}
        else:
            state["step"] -= 1
        checkpoint.write(tmp_path / broken, state)
        assert not torch.equal(wholes[1].weights, weights(run(data, tmp_path / broken, **ALL)[0]))


def test_workers_and_batches_do_not_change_what_is_drawn(data: Data) -> None:
    network = model()
    config = replace(QUICK, hflip=0.5, min_crop=0.5, seed=3)
    alone, helped = (train_loader(data.train, preprocessing(network), config, workers) for workers in (0, 2))
    for (x, y), (other_x, other_y) in zip(alone, helped, strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)
    first = torch.cat([x for x, _ in alone])
    alone.sampler.start(epoch=2)
    second = torch.cat([x for x, _ in alone])
    assert not torch.equal(first, second)
    alone.sampler.start(epoch=1, skip=2 * config.batch_size)
    assert torch.equal(torch.cat([x for x, _ in alone]), first[2 * config.batch_size :])


def test_a_seed_is_that_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(torch, "manual_seed", seen.append)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    seed_everything(3)
    drawn = torch.rand(4)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    seed_everything(3)
    assert seen == [3] and torch.equal(torch.rand(4), drawn)


def test_an_order_is_of_its_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = Shuffled(50, seed)
        sampler.start(epoch)
        return [index for index, _ in sampler]

    assert sorted(order(0, 1)) == list(range(50)) and order(0, 1) == order(0, 1)
    assert len({tuple(order(*each)) for each in ((0, 1), (0, 2), (1, 1), (1, 2), (2, 1))}) == 5
    assert len({mix(a, b) for a in range(50) for b in range(50)}) == 2500


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_a_checkpoint(
    data: Data, wholes: dict[int, Whole], tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**ALL, "checkpoint_minutes": 60}
    real, calls = vimoe.training.loop.auxiliary_losses, []

    def interrupted(*args: object) -> object:
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), number)
        return real(*args)

    before = signal.getsignal(number)
    monkeypatch.setattr(vimoe.training.loop, "auxiliary_losses", interrupted)
    with pytest.raises(Stopped, match="go on with: vimoe train --resume") as stopped:
        run(data, tmp_path / "stopped", **settings)
    assert stopped.value.status == 128 + number and signal.getsignal(number) is before
    state = checkpoint.read(tmp_path / "stopped")
    assert (state["epoch"], state["step"]) == (2, 2)
    assert torch.equal(wholes[1].weights, weights(run(data, tmp_path / "stopped", **settings)[0]))


def test_a_signal_during_the_last_validation_is_not_lost(
    data: Data, wholes: dict[int, Whole], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A next stage would go on, whatever was asked for."""
    real, calls = vimoe.tasks.classification_job.evaluate, []

    def interrupted(*args: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == ALL["epochs"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **options)

    monkeypatch.setattr(vimoe.tasks.classification_job, "evaluate", interrupted)
    with pytest.raises(Stopped):
        run(data, tmp_path, **ALL)
    assert checkpoint.read(tmp_path)["epoch"] == ALL["epochs"] + 1
    assert torch.equal(wholes[1].weights, weights(run(data, tmp_path, **ALL)[0]))


def test_the_last_good_checkpoint_is_kept_where_the_disk_is_full(
    data: Data, tmp_path: Path, kill_after: object
) -> None:
    kill_after(5)
    with pytest.raises(Killed):
        run(data, tmp_path, **ALL)
    kill_after(1000)
    before = (tmp_path / "checkpoints" / "last.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(FolderError, match=r"last.pt could not be written.*make room"):
            run(data, tmp_path, **ALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "checkpoints" / "last.pt").read_bytes() == before
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.pt"]
    assert checkpoint.read(tmp_path)["epoch"] == 2


def test_room_is_asked_for_before_training(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(FolderError, match=r"1 kB are free: expected 2.07 MB for the checkpoints"):
        run(data, tmp_path)
    assert not (tmp_path / "metrics.csv").exists()


def test_a_checkpoint_that_will_be_replaced_is_no_want_of_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, free = model(), 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 10**9, free))
    weights_ = sum(tensor.nbytes for tensor in network.state_dict().values())
    needed = 2 * (2 * sum(p.nbytes for p in network.parameters()) + 2 * weights_) + weights_
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.pt").write_bytes(bytes(1000))
    free = needed - 1000
    checkpoint.check_space(tmp_path, network, ema=False)
    free -= 1
    with pytest.raises(FolderError, match="for the checkpoints of this training; make room$"):
        checkpoint.check_space(tmp_path, network, ema=False)


PICKLE = b"cos\nsystem\n(S'touch executed'\ntR."


def test_no_pickle_is_executed(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for content, why in ((PICKLE, ""), (b"", "the file is empty"), (b"garbage", "")):
        (tmp_path / "checkpoints" / "last.pt").write_bytes(content)
        with pytest.raises(FolderError, match=rf"last.pt cannot be read: {why}.*; train again"):
            run(data, tmp_path)
    assert not (tmp_path / "executed").exists()
    torch.save({"format": 99}, tmp_path / "checkpoints" / "last.pt")
    with pytest.raises(FolderError, match="not a checkpoint of format 3"):
        run(data, tmp_path)


def test_other_images_are_refused(data: Data, tmp_path: Path, kill_after: object) -> None:
    kill_after(6)
    with pytest.raises(Killed):
        run(data, tmp_path, **ALL)
    kill_after(1000)
    with pytest.raises(FolderError, match="of other training images"):
        run(replace(data, train=data.train[1:]), tmp_path, **ALL)


def test_a_refused_checkpoint_leaves_the_model_in_its_own_precision(
    data: Data, tmp_path: Path, kill_after: object
) -> None:
    """Accelerate has put autocast around its forward by then."""
    kill_after(6)
    with pytest.raises(Killed):
        run(data, tmp_path, **ALL, precision="bf16")
    kill_after(1000)
    network = model()
    with pytest.raises(FolderError, match="of other training images"):
        run(replace(data, train=data.train[1:]), tmp_path, network, **ALL, precision="bf16")
    x, same = torch.randn(2, 3, 16, 16), model()
    same.load_state_dict(network.state_dict())
    assert torch.equal(network.eval()(x), same.eval()(x))


TRAIN = [
    "--model.name=vit_tiny_patch16_224", "--model.pretrained=false", "--model.img_size=16",
    '--model.args={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}', "--moe.layers=all",
    "--moe.num_experts=4", "--train.epochs=3", "--train.batch_size=8", "--train.lr=3e-3", "--train.ema_decay=0.8",
    "--train.checkpoint_minutes=0", "--train.tensorboard=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return roles(tmp_path_factory.mktemp("photos"), train=14, val=0)


def test_the_command_goes_on(
    photos: Path, tmp_path: Path, kill_after: object, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", f"--data.path={photos}", *TRAIN]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    kill_after(6)
    with pytest.raises(Killed):
        main([*command, "--out", str(tmp_path / "killed")])
    kill_after(1000)
    (tmp_path / "killed" / f"{TEMPORARY}abc").mkdir()  # what a kill while saving leaves behind
    assert main(["train", "--resume", str(tmp_path / "killed")]) == 0
    first, again = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)
    files = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("whole", "killed")]
    assert files[0] == files[1] and "checkpoints" not in files[0]
    for name in ("validation.txt", "config.yaml", "load.csv"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "killed" / name).read_text()
    capsys.readouterr()
    for wrong, said in (
        (["--resume", str(tmp_path / "killed")], "is finished: expected a stopped run"),
        (["--resume", str(tmp_path / "nowhere")], "no such run"),
        (["--resume", str(photos)], "has no config.yaml"),
        (["--resume", str(tmp_path / "killed"), "--train.lr=1"], "--train.lr=1 with --resume: expected none"),
    ):
        assert main(["train", *wrong]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1


@pytest.fixture(scope="module")
def killed_once(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "killed"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        arm(patch, 6)
        main(["train", f"--data.path={photos}", *TRAIN, "--out", str(out)])
    return out


@pytest.fixture
def killed(killed_once: Path, tmp_path: Path) -> Path:
    """A copy of a run that was killed in its second epoch."""
    return Path(shutil.copytree(killed_once, tmp_path / "killed"))


def test_nothing_is_deleted_of_a_project_that_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A config.yaml makes no run: it is what the documents suggest for --config, in anybody's project."""
    names = ["config.yaml", ".gitlab-ci.yml", ".pre-commit-config.yaml", "src/.my-notes", ".venv-3.11/python"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("train: {epochs: 3}")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume", "."]) == 2
    assert "has no checkpoints/last.pt: expected the run folder" in capsys.readouterr().err
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(names)


def test_only_what_a_kill_left_is_cleared_away(killed: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").touch()
    (killed / ".my-notes").mkdir()
    (killed / ".a-link").symlink_to(tmp_path / "elsewhere")
    (killed / f"{TEMPORARY}link").symlink_to(tmp_path / "elsewhere")
    (killed / "checkpoints" / f"{TEMPORARY}half").touch()
    assert main(["train", "--resume", str(killed)]) == 0
    assert (killed / ".my-notes").exists() and (killed / ".a-link").exists() and not list(killed.rglob(f"{TEMPORARY}*"))
    assert (tmp_path / "elsewhere" / "mine").exists()


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("train.weight_decay", "  weight_decay: 0.05", "  weight_decay: 5.0"),
        ("train.layer_decay", "layer_decay: 1.0", "layer_decay: 0.5"),
        ("train.ema_decay", "ema_decay: 0.8", "ema_decay: 0.0"),
        ("train.epochs", "epochs: 3", "epochs: 4"),
        ("train.train_only", "train_only: all", "train_only: moe"),
        ("train.batch_size", "batch_size: 8", "batch_size: 4"),
        ("moe.num_experts", "num_experts: 4", "num_experts: 2"),
        ("moe.layers", "layers: all", "layers: none"),
        ("model.args", "depth: 2", "depth: 3"),
        ("model.img_size", "img_size: 16", "img_size: 32"),
        ("data.seed", "  seed: 0\n  skip", "  seed: 1\n  skip"),
    ],
)
def test_a_setting_that_was_changed_since_is_named(
    killed: Path, name: str, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (killed / "config.yaml").read_text()
    assert settings.count(old) == 1
    (killed / "config.yaml").write_text(settings.replace(old, new))
    before = {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["train", "--resume", str(killed)]) == 2
    err = capsys.readouterr().err
    assert f"{killed}: {name} is " in err and "when the training began: expected the same" in err
    assert {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()} == before


def test_a_checkpoint_from_before_there_were_stages_is_gone_on_from(killed: Path) -> None:
    state = checkpoint.read(killed)
    checkpoint.write(killed, {n: v for n, v in state.items() if n not in ("stage", "part", "before", "ended")})
    assert main(["train", "--resume", str(killed)]) == 0
    assert "stages" not in json.loads((killed / "summary.json").read_text())


NEWER = ("moe.router", "moe.experts")  # than the first runs


@pytest.mark.parametrize("name", NEWER)
def test_a_setting_that_is_newer_than_the_checkpoint_had_its_default(killed: Path, name: str) -> None:
    state = checkpoint.read(killed)
    began = {**state["settings"]}
    for newer in NEWER:
        del began[newer]
    checkpoint.write(killed, {**state, "settings": began})
    with pytest.raises(FolderError, match=f"{name} is 'mine' and was '.*' when the training began"):
        checkpoint.check_settings(killed, began, {**state["settings"], name: "mine"})
    assert main(["train", "--resume", str(killed)]) == 0


@pytest.mark.parametrize("cache", ["none", "features"])
def test_a_class_that_was_added_since_is_one_line(
    tmp_path: Path, kill_after: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    photos, run = roles(tmp_path / "photos", train=14, val=0), tmp_path / "killed"
    kill_after(6)
    features = ["--data.cache=features", "--train.train_only=moe", "--moe.layers=last:1"] if cache == "features" else []
    with pytest.raises(Killed):
        main(["train", f"--data.path={photos}", *TRAIN, *features, "--out", str(run)])
    kill_after(1000)
    shutil.copytree(photos / "train" / "red", photos / "train" / "rot")
    capsys.readouterr()
    assert main(["train", "--resume", str(run)]) == 2
    err = capsys.readouterr().err
    assert f"{run}: its checkpoint is of other training images" in err


def test_the_data_may_have_moved_and_a_run_may_be_saved_more_often(photos: Path, killed: Path, tmp_path: Path) -> None:
    moved = photos.rename(tmp_path / "moved")
    settings = (killed / "config.yaml").read_text().replace(str(photos), str(moved))
    (killed / "config.yaml").write_text(settings.replace("checkpoint_minutes: 0", "checkpoint_minutes: 5"))
    status = main(["train", "--resume", str(killed)])
    moved.rename(photos)  # back, for other tests
    assert status == 0


def test_what_is_trained_with_other_settings_is_refused_in_python_too(
    data: Data, tmp_path: Path, kill_after: object
) -> None:
    kill_after(6)
    with pytest.raises(Killed):
        run(data, tmp_path, **ALL)
    kill_after(1000)
    with pytest.raises(FolderError, match=r"train.lr is 0.1 and was .* when the training began: expected the same"):
        run(data, tmp_path, **{**ALL, "lr": 0.1})


def test_a_run_that_is_alive_is_left_alone(killed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a process of its own, because a process may lock twice."""
    (killed / "checkpoints" / f"{TEMPORARY}last").touch()
    with locked(killed):
        ((status, _, said),) = finish(start(1, "-m", "vimoe.cli", "train", "--resume", killed))
        assert status == 2 and f"is being trained by process {os.getpid()} on" in said
        assert (killed / "checkpoints" / f"{TEMPORARY}last").exists()
        for verb in (["evaluate", killed], ["train", f"--data.path={killed}", "--out", killed]):
            capsys.readouterr()
            assert main([*map(str, verb)]) == 2
            assert "is being trained by process" in capsys.readouterr().err
    assert main(["train", "--resume", str(killed)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_thirty_kills(tmp_path: Path, workers: int) -> None:
    """Fifteen trainings, killed by SIGKILL at random moments, also while a checkpoint is written, until they end."""
    photos = roles(tmp_path / "photos", train=30)
    command = [sys.executable, "-m", "vimoe.cli", "train"]
    settings = [f"--data.path={photos}", f"--data.workers={workers}", *TRAIN, "--train.epochs=12"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *settings, "--out", str(tmp_path / "whole")], check=True, env=environment)
    whole = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    draw, kills = random.Random(workers), 0
    for number in range(15):
        out = tmp_path / f"run{number}"
        arguments = [*settings, "--out", str(out)]
        while True:
            process = subprocess.Popen([*command, *arguments], env=environment, start_new_session=True)
            started = time.perf_counter()
            while not (out / "checkpoints" / "last.pt").exists() and process.poll() is None:
                time.sleep(0.01)  # python and torch are long in starting
            time.sleep(draw.uniform(0, 2.5))
            if process.poll() is not None or time.perf_counter() - started > 300:
                break
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            arguments = ["--resume", str(out)] if (out / "config.yaml").exists() else arguments
            if (out / "summary.json").exists():
                break
            if kills > 2 * (number + 1):  # often enough: let it end
                process = subprocess.Popen([*command, *arguments], env=environment)
                assert process.wait() == 0
                break
        ended = load_file(out / "model" / "model.safetensors")
        assert all(torch.equal(whole[k], ended[k]) for k in whole), f"run {number}"
        assert logs(out) == logs(tmp_path / "whole")
    assert kills >= 15
