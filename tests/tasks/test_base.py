"""Every task says what it is through the contract, and settings know which of them it reads."""

from __future__ import annotations

import inspect
import logging

import pytest

from vimoe.config.data import TASKS, DataConfig
from vimoe.config.settings import OWN_SETTINGS, SECTIONS, Settings, check_reads
from vimoe.config.train import TrainConfig
from vimoe.errors import ConfigError, DataError
from vimoe.metrics.classification import ClassificationMetric
from vimoe.metrics.registry import METRICS
from vimoe.tasks.base import Task, check_classes, task_of, warn_of_errors
from vimoe.tasks.classification import Classification


@pytest.mark.parametrize("name", [*TASKS])
def test_a_task_is_a_class_whose_metric_and_settings_are_known(name: str) -> None:
    task = task_of(Settings(data=DataConfig(task=name)))
    assert isinstance(task, Task) and not inspect.isabstract(type(task))
    assert task.metric in METRICS
    for full in OWN_SETTINGS[name]:
        section, setting = full.split(".")
        assert setting in SECTIONS[section].__dataclass_fields__


def test_an_unknown_task_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="data.task='segmentatoin': expected one of .*did you mean 'segmentation'"):
        DataConfig(task="segmentatoin")


def test_a_task_without_an_entry_reads_no_setting_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "mine", Task)
    mixup = {"data": DataConfig(task="mine"), "train": TrainConfig(mixup=0.2)}
    with pytest.raises(ConfigError, match=r"train.mixup=0.2 with data.task='mine': expected it with classification on"):
        Settings(**mixup)
    monkeypatch.setitem(OWN_SETTINGS, "mine", ("train.mixup",))
    assert Settings(**mixup).train.mixup == 0.2
    check_reads("mine", "train.lr", 1)  # every task reads it
    with pytest.raises(ConfigError, match="expected it with classification or mine only"):
        check_reads("segmentation", "train.mixup", 0.2)


def test_a_task_whose_metric_has_no_names_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "mine", type("Mine", (Classification,), {"metric": "mine"}))
    monkeypatch.setitem(METRICS, "mine", ClassificationMetric)
    with pytest.raises(ConfigError, match="kind of score='mine': expected one of"):
        task_of(Settings(data=DataConfig(task="mine")))


def test_a_number_of_classes_is_that_of_the_data() -> None:
    check_classes(None, 3)
    check_classes(3, 3)
    with pytest.raises(ConfigError, match="model.num_classes=4: the data has 3 classes"):
        check_classes(4, 3)


def test_errors_of_some_files_are_logged_and_of_all_raised(caplog: pytest.LogCaptureFixture) -> None:
    bad, good = {"file": "a", "error": "a cannot be read"}, {"file": "b"}
    with caplog.at_level(logging.WARNING, "vimoe"):
        warn_of_errors([good])
        assert not caplog.records
        warn_of_errors([bad, good])
    assert caplog.records[0].getMessage() == "1 of 2 images was not predicted, such as: a cannot be read"
    with pytest.raises(DataError, match="^a cannot be read$"):
        warn_of_errors([bad])
    with pytest.raises(DataError, match="none of 2 images can be read: a cannot be read, ..."):
        warn_of_errors([bad, bad])
