"""A model's forward, taken up again at one of its MoE layers: all that stands before the layer is remembered.

`PartialForward.find` tries which shortcuts leave a model's outputs unchanged. `PartialForward.forward` runs a batch and
records it at some layers. `PartialForward.rest` then computes the logits for other outputs of one layer.

Axes: B images, T tokens, D channels.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vimoe.errors import VimoeError
from vimoe.models.frozen_trunk import Cut, Entry, nearly_equal, replaced_forward
from vimoe.models.interface import Backbone, find_backbone, logits_of
from vimoe.models.reading import ignoring_hooks, tokens_read


@dataclass
class LayerRecord:
    """A batch recorded at one layer.

    Attributes:
        entry: entry of the layer's block, or that of the batch where the model cannot be cut.
        x, y: input and output (B, T, D) of the layer.
        shape: shape of the output as the layer gave it, which may be a grid.
        siblings: outputs of the other modules of the block that ran before the layer; None for a module that has to
            run again.
    """

    entry: Entry
    x: Tensor | None = None
    y: Tensor | None = None
    shape: tuple[int, ...] = ()
    siblings: dict[nn.Module, Tensor | None] = field(default_factory=dict)


@dataclass(frozen=True)
class PartialForward:
    """Shortcuts through a model's forward, from some of its layers on. `find` chooses them.

    Attributes:
        model: it may change later, but not before the first of the layers.
        first: number of the first block with one of the layers; None if the model can only run from where it began.
    """

    model: nn.Module
    first: int | None = None

    @classmethod
    def find(cls, model: nn.Module, layers: Sequence[str], start: Entry) -> PartialForward:
        """Return the cheapest shortcuts with which the model's outputs from this entry on stay the same.

        Args:
            model: model in eval mode.
            layers: names of the layers.
            start: entry of a few images, before the layers.

        Raises:
            VimoeError: if the model's outputs do not depend on the output of a layer.
        """
        backbone = find_backbone(model)
        inside = [backbone.block_of(name) for name in layers]
        candidates = []
        if all(block in backbone.blocks for block in inside):
            candidates.append(cls(model, min(backbone.blocks.index(str(block)) for block in inside)))
        found = next((each for each in candidates if each._fits(layers, start)), cls(model))
        if found.first is None and (ignored := found._ignored(found.forward(start, layers)[1])):
            raise VimoeError(
                f"the model gives the same whatever {ignored} gives: expected a model that calls its MoE layers; pass "
                f"the module that was compiled or traced in place of the result"
            )
        return found

    def forward(self, entry: Entry, layers: Iterable[str] = ()) -> tuple[Tensor, dict[str, LayerRecord]]:
        """Run the model from an entry on. Returns its logits, and a record of each of these layers."""
        with ExitStack() as stack:
            stack.enter_context(_hooked())
            x = stack.enter_context(entry.resumed(self.model))
            records = {name: stack.enter_context(self._recording(name, entry)) for name in layers}
            return logits_of(self.model, x), records

    def rest(self, layer: str, record: LayerRecord, rows: Tensor, y: Tensor) -> Tensor:
        """Return the logits for some of the images of a record if the layer gives y (rows, T, D) for them."""

        def remembered(output: Tensor) -> Callable[..., Tensor]:
            return lambda *_, **__: output

        outputs = {module: kept[rows] for module, kept in record.siblings.items() if kept is not None}
        replaced: Any = self.model.get_submodule(layer)
        outputs[replaced] = replaced.grid.placed(y, record.shape)
        with ExitStack() as stack:
            stack.enter_context(_hooked())
            x = stack.enter_context(record.entry[rows].resumed(self.model))
            for module, output in outputs.items():
                stack.enter_context(replaced_forward([module], remembered(output)))
            return logits_of(self.model, x)

    def blocks_after(self, layer: str) -> int:
        """Return the number of whole blocks that `rest` computes; 1 where the model runs from where it began."""
        if self.first is None:
            return 1
        narrow = tokens_read(self.model) is not None
        return max(0, len(self._backbone.blocks) - 1 - self._block_number(layer) - narrow)

    @contextmanager
    def entries(self, start: Entry) -> Iterator[list[Entry]]:
        """Collect entries at block `first`, one for each forward from `start` inside the `with` block; else `start`."""
        if self.first is None:
            with _hooked():
                yield [start]
            return
        with self._entries(self.first, start) as found, _hooked():
            yield found

    # ---- tried once, before it is trusted

    def _fits(self, layers: Sequence[str], start: Entry) -> bool:
        """Return True if the outputs are those of the whole model, and depend on each of the layers."""
        expected = start.logits(self.model)
        rows = torch.arange(len(start), device=start.inputs.device)
        try:
            found, records = self.forward(start, layers)
            again = [self.rest(name, each, rows, each.y) for name, each in records.items() if each.y is not None]
            return all(nearly_equal(each, expected) for each in (found, *again)) and not self._ignored(records)
        except Exception:  # whatever a forward raises that was not made for this
            return False

    def _ignored(self, records: Mapping[str, LayerRecord]) -> str:
        """Return the first layer whose output the model ignores (NaN does not reach the logits), or ''."""
        for name, record in records.items():
            if record.y is None:
                return name
            rows = torch.arange(len(record.y), device=record.y.device)
            if self.rest(name, record, rows, torch.full_like(record.y, math.nan)).isfinite().all():
                return name
        return ""

    # ---- what hooks collect while the model runs

    @contextmanager
    def _entries(self, number: int, start: Entry) -> Iterator[list[Entry]]:
        """Collect entries at a block, one for each forward inside the `with` block, which begins at `start`."""
        size: Any = start.cut.size if start.cut else tuple(start.inputs.shape[1:])
        backbone = self._backbone
        cut = Cut(backbone.blocks, number, size)
        blocks = [self.model.get_submodule(name) for name in backbone.blocks]
        maps: dict[int, Tensor] = {}
        found: list[Entry] = []

        def keep(number: int) -> Callable[..., None]:
            return lambda _block, _args, output: maps.update({number: output})

        handles = [blocks[i].register_forward_hook(keep(i)) for i in backbone.read_blocks if i < number]
        take = blocks[number].register_forward_pre_hook(lambda _, args: found.append(Entry(args[0], cut, dict(maps))))
        with _removed([*handles, take]):
            yield found

    @contextmanager
    def _recording(self, name: str, start: Entry) -> Iterator[LayerRecord]:
        """Record a layer in the forward inside the `with` block, which begins at `start`."""
        layer: Any = self.model.get_submodule(name)
        record = LayerRecord(start)
        entries: list[Entry] = []

        def enter(_layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            record.x = layer.grid.tokens(args[0])
            if entries:
                record.entry = entries[-1]

        def leave(_layer: nn.Module, _args: Any, output: Tensor) -> None:
            record.y, record.shape = layer.grid.tokens(output), output.shape

        def remember(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            inside = bool(entries)  # False for a module that an earlier block calls too
            of_images = inside and isinstance(output, Tensor) and output.shape[:1] == entries[-1].inputs.shape[:1]
            once = record.x is None and module not in record.siblings
            worth = of_images and once and not (args and output is args[0])
            record.siblings[module] = output if worth else None

        with ExitStack() as stack:
            handles = [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
            if self.first is not None:
                entries = stack.enter_context(self._entries(self._block_number(name), start))
                block = self._backbone.blocks[self._block_number(name)]
                siblings = _siblings(self.model.get_submodule(block), name.removeprefix(f"{block}.").split("."))
                handles += [module.register_forward_hook(remember) for module in siblings]
            stack.enter_context(_removed(handles))
            yield record

    @property
    def _backbone(self) -> Backbone:
        return find_backbone(self.model)

    def _block_number(self, name: str) -> int:
        backbone = self._backbone
        return backbone.blocks.index(str(backbone.block_of(name)))


@contextmanager
def _hooked() -> Iterator[None]:
    """Run models inside the `with` block with our hooks, and computing only what is read.

    What torch.compile has compiled does not call hooks that came later.
    """
    compiled = "torch._dynamo" in sys.modules  # else nothing was compiled, and its import takes a second
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext(), ignoring_hooks():
        yield


def _siblings(block: nn.Module, path: Sequence[str]) -> Iterator[nn.Module]:
    """Yield the modules of a block that are called beside the one at the path, none of them inside another."""
    for step in path:
        others = [child for name, child in block.named_children() if name != step]
        while others:
            module = others.pop()
            if isinstance(module, nn.ModuleList | nn.ModuleDict):  # which are not called themselves
                others += module.children()
            else:
                yield module
        block = block.get_submodule(step)


@contextmanager
def _removed(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of the `with` block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
