"""Models as the processes of a training hold them: each the whole of it, or each a part.

`Copies` is data parallel training. Each process has a whole copy of the model and its share of every batch, and
DistributedDataParallel (DDP) averages the gradients. One process has the only copy. `Shards` is for `train.parallel`
with fsdp or expert above 1: `vimoe.parallel.parallelize` spreads the model. In both, Accelerate gives autocast,
accumulation and the shares of the batches.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    KwargsHandler,
)
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader, default_collate

from vimoe.config.train import TrainConfig
from vimoe.moe import Routing, record
from vimoe.parallel.checkpoint import load_checkpoint, save_checkpoint
from vimoe.parallel.gradients import begin, clip_grad_norm_
from vimoe.parallel.mesh import make_mesh
from vimoe.parallel.parallelize import full_state_dict, parallelize
from vimoe.process import Process
from vimoe.training import checkpoint
from vimoe.training.parameter_groups import parameter_groups

_AVERAGE = "ema"  # folder of the moving average's shards, in that of the model's


class Recorded(nn.Module):
    """Forward of a model that returns its routings beside its outputs.

    A loss of routings reaches parameters that the outputs may not, such as a router whose gates are constant. DDP looks
    for parameters without a gradient behind what a forward returns, so all that losses read has to be there.

    Args:
        model: dense model or one with MoE layers.
        outputs_of: function of the model and its inputs that returns its outputs.
        outputs: record the experts' outputs too, as `vimoe.record`.
    """

    def __init__(self, model: nn.Module, outputs_of: Callable[[nn.Module, Tensor], Tensor], outputs: bool) -> None:
        super().__init__()
        self.model, self.outputs_of, self.outputs = model, outputs_of, outputs

    def forward(self, inputs: Tensor) -> tuple[Tensor, list[Routing]]:
        """Return the outputs for inputs, and a `Routing` of each MoE layer."""
        with record(self.model, outputs=self.outputs) as routings:
            return self.outputs_of(self.model, inputs), routings


class Copies:
    """Whole models: one in each process.

    Attributes:
        model: model that the steps work with.

    Args:
        model: model to train, in place.
        config: settings of the training.
        process: this one of the processes.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, process: Process) -> None:
        self.model, self.config, self.process = model, config, process

    def prepare(
        self, recorded: Recorded, optimizer: torch.optim.AdamW, loader: DataLoader, out: Path
    ) -> tuple[Accelerator, nn.Module, AcceleratedOptimizer, DataLoader]:
        """Return the Accelerator of a training with run folder `out`, and what it makes of the parts.

        DDP waits for the gradient of each parameter. It looks for those that get none, at each step, only where there
        are any: routers that are frozen for a while, or parts of the model that its forward does not read.
        """
        wrapped = dist.is_initialized()  # by DDP, be it in a job of one process
        unused = wrapped and (self.config.freezes_routers or _has_unused(recorded, loader, self.process.device))
        accelerator = _accelerator(self.config, out, DistributedDataParallelKwargs(find_unused_parameters=unused))
        prepared, optimizer, loader_of_all = accelerator.prepare(recorded, optimizer, loader)
        settle_buckets(prepared, loader)
        return accelerator, prepared, optimizer, loader_of_all

    def average(self) -> ModelEmaV3 | None:
        """Return a moving average that begins with the model's weights; None where none is asked for."""
        decay = self.config.ema_decay
        return ModelEmaV3(self.model, decay=decay, use_warmup=True) if decay else None

    def clip(self, limit: float) -> None:
        """Scale the gradients so that the norm over all of them is at most `limit`."""
        nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a copy of all weights and buffers of the model, or of its moving average, on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}

    def save(self, out: Path, state: dict[str, Any], parts: Mapping[str, Any]) -> None:
        """Write a checkpoint; all processes call it.

        Args:
            out: run folder.
            state: progress of the training.
            parts: what has a state, by name: model, optimizer, ...
        """
        self.process.once(lambda: checkpoint.write(out, state | {k: part.state_dict() for k, part in parts.items()}))

    def load(self, out: Path, stored: dict[str, Any], parts: Mapping[str, Any]) -> None:
        """Load the parts from a checkpoint, of copies or shards; all processes call it."""
        if checkpoint.SHARDS in stored:
            folder = checkpoint.shards(out, stored[checkpoint.SHARDS])
            load_checkpoint(folder, parts["model"], parts["optimizer"].optimizer)
            if "ema" in parts:
                load_checkpoint(folder / _AVERAGE, parts["ema"])
        else:
            self._load_whole(stored, parts)

    def _load_whole(self, stored: dict[str, Any], parts: Mapping[str, Any]) -> None:
        for name, part in parts.items():
            part.load_state_dict(stored[name])

    def end(self, weights: dict[str, Tensor]) -> nn.Module:
        """Give the model that was to be trained these weights, and return a model to evaluate with them."""
        self.model.load_state_dict(weights)
        return self.model.eval()


class Shards(Copies):
    """A model that is spread over the processes; the one that was to be trained waits on the CPU."""

    def __init__(self, model: nn.Module, config: TrainConfig, process: Process) -> None:
        self.mesh = make_mesh(config.parallel, process.device.type)
        super().__init__(parallelize(copy.deepcopy(model).to(process.device), self.mesh), config, process)
        self.plain = model.cpu()

    def prepare(
        self, recorded: Recorded, optimizer: torch.optim.AdamW, loader: DataLoader, out: Path
    ) -> tuple[Accelerator, nn.Module, AcceleratedOptimizer, DataLoader]:
        begin(optimizer)
        # a segmenter's, which the losses do not change in place
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        accelerator = _accelerator(self.config, out)
        return accelerator, recorded, *accelerator.prepare(optimizer, loader)

    def average(self) -> ModelEmaV3 | None:
        if not (decay := self.config.ema_decay):
            return None
        average = ModelEmaV3(self.plain, decay=decay, use_warmup=True, foreach=False)  # shards of one mesh at a time
        average.module = parallelize(average.module.to(self.process.device), self.mesh).requires_grad_(False)
        return average

    def clip(self, limit: float) -> None:
        clip_grad_norm_(self.model.parameters(), limit)

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return them in the first process, and {} in the others."""
        return {name: tensor.clone() for name, tensor in full_state_dict(model).items()}

    def save(self, out: Path, state: dict[str, Any], parts: Mapping[str, Any]) -> None:
        """Write the shards by all processes, and then the file that names their folder."""
        name = f"{checkpoint.SHARDS}-{state['epoch']}-{state['step']}"
        folder = checkpoint.shards(out, name)
        self.process.once(folder.parent.mkdir, exist_ok=True)
        save_checkpoint(folder, parts["model"], parts["optimizer"].optimizer)
        if "ema" in parts:
            save_checkpoint(folder / _AVERAGE, parts["ema"])
        self.process.once(checkpoint.write, out, {**state, checkpoint.SHARDS: name})

    def _load_whole(self, stored: dict[str, Any], parts: Mapping[str, Any]) -> None:
        """Load what whole models had; the state of their optimiser is by the number of a parameter in the groups."""
        options = StateDictOptions(full_state_dict=True)
        for name in parts.keys() & {"model", "ema"}:
            set_model_state_dict(parts[name], dict(stored[name]), options=options)
        optimizer, whole = parts["optimizer"].optimizer, stored["optimizer"]
        order = [p for group in parameter_groups(self.model, self.config) for p in group["params"]]
        for i, state in whole["state"].items():
            for name, value in state.items():
                mine = optimizer.state[order[i]][name]
                mine.copy_(_shard(value, mine) if isinstance(mine, DTensor) else value)
        settings = {id(order[i]): group for group in whole["param_groups"] for i in group["params"]}
        for group in optimizer.param_groups:
            kept = {name: group[name] for name in ("params", "fused")}
            group |= {**settings[id(group["params"][0])], **kept}

    def end(self, weights: dict[str, Tensor]) -> nn.Module:
        """Do so in the first process, whose weights these are; the model to evaluate is the one of all processes."""
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, dict(weights), options=options)
        if self.process.first:
            self.plain.load_state_dict(weights)
        self.plain.to(self.process.device).eval()
        return self.model.eval()


def held(model: nn.Module, config: TrainConfig, process: Process) -> Copies:
    """Return how the processes hold a model while they train it. All of them call it."""
    return (Shards if config.parallel.spreads else Copies)(model, config, process)


def _accelerator(config: TrainConfig, out: Path, *handlers: KwargsHandler) -> Accelerator:
    """Return the Accelerator of a training, which cuts each batch into the shares of the processes."""
    return Accelerator(
        mixed_precision=config.precision,
        # as a plugin, which ACCELERATE_GRADIENT_ACCUMULATION_STEPS of an environment does not overrule
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.accumulation),
        log_with="tensorboard" if config.tensorboard else None,
        project_dir=out,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        kwargs_handlers=list(handlers),
    )


def settle_buckets(prepared: nn.Module, loader: DataLoader) -> None:
    """Pass two images forward and backward through DDP, and forget them.

    DDP orders its buckets of gradients anew after the first pass, and the sums of more than two processes are rounded
    by the place in a bucket. So a resumed training would differ from an uninterrupted one until then.

    Args:
        prepared: model as Accelerate prepared it; for one process nothing is done.
        loader: training batches.
    """
    if not isinstance(prepared, nn.parallel.DistributedDataParallel) or prepared.find_unused_parameters:
        return  # with unused parameters the buckets stay
    kept = {name: buffer.clone() for name, buffer in prepared.named_buffers()}
    _total(*prepared.train()(_two_images(loader, next(prepared.parameters())))).backward()
    prepared.zero_grad()
    for name, buffer in prepared.named_buffers():
        buffer.copy_(kept[name])


def _shard(whole: Tensor, like: DTensor) -> DTensor:
    """Return a tensor, which all processes have, in the shards of another one."""
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _has_unused(model: Recorded, loader: DataLoader, device: torch.device) -> bool:
    """Return True if a forward leaves trained parameters without a gradient."""
    model.to(device).train()
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}  # a batch norm's, which would move
    trained = [p for p in model.parameters() if p.requires_grad]
    total = _total(*torch.func.functional_call(model, kept, _two_images(loader, trained[0])))
    return any(gradient is None for gradient in torch.autograd.grad(total, trained, allow_unused=True))


def _two_images(loader: DataLoader, like: Tensor) -> Tensor:
    """Return inputs of two training images, of which a batch norm can take a variance, as a weight is."""
    inputs: Tensor = default_collate([loader.dataset[key] for key in islice(loader.sampler, 2)])[0]
    return inputs.to(like)


def _total(outputs: Tensor, routings: list[Routing]) -> Tensor:
    """Return a scalar that all outputs of a `Recorded` have a part in."""
    return outputs.float().sum() + sum(routing.logits.sum() for routing in routings)
