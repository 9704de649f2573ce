"""Cost of analysis and pruning: their time over that of a plain evaluation of the same images.

    python benchmarks/analysis_cost.py

The model is a ViT-S/14 at 112 pixels of random weights with two MoE layers (last:2, 8 experts, top 1, image routing),
whose experts differ and whose routers use them all; all in float32, with default settings, and images in memory.
Pruning removes both layers, so that it measures as often as it can, and writes a receipt on as many other images: it is
compared with evaluations of both. Each round evaluates before and after what it times. Writes
results/analysis float32.json and the tables of README.md.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vimoe
from vimoe.analysis.pruning import receipts
from vimoe.bench.result import machine
from vimoe.files import write_json
from vimoe.metrics.base import evaluate
from vimoe.moe.layer import moe_layers

RESULT = Path(__file__).parent / "results" / "analysis float32.json"
GOALS = {"analysis": 4.0, "pruning": 6.0}  # times the evaluation
SIZE, CLASSES = 112, 10


def random_model(name: str) -> nn.Module:
    """Return a ViT with attention, unequal experts, and routers that send images to all of them."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, img_size=SIZE, num_classes=CLASSES)
    vimoe.upcycle(model, vimoe.MoEConfig(layers="last:2", num_experts=8, top_k=1, routing="image"))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(gamma := getattr(module, "gamma", None), nn.Parameter):
                gamma.fill_(1)  # DINOv2's 1e-5 would let nothing through
        for layer in moe_layers(model).values():
            layer.router.weight.normal_(std=0.05)
            for weight in layer.experts.parameters():
                weight.add_(torch.randn_like(weight) * (weight.std() if weight.ndim > 2 else 0.01))
    return model.eval()


def loader(images: int, seed: int) -> DataLoader:
    """Return batches of the default size of `vimoe analyze`."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(images, 3, SIZE, SIZE, generator=generator)
    return DataLoader(TensorDataset(pixels, torch.arange(images) % CLASSES), batch_size=128)


def seconds(what: Callable[[], Any]) -> float:
    """Return the CPU time of a call, which other jobs on the machine disturb less than wall-clock time."""
    start = time.process_time()
    what()
    return time.process_time() - start


def one_round(model: nn.Module, val: DataLoader, test: DataLoader) -> dict[str, float]:
    """Return the seconds of each measured part, by name."""
    found: list[Any] = []

    def prune() -> None:
        pruned = copy.deepcopy(model)
        vimoe.prune(pruned, found[0], val, tolerance=100.0)
        assert not moe_layers(pruned)
        receipts([model, pruned], test)

    before = seconds(lambda: evaluate(model, val))
    analysis = seconds(lambda: found.append(vimoe.analyze(model, val)))
    between = seconds(lambda: evaluate(model, val))
    pruning = seconds(prune)
    after = seconds(lambda: evaluate(model, test))
    return {
        "evaluation": (before + between) / 2,
        "analysis": analysis,
        "evaluation of both": between + after,
        "pruning": pruning,
        "draws": max(layer.draws for layer in found[0].layers),
    }


def ratios(rounds: list[dict[str, float]]) -> dict[str, list[float]]:
    """Return the ratio in each round, by the part that was timed."""
    return {
        "analysis": [each["analysis"] / each["evaluation"] for each in rounds],
        "pruning": [each["pruning"] / each["evaluation of both"] for each in rounds],
        "pruning after an analysis of its own": [
            (each["analysis"] + each["pruning"]) / each["evaluation of both"] for each in rounds
        ],
    }


def table(result: dict[str, Any]) -> str:
    """Return the section for README.md."""
    rounds = result["rounds"]
    lines = [
        f"### Analysis and pruning over an evaluation: {result['of']}, {result['images']} images",
        "",
        "| | seconds | over the evaluation, median [least, most] | goal |",
        "|---|---|---|---|",
    ]
    for name, found in ratios(rounds).items():
        spent = f"{statistics.median(each[name] for each in rounds):.1f}" if name in GOALS else ""
        goal = GOALS.get(name)
        met = "" if goal is None else f"{goal:.0f} {'met' if max(found) <= goal else 'missed'}"
        spread = f"{statistics.median(found):.2f} [{min(found):.2f}, {max(found):.2f}]"
        lines.append(f"| {name} | {spent} | {spread} | {met} |")
    known = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    evaluation = statistics.median(each["evaluation"] for each in rounds)
    peaks = result["peak_mb"]
    words = (
        f"{len(rounds)} rounds in float32, CPU seconds; an evaluation took {evaluation:.1f}; {rounds[0]['draws']:.0f} "
        f"permutations. Peak memory {peaks['evaluation']:.0f} MB after evaluations, {peaks['all']:.0f} MB after all. "
        f"{known}."
    )
    return "\n".join([*lines, "", words])


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--print", action="store_true", help="write nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, val, test = random_model(args.model), loader(args.images, 1), loader(args.images, 2)

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    vimoe.analyze(model, loader(4, 3))  # imports what it needs
    evaluate(model, val)
    peaks, rounds = {"evaluation": peak()}, []
    for _ in range(args.rounds):
        rounds.append(one_round(model, val, test))
        print({name: round(value, 2) for name, value in rounds[-1].items()}, flush=True)
    import speed  # it reads the result

    result = {
        "of": f"{args.model} at {SIZE} pixels, last:2, N = 8, k = 1, image routing", "images": args.images,
        "rounds": rounds, "peak_mb": {**peaks, "all": peak()}, "machine": machine(), "commit": speed.commit(),
    }  # fmt: skip
    print(table(result))
    if not args.print:
        write_json(RESULT, result)
        speed.write_page()


if __name__ == "__main__":
    main()
