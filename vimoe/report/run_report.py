"""The page of one run, report.html, from the files in its folder. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vimoe.report.diagnosis_section import add_diagnosis
from vimoe.report.html_page import Page
from vimoe.report.pruning_section import add_decisions, add_receipt
from vimoe.report.routing_section import add_routing_in_short, add_routing_section
from vimoe.report.run_files import LOAD, METRICS, read_config, read_json, read_summary, reading
from vimoe.report.tasks_section import add_tasks
from vimoe.report.training_section import add_curves, add_details, add_loads, add_score
from vimoe.run_folder import CONFIG, DIAGNOSIS, EXAMPLES, EXPERT_MAPS, FIGURES, ROUTING, ROUTING_BEFORE, SUMMARY

ROUTING_FILES = (  # file, heading, prefix of its figures' names
    (ROUTING, "Routing", ""),
    (ROUTING_BEFORE, "Routing before pruning, the basis of its decisions", "before-"),
)


def write_run_report(run: Path) -> Path:
    """Write report.html of a run from the files in its folder, and return its path.

    The first section has the result, what was kept and one picture: the heatmaps of the routing, or without them the
    curves of the training.

    Raises:
        FolderError: The folder has no config.yaml, or a file in it is damaged.
    """
    page = Page(f"vimoe run {run.resolve().name}", run / FIGURES)
    settings, model = read_config(run)
    page.heading("Result")
    with reading(run / SUMMARY):
        summary = read_summary(run)
        versions = [(name, str(version)) for name, version in summary.get("versions", {}).items()]
        add_first = add_receipt if "before" in summary else add_score
        add_first(page, model, settings["data.path"], summary)
    pictured = _add_evidence(page, run)
    if not pictured and (run / METRICS).exists():
        with reading(run / METRICS):
            add_curves(page, run / METRICS, summary)
    with reading(run / SUMMARY):
        if "before" in summary:
            add_decisions(page, summary)
        if "tasks" in summary:
            add_tasks(page, summary["tasks"])
    _add_training(page, run, summary, curves=pictured is not None)
    if (run / FIGURES / EXPERT_MAPS).exists():
        _add_expert_maps(page, run / FIGURES / EXPERT_MAPS)
    if (run / DIAGNOSIS).exists():
        with reading(run / DIAGNOSIS):
            add_diagnosis(page, read_json(run / DIAGNOSIS))
    for name, heading, prefix in ROUTING_FILES:
        if (run / name).exists():
            with reading(run / name):
                evidence = read_json(run / name)
                add_routing_section(page, evidence, heading, prefix, in_short=name != pictured)
                _add_examples(page, run / FIGURES, [layer["name"] for layer in evidence["layers"]])
    page.heading("Settings and versions")
    page.text(f"All settings of the run, as in {CONFIG}, under the names of the command's flags.")
    page.table(("setting", "value"), settings.items(), words=True)
    if versions:
        page.table(("software", "version"), versions, words=True)
    return page.write(run / "report.html")


def _add_evidence(page: Page, run: Path) -> str | None:
    """Add to the first section what the analysis found, and its picture.

    Returns the name of the file whose heatmaps are shown; None if there are none.
    """
    if (run / DIAGNOSIS).exists():
        with reading(run / DIAGNOSIS):
            findings = read_json(run / DIAGNOSIS)["findings"]
            page.items(f"Diagnosis: {each['name']} in {', '.join(each['layers'])}." for each in findings)
    for name, _, prefix in ROUTING_FILES:
        with reading(run / name):
            evidence = read_json(run / name)
            if evidence.get("layers"):
                when = "Before pruning: " if name == ROUTING_BEFORE else ""
                add_routing_in_short(page, evidence, prefix, when)
                return name
    return None


def _add_training(page: Page, run: Path, summary: dict[str, Any], curves: bool) -> None:
    """Add the section on the training; with the curves, unless these are the picture of the first section."""
    if not (run / METRICS).exists() and "val" not in summary:
        return
    page.heading("Training" if "val" in summary else "Training after pruning")
    if curves and (run / METRICS).exists():
        with reading(run / METRICS):
            add_curves(page, run / METRICS, summary)
    if (run / LOAD).exists():
        with reading(run / LOAD):
            add_loads(page, run / LOAD)
    if "val" in summary:
        with reading(run / SUMMARY):
            add_details(page, summary)


def _add_expert_maps(page: Page, path: Path) -> None:
    page.heading("Experts over the image")
    page.text(
        "Validation images with the prediction of the model and, for each MoE layer (the last six at most), the expert "
        "that each patch chose first. An expert number has no meaning across layers. If patches of one kind have one "
        "colour, the router follows the content of the image; this does not show that its choice matters."
    )
    page.image(path, "Image, truth (void is white), prediction, and the expert of each patch, layer by layer.")


def _add_examples(page: Page, folder: Path, layers: Sequence[str]) -> None:
    sheets = {layer: folder / EXAMPLES.format(layer) for layer in layers if (folder / EXAMPLES.format(layer)).exists()}
    if sheets:
        page.subheading("Example images of each expert")
        page.text(
            "Each row is one expert with the validation images that gave it the largest sum of gates. They are "
            "extreme cases, not typical ones, and no score."
        )
    for layer, path in sheets.items():
        page.image(path, f"{layer}: validation images by expert.")
