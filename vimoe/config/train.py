"""How to train."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from vimoe.config.checks import LARGEST_SEED, check_choice, check_count, check_flags, check_range
from vimoe.errors import ConfigError

Precision = Literal["auto", "no", "bf16", "fp16"]


ClassWeights = Literal["none", "median_frequency"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. Names and defaults follow timm's training script where it has them.

    Args:
        epochs: passes over the training images.
        batch_size: images a step (on each device); lowered, with a warning, where there are fewer training images.
        accumulation: steps whose gradients are added up before the weights move.
        lr: peak learning rate of AdamW, reached after the warm-up and then decayed by a cosine to min_lr.
        min_lr: learning rate at the end, or lr where that is lower.
        warmup_epochs: epochs of linear warm-up.
        weight_decay: of matrices; biases, norms, embeddings have none.
        layer_decay: learning rate of a block relative to the block after it (1 is the same rate everywhere).
        router_lr_scale: learning rate of the routers relative to the block they are in.
        router_weight_decay: weight decay of the routers.
        router_warmup_epochs: epochs over which a share of the routers' decisions, falling linearly from 1 to 0, is
            taken at random, so that every expert is trained before a router has an opinion.
        expert_weight_decay: weight decay of the routed experts' matrices; by default that of other matrices.
        train_only: "all", or "moe" for the MoE layers and the classifier alone.
        balance_loss: weight of the routers' load-balancing loss.
        z_loss: weight of the routers' z-loss.
        importance_loss: weight of the routers' importance loss.
        label_smoothing: mass given to the other classes; by default 0.1 in classification and 0 in segmentation.
        mixup: alpha of mixup; 0 is off.
        cutmix: alpha of cutmix; 0 is off.
        auto_augment: timm's policy string, such as "rand-m9-mstd0.5-inc1"; none is off.
        random_erasing: probability.
        min_crop: smallest share of the area that a random crop keeps; 1 is no random crop.
        hflip: probability of a horizontal flip.
        color_jitter: up to which share brightness, contrast and saturation change; by default 0 in classification and
            0.5 in segmentation, which changes brightness by a quarter of it and hue by a tenth.
        min_scale: smallest factor by which an image is scaled before it is cropped (segmentation only).
        max_scale: largest factor by which an image is scaled before it is cropped (segmentation only).
        dice_loss: of segmentation: weight of the soft Dice loss beside the cross-entropy.
        class_weights: of segmentation: weigh classes by the "median_frequency" of all over their own.
        ema_decay: decay of the weights' moving average, which is then what is evaluated and saved; 0 is off.
        clip_grad: largest gradient norm; 0 is off.
        early_stopping: epochs without a better validation score after which the training ends; none is off.
        precision: "no" (float32), "bf16", "fp16", or "auto": bf16 where it is known to be faster, else float32; the
            run's config.yaml has which.
        seed: of initialisation, order and augmentation.
        checkpoint_minutes: time between checkpoints within an epoch; there is one at the end of each epoch anyway.
        tensorboard: write TensorBoard event files beside metrics.csv.
    """

    epochs: int = 10
    batch_size: int = 64
    accumulation: int = 1
    lr: float = 3e-4
    min_lr: float = 1e-6
    warmup_epochs: float = 0.5
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    router_lr_scale: float = 1.0
    router_weight_decay: float = 0.0
    router_warmup_epochs: float = 0.0
    expert_weight_decay: float | None = None
    train_only: Literal["all", "moe"] = "all"
    balance_loss: float = 0.01
    z_loss: float = 0.0
    importance_loss: float = 0.0
    label_smoothing: float | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    auto_augment: str | None = None
    random_erasing: float = 0.0
    min_crop: float = 0.35
    hflip: float = 0.5
    color_jitter: float | None = None
    min_scale: float = 0.5
    max_scale: float = 2.0
    dice_loss: float = 0.0
    class_weights: ClassWeights = "none"
    ema_decay: float = 0.0
    clip_grad: float = 1.0
    early_stopping: int | None = None
    precision: Precision = "auto"
    seed: int = 0
    checkpoint_minutes: float = 10.0
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name, least in _TRAIN_COUNTS.items():
            if (value := getattr(self, name)) is not None or name not in _MAY_BE_NONE:
                check_count(name, value, least)
        for name, (low, high) in _TRAIN_RANGES.items():
            if (value := getattr(self, name)) is not None or name not in _MAY_BE_NONE:
                check_range(name, value, low, high)
        for name, choices in _TRAIN_CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        check_count("seed", self.seed, 0, LARGEST_SEED)
        check_flags(self, "tensorboard")
        if self.max_scale < self.min_scale:
            raise ConfigError(
                f"max_scale={self.max_scale}: expected at least min_scale={self.min_scale}; exchange them"
            )
        if self.color_jitter and self.auto_augment:
            raise ConfigError(
                f"color_jitter={self.color_jitter} with auto_augment={self.auto_augment!r}: expected one of them; timm "
                f"has no jitter beside a policy"
            )
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ConfigError(f"batch_size={self.batch_size} with mixup or cutmix: expected an even number")


_TRAIN_COUNTS = {"epochs": 1, "batch_size": 1, "accumulation": 1, "early_stopping": 1}


_TRAIN_RANGES = {
    **dict.fromkeys(("lr", "min_lr", "warmup_epochs", "router_warmup_epochs", "weight_decay", "router_lr_scale",
                     "router_weight_decay", "expert_weight_decay", "balance_loss", "z_loss", "importance_loss",
                     "dice_loss", "mixup", "cutmix", "clip_grad", "checkpoint_minutes"), (0, math.inf)),
    **dict.fromkeys(("random_erasing", "hflip", "color_jitter"), (0, 1)),
    **dict.fromkeys(("layer_decay", "min_crop"), (0.01, 1)),
    **dict.fromkeys(("label_smoothing", "ema_decay"), (0, 0.99999)),
    **dict.fromkeys(("min_scale", "max_scale"), (0.01, 100)),
}  # fmt: skip


_TRAIN_CHOICES: dict[str, tuple[str, ...]] = {
    "train_only": ("all", "moe"),
    "precision": get_args(Precision),
    "class_weights": get_args(ClassWeights),
}


_MAY_BE_NONE = {"early_stopping", "expert_weight_decay", "color_jitter", "label_smoothing"}
