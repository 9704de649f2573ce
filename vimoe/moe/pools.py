"""Pools of experts, to which tokens are confined by their kind (`moe.groups`).

Axes: B images, T tokens of an image, D channels, R = B * T rows, N experts.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from vimoe.config.moe import MoEConfig
from vimoe.errors import VimoeError


def pool_of_experts(config: MoEConfig, device: torch.device) -> Tensor:
    """Return (N,) int64, the pool of each expert."""
    expert_N = torch.arange(config.num_experts, device=device)
    pool_N = torch.zeros_like(expert_N)
    for first in accumulate(config.pools[:-1]):  # of the pools after the first
        pool_N = pool_N + (expert_N >= first)
    return pool_N


def kinds_of(config: MoEConfig, num_prefix_tokens: int, given: Tensor | None, x_BTD: Tensor) -> Tensor:
    """Return (R,) int64 the kind of each token: as `token_kinds` says, else 0 for prefix tokens and 1 for patches.

    Raises:
        VimoeError: if kinds are not known, or of other tokens.
    """
    images, tokens, _ = x_BTD.shape
    if given is None:
        if not num_prefix_tokens:
            raise VimoeError(
                f"groups={list(config.pools)} and tokens whose kinds are not known: expected a forward inside of "
                f"vimoe.token_kinds(model, kinds)"
            )
        kinds = (torch.arange(tokens, device=x_BTD.device) >= num_prefix_tokens).long()
    elif given.shape not in ((tokens,), (images, tokens)):
        raise VimoeError(
            f"kinds of tokens {tuple(given.shape)} for {images} images of {tokens} tokens: expected ({tokens},) or "
            f"({images}, {tokens})"
        )
    else:
        kinds = given.to(x_BTD.device).long()
    return kinds.expand(images, tokens).reshape(images * tokens)
