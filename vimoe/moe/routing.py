"""The decisions of a layer for a batch: which experts get which tokens; and the recorder that collects them.

Axes: B images, T tokens of an image, R rows that are routed (B images, or B * T tokens), N experts, K slots of a row.
Outputs of experts have U tokens of a row (T for an image, else 1), D channels, and S filled slots in the order of
experts.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from vimoe.errors import VimoeError, expect


class Pairs(NamedTuple):
    """Filled slots of a batch as flat tensors (S,), row by row, the first choice first.

    Attributes:
        row: int64, index of the row (an image or a token) in the batch.
        expert: int64, index of the expert that gets it.
        gate: weight of that expert, in the type of the logits.
    """

    row: Tensor
    expert: Tensor
    gate: Tensor


@dataclass(frozen=True)
class Routing:
    """Decisions of one MoE layer for one batch: each row has K slots, and a slot holds an expert or nothing.

    Attributes:
        logits: (R, N) scores of the router without noise, float32 (float64 in a float64 model).
        gates: (R, K) weight of the expert in each slot, in the type of the logits; 0 where the slot is empty.
        experts: (R, K) int64, the chosen experts, the first choice first; -1 in empty slots, which come last.
        unit: "image" or "token". Row r of the above is image r, or token r % T of image r // T.
        batch: (B, T), number of images and of tokens of an image.
        layer: module name of the layer; a recorder sets it.
        ragged: True if slots can be empty. The router says so without a look at the data.
        outputs: (R, K, U, D) output of the expert in each slot before it is weighted, 0 where the slot is empty; with
            `moe.orthogonal` the orthogonal one. None unless they are recorded, and always for a router that mixes
            tokens or experts.
        kinds: (R,) int64 kind of each row, and so the pool of experts that it is confined to (`moe.groups`); scores of
            experts of other pools are -inf. None where there is one pool.
        pools: number of experts of each pool; empty where there is one.

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
    ragged: bool = False
    outputs: Tensor | None = None
    kinds: Tensor | None = None
    pools: tuple[int, ...] = ()

    @property
    def num_experts(self) -> int:
        """N, number of experts that could be chosen."""
        return self.logits.shape[-1]

    @property
    def tokens_per_unit(self) -> int:
        """Number of tokens that share one decision."""
        return 1 if self.unit == "token" else self.batch[1]

    @property
    def probabilities(self) -> Tensor:
        """(R, N) softmax of the logits over all experts, whatever the gates are made of."""
        return self.logits.softmax(dim=-1)

    @property
    def pairs(self) -> Pairs:
        """Filled slots as flat tensors. Their number depends on the data where the routing is ragged."""
        row, slot = (self.experts >= 0).nonzero(as_tuple=True)
        return Pairs(row, self.experts[row, slot], self.gates[row, slot])

    @property
    def chosen(self) -> Tensor:
        """(R, N) bool, True for the experts that a row got."""
        return self._by_expert(torch.ones_like(self.experts, dtype=torch.bool))

    @property
    def expert_gates(self) -> Tensor:
        """(R, N) gate of each expert, 0 where it was not chosen."""
        return self._by_expert(self.gates)

    def _by_expert(self, values_RK: Tensor) -> Tensor:
        """(R, K) values of slots to (R, N), 0 for experts that are in none."""
        zeros = values_RK.new_zeros(values_RK.shape[0], self.num_experts + 1)  # the first is for empty slots
        return zeros.scatter(1, self.experts + 1, values_RK)[:, 1:]

    @property
    def load(self) -> Tensor:
        """(N,) number of rows that each expert got."""
        return self._count(self.experts.flatten())

    @property
    def usage(self) -> Tensor:
        """(B, N) number of rows of each image that each expert got."""
        images, tokens = self.batch  # sizes are named, because an empty batch leaves -1 open
        rows = 1 if self.unit == "image" else tokens
        return self._count(self.experts.reshape(images, rows * self.experts.shape[1]))

    def _count(self, experts: Tensor) -> Tensor:
        """(..., M) experts, or -1, to (..., N): how often each expert is there."""
        shifted = experts + 1  # no bincount: its size would depend on the data, which torch.compile minds
        counts = experts.new_zeros(*experts.shape[:-1], self.num_experts + 1)
        return counts.scatter_add_(-1, shifted, torch.ones_like(shifted))[..., 1:]

    @property
    def by_gate(self) -> Routing:
        """The same decisions, with the slots of a row by falling gate; slots with equal gates stay in their order."""
        order_RK = (-self.gates.detach()).argsort(dim=-1, stable=True)
        return replace(self, gates=self.gates.gather(-1, order_RK), experts=self.experts.gather(-1, order_RK))

    @property
    def by_pool(self) -> list[Routing]:
        """The rows of each pool that has any, with the scores of its experts alone, as if it were a layer of its own.

        Without pools these are all rows. Else a part has the slots of its rows, and counts each as an image.
        """
        if self.kinds is None:
            return [self]
        parts, first = [], 0
        for kind, size in enumerate(self.pools):
            row = (self.kinds == kind).nonzero()[:, 0]
            part = self.of_rows(row)
            experts = torch.where(part.experts >= 0, part.experts - first, part.experts)
            part = replace(part, logits=part.logits[:, first : first + size], experts=experts, kinds=None, pools=())
            parts += [part] if len(row) else []
            first += size
        return parts or [self]

    def of_rows(self, row: Tensor) -> Routing:
        """Return the decisions for some rows, given by their (S,) int64 indices; each counts as an image."""
        return replace(
            self, logits=self.logits[row], gates=self.gates[row], experts=self.experts[row], batch=(len(row), 1),
            outputs=None if self.outputs is None else self.outputs[row],
            kinds=None if self.kinds is None else self.kinds[row],
        )  # fmt: skip

    def only(self, expert: int) -> Routing:
        """Return decisions that send every row to one expert alone, with the sum of the gates that the row has.

        Rows of other pools than the expert's keep theirs.
        """
        experts_RK, gates_RK = torch.full_like(self.experts, -1), torch.zeros_like(self.gates)
        experts_RK[:, 0], gates_RK[:, 0] = expert, self.gates.sum(dim=1)
        if self.kinds is not None:
            elsewhere_R1 = self.logits[:, expert, None] == -torch.inf
            experts_RK = torch.where(elsewhere_R1, self.experts, experts_RK)
            gates_RK = torch.where(elsewhere_R1, self.gates, gates_RK)
        return replace(self, experts=experts_RK, gates=gates_RK, ragged=True)

    def places(self, filled: int) -> Tensor:
        """Return (S,) where each filled slot is among all R * K; they are sorted by expert, and `filled` is S."""
        chosen = self.experts.flatten()
        return chosen.where(chosen >= 0, self.num_experts).argsort(stable=True)[:filled]

    def by_slot(self, y_SUD: Tensor) -> Tensor:
        """Return (R, K, U, D) the rows of y (S, U, D), sorted by expert, in the slots that they are of; else 0."""
        slots = y_SUD.new_zeros(self.experts.numel(), *y_SUD.shape[1:])
        return slots.index_copy(0, self.places(y_SUD.shape[0]), y_SUD).unflatten(0, self.experts.shape)

    def detach(self) -> Routing:
        """Return the same decisions without gradient and outputs, to be kept beyond their training step."""
        return replace(self, logits=self.logits.detach(), gates=self.gates.detach(), outputs=None)

    def without_gradient(self, row: Tensor) -> Routing:
        """Return the same decisions, of which the rows that are True in (R,) bool have no gradient."""
        outputs = None if self.outputs is None else part_detached(self.outputs, row)
        return replace(
            self, logits=part_detached(self.logits, row), gates=part_detached(self.gates, row), outputs=outputs
        )

    @property
    def image(self) -> Tensor:
        """(R,) index of the image in the batch that each row belongs to."""
        images, tokens = self.batch
        index = torch.arange(images, device=self.experts.device)
        return index if self.unit == "image" else index.repeat_interleave(tokens)


def part_detached(x: Tensor, row: Tensor) -> Tensor:
    """Return x (R, ...) with the same values, and without gradient in the rows that are True in (R,) bool."""
    return x.detach().where(row.view(-1, *[1] * (x.ndim - 1)), x)


class _Recorder:
    def __init__(self, names: dict[int, str], outputs: bool) -> None:
        self.names, self.outputs = names, outputs
        self.with_grad = torch.is_grad_enabled()
        self.routings: list[Routing] = []


class _Own(threading.local):
    """Recorders of this thread, the innermost last."""

    def __init__(self) -> None:  # an attribute of the class would be a constant to torch.compile
        self.recorders: tuple[_Recorder, ...] = ()


_own = _Own()


@contextmanager
def record(model: nn.Module, outputs: bool = False) -> Iterator[list[Routing]]:
    """Collect the routing of every MoE layer of the model while the block runs.

    The list has one `Routing` for each MoE layer in forward order, and as many again for each further forward.
    The innermost recorder of a model gets its routings, and a recorder sees only its own thread. Recomputation
    under gradient checkpointing is not recorded twice.

    Args:
        model: model to record.
        outputs: record the outputs of the chosen experts too (`Routing.outputs`); they are copied once more.

    Raises:
        VimoeError: if a layer runs without gradient inside a recorder that was entered with it. Reentrant
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
    recorder = _Recorder(names, outputs)
    _own.recorders = (*_own.recorders, recorder)
    try:
        yield recorder.routings
    finally:
        _own.recorders = tuple(each for each in _own.recorders if each is not recorder)


def recomputing() -> bool:
    """Return True inside a backward pass, where checkpointing computes a forward again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def note(layer: nn.Module, routing: Routing, y_SUD: Tensor | None = None) -> None:
    """Hand a layer's routing, and the outputs of its experts, to the innermost recorder that covers the layer."""
    for recorder in reversed(_own.recorders):
        if id(layer) not in recorder.names:
            continue
        if recomputing():
            return
        if recorder.with_grad and not torch.is_grad_enabled():
            raise VimoeError(
                f"{recorder.names[id(layer)]} ran without gradient inside vimoe.record(), so losses of the record "
                f"would train nothing: expected gradient as where record() was entered; use non-reentrant "
                f"checkpointing (use_reentrant=False), or enter torch.no_grad() before record()"
            )
        outputs = routing.by_slot(y_SUD) if recorder.outputs and y_SUD is not None else None
        recorder.routings.append(replace(routing, layer=recorder.names[id(layer)], outputs=outputs))
        return
