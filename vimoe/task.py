"""What a training needs to know of its task: batches, a loss, a score."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch.nn.functional as F
from PIL.Image import Image
from timm.data import Mixup
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vimoe.config import TrainConfig
from vimoe.crops import Finish
from vimoe.data import Data, Sample
from vimoe.decoded import Where
from vimoe.evaluate import evaluate
from vimoe.images import place
from vimoe.loading import Crops, decoded_for_evaluation, decoded_for_training, eval_loader, train_loader


class Scored(Protocol):
    """How good a model is on validation.

    Attributes:
        rank: of two scores the better one has the larger.
        columns: what the logs show; "loss" is the mean, in nats.
    """

    @property
    def rank(self) -> tuple[float, ...]: ...
    @property
    def columns(self) -> dict[str, float]: ...
    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Task:
    """One data set to learn, and how.

    Args:
        loader: of training batches (inputs, targets), with a `vimoe.loading.Shuffled` for a sampler.
        names: of the training images, for messages.
        fingerprint: of training images and targets, so that a training does not go on with others.
        prepare: a batch as it was loaded, on the device, to what the model takes and what the loss takes.
        loss: outputs and prepared targets to a scalar.
        evaluate: scores a model on validation, and leaves it in eval mode.
        forward: a model and what it takes to outputs; the model's own, but for cached features.
        facts: what summary.json is to say of it.
    """

    loader: DataLoader
    names: Sequence[str]
    fingerprint: int
    prepare: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    evaluate: Callable[[nn.Module], Scored]
    forward: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__
    facts: Mapping[str, Any] = field(default_factory=dict)


def classification(
    data: Data,
    prepared: dict[str, Any],
    config: TrainConfig,
    workers: int | None = None,
    cache: Where | Literal["none"] = "none",
) -> Task:
    """To name the class of an image: cross-entropy, mixup and cutmix, top-1.

    Args:
        data: only train and val are read.
        prepared: preprocessing, as `vimoe.loading.preprocessing` gives it.
        config: augmentation and batches.
        workers: processes that decode images, as `DataConfig.workers`.
        cache: where decoded images are kept, as `DataConfig.cache`; features are `vimoe.features.FeatureCache`'s.
    """
    train: Sequence[Sample] = data.train
    val: Sequence[Sample] = data.val
    val_prepared = prepared
    if cache != "none":
        train = decoded_for_training(train, prepared, config, cache)
        val, val_prepared = decoded_for_evaluation(val, prepared, cache), {**prepared, "crop_pct": 1.0}
    loader = train_loader(train, prepared, config, workers)
    val_loader = eval_loader(val, val_prepared, 2 * config.batch_size, workers)
    finish = Finish(prepared, config) if isinstance(loader.dataset, Crops) else None
    smoothing = 0.1 if config.label_smoothing is None else config.label_smoothing
    classes = len(data.classes)
    mixed = config.mixup or config.cutmix
    mixup = Mixup(config.mixup, config.cutmix, label_smoothing=smoothing, num_classes=classes) if mixed else None

    def prepare(images: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        if finish:
            images = finish.to(labels.device)(*images)
        return mixup(images, labels) if mixup else (images, labels)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets, label_smoothing=0.0 if mixup else smoothing)

    names = [f"image {i}" if isinstance(image, Image) else str(place(image)) for i, (image, _) in enumerate(data.train)]
    return Task(loader, names, fingerprint(data), prepare, loss, lambda model: evaluate(model, val_loader))


def fingerprint(data: Data) -> int:
    """Of the training images and their labels, as far as names tell; the data may have moved."""
    names = ("" if isinstance(source, Image) else "/".join(place(source).parts[-2:]) for source, _ in data.train)
    names = (f"{name}:{label}" for name, (_, label) in zip(names, data.train, strict=True))
    return zlib.crc32("\n".join(names).encode(errors="surrogateescape"))
