"""Short trainings of a tiny model on pictures, and what they write."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.pictures import roles
from helpers.tiny import config, upcycle, vit
from torch import nn

from vimoe.config.data import DataConfig
from vimoe.config.train import TrainConfig
from vimoe.data.classification import load_data
from vimoe.data.labelled_images import Data
from vimoe.data.loaders import preprocessing
from vimoe.errors import FolderError
from vimoe.tasks.classification_job import job_on_images
from vimoe.training.loop import train

QUICK = TrainConfig(epochs=2, batch_size=8, lr=3e-3, warmup_epochs=0.5, min_crop=1, tensorboard=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return load_data(DataConfig(path=str(roles(tmp_path_factory.mktemp("pictures")))))


def model(**settings: object) -> nn.Module:
    torch.manual_seed(0)
    return upcycle(vit(num_classes=3, img_size=16, patch_size=8), config(**settings))


def run(data: Data, out: Path, network: nn.Module | None = None, **changes: object) -> tuple[nn.Module, dict]:
    """A network comes back on the CPU, where tests have what they compare it with."""
    network = model() if network is None else network
    out.mkdir(exist_ok=True)
    settings = replace(QUICK, **changes)
    summary = train(network, job_on_images(data, preprocessing(network), settings), settings, out)
    return network.cpu(), summary


def resumed_apart(photos: Path, folder: Path) -> str:
    """What a process of a job says whose run folder is one of its own."""
    try:
        run(load_data(DataConfig(path=str(photos))), folder / str(dist.get_rank()))
    except FolderError as error:
        return str(error)
    return "trained"


def run_cached(data: Data, out: Path, cache: str, **changes: object) -> tuple[nn.Module, dict]:
    network = model()
    out.mkdir(exist_ok=True)
    settings = replace(QUICK, **changes)
    task = job_on_images(data, preprocessing(network), settings, workers=0, cache=cache)
    summary = train(network, task, settings, out)
    return network.cpu(), summary


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def weights(network: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])
