"""Gradients and optimisers of parameters on several meshes.

Operators on lists of tensors expect DTensors of one mesh, or plain tensors alone: the norms that
`torch.nn.utils.clip_grad_norm_` stacks, and the steps of fused and foreach optimisers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm


def by_mesh(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return parameter groups of an optimiser, each of which lies on one mesh; other entries stay.

    >>> len(by_mesh([{"params": [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))], "lr": 0.1}]))
    1
    """
    split: list[dict[str, Any]] = []
    for group in groups:
        members: dict[Any, list[nn.Parameter]] = {}
        for p in group["params"]:
            members.setdefault(p.device_mesh if isinstance(p, DTensor) else None, []).append(p)
        split += [{**group, "params": parameters} for parameters in members.values()]
    return split


def begin(optimizer: torch.optim.AdamW) -> None:
    """Make the state of an optimiser before its first step, as that step would, so that a checkpoint has all of it.

    torch's checkpoints take a step of zeros for that, which counts as a step.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            step = torch.zeros((), device=p.device if group["fused"] else None)
            optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


@torch.no_grad()
def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the 2-norm over all gradients, a scalar; 0 where there is none.

    All processes of the meshes call it. Each computes with its shards, and sums of squares are added up along the
    dimensions that shard a gradient; so replicas count once, and the norm is the same on all processes.

    Args:
        parameters: DTensors of any meshes, and plain parameters, which are the same on all processes.
    """
    norms = []
    for groups, gradients in _by_sharding(parameters).items():
        norm = get_total_norm(gradients)
        if groups:
            square = norm.square()
            for group in groups:
                dist.all_reduce(square, group=group)
            norm = square.sqrt()
        norms.append(norm)
    if not norms:
        return torch.tensor(0.0)
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients, in place, by min(1, max_norm / (norm + 1e-6)), with the `total_norm` of them.

    Args:
        parameters: as of `total_norm`.
        max_norm: largest norm; infinite to leave the gradients as they are.

    Returns:
        The norm before.
    """
    parameters = list(parameters)
    total = total_norm(parameters)
    factor = (max_norm / (total + 1e-6)).clamp(max=1)
    for gradients in _by_sharding(parameters).values():
        torch._foreach_mul_(gradients, factor)
    return total


def _by_sharding(parameters: Iterable[nn.Parameter]) -> dict[tuple[ProcessGroup, ...], list[Tensor]]:
    """Return what this process holds of the gradients, by the groups of processes over which they are sharded."""
    held: dict[tuple[ProcessGroup, ...], list[Tensor]] = {}
    for p in parameters:
        if p.grad is not None:
            own = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            held.setdefault(_sharding(p.grad), []).append(own)
    return held


def _sharding(gradient: Tensor) -> tuple[ProcessGroup, ...]:
    """Return the groups of processes over which a gradient is sharded."""
    if not isinstance(gradient, DTensor):
        return ()
    mesh = gradient.device_mesh
    return tuple(mesh.get_group(i) for i, placement in enumerate(gradient.placements) if not placement.is_replicate())
