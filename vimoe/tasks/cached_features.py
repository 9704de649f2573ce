"""Features of a frozen trunk, computed once: where only the last blocks train, epochs need not run the others.

What the first trained block gets is kept in files of the user's cache, one for each augmented view of the training
images and one for validation, and mapped into memory. The trunk computes as it does in evaluation: stochastic depth and
dropout act in the blocks after it.
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
from vimoe.files import written_whole
from vimoe.metrics.classification import evaluate
from vimoe.models.frozen_trunk import Rest, cut_before, digest
from vimoe.models.precision import resolve
from vimoe.tasks.image_training import classification
from vimoe.terminal import track
from vimoe.training.parameter_groups import freeze_all_but
from vimoe.training.task import Task

STORED = "float16"  # its 11 bits round eight times as finely as bfloat16's 8; its range is looked after
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

logger = logging.getLogger(__name__)


class Features(Dataset):
    """(features (T, C) in float16, label) by (index, view). A worker process maps the files too, as `_Mapped` does."""

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
    """(index, view) of each image: all of an epoch have one view, the next epoch has the next, and so round."""

    def __init__(self, images: int, seed: int, views: int) -> None:
        super().__init__(images, seed)
        self.views = views

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for index in self.images_at(self.skip, self.images):
            yield index, (self.epoch - 1) % self.views


class _File(NamedTuple):
    """What is to be kept in one file."""

    path: Path
    what: str
    images: int
    batches: Callable[[], DataLoader]


class FeatureCache:
    """What the frozen trunk of a model gives for the images of a data set, and the task to learn from that.

    View v of a training image has the draws that it would have in epoch v without a cache: with as many views as epochs
    a training is the same but for rounding. Everything is found again as long as the trunk, the images, transforms,
    seed, precision, kind of device and versions are the same; so fewer views are part of more.

    Args:
        model: on whichever device; its other layers are frozen, and it is moved to the device that trains.
        trained: names of the layers that are trained.
        data: only train and val are read.
        prepared: preprocessing, as `vimoe.data.loaders.preprocessing` gives it.
        config: augmentation, batches, seed and precision; no mixup.
        views: augmented versions of each training image; no more than there are epochs are made.
        workers: processes that decode images, as `DataConfig.workers`.

    Raises:
        ConfigError: where the model cannot be cut.
        FolderError: where the disk has no room for the features.
    """

    def __init__(
        self, model: nn.Module, trained: Sequence[str], data: Data, prepared: dict[str, Any], config: TrainConfig,
        views: int, workers: int | None = None,
    ) -> None:  # fmt: skip
        assert not config.mixup and not config.cutmix  # Settings refuses them: they mix pixels
        freeze_all_but(model, trained)
        config = resolve(config, model)
        self.model, self.data, self.config, self.workers = model, data, config, workers
        self.pixels = classification(data, prepared, config, workers)
        self.device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
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

    def task(self) -> Task:
        """Computes what is missing. What the model returns in training is then of features, and so is its score."""
        start = time.perf_counter()
        if self.missing:
            make_cache_folder(self.folder.name, "features")
        for file in self.missing:
            self._write(file)
        seconds = time.perf_counter() - start if self.missing else 0.0
        total = sum(file.path.stat().st_size for file in (*self.train, self.val))
        before = self.cut.blocks[self.cut.start]
        logger.info(
            "features before %s of %d views, %.2f GB in %s: %s", before, len(self.train), total / 1e9, self.folder,
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
            evaluate=lambda model: evaluate(Rest(model, cut), val),
            facts={"features": {"before": before, "views": len(self.train), "bytes": total, "seconds": seconds}},
        )  # fmt: skip

    def _batches(self, dataset: Dataset, view: int) -> Callable[[], DataLoader]:
        def batches() -> DataLoader:
            seeds = [(i, mix(self.config.seed, view, i)) for i in range(len(self.data.train))]
            return DataLoader(dataset, self.config.batch_size, sampler=seeds, **processes(self.workers))

        return batches

    def _file(self, key: str, what: str, images: int, batches: Callable[[], DataLoader]) -> _File:
        """Its name follows from all that the content depends on."""
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
