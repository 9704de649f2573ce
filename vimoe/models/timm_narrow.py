"""Blocks and attentions of timm's ViTs that can compute their first tokens alone (`vimoe.models.reading`).

Each class computes, for the first tokens, what its timm class computes for all. Keys and values are those of all
tokens. The first tokens are prefix tokens, so rotary positions, which patches alone have, turn no query.

Axes: B images, T tokens, n tokens that are read, D channels, h heads, d channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    Attention,
    AttentionRope,
    DropPath,
    LayerNorm,
    LayerNormFp32,
    LayerScale,
    RmsNorm,
    RmsNormFp32,
    SimpleNorm,
    SimpleNormFp32,
    apply_rot_embed_cat,
)
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vimoe.models.reading import NarrowBlock, tokenwise

TOKENWISE: frozenset[type[nn.Module]] = frozenset(
    (DropPath, LayerScale, LayerNorm, LayerNormFp32, RmsNorm, RmsNormFp32, SimpleNorm, SimpleNormFp32)
)
_NO_MASK: dict[str, Any] = {"attn_mask": None, "is_causal": False}


class _NarrowAttention(nn.Module):
    """Attention of the first tokens to all tokens."""

    num_kv_groups: int = 1

    def forward(self, x_BTD: Tensor, *args: Any, read: int | None = None, **kwargs: Any) -> Tensor:
        """(B, T, D) to (B, read, D), or to (B, T, D) without `read`."""
        if read is None:
            y_BTD: Tensor = super().forward(x_BTD, *args, **kwargs)
            return y_BTD
        return self._first(x_BTD, read, kwargs.get("rope"))

    @property
    def narrows(self: Any) -> bool:
        """True if the parts are known to compute each token by itself, and no one asks for the unfused attention."""
        parts = (self.q_proj if self.qkv is None else None, self.q_norm, self.norm, self.gate, self.proj)
        return self.fused_attn and all(part is None or tokenwise(part, TOKENWISE) for part in parts)

    def _first(self: Any, x_BTD: Tensor, read: int, rope: Tensor | None) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self._projected(x_BTD, read))
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            prefix = self.num_prefix_tokens
            turned = apply_rot_embed_cat(k[:, :, prefix:], rope, half=self.rotate_half)
            k = torch.cat([k[:, :, :prefix], turned], dim=2)
        grouped = self.num_kv_groups > 1  # a size that is compared would be a tensor in torch.jit.trace
        dropout = self.attn_drop.p if self.training else 0.0
        y_BhnD = F.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v, dropout_p=dropout, enable_gqa=grouped)
        y_BnD = self.norm(y_BhnD.transpose(1, 2).flatten(2))
        if self.gate is not None:
            y_BnD = y_BnD * self.gate(x_BTD[:, :read]).sigmoid()
        result: Tensor = self.proj_drop(self.proj(y_BnD))
        return result

    def _projected(self: Any, x_BTD: Tensor, read: int) -> tuple[Tensor, ...]:
        """Return queries (B, n, hd) of the first tokens, keys and values (B, T, hd) of all."""
        if self.qkv is None:
            return self.q_proj(x_BTD[:, :read]), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if type(self.qkv) is nn.Linear and not is_traceable_wrapper_subclass(self.qkv.weight):
            bias = self.qkv.bias if self._outer_bias is None else self._outer_bias
            sizes = [self.qkv.out_features // 3, self.qkv.out_features // 3 * 2]
            q_weight, kv_weight = self.qkv.weight.split(sizes)
            q_bias, kv_bias = (None, None) if bias is None else bias.split(sizes)
            k, v = F.linear(x_BTD, kv_weight, kv_bias).chunk(2, dim=-1)
            return F.linear(x_BTD[:, :read], q_weight, q_bias), k, v
        q, k, v = self._all_projected(x_BTD).chunk(3, dim=-1)
        return q[:, :read], k, v

    def _all_projected(self: Any, x_BTD: Tensor) -> Tensor:
        """Return (B, T, 3hd) from an adapter, a packed or quantised matrix, whose rows cannot be told apart."""
        result: Tensor = self.qkv(x_BTD)
        return result

    @property
    def _outer_bias(self) -> Tensor | None:
        """Bias (3hd,) that is no part of the linear map."""
        return None


class NarrowAttention(_NarrowAttention, Attention):
    """timm's attention."""


class NarrowAttentionRope(_NarrowAttention, AttentionRope):
    """timm's attention with rotary positions and grouped queries."""


class NarrowEvaAttention(_NarrowAttention, EvaAttention):
    """EVA's attention, whose keys have no bias."""

    @property
    def _outer_bias(self: Any) -> Tensor | None:
        return None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))

    def _all_projected(self: Any, x_BTD: Tensor) -> Tensor:
        bias = self._outer_bias
        if bias is None:
            return super()._all_projected(x_BTD)
        return self.qkv(x_BTD) + bias if self.qkv_bias_separate else F.linear(x_BTD, self.qkv.weight, bias)


def _attend(attention: nn.Module, x_BTD: Tensor, read: int, **given: Any) -> Tensor:
    """Return (B, n, D) what any attention gives for the first tokens; `given` are arguments as timm passes them."""
    if isinstance(attention, _NarrowAttention) and attention.narrows:
        return attention(x_BTD, read=read, **given)
    y_BTD: Tensor = attention(x_BTD, **given)
    return y_BTD[:, :read]


class _TimmBlock(NarrowBlock):
    """A block of timm's, which takes a mask too. A mask asks for all tokens."""

    def narrow(
        self, x_BTD: Tensor, read: int, rope: Tensor | None = None, attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor | None:  # fmt: skip
        return None if attn_mask is not None or is_causal else self._first(x_BTD, read, rope)

    @property
    def narrows(self) -> bool:
        known = all(tokenwise(part, TOKENWISE) for part in self._parts)
        return known and all(c.forward is known for c, known in _FORWARDS.items())

    @property
    def _parts(self: Any) -> list[nn.Module]:
        """Modules beside attention."""
        return [child for child in self.children() if child is not self.attn]

    def _first(self, x_BTD: Tensor, read: int, rope: Tensor | None) -> Tensor:
        """Return (B, n, D) the first tokens."""
        raise NotImplementedError


class NarrowPreNormBlock(_TimmBlock, Block):
    """timm's usual block."""

    def _first(self: Any, x_BTD: Tensor, read: int, rope: Tensor | None) -> Tensor:
        y_BnD = _attend(self.attn, self.norm1(x_BTD), read, **_NO_MASK)
        x_BnD = x_BTD[:, :read] + self.drop_path1(self.ls1(y_BnD))
        return x_BnD + self.drop_path2(self.ls2(self.mlp(self.norm2(x_BnD))))


class NarrowPostNormBlock(_TimmBlock, ResPostBlock):
    """timm's block with norms at the end of its branches."""

    def _first(self: Any, x_BTD: Tensor, read: int, rope: Tensor | None) -> Tensor:
        x_BnD = x_BTD[:, :read] + self.drop_path1(self.norm1(_attend(self.attn, x_BTD, read, **_NO_MASK)))
        return x_BnD + self.drop_path2(self.norm2(self.mlp(x_BnD)))


class NarrowParallelBlock(_TimmBlock, ParallelThingsBlock):
    """timm's block of several attentions, then several FFNs."""

    @property
    def _parts(self: Any) -> list[nn.Module]:
        return [self.ffns, *(part for each in self.attns for name, part in each.named_children() if name != "attn")]

    def _first(self: Any, x_BTD: Tensor, read: int, rope: Tensor | None) -> Tensor:
        attended = [each.drop_path(each.ls(_attend(each.attn, each.norm(x_BTD), read))) for each in self.attns]
        x_BnD = x_BTD[:, :read] + torch.stack(attended).sum(dim=0)
        return x_BnD + torch.stack([ffn(x_BnD) for ffn in self.ffns]).sum(dim=0)


class NarrowEvaBlock(_TimmBlock, EvaBlock):
    """EVA's block, of DINOv3 and others."""

    def _first(self: Any, x_BTD: Tensor, read: int, rope: Tensor | None) -> Tensor:
        y_BnD = _scaled(_attend(self.attn, self.norm1(x_BTD), read, rope=rope, **_NO_MASK), self.gamma_1)
        x_BnD = x_BTD[:, :read] + self.drop_path1(y_BnD)
        return x_BnD + self.drop_path2(_scaled(self.mlp(self.norm2(x_BnD)), self.gamma_2))


class NarrowEvaPostNormBlock(_TimmBlock, EvaBlockPostNorm):
    """EVA's block with norms at the end of its branches."""

    def _first(self: Any, x_BTD: Tensor, read: int, rope: Tensor | None) -> Tensor:
        x_BnD = x_BTD[:, :read] + self.drop_path1(self.norm1(_attend(self.attn, x_BTD, read, rope=rope, **_NO_MASK)))
        return x_BnD + self.drop_path2(self.norm2(self.mlp(x_BnD)))


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x


NARROWED: dict[type[nn.Module], type[nn.Module]] = {
    Attention: NarrowAttention,
    AttentionRope: NarrowAttentionRope,
    EvaAttention: NarrowEvaAttention,
    Block: NarrowPreNormBlock,
    ResPostBlock: NarrowPostNormBlock,
    ParallelThingsBlock: NarrowParallelBlock,
    EvaBlock: NarrowEvaBlock,
    EvaBlockPostNorm: NarrowEvaPostNormBlock,
}
_FORWARDS = {whole: whole.forward for whole in NARROWED}  # other code may put its own there (a patched class)
