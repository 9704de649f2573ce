"""All experts at work: a teacher of the model that runs a few of them.

Axes: R rows that are routed (images or tokens), N experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from vimoe.moe.layer import moe_layers
from vimoe.moe.router import Router
from vimoe.moe.routing import Routing


@contextmanager
def all_experts(model: nn.Module) -> Iterator[None]:
    """Let all experts of each MoE layer compute inside the block, weighted by the router's probabilities.

    A layer then computes S(x) + sum_i p_i (E_i(x) - S(x)) with combine="mix", and so on with i from 1 to N: the expert
    ensemble of arXiv 2604.13508. The p_i are `Router.probabilities`, divided by their sum, whatever the gate is. A
    router without gates of chosen experts (`Router.gated`) decides as it always does. Copy a model before the block:
    a copy that is made inside would ask the original's routers for good.

    >>> import timm, torch, vimoe
    >>> model = vimoe.upcycle(timm.create_model("test_vit"), vimoe.MoEConfig(layers="last:1", num_experts=4))
    >>> with vimoe.all_experts(model), vimoe.record(model) as routings:
    ...     logits = model(torch.randn(2, 3, 160, 160))
    >>> routings[0].experts.shape[1]
    4
    """
    with ExitStack() as stack:
        for layer in moe_layers(model).values():
            if layer.router.gated and "route" not in vars(layer.router):  # else an outer block does it
                stack.enter_context(_choosing_all(layer.router))
        yield


@contextmanager
def _choosing_all(router: Router) -> Iterator[None]:
    def decide(logits_RN: Tensor, batch: tuple[int, int]) -> Routing:
        own_RN = router.probabilities(logits_RN)
        gates_RN = own_RN / own_RN.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(own_RN.dtype).tiny)
        experts_RN = torch.arange(logits_RN.shape[1], device=logits_RN.device).expand(gates_RN.shape)
        return Routing(logits_RN, gates_RN, experts_RN, router.config.routing, batch)

    router.route = decide  # type: ignore[method-assign]
    try:
        yield
    finally:
        del router.route
