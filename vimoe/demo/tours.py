"""The tours by task."""

from __future__ import annotations

from typing import Any

from vimoe.demo.digits import tour_of_digits
from vimoe.demo.scenes import tour_of_scenes
from vimoe.demo.tour import tiny_models, tour_folder

TOURS = {"classification": tour_of_digits, "segmentation": tour_of_scenes}


def run_demo(out: str | None, task: str = "classification") -> tuple[str, dict[str, Any]]:
    """Runs a tour. Returns what to print and the figures.

    Args:
        out: folder to make; by default runs/demo-DATE-TIME.
        task: which of them.
    """
    folder = tour_folder(out)
    with tiny_models():
        return TOURS[task](folder)
