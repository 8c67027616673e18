"""A stand-in for the Hugging Face Hub on the loopback: the few endpoints that huggingface_hub asks, from a folder.

    GET  /api/models/{repo}[/revision/{rev}]?blobs=true   the commit and the files with their sizes
    GET  /api/models/{repo}/tree/{commit}?recursive=true  the same, as snapshot_download wants it
    HEAD, GET /{repo}/resolve/{rev}/{file}                a file, whole or a range, with commit and ETag

and, for uploads with `Hub.uploads`, what huggingface_hub asks of a hub without Xet:

    GET  /api/whoami-v2                                   whose token it is
    POST /api/repos/create                                a repository, empty
    POST /api/models/{repo}/preupload/main                which files go as LFS objects: safetensors
    POST /{repo}.git/info/lfs/objects/batch               where to put them
    PUT  /lfs/{sha256}                                    one of them
    POST /api/models/{repo}/commit/main                   all files at once
"""

from __future__ import annotations

import base64
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
        private: what the hub says of it.
    """

    revisions: dict[str, Path]
    error: tuple[int, str, str] | None = None
    drops: int = 0
    private: bool = False

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
    """The server.

    Attributes:
        log: every request, in order of their ends.
        uploads: where repositories are made that are uploaded to.
        token: the one that may write.
        refuses: a part of a path -> (status, X-Error-Code, X-Error-Message) for each POST or PUT to it.
        objects: sha256 -> bytes that were put.
        ignores: files that are left out, as if a .gitignore named them.
        hold: until it is set, no PUT is answered.
        held: set once a PUT waits.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    log: list[Request] = field(default_factory=list)
    uploads: Path | None = None
    token: str = "hf_writer"
    refuses: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    ignores: tuple[str, ...] = ()
    hold: threading.Event | None = None
    held: threading.Event = field(default_factory=threading.Event)

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
        if self.path == "/api/whoami-v2":
            if self._token() == self.state.token:
                self._json({"type": "user", "name": "writer", "orgs": []})
            else:
                self._fail(401, "", "Invalid credentials")
            return
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = urlsplit(self.path).path
        if self._is_refused(path):
            return
        repo = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/.]+)(?:\.git)?/.*", path)
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif repo and path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [
                {
                    "path": name,
                    "uploadMode": "lfs" if name.endswith(".safetensors") else "regular",
                    "shouldIgnore": name in self.state.ignores,
                }
                for name in names
            ]
            self._json({"files": files})
        elif repo and path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                if one["oid"] not in self.state.objects:
                    one["actions"] = {"upload": {"href": f"{self.state.endpoint}/lfs/{one['oid']}"}}
            self._json({"transfer": "basic", "objects": objects})
        elif repo and path.endswith("/commit/main"):
            self._commit(repo[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._fail(404, "", "no such endpoint")

    def do_PUT(self) -> None:
        size = int(self.headers["Content-Length"])
        if self._is_refused(self.path):
            self.close_connection = True
            return
        data = self.rfile.read(size)
        if self.state.hold is not None:
            self.state.held.set()
            self.state.hold.wait()
        sha256 = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == sha256
        self.state.objects[sha256] = data
        self._json({})

    def _is_refused(self, path: str) -> bool:
        refusal = next((said for part, said in self.state.refuses.items() if part in path), None)
        if refusal is None and self._token() != self.state.token and not path.startswith("/lfs/"):
            refusal = 403, "", "this token may not write"
        if refusal is not None:
            self._fail(*refusal)
        return refusal is not None

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.state.repos:
            self._send(409, json.dumps({"url": f"{self.state.endpoint}/{name}"}).encode(), {})
            return
        assert self.state.uploads is not None
        folder = self.state.uploads / name
        folder.mkdir(parents=True)
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.state.repos[name] = Repo({"main": folder}, private=private)
        self._json({"url": f"{self.state.endpoint}/{name}"})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        repo = self.state.repos[name]
        commit = repo.commit("main")
        assert commit is not None
        for line in lines[1:]:
            value = line["value"]
            data = self.state.objects[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
            path = repo.folder(commit) / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        self._json({"commitUrl": f"{self.state.endpoint}/{name}/commit/{commit}", "commitOid": commit})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

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
            body = {
                "id": name,
                "modelId": name,
                "sha": commit,
                "private": repo.private,
                "siblings": siblings,
                "tags": [],
            }
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
        if self.command != "HEAD":
            part = body[: len(body) // 2] if drop else body
            self.wfile.write(part)
            sent = len(part)
        request = Request(self.command, self.path, self.headers.get("Range", ""), self._token(), sent)
        self.state.log.append(request)
        if drop:
            self.wfile.flush()
            self.close_connection = True


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
