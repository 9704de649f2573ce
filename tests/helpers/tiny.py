"""What the tests share: tiny ViTs of every supported family, with weights that hide nothing."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import timm
import torch
from torch import Tensor, nn

import vimoe

# what is special about it: timm name, patch size, further arguments
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", 16, {}),
    "deit": ("deit_tiny_patch16_224", 16, {}),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", 16, {}),
    "deit3, LayerScale": ("deit3_small_patch16_224", 16, {}),
    "dinov2": ("vit_small_patch14_dinov2", 14, {}),
    "dinov2, registers": ("vit_small_patch14_reg4_dinov2", 14, {}),
    "dinov2, packed SwiGLU": ("vit_giant_patch14_dinov2", 14, {}),
    "registers without class token": ("vit_little_patch16_reg4_gap_256", 16, {}),
    "siglip, attention pool": ("vit_base_patch16_siglip_224", 16, {}),
    "parallel FFNs": ("vit_small_patch16_18x2_224", 16, {}),
    "no biases": ("aimv2_large_patch14_224", 14, {}),
    "inner norm": ("beit3_base_patch16_224", 16, {}),
    "beit": ("beit_base_patch16_224", 16, {}),
    "dinov3": ("vit_small_patch16_dinov3", 16, {}),
    "dinov3, SwiGLU": ("vit_small_plus_patch16_dinov3", 16, {}),
    "eva02, packed SwiGLU": ("eva02_tiny_patch14_224", 14, {}),
    "eva02, SwiGLU with inner norm": ("eva02_base_patch14_224", 14, {}),
}


def vit(family: str = "vit", **changes: object) -> nn.Module:
    """A tiny dense model in eval mode, the same on every call; all of its weights matter."""
    name, patch, arguments = FAMILIES[family]
    settings = {"depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5, "img_size": 2 * patch}
    model = timm.create_model(name, pretrained=False, **{**settings, **arguments, **changes})
    return randomise(model).eval()


def images(model: nn.Module, batch: int = 3, seed: int = 1) -> Tensor:
    size = model.patch_embed.img_size
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def randomise(module: nn.Module, seed: int = 0, scale: float = 1.0) -> nn.Module:
    """Adds noise to every parameter: a LayerScale of 1e-5, zero biases or equal experts would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            inputs = 10 if p.ndim < 2 else p.shape[-1] if p.ndim < 4 else p[0].numel()
            p.add_(torch.randn(p.shape, generator=generator) * scale * inputs**-0.5)
    return module


def config(**settings: object) -> vimoe.MoEConfig:
    return vimoe.MoEConfig(**{"layers": "all", "num_experts": 4, **settings})


def upcycle(model: nn.Module, settings: vimoe.MoEConfig) -> nn.Module:
    """`vimoe.upcycle`, and the warning exactly where it is due; the routers depend on no other test."""
    torch.manual_seed(0)
    one_gate = settings.top_k == 1 and settings.gates_sum_to_one
    due = settings.layers != "none" and (max(settings.pools) == 1 or (settings.num_experts > 1 and one_gate))
    with pytest.warns(UserWarning, match="the only gate is always 1") if due else nullcontext():
        return vimoe.upcycle(model, settings)


def layers(model: nn.Module) -> list[vimoe.MoE]:
    return [module for module in model.modules() if isinstance(module, vimoe.MoE)]


def perturb_experts(model: nn.Module) -> nn.Module:
    for seed, layer in enumerate(layers(model)):
        randomise(layer.experts, seed)
    return model


def shrink_timm(monkeypatch: pytest.MonkeyPatch, depth: int = 2) -> None:
    """Build each model of timm by name tiny and with random weights; one from a folder stays what it is."""
    build, size = timm.create_model, {"img_size": 28, "depth": depth, "embed_dim": 24, "num_heads": 2}

    def create(name: str, pretrained: bool = False, **settings: object) -> nn.Module:
        return build(name, pretrained=False, **(settings if ":" in name else {**settings, **size}))

    for owner in (timm, timm.models):
        monkeypatch.setattr(owner, "create_model", create)
    monkeypatch.setattr("vimoe.models.timm_vit.check_answers", lambda repo: None)  # nothing comes from the hub
