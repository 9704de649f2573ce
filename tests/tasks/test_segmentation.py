"""Segmentation: what contradicts a model is told, and analysis sees images of one size."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.scenery import NAMES, mask, scene, scenes
from helpers.segmenters import segmenter

from vimoe.config.data import DataConfig
from vimoe.config.settings import Settings
from vimoe.config.train import TrainConfig
from vimoe.errors import ConfigError
from vimoe.metrics.segmentation import ceiling
from vimoe.tasks.segmentation import Segmentation


def task(root: Path, **changes: object) -> Segmentation:
    data = DataConfig(path=str(root), task="segmentation", workers=0, **changes)
    return Segmentation(Settings(data=data, train=TrainConfig(batch_size=1)))


def test_what_contradicts_the_model_is_told(tmp_path: Path) -> None:
    model = SimpleNamespace(fixed_size=(32, 32), decoder_name="linear")
    task(tmp_path).check(model, {}, [])
    with pytest.raises(ConfigError, match="inference='whole' with .*, a ViT of one size"):
        task(tmp_path, inference="whole").check(model, {}, [])
    task(tmp_path, inference="whole").check(SimpleNamespace(fixed_size=None, decoder_name="linear"), {}, [])
    with pytest.raises(ConfigError, match="a batch of 1 image with model.decoder='upernet'"):
        task(tmp_path).check(SimpleNamespace(fixed_size=None, decoder_name="upernet"), {}, [])


def test_validation_is_whole_images_of_one_size_else_their_middle(tmp_path: Path) -> None:
    root, model = scenes(tmp_path, height=40, width=56), segmenter()
    segmentation = task(root)
    data = segmentation.find(segmentation.settings.data)
    assert {tuple(images.shape[-2:]) for images, _ in segmentation.validation(model, data)} == {(40, 56)}
    scene(root, "val", "a100", mask(1))
    data = segmentation.find(segmentation.settings.data)
    for loader in (segmentation.validation(model, data), segmentation.timed(model, data, data.test)):
        assert {tuple(labels.shape[-2:]) for _, labels in loader} == {model.crop}


def test_the_limit_is_the_ceiling_of_the_patch_size(tmp_path: Path) -> None:
    root, model = scenes(tmp_path), segmenter()
    segmentation = task(root)
    data = segmentation.find(segmentation.settings.data, NAMES)
    masks = [torch.from_numpy(data.legend.read(file)).long() for _, file in data.val]
    assert segmentation.limits(model, data) == {"patch_ceiling": ceiling(masks, model.patch_size, 3).miou}
    assert ceiling(masks, model.patch_size, 3).miou < 1 == ceiling(masks, (1, 1), 3).miou


def test_predictions_need_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="out=None: expected a folder for masks and overlays"):
        task(tmp_path).predict(segmenter(), [tmp_path / "a.png"])
