"""vimoe: a Vision Transformer becomes a sparse mixture of experts, and back.

Names are resolved when they are used, so that `import vimoe` and `vimoe.MoEConfig` cost no import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vimoe.accounting import count as count
    from vimoe.analysis import analyze as analyze
    from vimoe.config import MoEConfig as MoEConfig
    from vimoe.errors import VimoeError as VimoeError
    from vimoe.execution import optimize as optimize
    from vimoe.execution import set_backend as set_backend
    from vimoe.folder import load as load
    from vimoe.folder import save as save
    from vimoe.losses import balance_loss as balance_loss
    from vimoe.losses import importance_loss as importance_loss
    from vimoe.losses import router_z_loss as router_z_loss
    from vimoe.moe.layer import MoE as MoE
    from vimoe.moe.routing import Routing as Routing
    from vimoe.moe.routing import record as record
    from vimoe.pruning import prune as prune
    from vimoe.steering import set_random_share as set_random_share
    from vimoe.steering import update_bias as update_bias
    from vimoe.upcycling import densify as densify
    from vimoe.upcycling import plan as plan
    from vimoe.upcycling import upcycle as upcycle

__version__ = "0.1.0"

_HOME = {
    "MoEConfig": "config",
    "VimoeError": "errors",
    "MoE": "moe.layer",
    "Routing": "moe.routing",
    "record": "moe.routing",
    "balance_loss": "losses",
    "router_z_loss": "losses",
    "importance_loss": "losses",
    "count": "accounting",
    "plan": "upcycling",
    "upcycle": "upcycling",
    "densify": "upcycling",
    "update_bias": "steering",
    "set_random_share": "steering",
    "optimize": "execution",
    "set_backend": "execution",
    "save": "folder",
    "load": "folder",
    "analyze": "analysis",
    "prune": "pruning",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vimoe' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"vimoe.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
