"""The report of a run, from the files in its folder. Imports no torch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from vimoe.analysis.figures import INTERVENTIONS
from vimoe.analysis.statistics import over
from vimoe.errors import FolderError, VimoeError
from vimoe.files import read_text
from vimoe.metrics.registry import Shown, shown
from vimoe.report.curves import curves, loads
from vimoe.report.html_page import Page
from vimoe.report.routing_section import add_routing, told
from vimoe.run_folder import CONFIG, EXAMPLES, EXPERT_MAPS, FIGURES, ROUTING, ROUTING_BEFORE, SUMMARY

METRICS, LOAD = "metrics.csv", "load.csv"
COSTS = ("loss", "parameters, M", "activated, M", "MACs, G", "images/s")
RECEIPTS = {"before": "before pruning", "after": "pruned", "recovered": "pruned, then trained on"}
PLACE = {kind: name.removeprefix("dense: ") for kind, name in INTERVENTIONS.items()} | {"dropped": "other experts"}


def receipt_header(names: Shown) -> tuple[str, ...]:
    """Return the header of a table of receipts whose scores have these names."""
    return ("", f"{names.judge_name}, %", *COSTS)


def receipt_row(name: str, receipts: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """A row under `receipt_header`; of several receipts, such as those of seeds, mean and standard deviation."""

    def cell(key: str, unit: float, form: str) -> str:
        return over_seeds([receipt[key] for receipt in receipts], unit, form)

    return (
        name, cell(shown(receipts[0]).judge, 0.01, "{:.2f}"), cell("loss", 1, "{:.4f}"), cell("params", 1e6, "{:.3f}"),
        cell("activated_params", 1e6, "{:.3f}"), cell("macs", 1e9, "{:.4f}"), cell("images_per_second", 1, "{:.0f}"),
    )  # fmt: skip


def over_seeds(values: Sequence[float], unit: float, form: str) -> str:
    """Values in units of `unit`: their mean and standard deviation, or the one value that they all are."""
    values = [value / unit for value in values]
    mean = form.format(statistics.fmean(values))
    return mean if len(set(values)) == 1 else f"{mean} ± {form.format(statistics.stdev(values))}"


def write_run_report(run: Path) -> Path:
    """Writes report.html of a run from the files that are there. Raises FolderError where one of them is damaged."""
    page = Page(f"vimoe run {run.resolve().name}", run / FIGURES)
    settings, what = read_config(run)
    with damage_named(run / SUMMARY):
        summary = read_json(run / SUMMARY)
        versions = [(name, str(version)) for name, version in summary.get("versions", {}).items()]
        _what_was_done(page, what, settings["data.path"], summary)
        if "before" in summary:
            _pruning(page, summary)
    if (run / METRICS).exists():
        with damage_named(run / METRICS):
            _curves(page, run / METRICS, summary)
    if (run / LOAD).exists():
        with damage_named(run / LOAD):
            _loads(page, run / LOAD)
    if (run / FIGURES / EXPERT_MAPS).exists():
        _expert_maps(page, run / FIGURES / EXPERT_MAPS)
    for name, heading, prefix in (
        (ROUTING, "Routing", ""),
        (ROUTING_BEFORE, "Routing before pruning, which decided", "before-"),
    ):
        if (run / name).exists():
            with damage_named(run / name):
                evidence = read_json(run / name)
                add_routing(page, evidence, heading, prefix)
                _examples(page, run / FIGURES, [layer["name"] for layer in evidence["layers"]])
    page.heading("Settings and versions")
    page.text(f"All settings of the run, as in {CONFIG}, by the names of the command's flags; click to see them.")
    page.table(("setting", "value"), settings.items(), words=True, folded=f"{len(settings)} settings")
    if versions:
        page.table(("software", "version"), versions, words=True, folded="Versions of the software that made the run")
    return page.write(run / "report.html")


def describe(config: dict[str, Any]) -> str:
    """In words, what the settings of a run make of a ViT."""
    moe, model = config["moe"], config["model"]["name"]
    if moe["layers"] == "none":
        return f"{model}, dense"
    where = "every block" if moe["layers"] == "all" else f"blocks {moe['layers']}"
    if not moe["num_experts"]:
        return f"{model} with a dense FFN of {moe['num_shared_experts']} times the width in {where} (a control)"
    shared = f", {moe['num_shared_experts']} shared" if moe["num_shared_experts"] else ", none shared"
    return (
        f"{model} with a mixture of experts in {where}: {moe['num_experts']} experts{shared}, {moe['top_k']} chosen "
        f"for each {moe['routing']}"
    )


def receipt_rows(summary: dict[str, Any], name: str = "") -> list[tuple[str, ...]]:
    """The receipts of a pruned run as rows under `receipt_header`, with the name of the run before each."""
    return [
        receipt_row(f"{name}, {when}" if name else when, [summary[key]])
        for key, when in RECEIPTS.items()
        if summary.get(key)
    ]


def measures(score: dict[str, Any]) -> dict[str, str]:
    """Return the shares of a score in points, by name; the first with half its 95% interval where it has one."""
    names = shown(score)
    found = {f"{name}, %": f"{100 * score[key]:.2f}" for key, name in names.shares.items()}
    if (half := margin(score)) is not None:
        found[f"{names.judge_name}, %"] += f"\u00a0±\u00a0{half:.2f}"
    return found


def margin(score: dict[str, Any]) -> float | None:
    """Return half the 95% interval, in points, of a share of so many images; None for a share of something else."""
    names = shown(score)
    share = score[names.judge]
    return 196 * float((share * (1 - share) / score["images"]) ** 0.5) if names.counts_images else None


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Raises FolderError, with the name of the file, where what it holds cannot be shown."""
    try:
        yield
    except VimoeError:  # such as of a full disk
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, yaml.YAMLError) as error:
        raise FolderError(f"{path} is damaged ({error!r}); restore it, or make it again") from error


def read_config(run: Path) -> tuple[dict[str, str], str]:
    """The settings of a run by flag, and in words what they make."""
    if not (run / CONFIG).is_file():
        raise FolderError(f"{run} has no {CONFIG}: expected a folder that vimoe train or vimoe prune made")
    with damage_named(run / CONFIG):
        config = yaml.safe_load(read_text(run / CONFIG))
        flat = {f"{section}.{name}": str(value) for section, v in config.items() for name, value in v.items()}
        return {"data.path": "?", **flat}, describe(config)


def read_json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing where there is none."""
    return json.loads(read_text(path)) if path.exists() else {}


def _what_was_done(page: Page, what: str, data: str, summary: dict[str, Any]) -> None:
    page.heading("What was done")
    if "val" in summary:
        val = summary["val"]
        early = ", stopped early because further ones were no better" if summary.get("stopped_early") else ""
        page.text(
            f"A training of {what}, on {summary['train_images']} images of {data}: {_epochs(summary['epochs'])} in "
            f"{summary['seconds']:.0f} s{early}. Epoch {summary['best_epoch']} was the best on the {val['images']} "
            f"validation images and is the model that was kept."
        )
        names, shares = shown(val), measures(val)
        header = ("", "images", *shares, "loss")
        page.table(header, [("validation", str(val["images"]), *shares.values(), f"{val['loss']:.4f}")])
        margins = "± is the 95% margin of so many images. " if names.counts_images else ""
        page.text(
            f"{margins}The scores are a little too good, because the epoch was chosen by them: vimoe evaluate scores "
            f"test images, which decided nothing.",
            note=True,
        )
        if features := summary.get("features"):
            page.text(
                f"All before {features['before']} was frozen. What it gives for {features['views']} augmented views of "
                f"each training image was computed once ({features['bytes'] / 1e9:.2f} GB, {features['seconds']:.0f} s "
                f"besides those above; 0 s where an earlier run had left it) and trained on in place of images.",
                note=True,
            )
        for key, sentence in names.limits.items():
            if key in summary:
                page.text(sentence.format(f"{100 * summary[key]:.2f}"), note=True)
        if names.by_class and "classes" in summary:
            key, name = names.by_class
            _by_class(page, name, val[key], summary["classes"])
        if alarms := summary.get("alarms"):
            page.text(f"{len(alarms)} alarms were raised in training; the last ones:")
            page.items(alarms[-6:])
    elif "before" in summary:
        page.text(
            f"Pruning of a trained model: {what}, on images of {data}. MoE layers and experts were removed as long as "
            f"that cost little on validation images."
        )
    else:
        page.text(f"{what}, on images of {data}. There is no {SUMMARY}, so no result can be shown.")


def _by_class(page: Page, what: str, shares: list[float | None], classes: list[str]) -> None:
    rows = [(name, "–" if share is None else f"{100 * share:.2f}") for name, share in zip(classes, shares, strict=True)]
    page.table(("class", f"{what} on validation, %"), sorted(rows, key=lambda row: row[1] == "–"))


def _pruning(page: Page, summary: dict[str, Any]) -> None:
    before, steps = summary["before"], summary["steps"]
    right = shown(before).right_name
    page.heading("Result of pruning")
    page.text(
        "The same images before and after. Activated parameters are those that one image uses; MACs are the "
        "multiply-adds of one image; images/s was measured on the machine that pruned."
    )
    page.table(receipt_header(shown(before)), receipt_rows(summary))
    recovery = f" The last row is after {_epochs(summary['recovery_epochs'], 'further ')} of training the pruned model."
    page.text(
        f"On {before['images']} {summary['split']} images.{_margin_told(before)}"
        f"{recovery if summary.get('recovered') else ''}",
        note=True,
    )
    page.heading("What was pruned, and why")
    tolerance = summary["tolerance"]
    page.text(
        f"Removals in the order in which they were made, a row each. The change is that of the validation loss against "
        f"the step before, the total that against the unpruned model; in brackets 95% bootstrap intervals "
        f"{over(summary.get('sequences'))}. A layer or expert goes when the upper end of that interval is at most the "
        f"tolerance, {tolerance} nats. Experts are numbered among those that the layer still had."
    )
    if steps:
        page.table(
            ("removed", "what takes its place", "change, nats", "total, nats", f"total {right}, points"),
            [
                (
                    f"{i}. {removed(step)}", PLACE.get(step["how"], step["how"]), told(step["change"]["loss"]),
                    *_total(step["total"]),
                )
                for i, step in enumerate(steps, start=1)
            ],
        )  # fmt: skip
    else:
        page.text("Nothing was removed: of no layer was it clear that removing it costs at most the tolerance.")
    if summary["kept"]:
        page.subheading("What was kept")
        page.text(
            "MoE layers that stayed, and what removing them from the pruned model would have cost on validation by the "
            "cheapest way, with the same intervals: their upper ends are above the tolerance. Where a change cannot be "
            "told from 0, these images are too few to say whether the layer is needed."
        )
        page.table(
            ("layer", "experts left", "cheapest way", "loss, nats", f"{right}, points"),
            [
                (
                    kept["layer"], str(kept["experts"]), PLACE.get(kept["how"], kept["how"]),
                    told(kept["change"]["loss"]), told(kept["change"]["right"], "+z.2f", 0.01),
                )
                for kept in summary["kept"]
            ],
        )  # fmt: skip
    else:
        page.text("No MoE layer was kept: the pruned model is dense.")


def _margin_told(score: dict[str, Any]) -> str:
    half = margin(score)
    if half is None:
        return ""
    return (
        f" The 95% margin of a {shown(score).judge_name} on so many is ± {half:.2f} points, that of a difference on "
        f"the same images is mostly smaller."
    )


def _curves(page: Page, metrics: Path, summary: dict[str, Any]) -> None:
    page.heading("Training" if "val" in summary else "Training after pruning")
    images = summary["val"]["images"] if "val" in summary else summary.get("validation_images", "the run's")
    page.text(
        "Down is better on the left, up on the right. Where training goes on to fall and validation does not, the "
        "model learns its images by heart."
    )
    caption = f"Loss and score by epoch; validation is of {images} images. One training, so there is no interval."
    page.figure(curves(metrics), "curves", caption)


def _loads(page: Page, load: Path) -> None:
    page.figure(
        loads(load),
        "load",
        "The share of the training images (or tokens) that each expert got, by epoch: a panel a layer, a line an "
        "expert. Equal lines are a balanced layer; a line at 0 is an idle expert. Counts, so without interval.",
    )


def _expert_maps(page: Page, path: Path) -> None:
    page.heading("Experts over the image")
    page.text(
        "Validation images, spread over their list, with what the model makes of them and, for each MoE layer (of many "
        "the last six), the expert that was each patch's first choice. Expert numbers mean nothing between layers. "
        "Patches of one kind in one colour are a sign that the router follows what is seen; they do not show that this "
        "matters."
    )
    page.picture(path, "Image, truth (void is white), prediction, and the expert of each patch, layer by layer.")


def _examples(page: Page, folder: Path, layers: Sequence[str]) -> None:
    sheets = {layer: folder / EXAMPLES.format(layer) for layer in layers if (folder / EXAMPLES.format(layer)).exists()}
    if sheets:
        page.subheading("Images and their experts")
        page.text(
            "The validation images that gave each expert most, by the sum of the gates: a row an expert. They show the "
            "extremes, not the usual image, and are no score."
        )
    for layer, path in sheets.items():
        page.picture(path, f"{layer}: validation images by the expert that they went to.")


def removed(step: dict[str, Any]) -> str:
    """The layer or expert that a step of a pruning took out."""
    return step["layer"] if step["expert"] is None else f"{step['layer']}, expert {step['expert']}"


def _total(total: dict[str, Any] | None) -> tuple[str, str]:
    """The change of the loss and of what is right; dashes where it was not measured."""
    return (told(total["loss"]), told(total["right"], "+z.2f", 0.01)) if total else ("–", "–")


def _epochs(number: int, which: str = "") -> str:
    return f"{number} {which}epoch{'s' * (number != 1)}"
