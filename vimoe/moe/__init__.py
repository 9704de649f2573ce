"""The mixture-of-experts layer: a router decides, experts compute, the layer combines."""

from vimoe.moe.layer import MoE
from vimoe.moe.routing import Routing, record

__all__ = ["MoE", "Routing", "record"]
