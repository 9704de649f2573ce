"""Tasks one after the other: each sees its own images alone, and a killed sequence ends as if it had not been."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import TINY, call, refused
from helpers.kills import Killed, logs
from helpers.kills import kill_after as kill_after
from helpers.pages import Reader
from helpers.pictures import picture
from helpers.slow import one_in
from helpers.trainings import rows

import vimoe
import vimoe.experiments.train
from vimoe.analysis.forgetting import lift
from vimoe.config.data import DataConfig
from vimoe.config.model import ModelConfig
from vimoe.config.moe import MoEConfig
from vimoe.config.parallel import ParallelConfig
from vimoe.config.settings import Settings
from vimoe.config.train import TrainConfig
from vimoe.data.classification import load_data
from vimoe.data.loaders import eval_loader, preprocessing
from vimoe.data.tasks import class_tasks, classes_of
from vimoe.errors import ConfigError
from vimoe.experiments.finished_run import FinishedRun
from vimoe.experiments.task_sequence import TaskSequence
from vimoe.experiments.train import resume_training, run_training
from vimoe.models.model_folder import load
from vimoe.training.job import Job

COLOURS = [(20, 40, 200), (30, 180, 40), (210, 30, 30), (240, 240, 30), (20, 20, 20), (240, 240, 240)]
ARGS = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six classes, so that three tasks have two each."""
    root = tmp_path_factory.mktemp("photos")
    for c, colour in enumerate(COLOURS):
        for role, images in {"train": 6, "val": 3, "test": 2}.items():
            (root / role / f"class{c}").mkdir(parents=True)
            for i in range(images):
                picture(colour, seed=100 * c + i + 50 * len(role)).save(root / role / f"class{c}" / f"{i}.png")
    return root


def settings(photos: Path, moe: dict | None = None, data: dict | None = None, **train: object) -> Settings:
    given = {
        "epochs": 2,
        "batch_size": 4,
        "lr": 1e-2,
        "warmup_epochs": 0,
        "tensorboard": False,
        "checkpoint_minutes": 0,
    }
    return Settings(
        model=ModelConfig(name="vit_tiny_patch16_224", pretrained=False, img_size=16, args=ARGS),
        moe=MoEConfig(**{"layers": "last:1", "num_experts": 3, **(moe or {})}),
        data=DataConfig(path=str(photos), workers=0, **{"tasks": 3, **(data or {})}),
        train=TrainConfig(**{**given, **train}),
    )


STEPS = 3  # of an epoch: 12 images of a task in batches of 4


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The job of each training."""
    seen: list[Job] = []
    real = vimoe.experiments.train.train

    def train(model: object, job: Job, *given: object) -> dict:
        seen.append(job)
        return real(model, job, *given)

    monkeypatch.setattr(vimoe.experiments.train, "train", train)
    return seen


def test_each_task_sees_its_own_images_and_all_are_scored_after_it(
    photos: Path, tmp_path: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    models, real = [], TaskSequence.measured

    def measured(self: TaskSequence, model: torch.nn.Module, *given: object) -> dict:
        models.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return real(self, model, *given)

    monkeypatch.setattr(TaskSequence, "measured", measured)
    asked = settings(photos)
    summary = run_training(asked, tmp_path / "run")
    whole = load_data(asked.data)
    parts = class_tasks(whole, 3, 0)
    assert [sorted(job.names) for job in jobs] == [sorted(str(image) for image, _ in part.train) for part in parts]
    tasks = summary["tasks"]
    assert [each["classes"] for each in tasks["trained"]] == [[whole.classes[c] for c in classes_of(p)] for p in parts]
    assert [each["train_images"] for each in tasks["trained"]] == [12, 12, 12] and summary["train_images"] == 36
    assert summary["epochs"] == 6 and summary["best_epoch"] == tasks["trained"][-1]["best_epoch"] in (5, 6)

    network, seen = load(tmp_path / "run" / "model").cpu(), set()
    for t, state in enumerate(models):  # by a plain loop
        network.load_state_dict(state)
        seen |= set(classes_of(parts[t]))
        for i, part in enumerate(parts[: t + 1]):
            (images, labels), *none = eval_loader(part.val, preprocessing(network), 99, 0)
            with torch.no_grad():
                logits = network.eval()(images)
            for name, among in (("seen", sorted(seen)), ("own", classes_of(part))):
                right = [
                    among[int(row[among].argmax())] == int(label) for row, label in zip(logits, labels, strict=True)
                ]
                assert tasks[name]["accuracy"][t][i] == pytest.approx(np.mean(right)) and not none
    assert [len(row) for row in tasks["own"]["accuracy"]] == [1, 2, 3]
    assert tasks["own"]["mean"] >= tasks["seen"]["mean"] and tasks["seen"]["forgetting"] > 0.3  # nothing keeps the old
    assert summary["val"]["images"] == 18
    assert summary["val"] == pytest.approx(FinishedRun(tmp_path / "run").task.evaluate(
        network, eval_loader(whole.val, preprocessing(network), 99, 0)).to_dict())  # fmt: skip

    after = json.loads((tmp_path / "run" / "tasks.json").read_text())["after"]
    layer, counts = "blocks.1.mlp", [[each["routing"]["blocks.1.mlp"] for each in row] for row in after]
    assert all(sum(each) == 6 for row in counts for each in row)  # six images of a task, one expert each
    routing = tasks["routing"][layer]
    np.testing.assert_allclose(routing["lift"], lift(counts[2], counts[2]))
    np.testing.assert_allclose(routing["kept"], [lift(counts[0], counts[2])[0, 0], lift(counts[1], counts[2])[1, 1]])
    assert [row["stage"] for row in rows(tmp_path / "run" / "metrics.csv")] == [f"task {i // 2 + 1}" for i in range(6)]
    assert FinishedRun(tmp_path / "run").score()[0] == "test"

    page = Reader(tmp_path / "run" / "report.html").text
    assert "The model learnt 3 tasks one after the other" in page and "Experts that tasks share" in page
    assert f"{100 * tasks['own']['accuracy'][1][0]:.2f}" in page
    kept = ", ".join(str(each["best_epoch"]) for each in tasks["trained"])
    assert f", in {len(summary['tasks']['trained'])} tasks one after the other, for " in page
    assert f"Each task kept its epoch with the best score on its own validation images: {kept}." in page


@pytest.mark.parametrize("killed_after", one_in(3, [4, 0, 6, 13, 8, 17]))
def test_a_killed_sequence_ends_as_if_it_had_not_been(
    photos: Path, tmp_path: Path, kill_after: object, killed_after: int
) -> None:
    """Three tasks of six steps, killed in each; routers are frozen in the second."""
    asked = settings(photos, router_freeze_epochs=3, locality_loss=0.1, ema_decay=0.5)
    whole = run_training(asked, tmp_path / "whole")
    kill_after(killed_after)
    with pytest.raises(Killed):
        run_training(asked, tmp_path / "killed")
    kill_after(1000)
    again = resume_training(tmp_path / "killed")
    assert_equal(tmp_path / "whole", tmp_path / "killed")
    assert whole["router_freeze"] == again["router_freeze"] == {"blocks.1.mlp": 3}
    for name in ("tasks", "val", "alarms", "epochs", "train_images"):
        assert whole[name] == again[name], name


def assert_equal(whole: Path, killed: Path) -> None:
    ours, theirs = (load(run / "model").state_dict() for run in (whole, killed))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert logs(whole) == logs(killed)
    for name in ("tasks.json", "load.csv", "health.csv"):
        assert (whole / name).read_text() == (killed / name).read_text()


@pytest.mark.parametrize("when", one_in(2, ["before", "after"]))
def test_a_sequence_killed_between_two_tasks_too(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Before or after the model was measured, and its row written."""
    asked, real = settings(photos), TaskSequence.measured
    run_training(asked, tmp_path / "whole")

    def die(self: TaskSequence, model: torch.nn.Module, number: int, summary: dict) -> dict:
        if number == 1 and when == "before":
            raise Killed
        found = real(self, model, number, summary)
        if number == 1:
            raise Killed
        return found

    with monkeypatch.context() as patch:
        patch.setattr(TaskSequence, "measured", die)
        with pytest.raises(Killed):
            run_training(asked, tmp_path / "killed")
    resume_training(tmp_path / "killed")
    assert_equal(tmp_path / "whole", tmp_path / "killed")


def test_a_frozen_router_is_that_of_the_task_before_to_the_bit(photos: Path, tmp_path: Path) -> None:
    """Frozen after the first task, whose best weights the second begins with."""
    short = {"epochs": 1, "router_weight_decay": 9.0}
    run_training(settings(photos, data={"tasks": 2}, **short, router_freeze_epochs=1), tmp_path / "two")
    run_training(settings(photos, data={"tasks": 3}, **short, router_freeze_epochs=1), tmp_path / "three")
    free = run_training(settings(photos, data={"tasks": 3}, **short), tmp_path / "free")
    assert "router_freeze" not in free
    routers = {n: load(tmp_path / n / "model").blocks[1].mlp.router.weight for n in ("three", "free")}
    assert not torch.equal(*routers.values())
    gradients = [float(row["router_gradient"]) for row in rows(tmp_path / "three" / "health.csv")]
    assert gradients[0] > 0 and gradients[1:] == [0.0, 0.0]


def test_a_dense_model_learns_tasks_too_and_has_no_routing(photos: Path, tmp_path: Path) -> None:
    summary = run_training(settings(photos, moe={"layers": "none"}), tmp_path / "run")
    assert summary["tasks"]["routing"] == {} and len(summary["tasks"]["seen"]["accuracy"]) == 3
    assert "Experts that tasks share" not in Reader(tmp_path / "run" / "report.html").text


def test_tasks_read_cached_features(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of validation and one of a view for each task, which the scores after later tasks find again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    same = {"train_only": "moe", "min_crop": 1.0, "hflip": 0.0}  # without augmentation one view is all
    summary = run_training(settings(photos, data={"cache": "features", "views": 1}, **same), tmp_path / "run")
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 6 and summary["features"]["before"] == "blocks.1"
    plain = run_training(settings(photos, **same), tmp_path / "plain")
    assert summary["tasks"]["own"] == plain["tasks"]["own"]


@pytest.fixture(scope="module")
def renderings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, bright, dark, and in negative; the last is for test."""
    root = tmp_path_factory.mktemp("renderings")
    for n, (name, render) in enumerate({
        "bright": lambda pixel: pixel, "dark": lambda pixel: pixel // 4, "negative": lambda pixel: 255 - pixel
    }.items()):  # fmt: skip
        for c, colour in enumerate(COLOURS[:3]):
            (root / name / f"class{c}").mkdir(parents=True)
            for i in range(6):
                picture(colour, seed=100 * n + 10 * c + i).point(render).save(root / name / f"class{c}" / f"{i}.png")
    return root


SPLITS = {"tasks": "splits", "train_split": "bright+dark", "test_split": "negative", "val_fraction": 1 / 3}


def test_splits_of_the_data_are_tasks_of_the_same_classes(renderings: Path, tmp_path: Path, jobs: list[Job]) -> None:
    asked = settings(renderings, data=SPLITS)
    summary = run_training(asked, tmp_path / "run")
    assert [{Path(name).parts[-3] for name in job.names} for job in jobs] == [{"bright"}, {"dark"}]
    tasks = summary["tasks"]
    assert [each["split"] for each in tasks["trained"]] == ["bright", "dark"]
    assert [each["classes"] for each in tasks["trained"]] == [["class0", "class1", "class2"]] * 2
    assert [each["train_images"] for each in tasks["trained"]] == [12, 12] and tasks["seen"] == tasks["own"]
    assert np.shape(tasks["routing"]["blocks.1.mlp"]["lift"]) == (2, 2) and summary["val"]["images"] == 12
    validation = (tmp_path / "run" / "validation.txt").read_text().split()
    assert len(validation) == 12 and sum(name.startswith("dark/") for name in validation) == 6
    assert FinishedRun(tmp_path / "run").score()[0] == "test"

    page = Reader(tmp_path / "run" / "report.html").text
    assert "1 bright" in page and "Accuracy among all classes, which each task has" in page
    assert "the classes of the image's own task" not in page  # it would be the same table again

    joint = run_training(replace(asked, data=replace(asked.data, tasks=None)), tmp_path / "joint")
    assert (tmp_path / "joint" / "validation.txt").read_text() == (tmp_path / "run" / "validation.txt").read_text()
    assert joint["train_images"] == 24 and "tasks" not in joint


@pytest.mark.parametrize("killed_after", one_in(2, [8, 3]))
def test_a_killed_sequence_of_splits_ends_as_if_it_had_not_been(
    renderings: Path, tmp_path: Path, kill_after: object, killed_after: int
) -> None:
    asked = settings(renderings, data=SPLITS)
    run_training(asked, tmp_path / "whole")
    kill_after(killed_after)
    with pytest.raises(Killed):
        run_training(asked, tmp_path / "killed")
    kill_after(1000)
    resume_training(tmp_path / "killed")
    assert_equal(tmp_path / "whole", tmp_path / "killed")


def test_a_router_that_classes_train_has_them_all_where_splits_are_tasks(renderings: Path, tmp_path: Path) -> None:
    moe = {"router": "superclass", "num_experts": 2, "calibration_images": 12}
    assert run_training(settings(renderings, moe=moe, data=SPLITS, epochs=1), tmp_path / "run")["tasks"]


def test_a_start_from_images_has_those_of_the_first_task(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, real = [], vimoe.experiments.train.CalibrationImages

    class Seeing(real):
        def __iter__(self):  # noqa: ANN204
            for images, labels in super().__iter__():
                seen.extend(labels.tolist())
                yield images, labels

    monkeypatch.setattr(vimoe.experiments.train, "CalibrationImages", Seeing)
    asked = settings(photos, moe={"router": "centroids", "calibration_images": 99}, epochs=1)
    run_training(asked, tmp_path / "run")
    assert set(seen) == set(classes_of(class_tasks(load_data(asked.data), 3, 0)[0]))


def test_a_batch_is_never_larger_than_the_smallest_task(photos: Path, tmp_path: Path) -> None:
    run_training(settings(photos, epochs=1, batch_size=20), tmp_path / "run")
    assert "batch_size: 12\n" in (tmp_path / "run" / "config.yaml").read_text()


def test_what_tasks_do_not_go_with_is_one_line(photos: Path, tmp_path: Path) -> None:
    for train, named in (
        ({"stages": ("head", "moe")}, r"stages=\('head', 'moe'\)"),
        ({"fuse": "ewa"}, "fuse=ewa"),
        ({"parallel": ParallelConfig(fsdp=2)}, "parallel="),
    ):
        with pytest.raises(
            ConfigError, match=rf"^data.tasks=3 with train.{named}.*: expected one of them, since each task"
        ):
            settings(photos, moe={"num_shared_experts": 0}, **train)
    with pytest.raises(
        ConfigError, match="^data.tasks=3 with moe.router='superclass': expected a router that no classes"
    ):
        run_training(settings(photos, moe={"router": "superclass"}), tmp_path / "run")
    with pytest.raises(ConfigError, match="^data.tasks=4 with 6 classes: expected at least 2 classes for each task"):
        run_training(settings(photos, data={"tasks": 4}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_says_what_is_left_of_the_tasks(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", f"--data.path={photos}", *TINY, "--train.epochs=1", "--train.tensorboard=false", "--data.tasks=2"]
    argv += ["--train.warmup_epochs=0", "--data.workers=0"]
    found = call(capsys, *argv, "--out", tmp_path / "run")
    assert found["tasks"] == json.loads((tmp_path / "run" / "summary.json").read_text())["tasks"]
    assert vimoe.cli.main([*argv, "--out", str(tmp_path / "again")]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith(f"2 tasks: mean accuracy {found['tasks']['seen']['mean']:.2%} among all classes, ")
    said = refused(capsys, "prune", tmp_path / "run", "--recover", 1, "--out", tmp_path / "pruned")
    assert "recover=1 of a run with data.tasks=2: expected 0" in said
