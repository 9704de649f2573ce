"""The processes of a job as a mesh: data x fsdp x expert.

Every process computes images of its own, along all three dimensions. They differ in what of the model a process holds:

    data     nothing less: replicas
    fsdp     a part of each parameter, gathered for the time of its use (FSDP2)
    expert   some of the experts of each MoE layer; the other parameters whole

Neighbours in rank are neighbours along `expert`, whose exchange waits the most often.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from vimoe.errors import ConfigError, choice

DIMENSIONS = ("data", "fsdp", "expert")
REPLICAS = "replicas"  # dimension of the processes that hold the same of a parameter that belongs to no expert


def layout(parallel: Mapping[str, int], count: int) -> dict[str, int]:
    """Return the size of each dimension of the mesh; what `parallel` leaves open is 1, and `data` takes the rest.

    Args:
        parallel: sizes by name.
        count: number of processes.

    Raises:
        ConfigError: for another name, for a size below 1, and if the sizes do not make up the number of processes.

    >>> layout({"expert": 2}, 8)
    {'data': 4, 'fsdp': 1, 'expert': 2}
    """
    for name, size in parallel.items():
        if name not in DIMENSIONS:
            raise ConfigError(f"train.parallel has {name!r}: {choice(name, DIMENSIONS)}")
        if type(size) is not int or size < 1:
            raise ConfigError(f"train.parallel.{name}={size!r}: expected a whole number from 1")
    fsdp, expert = parallel.get("fsdp", 1), parallel.get("expert", 1)
    if count % (fsdp * expert):
        raise ConfigError(
            f"train.parallel has fsdp={fsdp} x expert={expert} for {count} processes: expected a product that divides "
            f"them; start a multiple of {fsdp * expert}, or choose smaller sizes"
        )
    data = count // (fsdp * expert)
    if parallel.get("data", data) != data:
        raise ConfigError(
            f"train.parallel has data={parallel['data']} x fsdp={fsdp} x expert={expert} for {count} processes: "
            f"expected a product of {count}; leave out data, which then is {data}"
        )
    return {"data": data, "fsdp": fsdp, "expert": expert}


def make_mesh(parallel: Mapping[str, int], count: int | None = None, device_type: str = "cpu") -> DeviceMesh:
    """Return the mesh of the job's processes; all of them call it, after they have joined.

    Args:
        parallel: sizes as in `layout`.
        count: number of processes; by default those of the job.
        device_type: "cpu" or "cuda".

    Raises:
        ConfigError: as of `layout`.
    """
    sizes = layout(parallel, dist.get_world_size() if count is None else count)
    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def replicated(mesh: DeviceMesh) -> DeviceMesh:
    """Return the same processes as (replicas, fsdp): the mesh of all parameters but those of spread experts.

    Replicas along `data` and along `expert` hold the same of these parameters.
    """
    ranks = mesh.mesh.permute(0, 2, 1).flatten(0, 1)
    return DeviceMesh(mesh.device_type, ranks, mesh_dim_names=(REPLICAS, "fsdp"))
