"""Classification or segmentation: what a run has to know of its kind, from the data to the score."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader

from vimoe import runs
from vimoe.backbone import create, dense_segmenter
from vimoe.config import ModelConfig, TrainConfig
from vimoe.data import Data, load_data, load_folder
from vimoe.errors import ConfigError
from vimoe.evaluate import Score, evaluate, label_names
from vimoe.features import FeatureCache
from vimoe.folder import load
from vimoe.images import image_size
from vimoe.loading import eval_loader, preprocessing, processes, train_loader
from vimoe.options import Settings
from vimoe.scan import Scan, scan
from vimoe.segmentation.joint import JointImages, centre_transform
from vimoe.segmentation.learning import evaluate_scenes, segmentation, whole_images
from vimoe.segmentation.maps import expert_maps
from vimoe.segmentation.scene_scan import SceneScan, scan_scenes
from vimoe.segmentation.scenes import Scenes, load_others, load_scenes
from vimoe.segmentation.score import SceneScore, ceiling
from vimoe.segmentation.segmenter import Segmenter, create_segmenter
from vimoe.surgery import select, vit
from vimoe.task import Task, classification
from vimoe.upcycling import moe_layers, sites

SHOWN = 4  # scenes whose expert maps a report has


class Classification:
    """To name the class of an image.

    Args:
        settings: of the run.
        classes: of a trained model; by default those of the data.
        validation: names of what a run split off train.
    """

    def __init__(
        self, settings: Settings, classes: Sequence[str] | None = None, validation: Iterable[str] = ()
    ) -> None:
        self.settings, self._classes, self._validation = settings, classes, validation

    @cached_property
    def data(self) -> Data:
        """The samples of each role, and the names of the classes. Raises DataError where they cannot be found."""
        return load_data(self.settings.data, self._classes, self._validation)

    @property
    def split_off(self) -> list[str]:
        """Names of the validation images, where they were taken from train."""
        return self.data.names(self.data.val) if self.data.split_off else []

    def scan(self) -> Scan:
        """Opens all images that have a role. Raises DataError where some cannot be used."""
        return scan(self.data)

    def dense_model(self) -> nn.Module:
        """The model to start from, as `settings.model` says."""
        asked = self.settings.model.num_classes
        if asked not in (None, len(self.data.classes)):
            raise ConfigError(f"model.num_classes={asked}: the data has {len(self.data.classes)} classes; leave it out")
        return create(self.settings.model, len(self.data.classes))

    def check(self, model: nn.Module) -> None:
        """Raises VimoeError for an augmentation that timm does not know, or features that cannot be kept."""
        train_loader(self.data.train, preprocessing(model, self.settings.data), self.settings.train, workers=0)
        if self.settings.data.cache == "features":
            self._features(model, self.settings.train)

    def task(self, model: nn.Module, config: TrainConfig) -> Task:
        """What a training has to know."""
        data = self.settings.data
        if data.cache == "features":
            return self._features(model, config).task()
        return classification(self.data, preprocessing(model, data), config, data.workers, data.cache)

    def _features(self, model: nn.Module, config: TrainConfig) -> FeatureCache:
        data = self.settings.data
        trained = [site.name for site in select(sites(model), self.settings.moe.layers)]
        return FeatureCache(model, trained, self.data, preprocessing(model, data), config, data.views, data.workers)

    def limits(self, model: nn.Module) -> dict[str, float]:
        """What bounds a score, by name; nothing in a classification."""
        return {}

    def figures(self, model: nn.Module) -> dict[str, Figure]:
        """Pictures for the report of a trained model, by file name; none of a classification."""
        return {}

    def loader(self, model: nn.Module, samples: Sequence[Any]) -> DataLoader:
        """Batches of these samples in order, as evaluation sees them."""
        batch = 2 * self.settings.train.batch_size
        return eval_loader(samples, preprocessing(model, self.settings.data), batch, self.settings.data.workers)

    def deciding(self, model: nn.Module) -> DataLoader:
        """Validation batches for analysis and pruning."""
        return self.loader(model, self.data.val)

    @property
    def sequences(self) -> tuple[str, ...] | None:
        """The video that each image of `deciding` is a frame of; None where nothing says."""
        return None

    def evaluate(self, model: nn.Module, loader: DataLoader, task: str = "") -> Score:
        """Scores a model, and shows how far it is if `task` names it."""
        return evaluate(model, loader, task)

    def elsewhere(self, model: nn.Module, path: str) -> tuple[str, DataLoader]:
        """Which images of another data path are to be scored ("test", "validation", "all"), and batches of them."""
        name, samples = load_folder(path, label_names(model), self.settings.data)
        return name, self.loader(model, samples)


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

    def check(self, model: nn.Module) -> None:
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

    def task(self, model: nn.Module, config: TrainConfig) -> Task:
        assert isinstance(model, Segmenter)
        pixels = self.scan().pixels["train"]
        prepared = preprocessing(model, self.settings.data)
        return segmentation(self.data, prepared, model.crop, config, self.settings.data, pixels)

    def limits(self, model: nn.Module) -> dict[str, float]:
        embed: Any = vit(model).patch_embed
        masks = (torch.from_numpy(self.data.legend.read(mask)).long() for _, mask in self.data.val)
        return {"patch_ceiling": ceiling(masks, embed.patch_size[0], len(self.data.classes)).miou}

    def figures(self, model: nn.Module) -> dict[str, Figure]:
        assert isinstance(model, Segmenter)
        if not moe_layers(model):
            return {}
        prepared = preprocessing(model, self.settings.data)
        spread = self.data.val[:: max(1, len(self.data.val) // SHOWN)][:SHOWN]  # the next frame of a video looks alike
        return {runs.EXPERT_MAPS: expert_maps(model, spread, self.data.legend, prepared)}

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


Problem = Classification | Segmentation


def problem_of(settings: Settings, classes: Sequence[str] | None = None, validation: Iterable[str] = ()) -> Problem:
    """The problem that the settings name, with its data found."""
    kind = Segmentation if settings.data.task == "segmentation" else Classification
    return kind(settings, classes, validation)
