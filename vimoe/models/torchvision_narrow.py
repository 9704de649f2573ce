"""The block of torchvision's ViT that can compute its first tokens alone (`vimoe.models.reading`).

Axes: B images, T tokens, n tokens that are read, D channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock

from vimoe.models.reading import NarrowBlock, tokenwise

_FORWARDS = EncoderBlock.forward, nn.MultiheadAttention.forward  # other code may put its own there (a patched class)


class NarrowEncoderBlock(NarrowBlock, EncoderBlock):  # type: ignore[misc]  # torchvision has no types
    """torchvision's block, whose attention is torch's: it takes fewer queries than keys."""

    def narrow(self: Any, x_BTD: Tensor, read: int) -> Tensor:
        """Return (B, n, D) the first tokens."""
        y_BTD = self.ln_1(x_BTD)
        y_BnD, _ = self.self_attention(y_BTD[:, :read], y_BTD, y_BTD, need_weights=False)
        x_BnD = x_BTD[:, :read] + self.dropout(y_BnD)
        result: Tensor = x_BnD + self.mlp(self.ln_2(x_BnD))
        return result

    @property
    def narrows(self: Any) -> bool:
        if type(self.self_attention) is not nn.MultiheadAttention:
            return False
        known = (EncoderBlock.forward, nn.MultiheadAttention.forward) == _FORWARDS
        return known and all(tokenwise(part, ()) for part in (self.dropout, self.ln_2, self.mlp))


NARROWED: dict[type[nn.Module], type[nn.Module]] = {EncoderBlock: NarrowEncoderBlock}
