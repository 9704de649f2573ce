"""Division of a data set into tasks that are learnt one after the other: by its classes, or by its train splits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from vimoe.config.data import DataConfig
from vimoe.data.labelled_images import Data, Sample
from vimoe.errors import ConfigError, DataError


def tasks_of(data: Data, config: DataConfig) -> list[Data]:
    """Return the images of each task (`DataConfig.tasks`) in the order of the tasks; without tasks all in one.

    Raises:
        VimoeError: errors of `class_tasks` and `split_tasks`.
    """
    if config.tasks is None:
        return [data]
    return split_tasks(data, config) if config.tasks == "splits" else class_tasks(data, config.tasks, config.seed)


def split_tasks(data: Data, config: DataConfig) -> list[Data]:
    """Return the images of each train split, in the order in which `config` names the splits.

    A split is what the data set takes for one, such as a rendering or a year. Not every split has to have all classes.

    Raises:
        ConfigError: if the data are not divided into several train splits, come with validation images, which belong to
            no task, or have no training image of a split in their subset.
        DataError: if a split has no image for validation.
    """
    named = f"data.tasks='splits' with data.train_split={config.train_split!r}"
    if not data.parts:
        raise ConfigError(f"{named}: expected several splits of the data; {config.path} has one; leave data.tasks out")
    if not data.split_off:
        raise ConfigError(
            f"{named} and validation images of their own: expected to split them off each task, since they belong to "
            f"none; set data.val_split=none"
        )
    for part in data.parts:
        if not part.train:
            raise ConfigError(
                f"{named}: no image of {part.split!r} was drawn for data.images_per_class={config.images_per_class}: "
                f"expected some of each split; raise it"
            )
        if not part.val:
            raise DataError(
                f"{named}: no class of {part.split!r} has two images: expected some, to split validation off; add "
                f"images, or leave the split out"
            )
    return [replace(part, parts=(), whole=data.train) for part in data.parts]


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
        tasks.append(replace(data, train=train, val=val, test=test, parts=(), whole=data.train))
    return tasks


def classes_of(task: Data) -> list[int]:
    """Return the numbers of the classes that a task has training images of."""
    return sorted({label for _, label in task.train})


def _of(classes: set[int], samples: Iterable[Sample]) -> tuple[Sample, ...]:
    return tuple(sample for sample in samples if sample[1] in classes)
