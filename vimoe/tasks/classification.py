"""Image classification: one class for each image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from vimoe.analysis.evidence import Evidence
from vimoe.analysis.figures import contact_sheet
from vimoe.analysis.trust import Trust
from vimoe.config.data import DataConfig
from vimoe.config.model import ModelConfig
from vimoe.data.classification import load_data, load_folder
from vimoe.data.images import open_image
from vimoe.data.labelled_images import Data
from vimoe.data.loaders import eval_loader, preprocessing, train_transform
from vimoe.data.scan import Scan, scan, warn_of_absent
from vimoe.data.tasks import tasks_of
from vimoe.files import one_line
from vimoe.metrics.base import Batches, metric_of
from vimoe.models.class_order import order_classes
from vimoe.models.create import create
from vimoe.models.frozen_trunk import check_cut
from vimoe.models.interface import label_names
from vimoe.tasks.base import Scanned, Task, check_classes
from vimoe.tasks.cached_features import FeatureCache, changed_layers, entries_of, if_kept
from vimoe.tasks.classification_job import job_on_images
from vimoe.tasks.classification_predictions import predict
from vimoe.training.job import Job

EXAMPLE_SIDE = 96  # pixels, at most, of an image on a contact sheet


class Classification(Task[Data]):
    """Image classification. A sample is an image and the number of its class."""

    metric = "classification"
    trusts = True

    @classmethod
    def find(cls, config: DataConfig, classes: Sequence[str] | None = None, validation: Iterable[str] = ()) -> Data:
        return load_data(config, classes, validation)

    @classmethod
    def dense_model(cls, config: ModelConfig, data: Data) -> nn.Module:
        check_classes(config.num_classes, len(data.classes))
        model = create(config, len(data.classes))
        order_classes(model, data.classes)
        return model

    def scan(self, data: Data) -> Scan:
        return scan(data)

    def divided(self, data: Data) -> Sequence[Data]:
        return tasks_of(data, self.settings.data)

    def check(self, model: nn.Module, prepared: dict[str, Any], trained: Sequence[str] | None) -> None:
        """Raise VimoeError for an augmentation that timm does not know, or features that cannot be cached."""
        train_transform(prepared, self.settings.train)
        if self.settings.data.cache == "features":
            assert trained is not None  # Settings refuses "all"
            check_cut(model, trained)

    def job(
        self, model: nn.Module, data: Data, scanned: Scanned, prepared: dict[str, Any], trained: Sequence[str] | None
    ) -> Job:
        read, config = self.settings.data, self.settings.train
        if read.cache == "features":
            assert trained is not None
            return FeatureCache(model, trained, data, prepared, config, read.views, read.workers, self.metric).job()
        return job_on_images(data, prepared, config, read.workers, read.cache, self.metric)

    def loader(self, model: nn.Module, data: Data, samples: Sequence[Any]) -> DataLoader:
        return self._loader(model, samples)

    def _loader(self, model: nn.Module, samples: Sequence[Any]) -> DataLoader:
        return eval_loader(samples, *self._reading(model), process=self.process)

    def _reading(self, model: nn.Module) -> tuple[dict[str, Any], int, int | None]:
        """Return preprocessing, batch size and workers of evaluation."""
        settings = self.settings
        return preprocessing(model, settings.data), 2 * settings.train.batch_size, settings.data.workers

    def validation(self, model: nn.Module, data: Data) -> Batches:
        return self.scored(model, data, data.val)

    def scored(self, model: nn.Module, data: Data, samples: Sequence[Any]) -> Batches:
        """Return features of samples after the trunk of a run that cached them, if they can be kept, else images."""
        entries = None
        if self.settings.data.cache == "features":
            changed = changed_layers(self.settings, model)
            entries = if_kept(lambda: entries_of(model, changed, samples, *self._reading(model), self.process))
        return entries or self.loader(model, data, samples)

    def check_scored(self, data: Data, role: str, samples: Sequence[Any]) -> None:
        warn_of_absent(role, samples, data.classes)

    def elsewhere(self, model: nn.Module, path: str) -> tuple[str, DataLoader]:
        classes = label_names(model)
        which, samples = load_folder(path, classes, self.settings.data)
        warn_of_absent(path if which == "all" else f"{which} of {path}", samples, classes)
        return which, self._loader(model, samples)

    def predict(
        self, model: nn.Module, files: Sequence[Path], out: Path | None = None, top: int = 5,
        trust: Trust | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        return predict(model, files, top, process=self.process, trust=trust)

    def line(self, prediction: dict[str, Any], top: int) -> str:
        classes = ", ".join(f"{one_line(each['name'])} {each['probability']:.1%}" for each in prediction["classes"])
        scores = {"correct": "right with", "familiarity": "familiarity"}  # those of `vimoe trust`
        trust = "".join(f"; {said} {prediction[name]:.1%}" for name, said in scores.items() if name in prediction)
        return f"{one_line(prediction['file'])}: {classes}{trust}"

    def examples(self, model: nn.Module, data: Data, evidence: Evidence) -> Mapping[str, Figure]:
        """Return the images that gave each expert the largest gates, captioned by their classes, a row an expert."""
        metric = metric_of(model, self.metric)

        def captioned(place: int) -> tuple[Image.Image, str]:
            source, label = data.val[place]
            image = open_image(source).copy()
            image.thumbnail((EXAMPLE_SIDE, EXAMPLE_SIDE))
            number = int(metric.classes_of(torch.as_tensor(label)[None]))
            return image, "no class" if number < 0 else evidence.classes[number]

        sheets = {}
        for layer in evidence.layers:
            order = [expert for expert in layer.expert_order if layer.examples[expert]]
            rows = {f"expert {expert}": [captioned(place) for place in layer.examples[expert]] for expert in order}
            sheets[layer.name] = contact_sheet(rows)
        return sheets
