"""The tasks by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vimoe.config.settings import Settings
from vimoe.tasks.classification import Classification
from vimoe.tasks.segmentation import Segmentation

Problem = Classification | Segmentation


def problem_of(settings: Settings, classes: Sequence[str] | None = None, validation: Iterable[str] = ()) -> Problem:
    """The problem that the settings name, with its data found."""
    kind = Segmentation if settings.data.task == "segmentation" else Classification
    return kind(settings, classes, validation)
