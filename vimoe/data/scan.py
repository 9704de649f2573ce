"""Problems of the images of a classification, found before training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vimoe.data.image_check import CheckedImages, check_images
from vimoe.data.images import THIN, Source, is_thin
from vimoe.data.labelled_images import Data, Sample, on_disk
from vimoe.data.listing import LOOSE
from vimoe.errors import DataError, counted

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Scan:
    """Numbers of images and of problems.

    Args:
        train, validation, test: number of images of each role.
        classes: number of classes in the class map.
        opened: number of images that were opened, now or in an earlier scan of the unchanged file; images in memory
            do not count.
        unreadable: number of images that were left out because they cannot be read.
        validation_in_train, test_in_train: number of images of the role that are byte for byte in train too.
        contradicting: number of train images that are byte for byte in several classes.
        junk: number of files and folders that were passed over, by kind.
    """

    train: int
    validation: int
    test: int
    classes: int
    opened: int
    unreadable: int
    validation_in_train: int
    test_in_train: int
    contradicting: int
    junk: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        kinds = sorted(self.junk, key=lambda kind: (kind != LOOSE, -self.junk[kind], kind))
        kinds = [f"{kind} ({self.junk[kind]})" for kind in kinds]
        junk = ", ".join([*kinds[:6], "..."] if len(kinds) > 6 else kinds) or "none"
        return (
            f"{self.train} train, {self.validation} validation, {self.test} test images of "
            f"{counted(self.classes, 'class', 'classes')}; "
            f"{self.opened} opened, {self.unreadable} unreadable; duplicates of train: {self.validation_in_train} in "
            f"validation, {self.test_in_train} in test, {self.contradicting} in other classes; passed over: {junk}"
        )


def scan(data: Data) -> Scan:
    """Open every image of a role, unless the cache remembers it, and warn of duplicates and thin images.

    Warns of classes without an image in validation or test too.

    Args:
        data: images; those in memory are not opened.

    Raises:
        DataError: if an image cannot be read and `DataConfig.skip_unreadable` is off.
    """
    checked = data.checked or _check(data)
    validation = "validation, split off train" if data.split_off else "validation"
    warn_of_absent(validation, data.val, data.classes, ", and they choose the epoch")
    warn_of_absent("test", data.test, data.classes)
    warn_of_thin(checked, lambda source: _name(source, data))
    train = [source for source, _ in on_disk(data.train)]
    in_train = {
        role: duplicates(role, [source for source, _ in on_disk(samples)], train, checked, lambda s: _name(s, data))
        for role, samples in (("validation", data.val), ("test", data.test))
    }
    contradicting = _contradicting(data.train, checked)
    if contradicting:
        logger.warning(
            "%d of %d train images contradict one another: the same content is in several classes, such as %s; "
            "keep each in the right class",
            sum(map(len, contradicting)), len(data.train), " = ".join(_name(s, data) for s in contradicting[0][:2]),
        )  # fmt: skip
    return Scan(
        train=len(data.train), validation=len(data.val), test=len(data.test), classes=len(data.classes),
        opened=len(checked.digests) + len(checked.errors), unreadable=len(checked.errors),
        validation_in_train=in_train["validation"], test_in_train=in_train["test"],
        contradicting=sum(map(len, contradicting)), junk=dict(data.junk),
    )  # fmt: skip


def duplicates(
    role: str, images: Sequence[Source], train: Iterable[Source], checked: CheckedImages, name: Callable[[Source], str]
) -> int:
    """Count the images of a role that are byte for byte in train too, and warn of them with the first pair.

    Args:
        role: name of the role, for the warning.
        images: images of the role.
        train: images of train.
        checked: outcome of opening all of them.
        name: function that returns the name of an image.
    """
    known = {checked.digests[image]: image for image in train}
    pairs = [(image, known[checked.digests[image]]) for image in images if checked.digests[image] in known]
    if pairs:
        logger.warning(
            "%d of %d %s images %s in train too, such as %s = %s: the model will have seen them; keep one of each",
            len(pairs), len(images), role, "is" if len(pairs) == 1 else "are", *map(name, pairs[0]),
        )  # fmt: skip
    return len(pairs)


def warn_of_absent(role: str, samples: Sequence[Sample], classes: Sequence[str], more: str = "") -> None:
    """Warn of classes without an image in a role, with the first of them; a role without images is not there at all.

    Args:
        role: name of the role, for the warning.
        samples: images of the role with their labels.
        classes: names of all classes.
        more: further words on the scores that leave these classes out.
    """
    there = {label for _, label in samples}
    absent = [name for label, name in enumerate(classes) if label not in there]
    if absent and there:
        have, example, them = ("has", "", "it") if len(absent) == 1 else ("have", "such as ", "them")
        logger.warning("%d of %d classes %s no image in %s, %s%s: its scores leave %s out%s",
                       len(absent), len(classes), have, role, example, absent[0], them, more)  # fmt: skip


def warn_of_thin(checked: CheckedImages, name: Callable[[Source], str]) -> None:
    """Warn of images that are many times as long as wide (`THIN`), with the first of them."""
    thin = [source for source, size in checked.sizes.items() if is_thin(size)]
    if thin:
        width, height = checked.sizes[thin[0]]
        logger.warning(
            "%d of %d images %s more than %d times as long as wide, such as %s (%dx%d): a model sees little of each; "
            "cut them into pieces, or remove them",
            len(thin), len(checked.sizes), "is" if len(thin) == 1 else "are", THIN, name(thin[0]), width, height,
        )  # fmt: skip


def _check(data: Data) -> CheckedImages:
    checked = check_images([source for source, _ in on_disk((*data.train, *data.val, *data.test))], data.root)
    if checked.errors:
        raise DataError(f"{checked}; remove them, or leave them out with --data.skip_unreadable true")
    return checked


def _contradicting(train: Iterable[Sample], checked: CheckedImages) -> list[list[Source]]:
    """Group train images of equal content and several labels; the first two images of a group differ in label."""
    alike: dict[str, dict[int, list[Source]]] = {}
    for source, label in on_disk(train):
        alike.setdefault(checked.digests[source], {}).setdefault(label, []).append(source)
    several = [list(labels.values()) for labels in alike.values() if len(labels) > 1]
    return [[images[0] for images in groups] + [i for images in groups for i in images[1:]] for groups in several]


def _name(source: Source, data: Data) -> str:
    (name,) = data.names([(source, 0)])
    return name
