"""Region similarity J and contour accuracy F of masks, image by image, after DAVIS (Perazzi et al., CVPR 2016).

Mean IoU counts the pixels of all images together; J and F are means over images, so that a small object in one image
weighs as much as a large one in another. F looks at borders alone.

Axes: H, W pixels.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

TOLERANCE = 0.008  # of an image's diagonal: how far apart two contours may be
Mask = NDArray[np.bool_]


def region_similarity(predicted: Mask, truth: Mask) -> float:
    """Return J, the intersection over the union of two masks (H, W); 1 if both are empty."""
    union = (predicted | truth).sum()
    return float((predicted & truth).sum() / union) if union else 1.0


def contour_accuracy(predicted: Mask, truth: Mask, tolerance: float = TOLERANCE) -> float:
    """Return F = 2 P R / (P + R) of the contours of two masks (H, W).

    P is the share of the predicted contour that is within the tolerance of the true one, R that of the true one near
    the predicted one. Without a contour on one side the share there is 1. F is 0 where both are 0, and for a contour
    on one side alone.

    Args:
        predicted, truth: masks.
        tolerance: largest Euclidean distance, as a share of the diagonal; it is rounded up to whole pixels.
    """
    reach = math.ceil(tolerance * math.hypot(*truth.shape))
    ours, theirs = contour(predicted), contour(truth)
    precision, recall = _near(ours, theirs, reach), _near(theirs, ours, reach)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def contour(mask: Mask) -> Mask:
    """Return the contour of a mask (H, W): pixels that differ from the one to the right, below, or below right."""
    padded = np.pad(mask, (0, 1), mode="edge")
    here = padded[:-1, :-1]
    found: Mask = (here ^ padded[:-1, 1:]) | (here ^ padded[1:, :-1]) | (here ^ padded[1:, 1:])
    return found


def _near(contour: Mask, other: Mask, reach: int) -> float:
    """Return the share of a contour's pixels within reach of another contour; 1 for none."""
    if not contour.any() or not other.any():
        return float(not contour.any())
    return float((ndimage.distance_transform_edt(~other)[contour] <= reach).mean())
