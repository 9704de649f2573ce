"""Tables of images and labels: CSV files, Hugging Face data sets, and the files of MNIST and its kin."""

from __future__ import annotations

import csv
import io
import logging
import struct
import sys
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from vimoe.data.archives import Member
from vimoe.data.images import Source
from vimoe.data.listing import SPLITS, ClassImages, Listing, by_class, in_order, table
from vimoe.errors import DataError, beside, first_line, nearest

BUILDERS = ("parquet", "arrow", "imagefolder")  # what `datasets` may read: images and tables, nothing that runs
MNISTS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}  # torchvision's names
INSTEAD = {  # what else timm takes, and why or for what it is refused
    "tfds/": "it streams, and a training that can go on needs images by their number; give hfds/NAME or a folder",
    "hfids/": "it streams, and a training that can go on needs images by their number; give it as hfds/NAME",
    "wds/": "give the folder of the shards itself, which are then read by their place instead of streamed",
    "torch/cifar": "its files are pickles, which can run code; give hfds/uoft-cs/cifar10 (or cifar100), or a folder",
    "torch/image": "give its folder itself",
    "torch/folder": "give its folder itself",
    "torch/": f"known: {', '.join(f'torch/{name}:FOLDER' for name in MNISTS)}; give a folder or a CSV file of others",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A `Packed` image: in a column of a Hugging Face table, which is mapped into memory by each process for itself."""

    root: Path
    split: str
    index: int
    column: str
    file: Path | None
    table: Any = field(compare=False, repr=False)
    alone: bool = True  # else a row has several images, and what each goes by has the column in it

    @property
    def path(self) -> Path:
        row = self.root / self.split / str(self.index)
        return row if self.alone else row / self.column

    def stream(self) -> BinaryIO:
        image = self.table[self.index][self.column]
        if image is None:
            raise DataError("there is none in this row")
        return io.BytesIO(image["bytes"]) if image["bytes"] is not None else Path(image["path"]).open("rb")


def csv_file(path: Path, image_column: str, label_column: str, splits: Collection[str]) -> Listing:
    """A CSV file with a row for each image: its path from the file's folder, its label, and maybe its split.

    Args:
        path: the file.
        image_column, label_column: the names of these columns; that of the split is "split".
        splits: what may be in that column besides the names that are known.

    Raises:
        DataError: for a missing column, label or image file, for one image with several labels or splits, or for a
            split that is not known.
    """
    root = path.absolute().parent
    rows: dict[Path, tuple[str | None, str]] = {}
    for line, row in _read_csv(path, image_column, label_column):
        where = f"{path}, line {line}"
        for name in (image_column, label_column):
            if not row[name].strip():
                raise DataError(f"{where}: no {name}: expected one in each row; fill it in, or remove the row")
        here = _split(where, row.get("split"), splits), row[label_column].strip()
        image = row[image_column].strip()
        before = rows.setdefault(root / image, here)
        if before != here:
            raise DataError(
                f"{where}: {image} has {_told(here)}, and {_told(before)} in a row above: expected one row for each "
                f"image; remove the wrong one"
            )
    if not rows:
        raise DataError(f"{path} has no row: expected one for each image")
    missing_files = [file for file in rows if not file.is_file()]
    if missing_files:
        first = ", ".join(map(str, missing_files[:3])) + (", ..." if len(missing_files) > 3 else "")
        raise DataError(
            f"{path}: {len(missing_files)} of {len(rows)} images are not there: {first}: expected paths from "
            f"{path.parent}; correct them, or remove the rows"
        )
    listed = [(split, label, file) for file, (split, label) in sorted(rows.items())]
    return table(str(path), root, listed, in_order(label for _, label, _ in listed), Counter())


def _read_csv(path: Path, *needed: str) -> list[tuple[int, dict[str, str]]]:
    """(line, row) of each row."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            columns = reader.fieldnames or []
            if twice := [name for name in (*needed, "split") if list(columns).count(name) > 1]:
                raise DataError(f"{path} has the column {twice[0]!r} twice: expected it once; rename or remove one")
            for name in needed:
                if name not in columns:
                    raise DataError(
                        f"{path} has no column {name!r}: expected a first line with {', '.join(needed)} and maybe "
                        f"split, separated by commas; {nearest(name, columns)}"
                    )
            return [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({first_line(error)}): expected a CSV file in UTF-8") from error


def _split(where: str, given: str | None, others: Collection[str]) -> str | None:
    if given is None:  # there is no such column
        return None
    split = given.strip()
    if split not in others and split.lower() not in SPLITS:
        raise DataError(f"{where}: split={split!r}: expected train, val or test; {nearest(split, sorted(SPLITS))}")
    return split if split in others else split.lower()


def _told(row: tuple[str | None, str]) -> str:
    return f"label {row[1]!r}" + (f" in {row[0]}" if row[0] else "")


def hugging_face(name: str, image_column: str | None, label_column: str | None) -> Listing:
    """A data set of the Hugging Face hub, or a local folder of parquet or arrow files.

    Args:
        name: its name, or the folder.
        image_column, label_column: which columns; by default the only ones that hold images and class labels.

    Raises:
        DataError: where `datasets` is not installed, the data set cannot be loaded, or a column is not as expected.
    """
    root, splits = open_tables(name)
    images, labels = _columns(root, next(iter(splits.values())).features, image_column, label_column)

    def find(split: str | None, _: Counter[str]) -> ClassImages:
        chosen = splits if split is None else {split: splits[split]}
        rows = [row for name, table in chosen.items() for row in _rows(root, name, table, images, labels)]
        names = getattr(next(iter(chosen.values())).features[labels], "names", None)
        return by_class(rows, names or in_order(label for label, _ in rows))

    return Listing(str(root), root, tuple(splits), find, "split")


def open_tables(name: str) -> tuple[Path, dict[str, Any]]:
    """What images of a data set are named from, and a table for each of its splits; as `hugging_face`."""
    root = Path(name) if Path(name).is_dir() else Path("hfds", name)
    return root, {split: rows.with_format(None) for split, rows in _load(name).items()}


def _load(name: str) -> Any:
    """A table for each split. No code that comes with a data set is run: there is no `trust_remote_code` here."""
    try:
        import datasets

        if int(datasets.__version__.split(".")[0]) < 4:
            raise ImportError("older ones run code that comes with data")
    except ImportError as error:
        raise DataError(
            f"hfds/{name} needs the package datasets: expected version 4 or newer; pip install 'datasets>=4'"
        ) from error
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # and each of its attempts
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        place = Path(name)
        if any((place / file).is_file() for file in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(name)
            return loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
        # absolute, because "csv" would be a kind of data, whatever is there
        builder = datasets.load_dataset_builder(str(place.absolute()) if place.is_dir() else name)
        if builder.name not in BUILDERS:
            raise DataError(f"its files are of kind {builder.name}: expected {', '.join(BUILDERS)}")
        builder.download_and_prepare()
        return builder.as_dataset()
    except Exception as error:  # of the network, of files, of the hub: there is no common class
        cause = error.__cause__ or error  # "an error occurred while generating the dataset" says nothing
        raise DataError(
            f"hfds/{name} cannot be loaded ({first_line(cause)}): expected a data set of the hub, or a folder of "
            f"parquet files; check the name, or the network"
        ) from error


def _columns(root: Path, features: Any, image_column: str | None, label_column: str | None) -> tuple[str, str]:
    """The columns of images and labels: the named ones, or the only one of its type, or the one called so."""
    found = []
    kinds = {"image": ("Image", image_column), "label": ("ClassLabel", label_column)}
    for what, (kind, given) in kinds.items():
        fitting = [name for name, feature in features.items() if type(feature).__name__ == kind]
        if given is None and len(fitting) != 1 and what not in (fitting if what == "image" else features):
            raise DataError(
                f"{root} has {len(fitting)} columns of type {kind}: expected one; name it with --data.{what}_column; "
                f"{nearest('', fitting or features)}"
            )
        name = given or (fitting[0] if len(fitting) == 1 else what)
        if name not in features or (what == "image" and name not in fitting):
            raise DataError(
                f"data.{what}_column={name!r}: no such column of type {kind} in {root}; "
                f"{nearest(name, fitting or features)}"
            )
        found.append(name)
    return found[0], found[1]


def _rows(root: Path, split: str, rows: Any, image_column: str, label_column: str) -> list[tuple[str, Source]]:
    """(class, image) of each row; the labels are read, the images are not."""
    from datasets import Image

    labels = rows.select_columns([label_column])[:][label_column]
    names = getattr(rows.features[label_column], "names", None)
    fits = range(len(names)).__contains__ if names else lambda label: isinstance(label, (int, str)) and label != ""
    bad = [i for i, label in enumerate(labels) if not fits(label)]
    if bad:  # -1 is what the hub has for test images whose labels are kept secret
        raise DataError(
            f"{root}, split {split!r}: {len(bad)} rows have no label, such as {bad[0]} ({labels[bad[0]]!r}): expected "
            f"one of each image; leave the split out, as with --data.test_split none"
        )
    images = rows.select_columns([image_column]).cast_column(image_column, Image(decode=False))
    file = next((Path(file["filename"]) for file in images.cache_files), None)
    return [
        (names[label] if names else str(label), Row(root, split, index, image_column, file, images))
        for index, label in enumerate(labels)
    ]


def torchvision_files(spec: str) -> Listing:
    """The files of MNIST or a data set of its format, as torchvision unpacks them; `spec` is NAME:FOLDER.

    They are images without a header, one after the other; given the header of a PGM file, each is an image file.

    Raises:
        DataError: where the files are missing or not of that format.
    """
    name, _, folder = spec.partition(":")
    if not folder:
        raise DataError(f"torch/{name}: no folder: expected the one that torchvision has it in; torch/{name}:FOLDER")
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
                f"{raw} cannot be read ({first_line(error)}): expected whole files; get them again"
            ) from error
        header = b"P5 %d %d 255\n" % (width, height)
        rows += [(split, label, Member(images, str(i), 16 + i * size, size, header)) for i, label in enumerate(names)]
    return table(f"torch/{name}:{folder}", root, rows, classes, Counter())
