"""What an analysis costs: its time over that of a plain evaluation of the same images, and the memory that it adds.

    python benchmarks/analysis_cost.py RUN FOLDER --images 10000

RUN is a run folder with MoE layers, FOLDER an image folder with its classes. Images are read from disk in both. The
interventions, whose cost is chosen by --overrule, are left out: this is the cost of seeing the routing. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

from vimoe.analysis import analyze
from vimoe.data import load_folder
from vimoe.evaluate import evaluate, label_names
from vimoe.folder import load
from vimoe.loading import eval_loader, preprocessing
from vimoe.runs import open_run, versions


def timed(what: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


def peak() -> float:
    """The largest memory that this process had, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("folder")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load(open_run(args.run).model)
    _, samples = load_folder(args.folder, label_names(model))
    if len(samples) < args.images:
        raise SystemExit(f"{args.folder} has {len(samples)} images: expected {args.images}")
    step = len(samples) // args.images  # of all classes

    def loader(images: int) -> DataLoader:
        return eval_loader(samples[::step][:images], preprocessing(model), 128, 0)

    evaluate(model, loader(1000))
    peaks = {"after evaluating 1000": peak()}
    for images in (1000, args.images):
        analyze(model, loader(images), overrule=0)
        peaks[f"after analysing {images}"] = peak()
    ratios, plain = [], []
    for _ in range(args.rounds):
        plain.append(timed(functools.partial(evaluate, model, loader(args.images))))
        ratios.append(timed(functools.partial(analyze, model, loader(args.images), overrule=0)) / plain[-1])
        print(f"evaluation {plain[-1]:.1f} s, analysis {ratios[-1]:.3f} times that", flush=True)
    print(json.dumps({
        "images": args.images, "ratio": statistics.median(ratios), "ratios": ratios, "evaluation_seconds": plain,
        "peak_mb": peaks, "threads": args.threads, "versions": versions(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
