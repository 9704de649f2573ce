"""A registry: the names that a setting takes, and the class that each stands for."""

from __future__ import annotations

import importlib
from typing import Any

from vimoe.errors import ConfigError, nearest


class Registry(dict[str, Any]):
    """Classes by the name that a setting gives them; a new one is a new entry.

    A value is a class, or the place of one ("package.module:Class"), which is imported when it is asked for. So
    settings are checked without an import of torch.

    Args:
        setting: the setting that takes these names ("moe.router").
        entries: what is there from the start.

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
        """Raise ConfigError, with the nearest known name, for one that is not there."""
        if name not in list(self):  # a name may be anything that a user writes, a list too
            raise ConfigError(
                f"{self.setting}={name!r}: expected one of {', '.join(self)}; {nearest(name, self)}, or import what "
                f"registers it"
            )

    def find(self, name: str) -> Any:
        """Return the class of this name. Raises ConfigError for one that is not there."""
        self.check(name)
        entry = self[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            self[name] = entry = getattr(importlib.import_module(module), attribute)
        return entry
