"""Features of a frozen trunk, computed once: who reads what comes after it need not run it again.

The inputs of the first block after the trunk are kept in files of the user's cache and mapped into memory: one for each
augmented view of the training images, and one for each list of images that models are scored on. The trunk computes in
eval mode: stochastic depth and dropout act in the blocks after it.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import filelock
import numpy as np
import timm
import torch
import torchvision
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vimoe.config.settings import Settings
from vimoe.config.train import Precision, TrainConfig
from vimoe.data.images import Source, identity
from vimoe.data.labelled_images import Data, Sample
from vimoe.data.loaders import eval_loader, processes, share
from vimoe.data.order import Shuffled, mix
from vimoe.data.user_cache import MADE_BY, cache_folder, make_cache_folder
from vimoe.errors import ConfigError, FolderError
from vimoe.files import TEMPORARY, discard, in_units, written_whole
from vimoe.metrics.base import evaluate
from vimoe.models.frozen_trunk import Cut, Entry, cut_before, digest
from vimoe.models.precision import resolve
from vimoe.models.upcycling import sites
from vimoe.moe.layer import moe_layers
from vimoe.process import Alone, Process, device
from vimoe.tasks.classification_job import job_on_images
from vimoe.terminal import track
from vimoe.training.job import Job

STORED = "float16"  # its 11 bits round eight times as finely as bfloat16's 8; `_write` checks its range
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

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


class FeatureFile(NamedTuple):
    """One file of features.

    Attributes:
        path: place of the file.
        what: name of its content for the progress bar.
        images: number of images.
        batches: function that returns the batches to compute it from.
        precision: number format that the trunk computes in.
        mask: (height, width) of the masks that `batches` gives beside the images, where they are kept too.
    """

    path: Path
    what: str
    images: int
    batches: Callable[[], Iterable[Any]]
    precision: Precision
    mask: tuple[int, int] | None = None

    @property
    def masks(self) -> Path:
        """Place of the masks, (images, *mask) in uint8."""
        return self.path.with_name(f"{self.path.stem}-masks.npy")


class FeatureFiles:
    """The trunk of a model, and the files of what it gives for images.

    Files are found again as long as the trunk, images, transforms, precision, kind of device and versions are the
    same, by whatever model has that trunk.

    Args:
        model: model on any device, which is moved to the one that computes; left in eval mode.
        cut: cut after the trunk.
        prepared: preprocessing, as `vimoe.data.loaders.preprocessing` gives it.
    """

    def __init__(self, model: nn.Module, cut: Cut, prepared: dict[str, Any]) -> None:
        self.device = device()
        self.model, self.cut, self.prepared = model.to(self.device), cut, prepared
        self.shape = self._trunk(torch.zeros(1, *cut.size), "no").shape[1:]
        self.folder = cache_folder() / "features"
        self._digest = digest(model, cut)

    def file(
        self, sources: Sequence[Source | Image], what: str, batches: Callable[[], Iterable[Any]],
        precision: Precision = "no", draws: str = "",
    ) -> FeatureFile:  # fmt: skip
        """Return the file of images, whose name is a hash of all that the content depends on.

        Args:
            sources: the images.
            what: name of them for the progress bar.
            batches: function that returns batches of them, in their order.
            precision: number format that the trunk computes in.
            draws: all that their augmentation depends on.
        """
        key = (
            f"{MADE_BY}, timm {timm.__version__}, torchvision {torchvision.__version__}, torch {torch.__version__}, "
            f"{self.device.type} {precision} {STORED} {sorted(self.prepared.items())} {self._digest} "
            f"{digest_of(sources)}{draws}"
        )
        name = hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
        return FeatureFile(self.folder / f"{name}.npy", what, len(sources), batches, precision)

    def as_evaluated(self, samples: Sequence[Sample], what: str, batch_size: int, workers: int | None) -> FeatureFile:
        """Return the file of images as evaluation sees them, in float32, in which it computes."""
        sources = [source for source, _ in samples]
        return self.file(sources, what, lambda: eval_loader(samples, self.prepared, batch_size, workers))

    def views(
        self, dataset: Dataset, sources: Sequence[Source | Image], config: TrainConfig, views: int, workers: int | None,
        draws: str,
    ) -> list[FeatureFile]:  # fmt: skip
        """Return the files of augmented views of training images; view v has the augmentation of epoch v.

        Args:
            dataset: images by (index, seed), as the training without a cache reads them.
            sources: its images.
            config: epochs, batches, seed and precision.
            views: number of views, of which there are never more than epochs.
            workers: number of processes that decode images, as `DataConfig.workers`.
            draws: all that their augmentation depends on beside the seed.
        """
        views = min(views, config.epochs)

        def batches(view: int) -> DataLoader:
            seeds: Any = [(i, mix(config.seed, view, i)) for i in range(len(sources))]
            return DataLoader(dataset, config.batch_size, sampler=seeds, **processes(workers))

        return [
            self.file(
                sources, f"view {view} of {views}", partial(batches, view), config.precision,
                f" {draws} {config.seed} {view}",
            )
            for view in range(1, views + 1)
        ]  # fmt: skip

    def missing(self, files: Sequence[FeatureFile], what: str) -> list[FeatureFile]:
        """Return the files that are still to be computed.

        Args:
            files: files, of which some may be there.
            what: name of all of them for the message.

        Raises:
            FolderError: if the disk has no room for them.
        """
        missing = [file for file in files if not self._whole(file)]
        of_image = self.shape.numel() * np.dtype(STORED).itemsize
        needed = sum(file.images * (of_image + math.prod(file.mask or (0,))) for file in missing)
        # Path.exists would raise an error in a folder that the user may not look into
        there = next(folder for folder in (self.folder, *self.folder.parents) if os.access(folder, os.F_OK))
        free = shutil.disk_usage(there).free
        if needed > free:
            kept = sum(path.stat().st_size for path in self.folder.glob("*.npy"))
            raise FolderError(
                f"data.cache='features' needs {needed / 1e9:.2f} GB for {what}: expected at most the "
                f"{free / 1e9:.2f} GB that are free in {there}; delete files of earlier runs in {self.folder} "
                f"({in_units(kept)}), lower data.views, or name another folder in XDG_CACHE_HOME"
            )
        return missing

    def make(self, files: Sequence[FeatureFile], what: str) -> dict[str, Any]:
        """Compute the files that are missing, log it, and return {"before", "bytes", "seconds"} for a result.

        Args:
            files: files, of which some may be there.
            what: name of all of them for messages.

        Raises:
            FolderError: if they cannot be written.
            ConfigError: if features are not finite as they are stored.
        """
        start, missing = time.perf_counter(), self.missing(files, what)
        if missing:
            make_cache_folder(self.folder.name, "features")
        for file in missing:
            with _alone(file):
                if not self._whole(file):
                    self._write(file)
        seconds = time.perf_counter() - start if missing else 0.0
        total = sum(path.stat().st_size for file in files for path in _paths(file))
        logger.info(
            "features before %s of %s, %s in %s: %s", self.cut.before, what, in_units(total), self.folder,
            f"made in {seconds:.0f} s" if missing else "found",
        )  # fmt: skip
        return {"before": self.cut.before, "bytes": total, "seconds": seconds}

    def _whole(self, file: FeatureFile) -> bool:
        try:
            kept = [np.load(path, mmap_mode="r", allow_pickle=False) for path in _paths(file)]
        except (OSError, ValueError, EOFError):
            return False
        return [(each.shape, each.dtype) for each in kept] == self._arrays(file)

    def _arrays(self, file: FeatureFile) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
        """Return shape and type of the features, and of the masks where they are kept."""
        features = (file.images, *self.shape), np.dtype(STORED)
        return [features, *([((file.images, *file.mask), np.dtype("uint8"))] if file.mask else [])]

    def _write(self, file: FeatureFile) -> None:
        loader, done = file.batches(), 0
        with ExitStack() as stack:
            # the masks get their name first, so that there are none missing where there are features
            out, *masks_out = [stack.enter_context(written_whole(path)) for path in _paths(file)]
            for opened, (shape, dtype) in zip([out, *masks_out], self._arrays(file), strict=True):
                header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(opened, header)
            for images, labels in track(loader, f"features, {file.what}"):
                features = self._trunk(images, file.precision).to(getattr(torch, STORED))
                if not features.isfinite().all():
                    raise ConfigError(
                        f"data.cache='features': not finite in {STORED} for one of the images {done} to "
                        f"{done + len(images) - 1} ({file.what}): expected less than {np.finfo(STORED).max:g}; use "
                        f"another data.cache"
                    )
                out.write(features.cpu().contiguous().numpy().data)
                for opened in masks_out:
                    opened.write(labels.to(torch.uint8).contiguous().numpy().data)
                done += len(images)

    @torch.no_grad()
    def _trunk(self, images: Tensor, precision: Precision) -> Tensor:
        self.model.eval()
        with torch.autocast(self.device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST):
            return self.cut.trunk(self.model, images.to(self.device, next(self.model.parameters()).dtype))


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


@contextmanager
def _alone(file: FeatureFile) -> Iterator[None]:
    """Wait until no other process computes a file, such as the next arm of a study, and lock it in this one."""
    place = file.path.with_name(f"{TEMPORARY}{file.path.stem}.lock")
    lock = filelock.FileLock(place)
    with suppress(OSError, NotImplementedError):  # a file system without locks: the file may be computed twice
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            logger.info("features of %s: another process computes them", file.what)
            lock.acquire()
    try:
        yield
    finally:
        discard(place)
        lock.release()


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


def _paths(file: FeatureFile) -> list[Path]:
    return [file.path, *([file.masks] if file.mask else [])]


def digest_of(sources: Sequence[Source | Image]) -> str:
    """Return a hash of images by their places, sizes and times, or their pixels (`vimoe.data.images.identity`)."""
    hashed = hashlib.blake2b(digest_size=12)
    for source in sources:
        hashed.update(identity(source))
    return hashed.hexdigest()
