"""Part of a page about the experts of each layer: how alike they are, by depth. Imports no torch."""

from __future__ import annotations

from typing import Any

from vimoe.analysis import figures
from vimoe.analysis.plot_data import PARENTS, by_depth, compared
from vimoe.report.html_page import Page

SIMILARITIES = {
    "weight_similarity": "mean cosine between the weights of two experts; 1 means equal",
    "deviation_similarity": "mean cosine between the deviations of two experts from the mean expert: -1/(N-1) if all N "
    "experts moved equally far, more if only a few moved",
    "deviation_directions": "effective number of directions of these deviations, 1 to N-1",
    "output_similarity": "mean cosine between the outputs of two experts for the same token; 1 means equal",
    "neuron_similarity": "mean cosine between hidden unit f of one expert and hidden unit f of another",
    "matched_neuron_similarity": "the same after each unit was matched to its best partner; a much larger value means "
    "that experts are partly permutations of each other",
    "active_neurons": "effective share of the hidden units that contribute to an expert's output",
    "score_norm_correlation": "rank correlation, over experts, of router score and output norm",
    "top1_has_largest_norm": "share of decisions in which the chosen expert has the largest output norm",
    "chance": "chance level of the previous number",
    "router_expert_correlation": "correlation, over pairs of experts, between the cosine of their router rows and the "
    "cosine of their deviations; 1 means that the router scores alike the experts that moved alike",
}


def add_similarities(page: Page, evidence: dict[str, Any], prefix: str = "") -> None:
    """Add how alike the experts of each layer are, in words, a figure by depth and tables.

    Args:
        page: page to add to.
        evidence: content of routing.json.
        prefix: beginning of the name of the figure's file.
    """
    numbers = {
        layer["name"]: {k: v for k, v in (layer["comparison"] or {}).items() if isinstance(v, int | float)}
        for layer in evidence["layers"]
    }
    names = [name for name in dict.fromkeys(k for n in numbers.values() for k in n) if name != "num_experts"]
    page.subheading("Similarity of experts")
    if not names:
        page.text("The experts were not compared with one another in this analysis.")
        return
    page.text(
        "Experts start as copies of one FFN. The table shows how far they have moved apart in each layer. Numbers on "
        "outputs and on the router are from a sample of validation images; numbers on weights need none. There are no "
        "intervals."
    )
    page.table(
        ["layer", *(name.replace("_", " ") for name in names)],
        [[layer, *(f"{n[name]:.3f}" if name in n else "–" for name in names)] for layer, n in numbers.items()],
    )
    page.items(f"{name.replace('_', ' ')}: {SIMILARITIES[name]}." for name in names if name in SIMILARITIES)
    if by_depth(evidence):
        _add_by_depth(page, evidence, prefix)


def _add_by_depth(page: Page, evidence: dict[str, Any], prefix: str) -> None:
    """Add the analyses of single matrices, outputs and ranks, which files of an older version have not."""
    page.subheading("A closer look at the experts, by depth")
    page.text(
        "Are experts still their parent, do they differ more in some layers, and does the router know them? The "
        "analyses are those of A Closer Look into Mixture-of-Experts (arXiv 2406.18219). A range in brackets, or a "
        "bar, has 95% of the values by chance: a value inside of it says nothing."
    )
    page.items(_of_parents(evidence))
    page.figure(
        figures.experts_by_depth(evidence), f"{prefix}experts-by-depth",
        "Experts by depth. Bars are ranges by chance: hidden units permuted (two experts, their order), tokens "
        "exchanged (outputs), experts relabelled (router rows, ranks); a hollow dot lies inside. Below, a column a "
        "layer: the experts on the first two principal axes of each matrix, with their parent as a triangle, and how "
        "often an expert has a rank by the router's score (up) and by the norm of its output (to the right).",
    )  # fmt: skip
    rows = [
        [
            f"{layer['name']}, {name}", _cell(m["cosine"]), _cell(m["neuron_mean"]), _cell(m["reordered"]),
            _cell(m["parent"]), _cell(m["router"]),
        ]
        for layer in evidence["layers"]
        for name, m in (compared(layer, "weights", "matrices") or {}).items()
    ]  # fmt: skip
    if rows:
        page.table(("matrix", "cosine", "of mean units", "matched", "with the parent", "router, R squared"), rows)
    places = (
        ("weights", "tau"), ("weights", "rho"), ("weights", "rho_parent"), ("outputs", "angular"),
        ("outputs", "diagonal"),
    )  # fmt: skip
    page.table(
        ("layer", "Kendall's tau", "equal value rows", "equal to the parent's", "angular similarity", "equal ranks"),
        [[layer["name"], *(_cell(compared(layer, *place)) for place in places)] for layer in evidence["layers"]],
    )
    page.items((
        "cosine: of the same matrix of two experts, mean over pairs, beside that for permuted hidden units. Of mean "
        "units: of its mean over hidden units. Matched: after the hidden units were put in the order that is nearest. "
        "With the parent: of an expert's matrix and the parent's",
        "router, R squared: how much of the similarity of router rows that of mean units explains, over pairs of "
        "experts; fc1 (or gate) is the matrix that reads tokens, as router rows do",
        "Kendall's tau of the order of matched hidden units with their own: 1 if none has moved. Equal value rows: "
        "share of the hidden units whose columns of fc2 have a cosine of at least 0.98 in two experts",
        "angular similarity: 1 - arccos(cosine) / pi of outputs for the same token; above 1/2 by chance if outputs "
        "have a direction in common. Equal ranks: share of the experts whose rank by score is that by output norm",
    ))  # fmt: skip


def _of_parents(evidence: dict[str, Any]) -> list[str]:
    """Return a sentence for each kind of parent: the cosine of the experts with it, by layer."""
    found: dict[str, list[str]] = {}
    for layer in evidence["layers"]:
        if parent := compared(layer, "parent"):
            cosine = "other shapes" if parent["cosine"] is None else f"cosine {parent['cosine']:.4f}"
            found.setdefault(parent["what"], []).append(
                f"{layer['name']} ({cosine}, outputs {parent['outputs']:.1%} apart)"
            )
    return [f"Experts beside {PARENTS[what]}: {', '.join(layers)}." for what, layers in found.items()]


def _cell(value: Any) -> str:
    """Return a number, with its range by chance on the next line where it has one."""
    if value is None:
        return "–"
    if not isinstance(value, dict):
        return f"{value:.3f}"
    return f"{value['value']:.3f}\n[{value['low']:.3f},\u00a0{value['high']:.3f}]"
