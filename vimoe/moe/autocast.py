"""What an autocast means to the layer: its tokens are cast once, and what has to be exact stays so."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def in_type_of_autocast(x: Tensor) -> Tensor:
    """What torch's own products make of their input under an autocast: not of float64."""
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(x.device.type)) if autocast else x


def own_type(x: Tensor) -> AbstractContextManager[object]:
    """A context in which x is computed with as it is. A backward pass may run under an autocast, too."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
