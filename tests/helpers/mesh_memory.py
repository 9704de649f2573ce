"""The largest memory of a step by one process of a mesh, as torch's allocator tells it."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import nn

import vimoe
from vimoe.bench.memory import largest
from vimoe.config.moe import MoEConfig
from vimoe.config.parallel import ParallelConfig
from vimoe.config.train import TrainConfig
from vimoe.parallel.mesh import make_mesh
from vimoe.parallel.parallelize import parallelize
from vimoe.training.auxiliary_losses import auxiliary_losses
from vimoe.training.parameter_groups import adamw, freeze_all_but, trained_modules


def training(case: dict[str, Any]) -> TrainConfig:
    return TrainConfig(**{"precision": "no", **case.get("train", {})})


def model(case: dict[str, Any]) -> nn.Module:
    """A ViT-Ti of the depth, image size and MoE layers of a case."""
    torch.manual_seed(0)
    dense = timm.create_model("vit_tiny_patch16_224", depth=case["depth"], img_size=case["size"], num_classes=10)
    made = vimoe.upcycle(dense, MoEConfig(**case["moe"]))
    trained = trained_modules(made, training(case).trained)
    if trained is not None:
        freeze_all_but(made, trained)
    if case.get("checkpointed"):
        made.set_grad_checkpointing(True)
    return made.train()


def peak_of_a_step(case: dict[str, Any], parallel: dict[str, int]) -> int:
    """The bytes that a step has at its most: its own above what is there before, and gradients of earlier ones."""
    made, settings, count = model(case), training(case), dist.get_world_size()
    parallelize(made, make_mesh(ParallelConfig(**parallel)))
    optimizer = adamw(made, settings)
    images, labels = case["images"] // count, torch.zeros(case["images"] // count, dtype=torch.long)

    def backward() -> None:
        x = torch.randn(images, 3, case["size"], case["size"])
        with vimoe.record(made) as routings, torch.autocast("cpu", torch.bfloat16, settings.precision == "bf16"):
            logits = made(x)
        loss = nn.functional.cross_entropy(logits.float(), labels) + auxiliary_losses(routings, settings)[0]
        loss.backward()

    def step() -> None:
        backward()
        optimizer.step()

    step()
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(settings.accumulation - 1):
            backward()
        earlier = sum(p.grad.to_local().nbytes for p in made.parameters() if p.grad is not None)
        found.append(largest(step) + earlier)
    return min(found)  # what another thread frees is not seen
