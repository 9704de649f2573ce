"""Features of a frozen trunk, computed once: if only the last blocks train, epochs need not run the others.

The inputs of the first trained block are kept in files of the user's cache, one for each augmented view of the training
images and one for validation, and mapped into memory. The trunk computes in eval mode: stochastic depth and dropout
act in the blocks after it.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vimoe.config.train import TrainConfig
from vimoe.data.classification import Data, Sample
from vimoe.data.images import identity
from vimoe.data.loaders import eval_loader, processes
from vimoe.data.order import Shuffled, mix
from vimoe.data.user_cache import MADE_BY, cache_folder, make_cache_folder
from vimoe.errors import DataError, FolderError
from vimoe.files import in_units, written_whole
from vimoe.metrics.base import evaluate
from vimoe.models.frozen_trunk import Rest, cut_before, digest
from vimoe.models.precision import resolve
from vimoe.process import device
from vimoe.tasks.classification_job import job_on_images
from vimoe.terminal import track
from vimoe.training.job import Job
from vimoe.training.parameter_groups import freeze_all_but

STORED = "float16"  # its 11 bits round eight times as finely as bfloat16's 8; `_write` checks its range
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

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


class _File(NamedTuple):
    """One file of features.

    Attributes:
        path: place of the file.
        what: name of its content for the progress bar.
        images: number of images.
        batches: function that returns the batches to compute it from.
    """

    path: Path
    what: str
    images: int
    batches: Callable[[], DataLoader]


class FeatureCache:
    """Features that the frozen trunk of a model gives for the images of a data set, and the job to learn from them.

    View v has the augmentation of epoch v. With as many views as epochs, training equals training on images, up to
    rounding. Files are found again as long as the trunk, images, transforms, seed, precision, kind of
    device and versions are the same; so fewer views are part of more.

    Args:
        model: model on any device; its other layers are frozen, and it is moved to the device that trains.
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
        freeze_all_but(model, trained)
        config = resolve(config, model)
        self.model, self.data, self.config, self.workers, self.metric = model, data, config, workers, metric
        self.pixels = job_on_images(data, prepared, config, workers)
        self.device = device()
        self.cut = cut_before(model, trained, prepared["input_size"])
        self.shape = self._trunk(torch.zeros(1, *self.cut.size)).shape[1:]
        self.folder = cache_folder() / "features"
        train_images, val_images = (_digest_of_images(samples) for samples in (data.train, data.val))
        common = (
            f"{MADE_BY}, timm {timm.__version__}, torchvision {torchvision.__version__}, torch {torch.__version__}, "
            f"{self.device.type} {config.precision} {STORED} {sorted(prepared.items())} {digest(model, self.cut)}"
        )
        dataset: Any = self.pixels.loader.dataset
        # the policy is named because its transforms do not tell all of it
        augmented = f"{common} {train_images} {config.auto_augment} {dataset.transform!r} {config.seed}"
        views = min(views, config.epochs)
        self.train = [
            self._file(f"{augmented} {view}", f"view {view} of {views}", len(data.train), self._batches(dataset, view))
            for view in range(1, views + 1)
        ]
        validation = eval_loader(data.val, prepared, 2 * config.batch_size, workers)
        self.val = self._file(f"{common} {val_images}", "validation", len(data.val), lambda: validation)
        self.missing = [file for file in (*self.train, self.val) if not self._whole(file)]
        self._check_room()

    def job(self) -> Job:
        """Compute the missing files, and return the job, whose batches and score are of features."""
        start = time.perf_counter()
        if self.missing:
            make_cache_folder(self.folder.name, "features")
        for file in self.missing:
            self._write(file)
        seconds = time.perf_counter() - start if self.missing else 0.0
        total = sum(file.path.stat().st_size for file in (*self.train, self.val))
        before = self.cut.blocks[self.cut.start]
        logger.info(
            "features before %s of %d views, %s in %s: %s", before, len(self.train), in_units(total), self.folder,
            f"made in {seconds:.0f} s" if self.missing else "found",
        )  # fmt: skip
        config, cut, in_processes = self.config, self.cut, processes(self.workers)
        loader = DataLoader(
            Features([file.path for file in self.train], [label for _, label in self.data.train]), config.batch_size,
            sampler=Views(len(self.data.train), config.seed, len(self.train)), drop_last=True, **in_processes,
        )  # fmt: skip
        val = DataLoader(
            Features([self.val.path], [label for _, label in self.data.val]), 2 * config.batch_size,
            sampler=[(i, 0) for i in range(len(self.data.val))], **in_processes,
        )  # fmt: skip
        return replace(
            self.pixels, loader=loader, prepare=lambda features, labels: (features.float(), labels), forward=cut.rest,
            evaluate=lambda model: evaluate(Rest(model, cut), val, metric=self.metric), reads_images=False,
            facts={"features": {"before": before, "views": len(self.train), "bytes": total, "seconds": seconds}},
        )  # fmt: skip

    def _batches(self, dataset: Dataset, view: int) -> Callable[[], DataLoader]:
        def batches() -> DataLoader:
            seeds = [(i, mix(self.config.seed, view, i)) for i in range(len(self.data.train))]
            return DataLoader(dataset, self.config.batch_size, sampler=seeds, **processes(self.workers))

        return batches

    def _file(self, key: str, what: str, images: int, batches: Callable[[], DataLoader]) -> _File:
        """Return the file whose name is a hash of all that the content depends on."""
        name = hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
        return _File(self.folder / f"{name}.npy", what, images, batches)

    def _whole(self, file: _File) -> bool:
        try:
            kept = np.load(file.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return False
        return kept.shape == (file.images, *self.shape) and kept.dtype == STORED

    def _check_room(self) -> None:
        needed = sum(file.images for file in self.missing) * self.shape.numel() * np.dtype(STORED).itemsize
        there = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        free = shutil.disk_usage(there).free
        if needed > free:
            raise FolderError(
                f"data.cache='features' needs {needed / 1e9:.2f} GB for {len(self.train)} views: expected at most the "
                f"{free / 1e9:.2f} GB that are free in {there}; lower data.views, or name another folder in "
                f"XDG_CACHE_HOME"
            )

    def _write(self, file: _File) -> None:
        loader, done = file.batches(), 0
        header = {"descr": np.dtype(STORED).str, "fortran_order": False, "shape": (file.images, *self.shape)}
        with written_whole(file.path) as out:
            np.lib.format.write_array_header_1_0(out, header)
            for images, _ in track(loader, f"features, {file.what}"):
                features = self._trunk(images).to(getattr(torch, STORED))
                if not features.isfinite().all():
                    raise DataError(
                        f"data.cache='features': not finite in {STORED} for one of the images {done} to "
                        f"{done + len(images) - 1} ({file.what}): expected less than {np.finfo(STORED).max:g}; use "
                        f"data.cache=disk"
                    )
                out.write(features.cpu().contiguous().numpy().data)
                done += len(images)

    @torch.no_grad()
    def _trunk(self, images: Tensor) -> Tensor:
        model = self.model.to(self.device).eval()
        precision = self.config.precision
        with torch.autocast(self.device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST):
            return self.cut.trunk(model, images.to(self.device, next(model.parameters()).dtype))


def _digest_of_images(samples: Sequence[Sample]) -> str:
    hashed = hashlib.blake2b(digest_size=12)
    for source, _ in samples:
        hashed.update(identity(source))
    return hashed.hexdigest()
