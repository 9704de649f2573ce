"""A model run again from one of its MoE layers on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vimoe.errors import VimoeError
from vimoe.models.frozen_trunk import Cut, alike, instead
from vimoe.models.interface import block_name
from vimoe.models.segmenter import Segmenter
from vimoe.models.upcycling import sites

# ---- from a layer on


@dataclass(frozen=True)
class Start:
    """Where the forward of a batch is taken up: at its images, or at what the block after a cut gets of them.

    Attributes:
        inputs: images (B, ...), or features (B, T, C).
        cut: None for images.
        maps: as in `Cut.given`.
    """

    inputs: Tensor
    cut: Cut | None = None
    maps: Mapping[int, Tensor] = field(default_factory=dict)

    def __getitem__(self, rows: Tensor | slice) -> Start:
        """The same of some of the images."""
        return Start(self.inputs[rows], self.cut, {number: each[rows] for number, each in self.maps.items()})

    def given(self, model: nn.Module) -> AbstractContextManager[Tensor]:
        """While it holds, the model runs from here on; yields what to call it with."""
        return self.cut.given(model, self.inputs, self.maps) if self.cut else nullcontext(self.inputs)

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return sum(each.nbytes for each in (self.inputs, *self.maps.values()))


@dataclass
class Passage:
    """A batch on its way through one layer.

    Attributes:
        start: of the layer's block, or of the model where that cannot be cut.
        x, y: what the layer got and gave, of the tokens that are read.
        beside: what other parts of its block gave before it; None of those that run again after it.
    """

    start: Start
    x: Tensor | None = None
    y: Tensor | None = None
    beside: dict[nn.Module, Tensor | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Way:
    """How a model can be run again from some of its layers on. `find` tries it.

    Attributes:
        model: it may change, but not before the first of these layers, nor in which tokens are read.
        blocks: the module that holds its blocks; "" where it can only be run from the images.
        first: the first block with one of the layers.
        read: how many of the tokens that leave the last block something reads, the first ones; None for all. The FFNs
            of the last block leave the others out, which are NaN from there on: who did read them would show it.
    """

    model: nn.Module
    blocks: str = ""
    first: int = 0
    read: int | None = None

    @classmethod
    def find(cls, model: nn.Module, layers: Sequence[str], images: Tensor, prefix: int) -> Way:
        """The cheapest way on which the model gives what it does for these images.

        Args:
            model: in eval mode.
            layers: their names.
            images: a few.
            prefix: how many tokens are no patches.

        Raises:
            VimoeError: where the model gives the same whatever a layer gives.
        """
        places = [(block_name(model, name) or "").rpartition(".") for name in layers]
        ways = []
        if places[0][0] and len({blocks for blocks, *_ in places}) == 1:
            whole = cls(model, places[0][0], min(int(number) for *_, number in places))
            ways = [*([replace(whole, read=prefix)] if prefix else []), whole]
        way = next((way for way in ways if way._fits(layers, images)), cls(model))
        if not way.blocks and (deaf := way._deaf(way.forward(Start(images), layers)[1])):
            raise VimoeError(
                f"the model gives the same whatever {deaf} gives: expected a model that calls its MoE layers; pass the "
                f"module that was compiled or traced in place of the result"
            )
        return way

    def _fits(self, layers: Sequence[str], images: Tensor) -> bool:
        expected = self.model(images)
        rows = torch.arange(len(images), device=images.device)
        try:
            found, passages = self.forward(Start(images), layers)
            again = [self.rest(name, p, rows, p.y) for name, p in passages.items() if p.y is not None]
            return all(alike(each, expected) for each in (found, *again)) and not self._deaf(passages)
        except Exception:  # whatever a forward raises that was not made for this
            return False

    def _deaf(self, passages: Mapping[str, Passage]) -> str:
        """The name of a layer that could give NaN and nobody would see it, as where its forward was compiled away."""
        for name, p in passages.items():
            if p.y is None:
                return name
            rows = torch.arange(len(p.y), device=p.y.device)
            if self.rest(name, p, rows, torch.full_like(p.y, math.nan)).isfinite().all():
                return name
        return ""

    def forward(self, start: Start, layers: Iterable[str] = ()) -> tuple[Tensor, dict[str, Passage]]:
        """What the model gives from here on, and the passages through these layers."""
        with ExitStack() as stack:
            x = stack.enter_context(start.given(self.model))
            stack.enter_context(self._computing({}))
            passages = {name: stack.enter_context(self._watching(name, start)) for name in layers}
            outputs: Tensor = self.model(x)
        return outputs, passages

    def blocks_after(self, layer: str) -> int:
        """How many whole blocks `rest` computes; more than that where the model is run from the images."""
        after = self._depth - 1 - int((block_name(self.model, layer) or "").rpartition(".")[2]) if self.blocks else 1
        return max(0, after - (self.read is not None))

    def rest(self, layer: str, passage: Passage, rows: Tensor, y: Tensor) -> Tensor:
        """What the model gives for some of the images of a passage where the layer gives y (rows, tokens, D)."""

        def remembered(kept: Tensor) -> Callable[..., Tensor]:
            return lambda *_, **__: kept[rows]

        forwards = {part: remembered(kept) for part, kept in passage.beside.items() if kept is not None}
        with (
            passage.start[rows].given(self.model) as x,
            self._computing({**forwards, self.model.get_submodule(layer): lambda *_, **__: y}),
        ):
            outputs: Tensor = self.model(x)
        return outputs

    @contextmanager
    def starts(self, images: Tensor) -> Iterator[list[Start]]:
        """Of the first block with a layer (or the images), in each forward of the model that runs while it holds."""
        if not self.blocks:
            yield [Start(images)]
            return
        with self._starts(self.first, Start(images)) as found:
            yield found

    @contextmanager
    def _starts(self, number: int, start: Start) -> Iterator[list[Start]]:
        """Of a block, in each forward that runs while it holds and begins at this start."""
        size: Any = start.cut.size if start.cut else tuple(start.inputs.shape[1:])
        cut = Cut(self.blocks, number, size)
        blocks = list(self.model.get_submodule(self.blocks).children())
        maps: dict[int, Tensor] = {}
        found: list[Start] = []

        def keep(number: int) -> Callable[..., None]:
            return lambda _block, _args, output: maps.update({number: output})

        read: Any = self.model.decoder.blocks if isinstance(self.model, Segmenter) else ()
        handles = [blocks[i].register_forward_hook(keep(i)) for i in read if i < number]
        take = blocks[number].register_forward_pre_hook(lambda _, args: found.append(Start(args[0], cut, dict(maps))))
        with _removed([*handles, take]):
            yield found

    @contextmanager
    def _watching(self, name: str, start: Start) -> Iterator[Passage]:
        """The passage through a layer of the forward that runs while it holds."""
        layer, passage = self.model.get_submodule(name), Passage(start)
        counted = slice(self.read if self._last and name.startswith(self._last) else None)

        def enter(_layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            passage.x = args[0][:, counted]
            if self.blocks:
                passage.start = replace(starts[-1], inputs=starts[-1].inputs[:, counted])

        def leave(_layer: nn.Module, _args: Any, output: Tensor) -> None:
            passage.y = output[:, counted]

        def remember(part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            whole = bool(starts) and isinstance(output, Tensor) and output.shape == starts[-1].inputs.shape
            once = passage.x is None and part not in passage.beside
            worth = whole and once and not (args and output is args[0])
            passage.beside[part] = output[:, counted] if worth else None

        if not self.blocks:
            with _removed([layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]):
                yield passage
            return
        inside = block_name(self.model, name) or ""
        parts = _beside(self.model.get_submodule(inside), name.removeprefix(f"{inside}.").split("."))
        with (
            self._starts(int(inside.rpartition(".")[2]), start) as starts,
            _removed([
                layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave),
                *(part.register_forward_hook(remember) for part in parts),
            ]),
        ):  # fmt: skip
            yield passage

    @property
    def _last(self) -> str:
        """What names of modules in the last block begin with; "" where all tokens are read."""
        if self.read is None:
            return ""
        return f"{self.blocks}.{self._depth - 1}."

    @property
    def _depth(self) -> int:
        return len(list(self.model.get_submodule(self.blocks).children()))

    @contextmanager
    def _computing(self, forwards: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
        """While it holds, modules compute this, and FFNs of the last block leave out the tokens that nobody reads."""
        forwards = dict(forwards)
        if self.read is not None:
            for module in (site.module for site in sites(self.model) if site.name.startswith(self._last)):
                forwards[module] = _of_first(self.read, forwards.get(module, module.forward))
        with ExitStack() as stack:
            for module, forward in forwards.items():
                stack.enter_context(instead([module], forward))
            yield


def _of_first(tokens: int, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The forward of an FFN for the first tokens alone; what it would give for the others is NaN."""

    def of_first(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = forward(x[:, :tokens], *args, **kwargs)
        return F.pad(y, (0, 0, 0, x.shape[1] - tokens), value=math.nan)

    return of_first


def _beside(block: nn.Module, path: Sequence[str]) -> Iterator[nn.Module]:
    """The parts of a block that are called before or after the one at the path, and not inside of one another."""
    for step in path:
        others = [child for name, child in block.named_children() if name != step]
        while others:
            part = others.pop()
            if isinstance(part, nn.ModuleList | nn.ModuleDict):  # which are not called themselves
                others += part.children()
            else:
                yield part
        block = block.get_submodule(step)


@contextmanager
def _removed(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Removes hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
