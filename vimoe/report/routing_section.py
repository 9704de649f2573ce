"""What the analysis of a model found, in words, tables and figures on a page. Imports no torch."""

from __future__ import annotations

from typing import Any

from scipy.stats import spearmanr

from vimoe.analysis import figures
from vimoe.analysis.figures import CHANCE, INTERVENTIONS, doubt, doubt_of_dependence, interventions
from vimoe.analysis.statistics import FEWEST, over
from vimoe.metrics.registry import shown
from vimoe.report import plotly_figures
from vimoe.report.html_page import Page

COMPARED = {
    "weight_similarity": "cosine of the experts' weights, mean over pairs; 1 is equal",
    "deviation_similarity": "the same of their deviations from the mean expert: -1/(N-1) where all N experts "
    "moved equally far, more where a few did",
    "deviation_directions": "how many directions these deviations have; 1 to N-1",
    "output_similarity": "cosine of what two experts compute from the same token; 1 is equal",
    "neuron_similarity": "cosine of hidden unit f of one expert and hidden unit f of another",
    "matched_neuron_similarity": "the same after each unit got its best partner; much more says that experts are in "
    "part permutations of each other",
    "active_neurons": "share of the hidden units that make an expert's output",
    "score_norm_correlation": "rank correlation, over experts, of the router's score with the size of the output",
    "top1_has_largest_norm": "how often the chosen expert is the one with the largest output",
    "chance": "what the number before would be for a router that knows nothing",
    "router_expert_correlation": "whether experts that the router likes alike are alike; 1 is so",
}


def add_routing(page: Page, evidence: dict[str, Any], heading: str, prefix: str = "") -> None:
    """Adds the section on routing: who goes where, does it follow the class, and does it matter.

    Args:
        page: to add it to.
        evidence: what routing.json holds.
        heading: of the section.
        prefix: of the names of the files in figures/, where a page has several such sections.
    """
    page.heading(heading)
    base, layers = evidence["base"], evidence["layers"]
    if not layers:
        page.text("The model has no MoE layer, so there is no routing to show.")
        return
    names = shown(base)
    page.text(
        f"In an MoE layer a router sends each image (or each of its tokens) to a few of the layer's experts. This "
        f"section asks whether it does so by class, and whether that matters. All of it is about validation images: "
        f"the routing of {evidence['images']} of them was recorded. On all {base['images']} the untouched model has "
        f"loss {base['loss']:.4f} and {names.right_name} {base[names.right]:.2%}. Intervals, in brackets and as bars, "
        f"are {evidence['confidence']:.0%} bootstrap intervals {_meaning(evidence.get('sequences'))}"
    )
    page.items(in_short(evidence))
    _who_goes_where(page, evidence, prefix)
    _dependence(page, evidence, prefix)
    _does_it_matter(page, evidence, prefix)
    _single_experts(page, evidence, prefix)
    _over_depth(page, evidence, prefix)
    _how_alike(page, evidence)


def _meaning(sequences: int | None) -> str:
    """What intervals are over and say, of images that are frames of so many videos."""
    if sequences is None:
        return "over images: they say what other images might have given, not what another training would."
    if sequences >= FEWEST:
        return (
            f"{over(sequences)}, because frames of one video are alike: they say what other videos might have given, "
            f"not what another training would. For p too whole sequences exchange their decisions."
        )
    return (
        f"{over(sequences)}: frames of one video are alike, and fewer than {FEWEST} sequences are too few to resample. "
        f"They say nothing of other videos, nor of another training, and p is too sure as well."
    )


def in_short(evidence: dict[str, Any]) -> list[str]:
    """Which layers specialise by number, which by cause, and whether the two agree."""
    layers = evidence["layers"]
    amis = {layer["name"]: layer["adjusted_mutual_information"] for layer in layers}
    follow = [f"{name} ({ami['value']:.3f})" for name, ami in amis.items() if not doubt_of_dependence(ami)]
    lines = [
        f"By number, the expert follows the class more than chance gives (AMI) in: {', '.join(follow) or 'no layer'}."
    ]
    causes = {layer["name"]: layer["permuted"]["loss"] for layer in layers if layer["permuted"]}
    if causes:
        matter = [f"{name} ({cause['value']:+.4f})" for name, cause in causes.items() if cause["low"] > 0]
        lines.append(
            f"By cause, the loss rises when decisions are permuted between images (nats, the interval above 0) in: "
            f"{', '.join(matter) or 'no layer'}."
        )
    numbers, changes = [amis[name]["value"] for name in causes], [cause["value"] for cause in causes.values()]
    if len(set(numbers)) > 2 and len(set(changes)) > 2:
        agree = spearmanr(numbers, changes).statistic
        lines.append(
            f"The rank correlation of the two over {len(causes)} layers is {agree:+.2f}; 1 says that the layers which "
            f"follow the class most matter most, and of so few layers it is a rough figure."
        )
    return lines


def interval(change: dict[str, float], form: str = "+z.4f", unit: float = 1) -> str:
    """An estimate, and below it its interval."""
    value, low, high = (format(change[key] / unit, form) for key in ("value", "low", "high"))
    return f"{value}\n[{low},\u00a0{high}]"


def told(change: dict[str, float], form: str = "+z.4f", unit: float = 1) -> str:
    """A change and its interval, and in words where it may be nothing."""
    return f"{interval(change, form, unit)}\n{doubt(change)}".rstrip()


def told_dependence(found: dict[str, float]) -> str:
    """Adjusted mutual information with its interval, and in words where chance explains it."""
    return f"{interval(found, 'z.3f')}\n{doubt_of_dependence(found)}".rstrip()


def _who_goes_where(page: Page, evidence: dict[str, Any], prefix: str) -> None:
    page.subheading("Which class goes to which expert")
    page.text(
        "One panel a layer, a row a class, a column an expert; the colour is the share of the class that goes to the "
        "expert, so that a row sums to 100%. A layer that specialises has bright blocks; one that does not has columns "
        "of one colour. A grey row is a class that none of these images is of."
    )
    drawn = sum(map(sum, evidence["layers"][0]["drawn"])) / max(sum(map(sum, evidence["layers"][0]["counts"])), 1)
    order = (
        f"All layers have one order of classes; each has its own order of experts. Both orders were found on one half "
        f"of the images and the picture is drawn from the other ({drawn:.0%} of {evidence['images']} validation "
        f"images), so that no structure in it is made by the sorting. Shares are counts and have no interval here."
    )
    page.figure(figures.heatmaps(evidence), f"{prefix}heatmaps", f"P(expert | class) by layer. {order}")
    caption = (
        "The same images in the same orders, a layer at a time: choose it above, and point at a cell to read it. The "
        "layer with the largest AMI (see below) comes first."
    )
    page.interactive(plotly_figures.heatmaps(evidence), caption)


def _dependence(page: Page, evidence: dict[str, Any], prefix: str) -> None:
    page.subheading("Does the expert follow the class?")
    page.text(
        "AMI, the adjusted mutual information of class and expert, is 0 where the expert has to do with the class no "
        "more than chance gives, and 1 where one tells the other. p is the share of random reassignments of classes "
        f"to whole images with at least as much mutual information; above {CHANCE} the layer is not distinguishable "
        "from chance. Effective experts count how many are in use: all of them if loads are equal, 1 if one gets all. "
        "Gates is the mean sum of the chosen experts' gates: the weight that they have in the layer's output."
    )
    rows = []
    for layer in evidence["layers"]:
        found, load = layer["adjusted_mutual_information"], layer["load"]
        rows.append((
            layer["name"], told_dependence(found), f"{found['p']:.3f}", f"{found['nats']:.3f}",
            f"{interval(layer['effective_experts'], '.2f')} of {layer['num_experts']}", f"{max(load):.1%}",
            f"{min(load):.1%}", str(sum(share == 0 for share in load)), f"{sum(layer['gate_mass']):.3f}",
        ))  # fmt: skip
    header = ("layer", "AMI", "p", "MI, nats", "effective experts", "busiest expert", "idlest", "idle experts", "gates")
    page.table(header, rows)
    caption = (
        f"AMI by layer on {evidence['images']} validation images, with {evidence['confidence']:.0%} bootstrap "
        f"intervals {over(evidence.get('sequences'))}; hollow where p is above {CHANCE}: not distinguishable from "
        f"chance."
    )
    name = f"{prefix}dependence"
    page.interactive(plotly_figures.dependence(evidence), caption, figures.dependence(evidence), name)


def _does_it_matter(page: Page, evidence: dict[str, Any], prefix: str) -> None:
    page.subheading("Does the routing matter?")
    found = list(dict.fromkeys(kind for layer in evidence["layers"] for kind in interventions(layer)))
    if not found:
        page.text("No layer was overruled in this analysis, so whether the routing matters was not measured.")
        return
    meanings = {
        "permuted": f"each image gets another image's complete decisions; mean of {_draws(evidence)} permutations",
        "frozen": "every image (or token) gets the layer's most frequent decision, so that it no longer chooses",
        "shared": "the layer is replaced by its shared expert alone",
        "merge": "the layer is replaced by one FFN with the experts' mean weights",
        "matched": "the same, after the experts' hidden units were matched to one another",
    }
    right = shown(evidence["base"]).right_name
    page.text(
        "One layer at a time is overruled, the others stay. What is shown is the change of the validation loss (up is "
        f"worse) and of the {right}. Where an interval contains 0 the change cannot be told from 0: on these "
        f"images the layer, or its choice, may do nothing."
    )
    page.items(f"{INTERVENTIONS[kind]}: {meanings[kind]}." for kind in INTERVENTIONS if kind in found)
    where = _overruled(evidence)
    caption = f"Change of the loss when a layer is overruled, {where} Hollow where the interval contains 0."
    page.interactive(plotly_figures.effects(evidence), caption, figures.effects(evidence), f"{prefix}effects")
    header = ["layer", *(INTERVENTIONS[kind] for kind in INTERVENTIONS if kind in found)]
    points = (("loss", "Loss, nats", "+z.4f", 1.0), ("right", f"{right.capitalize()}, points", "+z.2f", 0.01))
    for measure, name, form, unit in points:
        rows = [
            [layer["name"]]
            + [
                told(interventions(layer)[kind][measure], form, unit) if kind in interventions(layer) else "–"
                for kind in INTERVENTIONS
                if kind in found
            ]
            for layer in evidence["layers"]
        ]
        page.table([f"{name}: layer", *header[1:]], rows)
    page.text(f"Changes against the untouched model, {where}", note=True)


def _single_experts(page: Page, evidence: dict[str, Any], prefix: str) -> None:
    page.subheading("Single experts")
    dots = figures.expert_dots(evidence)
    if not dots:
        page.text("What single experts are worth was not measured in this analysis.")
        return
    clear = [dot for dot in dots if not dot.doubt]
    most = max(dots, key=lambda dot: dot.change["value"])
    page.text(
        f"One expert at a time is taken away and its images (or tokens) go to their next choice; experts of a layer "
        f"stand in order, the first on top. Of {len(dots)} experts the change of {len(dots) - len(clear)} cannot be "
        f"told from 0. Of so many intervals about {(1 - evidence['confidence']) * len(dots):.0f} would miss 0 if no "
        f"expert mattered. The largest change is that of {most.label}: {interval(most.change)} nats."
    )
    caption = f"Change of the loss without each expert, {_overruled(evidence)} Hollow where the interval contains 0."
    page.interactive(plotly_figures.experts(evidence), caption, figures.experts(evidence), f"{prefix}experts")


def _over_depth(page: Page, evidence: dict[str, Any], prefix: str) -> None:
    page.subheading("Over depth")
    pairs, routes, layers = evidence["pairs"], evidence["routes"], evidence["layers"]
    units = "tokens" if any(layer["routing"] == "token" for layer in layers) else "images"
    total, possible = sum(layer["num_experts"] for layer in layers), routes["possible"]
    page.text(
        f"Of the {total} experts of all layers together an image activates {pairs['mean']['value']:.1f} on average "
        f"(interval {pairs['mean']['low']:.1f} to {pairs['mean']['high']:.1f}; least {pairs['low']}, most "
        f"{pairs['high']}). A route is the combination of experts that one of the {units} takes from the first layer "
        f"to the last: {routes['used']:,} are used of {format(possible, ',' if possible < 10**9 else '.1e')} possible, "
        f"as varied as {routes['effective']:.1f} that are used equally often. Both on {evidence['images']} validation "
        f"images."
    )
    if len(layers) > 1:
        page.figure(
            figures.agreement(evidence), f"{prefix}agreement",
            f"Do two layers part the images alike? AMI between the images' favourite experts of each two layers: 1 "
            f"is the same partition under other names, 0 is chance. On {evidence['images']} validation images; "
            f"intervals are in routing.json.",
        )  # fmt: skip


def _how_alike(page: Page, evidence: dict[str, Any]) -> None:
    compared = {
        layer["name"]: {k: v for k, v in (layer["comparison"] or {}).items() if isinstance(v, int | float)}
        for layer in evidence["layers"]
    }
    names = [name for name in dict.fromkeys(k for n in compared.values() for k in n) if name != "num_experts"]
    page.subheading("How alike the experts are")
    if not names:
        page.text("The experts were not compared with one another in this analysis.")
        return
    page.text(
        "Experts start as copies of one FFN; how far they have come apart, layer by layer. Numbers of outputs and of "
        "the router are of a sample of validation images, those of weights need none; they have no interval."
    )
    page.table(
        ["layer", *(name.replace("_", " ") for name in names)],
        [[layer, *(f"{n[name]:.3f}" if name in n else "–" for name in names)] for layer, n in compared.items()],
    )
    page.items(f"{name.replace('_', ' ')}: {COMPARED[name]}." for name in names if name in COMPARED)


def _draws(evidence: dict[str, Any]) -> str:
    """How many permutations were made, over the layers."""
    made = [layer.get("draws", evidence["draws"]) for layer in evidence["layers"]]
    return f"{min(made)}" if min(made) == max(made) else f"{min(made)} to {max(made)}"


def _overruled(evidence: dict[str, Any]) -> str:
    return (
        f"on {evidence['overruled_images']} validation images, with {evidence['confidence']:.0%} bootstrap intervals "
        f"{over(evidence.get('overruled_sequences'))}."
    )
