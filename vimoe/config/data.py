"""Settings of the data."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

from vimoe.config.checks import LARGEST_SEED, bounded, check_choice, check_fields, check_range, one_of
from vimoe.config.registry import Registry
from vimoe.errors import ConfigError, nearest

Cache = Literal["none", "memory", "disk", "features"]
TASKS = Registry(
    "data.task",
    {
        "classification": "vimoe.tasks.classification:Classification",
        "segmentation": "vimoe.tasks.segmentation:Segmentation",
    },
)
Inference = Literal["slide", "whole"]
PREPROCESSING = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")  # timm's names of it
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "hamming", "box")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images, their roles, and how they are read.

    Args:
        path: folder of class folders, or of such a folder for each role; CSV file of paths and labels; tar file or
            folder of tar files, also WebDataset shards; "hfds/NAME" or "hfds/FOLDER" for Hugging Face;
            "torch/mnist:FOLDER"; or "digits" for scikit-learn's handwritten digits ("./digits" is a folder).
        task: "classification", or "segmentation" for a folder or table ("hfds/") with a mask for each image.
        train_split: name of the folder or split to train on. Several are joined by "+", as in Hugging Face's datasets;
            so are those of the other roles (classification only).
        val_split: name of the split for every decision; if it is missing or "none", validation is split off train.
        test_split: name of the split that only `evaluate` and the receipt of `prune` read.
        image_column: column of the images; by default "path" in a CSV file, and the only one of images in a Hugging
            Face table (segmentation: the one that is named like images).
        label_column: column of the labels; by default "label" in a CSV file, and the only one of class labels in a
            Hugging Face table (segmentation: the one that is named like masks).
        val_fraction: share of each class that is split off train if there is no validation split.
        images_per_class: largest number of train images of each class, drawn by `seed`.
        tasks: number of tasks that are learnt one after the other, each of its own classes, drawn by `seed`; or
            "splits", for a task of each split of `train_split`; by default all images are learnt at once.
        seed: seed of the validation split, of the subset and of the classes of each task.
        skip_unreadable: leave out images that cannot be read, instead of stopping before training.
        cache: keep decoded images in "memory", or on "disk" for later runs too (in $XDG_CACHE_HOME or ~/.cache). With
            a train.train_only other than "all", keep the "features" of the frozen blocks on disk instead of images;
            `evaluate`, `analyze`, `diagnose` and `prune` read them too (segmentation: no cache but this one).
        views: number of augmented versions cached for each training image; epochs use them in turn (cache=features).
        workers: number of processes that decode images; by default one per core, at most 8, if a GPU computes, else 0.
        crop_pct: share of the resized image's side that evaluation keeps; by default the model's own.
        interpolation: filter for resizing images ("bicubic", "bilinear"); by default the model's own.
        mean: mean of each channel for normalisation, values in 0..1; by default the model's own.
        std: standard deviation of each channel for normalisation, values in 0..1; by default the model's own.
        inference: "slide" a window of the training crop over an image, or predict the "whole" image at once
            (segmentation only).
        flip_test: average with the scores of the mirrored image (segmentation only).

    Raises:
        ConfigError: if a value is not one of these, or two roles have the same split.
    """

    path: str = ""
    task: str = "classification"
    train_split: str = "train"
    val_split: str = "val"
    test_split: str = "test"
    image_column: str | None = None
    label_column: str | None = None
    val_fraction: float = bounded(0.1, 0.001, 0.9)
    images_per_class: int | None = bounded(None, 2)
    tasks: int | Literal["splits"] | None = bounded(None, 2)
    seed: int = bounded(0, 0, LARGEST_SEED)
    skip_unreadable: bool = False
    cache: Cache = "none"
    views: int = bounded(4, 1)
    workers: int | None = bounded(None, 0)
    crop_pct: float | None = bounded(None, 0.1, 1)
    interpolation: str | None = one_of(None, INTERPOLATIONS)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    inference: Inference = "slide"
    flip_test: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        TASKS.check(self.task)
        check_normalisation("mean", self.mean)
        check_normalisation("std", self.std)
        for one, other in itertools.combinations(("train_split", "val_split", "test_split"), 2):
            if (name := getattr(self, one)) == getattr(self, other) != "none":
                raise ConfigError(
                    f"{one} and {other} are both {name!r}: expected different splits for training, decisions and "
                    f"reports; set {other}='none' to do without"
                )
        if self.tasks == "splits" and self.task_count < 2:
            raise ConfigError(
                f"tasks='splits' with train_split={self.train_split!r}: expected a split for each task, joined by '+', "
                f"such as 'photo+sketch'"
            )

    @property
    def task_count(self) -> int:
        """Number of tasks that are learnt one after the other; 1 if all images are learnt at once."""
        return len(joined(self.train_split)) if self.tasks == "splits" else self.tasks or 1


def joined(splits: str) -> list[str]:
    """Return the names in a text that joins them by "+".

    >>> joined("photo+sketch"), joined("photo + sketch")
    (['photo', 'sketch'], ['photo', 'sketch'])
    """
    return [name.strip() for name in splits.split("+")]


def check_preprocessing(values: dict[str, Any], own: dict[str, Any]) -> None:
    """Raise ConfigError for preprocessing in timm's terms with a name or value that nothing reads as it is meant.

    Args:
        values: values by name, those of `PREPROCESSING` alone; None stands for the model's own.
        own: the model's own preprocessing, whose values are taken as they are.
    """
    if unknown := next((name for name in values if name not in PREPROCESSING), None):
        raise ConfigError(f"preprocessing has {unknown!r}: {nearest(str(unknown), PREPROCESSING)}")
    new = {name: each for name, each in values.items() if each is not None and repr(each) != repr(own.get(name))}
    for name in ("mean", "std"):
        check_normalisation(name, new.get(name), own["input_size"][0])
    if "crop_pct" in new:
        check_range("crop_pct", new["crop_pct"], 0.1, 1)
    if "interpolation" in new:
        check_choice("interpolation", new["interpolation"], INTERPOLATIONS)


def check_normalisation(name: str, values: object, channels: int = 3) -> None:
    """Raise ConfigError if a mean or std is not in 0..1; None stands for the model's own.

    Args:
        name: "mean" or "std".
        values: one value for each of the channels, or one for all.
        channels: number of channels.
    """
    if values is None:
        return
    if isinstance(values, (tuple, list)) and len(values) not in (1, channels) and channels != 3:
        raise ConfigError(f"{name}={values!r}: expected a value for each of the {channels} channels, or one for all")
    if not isinstance(values, (tuple, list)) or len(values) not in (1, channels):
        raise ConfigError(f"{name}={values!r}: expected three values, of red, green and blue, such as [0.5, 0.5, 0.5]")
    for value in values:
        check_range(name, value, 0, math.inf)
    if max(values) > 1:
        raise ConfigError(f"{name}={values}: expected values in 0..1; divide by 255")
    if name == "std" and not min(values):
        raise ConfigError(f"std={values}: expected values above 0")
