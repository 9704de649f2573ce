"""Processor time of steps of one image, with gradients of idle experts filled or mapped, in turns; printed.

    OMP_NUM_THREADS=1 python benchmarks/idle_gradients.py --rounds 90

A ViT-S/14 at 224 pixels with 8 experts in its last two blocks, of which one image reaches one each, beside its dense
parent, in float32. "Step" is the passes with clipping and a fused AdamW. Ratios are medians over rounds of the ratio
within a round, with bootstrapped 95% intervals.
"""

from __future__ import annotations

import argparse
import time
from unittest import mock

import numpy as np
import timm
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

import vimoe
from vimoe.config.moe import MoEConfig
from vimoe.moe import grouped_linear

PASSES, STEP = "forward and backward", "step"
BESIDE = (("mapped", "filled"), ("mapped", "dense"), ("filled", "dense"))


def filled(weight: Tensor) -> Tensor:
    """Return zeros that are written, as they were before they were mapped."""
    return weight.new_zeros(weight.shape)


def vit() -> nn.Module:
    """Return the dense parent, without trained weights."""
    return timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=100).train()


def seconds(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> dict[str, float]:
    """Return the processor time of a training step, and of its passes alone."""
    began = time.process_time()
    F.cross_entropy(model(x), y).backward()
    passed = time.process_time()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return {PASSES: passed - began, STEP: time.process_time() - began}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=90)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    dense, mixture = vit(), vimoe.upcycle(vit(), MoEConfig(layers="last:2", num_experts=8)).train()
    models = {"dense": dense, "filled": mixture, "mapped": mixture}
    optimizers = {model: torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) for model in (dense, mixture)}
    x, y = torch.randn(1, 3, 224, 224), torch.tensor([3])
    found: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for number in range(rounds + 2):  # the first two are for warming up
        for name in np.roll(list(models), number).tolist():
            zeros = filled if name == "filled" else grouped_linear.unwritten_zeros
            with mock.patch.object(grouped_linear, "unwritten_zeros", zeros):
                found[name].append(seconds(models[name], optimizers[models[name]], x, y))
    for what in (PASSES, STEP):
        for of, against in BESIDE:
            ratios = np.array([a[what] / b[what] for a, b in zip(found[of][2:], found[against][2:], strict=True)])
            interval = stats.bootstrap((ratios,), np.median, method="percentile", rng=0).confidence_interval
            print(f"{what}: {of} over {against} {np.median(ratios):.3f} [{interval.low:.3f}, {interval.high:.3f}]")


if __name__ == "__main__":
    main()
