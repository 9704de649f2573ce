"""Cost of an epoch on cached features of a frozen trunk beside one on images, and when filling the cache pays.

    python benchmarks/feature_cache.py FOLDER --images 256

FOLDER holds class folders. Three trainings of one upcycled model with random weights (which cost what others do) take
an epoch each in every round, in turn: "features" (`data.cache: features`), "frozen" (the same layers are trained, and
the trunk runs without gradient) and "full" (all is trained). The last two have their images decoded in memory, so that
no decoding counts for the features. An epoch is what the training loop measures of its steps, batches and augmentation
included; "validation" is the scoring after it. "Processor" is the processor time of a training of one epoch, with
validation, checkpoint and all that it begins and ends with: where other jobs run, it disturbs less than the clock.
Ratios are taken within a round, and given with their smallest and largest. "Rounding" is the change of the logits of a
batch when its features are rounded, over the logits (both norms). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import vimoe
from vimoe.config.moe import MoEConfig
from vimoe.config.train import TrainConfig
from vimoe.data.classification import load_folder
from vimoe.data.labelled_images import Data
from vimoe.data.loaders import preprocessing
from vimoe.models.frozen_trunk import cut_before
from vimoe.run_folder import versions
from vimoe.tasks.cached_features import FeatureCache
from vimoe.tasks.classification_job import job_on_images
from vimoe.training.job import Job
from vimoe.training.loop import train


def processor() -> str:
    """Return the system's name for the processor."""
    info = Path("/proc/cpuinfo")
    named = [
        line.partition(":")[2].strip()
        for line in info.read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return named[0] if info.exists() and named else platform.processor()


def epoch(model: nn.Module, task: Job, config: TrainConfig) -> dict[str, float]:
    """Return seconds of an epoch's steps, of a validation, and of the processor for a training of one epoch."""
    model = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as out:
        trained = [name for name, module in model.named_modules() if isinstance(module, vimoe.MoE)]
        start = time.process_time()
        summary = train(model, task, config, Path(out), trained)
        processor_time = time.process_time() - start
        with (Path(out) / "metrics.csv").open(encoding="utf-8") as file:
            rate = float(next(csv.DictReader(file))["images_per_second"])
    start = time.perf_counter()
    task.evaluate(model)
    return {
        "epoch": summary["train_images"] // config.batch_size * config.batch_size / rate,
        "validation": time.perf_counter() - start,
        "processor": processor_time,
    }


@torch.no_grad()
def rounding(model: nn.Module, trained: Sequence[str], images: Tensor) -> dict[str, float]:
    """Return the relative change of the logits for each 16-bit type."""
    cut = cut_before(model, trained, (images.shape[1], images.shape[2], images.shape[3]))
    features = cut.trunk(model, images)
    logits = cut.rest(model, features)
    types = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    rounded = {name: cut.rest(model, features.to(kind).float()) for name, kind in types.items()}
    return {name: float((each - logits).norm() / logits.norm()) for name, each in rounded.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, smallest and largest of the rounds."""
    return {"median": statistics.median(values), "smallest": min(values), "largest": max(values)}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--img_size", type=int, default=224)
    parser.add_argument("--layers", default="last:2")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--validation", type=int, default=64)
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default="no")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("vimoe").setLevel(logging.ERROR)  # after one epoch routers are what they may be
    classes = tuple(sorted(p.name for p in Path(args.folder).iterdir()))
    found = load_folder(args.folder, classes)[1]
    wanted = args.images + args.validation
    if len(found) < wanted:
        raise SystemExit(f"{args.folder} has {len(found)} images: expected {wanted}")
    samples = found[:: len(found) // wanted][:wanted]
    data = Data(classes, samples[: args.images], samples[args.images :], (), Path(args.folder), split_off=False)
    torch.manual_seed(0)
    model = timm.create_model(args.model, img_size=args.img_size, num_classes=len(classes))
    vimoe.upcycle(model, MoEConfig(layers=args.layers))
    trained = [name for name, module in model.named_modules() if isinstance(module, vimoe.MoE)]
    prepared: dict[str, Any] = preprocessing(model)
    frozen = TrainConfig(epochs=1, warmup_epochs=0, batch_size=args.batch, precision=args.precision, train_only="moe",
                         tensorboard=False)  # fmt: skip
    full = replace(frozen, train_only="all")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        on_images = job_on_images(data, prepared, frozen, 0, "memory")
        start = time.process_time()
        on_features = FeatureCache(
            copy.deepcopy(model), trained, data, prepared, replace(frozen, epochs=args.views), args.views, 0
        ).job()
        filling = time.process_time() - start
        arms: dict[str, Callable[[], dict[str, float]]] = {
            "features": lambda: epoch(model, on_features, frozen),
            "frozen": lambda: epoch(model, on_images, frozen),
            "full": lambda: epoch(model, on_images, full),
        }
        rounds: list[dict[str, dict[str, float]]] = []
        for number in range(args.rounds + 1):
            measured = {name: arm() for name, arm in arms.items()}
            print(number, measured, flush=True)
            rounds.append(measured)
    rounds = rounds[1:]  # the first is to warm up
    ratios = {
        f"features over {other}, {what}": spread([r["features"][what] / r[other][what] for r in rounds])
        for other in ("frozen", "full")
        for what in ("epoch", "validation", "processor")
    }
    seconds = {name: {what: statistics.median(r[name][what] for r in rounds) for what in rounds[0][name]}
               for name in arms}  # fmt: skip
    saved = seconds["frozen"]["processor"] - seconds["features"]["processor"]
    batch = next(iter(on_images.loader))[0]
    facts = on_features.facts["features"]
    result = {
        **vars(args), "folder": Path(args.folder).name, "blocks": len(model.blocks), "seconds": seconds,
        **ratios, "rounding": rounding(model, trained, batch), "filling the cache, processor": filling,
        "cache, bytes": facts["bytes"],
        "bytes an image and view": facts["bytes"] / (args.images * args.views + args.validation),
        "epochs until it has paid": filling / saved,
        "processor": processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0], "versions": versions(),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
