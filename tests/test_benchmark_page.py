"""The tables of benchmarks/README.md are those of the results beside it."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_the_page_is_what_its_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    speed = importlib.import_module("speed")
    written = {}
    monkeypatch.setattr(speed, "write_text", lambda path, text: written.update({path: text}))
    speed.write_page()
    ((page, text),) = written.items()
    assert page.read_text(encoding="utf-8") == text
