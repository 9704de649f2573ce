"""What masks share, wherever they are read, scored or drawn."""

from __future__ import annotations

IGNORE = 255  # the value of void pixels in every mask that `vimoe.data.masks` has read; so there can be 255 classes
Colour = tuple[int, int, int]  # red, green, blue in 0..255
