"""Checks of single settings; each raises an error of one line."""

from __future__ import annotations

import math

from vimoe.errors import ConfigError, nearest

LARGEST_SEED = 2**32 - 1  # numpy's limit


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError, with the nearest allowed value, if a value is not allowed."""
    if value not in allowed:
        raise ConfigError(f"{name}={value!r}: expected one of {', '.join(allowed)}; {nearest(value, allowed)}")


def check_flags(config: object, *names: str) -> None:
    """Raise ConfigError if one of these settings is not a bool."""
    for name in names:
        if not isinstance(value := getattr(config, name), bool):  # the text "false" would count as true
            raise ConfigError(f"{name}={value!r}: expected True or False")


def check_count(name: str, value: object, least: int, most: float = math.inf) -> None:
    """Raise ConfigError unless the value is a whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        expected = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ConfigError(f"{name}={value!r}: expected a whole number {expected}")


def check_range(name: str, value: object, low: float, high: float = math.inf) -> None:
    """Raise ConfigError unless the value is a finite number from `low` to `high`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:  # type: ignore[operator]
        expected = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
        raise ConfigError(f"{name}={value!r}: expected {expected}")
