"""The MoE layer on one page: route, dispatch, compute, combine, add the shared expert.

Axes: B images, T tokens of an image, D channels, N experts, R rows that are routed (images or tokens), U tokens of a
row, S filled slots in the order of their experts. A row has one slot at each of its experts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from vimoe.config.moe import EXPERTS, ROUTERS, STARTS, MoEConfig
from vimoe.errors import SurgeryError, VimoeError
from vimoe.moe import ffn
from vimoe.moe.autocast import in_type_of_autocast
from vimoe.moe.dispatch import dispatch
from vimoe.moe.experts import Experts
from vimoe.moe.router import Router, TokenLayout
from vimoe.moe.routing import note
from vimoe.moe.start import Calibration, Start


class MoE(nn.Module):
    """A sparse mixture of experts with a shared expert, in the place of a dense FFN.

    With S the shared expert, E_i the chosen experts and g_i their gates it computes

        combine="mix":  S(x) + sum_i g_i (E_i(x) - S(x))     what the dense FFN did, until the experts are trained
        combine="sum":  S(x) + sum_i g_i E_i(x)              as in ViMoE (arXiv 2410.15732)

    and without a shared expert sum_i g_i E_i(x), where "mix" makes the softmax router's gates of the chosen experts sum
    to 1. A token without an expert gives S(x), or 0 without a shared expert.

    Every expert starts as a copy of the dense FFN, on its device and in its type, until `start` is called, which
    `vimoe.upcycle` does. Experts and router are trained even
    if the FFN is frozen. There are first derivatives in reverse mode.

    Args:
        dense: an FFN for which `vimoe.moe.ffn.is_ffn` holds. It becomes the shared expert when there is one of them.
        config: settings; `config.layers` plays no part here.
        layout: tokens that are no patches; only image routing reads it.

    Raises:
        SurgeryError: if experts could not reproduce a part of the FFN, or their `roles` do not name their parameters.

    Attributes:
        router: router of the kind `config.router`.
        experts: experts of the kind `config.experts`.
        shared: the shared expert, or None.

    >>> import torch, vimoe
    >>> from timm.layers import Mlp
    >>> from vimoe.moe.router import TokenLayout
    >>> tokens = TokenLayout(num_prefix_tokens=1, class_token=True)
    >>> layer = vimoe.MoE(Mlp(16, 32), vimoe.MoEConfig(num_experts=4, routing="token"), tokens)
    >>> layer(torch.randn(2, 5, 16)).shape  # (images, tokens, channels)
    torch.Size([2, 5, 16])
    """

    router: Router
    experts: Experts

    def __init__(self, dense: nn.Module, config: MoEConfig, layout: TokenLayout) -> None:
        super().__init__()
        n = config.num_shared_experts
        self.config = config
        dim, weight = ffn.describe(dense).dim, next(dense.parameters())
        self.router = ROUTERS.find(config.router)(dim, config, layout, like=weight)
        self.experts = EXPERTS.find(config.experts)(dense, config)
        if odd := set(self.experts.roles) ^ {name for name, _ in self.experts.named_parameters()}:
            raise SurgeryError(
                f"moe.experts={config.experts!r}: its roles and its parameters differ in {', '.join(sorted(odd))}: "
                f"expected a Role for each parameter and no other; correct `roles`"
            )
        self.shared = None if n == 0 else dense if n == 1 else ffn.widen(dense, n)
        self._begin: Start = STARTS.find(config.init)(config)
        # densify rebuilds the FFN from this copy; in a tuple, because it is no part of this model
        self._template = (copy.deepcopy(dense).to("meta"),)
        self.train(dense.training)

    def start(self, seen: Calibration | None = None) -> None:
        """Let the experts and the router of a new layer begin as `config.init` and `config.router` say.

        Args:
            seen: what the dense model computes here for some images; needed if `needs_images`.
        """
        assert seen is not None or not self.needs_images
        self._begin(self.experts, self.router, seen)
        if self.router.needs_images:
            self.router.calibrate(seen)

    @property
    def needs_images(self) -> bool:
        """True if `start` needs what the dense model computes for some images."""
        return self._begin.needs_images or self.router.needs_images

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        if not torch.compiler.is_compiling() and forward_ad.unpack_dual(x_BTD).tangent is not None:
            raise VimoeError(
                "a forward-mode derivative (jvp) of an MoE layer: expected reverse mode, such as backward()"
            )
        x_BTD = in_type_of_autocast(x_BTD)  # once for all that read it, so that one copy is kept for the backward pass
        routing = self.router(x_BTD)
        sent = dispatch(routing)
        x_RUD = x_BTD.reshape(routing.experts.shape[0], routing.tokens_per_unit, x_BTD.shape[-1])
        y_SUD = self.experts(x_RUD, sent.source, sent.load)
        note(self, routing, y_SUD)
        shared_RUD = None if self.shared is None else self.shared(x_BTD).view(x_RUD.shape)
        mix = self.shared is not None and self.config.combine == "mix"
        return sent.combine(y_SUD, shared_RUD, mix).view(x_BTD.shape)

    def without_experts(self) -> nn.Module:
        """Return the shared expert as an FFN, of the parent's width while the added shared experts are zero."""
        assert self.shared is not None
        return ffn.narrow(self.shared, self.config.num_shared_experts)

    @torch.no_grad()
    def merged(self, gate_mass: Tensor, matched: bool = False) -> nn.Module:
        """Return one FFN with the mean weights of all experts: this layer's formula, in weights instead of outputs.

        Args:
            gate_mass: (N,) mean over rows of the gate that each expert got, 0 where it was not chosen.
            matched: first put each expert's hidden units in the order that is nearest to one of them (`ffn.match`).
        """
        mass = gate_mass.tolist()
        parts = [self.experts.weights(i) for i in range(self.config.num_experts)]
        if self.shared is not None:
            assert self.config.num_shared_experts == 1
            parts.insert(0, ffn.read(self.shared))
            mass.insert(0, 1.0 if self.config.combine == "sum" else 1.0 - sum(mass))
        if matched:
            # A reference is matched exactly, the others with one another only through it. The shared expert is what
            # "mix" takes differences to, and all tokens have trained it; else take the expert that weighs most.
            reference = parts[0 if self.shared is not None else mass.index(max(mass))]
            parts = [ffn.match(part, reference, self.experts.kind.gated) for part in parts]
        total = sum(mass)
        shares = [m / total for m in mass] if total else [1 / len(mass)] * len(mass)
        scale = 1.0 if math.isclose(total, 1, rel_tol=1e-6) else total  # gates that sum to 1 do so but for rounding
        weights = ffn.average(parts, shares, scale)
        trained = any(p.requires_grad for p in (self.experts if self.shared is None else self.shared).parameters())
        return ffn.build(self._template[0], weights).requires_grad_(trained).train(self.training)

    @property
    def densify_methods(self) -> tuple[str, ...]:
        """Methods of making this layer dense, as `vimoe.densify` names them in `how`.

        Means are taken of FFNs of one width: not with several shared experts, nor of experts that are no FFNs.
        """
        shared = self.config.num_shared_experts
        means = ("merge", "matched") if shared <= 1 and self.experts.are_ffns else ()
        return (*(("shared",) if shared else ()), *means)

    def dense(self, how: str, gate_mass: Tensor) -> nn.Module:
        """Return the FFN that one of `densify_methods` puts in this layer's place; `gate_mass` as in `merged`."""
        return self.without_experts() if how == "shared" else self.merged(gate_mass, matched=how == "matched")

    def keep_experts(self, kept: Sequence[int]) -> None:
        """Remove all other experts, in place: their tokens go to the next choice. At least top_k must stay."""
        assert len(kept) >= self.config.top_k
        self.router.keep(kept)
        self.experts.keep(kept)
        self.config = self.router.config

    def extra_repr(self) -> str:
        return f"combine={self.config.combine!r}"


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """Return the model's MoE layers by module name, in forward order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
