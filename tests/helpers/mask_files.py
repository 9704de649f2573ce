"""Legends and mask files that the tests write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from helpers.scenery import PALETTE, VOID
from PIL import Image

from vimoe.config.masks import IGNORE
from vimoe.data.legends import read_legend
from vimoe.data.mask_colours import colour
from vimoe.data.masks import Legend

COLOURS = f"palette: {[list(colour) for colour in PALETTE]}\n"
VALUES = np.array([[0, 1, 1], [2, 2, VOID]], "uint8")
READ = [[0, 1, 1], [2, 2, IGNORE]]
COLOUR_OF = dict(zip((0, 1, 2, VOID), PALETTE, strict=True))


def legend(tmp_path: Path, text: str) -> Legend:
    (tmp_path / "classes.yaml").write_text(text)
    return read_legend(tmp_path / "classes.yaml")


def saved(tmp_path: Path, values: np.ndarray, mode: str = "") -> Path:
    picture = Image.fromarray(values)
    if mode == "P":
        picture = picture.convert("P") if picture.mode != "L" else picture
        picture.putpalette([channel for colour in (*PALETTE, *[(1, 1, 1)] * 252) for channel in colour])
    picture.save(tmp_path / "m.png")
    return tmp_path / "m.png"


def indexed(path: Path, order: list[int], colours: dict[int, tuple] = COLOUR_OF) -> Path:
    """VALUES as a palette PNG whose palette has the colours of these values in this order."""
    indices = np.vectorize(order.index)(VALUES).astype("uint8")
    colour(indices, [colours[value] for value in order]).save(path)
    return path
