"""The registered study as it is in the repository: its tables come from its files, and its words from its tables."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from harness.plan import Study
from harness.report import write_report

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "studies/vimoe"
INTERVAL = re.compile(r"(?:[-+]?[\d.]+ )?\[[-+\d.]+, [-+\d.]+\]")


def table() -> str:
    return (STUDY / "README.md").read_text("utf-8").partition("<!-- the table begins -->")[2]


def test_the_tables_regenerate_without_a_difference(tmp_path: Path) -> None:
    copied = shutil.copytree(STUDY, tmp_path / "study")
    (copied / "README.md").write_text(
        (STUDY / "README.md").read_text("utf-8").replace(table(), "\n<!-- the table ends -->\n")
    )
    write_report(Study(copied))
    assert (copied / "README.md").read_text("utf-8") == (STUDY / "README.md").read_text("utf-8")


@pytest.mark.parametrize("page", ["studies/vimoe/README.md", "README.md"])
def test_every_interval_in_words_is_one_of_the_tables(page: str) -> None:
    words = (ROOT / page).read_text("utf-8").replace(table(), "").replace("\n  ", " ").replace("\n", " ")
    said = INTERVAL.findall(words)
    assert said and not [each for each in said if each not in table()]
