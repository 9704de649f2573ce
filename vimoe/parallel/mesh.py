"""The processes of a job as a mesh: data x fsdp x expert.

Every process computes images of its own, along all three dimensions. They differ in what of the model a process holds:

    data     nothing less: replicas
    fsdp     a part of each parameter, gathered for the time of its use (FSDP2)
    expert   some of the experts of each MoE layer; the other parameters whole

Neighbours in rank are neighbours along `expert`, whose exchange waits the most often.
"""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from vimoe.config.parallel import ParallelConfig

DIMENSIONS = ("data", "fsdp", "expert")
REPLICAS = "replicas"  # dimension of the processes that hold the same of a parameter that belongs to no expert


def make_mesh(parallel: ParallelConfig, device_type: str = "cpu") -> DeviceMesh:
    """Return the mesh of the job's processes; all of them call it, after they have joined.

    Args:
        parallel: sizes of the dimensions.
        device_type: "cpu" or "cuda".

    Raises:
        ConfigError: if the sizes do not make up the number of processes.
    """
    sizes = parallel.over(dist.get_world_size())
    assert sizes.data is not None
    return init_device_mesh(device_type, (sizes.data, sizes.fsdp, sizes.expert), mesh_dim_names=DIMENSIONS)


def replicated(mesh: DeviceMesh) -> DeviceMesh:
    """Return the same processes as (replicas, fsdp): the mesh of all parameters but those of spread experts.

    Replicas along `data` and along `expert` hold the same of these parameters.
    """
    ranks = mesh.mesh.permute(0, 2, 1).flatten(0, 1)
    return DeviceMesh(mesh.device_type, ranks, mesh_dim_names=(REPLICAS, "fsdp"))
