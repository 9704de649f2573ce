"""Parts of the routing section about experts by themselves: how much they differ, and each one alone. No torch."""

from __future__ import annotations

from typing import Any

from vimoe.analysis.intervals import over
from vimoe.analysis.plot_data import advantage_line
from vimoe.metrics.registry import shown
from vimoe.report.html_page import Page


def add_diversity(page: Page, evidence: dict[str, Any]) -> None:
    """Add a line for each layer on the diversity of what its experts add; nothing for files of an older version."""
    lines = [line for layer in evidence["layers"] if (line := _diversity_line(layer))]
    if lines:
        page.text("What experts add for the same token (cosine 0 and rank n if all n of them are orthogonal):")
        page.items(lines)


def _diversity_line(layer: dict[str, Any]) -> str:
    parts = [
        f"{name} experts: cosine {each['cosine']:+.3f}, effective rank {each['effective_rank']:.2f}, hyperspherical "
        f"energy {each['energy']:.2f}"
        for name, each in (layer.get("diversity") or {}).items()
        if each
    ]
    return f"{layer['name']}: {'; '.join(parts)}." if parts else ""


def add_probe(page: Page, evidence: dict[str, Any]) -> None:
    """Add the matrix of each layer whose experts were probed: experts alone on the classes that each of them serves."""
    probed = {layer["name"]: layer["probe"] for layer in evidence["layers"] if layer.get("probe")}
    if not probed:
        return
    accuracy = shown(evidence["base"]).right_name
    page.subheading("Each expert alone")
    page.text(
        f"An expert serves the classes whose images chose it most often. A row is the {accuracy} if all images get "
        f"one expert alone, with the gates that they have; a column is the images of the classes that an expert "
        f"serves. Where experts specialise, the diagonal is the largest of its column. From "
        f"{evidence['overruled_images']} validation images; intervals are {over(evidence.get('overruled_sequences'))}."
    )
    for name, probe in probed.items():
        counts = (f"classes of {e} ({images} images)" for e, images in enumerate(probe["images"]))
        rows = [[f"expert {e}", *map(_percent, row)] for e, row in enumerate(probe["right"])]
        page.table([name, *counts], [*rows, ["the mixture", *map(_percent, probe["mixture_right"])]])
    page.items(advantage_line(name, probe) for name, probe in probed.items())


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"
