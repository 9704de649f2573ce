"""The last block of a ViT, computed for those tokens alone that the head reads.

A head on the class token reads none of the patches that the last block gives. The block needs all tokens for keys and
values, and for nothing else: queries, attention, projection and FFN of the others are work that nobody reads. While the
ViT's own forward runs, its last block leaves that work out. Other ways to call it, such as timm's `forward_features`
and `forward_intermediates`, get all tokens, and so does a hook on the last block or on what gets its tokens.

A family says which tokens its head reads (`Backbone.read_tokens`), and which classes of its blocks can compute the
first tokens alone (`Backbone.narrowed`).

Axes: B images, T tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn

from vimoe.config.model import Read
from vimoe.errors import ConfigError
from vimoe.models.interface import Backbone, find_backbone
from vimoe.moe import MoE
from vimoe.moe.ffn import has_hooks, is_ffn
from vimoe.moe.routing import recomputing

Model = TypeVar("Model", bound=nn.Module)
_running: ContextVar[tuple[tuple[nn.Module, int | None], ...]] = ContextVar("vimoe_reading", default=())
_ignoring_hooks: ContextVar[bool] = ContextVar("vimoe_reading_ignores_hooks", default=False)


class NarrowBlock(nn.Module):
    """A block that can compute its first tokens alone: a base class, before the class of the family's block.

    Attributes:
        tokens: number of tokens that are read while torch.compile follows the ViT's hooks too; else None.
    """

    tokens: int | None = None
    _latest: int | None = None

    def narrow(self, x_BTD: Tensor, read: int, *args: Any, **kwargs: Any) -> Tensor | None:
        """Return (B, read, D) what the block computes for the first tokens; None if arguments ask for all tokens."""
        raise NotImplementedError

    def forward(self, x_BTD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, T, D) to (B, read, D) while the ViT's own forward runs, else to (B, T, D)."""
        read = self._read()
        y: Tensor | None = None if read is None else self.narrow(x_BTD, read, *args, **kwargs)
        return super().forward(x_BTD, *args, **kwargs) if y is None else y

    def _read(self) -> int | None:
        if self.tokens is not None:
            return self.tokens
        read = next((read for block, read in _running.get() if block is self), None)
        if recomputing() and read is None:  # checkpointing calls the block again, outside of the ViT's forward
            return self._latest
        if not torch.compiler.is_compiling():
            self._latest = read
        return read


class _Begin:
    """Forward pre-hook of a ViT: its last block may be narrow from here on."""

    def __init__(self, block: str) -> None:
        self.block = block

    def __call__(self, vit: nn.Module, _args: Any) -> None:
        block: Any = vit.get_submodule(self.block)
        read = _tokens_now(vit)
        if torch.compiler.is_compiling():  # it cannot set the variable, of which each thread has one
            block.tokens = read
        else:
            _running.set(((block, read), *_running.get()))


class _End(_Begin):
    """Forward hook of a ViT, also after an error: its last block gives all tokens again."""

    def __call__(self, vit: nn.Module, _args: Any, _output: Any = None) -> None:
        block: Any = vit.get_submodule(self.block)
        running = _running.get()
        if torch.compiler.is_compiling():
            block.tokens = None
        elif running and running[0][0] is block:
            _running.set(running[1:])


def set_reading(model: Model, read: Read = "auto") -> Model:
    """Let the model's forward compute only what its head reads, or everything again; in place.

    Outputs and gradients stay the same, to rounding. The classes of the last block and of its attention become
    subclasses that can do with less, as torch.nn.utils.parametrize changes a module's class. Names of modules and
    parameters stay, and it is not saved with the model: `vimoe.load` and `vimoe.upcycle` call it.

    In training and inference, the last block then routes only the tokens that are read. With token routing, records,
    balance losses and analysis are of these tokens, for no other token's route can matter there.

    Nothing changes in a model whose head reads patches (mean or attention pooling, segmentation), or whose class or
    last block is not known for sure. Nor does it where a router of the last block needs the patches
    (`Router.needs_patches`).

    Args:
        model: a ViT, or a module with one inside.
        read: "auto" to compute what is read, "all" for everything.

    Returns:
        The same model.

    Raises:
        ConfigError: if `read` is neither.

    >>> import timm, torch, vimoe
    >>> model, images = timm.create_model("test_vit").eval(), torch.randn(2, 3, 160, 160)
    >>> logits, tokens = model(images), model.forward_features(images)
    >>> model = vimoe.set_reading(model)
    >>> torch.allclose(model(images), logits, atol=1e-5), model.forward_features(images).shape == tokens.shape
    (True, True)
    """
    if read not in get_args(Read):
        raise ConfigError(f"read={read!r}: expected 'auto' or 'all'")
    backbone = find_backbone(model)
    _change_classes(backbone, {narrow: whole for whole, narrow in backbone.narrowed.items()})
    for hooks in (backbone.vit._forward_pre_hooks, backbone.vit._forward_hooks):
        for number in [number for number, hook in hooks.items() if isinstance(hook, _Begin)]:
            del hooks[number]
    if read == "auto" and _narrow(backbone):
        name = backbone.blocks[-1].removeprefix(f"{backbone.path}.")
        backbone.vit.register_forward_pre_hook(_Begin(name))
        backbone.vit.register_forward_hook(_End(name), always_call=True)
    return model


def tokens_read(model: nn.Module) -> int | None:
    """Return the number of tokens, the first ones, that the last block computes now; None for all.

    It is `set_reading` that makes it less than all, and a hook or a router of the last block that makes it all.
    """
    vit = find_backbone(model).vit
    return _tokens_now(vit) if any(isinstance(hook, _Begin) for hook in vit._forward_pre_hooks.values()) else None


@contextmanager
def ignoring_hooks() -> Iterator[None]:
    """Compute only what is read inside the `with` block, also for hooks, which then see fewer tokens."""
    token = _ignoring_hooks.set(True)
    try:
        yield
    finally:
        _ignoring_hooks.reset(token)


def tokenwise(module: nn.Module) -> bool:
    """Return True for a module that gives a token the same whatever other tokens there are: an FFN or MoE layer."""
    return isinstance(module, MoE) or is_ffn(module)


def _narrow(backbone: Backbone) -> bool:
    """Give modules of the last block the classes that can do with less; return True if the block itself has one."""
    if backbone.read_tokens is None or backbone.read_blocks or not backbone.blocks:
        return False
    block = backbone.model.get_submodule(backbone.blocks[-1])
    if type(block) not in backbone.narrowed:
        return False
    _change_classes(backbone, backbone.narrowed)
    return True


def _change_classes(backbone: Backbone, classes: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Replace the classes of the last block and its parts."""
    for name in backbone.blocks[-1:]:
        for module in backbone.model.get_submodule(name).modules():
            module.__class__ = classes.get(type(module), type(module))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _tokens_now(vit: nn.Module) -> int | None:
    """Return the number of tokens that the head reads; None if something needs all of them.

    It is asked at each forward, because heads, layers and hooks may have changed since the last.
    """
    backbone = find_backbone(vit)
    read, block = backbone.read_tokens, vit.get_submodule(backbone.blocks[-1])
    compiled = block._compiled_call_impl is not None or "forward" in vars(block)
    if compiled and getattr(vit, "grad_checkpointing", False):
        return None  # it cannot tell that checkpointing computes it again
    if read is None or any(isinstance(m, MoE) and m.router.needs_patches for m in block.modules()):
        return None
    if not _ignoring_hooks.get() and (
        any(has_hooks(part) for part in block.children())
        or block._forward_hooks  # pre-hooks get all tokens anyway
        or any(part._forward_hooks or part._forward_pre_hooks for part in backbone.after_blocks)
    ):
        return None
    return read
