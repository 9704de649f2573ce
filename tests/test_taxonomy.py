"""The page on kinds of mixtures is what its script writes, and what it calls present can be chosen."""

from __future__ import annotations

import re

import pytest
import taxonomy
from taxonomy import PAGE, Row, page, problems, rows

from vimoe.config.moe import GATES


def test_the_page_is_what_the_script_writes() -> None:
    assert PAGE.read_text("utf-8") == page(), "run: python docs/taxonomy.py"


def test_what_the_page_calls_present_can_be_chosen_and_every_kind_has_a_row() -> None:
    assert problems() == []


def test_every_row_says_one_thing() -> None:
    """It is there, or there is a reason; and what is said of vision has a mark and a number."""
    assert len({row.leaf for row in rows()}) == len([*rows()])
    for row in rows():
        assert row.present or row.why.startswith(("refused: ", "not for vision", "given by the parent: ")), row.leaf
        assert row.evidence == taxonomy.NONE or re.search(r"\(\d{4}\.\d{5}, \*\*[FNA]\*\*\)", row.evidence), row.leaf
        assert "|" not in row.status + row.evidence + row.works


LIES = {
    "a setting that is not there": (Row("x", "y", ("moe.nothing=1",)), "x: no setting moe.nothing"),
    "a section that is not there": (Row("x", "y", ("moo.gate=choice",)), "x: no setting moo.gate"),
    "a value that is not there": (Row("x", "y", ("moe.gate=chance",)), "x: moe.gate=chance: moe.gate='chance'"),
    "settings that contradict": (Row("x", "y", ("train.fuse=ewa",)), "x: train.fuse=ewa: train.fuse='ewa' with"),
    "a verb that is not there": (Row("x", "y", verb="prone"), "x: no verb 'prone'"),
}


@pytest.mark.parametrize("lie", LIES)
def test_the_check_sees_what_is_wrong(lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row, message = LIES[lie]
    before = problems()
    monkeypatch.setitem(taxonomy.TAXONOMY, "lies", (row,))
    (found,) = [each for each in problems() if each not in before]
    assert found.startswith(message)


@pytest.mark.parametrize("target", ["vimoe.nowhere:Gate", "vimoe.moe.gates:NoSuchGate"])
def test_the_check_sees_kinds_that_are_not_written_or_have_no_row(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GATES, "choice", target)
    monkeypatch.setitem(GATES, "other", "vimoe.moe.gates:Gate")
    found = "\n".join(problems())
    assert "moe.gate=choice: " in found and "moe.gate=other has no row" in found
