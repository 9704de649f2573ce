"""Where the images are, and how they are read."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal, get_args

from vimoe.config.checks import LARGEST_SEED, check_choice, check_count, check_flags, check_range
from vimoe.config.registry import Registry
from vimoe.errors import ConfigError

Cache = Literal["none", "memory", "disk", "features"]


TASKS = Registry(
    "data.task",
    {
        "classification": "vimoe.tasks.classification:Classification",
        "segmentation": "vimoe.tasks.segmentation:Segmentation",
    },
)


Inference = Literal["slide", "whole"]


INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "hamming", "box")


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
    task: str = "classification"
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
        check_range("val_fraction", self.val_fraction, 0.001, 0.9)
        check_choice("cache", self.cache, get_args(Cache))
        check_count("views", self.views, 1)
        TASKS.check(self.task)
        check_choice("inference", self.inference, get_args(Inference))
        if self.crop_pct is not None:
            check_range("crop_pct", self.crop_pct, 0.1, 1.0)
        check_normalisation("mean", self.mean)
        check_normalisation("std", self.std)
        if self.interpolation is not None:
            check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        if self.workers is not None:
            check_count("workers", self.workers, 0)
        if self.images_per_class is not None:
            check_count("images_per_class", self.images_per_class, 2)
        check_count("seed", self.seed, 0, LARGEST_SEED)
        check_flags(self, "skip_unreadable", "flip_test")
        for one, other in itertools.combinations(("train_split", "val_split", "test_split"), 2):
            if (name := getattr(self, one)) == getattr(self, other) != "none":
                raise ConfigError(
                    f"{one} and {other} are both {name!r}: expected two splits, because what is trained on, what "
                    f"decides and what is reported must differ; {other}='none' does without"
                )


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
        check_range(name, value, 0, math.inf)
    if max(values) > 1:
        raise ConfigError(f"{name}={values}: expected values in 0..1; divide by 255")
    if name == "std" and not min(values):
        raise ConfigError(f"std={values}: expected values above 0")
