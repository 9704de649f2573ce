"""Find modules inside the blocks of a ViT, and swap them all or none.

Nothing here knows what an expert is: the caller says which modules count and what takes their place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from vimoe.errors import SurgeryError
from vimoe.models.interface import block_name


@dataclass(frozen=True)
class Site:
    """A place in a model: `block` counts the blocks that hold a site, in forward order, from 0."""

    name: str
    block: int
    module: nn.Module

    def __str__(self) -> str:
        return f"{self.name} (block {self.block})"


def find(model: nn.Module, match: Callable[[nn.Module], bool], skip: tuple[type[nn.Module], ...] = ()) -> list[Site]:
    """The outermost matching modules that lie inside numbered blocks ("blocks.3.mlp").

    A match outside of the blocks, such as the MLP of an attention pool, is no site, nor is one inside of `skip`.

    Raises:
        SurgeryError: where one module stands at two places, since swapping one of them would untie them.
    """
    names: dict[nn.Module, str] = {}
    blocks: dict[str, int] = {}
    sites: list[Site] = []

    def visit(module: nn.Module, path: tuple[str, ...]) -> None:
        for child_name, child in module._modules.items():  # named_children leaves out what stands there twice
            if child is None or isinstance(child, skip):
                continue
            child_path = (*path, child_name)
            if not match(child):
                visit(child, child_path)
                continue
            name = ".".join(child_path)
            if child in names:
                raise SurgeryError(f"{name} is the same module as {names[child]}: expected one place for each; untie")
            names[child] = name
            if inside := block_name(model, name):
                block = blocks.setdefault(inside, len(blocks))
                sites.append(Site(name, block, child))

    visit(model, ())
    return sites


def swap(model: nn.Module, replacements: dict[str, nn.Module]) -> None:
    """Puts each module at its place. All were built before this, so nothing can fail half-way."""
    for name, module in replacements.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
