"""Prompted segmentation: a mask for each class vector, after the decoder of RefSAM (arXiv 2307.00997).

Axes: B images, C classes, E numbers of a class vector, D channels of the ViT, K channels of prompts, h, w of its grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimoe.config.model import PromptAttention
from vimoe.errors import ConfigError, nearest
from vimoe.models.tracker import Tracker
from vimoe.models.weights_file import read_tensors

CHANNELS = 256  # K, as in SAM's mask decoder
LEVELS = 4  # blocks in equal steps of depth; in SAM those with global attention


class Level(nn.Module):
    """Features X (B, K, h, w) of one block's map: BatchNorm and a linear map for each patch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.project = nn.Conv2d(dim, CHANNELS, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, D, h, w) to (B, K, h, w)."""
        features: Tensor = self.project(self.norm(x))
        return features


class DenseAttention(nn.Module):
    """Dense prompt of one level: W [X; softmax(X P^T / sqrt(K)) P], the softmax over the prompts of each patch."""

    def __init__(self) -> None:
        super().__init__()
        self.join = nn.Conv2d(2 * CHANNELS, CHANNELS, kernel_size=1)

    def weights(self, x: Tensor, prompts_BCK: Tensor) -> Tensor:
        """Return the weights (B, C, h, w) of the prompts for features (B, K, h, w); those of a patch sum to 1."""
        return (torch.einsum("bkhw,bck->bchw", x, prompts_BCK) / CHANNELS**0.5).softmax(dim=1)

    def forward(self, x: Tensor, prompts_BCK: Tensor) -> Tensor:
        """Map features (B, K, h, w) to a dense prompt (B, K, h, w)."""
        read = torch.einsum("bchw,bck->bkhw", self.weights(x, prompts_BCK), prompts_BCK)
        dense: Tensor = self.join(torch.cat([x, read], dim=1))
        return dense


class Prompted(nn.Module):
    """A mask for each prompt; the score of class c at a patch is M . P_c, and nothing else depends on the class.

    The vectors v_c of the classes pass a cross-modal MLP (E to E / 2, ReLU, to K) and are normalised: P_c. With X_l the
    features of block l, the mask features are

        M = X_last + sum_l W_l [X_l; softmax(X_l P^T / sqrt(K)) P]

    over no level, the last block, or four blocks. So M is the same for any order of the prompts, and masks are permuted
    as the prompts are.

    In a video P_c + T_c takes the place of P_c, where the track token T_c is of the frame before (`Tracker`) and 0 for
    the first one.

    Of RefSAM these are the cross-modal MLP, the (hierarchical) dense attention and the track token. The rest of it is
    not here: SAM, its mask decoder and upsampling, and sentences and their words. Vectors enter the MLP with a root
    mean square of 1, and BatchNorm stands in the place of SAM's neck.

    Args:
        dim: number D of channels of the ViT.
        depth: number of its blocks.
        classes: number C of classes.
        prompt_width: number E of a class vector that `set_prompts` gives; by default K, and the vectors are learnt.
        prompt_mlp: use a hidden layer; else a linear map, E to K.
        prompt_attention: levels of dense attention: "none", "last" or "levels".
        prompt_track: carry a track token of each class from frame to frame (`step`).

    Raises:
        ConfigError: if there are fewer blocks than levels.
    """

    prompts: Tensor  # (C, E)

    def __init__(
        self, dim: int, depth: int, classes: int, prompt_width: int | None = None, prompt_mlp: bool = True,
        prompt_attention: PromptAttention = "levels", prompt_track: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        levels = LEVELS if prompt_attention == "levels" else 1
        if depth < levels:
            raise ConfigError(
                f"decoder='prompted' reads {levels} layers: expected as many blocks, got {depth}; use "
                f"prompt_attention='last'"
            )
        self.blocks = tuple((i + 1) * depth // levels - 1 for i in range(levels))
        self.learnt = prompt_width is None
        width = prompt_width or CHANNELS
        if self.learnt:
            self.prompts = nn.Parameter(torch.randn(classes, width))
        else:
            self.register_buffer("prompts", torch.ones(classes, width))
        hidden = (nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, CHANNELS))
        self.to_prompts = nn.Sequential(*hidden) if prompt_mlp else nn.Linear(width, CHANNELS)
        self.levels = nn.ModuleList([Level(dim) for _ in range(levels)])
        self.attention = nn.ModuleList([DenseAttention() for _ in range(0 if prompt_attention == "none" else levels)])
        self.tracker = Tracker(CHANNELS) if prompt_track else None

    def set_prompts(self, vectors: Tensor) -> None:
        """Put the vectors (C, E) of the classes in place; their number may change, since no weight depends on it.

        Raises:
            ConfigError: if the vectors are learnt, of another width, or not finite.
        """
        width = self.prompts.shape[1]
        if self.learnt:
            raise ConfigError("the class vectors of this decoder are learnt: expected one that was made with vectors")
        if vectors.ndim != 2 or vectors.shape[1] != width or not vectors.isfinite().all():
            raise ConfigError(
                f"class vectors of shape {tuple(vectors.shape)}: expected finite ones of shape (classes, {width})"
            )
        self.prompts = vectors.to(self.prompts.device, self.prompts.dtype).clone()

    def prompts_of_classes(self) -> Tensor:
        """Return the prompts (C, K) of the class vectors, each of length 1."""
        vectors_CE = F.normalize(self.prompts, dim=1) * self.prompts.shape[1] ** 0.5
        return F.normalize(self.to_prompts(vectors_CE), dim=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Map maps (B, D, h, w), one for each of `blocks`, to scores (B, C, h, w)."""
        prompts_CK = self.prompts_of_classes()
        return self._scored(maps, prompts_CK.expand(len(maps[0]), -1, -1))[0]

    def step(self, maps: Sequence[Tensor], tokens_BCK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the scores (B, C, h, w) of a frame of B videos, and the track tokens (B, C, K) for the next frame.

        Args:
            maps: maps of the frame, as `forward` takes them.
            tokens_BCK: what this returned for the frame before; None for the first one.

        Raises:
            ConfigError: if the decoder was made without `prompt_track`.
        """
        if self.tracker is None:
            raise ConfigError("the decoder tracks nothing: expected one with prompt_track=True; make one")
        prompts_BCK = self.prompts_of_classes().expand(len(maps[0]), -1, -1)
        scores, features = self._scored(maps, prompts_BCK if tokens_BCK is None else prompts_BCK + tokens_BCK)
        return scores, self.tracker(features, scores, tokens_BCK)

    def _scored(self, maps: Sequence[Tensor], prompts_BCK: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores (B, C, h, w), and the mask features M (B, K, h, w)."""
        features = [level(x) for level, x in zip(self.levels, maps, strict=True)]
        masks = features[-1]
        for attend, x in zip(self.attention, features, strict=False):  # there may be none
            masks = masks + attend(x, prompts_BCK)
        return torch.einsum("bkhw,bck->bchw", masks, prompts_BCK), masks


def read_prompts(path: str, classes: Sequence[str]) -> Tensor:
    """Return the vectors (C, E) of classes from a safetensors file with a vector (E,) under the name of each.

    The file may hold other names too.

    Raises:
        ConfigError: if a class has no vector, or vectors differ in length.
        FolderError: if it is no whole safetensors file.
    """
    found = read_tensors(Path(path))
    for name in classes:
        if name not in found:
            raise ConfigError(f"model.prompts={path!r} has no vector for the class {name!r}: {nearest(name, found)}")
    shapes = {tuple(found[name].shape) for name in classes}
    if len(shapes) > 1 or len(min(shapes)) != 1:
        raise ConfigError(f"model.prompts={path!r} has tensors of shapes {sorted(shapes)}: expected one (width,)")
    return torch.stack([found[name].float() for name in classes])
