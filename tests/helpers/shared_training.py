"""Trainings that any number of processes share; each process of a job calls `main`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from helpers.parallel_work import full
from helpers.pictures import roles
from helpers.scenery import scenes
from helpers.segmenters import segmenter
from helpers.tiny import config, upcycle, vit
from helpers.trainings import QUICK
from torch import nn

from vimoe.config.data import DataConfig
from vimoe.config.parallel import ParallelConfig
from vimoe.data.classification import load_data
from vimoe.data.loaders import preprocessing
from vimoe.data.scenes import load_scenes
from vimoe.moe.layer import moe_layers
from vimoe.process import Process
from vimoe.tasks.classification_job import job_on_images
from vimoe.tasks.segmentation_job import job_on_scenes
from vimoe.training.job import Job
from vimoe.training.loop import train

IMAGE, TOKEN = {"routing": "image"}, {"routing": "token", "top_k": 2}
CASES: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {  # settings of the layers, None for a segmenter
    "dense": ({"layers": "none"}, {}),
    "image": (IMAGE, {"balance_loss": 1.0, "ema_decay": 0.5}),
    "token": (TOKEN, {"balance_loss": 1.0, "importance_loss": 1.0, "variance_loss": 1.0, "orthogonal_loss": 0.1}),
    "rows": (TOKEN, {"z_loss": 0.1, "entropy_loss": 0.1, "mutual_loss": 0.1, "ema_decay": 0.5, "distill_loss": 1.0}),
    "bias": ({**IMAGE, "bias_update_rate": 0.1}, {"accumulation": 2, "balance_loss": 0.0}),
    "mixed": (
        IMAGE,
        {"mixup": 0.8, "cutmix": 1.0, "accumulation": 3, "clip_grad": 0.1, "min_crop": 0.5, "ema_decay": 0.5},
    ),
    "frozen": ({**IMAGE, "layers": [1]}, {"train_only": "moe", "router_frozen": 0.4, "layer_decay": 0.5}),
    "stopped": (
        {**IMAGE, "layers": [1], "bias_update_rate": 0.1},
        {"router_freeze_epochs": 1, "locality_loss": 0.01},
    ),
    "scenes": (None, {"dice_loss": 1.0, "class_weights": "median_frequency", "label_smoothing": 0.1}),
    "share": ({**IMAGE, "balance_over": "process"}, {"balance_loss": 1.0}),  # which is another loss
}


def images_of(folder: Path) -> None:
    """Writes the images of all trainings, in which the last share of validation is smaller than the others."""
    roles(folder / "pictures", val=3)
    scenes(folder / "scenes", train=12, val=3)


def made(folder: Path, case: str, double: bool = False, **changes: Any) -> tuple[nn.Module, Job, Any]:
    """The model, job and settings of a case; `double` is in float64."""
    network, job, settings = in_single(folder, case, **changes)
    return (network.double(), in_double(job), settings) if double else (network, job, settings)


def in_double(job: Job) -> Job:
    def prepare(*batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(each.double() if each.is_floating_point() else each for each in job.prepare(*batch))

    return replace(job, prepare=prepare)


def in_single(folder: Path, case: str, **changes: Any) -> tuple[nn.Module, Job, Any]:
    torch.manual_seed(0)
    layers, settings = CASES[case]
    if "parallel" in changes:
        changes["parallel"] = ParallelConfig(**changes["parallel"])
    settings = replace(QUICK, precision="no", **{**settings, **changes})
    if layers is None:
        found = load_scenes(DataConfig(path=str(folder / "scenes"), task="segmentation"))
        network = upcycle(segmenter(depth=2), config(**TOKEN))
        prepared, reading = preprocessing(network), DataConfig(task="segmentation", path="", workers=0)
        pixels = [9, 9, 1]
        return network, job_on_scenes(found, prepared, network.crop, settings, reading, pixels), settings
    network = upcycle(vit(num_classes=3, img_size=16, patch_size=8), config(**layers))
    data = load_data(DataConfig(path=str(folder / "pictures")))
    return network, job_on_images(data, preprocessing(network), settings), settings


def trained(folder: Path, out: Path, case: str, **changes: Any) -> dict[str, Any]:
    """Trains; all that a training leaves, by name."""
    network, job, settings = made(folder, case, **changes)
    out.mkdir(exist_ok=True)
    gradients: list[torch.Tensor] = []
    last: list[torch.Tensor] = []
    step = torch.optim.AdamW.step

    def see(self: Any, *args: Any, **kwargs: Any) -> Any:
        held = [full(p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            gradients.append(torch.cat([each.flatten() for each in held]))
            gradients.append(torch.stack([each.norm() for each in held]).sort().values)  # in no order of groups
        done = step(self, *args, **kwargs)
        last[:] = [full(p).flatten().clone() for group in self.param_groups for p in group["params"]]
        return done

    torch.optim.AdamW.step = see
    try:
        summary = train(network, job, settings, out)
    finally:
        torch.optim.AdamW.step = step
    load = [layer.router.choice_bias for layer in moe_layers(network).values()]
    return {
        "weights": network.state_dict(), "gradient": gradients[0], "norms": gradients[1], "val": summary["val"],
        "bias": load, "alarms": summary["alarms"], "last": torch.cat(last),
    }  # fmt: skip


def main() -> None:
    folder, out, count, *cases = sys.argv[1:]
    process = Process()
    for case in cases:
        found = trained(Path(folder), Path(out) / case, case, **eval(count))
        writer = 0 if "parallel" in eval(count) else process.count - 1  # the first writes the logs, and has the whole
        if process.rank == writer:
            torch.save(found, Path(out) / f"{case}.pt")


if __name__ == "__main__":
    main()
