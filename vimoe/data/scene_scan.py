"""Problems of images and masks, found before training."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np

from vimoe.config.masks import IGNORE
from vimoe.data.image_check import check_images
from vimoe.data.images import Source, image_size, name_within, source_path
from vimoe.data.masks import LEGEND, Array, Legend, palette_of
from vimoe.data.scan import duplicates, warn_of_thin
from vimoe.data.scenes import Scene, Scenes
from vimoe.errors import DataError, counted
from vimoe.terminal import track

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SceneScan:
    """Numbers of scenes and pixels, and problems.

    Args:
        train, validation, test: number of scenes of each role.
        classes: number of classes.
        opened: number of images and masks that were opened, images now or in an earlier scan of the unchanged file.
        pixels: number of pixels of each class, by role.
        void: number of void pixels, by role.
        absent: classes without a pixel, by role, without test, since nothing is decided there.
        all_void: number of scenes whose mask is entirely void.
        validation_in_train, test_in_train: number of images of the role that are byte for byte in train too.
    """

    train: int
    validation: int
    test: int
    classes: int
    opened: int
    pixels: dict[str, list[int]]
    void: dict[str, int]
    absent: dict[str, list[str]]
    all_void: int
    validation_in_train: int
    test_in_train: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        train = sum(self.pixels["train"]) + self.void["train"]
        return (
            f"{self.train} train, {self.validation} validation, {self.test} test scenes of "
            f"{counted(self.classes, 'class', 'classes')}; "
            f"{self.opened} files opened; void: {self.void['train'] / max(train, 1):.1%} of train's pixels, "
            f"{self.all_void} whole masks; duplicates of train: {self.validation_in_train} in validation, "
            f"{self.test_in_train} in test"
        )


def scan_scenes(scenes: Scenes, folder: str | Path) -> SceneScan:
    """Open every mask, and every image that `vimoe.data.image_check.check_images` does not remember.

    Warns of classes without a pixel in train or validation, masks that are entirely void, thin images, and images of
    validation or test that are in train too.

    Args:
        scenes: scenes of all roles.
        folder: data folder.

    Raises:
        DataError: if an image or mask has no partner or cannot be read, or if a mask has an unknown value or another
            size than its image (rotated by its EXIF tag). Also if all masks of train or validation are entirely void.
    """
    root = Path(folder)
    remedy = f"add masks, or remove the images{scenes.not_read}"
    _refuse(dict.fromkeys(scenes.images_alone, ""), "images have no mask", root, remedy, "image has no mask")
    remedy = "add images, or remove the masks"
    _refuse(dict.fromkeys(scenes.masks_alone, ""), "masks have no image", root, remedy, "mask has no image")
    roles = {"train": scenes.train, "validation": scenes.val, "test": scenes.test}
    everything = [scene for listed in roles.values() for scene in listed]
    checked = check_images([image for image, _ in everything], root)
    _refuse(checked.errors, f"of {len(everything)} images cannot be read", root, "remove them with their masks")
    warn_of_thin(checked, lambda image: name_within(root, image))
    counts = _count_pixels(everything, scenes, root)
    of_role = {role: _sum(counts, listed, len(scenes.classes)) for role, listed in roles.items()}
    for role, listed in (("train", scenes.train), ("validation", scenes.val)):
        if not of_role[role][:-1].any():  # every score would be 0, and every layer would seem of no use
            raise DataError(
                f"all masks of {role} are entirely void, such as {name_within(root, listed[0][1])}: expected pixels of "
                f"classes; give its masks, or correct ignore in {LEGEND}"
            )
    absent = {role: _absent(of_role[role], scenes.classes, role) for role in ("train", "validation")}
    blank = [mask for _, mask in everything if not counts[mask][:-1].any()]
    if blank:
        are = "is" if len(blank) == 1 else "are"
        logger.warning("%d of %d masks %s entirely void, such as %s: they teach and measure nothing",
                       len(blank), len(everything), are, name_within(root, blank[0]))  # fmt: skip
    train = [image for image, _ in scenes.train]
    in_train = {
        role: duplicates(role, [image for image, _ in roles[role]], train, checked, lambda i: name_within(root, i))
        for role in ("validation", "test")
    }
    return SceneScan(
        **{role: len(listed) for role, listed in roles.items()},
        classes=len(scenes.classes), opened=2 * len(everything),
        pixels={role: count[:-1].tolist() for role, count in of_role.items()},
        void={role: int(count[-1]) for role, count in of_role.items()},
        absent=absent, all_void=len(blank),
        validation_in_train=in_train["validation"], test_in_train=in_train["test"],
    )  # fmt: skip


def _count_pixels(scenes: list[Scene], all_scenes: Scenes, root: Path) -> dict[Source, Array]:
    """Count pixels by mask, (classes + 1,) with void at the end; in threads, as Pillow decodes without the GIL."""
    classes = len(all_scenes.classes)
    counts: dict[Source, Array] = {}
    wrong: dict[Source, str] = {}
    sizes: dict[Source, str] = {}

    colours: dict[int, tuple[tuple[int, ...], Source]] = {}  # palette colour of each class, and the mask that has it
    differing: list[str] = []

    def count(scene: Scene) -> Array | DataError | str:
        image, mask = scene
        try:
            numbers = all_scenes.legend.read(mask)
        except DataError as error:
            return error
        if numbers.shape != (size := image_size(image)):
            return f"{numbers.shape[1]}x{numbers.shape[0]}, the image {size[1]}x{size[0]}"
        found = np.bincount(numbers.ravel(), minlength=IGNORE + 1)
        return np.append(found[:classes], found[IGNORE])

    with ThreadPool() as pool:
        results = pool.imap(count, scenes, chunksize=8)
        shown = track(results, "scanning masks", len(scenes))
        for (_, mask), result in zip(scenes, shown, strict=True):
            if isinstance(result, DataError):
                wrong[mask] = str(result).removeprefix(f"{source_path(mask)}: ")
            elif isinstance(result, str):
                sizes[mask] = result
            else:
                counts[mask] = result
                if all_scenes.legend.palette is None and not differing:
                    differing += _differing(mask, result, all_scenes.legend, colours, root)
    if differing:
        logger.warning("%s: values count, since there is no palette; if colours count, give a palette in %s",
                       differing[0], LEGEND)  # fmt: skip
    _refuse(wrong, f"of {len(scenes)} masks cannot be used", root)
    other, one = "have another size than their image", f"of {len(scenes)} masks has another size than its image"
    _refuse(sizes, f"of {len(scenes)} masks {other}", root, "resize them", one)
    return counts


def _differing(
    mask: Source, pixels: Array, legend: Legend, known: dict[int, tuple[tuple[int, ...], Source]], root: Path
) -> list[str]:
    """Describe a class with another colour in this palette image than in an earlier one; [] without any.

    Then the values of one of the masks may be permuted.
    """
    palette = palette_of(mask)
    if palette is None:
        return []
    for number in np.flatnonzero(pixels[:-1]).tolist():
        value = legend.ids[number]
        colour = tuple(palette[value].tolist()) if value < len(palette) else ()
        before, first = known.setdefault(number, (colour, mask))
        if before != colour:
            names = name_within(root, first), name_within(root, mask)
            return [
                f"class {legend.names[number]!r} has the colour {list(before)} in {names[0]} and {list(colour)} in "
                f"{names[1]}"
            ]
    return []


def _refuse(files: Mapping[Any, str], what: str, root: Path, remedy: str = "", one: str = "") -> None:
    """Raise DataError with the number and the first names if there are any files; `one` says `what` of a single one."""
    if not files:
        return
    first = [name_within(root, file) + (f" ({why})" if why else "") for file, why in list(files.items())[:3]]
    rest = [f"{len(files) - 3} more"] if len(files) > 3 else []
    raise DataError(
        f"{counted(len(files), one or what, what)}: {', '.join([*first, *rest])}" + (f"; {remedy}" if remedy else "")
    )


def _sum(counts: dict[Source, Array], scenes: tuple[Scene, ...], classes: int) -> Array:
    return sum((counts[mask] for _, mask in scenes), np.zeros(classes + 1, "int64"))


def _absent(count: Array, classes: tuple[str, ...], role: str) -> list[str]:
    absent = [name for name, pixels in zip(classes, count[:-1], strict=True) if not pixels]
    if absent:
        consequence = {"train": "they cannot be learned", "validation": "its mean IoU leaves them out"}[role]
        have = "has" if len(absent) == 1 else "have"
        logger.warning("%d of %d classes %s no pixel in %s, such as %s: %s", len(absent), len(classes), have, role,
                       ", ".join(absent[:3]), consequence)  # fmt: skip
    return absent
