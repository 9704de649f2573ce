"""The page of one run, report.html, from the files in its folder. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vimoe.report.diagnosis_section import add_diagnosis
from vimoe.report.html_page import Page
from vimoe.report.pruning_section import add_pruning
from vimoe.report.routing_section import add_routing_section
from vimoe.report.run_files import LOAD, METRICS, read_config, read_json, reading
from vimoe.report.tasks_section import add_tasks
from vimoe.report.training_section import add_curves, add_loads, add_overview
from vimoe.run_folder import CONFIG, DIAGNOSIS, EXAMPLES, EXPERT_MAPS, FIGURES, ROUTING, ROUTING_BEFORE, SUMMARY

ROUTING_FILES = (  # file, heading, prefix of its figures' names
    (ROUTING, "Routing", ""),
    (ROUTING_BEFORE, "Routing before pruning, the basis of its decisions", "before-"),
)


def write_run_report(run: Path) -> Path:
    """Write report.html of a run from the files in its folder, and return its path.

    Raises:
        FolderError: The folder has no config.yaml, or a file in it is damaged.
    """
    page = Page(f"vimoe run {run.resolve().name}", run / FIGURES)
    settings, model = read_config(run)
    with reading(run / SUMMARY):
        summary = read_json(run / SUMMARY)
        versions = [(name, str(version)) for name, version in summary.get("versions", {}).items()]
        add_overview(page, model, settings["data.path"], summary)
        if "before" in summary:
            add_pruning(page, summary)
        if "tasks" in summary:
            add_tasks(page, summary["tasks"])
    if (run / METRICS).exists():
        with reading(run / METRICS):
            add_curves(page, run / METRICS, summary)
    if (run / LOAD).exists():
        with reading(run / LOAD):
            add_loads(page, run / LOAD)
    if (run / FIGURES / EXPERT_MAPS).exists():
        _add_expert_maps(page, run / FIGURES / EXPERT_MAPS)
    if (run / DIAGNOSIS).exists():
        with reading(run / DIAGNOSIS):
            add_diagnosis(page, read_json(run / DIAGNOSIS))
    for name, heading, prefix in ROUTING_FILES:
        if (run / name).exists():
            with reading(run / name):
                evidence = read_json(run / name)
                add_routing_section(page, evidence, heading, prefix)
                _add_examples(page, run / FIGURES, [layer["name"] for layer in evidence["layers"]])
    page.heading("Settings and versions")
    page.text(f"All settings of the run, as in {CONFIG}, under the names of the command's flags. Click to open.")
    page.table(("setting", "value"), settings.items(), words=True, folded=f"{len(settings)} settings")
    if versions:
        page.table(("software", "version"), versions, words=True, folded="Software versions of the run")
    return page.write(run / "report.html")


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
