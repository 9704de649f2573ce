"""Images a second of the input pipeline alone, beside timm's loader, and how long a training step waits for it.

    python benchmarks/data_loading.py FOLDER --images 10000 --workers 0 2

FOLDER holds class folders. All pipelines read the same files, augment alike (random crop and flip, timm's transforms)
and give normalised batches. "First" is an epoch after the page cache is warm, with what a first start costs on top:
scanning and decoding; "later" is the median of the epochs after it. Rounds are interleaved. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import create_loader

from vimoe.config.train import TrainConfig
from vimoe.data.classification import load_folder
from vimoe.data.image_check import check_images
from vimoe.data.labelled_images import Sample
from vimoe.data.loaders import decoded_for_training, train_loader
from vimoe.run_folder import versions

CONFIG = TrainConfig(batch_size=64)
Pipeline = Callable[[], Iterable[Any]]


class TimmsDataset(torch.utils.data.Dataset):
    """Dataset for timm's loader: images opened by Pillow, with a transform that the loader sets."""

    def __init__(self, folder: str, images: list[Sample]) -> None:
        self.inner = timm.data.ImageDataset(folder)
        known = {Path(folder, name): i for i, name in enumerate(self.inner.filenames())}
        self.places = [known[file] for file, _ in images]
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        self.inner.transform = self.transform
        return self.inner[self.places[index]]


def timms_loader(folder: str, samples: list[Sample], prepared: dict[str, Any], workers: int) -> Any:
    """Return timm's loader with the augmentation of CONFIG."""
    return create_loader(
        TimmsDataset(folder, samples), prepared["input_size"], CONFIG.batch_size, is_training=True,
        scale=(CONFIG.min_crop, 1.0), ratio=(3 / 4, 4 / 3), hflip=CONFIG.hflip, color_jitter=0.0, num_workers=workers,
        interpolation=prepared["interpolation"], mean=prepared["mean"], std=prepared["std"], use_prefetcher=False,
        persistent_workers=workers > 0,
    )  # fmt: skip


def rate(loader: Iterable[Any], images: int) -> float:
    """Return images per second in one epoch."""
    start = time.perf_counter()
    for _ in loader:
        pass
    return images / (time.perf_counter() - start)


def waiting(loader: Iterable[Any], model: torch.nn.Module, steps: int) -> dict[str, float]:
    """Return images per second of a training in bfloat16, and the share of its time that it waits for images."""
    optimizer = torch.optim.AdamW(model.parameters())
    waited = 0.0
    batches = iter(loader)
    next(batches)
    start = time.perf_counter()
    for _ in range(steps):
        before = time.perf_counter()
        images, labels = next(batches)
        waited += time.perf_counter() - before
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    total = time.perf_counter() - start
    return {"images_per_second": steps * CONFIG.batch_size / total, "waiting": waited / total}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = load_folder(args.folder, sorted(p.name for p in Path(args.folder).iterdir()))[1]
    samples = list(found[:: max(1, len(found) // args.images)][: args.images])
    images = len(samples) // CONFIG.batch_size * CONFIG.batch_size
    colour = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    prepared: dict[str, Any] = {"input_size": (3, args.size, args.size), **colour}
    for file, _ in samples:
        file.read_bytes()  # so that no pipeline pays for the disk
    result: dict[str, Any] = {"images": len(samples), "threads": args.threads, "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        start = time.perf_counter()
        check_images([file for file, _ in samples], Path(args.folder))
        result["scan_seconds"] = time.perf_counter() - start
        kept = {}
        for where in ("memory", "disk"):
            start = time.perf_counter()
            kept[where] = decoded_for_training(samples, prepared, CONFIG, where)
            result[f"decoding_to_{where}_seconds"] = time.perf_counter() - start
        start = time.perf_counter()
        decoded_for_training(samples, prepared, CONFIG, "disk")
        result["disk_found_again_seconds"] = time.perf_counter() - start
        print(result, flush=True)
        for workers in args.workers:
            loaders = {
                "timm": timms_loader(args.folder, samples, prepared, workers),
                "files": train_loader(samples, prepared, CONFIG, workers),
                "memory": train_loader(kept["memory"], prepared, CONFIG, workers),
                "disk": train_loader(kept["disk"], prepared, CONFIG, workers),
            }
            rates: dict[str, list[float]] = {name: [] for name in loaders}
            for _ in range(args.rounds + 1):
                for name, loader in loaders.items():
                    rates[name].append(rate(loader, images))
            ratios = [ours / theirs for ours, theirs in zip(rates["memory"], rates["timm"], strict=True)]
            result[f"workers {workers}"] = {
                "first": {name: values[0] for name, values in rates.items()},
                "later": {name: statistics.median(values[1:]) for name, values in rates.items()},
                "memory over timm, by round": ratios[1:],
            }
            print(workers, result[f"workers {workers}"], flush=True)
        model = timm.create_model("vit_tiny_patch16_224", img_size=args.size, patch_size=8, depth=6, num_classes=100)
        for name, source in (("files", samples), ("memory", kept["memory"])):
            result[f"training from {name}"] = waiting(
                train_loader(source, prepared, CONFIG, 0), model, steps=min(30, len(samples) // 64 - 1)
            )
    print(json.dumps({**result, "versions": versions()}))


if __name__ == "__main__":
    main()
