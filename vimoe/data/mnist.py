"""The files of MNIST and data sets in its format, read in place: raw images of one size, one after the other."""

from __future__ import annotations

import struct
from collections import Counter
from pathlib import Path

from vimoe.data.images import Source
from vimoe.data.listing import Listing, table
from vimoe.data.tar_index import Member
from vimoe.errors import DataError, beside, first_line

MNISTS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}  # torchvision's names


def mnist_files(spec: str) -> Listing:
    """List the images of MNIST, FashionMNIST or KMNIST. With the header of a PGM file, each is an image file.

    Args:
        spec: NAME:FOLDER, with one of `MNISTS` and the folder into which torchvision has unpacked the data.

    Raises:
        DataError: if files are missing, or not of this format.
    """
    name, _, folder = spec.partition(":")
    if not folder:
        raise DataError(
            f"torch/{name}: no folder: expected the one that torchvision unpacked it into; give torch/{name}:FOLDER"
        )
    from torchvision import datasets

    classes = getattr(datasets, MNISTS[name]).classes
    root = Path(folder)
    raw = root / MNISTS[name] / "raw"
    if not raw.is_dir():
        raise DataError(
            f"{raw}: no such folder: expected the files of torchvision's {MNISTS[name]}; {beside(raw.parent)}"
        )
    rows: list[tuple[str | None, str, Source]] = []
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = raw / f"{prefix}-images-idx3-ubyte", raw / f"{prefix}-labels-idx1-ubyte"
        try:
            with images.open("rb") as file:
                kind, count, height, width = struct.unpack(">4i", file.read(16))
            content = labels.read_bytes()
            size = height * width
            expected = struct.pack(">2i", 2049, count), 16 + count * size, 8 + count
            if kind != 2051 or (content[:8], images.stat().st_size, len(content)) != expected:
                raise ValueError(f"{images.name} and {labels.name} do not fit together")
            names = [classes[label] for label in content[8:]]
        except (OSError, struct.error, ValueError, IndexError) as error:
            raise DataError(
                f"{raw} cannot be read ({first_line(error)}): expected whole files; download them again"
            ) from error
        header = b"P5 %d %d 255\n" % (width, height)
        rows += [(split, label, Member(images, str(i), 16 + i * size, size, header)) for i, label in enumerate(names)]
    return table(f"torch/{name}:{folder}", root, rows, classes, Counter())
