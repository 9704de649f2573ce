"""What to build and how to train it: frozen settings that import no torch and round-trip through JSON."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from vimoe.errors import ConfigError, nearest

RoutedUnit = Literal["image", "token"]
Combine = Literal["mix", "sum"]
BenchType = Literal["float32", "bfloat16"]
Precision = Literal["auto", "no", "bf16", "fp16"]
Cache = Literal["none", "memory", "disk", "features"]
Task = Literal["classification", "segmentation"]
Inference = Literal["slide", "whole"]
ClassWeights = Literal["none", "median_frequency"]
DECODERS = ("linear", "linear4", "upernet")
LAYER_WORDS = ("all", "none", "last:N", "every:N")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "hamming", "box")
LARGEST_SEED = 2**32 - 1  # that numpy takes
PRUNE_TOLERANCE = 0.01  # nats of validation loss
DRAWS, OVERRULED_IMAGES = 20, 1_000  # of the causal scores: permutations, and images that they are measured on


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Which FFNs become mixtures of experts, and of what kind. Nothing here depends on the backbone.

    Args:
        layers: which blocks: "all", "none", "last:2", "every:2" (blocks 1, 3, 5, ...), a list of block
            indices (0 is the first block with an FFN, -1 the last), or module-name patterns ("blocks.1?.mlp").
        num_experts: routed experts N of a layer, each of the FFN's own shape. 0 makes no mixture but a dense
            FFN of num_shared_experts times the width: the control with equal activated parameters.
        top_k: experts k that one image or token is sent to.
        routing: "image" takes one decision for all tokens of an image, "token" one for each.
        num_shared_experts: n experts that every token passes; n of them are one FFN of n times the width.
        combine: "mix" is S(x) + sum g_i (E_i(x) - S(x)), "sum" is S(x) + sum g_i E_i(x) (the ViMoE paper).
        normalize_gates: divide the gates by their sum over the chosen experts; goes with "sum".
        router_noise: in training, normal noise on the router's scores, its standard deviation in units of
            1 / num_experts (V-MoE, arXiv 2106.05974, has 1).
        bias_update_rate: step by which each update of the weights moves a bias on the choice of experts, up for
            experts with less than the mean load and down for those with more; gates stay without it (loss-free
            balancing, arXiv 2408.15664, has 0.001). 0 makes no bias.
        expert_dropout: dropout rate on the hidden units of the routed experts in training (Switch Transformers,
            arXiv 2101.03961, section 2.4); where the FFN has a larger one of its own, that one holds.

    Raises:
        ConfigError: for a value outside of these, or values that contradict one another.
    """

    layers: str | tuple[int | str, ...] = "last:2"
    num_experts: int = 8
    top_k: int = 1
    routing: RoutedUnit = "image"
    num_shared_experts: int = 1
    combine: Combine = "mix"
    normalize_gates: bool = False
    router_noise: float = 0.0
    bias_update_rate: float = 0.0
    expert_dropout: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        check_layers(self.layers)
        _check_choice("routing", self.routing, get_args(RoutedUnit))
        _check_choice("combine", self.combine, get_args(Combine))
        _check_count("num_experts", self.num_experts, 0)
        _check_count("num_shared_experts", self.num_shared_experts, 0)
        _check_count("top_k", self.top_k, 1)
        _check_range("router_noise", self.router_noise, 0)
        _check_range("bias_update_rate", self.bias_update_rate, 0.0, 1.0)
        _check_range("expert_dropout", self.expert_dropout, 0.0, 0.99)
        _check_flags(self, "normalize_gates")
        if self.num_experts == 0 and self.num_shared_experts < 2:
            raise ConfigError(
                f"num_experts=0 makes a dense FFN of num_shared_experts times the width: expected "
                f"num_shared_experts of at least 2, got {self.num_shared_experts}; for the parent use layers='none'"
            )
        if self.num_experts and self.top_k > self.num_experts:
            raise ConfigError(f"top_k={self.top_k}: expected at most num_experts={self.num_experts}; lower top_k")
        if self.normalize_gates and self.combine == "mix":
            raise ConfigError(
                "normalize_gates=True with combine='mix': normalised gates would leave nothing of the shared "
                "expert (without one they are normalised already); drop it, or use combine='sum'"
            )

    @property
    def gates_sum_to_one(self) -> bool:
        """Whether the gates of the chosen experts are divided by their sum."""
        return self.normalize_gates or (self.combine == "mix" and self.num_shared_experts == 0)

    @property
    def router_is_blind(self) -> bool:
        """Whether the task loss can never train the router, because the only gate is always 1."""
        return self.num_experts == 1 or (self.num_experts > 1 and self.top_k == 1 and self.gates_sum_to_one)

    def to_dict(self) -> dict[str, Any]:
        """These settings as JSON knows them."""
        values = asdict(self)
        if isinstance(self.layers, tuple):
            values["layers"] = list(self.layers)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MoEConfig:
        """The inverse of `to_dict`. Raises ConfigError for a name that is no setting."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"unknown MoE setting {name!r}: {nearest(name, known)}")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The dense ViT to start from, in timm's terms.

    Args:
        name: a timm model name, or "local-dir:FOLDER" or "hf-hub:USER/REPO" for weights in timm's format.
        pretrained: load the weights that belong to the name (`plan` and `count` never do).
        img_size: side of the square input image in pixels; by default the model's own.
        num_classes: size of the classifier; `train` takes it from the data.
        drop_path_rate: stochastic depth while training.
        decoder: of segmentation: "linear" on the last layer (the default) or "linear4" on the last four, as in DINOv2,
            or "upernet".
        args: further arguments of timm.create_model, such as {patch_size: 8, depth: 6}.
    """

    name: str = "vit_small_patch14_dinov2"
    pretrained: bool = True
    img_size: int | None = None
    num_classes: int | None = None
    drop_path_rate: float = 0.0
    decoder: str | None = None
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.img_size is not None:
            _check_count("img_size", self.img_size, 1)
        if self.num_classes is not None:
            _check_count("num_classes", self.num_classes, 1)
        _check_range("drop_path_rate", self.drop_path_rate, 0.0, 0.99)
        _check_flags(self, "pretrained")
        if self.decoder is not None:
            _check_choice("decoder", self.decoder, DECODERS)
        if not isinstance(self.args, dict):
            raise ConfigError(f"args={self.args!r}: expected arguments by name, such as {{patch_size: 8}}")
        for name in ("img_size", "num_classes", "drop_path_rate", "pretrained"):
            if name in self.args:
                raise ConfigError(f"model.args has {name!r}: expected it as model.{name}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images are and which roles they have.

    Args:
        path: a folder of class folders, or one that holds a folder of class folders for each role; a CSV file of
            paths and labels; a tar file or a folder of them, also of WebDataset; "hfds/NAME" or "hfds/FOLDER" of
            Hugging Face; "torch/mnist:FOLDER"; "digits" is scikit-learn's handwritten digits ("./digits" is a folder).
        task: "classification", or "segmentation" of a folder or table ("hfds/") with a mask for each image.
        train_split: name of the folder or split to train on.
        val_split: name of the one that decides; where it is missing or "none", validation is split off train.
        test_split: name of the one that only `evaluate` and the receipt of `prune` read.
        image_column, label_column: of a CSV file ("path" and "label") or a Hugging Face table (the only ones of images
            and of class labels; in a segmentation the ones called images and masks).
        val_fraction: share of each class that is split off train where there is no validation.
        images_per_class: train on at most this many images of each class (drawn by `seed`).
        seed: draws the split and the subset.
        skip_unreadable: leave out images that cannot be read, instead of stopping before training.
        cache: keep decoded images in "memory", or on "disk" for later runs too (in $XDG_CACHE_HOME or ~/.cache). Where
            `TrainConfig.train_only` is "moe", keep the "features" of the frozen blocks, on disk, in place of images.
        views: of cached features: so many augmented versions of each training image, an epoch each, in turn.
        workers: processes that decode images; by default one a core, at most 8, where a GPU computes, and none
            where the CPU does.
        crop_pct: share of the resized image's side that evaluation keeps; by default the model's own.
        interpolation: how images are resized ("bicubic", "bilinear"); by default the model's own.
        mean, std: normalisation of each channel, values in 0..1; by default the model's own.
        inference: of segmentation: "slide" a window of the training crop over an image, or the "whole" image at once.
        flip_test: of segmentation: take the mean with the scores of the mirrored image.
    """

    path: str = ""
    task: Task = "classification"
    train_split: str = "train"
    val_split: str = "val"
    test_split: str = "test"
    image_column: str | None = None
    label_column: str | None = None
    val_fraction: float = 0.1
    images_per_class: int | None = None
    seed: int = 0
    skip_unreadable: bool = False
    cache: Cache = "none"
    views: int = 4
    workers: int | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    inference: Inference = "slide"
    flip_test: bool = False

    def __post_init__(self) -> None:
        _check_range("val_fraction", self.val_fraction, 0.001, 0.9)
        _check_choice("cache", self.cache, get_args(Cache))
        _check_count("views", self.views, 1)
        _check_choice("task", self.task, get_args(Task))
        _check_choice("inference", self.inference, get_args(Inference))
        if self.crop_pct is not None:
            _check_range("crop_pct", self.crop_pct, 0.1, 1.0)
        check_normalisation("mean", self.mean)
        check_normalisation("std", self.std)
        if self.interpolation is not None:
            _check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        if self.workers is not None:
            _check_count("workers", self.workers, 0)
        if self.images_per_class is not None:
            _check_count("images_per_class", self.images_per_class, 2)
        _check_count("seed", self.seed, 0, LARGEST_SEED)
        _check_flags(self, "skip_unreadable", "flip_test")
        for one, other in itertools.combinations(("train_split", "val_split", "test_split"), 2):
            if (name := getattr(self, one)) == getattr(self, other) != "none":
                raise ConfigError(
                    f"{one} and {other} are both {name!r}: expected two splits, because what is trained on, what "
                    f"decides and what is reported must differ; {other}='none' does without"
                )


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
        balance_loss, z_loss, importance_loss: weights of the auxiliary losses of the routers.
        label_smoothing: mass given to the other classes; by default 0.1 in classification and 0 in segmentation.
        mixup, cutmix: alpha of each, 0 is off.
        auto_augment: timm's policy string, such as "rand-m9-mstd0.5-inc1"; none is off.
        random_erasing: probability.
        min_crop: smallest share of the area that a random crop keeps; 1 is no random crop.
        hflip: probability of a horizontal flip.
        color_jitter: up to which share brightness, contrast and saturation change; by default 0 in classification and
            0.5 in segmentation, which changes brightness by a quarter of it and hue by a tenth.
        min_scale, max_scale: of segmentation: factors between which an image is scaled before it is cropped.
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
                _check_count(name, value, least)
        for name, (low, high) in _TRAIN_RANGES.items():
            if (value := getattr(self, name)) is not None or name not in _MAY_BE_NONE:
                _check_range(name, value, low, high)
        for name, choices in _TRAIN_CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        _check_count("seed", self.seed, 0, LARGEST_SEED)
        _check_flags(self, "tensorboard")
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


def check_layers(layers: object) -> None:
    """Raises ConfigError where `layers` is neither one of LAYER_WORDS, nor block indices or module-name patterns."""
    items = tuple(layers) if isinstance(layers, (tuple, list)) else (layers,)
    named = [item for item in items if isinstance(item, str) and item]
    indices = [item for item in items if isinstance(item, int) and not isinstance(item, bool)]
    if not items or len(named) + len(indices) < len(items) or (indices and not isinstance(layers, (tuple, list))):
        raise ConfigError(
            f"layers={layers!r}: expected one of {', '.join(LAYER_WORDS)}, block indices such as [3, 4], "
            f"or module-name patterns such as 'blocks.1?.mlp'"
        )
    word, colon, number = layers.partition(":") if isinstance(layers, str) else ("", "", "")
    if colon and not (word in ("last", "every") and re.fullmatch(r"[1-9]\d*", number)):
        remedy = nearest(f"{word}:N", LAYER_WORDS)
        raise ConfigError(f"layers={layers!r}: expected one of {', '.join(LAYER_WORDS)} with N of 1 or more; {remedy}")


def check_normalisation(name: str, values: object) -> None:
    """Raises ConfigError for a mean or std that is not of channels in 0..1; None is the model's own.

    Args:
        name: "mean" or "std".
        values: one for each of the three channels, or one for all.
    """
    if values is None:
        return
    if not isinstance(values, (tuple, list)) or len(values) not in (1, 3):
        raise ConfigError(f"{name}={values!r}: expected three values, of red, green and blue, such as [0.5, 0.5, 0.5]")
    for value in values:
        _check_range(name, value, 0, math.inf)
    if max(values) > 1:
        raise ConfigError(f"{name}={values}: expected values in 0..1; divide by 255")
    if name == "std" and not min(values):
        raise ConfigError(f"std={values}: expected values above 0")


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r}: expected one of {', '.join(allowed)}; {nearest(value, allowed)}")


def _check_flags(config: object, *names: str) -> None:
    for name in names:
        if not isinstance(value := getattr(config, name), bool):  # "false" would count as true
            raise ConfigError(f"{name}={value!r}: expected True or False")


def _check_count(name: str, value: object, least: int, most: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        expected = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ConfigError(f"{name}={value!r}: expected a whole number {expected}")


def _check_range(name: str, value: object, low: float, high: float = math.inf) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:  # type: ignore[operator]
        expected = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
        raise ConfigError(f"{name}={value!r}: expected {expected}")


@dataclass(frozen=True, kw_only=True)
class ModelBench:
    """What `vimoe bench model` times.

    Args:
        images: of a batch.
        dtype: of weights and images.
        precision: "bf16" computes under autocast, as `TrainConfig.precision`, with weights in float32; what
            `vimoe.optimize` makes, of one type, is then left out.
        rounds: in each of them every contestant runs once; fewer, with a warning, where they would take long.
    """

    images: int = 16
    dtype: BenchType = "float32"
    precision: Literal["no", "bf16"] = "no"
    rounds: int = 30

    def __post_init__(self) -> None:
        for field_ in fields(self):
            if isinstance(field_.default, int):  # of one round there is no interval
                _check_count(field_.name, getattr(self, field_.name), 2 if field_.name == "rounds" else 1)
        _check_choice("dtype", self.dtype, get_args(BenchType))
        _check_choice("precision", self.precision, ("no", "bf16"))
        if self.precision != "no" and self.dtype != "float32":
            raise ConfigError(
                f"precision={self.precision!r} with dtype={self.dtype!r}: expected dtype='float32', the weights' type "
                f"under autocast; leave one of them out"
            )

    @property
    def words(self) -> str:
        """In which type it computes."""
        return self.dtype if self.precision == "no" else "bfloat16 autocast of float32"


@dataclass(frozen=True, kw_only=True)
class LayerBench(ModelBench):
    """What `vimoe bench layer` times.

    Args:
        images, dtype, precision, rounds: as for a model.
        tokens: of an image.
        dim: channels.
        hidden: hidden units of an FFN.
        load: all experts alike, or expert i with 1 / (i + 1) of the share of expert 0 ("zipf").
    """

    tokens: int = 257
    dim: int = 384
    hidden: int = 1536
    load: Literal["balanced", "zipf"] = "balanced"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("load", self.load, ("balanced", "zipf"))
