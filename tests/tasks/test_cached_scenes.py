"""A segmenter trained and scored on the features of its frozen trunk is that of images, but for rounding."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import QUICK, TINY, call
from helpers.kills import Killed, kill_after, logs
from helpers.scenery import mask as scene_mask
from helpers.scenery import scene, scenes
from helpers.segmenters import segmenter
from helpers.tiny import config, perturb_experts, randomise, upcycle
from helpers.trainings import weights
from safetensors.torch import load_file
from torch import nn

import vimoe
import vimoe.data.scene_loaders
import vimoe.tasks.feature_files
from vimoe.cli import main
from vimoe.config.data import DataConfig
from vimoe.config.settings import Settings
from vimoe.config.train import TrainConfig
from vimoe.data.loaders import preprocessing
from vimoe.data.user_cache import cache_folder
from vimoe.errors import ConfigError
from vimoe.experiments.finished_run import FinishedRun
from vimoe.moe.layer import moe_layers
from vimoe.tasks.cached_scenes import entries_of_scenes, job_on_crop_features
from vimoe.tasks.segmentation import Segmentation
from vimoe.tasks.segmentation_job import evaluate_scenes, job_on_scenes
from vimoe.training.loop import train

SETTINGS = TrainConfig(
    epochs=3, batch_size=3, lr=3e-3, warmup_epochs=0.5, tensorboard=False, train_only="moe", precision="no"
)
CROP = 32  # of the tiny segmenter
RUN = ["--data.task=segmentation", *TINY, *QUICK, "--train.batch_size=3", "--moe.layers=last:1", "--moe.routing=token",
       "--moe.num_experts=3", "--data.cache=features", "--train.train_only=moe"]  # fmt: skip

__all__ = ["kill_after"]  # a fixture


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vimoe.tasks.feature_files, "STORED", "float32")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes larger than the crop in both directions, of one size."""
    return scenes(tmp_path_factory.mktemp("scenes"), train=7, val=3, height=40, width=72)


def model(layers: object = (3,), decoder: str = "linear", **settings: object) -> nn.Module:
    return perturb_experts(upcycle(segmenter(decoder=decoder), config(layers=layers, **settings)))


def found(root: Path, **changes: object) -> tuple:
    read = DataConfig(path=str(root), task="segmentation", workers=0, cache="features", views=3, **changes)
    return read, Segmentation.find(read)


def plain(score: dict) -> dict:
    return {**score, **dict(enumerate(score["per_class_iou"])), "per_class_iou": len(score["per_class_iou"])}


def trained_names(network: nn.Module) -> list[str]:
    return list(moe_layers(network))


def run(root: Path, out: Path, features: bool, network: nn.Module, views: int = 3) -> dict:
    read, data = found(root)
    out.mkdir()
    arguments = data, preprocessing(network, read), SETTINGS, replace(read, views=views)
    pixels = [1] * len(data.classes)
    if features:
        (names, *rest) = trained_names(network), *arguments
        job = job_on_crop_features(network, names, *rest, pixels)
    else:
        data, prepared, settings, read = arguments
        job = job_on_scenes(data, prepared, network.crop, settings, read, pixels)
    return train(network, job, SETTINGS, out)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("routing", ["token", "image"])
def test_training_on_features_is_training_on_images(root: Path, tmp_path: Path, routing: str) -> None:
    ours, theirs = model(routing=routing), model(routing=routing)
    before = weights(ours)
    on_features = run(root, tmp_path / "features", True, ours)
    on_images = run(root, tmp_path / "images", False, theirs)
    torch.testing.assert_close(weights(ours), weights(theirs), atol=1e-5, rtol=1e-4)
    assert (weights(ours) - before).abs().max() > 1e-3
    assert plain(on_features["val"]) == pytest.approx(plain(on_images["val"]), abs=1e-4)


def test_epochs_take_the_views_in_turn(root: Path) -> None:
    read, data = found(root)
    network = model()
    arguments = data, preprocessing(network, read), SETTINGS, replace(read, views=2)
    job = job_on_crop_features(network, trained_names(network), *arguments, [1] * 3)
    crops = job.loader.dataset
    seen = []
    for epoch in (1, 2, 3):
        job.loader.sampler.start(epoch)
        seen.append({view for _, view in job.loader.sampler})
    assert seen == [{0}, {1}, {0}] and len(crops) == 7
    features, mask = crops[2, 1]
    assert features.dtype == torch.float16 and mask.shape == (CROP, CROP) and mask.dtype == torch.int64
    again = pickle.loads(pickle.dumps(crops))[2, 1]  # what a worker process gets
    assert torch.equal(features, again[0]) and torch.equal(mask, again[1])


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    ("sizes", "inference", "batches"),
    [((), "slide", {1, 2}), (((40, 50), (33, 90)), "slide", {1}), ((), "whole", {1, 2})],
)
def test_a_score_on_features_is_that_on_images(
    tmp_path: Path, sizes: tuple, inference: str, batches: set, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenes of one size are scored in batches, others one by one; a second model opens no image."""
    root = scenes(tmp_path / "scenes", val=3, height=40, width=48)
    for number, (height, width) in enumerate(sizes):
        scene(root, "val", f"b{number}", scene_mask(number, height=height, width=width))
    read, data = found(root, inference=inference)
    network = model()
    prepared = preprocessing(network, read)
    loader = Segmentation(Settings(data=replace(read, cache="none", views=4))).loader(network, data, data.val)
    expected = plain(evaluate_scenes(network, loader, read).to_dict())
    entries = entries_of_scenes(network, trained_names(network), data.val, data, prepared, read, 2)
    assert plain(evaluate_scenes(network, entries, read).to_dict()) == pytest.approx(expected, rel=1e-5)
    assert entries.facts == {"features": {"before": "backbone.blocks.3"}}
    assert {len(masks) for _, masks in entries} == batches  # of 4 windows, at most 8 at once

    def opened(*_: object) -> None:
        raise AssertionError("an image was opened")

    monkeypatch.setattr(vimoe.data.scene_loaders, "open_image", opened)
    other = copy.deepcopy(network)
    for layer in moe_layers(other).values():
        randomise(layer.experts, seed=9)
    entries = entries_of_scenes(other, trained_names(other), data.val, data, prepared, read, 2)
    assert plain(evaluate_scenes(other, entries, read).to_dict()) != pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("sizes", [(), ((40, 50), (33, 90))])
def test_an_analysis_on_features_is_that_on_images(
    tmp_path: Path, sizes: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whole images where all have one size, else of their middle; a second model opens no image."""
    root = scenes(tmp_path / "scenes", val=5, height=40, width=48)
    for number, (height, width) in enumerate(sizes):
        scene(root, "val", f"b{number}", scene_mask(number, height=height, width=width))
    network = model(num_experts=3)

    def analysed(network: nn.Module, cache: str) -> dict:
        read, data = found(root)
        read = replace(read, cache=cache, views=3 if cache == "features" else DataConfig().views)
        settings = Settings(data=read, train=TrainConfig(train_only="moe", batch_size=2))
        batches = Segmentation(settings).validation(network, data)
        assert (getattr(batches, "facts", {}) != {}) == (cache == "features")
        assert next(iter(batches))[1].shape == (2, *((32, 32) if sizes else (40, 48)))
        return vimoe.analyze(network, batches, draws=4, metric="segmentation").to_dict()

    def losses(evidence: dict) -> list[float]:
        (layer,) = evidence["layers"]
        each = [layer["permuted"], layer["frozen"], layer["dense"]["shared"], *layer["experts"]]
        return [evidence["base"]["loss"], *(change["loss"]["value"] for change in each)]

    expected, ours = analysed(network, "none"), analysed(network, "features")
    assert losses(ours) == pytest.approx(losses(expected), rel=1e-3, abs=1e-6) and 0 not in losses(ours)[:2]
    assert ours["layers"][0]["counts"] == expected["layers"][0]["counts"]

    def written(*_: object) -> None:
        raise AssertionError("features were computed again")

    again = copy.deepcopy(network)
    monkeypatch.setattr(vimoe.tasks.feature_files.FeatureFiles, "_write", written)
    for each in moe_layers(again).values():
        randomise(each.experts, seed=9)
    assert analysed(again, "features")["base"] != ours["base"]


@pytest.mark.parametrize(
    ("changes", "height", "reason"),
    [
        ({"flip_test": True}, 40, "with data.flip_test=True: expected False"),
        ({}, 24, r"an image of 72x24 to score on, smaller than a window of 32x32: expected none"),
    ],
)
def test_where_windows_cannot_be_kept_images_are_read(
    tmp_path: Path, changes: dict, height: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    read, data = found(scenes(tmp_path / "scenes", height=height, width=72), **changes)
    network = model()
    task = Segmentation(Settings(data=read, train=TrainConfig(train_only="moe")))
    with caplog.at_level(logging.INFO, "vimoe"):
        loader = task.scored(network, data, data.val)
    (line,) = [record.getMessage() for record in caplog.records if "in place of" in record.getMessage()]
    assert reason in line and "\n" not in line
    assert next(iter(loader))[0].shape[-2:] == (height, 72)


def test_whole_images_of_several_sizes_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = scenes(tmp_path / "scenes", height=40, width=72)
    scene(root, "val", "wide", scene_mask(1, height=40, width=80))
    read, data = found(root, inference="whole")
    task = Segmentation(Settings(data=read, train=TrainConfig(train_only="moe")))
    with caplog.at_level(logging.INFO, "vimoe"):
        loader = task.scored(model(), data, data.val)
    assert "data.inference='whole' and images of 2 sizes: expected one" in caplog.text
    assert {images.shape[-1] for images, _ in loader} == {72, 80}


def test_a_mask_that_was_deleted_is_made_again_and_another_mask_is_another_file(root: Path, tmp_path: Path) -> None:
    copied = scenes(tmp_path / "scenes", train=7, val=3, height=40, width=72)
    network = model()

    def files() -> set[str]:
        read, data = found(copied)
        settings = replace(SETTINGS, epochs=1)
        job_on_crop_features(
            network, trained_names(network), data, preprocessing(network, read), settings, replace(read, views=1),
            [1] * 3,
        )  # fmt: skip
        return {path.name for path in (cache_folder() / "features").iterdir()}

    before = files()
    (masks,) = (cache_folder() / "features").glob("*-masks.npy")
    kept = np.load(masks)
    assert len(before) == 3 and kept.shape == (7, CROP, CROP)  # features and masks of a view, features of validation
    masks.unlink()
    assert files() == before and np.array_equal(np.load(masks), kept)
    scene(copied, "train", "a000", scene_mask(77, height=40, width=72))
    assert len(files()) > len(before)


def test_a_decoder_that_reads_the_trunk_is_refused(root: Path) -> None:
    read, data = found(root)
    network = model(decoder="linear4")
    task = Segmentation(Settings(data=read, train=TrainConfig(train_only="moe")))
    message = r"decoder='linear4', which reads the output of block 0: expected a decoder of what block 2"
    with pytest.raises(ConfigError, match=message):
        task.check(network, preprocessing(network, read), trained_names(network))
    task.check(model(), preprocessing(network, read), trained_names(network))


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_decoded_scenes_are_not_kept(cache: str) -> None:
    with pytest.raises(ConfigError, match=rf"data.cache='{cache}' with data.task='segmentation': expected 'none'"):
        Settings(data=DataConfig(task="segmentation", cache=cache))


def test_a_run_says_what_it_read_and_its_scores_are_those_of_images(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    call(capsys, "train", "--data.path", root, *RUN, "--out", run)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["features"]["before"] == "backbone.blocks.1" and summary["features"]["views"] == 3
    found = call(capsys, "evaluate", run)
    assert found.pop("features") == {"before": "backbone.blocks.1"}
    on_images = call(capsys, "evaluate", run, "--data.path", root)
    for name in ("miou", "loss", "pixel_accuracy"):
        assert found[name] == pytest.approx(on_images[name], abs=2e-3)
    pruned = call(capsys, "prune", run, "--out", tmp_path / "pruned", "--merge_all=true")
    assert pruned["before"]["miou"] == pytest.approx(found["miou"])
    vimoe.load(tmp_path / "pruned/model")


def test_a_finished_run_finds_the_features_that_its_training_validated_on(root: Path, tmp_path: Path) -> None:
    """Though the decoder's running statistics have changed since."""
    argv = ["train", "--data.path", str(root), *RUN, "--data.inference=whole", "--out", str(tmp_path / "run")]
    assert main(argv) == 0
    kept = sorted(cache_folder().rglob("*.npy"))
    run = FinishedRun(tmp_path / "run")
    run.task.validation(run.model, run.data)
    assert sorted(cache_folder().rglob("*.npy")) == kept != []


def test_a_killed_training_on_features_goes_on_to_the_same_weights(
    root: Path, tmp_path: Path, kill_after: object
) -> None:
    argv = ["train", "--data.path", str(root), *RUN, "--train.checkpoint_minutes=0"]
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    kill_after(3)
    with pytest.raises(Killed):
        main([*argv, "--out", str(tmp_path / "killed")])
    kill_after(10**6)
    assert main(["train", "--resume", str(tmp_path / "killed")]) == 0
    first, second = (load_file(tmp_path / out / "model/model.safetensors") for out in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert logs(tmp_path / "whole") == logs(tmp_path / "killed")
