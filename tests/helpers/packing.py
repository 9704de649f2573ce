"""The same images in all the ways that a data path can hold them, made of a folder of class folders."""

from __future__ import annotations

import csv
import io
import json
import struct
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def rows(photos: Path) -> list[tuple[str, str, Path]]:
    """(split or nothing, class, file) of each image."""
    files = sorted(photos.rglob("*.png"))
    return [("/".join(f.relative_to(photos).parts[:-2]), f.parent.name, f) for f in files]


def as_csv(photos: Path, out: Path) -> Path:
    listed = rows(photos)[::-1]  # the order of the rows is no matter
    columns = ["path", "label", *(["split"] if listed[0][0] else [])]
    with out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows((f.relative_to(out.parent), label, split)[: len(columns)] for split, label, f in listed)
    return out


def tar(out: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out


def as_tar(photos: Path, out: Path, above: str = "") -> Path:
    return tar(out, ((above + str(f.relative_to(photos)), f.read_bytes()) for _, _, f in rows(photos)[::-1]))


def as_tars(photos: Path, out: Path) -> Path:
    """One for each folder in the folder: each role, or each class."""
    for place in photos.iterdir():
        as_tar(place, out / f"{place.name}.tar")
    return out


def as_shards(photos: Path, out: Path, classes: tuple[str, ...] = (), sidecar: str = "cls", size: int = 5) -> Path:
    """WebDataset: an image and its label as text, or as a number where the classes are given (and then listed)."""
    by_split: dict[str, list[tuple[str, bytes]]] = {}
    for split, label, f in rows(photos):
        key, text = f"{label}_{f.stem}", str(classes.index(label)) if classes else label
        said = json.dumps({"label": int(text) if classes else text}) if sidecar == "json" else f"{text}\n"
        by_split.setdefault(split or "photos", []).append((key, f.read_bytes(), said.encode()))
    for split, samples in by_split.items():
        for start in range(0, len(samples), size):
            members = [
                member
                for key, image, label in samples[start : start + size]
                for member in ((f"{key}.{sidecar}", label), (f"{key}.png", image), (f"{key}.txt", b"a caption"))
            ]
            tar(out / f"{split}-{start // size:06d}.tar", members)
    if classes:
        (out / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    return out


def as_parquet(
    photos: Path, out: Path, names: tuple[str, ...] = ("blue", "green", "red"), columns: tuple[str, ...] = ("label",)
) -> Path:
    """A folder as the Hugging Face hub has them; `columns` are those of class labels."""
    import pyarrow
    from pyarrow import parquet

    out.mkdir(parents=True, exist_ok=True)
    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    features = {"image": {"_type": "Image"}, **{c: {"names": [*names], "_type": "ClassLabel"} for c in columns}}
    schema = pyarrow.schema(
        [("image", image), *((column, pyarrow.int64()) for column in columns)],
        {"huggingface": json.dumps({"info": {"features": features}})},
    )
    for split in sorted({split for split, _, _ in rows(photos)}):
        here = [(label, f) for other, label, f in rows(photos) if other == split]
        numbers = [names.index(label) if label in names else -1 for label, _ in here]
        images = pyarrow.array([{"bytes": f.read_bytes(), "path": None} for _, f in here], image)
        values = {"image": images, **{column: numbers for column in columns}}
        parquet.write_table(pyarrow.table(values, schema), out / f"{split or 'train'}-00000-of-00001.parquet")
    return out


def as_idx(out: Path, name: str = "MNIST", train: int = 40, test: int = 10) -> tuple[Path, dict[str, np.ndarray]]:
    """The files of MNIST, and the pixels that are in them; labels go round."""
    raw, pixels = out / name / "raw", {}
    raw.mkdir(parents=True)
    for seed, (split, prefix, count) in enumerate((("train", "train", train), ("test", "t10k", test))):
        pixels[split] = np.random.default_rng(seed).integers(0, 256, (count, 5, 7), dtype="uint8")
        header = struct.pack(">4i", 2051, *pixels[split].shape)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels[split].tobytes())
        labels = bytes(i % 10 for i in range(count))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels)
    return out, pixels


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


def scenes_as_parquet(
    scenes: Path, out: Path, columns: tuple[str, ...] = ("image", "annotation"), without: tuple[str, ...] = ()
) -> Path:
    """Scenes in ADE20K's layout as a table with a row each, in the order of their names, and the legend beside it.

    Args:
        scenes, out: folders.
        columns: of images, masks, and further ones with the images again.
        without: names of files whose place in the table is null.
    """
    import pyarrow
    from pyarrow import parquet

    out.mkdir(parents=True, exist_ok=True)
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    features = {"seen": {"dtype": "int64", "_type": "Value"}, **{c: {"_type": "Image"} for c in columns}}
    schema = pyarrow.schema(
        [("seen", pyarrow.int64()), *((column, kind) for column in columns)],
        {"huggingface": json.dumps({"info": {"features": features}})},
    )
    for role in sorted(path.name for path in (scenes / "images").iterdir()):
        names = sorted(path.stem for path in (scenes / "images" / role).iterdir())
        values = {"seen": list(range(len(names)))}
        for place, column in enumerate(columns):
            folder = scenes / ("annotations" if place == 1 else "images") / role
            values[column] = [
                None if f"{folder.parent.name}/{name}" in without
                else {"bytes": (folder / f"{name}.png").read_bytes(), "path": None}
                for name in names
            ]  # fmt: skip
        parquet.write_table(pyarrow.table(values, schema), out / f"{role}-00000-of-00001.parquet")
    if (scenes / "classes.yaml").is_file():
        (out / "classes.yaml").write_text((scenes / "classes.yaml").read_text())
    return out
