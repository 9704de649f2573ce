"""Constants of masks, shared by reading, scoring and drawing."""

from __future__ import annotations

IGNORE = 255  # value of void pixels in masks that `vimoe.data.masks` has read; so there are at most 255 classes
Colour = tuple[int, int, int]  # red, green, blue in 0..255
