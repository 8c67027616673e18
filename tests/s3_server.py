"""An S3 store on loopback: moto's server, and before it a proxy that counts requests and can go wrong on purpose.

The proxy passes on what it gets, byte for byte. It notes every request and how many bytes of body went each way, and
carries out the `faults` that a test has put there: connections cut in the middle of a body, refusals, and hooks that
run before or after the store sees a request.
"""

from __future__ import annotations

import http.client
import itertools
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import boto3
from moto.server import ThreadedMotoServer

KEY_ID = "AKIATHEKEYIDOFTESTS1"
SECRET = "TheSecretKeyOfTheTestsThatNobodyMaySee/1"
_NUMBERS = itertools.count()
HOLD_SECONDS = 30  # a client that was killed is waited for no longer


class Request(NamedTuple):
    """What was asked.

    Attributes:
        op: "list", "get", "head", "put", "part", "copy" (a part, of an object that is there), "create" (a multipart
            upload), "complete", "abort" or "delete".
        name: key, without the bucket.
        range: as the client wrote it, or ""; of a copy, of what is copied.
        received, sent: bytes of body, from and to the client.
        status: what was answered; 0: the connection was cut.
    """

    op: str
    name: str
    range: str = ""
    received: int = 0
    sent: int = 0
    status: int = 0

    @property
    def writes(self) -> bool:
        return self.op in ("put", "part", "copy", "create", "complete", "delete")


def of(op: str, ending: str = "") -> Callable[[Request], bool]:
    """Requests of that kind, for keys that end so."""
    return lambda request: request.op == op and request.name.endswith(ending)


@dataclass
class Fault:
    """Something that goes wrong.

    Attributes:
        of: which requests.
        how: "cut" breaks the connection in the middle of the body (of the answer to a GET, else of what is sent),
            "lost" after the store has done it, without an answer; or what is answered instead (status, code).
        times: how often.
    """

    of: Callable[[Request], bool]
    how: str | tuple[int, str] = "cut"
    times: float = 1


@dataclass
class Store:
    """The servers. `log` holds every request, in order of their ends.

    Attributes:
        faults: what goes wrong; the first one that fits a request and is not used up.
        before, after: called with each request before the store sees it, and after it has answered. Where `before`
            returns True the store never sees it, and the connection is cut.
        key_ids: access keys that are let in.
    """

    log: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    before: Callable[[Request], object] = lambda request: None
    after: Callable[[Request], object] = lambda request: None
    key_ids: set[str] = field(default_factory=lambda: {KEY_ID})
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Store:
        store = self

        class Handler(_Handler):
            state = store

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
        self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._moto.start()
        self.upstream = self._moto.get_host_and_port()
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._proxy.daemon_threads = True
        self._thread = threading.Thread(target=self._proxy.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        host, port = self.upstream
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=f"http://{host}:{port}",
            aws_access_key_id=KEY_ID,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )
        self.reset()
        return self

    def __exit__(self, *exc: object) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()
        self._thread.join()
        self._moto.stop()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._proxy.server_address[1]}"

    @property
    def settings(self) -> dict[str, str]:
        """Environment variables that lead botocore, and so s3fs, here and nowhere else."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def reset(self) -> None:
        """As new: no log, no faults, and an empty bucket with a name of its own."""
        self.bucket = f"bucket-{next(_NUMBERS)}"
        self.client.create_bucket(Bucket=self.bucket)
        self.log.clear()
        self.faults.clear()
        self.before = self.after = lambda request: None
        self.key_ids = {KEY_ID}

    def url(self, name: str) -> str:
        """Of a folder in the bucket."""
        return f"s3://{self.bucket}/{name}"

    def put(self, name: str, data: bytes) -> None:
        """An object of the bucket, unseen by the proxy."""
        self.client.put_object(Bucket=self.bucket, Key=name, Body=data)

    def upload(self, folder: Path, name: str = "src") -> str:
        """Puts every file of `folder` below `name`, unseen by the proxy; returns the URL."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{name}/{path.relative_to(folder)}", path.read_bytes())
        return self.url(name)

    def objects(self, name: str = "out") -> dict[str, bytes]:
        """What is below `name`, by the rest of the key."""
        found = {}
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=f"{name}/")
        for item in (item for page in pages for item in page.get("Contents", ())):
            body = self.client.get_object(Bucket=self.bucket, Key=item["Key"])["Body"].read()
            found[item["Key"].removeprefix(f"{name}/")] = body
        return found

    def unfinished(self) -> list[str]:
        """Keys of the bucket's multipart uploads that were neither completed nor aborted."""
        found = self.client.list_multipart_uploads(Bucket=self.bucket)
        return [upload["Key"] for upload in found.get("Uploads", ())]

    def asked(self, *ops: str, ending: str = "") -> list[Request]:
        """The requests of these kinds, for keys with this end."""
        return [request for request in self.log if request.op in ops and request.name.endswith(ending)]


class _Handler(BaseHTTPRequestHandler):
    state: Store
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        return

    def do_GET(self) -> None:
        self._pass_on()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _request(self) -> Request:
        url = urlsplit(self.path)
        query = parse_qs(url.query, keep_blank_values=True)
        op = {"GET": "get", "HEAD": "head", "PUT": "put", "POST": "post", "DELETE": "delete"}[self.command]
        if op == "get" and ("list-type" in query or "prefix" in query):
            op = "list"
        elif op == "put" and "partNumber" in query:
            op = "copy" if "x-amz-copy-source" in self.headers else "part"
        elif op == "post":
            op = "create" if "uploads" in query else "complete"
        elif op == "delete" and "uploadId" in query:
            op = "abort"
        name = unquote(url.path).strip("/").partition("/")[2]
        if op == "list":
            name = query.get("prefix", [""])[0].rstrip("/")
        return Request(op, name, self.headers.get("x-amz-copy-source-range" if op == "copy" else "Range", ""))

    def _fault(self, request: Request) -> str | tuple[int, str] | None:
        found = re.search(r"Credential=([^/]*)/", self.headers.get("Authorization", ""))
        if found is None or found[1] not in self.state.key_ids:
            return 403, "InvalidAccessKeyId"
        with self.state.lock:
            for fault in self.state.faults:
                if fault.times > 0 and fault.of(request):
                    fault.times -= 1
                    return fault.how
        return None

    def _pass_on(self) -> None:
        request = self._request()
        fault = self._fault(request)
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "cut" and request.op != "get":
            self._note(request, len(self.rfile.read(length // 2)), 0, 0)
            self._cut()
            return
        body = self._body(length)
        if isinstance(fault, tuple):
            self._refuse(request, len(body), *fault)
            return
        if self.state.before(request):
            self._note(request, len(body), 0, 0)
            self._cut()
            return
        if request.op == "copy" and self._source_changed():
            self._refuse(request, len(body), 412, "PreconditionFailed")
            return
        upstream = http.client.HTTPConnection(*self.state.upstream, timeout=HOLD_SECONDS)
        headers = {name: value for name, value in self.headers.items() if name not in ("Expect", "Connection")}
        if body and "Content-Length" not in self.headers:
            del headers["Transfer-Encoding"]
        upstream.request(self.command, self.path, body or None, headers)
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        self.state.after(request)
        if fault == "lost":
            self._note(request, len(body), 0, 0)
            self._cut()
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "date", "server", "content-length"):
                self.send_header(name, value)
        # The answer to HEAD says how long the object is.
        said = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", said or str(len(data)))
        part = data[: len(data) // 2] if fault == "cut" else data
        # Before the headers go out: with an answer that has no body, whoever asked goes on then.
        self._note(request, len(body), len(part), 0 if fault == "cut" else answer.status)
        self.end_headers()
        self.wfile.write(part)
        if fault == "cut":
            self._cut()

    def _source_changed(self) -> bool:
        """Whether a copy's condition does not hold, which S3 looks at and moto does not."""
        bucket, _, key = unquote(self.headers["x-amz-copy-source"]).lstrip("/").partition("/")
        now = self.state.client.list_objects_v2(Bucket=bucket, Prefix=key).get("Contents", ())
        found = [entry["ETag"] for entry in now if entry["Key"] == key]
        wanted = self.headers.get("x-amz-copy-source-if-match")
        return wanted is not None and bool(found) and found != [wanted]

    def _body(self, length: int) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _refuse(self, request: Request, received: int, status: int, code: str) -> None:
        text = b"" if request.op == "head" else f"<Error><Code>{code}</Code><Message>{code}.</Message></Error>".encode()
        self._note(request, received, len(text), status)
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _note(self, request: Request, received: int, sent: int, status: int) -> None:
        self.state.log.append(request._replace(received=received, sent=sent, status=status))

    def _cut(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def wait_until(true: Callable[[], bool], seconds: float = HOLD_SECONDS) -> None:
    """Looks again and again; fails in the end."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)
