"""Training of image classification: batches, loss and score."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL.Image import Image
from timm.data import Mixup
from torch import Tensor, nn

from vimoe.config.train import TrainConfig
from vimoe.data.decoded import Where
from vimoe.data.images import source_path
from vimoe.data.labelled_images import Data, Sample
from vimoe.data.loaders import decoded_for_evaluation, decoded_for_training, eval_loader, train_loader
from vimoe.metrics.base import Score, evaluate
from vimoe.process import Process
from vimoe.training.job import Job


def job_on_images(
    data: Data,
    prepared: dict[str, Any],
    config: TrainConfig,
    workers: int | None = None,
    cache: Where | Literal["none"] = "none",
    metric: str = "classification",
) -> Job:
    """Return the job of learning the class of each image, by cross-entropy with mixup and cutmix.

    Args:
        data: images, of which train and val are read.
        prepared: preprocessing, as `vimoe.data.loaders.preprocessing` gives it.
        config: augmentation and batches.
        workers: number of processes that decode images, as `DataConfig.workers`.
        cache: place of decoded images, as `DataConfig.cache`; for features there is `FeatureCache`.
        metric: name in METRICS of the metric that scores validation.
    """
    train: Sequence[Sample] = data.train
    val: Sequence[Sample] = data.val
    val_prepared = prepared
    process = Process()
    if cache != "none":
        train = process.first_then_all(decoded_for_training, train, prepared, config, cache)
        val = process.first_then_all(decoded_for_evaluation, val, prepared, cache)
        val_prepared = {**prepared, "crop_pct": 1.0}
    loader = train_loader(train, prepared, config, workers)
    val_loader = eval_loader(val, val_prepared, 2 * config.batch_size, workers, process=process)
    smoothing = 0.1 if config.label_smoothing is None else config.label_smoothing
    classes = len(data.classes)
    mixed = config.mixup or config.cutmix
    mixup = Mixup(config.mixup, config.cutmix, label_smoothing=smoothing, num_classes=classes) if mixed else None

    def prepare(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return mixup(images, labels) if mixup else (images, labels)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        precise = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(precise), targets, label_smoothing=0.0 if mixup else smoothing)

    names = [
        f"image {i}" if isinstance(image, Image) else str(source_path(image)) for i, (image, _) in enumerate(data.train)
    ]

    def score(model: nn.Module) -> Score:
        return evaluate(model, val_loader, metric=metric, process=process)

    return Job(loader, names, fingerprint(data), prepare, loss, score)


def fingerprint(data: Data) -> int:
    """Return a hash of the names and labels of the training images, of all tasks; it stays when the data move."""
    train = data.train if data.whole is None else data.whole
    names = ("" if isinstance(source, Image) else "/".join(source_path(source).parts[-2:]) for source, _ in train)
    names = (f"{name}:{label}" for name, (_, label) in zip(names, train, strict=True))
    return zlib.crc32("\n".join(names).encode(errors="surrogateescape"))
