"""Time of training steps under bfloat16 autocast over float32 ones, by the width of a ViT.

    python benchmarks/precision.py

`train.precision auto` goes by the result. A step is forward, backward and AdamW. Seconds are of processor time and
the two are taken in turn, so other jobs disturb little. On a CPU with bfloat16 `ONEDNN_MAX_CPU_ISA=AVX2
ATEN_CPU_CAPABILITY=avx2` shows one without it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F

from vimoe.bench.result import machine

WIDTHS = {64: 2, 96: 3, 128: 2, 192: 3, 384: 6}  # channels: heads
BATCHES = ((4, 32), (32, 32), (4, 112), (16, 112))  # images, pixels a side


def step(width: int, heads: int, images: int, side: int, autocast: bool) -> Callable[[], None]:
    """Return a function that trains a ViT of four blocks for a step."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=4, embed_dim=width, num_heads=heads, img_size=side, patch_size=8, num_classes=10
    )
    optimizer = torch.optim.AdamW(model.parameters())
    x, labels = torch.randn(images, 3, side, side), torch.arange(images) % 10

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(x).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def ratio(width: int, heads: int, images: int, side: int, rounds: int) -> float:
    """Return the median over rounds of bfloat16's time over float32's."""
    steps = [step(width, heads, images, side, autocast) for autocast in (False, True)]
    ratios = []
    for _ in range(rounds + 1):
        seconds = []
        for run in steps:
            start = time.process_time()
            run()
            seconds.append(time.process_time() - start)
        ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios[1:])


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print("channels " + " ".join(f"{f'{images} x {side} px':>12}" for images, side in BATCHES))
    for width, heads in WIDTHS.items():
        cells = [f"{ratio(width, heads, images, side, rounds):12.2f}" for images, side in BATCHES]
        print(f"{width:<8} {' '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
