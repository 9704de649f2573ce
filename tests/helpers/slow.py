"""Parameters of which some run always, and the others with `-m slow` too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def one_in(n: int, cases: Iterable[Any]) -> list[Any]:
    """Return the cases as parameters, of which every n-th runs always; a tuple has a value for each argument.

    Of a product with an n that has no factor in common with its sides, all values of each side run.
    """
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[pytest.mark.slow] * (number % n > 0))
        for number, case in enumerate(cases)
    ]
