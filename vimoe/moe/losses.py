"""Losses that keep experts in use: pure functions of the recorded `Routing`s, in float32.

Axes: N experts. Each loss is averaged over the records. Rows are images with image routing, and tokens with token
routing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vimoe.errors import VimoeError
from vimoe.moe.routing import Routing


def balance_loss(routings: Sequence[Routing]) -> Tensor:
    """N x sum_i f_i P_i: f_i the share of rows sent to expert i, P_i its mean probability over all rows.

    Fedus et al., Switch Transformers (arXiv 2101.03961), eq. 4 to 6, in the form for any k: f sums to k, or to the mean
    number of experts of a row where that varies. The loss is that number if all experts are used alike. The gradient
    flows through P alone.

    >>> import timm, torch, vimoe
    >>> model = vimoe.upcycle(timm.create_model("test_vit"), vimoe.MoEConfig(layers="last:1", num_experts=4))
    >>> with vimoe.record(model) as routings:
    ...     logits = model(torch.randn(2, 3, 160, 160))
    >>> loss = logits.square().mean() + 0.01 * vimoe.balance_loss(routings)
    >>> loss.backward()
    """
    return _mean(routings, _balance)


def router_z_loss(routings: Sequence[Routing]) -> Tensor:
    """Mean squared log-sum-exp of the logits: Zoph et al., ST-MoE (arXiv 2202.08906), eq. 5.

    >>> import timm, torch, vimoe
    >>> model = vimoe.upcycle(timm.create_model("test_vit"), vimoe.MoEConfig(layers="last:1", num_experts=4))
    >>> with vimoe.record(model) as routings:
    ...     logits = model(torch.randn(2, 3, 160, 160))
    >>> loss = logits.square().mean() + 0.001 * vimoe.router_z_loss(routings)
    >>> loss.backward()
    """
    return _mean(routings, lambda routing: routing.logits.logsumexp(dim=-1).square().mean())


def importance_loss(routings: Sequence[Routing]) -> Tensor:
    """Squared coefficient of variation of the experts' summed probabilities over the batch.

    Riquelme et al., V-MoE (arXiv 2106.05974), appendix A.2, without its noise.

    >>> import timm, torch, vimoe
    >>> model = vimoe.upcycle(timm.create_model("test_vit"), vimoe.MoEConfig(layers="last:1", num_experts=4))
    >>> with vimoe.record(model) as routings:
    ...     logits = model(torch.randn(2, 3, 160, 160))
    >>> loss = logits.square().mean() + 0.01 * vimoe.importance_loss(routings)
    >>> loss.backward()
    """
    return _mean(routings, _importance)


def _balance(routing: Routing) -> Tensor:
    f_N = routing.load.float() / len(routing.logits)
    return routing.num_experts * (f_N * routing.probabilities.mean(dim=0)).sum()


def _importance(routing: Routing) -> Tensor:
    importance_N = routing.probabilities.sum(dim=0)
    return importance_N.var(correction=0) / importance_N.mean().square()


def _mean(routings: Sequence[Routing], loss: Callable[[Routing], Tensor]) -> Tensor:
    if not routings:
        raise VimoeError("no routing was recorded: run a model with MoE layers inside vimoe.record() first")
    return torch.stack([loss(routing) for routing in routings]).mean()
