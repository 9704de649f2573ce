"""The contract of a metric, and the evaluation that goes through it.

Axes: B images of a batch, P patches of an image.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from vimoe.errors import ConfigError, DataError, counted
from vimoe.metrics.registry import METRICS, kind_of
from vimoe.models.frozen_trunk import Entry
from vimoe.models.interface import label_names, logits_of, unwrapped
from vimoe.parallel.abreast import abreast
from vimoe.process import Process
from vimoe.terminal import track

# of images (B, ...), or an entry behind a trunk that was computed before, and labels (B, ...), on any device
Batches = Iterable[tuple[Tensor, Tensor]] | Iterable[tuple[Entry, Tensor]]


class Score(ABC):
    """Quality of a model on labelled images; a subclass is a frozen dataclass of figures.

    Attributes:
        kind: name in METRICS and SCORES; JSON does not have it (`vimoe.metrics.registry.kind_of`).
        images: number of images that the figures are of.
    """

    kind: ClassVar[str]
    images: int

    @property
    @abstractmethod
    def rank(self) -> tuple[float, ...]:
        """Sort key: of two scores the better one has the larger. Its first number is a share in 0..1."""

    @property
    @abstractmethod
    def columns(self) -> dict[str, float]:
        """Figures for the logs, by name; "loss" is the mean in nats, others are in 0..1."""

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON knows them."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the score of these figures, the inverse of `to_dict`."""
        return cls(**values)


@dataclass(frozen=True)
class MeanScore(Score):
    """Means over images: the share that is right, in 0..1, and the loss in nats.

    In JSON and in the logs the share has the kind for its key.
    """

    right: float
    loss: float
    images: int

    @property
    def rank(self) -> tuple[float, float]:
        """Sort key: the share, then the loss."""
        return self.right, -self.loss

    @property
    def columns(self) -> dict[str, float]:
        return {"loss": self.loss, self.kind: self.right}

    def to_dict(self) -> dict[str, Any]:
        return {**self.columns, "images": self.images}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return cls(values[cls.kind], values["loss"], values["images"])

    def __str__(self) -> str:
        return f"{self.kind} {self.right:.2%}, loss {self.loss:.4f} of {counted(self.images, 'image')}"


class Counts(ABC):
    """Sums over images that a score follows from.

    Attributes:
        sums: names of the attributes, numbers or tensors, that add up over the shares of several processes.
    """

    sums: ClassVar[tuple[str, ...]]

    def over(self, process: Process) -> Self:
        """Return the counts of all processes."""
        counts = copy.copy(self)
        for name in self.sums if process.count > 1 else ():
            own = getattr(self, name)
            total = process.sum(torch.as_tensor(own, dtype=torch.float64 if isinstance(own, float) else None))
            setattr(counts, name, total if isinstance(own, Tensor) else total.item())
        return counts

    @abstractmethod
    def add(self, outputs: Tensor, labels: Tensor) -> None:
        """Count a batch: outputs (B, classes, ...) of the model, and labels (B, ...) on the same device."""

    @abstractmethod
    def score(self) -> Score:
        """Return the score of all batches so far."""


class Metric(ABC):
    """Measure of a model on labelled images, for all of them together and for each one.

    A subclass says what labels are: int64 of one shape, images first. `analyze` and `prune` learn of labels through
    this class alone.

    Attributes:
        model: model that is measured.
        score_type: class of the scores; its `kind` is the metric's name in METRICS.
        by_patch: True if each patch of an image has a class of its own, False if the image has one.
        calibrates: True if outputs are logits (B, classes) of one class for each image and the loss is their
            cross-entropy, and scores have the column "ece". Then `vimoe.metrics.calibration` fits a temperature.
    """

    score_type: ClassVar[type[Score]]
    by_patch: ClassVar[bool] = False
    calibrates: ClassVar[bool] = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def classes(self) -> list[str]:
        """Names of the classes that `classes_of` numbers; by default those of the model."""
        return label_names(self.model)

    def counts(self) -> Counts:
        """Return counts of nothing yet; by default of means over images, for a `score_type` that is a `MeanScore`."""
        return MeanCounts(self)

    def contours(self) -> Counts:
        """Return counts whose score has the accuracy of contours too, which takes time.

        Raises:
            ConfigError: by default, for a model whose predictions are no masks.
        """
        raise ConfigError(f"contours of a {self.score_type.kind} model: expected one that predicts masks; leave it out")

    @abstractmethod
    def check(self, images: Tensor, labels: Tensor) -> None:
        """Raise DataError for a batch that the model does not take, or labels that are none.

        Args:
            images: (B, channels, height, width), or what else the model takes.
            labels: (B, ...) from the loader, of any type of whole number.
        """

    def labelled(self, labels: Tensor) -> Tensor:
        """Return (B,) True for the images of which a label says anything; by default all."""
        return torch.ones(len(labels), dtype=torch.bool, device=labels.device)

    @abstractmethod
    def of_each_image(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B,) the loss of each image in nats, and (B,) the share of it that is right, in 0..1.

        Args:
            outputs: (B, classes, ...) of the model.
            labels: (B, ...) on the same device.
        """

    @abstractmethod
    def classes_of(self, labels: Tensor) -> Tensor:
        """Return the class (B,) of each image, or (B, P) of each patch if `by_patch`; -1 for none."""


class MeanCounts(Counts):
    """Sums of what a metric says of each image."""

    sums = ("images", "right", "loss")

    def __init__(self, metric: Metric) -> None:
        self.metric, self.images, self.right, self.loss = metric, 0, 0.0, 0.0

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        loss, right = self.metric.of_each_image(outputs, labels)
        self.images += len(labels)
        self.right, self.loss = self.right + float(right.sum()), self.loss + float(loss.sum())

    def score(self) -> Score:
        n, kind = max(self.images, 1), self.metric.score_type
        return kind.from_dict({kind.kind: self.right / n, "loss": self.loss / n, "images": self.images})


def metric_of(model: nn.Module, name: str | None = None) -> Metric:
    """Return the metric of a model.

    Args:
        model: model to measure.
        name: name in METRICS; by default the model's attribute `metric`, and "classification" for one that has none.

    Raises:
        ConfigError: if no such name is registered.
    """
    model = unwrapped(model)
    metric: Metric = METRICS.find(name or str(getattr(model, "metric", "classification")))(model)
    return metric


def read_score(values: Mapping[str, Any]) -> Score:
    """Return a score from JSON, of the class of its kind."""
    score: Score = METRICS.find(kind_of(values)).score_type.from_dict(values)
    return score


def evaluate(
    model: nn.Module,
    loader: Batches,
    bar: str = "",
    metric: str | None = None,
    outputs: Callable[[nn.Module, Tensor], Tensor] = logits_of,
    counts: Counts | None = None,
    process: Process | None = None,
) -> Score:
    """Return the score of a model over a loader of (images, labels). Leaves the model in eval mode.

    Args:
        model: model to score.
        loader: batches on any device.
        bar: name of the progress bar; without it there is none.
        metric: name in METRICS; by default the model's own (`metric_of`).
        outputs: function of the model and its argument on its device, such as images; it returns logits.
        counts: counts to add the batches to; by default new ones of the metric.
        process: this one of the processes that have shares of the images; the score is of all of them.

    Raises:
        DataError: if the model does not take the batches.
    """
    measure = metric_of(model, metric)
    counts = measure.counts() if counts is None else counts
    start = Entry(torch.empty(0))
    with abreast(model, process) as wait:
        for start, labels in batches(measure, loader, bar):
            with torch.no_grad(), start.resumed(model) as x:
                counts.add(outputs(model, x), labels)
        with start.resumed(model):
            wait()
    return (counts if process is None else counts.over(process)).score()


def batches(metric: Metric, loader: Batches, bar: str = "") -> Iterator[tuple[Entry, Tensor]]:
    """Yield (entry, labels) of each batch, checked, on the model's device; the entry in its type, labels in int64.

    The model is put in eval mode, and empty batches are left out.

    Args:
        metric: metric of the model.
        loader: batches on any device.
        bar: name of the progress bar; without it there is none.

    Raises:
        DataError: if the loader gives something else than pairs of tensors that the model takes, or labels that are
            no whole numbers.
    """
    if isinstance(loader, Tensor) or not hasattr(loader, "__iter__"):
        raise DataError(f"the loader is of type {type(loader).__name__}: expected batches of (images, labels)")
    metric.model.eval()
    weight = next(metric.model.parameters())
    for batch in track(loader, bar):
        start, labels = _pair(batch)
        if start.cut is None:  # of features the metric knows no shape
            metric.check(start.inputs, labels)
        if len(start):
            yield start.to(weight), labels.to(weight.device, torch.int64)


def signature(labels: Tensor) -> Tensor:
    """Return (B,) a number for each image, by which a second reading of a loader notices another order."""
    return labels[:, None].flatten(1).sum(dim=1)


def check_shape(labels: Tensor, images: int, shape: str, axes: int) -> None:
    """Raise DataError for labels of another shape, or not so many as images.

    Args:
        labels: labels of a batch from the loader.
        images: number of images of the batch.
        shape: expected shape, in words.
        axes: expected number of axes.
    """
    if labels.ndim != axes or len(labels) != images:
        raise DataError(
            f"the loader gives labels of {labels.dtype} and shape {tuple(labels.shape)} for {images} images: expected "
            f"whole numbers of shape {shape}"
        )


def check_range(labels: Tensor, classes: int) -> None:
    """Raise DataError for a label that is not one of 0 to `classes` - 1."""
    if not labels.numel():
        return
    low, high = (int(each) for each in labels.aminmax())
    if low < 0 or high >= classes:
        odd = low if low < 0 else high
        raise DataError(
            f"the loader gives the label {odd}: expected 0 to {classes - 1}, the model has {classes} classes"
        )


def _pair(batch: Any) -> tuple[Entry, Tensor]:
    """Return the entry and labels of a batch. Raises DataError for anything but images and whole numbers."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        what = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (tuple, list, dict)) else "")
        raise DataError(f"the loader gives {what}: expected pairs (images, labels); wrap it in one that gives these")
    images, labels = batch
    start = images if isinstance(images, Entry) else Entry(images)
    for name, part in (("images", start.inputs), ("labels", labels)):
        if not isinstance(part, Tensor):
            raise DataError(f"the loader gives {name} of type {type(part).__name__}: expected a tensor; convert it")
    if labels.is_floating_point() or labels.is_complex():
        raise DataError(
            f"the loader gives labels of {labels.dtype} and shape {tuple(labels.shape)} for {len(images)} images: "
            f"expected whole numbers; convert them"
        )
    return start, labels
