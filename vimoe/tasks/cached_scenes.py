"""Training of segmentation on features of a frozen trunk: augmented crops and their masks, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vimoe.config.data import DataConfig
from vimoe.config.train import TrainConfig
from vimoe.data.images import image_size
from vimoe.data.loaders import processes
from vimoe.data.scenes import Scene, Scenes
from vimoe.errors import ConfigError
from vimoe.models.frozen_trunk import check_cut, cut_before
from vimoe.models.precision import resolve
from vimoe.process import Alone, Process
from vimoe.tasks.cached_features import Entries, Views, if_kept, in_words
from vimoe.tasks.feature_files import FeatureFiles, digest_of
from vimoe.tasks.segmentation_job import evaluate_scenes, job_on_scenes, whole_images
from vimoe.tasks.window_features import WindowEntries, window_entries
from vimoe.training.job import Job


class CropFeatures(Dataset):
    """Pairs (features (T, C) in float16, mask (H, W) int64) by (index, view). A worker maps the files itself."""

    def __init__(self, files: Sequence[tuple[Path, Path]]) -> None:
        self.files = files
        self.views = [(_mapped(features), _mapped(masks)) for features, masks in files]

    def __len__(self) -> int:
        return len(self.views[0][0])

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        index, view = key
        features, mask = (torch.from_numpy(np.array(array[index])) for array in self.views[view])
        return features, mask.long()

    def __reduce__(self) -> tuple[type, tuple[Sequence[tuple[Path, Path]]]]:
        return CropFeatures, (self.files,)


def job_on_crop_features(
    model: Any, trained: Sequence[str], scenes: Scenes, prepared: dict[str, Any], config: TrainConfig,
    data: DataConfig, pixels: Sequence[int],
) -> Job:  # fmt: skip
    """Return the job of `job_on_scenes`, on features of the model's frozen trunk; missing ones are computed first.

    Views of the training scenes are those of `vimoe.tasks.cached_features.FeatureCache`: crops, with their masks.
    Validation is scored on features, or on images where it cannot be (`entries_of_scenes`).

    Args:
        model: segmenter on any device; it is moved to the device that trains.
        trained: names of the modules that are trained beside the decoder.
        scenes, prepared, config, data, pixels: arguments of `job_on_scenes`.

    Raises:
        ConfigError: if the model cannot be cut, or features are not finite as they are stored.
        FolderError: if there is no room or folder for the features.
    """
    config, process = resolve(config, model), Process()
    on_images = job_on_scenes(scenes, prepared, model.crop, config, data, pixels)
    files = FeatureFiles(model, cut_before(model, trained, (3, *model.crop)), prepared)
    dataset: Any = on_images.loader.dataset
    images, masks = [image for image, _ in scenes.train], [mask for _, mask in scenes.train]
    draws = f"{dataset.transform!r} {scenes.legend!r} {digest_of(masks)}"
    views = files.views(dataset, images, config, data.views, data.workers, draws)
    views = [file._replace(mask=model.crop) for file in views]
    made = process.first_then_all(files.make, views, in_words(len(views)))
    crops = CropFeatures([(file.path, file.masks) for file in views])
    order = Views(len(images), config.seed, len(views))
    loader = DataLoader(crops, config.batch_size, sampler=order, drop_last=True, **processes(data.workers))
    scored = scenes.val, scenes, prepared, data, config.batch_size
    val = if_kept(lambda: entries_of_scenes(model, trained, *scored, process))
    return replace(
        on_images, loader=loader, prepare=lambda features, masks: (features.float(), masks), forward=files.cut.rest,
        evaluate=(lambda model: evaluate_scenes(model, val, data, process=process)) if val else on_images.evaluate,
        facts={"features": {**made, "views": len(views)}},
    )  # fmt: skip


def entries_of_scenes(
    model: Any, changed: Sequence[str], samples: Sequence[Scene], scenes: Scenes, prepared: dict[str, Any],
    data: DataConfig, batch_size: int, process: Process | None = None,
) -> Entries | WindowEntries:  # fmt: skip
    """Return the batches that a trained segmenter is scored on, after its trunk; missing features are computed first.

    Args:
        model: segmenter on any device; left in eval mode.
        changed: names of the modules that training or surgery may have changed beside the decoder.
        samples: scenes to score on.
        scenes: data set that they are of.
        prepared: preprocessing, as `vimoe.data.loaders.preprocessing` gives it.
        data: inference on whole images, and the number of processes that decode them.
        batch_size: number of whole images of a batch of all processes.
        process: this one of the processes that share the scenes, of which the first computes what is missing.

    Raises:
        ConfigError: if the model cannot be cut, a scene is smaller than a window, scenes that are inferred whole differ
            in size, or scores are a mean with mirrored images.
        FolderError: if there is no room or folder for the features.
    """
    if data.flip_test:
        raise ConfigError("data.cache='features' with data.flip_test=True: expected False")
    if data.inference == "whole":
        size, *others = {image_size(image) for image, _ in samples}
        if others:
            raise ConfigError(
                f"data.cache='features' with data.inference='whole' and images of {1 + len(others)} sizes: expected one"
            )
        loader = whole_images(samples, scenes, prepared, batch_size, data.workers)
        return entries_of_one_size(model, changed, loader, size, scenes, prepared, batch_size, process)
    files = FeatureFiles(model, cut_before(model, changed, (3, *model.crop)), prepared)
    file, opened = window_entries(files, samples, scenes, model.crop, data.workers)
    (process or Alone()).first_then_all(files.make, [file], file.what)
    return opened(process)


def entries_of_one_size(
    model: Any, changed: Sequence[str], loader: DataLoader, size: tuple[int, int], scenes: Scenes,
    prepared: dict[str, Any], batch_size: int, process: Process | None = None,
) -> Entries:  # fmt: skip
    """Return the batches that a trained segmenter is analysed on, after its trunk; missing features are computed first.

    Args:
        model, changed, prepared, process: arguments of `entries_of_scenes`.
        loader: batches of `vimoe.data.scene_loaders.JointImages`.
        size: (height, width) of all its images.
        scenes: data set that they are of.
        batch_size: number of scenes of a batch of all processes.

    Raises:
        ConfigError: if the model cannot be cut, or features are not finite as they are stored.
        FolderError: if there is no room or folder for the features.
    """
    shown: Any = loader.dataset
    files = FeatureFiles(model, cut_before(model, changed, (3, *size)), prepared)
    images, masks = ([scene[which] for scene in shown.scenes] for which in (0, 1))
    draws = f" {shown.transform!r} {scenes.legend!r} {digest_of(masks)}"
    file = files.file(images, f"{len(images)} scenes", lambda: loader, draws=draws)._replace(mask=size)
    (process or Alone()).first_then_all(files.make, [file], file.what)
    return Entries(file.path, torch.from_numpy(_mapped(file.masks)), files.cut, batch_size, process)


def check_cut_and_decoder(model: Any, trained: Sequence[str]) -> None:
    """Raise ConfigError if a segmenter has no frozen trunk, or its decoder reads blocks inside it."""
    start = check_cut(model, trained)
    if inside := [number for number in model.read_blocks if number < start - 1]:
        raise ConfigError(
            f"data.cache='features' with model.decoder={model.decoder_name!r}, which reads the output of block "
            f"{inside[0]}: expected a decoder of what block {start - 1} and later ones give; use "
            f"model.decoder=linear, or leave data.cache out"
        )


def _mapped(path: Path) -> np.ndarray[Any, Any]:
    # "c": torch warns of an array that it may not write to; nothing written would reach the file
    array: np.ndarray[Any, Any] = np.load(path, mmap_mode="c", allow_pickle=False)
    return array
