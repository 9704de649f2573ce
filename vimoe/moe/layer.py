"""The MoE layer on one page: route, dispatch, compute, combine, add the shared expert.

Axes: B images, T tokens of an image, D channels, N experts, R rows that are routed (images or tokens), U tokens of a
row, S filled slots in the order of their experts. A row has one slot at each of its experts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from vimoe.config.moe import EXPERTS, ROUTERS, STARTS, MoEConfig
from vimoe.errors import SurgeryError, VimoeError
from vimoe.moe import ffn, ffn_weights, router_gradient
from vimoe.moe.autocast import in_type_of_autocast
from vimoe.moe.dispatch import dispatch
from vimoe.moe.experts import Experts
from vimoe.moe.ffn_weights import Weights
from vimoe.moe.grid import Grid
from vimoe.moe.orthogonal import check, orthogonal_outputs
from vimoe.moe.router import Router, TokenLayout
from vimoe.moe.routing import note
from vimoe.moe.start import Calibration, Start


class MoE(nn.Module):
    """A sparse mixture of experts with a shared expert, in the place of a dense FFN.

    With S the shared expert, E_i the chosen experts and g_i their gates it computes

        combine="mix":  S(x) + sum_i g_i (E_i(x) - S(x))     what the dense FFN did, until the experts are trained
        combine="sum":  S(x) + sum_i g_i E_i(x)              as in ViMoE (arXiv 2410.15732)

    and without a shared expert sum_i g_i E_i(x), where "mix" makes the softmax router's gates of the chosen experts sum
    to 1. A token without an expert gives S(x), or 0 without a shared expert. A router that mixes tokens or experts has
    a formula of its own (`Router.compute`). With `config.orthogonal` the outputs of a token's experts are first made
    orthogonal (`vimoe.moe.orthogonal`).

    Every expert starts as a copy of the dense FFN, on its device and in its type, until `start` is called, which
    `vimoe.upcycle` does. Where experts are narrower (`expert_width` w < F), expert e is part e mod F / w of the FFN's
    hidden units (`ffn.divide`). Experts and router are trained even if the FFN is frozen. There are first derivatives
    in reverse mode.

    Tokens may lie on a grid (B, H, W, D), of which a token is a position. In the place of an FFN of 1x1 convolutions
    the layer takes (B, D, H, W), and has linear maps for them.

    Args:
        dense: an FFN for which `vimoe.moe.ffn.is_ffn` holds. It becomes the shared expert when there is one of them.
        config: settings; `config.layers` plays no part here.
        layout: tokens that are no patches; image routing and pools of experts (`moe.groups`) read it.

    Raises:
        SurgeryError: if experts could not reproduce a part of the FFN, or their `roles` do not name their parameters.

    Attributes:
        router: router of the kind `config.router`.
        experts: experts of the kind `config.experts`.
        shared: the shared expert, or None.
        grid: the shape of what the FFN got, a `Grid`.
        unchosen: what trains the router by experts that were not chosen (`config.router_gradient`), or None.

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
    unchosen: router_gradient.Unchosen | None

    def __init__(self, dense: nn.Module, config: MoEConfig, layout: TokenLayout) -> None:
        super().__init__()
        # densify rebuilds the FFN from this copy; in a tuple, because it is no part of this model
        self._template = (copy.deepcopy(dense).to("meta"),)
        self.grid = Grid.of(dense)
        dense = ffn.as_linear(dense)
        n = config.num_shared_experts
        kind, weight = ffn.describe(dense), next(dense.parameters())
        self._begin: Start = STARTS.find(config.init)(config)
        width = self._begin.width(kind.hidden)
        parts = [] if width == kind.hidden else ffn.divide(dense, width)
        self.config = config = replace(config, expert_width=width) if parts else config
        self.router = ROUTERS.find(config.router)(kind.dim, config, layout, like=weight)
        self.experts = EXPERTS.find(config.experts)(ffn.build(dense, parts[0]) if parts else dense, config)
        for e in range(config.num_experts if parts else 0):
            self.experts.set_weights(e, parts[e % len(parts)])
        if odd := set(self.experts.roles) ^ {name for name, _ in self.experts.named_parameters()}:
            raise SurgeryError(
                f"moe.experts={config.experts!r}: its roles and its parameters differ in {', '.join(sorted(odd))}: "
                f"expected a Role for each parameter and no other; correct `roles`"
            )
        self.shared = None if n == 0 else dense if n == 1 else ffn.widen(dense, n)
        check(config, self.experts, self.shared)
        unchosen = router_gradient.KINDS.get(config.router_gradient)
        self.unchosen = None if unchosen is None else unchosen(config.num_experts, kind.dim, like=weight)
        self.train(dense.training)

    def start(self, seen: Calibration | None = None) -> None:
        """Let the experts and the router of a new layer begin as `config.init` and `config.router` say.

        Args:
            seen: what the dense model computes here for some images; needed if `needs_images`.
        """
        assert seen is not None or not self.needs_images
        self.check_start()
        self._begin(self.experts, self.router, seen)
        if self.router.needs_images:
            self.router.calibrate(seen)

    def check_start(self) -> None:
        """Raise SurgeryError if a new layer cannot start as `config.init` says, before any work is done.

        Settings that it would not read are refused too. A layer that has been pruned may have them.
        """
        config = self.config
        if not self.needs_images and config.calibration_images != MoEConfig.calibration_images:
            raise SurgeryError(
                f"calibration_images={config.calibration_images} with init={config.init!r} and "
                f"router={config.router!r}: expected a start or a router that is computed from images, such as "
                f"router='centroids'; leave it out"
            )
        if self.unchosen is not None and not self.router.ragged and self.router.slots >= max(config.pools):
            raise SurgeryError(
                f"router_gradient={config.router_gradient!r} with all {max(config.pools)} experts chosen: expected "
                f"'chosen', since no expert is left out; leave it out, or lower top_k"
            )
        if self.unchosen is not None and self.router.constant and not list(self.router.parameters()):
            raise SurgeryError(
                f"router_gradient={config.router_gradient!r} with router={config.router!r}: expected 'chosen', since "
                f"the router has nothing to train; leave it out"
            )
        self._begin.check(self.experts, self.router, self._parent_hidden)

    def could_have(self, **changes: Any) -> bool:
        """Return True if a new layer could have these other settings, by their names in `MoEConfig`."""
        try:
            changed = replace(self.config, **changes)
            MoE(copy.deepcopy(self._template[0]), changed, self.router.layout).check_start()
        except VimoeError:
            return False
        return True

    @property
    def keeps_function(self) -> bool:
        """True if a new layer computes what the dense FFN did by construction, to rounding."""
        one_each = not self.router.ragged and not self.router.mixes  # gates of equal experts then sum to 1
        mixed = self.config.combine == "mix" and (self.shared is not None or one_each)
        mixed = mixed and self.config.orthogonal != "normalized"  # it gives the rounding of no change unit length
        return mixed and not self.narrow and self.experts.keeps_function and self._begin.keeps_function

    @property
    def narrow(self) -> bool:
        """True if the experts have fewer hidden units than the dense FFN had."""
        return self.experts.kind.hidden < self._parent_hidden

    @property
    def _parent_hidden(self) -> int:
        return ffn.describe(self._template[0]).hidden

    @property
    def needs_images(self) -> bool:
        """True if `start` needs what the dense model computes for some images."""
        return self._begin.needs_images or self.router.needs_images

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to the same; a grid (B, H, W, D) or (B, D, H, W) too, and (T, D) where tokens are routed.

        Raises:
            VimoeError: for another shape, such as a grid where some tokens are no patches.
        """
        if self.config.routing == "image" and x.ndim != 3 and (x.ndim < 3 or self.router.layout.num_prefix_tokens):
            raise VimoeError(f"MoE input of shape {tuple(x.shape)}: expected (images, tokens, channels)")
        return self.grid.placed(self._mixed(self.grid.tokens(x)), x.shape)

    def _mixed(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        if getattr(self, "_is_replica", False) and (self.experts.reads or self.router.reads_weights):
            raise VimoeError(
                f"moe.experts={self.config.experts!r} with moe.router={self.config.router!r} in a replica of "
                f"DataParallel, whose parts do not find one another: expected DistributedDataParallel; use it"
            )
        if not torch.compiler.is_compiling() and forward_ad.unpack_dual(x_BTD).tangent is not None:
            raise VimoeError(
                "a forward-mode derivative (jvp) of an MoE layer: expected reverse mode, such as backward()"
            )
        x_BTD = in_type_of_autocast(x_BTD)  # once for all that read it, so that one copy is kept for the backward pass
        routing = self.router(x_BTD)
        if self.router.mixes:
            note(self, routing)
            return self.router.compute(x_BTD, routing, self.experts, self.shared)
        all_RN = None
        if self.unchosen is not None and self.training and torch.is_grad_enabled():
            all_RN = self.router.gates_of_all(routing)
            routing = router_gradient.through(routing, all_RN)
        sent = dispatch(routing)
        x_RUD = x_BTD.reshape(routing.experts.shape[0], routing.tokens_per_unit, x_BTD.shape[-1])
        y_SUD = self.experts(x_RUD, sent.source, sent.load)
        shared_RUD = None if self.shared is None else self.shared(x_BTD).view(x_RUD.shape)
        if shared_RUD is not None and self.config.orthogonal != "none":
            y_SUD = orthogonal_outputs(y_SUD, shared_RUD, routing, self.config)
        note(self, routing, y_SUD)
        mix = self.shared is not None and self.config.combine == "mix"
        y_RUD = sent.combine(y_SUD, shared_RUD, mix)
        if self.unchosen is not None and all_RN is not None:
            gates_RN = all_RN.masked_fill(routing.chosen, 0)
            y_RUD = y_RUD + self.unchosen(gates_RN, x_RUD, y_SUD, shared_RUD if mix else None, sent, self.experts)
        return y_RUD.view(x_BTD.shape)

    def without_experts(self) -> nn.Module:
        """Return the shared expert as an FFN, of the parent's width while the added shared experts are zero."""
        assert self.shared is not None
        dense = ffn.narrow(self.shared, self.config.num_shared_experts)
        return dense if self.grid.channels == -1 else self._as_dense(ffn.read(dense))

    @torch.no_grad()
    def merged(self, gate_mass: Tensor, matched: bool = False) -> nn.Module:
        """Return one FFN with the mean weights of all experts: this layer's formula, in weights instead of outputs.

        Args:
            gate_mass: (N,) mean over rows of the gate that each expert got, 0 where it was not chosen.
            matched: first put each expert's hidden units in the order that is nearest to one of them
                (`ffn_weights.match`).
        """
        parts, mass = self._weighed(gate_mass)
        if matched:
            # A reference is matched exactly, the others with one another only through it. The shared expert is what
            # "mix" takes differences to, and all tokens have trained it; else take the expert that weighs most.
            reference = parts[0 if self.shared is not None else mass.index(max(mass))]
            parts = [ffn_weights.match(part, reference, self.experts.kind.gated) for part in parts]
        total = sum(mass)
        shares = [m / total for m in mass] if total else [1 / len(mass)] * len(mass)
        scale = 1.0 if math.isclose(total, 1, rel_tol=1e-6) else total  # gates that sum to 1 do so but for rounding
        return self._as_dense(ffn_weights.average(parts, shares, scale))

    @torch.no_grad()
    def joined(self, gate_mass: Tensor, whole: bool = False) -> nn.Module:
        """Return one FFN with the hidden units of all experts side by side, and those of the shared expert.

        Each expert's last matrix and bias are weighted by its mean gate, so that the FFN computes what this layer does
        if gates are constant. Silent units fill it up to a multiple of the parent's width, which model folders can
        note; there are some only after experts have been removed.

        Args:
            gate_mass: (N,) mean over rows of the gate that each expert got, 0 where it was not chosen.
            whole: weigh each last matrix by 1 / top_k instead, as if all experts were chosen beside one another: what
                EMoE (arXiv 2310.10908) does with the pieces of a split FFN after training.
        """
        parts, mass = self._weighed(gate_mass)
        gated = self.experts.kind.gated
        matrix = [1 / self.config.top_k] * len(mass) if whole else mass
        silent = -sum(part["fc2.weight"].shape[1] for part in parts) % self._parent_hidden
        unit = ffn_weights.take(parts[0], torch.zeros(silent, dtype=torch.long), gated)
        weighed = [ffn_weights.scaled(*each) for each in zip(parts, matrix, mass, strict=True)]
        silenced = {name: torch.zeros_like(w) for name, w in unit.items()}
        return self._as_dense(ffn_weights.join([*weighed, silenced], gated))

    def _weighed(self, gate_mass: Tensor) -> tuple[list[Weights], list[float]]:
        """Return the shared expert, where there is one, and the experts, with their weights in the layer's formula."""
        mass = gate_mass.tolist()
        parts = [self.experts.weights(i) for i in range(self.config.num_experts)]
        if self.shared is not None:
            parts.insert(0, ffn.read(self.shared))
            mass.insert(0, 1.0 if self.config.combine == "sum" else 1.0 - sum(mass))
        return parts, mass

    def _as_dense(self, weights: Weights) -> nn.Module:
        trained = any(p.requires_grad for p in (self.experts if self.shared is None else self.shared).parameters())
        return ffn.build(self._template[0], weights).requires_grad_(trained).train(self.training)

    @property
    def densify_methods(self) -> tuple[str, ...]:
        """Methods of making this layer dense, as `vimoe.densify` names them in `how`.

        Means are taken of FFNs of the width of the dense one: not with several shared experts, nor of experts that are
        no FFNs, wider ones, or narrower ones, which are joined; nor of changes whose length was normalized away.
        """
        shared = ("shared",) if self.shared is not None else ()
        if self.narrow and self.experts.are_ffns:
            return (*shared, "join", *(("whole",) if self._begin.pieces else ()))
        of_one_width = self.experts.are_ffns and self.experts.width == self._parent_hidden
        meaningful = self.config.num_shared_experts <= 1 and self.config.orthogonal != "normalized"
        means = ("merge", "matched") if of_one_width and meaningful else ()
        return (*shared, *means)

    def dense(self, how: str, gate_mass: Tensor) -> nn.Module:
        """Return the FFN that one of `densify_methods` puts in this layer's place; `gate_mass` as in `merged`."""
        if how == "shared":
            return self.without_experts()
        if self.narrow:
            return self.joined(gate_mass, whole=how == "whole")
        return self.merged(gate_mass, matched=how == "matched")

    def keep_experts(self, kept: Sequence[int]) -> None:
        """Remove all other experts, in place: their tokens go to the next choice. At least top_k of each pool stay."""
        assert len(kept) >= self.config.top_k
        self.router.keep(kept)
        self.experts.keep(kept)
        if self.unchosen is not None:
            self.unchosen.keep(kept)
        self.config = self.router.config

    def extra_repr(self) -> str:
        return f"combine={self.config.combine!r}"


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """Return the model's MoE layers by module name, in forward order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
