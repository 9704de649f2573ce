"""Defaults of analysis and pruning."""

from __future__ import annotations

PRUNE_TOLERANCE = 0.01  # largest rise of the validation loss, in nats
DRAWS, OVERRULED_IMAGES = 20, 1_000  # permutations and images for the causal scores
