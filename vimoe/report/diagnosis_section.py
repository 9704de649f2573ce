"""Section of a page with the diagnosis of the MoE layers, from diagnosis.json. Imports no torch."""

from __future__ import annotations

from typing import Any

from vimoe.analysis.intervals import over
from vimoe.report.html_page import Page
from vimoe.report.table_cells import change_cell, interval_cell

HEADER = (
    "layer", "from the shared expert", "from one another", "cosine", "gate (5% to 95%)", "confidence",
    "experts in use", "routes permuted, nats", "best expert of each predicted class, nats", "one for all, nats",
    "best of each true class, nats", "best of each image, nats",
)  # fmt: skip


def add_diagnosis(page: Page, diagnosis: dict[str, Any]) -> None:
    """Add the findings with their remedies, and the figures of each layer.

    Args:
        page: page to add to.
        diagnosis: content of diagnosis.json.
    """
    page.heading("Diagnosis")
    page.table(("finding", "layers", "try", "reason"), map(_finding, diagnosis["findings"]), words=True)
    page.text(
        "Distances are those of outputs, relative to their size: 0 for copies, 141% for what is unrelated. The cosine "
        "is that of the weights with the shared expert, or without one with the mean expert. The gate is the weight of "
        "the chosen experts together. The best expert of each predicted class is chosen on one half of the images and "
        "measured on the other, and so is the best one for all: a change below 0 says that better routes exist. The "
        "best experts of each true class and of each image are chosen by the image's own label, so they are upper "
        "bounds of the gain and no scores."
    )
    page.table(HEADER, map(_row, diagnosis["layers"]))
    without = f" No oracle: {diagnosis['without_oracle']}." if diagnosis["without_oracle"] else ""
    features = diagnosis.get("features")
    source = f", from their features before {features['before']}, rounded to float16" if features else ""
    page.text(
        f"From {diagnosis['images']} validation images{source}, with {diagnosis['confidence']:.0%} bootstrap intervals "
        f"{over(diagnosis['sequences'])}.{without}",
        note=True,
    )


def _finding(finding: dict[str, Any]) -> tuple[str, ...]:
    layers = "\n".join(f"{layer}: {figure}" for layer, figure in finding["layers"].items())
    advice = ", or ".join(finding["remedies"]) or "nothing to mend"
    return f"{finding['name']}: {finding['says']}", layers, advice, finding["because"]


def _row(layer: dict[str, Any]) -> tuple[str, ...]:
    shared, mean, gates, oracle = (layer[key] for key in ("from_shared", "from_mean", "gates", "oracle"))
    cosine = (shared or mean)["cosine"]
    return (
        layer["name"],
        f"{shared['outputs']:.2%}" if shared else "–",
        f"{mean['outputs']:.2%}",
        "–" if cosine is None else f"{cosine:.5f}",
        f"{gates['mean']:.2f} ({gates['low']:.2f} to {gates['high']:.2f})",
        f"{layer['router_confidence']:.3f}",
        f"{interval_cell(layer['effective_experts'], '.2f')} of {layer['num_experts']}",
        change_cell(layer["permuted"]["loss"]),
        *(change_cell(oracle[key]["loss"]) if oracle else "–" for key in ("by_prediction", "for_all")),
        *(interval_cell(oracle[key]["loss"]) if oracle else "–" for key in ("by_class", "by_image")),
    )
