"""Where data sets keep images and masks on disk: as ADE20K does, Pascal VOC, or Cityscapes."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vimoe.config import DataConfig
from vimoe.data import split_of
from vimoe.errors import DataError, nearest
from vimoe.images import find_images
from vimoe.segmentation.legend import LEGEND, Legend, png_palette, read_legend

ROLES = ("train", "val", "test")
Files = dict[str, Path]  # by what an image and its mask are both called

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """The files of each role, still unpaired; without a legend where nothing says what the masks' values mean."""

    images: dict[str, Files]
    masks: dict[str, Files]
    legend: Legend | None


def find_scenes(config: DataConfig, to_train: bool = True) -> Found:
    """Finds images and masks in `config.path`, whichever of the three layouts it has; with a role to train if asked.

    Raises:
        DataError: where it has none of them, or names a folder for a role that is not there.
    """
    root = Path(config.path)
    if (root / "images").is_dir() and (root / "annotations").is_dir():
        return _ade20k(root, config, to_train)
    if (root / "leftImg8bit").is_dir() and (root / "gtFine").is_dir():
        return _cityscapes(root, config, to_train)
    for year in (root, *sorted(root.glob("VOC2*")), *sorted(root.glob("VOCdevkit/VOC2*"))):
        if (year / "JPEGImages").is_dir() and (year / "SegmentationClass").is_dir():
            return _voc(year, config)
    raise DataError(
        f"{root} has no masks that are known: expected images/ and annotations/ (as ADE20K), leftImg8bit/ and gtFine/ "
        f"(Cityscapes) or VOCdevkit/VOC2012/; {nearest('images', (p.name for p in root.iterdir() if p.is_dir()))}"
    )


def _ade20k(root: Path, config: DataConfig, to_train: bool) -> Found:
    """images/ROLE/NAME.jpg and annotations/ROLE/NAME.png, with folders inside of these where there are many."""
    images, masks = (_role_folders(root / kind, config, to_train) for kind in ("images", "annotations"))
    if "test" in images and "test" not in masks:
        logger.info("%s has no masks in annotations: left out", images.pop("test"))
    legend = read_legend(root / LEGEND) if (root / LEGEND).is_file() else None
    return Found(_files(images), _files(masks, ".png"), legend)


def _cityscapes(root: Path, config: DataConfig, to_train: bool) -> Found:
    """leftImg8bit/ROLE/CITY/NAME_leftImg8bit.png, gtFine/ROLE/CITY/NAME_gtFine_labelIds.png; 19 of the 34 labels.

    The test labels are withheld (the files there are blank), so the role is left out.
    """
    from torchvision.datasets import Cityscapes

    used = sorted((c for c in Cityscapes.classes if 0 <= c.train_id < 255), key=lambda c: c.train_id)
    ids = tuple(c.id for c in used)
    void = tuple(c.id % 256 for c in Cityscapes.classes if c.id not in ids)  # -1 is 255 in a file of 8 bits
    legend = Legend(tuple(c.name for c in used), ids, void, tuple(c.color for c in used), sequence=_CITY_SEQUENCE)
    images, masks = (_role_folders(root / kind, config, to_train) for kind in ("leftImg8bit", "gtFine"))
    if config.test_split == "test":
        images.pop("test", None), masks.pop("test", None)
    ending = "_gtFine_labelIds"
    return Found(_files(images, cut="_leftImg8bit"), _files(masks, ".png", cut=ending, only=ending), legend)


def _voc(root: Path, config: DataConfig) -> Found:
    """JPEGImages/NAME.jpg and SegmentationClass/NAME.png, with the names of a role in ImageSets/Segmentation/ROLE.txt.

    Of a list the masks that are there count; of the images that no list names nothing is read.
    """
    from torchvision.models.segmentation import FCN_ResNet50_Weights

    lists = root / "ImageSets" / "Segmentation"
    images: dict[str, Files] = {}
    masks: dict[str, Files] = {}
    there_are = [path.stem for path in lists.glob("*.txt")]
    for role in ROLES:
        split = split_of(role, getattr(config, f"{role}_split"), there_are, f"list in {lists}")
        if split is None:
            continue
        names = (lists / f"{split}.txt").read_text().split()
        found = {kind: {name: root / kind / f"{name}{ending}" for name in names} for kind, ending in _VOC.items()}
        there = [{name: path for name, path in files.items() if path.is_file()} for files in found.values()]
        if there[1]:  # test has none
            images[role], masks[role] = there
    names = FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"]
    first = next((path for path in masks.get("train", {}).values()), None)
    if first is None:
        raise DataError(
            f"{lists} lists no mask to train on: expected {config.train_split}.txt; download the data again"
        )
    ids = tuple(range(len(names)))
    return Found(images, masks, Legend(tuple(names), ids, palette=png_palette(first, ids)))


_CITY_SEQUENCE = r"(.+)_\d+$"  # names are CITY_SEQUENCE_FRAME
_VOC = {"JPEGImages": ".jpg", "SegmentationClass": ".png"}


def _role_folders(root: Path, config: DataConfig, to_train: bool) -> dict[str, Path]:
    """The folder of each role that has one; where there are none, all is for train."""
    inside = [path.name for path in root.iterdir() if path.is_dir()]
    named = {role: split_of(role, getattr(config, f"{role}_split"), inside, f"folder in {root}") for role in ROLES}
    folders = {role: root / name if name else None for role, name in named.items()}
    if folders["train"] is None and any(folders.values()):
        if not to_train:
            return {role: folder for role, folder in folders.items() if folder}
        known = nearest(config.train_split, inside)
        raise DataError(f"{root} has no folder {config.train_split!r}: expected one beside the others; {known}")
    return {role: folder for role, folder in {**folders, "train": folders["train"] or root}.items() if folder}


def _files(folders: dict[str, Path], ending: str = "", cut: str = "", only: str = "") -> dict[str, Files]:
    return {role: _named(folder, ending, cut, only) for role, folder in folders.items()}


def _named(folder: Path, ending: str, cut: str, only: str) -> Files:
    """The image files below a folder by their paths in it, without the ending and what is `cut` from it."""
    named: Files = {}
    found: Iterable[Path] = find_images(folder)[0]
    for path in found:
        if (ending and path.suffix.lower() != ending) or not path.stem.endswith(only):
            continue
        name = path.relative_to(folder).with_suffix("").as_posix().removesuffix(cut)
        if twin := named.get(name):
            raise DataError(f"{twin} and {path.name} have the same name: expected one of them; remove the other")
        named[name] = path
    return named
