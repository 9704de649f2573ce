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


RouterGradient = Literal["chosen", "default_vectors", "dense"]
BalanceOver = Literal["global", "process"]
Orthogonal = Literal["none", "outputs", "normalized"]

ROUTERS = Registry(
    "moe.router",
    {
        "softmax": "vimoe.moe.routers.softmax:SoftmaxRouter",
        "sigmoid": "vimoe.moe.routers.sigmoid:SigmoidRouter",
        "cosine": "vimoe.moe.routers.cosine:CosineRouter",
        "expert_choice": "vimoe.moe.routers.expert_choice:ExpertChoiceRouter",
        "soft": "vimoe.moe.routers.soft:SoftRouter",
        "smear": "vimoe.moe.routers.smear:SmearRouter",
        "hash": "vimoe.moe.routers.hash:HashRouter",
        "random": "vimoe.moe.routers.random:RandomRouter",
        "centroids": "vimoe.moe.routers.centroids:CentroidRouter",
        "superclass": "vimoe.moe.routers.superclass:SuperclassRouter",
    },
)
GATES = Registry(
    "moe.gate",
    {
        "probability": "vimoe.moe.gates:Gate",
        "choice": "vimoe.moe.gates:ChoiceGate",
        "sigmoid": "vimoe.moe.gates:SigmoidGate",
    },
)
EXPERTS = Registry(
    "moe.experts",
    {
        "ffn": "vimoe.moe.stacked_ffns:StackedFFNs",
        "lora": "vimoe.moe.low_rank:LoRAExperts",
        "delta": "vimoe.moe.sparse_deltas:DeltaExperts",
        "adapter": "vimoe.moe.adapters:AdapterExperts",
    },
)
STARTS = Registry(
    "moe.init",
    {
        "copy": "vimoe.moe.start:Start",
        "drop": "vimoe.moe.starts.drop:Drop",
        "noise": "vimoe.moe.starts.noise:Noise",
        "split": "vimoe.moe.starts.split:Split",
        "cluster": "vimoe.moe.starts.cluster:Cluster",
    },
)

# settings that some kinds alone read: the setting that names the kind, and these kinds
_READ_BY: dict[str, tuple[str, tuple[str, ...]]] = {
    "gate_weight": ("gate", ("choice",)),
    "drop_ratio": ("init", ("drop",)),
    "noise_std": ("init", ("noise",)),
    "cluster_energy": ("init", ("cluster",)),
    "rank": ("experts", ("lora", "adapter")),
    "delta_density": ("experts", ("delta",)),
    "orthogonal": ("experts", ("lora", "delta", "adapter")),
    "slots_per_expert": ("router", ("soft",)),
}
_KINDS = {"gate": GATES, "init": STARTS, "experts": EXPERTS, "router": ROUTERS}
_BUILT_IN = {setting: frozenset(kinds) for setting, kinds in _KINDS.items()}


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Settings of MoE layers. Nothing here depends on the backbone.

    Args:
        layers: blocks to convert: "all", "none", "last:2", "every:2" (blocks 1, 3, 5, ...), a list of block
            indices (0 is the first block with an FFN, -1 the last), or module-name patterns ("blocks.1?.mlp").
        num_experts: number of routed experts N of a layer, each as wide as the FFN unless `expert_width` is set. 0
            makes no mixture but a dense FFN of num_shared_experts times the width: the control with equal activated
            parameters. It reads no setting of routed experts.
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
        balance_over: rows that the balance, importance and variance losses are of, where several processes train:
            "global" takes the whole batch, as one process would; "process" each process's share of it, which asks for
            an even load in every share and lets experts specialise less (arXiv 2501.11873).
        expert_dropout: dropout rate on the hidden units of the routed experts in training (Switch Transformers,
            arXiv 2101.03961, section 2.4); a larger rate of the FFN itself is kept.
        router: kind of the router: "softmax" sends each to the k experts of largest probability; "sigmoid" and
            "cosine" have other scores; with "expert_choice" experts choose tokens; "soft" and "smear" mix instead of
            choosing; "hash" and "random" are fixed; "centroids" and "superclass" start from training images. Or a name
            that your code has added to `ROUTERS`. The formulas of all kinds are in docs/guides/routers.md.
        gate: weight of the chosen experts: "probability" is the router's own; "choice" lets them weigh `gate_weight`
            together, whatever the scores; "sigmoid" is a sigmoid of each expert's own score. Or a name in `GATES`.
        gate_weight: weight of the chosen experts together, with gate="choice"; by default 0.5 with a shared expert and
            1 without, or with `normalize_gates`. A weight of 1 leaves the shared expert of a "mix" without a gradient.
        router_gradient: outputs that train the router: "chosen" experts', with "default_vectors" also each other
            expert's mean output (after Default MoE, arXiv 2504.12463), or with "dense" also all other experts' own
            outputs (DenseMixer). The last two change gradients alone, not what the layer computes.
        experts: kind of the experts: "ffn" gives each expert weights of its own; "lora" (low rank), "delta" (sparse)
            and "adapter" give it a small change of one FFN that all share. Or a name in `EXPERTS`.
        init: start of the experts: "copy" makes all of them copies of the dense FFN; "noise" adds noise to the copies;
            "drop" draws a part of their hidden units anew; "split" cuts the FFN into pieces; "cluster" cuts it to what
            clusters of training images need. Or a name in `STARTS`.
        drop_ratio: share of each expert's hidden units that init="drop" draws anew.
        noise_std: standard deviation of the noise of init="noise", relative to that of each matrix.
        cluster_energy: share of the squared norm, weighted by the data, that init="cluster" keeps of each matrix.
        calibration_images: number of training images from which a start or a router is computed, where one needs some.
        rank: rank of the changes of "lora" experts, and number of hidden units of "adapter" experts.
        delta_density: share of the weights that "delta" experts change.
        expert_width: number of hidden units of an expert; by default that of the FFN. Each expert gets a part of the
            FFN's hidden units (fine-grained experts: DeepSeekMoE, arXiv 2401.06066).
        slots_per_expert: number of mixtures of tokens that each expert of a "soft" router gets from an image.
        orthogonal: "outputs" makes the changes E_i(x) - S(x) of a token's experts orthogonal to one another, by
            Gram-Schmidt in the order of their gates (after OMoE, arXiv 2501.10062); "normalized" gives them unit length
            too (after MOORE, arXiv 2311.11385). For experts that change one shared expert, and top_k of at least 2.
        groups: sizes of the pools that the experts are parted into, in their order, such as [2, 6]: tokens of kind j
            are confined to pool j (V-experts and T-experts of VL-MoE, arXiv 2303.07226). In a ViT the kinds are prefix
            tokens (class token, registers) and patches; in another model `vimoe.token_kinds` says them.
        capacity_factor: C, by which an expert gets at most ceil(C k T / N) of the T tokens of an image, in training and
            inference; tokens with the largest gates come first, and what is left over gets the shared expert alone
            (batch-prioritized routing, V-MoE, arXiv 2106.05974). None is no limit.

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
    balance_over: BalanceOver = "global"
    expert_dropout: float = bounded(0.0, 0, 0.99)
    router: str = "softmax"
    gate: str = "probability"
    gate_weight: float | None = bounded(None, 0.001)
    router_gradient: RouterGradient = "chosen"
    experts: str = "ffn"
    init: str = "copy"
    drop_ratio: float = bounded(0.5, 0, 1)
    noise_std: float = bounded(0.1, 0)
    cluster_energy: float = bounded(0.95, 0.01, 1)
    calibration_images: int = bounded(2048, 2)
    rank: int = bounded(16, 1)
    delta_density: float = bounded(0.001, 0, 1)
    expert_width: int | None = bounded(None, 1)
    slots_per_expert: int = bounded(1, 1)
    orthogonal: Orthogonal = "none"
    groups: tuple[int, ...] | None = None
    capacity_factor: float | None = bounded(None, 0.01)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", self.selection.written)  # a list becomes a tuple
        check_fields(self)
        for setting, kinds in _KINDS.items():
            kinds.check(getattr(self, setting))
        self._check_readers()
        if self.num_experts == 0 and self.num_shared_experts < 2:
            raise ConfigError(
                f"num_experts=0 makes a dense FFN of num_shared_experts times the width: expected "
                f"num_shared_experts of at least 2, got {self.num_shared_experts}; for the parent use layers='none'"
            )
        if self.num_experts and self.top_k > self.num_experts:
            raise ConfigError(f"top_k={self.top_k}: expected at most num_experts={self.num_experts}; lower top_k")
        if self.groups is not None:
            self._check_groups(self.groups)
        if self.capacity_factor is not None and self.routing != "token":
            raise ConfigError(
                f"capacity_factor={self.capacity_factor:g} with routing={self.routing!r}: expected routing='token', "
                f"since a capacity is of the tokens of an image; set it, or leave capacity_factor out"
            )
        if self.gate == "choice" and self.gates_sum_to_one and self.choice_weight != 1:
            raise ConfigError(
                f"gate_weight={self.gate_weight:g} where the gates of the chosen experts sum to 1: expected 1; leave "
                f"it out, or use a shared expert"
            )
        if self.normalize_gates and self.combine == "mix":
            raise ConfigError(
                "normalize_gates=True with combine='mix': normalised gates would leave nothing of the shared "
                "expert (without one they are normalised already); drop it, or use combine='sum'"
            )
        if self.normalize_gates and self.router == "soft":
            raise ConfigError(
                "normalize_gates=True with router='soft': its weights of a token sum to 1 already; leave it out"
            )
        if self.orthogonal != "none":
            self._check_orthogonal()

    def _check_groups(self, groups: Any) -> None:
        """Raise ConfigError for pools that are no partition of the experts; a list of their sizes becomes a tuple."""
        listed = isinstance(groups, (list, tuple)) and not any(isinstance(size, bool) for size in groups)
        if not listed or not groups or not all(isinstance(size, int) and size >= self.top_k for size in groups):
            raise ConfigError(
                f"groups={groups!r}: expected a list of the sizes of pools, each at least top_k={self.top_k}, such as "
                f"[2, 6]"
            )
        object.__setattr__(self, "groups", tuple(groups))
        if sum(groups) != self.num_experts:
            raise ConfigError(
                f"groups={list(groups)} with num_experts={self.num_experts}: expected sizes that add up to it; set "
                f"num_experts={sum(groups)}"
            )
        if self.routing != "token":
            raise ConfigError(
                f"groups={list(groups)} with routing={self.routing!r}: expected routing='token', since pools are of "
                f"kinds of tokens; set it, or leave groups out"
            )

    def _check_orthogonal(self) -> None:
        """Raise ConfigError for settings by which a token has no changes to make orthogonal."""
        needed = {
            "top_k": (self.top_k > 1, "at least 2, since a single output has none to be orthogonal to"),
            "num_shared_experts": (self.num_shared_experts == 1, "1, the one that all experts change"),
            "router_gradient": (
                self.router_gradient == "chosen",
                "'chosen', since an output is orthogonal to chosen ones",
            ),
        }
        for name, (right, expected) in needed.items():
            if not right:
                raise ConfigError(
                    f"orthogonal={self.orthogonal!r} with {name}={getattr(self, name)!r}: expected {expected}; set it, "
                    f"or leave orthogonal out"
                )

    def _check_readers(self) -> None:
        """Raise ConfigError for a setting that the chosen kind does not read. Kinds of others may read any."""
        for each in fields(self):
            setting, readers = _READ_BY.get(each.name, ("", ()))
            if not setting or getattr(self, each.name) == each.default:
                continue
            kind = getattr(self, setting)
            if kind in _BUILT_IN[setting] and kind not in readers:
                raise ConfigError(
                    f"{each.name}={getattr(self, each.name)!r} with {setting}={kind!r}: expected it with "
                    f"{setting}={' or '.join(map(repr, readers))} only; leave it out"
                )

    @cached_property
    def selection(self) -> Layers:
        """`layers`, parsed."""
        return Layers.parse(self.layers)

    @property
    def choice_weight(self) -> float:
        """Weight of the chosen experts together, with gate="choice"."""
        divided = self.num_shared_experts == 0 or self.gates_sum_to_one
        return self.gate_weight or (1.0 if divided else 0.5)

    @property
    def gates_sum_to_one(self) -> bool:
        """True if the gates of the chosen experts are divided by their sum."""
        return self.normalize_gates or (self.combine == "mix" and self.num_shared_experts == 0)

    @property
    def pools(self) -> tuple[int, ...]:
        """Sizes of the pools of experts; without `groups` there is one of all."""
        return self.groups or (self.num_experts,)

    def to_dict(self) -> dict[str, Any]:
        """Return these settings as JSON knows them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MoEConfig:
        """Return the settings that `to_dict` gave. Raises ConfigError for a name that is no setting."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"unknown MoE setting {name!r}: {nearest(name, known)}")
        return cls(**values)
