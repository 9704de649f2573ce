"""Registries: classes by name, imported when asked for; an unknown name gets the nearest known one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vimoe.config.registry import Registry
from vimoe.errors import ConfigError


def test_a_class_or_its_place_is_found_by_name() -> None:
    shapes = Registry("shape", {"deque": "collections:deque"})
    shapes["list"] = list
    assert shapes.find("list") is list
    assert shapes.find("deque").__name__ == "deque"
    assert shapes["deque"].__name__ == "deque"  # imported once


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    shapes = Registry("moe.shape", {"deque": "collections:deque"})
    with pytest.raises(ConfigError, match="moe.shape='deqe': expected one of deque; .*deque.*import what registers it"):
        shapes.find("deqe")


def test_settings_are_checked_without_an_import_of_torch() -> None:
    code = "import sys, vimoe.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
