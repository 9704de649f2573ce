"""Batch norms over the batch that several processes share, on any device (torch.nn.SyncBatchNorm asks for GPUs)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vimoe.models.frozen_trunk import replaced_forward
from vimoe.process import Process

_BatchNorm = nn.modules.batchnorm._BatchNorm


@contextmanager
def shared_norms(model: nn.Module, process: Process) -> Iterator[None]:
    """Let the batch norms of a model norm by the mean and variance of all processes inside the `with` block.

    Each process has an equal share of the batch. In eval mode, and with one process, they compute as ever.

    Args:
        model: model that trains, with or without batch norms.
        process: this one of the processes.
    """
    with ExitStack() as stack:
        for norm in model.modules() if process.count > 1 else ():
            if isinstance(norm, _BatchNorm):
                stack.enter_context(replaced_forward([norm], _shared(norm, process)))
        yield


class _Mean(torch.autograd.Function):
    """Mean of a tensor over the processes; its gradient is the mean of theirs, since all outputs read the mean."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, process: Process) -> Tensor:
        ctx.process = process
        return process.sum(values) / process.count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.process.sum(gradients[0]) / ctx.process.count, None


def _shared(norm: _BatchNorm, process: Process) -> Callable[[Tensor], Tensor]:
    alone = norm.forward

    def mean(values: Tensor) -> Tensor:
        return _Mean.apply(values, process)

    def forward(x: Tensor) -> Tensor:
        if not norm.training:
            return alone(x)
        axes, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        center = mean(precise.mean(axes))
        apart = precise - center.view(shape)
        variance = mean(apart.square().mean(axes))
        _note(norm, center, variance, process.count * x.numel() // x.shape[1])
        y = apart * (variance + norm.eps).rsqrt().view(shape)
        return (y if norm.weight is None else y * norm.weight.view(shape) + norm.bias.view(shape)).to(x.dtype)

    return forward


@torch.no_grad()
def _note(norm: _BatchNorm, center: Tensor, variance: Tensor, values: int) -> None:
    """Move the running mean and variance as torch does, the variance without bias."""
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked += 1
    rate = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(center.to(norm.running_mean.dtype), rate)
    norm.running_var.lerp_((variance * values / (values - 1)).to(norm.running_var.dtype), rate)
