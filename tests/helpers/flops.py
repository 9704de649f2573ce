"""Multiply-adds of a computation, counted as it runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which torch 2.11 does not count


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    heads = query[1]  # that of keys and values, once grouped ones are repeated; torch 2.11 counts equal numbers only
    return sdpa_flop_count(query, (key[0], heads, *key[2:]), (value[0], heads, *value[2:]))


def macs(compute: Callable[..., object], *args: Tensor) -> int:
    with FlopCounterMode(display=False, custom_mapping={_ON_CPU: _attention}) as counter:
        compute(*args)
    return counter.get_total_flops() // 2
