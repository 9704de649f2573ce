"""Tables and figures of a study, from its JSON files alone: the same files give the same text and pictures."""

from __future__ import annotations

from pathlib import Path

from harness.figures import draw
from harness.plan import Study
from harness.results import Results
from harness.tables import arms_table, contrasts_table, effects_table, layers_table, notes, search_table
from vimoe.errors import FolderError
from vimoe.files import read_text, write_text

BEGIN, END = "<!-- the table begins -->", "<!-- the table ends -->"


def put_between_marks(page: Path, text: str) -> None:
    """Replace what stands between the two marks of a page. Raises FolderError if it has none."""
    before, begin, rest = read_text(page).partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise FolderError(f"{page} has no marks: expected {BEGIN} and {END}; add them")
    write_text(page, f"{before}{BEGIN}\n{text}\n{END}{after}")


def write_report(study: Study) -> None:
    """Write the tables into STUDY/README.md and the figures into STUDY/figures."""
    results = Results.read(study)
    sections = [section(results, data) for data in study.data]
    put_between_marks(study.folder / "README.md", "\n\n".join(sections))


def section(results: Results, data: str) -> str:
    """Return all tables of a data set as Markdown."""
    there = [cell for cell in results.cells.values() if cell["data"] == data]
    if not there:
        return f"### {data}\n\nNo result yet."
    search = sum(cell["search"] for cell in there)
    final = sum(len(results.final(data, arm)) for arm in results.study.arms)
    wanted = sum(len(results.study.seeds_of(data, arm)) for arm in results.study.arms)
    head = f"### {data}\n\n{search} cells of the search, {final} of {wanted} cells at the chosen rates."
    tables = [contrasts_table, arms_table, layers_table, effects_table, search_table]
    parts = [head, *(table(results, data) for table in tables), *draw(results, data), notes(results, data)]
    return "\n\n".join(part for part in parts if part)
