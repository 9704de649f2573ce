"""Training of segmentation: batches, loss, and the score on whole images."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vimoe.config.data import DataConfig
from vimoe.config.masks import IGNORE
from vimoe.config.train import TrainConfig
from vimoe.data.images import source_path
from vimoe.data.scene_loaders import eval_loader, eval_transform, train_loader, train_transform
from vimoe.data.scenes import Scene, Scenes
from vimoe.errors import ConfigError
from vimoe.metrics.base import Batches, Counts, Score, evaluate
from vimoe.metrics.segmentation import pixel_loss
from vimoe.process import Process
from vimoe.tasks.window_features import WindowEntries, infer_windows
from vimoe.tasks.windows import sliding, whole
from vimoe.training.job import Job

JITTER = 0.5  # of colours, by default


def job_on_scenes(
    scenes: Scenes,
    prepared: dict[str, Any],
    crop: tuple[int, int],
    config: TrainConfig,
    data: DataConfig,
    pixels: Sequence[int],
) -> Job:
    """Return the job of learning the class of every pixel, by cross-entropy, and soft Dice if it is asked for.

    Args:
        scenes: scenes, of which train and val are read.
        prepared: mean and std, as `vimoe.data.loaders.preprocessing` gives them.
        crop: (height, width) to train on.
        config: augmentation, batches and losses.
        data: inference on whole images, and the number of processes that decode them.
        pixels: number of train's pixels by class, for `config.class_weights`.
    """
    jitter = JITTER if config.color_jitter is None else config.color_jitter
    scale = (config.min_scale, config.max_scale)
    transform = train_transform(crop, prepared["mean"], prepared["std"], scale=scale, hflip=config.hflip, jitter=jitter)
    process = Process()
    loader = train_loader(scenes.train, scenes.legend, transform, config.batch_size, config.seed, data.workers)
    val_loader = whole_images(scenes.val, scenes, prepared, config.batch_size, data.workers, process)
    weights = median_frequency(pixels) if config.class_weights == "median_frequency" else None

    def loss(logits: Tensor, masks: Tensor) -> Tensor:
        total = pixel_loss(logits, masks, weights, config.label_smoothing or 0.0, process)
        return total + config.dice_loss * dice_loss(logits, masks, process) if config.dice_loss else total

    return Job(
        loader,
        [str(source_path(image)) for image, _ in scenes.train],
        fingerprint(scenes),
        lambda images, masks: (images, masks),
        loss,
        lambda model: evaluate_scenes(model, val_loader, data, process=process),
    )


def whole_images(
    scenes: Sequence[Scene],
    all_scenes: Scenes,
    prepared: dict[str, Any],
    batch_size: int,
    workers: int | None,
    process: Process | None = None,
) -> DataLoader:
    """Return batches of whole images and masks, in order; of several processes each gets its share."""
    transform = eval_transform(prepared["mean"], prepared["std"])
    return eval_loader(scenes, all_scenes.legend, transform, batch_size, workers, process)


def evaluate_scenes(
    model: nn.Module,
    loader: Batches,
    config: DataConfig,
    bar: str = "",
    counts: Counts | None = None,
    process: Process | None = None,
) -> Score:
    """Return the score of a segmenter over whole images, or `WindowEntries`, as `vimoe.metrics.base.evaluate` does."""
    outputs = infer_windows if isinstance(loader, WindowEntries) else partial(infer, config=config)
    return evaluate(model, loader, bar, "segmentation", outputs, counts, process)


def infer(model: nn.Module, images: Tensor, config: DataConfig) -> Tensor:
    """Return scores (B, classes, H, W) of images (B, 3, H, W) by `config.inference` and `config.flip_test`."""
    if config.inference == "whole":
        return whole(model, images, config.flip_test)
    window: Any = model.crop
    return sliding(model, images, window, flip=config.flip_test)


def dice_loss(logits: Tensor, masks: Tensor, process: Process | None = None) -> Tensor:
    """Return 1 - the mean soft Dice coefficient of the batch's classes (Milletari et al., arXiv 1606.04797).

    The coefficient is 2 sum(p t) / (sum p + sum t), with p the probabilities and t the truth, over all pixels of the
    batch that are not void. The loss is 0 if all are void.

    Args:
        logits: (B, classes, H, W).
        masks: (B, H, W) int64 with IGNORE.
        process: this one of those that have equal shares of the batch, as of `pixel_loss`.
    """
    counted = (masks != IGNORE)[:, None]
    truth = (masks[:, None] == torch.arange(logits.shape[1], device=masks.device)[:, None, None]) & counted
    chances = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1) * counted
    over = (0, 2, 3)
    sums = torch.stack([(chances * truth).sum(over), chances.sum(over), truth.sum(over)])
    common, expected, found = sums if process is None else process.mean(sums)
    dice = 2 * common / (expected + found).clamp(min=1e-6)
    present = found > 0
    return (present * (1 - dice)).sum() / present.sum().clamp(min=1)


def median_frequency(pixels: Sequence[int]) -> Tensor:
    """Return (classes,) weights: the median number of pixels over the number of each class.

    Eigen and Fergus (arXiv 1411.4734) balance classes so, but count the pixels of those images alone that hold the
    class; here all of train counts. A class without pixels has weight 0 and no part in the median.

    Raises:
        ConfigError: if no class has any pixel.
    """
    counts = np.asarray(pixels, dtype=np.float64)
    if not counts.any():
        raise ConfigError("train.class_weights='median_frequency' of masks without a pixel: expected some; use 'none'")
    weights = np.divide(np.median(counts[counts > 0]), counts, out=np.zeros_like(counts), where=counts > 0)
    return torch.from_numpy(weights).float()


def fingerprint(scenes: Scenes) -> int:
    """Return a hash of the names of the training scenes and of their legend; it stays when the folder moves."""
    names = ("/".join((*source_path(image).parts[-2:], *source_path(mask).parts[-2:])) for image, mask in scenes.train)
    return zlib.crc32("\n".join([repr(scenes.legend), *names]).encode(errors="surrogateescape"))
