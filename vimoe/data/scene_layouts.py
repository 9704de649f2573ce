"""Layouts of data sets for segmentation: ADE20K, Pascal VOC, Cityscapes, and Hugging Face tables."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vimoe.config.data import DataConfig, joined
from vimoe.config.masks import IGNORE, Colour
from vimoe.data.image_files import find_images, is_hidden
from vimoe.data.images import Source, source_path
from vimoe.data.legends import legend_in
from vimoe.data.masks import Legend
from vimoe.data.scene_tables import Files, scene_tables
from vimoe.data.splits import ROLES, check_once, split_of
from vimoe.errors import ConfigError, DataError, beside, counted, nearest
from vimoe.files import read_names

LAYOUTS = {  # the folders of images and of masks
    "ADE20K": ("images", "annotations"),
    "Cityscapes": ("leftImg8bit", "gtFine"),
    "Pascal VOC": ("JPEGImages", "SegmentationClass"),
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SceneFiles:
    """Image and mask files of each role, not yet paired.

    Attributes:
        root: folder from which files are named.
        images, masks: files by role.
        legend: meaning of the masks' values, if the data set has one.
        undivided: True for data without splits, all of which are then under "train".
        junk: number of other files among the images, by kind.
        unread: image files among the masks that do not end as masks do.
    """

    root: Path
    images: dict[str, Files]
    masks: dict[str, Files]
    legend: Legend | None
    undivided: bool = False
    junk: Counter[str] = field(default_factory=Counter)
    unread: list[Path] = field(default_factory=list)

    def not_read(self, images: Iterable[Source]) -> str:
        """Return a note on masks of these images that were passed over for their ending; "" without any."""
        names = {source_path(image).stem for image in images}
        same = [path for path in self.unread if path.stem in names]
        if not same:
            return ""
        were = counted(len(same), "file of such a name was", "files of such names were")
        where = same[0].relative_to(self.root)
        return f"; {were} passed over, such as {where}: save masks as .png, because other formats change values"


def find_scenes(config: DataConfig, to_train: bool = True) -> SceneFiles:
    """Find images and masks in `config.path`: in one of `LAYOUTS`, or a table.

    Args:
        config: settings of the data.
        to_train: True to require the configured splits, and one for train if there are splits; False for data other
            than a run's, in which usual names are looked for where a configured split is missing.

    Raises:
        DataError: if the folder is missing or has none of the layouts, or a configured split is missing.
        ConfigError: if a column is named for data that are no table.
    """
    if config.path.startswith("hfds/"):
        return _table(config, to_train)
    root = Path(config.path)
    if not config.path or not root.is_dir():
        raise DataError(
            f"data.path={config.path!r}: no such folder: expected one with images/ and annotations/; {beside(root)}"
        )
    for name in ("image_column", "label_column"):
        if given := getattr(config, name):
            raise ConfigError(f"data.{name}={given!r} with a folder: expected it for a table (hfds/); leave it out")
    if _is("ADE20K", root):
        return _ade20k(root, config, to_train)
    if _is("Cityscapes", root):
        return _cityscapes(root, config, to_train)
    for year in (root, *sorted(root.glob("VOC2*")), *sorted(root.glob("VOCdevkit/VOC2*"))):
        if _is("Pascal VOC", year):
            return _voc(year, config, to_train)
    raise DataError(
        f"{root} has no known layout of masks: expected images/ and annotations/ (as ADE20K), leftImg8bit/ and gtFine/ "
        f"(Cityscapes) or VOCdevkit/VOC2012/; {nearest('images', (p.name for p in root.iterdir() if p.is_dir()))}"
    )


def _is(layout: str, root: Path) -> bool:
    return all((root / name).is_dir() for name in LAYOUTS[layout])


def _ade20k(root: Path, config: DataConfig, to_train: bool) -> SceneFiles:
    """Find images/ROLE/NAME.jpg and annotations/ROLE/NAME.png, also in subfolders of ROLE."""
    images, masks = _role_folders(root, "ADE20K", config, to_train)
    if "test" in images and "test" not in masks:
        logger.info("%s has no masks in annotations: left out", images.pop("test"))
    legend = legend_in(root)
    junk: Counter[str] = Counter()
    unread: list[Path] = []
    whole = images.get("train") == root / "images"
    masked = _files(masks, Counter(), ".png", unread=unread)
    return SceneFiles(root, _files(images, junk), masked, legend, whole, junk, unread)


def _table(config: DataConfig, to_train: bool) -> SceneFiles:
    """Find the scenes of a table: one per row, with columns of images and masks; its folder may hold a legend."""
    root, splits = scene_tables(config.path.removeprefix("hfds/"), config.image_column, config.label_column)
    images: dict[str, Files] = {}
    masks: dict[str, Files] = {}
    roles = _roles(splits, config if to_train else _with_usual_names(config, splits), "split", config.path, to_train)
    for role, split in roles.items():
        for kind, files in enumerate((images, masks)):
            chosen = splits.values() if split is None else [splits[split]]
            files[role] = {name: file for both in chosen for name, file in both[kind].items()}
    if "test" in masks and not masks["test"]:
        logger.info("%s has no masks in test: left out", config.path)
        del images["test"], masks["test"]
    legend = legend_in(root)
    return SceneFiles(root, images, masks, legend, None in roles.values())


def _cityscapes(root: Path, config: DataConfig, to_train: bool) -> SceneFiles:
    """Find leftImg8bit/ROLE/CITY/NAME_leftImg8bit.png and gtFine/ROLE/CITY/NAME_gtFine_labelIds.png.

    19 of the 34 labels are classes, the others void. The test labels are withheld (their files are blank), so test is
    left out.
    """
    from torchvision.datasets import Cityscapes

    used = sorted((c for c in Cityscapes.classes if 0 <= c.train_id < 255), key=lambda c: c.train_id)
    ids = tuple(c.id for c in used)
    void = tuple(c.id % 256 for c in Cityscapes.classes if c.id not in ids)  # -1 is 255 in a file of 8 bits
    legend = Legend(tuple(c.name for c in used), ids, void, tuple(c.color for c in used), sequence=_CITY_SEQUENCE)
    images, masks = _role_folders(root, "Cityscapes", config, to_train)
    if images.get("test", root).name == "test":
        images.pop("test", None), masks.pop("test", None)
    ending = "_gtFine_labelIds"
    junk: Counter[str] = Counter()
    pictures = _files(images, junk, cut="_leftImg8bit")
    whole = images.get("train") == root / "leftImg8bit"
    masked = _files(masks, Counter(), ".png", cut=ending, only=ending)
    return SceneFiles(root, pictures, masked, legend, whole, junk)


def _voc(root: Path, config: DataConfig, to_train: bool) -> SceneFiles:
    """Find JPEGImages/NAME.jpg and SegmentationClass/NAME.png, for the names in ImageSets/Segmentation/ROLE.txt.

    Images that no list names are not read. The test labels are withheld; without any, test is left out.
    """
    from torchvision.models.segmentation import FCN_ResNet50_Weights

    lists = root / "ImageSets" / "Segmentation"
    images: dict[str, Files] = {}
    masks: dict[str, Files] = {}
    available = [path.stem for path in lists.glob("*.txt")]
    config = config if to_train else _with_usual_names(config, available)
    for role, split in _named(config, available, f"list in {lists}").items():
        names = read_names(lists / f"{split}.txt")
        for files, kind, ending in ((images, "JPEGImages", ".jpg"), (masks, "SegmentationClass", ".png")):
            paths = {name: root / kind / f"{name}{ending}" for name in names}
            files[role] = {name: path for name, path in paths.items() if path.is_file()}
        if role == "test" and not masks[role]:
            logger.info("%s has no masks of %s.txt: left out", root, split)
            del images[role], masks[role]
        elif gone := [name for name in names if name not in images[role] and name not in masks[role]]:
            raise DataError(
                f"{lists}/{split}.txt: {len(gone)} of {len(names)} names have neither image nor mask, such as "
                f"{gone[0]!r}: expected JPEGImages/NAME.jpg and SegmentationClass/NAME.png, one name per line; "
                f"correct the list, or download the data again"
            )
    if to_train and not masks.get("train"):
        raise DataError(
            f"{lists} lists no mask to train on: expected {config.train_split}.txt; download the data again"
        )
    names = FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"]
    ids = tuple(range(len(names)))
    return SceneFiles(root, images, masks, Legend(tuple(names), ids, palette=tuple(map(_voc_colour, (*ids, IGNORE)))))


def _voc_colour(value: int) -> Colour:
    """Return Pascal VOC's colour of a value: its bits go in turn to red, green and blue, from their top bits down."""
    red, green, blue = (sum((value >> 3 * i + c & 1) << 7 - i for i in range(8)) for c in range(3))
    return red, green, blue


_CITY_SEQUENCE = r"(.+?)(?:_\d+)?$"  # names are CITY_SEQUENCE_FRAME; any other name is its own sequence


def _role_folders(
    root: Path, layout: str, config: DataConfig, to_train: bool
) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return the folders of images and of masks of each role that has one; without any, the whole is for train."""
    kinds = [root / name for name in LAYOUTS[layout]]
    inside = [[path.name for path in kind.iterdir() if path.is_dir()] for kind in kinds]
    config = config if to_train else _with_usual_names(config, *inside)
    images, masks = (
        {role: kind / (name or "") for role, name in _roles(names, config, "folder", kind, to_train).items()}
        for kind, names in zip(kinds, inside, strict=True)
    )
    return images, masks


def _with_usual_names(config: DataConfig, *listed: Iterable[str]) -> DataConfig:
    """Return settings for data other than a run's: usual names in place of splits that not all of these lists have.

    "none" has its usual name, too, unless that split has another role.
    """
    names = set.intersection(*map(set, listed))
    found = {role: name for role in ROLES if (name := getattr(config, f"{role}_split")) in names}
    usual = {role: split_of(role, role, names, "") or role for role in ROLES if role not in found}
    usual = {role: "none" if split in found.values() else role for role, split in usual.items()}
    return replace(config, **{f"{role}_split": name for role, name in {**found, **usual}.items()})


def _roles(
    names: Iterable[str], config: DataConfig, word: str, where: str | Path, to_train: bool
) -> dict[str, str | None]:
    """Return the split of each role that has one; {"train": None}, for all of the data, without any."""
    splits = list(names)
    roles = _named(config, splits, f"{word} in {where}")
    if roles and "train" not in roles and to_train:
        known = nearest(config.train_split, splits)
        raise DataError(f"{where} has no {word} {config.train_split!r}: expected one beside the others; {known}")
    without = [split for split in splits if split not in roles.values() and not is_hidden(split)]
    if roles and without:
        logger.warning("%s: %s without a role: %s; left out", where, word, ", ".join(sorted(without)))
    return {**roles} or {"train": None}


def _named(config: DataConfig, splits: Sequence[str], where: str) -> dict[str, str]:
    """Return the split of each role that has one."""
    roles = {}
    for role in ROLES:
        name = getattr(config, f"{role}_split")
        if name not in splits and len(joined(name)) > 1 and all(joined(name)):
            raise ConfigError(
                f"data.{role}_split={name!r} with data.task='segmentation': expected one {where}; classification alone "
                f"joins several"
            )
        if split := split_of(role, name, splits, where):
            roles[role] = split
    check_once({role: (split,) for role, split in roles.items()})
    return roles


def _files(
    folders: dict[str, Path], junk: Counter[str], ending: str = "", cut: str = "", only: str = "",
    unread: list[Path] | None = None,
) -> dict[str, Files]:  # fmt: skip
    return {role: _by_name(folder, junk, ending, cut, only, unread) for role, folder in folders.items()}


def _by_name(
    folder: Path, junk: Counter[str], ending: str, cut: str, only: str, unread: list[Path] | None = None
) -> Files:
    """Return the image files in a folder and its subfolders by name.

    Args:
        folder: the folder.
        junk: number of other files by kind; added to.
        ending: ending of the files that count; "" for any.
        cut: end of a file's stem that is not part of the name.
        only: end of the stems that count.
        unread: image files of other endings are added to it.

    Raises:
        DataError: if two files have one name.
    """
    named: Files = {}
    found, others = find_images(folder)
    junk.update(others)
    for path in found:
        if ending and path.suffix.lower() != ending:
            if unread is not None:
                unread.append(path)
            continue
        if not path.stem.endswith(only):
            continue
        name = path.relative_to(folder).with_suffix("").as_posix().removesuffix(cut)
        if twin := named.get(name):
            raise DataError(f"{twin} and {path.name} have the same name: expected one of them; remove one")
        named[name] = path
    return named
