"""Mistakes of users. Each message names the value, what was expected and the remedy, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class VimoeError(ValueError):
    """A mistake of the caller. The command line prints its message as one line and exits with status 2.

    >>> import vimoe
    >>> try:
    ...     vimoe.MoEConfig(routing="imgae")
    ... except vimoe.VimoeError as error:
    ...     print(error)
    routing='imgae': expected one of image, token; did you mean 'image'?
    """


class ConfigError(VimoeError):
    """A setting has an impossible value."""


class SurgeryError(VimoeError):
    """A model or one of its layers cannot be converted as asked. Nothing was changed."""


class DataError(VimoeError):
    """Images, labels or folders are not as expected."""


class FolderError(VimoeError):
    """A model folder or run folder is missing or incomplete, or its model cannot be rebuilt."""


class Stopped(KeyboardInterrupt):
    """A training that was asked to end, and left a checkpoint from which it can go on.

    Attributes:
        status: exit status of a process that a signal ended, 128 plus the signal's number.
    """

    def __init__(self, run: Path, signal: int) -> None:
        super().__init__(f"stopped, with a checkpoint; go on with: vimoe train --resume {run}")
        self.status = 128 + signal


def nearest(word: object, known: Iterable[object], listed: int = 12) -> str:
    """Return the remedy for a misspelt name: the nearest known name, or a list of them if none is near.

    Args:
        word: name that was given.
        known: right names.
        listed: largest number of names to list.

    >>> nearest("imgae", ["image", "token"])
    "did you mean 'image'?"
    >>> nearest("xyz", ["image", "token"])
    'known: image, token'
    """
    names = [str(name) for name in known]
    close = difflib.get_close_matches(str(word), names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    if not names:
        return "there is none"
    return f"known: {', '.join(names[:listed])}{', ...' if len(names) > listed else ''}"


def choice(word: object, known: Iterable[str]) -> str:
    """Return expectation and remedy for a value that is not one of a few.

    >>> choice("imgae", ["image", "token"])
    "expected one of image, token; did you mean 'image'?"
    >>> choice("patch", ["image", "token"])
    'expected one of image, token; choose one of them'
    """
    names = list(known)
    close = difflib.get_close_matches(str(word), names, n=1)
    return f"expected one of {', '.join(names)}; " + (f"did you mean {close[0]!r}?" if close else "choose one of them")


def counted(count: int, one: str, many: str = "") -> str:
    """Return a number with its noun, and what else depends on it, in singular or plural.

    Args:
        count: the number.
        one: words after the number 1.
        many: words after other numbers; by default `one` with an s.

    >>> counted(1, "class", "classes"), counted(2, "image"), counted(0, "image")
    ('1 class', '2 images', '0 images')
    """
    return f"{count} {one if count == 1 else many or one + 's'}"


def expect(name: str, value: object, kind: type | tuple[type, ...], remedy: str) -> None:
    """Raise VimoeError if an argument is of another type.

    >>> expect("config", {"layers": "all"}, int, "give a number")
    Traceback (most recent call last):
    vimoe.errors.VimoeError: config is of type dict, {'layers': 'all'}: expected int; give a number
    """
    if not isinstance(value, kind):
        shown = " ".join(repr(value).split())
        shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
        given = "None" if value is None else f"of type {type(value).__name__}, {shown}"
        expected = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        raise VimoeError(f"{name} is {given}: expected {expected}; {remedy}")


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message, or the error's class if the message is empty."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def beside(path: Path) -> str:
    """Return the remedy for a missing path: the nearest name in its folder, or advice to check the path."""
    if path.is_symlink():
        return "it is a link whose target is missing"
    names = [p.name for p in path.parent.iterdir() if p.name != path.name] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {str(path.with_name(close[0]))!r}?" if close else "check the path"
