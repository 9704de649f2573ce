"""What is wrong with the images, found before anything is trained on them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vimoe.data.classification import Data, Sample, on_disk
from vimoe.data.images import THIN, Source, Tried, is_thin, try_images
from vimoe.data.listing import LOOSE
from vimoe.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Scan:
    """Counts of images, and of what else was found.

    Args:
        train, validation, test: images of each role.
        classes: in the class map.
        opened: images that were opened, now or in an earlier scan of the unchanged file; none of those in memory.
        unreadable: images that were left out because they cannot be read.
        validation_in_train, test_in_train: images of the role whose bytes a train image has too.
        contradicting: train images whose bytes are in another class of train too.
        junk: files and folders that were passed over, by kind.
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
        """As JSON knows it."""
        return asdict(self)

    def __str__(self) -> str:
        kinds = sorted(self.junk, key=lambda kind: (kind != LOOSE, -self.junk[kind], kind))
        kinds = [f"{kind} ({self.junk[kind]})" for kind in kinds]
        junk = ", ".join([*kinds[:6], "..."] if len(kinds) > 6 else kinds) or "none"
        return (
            f"{self.train} train, {self.validation} validation, {self.test} test images of {self.classes} classes; "
            f"{self.opened} opened, {self.unreadable} unreadable; duplicates of train: {self.validation_in_train} in "
            f"validation, {self.test_in_train} in test, {self.contradicting} in other classes; passed over: {junk}"
        )


def scan(data: Data) -> Scan:
    """Opens every image that has a role, or asks the cache, and warns of duplicates.

    Args:
        data: the images; those in memory are not opened.

    Raises:
        DataError: where images cannot be read and were not left out already (`DataConfig.skip_unreadable`).
    """
    tried = data.tried or _try(data)
    warn_of_thin(tried, lambda source: _name(source, data))
    train = [source for source, _ in on_disk(data.train)]
    in_train = {
        role: duplicates(role, [source for source, _ in on_disk(samples)], train, tried, lambda s: _name(s, data))
        for role, samples in (("validation", data.val), ("test", data.test))
    }
    contradicting = _contradicting(data.train, tried)
    if contradicting:
        logger.warning(
            "%d of %d train images contradict one another, with the same content in several classes, such as %s; "
            "keep them in the right one",
            sum(map(len, contradicting)), len(data.train), " = ".join(_name(s, data) for s in contradicting[0][:2]),
        )  # fmt: skip
    return Scan(
        train=len(data.train), validation=len(data.val), test=len(data.test), classes=len(data.classes),
        opened=len(tried.digests) + len(tried.errors), unreadable=len(tried.errors),
        validation_in_train=in_train["validation"], test_in_train=in_train["test"],
        contradicting=sum(map(len, contradicting)), junk=dict(data.junk),
    )  # fmt: skip


def duplicates(
    role: str, images: Sequence[Source], train: Iterable[Source], tried: Tried, name: Callable[[Source], str]
) -> int:
    """How many images of a role train has too, byte by byte; warns of them with the first pair."""
    known = {tried.digests[image]: image for image in train}
    pairs = [(image, known[tried.digests[image]]) for image in images if tried.digests[image] in known]
    if pairs:
        logger.warning(
            "%d of %d %s images are in train too, such as %s = %s: the model will have seen them; keep one of each",
            len(pairs), len(images), role, *map(name, pairs[0]),
        )  # fmt: skip
    return len(pairs)


def warn_of_thin(tried: Tried, name: Callable[[Source], str]) -> None:
    """Warns of images that are a line rather than a picture, with the first of them."""
    thin = [source for source, size in tried.sizes.items() if is_thin(size)]
    if thin:
        width, height = tried.sizes[thin[0]]
        logger.warning(
            "%d of %d images are more than %d times as long as wide, such as %s (%dx%d): a model sees little of each; "
            "cut them into pieces, or remove them",
            len(thin), len(tried.sizes), THIN, name(thin[0]), width, height,
        )  # fmt: skip


def _try(data: Data) -> Tried:
    tried = try_images([source for source, _ in on_disk((*data.train, *data.val, *data.test))], data.root)
    if tried.errors:
        raise DataError(f"{tried}; remove them, or leave them out with --data.skip_unreadable true")
    return tried


def _contradicting(train: Iterable[Sample], tried: Tried) -> list[list[Source]]:
    """Train images of the same content and several labels, by content; the first two of each differ in their label."""
    alike: dict[str, dict[int, list[Source]]] = {}
    for source, label in on_disk(train):
        alike.setdefault(tried.digests[source], {}).setdefault(label, []).append(source)
    several = [list(labels.values()) for labels in alike.values() if len(labels) > 1]
    return [[images[0] for images in groups] + [i for images in groups for i in images[1:]] for groups in several]


def _name(source: Source, data: Data) -> str:
    (name,) = data.names([(source, 0)])
    return name
