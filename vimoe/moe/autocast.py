"""Autocast in the layer: tokens are cast once, and what has to be exact is not cast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def in_type_of_autocast(x: Tensor) -> Tensor:
    """Return x in the type that torch's own products cast it to under an autocast; float64 stays."""
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(x.device.type)) if autocast else x


def own_type(x: Tensor) -> AbstractContextManager[object]:
    """Return a context that computes with x as it is. A backward pass may run under an autocast, too."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
