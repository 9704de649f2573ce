"""The explorer as a page of this machine: a server of Starlette for a session, without anything from the network."""

from __future__ import annotations

import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vimoe.errors import ConfigError, VimoeError
from vimoe.explore.session import Session
from vimoe.report.html_page import LOOK

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

PAGE = Path(__file__).parent / "page"
LARGEST = 64 * 2**20  # bytes of an image
LOCAL = ("127.0.0.1", "localhost", "[::1]")  # as they are in a URL
# nothing of elsewhere, and nothing that a name with markup could bring
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'"


def app(session: Session, hosts: tuple[str, ...] = LOCAL) -> Starlette:
    """Return the page of a session as an ASGI application.

    Args:
        session: the run that is looked at.
        hosts: names that a browser may call the server by; others are refused, so that no other page can read it.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import FileResponse, JSONResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    state = session.state()

    def answered(answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def safely(request: Request) -> Response:
            try:
                return await answer(request)
            except VimoeError as error:
                return JSONResponse({"error": str(error)}, 400)

        return safely

    async def begin(_: Request) -> Response:
        return JSONResponse(state)

    async def look_of_pages(_: Request) -> Response:
        return FileResponse(LOOK)

    async def thumbnail(request: Request) -> Response:
        index = request.path_params["index"]
        if index >= len(session.files):
            raise VimoeError(f"image {index}: expected less than {len(session.files)}")
        return Response(await run_in_threadpool(session.thumbnail, index), media_type="image/jpeg")

    async def look(request: Request) -> Response:
        asked = _asked(request.query_params.get("overrule", "{}"))
        given = request.query_params.get("image")
        image = await _content(request) if given is None else _index(given)
        return JSONResponse(await run_in_threadpool(session.look, image, asked))

    routes = [
        Route("/look.css", look_of_pages),
        Route("/state", answered(begin)),
        Route("/thumbnail/{index:int}", answered(thumbnail)),
        Route("/look", answered(look), methods=["POST"]),
        Mount("/", StaticFiles(directory=PAGE, html=True)),
    ]
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts)),
            Middleware(BaseHTTPMiddleware, dispatch=_with_policy),
        ],
    )


async def _with_policy(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
    response = await answer(request)
    response.headers["Content-Security-Policy"] = POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


def bound(host: str, port: int) -> socket.socket:
    """Return a socket of an address and a port. Raises ConfigError if the port is taken."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        reason = error.strerror or str(error)
        raise ConfigError(f"--port {port} at {host}: {reason}: expected a free port; name another") from error
    return listening


def serve(session: Session, listening: socket.socket, host: str, say: Callable[[str], Any]) -> None:
    """Serve a session until Ctrl-C.

    Args:
        session: the run that is looked at.
        listening: where to listen (`bound`).
        host: address that it was bound to.
        say: function that prints the page's address.
    """
    import uvicorn

    shown = f"[{host}]" if ":" in host else host
    hosts = (*LOCAL, shown) if host not in ("0.0.0.0", "::") else ("*",)
    say(f"http://{shown}:{listening.getsockname()[1]}/ until Ctrl-C")
    uvicorn.Server(uvicorn.Config(app(session, hosts), log_level="warning")).run([listening])


def _asked(text: str) -> dict[str, str]:
    try:
        asked = json.loads(text)
    except ValueError:
        asked = None
    if not isinstance(asked, dict) or not all(isinstance(what, str) for what in asked.values()):
        raise VimoeError("overrule: expected a switch by layer name, as JSON")
    return asked


def _index(text: str) -> int:
    if not text.isdecimal():
        raise VimoeError("image: expected the number of a validation image, or a file")
    return int(text)


async def _content(request: Request) -> bytes:
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > LARGEST:
            raise VimoeError(f"this file has more than {LARGEST // 2**20} MiB: expected less; shrink the image")
    if not content:
        raise VimoeError("this file is empty: expected an image")
    return bytes(content)
