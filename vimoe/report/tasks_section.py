"""Section of a page about tasks that were learnt one after the other, from summary.json. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vimoe.report.html_page import Page

AMONG = {"seen": "all classes seen until then", "own": "the classes of the image's own task"}
FIGURES = {"mean": "mean at the end", "forgetting": "forgetting", "backward_transfer": "backward transfer"}


def add_tasks(page: Page, tasks: dict[str, Any]) -> None:
    """Add accuracies after each task, what was forgotten, and which experts tasks share.

    Args:
        page: page to add to.
        tasks: entry "tasks" of summary.json.
    """
    page.heading("Tasks")
    trained = tasks["trained"]
    page.text(
        f"The model learnt {len(trained)} tasks one after the other, each from its own images alone. Row t of a table "
        f"is after task t, column i of the validation images of task i, in %. These images also chose the epoch of "
        f"their own task, so the diagonal is slightly optimistic. This is one order of the tasks, so there is no "
        f"interval."
    )
    page.table(
        ("task", "classes", "training images", "epochs"),
        [(f"{i} {each.get('split', '')}".strip(), ", ".join(each["classes"]), str(each["train_images"]),
          str(each["epochs"])) for i, each in enumerate(trained, start=1)],
        words=True, folded="Classes of each task",
    )  # fmt: skip
    alike = all(each["classes"] == trained[0]["classes"] for each in trained)
    shown = {"own": "all classes, which each task has"} if alike else AMONG
    for name, among in shown.items():
        page.subheading(f"Accuracy among {among}")
        _add_matrix(page, tasks[name]["accuracy"], "{:.2f}", 100)
    page.table(
        ("among", *FIGURES.values()),
        [(among, *(f"{100 * tasks[name][key]:.2f}" for key in FIGURES)) for name, among in shown.items()],
    )
    page.text(
        "Forgetting is what the best model before the end knew more of a task, in points, as a mean over the tasks "
        "before the last. Backward transfer is the change since the model had just learnt the task; below 0, later "
        "tasks cost accuracy.",
        note=True,
    )
    if tasks["routing"]:
        _add_routing(page, tasks["routing"])


def _add_routing(page: Page, routing: dict[str, dict[str, Any]]) -> None:
    page.subheading("Experts that tasks share")
    page.text(
        "How much likelier images of two tasks meet in an expert than images of any two tasks do, as log2, after the "
        "last task: 0 is no difference, 1 twice as likely. The last column compares a task's own images after its "
        "training and at the end; it is near 0 if the experts were never the task's own, and falls if its images move "
        "to the experts of other tasks."
    )
    for layer, found in routing.items():
        page.text(f"{layer}:")
        kept = [*(f"{value:+.2f}" for value in found["kept"]), ""]
        _add_matrix(page, found["lift"], "{:+.2f}", 1, ("then and now", kept))


def _add_matrix(
    page: Page, rows: Sequence[Sequence[float]], form: str, scale: float, more: tuple[str, list[str]] | None = None
) -> None:
    """Add a table of a square or triangle, and perhaps one more column."""
    count = len(rows)
    cells = [
        [str(i + 1), *(form.format(scale * x) for x in row), *[""] * (count - len(row))] for i, row in enumerate(rows)
    ]
    header = ["task", *(str(i + 1) for i in range(count))]
    if more:
        header.append(more[0])
        cells = [[*row, last] for row, last in zip(cells, more[1], strict=True)]
    page.table(header, cells)
