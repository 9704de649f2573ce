"""Blocks that torch.compile compiles for the steps of a training.

Blocks are compiled one by one: those that differ in their weights alone share a compilation, and blocks are also what
runs on cached features. Weights keep their names. Shapes are fixed and a compilation is never given up for eager
computation, so what a step computes does not depend on the steps before it, and a resumed training is exact.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from vimoe.errors import ConfigError, first_line
from vimoe.models.frozen_trunk import replaced_forward
from vimoe.models.interface import find_backbone
from vimoe.process import device

BACKEND = "inductor"
VARIANTS = 8  # of each block that may be compiled, such as with frozen or random routers


@contextmanager
def compiled_blocks(model: nn.Module) -> Iterator[None]:
    """Let the blocks of a model compute compiled in training mode inside the `with` block, and as ever in eval mode.

    A copy of the model that is made meanwhile would compute with this one's weights.
    """
    blocks = [model.get_submodule(name) for name in find_backbone(model).blocks]
    # blocks of one class count together
    limits = torch._dynamo.config.patch(recompile_limit=VARIANTS * len(blocks), fail_on_recompile_limit_hit=True)
    with ExitStack() as stack:
        stack.callback(torch.compiler.reset)  # else blocks of later models would count towards the variants
        stack.enter_context(limits)
        for block in blocks:
            stack.enter_context(replaced_forward([block], _in_training(block)))
        yield


def _in_training(block: nn.Module) -> Callable[..., Tensor]:
    eager = block.forward
    compiled = torch.compile(eager, backend=BACKEND, dynamic=False)

    def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
        if not block.training:
            return eager(*args, **kwargs)
        try:
            y: Tensor = compiled(*args, **kwargs)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            why = first_line(getattr(error, "inner_exception", error))
            raise ConfigError(
                f"train.compile=true: torch.compile gave up ({why}): expected a compiler that works "
                f"here, and blocks that it can compile; leave train.compile out"
            ) from error
        return y

    return forward


def check_compiler() -> None:
    """Raise ConfigError if the processor that trains is a CPU, and torch.compile would find no C++ compiler for it."""
    name = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if device().type == "cpu" and shutil.which(name) is None:
        raise ConfigError(
            f"train.compile=true: there is no C++ compiler {name!r}: expected one; install it, name another in the "
            f"environment variable CXX, or leave train.compile out"
        )
