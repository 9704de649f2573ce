"""The mutants of tests/mutants.py are of the package as it is."""

from __future__ import annotations

import pytest
from mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_one_place(mutant: Mutant) -> None:
    source = (ROOT / "vimoe" / mutant.module).read_text(encoding="utf-8")
    assert source.count(mutant.text) == 1
    assert mutant.instead != mutant.text
    assert all((ROOT / "tests" / test).exists() for test in mutant.tests)


def test_there_are_enough_of_them_and_each_has_a_name() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names) >= 40
