"""Features of a frozen trunk, computed once: who reads what comes after it need not run it again.

The inputs of the first block after the trunk are kept in files (`vimoe.tasks.feature_files`): one for each augmented
view of the training images, and one for each list of images that models are scored on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vimoe.config.settings import Settings
from vimoe.config.train import TrainConfig
from vimoe.data.labelled_images import Data, Sample
from vimoe.data.loaders import processes, share
from vimoe.data.order import Shuffled
from vimoe.errors import ConfigError, FolderError
from vimoe.metrics.base import evaluate
from vimoe.models.frozen_trunk import Cut, Entry, cut_before
from vimoe.models.precision import resolve
from vimoe.models.upcycling import sites
from vimoe.moe.layer import moe_layers
from vimoe.process import Alone, Process
from vimoe.tasks.classification_job import job_on_images
from vimoe.tasks.feature_files import FeatureFiles
from vimoe.training.job import Job

Kept = TypeVar("Kept")

logger = logging.getLogger(__name__)


class Features(Dataset):
    """Pairs (features (T, C) in float16, label) by (index, view). A worker process maps the files itself."""

    def __init__(self, files: Sequence[Path], labels: Sequence[int]) -> None:
        self.files, self.labels = files, labels
        self.views = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        index, view = key
        return torch.from_numpy(np.array(self.views[view][index])), self.labels[index]

    def __reduce__(self) -> tuple[type, tuple[Sequence[Path], Sequence[int]]]:
        return Features, (self.files, self.labels)


class Views(Shuffled):
    """Order of (index, view): all images of an epoch have one view, and epochs take the views in turn."""

    def __init__(self, images: int, seed: int, views: int) -> None:
        super().__init__(images, seed)
        self.views = views

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for index in self.images_at(self.skip, self.images):
            yield index, (self.epoch - 1) % self.views


class Entries:
    """Batches (entry after the trunk, labels) of images in order, in the place of batches of images.

    Attributes:
        facts: what a result has to say of its source (`vimoe.tasks.base.facts_of`).
        batch_sampler: places of the images of each batch, as `vimoe.data.loaders.share` gives them.

    Args:
        file: file of the images' features.
        labels: label of each image, or its mask.
        cut: cut that the features belong to.
        batch_size: number of images of a batch of all processes.
        process: this one of the processes that share the images; by default they are all for this one.
    """

    def __init__(
        self, file: Path, labels: Sequence[int] | Tensor, cut: Cut, batch_size: int, process: Process | None = None
    ) -> None:
        self.features = np.load(file, mmap_mode="r", allow_pickle=False)
        self.labels, self.cut = torch.as_tensor(labels), cut
        self.batch_sampler = share(len(labels), batch_size, process)
        self.facts = {"features": {"before": cut.before}}

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[tuple[Entry, Tensor]]:
        for places in self.batch_sampler:
            rows = slice(places.start, places.stop, places.step)
            yield Entry(torch.from_numpy(np.array(self.features[rows])), self.cut), self.labels[rows]


class FeatureCache:
    """Features that the frozen trunk of a model gives for the images of a data set, and the job to learn from them.

    View v has the augmentation of epoch v. With as many views as epochs, training equals training on images, up to
    rounding; so fewer views are part of more. A later stage of a training goes on in turn through the same views.
    Validation is computed as evaluation computes, in float32, whatever the precision that trains.

    Args:
        model: model on any device; it is moved to the device that trains.
        trained: names of the modules that are trained beside the head.
        data: images, of which train and val are read.
        prepared: preprocessing, as `vimoe.data.loaders.preprocessing` gives it.
        config: augmentation, batches, seed and precision; no mixup.
        views: number of augmented versions of each training image; there are never more than epochs.
        workers: number of processes that decode images, as `DataConfig.workers`.
        metric: name in METRICS of the metric that scores validation.

    Raises:
        ConfigError: if the model cannot be cut.
        FolderError: if the disk has no room for the features.
    """

    def __init__(
        self, model: nn.Module, trained: Sequence[str], data: Data, prepared: dict[str, Any], config: TrainConfig,
        views: int, workers: int | None = None, metric: str = "classification",
    ) -> None:  # fmt: skip
        assert not config.mixup and not config.cutmix  # Settings refuses them: they mix pixels
        config = resolve(config, model)
        self.data, self.config, self.workers, self.metric = data, config, workers, metric
        self.pixels = job_on_images(data, prepared, config, workers)
        self.files = FeatureFiles(model, cut_before(model, trained, prepared["input_size"]), prepared)
        dataset: Any = self.pixels.loader.dataset
        # the policy is named because its transforms do not tell all of it
        augmentation = f"{config.auto_augment} {dataset.transform!r}"
        sources = [source for source, _ in data.train]
        self.train = self.files.views(dataset, sources, config, views, workers, augmentation)
        self.what = f"{in_words(len(self.train))} and validation"
        self.val = self.files.as_evaluated(data.val, "validation", 2 * config.batch_size, workers)
        self.files.missing([*self.train, self.val], self.what)  # says if there is no room

    def job(self) -> Job:
        """Compute the missing files, and return the job, whose batches and score are of features."""
        config, process = self.config, Process()
        made = process.first_then_all(self.files.make, [*self.train, self.val], self.what)
        loader = DataLoader(
            Features([file.path for file in self.train], [label for _, label in self.data.train]), config.batch_size,
            sampler=Views(len(self.data.train), config.seed, len(self.train)), drop_last=True,
            **processes(self.workers),
        )  # fmt: skip
        labels = [label for _, label in self.data.val]
        val = Entries(self.val.path, labels, self.files.cut, 2 * config.batch_size, process)
        return replace(
            self.pixels, loader=loader, prepare=lambda features, labels: (features.float(), labels),
            forward=self.files.cut.rest,
            evaluate=lambda model: evaluate(model, val, metric=self.metric, process=process),
            facts={"features": {**made, "views": len(self.train)}},
        )  # fmt: skip


def entries_of(
    model: nn.Module, changed: Sequence[str], samples: Sequence[Sample], prepared: dict[str, Any], batch_size: int,
    workers: int | None = None, process: Process | None = None,
) -> Entries:  # fmt: skip
    """Return the batches that a trained model is scored on, after its trunk; missing features are computed first.

    Args:
        model: model on any device; left in eval mode.
        changed: names of the modules that training or surgery may have changed beside the head.
        samples: images and their labels.
        prepared: preprocessing, as `vimoe.data.loaders.preprocessing` gives it.
        batch_size: number of images of a batch of all processes.
        workers: number of processes that decode images, as `DataConfig.workers`.
        process: this one of the processes that share the images, of which the first computes what is missing; by
            default they are all for this one.

    Raises:
        ConfigError: if the model cannot be cut before these modules, or features are not finite as they are stored.
        FolderError: if there is no room or folder for the features.
    """
    files = FeatureFiles(model, cut_before(model, changed, prepared["input_size"]), prepared)
    what = f"{len(samples)} images"
    file = files.as_evaluated(samples, what, batch_size, workers)
    (process or Alone()).first_then_all(files.make, [file], what)
    return Entries(file.path, [label for _, label in samples], files.cut, batch_size, process)


def if_kept(entries: Callable[[], Kept]) -> Kept | None:
    """Return what a function makes of features; None, with a line in the log, where they cannot be kept.

    Args:
        entries: function that raises ConfigError where the model cannot be cut, and FolderError where there is no room.
    """
    try:
        return entries()
    except (ConfigError, FolderError) as error:
        logger.info("images are read in place of their features: %s", error)
        return None


def changed_layers(settings: Settings, model: nn.Module) -> list[str]:
    """Return the names of the layers that a run of these settings makes or trains, be they MoE layers still or not.

    They include all that are, because an analysis has to begin before them.
    """
    parts = (settings.moe.selection, *settings.train.parts)  # "moe" and "experts" are in the first
    chosen = [site.name for part in parts for site in part.select(sites(model))]
    return [*chosen, *moe_layers(model)]


def in_words(views: int) -> str:
    """Return "1 view" or "4 views"."""
    return f"{views} view{'s' * (views != 1)}"
