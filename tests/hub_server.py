"""A stand-in for the Hugging Face Hub on the loopback: the few endpoints that huggingface_hub asks, from a folder.

    GET  /api/models/{repo}[/revision/{rev}]?blobs=true   the commit and the files with their sizes
    GET  /api/models/{repo}/tree/{commit}?recursive=true  the same, as snapshot_download wants it
    HEAD, GET /{repo}/resolve/{rev}/{file}                a file, whole or a range, with commit and ETag
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit


class Request(NamedTuple):
    """What was asked: `range` as the client wrote it, or ""; `sent` bytes of body."""

    method: str
    path: str
    range: str
    token: str
    sent: int


@dataclass
class Repo:
    """One repository: a folder per revision. The first revision is "main".

    Attributes:
        error: (status, X-Error-Code, X-Error-Message) for every request, instead of an answer.
        drops: how many GETs of safetensors files break off after half of their bytes.
    """

    revisions: dict[str, Path]
    error: tuple[int, str, str] | None = None
    drops: int = 0

    def commit(self, revision: str) -> str | None:
        for name in self.revisions:
            commit = hashlib.sha1(name.encode()).hexdigest()
            if revision in (name, commit):
                return commit
        return None

    def folder(self, commit: str) -> Path:
        return next(path for name, path in self.revisions.items() if self.commit(name) == commit)


@dataclass
class Hub:
    """The server. `log` holds every request, in order of their ends."""

    repos: dict[str, Repo] = field(default_factory=dict)
    log: list[Request] = field(default_factory=list)

    def __enter__(self) -> Hub:
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def shard_requests(self) -> list[Request]:
        """The GETs of safetensors files."""
        return [r for r in self.log if r.method == "GET" and r.path.endswith(".safetensors")]


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        return

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = None
        if found:
            name, what, revision = found[1], found[2], found[3] or "main"
        else:
            found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            if not found:
                self._fail(404, "", "no such endpoint")
                return
            name, what, revision, file = found[1], "file", found[2], found[3]
        repo = self.state.repos.get(name)
        if repo is None:
            self._fail(404, "RepoNotFound", "Repository not found")
            return
        if repo.error:
            self._fail(*repo.error)
            return
        commit = repo.commit(revision)
        if commit is None:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        if file is not None:
            self._file(repo, commit, file)
            return
        folder = repo.folder(commit)
        sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        if what == "tree":
            body: Any = [{"type": "file", "path": n, "size": s, "oid": _etag(folder / n)} for n, s in sizes.items()]
        else:
            siblings = [{"rfilename": n, "size": s, "blobId": _etag(folder / n)} for n, s in sizes.items()]
            body = {"id": name, "modelId": name, "sha": commit, "private": False, "siblings": siblings, "tags": []}
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _file(self, repo: Repo, commit: str, file: str) -> None:
        path = repo.folder(commit) / file
        if not path.is_file():
            self._fail(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return
        data = path.read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(path)}"', "Accept-Ranges": "bytes"}
        status = 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data, status = data[start : end + 1], 206
        drop = self.command == "GET" and file.endswith(".safetensors") and repo.drops > 0
        repo.drops -= drop
        self._send(status, data, headers, drop)

    def _fail(self, status: int, code: str, message: str, more: dict[str, str] | None = None) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message, **(more or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str], drop: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = 0
        if self.command == "GET":
            part = body[: len(body) // 2] if drop else body
            self.wfile.write(part)
            sent = len(part)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.state.log.append(Request(self.command, self.path, self.headers.get("Range", ""), token, sent))
        if drop:
            self.wfile.flush()
            self.close_connection = True


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
