"""Images with a class each, in three roles: train, validation (for every decision) and test (only reported)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from vimoe.data.image_check import CheckedImages
from vimoe.data.images import Source, name_within
from vimoe.errors import counted

Sample = tuple[Source | Image.Image, int]


@dataclass(frozen=True)
class Data:
    """Images of each role; labels index `classes`, which train defines for all roles.

    Args:
        classes: names of the classes.
        train, val, test: (image or its source, label) of each image.
        root: data folder or file, from which images are named.
        split_off: True if validation was split off train.
        junk: number of other files by kind, as `find_images` counts them.
        checked: outcome of opening all images, if unreadable ones were left out.
        parts: images of each train split, if there are several; all have the same test images. Without a validation
            split, each has the validation images that were split off it, else none.
        split: name of the train split, in one of these parts.
        whole: train images of all tasks, where these are the images of one (`vimoe.data.tasks`).
    """

    classes: tuple[str, ...]
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    test: tuple[Sample, ...]
    root: Path = Path()
    split_off: bool = False
    junk: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)
    checked: CheckedImages | None = field(default=None, compare=False, repr=False)
    parts: tuple[Data, ...] = field(default=(), compare=False, repr=False)
    split: str | None = field(default=None, compare=False, repr=False)
    whole: tuple[Sample, ...] | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        roles = f"{len(self.train)} train, {len(self.val)} validation, {len(self.test)} test"
        return f"{roles} images of {counted(len(self.classes), 'class', 'classes')}"

    def names(self, samples: Iterable[Sample]) -> list[str]:
        """Return the names of images in lists that outlast this process; images in memory have none."""
        return [name_within(self.root, source) for source, _ in on_disk(samples)]


def on_disk(samples: Iterable[Sample]) -> list[tuple[Source, int]]:
    """Return the images that are not in memory."""
    return [(source, label) for source, label in samples if not isinstance(source, Image.Image)]
