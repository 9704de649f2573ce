"""A model cut in two before one of its blocks, so that what stands before the cut, the trunk, is computed once.

No model's forward is written anew. On features, the tokens that enter the first block after the cut, a model runs its
own forward with one black image: the blocks of the trunk compute nothing, and the next block gets the features. An
`Entry` is what a batch begins with, images or features, for code that should not care which.

Axes: B images, T tokens, D channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vimoe.errors import ConfigError
from vimoe.models.interface import find_backbone, logits_of

_ONLY_IN_TRAINING = (nn.Identity, nn.Dropout, DropPath)  # classes of modules that return what they get in eval mode


@dataclass(frozen=True)
class Cut:
    """A cut between two blocks of a model, and of all its copies.

    Args:
        blocks: module names of all blocks of the model, in forward order.
        start: number of the first block after the cut.
        size: (channels, height, width) of the images.
    """

    blocks: tuple[str, ...]
    start: int
    size: tuple[int, int, int]

    @property
    def before(self) -> str:
        """Module name of the first block after the cut."""
        return self.blocks[self.start]

    def trunk(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the features (B, T, D) of images (B, *size)."""
        features: list[Tensor] = []
        output_with = find_backbone(model).output_with

        def keep(x: Tensor, *_: Any, **__: Any) -> Any:
            features.append(x)
            return output_with(x)

        with replaced_forward(self._modules(model)[self.start :], keep):
            model(images)
        return features[0]

    def rest(self, model: nn.Module, features: Tensor) -> Tensor:
        """Return the logits that the model gives for images with these features (B, T, D)."""
        return Entry(features, self).logits(model)

    @contextmanager
    def resumed(self, model: nn.Module, features: Tensor, maps: Mapping[int, Tensor] | None = None) -> Iterator[Tensor]:
        """Let the model compute from features, whatever the image, inside the `with` block; yields a black image.

        Args:
            model: the model that made the features, or a copy.
            features: (B, T, D).
            maps: outputs of blocks before the cut, by number, that more than the next block reads (a decoder).
        """
        blocks, output_with = self._modules(model), find_backbone(model).output_with
        with ExitStack() as stack:
            for number, block in enumerate(blocks[: self.start]):
                kept = output_with((maps or {}).get(number, features))
                stack.enter_context(replaced_forward([block], lambda *_, kept=kept, **__: kept))
            if self.start == 0:  # elsewhere no hook: activation checkpointing would miss it when it computes again
                first = blocks[0].register_forward_pre_hook(lambda _block, args: (features, *args[1:]))
                stack.callback(first.remove)
            yield features.new_zeros(1, *self.size)

    def is_exact(self, model: nn.Module, images: Tensor) -> bool:
        """Return True if the model computes from features what it computes from these images.

        Outputs of the last block are compared too, because a classifier of zeros would hide all differences.
        """
        expected = self._outputs(model, images)
        with self.resumed(model, self.trunk(model, images)) as black:
            found = self._outputs(model, black)
        return all(nearly_equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))

    def prefixes_after(self) -> tuple[str, ...]:
        """Return the prefixes of module names in the blocks after the cut."""
        return tuple(f"{name}." for name in self.blocks[self.start :])

    def _outputs(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits, and the output of the last block."""
        last: list[Any] = []
        with self._modules(model)[-1].register_forward_hook(lambda _block, _args, output: last.append(output)):
            return logits_of(model, images), find_backbone(model).tokens_of(last[0])

    def _modules(self, model: nn.Module) -> list[nn.Module]:
        return [model.get_submodule(name) for name in self.blocks]


@dataclass(frozen=True)
class Entry:
    """The point where the forward of a batch is taken up: its images, or the tokens that enter a block.

    Attributes:
        inputs: images (B, ...), or features (B, T, D) of a cut.
        cut: the cut; None for images.
        maps: outputs of earlier blocks that a decoder reads, as in `Cut.resumed`.
    """

    inputs: Tensor
    cut: Cut | None = None
    maps: Mapping[int, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: Tensor | slice) -> Entry:
        """Return the entry of some of the images."""
        return Entry(self.inputs[rows], self.cut, {number: each[rows] for number, each in self.maps.items()})

    def to(self, like: Tensor) -> Entry:
        """Return the entry on the device and in the type of a tensor, such as a weight of the model."""
        moved = (each.to(like.device, like.dtype, non_blocking=True) for each in (self.inputs, *self.maps.values()))
        return Entry(next(moved), self.cut, dict(zip(self.maps, moved, strict=True)))

    def resumed(self, model: nn.Module) -> AbstractContextManager[Tensor]:
        """Let the model run on from here inside the `with` block; yields its argument."""
        return self.cut.resumed(model, self.inputs, self.maps) if self.cut else nullcontext(self.inputs)

    def logits(self, model: nn.Module) -> Tensor:
        """Return the logits that the model gives from here on."""
        with self.resumed(model) as x:
            return logits_of(model, x)

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return sum(each.nbytes for each in (self.inputs, *self.maps.values()))


def cut_before(model: nn.Module, trained: Sequence[str], size: tuple[int, int, int]) -> Cut:
    """Return the cut before the first block that holds a trained module, or else before the last block.

    Args:
        model: a model of a known family; left in eval mode.
        trained: names of the trained modules inside blocks; none if only what comes after the blocks is trained.
        size: (channels, height, width) of the images.

    Raises:
        ConfigError: as `check_cut`, or if a block hands more than tokens to the next one.
    """
    start, blocks = check_cut(model, trained), find_backbone(model).blocks
    cut = Cut(blocks, start, size)
    weight = next(model.parameters())
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    with torch.no_grad(), suppress(RuntimeError, ValueError):  # of blocks that ask for more than tokens
        if cut.is_exact(model.eval(), images):
            return cut
    raise ConfigError(
        f"data.cache='features': {type(model).__name__} does not compute the same from what {blocks[start]} gets: "
        f"expected a ViT whose blocks pass on tokens alone; use another data.cache"
    )


def check_cut(model: nn.Module, trained: Sequence[str]) -> int:
    """Return the number of the first block that holds a trained module, or of the last block. Computes nothing.

    A cut is where a block gets its input, so there is none after the last block.

    Raises:
        ConfigError: if no block comes before, a trained module is in none of them, or patches are dropped.
    """
    backbone = find_backbone(model)
    numbers = {block: number for number, block in enumerate(backbone.blocks)}
    if beside := next((name for name in trained if backbone.block_of(name) not in numbers), None):
        raise ConfigError(
            f"data.cache='features': {beside} is in none of the {len(numbers)} blocks that follow one another in "
            f"{type(backbone.vit).__name__}: expected trained modules in these alone; use another data.cache"
        )
    start = min((numbers[str(backbone.block_of(name))] for name in trained), default=len(numbers) - 1)
    if start <= 0:
        what = f"{trained[0]} is in the first block and trained" if trained else "the model has no second block"
        raise ConfigError(
            f"data.cache='features': {what}: expected frozen blocks before what is trained; use another data.cache, or "
            f"train the blocks after it alone (moe.layers, train.train_only)"
        )
    if backbone.drops_patches:
        raise ConfigError("data.cache='features' keeps all patches: expected no patch_drop_rate in model.args")
    return start


def digest(model: nn.Module, cut: Cut) -> str:
    """Hash of all that decides the features: weights, buffers and options (heads, epsilons) of the frozen modules.

    Blocks after the cut, the head, a decoder's statistics among it, and modules that only act in training (a model
    folder has no stochastic depth) are left out. So a training that goes on finds the features that it began with, and
    so does the trained model, and any other on the same trunk whose ViT notes the same number of classes.
    """
    hashed = hashlib.blake2b(digest_size=12)
    after = cut.prefixes_after()
    for name, module in model.named_modules():
        if not f"{name}.".startswith(after) and not isinstance(module, _ONLY_IN_TRAINING):
            options = {key: value for key, value in vars(module).items() if _is_option(key, value)}
            hashed.update(f"{name} {type(module).__name__} {sorted(options.items())}".encode())
    head = find_backbone(model).head()
    for name, tensor in model.state_dict().items():
        if not name.startswith(after) and name not in head:
            hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def _is_option(name: str, value: object) -> bool:
    """Return True for a module's attribute that decides what it computes; an MoE layer's config is a dataclass."""
    plain = isinstance(value, (int, float, str, tuple)) or is_dataclass(value)
    return plain and name != "training" and not name.startswith("_")


def nearly_equal(ours: Tensor, theirs: Tensor) -> bool:
    """Return True if two tensors differ by rounding alone, measured by the largest number in them."""
    tolerance = max(1e-3, 4 * torch.finfo(theirs.dtype).eps)
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


@contextmanager
def replaced_forward(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Let modules compute another forward inside the `with` block."""
    before = [vars(module).get("forward") for module in modules]
    try:
        for module in modules:
            module.forward = forward
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            del module.forward
            if own is not None:
                module.forward = own
