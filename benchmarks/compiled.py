"""Time of training steps with `train.compile` over steps without, and after how many steps the compilation has paid.

    python benchmarks/compiled.py --precision bf16 --layers last:2
    python benchmarks/compiled.py --precision no --layers none

A step is forward, losses and backward of a batch, without an optimiser. Two copies of a model take steps in turn in one
process; the ratio is the median over rounds of that within a round, with a 95% interval by bootstrap. Seconds are of
processor time, because other jobs disturb it less than the clock; those of the compilation include the C++ compiler,
and torch's caches are off. Only the blocks are compiled, one by one.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vimoe
from vimoe.bench import timing
from vimoe.bench.result import machine
from vimoe.bench.step import autocast_of
from vimoe.bench.timing import compare, interleaved
from vimoe.training.compiled import compiled_blocks


def step(model: nn.Module, images: Tensor, labels: Tensor, autocast: bool) -> None:
    """Take a training step without an update of the weights."""
    model.zero_grad()
    with autocast_of(autocast), vimoe.record(model) as routings:
        logits = model(images)
    loss = F.cross_entropy(logits.float(), labels)
    (loss + 0.01 * vimoe.balance_loss(routings) if routings else loss).backward()


def processor() -> float:
    """Return the processor time of this process and of those that it started and ended, in seconds."""
    return sum(os.times()[:4])


def main() -> None:
    """Print both times, and the steps until compiling has paid."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=["no", "bf16"], default="bf16")
    parser.add_argument("--layers", default="last:2", help="as moe.layers")
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch._inductor.config.force_disable_caches = True
    torch._inductor.config.compile_threads = 1  # worker processes would not be counted while they live
    model = timm.create_model("vit_small_patch14_dinov2", img_size=args.size, num_classes=100)
    if args.layers != "none":
        vimoe.upcycle(model, vimoe.MoEConfig(layers=args.layers, num_experts=8))
    batch = torch.randn(args.batch, 3, args.size, args.size), torch.randint(0, 100, (args.batch,))
    models = {"eager": model.train(), "compiled": copy.deepcopy(model)}
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(args)
    with ExitStack() as stack:
        stack.enter_context(compiled_blocks(models["compiled"]))
        steps = {name: lambda each=each: step(each, *batch, args.precision == "bf16") for name, each in models.items()}
        before = processor()
        steps["compiled"]()
        first = processor() - before
        stack.enter_context(mock.patch.object(timing, "time", SimpleNamespace(perf_counter=time.process_time)))
        seconds = interleaved(steps, args.rounds)
    for each in compare(seconds, ("eager",), {}):
        print(each)
    eager, compiled = (float(np.median(seconds[name])) for name in models)
    print(f"compilation {first - compiled:.1f} s", end="")
    print(f", paid after {(first - compiled) / (eager - compiled):.0f} steps" if eager > compiled else ", never paid")


if __name__ == "__main__":
    main()
