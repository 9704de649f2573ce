"""k-means of directions: spherical, and with clusters of equal size.

Axes: M vectors, D channels, N clusters.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

ROUNDS = 100  # at most; assignments mostly stay after a dozen
STARTS = 4  # of which the best is taken


def spherical_kmeans(x_MD: Tensor, clusters: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return unit centroids (N, D) and the cluster (M,) of each vector: that with the largest cosine.

    Dhillon and Modha, "Concept decompositions for large sparse text data using clustering" (2001), from k-means++
    starts. An empty cluster takes the vector that fits its own cluster worst.

    Args:
        x_MD: vectors; their lengths do not matter.
        clusters: N, at most M.
        seed: seed of the starts.
    """
    unit_MD = F.normalize(x_MD.detach().double().cpu(), dim=1)
    rng = np.random.default_rng(seed)
    return max(
        (_spherical(unit_MD, _spread(unit_MD, clusters, rng)) for _ in range(STARTS)), key=lambda found: found[2]
    )[:2]


def balanced_kmeans(x_MD: Tensor, clusters: int, seed: int = 0) -> Tensor:
    """Return the cluster (M,) of each vector, by cosine, with M / N vectors in each (or one more where it is no whole).

    Each assignment is the best one for its centroids (Hungarian algorithm), so M should be some thousands at most.
    """
    unit_MD = F.normalize(x_MD.detach().double().cpu(), dim=1)
    rng = np.random.default_rng(seed)
    places = np.arange(len(unit_MD)) % clusters  # the cluster that each place in one belongs to
    return max(
        (_balanced(unit_MD, _spread(unit_MD, clusters, rng), places) for _ in range(STARTS)), key=lambda found: found[1]
    )[0]


def _spread(unit_MD: Tensor, clusters: int, rng: np.random.Generator) -> Tensor:
    """Return (N, D) of the vectors, far from one another (k-means++: Arthur and Vassilvitskii, 2007)."""
    chosen = [int(rng.integers(len(unit_MD)))]
    far_M = np.full(len(unit_MD), np.inf)
    while len(chosen) < clusters:
        far_M = np.minimum(far_M, (1 - unit_MD @ unit_MD[chosen[-1]]).clamp(min=0).numpy())
        far_M[chosen] = 0
        total = far_M.sum()
        weights = far_M / total if total > 0 else None  # all are copies of those chosen
        chosen.append(int(rng.choice(len(unit_MD), p=weights)))
    return unit_MD[chosen]


def _spherical(unit_MD: Tensor, centroids_ND: Tensor) -> tuple[Tensor, Tensor, float]:
    label_M = torch.full((len(unit_MD),), -1)
    for _ in range(ROUNDS):
        cosine_MN = unit_MD @ centroids_ND.T
        best_M, new_M = cosine_MN.max(dim=1)
        for empty in set(range(len(centroids_ND))) - set(new_M.tolist()):
            alone_M = new_M.bincount(minlength=len(centroids_ND))[new_M] == 1  # whose cluster would be empty then
            worst = int(best_M.where(~alone_M, torch.inf).argmin())
            new_M[worst], best_M[worst] = empty, torch.inf
        if torch.equal(new_M, label_M):
            break
        label_M = new_M
        centroids_ND = _centroids(unit_MD, label_M, len(centroids_ND))
    return centroids_ND.float(), label_M, float((unit_MD * centroids_ND[label_M]).sum())


def _balanced(unit_MD: Tensor, centroids_ND: Tensor, places: np.ndarray) -> tuple[Tensor, float]:
    label_M = torch.full((len(unit_MD),), -1)
    for _ in range(ROUNDS):
        cosine_MN = (unit_MD @ centroids_ND.T).numpy()
        new_M = torch.from_numpy(places[linear_sum_assignment(cosine_MN[:, places], maximize=True)[1]])
        if torch.equal(new_M, label_M):
            break
        label_M = new_M
        centroids_ND = _centroids(unit_MD, label_M, len(centroids_ND))
    return label_M, float((unit_MD * centroids_ND[label_M]).sum())


def _centroids(unit_MD: Tensor, label_M: Tensor, clusters: int) -> Tensor:
    sums = unit_MD.new_zeros(clusters, unit_MD.shape[1]).index_add_(0, label_M, unit_MD)
    return F.normalize(sums, dim=1)
