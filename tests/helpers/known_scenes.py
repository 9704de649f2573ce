"""A segmenter whose routing and causes are known exactly, and batches for it."""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vimoe
from vimoe.config.masks import IGNORE
from vimoe.models.segmenter import Segmenter
from vimoe.moe.layer import moe_layers


class Painted(nn.Module):
    """A head for features that are the patch's mean colour: class c has channel c."""

    blocks = (0,)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return 20 * maps[0][:, :3]


def known(routing: str = "token") -> Segmenter:
    """A segmenter whose one MoE layer decides the class: expert e adds to channel e, and the router reads the colour.

    The ViT hands the mean colour of each patch through: attention adds nothing.
    """
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=0,
        dynamic_img_size=True,
    )  # fmt: skip
    with torch.no_grad():
        for p in vit.parameters():
            p.zero_()
        for c in range(3):
            vit.patch_embed.proj.weight[c, c] = 1 / 16
        vit.blocks[0].norm1.weight.fill_(1)
    vit.blocks[0].norm2, vit.norm = nn.Identity(), nn.Identity()
    model = Segmenter(vit, 3)
    model.decoder = Painted()
    vimoe.upcycle(model, vimoe.MoEConfig(layers="all", routing=routing, num_experts=3, combine="sum"))
    (layer,) = moe_layers(model).values()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, :3] = 30 * torch.eye(3)
        for e in range(3):
            layer.experts.fc2.bias[e, e] = 1.0
    return model.eval()


def batches(images: int = 12, seed: int = 0, void: bool = True) -> list[tuple[Tensor, Tensor]]:
    """Masks of whole patches; the image is faintly their colour, so that experts do the rest."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randint(0, 3, (images, 4, 4), generator=generator)
    masks = patches.repeat_interleave(4, 1).repeat_interleave(4, 2)
    x = 0.1 * F.one_hot(masks, 3).movedim(-1, 1).float()
    if void:
        masks[:, :4, :4] = IGNORE
    return [(x[i : i + 5], masks[i : i + 5]) for i in range(0, images, 5)]
