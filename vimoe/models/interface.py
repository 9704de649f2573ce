"""What the rest of the package asks of a model that is, or has inside, a ViT."""

from __future__ import annotations

import re
from typing import Any

from timm.models import get_model_input_config
from torch import nn

from vimoe.errors import VimoeError, expect

pass


def vit(model: nn.Module) -> nn.Module:
    """The ViT that a model is or has inside: the outermost module that says how it makes tokens, else the model."""
    return model.get_submodule(_vit_name(model))


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of torch.compile's module, DataParallel or DistributedDataParallel.

    Raises:
        VimoeError: for what is no module.
    """
    expect("model", model, nn.Module, "build one, such as by timm.create_model")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrapped(model.module)
    compiled: Any = getattr(model, "_orig_mod", None)
    return model if compiled is None else unwrapped(compiled)


def _vit_name(model: nn.Module) -> str:
    says = ("num_prefix_tokens", "patch_embed")
    return next((name for name, m in model.named_modules() if all(hasattr(m, each) for each in says)), "")


def block_name(model: nn.Module, name: str) -> str | None:
    """The numbered block of the ViT that a module lies in: "blocks.3" of "blocks.3.mlp"; None outside of all."""
    inside = _vit_name(model)
    prefix = f"{inside}." if inside else ""  # the ViT may be a numbered part itself, as in a Sequential
    numbered = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", name.removeprefix(prefix)) if name.startswith(prefix) else None
    return prefix + numbered.group() if numbered else None


def model_input_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a timm model, or the one inside of the model, was made for."""
    model = vit(model)
    channels, height, width = get_model_input_config(model)["input_size"]
    if not hasattr(model, "_traits"):  # not built by timm.create_model, which notes the size
        height, width = getattr(model.patch_embed, "img_size", None) or (height, width)
    return channels, height, width


def label_names(model: nn.Module) -> list[str]:
    """The names of a model's classes, or their numbers where it has none."""
    names = getattr(model, "pretrained_cfg", {}).get("label_names")
    classes: Any = model.num_classes
    if names and len(names) != classes:
        raise VimoeError(f"the model has {classes} classes and {len(names)} label names: expected a name for each")
    return list(names) if names else [str(i) for i in range(classes)]
