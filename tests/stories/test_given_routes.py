"""Routes that are given: trained from an image folder by the command line, killed and gone on with, looked at, cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.commands import QUICK, TINY, call, refused
from helpers.kills import Killed, logs
from helpers.kills import kill_after as kill_after
from helpers.pictures import roles
from helpers.scene_runs import SCENES
from helpers.scenery import mask, scene, scenes
from helpers.slow import one_in
from safetensors.torch import load_file

import vimoe
import vimoe.tasks.classification
from vimoe.cli import main
from vimoe.moe.layer import moe_layers

GIVEN = ["centroids", "superclass"]
MOE = ["--moe.layers=last:1", "--moe.num_experts=3"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return roles(tmp_path_factory.mktemp("photos"))


def command(photos: Path, router: str, *more: str) -> list[str]:
    return ["train", "--data.path", str(photos), *TINY, *QUICK, *MOE, f"--moe.router={router}", *more]


@pytest.mark.parametrize(("router", "cache"), one_in(2, [("superclass", "features"), ("centroids", "none")]))
def test_it_goes_through_every_verb_and_ends_the_same_where_it_was_killed(
    photos: Path, tmp_path: Path, router: str, cache: str, capsys: pytest.CaptureFixture[str], kill_after: object
) -> None:
    more = ["--data.cache=features", "--train.train_only=moe"] if cache == "features" else []
    argv = command(photos, router, "--train.router_frozen=0.5", "--train.checkpoint_minutes=0", *more)
    summary = call(capsys, *argv, "--out", tmp_path / "whole")
    assert summary["val"]["top1"] > 0.3 and not [a for a in summary["alarms"] if "no gradient" in a]
    kill_after(4)
    with pytest.raises(Killed):
        main([*argv, "--out", str(tmp_path / "killed")])
    kill_after(1000)
    assert main(["train", "--resume", str(tmp_path / "killed")]) == 0
    states = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert logs(tmp_path / "whole") == logs(tmp_path / "killed")
    assert ("train_route_loss" in logs(tmp_path / "whole")[0]) == (router == "superclass")

    call(capsys, "analyze", tmp_path / "whole", "--draws=2")
    call(capsys, "evaluate", tmp_path / "whole")
    call(capsys, "prune", tmp_path / "whole", "--tolerance=9", "--recover=1", "--out", tmp_path / "dense")
    assert not moe_layers(vimoe.load(tmp_path / "dense" / "model"))


@pytest.mark.parametrize("router", one_in(2, GIVEN))
def test_experts_are_removed_and_the_rest_trained_on(
    photos: Path, tmp_path: Path, router: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call(capsys, *command(photos, router, "--train.router_frozen=1"), "--out", tmp_path / "run")
    call(capsys, "analyze", tmp_path / "run", "--draws=2")
    monkeypatch.setattr("vimoe.analysis.pruning._Greedy.layers", lambda *_: ())  # as if no layer could go
    options = ["--tolerance=9", "--experts=true", "--recover=1"]
    call(capsys, "prune", tmp_path / "run", *options, "--out", tmp_path / "small")
    before, after = (vimoe.load(tmp_path / name / "model").blocks[1].mlp for name in ("run", "small"))
    assert after.config.num_experts == 1
    rows = before.router.weight.tolist()
    assert after.router.weight.tolist()[0] in rows  # frozen for good is frozen in the recovery too


def test_images_to_start_from_are_of_train_as_evaluated_and_follow_from_the_seed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, real = [], vimoe.tasks.classification.eval_loader

    def noted(samples: list, *args: object, **kwargs: object) -> object:
        made.append(samples)
        return real(samples, *args, **kwargs)

    monkeypatch.setattr(vimoe.tasks.classification, "eval_loader", noted)
    for number, seed in enumerate((0, 0, 1)):
        argv = command(photos, "centroids", "--moe.calibration_images=10", f"--train.seed={seed}", "--train.epochs=1")
        assert main([*argv, "--out", str(tmp_path / str(number))]) == 0
    first, again, other = ([str(image) for image, _ in samples] for samples in made)
    assert len(first) == 10 == len(set(first)) and all("/train/" in name for name in first)
    assert first == again != other and first == sorted(first)


def test_a_folder_of_few_images_gives_all_of_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "vimoe"):
        argv = command(roles(tmp_path / "photos", train=2), "centroids", "--train.batch_size=4", "--train.epochs=1")
        assert main([*argv, "--out", str(tmp_path / "run")]) == 0
    assert "6 training images: what the routers or experts of 1 layers start from" in caplog.text


@pytest.mark.parametrize("router", GIVEN)
def test_an_unreadable_image_is_told_as_ever_or_left_out(
    tmp_path: Path, router: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = roles(tmp_path / "photos", train=4)
    (root / "train" / "red" / "001.png").write_bytes(b"no image")
    (root / "val" / "red" / "001.png").write_bytes(b"no image")
    argv = command(root, router, "--train.epochs=1")
    said = refused(capsys, *argv, "--out", tmp_path / "run")
    assert "2 of" in said and "cannot be read" in said and "001.png" in said and "--data.skip_unreadable true" in said
    assert not (tmp_path / "run").exists()
    assert main([*argv, "--data.skip_unreadable=true", "--out", str(tmp_path / "run")]) == 0


def test_images_are_opened_once_and_after_the_layers_are_known_to_be_right(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scans, real = [], vimoe.tasks.classification.scan
    monkeypatch.setattr(vimoe.tasks.classification, "scan", lambda data: (scans.append(1), real(data))[1])
    said = refused(capsys, *command(photos, "centroids", "--moe.layers=last:9"), "--out", tmp_path / "run")
    assert "expected at most 2" in said and not scans
    assert main([*command(photos, "centroids", "--train.epochs=1"), "--out", str(tmp_path / "run")]) == 0
    assert scans == [1]
    assert "scan" in json.loads((tmp_path / "run" / "summary.json").read_text())


@pytest.mark.parametrize(
    ("router", "options", "message"),
    [
        ("centroids", ["--moe.num_experts=25"], "24 images to start 25 experts or their router from: expected"),
        ("superclass", ["--moe.num_experts=4"], "num_experts=4 with router='superclass' and images of 3 classes"),
        ("superclass", ["--moe.routing=token"], "router='superclass' with routing='token': expected routing='image'"),
        ("centroids", ["--train.route_loss=1"], "train.route_loss=1 with moe.router='centroids': expected it with"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(
    photos: Path, tmp_path: Path, router: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, *command(photos, router, *options), "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_scenes_of_several_sizes_have_centroids_and_no_super_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = scenes(tmp_path / "scenes", train=5, height=40, width=56)
    scene(root, "train", "a100", mask(1))
    argv = ["train", "--data.path", str(root), *SCENES, *MOE, "--train.epochs=1", "--moe.routing=token"]
    assert main([*argv, "--moe.router=centroids", "--out", str(tmp_path / "run")]) == 0
    said = refused(capsys, *argv, "--moe.router=superclass", "--moe.routing=image", "--out", tmp_path / "refused")
    assert "router='superclass' without a class for each image: expected a classification" in said
    assert not (tmp_path / "refused").exists()


def test_the_same_command_without_layers_trains_the_dense_model(photos: Path, tmp_path: Path) -> None:
    argv = command(photos, "superclass", "--moe.layers=none", "--train.epochs=1", "--train.route_loss=0.5")
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0
