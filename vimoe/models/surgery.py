"""Find modules inside the blocks of a ViT, and swap them all or none.

Nothing here knows of experts: the caller decides which modules match, and builds the modules that replace them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from vimoe.errors import SurgeryError
from vimoe.models.interface import find_backbone
from vimoe.moe.split_ffn import SplitFFN


@dataclass(frozen=True)
class Site:
    """A module that surgery can replace.

    Attributes:
        name: module name in the model.
        block: number of its block, from 0 in forward order, among the blocks that hold a site.
        module: the module itself; a `SplitFFN` of the modules that an FFN is spread over.
    """

    name: str
    block: int
    module: nn.Module

    def __str__(self) -> str:
        return f"{self.name} (block {self.block})"


def find(model: nn.Module, match: Callable[[nn.Module], bool]) -> list[Site]:
    """Return the outermost matching modules that lie inside the blocks of the model's ViT ("blocks.3.mlp").

    A match outside of the blocks, such as the MLP of an attention pool, is no site, nor is one inside of a module that
    the family skips (`Backbone.skips`).

    Raises:
        SurgeryError: if one module stands at two places, since swapping one of them would untie them; or if nothing is
            found in a model that no family knows, or whose blocks have something else for FFNs.
    """
    backbone = find_backbone(model)
    names: dict[nn.Module, str] = {}
    blocks: dict[str, int] = {}
    sites: list[Site] = []

    def visit(module: nn.Module, path: tuple[str, ...]) -> None:
        for child_name, child in module._modules.items():  # named_children leaves out what stands there twice
            child_path = (*path, child_name)
            name = ".".join(child_path)
            if child is None or backbone.skips(name, child):
                continue
            found = child if match(child) else backbone.joined(name)
            if found is None:
                visit(child, child_path)
                continue
            if child in names:
                raise SurgeryError(f"{name} is the same module as {names[child]}: expected one place for each; untie")
            names[child] = name
            if inside := backbone.block_of(name):
                block = blocks.setdefault(inside, len(blocks))
                sites.append(Site(name, block, found))

    visit(model, ())
    if not sites:
        backbone.check_known("blocks")
    return sites


def swap(model: nn.Module, replacements: dict[str, nn.Module]) -> None:
    """Put each module at its place. All were built before, so nothing can fail half-way.

    Of an FFN that is spread over two modules, its first module has the name, and its last matrix gives way too.
    """
    backbone = find_backbone(model)
    for name, module in replacements.items():
        block, _, child = name.rpartition(".")
        if there := backbone.joined(name):
            model.set_submodule(_inside(block, there.end), nn.Identity())
        if isinstance(module, SplitFFN):
            model.set_submodule(_inside(block, module.end), module.last)
        setattr(model.get_submodule(block), child, module.first if isinstance(module, SplitFFN) else module)


def _inside(block: str, name: str) -> str:
    """Return the name in the model of what has this name in a block; the model itself is the block ""."""
    return f"{block}.{name}" if block else name
