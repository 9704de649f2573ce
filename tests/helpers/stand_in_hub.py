"""A stand-in for the Hugging Face hub: the few calls that pushing and loading a model need, on this machine.

It speaks what huggingface_hub's client asks: create, branch, validate-yaml, preupload, LFS batch, commit, revision,
tree and resolve, with the error codes of the real one. Xet is switched off, so that large files go by LFS.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_secret"


class Hub(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        repos: branches, and commits, of each repository: files by name.
        gated: repositories that need TOKEN to be read.
        asked: paths of all requests.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.heads: dict[tuple[str, str], str] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repo: str, branch: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(repr((branch, sorted(files.items()), len(self.repos[repo]))).encode()).hexdigest()
        self.repos[repo][oid], self.heads[repo, branch] = files, oid
        return oid


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, values: Any = None, content: bytes | None = None, **headers: str) -> None:
        body = json.dumps(values).encode() if content is None else content
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body

    def _handle(self) -> None:
        """Finds the method for a path; who writes needs the token, and so does who reads what is private or gated."""
        path, body, hub = urlsplit(self.path).path, self._body(), self.server
        hub.asked.append(f"{self.command} {path}")
        method, found = next((name, found) for form, name in ROUTES if (found := re.fullmatch(form, path)))
        parts = {name: unquote(part) for name, part in found.groupdict().items() if part}
        repo, known = parts.get("repo"), self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if method in ("create", "branch", "preupload", "batch", "commit") and not known:
            self._refuse(401, "Unauthorized")
        elif repo and (repo not in hub.repos or (repo in hub.private and not known)):
            self._refuse(404, "RepoNotFound")
        elif repo in hub.gated and not known:
            self._refuse(403, "GatedRepo")
        else:
            getattr(self, method)(body, **parts)

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815

    def validate(self, _body: bytes) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def missing(self, _body: bytes) -> None:
        self._refuse(404, "NotFound")

    def create(self, body: bytes) -> None:
        asked, hub = json.loads(body), self.server
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in hub.repos:
            self._send(409, {"error": "exists", "url": f"{hub.url}/{repo}"})
            return
        hub.repos[repo] = {}
        hub.commit(repo, "main", {})
        if asked.get("visibility") == "private":
            hub.private.add(repo)
        self._send(200, {"url": f"{hub.url}/{repo}"})

    def branch(self, _body: bytes, repo: str, revision: str) -> None:
        heads = self.server.heads
        there = (repo, revision) in heads
        heads.setdefault((repo, revision), heads[repo, "main"])
        self._send(409 if there else 200, {})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        paths = [each["path"] for each in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
        files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        self._send(200, {"files": files})

    def batch(self, body: bytes, repo: str) -> None:
        upload = [{**each, "actions": {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}}
                  for each in json.loads(body)["objects"]]  # fmt: skip
        self._send(200, {"transfer": "basic", "objects": upload})

    def lfs(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.blobs[oid] = body
        self._send(200, {})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        hub = self.server
        files = dict(hub.repos[repo][hub.heads[repo, revision]])
        for entry in map(json.loads, filter(None, body.split(b"\n"))):
            value = entry["value"]
            if entry["key"] == "header":
                hub.messages.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = hub.blobs[value["oid"]]
        oid = hub.commit(repo, revision, files)
        self._send(200, {"commitUrl": f"{hub.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    def _files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes] | None]:
        oid = self.server.heads.get((repo, revision), revision)
        return oid, self.server.repos[repo].get(oid)

    def info(self, _body: bytes, repo: str, revision: str = "main") -> None:
        oid, files = self._files(repo, revision)
        if files is None:
            self._refuse(404, "RevisionNotFound")
        else:
            self._send(200, {"id": repo, "sha": oid, "siblings": [{"rfilename": path} for path in files], "tags": []})

    def tree(self, _body: bytes, repo: str, revision: str) -> None:
        _, files = self._files(repo, revision)
        self._send(200, [{"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                         for path, content in (files or {}).items()])  # fmt: skip

    def resolve(self, _body: bytes, repo: str, revision: str, file: str) -> None:
        oid, files = self._files(repo, revision)
        if files is None or file not in files:
            self._refuse(404, "EntryNotFound")
        else:
            etag = f'"{hashlib.sha256(files[file]).hexdigest()}"'
            self._send(200, content=files[file], ETag=etag, X_Repo_Commit=oid)


_REPO, _REVISION = "(?P<repo>[^/]+/[^/]+?)", "(?P<revision>[^/]+)"
ROUTES = [
    ("/api/validate-yaml", "validate"),
    ("/api/repos/create", "create"),
    (f"/api/models/{_REPO}/branch/{_REVISION}", "branch"),
    (f"/api/models/{_REPO}/preupload/{_REVISION}", "preupload"),
    (f"/api/models/{_REPO}/commit/{_REVISION}", "commit"),
    (f"/api/models/{_REPO}/tree/{_REVISION}", "tree"),
    (f"/api/models/{_REPO}(/revision/{_REVISION})?", "info"),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", "batch"),
    (f"/{_REPO}/resolve/{_REVISION}/(?P<file>.+)", "resolve"),
    ("/lfs/(?P<oid>[^/]+)", "lfs"),
    (".*", "missing"),
]


@contextmanager
def stand_in_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """Serve a hub, and let huggingface_hub's client in this process use it, with an empty cache."""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
