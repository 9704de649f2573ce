"""Settings of MoE layers: the FFNs that become mixtures of experts, their routers and their experts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal

from vimoe.config.checks import bounded, check_fields
from vimoe.config.layers import Layers
from vimoe.config.registry import Registry
from vimoe.errors import ConfigError, nearest

RoutedUnit = Literal["image", "token"]
Combine = Literal["mix", "sum"]


ROUTERS = Registry("moe.router", {"softmax": "vimoe.moe.softmax_router:SoftmaxRouter"})


EXPERTS = Registry("moe.experts", {"ffn": "vimoe.moe.stacked_ffns:StackedFFNs"})


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Settings of MoE layers. Nothing here depends on the backbone.

    Args:
        layers: blocks to convert: "all", "none", "last:2", "every:2" (blocks 1, 3, 5, ...), a list of block
            indices (0 is the first block with an FFN, -1 the last), or module-name patterns ("blocks.1?.mlp").
        num_experts: number of routed experts N of a layer, each of the FFN's own shape. 0 makes no mixture but a dense
            FFN of num_shared_experts times the width: the control with equal activated parameters.
        top_k: number of experts for each image or token. Another router may define it differently; at least top_k
            experts always remain.
        routing: "image" takes one decision for all tokens of an image, "token" one for each.
        num_shared_experts: number of experts that every token passes; n of them are one FFN of n times the width.
        combine: "mix" is S(x) + sum g_i (E_i(x) - S(x)), "sum" is S(x) + sum g_i E_i(x) (the ViMoE paper).
        normalize_gates: divide the gates by their sum over the chosen experts; goes with "sum".
        router_noise: standard deviation, in units of 1 / num_experts, of normal noise on the router's scores in
            training (V-MoE, arXiv 2106.05974, has 1).
        bias_update_rate: step by which each update of the weights moves a bias on the choice of experts, up for
            experts with less than the mean load and down for those with more; gates stay without it (loss-free
            balancing, arXiv 2408.15664, has 0.001). 0 makes no bias.
        expert_dropout: dropout rate on the hidden units of the routed experts in training (Switch Transformers,
            arXiv 2101.03961, section 2.4); a larger rate of the FFN itself is kept.
        router: kind of the router, a name in `ROUTERS`; "softmax" sends each to the k experts of largest probability.
        experts: kind of the experts, a name in `EXPERTS`; "ffn" gives each expert weights of its own.

    Raises:
        ConfigError: if a value is none of these, or values contradict one another.

    >>> import vimoe
    >>> vimoe.MoEConfig(layers="last:2", num_experts=4, routing="token").to_dict()["num_experts"]
    4
    """

    layers: str | tuple[int | str, ...] = "last:2"
    num_experts: int = bounded(8, 0)
    top_k: int = bounded(1, 1)
    routing: RoutedUnit = "image"
    num_shared_experts: int = bounded(1, 0)
    combine: Combine = "mix"
    normalize_gates: bool = False
    router_noise: float = bounded(0.0, 0)
    bias_update_rate: float = bounded(0.0, 0, 1)
    expert_dropout: float = bounded(0.0, 0, 0.99)
    router: str = "softmax"
    experts: str = "ffn"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", self.selection.written)  # a list becomes a tuple
        check_fields(self)
        ROUTERS.check(self.router)
        EXPERTS.check(self.experts)
        if self.num_experts == 0 and self.num_shared_experts < 2:
            raise ConfigError(
                f"num_experts=0 makes a dense FFN of num_shared_experts times the width: expected "
                f"num_shared_experts of at least 2, got {self.num_shared_experts}; for the parent use layers='none'"
            )
        if self.num_experts and self.top_k > self.num_experts:
            raise ConfigError(f"top_k={self.top_k}: expected at most num_experts={self.num_experts}; lower top_k")
        if self.normalize_gates and self.combine == "mix":
            raise ConfigError(
                "normalize_gates=True with combine='mix': normalised gates would leave nothing of the shared "
                "expert (without one they are normalised already); drop it, or use combine='sum'"
            )

    @cached_property
    def selection(self) -> Layers:
        """`layers`, parsed."""
        return Layers.parse(self.layers)

    @property
    def gates_sum_to_one(self) -> bool:
        """True if the softmax router divides the gates of the chosen experts by their sum."""
        return self.normalize_gates or (self.combine == "mix" and self.num_shared_experts == 0)

    def to_dict(self) -> dict[str, Any]:
        """Return these settings as JSON knows them."""
        values = asdict(self)
        if isinstance(self.layers, tuple):
            values["layers"] = list(self.layers)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MoEConfig:
        """Return the settings that `to_dict` gave. Raises ConfigError for a name that is no setting."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"unknown MoE setting {name!r}: {nearest(name, known)}")
        return cls(**values)
