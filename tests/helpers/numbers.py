"""Nested values of JSON that are those of another computation, but for the rounding of their numbers."""

from __future__ import annotations

from typing import Any

import pytest


def numbers(found: Any, place: str = "") -> dict[str, Any]:
    """Numbers by their place, and None where there is none, in dictionaries and lists; texts are left out."""
    if not isinstance(found, dict | list):
        return {} if isinstance(found, str) else {place: found}
    inner = found.items() if isinstance(found, dict) else enumerate(found)
    return {key: value for part, each in inner for key, value in numbers(each, f"{place}.{part}").items()}


def assert_alike(ours: Any, theirs: Any, where: str = "") -> None:
    """The same names, in the same order, with the same values; numbers of type float to rounding in float32."""
    if isinstance(ours, dict | list):
        parts = list(ours) if isinstance(ours, dict) else range(len(ours))
        assert parts == (list(theirs) if isinstance(theirs, dict) else range(len(theirs))), where
        for part in parts:
            assert_alike(ours[part], theirs[part], f"{where}/{part}")
    else:
        assert theirs == (pytest.approx(ours, rel=1e-3, abs=2e-5) if isinstance(ours, float) else ours), where
