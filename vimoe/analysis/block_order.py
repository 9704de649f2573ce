"""Orders of classes and experts in which the blocks of a heatmap appear.

Axes: C classes, N experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def orders(tables: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Order the classes, for all layers alike, and the experts of each layer so that blocks appear.

    Spectral co-clustering (Dhillon, KDD 2001) of P(expert | class) of all layers side by side. Draw the result on other
    images than it was found on: sorting makes structure of noise.

    Args:
        tables: counts (C, N) of each layer, how often the units of a class chose each expert.
    """
    shares = [table / np.maximum(table.sum(axis=1, keepdims=True), 1) for table in tables]
    together = np.concatenate(shares, axis=1)
    seen, used = together.any(axis=1), together.any(axis=0)  # what is empty would make clusters of its own
    rows, closeness = np.full(len(together), np.inf), together.max(axis=1)
    # classes with the same routes are one point: as several they would be parted by rounding
    points, point = np.unique(together[seen][:, used].round(9), axis=0, return_inverse=True)
    clusters = min(len(points), max(share.any(axis=0).sum() for share in shares))
    if clusters > 1:
        from sklearn.cluster import SpectralCoclustering

        found = SpectralCoclustering(clusters, random_state=0).fit(points + 1e-6)
        rows[seen] = found.row_labels_[point]
        same = rows[seen][:, None] == found.column_labels_
        closeness[seen] = (points[point] * same).sum(axis=1)
    order = np.lexsort((-closeness, rows))
    position = np.empty(len(order))
    position[order] = np.arange(len(order))
    centres = [(position[:, None] * share).sum(axis=0) / np.maximum(share.sum(axis=0), 1e-12) for share in shares]
    idle = [share.sum(axis=0) == 0 for share in shares]  # they stand last
    return order, [np.lexsort((centre, none)) for centre, none in zip(centres, idle, strict=True)]
