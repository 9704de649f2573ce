"""Time and memory of a training step, and bytes that a process sends for it, on meshes of 1, 2 and 4 processes.

The global batch is the same for all meshes. Processes that share cores show what the exchange costs, and no speed-up:
CPU time is that of all processes together. Each round runs every mesh, each in a job of its own, and ratios are within
a round. Bytes are the mean over processes of `exchanged_bytes`, the least that the collectives send, beside those that
`vimoe plan --devices` computes, which takes loads as even. So is the peak of a step: tensors above those before it,
without what a library of collectives takes for itself.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import vimoe
from vimoe.bench.memory import largest
from vimoe.bench.result import machine
from vimoe.config.parallel import ParallelConfig
from vimoe.config.train import TrainConfig
from vimoe.parallel.gradients import by_mesh, clip_grad_norm_
from vimoe.parallel.mesh import DIMENSIONS, make_mesh
from vimoe.parallel.parallelize import parallelize
from vimoe.parallel.traffic import exchanged_bytes
from vimoe.training.footprint import footprint
from vimoe.training.layouts import Layout, layout

MESHES: list[tuple[int, dict[str, int]]] = [
    (1, {}),
    (2, {"data": 2}),
    (2, {"fsdp": 2}),
    (2, {"expert": 2}),
    (4, {"data": 2, "expert": 2}),
    (4, {"fsdp": 2, "expert": 2}),
    (4, {"expert": 4}),
]
IMAGES, SIZE, STEPS, WARMUP = 16, 96, 5, 2


def model() -> nn.Module:
    """Return a ViT of 6 blocks of width 192, half of them with 8 experts of which a token gets 2."""
    torch.manual_seed(0)
    dense = timm.create_model("vit_tiny_patch16_224", depth=6, img_size=SIZE, num_classes=10)
    return vimoe.upcycle(dense, vimoe.MoEConfig(layers="every:2", num_experts=8, top_k=2, routing="token")).train()


def measure(rank: int, count: int, parallel: dict[str, int], folder: str) -> None:
    """Measure the steps of one process of a mesh, and write what the first one saw."""
    torch.set_num_threads(1)
    made = model()
    if count > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
        parallelize(made, make_mesh(ParallelConfig(**parallel)))
    step = stepping(made, rank, count)
    for _ in range(WARMUP):
        step()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(STEPS):
        step()
    times = torch.tensor([time.perf_counter() - wall, time.process_time() - cpu]) / STEPS
    if count > 1:
        dist.all_reduce(times)
    wall, cpu = (times / torch.tensor([count, 1])).tolist()  # CPU time is the sum over processes
    sent = torch.zeros(len(DIMENSIONS))
    if count > 1:
        bytes_of = exchanged_bytes(made, step)
        sent = torch.tensor([float(bytes_of[name]) for name in DIMENSIONS])
        dist.all_reduce(sent)
    held = sum(_own(p).numel() * p.element_size() for p in made.parameters())
    buckets = 0
    if count > 1 and not ParallelConfig(**parallel).spreads:  # a training without other dimensions is plain DDP
        step = stepping(nn.parallel.DistributedDataParallel(model()), rank, count)
        step()
        buckets = held  # as large as the gradients, and made before the step
    peak = torch.tensor(float(min(largest(step) for _ in range(3)) + buckets))  # what another thread frees is not seen
    if count > 1:
        dist.all_reduce(peak)
    if rank == 0:
        figures = {"wall": wall, "cpu": cpu, "sent": (sent / count).tolist(), "held": held, "peak": peak.item() / count}
        torch.save(figures, f"{folder}/seen")
    if count > 1:
        dist.destroy_process_group()


def stepping(made: nn.Module, rank: int, count: int) -> Callable[[], None]:
    """Return a function that takes a training step of a model, which leaves no gradients."""
    optimizer = torch.optim.AdamW(by_mesh([{"params": list(made.parameters())}]), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, SIZE, SIZE, generator=generator).chunk(count)[rank]
    labels = torch.randint(10, (IMAGES,), generator=generator).chunk(count)[rank]

    def step() -> None:
        with vimoe.record(made) as routings:
            logits = made(images)
        (nn.functional.cross_entropy(logits, labels) + 0.01 * vimoe.balance_loss(routings)).backward()
        clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def planned(parallel: dict[str, int], count: int) -> Layout:
    """Return the plan for a mesh of so many processes."""
    found = footprint(model(), IMAGES // count, TrainConfig(precision="no"))
    return layout(found, ParallelConfig(**parallel).over(count))


def _own(p: Tensor) -> Tensor:
    return p.to_local() if isinstance(p, DTensor) else p


def run(count: int, parallel: dict[str, int]) -> dict[str, Any]:
    """Return what the first process of a mesh saw."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(measure, (count, parallel, folder), count, start_method="forkserver")
        return torch.load(Path(folder) / "seen", weights_only=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    seen = [[run(count, parallel) for count, parallel in MESHES] for _ in range(rounds)]
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} core(s) for all processes; mean of {STEPS} steps, medians over {rounds} rounds [least, largest]\n")
    columns = ["mesh", "processes", "step, ms", "CPU, ms", "CPU, ratio", "weights held, MB"]
    columns.append("peak of a step, MB: measured / plan")
    columns += [f"sent along {name}, MB: measured / plan" for name in DIMENSIONS]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for i, (count, parallel) in enumerate(MESHES):
        wall, cpu = (statistics.median(each[i][kind] for each in seen) for kind in ("wall", "cpu"))
        ratios = sorted(each[i]["cpu"] / each[0]["cpu"] for each in seen)
        name = " x ".join(f"{key} {size}" for key, size in parallel.items()) or "one process"
        ratio = f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
        plan, first = planned(parallel, count), seen[0][i]
        each = zip(first["sent"], DIMENSIONS, strict=True)
        sent = [f"{size / 1e6:.3f} / {plan.sent[dimension] / 1e6:.3f}" for size, dimension in each]
        peak = f"{first['peak'] / 1e6:.2f} / {plan.memory['step'] / 1e6:.2f}"
        cells = [name, count, f"{1e3 * wall:.0f}", f"{1e3 * cpu:.0f}", ratio, f"{first['held'] / 1e6:.2f}", peak, *sent]
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor", "timm", "vimoe.moe"])
    main()
