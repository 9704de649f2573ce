"""The server: what it answers, what it refuses, and that 50 hostile files leave it running."""

from __future__ import annotations

import json
import struct
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
from helpers.commands import refused
from helpers.explored import explored, served

from vimoe.explore.server import bound, serve
from vimoe.explore.session import Session

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    session = Session(explored(tmp_path_factory.mktemp("run")))
    with served(session) as url:
        yield url
    session.close()


def get(url: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes, Any]:
    request = urllib.request.Request(url, data, headers, method=None if data is None else "POST")
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers


def test_the_page_and_its_parts(address: str) -> None:
    for path, kind in (("/", "html"), ("/explore.js", "javascript"), ("/explore.css", "css"), ("/thumbnail/0", "jpeg")):
        status, content, headers = get(address + path)
        assert status == 200 and content and kind in headers["content-type"]
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert len(json.loads(get(address + "/state")[1])["images"]) == 9


def test_a_look_with_a_switch(address: str) -> None:
    state = json.loads(get(address + "/state")[1])
    asked = quote(json.dumps({state["layers"][0]["name"]: "expert 1"}))
    status, content, _ = get(f"{address}/look?image=3&overrule={asked}", b"")
    assert status == 200 and json.loads(content)["overruled"]["layers"]


@pytest.mark.parametrize(
    ("query", "data", "message"),
    [
        ("", b"", "this file is empty"), ("image=99", b"", "image 99: expected 0 to 8"),
        ("image=-1", b"", "image: expected the number"), ("image=0&overrule=[1]", b"", "overrule: expected"),
        ("image=0&overrule={", b"", "overrule: expected"),
        ("image=0&overrule=" + quote('{"nowhere": "as others"}'), b"", "layer 'nowhere'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(address: str, query: str, data: bytes, message: str) -> None:
    status, content, _ = get(f"{address}/look?{query}", data)
    assert status == 400 and json.loads(content)["error"].startswith(message) and "\\n" not in content.decode()


def test_another_page_cannot_read_it_by_a_name_of_its_own(address: str) -> None:
    assert get(address + "/state", Host="evil.example")[0] == 400


@pytest.mark.parametrize("path", ["/thumbnail/99", "/thumbnail/x", "/../session.py", "/%2e%2e/server.py", "/nowhere"])
def test_there_is_nothing_else(address: str, path: str) -> None:
    assert get(address + path)[0] in (400, 404)


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


HOSTILE = [
    b"x", b"\0" * 1000, b"<script>alert(1)</script>", b"<svg onload=alert(1)>", b"%PDF-1.7", b"PK\x03\x04",
    b"\xff\xd8\xff",
    b"GIF89a", b"GIF89a\x01\0\x01\0\0\0\0", b"RIFF\0\0\0\0WEBP", b"BM", b"II*\0", b"MM\0*", b"\x89PNG\r\n\x1a\n",
    b"cos\nsystem\n(S'true'\ntR.", b"\x80\x04\x95", b"#!/bin/sh\nexit", b"\x7fELF", b"P6 99999 99999 255\n",
    png(0, 0), png(1, 1), png(60000, 60000), png(2**31 - 1, 1), png(2**31 - 1, 2**31 - 1),
    *(b"\xff\xd8\xff\xe0" + bytes([n]) * n * 10 for n in range(1, 14)),
    *(b"\x89PNG\r\n\x1a\n" + bytes([n]) * n * 10 for n in range(1, 14)),
]  # fmt: skip


def test_hostile_files_leave_it_running(address: str) -> None:
    assert len(HOSTILE) == 50
    for content in HOSTILE:
        status, answer, _ = get(f"{address}/look", content)
        told = json.loads(answer)["error"]
        assert status == 400 and told.startswith("this file") and "\n" not in told, content[:20]
    assert get(f"{address}/look?image=0", b"")[0] == 200


def test_a_file_that_is_too_large_is_not_read_to_its_end(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vimoe.explore.server.LARGEST", 2**20)
    status, content, _ = get(f"{address}/look", b"x" * (2**20 + 1))
    assert status == 400 and "more than 1 MiB" in json.loads(content)["error"]


def test_a_port_that_cannot_be_had_is_told_before_any_work(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vimoe.verbs.explore.open_run", lambda path: path)
    monkeypatch.setattr("vimoe.explore.session.Session", None)
    told = refused(capsys, "explore", tmp_path, "--port", address.rpartition(":")[2])
    assert "--port" in told and "expected a free port" in told
    for port in (-1, 70000):
        assert f"--port {port}: expected 0 to 65535" in refused(capsys, "explore", tmp_path, f"--port={port}")
    monkeypatch.setattr("vimoe.verbs.explore.find_spec", lambda name: name == "starlette")
    assert "needs starlette and uvicorn" in refused(capsys, "explore", tmp_path)


def test_an_address_with_colons_is_shown_and_answered_in_brackets(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert get(address + "/state", Host="[::1]:7860")[0] == 200
    told: list[str] = []
    monkeypatch.setattr("uvicorn.Server", lambda config: SimpleNamespace(run=lambda sockets: None))
    with bound("127.0.0.1", 0) as listening:  # a machine need not have IPv6
        serve(SimpleNamespace(state=dict), listening, "fd00::1", told.append)  # type: ignore[arg-type]
    assert told[0].startswith("http://[fd00::1]:")


def test_a_page_does_not_take_the_place_of_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    settings = SimpleNamespace(data=SimpleNamespace(path=str(data)))
    monkeypatch.setattr("vimoe.verbs.explore.open_run", lambda path: SimpleNamespace(settings=settings))
    monkeypatch.setattr("vimoe.explore.session.Session", None)  # the mistake is told before any work
    (tmp_path / "index.html").write_text("mine", encoding="utf-8")
    told = refused(capsys, "explore", tmp_path, "--static", tmp_path)
    assert "already has an index.html: expected a folder without one" in told
    told = refused(capsys, "explore", tmp_path, "--static", tmp_path / "index.html")
    assert "index.html cannot be created: File exists" in told
    (data / "cat").mkdir(parents=True)
    for place in (data, data / "page"):
        assert "lies in" in refused(capsys, "explore", tmp_path, "--static", place)
    (tmp_path / "other" / "a").mkdir(parents=True)
    told = refused(capsys, "explore", tmp_path, "--static", tmp_path / "other")
    assert "other holds other files, such as a: expected an empty folder" in told
    assert not list(data.rglob("*.html")) and not (data / "page").exists()
    assert (tmp_path / "index.html").read_text(encoding="utf-8") == "mine"
