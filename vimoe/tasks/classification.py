"""Naming the class of an image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader

from vimoe.config.settings import Settings
from vimoe.config.train import TrainConfig
from vimoe.data.classification import Data, load_data, load_folder
from vimoe.data.loaders import eval_loader, preprocessing, train_loader
from vimoe.data.scan import Scan, scan
from vimoe.errors import ConfigError
from vimoe.metrics.classification import Score, evaluate
from vimoe.models.create import create
from vimoe.models.interface import label_names
from vimoe.tasks.cached_features import FeatureCache
from vimoe.tasks.image_training import classification
from vimoe.training.task import Task


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

    def check(self, model: nn.Module, converted: Sequence[str] = ()) -> None:
        """Raises VimoeError for an augmentation that timm does not know, or features that cannot be kept.

        Args:
            model: to be trained.
            converted: names of the FFNs that `upcycle` converted.
        """
        train_loader(self.data.train, preprocessing(model, self.settings.data), self.settings.train, workers=0)
        if self.settings.data.cache == "features":
            self._features(model, self.settings.train, converted)

    def task(self, model: nn.Module, config: TrainConfig, converted: Sequence[str] = ()) -> Task:
        """Return what a training has to know; cached features are those before the first of the `converted` FFNs."""
        data = self.settings.data
        if data.cache == "features":
            return self._features(model, config, converted).task()
        return classification(self.data, preprocessing(model, data), config, data.workers, data.cache)

    def _features(self, model: nn.Module, config: TrainConfig, converted: Sequence[str]) -> FeatureCache:
        data = self.settings.data
        return FeatureCache(model, converted, self.data, preprocessing(model, data), config, data.views, data.workers)

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
