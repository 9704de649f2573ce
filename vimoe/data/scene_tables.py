"""Images and masks in Hugging Face tables: their two columns, and the rows without null."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vimoe.data.hugging_face import Row, fullest, open_tables, undecoded
from vimoe.data.images import Source
from vimoe.errors import DataError, nearest

IMAGES = ("image", "images", "img", "pixel_values")  # usual names of the columns
MASKS = (
    "mask", "masks", "label", "labels", "annotation", "annotations", "segmentation", "segmentation_mask",
    "semantic_segmentation",
)  # fmt: skip
Files = dict[str, Source]  # files by the name that an image and its mask share


def scene_tables(
    name: str, image_column: str | None, mask_column: str | None
) -> tuple[Path, dict[str, tuple[Files, Files]]]:
    """Find the images and the masks of each split, by row; null cells are left out, and a column that a split lacks.

    Args:
        name: name of a data set of the hub, or a local folder of parquet or arrow files.
        image_column, mask_column: names of the columns; by default the only ones of type Image with a usual name
            (`IMAGES`, `MASKS`).

    Returns:
        The path from which images are named, and (images, masks) of each split.

    Raises:
        DataError: if the data set cannot be loaded, or the columns cannot be told.
    """
    root, splits = open_tables(name)
    columns = _columns(root, fullest(splits), image_column, mask_column)
    found = {}
    for split, rows in splits.items():
        images, masks = (_files(root, split, rows, column) for column in columns)
        found[split] = (images, masks)
    return root, found


def _columns(root: Path, features: Any, image_column: str | None, mask_column: str | None) -> tuple[str, str]:
    pictures = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    for setting, given in (("image_column", image_column), ("label_column", mask_column)):
        if given is not None and given not in pictures:
            raise DataError(
                f"data.{setting}={given!r}: no such column of type Image in {root}; {nearest(given, pictures)}"
            )
    image = image_column or _only(pictures, IMAGES, mask_column)
    mask = mask_column or _only(pictures, MASKS, image_column)
    if len(pictures) == 2:  # if one is known, the other is the remaining one
        image = image or (mask and _only(pictures, pictures, mask))
        mask = mask or (image and _only(pictures, pictures, image))
    if not image or not mask or image == mask:
        raise DataError(
            f"{root} has {len(pictures)} columns of type Image ({', '.join(pictures)}): expected one of images and one "
            f"of masks with usual names; name them with --data.image_column and --data.label_column"
        )
    return image, mask


def _only(pictures: Sequence[str], names: Collection[str], other: str | None) -> str | None:
    """Return the only column with one of the names that is not the other column; None unless there is one."""
    fitting = [name for name in pictures if name.lower() in names and name != other]
    return fitting[0] if len(fitting) == 1 else None


def _files(root: Path, split: str, rows: Any, column: str) -> Files:
    """Return the cells of a column by SPLIT/ROW, without reading them; null cells are left out."""
    if column not in rows.features:
        return {}
    images, file = undecoded(rows, column)
    digits = len(str(len(rows)))  # leading zeros, so that sorted names are in the order of the rows
    return {
        f"{split}/{index:0{digits}}": Row(root, split, index, column, file, images, alone=False)
        for index in _present(images, column)
    }


def _present(rows: Any, column: str) -> list[int]:
    """Return the rows whose image is neither null nor a struct of nulls."""
    if not len(rows):
        return []
    from pyarrow import compute

    values = rows.with_format("arrow")[:][column]
    inside = [compute.struct_field(values, field).is_valid() for field in ("bytes", "path")]
    return np.flatnonzero(np.asarray(values.is_valid()) & (np.asarray(inside[0]) | np.asarray(inside[1]))).tolist()
