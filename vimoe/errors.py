"""What a user can get wrong. Each message names the value, what was expected and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class VimoeError(ValueError):
    """A mistake of the caller. The command line prints its message as one line and exits with 2."""


class ConfigError(VimoeError):
    """A setting has a value that it cannot have."""


class SurgeryError(VimoeError):
    """A model, or a layer of it, cannot be converted as asked. Nothing was changed."""


class DataError(VimoeError):
    """Images, labels or folders are not as expected."""


class FolderError(VimoeError):
    """A model folder or run folder is missing, incomplete or would not rebuild its model."""


class Stopped(KeyboardInterrupt):
    """A training that was asked to end, and left a checkpoint to go on from.

    Attributes:
        status: exit status of a process that a signal ended, 128 and its number.
    """

    def __init__(self, run: Path, signal: int) -> None:
        super().__init__(f"stopped, with a checkpoint; go on with: vimoe train --resume {run}")
        self.status = 128 + signal


def nearest(word: object, known: Iterable[object], listed: int = 12) -> str:
    """The remedy for a misspelt name: ``did you mean 'image'?``, or what is known where nothing is near.

    Args:
        word: what was given.
        known: the right names.
        listed: how many of them to show at most where none is near.

    >>> nearest("imgae", ["image", "token"])
    "did you mean 'image'?"
    """
    names = [str(name) for name in known]
    close = difflib.get_close_matches(str(word), names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    if not names:
        return "there is none"
    return f"known: {', '.join(names[:listed])}{', ...' if len(names) > listed else ''}"


def expect(name: str, value: object, kind: type, remedy: str) -> None:
    """Raise VimoeError where an argument is of another kind.

    >>> expect("config", {"layers": "all"}, int, "give a number")
    Traceback (most recent call last):
    vimoe.errors.VimoeError: config is of type dict, {'layers': 'all'}: expected int; give a number
    """
    if not isinstance(value, kind):
        shown = " ".join(repr(value).split())
        shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
        what = "None" if value is None else f"of type {type(value).__name__}, {shown}"
        raise VimoeError(f"{name} is {what}: expected {kind.__name__}; {remedy}")


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line; its class where it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def beside(path: Path) -> str:
    """The remedy for a path that is not there: the nearest name in its folder, or a look at the path."""
    if path.is_symlink():
        return "it is a link to what is not there"
    names = [p.name for p in path.parent.iterdir() if p.name != path.name] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {str(path.with_name(close[0]))!r}?" if close else "check the path"
