"""vimoe: a Vision Transformer becomes a sparse mixture of experts, and back.

Names are resolved when they are used, so that `import vimoe` and `vimoe.MoEConfig` cost no import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vimoe.analysis.analyze import analyze as analyze
    from vimoe.analysis.diagnose import diagnose as diagnose
    from vimoe.analysis.pruning import prune as prune
    from vimoe.config.moe import MoEConfig as MoEConfig
    from vimoe.errors import VimoeError as VimoeError
    from vimoe.models.cost import count as count
    from vimoe.models.export.folder import export as export
    from vimoe.models.inference import optimize as optimize
    from vimoe.models.inference import set_backend as set_backend
    from vimoe.models.model_folder import load as load
    from vimoe.models.model_folder import save as save
    from vimoe.models.parent_weights import load_parent_weights as load_parent_weights
    from vimoe.models.push import push_to_hub as push_to_hub
    from vimoe.models.reading import set_reading as set_reading
    from vimoe.models.upcycling import densify as densify
    from vimoe.models.upcycling import plan as plan
    from vimoe.models.upcycling import upcycle as upcycle
    from vimoe.moe.balancing import set_random_share as set_random_share
    from vimoe.moe.balancing import update_bias as update_bias
    from vimoe.moe.ensemble import all_experts as all_experts
    from vimoe.moe.kinds import token_kinds as token_kinds
    from vimoe.moe.layer import MoE as MoE
    from vimoe.moe.losses import balance_loss as balance_loss
    from vimoe.moe.losses import distill_loss as distill_loss
    from vimoe.moe.losses import entropy_loss as entropy_loss
    from vimoe.moe.losses import importance_loss as importance_loss
    from vimoe.moe.losses import mutual_loss as mutual_loss
    from vimoe.moe.losses import orthogonal_loss as orthogonal_loss
    from vimoe.moe.losses import router_z_loss as router_z_loss
    from vimoe.moe.losses import variance_loss as variance_loss
    from vimoe.moe.routing import Routing as Routing
    from vimoe.moe.routing import record as record

__version__ = "0.1.0"

_HOME = {
    "MoEConfig": "config.moe",
    "VimoeError": "errors",
    "MoE": "moe.layer",
    "Routing": "moe.routing",
    "record": "moe.routing",
    "balance_loss": "moe.losses",
    "router_z_loss": "moe.losses",
    "importance_loss": "moe.losses",
    "entropy_loss": "moe.losses",
    "variance_loss": "moe.losses",
    "mutual_loss": "moe.losses",
    "orthogonal_loss": "moe.losses",
    "distill_loss": "moe.losses",
    "all_experts": "moe.ensemble",
    "token_kinds": "moe.kinds",
    "count": "models.cost",
    "plan": "models.upcycling",
    "upcycle": "models.upcycling",
    "densify": "models.upcycling",
    "update_bias": "moe.balancing",
    "set_random_share": "moe.balancing",
    "set_reading": "models.reading",
    "optimize": "models.inference",
    "set_backend": "models.inference",
    "save": "models.model_folder",
    "load": "models.model_folder",
    "export": "models.export.folder",
    "load_parent_weights": "models.parent_weights",
    "push_to_hub": "models.push",
    "analyze": "analysis.analyze",
    "diagnose": "analysis.diagnose",
    "prune": "analysis.pruning",
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
