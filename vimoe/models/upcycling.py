"""Dense to MoE and back: `plan` shows the change, `upcycle` and `densify` make it, all or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vimoe.config.layers import Layers
from vimoe.config.model import Read
from vimoe.config.moe import ROUTERS, STARTS, MoEConfig
from vimoe.errors import SurgeryError, expect, first_line, nearest
from vimoe.models import surgery
from vimoe.models.calibration import Batches, calibrate
from vimoe.models.cost import Cost, count, meta_copy, meta_images
from vimoe.models.interface import Backbone, find_backbone
from vimoe.models.reading import set_reading, tokens_read
from vimoe.models.start_change import StartChange, measure_start
from vimoe.models.surgery import Site
from vimoe.moe import MoE, ffn
from vimoe.moe.grid import Grid
from vimoe.moe.layer import moe_layers
from vimoe.moe.packed import check_not_packed
from vimoe.moe.router import TokenLayout
from vimoe.moe.start import Calibration

_NO_LAYOUT = TokenLayout(num_prefix_tokens=0, class_token=False)  # where nothing depends on which token is which
_KEEP_SHAPE = (nn.LayerNorm, nn.GELU)  # left out where shapes alone are asked for: without values they are slow
HOW = ("shared", "merge", "matched", "join", "whole")


@dataclass(frozen=True)
class Plan:
    """Changes that `upcycle` would make, and their cost. Print it.

    Attributes:
        sites: FFNs that would be replaced.
        configs: settings of the layer at each site.
        dense: cost of the model as it is.
        moe: cost of the model with MoE layers.
        start: change of the last block's output before any training; None where nothing changes by construction.
    """

    sites: tuple[Site, ...]
    configs: tuple[MoEConfig, ...]
    dense: Cost
    moe: Cost
    start: StartChange | None = None

    def __str__(self) -> str:
        made = zip(self.sites, map(_described, self.configs), strict=True)
        lines = [f"  {site.name}: {type(site.module).__name__} -> {kind}" for site, kind in made]
        start = [] if self.start is None else [f"start:  {self.start}"]
        return "\n".join([f"before: {self.dense}", f"after:  {self.moe}", *start, *lines])


def _described(c: MoEConfig) -> str:
    """Return a layer's settings in words."""
    named = (
        "gate",
        "init",
        "expert_width",
        "router_gradient",
        "orthogonal",
        "groups",
        "capacity_factor",
    )  # settings that are told where they are set
    more = "".join(f", {name}={getattr(c, name)}" for name in named if getattr(c, name) != getattr(MoEConfig, name))
    return (
        f"{c.num_experts} experts ({c.experts}), {c.router} router, top_k={c.top_k}, {c.routing} routing, "
        f"{c.num_shared_experts} shared, {c.combine}{more}"
        if c.num_experts
        else f"dense FFN of {c.num_shared_experts} times the width"
    )


def plan(
    model: nn.Module, config: MoEConfig, input_size: tuple[int, int, int] | None = None, images: Batches | None = None,
    read: Read = "auto",
) -> Plan:  # fmt: skip
    """Return the changes that `upcycle(model, config)` would make, and their cost.

    It changes nothing, and needs no memory for weights unless the new layers would not compute what the FFNs do
    (`MoE.keeps_function`). Then the change is measured on a copy that is upcycled, if the model has weights.

    Args:
        model: as for `upcycle`, of images.
        config: blocks and kind of layer.
        input_size: (channels, height, width) to count for; by default that of the model.
        images: as for `upcycle`; the change is measured on the first batch. By default it is measured on 8 images of
            standard normal values, unless the start needs images.
        read: as for `upcycle`.

    Raises:
        SurgeryError: if `upcycle` would raise it.

    >>> import timm, vimoe
    >>> print(vimoe.plan(timm.create_model("test_vit", num_classes=4), vimoe.MoEConfig(layers="last:1", num_experts=4)))
    before: 0.31 M parameters, 0.31 M activated, 0.038 G multiply-adds
    after:  0.41 M parameters, 0.33 M activated, 0.040 G multiply-adds (0.033 G computed), 1 MoE layers
      blocks.5.mlp: Mlp -> 4 experts (ffn), softmax router, top_k=1, image routing, 1 shared, mix
    """
    _check(model, config)
    copied = meta_copy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        replaced = _new_layers(copied, config)
    changed = tuple(site for site in sites(model) if site.name in replaced)
    for site in changed:
        _check_hooks(site)  # the copy has none
    dense = count(model, input_size)
    layers = [module for module in replaced.values() if isinstance(module, MoE)]
    start = None if all(layer.keeps_function for layer in layers) else _start_change(model, layers, config, images)
    surgery.swap(copied, replaced)
    return Plan(changed, (config,) * len(changed), dense, count(set_reading(copied, read), input_size), start)


def _start_change(model: nn.Module, layers: Sequence[MoE], config: MoEConfig, images: Batches | None) -> StartChange:
    if any(layer.needs_images for layer in layers) and images is None:
        return StartChange(
            None, "it is computed from training images, which vimoe train has and vimoe.plan takes as images"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        return StartChange(
            None, "the model has no weights here; give vimoe.plan one that has, or model.name=local-dir:FOLDER"
        )
    return measure_start(model, lambda copied: convert(copied, config, images), images)


def upcycle(model: nn.Module, config: MoEConfig, images: Batches | None = None, read: Read = "auto") -> nn.Module:
    """Replace the FFNs of the chosen blocks by MoE layers whose experts start as copies of them (sparse upcycling).

    In place. With `combine="mix"`, the default, the model computes exactly what it did before, to rounding: all
    experts agree, so the task loss gives the routers no gradient until a step has separated them. `MoEConfig.init` has
    other starts, at which experts differ; `plan` says how far they take the model.

    Args:
        model: a model of timm, transformers or torchvision (docs/compatibility.md says which), or a module with one
            inside such as `vimoe.models.segmenter.Segmenter`, on any device. With `routing="token"` also any other
            model, if `config.layers` are patterns of module names.
        config: blocks and kind of layer.
        images: batches of (images, labels) to compute a start or a router from (`MoEConfig.init`,
            `MoEConfig.router`), the same each time they are read: a list or a loader of training images.
        read: "auto" to compute in the last block only the tokens that the head reads (`vimoe.set_reading`), which
            changes no output; "all" to compute all tokens.

    Returns:
        The same model.

    Raises:
        SurgeryError: if a block cannot be converted, or needs images; the model is as it was.
        VimoeError: if the model is optimised.

    >>> import timm, torch, vimoe
    >>> model, images = timm.create_model("test_vit").eval(), torch.randn(2, 3, 160, 160)
    >>> before = model(images)
    >>> after = vimoe.upcycle(model, vimoe.MoEConfig(layers="last:2", num_experts=4))(images)
    >>> torch.allclose(before, after, atol=1e-5)
    True
    """
    _check(model, config)
    before: Read = "all" if tokens_read(model) is None else "auto"
    set_reading(model, read)
    try:
        convert(model, config, images)
    except BaseException:
        set_reading(model, before)
        raise
    return model


def convert(model: nn.Module, config: MoEConfig, images: Batches | None = None) -> list[str]:
    """Do what `upcycle` does, and return the names of the converted FFNs in forward order."""
    _check(model, config)
    replaced = _new_layers(model, config)
    _start(model, {name: module for name, module in replaced.items() if isinstance(module, MoE)}, images)
    return _swap(model, config, replaced)


def needs_images(config: MoEConfig) -> bool:
    """Return True if `upcycle` with these settings needs images."""
    return bool(STARTS.find(config.init).needs_images or ROUTERS.find(config.router).needs_images)


def build_layers(
    model: nn.Module, config: MoEConfig, new: bool = True, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> list[str]:
    """Do what `convert` does, for a model whose weights are still to be loaded: nothing is started.

    Args:
        model: model.
        config: blocks and kind of layer.
        new: False for layers from which experts may have been removed since they were made.
        shapes: `input_shapes` of the dense model, for several calls on one model; by default the model is run for them.
    """
    _check(model, config)
    return _swap(model, config, _new_layers(model, config) if new else _replacements(model, config, shapes))


def _swap(model: nn.Module, config: MoEConfig, replaced: dict[str, nn.Module]) -> list[str]:
    surgery.swap(model, replaced)
    routers = [module.router for module in replaced.values() if isinstance(module, MoE)]
    if any(router.blind and any(True for _ in router.parameters()) for router in routers):  # a fixed one has nothing
        warnings.warn(
            f"the only gate is always 1 (num_experts={config.num_experts}, top_k={config.top_k}, gates normalised), so "
            f"the task loss never trains the router; use top_k=2, a shared expert, or combine='sum'",
            stacklevel=4,
        )
    return list(replaced)


def _start(model: nn.Module, layers: dict[str, MoE], images: Batches | None) -> None:
    """Let new layers start, which are not in the model yet."""
    seen = dict[str, Calibration]()
    if needing := next((layer.config for layer in layers.values() if layer.needs_images), None):
        if images is None:
            init = STARTS.find(needing.init).needs_images
            what = f"init={needing.init!r}" if init else f"router={needing.router!r}"
            raise SurgeryError(
                f"{what} is computed from training images: expected some; pass images=[(images, labels), ...]"
            )
        seen = calibrate(model, {name: layer.router for name, layer in layers.items()}, images)
    for name, layer in layers.items():
        layer.start(seen.get(name))


def densify(
    model: nn.Module,
    layers: str | Sequence[int | str] = "all",
    how: str = "shared",
    gate_mass: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Replace MoE layers by dense FFNs: the inverse of `upcycle`.

    Args:
        model: an upcycled model; changed in place.
        layers: blocks, as in `MoEConfig.layers`; "all" means all MoE layers.
        how: "shared" keeps the shared expert alone; "merge" takes the mean of all experts' weights; "matched" first
            reorders each expert's hidden units to match a reference (`ffn_weights.match`), then averages. Experts
            that are narrower than the FFN are not averaged: "join" puts the hidden units of all of them, and of the
            shared expert, side by side into one FFN, with their gates in its last matrix. "whole" does so with the
            pieces of a split FFN (init="split"), each at the full weight that it has when it is chosen.
        gate_mass: (N,) mean gate that each expert got, by layer name, for all but "shared"
            (`LayerEvidence.gate_mass`). Without it, experts count as a router without preference weighs them.

    Returns:
        The same model. Right after `upcycle` its state is the parent's, bit for bit.

    Raises:
        SurgeryError: if no MoE layer is named, or `how` does not fit one of them; nothing was changed.
        VimoeError: if the model is optimised.

    >>> import timm, torch, vimoe
    >>> model, images = timm.create_model("test_vit").eval(), torch.randn(2, 3, 160, 160)
    >>> before = model(images)
    >>> model = vimoe.densify(vimoe.upcycle(model, vimoe.MoEConfig(layers="last:2", num_experts=4)))
    >>> torch.allclose(before, model(images), atol=1e-5)
    True
    """
    if how not in HOW:
        raise SurgeryError(f"how={how!r}: expected {' or '.join(map(repr, HOW))}")
    chosen = [s for s in Layers.parse(layers).select(sites(model)) if isinstance(s.module, MoE) or layers != "all"]
    if not chosen:
        raise SurgeryError(f"layers={layers!r}: the model has no MoE layer there: expected one that upcycle made")
    masses = dict(gate_mass or {})
    names = list(moe_layers(model))  # those that stay are evidence of the same model
    if unknown := next((name for name in masses if name not in names), None):
        raise SurgeryError(f"gate_mass of {unknown!r}, which is no MoE layer: {nearest(unknown, names)}")
    surgery.swap(model, {site.name: _dense(site, how, masses.get(site.name)) for site in chosen})
    return model


def _check(model: nn.Module, config: MoEConfig) -> None:
    expect("model", model, nn.Module, "build one, such as by timm.create_model")
    expect("config", config, MoEConfig, "write MoEConfig(layers=...), or MoEConfig.from_dict(...)")


def sites(model: nn.Module) -> list[Site]:
    """Return the sites of a model that hold an FFN or an MoE layer, in forward order.

    Raises:
        VimoeError: if the model is optimised.
    """
    check_not_packed(model)
    return surgery.find(model, lambda module: isinstance(module, MoE) or ffn.is_ffn(module))


def _new_layers(model: nn.Module, config: MoEConfig) -> dict[str, nn.Module]:
    """Return the new module of every chosen site, after all checks."""
    replaced = _replacements(model, config)
    for module in replaced.values():
        if isinstance(module, MoE):
            module.check_start()
    return replaced


def _replacements(
    model: nn.Module, config: MoEConfig, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, nn.Module]:
    """Return the new module of every chosen site, after all checks but those of its start."""
    found, backbone = sites(model), find_backbone(model)
    if any(not isinstance(item, str) for item in config.selection.items) or config.selection.word not in ("", "none"):
        backbone.check_known("blocks")
    if not found and config.selection.word != "none":
        _check_refused(backbone)
    chosen = config.selection.select(found)
    if not chosen:
        return {}
    for site in chosen:
        if isinstance(site.module, MoE):
            raise SurgeryError(f"{site} is an MoE layer already: expected a dense FFN; densify it first")
        _check_hooks(site)
        _describe(site, site.module)
    layouts = _layouts(backbone, config, chosen, shapes)
    return {site.name: _upcycled(site, config, layouts[site.name]) for site in chosen}


def _check_hooks(site: Site) -> None:
    if ffn.has_hooks(site.module):
        raise SurgeryError(f"{site} has forward hooks, which experts would not call: expected none; remove them first")


def _describe(site: Site, dense: nn.Module) -> None:
    try:
        ffn.describe(dense)
    except SurgeryError as error:
        raise SurgeryError(f"{site}: {error}") from None


def _check_refused(backbone: Backbone) -> None:
    """Raise SurgeryError for a model whose blocks have something else in the place of FFNs."""
    for name, module in backbone.model.named_modules():
        if why := backbone.refused.get(type(module)):
            raise SurgeryError(
                f"{name} is a {type(module).__name__}, {why}: expected an FFN, which maps each token by itself; use "
                f"another model"
            )


def _upcycled(site: Site, config: MoEConfig, layout: TokenLayout) -> nn.Module:
    if config.num_experts == 0:
        return ffn.widen(site.module, config.num_shared_experts)
    return MoE(site.module, config, layout)


def _layouts(
    backbone: Backbone, config: MoEConfig, chosen: Sequence[Site], shapes: Mapping[str, tuple[int, ...]] | None
) -> dict[str, TokenLayout]:
    """Return the layout of the tokens of each site. Where each token is routed by itself, a model may have none."""
    if backbone.has_images:
        shapes = _shapes(backbone, chosen) if shapes is None else shapes
        return {site.name: _layout(backbone, site, shapes.get(site.name), config) for site in chosen}
    if config.routing == "image":
        return {site.name: backbone.layout for site in chosen}  # or SurgeryError with the reason
    if ROUTERS.find(config.router).tokens_interact or config.capacity_factor is not None:
        limit = "" if config.capacity_factor is None else f" with capacity_factor={config.capacity_factor:g}"
        raise SurgeryError(
            f"router={config.router!r}{limit} compares the tokens of an image, and {type(backbone.model).__name__} is "
            f"not known to get images: expected a router that decides for each token by itself, such as 'softmax'"
        )
    return {site.name: _NO_LAYOUT for site in chosen}


def input_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of what each FFN of a model gets for two images, images first; empty for a model without images.

    Raises:
        SurgeryError: if the model does not run on images of its size.
    """
    backbone = find_backbone(model)
    return _shapes(backbone, sites(model)) if backbone.has_images else {}


def _itself(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _shapes(backbone: Backbone, chosen: Sequence[Site]) -> dict[str, tuple[int, ...]]:
    """Run two images through a copy without weights, and return the shape of what each FFN gets that gets anything."""
    copied = meta_copy(backbone.model).eval()
    for module in copied.modules():
        if isinstance(module, _KEEP_SHAPE):
            module.forward = _itself  # type: ignore[method-assign, assignment]
    shapes: dict[str, tuple[int, ...]] = {}

    def see(name: str) -> Callable[..., None]:
        return lambda _module, args, kwargs: shapes.update({name: tuple((*args, *kwargs.values())[0].shape)})

    for site in chosen:
        copied.get_submodule(site.name).register_forward_pre_hook(see(site.name), with_kwargs=True)
    images = meta_images(copied, 2)
    try:
        with torch.no_grad():
            copied(images)
    except Exception as error:  # whatever a model raises that asks for more than images
        size = tuple(images.shape[1:])
        raise SurgeryError(f"the model does not run on images of shape {size}: {first_line(error)}") from error
    return shapes


def _layout(backbone: Backbone, site: Site, shape: tuple[int, ...] | None, config: MoEConfig) -> TokenLayout:
    """Return the layout of the tokens of an FFN that gets this shape; image routing and pools have to know it."""
    if shape is None or len(shape) < 3 or shape[0] != 2:
        raise SurgeryError(
            f"{site} gets {shape} for 2 images: expected (2, tokens, channels), or a grid of tokens; a block that "
            f"folds windows into the batch cannot be converted, because its first axis is not images"
        )
    tokens = Grid.of(site.module).tokens(torch.empty(*shape, device="meta")).shape[1]
    try:
        layout = backbone.layout_of(tokens)
    except SurgeryError as error:
        if config.routing == "image" and config.num_experts:
            raise SurgeryError(f"{site} with image routing: {error}; use routing='token'") from None
        layout = _NO_LAYOUT
    if len(config.pools) > 1 and not (len(config.pools) == 2 and 0 < layout.num_prefix_tokens < tokens):
        raise SurgeryError(
            f"{site} with groups={list(config.pools)}: expected a pool for prefix tokens and one for patches, and an "
            f"FFN that gets both, not {layout.num_prefix_tokens} and {tokens - layout.num_prefix_tokens}; leave the "
            f"block out of layers, or leave groups out"
        )
    return layout


def _dense(site: Site, how: str, gate_mass: Tensor | None) -> nn.Module:
    layer = site.module
    if not isinstance(layer, MoE):
        raise SurgeryError(f"{site} is a dense FFN already: expected an MoE layer; leave it out of layers")
    n = layer.config.num_experts
    if how not in layer.densify_methods:
        found, expected = _misfit(layer, how)
        others = " or ".join(f"how={other!r}" for other in layer.densify_methods)
        remedy = f"use {others}" if others else "it cannot be made dense, so leave it out of layers"
        raise SurgeryError(f"{site} has {found}: expected {expected} for how={how!r}; {remedy}")
    if how == "shared":
        return layer.without_experts()
    if layer.shared is not None:
        _describe(site, layer.shared)
    mass_N = layer.router.neutral_gate_mass() if gate_mass is None else gate_mass
    if gate_mass is None and layer.shared is None and not mass_N.any():
        raise SurgeryError(
            f"{site} has a router that chooses no expert at equal scores, and no shared expert: expected gate_mass; "
            f"pass that of vimoe.analyze"
        )
    if mass_N.shape != (n,):
        raise SurgeryError(f"gate_mass of {site} has shape {tuple(mass_N.shape)}: expected ({n},)")
    return layer.dense(how, mass_N)


def _misfit(layer: MoE, how: str) -> tuple[str, str]:
    """Return what keeps a layer from being made dense so, and what was expected instead."""
    if how == "shared":
        return "no shared expert", "one"
    if not layer.experts.are_ffns:
        return f"experts of the kind {layer.config.experts!r}, which are no FFNs", "FFNs"
    if how == "join":
        return "experts that are as wide as its FFN was", "narrower ones"
    if how == "whole":
        return "experts that are no pieces of one FFN", "those of init='split'"
    if layer.narrow:
        return "experts that are narrower than its FFN was", "experts of its width"
    if layer.config.num_shared_experts <= 1:
        units = layer.experts.kind.hidden
        return (
            f"experts of the kind {layer.config.experts!r} with {layer.experts.width} hidden units",
            f"the FFN's {units}",
        )
    return f"{layer.config.num_shared_experts} shared experts, which are wider than its experts", "at most 1"
