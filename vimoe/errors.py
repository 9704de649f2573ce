"""What a user can get wrong. Each message names the value, what was expected and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


def nearest(word: object, known: Iterable[object]) -> str:
    """The remedy for a misspelt name: ``did you mean 'last:2'?``, or the known names where none is near.

    >>> nearest("imgae", ["image", "token"])
    "did you mean 'image'?"
    """
    names = [str(name) for name in known]
    close = difflib.get_close_matches(str(word), names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"known: {shown}" if names else "none is known"
