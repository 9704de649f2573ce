"""Settings of the training."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from vimoe.config.checks import LARGEST_SEED, bounded, check_fields
from vimoe.config.layers import Layers
from vimoe.config.parallel import ParallelConfig
from vimoe.errors import ConfigError

Precision = Literal["auto", "no", "bf16", "fp16"]


ClassWeights = Literal["none", "median_frequency"]
Fuse = Literal["none", "ewa", "exfusion"]
TRAINED = ("all", "moe", "experts", "head", "last:N", "every:N")  # `train_only`, beside block indices and patterns


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of the training. Names and defaults follow timm's training script where it has them.

    Args:
        epochs: number of passes over the training images.
        batch_size: number of images a step, of all processes together, which get equal shares; lowered, with a warning,
            if there are fewer training images.
        accumulation: number of steps whose gradients are added up for one update of the weights.
        lr: peak learning rate of AdamW, reached after the warm-up and then decayed by a cosine to min_lr.
        min_lr: learning rate at the end, or lr where that is lower.
        warmup_epochs: number of epochs of linear warm-up.
        weight_decay: weight decay of matrices; biases, norms and embeddings have none.
        layer_decay: learning rate of a block relative to the block after it (1 is the same rate everywhere).
        router_lr_scale: learning rate of the routers relative to the block they are in.
        expert_lr_scale: learning rate of the routed experts relative to the block they are in; the shared expert has
            the block's.
        router_weight_decay: weight decay of the routers.
        router_frozen: share of the training, from its beginning, in which no router is trained; 1 is all of it. Biases
            and gates (`moe.bias_update_rate`, `moe.gate`) still learn.
        router_freeze_epochs: number of epochs, counted over all stages or tasks, after which no router changes any
            more, its bias and gate included; 0 is never. `router_frozen` is about the beginning of a training.
        router_freeze_margin: gap between the scores of the last chosen expert and the next one. A layer's router
            changes no more once the mean gap over an epoch's images (or tokens) is larger; 0 is never.
        router_warmup_epochs: number of epochs in which a share of the routers' decisions is random; it falls linearly
            from 1 to 0, so that every expert is trained before a router has an opinion.
        expert_weight_decay: weight decay of the routed experts' matrices; by default that of other matrices.
        train_only: "all"; "moe" for the MoE layers, "experts" for their routed experts and routers without the shared
            expert, "head" for no layer; or FFNs by block as in `MoEConfig.layers` ("last:2", [10, 11],
            "blocks.1?.mlp"), dense or MoE. The classifier is always trained too.
        stages: list of values of train_only, such as "[head, all, experts]", trained one after the other, for `epochs`
            each, with all other settings; each starts with the best weights of that before, and its own schedule. MoE
            layers are made of the FFNs at the first "moe" or "experts", and the model is dense until then (MoE-LLaVA,
            arXiv 2401.15947, has the three above).
        fuse: "none", or how the experts of each MoE layer become one FFN, so that the model is dense at the end: "ewa"
            averages experts that random tokens (or images) have trained (arXiv 2308.06093), "exfusion" learns the
            shares of a sum of their weights, which is the FFN of every step (arXiv 2603.27965).
        fuse_rate: share of the way to the mean of the experts that each of them goes after an update, with fuse="ewa";
            it rises linearly from 0 to this over the training.
        balance_loss: weight of the routers' load-balancing loss.
        z_loss: weight of the routers' z-loss.
        importance_loss: weight of the routers' importance loss.
        entropy_loss: weight of the entropy of the routers' probabilities, which makes decisions confident.
        variance_loss: weight of the loss that lets each expert's probability vary from one image (or token) to another.
        orthogonal_loss: weight of the loss that makes the outputs of the experts of one token orthogonal; needs top_k
            of at least 2.
        mutual_loss: weight of the mean squared difference of the outputs of the experts of one token to their mean, by
            which they learn from one another (after MoDE, arXiv 2402.00893); needs top_k of at least 2.
        distill_loss: weight of the loss by which the moving average (`ema_decay`), with all its experts at work,
            teaches the model.
        route_loss: weight of the cross-entropy that teaches a "superclass" router the expert of each class; no other
            router reads it.
        oracle_loss: weight of the cross-entropy that teaches the routers which expert would have lost least on an image
            (classification by image routing). Until they are frozen (`router_freeze_epochs`), every second training
            image teaches them, and trains nothing else.
        oracle_temperature: nats by which an expert has to lose less than another to be e times as likely its target.
        locality_loss: weight of the loss that sends images to experts that have moved little since the task (or the
            training) began.
        label_smoothing: mass given to the other classes; by default 0.1 in classification and 0 in segmentation.
        mixup: alpha of mixup; 0 is off.
        cutmix: alpha of cutmix; 0 is off.
        auto_augment: timm's policy string, such as "rand-m9-mstd0.5-inc1"; none is off.
        random_erasing: probability of erasing a random part of an image.
        min_crop: smallest share of the area that a random crop keeps; 1 is no random crop.
        hflip: probability of a horizontal flip.
        color_jitter: largest relative change of brightness, contrast and saturation; by default 0 in classification
            and 0.5 in segmentation, which changes brightness by a quarter of it and hue by a tenth.
        min_scale: smallest factor by which an image is scaled before it is cropped (segmentation only).
        max_scale: largest factor by which an image is scaled before it is cropped (segmentation only).
        dice_loss: weight of the soft Dice loss beside the cross-entropy (segmentation only).
        class_weights: "none", or "median_frequency" for weights of the median frequency of all classes over a class's
            own (segmentation only).
        ema_decay: decay of the weights' moving average, which is then evaluated and saved; 0 is off.
        clip_grad: largest gradient norm; 0 is off.
        val_interval: number of epochs from one validation to the next; the last epoch is always validated. The best
            of the validated epochs is kept.
        early_stopping: number of epochs without a better validation score that end the training, at a validation; none
            is off.
        precision: "no" (float32), "bf16", "fp16", or "auto" for bf16 where it is known to be faster, else float32; the
            run's config.yaml notes the choice.
        compile: compile the model's blocks for the steps of the training (torch.compile), which takes up to a minute at
            the start of each run and stage. On a CPU it needs a C++ compiler.
        seed: seed of initialisation, order and augmentation.
        checkpoint_minutes: minutes between checkpoints within an epoch; each epoch ends with one anyway.
        tensorboard: write TensorBoard event files beside metrics.csv.
        parallel: sizes of the mesh of processes (data, fsdp, expert); by default all processes are data parallel.
    """

    epochs: int = bounded(10, 1)
    batch_size: int = bounded(64, 1)
    accumulation: int = bounded(1, 1)
    lr: float = bounded(3e-4, 0)
    min_lr: float = bounded(1e-6, 0)
    warmup_epochs: float = bounded(0.5, 0)
    weight_decay: float = bounded(0.05, 0)
    layer_decay: float = bounded(1.0, 0.01, 1)
    router_lr_scale: float = bounded(1.0, 0)
    expert_lr_scale: float = bounded(1.0, 0)
    router_weight_decay: float = bounded(0.0, 0)
    router_frozen: float = bounded(0.0, 0, 1)
    router_freeze_epochs: int = bounded(0, 0)
    router_freeze_margin: float = bounded(0.0, 0)
    router_warmup_epochs: float = bounded(0.0, 0)
    expert_weight_decay: float | None = bounded(None, 0)
    train_only: str | tuple[int | str, ...] = "all"
    stages: tuple[str, ...] | None = None
    fuse: Fuse = "none"
    fuse_rate: float = bounded(1.0, 0, 1)
    balance_loss: float = bounded(0.01, 0)
    z_loss: float = bounded(0.0, 0)
    importance_loss: float = bounded(0.0, 0)
    entropy_loss: float = bounded(0.0, 0)
    variance_loss: float = bounded(0.0, 0)
    orthogonal_loss: float = bounded(0.0, 0)
    mutual_loss: float = bounded(0.0, 0)
    distill_loss: float = bounded(0.0, 0)
    route_loss: float = bounded(0.3, 0)
    oracle_loss: float = bounded(0.0, 0)
    oracle_temperature: float = bounded(0.1, 1e-6)
    locality_loss: float = bounded(0.0, 0)
    label_smoothing: float | None = bounded(None, 0, 0.99999)
    mixup: float = bounded(0.0, 0)
    cutmix: float = bounded(0.0, 0)
    auto_augment: str | None = None
    random_erasing: float = bounded(0.0, 0, 1)
    min_crop: float = bounded(0.35, 0.01, 1)
    hflip: float = bounded(0.5, 0, 1)
    color_jitter: float | None = bounded(None, 0, 1)
    min_scale: float = bounded(0.5, 0.01, 100)
    max_scale: float = bounded(2.0, 0.01, 100)
    dice_loss: float = bounded(0.0, 0)
    class_weights: ClassWeights = "none"
    ema_decay: float = bounded(0.0, 0, 0.99999)
    clip_grad: float = bounded(1.0, 0)
    val_interval: int = bounded(1, 1)
    early_stopping: int | None = bounded(None, 1)
    precision: Precision = "auto"
    compile: bool = False
    seed: int = bounded(0, 0, LARGEST_SEED)
    checkpoint_minutes: float = bounded(10.0, 0)
    tensorboard: bool = True
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "train_only", self.trained.written)  # a list becomes a tuple
        check_fields(self)
        self._check_stages()
        if self.distill_loss and not self.ema_decay:
            raise ConfigError(
                f"distill_loss={self.distill_loss:g} with ema_decay=0: expected a moving average to be the teacher; "
                f"set ema_decay, such as 0.999"
            )
        if self.max_scale < self.min_scale:
            raise ConfigError(
                f"max_scale={self.max_scale}: expected at least min_scale={self.min_scale}; exchange them"
            )
        if self.color_jitter and self.auto_augment:
            raise ConfigError(
                f"color_jitter={self.color_jitter} with auto_augment={self.auto_augment!r}: expected one of them; timm "
                f"has no jitter beside a policy"
            )
        if self.fuse_rate != TrainConfig.fuse_rate and self.fuse != "ewa":
            raise ConfigError(
                f"fuse_rate={self.fuse_rate:g} with fuse={self.fuse!r}: expected it with fuse='ewa' only; leave it out"
            )
        self._check_oracle()
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ConfigError(f"batch_size={self.batch_size} with mixup or cutmix: expected an even number")

    def _check_oracle(self) -> None:
        if not self.oracle_loss and self.oracle_temperature != TrainConfig.oracle_temperature:
            raise ConfigError(
                f"oracle_temperature={self.oracle_temperature:g} with oracle_loss=0: expected it with an oracle_loss "
                f"only; leave it out"
            )
        refused = {  # settings by which images that teach the routers would train experts, or none could be told
            "mixup": "each image is in one half",
            "cutmix": "each image is in one half",
            "router_frozen": "no image may train experts before it teaches the routers",
            "compile": "experts are tried one by one",
        }
        for name, why in refused.items() if self.oracle_loss else ():
            if value := getattr(self, name):
                raise ConfigError(
                    f"oracle_loss={self.oracle_loss:g} with {name}={value}: expected "
                    f"{name}={getattr(TrainConfig, name)}, since {why}; leave one of them out"
                )

    def _check_stages(self) -> None:
        if self.stages is None:
            return
        if not isinstance(self.stages, (tuple, list)) or not self.stages:
            raise ConfigError(f"stages={self.stages!r}: expected a list of parts, such as [head, all, experts]")
        object.__setattr__(self, "stages", tuple(self.stages))
        for part in self.stages:
            Layers.parse(part, "stages", TRAINED)
        if self.train_only != "all":
            raise ConfigError(
                f"train_only={self.train_only!r} with stages={list(self.stages)}: expected one of them, since each "
                f"stage has its own part; leave train_only out, or set it to 'all' if a preset or file sets it"
            )

    @property
    def freezes_routers(self) -> bool:
        """True if routers are trained in a part of the training alone, or never."""
        return bool(self.router_frozen or self.router_freeze_epochs or self.router_freeze_margin)

    @property
    def trainings(self) -> list[TrainConfig]:
        """Settings of each stage, in order; these settings alone where there are no stages."""
        return [replace(self, train_only=part, stages=None) for part in self.stages or ()] or [self]

    @property
    def parts(self) -> list[Layers]:
        """Parts that are trained one after the other, parsed; an error about one names the setting that has it."""
        return [Layers.parse(part, "stages", TRAINED) for part in self.stages or ()] or [self.trained]

    @property
    def reads_outputs(self) -> bool:
        """True if a loss reads the outputs of the experts, which are recorded then."""
        return self.orthogonal_loss > 0 or self.mutual_loss > 0

    @property
    def trained(self) -> Layers:
        """`train_only`, parsed; its `word` is "all", "moe", "experts" or "head" where these are meant."""
        return Layers.parse(self.train_only, "train_only", TRAINED)
