"""Labelled images in three roles: train, validation (which decides) and test (which is only reported)."""

from __future__ import annotations

import logging
import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from vimoe.config.data import DataConfig
from vimoe.data.archives import archives, find_archives, is_archive
from vimoe.data.images import Source, Tried, find_images, is_hidden, name_within, passed_over, try_images
from vimoe.data.listing import LOOSE, SYNONYMS, ClassImages, Listing, check_levels, folder, is_split
from vimoe.data.tables import INSTEAD, MNISTS, csv_file, hugging_face, torchvision_files
from vimoe.errors import DataError, beside, nearest

logger = logging.getLogger(__name__)

Sample = tuple[Source | Image.Image, int]


@dataclass(frozen=True)
class Data:
    """The images of each role; labels index `classes`, which train defines for all roles.

    Args:
        classes: their names.
        train, val, test: (image or where it is, label) of each image.
        root: the data folder or file, from which images are named.
        split_off: whether validation was taken from train.
        junk: what is there beside images, as `find_images` counts it.
        tried: what came of opening all images, where that was needed to leave out those that cannot be read.
    """

    classes: tuple[str, ...]
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    test: tuple[Sample, ...]
    root: Path = Path()
    split_off: bool = False
    junk: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)
    tried: Tried | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        roles = f"{len(self.train)} train, {len(self.val)} validation, {len(self.test)} test"
        return f"{roles} images of {len(self.classes)} classes"

    def names(self, samples: Iterable[Sample]) -> list[str]:
        """What images that are not in memory are called, in lists that outlast this process."""
        return [name_within(self.root, source) for source, _ in on_disk(samples)]


def load_data(config: DataConfig, classes: Sequence[str] | None = None, validation: Iterable[str] = ()) -> Data:
    """Finds the images and gives each a role.

    Args:
        config: where they are.
        classes: the class map of a trained model; without it, train's classes in the order of the data.
        validation: names (as `Data.names` gives them) that a run split off train, so that it finds the same again.

    Raises:
        DataError: where images, splits or labels are missing, damaged, or of a class that is not in the map; or where a
            class has no image left of those that can be read.
    """
    if config.path == "digits":
        return _digits(config)
    listing = list_data(config)
    chosen = {role: _split(listing, role, getattr(config, f"{role}_split")) for role in ("train", "val", "test")}
    if chosen["train"] is None and (others := {role: split for role, split in chosen.items() if split}):
        role, split = next(iter(others.items()))
        raise DataError(
            f"{listing.name} has no {listing.word} {config.train_split!r}: expected one beside {split!r}; "
            f"{nearest('', listing.splits)}; if {split!r} is a class, set --data.{role}_split none"
        )
    present = {role: split for role, split in chosen.items() if split or role == "train"}
    found = {role: listing.classes(split) for role, split in present.items()}
    where = {role: listing.where(split) for role, split in present.items()}
    names = tuple(classes or found["train"])
    _check_names(where["train"], found["train"])
    if empty := [name for name, images in found["train"].items() if not images]:
        raise DataError(
            f"{where['train']}/{empty[0]} holds no image{passed_over(listing.junk)}: expected some, or no such folder"
        )
    if set(names) == {"annotations", "images"}:
        raise DataError(
            f"{where['train']} has images/ and annotations/: expected a folder for each class; to learn masks, set "
            f"--data.task segmentation"
        )
    check_levels(listing, found["train"], where["train"])
    if not names and chosen["train"] and listing.junk[LOOSE]:
        raise DataError(
            f"{where['train']} holds {listing.junk[LOOSE]} images and no class folder: expected a folder for each "
            f"class; if {chosen['train']!r} is a class itself, set --data.train_split none"
        )
    if len(names) < 2 and classes is None:
        raise DataError(
            f"{where['train']}: {len(names)} classes with images{passed_over(listing.junk)}: expected at least 2; "
            f"{nearest('', listing.splits)}"
        )
    tried = None
    if config.skip_unreadable:
        found, tried = _leave_out_unreadable(found, listing.root)
    train, val, test = (
        _samples(where[role], found[role], names) if role in present else [] for role in ("train", "val", "test")
    )
    if chosen["train"] and classes is None:  # once, before training: later verbs need not walk them again
        _tell_without_role(listing, chosen)
    split_off = not val
    if split_off:
        train, val = _split_off(train, listing, config, set(validation))
    return Data(
        names, tuple(_subset(train, config)), tuple(val), tuple(test), listing.root, split_off, listing.junk, tried
    )


def load_folder(
    path: str | Path, classes: Sequence[str], config: DataConfig | None = None
) -> tuple[str, tuple[Sample, ...]]:
    """All images at a data path without roles, or those of its test (else validation) split, by a model's class map.

    Args:
        path: as `DataConfig.path`.
        classes: the class map.
        config: how to read them: the names of columns, and whether to leave out what cannot be read.

    Returns:
        Which they are ("test", "validation", or "all" for data without roles), and the images.
    """
    config = replace(config or DataConfig(), path=str(path))
    if config.path == "digits":
        return "test", _by_names(_digits(config), classes)
    listing = list_data(config)
    splits = {"test": _split(listing, "test", "test"), "validation": _split(listing, "val", "val"), "all": None}
    name, split = next((name, split) for name, split in splits.items() if split or name == "all")
    found = {name: listing.classes(split)}
    check_levels(listing, found[name], listing.where(split))
    if config.skip_unreadable:
        found, _ = _leave_out_unreadable(found, listing.root)
    return name, tuple(_samples(listing.where(split), found[name], tuple(classes)))


def _by_names(digits: Data, classes: Sequence[str]) -> tuple[Sample, ...]:
    """The test digits with the labels that a model's class map gives them."""
    if missing := set(digits.classes) - set(classes):
        raise DataError(f"digits: no class {min(missing)!r} in the class map from train; {nearest('', classes)}")
    return tuple((image, list(classes).index(digits.classes[label])) for image, label in digits.test)


def list_data(config: DataConfig) -> Listing:
    """What is at `config.path`: any of the kinds that it can be.

    Raises:
        DataError: where it is none of them, or cannot be read as the one that it is.
    """
    path, root = config.path, Path(config.path)
    if not path:
        raise DataError("data.path is empty: expected a folder of class folders, a .csv or .tar file, or 'digits'")
    if path.startswith("hfds/"):
        return hugging_face(path.removeprefix("hfds/"), config.image_column, config.label_column)
    if path.startswith("torch/") and path.removeprefix("torch/").partition(":")[0] in MNISTS:
        return torchvision_files(path.removeprefix("torch/"))
    if refused := next((why for prefix, why in INSTEAD.items() if path.startswith(prefix)), None):
        raise DataError(f"data.path={path!r} cannot be read: {refused}")
    if root.is_dir():
        inside = find_archives(root)
        return archives(root, inside) if inside else folder(root)
    if not root.is_file():
        raise DataError(f"data.path={path!r}: no such folder or file; {beside(root)}")
    if is_archive(root):
        return archives(root, [root])
    if root.suffix.lower() == ".csv":
        splits = {config.train_split, config.val_split, config.test_split} - {"none"}
        return csv_file(root, config.image_column or "path", config.label_column or "label", splits)
    raise DataError(f"data.path={path!r} is a file: expected a folder, a .csv or a .tar file; unpack it, or list it")


def absolute(path: str) -> str:
    """A data path that means the same from any working directory."""
    place = local(path)
    if place is None or not place.exists():  # of the hub
        return path
    return path[: _start(path)] + str(place.resolve() if place.is_dir() else place.parent.resolve() / place.name)


def local(path: str) -> Path | None:
    """Return the file or folder that a data path names, without the kind before it; None for data of no file."""
    return None if path in ("", "digits") else Path(path[_start(path) :])


def _start(path: str) -> int:
    """Return where the file or folder begins in a data path, after its kind."""
    return path.index(":") + 1 if path.startswith("torch/") and ":" in path else 5 if path.startswith("hfds/") else 0


def on_disk(samples: Iterable[Sample]) -> list[tuple[Source, int]]:
    """Those of the images that are not in memory."""
    return [(source, label) for source, label in samples if not isinstance(source, Image.Image)]


def list_images(paths: Iterable[str | Path]) -> list[Path]:
    """The image files among files and folders, folders searched through. Raises DataError for what is missing."""
    found: list[Path] = []
    for path in map(Path, map(_named, paths)):
        if path.is_dir():
            inside, junk = find_images(path)
            if not inside:
                raise DataError(f"{path} holds no image{passed_over(junk)}: expected files such as .jpg or .png")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{path}: no such file; {beside(path)}")
    return found


def _named(path: str | Path) -> str | Path:
    if not str(path):  # an unset variable of a shell; pathlib takes it for the working directory
        raise DataError("an empty path: expected an image file or a folder; name it")
    return path


def split_of(role: str, name: str, splits: Iterable[str], where: str) -> str | None:
    """Return the split that has a role ("train", "val", "test"), by the configured name or a synonym; None without one.

    Where the name is the role's own, small and capital letters are alike; of several splits that fit the one in small
    letters has the role.

    Args:
        role: which.
        name: as configured; "none" where it is to have none.
        splits: those that there are.
        where: what an error calls these: "folder in photos".

    Raises:
        DataError: where `name` is not the role's own and there is no such split.
    """
    splits = list(splits)
    if name == "none":
        return None
    folded = {split.lower(): split for split in sorted(splits)}  # of several the one in small letters, which sorts last
    for candidate in (role, *SYNONYMS[role]) if name == role else ():
        if candidate in folded:
            return folded[candidate]
    if name in splits:
        return name
    if name != role:
        raise DataError(f"data.{role}_split={name!r}: no such {where}; {nearest(name, splits)}")
    return None


def _split(listing: Listing, role: str, name: str) -> str | None:
    return split_of(role, name, listing.splits, f"{listing.word} in {listing.name}")


def _tell_without_role(listing: Listing, chosen: Mapping[str, str | None]) -> None:
    """Counts images in parts that have no role, and says how to give them one."""
    for split in listing.splits:
        if split in chosen.values() or is_hidden(split):
            continue
        inside = replace(listing, junk=Counter())
        try:
            images = sum(map(len, inside.classes(split).values())) + inside.junk[LOOSE]
        except (DataError, OSError):  # a table whose labels are kept secret, a folder of somebody else's
            continue
        if images:
            listing.junk[f"images in {split}, which has no role"] += images
            free = next((role for role in ("val", "test", "train") if chosen[role] is None), None)
            remedy = f"; to use them, set --data.{free}_split {split}" if free and not is_split(split) else ""
            logger.warning("%s has no role, and its %d images are left out%s", listing.where(split), images, remedy)


def _leave_out_unreadable(found: dict[str, ClassImages], root: Path) -> tuple[dict[str, ClassImages], Tried]:
    tried = try_images([image for classes in found.values() for images in classes.values() for image in images], root)
    if tried.errors:
        logger.warning("%s; left out", tried)
    readable = {
        role: {name: [image for image in images if image in tried.digests] for name, images in classes.items()}
        for role, classes in found.items()
    }
    for name, images in readable.get("train", {}).items():
        if not images:
            raise DataError(f"no image of class {name!r} can be read: expected some, or no such folder; {tried}")
    return readable, tried


def _check_names(where: str, names: Iterable[str]) -> None:
    known: dict[str, str] = {}
    for name in names:
        twin = known.setdefault(_folded(name), name)
        if twin != name:
            raise DataError(
                f"{where}: classes {twin!a} and {name!a} differ only by case or Unicode normalisation: expected one "
                f"name for each class; merge or rename them"
            )


def _folded(name: str) -> str:
    """What names have in common that some file systems and most people take for the same."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).lower())


def _samples(where: str, found: ClassImages, classes: tuple[str, ...]) -> list[Sample]:
    known = set(classes)
    for name, images in found.items():
        if images and name not in known:
            _check_names(where, (*classes, name))
            raise DataError(f"{where}: no class {name!r} in the class map from train; {nearest(name, classes)}")
    samples: list[Sample] = [(i, label) for label, name in enumerate(classes) for i in found.get(name, [])]
    if not samples:
        raise DataError(
            f"{where}: no image in any class; expected classes named {', '.join(classes[:3])}, ...; add or remove it"
        )
    return samples


def _split_off(
    train: list[Sample], listing: Listing, config: DataConfig, listed: set[str]
) -> tuple[list[Sample], list[Sample]]:
    """Takes validation from train: the listed images where a run names them, else a seeded share of each class."""
    if listed:
        val = [s for s in train if not isinstance(s[0], Image.Image) and name_within(listing.root, s[0]) in listed]
        if len(val) != len(listed):
            raise DataError(
                f"{listing.name}: {len(listed) - len(val)} of the run's {len(listed)} validation images are gone or "
                f"damaged: expected the data as they were in training; restore them, or train again"
            )
        held_out = {id(sample) for sample in val}
        return [s for s in train if id(s) not in held_out], val
    kept, val = _draw(train, lambda n: min(n - 1, max(1, round(n * config.val_fraction))), config.seed)
    if not val:
        raise DataError(
            f"{listing.name}: no class has two images: expected some to split validation off; add a "
            f"{listing.word} 'val'"
        )
    return kept, val


def _subset(train: list[Sample], config: DataConfig) -> list[Sample]:
    most = config.images_per_class
    return train if most is None else _draw(train, lambda n: min(n, most), config.seed + 1)[1]


def _draw(samples: list[Sample], how_many: Any, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(the others, the drawn), `how_many(n)` of the n samples of each class, both in their first order."""
    by_class: dict[int, list[int]] = defaultdict(list)
    for index, (_, label) in enumerate(samples):
        by_class[label].append(index)
    rng = random.Random(seed)
    drawn = {i for members in by_class.values() for i in rng.sample(members, how_many(len(members)))}
    return [s for i, s in enumerate(samples) if i not in drawn], [s for i, s in enumerate(samples) if i in drawn]


def _digits(config: DataConfig) -> Data:
    """scikit-learn's 1,797 handwritten digits, 8x8: two fifths for test, a fifth for validation, the rest to train."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    grey = (pixels.reshape(-1, 8, 8) * (255 / 16)).round().astype("uint8")
    samples: list[Sample] = [(Image.fromarray(g).convert("RGB"), int(y)) for g, y in zip(grey, labels, strict=True)]
    rest, test = _draw(samples, lambda n: round(n * 0.4), seed=0)
    train, val = _draw(rest, lambda n: round(n / 3), config.seed)
    return Data(tuple("0123456789"), tuple(_subset(train, config)), tuple(val), tuple(test))
