"""All numbers in nested values, by their place, so that two of them can be compared to a tolerance."""

from __future__ import annotations

from typing import Any


def numbers(found: Any, place: str = "") -> dict[str, Any]:
    """Numbers, and None where there is none, in dictionaries and lists; texts are left out."""
    if not isinstance(found, dict | list):
        return {} if isinstance(found, str) else {place: found}
    inner = found.items() if isinstance(found, dict) else enumerate(found)
    return {key: value for part, each in inner for key, value in numbers(each, f"{place}.{part}").items()}
