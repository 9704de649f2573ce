"""Find modules inside the blocks of a ViT, choose some by block, and swap them all or none.

Nothing here knows of experts: the caller decides which modules match, and builds the modules that replace them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from vimoe.config.moe import LAYER_WORDS, check_layers
from vimoe.errors import SurgeryError, nearest
from vimoe.models.interface import find_backbone


@dataclass(frozen=True)
class Site:
    """A module that surgery can replace.

    Attributes:
        name: module name in the model.
        block: number of its block, from 0 in forward order, among the blocks that hold a site.
        module: the module itself.
    """

    name: str
    block: int
    module: nn.Module

    def __str__(self) -> str:
        return f"{self.name} (block {self.block})"


def find(model: nn.Module, match: Callable[[nn.Module], bool]) -> list[Site]:
    """Return the outermost matching modules that lie inside the blocks of the model's ViT ("blocks.3.mlp").

    A match outside of the blocks, such as the MLP of an attention pool, is no site, nor is one inside of a module that
    the family skips (`Backbone.skipped`).

    Raises:
        SurgeryError: where one module stands at two places, since swapping one of them would untie them; or where
            nothing is found in a model that no family knows.
    """
    backbone = find_backbone(model)
    names: dict[nn.Module, str] = {}
    blocks: dict[str, int] = {}
    sites: list[Site] = []

    def visit(module: nn.Module, path: tuple[str, ...]) -> None:
        for child_name, child in module._modules.items():  # named_children leaves out what stands there twice
            if child is None or isinstance(child, backbone.skipped):
                continue
            child_path = (*path, child_name)
            if not match(child):
                visit(child, child_path)
                continue
            name = ".".join(child_path)
            if child in names:
                raise SurgeryError(f"{name} is the same module as {names[child]}: expected one place for each; untie")
            names[child] = name
            if inside := backbone.block_of(name):
                block = blocks.setdefault(inside, len(blocks))
                sites.append(Site(name, block, child))

    visit(model, ())
    if not sites:
        backbone.check_known("blocks")
    return sites


def select(sites: Sequence[Site], layers: str | Sequence[int | str]) -> list[Site]:
    """Return the sites of the named blocks, in forward order; the syntax is that of `MoEConfig.layers`.

    Raises:
        ConfigError: for words that `MoEConfig.layers` would refuse.
        SurgeryError: where a word, index or pattern names no site.
    """
    check_layers(layers)
    count = 1 + max((site.block for site in sites), default=-1)
    if layers == "none":
        return []
    if not sites:
        raise SurgeryError(
            "no FFN was found inside the model's blocks: expected a plain ViT of timm (vit_*, deit*), and not one "
            "that fuses the FFN with the attention, as vit_*_xp and vit_*pwee do"
        )
    if layers == "all":
        return list(sites)
    if isinstance(layers, str):
        word, colon, number = layers.partition(":")
        if colon and int(number) > count:
            raise SurgeryError(f"layers={layers!r}: expected at most {count}, the number of blocks with an FFN")
        if word == "last" and colon:
            return [site for site in sites if site.block >= count - int(number)]
        if word == "every" and colon:
            return [site for site in sites if site.block % int(number) == int(number) - 1]
    wanted = {name for item in ([layers] if isinstance(layers, str) else layers) for name in _named(sites, item, count)}
    return [site for site in sites if site.name in wanted]


def _named(sites: Sequence[Site], item: int | str, count: int) -> list[str]:
    if isinstance(item, int):
        if not -count <= item < count:
            raise SurgeryError(f"layers: no block {item}: expected {-count} to {count - 1}")
        return [site.name for site in sites if site.block == item % count]
    found = [site.name for site in sites if fnmatchcase(site.name, item)]
    if not found:
        known = [*LAYER_WORDS, *(site.name for site in sites)]
        raise SurgeryError(f"layers={item!r} names no FFN: {nearest(item, known)}")
    return found


def swap(model: nn.Module, replacements: dict[str, nn.Module]) -> None:
    """Put each module at its place. All were built before, so nothing can fail half-way."""
    for name, module in replacements.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
