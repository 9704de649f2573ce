"""Analyses of images that any number of processes share; each process of a job calls these functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from helpers.segmenters import segmenter
from helpers.tiny import config, images, perturb_experts, upcycle, vit
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import vimoe
from vimoe.analysis import decisions, interventions
from vimoe.config.data import DataConfig
from vimoe.config.masks import IGNORE
from vimoe.data.loaders import share
from vimoe.errors import VimoeError
from vimoe.metrics.calibration import fit_temperature
from vimoe.process import Alone, Process
from vimoe.tasks.segmentation_predictions import predict_scenes

IMAGES, BATCH = 41, 9  # two processes have 21 and 20 of them, three of the last batch of 5 have 2, 2 and 1
TOKEN = {"routing": "token", "top_k": 2}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # layers, arguments, limits
    "images": ({"routing": "image"}, {}, {}),
    "tokens": (TOKEN, {"sequences": [f"video {i // 6}" for i in range(IMAGES)], "overrule": 20}, {}),
    "a sample": (TOKEN, {"overrule": 9, "seed": 3}, {"KEPT_IMAGES": 15, "_COMPARED": 4}),
    "read again": ({"routing": "image", "top_k": 2}, {"overrule": 3}, {"KEPT_BYTES": 0}),
    "without interventions": ({"routing": "image"}, {"overrule": 0}, {}),
}


def process() -> Process:
    return Process() if dist.is_initialized() else Alone()


def shared(x: Tensor, labels: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(x, labels), batch_sampler=share(len(x), BATCH, process()))


def found(case: str) -> dict[str, Any]:
    """The evidence of a case."""
    torch.manual_seed(0)
    layers, arguments, limits = CASES[case]
    model = perturb_experts(upcycle(vit(depth=3), config(**layers)))
    loader = shared(images(model, IMAGES), torch.arange(IMAGES) % 5)
    homes = {"KEPT_BYTES": interventions}
    patches = [patch.object(homes.get(name, decisions), name, value) for name, value in limits.items()]
    for each in patches:
        each.start()
    try:
        return vimoe.analyze(model, loader, draws=6, process=process(), **arguments).to_dict()
    finally:
        for each in patches:
            each.stop()


def of_scenes() -> dict[str, Any]:
    """The evidence of masks, in which images have other numbers of void pixels."""
    model = perturb_experts(upcycle(segmenter(depth=2), config(**TOKEN)))
    random = torch.Generator().manual_seed(0)
    masks = torch.randint(3, (IMAGES, *model.crop), generator=random)
    masks[::3, :9] = IGNORE
    x = torch.randn(IMAGES, 3, *model.crop, generator=random)
    return vimoe.analyze(model, shared(x, masks), draws=3, metric="segmentation", process=process()).to_dict()


def everything() -> dict[str, dict[str, Any]]:
    return json.loads(json.dumps({**{case: found(case) for case in CASES}, "scenes": of_scenes()}))


class Batches(list):
    """Batches, and the places of their images."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]], places: list[range]) -> None:
        super().__init__(batches)
        self.batch_sampler = places


def mistakes() -> list[str]:
    """What is said of loaders that cannot be shared so: the whole, one image, and images of two sizes."""
    torch.manual_seed(0)
    model, rank = upcycle(vit(dynamic_img_size=True), config()), process().rank
    x, labels = images(model, 2), torch.arange(2)
    larger = torch.randn(2, 3, 64, 64)
    loaders = (
        [(x, labels)],
        Batches([] if rank else [(x[:1], labels[:1])], share(1, BATCH, process())),
        Batches([(larger if rank else x, labels)], share(4, BATCH, process())),
    )
    said = []
    for loader in loaders:
        try:
            vimoe.analyze(model, loader, process=process())
        except VimoeError as error:
            said.append(str(error))
    return said


def temperature(logits: Tensor, labels: Tensor, parts: list[slice]) -> float:
    mine = parts[process().rank]
    return fit_temperature(logits[mine], labels[mine], process())


def masks(files: list[Path], out: Path) -> list[dict[str, Any]]:
    """Predictions of masks, which this process or another one writes."""
    return predict_scenes(upcycle(segmenter(depth=2), config()), files, out, DataConfig(task="segmentation"), process())
