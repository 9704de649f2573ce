"""Kinds of tokens that a caller knows and an image does not tell, such as text and image of a fused model.

Axes: B images, T tokens of an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from vimoe.errors import VimoeError
from vimoe.moe.layer import moe_layers


@contextmanager
def token_kinds(model: nn.Module, kinds: Tensor) -> Iterator[None]:
    """Say which kind each token is of, for the layers with `moe.groups` that run inside of the block.

    A token of kind j gets experts of pool j. A ViT whose tokens are prefix tokens and patches needs no such block, and
    inside of one these kinds hold instead. A model that computes blocks again in the backward pass (gradient
    checkpointing) needs that pass inside of it too. Where processes share a loss (`over`), each needs all kinds.

    Args:
        model: a model with MoE layers that all get the same tokens.
        kinds: kind of each token, 0 for the first pool: integers (T,) for all images alike, or (B, T).

    Raises:
        VimoeError: if the model has no pools, or a kind has none; a layer raises it for tokens of another number.

    >>> import torch, vimoe
    >>> from timm.layers import Mlp
    >>> from vimoe.moe.router import TokenLayout
    >>> config = vimoe.MoEConfig(num_experts=4, groups=[1, 3], routing="token")
    >>> layer = vimoe.MoE(Mlp(16, 32), config, TokenLayout(num_prefix_tokens=0, class_token=False))
    >>> with vimoe.token_kinds(layer, torch.tensor([0, 0, 1])), vimoe.record(layer) as routings:
    ...     y = layer(torch.randn(2, 3, 16))
    >>> (routings[0].experts[:, 0] > 0).tolist()
    [False, False, True, False, False, True]
    """
    routers = [layer.router for layer in moe_layers(model).values() if len(layer.config.pools) > 1]
    pools = min((len(router.config.pools) for router in routers), default=0)
    if not pools:
        raise VimoeError("a model without pools of experts: expected MoE layers with moe.groups; set it")
    if kinds.is_floating_point() or kinds.numel() == 0 or not 0 <= int(kinds.min()) <= int(kinds.max()) < pools:
        raise VimoeError(
            f"kinds of tokens {tuple(kinds.shape)}, {kinds.dtype}: expected integers from 0 to {pools - 1}"
        )
    before = [router.kinds for router in routers]
    for router in routers:
        router.kinds = kinds
    try:
        yield
    finally:
        for router, kind in zip(routers, before, strict=True):
            router.kinds = kind
