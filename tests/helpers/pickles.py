"""A pickle that would tell if it were loaded."""

from __future__ import annotations

PICKLE = b"cos\nsystem\n(S'touch executed'\ntR."
