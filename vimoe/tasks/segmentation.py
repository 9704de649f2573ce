"""Naming the class of every pixel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader

from vimoe import run_folder
from vimoe.analysis.expert_maps import expert_maps
from vimoe.config.model import ModelConfig
from vimoe.config.settings import Settings
from vimoe.config.train import TrainConfig
from vimoe.data.images import image_size
from vimoe.data.loaders import preprocessing, processes
from vimoe.data.scene_loaders import JointImages, centre_transform
from vimoe.data.scene_scan import SceneScan, scan_scenes
from vimoe.data.scenes import Scenes, load_others, load_scenes
from vimoe.errors import ConfigError
from vimoe.metrics.segmentation import SceneScore, ceiling
from vimoe.models.create import dense_segmenter
from vimoe.models.interface import label_names
from vimoe.models.model_folder import load
from vimoe.models.segmenter import Segmenter, create_segmenter
from vimoe.moe.layer import moe_layers
from vimoe.tasks.scene_training import evaluate_scenes, segmentation, whole_images
from vimoe.training.task import Task

SHOWN = 4  # scenes whose expert maps a report has


class Segmentation:
    """To name the class of every pixel; in all else as `Classification`."""

    def __init__(
        self, settings: Settings, classes: Sequence[str] | None = None, validation: Iterable[str] = ()
    ) -> None:
        self.settings, self._classes, self._validation = settings, classes, validation
        self._scan: SceneScan | None = None

    @cached_property
    def data(self) -> Scenes:
        return load_scenes(self.settings.data, self._classes or (), self._validation)

    @property
    def split_off(self) -> list[str]:
        return self.data.names(self.data.val) if self.data.split_off else []

    def scan(self) -> SceneScan:
        self._scan = self._scan or scan_scenes(self.data, self.data.root)
        return self._scan

    def dense_model(self) -> Segmenter:
        config = self.settings.model
        asked = config.num_classes
        if asked not in (None, len(self.data.classes)):
            raise ConfigError(f"model.num_classes={asked}: the data has {len(self.data.classes)} classes; leave it out")
        if folder := dense_segmenter(config):
            return self._continued(folder)
        palette = self.data.palette
        return create_segmenter(config, len(self.data.classes), config.decoder or "linear", palette=palette)

    def _continued(self, folder: Path) -> Segmenter:
        """A segmenter that was trained before, decoder and all."""
        config = self.settings.model
        if config != ModelConfig(name=config.name, pretrained=config.pretrained, num_classes=config.num_classes):
            raise ConfigError(f"model.name={config.name!r} is a whole segmenter: expected no other setting of model; "
                              f"leave img_size, decoder, drop_path_rate and args out")  # fmt: skip
        model = load(folder)
        assert isinstance(model, Segmenter)
        if label_names(model) != list(self.data.classes):
            raise ConfigError(f"model.name={config.name!r} knows the classes {', '.join(label_names(model)[:4])}, ...: "
                              f"expected those of the data, in their order; correct its classes.yaml")  # fmt: skip
        return model

    def check(self, model: nn.Module, converted: Sequence[str] = ()) -> None:
        assert isinstance(model, Segmenter)
        if self.settings.data.inference == "whole" and model.fixed_size:
            raise ConfigError(
                f"data.inference='whole' with {self.settings.model.name!r}, a ViT of one size: expected 'slide'"
            )
        if model.decoder_name == "upernet" and self.settings.train.batch_size < 2:
            raise ConfigError(
                "a batch of 1 image with model.decoder='upernet': expected at least 2 for its batch norms; raise "
                "train.batch_size, give more training images, or use model.decoder=linear"
            )

    def task(self, model: nn.Module, config: TrainConfig, converted: Sequence[str] = ()) -> Task:
        assert isinstance(model, Segmenter)
        pixels = self.scan().pixels["train"]
        prepared = preprocessing(model, self.settings.data)
        return segmentation(self.data, prepared, model.crop, config, self.settings.data, pixels)

    def limits(self, model: nn.Module) -> dict[str, float]:
        assert isinstance(model, Segmenter)
        masks = (torch.from_numpy(self.data.legend.read(mask)).long() for _, mask in self.data.val)
        return {"patch_ceiling": ceiling(masks, model.patch_size[0], len(self.data.classes)).miou}

    def figures(self, model: nn.Module) -> dict[str, Figure]:
        assert isinstance(model, Segmenter)
        if not moe_layers(model):
            return {}
        prepared = preprocessing(model, self.settings.data)
        spread = self.data.val[:: max(1, len(self.data.val) // SHOWN)][:SHOWN]  # the next frame of a video looks alike
        return {run_folder.EXPERT_MAPS: expert_maps(model, spread, self.data.legend, prepared)}

    def loader(self, model: nn.Module, samples: Sequence[Any]) -> DataLoader:
        return self._loader(model, samples, self.data)

    def _loader(self, model: nn.Module, samples: Sequence[Any], scenes: Scenes) -> DataLoader:
        prepared = preprocessing(model, self.settings.data)
        return whole_images(samples, scenes, prepared, self.settings.train.batch_size, self.settings.data.workers)

    def deciding(self, model: nn.Module) -> DataLoader:
        """Whole images where all are of one size, else the middle of each, as large as the training crop."""
        assert isinstance(model, Segmenter)
        sizes = {image_size(image) for image, _ in self.data.val}
        if len(sizes) == 1 and not model.fixed_size:
            return self.loader(model, self.data.val)
        prepared = preprocessing(model, self.settings.data)
        transform = centre_transform(model.crop, prepared["mean"], prepared["std"])
        scenes = JointImages(self.data.val, self.data.legend, transform)
        return DataLoader(scenes, self.settings.train.batch_size, **processes(self.settings.data.workers))

    @property
    def sequences(self) -> tuple[str, ...] | None:
        return self.data.sequences

    def evaluate(self, model: nn.Module, loader: DataLoader, task: str = "") -> SceneScore:
        return evaluate_scenes(model, loader, self.settings.data, task)

    def elsewhere(self, model: nn.Module, path: str) -> tuple[str, DataLoader]:
        name, others = load_others(path, label_names(model), self.data.legend, self.settings.data)
        return name, self._loader(model, others.test, others)
