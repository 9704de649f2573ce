"""The tours by task."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vimoe import run_folder
from vimoe.demo.digits import tour_of_digits
from vimoe.demo.scenes import tour_of_scenes

TOURS = {"classification": lambda _folder: tour_of_digits(), "segmentation": tour_of_scenes}


def run_demo(out: str | None, task: str = "classification") -> tuple[str, dict[str, Any]]:
    """Run a tour, and return the text to print and the figures.

    Args:
        out: folder to make; by default runs/demo-DATE-TIME.
        task: name of the tour.

    Raises:
        FolderError: if the folder cannot be made.
    """
    folder = run_folder.new_run(out or f"runs/demo-{time.strftime('%Y%m%d-%H%M%S')}")
    with _for_tiny_models():
        return TOURS[task](folder).run(folder)


@contextmanager
def _for_tiny_models() -> Iterator[None]:
    """Compute in one thread, since several would only wait for one another, and log errors alone."""
    threads, log = torch.get_num_threads(), logging.getLogger("vimoe")
    level = log.level
    torch.set_num_threads(1)
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        log.setLevel(level)
