"""Diversity of what experts add to the output for the same token: angles, effective rank, hyperspherical energy.

What an expert adds is v = E(x) - S(x) in a "mix" with a shared expert S, else E(x). Similarities of outputs themselves
(`vimoe.analysis.expert_similarity`) are near 1 as long as experts are small changes of one FFN.

Axes: B images, T tokens of an image, M tokens, N experts, K slots of a row, n experts of a token (N or K), D channels,
P pairs of experts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from vimoe.moe import MoE, record

ROUNDING = 1e-6  # an addition that is smaller, relative to the output, is taken as none
NEAREST = 1e-3  # distance of directions that counts for all nearer ones


@dataclass(frozen=True)
class Diversity:
    """Figures of the additions v_1, ..., v_n for one token, as means over tokens; u_i = v_i / |v_i|.

    An expert that adds nothing is left out, and so is a token with fewer than two others.

    Attributes:
        cosine: mean of u_i . u_j over pairs, in -1..1: 1 for equal directions, 0 for orthogonal ones.
        effective_rank: exp(-sum_i p_i log p_i) with p_i = s_i / sum_j s_j and s the singular values of the matrix of
            all u_i (Roy and Vetterli, EUSIPCO 2007), in 1..n: 1 if all lie on one line, n if they are orthogonal.
        energy: mean of 1 / max(|u_i - u_j|, NEAREST) over pairs, at least 1/2: the hyperspherical energy of order 1
            (Liu et al., arXiv 1805.09298), there a sum without a bound. 0.71 for orthogonal directions, 1000 for equal
            ones.
    """

    cosine: float
    effective_rank: float
    energy: float


@torch.no_grad()
def measure_diversity(layer: MoE, x_BTD: Tensor) -> dict[str, dict[str, float] | None]:
    """Return the figures of `Diversity` by name, for all experts ("all") and for those that a token chose ("chosen").

    The outputs of chosen experts are those that the layer mixes, so with `moe.orthogonal` the orthogonal ones. A figure
    set is None if no token has two experts, as with top_k = 1, and if experts are copies.

    Args:
        layer: the layer, in eval mode.
        x_BTD: (B, T, D) inputs of that layer, on its device; a few images are enough.
    """
    parts: dict[str, list[Tensor]] = {"all": [], "chosen": []}
    n = layer.config.num_experts
    with torch.autocast(x_BTD.device.type, enabled=False):
        for x_1TD in x_BTD.split(1):
            tokens = x_1TD.shape[1]
            base_M1D: Tensor | int = 0
            if layer.shared is not None and layer.config.combine == "mix":
                base_M1D = layer.shared(x_1TD)[0][:, None]
            source_S = torch.arange(tokens, device=x_BTD.device).repeat(n)
            y_SD = layer.experts(x_1TD[0][:, None], source_S, torch.full_like(source_S[:n], tokens))[:, 0]
            parts["all"].append(_figures(y_SD.view(n, tokens, -1).transpose(0, 1), base_M1D))
            with record(layer, outputs=True) as routings:
                layer(x_1TD)
            if (y_RKUD := routings[0].outputs) is not None:
                parts["chosen"].append(_figures(y_RKUD.transpose(1, 2).flatten(0, 1), base_M1D))
    return {name: _mean(torch.cat(each)) if each else None for name, each in parts.items()}


def _figures(y_MnD: Tensor, base_M1D: Tensor | int) -> Tensor:
    """(M, n, D) outputs, 0 in empty slots, to (M', 3) figures of the tokens with at least two additions."""
    v_MnD, y_MnD = (y_MnD - base_M1D).double(), y_MnD.double()
    lengths_Mn, filled_Mn = v_MnD.norm(dim=-1), y_MnD.any(dim=-1)
    adds_Mn = filled_Mn & (lengths_Mn > ROUNDING * y_MnD.norm(dim=-1))
    enough_M = adds_Mn.sum(dim=1) > 1
    adds_Mn, u_MnD = adds_Mn[enough_M], (v_MnD / lengths_Mn[..., None])[enough_M]
    u_MnD = u_MnD.where(adds_Mn[..., None], 0)
    gram_Mnn = u_MnD @ u_MnD.mT
    number = gram_Mnn.shape[1]
    i, j = torch.triu_indices(number, number, offset=1, device=gram_Mnn.device)
    pair_MP, cosine_MP = adds_Mn[:, i] & adds_Mn[:, j], gram_Mnn[:, i, j].clamp(-1, 1)
    energy_MP = 1 / (2 - 2 * cosine_MP).sqrt().clamp(min=NEAREST)
    values_Mn = torch.linalg.eigvalsh(gram_Mnn).clamp(min=0).sqrt()
    rank_M = torch.special.entr(values_Mn / values_Mn.sum(dim=1, keepdim=True)).sum(dim=1).exp()
    pairs_M = pair_MP.sum(dim=1)
    cosine_M, energy_M = ((each * pair_MP).sum(dim=1) / pairs_M for each in (cosine_MP, energy_MP))
    return torch.stack([cosine_M, rank_M, energy_M], dim=1)


def _mean(figures_M3: Tensor) -> dict[str, float] | None:
    defined = figures_M3[figures_M3.isfinite().all(dim=1)]
    return asdict(Diversity(*defined.mean(dim=0).tolist())) if len(defined) else None
