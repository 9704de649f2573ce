"""A model cut in two before one of its blocks: what comes before is computed once where it does not change.

No model's forward is written anew. On features, which are what the first block after the cut gets, a model runs its own
forward with one black image, whose tokens nobody sees: the blocks of the trunk compute nothing, and the next one gets
the features in their place.

Axes: B images, T tokens, C channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from timm.layers import PatchDropout
from torch import Tensor, nn

from vimoe.errors import ConfigError
from vimoe.models.interface import block_name


@dataclass(frozen=True)
class Cut:
    """A place between two blocks of a model and of all its copies.

    Args:
        blocks: the module that holds the blocks ("blocks").
        start: the first block after the cut.
        size: (channels, height, width) of the images.
    """

    blocks: str
    start: int
    size: tuple[int, int, int]

    def trunk(self, model: nn.Module, images: Tensor) -> Tensor:
        """(B, T, C): what block `start` gets of images (B, *size)."""
        features: list[Tensor] = []

        def keep(x: Tensor, *_: Any, **__: Any) -> Tensor:
            features.append(x)
            return x

        with instead(self._all(model)[self.start :], keep):
            model(images)
        return features[0]

    def rest(self, model: nn.Module, features: Tensor) -> Tensor:
        """What the model gives for the images that the features (B, T, C) are of."""
        with self.given(model, features) as black:
            outputs: Tensor = model(black)
        return outputs

    @contextmanager
    def given(self, model: nn.Module, features: Tensor, maps: Mapping[int, Tensor] | None = None) -> Iterator[Tensor]:
        """While it holds, the model runs on these features, whatever the image; yields a black one.

        Args:
            model: the one that they are of, or a copy.
            features: (B, T, C).
            maps: by number what blocks before the cut give, of those that something else reads than the next block.
        """
        blocks = self._all(model)
        with ExitStack() as stack:
            for number, block in enumerate(blocks[: self.start]):
                kept = (maps or {}).get(number, features)
                stack.enter_context(instead([block], lambda *_, kept=kept, **__: kept))
            if self.start == 0:  # elsewhere there is no hook, which a checkpoint would miss that computes again
                first = blocks[0].register_forward_pre_hook(lambda _block, args: (features, *args[1:]))
                stack.callback(first.remove)
            yield features.new_zeros(1, *self.size)

    def outcome(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the last block gives, and what the model does, which a classifier of zeros would hide."""
        last: list[Tensor] = []
        with self._all(model)[-1].register_forward_hook(lambda _block, _args, output: last.append(output)):
            return model(images), last[0]

    def names_after(self, model: nn.Module) -> tuple[str, ...]:
        """What the names of the blocks after the cut begin with."""
        return tuple(f"{self.blocks}.{i}." for i in range(self.start, len(self._all(model))))

    def _all(self, model: nn.Module) -> list[nn.Module]:
        return list(model.get_submodule(self.blocks).children())


def cut_before(model: nn.Module, trained: Sequence[str], size: tuple[int, int, int]) -> Cut:
    """Return the cut before the first block in which one of the named layers is trained.

    Raises:
        ConfigError: as `check_cut`, or for a model that needs more than the output of the block before.
    """
    blocks, start = check_cut(model, trained)
    cut = Cut(blocks, start, size)
    weight = next(model.parameters())
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    with torch.no_grad():
        expected = cut.outcome(model.eval(), images)
        with cut.given(model, cut.trunk(model, images)) as black:
            found = cut.outcome(model, black)
    if not all(alike(ours, theirs) for ours, theirs in zip(found, expected, strict=True)):
        raise ConfigError(
            f"data.cache='features': {type(model).__name__} does not compute the same from what {blocks}.{start} gets: "
            f"expected a ViT whose blocks pass on tokens alone; use data.cache=disk"
        )
    return cut


def check_cut(model: nn.Module, trained: Sequence[str]) -> tuple[str, int]:
    """Return the name of the blocks, and the number of the first one with a trained layer. Computes nothing.

    Raises:
        ConfigError: for a model without trained layers, without blocks before them, or with patch dropout.
    """
    if not trained:
        raise ConfigError("data.cache='features': the model has no MoE layer to train: expected one; see moe.layers")
    places = [(block_name(model, name) or name).rpartition(".") for name in trained]
    start = min(int(number) for *_, number in places)
    if start == 0:
        raise ConfigError(
            f"data.cache='features': {trained[0]} is in the first block and trained: expected frozen blocks before it; "
            f"use data.cache=disk, or leave the block out of moe.layers"
        )
    if any(isinstance(module, PatchDropout) and module.prob for module in model.modules()):
        raise ConfigError("data.cache='features' keeps all patches: expected no patch_drop_rate in model.args")
    return places[0][0], start


def alike(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors are the same but for rounding, as far as the largest number in them goes."""
    tolerance = max(1e-3, 4 * torch.finfo(theirs.dtype).eps)
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


class Rest(nn.Module):
    """A model that takes features in the place of images."""

    def __init__(self, model: nn.Module, cut: Cut) -> None:
        super().__init__()
        self.model, self.cut = model, cut
        self.num_classes = model.num_classes

    def forward(self, features: Tensor) -> Tensor:
        return self.cut.rest(self.model, features)


def digest(model: nn.Module, cut: Cut) -> str:
    """Of all that is frozen and not after the cut: weights, buffers, and what else modules are told (heads, epsilons).

    What is trained is left out, so a training that goes on finds the features that it began with.
    """
    hashed = hashlib.blake2b(digest_size=12)
    after = cut.names_after(model)
    for name, module in model.named_modules():
        if not f"{name}.".startswith(after):
            told = {key: value for key, value in vars(module).items() if _says_how(value)}
            told = {key: value for key, value in told.items() if not key.startswith("_") and key != "training"}
            hashed.update(f"{name} {type(module).__name__} {sorted(told.items())}".encode())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, tensor in model.state_dict().items():
        if not name.startswith(after) and name not in trained:
            hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def _says_how(value: object) -> bool:
    return isinstance(value, (int, float, str, tuple)) or is_dataclass(value)  # an MoE layer has a config


@contextmanager
def instead(blocks: Sequence[nn.Module], forward: Callable[..., Tensor]) -> Iterator[None]:
    """While it holds, the blocks compute this."""
    before = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = forward
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            del block.forward
            if own is not None:
                block.forward = own
