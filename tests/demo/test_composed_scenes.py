"""Scenes of digits: masks that say what the images show, roles that share no digit, the same for a seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vimoe.demo.composed_scenes as compose
from vimoe.config.data import DataConfig
from vimoe.config.masks import IGNORE
from vimoe.data.classification import load_data
from vimoe.data.scene_scan import scan_scenes
from vimoe.data.scenes import Scenes, load_scenes
from vimoe.demo.composed_scenes import BACKGROUND, DIGITS, NAMES, PALETTE, compose_scenes
from vimoe.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compose_scenes(tmp_path_factory.mktemp("composed") / "scenes", 12, 4, 3)


@pytest.fixture(scope="module")
def scenes(folder: Path) -> Scenes:
    return load_scenes(DataConfig(path=str(folder), task="segmentation"))


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_they_are_read_as_any_scenes_are(folder: Path, scenes: Scenes) -> None:
    assert [len(role) for role in (scenes.train, scenes.val, scenes.test)] == [12, 4, 3]
    assert scenes.classes == NAMES and scenes.palette == PALETTE and not scenes.split_off
    pixels = scan_scenes(scenes, str(folder)).pixels["train"]
    assert pixels[BACKGROUND] > 0.5 * 12 * 64**2 and sum(count > 0 for count in pixels) > DIGITS[1]
    image, mask = scenes.train[0]
    assert opened(image).shape == (64, 64, 3) and scenes.legend.read(mask).shape == (64, 64)
    numbers, shown = scenes.legend.read(mask), opened(mask)  # a viewer shows the palette
    assert all((shown[numbers == c] == PALETTE[c]).all() for c in np.unique(numbers) if c != IGNORE)


def test_strokes_have_one_bright_colour_on_a_dark_ground_and_void_lies_between(scenes: Scenes) -> None:
    for image, mask in scenes.train:
        pixels, numbers = opened(image), scenes.legend.read(mask)
        stroke = (numbers != BACKGROUND) & (numbers != IGNORE)
        assert pixels[stroke].max(axis=1).min() == 255 and pixels[numbers == BACKGROUND].max() <= 128
        colours = np.unique(pixels[stroke], axis=0)
        assert len(np.unique(numbers[stroke])) <= len(colours) <= DIGITS[1]
        beside = np.zeros_like(stroke)
        beside[1:] |= stroke[:-1]
        beside[:, 1:] |= stroke[:, :-1]
        assert (numbers[beside] == BACKGROUND).mean() < 0.1 and (numbers == IGNORE).any()


def test_the_mask_names_the_digit_that_was_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one digit a scene, of a known label, there is no other class, and its ink is where the stroke is."""
    data = load_data(DataConfig(path="digits"))
    seven = next(sample for sample in data.train if sample[1] == 7)
    monkeypatch.setattr(compose, "DIGITS", (1, 1))
    monkeypatch.setattr(compose, "load_data", lambda config: type(data)(data.classes, (seven,), (seven,), (seven,)))
    found = load_scenes(DataConfig(path=str(compose_scenes(tmp_path / "scenes", 3, 1, 1)), task="segmentation"))
    for image, mask in found.train:
        numbers = found.legend.read(mask)
        assert set(np.unique(numbers)) == {BACKGROUND, NAMES.index("7"), IGNORE}
        assert (opened(image).max(axis=2) == 255)[numbers == NAMES.index("7")].all()


def test_roles_show_different_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[set[bytes]] = []
    real = compose._scene

    def scene(samples, size, rng):
        drawn.append({digit.tobytes() for digit, _ in samples})
        return real(samples, size, rng)

    monkeypatch.setattr(compose, "_scene", scene)
    compose_scenes(tmp_path / "scenes", 1, 1, 1)
    train, val, test = drawn
    assert min(map(len, drawn)) > 300 and not (train & val or train & test or val & test)


def test_fewer_digits_are_fewer_classes(tmp_path: Path) -> None:
    folder = compose_scenes(tmp_path / "scenes", 20, 1, 1, known=3)
    scenes = load_scenes(DataConfig(path=str(folder), task="segmentation"))
    assert scenes.classes == NAMES[:4] and scenes.palette == PALETTE[:4]
    seen = set().union(*(set(np.unique(scenes.legend.read(mask))) for _, mask in scenes.train))
    assert seen == {0, 1, 2, 3, IGNORE}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_seed_gives_the_same_files_and_more_scenes_begin_with_fewer(folder: Path, tmp_path: Path) -> None:
    again, fewer, other = (
        contents(compose_scenes(tmp_path / name, train, 4, 3, seed=seed))
        for name, train, seed in (("again", 12, 0), ("fewer", 5, 0), ("other", 12, 1))
    )
    first = contents(folder)
    assert again == first and fewer.items() < first.items()
    assert all(other[name] != first[name] for name in first if name.startswith("images"))


def test_mistakes_are_named_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="size=20: expected at least"):
        compose_scenes(tmp_path / "small", 1, 1, 1, size=20)
    with pytest.raises(DataError, match="known=11: expected 1 to 10"):
        compose_scenes(tmp_path / "small", 1, 1, 1, known=11)
    assert not (tmp_path / "small").exists()
    with pytest.raises(DataError, match="is there already"):
        compose_scenes(folder, 1, 1, 1)
