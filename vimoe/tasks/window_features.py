"""Features of the windows of scenes, on which a segmenter is scored without running its frozen trunk again.

Axes: n windows of a scene, T tokens of a window, D channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vimoe.data.images import image_size
from vimoe.data.loaders import share
from vimoe.data.scene_loaders import eval_loader, eval_transform
from vimoe.data.scenes import Scene, Scenes
from vimoe.errors import ConfigError
from vimoe.models.frozen_trunk import Cut, Entry
from vimoe.process import Process
from vimoe.tasks.feature_files import FeatureFile, FeatureFiles
from vimoe.tasks.windows import Windows

AT_ONCE = 8  # windows of a batch, as in `vimoe.tasks.windows.sliding`


class WindowEntries:
    """Batches (entry after the trunk, masks) of scenes in order, in the place of whole images.

    An entry has all windows of its scenes, scene by scene. Its image, which is black, has the size of a scene.

    Attributes:
        facts: what a result has to say of its source (`vimoe.tasks.base.facts_of`).

    Args:
        file: file of the windows' features.
        scenes: the scenes.
        all_scenes: data set that they are of, for its legend.
        grids: windows of each scene.
        cut: cut that the features belong to.
        process: this one of the processes that share the scenes.
    """

    def __init__(
        self, file: Path, scenes: Sequence[Scene], all_scenes: Scenes, grids: Sequence[Windows], cut: Cut,
        process: Process | None = None,
    ) -> None:  # fmt: skip
        self.features = np.load(file, mmap_mode="r", allow_pickle=False)
        self.scenes, self.legend, self.grids, self.cut = scenes, all_scenes.legend, grids, cut
        self.first = np.cumsum([0, *(len(grid.corners) for grid in grids)])
        of_one_size = len({grid.image for grid in grids}) == 1
        batch_size = max(1, AT_ONCE // len(grids[0].corners)) if of_one_size else 1
        self.batch_sampler = share(len(scenes), batch_size, process)
        self.facts = {"features": {"before": cut.before}}

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[tuple[Entry, Tensor]]:
        for places in self.batch_sampler:
            rows = np.concatenate([self.features[self.first[i] : self.first[i + 1]] for i in places])
            masks = [torch.from_numpy(self.legend.read(self.scenes[i][1])).long() for i in places]
            size = (self.cut.size[0], *self.grids[places[0]].image)
            yield Entry(torch.from_numpy(rows), replace(self.cut, size=size)), torch.stack(masks)


@torch.no_grad()
def infer_windows(model: nn.Module, black: Tensor) -> Tensor:
    """Return scores (B, classes, H, W) of scenes whose windows' features the model runs on from.

    Args:
        model: segmenter inside `Entry.resumed` of `WindowEntries`.
        black: (1, 3, H, W), the image that `Entry.resumed` gave.
    """
    crop: Any = model.crop
    grid = Windows.of(black.shape[-2:], crop)
    logits = model(black[..., : grid.size[0], : grid.size[1]]).float()
    return grid.mean(logits.unflatten(0, (-1, len(grid.corners))).unbind(1))


def window_entries(
    files: FeatureFiles, scenes: Sequence[Scene], all_scenes: Scenes, crop: tuple[int, int], workers: int | None
) -> tuple[FeatureFile, partial[WindowEntries]]:
    """Return the file of scenes' windows, and a function that gives `WindowEntries` for a process once it is there.

    Args:
        files: trunk that the features are of.
        scenes: scenes to score on.
        all_scenes: data set that they are of.
        crop: (height, width) of a window.
        workers: number of processes that decode images, as `DataConfig.workers`.

    Raises:
        ConfigError: if a scene is smaller than a window, because its windows have fewer tokens.
    """
    sizes = [image_size(image) for image, _ in scenes]
    if small := next((size for size in sizes if size[0] < crop[0] or size[1] < crop[1]), None):
        raise ConfigError(
            f"data.cache='features': an image of {small[1]}x{small[0]} to score on, smaller than a window of "
            f"{crop[1]}x{crop[0]}: expected none; lower model.img_size, or use another data.cache"
        )
    grids = [Windows.of(size, crop) for size in sizes]
    transform = eval_transform(files.prepared["mean"], files.prepared["std"])

    def batches() -> _Batches:
        return _Batches(eval_loader(scenes, all_scenes.legend, transform, 1, workers), grids)

    # every window is a row of the file, and has the key of its image
    sources = [image for (image, _), grid in zip(scenes, grids, strict=True) for _ in grid.corners]
    file = files.file(sources, f"{len(scenes)} scenes", batches, draws=f" windows of {crop}")
    return file, partial(WindowEntries, file.path, scenes, all_scenes, grids, files.cut)


class _Batches:
    """Batches (windows, mask of the scene) of scenes one by one."""

    def __init__(self, loader: DataLoader, grids: Sequence[Windows]) -> None:
        self.loader, self.grids = loader, grids

    def __len__(self) -> int:
        return sum(-(-len(grid.corners) // AT_ONCE) for grid in self.grids)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for (scene, mask), grid in zip(self.loader, self.grids, strict=True):
            height, width = grid.size
            for first in range(0, len(grid.corners), AT_ONCE):
                some = grid.corners[first : first + AT_ONCE]
                yield torch.cat([scene[..., y : y + height, x : x + width] for y, x in some]), mask
