"""Evidence made by hand for figures and pages."""

from __future__ import annotations

from typing import Any

import numpy as np


def change(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def effect(value: float, half: float = 0.01, calibrated: float | None = None) -> dict[str, Any]:
    """With a calibrated change, what a classifier has; without, what a segmenter has or an older file."""
    found = {"loss": change(value, half), "right": change(-value / 10, half / 10)}
    if calibrated is None:
        return found
    return {**found, "calibrated": {**change(calibrated, half), "temperature_before": 1.25, "temperature_after": 0.875}}


def closer_look(depth: int, experts: int) -> dict[str, Any]:
    """What a comparison has of matrices, outputs and the parent; the first layers are not told from chance."""
    against = {"value": 0.25 + 0.125 * depth, "low": 0.125, "high": 0.4375}
    matrix = {
        "cosine": against, "neuron_mean": 0.5, "reordered": 0.75, "parent": 0.875, "router": against,
        "pca": [[float(np.cos(i)), float(np.sin(i))] for i in range(experts + 1)], "explained": [0.5, 0.25],
    }  # fmt: skip
    return {
        "weights": {
            "matrices": {"fc1": matrix, "fc2": matrix}, "tau": against, "rho": 0.0625, "rho_parent": 0.1875,
            "matched": min(experts, 8),
        },
        "outputs": {"angular": against, "ranks": np.eye(experts, dtype=int).tolist(), "diagonal": against},
        "parent": {"what": "shared", "cosine": 0.9375, "weights": 0.25, "outputs": 0.5},
    }  # fmt: skip


def evidence(layers: int = 6, classes: int = 10, experts: int = 8, overruled: bool = True) -> dict[str, Any]:
    """What routing.json holds: the deepest layer specialises and matters most, the first does neither."""
    rng = np.random.default_rng(0)
    per_class, names = 40, [f"class {i}" for i in range(classes)]

    def layer(depth: int) -> dict[str, Any]:
        strength = depth / max(layers - 1, 1)
        likes = (1 - strength) * np.ones((classes, experts)) / experts + strength * np.eye(experts)[
            np.arange(classes) % experts
        ]
        drawn = np.stack([rng.multinomial(per_class // 2, row) for row in likes])
        counts = drawn + np.stack([rng.multinomial(per_class // 2, row) for row in likes])
        load = counts.sum(axis=0) / counts.sum()
        return {
            "name": f"blocks.{depth}.mlp", "routing": "image", "num_experts": experts, "top_k": 1,
            "counts": counts.tolist(), "drawn": drawn.tolist(), "expert_order": rng.permutation(experts).tolist(),
            "gate_mass": load.tolist(), "load": load.tolist(),
            "adjusted_mutual_information":
                {**change(0.9 * strength, 0.05), "p": 0.002 if strength else 0.4, "nats": 2 * strength},
            "effective_experts": change(7.5, 0.2),
            "permuted": effect(0.3 * strength) if overruled else None,
            "frozen": effect(0.2 * strength, 0.02) if overruled else None,
            "dense": {k: effect(0.1 * strength) for k in ("shared", "merge", "matched")} if overruled else {},
            "experts": [effect(0.02 * strength * e, 0.015) for e in range(experts)] if overruled else [],
            "comparison": {
                "num_experts": experts, "weight_similarity": 1 - strength / 9, "deviation_similarity": None,
                **closer_look(depth, experts),
            } if overruled else None,
        }  # fmt: skip

    images = classes * per_class
    return {
        "base": {"top1": 0.8123, "top5": 0.95, "loss": 0.7, "images": images},
        "classes": names, "confidence": 0.95, "images": images, "draws": 20,
        "overruled_images": images if overruled else 0,
        "class_order": sorted(range(classes), key=lambda c: (c % experts, c)),
        "pairs": {"mean": change(layers * 0.9, 0.1), "low": layers - 1, "high": layers},
        "routes": {"used": 123, "effective": 45.6, "possible": experts**layers},
        "agreement": {key: (0.5 * np.eye(layers) + 0.5).tolist() for key in ("value", "low", "high")},
        "layers": [layer(i) for i in range(layers)],
    }  # fmt: skip
