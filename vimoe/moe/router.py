"""The contract of a router: scores in, decisions out; and the scores that all routers share.

Axes: B images, T tokens of an image, D channels, R rows that are routed (B images, or B * T tokens), N experts, K slots
of a row.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from vimoe.config.moe import EXPERTS, GATES, MoEConfig, RoutedUnit
from vimoe.errors import ConfigError, VimoeError
from vimoe.moe.autocast import own_type
from vimoe.moe.chunks import chunks
from vimoe.moe.experts import Experts
from vimoe.moe.pools import kinds_of, pool_of_experts
from vimoe.moe.routing import Routing

INIT_STD = 0.02  # as ViTs initialise their linear maps; zero would send every image to the same expert


@dataclass(frozen=True)
class TokenLayout:
    """Tokens of a ViT that are no patches. An FFN cannot know them; surgery tells the router.

    Attributes:
        num_prefix_tokens: number of tokens before the patches.
        class_token: True if the first token is the class token.
    """

    num_prefix_tokens: int
    class_token: bool


class Router(nn.Module):
    """Base of all routers: N scores of the routed feature, by default a linear map, and decisions by a subclass.

    With "image" routing the feature is the class token where the model has one, else the mean of the patch tokens
    (ViMoE, section 3). Scores and gates are float32 at least, whatever the autocast. The tokens are rounded as the
    experts see them, to the type of the autocast (the selective precision of Switch Transformer, section 2.4). Where
    torch may compute float32 products in TF32, these are too.

    In training `router_noise` moves the scores that `decide` gets. A `Routing` records the scores without noise: losses
    shape what the router thinks (V-MoE's importance loss, too, is of these).

    A router kind is a subclass with `decide`, and an entry in `vimoe.config.moe.ROUTERS`. The contract:

    - A score of -inf keeps an expert from being chosen: analysis and pruning rule experts out by it, and `moe.groups`
      confines tokens to the experts of their pool. A router that is `even` or `needs_images` is refused pools.
    - The decisions for an image depend on that image alone, never on the others in its batch. A router that limits
      the capacity of experts does so image by image; `by_image` gives the view, and `tokens_interact` says so.
    - Every row has K = `slots` slots. A router that can leave slots empty says `ragged`; `assign` fills them.
    - A ragged router whose rows get fewer than K experts on average overrides `experts_per_token`. The default is K, so
      activated parameters and multiply-adds are upper bounds.
    - At least `config.top_k` experts of each pool are there to choose from, also after pruning. They may be fewer
      than K.
    - A router whose scores are no linear map overrides `score`, and `macs` if it has further matrices.
    - A router with parameters or buffers of its own for each expert overrides `keep`, and removes their rows as well.
    - A tensor that no training may change is a buffer; `fixed` makes `weight` one.
    - A router that is taught which class belongs to which expert says `supervised`, and has `label_loss`.
    - `decide` gives each chosen expert the router's own weight, such as a probability, of which `gate` then makes the
      final one: it also divides by their sum, where the settings ask for it. `probabilities` gives such a weight for
      each expert.
    - A router that sends no rows to experts, but mixes tokens or experts, says `mixes` and has `compute` and
      `compute_macs`. Its rows get all experts (`all_experts`), with their share in the output for a gate.

    Attributes:
        units: values of `moe.routing` that the router can do.
        gated: True if its gates are weights of chosen experts, so that `moe.gate` and `moe.router_gradient` can act.
        needs_images: True if `calibrate` has to be called before the router is used.
        fixed: True if `weight` is a buffer, which nothing trains or unfreezes.
        even: True if all experts get the same share of each image by construction; the balance loss is then constant.
        constant: True if its scores depend on no image and no parameter, so that no loss of scores trains anything.
        supervised: True if classes of images train it, by `label_loss`; so it needs them in `calibrate` too.
        ragged: True if a row may get fewer than K experts, so that slots can be empty.
        tokens_interact: True if a token's decision depends on other tokens of its image.
        has_capacity: True if it obeys `moe.capacity_factor`.
        adjustable: True if `decide` chooses by `preferences`, so that a bias and random decisions can act. Otherwise
            `moe.bias_update_rate` and `vimoe.set_random_share` are refused.
        mixes: True if the layer calls `compute` instead of sending rows to experts.
        overrulable: True if a layer computes what the experts and gates of a `Routing` say, so that analysis can give
            it other decisions.
        reads_weights: True if `compute` reads the experts' weights: they must be FFNs, and `vimoe.optimize` leaves them
            as they are.
        gate: the gate of the kind `config.gate`.
        weight: (N, D), the linear map; a row for each expert.
        choice_bias: (N,) float32, added where experts are chosen, and nowhere else; None if `bias_update_rate` is 0.
            It is a part of the model as weights are; `vimoe.update_bias` moves it.
        kinds: (T,) or (B, T) kind of each token, where `vimoe.token_kinds` has said it; else None.
        random_share: scalar, share of the decisions that is random in training; None for none. Not saved, and a
            tensor, because torch.compile would compile again for each number; `vimoe.set_random_share` sets it.

    Args:
        dim: D.
        config: settings of the layer.
        layout: tokens that are no patches; image routing and pools of experts read it.
        like: a weight of the FFN, for type and device.

    Raises:
        ConfigError: if the router does not go with other settings.
    """

    units: tuple[RoutedUnit, ...] = ("image", "token")
    gated = True
    needs_images = False
    fixed = False
    even = False
    constant = False
    supervised = False
    ragged = False
    tokens_interact = False
    has_capacity = False
    adjustable = False
    mixes = False
    overrulable = True
    reads_weights = False
    weight: Tensor
    choice_bias: Tensor | None
    random_share: Tensor | None

    def __init__(self, dim: int, config: MoEConfig, layout: TokenLayout, like: Tensor) -> None:
        super().__init__()
        self._check(config)
        self.config, self.layout = config, layout
        self.kinds: Tensor | None = None
        self.gate = GATES.find(config.gate)(config, like)
        weight_ND = torch.empty(config.num_experts, dim, dtype=like.dtype, device=like.device)
        nn.init.trunc_normal_(weight_ND, std=INIT_STD)
        if self.fixed:
            self.register_buffer("weight", weight_ND)
        else:
            self.weight = nn.Parameter(weight_ND)
        bias_N = torch.zeros(config.num_experts, dtype=torch.float32, device=like.device)
        self.register_buffer("choice_bias", bias_N if config.bias_update_rate else None)
        self.register_buffer("random_share", None, persistent=False)

    def forward(self, x_BTD: Tensor) -> Routing:
        """Return the decisions for tokens (B, T, D)."""
        batch = batch_of(x_BTD)
        with own_type(x_BTD):
            logits_RN = self.score(self.feature(x_BTD))
            if len(self.config.pools) == 1:
                return replace(self.route(self.noisy(logits_RN), batch), logits=logits_RN)
            kinds_R = kinds_of(self.config, self.layout.num_prefix_tokens, self.kinds, x_BTD)
            logits_RN = logits_RN.masked_fill(self.pool_of_experts != kinds_R[:, None], -torch.inf)
            routing = self.route(self.noisy(logits_RN), batch)
            return replace(routing, logits=logits_RN, kinds=kinds_R, pools=self.config.pools)

    @property
    def pool_of_experts(self) -> Tensor:
        """(N,) int64, the pool of each expert."""
        return pool_of_experts(self.config, self.weight.device)

    def noisy(self, logits: Tensor) -> Tensor:
        """Return scores with the noise of `router_noise`, in training."""
        if not self.training or not self.config.router_noise:
            return logits
        return logits + self.config.router_noise / self.config.num_experts * torch.randn_like(logits)

    def route(self, logits_RN: Tensor, batch: tuple[int, int]) -> Routing:
        """Return the decisions that follow from the scores, with the weights of the gate; arguments as of `decide`."""
        routing: Routing = self.gate(self.decide(logits_RN, batch))
        return routing

    def score(self, feature_RD: Tensor) -> Tensor:
        """Return (R, N) scores, float32 at least, of features (R, D) in the type of the autocast; by `weight`."""
        return scores(feature_RD, self.weight, few=self.config.routing == "image")

    def probabilities(self, logits_RN: Tensor) -> Tensor:
        """Return (R, N) the router's own weight of each expert, chosen or not; by default a softmax."""
        return logits_RN.softmax(dim=-1)

    def gates_of_all(self, routing: Routing) -> Tensor:
        """Return (R, N) the gates of all experts as if each had been chosen, from the scores without noise."""
        gates_RN: Tensor = self.gate.of_all(self.probabilities(routing.logits), routing.logits)
        return gates_RN

    def decide(self, logits_RN: Tensor, batch: tuple[int, int]) -> Routing:
        """Return the decisions that follow from the scores, with the router's own weights for gates.

        Args:
            logits_RN: scores, float32 or float64; -inf rules an expert out.
            batch: (B, T). With token routing R is B * T, with image routing B.
        """
        raise NotImplementedError

    @property
    def needs_patches(self) -> bool:
        """True if the output for a token depends on others than itself and the class token."""
        return self.tokens_interact or (self.config.routing == "image" and not self.layout.class_token)

    @property
    def slots(self) -> int:
        """K, the most experts that a row can get; the same for every batch."""
        return self.config.top_k

    @property
    def experts_per_token(self) -> float:
        """Mean number of experts that a token passes, for parameters and multiply-adds that are activated.

        The default, K, is an upper bound if slots can be empty; a ragged router overrides it.
        """
        return self.slots

    def compute(self, x_BTD: Tensor, routing: Routing, experts: Experts, shared: nn.Module | None) -> Tensor:
        """Return the layer's output (B, T, D), of a router that `mixes`.

        Args:
            x_BTD: tokens.
            routing: decisions that `forward` made for them.
            experts: experts of the layer.
            shared: shared expert, or None.
        """
        raise NotImplementedError

    @property
    def macs(self) -> int:
        """Multiply-adds of `score` for one row."""
        return self.weight.numel()

    def compute_macs(self, tokens: int, experts: Experts, shared: int) -> float:
        """Multiply-adds of one image after its scores; the shared expert's pass over all tokens is counted elsewhere.

        Args:
            tokens: T.
            experts: experts of the layer.
            shared: multiply-adds of the shared expert for one token, 0 without one.
        """
        return tokens * self.experts_per_token * experts.macs

    @property
    def num_decisions(self) -> tuple[int, ...]:
        """Number of sets of experts that a row of each pool can get; with the empty set, where slots can be empty."""
        sizes = range(self.slots + 1) if self.ragged else [self.slots]
        return tuple(sum(math.comb(n, size) for size in sizes) for n in self.config.pools)

    @property
    def blind(self) -> bool:
        """True if the task loss can never train the router, because its gates are constant.

        By default the router's own weights are taken to vary. A kind whose weights are constant where there is a single
        expert, as a softmax over all experts is, overrides it.
        """
        return bool(self.gate.blind(self.slots, constant=False))

    @torch.no_grad()
    def neutral_gate_mass(self) -> Tensor:
        """(N,) mean gate of each expert if all scores are equal, without bias or chance.

        They are equal but for 1e-12, so that ties do not send all rows to the same experts: row r prefers expert r.
        Each pool of experts is taken to get a share of the rows in proportion to its size.
        """
        n = self.config.num_experts
        neutral = copy.deepcopy(self).eval()
        neutral.choice_bias = None
        rows_N = torch.arange(n, dtype=torch.float64, device=self.weight.device)
        scores_NN = -1e-12 * ((rows_N - rows_N[:, None]) % n)
        pool_N = self.pool_of_experts
        scores_NN = scores_NN.masked_fill(pool_N != pool_N[:, None], -torch.inf)
        routing = neutral.route(scores_NN, (1, n) if self.config.routing == "token" else (n, 1))
        of_pools = routing.gates.split(self.config.pools)
        return torch.cat([torch.full((len(gates),), float(gates.sum()) / (n * len(gates))) for gates in of_pools])

    @property
    def removable(self) -> list[int]:
        """Experts that `keep` may remove one of: those of pools with more than `config.top_k`."""
        sizes = [size for size in self.config.pools for _ in range(size)]
        return [expert for expert, size in enumerate(sizes) if size > self.config.top_k]

    def keep(self, kept: Sequence[int]) -> None:
        """Remove all other experts, in place. At least `config.top_k` of each pool must stay, pool after pool."""
        groups = self.config.groups
        if groups is not None:
            pool_of_kept = self.pool_of_experts[list(kept)]
            assert pool_of_kept.equal(pool_of_kept.sort().values)
            groups = tuple(pool_of_kept.bincount(minlength=len(groups)).tolist())
        self.config = self.gate.config = replace(self.config, num_experts=len(kept), groups=groups)
        rows_ND = self.weight.detach()[list(kept)]
        self.weight = rows_ND if self.fixed else nn.Parameter(rows_ND, requires_grad=self.weight.requires_grad)
        if self.choice_bias is not None:
            self.choice_bias = self.choice_bias[list(kept)]

    def by_image(self, scores_RN: Tensor, batch: tuple[int, int]) -> Tensor:
        """(R, N) to (B, R / B, N), a view: what limits an expert's capacity is computed over its second axis."""
        rows = batch[1] if self.config.routing == "token" else 1
        return scores_RN.view(batch[0], rows, scores_RN.shape[-1])

    def assign(self, logits_RN: Tensor, gates_RN: Tensor, chosen_RN: Tensor, batch: tuple[int, int]) -> Routing:
        """Return the decisions for chosen experts: in the slots of each row by falling gate, K at most, then nothing.

        Args:
            logits_RN: scores, as `decide` gets them.
            batch: (B, T).
            gates_RN: weight of each expert, if it is chosen.
            chosen_RN: bool; experts with a score of -inf are left out.
        """
        allowed_RN = chosen_RN & (logits_RN > -torch.inf)
        filled = min(self.slots, self.config.num_experts)  # pruning may leave fewer experts than slots
        best = gates_RN.detach().masked_fill(~allowed_RN, -torch.inf).topk(filled)
        empty, unfilled = best.values == -torch.inf, (0, self.slots - filled)
        gates_RK = F.pad(gates_RN.gather(-1, best.indices).masked_fill(empty, 0), unfilled)
        experts_RK = F.pad(best.indices.masked_fill(empty, -1), unfilled, value=-1)
        return Routing(logits_RN, gates_RK, experts_RK, self.config.routing, batch, ragged=self.ragged)

    def all_experts(self, logits_RN: Tensor, gates_RN: Tensor, batch: tuple[int, int]) -> Routing:
        """Return the decisions of a router whose rows get all experts; arguments as of `assign`."""
        return self.assign(logits_RN, gates_RN, torch.ones_like(gates_RN, dtype=torch.bool), batch)

    @classmethod
    def check_classes(cls, config: MoEConfig, classes: int) -> None:
        """Raise ConfigError if a `supervised` router cannot be taught by images of so many classes."""

    def calibrate(self, seen: Any) -> None:
        """Set the rows of a router that `needs_images`, from a `vimoe.moe.start.Calibration`, in place."""

    def label_loss(self, logits_RN: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a `supervised` router's scores, a scalar.

        Args:
            logits_RN: scores.
            targets: class (R,) of each image, or the mass (R, C) of each class.
        """
        raise NotImplementedError

    @property
    def routes(self) -> list[nn.Parameter]:
        """Parameters that say which expert gets what; those of the gate only say how much it weighs."""
        return [p for name, p in self.named_parameters() if not name.startswith("gate.")]

    @property
    def overrules(self) -> bool:
        """True if something else than its scores may choose experts now: a bias, or chance."""
        return self.choice_bias is not None or (self.training and self.random_share is not None)

    def preferences(self, probabilities_RN: Tensor) -> Tensor:
        """Return (R, N) values to choose experts by, the larger the better, given probabilities in 0..1.

        They have the bias added, and a random share of the rows has random values in 0..1.
        """
        preferred_RN = probabilities_RN if self.choice_bias is None else probabilities_RN + self.choice_bias
        if not self.training or self.random_share is None:
            return preferred_RN
        random_R1 = torch.rand(preferred_RN.shape[0], 1, device=preferred_RN.device) < self.random_share
        return torch.where(random_R1, torch.rand_like(preferred_RN), preferred_RN)

    def _check(self, config: MoEConfig) -> None:
        """Raise ConfigError for settings that this kind of router does not go with."""
        if config.routing not in self.units:
            raise ConfigError(
                f"router={config.router!r} with routing={config.routing!r}: expected routing={self.units[0]!r}; set it"
            )
        if self.reads_weights and not EXPERTS.find(config.experts).are_ffns:
            raise ConfigError(
                f"experts={config.experts!r} with router={config.router!r}, which takes the mean of experts' weights: "
                f"expected experts that are FFNs, such as 'ffn'"
            )
        refused = {
            "bias_update_rate": (config.bias_update_rate and not self.adjustable, 0),
            "gate": (config.gate != "probability" and not self.gated, "probability"),
            "router_gradient": (config.router_gradient != "chosen" and not self.gated, "chosen"),
            "orthogonal": (config.orthogonal != "none" and self.mixes, "none"),
            "capacity_factor": (config.capacity_factor is not None and not self.has_capacity, None),
            "groups": (config.groups is not None and (self.even or self.needs_images), None),
        }
        for name, (wrong, expected) in refused.items():
            if wrong:
                raise ConfigError(
                    f"{name}={getattr(config, name)!r} with router={config.router!r}: expected {expected!r}, which is "
                    f"all that it knows; leave it out"
                )

    def feature(self, x_BTD: Tensor) -> Tensor:
        """Return (R, D), what the router reads of tokens (B, T, D)."""
        if self.config.routing == "token":
            return x_BTD.flatten(0, 1)
        if self.layout.class_token:
            return x_BTD[:, 0]
        patches = x_BTD[:, self.layout.num_prefix_tokens :]
        return patches.mean(dim=1, dtype=torch.promote_types(x_BTD.dtype, torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        bias_N = self.choice_bias
        super()._apply(fn, recurse)
        if bias_N is not None and self.choice_bias is not None and self.choice_bias.dtype != bias_N.dtype:
            self.choice_bias = bias_N.to(self.choice_bias.device)  # in bfloat16 its steps would be rounded away
        return self

    def extra_repr(self) -> str:
        num_experts, dim = self.weight.shape
        return f"{dim} -> {num_experts}, top_k={self.config.top_k}, routing={self.config.routing!r}"


def batch_of(x_BTD: Tensor) -> tuple[int, int]:
    """Return (B, T). Raises VimoeError for tokens of another shape."""
    if x_BTD.ndim != 3:
        raise VimoeError(f"MoE input of shape {tuple(x_BTD.shape)}: expected (images, tokens, channels)")
    return x_BTD.shape[0], x_BTD.shape[1]


def scores(feature_RD: Tensor, weight_ND: Tensor, few: bool = False) -> Tensor:
    """(R, N), float32 at least.

    Unless the rows are few, no wide copy of low precision is kept for the backward pass, nor made whole on a CPU.
    """
    precise = torch.promote_types(feature_RD.dtype, torch.float32)
    if few or feature_RD.dtype == precise:
        return F.linear(feature_RD.to(precise), weight_ND.to(precise))
    logits_RN: Tensor = _scores(feature_RD, weight_ND.to(precise))
    return logits_RN


@torch.library.custom_op("vimoe::scores", mutates_args=())
def _scores(feature: Tensor, weight: Tensor) -> Tensor:
    logits = weight.new_empty(len(feature), len(weight))
    for at in chunks(feature):
        torch.mm(feature[at].to(weight.dtype), weight.T, out=logits[at])
    return logits


@torch.library.custom_op("vimoe::scores_gradient", mutates_args=())
def _scores_gradient(dlogits: Tensor, feature: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dfeature, dweight = torch.empty_like(feature), torch.zeros_like(weight)
    with own_type(dlogits):
        for at in chunks(feature):
            dfeature[at] = dlogits[at] @ weight
            dweight.addmm_(dlogits[at].T, feature[at].to(weight.dtype))
    return dfeature, dweight


@_scores.register_fake
def _(feature: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(feature.shape[0], weight.shape[0])


@_scores_gradient.register_fake
def _(dlogits: Tensor, feature: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(feature), torch.empty_like(weight)


_scores.register_autograd(
    lambda ctx, dlogits: _scores_gradient(dlogits, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@register_flop_formula(torch.ops.vimoe.scores)
def _flops(feature: torch.Size, weight: torch.Size, **_: Any) -> int:
    return 2 * feature[0] * weight.numel()


@register_flop_formula(torch.ops.vimoe.scores_gradient)
def _gradient_flops(dlogits: torch.Size, feature: torch.Size, weight: torch.Size, **_: Any) -> int:
    return 4 * feature[0] * weight.numel()
