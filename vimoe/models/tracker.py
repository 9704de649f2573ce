"""Track tokens: what the masks of a frame tell the next one, after RefSAM's implicit tracking (arXiv 2307.00997).

Axes: B videos, C classes, K channels of prompts, h, w of the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

HEADS, HIDDEN = 8, 1024  # as in RefSAM


class Tracker(nn.Module):
    """The track token of each class for the next frame, of its mask in this one and of its track token so far.

    The object token O_c is the mean of the mask features M over the patches, weighed by the probability of class c
    there. With T_c the track token that this frame had, 0 in the first one:

        T_c of the next frame = W [self-attention and FFN of the two tokens O_c and T_c], at the place of T_c

    W begins as 0, so an untrained tracker changes nothing. No weight belongs to a class.

    Args:
        channels: K.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(channels, HEADS, HIDDEN, dropout=0.0, batch_first=True)
        self.project = nn.Linear(channels, channels)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, features: Tensor, scores: Tensor, tokens_BCK: Tensor | None) -> Tensor:
        """Return (B, C, K) for the next frame.

        Args:
            features: (B, K, h, w) mask features of this frame.
            scores: (B, C, h, w) of this frame.
            tokens_BCK: track tokens that this frame had; None for 0.
        """
        share = scores.softmax(dim=1)
        objects_BCK = torch.einsum("bchw,bkhw->bck", share, features) / share.sum(dim=(2, 3))[..., None]
        tokens_BCK = torch.zeros_like(objects_BCK) if tokens_BCK is None else tokens_BCK
        pairs = torch.stack([objects_BCK, tokens_BCK], dim=2).flatten(0, 1)  # (B C, 2, K)
        tokens: Tensor = self.project(self.layer(pairs)[:, 1]).view_as(objects_BCK)
        return tokens
