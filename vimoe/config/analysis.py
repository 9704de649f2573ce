"""Defaults of analysis and pruning."""

from __future__ import annotations

PRUNE_TOLERANCE = 0.01  # nats of validation loss


DRAWS, OVERRULED_IMAGES = 20, 1_000  # of the causal scores: permutations, and images that they are measured on
