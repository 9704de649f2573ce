"""A registry: the values of a setting, and the class for each."""

from __future__ import annotations

import importlib
from typing import Any

from vimoe.errors import ConfigError, choice


class Registry(dict[str, Any]):
    """Classes by their name in a setting; a new class is a new entry.

    An entry is a class, or its import path ("package.module:Class"), which is imported when it is needed. So settings
    are checked without an import of torch.

    Args:
        setting: name of the setting ("moe.router").
        entries: first entries.

    Example:
        >>> shapes = Registry("shape", {"dict": "builtins:dict"})
        >>> shapes["list"] = list
        >>> shapes.find("dict"), shapes.find("list")
        (<class 'dict'>, <class 'list'>)
    """

    def __init__(self, setting: str, entries: dict[str, Any]) -> None:
        super().__init__(entries)
        self.setting = setting

    def check(self, name: object) -> None:
        """Raise ConfigError, with the nearest known name, if a name is unknown."""
        if name not in list(self):  # a name may be anything that a user writes, a list too
            raise ConfigError(f"{self.setting}={name!r}: {choice(name, self)}, or import what registers it")

    def find(self, name: str) -> Any:
        """Return the class of a name. Raises ConfigError if it is unknown."""
        self.check(name)
        entry = self[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            self[name] = entry = getattr(importlib.import_module(module), attribute)
        return entry
