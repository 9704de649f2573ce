"""Losses of segmentation agree with hand-computed cases; the fingerprint knows what masks mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.scenery import YAML, scenes

from vimoe.config.data import DataConfig
from vimoe.config.masks import IGNORE
from vimoe.errors import ConfigError
from vimoe.tasks.segmentation import Segmentation
from vimoe.tasks.segmentation_job import dice_loss, fingerprint, median_frequency


def test_dice_of_hand_computed_cases() -> None:
    masks = torch.tensor([[[0, 0], [1, IGNORE]]])
    right = torch.full((1, 3, 2, 2), -100.0)
    right[0, 0, 0, :] = right[0, 1, 1, :] = 100.0
    assert dice_loss(right, masks) == pytest.approx(0)
    # all pixels evenly: class 0 2*(2/3)/(1+2) = 4/9, class 1 2*(1/3)/(1+1) = 1/3; class 2 is not there
    assert dice_loss(torch.zeros(1, 3, 2, 2), masks) == pytest.approx(1 - (4 / 9 + 1 / 3) / 2)
    assert dice_loss(torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2), IGNORE)) == 0


def test_median_frequency_of_a_hand_computed_case() -> None:
    assert median_frequency([10, 0, 40, 20]).tolist() == [2, 0, 0.5, 1]
    with pytest.raises(ConfigError, match="without a pixel"):
        median_frequency([0, 0])


def test_classes_that_were_exchanged_are_other_training_data(tmp_path: Path) -> None:
    prints = []
    for yaml in (YAML, YAML.replace("sky, road", "road, sky")):
        data = Segmentation.find(DataConfig(path=str(scenes(tmp_path, yaml=yaml)), task="segmentation"))
        prints.append(fingerprint(data))
    assert prints[0] != prints[1]
