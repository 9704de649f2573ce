"""Labelled images in three roles: train, validation (which decides) and test (which is only reported)."""

from __future__ import annotations

import logging
import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from vimoe.config import DataConfig
from vimoe.errors import DataError, beside, nearest
from vimoe.images import Tried, find_images, is_hidden, kind_of_junk, try_images

logger = logging.getLogger(__name__)

# other names that data sets in the wild use for a role; the configured name comes first
SYNONYMS = {"train": ("training",), "val": ("valid", "validation"), "test": ("testing",)}
Sample = tuple["Path | Image.Image", int]
LOOSE = "images beside the class folders"  # the kind of junk that may be meant as data
ClassFiles = dict[str, list[Path]]  # the image files of each class folder, by its name


@dataclass(frozen=True)
class Data:
    """The images of each role; labels index `classes`, which train defines for all roles.

    Args:
        classes: their names.
        train, val, test: (image or file, label) of each image.
        split_off: whether validation was taken from train.
        junk: what lies in the folders beside images, as `find_images` counts it.
        tried: what came of opening all images, where that was needed to leave out those that cannot be read.
    """

    classes: tuple[str, ...]
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    test: tuple[Sample, ...]
    split_off: bool = False
    junk: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)
    tried: Tried | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        roles = f"{len(self.train)} train, {len(self.val)} validation, {len(self.test)} test"
        return f"{roles} images of {len(self.classes)} classes"


def load_data(config: DataConfig, classes: Sequence[str] | None = None, validation: Iterable[str] = ()) -> Data:
    """Finds the images and gives each a role.

    Args:
        config: where they are.
        classes: the class map of a trained model; without it, train's class folders in sorted order.
        validation: files (relative to `config.path`) that a run split off train, so that it finds the same again.

    Raises:
        DataError: where folders are missing, empty, or hold a class that is not in the map; or where a class has no
            image left of those that can be read.
    """
    if not config.path:
        raise DataError("data.path is empty: expected a folder of class folders, or 'digits'")
    root = Path(config.path)
    if config.path == "digits":
        return _digits(config)
    if not root.is_dir():
        raise DataError(f"data.path={config.path!r}: no such folder; {beside(root)}")
    folders = {role: _role_folder(root, role, getattr(config, f"{role}_split")) for role in ("train", "val", "test")}
    train_folder = folders["train"] or root
    if folders["train"] is None and any(folders.values()):
        raise DataError(f"{root} has no folder {config.train_split!r}: expected one beside the others; {_inside(root)}")
    present = {role: folder for role, folder in {**folders, "train": train_folder}.items() if folder}
    junk: Counter[str] = Counter()
    found = {role: _class_files(folder, junk) for role, folder in present.items()}
    names = tuple(classes or found["train"])
    _check_names(train_folder, found["train"])
    if empty := [name for name, files in found["train"].items() if not files]:
        raise DataError(f"{train_folder / empty[0]} holds no image: expected some, or no such folder")
    if len(names) < 2 and classes is None:
        raise DataError(f"{train_folder}: {len(names)} class folders with images: expected at least 2; {_inside(root)}")
    tried = None
    if config.skip_unreadable:
        found, tried = _leave_out_unreadable(found, root)
    train, val, test = (
        _samples(present[role], found[role], names) if role in present else [] for role in ("train", "val", "test")
    )
    split_off = not val
    if split_off:
        train, val = _split_off(train, root, config, set(validation))
    return Data(names, tuple(_subset(train, config)), tuple(val), tuple(test), split_off, junk, tried)


def load_folder(
    path: str | Path, classes: Sequence[str], skip_unreadable: bool = False
) -> tuple[str, tuple[Sample, ...]]:
    """All images of one folder of class folders, or of its test (else validation) folder, by a model's class map.

    Args:
        path: the folder.
        classes: the class map.
        skip_unreadable: open all images first, and leave out those that cannot be read.

    Returns:
        Which they are ("test", "validation", or "all" for a plain folder), and the images.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder: expected class folders with images; {beside(root)}")
    roles = {"test": _role_folder(root, "test", "test"), "validation": _role_folder(root, "val", "val"), "all": root}
    name, folder = next((name, folder) for name, folder in roles.items() if folder)
    found = {name: _class_files(folder, Counter())}
    if skip_unreadable:
        found, _ = _leave_out_unreadable(found, root)
    return name, tuple(_samples(folder, found[name], tuple(classes)))


def list_images(paths: Iterable[str | Path]) -> list[Path]:
    """The image files among files and folders, folders searched through. Raises DataError for what is missing."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside, _ = find_images(path)
            if not inside:
                raise DataError(f"{path} holds no image: expected files such as .jpg or .png")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{path}: no such file; {beside(path)}")
    return found


def _role_folder(root: Path, role: str, name: str) -> Path | None:
    if name == "none":
        return None
    for candidate in (name, *(SYNONYMS[role] if name == role else ())):
        if (root / candidate).is_dir():
            return root / candidate
    if name != role:
        raise DataError(f"data.{role}_split={name!r}: no such folder in {root}; {_inside(root, name)}")
    return None


def _inside(root: Path, word: str = "") -> str:
    return nearest(word, sorted(p.name for p in root.iterdir() if p.is_dir()))


def _class_files(folder: Path, junk: Counter[str]) -> ClassFiles:
    """The image files of each folder inside, in sorted order; adds what else is there to `junk`.

    One walk, since a walk of millions is slow.
    """
    found: ClassFiles = {}
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            junk[kind_of_junk(path.name) or LOOSE] += 1
        elif is_hidden(path.name):
            junk["hidden folders"] += 1
        elif folder.resolve().is_relative_to(path.resolve()):  # it would hold the images of all classes
            junk["links to folders"] += 1
        else:
            found[path.name], others = find_images(path)
            junk.update(others)
    return found


def _leave_out_unreadable(found: dict[str, ClassFiles], folder: Path) -> tuple[dict[str, ClassFiles], Tried]:
    tried = try_images([file for files in found.values() for names in files.values() for file in names], folder)
    if tried.errors:
        logger.warning("%s; left out", tried)
    readable = {
        role: {name: [file for file in listed if file in tried.digests] for name, listed in files.items()}
        for role, files in found.items()
    }
    for name, files in readable.get("train", {}).items():
        if not files:
            raise DataError(f"no image of class {name!r} can be read: expected some, or no such folder; {tried}")
    return readable, tried


def _check_names(folder: Path, names: Iterable[str]) -> None:
    known: dict[str, str] = {}
    for name in names:
        twin = known.setdefault(_folded(name), name)
        if twin != name:
            raise DataError(
                f"{folder}: classes {twin!a} and {name!a} differ only by case or Unicode normalisation: expected one "
                f"folder for each class; merge or rename them"
            )


def _folded(name: str) -> str:
    """What names have in common that some file systems and most people take for the same."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).lower())


def _samples(folder: Path, found: dict[str, list[Path]], classes: tuple[str, ...]) -> list[Sample]:
    known = set(classes)
    for name, files in found.items():
        if files and name not in known:
            _check_names(folder, (*classes, name))
            raise DataError(f"{folder / name}: no class {name!r} in the class map from train; {nearest(name, classes)}")
    samples: list[Sample] = [(f, label) for label, name in enumerate(classes) for f in found.get(name, [])]
    if not samples:
        raise DataError(f"{folder}: no image in any class folder; expected folders named {', '.join(classes[:3])}, ...")
    return samples


def _split_off(
    train: list[Sample], root: Path, config: DataConfig, listed: set[str]
) -> tuple[list[Sample], list[Sample]]:
    """Takes validation from train: the listed files where a run names them, else a seeded share of each class."""
    if listed:
        val = [s for s in train if isinstance(s[0], Path) and str(s[0].relative_to(root)) in listed]
        if len(val) != len(listed):
            raise DataError(
                f"{root}: {len(listed) - len(val)} of the run's {len(listed)} validation images are gone or damaged: "
                f"expected the folder as it was in training; restore it, or train again"
            )
        held_out = {id(sample) for sample in val}
        return [s for s in train if id(s) not in held_out], val
    kept, val = _draw(train, lambda n: min(n - 1, max(1, round(n * config.val_fraction))), config.seed)
    if not val:
        raise DataError(f"{root}: no class has two images: expected some to split validation off; add {root / 'val'}")
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
