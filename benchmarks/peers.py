"""The MoE layers of other libraries in the shape of ours, for speed.py to time and check_peers.py to check.

Axes: B images, T tokens of an image, D channels, F hidden units, N experts, k of them for a token.

Each is a map of (B, T, D) with N experts and one shared expert, and with as many activated multiply-adds as ours where
the library allows it; `Peer.note` says what differs. A gated FFN has three matrices, so its width is 2/3 F. Absent are
scattermoe, tutel and fastmoe, which the package index that was tried did not have; megablocks, whose source does not
install without an NVIDIA driver; and transformers' "batched_mm", because it copies an expert for each token.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp, SwiGLU
from torch import Tensor, nn

from vimoe.config.moe import MoEConfig
from vimoe.errors import VimoeError, first_line
from vimoe.moe import MoE
from vimoe.moe.router import TokenLayout

TYPES = (torch.float32, torch.bfloat16)
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # else DeepSpeed warns
SURE = 10.0  # the score of the expert that a token is forced to; that of all others is 0


@dataclass(frozen=True)
class Shape:
    """Shape of a layer. `tokens` is the number in one image, for which SoftMoE makes its slots; others take any."""

    dim: int
    hidden: int
    num_experts: int
    top_k: int = 1
    tokens: int = 257

    @property
    def gated_hidden(self) -> int:
        """Width at which three matrices have the multiply-adds of two."""
        return round(self.hidden * 2 / 3)


@dataclass(frozen=True)
class Peer:
    """One layer of another library.

    Attributes:
        name: library and variant.
        build: function that builds the layer, float32, on the CPU, in train mode: (B, T, D) to (B, T, D).
        macs: multiply-adds of one token with the matrices that it activates, counted from the built layer. Padding by
            capacity, and products of activations with one another, are not counted; see `computed`.
        note: differences from ours.
        drops: True if it drops tokens beyond a capacity.
        types: types in which it runs forward and backward, found by trying.
        exact: function that copies the weights of the layer that `twin` makes, after which both compute the same
            function; None if the peer computes another one.
        route: function that sends token i of the flattened input to expert wanted[i], (B * T,) int64, until it is
            called again. Call it once the layer has its type and device. For k=1. None without a choice.
        sent: function from the output of the layer's gate to the routing of tokens, (B * T, N) bool. None as above.
        twin: our layer that computes the same; None if there is none.
    """

    name: str
    build: Callable[[Shape], nn.Module]
    macs: Callable[[Shape], float]
    note: str
    drops: bool
    types: tuple[torch.dtype, ...]
    exact: Callable[[nn.Module, MoE], None] | None
    route: Callable[[nn.Module, Tensor], None] | None
    sent: Callable[[Any], Tensor] | None
    twin: Callable[[Shape], MoE] | None


class Layer(nn.Module):
    """A peer's layer, reduced to its output, with a dense FFN beside it if it has no shared expert of its own."""

    def __init__(self, moe: nn.Module, gate: nn.Module | None, experts: nn.Module, shared: nn.Module | None) -> None:
        super().__init__()
        self.moe, self.shared = moe, shared
        self._parts = (gate, experts)  # of `moe`; in a tuple, because they are registered there already

    @property
    def gate(self) -> nn.Module | None:
        """Module of the router, whose only parameter is its matrix."""
        return self._parts[0]

    @property
    def experts(self) -> nn.Module:
        """Module with the weights of all experts."""
        return self._parts[1]

    def forward(self, x_BTD: Tensor) -> Tensor:
        y = self.moe(x_BTD)
        y_BTD = y if isinstance(y, Tensor) else y[0]  # else followed by losses
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD)


def ours(shape: Shape, dense: nn.Module, normalize_gates: bool = False) -> MoE:
    """Return our layer with this FFN as expert and shared expert, with token routing and the formula of the peers."""
    settings = MoEConfig(
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        routing="token",
        num_shared_experts=1,
        combine="sum",
        normalize_gates=normalize_gates,
    )
    return MoE(dense, settings, TokenLayout(1, True))


def force(gate: nn.Module, wanted: Tensor, like: Tensor) -> None:
    """Make a gate, the parent of one matrix, choose the experts wanted (B * T,); `like` has the input's type, device.

    The gate's own code runs on rows that have the answer in their first N channels, with the identity for a matrix. So
    it costs what it costs, its gradient in weight and input included, and nothing is added. The input gets no gradient
    through the gate then. Our `MoE.router` can be forced in the same way.
    """
    (matrix,) = gate.parameters()
    dim, experts = max(matrix.shape), min(matrix.shape)
    if wanted.min() < 0 or wanted.max() >= experts:
        raise VimoeError(f"experts {int(wanted.min())} to {int(wanted.max())} wanted: expected 0 to {experts - 1}")
    with torch.no_grad():
        matrix.copy_(SURE * torch.eye(*matrix.shape))
    rows = F.one_hot(wanted, dim).to(like).requires_grad_()
    gate._forward_pre_hooks.clear()  # what was forced before
    gate.register_forward_pre_hook(lambda module, args: (rows.view(args[0].shape), *args[1:]))


def activated(layer: nn.Module, share: float) -> float:
    """Return the multiply-adds of one token with weights, given the share of experts that it uses."""
    experts = _matrices(layer.experts)
    return _matrices(layer) - experts + share * experts


def _matrices(module: nn.Module) -> int:
    return sum(p.numel() for name, p in module.named_parameters() if p.ndim > 1 and not name.endswith("bias"))


def failure(build: Callable[[Shape], nn.Module], dtype: torch.dtype, device: str = "cpu") -> str | None:
    """Return the first line of the error of a tiny layer, forward or backward, in a type; None if it runs."""
    layer, x = build(TINY).to(device, dtype), inputs(TINY).to(device, dtype).requires_grad_()
    try:
        layer(x).sum().backward()
    except (RuntimeError, NotImplementedError) as error:
        return first_line(error)
    return None


TINY = Shape(dim=32, hidden=48, num_experts=4, top_k=1, tokens=17)


def inputs(shape: Shape, images: int = 3) -> Tensor:
    """Return (B, T, D) normal numbers, always the same."""
    return torch.randn(images, shape.tokens, shape.dim, generator=torch.Generator().manual_seed(0))


def only(shape: Shape, largest: int, library: str) -> None:
    """Raise VimoeError if a library has no layer with this k."""
    if shape.top_k > largest:
        raise VimoeError(f"top_k={shape.top_k} with {library}: expected at most {largest}; leave this peer out")


def mlp(shape: Shape, bias: bool = True) -> Mlp:
    """The FFN of a ViT."""
    return Mlp(shape.dim, shape.hidden, bias=bias)


# ---- transformers


def qwen(implementation: str, shape: Shape) -> Layer:
    """Qwen2-MoE's block; built alone its weights are uninitialised, and its router's are zero."""
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    config = Qwen2MoeConfig(
        hidden_size=shape.dim,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=False,
        moe_intermediate_size=shape.gated_hidden,
        shared_expert_intermediate_size=shape.gated_hidden,
        experts_implementation=implementation,
    )
    moe = Qwen2MoeSparseMoeBlock(config)
    for weight in moe.parameters():
        nn.init.normal_(weight, std=config.initializer_range)
    return Layer(moe, moe.gate, moe.experts, None)


@torch.no_grad()
def copy_to_qwen(layer: Layer, twin: MoE) -> None:
    """Their shared expert is multiplied by a gate: with a gate of zeros by 1/2, so its last matrix is doubled."""
    moe = layer.moe
    moe.gate.weight.copy_(twin.router.weight)
    moe.experts.gate_up_proj.copy_(twin.experts.fc1.weight)
    moe.experts.down_proj.copy_(twin.experts.fc2.weight)
    moe.shared_expert.gate_proj.weight.copy_(twin.shared.fc1_g.weight)
    moe.shared_expert.up_proj.weight.copy_(twin.shared.fc1_x.weight)
    moe.shared_expert.down_proj.weight.copy_(2 * twin.shared.fc2.weight)
    moe.shared_expert_gate.weight.zero_()


def switch(shape: Shape) -> Layer:
    """Switch Transformers' layer; capacity holds all tokens, and jitter, which writes into its input, is off."""
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    only(shape, 1, "Switch Transformers")
    config = SwitchTransformersConfig(
        d_model=shape.dim,
        d_ff=shape.hidden,
        num_experts=shape.num_experts,
        expert_capacity=shape.tokens,
        dense_act_fn="gelu",
        dropout_rate=0.0,
        router_jitter_noise=0.0,
    )
    moe = SwitchTransformersSparseMLP(config)
    return Layer(moe, moe.router, moe.experts, mlp(shape, bias=False))


@torch.no_grad()
def copy_to_switch(layer: Layer, twin: MoE) -> None:
    """The names that they give to the weights."""
    layer.moe.router.classifier.weight.copy_(twin.router.weight)
    for i, expert in enumerate(layer.experts.values()):
        expert.load_state_dict({
            "wi.weight": twin.experts.fc1.weight[i], "wo.weight": twin.experts.fc2.weight[i]
        })  # fmt: skip
    layer.shared.load_state_dict(twin.shared.state_dict())


# ---- DeepSpeed


def deepspeed(shape: Shape) -> Layer:
    """Any FFN can be its expert, so it has ours."""
    from deepspeed.moe.layer import MoE as Theirs

    moe = Theirs(
        shape.dim,
        mlp(shape),
        shape.num_experts,
        k=shape.top_k,
        drop_tokens=False,
        use_rts=False,  # chooses whom to drop
        top2_2nd_expert_sampling=False,
    )
    return Layer(moe, moe.deepspeed_moe.gate, moe.deepspeed_moe.experts, mlp(shape))


@torch.no_grad()
def copy_to_deepspeed(layer: Layer, twin: MoE) -> None:
    """Experts and shared expert are of the class of ours."""
    layer.gate.wg.weight.copy_(twin.router.weight)
    for i, expert in enumerate(layer.experts.deepspeed_experts):
        expert.load_state_dict(twin.experts.weights(i))
    layer.shared.load_state_dict(twin.shared.state_dict())


# ---- st-moe-pytorch, mixture-of-experts, soft-moe-pytorch


def st_moe(shape: Shape) -> Layer:
    """It insists on two choices or more: an endless threshold is what the second one never passes."""
    from st_moe_pytorch import MoE as Theirs

    threshold = 0.0 if shape.top_k > 1 else torch.inf
    moe = Theirs(
        dim=shape.dim,
        num_experts=shape.num_experts,
        expert_hidden_mult=shape.hidden / shape.dim,
        gating_top_n=max(2, shape.top_k),
        threshold_train=threshold,
        threshold_eval=threshold,
    )
    return Layer(moe, moe.gate, moe.experts, mlp(shape))


def mixture_of_experts(shape: Shape) -> Layer:
    """It has two choices, of which the second can be left out."""
    from mixture_of_experts import MoE as Theirs

    only(shape, 2, "mixture-of-experts")
    policy = "all" if shape.top_k == 2 else "none"
    moe = Theirs(
        dim=shape.dim,
        num_experts=shape.num_experts,
        hidden_dim=shape.hidden,
        activation=nn.GELU,
        second_policy_train=policy,
        second_policy_eval=policy,
    )
    return Layer(moe, moe.gate, moe.experts, mlp(shape))


def soft_moe(shape: Shape) -> Layer:
    """Return SoftMoE with as many slots as there are choices of tokens, T k, up to divisibility by N."""
    from soft_moe_pytorch import SoftMoE

    moe = SoftMoE(
        shape.dim, num_experts=shape.num_experts, num_slots=slots(shape), expert_mult=shape.hidden / shape.dim
    )
    return Layer(moe, None, moe.experts, mlp(shape))


def slots(shape: Shape) -> int:
    """Return the number of slots of one expert for one image."""
    return shape.top_k * shape.tokens // shape.num_experts


# ---- all of them


def _routed(layer: Layer, wanted: Tensor) -> None:
    force(layer.gate, wanted, next(layer.experts.parameters()))


def _chosen(indices: Tensor, num_experts: int) -> Tensor:
    """Turn (B * T, k) experts, -1 for a dropped token, into (B * T, N) bool."""
    return F.one_hot(indices.long() + 1, num_experts + 1)[..., 1:].sum(dim=1).bool()


def mean_share(shape: Shape) -> float:
    """Return the share of the experts that one token uses."""
    return shape.top_k / shape.num_experts


@dataclass(frozen=True)
class _Entry:
    """Description of a peer without an import of its package."""

    package: str  # on the package index
    module: str
    name: str
    build: Callable[[Shape], Layer]
    note: str
    sent: Callable[[Any], Tensor] | None
    drops: bool = False
    share: Callable[[Shape], float] = mean_share
    exact: Callable[[Layer, MoE], None] | None = None
    twin: Callable[[Shape], MoE] | None = None


def _qwen_entry(implementation: str) -> _Entry:
    return _Entry(
        package="transformers",
        module="transformers",
        name=f"transformers {implementation}",
        build=functools.partial(qwen, implementation),
        note="SwiGLU of 2/3 the width, no biases; its shared expert has a gate of its own"
        + ("; stays in the type of the weights under autocast" if implementation == "grouped_mm" else ""),
        sent=lambda output: _chosen(output[2], output[0].shape[-1]),
        exact=copy_to_qwen,
        twin=lambda shape: ours(shape, SwiGLU(shape.dim, shape.gated_hidden, bias=False)),
    )


_CAPACITY = (
    "gates are divided by the sum of the two best, also for k=1; capacity 1.25 of the mean load in training and 2 in "
    "evaluation, for each image: what is beyond it is dropped, what is short of it computed"
)

_ENTRIES = (
    _qwen_entry("eager"),
    _qwen_entry("grouped_mm"),
    _Entry(
        package="transformers",
        module="transformers",
        name="transformers switch",
        build=switch,
        note="k=1 only; no biases; router in float32; no shared expert inside",
        sent=lambda output: output[0].flatten(0, 1).bool(),
        exact=copy_to_switch,
        twin=lambda shape: ours(shape, mlp(shape, bias=False)),
    ),
    _Entry(
        package="deepspeed",
        module="deepspeed",
        name="deepspeed",
        build=deepspeed,
        note="our FFN as expert; drops nothing: all experts are padded to the largest load; gates sum to 1 for k > 1; "
        "no shared expert inside",
        sent=lambda output: _chosen(output[3].T, output[2]),
        exact=copy_to_deepspeed,
        twin=lambda shape: ours(shape, mlp(shape), normalize_gates=shape.top_k > 1),
    ),
    _Entry(
        package="st-moe-pytorch",
        module="st_moe_pytorch",
        name="st-moe-pytorch",
        build=st_moe,
        note=f"GEGLU of 2/3 the width; {_CAPACITY}; no shared expert inside",
        sent=lambda output: output[0].flatten(0, 1).sum(dim=-1).bool(),
        drops=True,
    ),
    _Entry(
        package="mixture-of-experts",
        module="mixture_of_experts",
        name="mixture-of-experts",
        build=mixture_of_experts,
        note=f"no biases; {_CAPACITY}; no shared expert inside",
        sent=lambda output: output[0].flatten(0, 1).sum(dim=-1).bool(),
        drops=True,
    ),
    _Entry(
        package="soft-moe-pytorch",
        module="soft_moe_pytorch",
        name="soft-moe-pytorch",
        build=soft_moe,
        note="soft: nothing is chosen, experts compute slots that are means of tokens, as many as there are tokens; "
        "normalises its input; no shared expert inside",
        sent=None,
        share=lambda shape: slots(shape) / shape.tokens,
    ),
)


@functools.cache
def _present(entry: _Entry) -> bool:
    try:
        importlib.import_module(entry.module)
    except ImportError:  # of the package, or of one that it needs
        return False
    return True


def installed(device: str = "cpu") -> list[Peer]:
    """Return the peers whose package is installed, in a fixed order; their types are tried on this device."""
    return list(_peers(device))


def _peers(device: str) -> Iterator[Peer]:
    for entry in filter(_present, _ENTRIES):
        yield Peer(
            name=entry.name,
            build=entry.build,
            macs=lambda shape, entry=entry: activated(entry.build(shape), entry.share(shape)),
            note=entry.note,
            drops=entry.drops,
            types=tuple(dtype for dtype in TYPES if failure(entry.build, dtype, device) is None),
            exact=entry.exact,
            route=_routed if entry.sent else None,
            sent=entry.sent,
            twin=entry.twin,
        )


def versions() -> dict[str, str]:
    """Return the versions of the installed packages."""
    here = sorted({entry.package for entry in _ENTRIES if _present(entry)})
    return {package: importlib.metadata.version(package) for package in here}


def missing() -> list[str]:
    """Return the packages, by pip's name, whose layers would be compared if they were installed."""
    return sorted({entry.package for entry in _ENTRIES if not _present(entry)})
