"""Scenes composed of scikit-learn's handwritten digits, with masks: data for segmentation without a download.

They are files in ADE20K's layout, to look at, and are read as any scenes are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from vimoe.config.data import DataConfig
from vimoe.config.masks import IGNORE
from vimoe.data.classification import load_data
from vimoe.data.labelled_images import Sample
from vimoe.data.mask_colours import colour
from vimoe.data.masks import LEGEND
from vimoe.data.splits import ROLES
from vimoe.errors import DataError
from vimoe.files import write_text

BACKGROUND = 0  # the class; digit d is class d + 1
NAMES = ("background", *"0123456789")
TAB10 = (  # matplotlib's
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75), (227, 119, 194),
    (127, 127, 127), (188, 189, 34), (23, 190, 207),
)  # fmt: skip
PALETTE = ((70, 70, 70), *TAB10)
VOID = (255, 255, 255)
DIGITS = (2, 4)  # least and largest number in a scene
SIDES = (18, 28)  # of a digit in pixels
POSITIONS = 4  # tried for each digit
INK = (0.2, 0.5)  # a scaled digit's grey: at most the first is no ink, at least the second is ink alone


def compose_scenes(
    folder: str | Path, train: int, val: int, test: int, size: int = 64, seed: int = 0, known: int = 10
) -> Path:
    """Write scenes with masks into a new folder: 2 to 4 digits on a textured ground, later digits over earlier ones.

    A pixel has the class of the digit whose ink covers it. At the edges of a stroke ink and ground mix; such a pixel is
    void, since no label would be right. A digit is put at the one of a few random positions that covers least. The
    three roles show different digits, as `digits` splits them. A scene follows from `seed`, its role and its number, so
    a larger set begins with the smaller one.

    Args:
        folder: folder for images/, annotations/ and classes.yaml.
        train: number of training scenes.
        val: number of validation scenes.
        test: number of test scenes.
        size: side of the square scenes in pixels.
        seed: seed of all draws.
        known: number of digits, 0 to `known` - 1.

    Raises:
        DataError: if scenes are too small for digits, there are no such digits, or the folder is not empty.
    """
    folder = Path(folder)
    if size < SIDES[1]:
        raise DataError(f"size={size}: expected at least {SIDES[1]} pixels, the side of the largest digits")
    if not 1 <= known <= 10:
        raise DataError(f"known={known}: expected 1 to 10 digits")
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is there already: expected a new folder; name another one")
    digits = load_data(DataConfig(path="digits"))
    for position, (role, number) in enumerate(zip(ROLES, (train, val, test), strict=True)):
        samples = [sample for sample in getattr(digits, role) if sample[1] < known]
        for kind in ("images", "annotations"):
            (folder / kind / role).mkdir(parents=True)
        for i in range(number):
            image, mask = _scene(samples, size, np.random.default_rng((seed, position, i)))
            Image.fromarray(image).save(folder / "images" / role / f"{i:05d}.png")
            colour(mask, (*PALETTE, *[VOID] * (256 - len(PALETTE)))).save(
                folder / "annotations" / role / f"{i:05d}.png"
            )
    colours = [list(rgb) for rgb in (*PALETTE[: known + 1], VOID)]
    legend = {"names": list(NAMES[: known + 1]), "ignore": IGNORE, "palette": colours}
    write_text(folder / LEGEND, yaml.safe_dump(legend, default_flow_style=None, sort_keys=False))
    return folder


def _scene(samples: Sequence[Sample], size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return an image (size, size, 3) and its mask (size, size), uint8."""
    image = _ground(size, rng)
    mask = np.full((size, size), BACKGROUND, "uint8")
    for _ in range(rng.integers(DIGITS[0], DIGITS[1], endpoint=True)):
        digit, label = samples[int(rng.integers(len(samples)))]
        assert isinstance(digit, Image.Image)
        side = rng.integers(*SIDES, endpoint=True)
        corners = rng.integers(size - side, size=(POSITIONS, 2), endpoint=True)
        windows = [np.s_[top : top + side, left : left + side] for top, left in corners]
        window = min(windows, key=lambda window: (mask[window] != BACKGROUND).sum())
        ink = _ink(digit, int(side))
        image[window] += ink[..., None] * (_bright(rng) - image[window])
        mask[window][ink > 0] = IGNORE
        mask[window][ink == 1] = label + 1
    return (255 * image).round().astype("uint8"), mask


def _ink(digit: Image.Image, side: int) -> np.ndarray:
    """Return the share of each pixel that a digit of that size covers, (side, side) in 0..1."""
    grey = np.asarray(digit.convert("F").resize((side, side), Image.Resampling.BICUBIC)) / 255
    return ((grey - INK[0]) / (INK[1] - INK[0])).clip(0, 1)


def _ground(size: int, rng: np.random.Generator) -> np.ndarray:
    """Return a ground (size, size, 3) in 0..0.5: dark clouds of colour under a fine grain."""
    clouds = Image.fromarray(rng.integers(0, 100, (4, 4, 3), "uint8")).resize((size, size), Image.Resampling.BICUBIC)
    return (np.asarray(clouds) / 255 + rng.uniform(-0.08, 0.08, (size, size, 1))).clip(0, 0.5)


def _bright(rng: np.random.Generator) -> np.ndarray:
    """Return a colour that stands out from the ground."""
    colours = rng.uniform(0.2, 1, 3)
    return colours / colours.max()
