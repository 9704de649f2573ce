"""Scenes that the tests make: rectangles whose colour is their class, so that a mask can be told from its image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("sky", "road", "car")
VOID = 7  # the value of void pixels in masks
PALETTE = ((40, 80, 220), (120, 120, 120), (220, 40, 40), (0, 0, 0))  # the last of void
YAML = f"names: [sky, road, car]\nignore: {VOID}\n"


def mask(seed: int, height: int = 24, width: int = 32, void: bool = True) -> np.ndarray:
    """Sky above road, a car somewhere, and a void corner."""
    rng = np.random.default_rng(seed)
    values = np.zeros((height, width), "uint8")
    values[height // 2 :] = 1
    top, left = rng.integers(2, height // 2), rng.integers(2, width // 2)
    values[top : top + height // 4, left : left + width // 4] = 2
    if void:
        values[: height // 8, : width // 8] = VOID
    return values


def painted(values: np.ndarray) -> Image.Image:
    table = np.zeros((256, 3), "uint8")
    table[[0, 1, 2, VOID]] = PALETTE
    return Image.fromarray(table[values])


def scene(root: Path, role: str, name: str, values: np.ndarray) -> None:
    for kind, ending, picture in (("images", "png", painted(values)), ("annotations", "png", Image.fromarray(values))):
        path = root / kind / role / f"{name}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


def scenes(root: Path, train: int = 6, val: int = 2, test: int = 2, yaml: str = YAML, **size: int) -> Path:
    for first, (role, count) in zip((0, 100, 200), {"train": train, "val": val, "test": test}.items(), strict=True):
        for i in range(count):
            scene(root, role, f"a{first + i:03d}", mask(first + i, **size))
    if yaml:
        (root / "classes.yaml").write_text(yaml)
    return root
