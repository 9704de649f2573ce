"""Classes are divided into tasks by a seed, or splits are the tasks; labels stay, and every image is in one task."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from vimoe.config.data import DataConfig
from vimoe.data.labelled_images import Data
from vimoe.data.tasks import class_tasks, classes_of, split_tasks, tasks_of
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


def of_two_splits() -> tuple[Data, DataConfig]:
    """Images of all classes in two splits, one of which has validation images of the first class alone."""
    whole = data()
    odd, even = (
        replace(whole, train=whole.train[i::2], val=val, split=name)
        for i, val, name in ((1, whole.val, "photo"), (0, whole.val[:1], "sketch"))
    )
    config = DataConfig(tasks="splits", train_split="photo+sketch")
    return replace(whole, parts=(odd, even), split_off=True), config


def test_splits_are_tasks_in_the_order_in_which_they_are_named() -> None:
    whole, config = of_two_splits()
    tasks = tasks_of(whole, config)
    assert [task.split for task in tasks] == ["photo", "sketch"] and config.task_count == 2
    assert [task.train for task in tasks] == [whole.train[1::2], whole.train[::2]]
    assert [classes_of(task) for task in tasks] == [list(range(7)), list(range(7))]
    assert {fingerprint(task) for task in tasks} == {fingerprint(whole)}
    assert len(tasks_of(whole, replace(config, tasks=3))) == 3  # classes of both splits
    assert tasks_of(whole, replace(config, tasks=None)) == [whole]


def test_splits_that_are_no_tasks_are_refused() -> None:
    whole, config = of_two_splits()
    named = r"^data.tasks='splits' with data.train_split='photo\+sketch'"
    with pytest.raises(ConfigError, match=f"{named}: expected several splits of the data"):
        split_tasks(replace(whole, parts=()), config)
    with pytest.raises(ConfigError, match=f"{named} and validation images of their own: .*; set data.val_split=none"):
        split_tasks(replace(whole, split_off=False), config)
    parts = (whole.parts[0], replace(whole.parts[1], val=()))
    with pytest.raises(DataError, match=f"{named}: no class of 'sketch' has two images"):
        split_tasks(replace(whole, parts=parts), config)
    few, config2 = (whole.parts[0], replace(whole.parts[1], train=())), replace(config, images_per_class=2)
    with pytest.raises(ConfigError, match=f"{named}: no image of 'sketch' was drawn for data.images_per_class=2"):
        split_tasks(replace(whole, parts=few), config2)
    with pytest.raises(ConfigError, match="^tasks='splits' with train_split='train': expected a split for each task"):
        DataConfig(tasks="splits")
    with pytest.raises(ConfigError, match="^tasks=1: expected a whole number of at least 2, or 'splits'$"):
        DataConfig(tasks=1)
