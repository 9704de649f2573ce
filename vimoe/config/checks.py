"""Checks of settings: bounds stand at the field of a setting, and one function holds all fields to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import field, fields, is_dataclass
from functools import cache, partial
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vimoe.errors import ConfigError, choice

LARGEST_SEED = 2**32 - 1  # numpy's limit


def bounded(default: float | None, low: float, high: float = math.inf) -> Any:
    """Return a dataclass field for a number from `low` to `high`."""
    return field(default=default, metadata={"low": low, "high": high})


def one_of(default: str | None, allowed: tuple[str, ...]) -> Any:
    """Return a dataclass field for a text out of `allowed`."""
    return field(default=default, metadata={"allowed": allowed})


def check_fields(config: Any) -> None:
    """Raise ConfigError if a field of a dataclass has a value outside of its type or bounds.

    Flags, literals, texts, settings of settings, and numbers with bounds are checked; None is taken where the type
    has it.
    """
    for name, check in _checks(config.__class__).items():
        check(name, getattr(config, name))


@cache
def _checks(config: type) -> dict[str, Callable[[str, object], None]]:
    """Return the check of each field that has one."""
    checks: dict[str, Callable[[str, object], None]] = {}
    hints = get_type_hints(config)
    for each in fields(config):
        hint = hints[each.name]
        kinds = get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)
        words = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), None)
        if words and int in kinds:
            checks[each.name] = partial(_unless_none, partial(check_count_or_word, words=words, **each.metadata))
            continue
        if set(kinds) <= {str, type(None)} and not each.metadata:
            checks[each.name] = partial(_unless_none, check_text) if type(None) in kinds else check_text
        for kind in kinds:
            check = _check(kind, dict(each.metadata))
            if check:
                checks[each.name] = partial(_unless_none, check) if type(None) in kinds else check
    return checks


def _check(kind: Any, bounds: dict[str, Any]) -> Callable[[str, object], None] | None:
    if get_origin(kind) is Literal:
        return partial(check_choice, allowed=get_args(kind))
    by_kind: dict[Any, Callable[..., None]] = {int: check_count, float: check_range, str: check_choice}
    if bounds and kind in by_kind:
        return partial(by_kind[kind], **bounds)
    if is_dataclass(kind):
        return partial(check_section, kind=kind)
    return check_flag if kind is bool else None


def _unless_none(check: Callable[[str, object], None], name: str, value: object) -> None:
    if value is not None:
        check(name, value)


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError, with the nearest allowed value, if a value is not allowed."""
    if value not in allowed:
        raise ConfigError(f"{name}={value!r}: {choice(value, allowed)}")


def check_text(name: str, value: object) -> None:
    """Raise ConfigError unless the value is a text."""
    if not isinstance(value, str):
        raise ConfigError(f"{name}={value!r}: expected a text; write str(...) around a path")


def check_flag(name: str, value: object) -> None:
    """Raise ConfigError unless the value is a bool."""
    if not isinstance(value, bool):  # the text "false" would count as true
        raise ConfigError(f"{name}={value!r}: expected True or False")


def check_section(name: str, value: object, kind: Any) -> None:
    """Raise ConfigError unless the value is an instance of the dataclass."""
    if not isinstance(value, kind):
        raise ConfigError(f"{name}={value!r}: expected a {kind.__name__}, such as {kind()!r}")


def check_count(name: str, value: object, low: float, high: float = math.inf) -> None:
    """Raise ConfigError unless the value is a whole number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        expected = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ConfigError(f"{name}={value!r}: expected a whole number {expected}")


def check_count_or_word(name: str, value: object, words: tuple[str, ...], low: float, high: float = math.inf) -> None:
    """Raise ConfigError unless the value is one of some words, or a whole number from `low` to `high`."""
    if value in words:
        return
    try:
        check_count(name, value, low, high)
    except ConfigError as error:
        raise ConfigError(f"{error}, or {' or '.join(map(repr, words))}") from None


def check_range(name: str, value: object, low: float, high: float = math.inf) -> None:
    """Raise ConfigError unless the value is a finite number from `low` to `high`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:  # type: ignore[operator]
        expected = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
        raise ConfigError(f"{name}={value!r}: expected {expected}")
