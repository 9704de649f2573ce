"""Division of a data set into tasks that are learnt one after the other, each of its own classes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from vimoe.data.classification import Data, Sample
from vimoe.errors import ConfigError, DataError


def class_tasks(data: Data, count: int, seed: int) -> list[Data]:
    """Return the images of each task in the order of the tasks; the labels stay those of all classes.

    The classes are drawn without replacement, so that tasks are alike. In the order of their names, relatives would be
    in one task, because names often follow a taxonomy. Numbers of classes differ by at most one.

    Args:
        data: images of all classes.
        count: number of tasks.
        seed: seed of the draw.

    Raises:
        ConfigError: if a task would have a single class, which leaves nothing to tell apart.
        DataError: if a task has no images for validation.
    """
    if 2 * count > len(data.classes):
        raise ConfigError(
            f"data.tasks={count} with {len(data.classes)} classes: expected at least 2 classes for each task; lower it"
        )
    drawn = np.random.default_rng(seed).permutation(len(data.classes))
    tasks = []
    for number, part in enumerate(np.array_split(drawn, count), start=1):
        own = {int(label) for label in part}
        train, val, test = (_of(own, role) for role in (data.train, data.val, data.test))
        if not val:
            names = ", ".join(data.classes[label] for label in sorted(own)[:3])
            raise DataError(
                f"no validation image of the classes of task {number} ({names}, ...): expected some in each task; add "
                f"images, or lower data.tasks"
            )
        tasks.append(replace(data, train=train, val=val, test=test, whole=data.train))
    return tasks


def classes_of(task: Data) -> list[int]:
    """Return the numbers of the classes that a task has training images of."""
    return sorted({label for _, label in task.train})


def _of(classes: set[int], samples: Iterable[Sample]) -> tuple[Sample, ...]:
    return tuple(sample for sample in samples if sample[1] in classes)
