"""CSV files with a row for each image: path, label and, optionally, split."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from vimoe.data.listing import Listing, in_order, table
from vimoe.data.splits import is_split
from vimoe.errors import DataError, first_line, nearest


def csv_file(path: Path, image_column: str, label_column: str, splits: Collection[str]) -> Listing:
    """List the images of a CSV file. Paths start at the file's folder; the column "split" is optional.

    Args:
        path: the file.
        image_column, label_column: names of the columns of paths and labels.
        splits: names of splits that the settings give, as they are written; the usual ones count in any case.

    Raises:
        DataError: if a column, label, split or image file is missing, or an image has several labels or splits.
    """
    root = path.absolute().parent
    rows: dict[Path, tuple[str | None, str]] = {}
    for line, row in _read_csv(path, image_column, label_column):
        where = f"{path}, line {line}"
        for name in (image_column, label_column):
            if not row[name].strip():
                raise DataError(f"{where}: no {name}: expected one in each row; add it, or remove the row")
        here = _split(where, row.get("split"), splits), row[label_column].strip()
        image = row[image_column].strip()
        before = rows.setdefault(root / image, here)
        if before != here:
            raise DataError(
                f"{where}: {image} has {_describe(here)}, and {_describe(before)} in a row above: expected one row for "
                f"each image; remove the wrong one"
            )
    if not rows:
        raise DataError(f"{path} has no row: expected one for each image")
    missing_files = [file for file in rows if not file.is_file()]
    if missing_files:
        first = ", ".join(map(str, missing_files[:3])) + (", ..." if len(missing_files) > 3 else "")
        raise DataError(
            f"{path}: {len(missing_files)} of {len(rows)} images {'is' if len(missing_files) == 1 else 'are'} "
            f"missing: {first}: expected paths from "
            f"{path.parent}; correct them, or remove the rows"
        )
    listed = [(split, label, file) for file, (split, label) in sorted(rows.items())]
    return table(str(path), root, listed, in_order(label for _, label, _ in listed), Counter())


def _read_csv(path: Path, *needed: str) -> list[tuple[int, dict[str, str]]]:
    """Return (line number, row) for each row."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            columns = reader.fieldnames or []
            if twice := [name for name in (*needed, "split") if list(columns).count(name) > 1]:
                raise DataError(f"{path} repeats the column {twice[0]!r}: expected it once; rename or remove one")
            for name in needed:
                if name not in columns:
                    raise DataError(
                        f"{path} has no column {name!r}: expected a first line with {', '.join(needed)} and, "
                        f"optionally, split, separated by commas; {nearest(name, columns)}"
                    )
            return [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({first_line(error)}): expected a CSV file in UTF-8") from error


def _split(where: str, given: str | None, others: Collection[str]) -> str | None:
    if given is None:  # the file has no such column
        return None
    split = given.strip()
    if not split:
        raise DataError(f"{where}: no split: expected one in each row, such as train; add it, or remove the row")
    return split.lower() if is_split(split) and split not in others else split


def _describe(row: tuple[str | None, str]) -> str:
    return f"label {row[1]!r}" + (f" in {row[0]}" if row[0] else "")
