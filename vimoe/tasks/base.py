"""The contract of a task: all that differs between classification, segmentation, and a task of yours.

A task is a class and an entry in `vimoe.config.data.TASKS`. Its metric is another one
(`vimoe.metrics.base.Metric`), with an entry in METRICS and, for the names on pages, in SCORES of
`vimoe.metrics.registry`. Settings that not every task reads are listed in `vimoe.config.settings.OWN_SETTINGS`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader

from vimoe.analysis.evidence import Evidence
from vimoe.config.data import TASKS, DataConfig
from vimoe.config.model import ModelConfig
from vimoe.config.settings import Settings
from vimoe.errors import ConfigError, DataError, counted
from vimoe.metrics.base import Batches, Counts, Score, evaluate
from vimoe.metrics.registry import check_shown
from vimoe.process import Alone, Process
from vimoe.training.job import Job

logger = logging.getLogger(__name__)


class Roles(Protocol):
    """Labelled images in three roles. A sample is an image and its label, in the task's own form.

    Attributes:
        classes: names of the model's classes.
        train, val, test: samples of each role; validation decides, test is only reported.
        split_off: True if validation was taken from train.
    """

    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def train(self) -> tuple[Any, ...]: ...
    @property
    def val(self) -> tuple[Any, ...]: ...
    @property
    def test(self) -> tuple[Any, ...]: ...
    @property
    def split_off(self) -> bool: ...
    def names(self, samples: Any, /) -> list[str]:
        """Return names of samples for lists that outlast this process."""


class Scanned(Protocol):
    """Counts of opened images; its text is a line for the log."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON knows them."""


D = TypeVar("D", bound=Roles)


class Task(ABC, Generic[D]):
    """A task on images: from finding its data to figures of a trained model.

    An object holds the settings of a run, as they are used, and no data. Data are found once, by `find`, and handed to
    the methods that need them.

    Attributes:
        settings: settings of the run.
        process: this one of the processes that share the images of `loader` and of the batches like it, as
            `vimoe.data.loaders.share` does, and the files of `predict`; by default the only one. Trainings share
            otherwise (`job`).
        metric: name of the metric in `vimoe.metrics.registry.METRICS`.
        writes_predictions: True if `predict` writes a file for each image, into a folder that has to be named.
        trusts: True if images have one class each, and `predict` takes the argument `trust`: a
            `vimoe.analysis.trust.Trust`, whose scores are added to each prediction; by default None.
    """

    metric: ClassVar[str]
    writes_predictions: ClassVar[bool] = False
    trusts: ClassVar[bool] = False

    def __init__(self, settings: Settings, process: Process | None = None) -> None:
        self.settings, self.process = settings, process or Alone()

    @classmethod
    @abstractmethod
    def find(cls, config: DataConfig, classes: Sequence[str] | None = None, validation: Iterable[str] = ()) -> D:
        """Return the images of each role. They are listed, not opened.

        Args:
            config: place of the images.
            classes: class names of a trained model; by default those of the data.
            validation: names of the images that a run split off train, so that it finds the same split again.

        Raises:
            DataError: if images, labels or splits are missing or contradict one another.
        """

    @classmethod
    @abstractmethod
    def dense_model(cls, config: ModelConfig, data: D) -> nn.Module:
        """Return the dense model to start from, on torch's default device.

        Args:
            config: architecture and weights.
            data: images whose classes the model is to name.

        Raises:
            ConfigError: if it cannot be built, or does not fit the data.
        """

    @abstractmethod
    def scan(self, data: D) -> Scanned:
        """Open all images that have a role. Raises DataError where some cannot be used."""

    def divided(self, data: D) -> Sequence[D]:
        """Return the images of each task of a sequence (`data.tasks`), in their order; by default all in one.

        Raises:
            VimoeError: if they cannot be divided so.
        """
        return [data]

    def check(self, model: nn.Module, prepared: dict[str, Any], trained: Sequence[str] | None) -> None:
        """Raise VimoeError for settings that contradict the model. It costs little, and opens no image.

        Args:
            model: upcycled model, to be trained.
            prepared: preprocessing of its images, as `vimoe.data.loaders.preprocessing` gives it.
            trained: names of the modules that are trained beside the head; None for all.
        """

    @abstractmethod
    def job(
        self, model: nn.Module, data: D, scanned: Scanned, prepared: dict[str, Any], trained: Sequence[str] | None
    ) -> Job:
        """Return the batches, loss and score to train the model with, by `settings.train`.

        Args:
            model: model to be trained.
            data: images, of which train and val are read.
            scanned: result of `scan`.
            prepared: preprocessing of the model's images.
            trained: names of the modules that are trained beside the head; None for all.
        """

    @abstractmethod
    def loader(self, model: nn.Module, data: D, samples: Sequence[Any]) -> DataLoader:
        """Return batches (images, labels) of samples, in order, as the model is evaluated on them.

        Of several processes each gets its share (`process`).
        """

    def one_size(self, model: nn.Module, data: D, samples: Sequence[Any]) -> DataLoader:
        """Return batches of samples for the model itself, all images of one size."""
        return self.loader(model, data, samples)

    def validation(self, model: nn.Module, data: D) -> Batches:
        """Return batches of validation for analysis and pruning, all images of one size, or entries as `scored`."""
        return self.one_size(model, data, data.val)

    def scored(self, model: nn.Module, data: D, samples: Sequence[Any]) -> Batches:
        """Return batches of samples, in order, to score a trained model on; by default those of `loader`.

        A task may know what a part of the model gives for the images, and return entries after it
        (`vimoe.models.frozen_trunk.Entry`) in their place. Then `facts` of the batches say so (`facts_of`).
        """
        return self.loader(model, data, samples)

    def check_scored(self, data: D, role: str, samples: Sequence[Any]) -> None:
        """Warn of what a score on samples does not tell; by default nothing.

        Args:
            data: images that the model was trained on.
            role: name of the samples' role, for messages.
            samples: those that will be scored.
        """
        return

    def timed(self, model: nn.Module, data: D, samples: Sequence[Any]) -> DataLoader:
        """Return batches to time a model on that is scored on these samples, all images of one size."""
        return self.loader(model, data, samples)

    def sequences(self, data: D) -> tuple[str, ...] | None:
        """Return the video that each validation image is a frame of; None if nothing says."""
        return None

    def evaluate(
        self, model: nn.Module, loader: Batches, bar: str = "", counts: Counts | None = None,
        process: Process | None = None,
    ) -> Score:  # fmt: skip
        """Return the score of a model; bar, counts and process are those of `vimoe.metrics.base.evaluate`."""
        return evaluate(model, loader, bar, self.metric, counts=counts, process=process)

    @abstractmethod
    def elsewhere(self, model: nn.Module, path: str) -> tuple[str, DataLoader]:
        """Return batches of the images at another data path, and which they are ("test", "validation" or "all").

        Raises:
            DataError: if there are none, or their classes are not those of the model.
        """

    @abstractmethod
    def predict(
        self, model: nn.Module, files: Sequence[Path], out: Path | None = None, top: int = 5
    ) -> list[dict[str, Any]]:
        """Return a prediction for each image file.

        Args:
            model: trained model with preprocessing and label names, as `vimoe.load` gives it.
            files: image files.
            out: folder for the files of a task that writes some (`writes_predictions`).
            top: number of classes to name, for a task that names some.

        Returns:
            {"file", ...} of each, in every process, or {"file", "error"} for one that cannot be read.

        Raises:
            DataError: if none can be read.
        """

    @abstractmethod
    def line(self, prediction: dict[str, Any], top: int) -> str:
        """Return a prediction without error as text, with `top` classes."""

    def limits(self, model: nn.Module, data: D) -> Mapping[str, float]:
        """Return shares in 0..1 that bound a score, for summary.json; `Shown.limits` puts them into words."""
        return {}

    def figures(self, model: nn.Module, data: D) -> Mapping[str, Figure]:
        """Return figures for the report of a trained model, by file name."""
        return {}

    def examples(self, model: nn.Module, data: D, evidence: Evidence) -> Mapping[str, Figure]:
        """Return a contact sheet of validation images for each MoE layer, by its name."""
        return {}


def task_class(settings: Settings) -> type[Task[Any]]:
    """Return the class of the task that settings name.

    Raises:
        ConfigError: if the task, its metric or the names of its score are not registered.
    """
    kind: type[Task[Any]] = TASKS.find(settings.data.task)
    check_shown(kind.metric)
    return kind


def task_of(settings: Settings, process: Process | None = None) -> Task[Any]:
    """Return the task that settings name, for a process as of `Task`. Raises ConfigError as `task_class`."""
    return task_class(settings)(settings, process)


def facts_of(loader: Batches) -> dict[str, Any]:
    """Return entries for a result about the batches that it was computed from; none for plain batches of images."""
    return dict(getattr(loader, "facts", {}))


def check_classes(asked: int | None, classes: int) -> None:
    """Raise ConfigError for a `model.num_classes` that is not the number of classes in the data."""
    if asked not in (None, classes):
        raise ConfigError(
            f"model.num_classes={asked}: the data has {counted(classes, 'class', 'classes')}; leave it out"
        )


def warn_of_errors(predictions: Sequence[dict[str, Any]]) -> None:
    """Log how many predictions are errors, with the first. Raises DataError where all are."""
    errors = [each["error"] for each in predictions if "error" in each]
    if errors and len(errors) == len(predictions):
        raise DataError(
            errors[0] if len(errors) == 1 else f"none of {len(errors)} images can be read: {errors[0]}, ..."
        )
    if errors:
        logger.warning("%d of %d images %s not predicted, such as: %s", len(errors), len(predictions),
                       "was" if len(errors) == 1 else "were", errors[0])  # fmt: skip
