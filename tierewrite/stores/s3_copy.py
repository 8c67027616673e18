"""Uploads to S3 of which the store copies large ranges by itself, from objects that it has already.

`S3FileSystem.call_s3` is s3fs's public way to any request (the same from 2025.3 on); the requests and their parameters
are the S3 API's: UploadPartCopy with CopySourceRange and CopySourceIfMatch
(https://docs.aws.amazon.com/AmazonS3/latest/API/API_UploadPartCopy.html).
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tierewrite.errors import SourceChanged, SystemFailure
from tierewrite.stores.base import Copied, SourceFile, Stamped
from tierewrite.stores.remote import (
    RemoteFile,
    RemotePath,
    least_part_bytes,
    part_bytes,
    remote_errors,
    with_timeout,
)

log = logging.getLogger(__name__)

_COPIES = 4  # requests at a time, of one upload
_READ_BYTES = 8 << 20  # of a range that passes through this machine
_ETAG = re.compile(r'\d+ ("[^"]+")')  # in a version, as `remote.identity` makes it
_CHANGED = {404: "was removed", 412: "changed", 416: "became shorter"}
_TRY_AGAIN = {408, 409, 429}


def can_copy(sources: Sequence[Stamped], path: RemotePath) -> bool:
    """Whether a store can copy ranges of `sources` into an upload at `path`. Asks nobody.

    It can if all are objects of S3 that the same settings open: endpoint, credentials, and what else s3fs was given.
    """
    places = [source.path for source in sources]
    if not all(
        isinstance(place, RemotePath) and place.url.startswith(("s3://", "s3a://")) for place in [*places, path]
    ):
        return False
    system, _ = path.opened()
    return (
        hasattr(system, "call_s3")
        and not getattr(system, "fixed_upload_size", False)  # such a store wants all parts of one size (R2)
        and all(place.opened()[0] == system for place in places)
        and all(_ETAG.fullmatch(source.version) for source in sources)
    )


class CopyingUpload:
    """One new object, written from its first byte to its last; see `base.CopyingSink`.

    Every part but the last has at least 5 MiB: what lies between copied ranges and is smaller is made a part together
    with the beginning of the next range, which is read for that.
    """

    def __init__(self, path: RemotePath, size: int) -> None:
        self.path = path
        self._system, target = path.opened()
        self._object = dict(zip(("Bucket", "Key"), self._system.split_path(target)[:2], strict=True))
        self._part_bytes, self._least_bytes = part_bytes(size), least_part_bytes(size)
        self._waiting = bytearray()
        self._parts: dict[int, dict[str, Any]] = {}  # by number; complete once nothing is under way
        self._under_way: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(_COPIES, thread_name_prefix="tierewrite-copy")
        self._begun: int = 0  # parts
        self._copies: bool | None = None  # whether the store takes such requests; None: not tried yet

    def write(self, data: memoryview) -> None:
        """See `Sink`."""
        self._waiting += data
        if len(self._waiting) >= self._part_bytes:
            self._upload()

    def copy(self, source: SourceFile, start: int, end: int) -> Copied:
        """See `CopyingSink`; one request, so `end - start` is at most 5 GiB."""
        assert isinstance(source, RemoteFile)
        first = start + max(0, self._least_bytes - len(self._waiting)) if self._waiting else start
        if self._copies is False or end - first < self._least_bytes:
            self._read_and_write(source, start, end)
            return Copied()
        self._read_and_write(source, start, first)
        if self._waiting:
            self._upload()
        if self._copies is None:
            self._copies = self._try_to_copy(source, first, end)
            if not self._copies:
                self._read_and_write(source, first, end)
                return Copied()
        else:
            while len(self._under_way) >= _COPIES:
                self._under_way.popleft().result()
            self._under_way.append(self._pool.submit(self._copy_part, self._next(), source, first, end))
        return Copied(by_store=end - first)

    def commit(self) -> None:
        """See `Sink`."""
        if self._waiting:
            self._upload()
        while self._under_way:
            self._under_way.popleft().result()
        self._pool.shutdown()
        parts = [self._parts[number] for number in sorted(self._parts)]
        with remote_errors("completing", self.path, writes=True):
            self._call("complete_multipart_upload", MultipartUpload={"Parts": parts})
            self._system.invalidate_cache()

    def abort(self) -> None:
        """See `Sink`."""
        with_timeout(self._give_up)

    def _give_up(self) -> None:
        self._pool.shutdown(cancel_futures=True)  # a part that comes after the end of an upload would stay
        if "UploadId" in self._object:
            self._call("abort_multipart_upload")

    def _call(self, request: str, **parameters: Any) -> dict[str, Any]:
        return dict(self._system.call_s3(request, **self._object, **parameters))

    def _next(self) -> int:
        """The number of the next part; begins the upload with the first."""
        if "UploadId" not in self._object:
            with remote_errors("beginning", self.path, writes=True):
                self._object["UploadId"] = self._call("create_multipart_upload")["UploadId"]
        self._begun += 1
        return self._begun

    def _upload(self) -> None:
        """What waits becomes a part."""
        number = self._next()
        with remote_errors("writing", self.path, writes=True):
            answer = self._call("upload_part", PartNumber=number, Body=bytes(self._waiting))
        self._parts[number] = _part(number, answer)
        self._waiting.clear()

    def _read_and_write(self, source: RemoteFile, start: int, end: int) -> None:
        for at in range(start, end, _READ_BYTES):
            self.write(memoryview(source.read(at, min(end, at + _READ_BYTES))))

    def _try_to_copy(self, source: RemoteFile, start: int, end: int) -> bool:
        """The first such request of an upload: whether the store takes it."""
        number = self._next()
        try:
            self._copy_part(number, source, start, end)
        except _Refused as refused:
            log.info("%s; it is read and uploaded", refused)
            self._begun -= 1
            return False
        return True

    def _copy_part(self, number: int, source: RemoteFile, start: int, end: int) -> None:
        """Copies a range as part `number`, if the object is still the one whose header was read.

        Raises:
            SourceChanged: it is not. SystemFailure: the request failed.
            _Refused: the store does not take such requests, or not from these credentials.
        """
        match = _ETAG.fullmatch(source.version)
        assert match is not None
        place = dict(zip(("Bucket", "Key"), self._system.split_path(source.path.url)[:2], strict=True))
        with remote_errors("copying from SRC", self.path, writes=True):
            try:
                answer = self._call(
                    "upload_part_copy",
                    PartNumber=number,
                    CopySource=place,
                    CopySourceRange=f"bytes={start}-{end - 1}",
                    CopySourceIfMatch=match[1],
                )
            except OSError as error:
                _tell_refusals(error, source)
                raise
        self._parts[number] = _part(number, answer["CopyPartResult"])


class _Refused(SystemFailure):
    """The store does not copy ranges, for whatever reason."""


def _tell_refusals(error: OSError, source: RemoteFile) -> None:
    """Raises what a refused UploadPartCopy means, where it is no failure that reading would meet as well.

    Raises:
        SourceChanged, _Refused.
    """
    answer = getattr(error.__cause__, "response", {})  # botocore's ClientError has the store's answer
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if status in _CHANGED and answer["Error"]["Code"] not in ("NoSuchUpload", "NoSuchBucket"):
        raise SourceChanged(
            f"the object {_CHANGED[status]} while it was being read; run again when nothing writes to it",
            file=source.path,
        ) from None
    if status == 501 or (400 <= status < 500 and status not in _TRY_AGAIN):
        raise _Refused(
            f"the store refused to copy a range of it ({answer['Error']['Code']})", file=source.path
        ) from None


def _part(number: int, answer: dict[str, Any]) -> dict[str, Any]:
    """What completing an upload has to say of a part: as s3fs says it."""
    checksum = {name: answer[name] for name in ("ChecksumSHA256",) if name in answer}
    return {"PartNumber": number, "ETag": answer["ETag"], **checksum}
