"""Evaluation's view of images of every shape: what timm's transforms give, and of a line its middle."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.pictures import picture
from PIL import Image
from timm.data import create_transform

from vimoe.config.train import TrainConfig
from vimoe.data.decoded import Shrink
from vimoe.data.images import THIN, open_image
from vimoe.data.loaders import CutThin, decoded_for_evaluation, eval_loader, share, train_loader

PREPARED = {
    "input_size": (3, 32, 32), "interpolation": "bicubic", "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2),
    "crop_pct": 0.9, "crop_mode": "center",
}  # fmt: skip
ORDINARY = ((50, 40), (40, 50), (7, 7), (300, 20), (20, 320), (1, 16))


def image(size: tuple[int, int]) -> Image.Image:
    return picture((200, 90, 10), 0, 64).resize(size)


def seen(source: Image.Image, **changes: object) -> torch.Tensor:
    ((images, _),) = eval_loader([(source, 0)], {**PREPARED, **changes}, 1, 0)
    return images[0]


@pytest.mark.parametrize("size", ORDINARY)
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("sides", [(32, 32), (48, 16)])
def test_ordinary_images_are_seen_as_by_timm(size: tuple[int, int], mode: str, sides: tuple[int, int]) -> None:
    changes = {"crop_mode": mode, "input_size": (3, *sides)}
    if mode == "border" and max(size) > 10 * min(size):
        pytest.skip("timm scales the shorter side to nothing")
    expected = create_transform(**{**PREPARED, **changes}, is_training=False)(image(size))
    assert torch.equal(seen(image(size), **changes), expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("short", [1, 2, 9, 100])
@pytest.mark.parametrize("upright", [False, True])
def test_of_a_line_the_middle_is_seen_as_before(interpolation: str, short: int, upright: bool) -> None:
    size = (short * 50, short)
    line = picture((200, 90, 10), 0, 64).resize(size, Image.Resampling.BICUBIC)
    line = line.transpose(Image.Transpose.ROTATE_90) if upright else line
    expected = create_transform(**{**PREPARED, "interpolation": interpolation}, is_training=False)(line)
    difference = (seen(line, interpolation=interpolation) - expected).abs().max()
    assert difference <= 1 / 255 / 0.2 + 1e-6  # a level: the scales differ by less than a pixel in the whole length


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (30_000, 3)])
def test_a_line_takes_no_memory(size: tuple[int, int], mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Image.new("RGB", size, (255, 0, 0))
    made: list[tuple[int, int]] = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, to, *args: made.append(to) or resize(self, to, *args))
    assert seen(source, crop_mode=mode).shape == (3, 32, 32)
    assert made and max(width * height for width, height in made) <= THIN * 36**2
    assert max(CutThin(THIN)(source).size) <= THIN * min(size)


def test_a_line_is_kept_small_in_every_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Image.new("RGB", (60_000, 1), (255, 0, 0)).save(tmp_path / "x.png")
    samples = [(tmp_path / "x.png", 0)]
    decoded = decoded_for_evaluation(samples, PREPARED, "memory")
    assert decoded.pixels[0].shape == (32, 32, 3)
    assert torch.equal(seen(decoded[0][0]), seen(open_image(tmp_path / "x.png")))
    assert Shrink(8)(Image.new("RGB", (60_000, 1))).size == (60_000, 1)
    assert Shrink(8)(Image.new("RGB", (6000, 16))).size == (3000, 8)


@pytest.mark.parametrize(("images", "batch"), [(1, 4), (5, 1), (41, 9), (16, 4)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_shares_are_parts_of_the_batches_of_one_process(images: int, batch: int, count: int) -> None:
    shares = [share(images, batch, SimpleNamespace(rank=rank, count=count)) for rank in range(count)]
    whole = [range(at, min(at + max(batch, count), images)) for at in range(0, images, max(batch, count))]
    for j, places in enumerate(whole):
        assert sorted(place for own in shares for part in own[j : j + 1] for place in part) == list(places)
    assert all(len(own) <= len(whole) and all(own) for own in shares)
    sizes = [sum(map(len, own)) for own in shares]
    assert sum(sizes) == images and (batch % count or max(sizes) - min(sizes) <= 1)
    assert share(images, batch) == share(images, batch, SimpleNamespace(rank=0, count=1))


def test_a_line_is_trained_on_as_a_part_of_it() -> None:
    config = TrainConfig(batch_size=1, seed=0)
    ((images, _),) = train_loader([(Image.new("RGB", (60_000, 1)), 0)], PREPARED, config, 0)
    assert images.shape == (1, 3, 32, 32)


def test_the_middle_is_the_middle() -> None:
    pixels = np.zeros((1, 101, 3), "uint8")
    pixels[0, 50] = 255
    cut = np.asarray(CutThin(16)(Image.fromarray(pixels)))
    assert cut.shape == (1, 16, 3) and cut[0, 8].tolist() == [255, 255, 255]
    assert repr(CutThin(16)) == "CutThin(16)"  # by which caches know it
