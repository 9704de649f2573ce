"""Section of a page about the routing of a model: words, tables and figures from routing.json. Imports no torch."""

from __future__ import annotations

from typing import Any

from scipy.stats import spearmanr

from vimoe.analysis import figures
from vimoe.analysis.intervals import FEWEST, over
from vimoe.analysis.plot_data import CHANCE, chance_warning
from vimoe.metrics.registry import METRICS, kind_of, shown
from vimoe.report import plotly_figures
from vimoe.report.html_page import Page
from vimoe.report.intervention_section import add_expert_effects, add_interventions
from vimoe.report.probe_section import add_diversity, add_probe
from vimoe.report.similarity_section import add_similarities
from vimoe.report.table_cells import ami_cell, interval_cell


def add_routing_in_short(page: Page, evidence: dict[str, Any], prefix: str = "", when: str = "") -> None:
    """Add what was found in a few sentences, and the figure of P(expert | class) of all layers.

    Args:
        page: page to add to.
        evidence: content of routing.json, with at least one layer.
        prefix: beginning of the names of its files in figures/.
        when: beginning of each sentence.
    """
    page.items(f"{when}{line}" for line in routing_summary(evidence))
    drawn = sum(map(sum, evidence["layers"][0]["drawn"])) / max(sum(map(sum, evidence["layers"][0]["counts"])), 1)
    page.figure(
        figures.heatmaps(evidence),
        f"{prefix}heatmaps",
        f"P(expert | class) by layer: each row is a class, each column an expert. A layer that specialises has bright "
        f"blocks; a layer that does not has columns of one colour. All layers have the same order of classes; each "
        f"layer has its own order of experts. Both orders were found on one half of the images and the heatmap shows "
        f"the other ({drawn:.0%} of {evidence['images']} validation images), so the sorting adds no structure. These "
        f"are counts, so there are no intervals.",
    )


def add_routing_section(
    page: Page, evidence: dict[str, Any], heading: str, prefix: str = "", in_short: bool = True
) -> None:
    """Add a section on routing: which class goes to which expert, whether by class, and whether it matters.

    Args:
        page: page to add to.
        evidence: content of routing.json.
        heading: heading of the section.
        prefix: beginning of the names of its files in figures/, for a page with several such sections.
        in_short: False if the page has `add_routing_in_short` of this evidence already.
    """
    page.heading(heading)
    base, layers = evidence["base"], evidence["layers"]
    if not layers:
        page.text("The model has no MoE layer, so there is no routing to show.")
        return
    names = shown(base)
    source = "validation images"
    if features := evidence.get("features"):
        source += f", from their features before {features['before']}, rounded to float16"
    once = METRICS.find(kind_of(base)).by_patch  # scenes, that a score may read by windows
    pieces = ", each read once, whole or its middle" if once else ""
    page.text(
        f"In an MoE layer a router sends each image (or each of its tokens) to a few of the layer's experts. This "
        f"section asks whether the router does so by class, and whether its choice matters. All numbers are from "
        f"{source}. The routing of {evidence['images']} of them was recorded. On all {base['images']} the "
        f"unchanged model has loss {base['loss']:.4f} and {names.right_name} {base[names.right]:.2%}{pieces}. Brackets "
        f"and bars are {evidence['confidence']:.0%} bootstrap intervals {_interval_meaning(evidence.get('sequences'))}"
    )
    if in_short:
        add_routing_in_short(page, evidence, prefix)
    _add_classes(page, evidence)
    _add_dependence(page, evidence, prefix)
    add_interventions(page, evidence, prefix)
    add_expert_effects(page, evidence, prefix)
    add_probe(page, evidence)
    _add_routes(page, evidence, prefix)
    add_similarities(page, evidence, prefix)
    add_diversity(page, evidence)


def routing_summary(evidence: dict[str, Any]) -> list[str]:
    """Return sentences on the layers that depend on the class, the layers that matter, and their agreement."""
    layers = evidence["layers"]
    amis = {layer["name"]: layer["adjusted_mutual_information"] for layer in layers}
    dependent = [f"{name} ({ami['value']:.3f})" for name, ami in amis.items() if not chance_warning(ami)]
    lines = [f"The expert depends on the class more than by chance (AMI) in: {', '.join(dependent) or 'no layer'}."]
    effects = {layer["name"]: layer["permuted"]["loss"] for layer in layers if layer["permuted"]}
    if effects:
        matter = [f"{name} ({effect['value']:+.4f})" for name, effect in effects.items() if effect["low"] > 0]
        lines.append(
            f"The loss rises when images exchange their routing decisions (change in nats, interval above 0) in: "
            f"{', '.join(matter) or 'no layer'}."
        )
    numbers, changes = [amis[name]["value"] for name in effects], [effect["value"] for effect in effects.values()]
    if len(set(numbers)) > 2 and len(set(changes)) > 2:
        correlation = spearmanr(numbers, changes).statistic
        lines.append(
            f"The rank correlation of AMI and loss change over {len(effects)} layers is {correlation:+.2f}. At 1, the "
            f"layers that depend most on the class matter most. With so few layers it is a rough figure."
        )
    return lines


def _interval_meaning(sequences: int | None) -> str:
    """Return the end of a sentence on the intervals, for images that are frames of a number of videos."""
    if sequences is None:
        return "over images. They show what other images might have given, not what another training would give."
    if sequences >= FEWEST:
        return (
            f"{over(sequences)}, because frames of one video are alike. They show what other videos might have given, "
            f"not what another training would give. For p, too, whole sequences exchange their decisions."
        )
    return (
        f"{over(sequences)}. Frames of one video are alike, and fewer than {FEWEST} sequences are too few to resample. "
        f"The intervals say nothing of other videos or another training, and p is too small as well."
    )


def _add_classes(page: Page, evidence: dict[str, Any]) -> None:
    page.subheading("Which class goes to which expert")
    page.text(
        "Each row is a class, each column an expert. The colour is the share of the class that goes to the expert, so "
        "a row sums to 100%. A grey row is a class without images."
    )
    caption = (
        "The figure of all layers, one layer at a time. Choose the layer in the menu; point at a cell to read it. The "
        "layer with the largest AMI (explained below) comes first."
    )
    page.plotly_figure(plotly_figures.heatmaps(evidence), caption)


def _add_dependence(page: Page, evidence: dict[str, Any], prefix: str) -> None:
    page.subheading("Does the expert depend on the class?")
    page.text(
        "AMI is the adjusted mutual information of class and expert: 0 at chance level, 1 if each determines the "
        "other. p is the share of random reassignments of classes to whole images with at least as much mutual "
        f"information; above {CHANCE} the layer is not distinguishable from chance. Effective experts are exp(entropy "
        "of the load): N if all loads are equal, 1 if one expert receives everything. Gates is the mean sum of the "
        "chosen experts' gates, which is their weight in the layer's output."
    )
    rows = []
    for layer in evidence["layers"]:
        ami, load = layer["adjusted_mutual_information"], layer["load"]
        rows.append((
            layer["name"], ami_cell(ami), f"{ami['p']:.3f}", f"{ami['nats']:.3f}",
            f"{interval_cell(layer['effective_experts'], '.2f')} of {layer['num_experts']}", f"{max(load):.1%}",
            f"{min(load):.1%}", str(sum(share == 0 for share in load)), f"{sum(layer['gate_mass']):.3f}",
        ))  # fmt: skip
    header = ("layer", "AMI", "p", "MI, nats", "effective experts", "largest load", "smallest", "idle experts", "gates")
    page.table(header, rows)
    caption = (
        f"AMI by layer on {evidence['images']} validation images, with {evidence['confidence']:.0%} bootstrap "
        f"intervals {over(evidence.get('sequences'))}. A hollow dot has p above {CHANCE}: not distinguishable from "
        f"chance."
    )
    page.plotly_figure(plotly_figures.ami(evidence), caption, figures.ami(evidence), f"{prefix}dependence")


def _add_routes(page: Page, evidence: dict[str, Any], prefix: str) -> None:
    page.subheading("Routes through all layers")
    pairs, routes, layers = evidence["pairs"], evidence["routes"], evidence["layers"]
    routed = "token" if any(layer["routing"] == "token" for layer in layers) else "image"
    total, possible = sum(layer["num_experts"] for layer in layers), routes["possible"]
    page.text(
        f"All layers together have {total} experts. An image activates {pairs['mean']['value']:.1f} of them on average "
        f"(interval {pairs['mean']['low']:.1f} to {pairs['mean']['high']:.1f}; minimum {pairs['low']}, maximum "
        f"{pairs['high']}). A route is the combination of experts that one {routed} takes from the first layer to the "
        f"last. {routes['used']:,} of {format(possible, ',' if possible < 10**9 else '.1e')} possible routes are used; "
        f"their effective number, exp(entropy), is {routes['effective']:.1f}. Both are from {evidence['images']} "
        f"validation images."
    )
    if len(layers) > 1:
        page.figure(
            figures.agreement(evidence), f"{prefix}agreement",
            f"Do two layers divide the images alike? AMI between the images' favourite experts in each two layers: 1 "
            f"is the same division under other numbers, 0 is chance level. From {evidence['images']} validation "
            f"images; intervals are in routing.json.",
        )  # fmt: skip
