"""Cost of comparing the experts of a model, a part of its analysis, over one validation epoch of 300 images.

    python benchmarks/comparison_cost.py [MODEL FOLDER] > benchmarks/results/comparison_cost.txt

The models are those of analysis_cost.py (ViT-S/14 at 112 pixels, last:2, 8 experts) in float32 on one thread: with
copies that have moved, whose hidden units know their partners, and with unrelated experts, for whose units an
assignment is solved. A folder is a trained model of the same shape. All layers are compared, on 16 images of 65 tokens
as in the analysis. Each round evaluates before and after what it times, in CPU seconds.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from analysis_cost import SIZE, loader, random_model, seconds
from torch import nn

import vimoe
from vimoe.analysis.expert_similarity import compare_experts
from vimoe.bench.result import machine
from vimoe.metrics.base import evaluate
from vimoe.moe.layer import moe_layers

IMAGES, ROUNDS = 300, 3


def compared(model: nn.Module, unrelated: bool = False) -> Callable[[], Any]:
    """Return a function that compares the experts of all layers of a model, which is not changed.

    Args:
        model: the model.
        unrelated: True to draw all weights of the experts anew.
    """
    layers = copy.deepcopy(list(moe_layers(model).values()))
    tokens = torch.randn(16, (SIZE // 14) ** 2 + 1, layers[0].experts.kind.dim)
    for layer in layers if unrelated else ():
        for weight in layer.experts.parameters():
            nn.init.normal_(weight, std=0.02)
    return lambda: [compare_experts(layer, tokens) for layer in layers]


def main() -> None:
    """Measure, and print the table."""
    torch.set_num_threads(1)
    model, val = random_model("vit_small_patch14_dinov2"), loader(IMAGES, 1)
    arms = {"moved copies": compared(model), "unrelated experts": compared(model, unrelated=True)}
    if len(sys.argv) > 1:
        arms["trained model"] = compared(vimoe.load(sys.argv[1]).eval())
    epochs: list[float] = []
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(ROUNDS):
        before = seconds(lambda: evaluate(model, val))
        found = {name: seconds(compare) for name, compare in arms.items()}
        epochs.append((before + seconds(lambda: evaluate(model, val))) / 2)
        for name, value in found.items():
            taken[name].append(value)
    print(f"comparison of experts, {len(moe_layers(model))} layers, {ROUNDS} rounds; an epoch takes", end=" ")
    print(f"{statistics.median(epochs):.1f} s\n\n{'':<20}{'seconds':>8}  over an epoch, median [least, most]")
    for name, values in taken.items():
        ratios = [value / epoch for value, epoch in zip(values, epochs, strict=True)]
        spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        print(f"{name:<20}{statistics.median(values):>8.1f}  {spread}")
    print("\n" + ", ".join(f"{name} {value}" for name, value in machine().items()))


if __name__ == "__main__":
    main()
