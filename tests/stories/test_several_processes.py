"""`torchrun -m vimoe train`: one run folder, one log, one line for a failure; nothing hangs, and it can be resumed."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.commands import QUICK, TINY, call
from helpers.jobs import TESTS, environment, finish, start
from helpers.numbers import assert_alike
from helpers.pictures import folder, roles
from helpers.scenery import scenes
from helpers.slow import one_in
from helpers.trainings import rows
from safetensors.torch import load_file

import vimoe
from vimoe.run_folder import LOCK

FAILING = TESTS / "helpers" / "failing_job.py"
OPTIONS = [*TINY, *QUICK, "--moe.layers=last:1", "--moe.num_experts=4", "--train.ema_decay=0.5", "--train.mixup=0.2"]
OPTIONS += ["--train.checkpoint_minutes=0", "--moe.bias_update_rate=0.01"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return roles(tmp_path_factory.mktemp("photos"), train=14)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def train(photos: Path, out: Path, *more: str) -> list[str]:
    return ["train", f"--data.path={photos}", *OPTIONS, *more, "--out", str(out)]


def lines(ended: list[tuple[int | None, str, str]]) -> list[str]:
    """What the processes said of their end."""
    return [line for _, _, said in ended for line in said.splitlines() if line.startswith("vimoe: ")]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def assert_equal(ours: Path, theirs: Path) -> None:
    one, other = weights(ours), weights(theirs)
    assert all(torch.equal(one[name], other[name]) for name in one)


def assert_same_logs(ours: Path, theirs: Path) -> None:
    for name in ("metrics.csv", "load.csv", "health.csv"):
        for row, other in zip(rows(ours / name), rows(theirs / name), strict=True):
            for column in row.keys() - {"images_per_second", "layer"}:
                assert float(other[column]) == pytest.approx(float(row[column]), rel=1e-5), (name, column)


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int | None, str, str]]]:
    """A run of two processes, and how they ended."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        return out, finish(start(2, "-m", "vimoe", *train(photos, out, "--data.cache=disk")))


def test_one_speaks_and_writes(whole: tuple[Path, Any]) -> None:
    out, ((first, printed, said), second) = whole
    assert first == 0, said
    assert "validation top-1" in printed and "epoch 3 of 3" in said and second == (0, "", "")
    assert {"config.yaml", "metrics.csv", "load.csv", "report.html", "summary.json", "model"} <= {
        each.name for each in out.iterdir()
    }
    assert json.loads((out / "summary.json").read_text())["val"]["images"] == 9
    assert len(rows(out / "metrics.csv")) == 3


def test_a_killed_job_ends_and_goes_on_to_the_same_bits(photos: Path, whole: tuple[Path, Any], tmp_path: Path) -> None:
    for rank, step, how in ((1, 3, "kill"), (0, 4, "kill")):
        out = tmp_path / f"killed{rank}"
        ended = finish(start(2, FAILING, how, rank, step, *train(photos, out, "--data.cache=disk")), 200)
        assert ended[rank][0] == -signal.SIGKILL and ended[1 - rank][0] == 2, ended
        assert len(lines(ended)) == 1 and "another process of the job has ended" in lines(ended)[0]
        again = finish(start(2, "-m", "vimoe", "train", "--resume", out))
        assert [status for status, _, _ in again] == [0, 0], again
        assert_equal(whole[0], out)
        assert_same_logs(whole[0], out)  # the sums until the kill are counted once


def test_a_signal_to_one_stops_all_with_a_checkpoint(photos: Path, whole: tuple[Path, Any], tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    ended = finish(start(2, FAILING, "term", 1, 7, *train(photos, out, "--data.cache=disk")), 200)
    assert [status for status, _, _ in ended] == [128 + signal.SIGTERM] * 2, ended
    assert lines(ended) == [f"vimoe: stopped, with a checkpoint; go on with: vimoe train --resume {out}"]
    assert [status for status, _, _ in finish(start(1, "-m", "vimoe", "train", "--resume", out))] == [0]
    ours, theirs = rows(whole[0] / "metrics.csv"), rows(out / "metrics.csv")  # by one process from the second epoch on
    for row, other in zip(ours, theirs, strict=True):
        assert float(other["train_loss"]) == pytest.approx(float(row["train_loss"]), rel=1e-4)
        assert float(other["val_loss"]) == pytest.approx(float(row["val_loss"]), rel=1e-3)


EXPERTS = ["--moe.layers=all", "--moe.routing=token", "--train.parallel.expert=2"]


def spread_as(out: Path, **sizes: int) -> None:
    """Changes the mesh in the settings of a run."""
    settings = yaml.safe_load((out / "config.yaml").read_text())
    settings["train"]["parallel"] = sizes
    (out / "config.yaml").write_text(yaml.safe_dump(settings))


@pytest.mark.slow
def test_spread_experts_go_on_after_a_kill_and_over_any_mesh(photos: Path, tmp_path: Path) -> None:
    """Two processes go on to the same bits; one process, and shards after that, to rounding."""
    whole, killed, other = (tmp_path / name for name in ("whole", "killed", "other"))
    ended = finish(start(2, "-m", "vimoe", *train(photos, whole, *EXPERTS)))
    assert [status for status, _, _ in ended] == [0, 0], ended
    ended = finish(start(2, FAILING, "kill", 1, 3, *train(photos, killed, *EXPERTS)), 200)
    assert [status for status, _, _ in ended] == [2, -signal.SIGKILL] and len(lines(ended)) == 1, ended
    assert len(list((killed / "checkpoints").glob("shards-*"))) == 1
    shutil.copytree(killed, other)
    again = finish(start(2, "-m", "vimoe", "train", "--resume", killed))
    assert [status for status, _, _ in again] == [0, 0] and not (killed / "checkpoints").exists(), again
    assert_equal(whole, killed)
    refused = finish(start(1, "-m", "vimoe", "train", "--resume", other))
    assert "with 1 process: expected sizes whose product is 1" in lines(refused)[0]
    spread_as(other)
    stopped = finish(start(1, FAILING, "term", 0, 3, "train", "--resume", other))
    assert [status for status, _, _ in stopped] == [128 + signal.SIGTERM], stopped
    assert [path.name for path in (other / "checkpoints").iterdir()] == ["last.pt"]
    spread_as(other, fsdp=2)
    again = finish(start(2, "-m", "vimoe", "train", "--resume", other))
    assert [status for status, _, _ in again] == [0, 0], again
    for row, there in zip(rows(whole / "metrics.csv"), rows(other / "metrics.csv"), strict=True):
        assert float(there["train_loss"]) == pytest.approx(float(row["train_loss"]), rel=1e-4)
        assert float(there["val_loss"]) == pytest.approx(float(row["val_loss"]), rel=1e-3)
    assert vimoe.load(whole / "model")(torch.zeros(1, 3, 16, 16)).isfinite().all()  # in one process


@pytest.mark.parametrize(
    ("how", "rank", "said"),
    one_in(
        3,
        [
            ("nan", 1, "the loss is nan in epoch 1, step 3, of "),
            ("error", 1, "the image is gone: expected it to be there; restore it"),
            ("full", 0, "No space left on device"),
        ],
    ),
)
def test_a_failure_of_one_ends_all_with_its_line(photos: Path, tmp_path: Path, how: str, rank: int, said: str) -> None:
    out = tmp_path / "failed"
    ended = finish(start(2, FAILING, how, rank, 2, *train(photos, out)), 200)
    assert [status for status, _, _ in ended] == [2, 2], ended
    assert len(lines(ended)) == 1 and said in lines(ended)[0], ended
    assert (out / "checkpoints" / "last.pt").exists() and not (out / "summary.json").exists()
    if how == "nan":
        assert [status for status, _, _ in finish(start(1, "-m", "vimoe", "train", "--resume", out))] == [0]


def test_processes_that_read_different_images_do_not_train(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "blind"
    ended = finish(start(2, FAILING, "blind", 1, 0, *train(photos, out, "--data.skip_unreadable=true")), 200)
    assert [status for status, _, _ in ended] == [2, 2], ended
    assert len(lines(ended)) == 1 and "the processes found different images: expected the same" in lines(ended)[0]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["train", "--data.path=digits", *OPTIONS, "--train.batch_size=10"], "train.batch_size=10 over 2 processes"),
        (["train", "--data.path=nowhere", *OPTIONS], "nowhere"),
        (["train", "--train.lr=high"], "train.lr"),
        (
            ["train", "--data.path=digits", *OPTIONS, "--train.parallel.fsdp=2", "--train.compile=true"],
            "train.compile=True with train.parallel",
        ),
        (["train", "--data.path=digits", *OPTIONS, "--train.parallel.expert=3"], "expected sizes whose product is 2"),
        (
            [
                "train",
                "--data.path=digits",
                *OPTIONS,
                "--moe.num_experts=3",
                "--train.parallel.expert=2",
            ],
            "train.parallel.expert=2 with moe.num_experts=3",
        ),
        (
            ["prune", "runs/first"],
            "vimoe prune in 2 processes: expected 1, since only train, evaluate, predict, analyze",
        ),
        (["evaluate", "runs/first"], "runs/first: no such run"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, command: list[str], said: str) -> None:
    more = ["--out", str(tmp_path / "run")] if command[0] == "train" else []
    ended = finish(start(2, "-m", "vimoe", *command, *more))
    assert [status for status, _, _ in ended] == [2, 2]
    assert len(lines(ended)) == 1 and said in lines(ended)[0], ended
    assert not (tmp_path / "run").exists()


def shared(*command: object, count: int = 2) -> dict[str, Any]:
    """The JSON of a verb in several processes, of which one speaks."""
    (first, printed, said), *others = finish(start(count, "-m", "vimoe", *command, "--json"))
    assert first == 0, said
    assert others == [(0, "", "")] * (count - 1)
    return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_other_verbs_share_the_images_and_give_what_one_gives(
    photos: Path, whole: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    ours, theirs = (Path(shutil.copytree(whole[0], tmp_path / name)) for name in ("ours", "theirs"))
    others = folder(tmp_path / "others", 2, seed=7)
    for more in ([], ["--data.path", others]):
        one, several = call(capsys, "evaluate", ours, *more), shared("evaluate", theirs, *more, count=count)
        assert_alike(one, several)
        assert several["images"] == (6 if more else 9)
    predicted = shared("predict", theirs, photos / "test", photos / "val", "--top=2", count=count)
    assert_alike(call(capsys, "predict", ours, photos / "test", photos / "val", "--top=2"), predicted)
    assert len(predicted["predictions"]) == 18
    found = shared("analyze", theirs, "--overrule=7", "--probe=true", count=count)
    assert_alike(
        call(capsys, "analyze", ours, "--overrule=7", "--probe=true")
        | {key: found[key] for key in ("routing", "report")},
        found,
    )
    assert_alike(*(json.loads((run / "routing.json").read_text()) for run in (ours, theirs)))
    assert {each.name for each in theirs.rglob("*")} == {each.name for each in ours.rglob("*")}


def test_a_damaged_image_of_one_share_ends_all_or_leaves_out_the_temperature(
    photos: Path, whole: tuple[Path, Any], tmp_path: Path
) -> None:
    others = Path(shutil.copytree(photos, tmp_path / "photos"))
    run = Path(shutil.copytree(whole[0], tmp_path / "run"))
    settings = run / "config.yaml"
    settings.write_text(settings.read_text().replace(str(photos), str(others)))
    (others / "val" / "blue" / "001.png").write_bytes(b"no image")  # the second image: of the second process
    for verb in ("evaluate", "analyze"):  # of which the first calibrates on it
        ended = finish(start(2, "-m", "vimoe", verb, run), 200)
        assert [status for status, _, _ in ended] == [2, 2], ended
        assert len(lines(ended)) == 1 and "001.png" in lines(ended)[0], ended
    (status, printed, said), second = finish(start(2, "-m", "vimoe", "evaluate", run, "--data.path", others / "test"))
    assert status == 0 and "9 images" in printed and "temperature" not in printed and second == (0, "", "")
    assert "without a temperature" in said and "001.png" in said


@pytest.mark.slow
def test_four_go_on_to_the_same_bits(photos: Path, tmp_path: Path) -> None:
    """Sums of more than two depend on their order, and so on the buckets that DDP puts gradients in."""
    ended = finish(start(4, "-m", "vimoe", *train(photos, tmp_path / "whole")))
    assert [status for status, _, _ in ended] == [0] * 4, ended
    for rank, step in ((1, 3), (3, 6)):
        out = tmp_path / f"killed{rank}"
        ended = finish(start(4, FAILING, "kill", rank, step, *train(photos, out)), 200)
        assert [status for status, _, _ in ended] == [-signal.SIGKILL if r == rank else 2 for r in range(4)], ended
        again = finish(start(4, "-m", "vimoe", "train", "--resume", out))
        assert [status for status, _, _ in again] == [0] * 4, again
        assert_equal(tmp_path / "whole", out)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_features_are_computed_once(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    options = ["--data.cache=features", "--train.train_only=moe", "--train.mixup=0", f"--data.task={task}"]
    images, files = photos, 1
    if task == "segmentation":
        images, files = scenes(tmp_path / "scenes", train=14, val=9, test=3, height=40, width=72), 2  # views and val
        options += ["--moe.routing=token", "--moe.bias_update_rate=0"]
    for count in (2, 1):
        ended = finish(start(count, "-m", "vimoe", *train(images, tmp_path / str(count), *options)))
        assert [status for status, _, _ in ended] == [0] * count, ended
        made = [line for _, _, said in ended for line in said.splitlines() if "features before" in line]
        assert len(made) == files and all(line.endswith("found" if count == 1 else "s") for line in made)
        assert json.loads((tmp_path / str(count) / "summary.json").read_text())["val"]["images"] == 9
    copied = Path(shutil.copytree(tmp_path / "1", tmp_path / "copied"))
    several = shared("evaluate", copied, count=2)
    assert "features" in several
    assert_alike(call(capsys, "evaluate", tmp_path / "1"), several)
    shared("analyze", copied, count=2)
    call(capsys, "analyze", tmp_path / "1")
    assert_alike(*(json.loads((run / "routing.json").read_text()) for run in (tmp_path / "1", copied)))
    ours, theirs = (rows(tmp_path / name / "metrics.csv") for name in ("1", "2"))
    for row, other in zip(ours, theirs, strict=True):
        assert float(other["val_loss"]) == pytest.approx(float(row["val_loss"]), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_launchers(photos: Path, tmp_path: Path, launcher: str) -> None:
    """Accelerate starts one process where it is to use CPUs, and vimoe the job; one speaks."""
    modules = {"torchrun": "torch.distributed.run", "accelerate": "accelerate.commands.launch"}
    options = ["--nproc-per-node=2"] if launcher == "torchrun" else ["--num_processes=2", "--cpu"]
    plain = {k: v for k, v in environment(0, 1, 0).items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    plain = {k: v for k, v in plain.items() if not k.startswith("MASTER")}

    def printed(*verb: object) -> str:
        command = [sys.executable, "-m", modules[launcher], *options, "-m", "vimoe", *map(str, verb)]
        done = subprocess.run(command, env=plain, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert printed(*train(photos, tmp_path / "run")).count("validation top-1") == 1
    predicted = printed("predict", tmp_path / "run", photos / "test").splitlines()
    files = [str(file) for file in sorted((photos / "test").rglob("*.png"))]
    assert [line.partition(": ")[0] for line in predicted if line.startswith(str(photos))] == files
    assert printed("analyze", tmp_path / "run", "--draws=2").count("report.html") == 1


@pytest.mark.slow  # 10 minutes each
@pytest.mark.parametrize("mesh", [["--data.cache=disk"], EXPERTS, ["--train.parallel.fsdp=2"]], ids=lambda m: m[-1])
def test_twenty_kills(photos: Path, tmp_path: Path, mesh: list[str]) -> None:
    """One of two processes is killed at a random moment, also while a checkpoint is written, until the run ends."""
    ended = finish(start(2, "-m", "vimoe", *train(photos, tmp_path / "whole", *mesh)))
    assert [status for status, _, _ in ended] == [0, 0], ended
    draw, kills, number = random.Random(0), 0, 0
    while kills < 20:
        number += 1
        out = tmp_path / f"run{number}"
        arguments = train(photos, out, *mesh)
        for attempt in range(5):
            (out / LOCK).unlink(missing_ok=True)
            job = start(2, "-m", "vimoe", *arguments)
            begun = time.perf_counter()
            held = [out / LOCK, out / "checkpoints" / "last.pt"]  # before they have met, a launcher ends the others
            while not all(each.exists() for each in held) and job[0].process.exitcode is None:
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 3))
            victim = job[draw.randrange(2)].process
            if attempt < 4 and victim.exitcode is None:
                victim.kill()
                kills += 1
            ended = finish(job, 200)
            assert time.perf_counter() - begun < 400
            if (out / "summary.json").exists():
                break
            assert len(lines(ended)) == 1, ended
            arguments = ["train", "--resume", str(out)] if (out / "checkpoints" / "last.pt").exists() else arguments
        assert_equal(tmp_path / "whole", out)
