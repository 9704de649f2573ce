"""Image and mask stay together, draws follow from seeds, and batches are what a model takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.scenery import PALETTE, VOID, mask, painted, scene, scenes
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from vimoe.config.data import DataConfig
from vimoe.config.masks import IGNORE
from vimoe.data.order import seed_host
from vimoe.data.scene_loaders import JointImages, eval_loader, eval_transform, train_loader, train_transform
from vimoe.data.scenes import Scenes, load_scenes
from vimoe.errors import DataError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def pair(height: int, width: int, seed: int = 0) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    values = mask(seed, height, width)
    image = tv_tensors.Image(torch.from_numpy(np.asarray(painted(values)).copy()).permute(2, 0, 1))
    return image, tv_tensors.Mask(torch.from_numpy(np.where(values == VOID, IGNORE, values).astype("uint8")))


def class_of_colour(image: Tensor, tolerance: float = 2.5) -> Tensor:
    """The class whose colour a pixel has, -1 for a mixture of colours."""
    pixels = (image * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255
    colours = torch.tensor(PALETTE, dtype=torch.float32)
    distance = (pixels[None] - colours[:, :, None, None]).abs().amax(dim=1)
    nearest, which = distance.min(dim=0)
    number = torch.tensor([0, 1, 2, IGNORE])[which]
    return torch.where(nearest <= tolerance, number, -1)


@pytest.mark.parametrize("scale", [(0.4, 0.9), (0.9, 2.3), (1.0, 1.0)], ids=str)
@pytest.mark.parametrize("size", [(48, 64), (32, 32), (90, 50)], ids=str)
def test_the_mask_is_still_what_the_colours_say(scale: tuple, size: tuple) -> None:
    transform = train_transform(size, MEAN, STD, scale=scale, jitter=0)
    for seed in range(12):
        seed_host(seed)
        image, target = (t.as_subclass(Tensor) for t in transform(*pair(64, 80, seed)))
        assert image.shape == (3, *size) and target.shape == size
        seen = class_of_colour(image)
        padded = (image == 0).all(dim=0)
        pure = (seen >= 0) & ~padded
        assert pure.sum() > 0.5 * (~padded).sum()
        assert (seen[pure] == target[pure]).all()
        assert (target[padded] == IGNORE).all()


@pytest.mark.parametrize("border", range(29, 36))
@pytest.mark.parametrize("scale", [0.25, 0.5, 2.0])
def test_borders_stay_at_the_same_place_in_image_and_mask(border: int, scale: float) -> None:
    """A mask that is resized by the corners of pixels would be off by up to half a pixel of the smaller image."""
    values = np.zeros((64, 64), "uint8")
    values[border:] = 1
    image = tv_tensors.Image(torch.from_numpy(values * 255)[None].expand(3, -1, -1).contiguous())
    size = round(64 * scale)
    transform = train_transform((size, size), (0.5,) * 3, (1.0,) * 3, scale=(scale, scale), hflip=0, jitter=0)
    bright, target = transform(image, tv_tensors.Mask(torch.from_numpy(values)))
    decided = bright[0].abs() > 0.02  # a pixel that the border halves is as good as either
    assert torch.equal((bright[0] > 0)[decided], (target == 1)[decided]) and decided.sum() >= size * (size - 1)


def test_images_smaller_than_the_crop_are_padded_with_void_and_the_mean() -> None:
    image, target = train_transform((40, 64), MEAN, STD, scale=(1.0, 1.0), jitter=0, hflip=0)(*pair(24, 32))
    assert (target[24:] == IGNORE).all() and (target[:, 32:] == IGNORE).all()
    assert (image[:, 24:] == 0).all() and (image[:, :, 32:] == 0).all()
    expected = pair(24, 32)[1]
    assert torch.equal(target[:24, :32].as_subclass(Tensor), expected.as_subclass(Tensor))


def test_a_scale_that_leaves_less_than_a_pixel_of_the_source_takes_one() -> None:
    small = tv_tensors.Image(torch.zeros(3, 2, 3, dtype=torch.uint8)), tv_tensors.Mask(torch.full((2, 3), 2).byte())
    for seed in range(20):
        seed_host(seed)
        image, target = train_transform((2, 2), MEAN, STD, scale=(9.0, 9.0), jitter=0)(*small)
        assert image.shape == (3, 2, 2) and (target == 2).all()


def test_one_side_smaller_one_larger() -> None:
    for seed in range(5):
        seed_host(seed)
        image, target = train_transform((40, 20), MEAN, STD, scale=(0.5, 1.5))(*pair(24, 60))
        assert image.shape == (3, 40, 20) and target.shape == (40, 20)


def test_scale_and_flip_and_colours_do_what_they_say() -> None:
    def areas(scale: float) -> float:
        out = [train_transform((200, 200), MEAN, STD, scale=(scale, scale))(*pair(64, 64, s))[1] for s in range(3)]
        return float(np.mean([(m == 2).sum() for m in out]))

    assert areas(2.0) == pytest.approx(4 * areas(1.0), rel=0.02)
    there = train_transform((24, 32), MEAN, STD, scale=(1.0, 1.0), hflip=0, jitter=0)(*pair(24, 32))
    flipped = train_transform((24, 32), MEAN, STD, scale=(1.0, 1.0), hflip=1, jitter=0)(*pair(24, 32))
    assert all(torch.equal(a.flip(-1), b) for a, b in zip(there, flipped, strict=True))
    jittered = train_transform((24, 32), MEAN, STD, scale=(1.0, 1.0), hflip=0, jitter=0.5)(*pair(24, 32))
    assert torch.equal(jittered[1], there[1]) and not torch.allclose(jittered[0], there[0], atol=0.01)


def test_a_wrong_scale_is_refused() -> None:
    with pytest.raises(DataError, match=r"scale=\(2.0, 0.5\): expected two factors"):
        train_transform((8, 8), MEAN, STD, scale=(2.0, 0.5))


def load(root: Path, **settings: object) -> Scenes:
    return load_scenes(DataConfig(path=str(root), **settings))


def test_training_batches_follow_from_seed_and_epoch(tmp_path: Path) -> None:
    found = load(scenes(tmp_path))
    transform = train_transform((16, 16), MEAN, STD)

    def epoch(number: int, seed: int = 3, workers: int = 0) -> list[Tensor]:
        loader = train_loader(found.train, found.legend, transform, 4, seed, workers)
        loader.sampler.start(number)
        torch.rand(1)
        return [tensor for batch in loader for tensor in batch]

    first = epoch(1)
    assert len(first) == 2 and first[0].shape == (4, 3, 16, 16) and first[0].dtype == torch.float32
    assert first[1].shape == (4, 16, 16) and first[1].dtype == torch.int64
    assert set(first[1].unique().tolist()) <= {0, 1, 2, IGNORE}
    assert all(type(tensor) is Tensor for tensor in first)
    assert all(torch.equal(a, b) for a, b in zip(first, epoch(1), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, epoch(1, workers=1), strict=True))
    assert not torch.equal(first[0], epoch(2)[0]) and not torch.equal(first[0], epoch(1, seed=4)[0])


def test_evaluation_reads_whole_images(tmp_path: Path) -> None:
    found = load(scenes(tmp_path, test=3))
    for size, batch in ((1, 1), (2, 2), (5, 3)):
        images, masks = next(iter(eval_loader(found.test, found.legend, eval_transform(MEAN, STD), size, 0)))
        assert images.shape == (batch, 3, 24, 32) and masks.shape == (batch, 24, 32)
    values = mask(200)
    assert torch.equal(masks[0], torch.from_numpy(np.where(values == VOID, IGNORE, values)).long())
    assert torch.equal(class_of_colour(images[0]), masks[0])


def test_images_of_several_sizes_come_one_by_one(tmp_path: Path) -> None:
    root = scenes(tmp_path)
    scene(root, "test", "large", mask(1, 40, 48))
    found = load(root)
    loader = eval_loader(found.test, found.legend, eval_transform(MEAN, STD), 4, 0)
    assert sorted(tuple(images.shape) for images, _ in loader) == [(1, 3, 24, 32), (1, 3, 24, 32), (1, 3, 40, 48)]


def test_sizes_that_differ_are_told_without_a_scan_too(tmp_path: Path) -> None:
    root = scenes(tmp_path)
    Image.fromarray(mask(0, 20, 32)).save(root / "annotations/train/a000.png")
    found = load(root)
    with pytest.raises(DataError, match=r"a000.png is 32x20 and its image 32x24"):
        JointImages(found.train, found.legend, eval_transform(MEAN, STD))[0]
