"""Changes of the routers between training steps: a bias that evens the load, and decisions at random.

Axes: N experts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vimoe.errors import VimoeError
from vimoe.moe import Routing
from vimoe.moe.layer import moe_layers
from vimoe.process import Process


@torch.no_grad()
def update_bias(model: nn.Module, routings: Iterable[Routing], over: Process | None = None) -> None:
    """Update the choice bias of each layer that has one: b_i += rate * sign(mean load - load_i).

    Call it after an update of the weights. Loss-free balancing: Wang et al., arXiv 2408.15664, algorithm 1, here on
    softmax probabilities. The load is summed over all records of a layer, so with gradient accumulation pass those of
    all its steps. Image routing counts images, token routing tokens. The mean is that of an expert's pool
    (`MoEConfig.groups`). Layers without a bias (`MoEConfig.bias_update_rate` of 0) are passed over.

    Args:
        model: the model that was recorded.
        routings: records that `vimoe.record(model)` collected since the last update.
        over: processes that train the model together, whose loads are summed; by default this one alone.

    Raises:
        VimoeError: if the model does not have the layer of a record.

    >>> import timm, torch, vimoe
    >>> config = vimoe.MoEConfig(layers="last:1", num_experts=4, bias_update_rate=0.001)
    >>> model = vimoe.upcycle(timm.create_model("test_vit"), config)
    >>> with vimoe.record(model) as routings:
    ...     logits = model(torch.randn(2, 3, 160, 160))
    >>> vimoe.update_bias(model, routings)  # after optimizer.step()
    """
    layers, loads = moe_layers(model), dict[str, Tensor]()
    for routing in routings:
        if routing.layer not in layers:
            raise VimoeError(
                f"a routing of layer {routing.layer!r}: expected one of {', '.join(layers) or 'none'}; pass the model "
                f"that was recorded"
            )
        if layers[routing.layer].router.choice_bias is not None:
            load_N = routing.load
            loads[routing.layer] = loads[routing.layer] + load_N if routing.layer in loads else load_N
    for name, load_N in loads.items():
        router, load_N = layers[name].router, load_N if over is None else over.sum(load_N)
        assert router.choice_bias is not None
        pools = load_N.split(router.config.pools)  # of kinds that may have very different numbers of tokens
        below_N = torch.cat([(own.sum() - len(own) * own).sign() for own in pools])  # in whole numbers, so even is 0
        router.choice_bias += router.config.bias_update_rate * below_N


def set_random_share(model: nn.Module, share: float) -> None:
    """Set the share of the decisions that is taken at random in training: k distinct experts, all alike likely.

    So every expert is trained before a router has an opinion. Gates are the router's probabilities of these experts,
    so it learns meanwhile. In eval mode nothing is random.

    Args:
        model: a model with MoE layers, or without.
        share: 0 to 1; leave the model with 0.

    Raises:
        VimoeError: if the share is another, or the decisions of a router cannot be random.

    >>> import timm, vimoe
    >>> model = vimoe.upcycle(timm.create_model("test_vit"), vimoe.MoEConfig(layers="last:1", num_experts=4))
    >>> for epoch in range(3):
    ...     vimoe.set_random_share(model, 1 - epoch / 2)  # 1, 0.5, 0
    """
    if not 0 <= share <= 1:
        raise VimoeError(f"share={share}: expected 0 to 1")
    for layer in moe_layers(model).values():
        router = layer.router
        if share and not router.adjustable:
            raise VimoeError(
                f"share={share:g} with moe.router={router.config.router!r}: expected 0, its decisions cannot be "
                f"random; set train.router_warmup_epochs=0"
            )
        if not share:
            router.random_share = None
        elif router.random_share is None:
            router.random_share = torch.tensor(float(share), device=router.weight.device)
        else:
            router.random_share.fill_(share)
