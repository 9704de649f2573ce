"""Semantic segmentation: one class for each pixel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader

from vimoe import run_folder
from vimoe.config.data import DataConfig
from vimoe.config.model import ModelConfig
from vimoe.data.images import image_size
from vimoe.data.loaders import preprocessing, processes, share
from vimoe.data.scene_loaders import JointImages, centre_transform, eval_transform
from vimoe.data.scene_scan import SceneScan, scan_scenes
from vimoe.data.scenes import Scenes, load_others, load_scenes
from vimoe.errors import ConfigError
from vimoe.files import one_line
from vimoe.metrics.base import Batches, Counts, Score
from vimoe.metrics.segmentation import ceiling
from vimoe.models.create import create_segmenter
from vimoe.models.interface import label_names
from vimoe.models.model_folder import load
from vimoe.models.names import segmenter_folder
from vimoe.models.prompted import read_prompts
from vimoe.moe.layer import moe_layers
from vimoe.process import Process
from vimoe.tasks.base import Task, check_classes
from vimoe.tasks.cached_features import changed_layers, if_kept
from vimoe.tasks.cached_scenes import (
    check_cut_and_decoder,
    entries_of_one_size,
    entries_of_scenes,
    job_on_crop_features,
)
from vimoe.tasks.expert_maps import expert_maps
from vimoe.tasks.segmentation_job import evaluate_scenes, job_on_scenes, whole_images
from vimoe.tasks.segmentation_predictions import predict_scenes
from vimoe.training.job import Job

SHOWN = 4  # scenes whose expert maps a report has


class Segmentation(Task[Scenes]):
    """Semantic segmentation. A sample is an image and its mask; models are of class `Segmenter`."""

    metric = "segmentation"
    writes_predictions = True

    @classmethod
    def find(cls, config: DataConfig, classes: Sequence[str] | None = None, validation: Iterable[str] = ()) -> Scenes:
        return load_scenes(config, classes or (), validation)

    @classmethod
    def dense_model(cls, config: ModelConfig, data: Scenes) -> nn.Module:
        check_classes(config.num_classes, len(data.classes))
        if folder := segmenter_folder(config):
            return _continued(config, folder, data)
        prompts = None if config.prompts is None else read_prompts(config.prompts, data.classes)
        decoder = config.decoder or "linear"
        return create_segmenter(config, len(data.classes), decoder, palette=data.palette, prompts=prompts)

    def scan(self, data: Scenes) -> SceneScan:
        return scan_scenes(data, data.root)

    def check(self, model: Any, prepared: dict[str, Any], trained: Sequence[str] | None) -> None:
        """Raise ConfigError for whole images and a ViT of one size, a batch norm over one image, or no frozen trunk."""
        if self.settings.data.inference == "whole" and model.fixed_size:
            raise ConfigError(
                f"data.inference='whole' with {self.settings.model.name!r}, a ViT of one size: expected 'slide'"
            )
        if self.settings.data.cache == "features":
            assert trained is not None  # Settings refuses "all"
            check_cut_and_decoder(model, trained)
        if model.decoder_name == "upernet" and self.settings.train.batch_size < 2:
            raise ConfigError(
                "a batch of 1 image with model.decoder='upernet': expected at least 2 for its batch norms; raise "
                "train.batch_size, give more training images, or use model.decoder=linear"
            )

    def job(
        self, model: Any, data: Scenes, scanned: Any, prepared: dict[str, Any], trained: Sequence[str] | None
    ) -> Job:
        pixels, settings = scanned.pixels["train"], self.settings
        if settings.data.cache == "features":
            assert trained is not None
            return job_on_crop_features(model, trained, data, prepared, settings.train, settings.data, pixels)
        return job_on_scenes(data, prepared, model.crop, settings.train, settings.data, pixels)

    def loader(self, model: nn.Module, data: Scenes, samples: Sequence[Any]) -> DataLoader:
        prepared, read = preprocessing(model, self.settings.data), self.settings.data
        return whole_images(samples, data, prepared, self.settings.train.batch_size, read.workers, self.process)

    def scored(self, model: nn.Module, data: Scenes, samples: Sequence[Any]) -> Batches:
        """Return features of a run that cached them, if they can be kept, else whole images."""
        read, entries, size = self.settings.data, None, self.settings.train.batch_size
        if read.cache == "features":
            known = changed_layers(self.settings, model), samples, data, preprocessing(model, read), read, size
            entries = if_kept(lambda: entries_of_scenes(model, *known, self.process))
        return entries or self.loader(model, data, samples)

    def validation(self, model: nn.Module, data: Scenes) -> Batches:
        """Return features of the images of `one_size` of a run that cached features, if they can be kept."""
        read, entries = self.settings.data, None
        if read.cache == "features":
            images = Segmentation(self.settings).one_size(model, data, data.val)  # of all processes
            size, batch = self._size(model, data.val), self.settings.train.batch_size
            known = changed_layers(self.settings, model), images, size, data, preprocessing(model, read), batch
            entries = if_kept(lambda: entries_of_one_size(model, *known, self.process))
        return entries or self.one_size(model, data, data.val)

    def one_size(self, model: Any, data: Scenes, samples: Sequence[Any]) -> DataLoader:
        """Return whole images where all are of one size, else the middle of each, as large as the training crop."""
        prepared, read, size = preprocessing(model, self.settings.data), self.settings.data, self._size(model, samples)
        normalise = prepared["mean"], prepared["std"]
        # whole images have the transform of `loader`, by which features are found again
        transform = centre_transform(size, *normalise) if size == model.crop else eval_transform(*normalise)
        scenes = JointImages(samples, data.legend, transform)
        places: Any = share(len(samples), self.settings.train.batch_size, self.process)
        return DataLoader(scenes, batch_sampler=places, **processes(read.workers))

    def _size(self, model: Any, samples: Sequence[Any]) -> tuple[int, int]:
        """Return (height, width) of the images of `one_size`."""
        sizes = {image_size(image) for image, _ in samples}
        crop: tuple[int, int] = model.crop
        return sizes.pop() if len(sizes) == 1 and not model.fixed_size else crop

    def timed(self, model: Any, data: Scenes, samples: Sequence[Any]) -> DataLoader:
        """Return validation, because whole images may differ in size."""
        return self.one_size(model, data, data.val)

    def sequences(self, data: Scenes) -> tuple[str, ...] | None:
        return data.sequences

    def evaluate(
        self, model: nn.Module, loader: Batches, bar: str = "", counts: Counts | None = None,
        process: Process | None = None,
    ) -> Score:  # fmt: skip
        return evaluate_scenes(model, loader, self.settings.data, bar, counts, process)

    def elsewhere(self, model: nn.Module, path: str) -> tuple[str, DataLoader]:
        classes, config = label_names(model), self.settings.data
        which, others = load_others(path, classes, self.find(config, classes).legend, config)
        return which, self.loader(model, others, others.test)

    def predict(
        self, model: nn.Module, files: Sequence[Path], out: Path | None = None, top: int = 5
    ) -> list[dict[str, Any]]:
        if out is None:
            raise ConfigError("out=None: expected a folder for masks and overlays; name it")
        return predict_scenes(model, files, out, self.settings.data, self.process)

    def line(self, prediction: dict[str, Any], top: int) -> str:
        areas = ", ".join(f"{one_line(name)} {share:.1%}" for name, share in list(prediction["areas"].items())[:top])
        return f"{one_line(prediction['mask'])}: {areas}"

    def limits(self, model: Any, data: Scenes) -> Mapping[str, float]:
        masks = (torch.from_numpy(data.legend.read(mask)).long() for _, mask in data.val)
        return {"patch_ceiling": ceiling(masks, model.patch_size, len(data.classes)).miou}

    def figures(self, model: Any, data: Scenes) -> Mapping[str, Figure]:
        """Return maps of the experts over a few validation images; nothing for a dense model."""
        if not moe_layers(model):
            return {}
        prepared = preprocessing(model, self.settings.data)
        spread = data.val[:: max(1, len(data.val) // SHOWN)][:SHOWN]  # the next frame of a video looks alike
        return {run_folder.EXPERT_MAPS: expert_maps(model, spread, data.legend, prepared)}


def _continued(config: ModelConfig, folder: Path, data: Scenes) -> nn.Module:
    """Return a segmenter that was trained before, decoder and all."""
    if config != ModelConfig(name=config.name, pretrained=config.pretrained, num_classes=config.num_classes):
        raise ConfigError(
            f"model.name={config.name!r} is a whole segmenter: expected no other setting of model; leave img_size, "
            f"decoder, drop_path_rate and args out"
        )
    model = load(folder)
    if label_names(model) != list(data.classes):
        raise ConfigError(
            f"model.name={config.name!r} knows the classes {', '.join(label_names(model)[:4])}, ...: expected those of "
            f"the data, in their order; correct its classes.yaml"
        )
    return model
