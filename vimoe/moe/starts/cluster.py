"""The start "cluster": each expert is the FFN reduced to what a cluster of inputs needs, and a router that knows them.

Axes: N experts and clusters, R rows that are routed (images or tokens), B images of a batch, T tokens of an image, M
tokens of a cluster, D channels, F hidden units, O outputs and I inputs of a matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vimoe.moe import ffn
from vimoe.moe.experts import Experts
from vimoe.moe.kmeans import spherical_kmeans
from vimoe.moe.router import Router
from vimoe.moe.start import Calibration, Start

RIDGE = 1e-6  # of the mean second moment: a cluster may have fewer tokens than channels
TINY = 1e-30


class Cluster(Start):
    """Cluster-aware upcycling (arXiv 2604.13508): experts by data-aware truncated SVD, router rows by k-means.

    Spherical k-means of what the router reads gives N unit centroids, which become the router's rows. In the cluster of
    an expert the inputs x of a matrix W have C = E[x x^T] = L L^T. W L = U S V^T is cut to the smallest rank r whose
    squared singular values hold a share `cluster_energy` of their sum, which is E |W x|^2. The expert has
    W' = U_r S_r V_r^T L^-1. That is U_r U_r^T W, with U the eigenvectors of W C W^T: neither L nor its inverse is
    needed, which rounding and rare tokens would make unsafe. Biases and norms stay.

    A cluster has all tokens of its images with image routing; with token routing a token is in that of the nearest
    centroid. The inputs of the last matrix are the hidden activations before the first is cut, so that one pass over
    the images is enough (the paper's code is not public). The halves of a gated FFN's first matrix are two matrices.
    There are N (D^2 + F^2) numbers in memory, for one layer at a time.
    """

    needs_images = sets_weights = sets_rows = True
    keeps_function = False

    @torch.no_grad()
    def __call__(self, experts: Experts, router: Router, seen: Calibration | None) -> None:
        assert seen is not None
        n, energy = experts.num_experts, self.config.cluster_energy
        centroids_ND, label_R = spherical_kmeans(seen.features, n)
        router.weight.copy_(centroids_ND)
        first_NDD, last_NFF = self._moments(experts, seen, centroids_ND, label_R)
        for e in range(n):
            weights = experts.weights(e)
            first = weights["fc1.weight"].chunk(1 + experts.kind.gated)
            cut = {
                "fc1.weight": torch.cat([truncated(half, first_NDD[e], energy) for half in first]),
                "fc2.weight": truncated(weights["fc2.weight"], last_NFF[e], energy),
            }
            experts.set_weights(e, {**weights, **cut})

    def _moments(
        self, experts: Experts, seen: Calibration, centroids_ND: Tensor, label_R: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the sums (N, D, D) and (N, F, F) of x x^T over the inputs of both matrices, by cluster."""
        ffns = [experts.weights(e) for e in range(experts.num_experts)]
        like = ffns[0]["fc1.weight"]
        precise = torch.promote_types(like.dtype, torch.float32)
        first, last = (
            torch.zeros(len(ffns), size, size, dtype=precise, device=like.device)
            for size in (experts.kind.dim, experts.kind.hidden)
        )
        images = 0
        for x_BTD in seen.inputs():
            if self.config.routing == "token":
                label_BT = (x_BTD.to(precise) @ centroids_ND.to(like.device, precise).T).argmax(dim=-1)
            else:
                label_BT = label_R[images : images + len(x_BTD), None].expand(x_BTD.shape[:2]).to(like.device)
            images += len(x_BTD)
            for e in label_BT.unique().tolist():
                x_MD = x_BTD[label_BT == e].to(precise)
                h_MF = ffn.hidden(experts.kind, {name: w.to(precise) for name, w in ffns[e].items()}, x_MD)
                first[e].addmm_(x_MD.T, x_MD)
                last[e].addmm_(h_MF.T, h_MF)
        return first, last


def truncated(weight_OI: Tensor, moment_II: Tensor, energy: float) -> Tensor:
    """Return the matrix of smallest rank that holds a share `energy` of E |W x|^2, given a multiple of E[x x^T].

    Without any input, where the moment is 0, all inputs count as equal.
    """
    w_OI, moment_II = (each.detach().cpu().double() for each in (weight_OI, moment_II))
    ridge = (RIDGE * moment_II.diagonal().mean()).clamp(min=TINY)
    basis, small = torch.linalg.qr(w_OI)
    within = small @ (moment_II + ridge * torch.eye(len(moment_II), dtype=torch.float64)) @ small.T
    values, vectors = torch.linalg.eigh(within)  # rising; the squared singular values of W L
    least = values.clamp(min=TINY).cumsum(0)  # of each value and all smaller ones
    left = basis @ vectors[:, least > (1 - energy) * least[-1]]
    return (left @ (left.T @ w_OI)).to(weight_OI.device, weight_OI.dtype)
