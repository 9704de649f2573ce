"""The Routing record that routers make and losses and analysis read, and the recorder that collects it.

Axes: B images, T tokens of an image, R routed units (B images, or B * T tokens), N experts, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from vimoe.errors import VimoeError, expect


@dataclass(frozen=True)
class Routing:
    """The decision of one MoE layer for one batch.

    Attributes:
        logits: (R, N) the router's scores without noise, float32 (float64 in a float64 model).
        gates: (R, K) the weight of each chosen expert, in the type of the logits.
        experts: (R, K) int64, the chosen experts, the first choice first.
        unit: what was routed. Row r of the above is image r, or token r % T of image r // T.
        batch: (B, T), images and tokens of an image.
        layer: module name of the layer, where a recorder knows it.

    >>> import timm, torch, vimoe
    >>> model = vimoe.upcycle(timm.create_model("test_vit"), vimoe.MoEConfig(layers="last:1", num_experts=4))
    >>> with vimoe.record(model) as routings:
    ...     logits = model(torch.randn(2, 3, 160, 160))
    >>> def mean_gate(routing: vimoe.Routing) -> float:
    ...     return routing.gates.mean().item()
    >>> 0 < mean_gate(routings[0]) < 1
    True
    """

    logits: Tensor
    gates: Tensor
    experts: Tensor
    unit: Literal["image", "token"]
    batch: tuple[int, int]
    layer: str = ""

    @property
    def num_experts(self) -> int:
        """N, the number of experts that could be chosen."""
        return self.logits.shape[-1]

    @property
    def tokens_per_unit(self) -> int:
        """Tokens that share one decision."""
        return 1 if self.unit == "token" else self.batch[1]

    @property
    def probabilities(self) -> Tensor:
        """(R, N) softmax of the logits, over all experts."""
        return self.logits.softmax(dim=-1)

    @property
    def load(self) -> Tensor:
        """(N,) units that each expert received."""
        chosen = self.experts.flatten()  # no bincount: its size would depend on the data, which torch.compile minds
        return chosen.new_zeros(self.num_experts).scatter_add_(0, chosen, torch.ones_like(chosen))

    def detach(self) -> Routing:
        """The same without gradient, to be kept beyond the step that it is of."""
        return replace(self, logits=self.logits.detach(), gates=self.gates.detach())

    @property
    def image(self) -> Tensor:
        """(R,) index of the image in the batch that each unit belongs to."""
        images, tokens = self.batch
        index = torch.arange(images, device=self.experts.device)
        return index if self.unit == "image" else index.repeat_interleave(tokens)


class _Recorder:
    def __init__(self, names: dict[int, str]) -> None:
        self.names = names
        self.with_grad = torch.is_grad_enabled()
        self.routings: list[Routing] = []


_recorders: ContextVar[tuple[_Recorder, ...]] = ContextVar("vimoe_recorders", default=())


@contextmanager
def record(model: nn.Module) -> Iterator[list[Routing]]:
    """Collects the routing of every MoE layer of the model while the block runs.

    The list has one `Routing` for each MoE layer in forward order, and as many again for each further forward.
    The innermost recorder of a model gets its routings, and a recorder sees only its own thread. Recomputation
    under gradient checkpointing is not recorded twice.

    Raises:
        VimoeError: where a layer runs without gradient inside a recorder that was entered with it. Reentrant
            checkpointing does that, and a loss of such a record would train nothing.

    >>> import timm, torch, vimoe
    >>> model = vimoe.upcycle(timm.create_model("test_vit"), vimoe.MoEConfig(layers="last:2", num_experts=4))
    >>> with vimoe.record(model) as routings:
    ...     logits = model(torch.randn(2, 3, 160, 160))
    >>> [routing.layer for routing in routings]
    ['blocks.4.mlp', 'blocks.5.mlp']
    """
    expect("model", model, nn.Module, "give the one that is to be recorded")
    names = {id(module): name for name, module in model.named_modules()}
    recorder = _Recorder(names)
    token = _recorders.set((*_recorders.get(), recorder))
    try:
        yield recorder.routings
    finally:
        _recorders.reset(token)


def note(layer: nn.Module, routing: Routing) -> None:
    """Hands the layer's routing to the innermost recorder that covers it, if there is one."""
    for recorder in reversed(_recorders.get()):
        if id(layer) not in recorder.names:
            continue
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return  # inside a backward pass: checkpointing computes the forward again
        if recorder.with_grad and not torch.is_grad_enabled():
            raise VimoeError(
                f"{recorder.names[id(layer)]} ran without gradient inside vimoe.record(), so losses of the record "
                f"would train nothing: expected gradient as where record() was entered; use non-reentrant "
                f"checkpointing (use_reentrant=False), or enter torch.no_grad() before record()"
            )
        recorder.routings.append(replace(routing, layer=recorder.names[id(layer)]))
        return
