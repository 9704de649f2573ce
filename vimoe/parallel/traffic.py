"""Bytes that a process sends, counted while it computes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from vimoe.parallel.mesh import DIMENSIONS

c10d = torch.ops.c10d


def exchanged_bytes(model: nn.Module, step: Callable[[], object]) -> dict[str, int]:
    """Return the bytes that this process sends in a step, by dimension of the meshes of a parallel model.

    A collective counts with the least that a process has to send, what a ring algorithm sends, for b bytes of the whole
    result or operand and g processes:

        all-gather, reduce-scatter    b (g - 1) / g
        all-reduce                    2 b (g - 1) / g
        all-to-all                    the rows for other processes

    Weights and gradients are sent along "fsdp". "data" has the sums of gradients over copies, along the dimension
    `expert` too where a parameter is of no expert. "expert" has tokens, their gradients and loads. Groups that are not
    of the model, such as that of all processes, are "other".

    Args:
        model: model of `parallelize`.
        step: a training step, or a part of it; all processes take it.
    """
    names: dict[Any, str] = {
        mesh.get_group(i).group_name: "fsdp" if name == "fsdp" else "data"
        for mesh in {p.device_mesh for p in model.parameters() if isinstance(p, DTensor)}
        for i, name in enumerate(mesh.mesh_dim_names or ())
    }
    counter = _Counter()
    with counter:
        step()
    sent = dict.fromkeys((*DIMENSIONS, "other"), 0.0)
    for (group, collective), size in counter.sent.items():
        # torch has one group for all dimensions that are all processes, so tokens are known by their collective
        sent["expert" if collective is c10d.alltoall_base_ else names.get(group, "other")] += size
    return {name: round(size) for name, size in sent.items()}


class _Counter(TorchDispatchMode):
    """Adds up the bytes that are sent, by the name of the group of processes and the collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[tuple[Any, Any], float] = defaultdict(float)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            group = next(ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
            collective = function.overloadpacket
            self.sent[group.group_name, collective] += _sent(collective, args, group)
        return function(*args, **(kwargs or {}))


def _sent(collective: Any, args: Any, group: ProcessGroup) -> float:
    """Return the bytes that this process sends in a collective."""
    others = (group.size() - 1) / group.size()
    if collective is c10d.allreduce_:
        return 2 * others * sum(map(_size, args[0]))
    if collective is c10d._allgather_base_:
        return others * _size(args[0])
    if collective is c10d._reduce_scatter_base_:
        return others * _size(args[1])
    if collective is c10d.alltoall_base_:
        rows = args[1]
        kept = args[4][group.rank()] if args[4] else len(rows) // group.size()
        return _size(rows) - kept * _size(rows[:1])
    raise NotImplementedError(f"{collective} is in no training step of vimoe: its bytes are not known")


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
