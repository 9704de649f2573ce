"""Image folders that the tests make: classes that a small model can tell apart by colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (20, 40, 200), "green": (30, 180, 40), "red": (210, 30, 30)}


def picture(colour: tuple[int, int, int], seed: int, size: int = 16) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-20, 20, (size, size, 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype("uint8"))


def folder(root: Path, images: int, classes: tuple[str, ...] = tuple(COLOURS), seed: int = 0) -> Path:
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(images):
            picture(COLOURS.get(name, (90, 90, 90)), seed + 1000 * c + i).save(root / name / f"{i:03d}.png")
    return root


def roles(root: Path, train: int = 8, val: int = 3, test: int = 3) -> Path:
    for seed, (role, images) in enumerate({"train": train, "val": val, "test": test}.items()):
        if images:
            folder(root / role, images, seed=10_000 * seed)
    return root
