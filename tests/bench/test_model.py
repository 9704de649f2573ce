"""A model and its parent, to be timed."""

from __future__ import annotations

import torch

import vimoe
from vimoe.bench.model import model_case
from vimoe.config.bench import ModelBench
from vimoe.config.model import ModelConfig
from vimoe.config.moe import MoEConfig


def test_a_model_and_its_parent_compute_the_same() -> None:
    model = ModelConfig(name="vit_tiny_patch16_224", img_size=32, num_classes=5, args={"depth": 2})
    models, images = model_case(ModelBench(images=2), model, MoEConfig(layers="last:1"))
    assert images.shape == (2, 3, 32, 32)
    with vimoe.record(models["vimoe"]) as routings:
        torch.testing.assert_close(models["vimoe"].eval()(images), models["dense"].eval()(images))
    assert routings[0].load.max() == 1  # two images, at two experts
