"""The last block of a ViT, computed for those tokens alone that the head reads.

A head on the class token reads none of the patches that the last block gives. The block needs all tokens for keys and
values, and for nothing else: queries, attention, projection and FFN of the others are work that nobody reads. While the
ViT's own forward runs, its last block leaves that work out. Other ways to call it, such as timm's `forward_features`
and `forward_intermediates`, get all tokens, and so does a hook on the last block or on what gets its tokens.

A family says which tokens its head reads (`Backbone.read_tokens`), and which classes of its blocks can compute the
first tokens alone (`Backbone.narrowed`). What gets fewer tokens than before must be known to be token-wise: torch's own
layers are, and those of its library that the family names (`Backbone.tokenwise`).

Axes: B images, T tokens, D channels.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.parametrize import type_before_parametrizations

from vimoe.config.model import Read
from vimoe.errors import ConfigError
from vimoe.models.interface import Backbone, find_backbone
from vimoe.moe import MoE
from vimoe.moe.ffn import kind_of
from vimoe.moe.packed import PackedLinear
from vimoe.moe.routing import recomputing

Model = TypeVar("Model", bound=nn.Module)
_TOKENWISE = (nn.Identity, nn.Linear, PackedLinear, nn.Dropout, nn.LayerNorm, nn.RMSNorm)


class _Own(threading.local):
    """ViTs whose forward runs in this thread, with the last block and the tokens that it computes, the latest first."""

    def __init__(self) -> None:  # an attribute of the class would be a constant to torch.compile
        self.running: tuple[tuple[nn.Module, nn.Module, int], ...] = ()
        self.ignoring_hooks = False


_own = _Own()


class NarrowBlock(nn.Module):
    """A block that can compute its first tokens alone: a base class, before the class of the family's block.

    Attributes:
        within: the ViT while its forward runs, and its hook, for torch.compile, which follows hooks too; else empty.
    """

    within: tuple[Any, ...] = ()
    _latest: int | None = None

    def narrow(self, x_BTD: Tensor, read: int, *args: Any, **kwargs: Any) -> Tensor | None:
        """Return (B, read, D) what the block computes for the first tokens; None if arguments ask for all tokens."""
        raise NotImplementedError

    def forward(self, x_BTD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, T, D) to (B, read, D) while the ViT's own forward runs, else to (B, T, D)."""
        read = None if isinstance(x_BTD, Proxy) else self._read()  # a trace may be for the sake of any output
        y: Tensor | None = None if read is None else self.narrow(x_BTD, read, *args, **kwargs)
        return super().forward(x_BTD, *args, **kwargs) if y is None else y

    @property
    def narrows(self) -> bool:
        """True if all that gets the first tokens alone is known to be token-wise (`tokenwise`)."""
        raise NotImplementedError

    def _read(self) -> int | None:
        if torch.compiler.is_compiling() and self.within:
            vit, begin = self.within
            tokens: int | None = begin.constant(id(vit), id(self))
            return tokens
        read = next((read for _, block, read in _own.running if block is self), None)
        if recomputing() and read is None:  # checkpointing calls the block again, outside of the ViT's forward
            return self._latest
        if not torch.compiler.is_compiling():
            self._latest = read
        return read


class _End:
    """Forward hook of a ViT, also after an error: its last block gives all tokens again."""

    def __init__(self, holder: str) -> None:
        self.holder = holder

    def __call__(self, vit: nn.Module, _args: Any, _output: Any = None) -> None:
        if torch.compiler.is_compiling():
            for block in self._last(vit):
                block.within = ()
        elif _own.running:
            _own.running = tuple(each for each in _own.running if each[0] is not vit)

    def _last(self, vit: nn.Module) -> list[Any]:
        """Return the last block, if there is one."""
        return [*vit.get_submodule(self.holder).children()][-1:]


class _Begin(_End):
    """Forward pre-hook of a ViT: its last block may be narrow from here on."""

    def __init__(self, holder: str, vit: nn.Module) -> None:
        super().__init__(holder)
        self.vit = weakref.ref(vit)  # with a cycle, weights would stay in memory until it is found

    def __getstate__(self) -> tuple[str, nn.Module | None]:
        return self.holder, self.vit()

    def __setstate__(self, state: tuple[str, nn.Module]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __call__(self, vit: nn.Module, args: Any, _output: Any = None) -> None:
        super().__call__(vit, args)  # what an interrupted forward began has not ended
        for block in self._last(vit):
            if torch.compiler.is_compiling():
                block.within = (vit, self)  # the block asks, as it is compiled with the head, and this perhaps without
            elif (read := _tokens_now(vit, block)) is not None:
                _own.running = ((vit, block, read), *_own.running)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def constant(self, vit: int, block: int) -> int | None:
        """Return `_tokens_now` of modules by their ids, to stay in compiled code; torch 2.11 gives it no modules."""
        own = self.vit()
        if own is None or id(own) != vit:  # a shallow copy shares the hooks
            return None
        return next((_tokens_now(own, last) for last in self._last(own) if id(last) == block), None)


def set_reading(model: Model, read: Read = "auto") -> Model:
    """Let the model's forward compute only what its head reads, or everything again; in place.

    Outputs and gradients stay the same, to rounding. The classes of the last block and of its attention become
    subclasses that can do with less, as torch.nn.utils.parametrize changes a module's class. Names of modules and
    parameters stay, and it is not saved with the model: `vimoe.load` and `vimoe.upcycle` call it.

    In training and inference, the last block then routes only the tokens that are read. With token routing, records,
    balance losses and analysis are of these tokens, for no other token's route can matter there.

    Nothing changes in a model whose head reads patches (mean or attention pooling, segmentation), or whose class, last
    block or a part of it is not known for sure. Nor does it where a router of the last block needs the patches
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
        for number in [number for number, hook in hooks.items() if isinstance(hook, _End)]:
            del hooks[number]
    if read == "auto" and _narrow(backbone):
        backbone.vit.register_forward_pre_hook(_Begin(backbone.holder, backbone.vit))
        backbone.vit.register_forward_hook(_End(backbone.holder), always_call=True)
    return model


def tokens_read(model: nn.Module) -> int | None:
    """Return the number of tokens, the first ones, that the last block computes now; None for all.

    It is `set_reading` that makes it less than all, and a hook or a router of the last block that makes it all.
    """
    vit = find_backbone(model).vit
    begins = [hook for hook in vit._forward_pre_hooks.values() if isinstance(hook, _Begin)]
    return next((_tokens_now(vit, block) for begin in begins for block in begin._last(vit)), None)


@contextmanager
def ignoring_hooks() -> Iterator[None]:
    """Compute only what is read inside the `with` block, also for hooks, which then see fewer tokens."""
    before, _own.ignoring_hooks = _own.ignoring_hooks, True
    try:
        yield
    finally:
        _own.ignoring_hooks = before


def tokenwise(module: nn.Module, known: Collection[type[nn.Module]]) -> bool:
    """Return True for a module that is known to give a token the same whatever other tokens there are.

    Args:
        module: module.
        known: classes of such modules, beside torch's and vimoe's own.
    """
    if type(module) in (nn.Sequential, nn.ModuleList):
        return all(tokenwise(child, known) for child in module.children())
    if (kind := kind_of(module)) is not None:  # whose activation acts on each number
        return all(name == kind.act or tokenwise(child, known) for name, child in module.named_children())
    return isinstance(module, MoE) or type_before_parametrizations(module) in (*_TOKENWISE, *known)


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


def _watched(module: nn.Module, before: bool = True) -> bool:
    """Return True for a module with forward hooks that may look at tokens; those of FSDP gather weights."""
    hooks = [*module._forward_hooks.values(), *(module._forward_pre_hooks.values() if before else ())]
    owners = (type(getattr(hook, "__self__", None)).__module__ for hook in hooks)
    return any(not owner.startswith("torch.distributed.") for owner in owners)


def _tokens_now(vit: nn.Module, block: nn.Module) -> int | None:
    """Return the number of tokens of a block that the head reads; None if something needs all of them.

    It is asked at each forward, because blocks, heads, layers and hooks may have changed since the last.
    """
    backbone = find_backbone(vit)
    read = backbone.read_tokens
    if read is None:
        return None
    holder: Any = vit.get_submodule(backbone.holder)
    called = list(holder._modules.values())  # a block that is there twice is called twice
    if type(holder) not in (nn.Sequential, nn.ModuleList) or called.index(block) + 1 < len(called):
        return None
    known = all(tokenwise(part, backbone.tokenwise) for part in backbone.after_blocks)
    if not (known and isinstance(block, NarrowBlock) and block.narrows):
        return None
    compiled = block._compiled_call_impl is not None or "forward" in vars(block)
    if compiled and getattr(vit, "grad_checkpointing", False):
        return None  # it cannot tell that checkpointing computes it again
    if any(isinstance(m, MoE) and m.router.needs_patches for m in block.modules()):
        return None
    steps = accumulate(backbone.holder.split("."), lambda outer, inner: f"{outer}.{inner}")
    after = (*map(vit.get_submodule, steps), *backbone.after_blocks)  # all around the blocks, and what follows
    if not _own.ignoring_hooks and (
        any("forward" in vars(part) or _watched(part) for child in block.children() for part in child.modules())
        or _watched(block, before=False)  # pre-hooks get all tokens anyway
        or any(map(_watched, after))
        or any(part._backward_hooks or part._backward_pre_hooks for part in (*block.modules(), *after))
    ):
        return None
    return read
