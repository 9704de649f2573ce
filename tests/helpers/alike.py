"""Figures of JSON that are those of another computation, to rounding."""

from __future__ import annotations

from typing import Any

import pytest


def assert_alike(ours: Any, theirs: Any, where: str = "") -> None:
    """The same names, in the same order, with the same values; numbers of type float to rounding in float32."""
    if isinstance(ours, dict | list):
        parts = list(ours) if isinstance(ours, dict) else range(len(ours))
        assert parts == (list(theirs) if isinstance(theirs, dict) else range(len(theirs))), where
        for part in parts:
            assert_alike(ours[part], theirs[part], f"{where}/{part}")
    else:
        assert theirs == (pytest.approx(ours, rel=1e-3, abs=2e-5) if isinstance(ours, float) else ours), where
