"""A batch of crops is what timm and Pillow make of each image."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import vimoe.data.loaders
from vimoe.config.train import TrainConfig
from vimoe.data.crops import KERNELS, Finish, pad
from vimoe.data.decoded import Shrink, decode
from vimoe.data.loaders import Crops, train_loader

PLAIN = {"input_size": (3, 20, 24), "mean": (0, 0, 0), "std": (1 / 255,) * 3, "interpolation": "bicubic"}
SIZES = ((20, 24), (37, 91), (200, 150), (5, 300), (16, 16), (1, 1))  # of images, larger and smaller than the output
ROUNDING = 1.5  # of 255: Pillow rounds after each axis


def image(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(height * width)
    return Image.fromarray(rng.integers(90, 170, (height, width, 3), dtype=np.uint8))  # no filter leaves 0..255


@pytest.mark.parametrize("interpolation", KERNELS)
@pytest.mark.parametrize("mirrored", [False, True])
def test_every_filter_resizes_as_pillow_does(interpolation: str, mirrored: bool) -> None:
    images = [image(*size) for size in SIZES]
    padded, boxes = pad([(np.array(i), (i.height, i.width, mirrored)) for i in images])
    results = Finish({**PLAIN, "interpolation": interpolation}, TrainConfig())(padded, boxes)
    for result, i in zip(results, images, strict=True):
        resized = i.resize((24, 20), Image.Resampling[interpolation.upper()])
        if mirrored:
            resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert (result - torch.from_numpy(np.array(resized)).permute(2, 0, 1)).abs().max() < ROUNDING


@pytest.mark.parametrize("interpolation", KERNELS)
def test_the_filters_are_told_apart(interpolation: str) -> None:
    """Else the test above would let one stand for another."""
    padded, boxes = pad([(np.array(image(29, 35)), (29, 35, False))])
    results = {name: Finish({**PLAIN, "interpolation": name}, TrainConfig())(padded, boxes) for name in KERNELS}
    assert all(
        (results[interpolation] - r).abs().max() > 2 * ROUNDING for name, r in results.items() if name != interpolation
    )


@pytest.mark.parametrize("changes", [{}, {"min_crop": 1}, {"hflip": 0}, {"hflip": 1}, {"min_crop": 0.05}])
def test_a_gpu_gets_the_crops_that_timm_makes_on_the_host(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = {"input_size": (3, 32, 32), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "interpolation": "bicubic"}
    sizes = ((40, 60), (64, 64), (90, 33), (20, 21), (300, 100), (31, 64), (50, 50), (47, 48))
    samples = decode([(image(*size), label) for label, size in enumerate(sizes)], Shrink(1000), "memory")
    config = TrainConfig(batch_size=4, **changes)
    host = train_loader(samples, prepared, config, workers=0)
    monkeypatch.setattr(vimoe.data.loaders, "_gpu", lambda: True)
    device = train_loader(samples, prepared, config, workers=0)
    assert isinstance(device.dataset, Crops)
    assert len(device) == len(host) == 2
    finish = Finish(prepared, config)
    for epoch in (1, 2):
        for loader in (host, device):
            loader.sampler.start(epoch)
        for (images, labels), (crops, device_labels) in zip(host, device, strict=True):
            assert torch.equal(labels, device_labels)
            levels = (images - finish(*crops)).abs() * 255 * torch.tensor(prepared["std"])[:, None, None]
            assert levels.max() < ROUNDING


def test_what_a_filter_overshoots_is_clipped() -> None:
    edge = np.zeros((8, 8, 3), np.uint8)
    edge[:, 4:] = 255
    result = Finish(PLAIN, TrainConfig())(*pad([(edge, (8, 8, False))]))
    assert (result.min(), result.max()) == (0, 255)


def test_a_policy_of_timm_a_coarse_filter_and_files_stay_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vimoe.data.loaders, "_gpu", lambda: True)
    samples = [(image(30, 30), 0)] * 4
    decoded = decode(samples, Shrink(1000), "memory")
    config, policy = TrainConfig(batch_size=2), TrainConfig(batch_size=2, auto_augment="rand-m5-inc1")
    batchwise = {
        "all as it should be": train_loader(decoded, PLAIN, config, 0),
        "policy": train_loader(decoded, PLAIN, policy, 0),
        "filter": train_loader(decoded, {**PLAIN, "interpolation": "nearest"}, config, 0),
        "not decoded": train_loader(samples, PLAIN, config, 0),
    }
    assert [name for name, loader in batchwise.items() if isinstance(loader.dataset, Crops)] == ["all as it should be"]


def test_a_part_is_erased_of_as_many_images_as_asked_for() -> None:
    pixels = np.full((24, 24, 3), 77, np.uint8)
    padded, boxes = pad([(pixels, (24, 24, False))] * 400)
    random.seed(0)
    torch.manual_seed(0)
    erased = Finish(PLAIN, replace(TrainConfig(), random_erasing=0.3))(padded, boxes)
    untouched = Finish(PLAIN, TrainConfig())(padded, boxes)
    assert torch.allclose(untouched, torch.tensor(77.0), atol=1e-3)
    assert 0.2 < ((erased - 77).abs() > 1).flatten(1).any(dim=1).float().mean() < 0.4
