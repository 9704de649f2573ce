"""Linear maps and experts with weights in the order in which a CPU's matrix product reads them; no gradient.

oneDNN, torch's library for products on a CPU, otherwise brings a matrix into that order at each call. torch.compile
writes the same operators for a frozen model. An activation after a map is computed with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimoe.errors import VimoeError, expect
from vimoe.moe.experts import Experts
from vimoe.moe.grouped_linear import loaded_experts, tokens_of

OPTIMIZED = "_optimized_by_vimoe"  # attribute of a whole model, whether or not there was something to pack


def can_pack(weight: Tensor) -> bool:
    """Return True if this build of torch, on this machine, computes with packed weights of this type."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def check_not_packed(model: nn.Module) -> None:
    """Raise VimoeError for a value that is no model, or a model that can only be run after `vimoe.optimize`."""
    expect("model", model, nn.Module, "build one, such as by timm.create_model")
    if any(isinstance(m, (PackedLinear, PackedExperts)) or hasattr(m, OPTIMIZED) for m in model.modules()):
        _refuse()


def _refuse(*_: Any) -> NoReturn:
    raise VimoeError("the model went through vimoe.optimize and can only be run: expected one as vimoe.load gives it")


class PackedLinear(nn.Module):
    """act(x W^T + b) for x (..., I), to (..., O), in the type of W, also where an autocast has made x another.

    Args:
        weight: (O, I).
        bias: (O,) or None.
        act: an activation, or None.

    Raises:
        VimoeError: if `forward` is to have a gradient: the operators would end it without a word.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, act: nn.Module | None = None) -> None:
        super().__init__()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self._bias = None if bias is None else bias.detach().contiguous()
        fused = _fused(act)
        self._name, self._algorithm = fused or ("none", "")
        self.act = nn.Identity() if fused or act is None else act

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise VimoeError(
                "a gradient is wanted through a model that went through vimoe.optimize: expected torch.no_grad(), or a "
                "model as vimoe.load gives it"
            )
        x = x.to(self._packed.dtype)
        y = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, self._name, [], self._algorithm)
        result: Tensor = self.act(y)
        return result

    def train(self, mode: bool = True) -> Self:
        if mode:  # nothing here would be trained, but the statistics of batch norms elsewhere
            _refuse()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        probe = torch.empty(0, dtype=self._packed.dtype)
        if (moved := fn(probe)).dtype != probe.dtype or moved.device != probe.device:
            _refuse()
        return super()._apply(fn, recurse)

    # torch cannot copy packed weights, and leaves them out of a state
    __reduce_ex__ = _save_to_state_dict = _refuse  # type: ignore[assignment]


def _fused(act: nn.Module | None) -> tuple[str, str] | None:
    """Return oneDNN's name and algorithm of an activation that it can compute with a product, else None."""
    if type(act) is nn.GELU:
        return "gelu", act.approximate
    return {nn.ReLU: ("relu", ""), nn.SiLU: ("swish", "")}.get(type(act))  # type: ignore[arg-type]


class PackedExperts(nn.Module):
    """Experts that are FFNs, as they compute in eval mode."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.kind = experts.kind
        weights = [experts.weights(e) for e in range(experts.num_experts)]
        act = None if self.kind.gated else experts.act
        self.act = experts.act
        self.fc1 = nn.ModuleList(PackedLinear(w["fc1.weight"], w.get("fc1.bias"), act) for w in weights)
        self.fc2 = nn.ModuleList(PackedLinear(w["fc2.weight"], w.get("fc2.bias")) for w in weights)
        self._norms = [(w["norm.weight"].clone(), w["norm.bias"].clone()) for w in weights if "norm.weight" in w]

    def forward(self, x_RUD: Tensor, source_S: Tensor | None, load_N: Tensor) -> Tensor:
        """(R, U, D) to (S, U, D); see `Experts.forward`."""
        if torch.compiler.is_exporting():
            _refuse()
        y_SUD = x_RUD.new_empty(len(x_RUD if source_S is None else source_S), *x_RUD.shape[1:])
        for e, at in loaded_experts(load_N):
            hidden = self.fc1[e](tokens_of(x_RUD, source_S, at))
            if self.kind.gated:
                gate, value = hidden.chunk(2, dim=-1)
                hidden = self.act(gate) * value
            if self.kind.norm_eps is not None:
                hidden = F.layer_norm(hidden, hidden.shape[-1:], *self._norms[e], self.kind.norm_eps)
            y_SUD[at] = self.fc2[e](hidden).view(-1, *x_RUD.shape[1:])
        return y_SUD
