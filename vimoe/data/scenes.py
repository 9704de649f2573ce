"""Scenes, which are images with a mask each, in three roles: train, validation (for every decision) and test."""

from __future__ import annotations

import logging
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vimoe.config.data import DataConfig
from vimoe.config.masks import IGNORE, Colour
from vimoe.data.image_files import passed_over
from vimoe.data.images import Source, name_within
from vimoe.data.legends import legend_of_masks
from vimoe.data.masks import LEGEND, Legend
from vimoe.data.scene_layouts import SceneFiles, find_scenes
from vimoe.data.splits import ROLES
from vimoe.errors import DataError, counted

Scene = tuple[Source, Source]  # an image and its mask
MOST_OF_TRAIN = 0.25  # largest share of train that a validation split by sequence may take

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scenes:
    """Scenes of each role.

    Args:
        legend: classes, and their values in mask files.
        train, val, test: (image, mask) of each scene.
        split_off: True if validation was split off train.
        sequences: video of each scene of val; None if unknown.
        images_alone, masks_alone: files without a counterpart, which the scan refuses.
        root: data folder, from which images are named.
        not_read: note on masks of `images_alone` that were passed over for their ending; "" without any.
    """

    legend: Legend
    train: tuple[Scene, ...]
    val: tuple[Scene, ...]
    test: tuple[Scene, ...]
    split_off: bool = False
    sequences: tuple[str, ...] | None = None
    images_alone: tuple[Source, ...] = field(default=(), repr=False)
    masks_alone: tuple[Source, ...] = field(default=(), repr=False)
    root: Path = Path()
    not_read: str = field(default="", repr=False)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; masks hold indices in this."""
        return self.legend.names

    @property
    def palette(self) -> tuple[Colour, ...] | None:
        """Colour (red, green, blue) of each class, if the data have a palette."""
        return self.legend.palette and self.legend.palette[: len(self.classes)]

    def names(self, scenes: Iterable[Scene]) -> list[str]:
        """Return the names of the scenes' images in lists that outlast this process."""
        return [name_within(self.root, image) for image, _ in scenes]

    def __str__(self) -> str:
        roles = f"{len(self.train)} train, {len(self.val)} validation, {len(self.test)} test"
        return f"{roles} scenes of {len(self.classes)} classes"


def load_scenes(config: DataConfig, classes: Sequence[str] = (), validation: Iterable[str] = ()) -> Scenes:
    """Find images and masks, and give each pair a role.

    `classes.yaml` beside the images gives the meaning of the masks' values (`vimoe.data.legends.read_legend`). Without
    it they are classes, from 0 to the largest value in train's masks, and 255 is void. If there is no validation
    split, `config.val_fraction` is split off train: whole sequences, if the legend or the names tell them (`sequence`),
    else single images.

    Args:
        config: settings of the data.
        classes: class names of a trained model, which the data must have too.
        validation: names (`Scenes.names`) of the images that a run split off train, to get the same split again.

    Raises:
        DataError: if folders are missing or hold no pair, or the classes are not the model's.
    """
    found = find_scenes(config)
    root = found.root
    names, pairs, images_alone, masks_alone = _paired(found)
    if not pairs["train"]:
        other = "" if images_alone else passed_over(found.junk)
        raise DataError(
            f"{root}: {counted(len(images_alone), 'image')}{other} and {counted(len(masks_alone), 'mask')}, and no "
            f"pair of them in train: expected masks with the images' names that end in .png, or rows with both; rename "
            f"or complete them{found.not_read(images_alone)}"
        )
    legend = found.legend or legend_of_masks([mask for _, mask in pairs["train"]])
    if found.legend is None and not classes:  # a trained model has told its user
        logger.warning(
            "%s has no %s: the values 0 to %d in train's masks are taken for %d classes, and %d for void; give names "
            "in a %s beside the images, such as 'names: [sky, road]'",
            root, LEGEND, len(legend.names) - 1, len(legend.names), IGNORE, LEGEND,
        )  # fmt: skip
    _check_classes(root, legend, classes or legend.names)
    videos = _videos(legend, names, pairs)
    train, val = pairs["train"], pairs["val"]
    if not val:
        of_video = [videos.get(scene) or sequence(name) for scene, name in zip(train, names["train"], strict=True)]
        train, val = _split_off(train, of_video, root, config, set(validation))
    return Scenes(
        legend, tuple(train), tuple(val), tuple(pairs["test"]), split_off=not pairs["val"],
        sequences=tuple(videos[scene] for scene in val) if videos else None,
        images_alone=tuple(images_alone), masks_alone=tuple(masks_alone), root=root,
        not_read=found.not_read(images_alone),
    )  # fmt: skip


def load_others(
    path: str, classes: Sequence[str], legend: Legend, config: DataConfig | None = None
) -> tuple[str, Scenes]:
    """Load the scenes of another data path in the role of test, to score a trained model on them.

    Args:
        path: data path, as `DataConfig.path`; train may be missing.
        classes: class names of the model.
        legend: meaning of the masks' values, for data without a legend.
        config: settings of the run, of which the names of splits and of a table's columns are used. Where the data
            lack a split of that name, usual names are looked for, such as "testing".

    Returns:
        Name of the scenes ("test", "validation", "train", or "all" for data without roles), and the scenes.

    Raises:
        DataError: if there are none, files have no counterpart, or the classes are not the model's.
    """
    other = replace(config or DataConfig(), path=path, task="segmentation")
    if not path.startswith("hfds/"):
        other = replace(other, image_column=None, label_column=None)
    found = find_scenes(other, to_train=False)
    root = found.root
    _, pairs, images_alone, masks_alone = _paired(found)
    if images_alone or masks_alone:
        raise DataError(
            f"{root}: {counted(len(images_alone), 'image has', 'images have')} no mask and "
            f"{counted(len(masks_alone), 'mask')} no image, such as "
            f"{name_within(root, (images_alone + masks_alone)[0])}: expected pairs; remove them"
            f"{found.not_read(images_alone)}"
        )
    legend = found.legend or legend
    _check_classes(root, legend, classes)
    last = "all" if found.undivided else "train"
    roles = {"test": pairs["test"], "validation": pairs["val"], last: pairs["train"]}
    role = next((role for role, scenes in roles.items() if scenes), None)
    if role is None:
        raise DataError(f"{root} holds no image with a mask: expected masks with the images' names that end in .png")
    return role, Scenes(legend, (), (), tuple(roles[role]), root=root)


def _paired(found: SceneFiles) -> tuple[dict[str, list[str]], dict[str, list[Scene]], list[Source], list[Source]]:
    """Pair images and masks of one name.

    Returns:
        Names of the pairs by role, pairs by role, images without a mask, and masks without an image.
    """
    names: dict[str, list[str]] = {}
    pairs: dict[str, list[Scene]] = {}
    images_alone: list[Source] = []
    masks_alone: list[Source] = []
    for role in ROLES:
        images, masks = found.images.get(role, {}), found.masks.get(role, {})
        names[role] = sorted(images.keys() & masks.keys())
        pairs[role] = [(images[name], masks[name]) for name in names[role]]
        images_alone += [images[name] for name in sorted(images.keys() - masks.keys())]
        masks_alone += [masks[name] for name in sorted(masks.keys() - images.keys())]
    return names, pairs, images_alone, masks_alone


def _videos(legend: Legend, names: dict[str, list[str]], pairs: dict[str, list[Scene]]) -> dict[Scene, str]:
    """Return the video of each scene by the legend; {} if that has no `sequence`."""
    scenes = [scene for role in ROLES for scene in pairs[role]]
    videos = legend.sequences([name for role in ROLES for name in names[role]])
    return dict(zip(scenes, videos, strict=True)) if videos else {}


def _check_classes(root: Path, legend: Legend, classes: Sequence[str]) -> None:
    if tuple(classes) != legend.names:
        raise DataError(
            f"{root} has the classes {_few(legend.names)}: expected the model's {_few(classes)}, in this order; "
            f"correct its classes.yaml"
        )


def sequence(name: str) -> str:
    """Guess the video of a frame from its name: the part before its last run of digits and underscores.

    Neighbouring frames are nearly equal, so a split must not part them. If all names share one prefix
    ("ADE_train_00000001"), the guess is one video for all. A wrong guess does no harm to a split; intervals use the
    legend's `sequence` instead.

    >>> sequence("0006R0_f00930"), sequence("0001TP_006690"), sequence("aachen/aachen_000000_000019")
    ('0006R0_f', '0001TP', 'aachen/aachen')
    """
    runs = list(re.finditer(r"[\d_]*\d[\d_]*", name))
    return name[: runs[-1].start()] if runs else name


def _split_off(
    train: list[Scene], of_video: list[str], root: Path, config: DataConfig, listed: set[str]
) -> tuple[list[Scene], list[Scene]]:
    """Split validation off train: the images that a run has listed, or else a seeded share."""
    if listed:
        val = [scene for scene in train if name_within(root, scene[0]) in listed]
        if len(val) != len(listed):
            raise DataError(
                f"{root}: {len(listed) - len(val)} of the run's {len(listed)} validation images are missing: expected "
                f"the folder as it was in training; restore it, or train again"
            )
    elif len(train) < 2:
        raise DataError(f"{root}: 1 scene in train: expected at least two, to split validation off; add scenes")
    else:
        share = min(len(train) - 1, round(len(train) * config.val_fraction))
        wanted = max(share, min(2, len(train) // 2))  # analysis needs at least 2
        val = _whole_sequences(train, of_video, wanted, config.seed)
        if not val:
            logger.info("validation is split off train by image, because names show no sequences that fit")
            val = random.Random(config.seed).sample(train, wanted)
    taken = set(val)
    return [scene for scene in train if scene not in taken], [scene for scene in train if scene in taken]


def _whole_sequences(train: list[Scene], of_video: list[str], wanted: int, seed: int) -> list[Scene]:
    """Choose whole sequences for validation.

    In seeded order, take each sequence that still fits into the wanted number of scenes; if these are less than half
    of it, take the shortest of the others too.

    Returns:
        The scenes; [] if there is only one sequence, or they are more than `MOST_OF_TRAIN` of train or less than half
        of the wanted number.
    """
    videos: dict[str, list[Scene]] = defaultdict(list)
    for scene, name in zip(train, of_video, strict=True):
        videos[name].append(scene)
    if len(videos) < 2:
        return []
    chosen: list[Scene] = []
    left: list[list[Scene]] = []
    for video in random.Random(seed).sample(list(videos.values()), len(videos)):
        if len(chosen) + len(video) <= wanted:
            chosen += video
        else:
            left.append(video)
    if 2 * len(chosen) < wanted and left:
        shortest = min(left, key=len)
        chosen += shortest
    return chosen if wanted <= 2 * len(chosen) <= 2 * MOST_OF_TRAIN * len(train) else []


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f", ... ({len(names)})" if len(names) > 4 else "")
