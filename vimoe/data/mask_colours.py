"""Masks as pictures in colour."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vimoe.config.masks import Colour


def colour(predicted: np.ndarray, colours: Sequence[Colour]) -> Image.Image:
    """(H, W) uint8 places in the classes, as a palette image."""
    image = Image.fromarray(predicted)
    image.putpalette([value for each in colours for value in each])
    return image


def spread_colours(number: int) -> list[Colour]:
    """Colours that can be told apart, for data that names none."""
    golden = 0.618034  # steps of the golden ratio never fall near one another
    found = []
    for i in range(number):
        red, green, blue = colorsys.hsv_to_rgb(i * golden % 1, 0.65 if i % 2 else 0.9, 0.95 if i % 3 else 0.7)
        found.append((round(255 * red), round(255 * green), round(255 * blue)))
    return found
