"""The explorer as one file that needs no server: some images, with each layer overruled in each way, one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vimoe.errors import FolderError
from vimoe.explore.server import PAGE
from vimoe.explore.session import Session, data_uri
from vimoe.files import read_text, write_text
from vimoe.report.html_page import LOOK
from vimoe.terminal import track

NAME = "index.html"
IMAGES = 24  # that can be looked at


def make_place(folder: Path) -> None:
    """Create the folder of a page if it is missing. Raises FolderError if that fails, or it has files of others."""
    if (folder / NAME).exists():
        raise FolderError(f"--static {folder} already has an {NAME}: expected a folder without one; name another one")
    if others := sorted(path.name for path in folder.glob("*") if not path.name.startswith(".")):
        raise FolderError(
            f"--static {folder} holds other files, such as {others[0]}: expected an empty folder; name another"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"--static {folder} cannot be created: {error.strerror}; name another folder") from error


def write_page(session: Session, folder: Path, images: int = IMAGES) -> Path:
    """Write index.html into a folder that exists (`make_place`), and return its path.

    Args:
        session: the run that is looked at.
        folder: folder to write into.
        images: number of validation images that can be looked at, from the first.
    """
    state, looks = session.state(), dict[str, Any]()
    for index in track(range(min(images, len(session.files))), "overruling layers"):
        looks[f"{index}"] = session.look(index, {})
        for layer in state["layers"]:
            for switch in layer["switches"][1:]:
                looks[f"{index}|{layer['name']}|{switch}"] = session.overruled(index, {layer["name"]: switch})
    thumbnails = [data_uri(session.thumbnail(index), "jpeg") for index in range(len(session.files))]
    content = json.dumps({**state, "looks": looks, "thumbnails": thumbnails})
    page, script = read_text(PAGE / "index.html"), read_text(PAGE / "explore.js")
    for style in (LOOK, PAGE / "explore.css"):
        page = page.replace(f'<link rel="stylesheet" href="{style.name}">', f"<style>\n{read_text(style)}</style>")
    # as JSON in a script, "<" could end it
    data = content.replace("<", "\\u003c")
    page = page.replace(
        '<script src="explore.js"></script>',
        f'<script type="application/json" id="data">{data}</script>\n<script>\n{script}</script>',
    )
    path = folder / NAME
    write_text(path, page)
    return path
