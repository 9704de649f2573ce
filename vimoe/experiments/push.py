"""A run's model on the hub: its model card has the figures that the run's own files hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vimoe import run_folder
from vimoe.errors import FolderError
from vimoe.files import read_text
from vimoe.metrics.registry import shown
from vimoe.models.model_folder import load
from vimoe.models.push import push_to_hub
from vimoe.report.table_cells import measures, receipt_header, receipt_rows


def push_run(
    path: str | Path, repo_id: str, private: bool | None = None, message: str = "Upload model",
    revision: str | None = None,
) -> str:  # fmt: skip
    """Upload the model of a run with its card; return the URL of the commit. The token is that of `hf auth login`.

    Args:
        path: run folder.
        repo_id, private, revision: as for `vimoe.push_to_hub`.
        message: message of the commit.

    Raises:
        FolderError: if it is no run, or the hub refuses.
    """
    run = run_folder.open_run(path)
    return push_to_hub(
        load(run.model),
        repo_id,
        private=private,
        commit_message=message,
        revision=revision,
        pretrained=run.settings.model.pretrained,
        results=results(run.path / run_folder.SUMMARY),
    )


def results(summary: Path) -> str:
    """Return the scores, or the receipt of a pruning, in a summary.json as a section of Markdown; "" without one."""
    if not summary.is_file():
        return ""
    try:
        values: dict[str, Any] = json.loads(read_text(summary))
        if "val" in values:
            score = values["val"]
            cells = {**measures(score), "loss": f"{score['loss']:.4f}"}
            header, rows, images = ("", *cells), [("validation", *cells.values())], score["images"]
            split = "validation"
        else:
            header, rows = receipt_header(shown(values["before"])), receipt_rows(values)
            split, images = values["split"], values["before"]["images"]
    except (ValueError, KeyError, TypeError) as error:
        raise FolderError(f"{summary} cannot be read ({error}): expected that of a run; restore it") from error
    table = [header, ("---",) * len(header), *rows]
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join(["## Figures", "", f"Measured on {images} {split} images.", "", *lines])
