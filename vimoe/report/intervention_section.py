"""Parts of the routing section about interventions: the loss when the routing of one layer is changed. No torch."""

from __future__ import annotations

from typing import Any

from vimoe.analysis import figures
from vimoe.analysis.intervals import over
from vimoe.analysis.plot_data import INTERVENTIONS, expert_dots, measured_interventions
from vimoe.metrics.registry import shown
from vimoe.report import plotly_figures
from vimoe.report.html_page import Page
from vimoe.report.table_cells import change_cell, interval_cell


def add_interventions(page: Page, evidence: dict[str, Any], prefix: str) -> None:
    """Add the changes of loss and accuracy for each layer and kind of intervention.

    Args:
        page: page to add to.
        evidence: content of routing.json.
        prefix: beginning of the names of its files in figures/.
    """
    page.subheading("Does the routing matter?")
    measured = {layer["name"]: measured_interventions(layer) for layer in evidence["layers"]}
    kinds = [kind for kind in INTERVENTIONS if any(kind in effects for effects in measured.values())]
    if not kinds:
        page.text("This analysis made no interventions, so whether the routing matters was not measured.")
        return
    meanings = {
        "permuted": f"each image gets another image's complete decisions; mean of {_draws(evidence)} permutations",
        "frozen": "every image (or token) gets the layer's most frequent decision, so the router no longer chooses",
        "shared": "the layer is replaced by its shared expert",
        "merge": "the layer is replaced by one FFN with the experts' mean weights",
        "matched": "the same, after the experts' hidden units were matched to one another",
        "join": "the layer is replaced by one FFN with the hidden units of all experts, weighted by their mean gates",
        "whole": "the same, with each piece at the weight that it has when it is chosen",
    }
    accuracy = shown(evidence["base"]).right_name
    page.text(
        f"Each intervention changes one layer and leaves the others as they are. The numbers are changes of the "
        f"validation loss (higher is worse) and of the {accuracy}. If an interval contains 0, the change is "
        f"not distinguishable from 0: on these images the layer, or its choice, may have no effect."
    )
    page.items(f"{INTERVENTIONS[kind]}: {meanings[kind]}." for kind in kinds)
    images = _images(evidence)
    caption = f"Change of the loss under each intervention, {images} A hollow dot has an interval that contains 0."
    page.plotly_figure(plotly_figures.effects(evidence), caption, figures.effects(evidence), f"{prefix}effects")
    note = f"Changes from the unchanged model, {images}"
    for key, name, form, unit in (
        ("loss", "Loss, nats", "+z.4f", 1.0),
        ("right", f"{accuracy.capitalize()}, points", "+z.2f", 0.01),
        ("calibrated", "Calibrated loss, nats", "+z.4f", 1.0),
    ):
        found = {layer: {k: e[key] for k, e in effects.items() if e.get(key)} for layer, effects in measured.items()}
        if not any(found.values()):  # masks have no calibrated loss, nor have older files
            continue
        rows = [
            [layer, *(_change_cell(changes[kind], form, unit) if kind in changes else "–" for kind in kinds)]
            for layer, changes in found.items()
        ]
        page.table([f"{name}: layer", *(INTERVENTIONS[kind] for kind in kinds)], rows)
        if key == "calibrated":
            before = next(c["temperature_before"] for changes in found.values() for c in changes.values())
            note += (
                f" The calibrated loss is that at the temperature T that fits each model best on these images; the "
                f"unchanged model has T = {before:.2f}. If a change of the loss is none of the calibrated loss, the "
                f"model only became more sure, or less sure, of the same answers."
            )
    page.text(note, note=True)


def add_expert_effects(page: Page, evidence: dict[str, Any], prefix: str) -> None:
    """Add the change of the loss without each single expert; the arguments are those of `add_interventions`."""
    page.subheading("Single experts")
    dots = expert_dots(evidence)
    if not dots:
        page.text("The effect of single experts was not measured in this analysis.")
        return
    unclear = sum(bool(dot.warning) for dot in dots)
    most = max(dots, key=lambda dot: dot.estimate["value"])
    page.text(
        f"Each dot shows the loss without one expert; its images (or tokens) go to their next choice. The experts of a "
        f"layer are in order, the first at the top. For {unclear} of {len(dots)} experts the change is not "
        f"distinguishable from 0. If no expert mattered, about {(1 - evidence['confidence']) * len(dots):.0f} of these "
        f"intervals would exclude 0. The largest change is that of {most.label}: {interval_cell(most.estimate)} nats."
    )
    caption = (
        f"Change of the loss without each expert, {_images(evidence)} A hollow dot has an interval that contains 0."
    )
    page.plotly_figure(
        plotly_figures.expert_effects(evidence), caption, figures.expert_effects(evidence), f"{prefix}experts"
    )


def _change_cell(change: dict[str, float], form: str, unit: float) -> str:
    """Return a change as `change_cell` does, with the temperature of the changed model if it has one."""
    after = change.get("temperature_after")
    return change_cell(change, form, unit) + (f"\nT = {after:.2f}" if after else "")


def _draws(evidence: dict[str, Any]) -> str:
    """Return the number of permutations, or its range over the layers."""
    made = [layer.get("draws", evidence["draws"]) for layer in evidence["layers"]]
    return f"{min(made)}" if min(made) == max(made) else f"{min(made)} to {max(made)}"


def _images(evidence: dict[str, Any]) -> str:
    return (
        f"on {evidence['overruled_images']} validation images, with {evidence['confidence']:.0%} bootstrap intervals "
        f"{over(evidence.get('overruled_sequences'))}."
    )
