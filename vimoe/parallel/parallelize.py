"""A model over the processes of a mesh: FSDP by block, and experts spread along `expert`.

Parameters become DTensors, but for scalars, which each process keeps. Those of no expert are sharded along `fsdp` and
replicated along `data` and `expert`; those of experts are sharded by expert along `expert`, by another axis along
`fsdp`, and replicated along `data`. FSDP2 (`torch.distributed.fsdp.fully_shard`) gathers what a block needs for the
time of its forward and backward pass, and takes the mean of gradients over the processes; see
`vimoe.parallel.exchange` for why each gradient is that of the mean loss. It does so with one shard too (fsdp=1), so
there is one way for all meshes: what is gathered is a copy then, which is freed in the same way.

The model that each process begins with is whole, so it has to fit into the memory of one.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard

from vimoe.errors import SurgeryError, VimoeError, expect
from vimoe.models.interface import find_backbone
from vimoe.moe.layer import MoE, moe_layers
from vimoe.moe.packed import check_not_packed
from vimoe.parallel.abreast import PLAIN, is_parallel
from vimoe.parallel.exchange import spread
from vimoe.parallel.mesh import replicated


def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Spread a model over the processes of a mesh; in place. All processes call it, with models of one architecture.

    The first process's weights and buffers hold for all. Make the optimiser after this, because parameters are new
    ones; their names and order stay. Surgery, `count`, `set_reading` and the start of layers come before; `whole` gives
    a model for all that comes after. Only `model(images)` gathers the parameters, and not methods of the model.

    A gradient is that of the mean of the processes' losses after each `backward()`. Buffers stay with each process.

    Args:
        model: model with or without MoE layers, on the device of the mesh.
        mesh: mesh of `make_mesh`.

    Returns:
        The same model.

    Raises:
        SurgeryError: if an MoE layer cannot be spread over the mesh, or the model is spread already; it is as it was.
        VimoeError: if it is no model, or an optimised one.
    """
    check(model, mesh["expert"].size(), mesh.size())
    object.__setattr__(model, PLAIN, (_without_weights(model),))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.contiguous()  # neither a broadcast nor FSDP takes others
            dist.broadcast(tensor, 0)
    shards, scalars = mesh["fsdp"].size(), {p for p in model.parameters() if not p.ndim}
    for p in scalars:  # FSDP refuses them
        p.register_post_accumulate_grad_hook(_mean)
    if mesh["expert"].size() > 1:
        for layer in moe_layers(model).values():
            spread(layer.experts, mesh["expert"])
            fully_shard(
                layer.experts,
                mesh=mesh["data", "fsdp"],
                ignored_params=scalars,
                shard_placement_fn=lambda p: Shard(int(p.shape[1] % shards == 0)),
            )
    dense = replicated(mesh)
    for name in find_backbone(model).blocks:
        fully_shard(model.get_submodule(name), mesh=dense, ignored_params=scalars)
    fully_shard(model, mesh=dense, ignored_params=scalars)
    return model


def _mean(parameter: nn.Parameter) -> None:
    """Take the mean of a gradient over all processes; that of steps before, to which it was added, stays as it is."""
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def check(model: nn.Module, expert: int, count: int) -> None:
    """Raise the error that `parallelize` would raise for so many processes, of which `expert` share a layer's experts.

    Raises:
        SurgeryError: as of `parallelize`.
        VimoeError: as of `parallelize`.
    """
    expect("model", model, nn.Module, "build one, such as by timm.create_model")
    check_not_packed(model)
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise SurgeryError("the model is spread over processes already: expected one that is not; build it again")
    for name, layer in moe_layers(model).items():
        if why := _obstacle(layer, expert, count):
            raise SurgeryError(f"{name} cannot be spread over {count} processes: {why}")


def _obstacle(layer: MoE, expert: int, count: int) -> str | None:
    """Return why a layer cannot be spread, and the remedy, or None if it can."""
    config, experts = layer.config, layer.experts
    if count > 1 and layer.unchosen is not None and layer.unchosen.moves:
        return (
            f"moe.router_gradient={config.router_gradient!r} keeps means of the tokens that one process saw; choose "
            f"'chosen' or 'dense'"
        )
    if expert == 1:
        return None
    if config.num_experts % expert:
        return f"num_experts={config.num_experts}: expected a multiple of expert={expert}; choose another"
    if layer.router.reads_weights:
        return f"moe.router={config.router!r} reads the weights of all experts; set expert=1, or choose another router"
    if not all(role.per_expert for role in experts.roles.values()):
        return (
            f"moe.experts={config.experts!r} own a base that all of them share; set num_shared_experts=1, whose expert "
            f"is the base, or expert=1"
        )
    return None


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole state of a parallel model in the first process, on the CPU, and {} in the others.

    All processes call it. Names are those of the model before `parallelize`, so that a model of one process loads it.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return state


def whole(model: nn.Module) -> nn.Module | None:
    """Return a model of this process alone with the weights of a parallel one, on the CPU; None but in the first.

    All processes call it. The result is what `parallelize` began with, so that `vimoe.save`, `vimoe.analyze`,
    `vimoe.prune` and all else take it.

    Raises:
        VimoeError: if the model is not parallel.
    """
    if not is_parallel(model):
        raise VimoeError("the model is not spread over processes: expected one that parallelize returned; use it as is")
    state = full_state_dict(model)
    if dist.get_rank():
        return None
    plain: nn.Module = copy.deepcopy(getattr(model, PLAIN)[0])
    plain.load_state_dict(state, assign=True)
    return plain.cpu().train(model.training)


def _without_weights(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters are on the meta device; buffers are copied, since some are in no state."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo)
