"""The router "centroids": a softmax router that starts from clusters of what it reads in the dense model.

Axes: R rows that are routed (images or tokens), N experts, D channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vimoe.moe.kmeans import spherical_kmeans
from vimoe.moe.routers.softmax import SoftmaxRouter
from vimoe.moe.start import Calibration


class CentroidRouter(SoftmaxRouter):
    """Softmax over the scores c_i . x with the unit centroid c_i of a cluster for each expert, and the k best.

    The clusters are those of a spherical k-means of features x: class tokens (or means of patches) of training images
    with image routing, some of their tokens with token routing. Their mean direction m is removed first,
    x' = x - (x . m) m, because all features share it. Centroids are at right angles to m, so that c_i . x = c_i . x',
    and the best expert for x is its cluster: argmax_i c_i . x = argmax_i cos(c_i, x'). From there the rows are trained
    as any router's, unless `train.router_frozen` keeps them.

    Cluster-aware upcycling (arXiv 2604.13508) has centroids for rows, of x itself. TGR-MoE (arXiv 2604.21330) takes
    routes from features of a frozen model too, but by a second router that is trained on them as a teacher.
    """

    needs_images = True

    @torch.no_grad()
    def calibrate(self, seen: Calibration) -> None:
        x_RD = seen.features
        common_D = F.normalize(x_RD.mean(dim=0), dim=0)
        self.weight.copy_(spherical_kmeans(x_RD - (x_RD @ common_D)[:, None] * common_D, self.config.num_experts)[0])
