"""Predicted masks as images in colour."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vimoe.config.masks import Colour


def colour(predicted: np.ndarray, colours: Sequence[Colour]) -> Image.Image:
    """Return a mask (H, W) uint8 of class numbers as a palette image.

    Args:
        predicted: class number of each pixel.
        colours: colour of each class.
    """
    image = Image.fromarray(predicted)
    image.putpalette([value for each in colours for value in each])
    return image


def spread_colours(number: int) -> list[Colour]:
    """Return distinct colours, for data without a palette."""
    golden = 0.618034  # hues in steps of the golden ratio stay apart, however many there are
    found = []
    for i in range(number):
        red, green, blue = colorsys.hsv_to_rgb(i * golden % 1, 0.65 if i % 2 else 0.9, 0.95 if i % 3 else 0.7)
        found.append((round(255 * red), round(255 * green), round(255 * blue)))
    return found
