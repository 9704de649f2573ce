"""Tables and figures of a study, from its JSON files alone: the same files give the same text and pictures."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from vimoe.errors import FolderError
from vimoe.files import read_text, write_text
from vimoe.study.figures import draw
from vimoe.study.plan import FILE, Study
from vimoe.study.results import Results
from vimoe.study.tables import (
    arms_table,
    contrasts_table,
    effects_table,
    explored_table,
    layers_table,
    notes,
    search_table,
)

PAGE = "README.md"
BEGIN, END = "<!-- the table begins -->", "<!-- the table ends -->"
EMPTY = f"# A study\n\nExact settings are in [{FILE}]({FILE}).\n\n{BEGIN}\n{END}\n"  # of a folder that has no page


def check_page(folder: Path) -> None:
    """Raise FolderError if the page of a study has no place for tables; before anything is computed."""
    if (page := folder / PAGE).exists():
        _around_marks(page)


def put_between_marks(page: Path, text: str) -> None:
    """Replace what stands between the two marks of a page. Raises FolderError if it has none."""
    before, after = _around_marks(page)
    write_text(page, f"{before}{BEGIN}\n{text}\n{END}{after}")


def _around_marks(page: Path) -> tuple[str, str]:
    before, begin, rest = read_text(page).partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise FolderError(f"{page} has no marks: expected {BEGIN} and {END}; add them")
    return before, after


def write_report(study: Study, keys: Mapping[str, Collection[str]] | None = None) -> Results:
    """Write the tables into README.md of the study, and the figures beside it; return the cells that they show.

    A folder without README.md gets one; in one that is there, all but the text between the marks stays.

    Args:
        study: the study, with all its data sets.
        keys: as of `Results.read`.
    """
    results = Results.read(study, keys)
    sections = [section(results, data) for data in study.data]
    page = study.folder / PAGE
    if not page.exists():
        write_text(page, EMPTY)
    put_between_marks(page, "\n\n".join(sections))
    return results


def section(results: Results, data: str) -> str:
    """Return all tables of a data set as Markdown."""
    there = [cell for cell in results.cells.values() if cell["data"] == data]
    if not there:
        return f"### {data}\n\nNo result yet."
    search = sum(cell["search"] for cell in there)
    final = sum(len(results.final(data, arm)) for arm in results.study.arms)
    wanted = sum(len(results.study.seeds_of(data, arm)) for arm in results.study.arms)
    head = f"### {data}\n\n{search} cells of the search, {final} of {wanted} cells at the chosen rates."
    tables = [contrasts_table, explored_table, arms_table, layers_table, effects_table, search_table]
    parts = [head, *(table(results, data) for table in tables), *draw(results, data), notes(results, data)]
    return "\n\n".join(part for part in parts if part)
