"""Tables of a study as Markdown: contrasts, arms, MoE layers, the search, and notes on what was run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from vimoe.metrics.registry import shown
from vimoe.study.contrasts import Answer, answers, differences, explorations, layer_names, names_of, shown_mean
from vimoe.study.paired import EXACT, interval
from vimoe.study.results import Results

OPTIONAL = {
    "ece": "calibration error",
    "loss_at_temperature": "loss at the best temperature",
}  # where evaluate has them
EFFECTS: dict[str, Callable[[Any], Any]] = {
    "routes permuted": lambda layer: layer["permuted"],
    "shared expert alone": lambda layer: layer["dense"]["shared"],
    "merged": lambda layer: layer["dense"]["merge"],
}


def contrasts_table(results: Results, data: str) -> str:
    """Return the declared contrasts with their verdicts; "" before the first one can be computed."""
    return _answers_table(results, answers(results, data))


def explored_table(results: Results, data: str) -> str:
    """Return the comparisons that were not declared; "" before the first one can be computed."""
    if not (table := _answers_table(results, explorations(results, data))):
        return ""
    return f"Not declared before the runs, so each interval is 95% for itself:\n\n{table}"


def _answers_table(results: Results, found: list[Answer]) -> str:
    if all(each.difference is None for each in found):
        return ""
    head = ["contrast", "of", "against", "seeds", "difference, points", "p, signs", "loss", "routes permuted, nats",
            "margin", "verdict"]  # fmt: skip
    return markdown(head, [contrast_row(results, each) for each in found])


def contrast_row(results: Results, found: Answer) -> list[str]:
    """Return the row of an answer."""
    of = found.of or "the best of " + ", ".join(results.study.contrasts[found.contrast].candidates)
    row, margin = [found.contrast, of, found.against], f"{found.margin:g}" if found.of else ""
    if found.difference is None or found.loss is None:
        return [*row, "0", *[""] * 4, margin, found.verdict]
    return [*row, str(found.difference.n), shown_mean(found.difference), f"{found.p:.3f}",
            shown_mean(found.loss, "+.4f"), shown_mean(found.routes, "+.3f") if found.routes else "", margin,
            found.verdict]  # fmt: skip


def arms_table(results: Results, data: str) -> str:
    """Return each outcome, and its differences to the control, paired by seed; "" before a final cell is there."""
    study = results.study
    outcomes = [
        o
        for arm, of in study.arms.items()
        for o in (arm, *(f"{arm}/{s}" for s in of.get("after", ()) if s != "analyze"))
    ]
    scores = {outcome: results.outcome(data, outcome) for outcome in outcomes}
    scores = {outcome: found for outcome, found in scores.items() if found}
    if not scores:
        return ""
    names = names_of(next(iter(scores.values())))
    fields = [("loss", "loss"), *((key, name) for key, name in OPTIONAL.items() if has(scores, key))]
    head = ["arm", "rate", "seeds", f"{names.judge_name}, %", "difference, points"]
    for _, name in fields:
        head += [name, "difference"]
    rows = []
    for outcome, found in scores.items():
        arm = outcome.partition("/")[0]
        cells = results.final(data, arm)
        row = [outcome, f"{results.rate(data, arm):g}", str(len(found)), spread(found, names.judge, 100, ".2f"),
               against(scores, outcome, study.control, names.judge, 100, "+.2f", len(study.contrasts))]  # fmt: skip
        for key, _ in fields:
            row += [
                spread(found, key, 1, ".4f"),
                against(scores, outcome, study.control, key, 1, "+.4f", len(study.contrasts)),
            ]
        costs = [
            cell["after"][outcome.partition("/")[2]]["after"] if "/" in outcome else cell["cost"]
            for cell in cells.values()
        ]
        row += [f"{mean_of(costs, 'activated_params') / 1e6:.2f}", f"{mean_of(costs, 'macs') / 1e9:.3f}"]
        row += ["" if "/" in outcome else f"{statistics.fmean(c['seconds']['train'] for c in cells.values()):.0f}"]
        rows.append(row)
    return markdown([*head, "activated, M", "MACs, G", "training, s"], rows)


def layers_table(results: Results, data: str) -> str:
    """Return what the analysis found in each MoE layer, as means over seeds with intervals; "" without any."""
    rows = []
    for arm, layer, cells, found in analysed_layers(results, data):
        # by the steps, because a layer that no method makes dense stays, and is not in `kept`
        pruned = [cell["after"]["prune"]["steps"] for cell in cells if "prune" in cell["after"]]
        gone = sum(any(s["layer"] == layer and s["expert"] is None for s in steps) for steps in pruned)
        rows.append([
            arm, layer, str(len(found)),
            over_seeds(found, lambda e: e["adjusted_mutual_information"]["value"]),
            over_seeds(found, lambda e: e["effective_experts"]["value"], ".2f"),
            f"{gone} of {len(pruned)}" if pruned else "",
        ])  # fmt: skip
    head = ["arm", "layer", "seeds", "AMI with the class", "effective experts", "pruned"]
    return "\n\n".join([markdown(head, rows), *routes_table(results, data)]) if rows else ""


def effects_table(results: Results, data: str) -> str:
    """Return the changes on validation if each MoE layer is overruled, as means over seeds; "" without any.

    The last column is the change of the loss if each model has the temperature that fits it best. It is left out where
    no result has it: segmentation has none, and older results have none.
    """
    rows, head = [], ["arm", "layer", "overruled", "seeds", "loss, nats"]
    for arm, layer, cells, found in analysed_layers(results, data):
        points = f"{shown(cells[0]['analysis']['base']).right_name}, points"
        for name, effect in EFFECTS.items():
            figures = [
                over_seeds(found, partial(_scaled, effect, key, scale), form)
                for key, scale, form in (("loss", 1, "+.3f"), ("right", 100, "+.2f"), ("calibrated", 1, "+.3f"))
            ]
            if any(figures):
                rows.append([arm, layer, name, str(len(found)), *figures])
    if not rows:
        return ""
    head += [points, "calibrated loss, nats"]
    kept = len(head) if any(row[-1] for row in rows) else -1
    return markdown(head[:kept], [row[:kept] for row in rows])


def _scaled(effect: Callable[[Any], Any], key: str, scale: float, layer: dict[str, Any]) -> float:
    return scale * float(effect(layer)[key]["value"])


def analysed_layers(
    results: Results, data: str
) -> Iterator[tuple[str, str, list[dict[str, Any]], list[dict[str, Any]]]]:
    """Yield each arm, MoE layer, the arm's cells with an analysis, and what these found in the layer."""
    for arm in results.study.arms:
        cells = [cell for cell in results.final(data, arm).values() if cell["analysis"]]
        for layer in layer_names(cells):
            yield arm, layer, cells, [e for cell in cells for e in cell["analysis"]["layers"] if e["name"] == layer]


def routes_table(results: Results, data: str) -> list[str]:
    """Return the combinations of experts over depth that images take (routing degree), by arm, in a list of one."""
    rows = []
    for arm in results.study.arms:
        found = [cell["analysis"] for cell in results.final(data, arm).values() if cell["analysis"]]
        if found:
            parts = [
                lambda e: e["routes"]["used"],
                lambda e: e["routes"]["effective"],
                lambda e: e["pairs"]["mean"]["value"],
            ]
            means = [over_seeds(found, part, ".2f") for part in parts]
            rows.append([arm, *means[:2], f"{found[0]['routes']['possible']}", means[2]])
    head = ["arm", "routes used", "effective routes", "possible (routing degree)", "experts of an image"]
    return [markdown(head, rows)] if rows else []


def search_table(results: Results, data: str) -> str:
    """Return the search: validation score of each arm at each rate, and the rate of the best mean rank."""
    rows = []
    for arm in results.study.arms:
        found = results.searched(data, arm)
        if found:
            judge = names_of(next(iter(found.values()))).judge
            means = [spread(found[rate], judge, 100, ".2f") for rate in results.study.rates]
            rows.append([arm, *means, f"{results.rate(data, arm):g}"])
    head = ["arm", *(f"validation at {rate:g}, %" for rate in results.study.rates), "chosen"]
    return "\n\n".join([markdown(head, rows), *filter(None, [at_an_end(results, data)])]) if rows else ""


def at_an_end(results: Results, data: str) -> str:
    """Return a sentence on the arms whose chosen rate is the lowest or the highest, if there are several rates."""
    ends = {min(results.study.rates), max(results.study.rates)}
    chosen = {arm: results.rate(data, arm) for arm in results.study.arms if results.searched(data, arm)}
    arms = [f"{arm} ({rate:g})" for arm, rate in chosen.items() if rate in ends and len(ends) > 1]
    return f"Chosen at an end of the grid, beyond which a rate may be better: {', '.join(arms)}." if arms else ""


def notes(results: Results, data: str) -> str:
    """Return what the tables of a data set have in common."""
    cells = [cell for cell in results.cells.values() if cell["data"] == data]
    tests = sorted({cell["test"]["images"] for cell in cells if "test" in cell})
    versions = sorted({f"torch {c['versions']['torch']}, timm {c['versions']['timm']}" for c in cells})
    machines = sorted({f"{c['machine']['gpu'] or c['machine']['cpu']}, precision {c['precision']}" for c in cells})
    inputs = sorted({f"{name} {mark}" for c in cells for name, mark in c["inputs"].items()})
    hours = sum(cell["seconds"]["cell"] for cell in cells) / 3600
    study, count = results.study, max(len(results.study.contrasts), 1)
    after, analysed = {step for cell in cells for step in cell["after"]}, any(cell["analysis"] for cell in cells)
    more = any(len(study.seeds_of(data, arm)) > len(study.seeds) for arm in study.arms)
    seen = ", ".join(map(str, tests)) or "none scored yet"
    code, digests = ", ".join(sorted({c["code"] for c in cells})), ", ".join(inputs) or "none"
    lines = [
        f"Test images: {seen}. A score is the mean ± standard deviation over an arm's own seeds, a difference over "
        f"those that two arms share, so these need not agree to the last digit.",
        f"A difference is paired by seed, and to the control, {study.control}, where no other arm is named. It has a "
        f"95% interval of Student's t, widened for {count} contrasts (Bonferroni); only the contrasts were declared.",
        f"p is of the signs of the differences, all of them up to {EXACT} seeds and 9,999 draws of them for more.",
    ]
    if more:
        lines.append("Contrasts that got more seeds were looked at twice, for which no interval is widened.")
    if "prune" in after:
        lines.append("ARM/prune is the pruned model.")
    if "merge_all" in after:
        lines.append("ARM/merge_all is the model of which each MoE layer is the mean of its experts.")
    if analysed:
        lines += [
            "Changes by overruling a layer are on validation. Those among the contrasts are of the layer whose "
            "interval has the highest lower end, widened for the number of layers.",
            "The calibrated loss is that at the temperature that fits each model best, so a scale of the logits "
            "changes nothing.",
        ]
    lines += [
        f"Versions: {'; '.join(versions)}; package {code}. Digests of the data: {digests}.",
        f"Machine: {'; '.join(machines)}. Computing took {hours:.2f} hours in all.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def has(scores: dict[str, dict[int, dict[str, Any]]], key: str) -> bool:
    """Return True if all scores have a figure."""
    return all(score.get(key) is not None for found in scores.values() for score in found.values())


def against(
    scores: dict[str, dict[int, dict[str, Any]]], of: str, to: str, key: str, scale: float, form: str, comparisons: int
) -> str:
    """Return the mean difference of two outcomes with its interval, as text."""
    found = differences(scores[of], scores.get(to, {}), key, scale)
    return "" if of == to or not found else shown_mean(interval(found, max(comparisons, 1)), form)


def over_seeds(found: Sequence[dict[str, Any]], part: Callable[[Any], float], form: str = ".3f") -> str:
    """Return the mean of a part with its 95% interval, as text; "" where it was not measured."""
    values = []
    for each in found:
        try:
            values.append(part(each))
        except (KeyError, TypeError):  # an intervention that the router or the layer does not have
            return ""
    return shown_mean(interval(values), form)


def spread(scores: dict[int, dict[str, Any]], key: str, scale: float, form: str) -> str:
    """Return mean ± standard deviation of a figure as text; for one value without the deviation."""
    values = [scale * score[key] for score in scores.values()]
    mean = format(statistics.fmean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


def mean_of(values: Sequence[dict[str, Any]], key: str) -> float:
    """Return the mean of a figure."""
    return statistics.fmean(value[key] for value in values)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
