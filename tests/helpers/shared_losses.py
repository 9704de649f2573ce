"""Losses of a batch that any number of processes share, in float64, and their gradients; see `main`."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from helpers.tiny import config, images, upcycle, vit
from torch import Tensor, nn

import vimoe
from vimoe.config.masks import IGNORE
from vimoe.metrics.segmentation import pixel_loss
from vimoe.process import Process
from vimoe.tasks.segmentation_job import dice_loss
from vimoe.training.batch_norm import shared_norms

BATCH = 4
KINDS: dict[str, dict[str, Any]] = {
    "image": {"routing": "image"},
    "token": {"routing": "token", "top_k": 2},
    "expert choice": {"routing": "token", "router": "expert_choice"},
}
OVER = (vimoe.balance_loss, vimoe.importance_loss, vimoe.variance_loss)
BY_ROW = (vimoe.router_z_loss, vimoe.entropy_loss)


def gradients(parameters: list[Tensor], loss: Tensor, process: Process) -> Tensor:
    """The gradient that DDP would give: the mean of those of the processes."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return process.sum(torch.cat([each.flatten() for each in flat])) / process.count


def of_routers(kind: str, process: Process) -> dict[str, Tensor]:
    """Losses of routings and their gradients."""
    torch.manual_seed(0)
    network = upcycle(vit(), config(**KINDS[kind])).double()
    share = images(network, BATCH).double().chunk(process.count)[process.rank]
    parameters = list(network.parameters())
    results = {}
    for loss in (*OVER, *BY_ROW):
        with vimoe.record(network) as routings:
            logits = network(share)
        value = loss(routings, process) if loss in OVER else loss(routings)
        total = value + logits.square().mean()
        results[loss.__name__] = gradients(parameters, total, process)
        results[f"{loss.__name__}, value"] = process.sum(value.detach()) / process.count
    return results


def of_scenes(process: Process) -> dict[str, Tensor]:
    """Losses of pixels through a batch norm, where the shares have other numbers of void pixels; its running means."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.GELU(), nn.Conv2d(5, 4, 1)).double().train()
    pixels, masks = torch.randn(BATCH, 3, 6, 6).double(), torch.randint(0, 4, (BATCH, 6, 6))
    masks[0, 1:] = masks[1, :2] = IGNORE
    masks[-1][masks[-1] == 3] = 0
    x, y = (each.chunk(process.count)[process.rank] for each in (pixels, masks))
    weights, results = torch.tensor([1.0, 2.0, 0.5, 3.0]).double(), {}
    losses = {
        "pixels": lambda z: pixel_loss(z, y, weights.float(), 0.1, process),
        "dice": lambda z: dice_loss(z, y, process),
    }
    for name, loss in losses.items():
        model = copy.deepcopy(net)
        with shared_norms(model, process):
            value = loss(model(x))
        results[name] = gradients(list(model.parameters()), value, process)
        results[f"{name}, value"] = process.sum(value.detach()) / process.count
        results |= {f"{name}, {key}": buffer for key, buffer in model.named_buffers()}
        assert torch.equal(model.eval()(x), model(x))
    return results


def biases(process: Process) -> dict[str, Tensor]:
    """Biases of routers after an update by the load of the batch."""
    network = upcycle(vit(), config(routing="token", bias_update_rate=0.5))
    share = images(network, BATCH).chunk(process.count)[process.rank]
    with vimoe.record(network) as routings:
        network(share)
    vimoe.update_bias(network, routings, process)
    return {name: buffer for name, buffer in network.named_buffers() if name.endswith("choice_bias")}


def everything(process: Process) -> dict[str, dict[str, Tensor]]:
    return {
        **{kind: of_routers(kind, process) for kind in KINDS}, "scenes": of_scenes(process), "bias": biases(process)
    }  # fmt: skip


if __name__ == "__main__":
    job = Process()
    torch.save(everything(job), Path(sys.argv[1]) / f"{job.rank}.pt")
