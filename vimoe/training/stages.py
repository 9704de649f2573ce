"""Stages of a training step: the forward and the backward pass of each block, and what lies outside of blocks.

A mesh gathers weights for the time of such a stage, so what a device holds at a moment depends on the moment's stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from vimoe.models.interface import find_backbone
from vimoe.moe.layer import moe_layers
from vimoe.moe.routing import recomputing

Phase = Literal["forward", "backward", "update"]
Moment = tuple[int, int, int]  # bytes of what the step has made: gradients of dense and expert weights at the end
Mark = Callable[[Phase, str, bool], None]  # of a stage that begins: phase, block, experts
Hook = Callable[..., None]


@dataclass(frozen=True)
class Stage:
    """A part of a step, from one mark to the next.

    Attributes:
        phase: forward pass, backward pass (in which checkpointing computes a forward again) or update of the weights.
        block: module name of the block that is computed; "" outside of blocks.
        experts: True inside of the experts of the block's MoE layer.
        start: bytes at its beginning.
        moments: bytes at moments of the stage. Those than which another one has as much or more of each are left out.
    """

    phase: Phase
    block: str
    experts: bool
    start: Moment
    moments: tuple[Moment, ...]


@contextmanager
def marked(model: nn.Module, mark: Mark) -> Iterator[None]:
    """Call a function when a stage of the forward or the backward pass begins inside the `with` block.

    Args:
        model: model whose passes are marked. Layers whose router mixes experts have no stage for them. The beginning of
            the whole backward pass, and of the update, are for the caller to mark.
        mark: function of phase, block and experts, as `Stage` has them.
    """
    backbone, marks = find_backbone(model), _Marks(mark)
    hooks: list[tuple[nn.Module, Hook, Hook]] = []
    for block in backbone.blocks:
        hooks.append((model.get_submodule(block), partial(marks.enter, block), partial(marks.leave, block)))
    for name, layer in moe_layers(model).items():
        block = backbone.block_of(name) or ""
        if block and not layer.router.mixes:
            hooks.append((layer.experts, partial(marks.enter_experts, block), partial(marks.leave_experts, block)))
    handles = [module.register_forward_pre_hook(before) for module, before, _ in hooks]
    handles += [module.register_forward_hook(after) for module, _, after in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Marks:
    """Hooks of modules and of gradients, which mark stages. A forward that is computed again has its first marks."""

    def __init__(self, mark: Mark) -> None:
        self.mark, self.first = mark, True

    def enter(self, block: str, _module: nn.Module, args: Any) -> None:
        if not recomputing():
            self.mark("forward", block, False)
            if self.first:  # at whose input the backward pass leaves all blocks
                _at_gradient(args, partial(self.mark, "backward", "", False))
            self.first = False

    def leave(self, block: str, _module: nn.Module, _args: Any, output: Any) -> None:
        if not recomputing():
            self.mark("forward", "", False)
            _at_gradient(output, partial(self.mark, "backward", block, False))

    def enter_experts(self, block: str, _module: nn.Module, args: Any) -> None:
        self.mark("backward" if recomputing() else "forward", block, True)
        _at_gradient(args, partial(self.mark, "backward", block, False))

    def leave_experts(self, block: str, _module: nn.Module, _args: Any, output: Any) -> None:
        if not recomputing():  # else their backward pass follows
            self.mark("forward", block, False)
            _at_gradient(output, partial(self.mark, "backward", block, True))


def _at_gradient(tensors: Any, call: Callable[[], None]) -> None:
    """Call a function when the gradient of the first of some tensors that has one is there."""
    for tensor in tree_iter(tensors):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(lambda _gradient: call())
            return
