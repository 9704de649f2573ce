"""The verb `explore`."""

from __future__ import annotations

from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

from vimoe.errors import ConfigError
from vimoe.run_folder import open_run
from vimoe.verbs.options import Result, parser_of, tell


def explore(argv: list[str]) -> Result:
    """Show on a page what each MoE layer chose for an image, and what changes if layers are overruled.

    Example: vimoe explore runs/photos
    """
    parser = parser_of(
        explore, static="folder for a page that needs no server, with some images; then nothing is served"
    )
    parser.add_argument("run", help="run folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; others than this machine may look")
    parser.add_argument("--port", type=int, default=7860, help="port to serve at; 0 for any that is free")
    parser.add_argument("--images", type=int, default=200, help="largest number of validation images to show")
    options = parser.parse_args(argv)
    if options["images"] < 1:
        raise ConfigError(f"--images {options['images']}: expected at least 1")
    if not 0 <= options["port"] < 2**16:
        raise ConfigError(f"--port {options['port']}: expected 0 to {2**16 - 1}; name another")
    run = open_run(options["run"])  # reports a wrong folder before the slow import of torch
    static = options["static"]
    if static is None and not (find_spec("starlette") and find_spec("uvicorn")):
        raise ConfigError(
            "vimoe explore needs starlette and uvicorn: pip install 'vimoe[explore]'; or use --static DIR"
        )
    from vimoe.experiments.train import check_outside
    from vimoe.explore.server import bound, serve
    from vimoe.explore.session import Session
    from vimoe.explore.static_page import make_place, write_page

    # a mistaken place is told before the work that a session is
    if static is None:
        host = options["host"]
        with bound(host, options["port"]) as listening, closing(Session(options["run"], options["images"])) as session:
            serve(session, listening, host, tell)
        return "stopped", {}
    check_outside("--static", static, run.settings.data.path)
    make_place(Path(static))
    with closing(Session(options["run"], options["images"])) as session:
        page = write_page(session, Path(static))
    return str(page), {"page": str(page)}
