"""Memory of real training steps beside the arithmetic of `vimoe plan --devices`, on a CPU.

    python benchmarks/memory.py            writes benchmarks/results/memory.json and prints the table

Each row is a process of its own: it predicts (`vimoe.training.footprint`), then builds the model with weights, takes
two training steps, and a third one that is measured. Weights, gradients and the optimiser's state are sums over the
storages that are there. Activations are the tensors that autograd keeps, caught by hooks of the same step, with the
images. "Peak" is what torch's allocator has handed out at the most during a step, from the events of torch's profiler.
"Process" is the largest resident memory of the process in the first steps above that before the model was built (and
after a step of one image has loaded all libraries), which also has what libraries allocate inside themselves.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from vimoe.bench.memory import largest
from vimoe.bench.result import machine
from vimoe.config.model import ModelConfig
from vimoe.config.moe import MoEConfig
from vimoe.config.train import TrainConfig
from vimoe.models.create import create
from vimoe.models.upcycling import build_layers
from vimoe.moe import record
from vimoe.training.auxiliary_losses import auxiliary_losses
from vimoe.training.footprint import footprint
from vimoe.training.parameter_groups import adamw, freeze_all_but, trained_modules

RESULT = Path(__file__).parent / "results" / "memory.json"
NAME, IMAGES = "vit_tiny_patch16_224", 16
ROWS: dict[str, dict[str, Any]] = {
    "dense": {"moe": {"layers": "none"}},
    "image routing": {"moe": {"routing": "image"}},
    "token routing": {"moe": {"routing": "token"}},
    "token routing, k = 2": {"moe": {"routing": "token", "top_k": 2}},
    "token routing, checkpointed": {"moe": {"routing": "token"}, "checkpointed": True},
    "token routing, bf16": {"moe": {"routing": "token"}, "train": {"precision": "bf16"}},
    "token routing, frozen trunk": {"moe": {"routing": "token"}, "train": {"train_only": "moe"}},
    "image routing, accumulation 2": {"moe": {"routing": "image"}, "train": {"accumulation": 2}},
    "token routing, moving average": {"moe": {"routing": "token"}, "train": {"ema_decay": 0.999}},
    "expert choice": {"moe": {"routing": "token", "router": "expert_choice"}},
}


def case(row: Mapping[str, Any]) -> tuple[nn.Module, TrainConfig]:
    """Return the model of a row, ready to be trained, and its settings."""
    config = TrainConfig(**{"precision": "no", **row.get("train", {})})
    model = create(ModelConfig(name=NAME, pretrained=False, num_classes=100))
    moe = MoEConfig(**{"layers": "last:4", "num_experts": 8, **row["moe"]})
    if moe.layers != "none":
        build_layers(model, moe)
    trained = trained_modules(model, config.trained)
    if trained is not None:
        freeze_all_but(model, trained)
    if row.get("checkpointed"):
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    return model, config


def loss_of(model: nn.Module, images: Tensor, config: TrainConfig) -> Tensor:
    """Return the loss of a step."""
    with record(model) as routings, torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
        logits = model(images)
    labels = torch.arange(len(images)) % logits.shape[1]
    return F.cross_entropy(logits.float(), labels) + auxiliary_losses(routings, config)[0]


def kept(model: nn.Module, compute: Callable[[], Tensor], images: Tensor) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, and those of the images."""
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        compute().backward()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages[images.untyped_storage().data_ptr()] = images.untyped_storage()
    return sum(storage.nbytes() for place, storage in storages.items() if place not in weights)


def resident(what: str) -> int:
    """Return a figure of this process's resident memory in bytes: "RSS" now, or "HWM" at the most."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"Vm{what}:\s+(\d+) kB", status)
    assert found
    return 1024 * int(found[1])


def measure(name: str) -> dict[str, Any]:
    """Return the predicted and the measured figures of a row, in bytes."""
    row = ROWS[name]
    with torch.device("meta"):
        shapes, config = case(row)
    found = footprint(shapes, IMAGES, config)
    predicted = {
        "weights": found.sum("dense") + found.sum("expert"),
        "gradients": found.sum("trained_dense") + found.sum("trained_expert"),
        "optimizer": sum(found.optimizer),
        "activations": found.activations,
        "peak": found.peak,
    }
    copies = 1 + found.ema
    total = copies * (predicted["weights"] + found.buffers) + predicted["optimizer"] + predicted["peak"]
    warm, _ = case(row)
    loss_of(warm, torch.randn(1, 3, 224, 224), config).backward()
    del warm
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the largest resident memory is that from here on
    before = resident("RSS")
    model, _ = case(row)
    model.train()
    optimizer = adamw(model, config)
    average = ModelEmaV3(model, decay=config.ema_decay) if config.ema_decay else None

    def step(images: Tensor, update: bool = True) -> None:
        loss_of(model, images, config).backward()
        if update:
            optimizer.step()

    images = torch.randn(IMAGES, 3, 224, 224)
    for _ in range(2):
        for update in [False] * (config.accumulation - 1) + [True]:
            step(images, update)
        optimizer.zero_grad()
        if average:
            average.update(model)
    process = resident("HWM") - before
    del images
    for _ in range(config.accumulation - 1):
        step(torch.randn(IMAGES, 3, 224, 224), update=False)
    earlier = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    peak = largest(lambda: step(torch.randn(IMAGES, 3, 224, 224)))
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    state = [v for each in optimizer.state.values() for v in each.values()]
    measured = {
        "weights": sum(p.untyped_storage().nbytes() for p in model.parameters()),
        "gradients": sum(g.untyped_storage().nbytes() for g in gradients),
        "optimizer": sum(v.untyped_storage().nbytes() for v in state),
        "peak": peak + earlier,
    }
    optimizer.zero_grad()
    images = torch.randn(IMAGES, 3, 224, 224)
    measured["activations"] = kept(model, lambda: loss_of(model, images, config), images)
    return {"predicted": {**predicted, "process": total}, "measured": {**measured, "process": process}}


def table(rows: Mapping[str, dict[str, dict[str, float]]]) -> str:
    """Return predicted over measured as a table, with the measured megabytes."""
    names = ("weights", "gradients", "optimizer", "activations", "peak", "process")
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name, row in rows.items():
        cells = [
            f"{row['measured'][each] / 1e6:.1f} MB, {row['predicted'][each] / row['measured'][each]:.3f}"
            for each in names
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure every row in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", choices=ROWS)
    asked = parser.parse_args().row
    if asked:
        torch.manual_seed(0)
        print(json.dumps(measure(asked)))
        return
    rows = {}
    # else glibc raises the size above which freed memory goes back to the system, and holes count as memory
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_ARENA_MAX": "1"}
    for name in ROWS:
        command = [sys.executable, __file__, "--row", name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        rows[name] = json.loads(done.stdout.splitlines()[-1])
    values = {"model": NAME, "images": IMAGES, "layers": "last:4", "rows": rows, "machine": machine()}
    RESULT.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
