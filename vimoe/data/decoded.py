"""Images decoded once: uint8 pixels in memory, or in a file of the user's cache that is mapped into memory."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image

from vimoe.data.images import identity, open_image
from vimoe.data.labelled_images import Sample
from vimoe.data.user_cache import MADE_BY, cache_folder, make_cache_folder
from vimoe.errors import DataError
from vimoe.files import written_whole
from vimoe.terminal import track

Pixels = NDArray[np.uint8]
Where = Literal["memory", "disk"]  # values of `DataConfig.cache` for decoded images
LOOK = 256  # images between two checks of the free space
AHEAD = 1024  # images that may be decoded but not stored yet


class Fit(Protocol):
    """A function that brings an image to the size to keep. Its repr is part of the cache's key."""

    def __call__(self, img: Image.Image, /) -> Image.Image: ...


class Shrink:
    """Shrink an image until its shorter side has at most `side` pixels."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, image: Image.Image) -> Image.Image:
        short = min(image.size)
        if short <= self.side:
            return image
        width, height = (round(length * self.side / short) for length in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC)

    def __repr__(self) -> str:
        return f"Shrink({self.side})"


class Decoded(Sequence[Sample]):
    """Samples whose images are decoded.

    Args:
        pixels: pixels (height, width, 3) uint8 of each image.
        labels: label of each image.
    """

    def __init__(self, pixels: Sequence[Pixels], labels: Sequence[int]) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]  # slices are not supported
        return Image.fromarray(self.pixels[index]), self.labels[index]


class _Mapped(Sequence[Pixels]):
    """Images one after the other in a mapped file. A worker process maps the file as well, and gets no copy."""

    def __init__(self, file: Path, sizes: NDArray[np.int64]) -> None:
        self.file, self.sizes = file, sizes
        self.ends = np.cumsum(3 * sizes.prod(axis=1))
        self.flat = np.memmap(file, np.uint8, "r")

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Pixels:  # type: ignore[override]
        height, width = self.sizes[index]
        end = self.ends[index]
        return self.flat[end - 3 * height * width : end].reshape(height, width, 3)

    def __reduce__(self) -> tuple[type, tuple[Path, NDArray[np.int64]]]:
        return _Mapped, (self.file, self.sizes)


def decode(samples: Sequence[Sample], fit: Fit, where: Where) -> Decoded:
    """Decode all images in threads, or find those that an earlier call has stored on disk.

    Args:
        samples: (image or source, label) of each image.
        fit: function that brings an image to the size to keep.
        where: "memory", or "disk" for decoded/ in `vimoe.data.user_cache.cache_folder`, which may be deleted at any
            time. Stored images are reused as long as files, `fit` and Pillow are the same.

    Raises:
        DataError: if an image cannot be read, or all of them do not fit into the free memory or disk.
        FolderError: if the cache cannot be written.
    """
    labels = [label for _, label in samples]
    images = _decode(samples, fit)
    if where == "memory":
        return Decoded(
            list(_watched(images, len(samples), "memory", lambda: psutil.virtual_memory().available)), labels
        )
    stored = _paths(samples, fit)
    if not _whole(*stored, len(samples)):
        _write(images, *stored, len(samples))
    pixels, sizes = stored
    return Decoded(_Mapped(pixels, np.load(sizes)), labels)


def _decode(samples: Sequence[Sample], fit: Fit) -> Iterator[Pixels]:
    def each() -> Iterator[Pixels]:
        with ThreadPool() as pool:  # Pillow decodes without the GIL
            for start in range(0, len(samples), AHEAD):  # bounds the images that wait in memory for a slow disk
                some = samples[start : start + AHEAD]
                yield from pool.imap(lambda sample: np.array(fit(open_image(sample[0]))), some, chunksize=16)

    yield from track(each(), "decoding images", len(samples))


def _watched(images: Iterator[Pixels], total: int, where: Where, free: Callable[[], int]) -> Iterator[Pixels]:
    """Yield the images. Raises DataError once the mean size so far says that they will not fit into the free space."""
    done = 0
    for index, image in enumerate(images):
        if index and index % LOOK == 0:
            needed = (total - index) * done / index
            if needed > free():
                other = "disk" if where == "memory" else "none"
                raise DataError(
                    f"data.cache={where!r}: about {(done + needed) / 1e9:.1f} GB for {total} images: expected at most "
                    f"the {(done + free()) / 1e9:.1f} GB that are free; use data.cache={other}"
                )
        done += image.nbytes
        yield image


def _paths(samples: Sequence[Sample], fit: Fit) -> tuple[Path, Path]:
    """Return the files of pixels and of sizes, named by a hash of all that their content depends on."""
    digest = hashlib.blake2b(f"{MADE_BY} {fit!r}".encode(), digest_size=12)
    for source, _ in samples:
        digest.update(identity(source))
    path = cache_folder() / "decoded" / digest.hexdigest()
    return path.with_suffix(".pixels"), path.with_suffix(".sizes.npy")


def _whole(pixels: Path, sizes: Path, total: int) -> bool:
    """Return True if both files exist, with the sizes and pixels of `total` images."""
    try:
        shapes = np.load(sizes, allow_pickle=False)
        return len(shapes) == total and pixels.stat().st_size == 3 * math.fsum(shapes.prod(axis=1))
    except (OSError, ValueError, EOFError):
        return False


def _write(images: Iterator[Pixels], pixels: Path, sizes: Path, total: int) -> None:
    make_cache_folder(pixels.parent.name, "disk")
    shapes = []
    with written_whole(pixels) as file:
        for image in _watched(images, total, "disk", lambda: shutil.disk_usage(pixels.parent).free):
            shapes.append(image.shape[:2])
            file.write(np.ascontiguousarray(image).data)
    with written_whole(sizes) as file:
        np.save(file, np.array(shapes, np.int64))
