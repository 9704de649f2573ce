"""Recording, checkpointing and hooks of a parallel model, and bytes on its meshes: work of a process of a job."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from helpers.parallel_work import batch, full, model
from torch.distributed.tensor import DTensor

import vimoe
from vimoe.config.parallel import ParallelConfig
from vimoe.models.reading import tokens_read
from vimoe.moe.layer import moe_layers
from vimoe.parallel.mesh import make_mesh
from vimoe.parallel.parallelize import full_state_dict, parallelize
from vimoe.parallel.traffic import exchanged_bytes

SETTINGS: dict[str, Any] = {"routing": "token", "top_k": 2}


def step(checkpointing: bool) -> dict[str, Any]:
    """A step with or without gradient checkpointing: gradients, and what was recorded."""
    made = model(SETTINGS)
    made.set_grad_checkpointing(checkpointing)
    outside = sum(p.nbytes for name, p in made.named_parameters() if not name.startswith("blocks."))
    parallelize(made, make_mesh(ParallelConfig(expert=2)))
    shards = storages(made)
    images, labels = (each.chunk(2)[dist.get_rank()] for each in batch())
    with vimoe.record(made) as routings:
        logits = made(images)
    copied = sum(size for place, size in storages(made).items() if place not in shards)
    loss = torch.nn.functional.cross_entropy(logits, labels) + vimoe.balance_loss(routings)
    sent = exchanged_bytes(made, loss.backward)
    return {
        "sent": sent,
        "gradients": {name: full(p.grad) for name, p in made.named_parameters()},
        "records": [(routing.layer, *routing.logits.shape) for routing in routings],
        "read": tokens_read(made),
        "copied": copied,
        "outside": outside,
    }


def storages(made: torch.nn.Module) -> dict[int, int]:
    """Bytes of the memory behind the parameters as they are now, by its address."""
    local = [p.to_local() if isinstance(p, DTensor) else p for p in made.parameters()]
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in local}


def checkpointed_and_not() -> tuple[dict[str, Any], dict[str, Any]]:
    return step(True), step(False)


def figures() -> dict[str, Any]:
    """Bytes that a process sends in a step of data 1 x fsdp 2 x expert 2, and sizes that they follow from."""
    made = model(SETTINGS).float()
    layers = moe_layers(made)
    of_experts = sum(p.numel() for layer in layers.values() for p in layer.experts.parameters())
    root = sum(p.numel() for name, p in made.named_parameters() if not name.startswith("blocks."))
    everything = sum(p.numel() for p in made.parameters())
    parallelize(made, make_mesh(ParallelConfig(fsdp=2, expert=2)))
    images, recorded = batch()[0].chunk(4)[dist.get_rank()].float(), list[vimoe.Routing]()

    def training_step() -> None:
        with vimoe.record(made) as routings:
            made(images).square().sum().backward()
        recorded.extend(routings)

    seen = exchanged_bytes(made, training_step)
    shape = {name: tuple(tensor.shape) for name, tensor in full_state_dict(made).items()}
    return {
        "sent": seen,
        "loads": [routing.load.tolist() for routing in recorded],
        "expert rank": dist.get_rank() % 2,
        "of experts": of_experts,
        "root": root,
        "all": everything,
        "width": shape["blocks.0.mlp.router.weight"][1] if shape else None,
    }
