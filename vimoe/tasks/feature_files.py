"""Files of what the frozen trunk of a model gives for images, found again by a hash of all that they depend on.

They are kept in the user's cache and mapped into memory. The trunk computes in eval mode: stochastic depth and dropout
act in the blocks after it.
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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np
import timm
import torch
import torchvision
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vimoe.config.train import Precision, TrainConfig
from vimoe.data.images import Source, identity
from vimoe.data.labelled_images import Sample
from vimoe.data.loaders import eval_loader, processes
from vimoe.data.order import mix
from vimoe.data.user_cache import MADE_BY, cache_folder, make_cache_folder
from vimoe.errors import ConfigError, FolderError
from vimoe.files import TEMPORARY, discard, in_units, written_whole
from vimoe.models.frozen_trunk import Cut, digest
from vimoe.models.precision import AUTOCAST
from vimoe.process import device
from vimoe.terminal import track

STORED = "float16"  # its 11 bits round eight times as finely as bfloat16's 8; `_write` checks its range

logger = logging.getLogger(__name__)


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


def _paths(file: FeatureFile) -> list[Path]:
    return [file.path, *([file.masks] if file.mask else [])]


def digest_of(sources: Sequence[Source | Image]) -> str:
    """Return a hash of images by their places, sizes and times, or their pixels (`vimoe.data.images.identity`)."""
    hashed = hashlib.blake2b(digest_size=12)
    for source in sources:
        hashed.update(identity(source))
    return hashed.hexdigest()
