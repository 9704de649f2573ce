"""Hugging Face data sets: from the hub, or a local folder of parquet or arrow files. None of their code is run."""

from __future__ import annotations

import io
import logging
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from vimoe.data.images import Source
from vimoe.data.listing import ClassImages, Listing, by_class, in_order
from vimoe.errors import DataError, counted, first_line, nearest

BUILDERS = ("parquet", "arrow", "imagefolder")  # kinds of files that `datasets` may read; none contains code


@dataclass(frozen=True, slots=True)
class Row:
    """A `Packed` image: a cell of a Hugging Face table, which each process maps into memory itself."""

    root: Path
    split: str
    index: int
    column: str
    file: Path | None
    table: Any = field(compare=False, repr=False)
    alone: bool = True  # False if a row has several images, whose names then include the column

    @property
    def path(self) -> Path:
        row = self.root / self.split / str(self.index)
        return row if self.alone else row / self.column

    def stream(self) -> BinaryIO:
        image = self.table[self.index][self.column]
        if image is None:
            raise DataError("this row has no image")
        return io.BytesIO(image["bytes"]) if image["bytes"] is not None else Path(image["path"]).open("rb")


def hugging_face(name: str, image_column: str | None, label_column: str | None) -> Listing:
    """List the images of a data set.

    Args:
        name: name of the data set on the hub, or a local folder.
        image_column, label_column: names of the columns; by default the only ones of images and class labels.

    Raises:
        DataError: if `datasets` is not installed, the data set cannot be loaded, or a column is not as expected.
    """
    root, splits = open_tables(name)
    images, labels = _columns(root, fullest(splits), image_column, label_column)

    def find(split: str | None, _: Counter[str]) -> ClassImages:
        chosen = splits if split is None else {split: splits[split]}
        rows = [row for name, table in chosen.items() for row in _rows(root, name, table, images, labels)]
        return by_class(rows, ordered(label for label, _ in rows))

    def ordered(found: Iterable[str]) -> list[str]:
        known, names = set(found), getattr(fullest(splits)[labels], "names", None)
        return [name for name in names if name in known] if names else in_order(known)

    return Listing(str(root), root, tuple(splits), find, "split", in_order=ordered)


def open_tables(name: str) -> tuple[Path, dict[str, Any]]:
    """Return the path from which images are named, and the table of each split. Errors as `hugging_face`."""
    root = Path(name) if Path(name).is_dir() else Path("hfds", name)
    return root, {split: rows.with_format(None) for split, rows in _load(name).items()}


def fullest(splits: dict[str, Any]) -> dict[str, Any]:
    """Return the columns, by name, of the split with most of them: a test split may come without labels."""
    return max((table.features for table in splits.values()), key=len)


def _load(name: str) -> Any:
    """Load the table of each split, without `trust_remote_code`, so no code that comes with a data set is run."""
    try:
        import datasets

        if int(datasets.__version__.split(".")[0]) < 4:
            raise ImportError("older versions run code that comes with data")
    except ImportError as error:
        raise DataError(
            f"hfds/{name} needs the package datasets: expected version 4 or newer; pip install 'datasets>=4'"
        ) from error
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs the errors that it raises
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs each attempt
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        folder = Path(name)
        if any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(name)
            return loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
        # an absolute path, because a folder named "csv" would be taken for a kind of data
        builder = datasets.load_dataset_builder(str(folder.absolute()) if folder.is_dir() else name)
        if builder.name not in BUILDERS:
            raise DataError(f"its files are of kind {builder.name}: expected {', '.join(BUILDERS)}")
        builder.download_and_prepare()
        return builder.as_dataset()
    except Exception as error:  # errors of the network, of files and of the hub have no common class
        cause = (
            error.__cause__ or error
        )  # its own text, "an error occurred while generating the dataset", does not help
        raise DataError(
            f"hfds/{name} cannot be loaded ({first_line(cause)}): expected a data set of the hub, or a folder of "
            f"parquet files; check the name, or the network"
        ) from error


def _columns(root: Path, features: Any, image_column: str | None, label_column: str | None) -> tuple[str, str]:
    """Return the columns of images and labels: those named, or the only one of the type, or "image" and "label"."""
    found = []
    kinds = {"image": ("Image", image_column), "label": ("ClassLabel", label_column)}
    for role, (kind, given) in kinds.items():
        fitting = [name for name, feature in features.items() if type(feature).__name__ == kind]
        if given is None and len(fitting) != 1 and role not in (fitting if role == "image" else features):
            raise DataError(
                f"{root} has {len(fitting)} columns of type {kind}: expected one; name it with --data.{role}_column; "
                f"{nearest('', fitting or features)}"
            )
        name = given or (fitting[0] if len(fitting) == 1 else role)
        if name not in features or (role == "image" and name not in fitting):
            raise DataError(
                f"data.{role}_column={name!r}: no such column of type {kind} in {root}; "
                f"{nearest(name, fitting or features)}"
            )
        found.append(name)
    return found[0], found[1]


def _rows(root: Path, split: str, rows: Any, image_column: str, label_column: str) -> list[tuple[str, Source]]:
    """Return (class, image) for each row; labels are read, images are not."""
    for what, column in (("labels", label_column), ("images", image_column)):
        if column not in rows.features:
            raise DataError(
                f"{root}, split {split!r} has no column {column!r}: expected {what}; leave the split out, as with "
                f"--data.test_split none"
            )
    labels = rows.select_columns([label_column])[:][label_column]
    names = getattr(rows.features[label_column], "names", None)
    fits = range(len(names)).__contains__ if names else lambda label: isinstance(label, (int, str)) and label != ""
    bad = [i for i, label in enumerate(labels) if not fits(label)]
    if bad:  # the hub has -1 for test images whose labels are withheld
        raise DataError(
            f"{root}, split {split!r}: {counted(len(bad), 'row has', 'rows have')} no label, "
            f"such as {bad[0]} ({labels[bad[0]]!r}): expected "
            f"one for each image; leave the split out, as with --data.test_split none"
        )
    images, file = undecoded(rows, image_column)
    alone = sum(type(feature).__name__ == "Image" for feature in rows.features.values()) == 1
    return [
        (names[label] if names else str(label), Row(root, split, index, image_column, file, images, alone))
        for index, label in enumerate(labels)
    ]


def undecoded(rows: Any, column: str) -> tuple[Any, Path | None]:
    """Return the table of a column of images that are not decoded, and the file that it is mapped from, if any."""
    from datasets import Image

    images = rows.select_columns([column]).cast_column(column, Image(decode=False))
    return images, next((Path(file["filename"]) for file in images.cache_files), None)
