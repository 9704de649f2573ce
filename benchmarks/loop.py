"""Time of a training step of `vimoe train` beside a plain loop of timm's parts: same model, batches and precision.

    python benchmarks/loop.py                       # all cases, in six processes each
    python benchmarks/loop.py --only "*features*"   # some of them

"Plain" is what one writes by hand: timm's loader, optimiser, schedule and loss, autocast, clipped gradients. "Plain,
fused" has torch's fused AdamW, as vimoe has it. On cached features the plain loop indexes the memory map and runs the
last blocks. It knows no routing: with MoE layers ours has records, balance loss and health on top. In a round each
loop trains a fresh copy of the model for an epoch, and its steps are timed, with loading. Seconds are of processor
time: there is one thread and no worker process, so nothing waits, and other jobs disturb less than on the clock. A
process gives the median over rounds of the ratio within a round. Shown are the mean over processes and Student's 95%
interval.
"""

from __future__ import annotations

import argparse
import copy
import csv
import fnmatch
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm
import timm.data
import torch
from PIL import Image
from speed import paired
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torch.utils.data import Dataset

import vimoe
from vimoe.bench.result import machine
from vimoe.bench.timing import compare
from vimoe.config.train import TrainConfig
from vimoe.data.classification import load_folder
from vimoe.data.labelled_images import Data
from vimoe.data.loaders import preprocessing
from vimoe.models.precision import resolve
from vimoe.tasks.cached_features import FeatureCache
from vimoe.tasks.classification_job import job_on_images
from vimoe.training.job import Job
from vimoe.training.loop import train
from vimoe.training.parameter_groups import freeze_all_but, trained_modules

CLASSES, PIXELS = 4, 256
TINY, SMALL = ("vit_tiny_patch16_224", 96, 32), ("vit_small_patch14_dinov2", 112, 16)
Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """What is trained: a ViT, (name, pixels, batch size), with MoE layers or without, and where its inputs come from.

    From "features" the last two blocks' FFNs are trained, else all.
    """

    vit: tuple[str, int, int]
    source: str
    moe: bool = False


CASES = {
    "ViT-Ti, 96 px, batches of 32, from files": Case(TINY, "files"),
    "ViT-Ti, 96 px, batches of 32, from memory": Case(TINY, "memory"),
    "ViT-S/14, 112 px, batches of 16, from memory": Case(SMALL, "memory"),
    "ViT-S/14, 112 px, batches of 16, on features": Case(SMALL, "features"),
    "ViMoE-S/14, 112 px, batches of 16, from memory": Case(SMALL, "memory", moe=True),
    "ViMoE-S/14, 112 px, batches of 16, on features": Case(SMALL, "features", moe=True),
}


def write_images(folder: Path, count: int) -> None:
    """Write so many JPEG files of smooth noise into a folder of class folders."""
    draw = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(draw.integers(256, size=(16, 16, 3), dtype=np.uint8))
        place = folder / str(i % CLASSES)
        place.mkdir(exist_ok=True)
        coarse.resize((PIXELS, PIXELS)).save(place / f"{i}.jpg")


class InMemory(Dataset):
    """Images in memory, with the transform that timm's loader sets."""

    def __init__(self, data: Data) -> None:
        self.data, self.transform = data, nn.Identity()

    def __len__(self) -> int:
        return len(self.data.train)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.data.train[index]
        return self.transform(image), label


def setup(case: Case, steps: int, precision: str, folder: Path) -> dict[str, Callable[[], float]]:
    """Return the loops by name; each returns the seconds of an epoch's steps.

    Args:
        case: what is trained.
        steps: number of steps of an epoch.
        precision: as `TrainConfig.precision`.
        folder: empty folder for images and runs.
    """
    name, pixels, batch = case.vit
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=pixels, num_classes=CLASSES)
    if case.moe:
        vimoe.upcycle(model, vimoe.MoEConfig(layers="last:2", num_experts=8))
    (folder / "images").mkdir()
    write_images(folder / "images", steps * batch)
    samples = tuple(load_folder(folder / "images", [str(i) for i in range(CLASSES)])[1])
    if case.source == "memory":
        samples = tuple((Image.open(source).convert("RGB"), label) for source, label in samples)
    data = Data(tuple(map(str, range(CLASSES))), samples, samples[:batch], ())
    config = TrainConfig(
        epochs=1, batch_size=batch, warmup_epochs=0, precision=precision,
        train_only="last:2" if case.source == "features" else "all", tensorboard=False,
    )  # fmt: skip
    config, prepared, trained = resolve(config, model), preprocessing(model), trained_modules(model, config.trained)
    if trained is None:
        job, features = job_on_images(data, prepared, config, workers=0), None
    else:
        freeze_all_but(model, trained)
        cache = FeatureCache(model, trained, data, prepared, config, views=1, workers=0)
        job, features = cache.job(), cache.train[0].path

    def batches() -> Batches:
        return (
            on_features(features, data, batch)
            if features
            else timms_loader(folder / "images", data, case, config, prepared)
        )

    loops = {"vimoe train": lambda: ours(copy.deepcopy(model), job, config, trained)}
    for words, fused in (("plain", None), ("plain, fused", True)):
        loops[words] = lambda fused=fused: plain(copy.deepcopy(model), batches(), config, steps, fused, bool(features))
    return loops


def ours(model: nn.Module, job: Job, config: TrainConfig, trained: list[str] | None) -> float:
    """Return the seconds of the steps of an epoch of `vimoe train`, as it measures them."""
    with tempfile.TemporaryDirectory() as out:
        with mock.patch.object(time, "perf_counter", time.process_time):
            train(model, job, config, Path(out), trained)
        with (Path(out) / "metrics.csv").open(encoding="utf-8") as file:
            rate = float(next(csv.DictReader(file))["images_per_second"])
    return len(job.names) / rate


def plain(model: nn.Module, batches: Batches, config: TrainConfig, steps: int, fused: bool | None, cut: bool) -> float:
    """Return the seconds of the steps of an epoch of a plain loop.

    Args:
        model: model to train; frozen parameters stay as they are.
        batches: batches of an epoch; an iteration is a part of what is measured.
        config: rates, precision and clipping.
        steps: number of steps of the epoch.
        fused: as in torch's AdamW.
        cut: True for batches of features before the first block that is trained.
    """
    optimizer = create_optimizer_v2(model, "adamw", config.lr, config.weight_decay, fused=fused)
    schedule = CosineLRScheduler(optimizer, t_initial=steps, lr_min=config.min_lr, t_in_epochs=False)
    criterion = LabelSmoothingCrossEntropy(0.1)
    forward = (lambda x: last_blocks(model, x)) if cut else model
    model.train()
    start = time.process_time()
    for update, (inputs, labels) in enumerate(batches):
        with torch.autocast("cpu", torch.bfloat16) if config.precision == "bf16" else nullcontext():
            outputs = forward(inputs)
        loss = criterion(outputs.float(), labels)
        if not loss.isfinite():
            raise SystemExit("the loss is not finite")
        loss.backward()
        dispatch_clip_grad(model.parameters(), config.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step_update(update + 1)
    return time.process_time() - start


def last_blocks(model: nn.Module, features: Tensor) -> Tensor:
    """Return the logits from the inputs of the last two blocks."""
    for block in model.blocks[-2:]:
        features = block(features)
    return model.forward_head(model.norm(features))


def on_features(file: Path, data: Data, batch: int) -> Batches:
    """Yield batches of an epoch on cached features."""
    features, labels = np.load(file, mmap_mode="r"), torch.tensor([label for _, label in data.train])
    for chosen in torch.randperm(len(labels)).split(batch):
        yield torch.from_numpy(features[chosen.numpy()]).float(), labels[chosen]


def timms_loader(folder: Path, data: Data, case: Case, config: TrainConfig, prepared: dict[str, Any]) -> Batches:
    """Return timm's loader, with the transforms of a training that vimoe has by default."""
    dataset = InMemory(data) if case.source == "memory" else timm.data.ImageDataset(str(folder))
    return timm.data.create_loader(
        dataset, batch_size=case.vit[2], is_training=True, use_prefetcher=False, num_workers=0,
        persistent_workers=False, scale=(config.min_crop, 1.0), ratio=(3 / 4, 4 / 3), hflip=config.hflip,
        color_jitter=0.0, **{key: prepared[key] for key in ("input_size", "interpolation", "mean", "std")},
    )  # fmt: skip


def measure(case: Case, rounds: int, steps: int, precision: str) -> list[dict]:
    """Return the timings of a case's loops, each of one step."""
    with tempfile.TemporaryDirectory() as folder:
        loops = setup(case, steps, precision, Path(folder))
        order, seconds = np.random.default_rng(0), {name: list[float]() for name in loops}
        for _ in range(rounds + 1):
            for name in order.permutation(list(loops)):
                seconds[name].append(loops[name]() / steps)
    return [asdict(each) for each in compare({k: np.array(v[1:]) for k, v in seconds.items()}, ("plain",), {})]


def in_processes(name: str, args: argparse.Namespace) -> Iterator[dict]:
    """Yield the measurement of a case of one new process after the other."""
    command = [
        sys.executable, __file__, "--measure", name, "--rounds", str(args.rounds), "--steps", str(args.steps),
        "--precision", args.precision,
    ]  # fmt: skip
    for _ in range(args.processes):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        yield {"timings": {"step": json.loads(done.stdout.splitlines()[-1])}}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", help="names of cases, with * for anything")
    parser.add_argument("--precision", default="auto", help="as train.precision")
    for name, number in {"processes": 6, "rounds": 6, "steps": 6}.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--measure", help="measure one case in this process, and print it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure:
        logging.disable(logging.WARNING)
        print(json.dumps(measure(CASES[args.measure], args.rounds, args.steps, args.precision)))
        return
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(f"precision {args.precision}, {args.processes} processes of {args.rounds} rounds of {args.steps} steps")
    print("| case | plain, ms | vimoe train over plain | over plain, fused |\n|---|---|---|---|", flush=True)
    for name in fnmatch.filter(CASES, args.only):
        runs = list(in_processes(name, args))
        (step,) = (
            float(np.median([t["seconds"] for run in runs for t in run["timings"]["step"] if t["name"] == "plain"])),
        )
        over = [paired(runs, "step", "vimoe train", floor) for floor in ("plain", "plain, fused")]
        cells = [f"{each['ratio']:.3f} [{each['low']:.3f}, {each['high']:.3f}]" for each in over]
        print(f"| {name} | {1e3 * step:.0f} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
