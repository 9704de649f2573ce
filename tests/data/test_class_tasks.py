"""Classes are divided into tasks by a seed; labels stay, and every image is in one task."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from vimoe.data.class_tasks import class_tasks, classes_of
from vimoe.data.classification import Data
from vimoe.errors import ConfigError, DataError
from vimoe.tasks.classification_job import fingerprint


def data(classes: int = 7, each: int = 3) -> Data:
    """Images of each class, of which the pixel says the class and the number."""
    samples = [(Image.new("RGB", (1, 1), (c, i, 0)), c) for c in range(classes) for i in range(each)]
    return Data(tuple("abcdefghij"[:classes]), tuple(samples), tuple(samples[::each]), tuple(samples[1::each]))


def test_every_image_is_in_one_task_with_its_label() -> None:
    whole = data()
    tasks = class_tasks(whole, 3, seed=0)
    assert sorted(len(classes_of(task)) for task in tasks) == [2, 2, 3]
    assert sorted(label for task in tasks for label in classes_of(task)) == list(range(7))
    for role in ("train", "val", "test"):
        divided = [sample for task in tasks for sample in getattr(task, role)]
        assert sorted(map(id, divided)) == sorted(map(id, getattr(whole, role)))
        for task in tasks:
            assert {label for _, label in getattr(task, role)} == set(classes_of(task))
            order = [id(sample) for sample in getattr(whole, role)]
            assert [id(sample) for sample in getattr(task, role)] == [
                i for i in order if i in map(id, getattr(task, role))
            ]
    assert all(task.classes == whole.classes for task in tasks)


def test_the_seed_draws_the_classes_and_names_do_not_order_them() -> None:
    first, again, other = ([classes_of(task) for task in class_tasks(data(10), 5, seed)] for seed in (0, 0, 1))
    assert first == again != other
    assert first != [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]] != other


def test_tasks_that_cannot_be_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="^data.tasks=4 with 7 classes: expected at least 2 classes for each task; lower"
    ):
        class_tasks(data(), 4, 0)
    assert len(class_tasks(data(8), 4, 0)) == 4
    with pytest.raises(
        DataError, match=r"no validation image of the classes of task \d \((\w, )+\.\.\.\): expected some"
    ):
        class_tasks(replace(data(), val=data().val[:1]), 3, 0)


def test_the_fingerprint_of_a_task_is_that_of_all() -> None:
    """So a training that goes on in one task notices that images of another have changed."""
    whole = data()
    assert {fingerprint(task) for task in class_tasks(whole, 3, 0)} == {fingerprint(whole)}
    assert fingerprint(class_tasks(whole, 3, 0)[0]) != fingerprint(replace(whole, train=whole.train[1:]))
