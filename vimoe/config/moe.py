"""Which FFNs become mixtures of experts, and of what kind."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

from vimoe.config.checks import check_choice, check_count, check_flags, check_range
from vimoe.config.layers import Layers
from vimoe.errors import ConfigError, nearest

RoutedUnit = Literal["image", "token"]
Combine = Literal["mix", "sum"]


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Which FFNs become mixtures of experts, and of what kind. Nothing here depends on the backbone.

    Args:
        layers: which blocks: "all", "none", "last:2", "every:2" (blocks 1, 3, 5, ...), a list of block
            indices (0 is the first block with an FFN, -1 the last), or module-name patterns ("blocks.1?.mlp").
        num_experts: routed experts N of a layer, each of the FFN's own shape. 0 makes no mixture but a dense
            FFN of num_shared_experts times the width: the control with equal activated parameters.
        top_k: experts k that one image or token is sent to.
        routing: "image" takes one decision for all tokens of an image, "token" one for each.
        num_shared_experts: n experts that every token passes; n of them are one FFN of n times the width.
        combine: "mix" is S(x) + sum g_i (E_i(x) - S(x)), "sum" is S(x) + sum g_i E_i(x) (the ViMoE paper).
        normalize_gates: divide the gates by their sum over the chosen experts; goes with "sum".
        router_noise: in training, normal noise on the router's scores, its standard deviation in units of
            1 / num_experts (V-MoE, arXiv 2106.05974, has 1).
        bias_update_rate: step by which each update of the weights moves a bias on the choice of experts, up for
            experts with less than the mean load and down for those with more; gates stay without it (loss-free
            balancing, arXiv 2408.15664, has 0.001). 0 makes no bias.
        expert_dropout: dropout rate on the hidden units of the routed experts in training (Switch Transformers,
            arXiv 2101.03961, section 2.4); where the FFN has a larger one of its own, that one holds.

    Raises:
        ConfigError: for a value outside of these, or values that contradict one another.

    >>> import vimoe
    >>> vimoe.MoEConfig(layers="last:2", num_experts=4, routing="token").to_dict()["num_experts"]
    4
    """

    layers: str | tuple[int | str, ...] = "last:2"
    num_experts: int = 8
    top_k: int = 1
    routing: RoutedUnit = "image"
    num_shared_experts: int = 1
    combine: Combine = "mix"
    normalize_gates: bool = False
    router_noise: float = 0.0
    bias_update_rate: float = 0.0
    expert_dropout: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", self.selection.written)  # a list becomes a tuple
        check_choice("routing", self.routing, get_args(RoutedUnit))
        check_choice("combine", self.combine, get_args(Combine))
        check_count("num_experts", self.num_experts, 0)
        check_count("num_shared_experts", self.num_shared_experts, 0)
        check_count("top_k", self.top_k, 1)
        check_range("router_noise", self.router_noise, 0)
        check_range("bias_update_rate", self.bias_update_rate, 0.0, 1.0)
        check_range("expert_dropout", self.expert_dropout, 0.0, 0.99)
        check_flags(self, "normalize_gates")
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
        """Whether the gates of the chosen experts are divided by their sum."""
        return self.normalize_gates or (self.combine == "mix" and self.num_shared_experts == 0)

    @property
    def router_is_blind(self) -> bool:
        """Whether the task loss can never train the router, because the only gate is always 1."""
        return self.num_experts == 1 or (self.num_experts > 1 and self.top_k == 1 and self.gates_sum_to_one)

    def to_dict(self) -> dict[str, Any]:
        """These settings as JSON knows them."""
        values = asdict(self)
        if isinstance(self.layers, tuple):
            values["layers"] = list(self.layers)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MoEConfig:
        """The inverse of `to_dict`. Raises ConfigError for a name that is no setting."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"unknown MoE setting {name!r}: {nearest(name, known)}")
        return cls(**values)
