"""Tiny runs to explore: of three classes by image, by token or dense, and of scenes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers.commands import QUICK, TINY
from helpers.pictures import roles
from helpers.scene_runs import MOE, SCENES
from helpers.scenery import scenes

from vimoe.cli import main
from vimoe.explore.session import Session


def explored(folder: Path, kind: str = "image", **options_of_scenes: str) -> Path:
    """Train a run in a folder and return it."""
    if kind == "scenes":
        options = ["--data.path", str(scenes(folder / "street", **options_of_scenes)), *SCENES, *MOE]
    else:
        moe = ["--moe.layers=none"] if kind == "dense" else ["--moe.layers=all", f"--moe.routing={kind}"]
        options = ["--data.path", str(roles(folder / "photos")), *TINY, *QUICK, *moe, "--moe.num_experts=4"]
    assert main(["train", *options, "--out", str(folder / "run")]) == 0
    return folder / "run"


@contextmanager
def served(session: Session) -> Iterator[str]:
    """Serve a session at a free port, and yield its address."""
    import uvicorn

    from vimoe.explore.server import app

    server = uvicorn.Server(uvicorn.Config(app(session), port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
