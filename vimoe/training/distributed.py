"""Data parallel training: a model as Accelerate prepares it for one process or several.

Each process has a whole copy of the model and its share of every batch, and DistributedDataParallel (DDP) averages the
gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from vimoe.config.train import TrainConfig
from vimoe.moe import Routing, record
from vimoe.process import Process


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


def accelerator_for(model: Recorded, loader: DataLoader, config: TrainConfig, out: Path) -> Accelerator:
    """Return the Accelerator of a training, which cuts each batch into the shares of the processes.

    DDP waits for the gradient of each parameter. It looks for those that get none, at each step, only where there are
    any: routers that are frozen for a while, or parts of the model that its forward does not read.

    Args:
        model: model to be prepared.
        loader: training batches.
        config: settings of the training.
        out: run folder.
    """
    process = Process()
    unused = process.count > 1 and (config.router_frozen > 0 or _has_unused(model, loader, process.device))
    return Accelerator(
        mixed_precision=config.precision,
        gradient_accumulation_steps=config.accumulation,
        log_with="tensorboard" if config.tensorboard else None,
        project_dir=out,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
    )


def settle_buckets(prepared: nn.Module, loader: DataLoader, device: torch.device) -> None:
    """Pass two images forward and backward through DDP, and forget them.

    DDP orders its buckets of gradients anew after the first pass, and the sums of more than two processes are rounded
    by the place in a bucket. So a resumed training would differ from an uninterrupted one until then.

    Args:
        prepared: model as Accelerate prepared it; for one process nothing is done.
        loader: training batches.
        device: device of the model.
    """
    if not isinstance(prepared, nn.parallel.DistributedDataParallel) or prepared.find_unused_parameters:
        return  # with unused parameters the buckets stay
    kept = {name: buffer.clone() for name, buffer in prepared.named_buffers()}
    _total(*prepared.train()(_two_images(loader, device))).backward()
    prepared.zero_grad()
    for name, buffer in prepared.named_buffers():
        buffer.copy_(kept[name])


def _has_unused(model: Recorded, loader: DataLoader, device: torch.device) -> bool:
    """Return True if a forward leaves trained parameters without a gradient."""
    model.to(device).train()
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}  # a batch norm's, which would move
    total = _total(*torch.func.functional_call(model, kept, _two_images(loader, device)))
    trained = [p for p in model.parameters() if p.requires_grad]
    return any(gradient is None for gradient in torch.autograd.grad(total, trained, allow_unused=True))


def _two_images(loader: DataLoader, device: torch.device) -> Tensor:
    """Return inputs of two training images, of which a batch norm can take a variance."""
    inputs: Tensor = default_collate([loader.dataset[key] for key in islice(loader.sampler, 2)])[0]
    return inputs.to(device).float()


def _total(outputs: Tensor, routings: list[Routing]) -> Tensor:
    """Return a scalar that all outputs of a `Recorded` have a part in."""
    return outputs.float().sum() + sum(routing.logits.sum() for routing in routings)
