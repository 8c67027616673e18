"""Files of any fsspec file system, by URL: the few operations that a rewrite needs of an object store.

Everything goes through fsspec and its back ends (s3fs, gcsfs, huggingface_hub and so on; the extra `remote`): their
own settings say which credentials and endpoints are used, and how often a request is tried again
(https://filesystem-spec.readthedocs.io, "Configuration"). They are imported only once a URL is given. Whatever
they raise becomes an error of ours that names the URL and never a credential.

A `RemotePath` is text and can be sent to another process, which opens the file system by itself.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from tierewrite.errors import SourceChanged, SourceError, SystemFailure, TierewriteError, UsageError, first_line, shown
from tierewrite.stores.base import Copied

_USER = re.compile(r"(://)[^/@\s]*@")
_QUERY = re.compile(r"(://[^\s?'\"]*)\?[^\s'\"]*")
_SECRET = re.compile(r"secret|token|passw|credential|(?:^|_)key(?:$|_id$)|signature|account_key|sas", re.IGNORECASE)

_GAP_BYTES = 256 << 10  # read and thrown away where that saves a request
_WASTE_BYTES = 4 << 20  # of such bytes in one request, at most
_PART_BYTES = 16 << 20  # of an upload
_LEAST_PART_BYTES = 5 << 20  # that stores take, but for the last part
_MAX_PARTS = 9_000  # S3 takes 10,000
_CLEANUP_SECONDS = 20  # that a store which does not answer is waited for, once a run has failed
_SECRET_CHARACTERS = 6  # a shorter value is as likely a word of the message


@dataclass(frozen=True, slots=True)
class RemotePath:
    """A file or folder of an fsspec file system: the part of pathlib's interface that is needed here.

    Attributes:
        url: as fsspec takes it, without a slash at its end.
    """

    url: str

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}")

    def __str__(self) -> str:
        return redacted(self.url)

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        """The folder that holds it."""
        return RemotePath(self.url.rpartition("/")[0])

    def opened(self) -> tuple[Any, str]:
        """The file system, and the path in it.

        Raises:
            UsageError: no such kind of file system, or its package is not installed.
            SystemFailure: it cannot be reached.
        """
        with remote_errors("opening", self):
            import fsspec

            fs, path = fsspec.core.url_to_fs(self.url)
            return fs, path

    def read_bytes(self) -> bytes:
        """The whole of a small file."""
        fs, path = self.opened()
        with remote_errors("reading", self):
            return bytes(fs.cat_file(path))

    def write_bytes(self, data: bytes) -> None:
        """A small file, whole, in one request where the store can."""
        fs, path = self.opened()
        with remote_errors("writing", self, writes=True):
            fs.pipe_file(path, data)

    def write_new(self, data: bytes) -> None:
        """As `write_bytes`, but what is there already stays, where the store can promise that.

        Which of the two it was, only the content tells: a request that was sent again may have met itself.
        """
        fs, path = self.opened()
        with remote_errors("writing", self, writes=True):
            try:
                fs.pipe_file(path, data, mode="create")
            except FileExistsError:
                pass
            except (NotImplementedError, TypeError):
                fs.pipe_file(path, data)
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.EINVAL):
                    raise
                fs.pipe_file(path, data)

    def info(self) -> dict[str, Any]:
        """What the store says of the file now. Raises SourceError if it is not there."""
        fs, path = self.opened()
        with remote_errors("looking at", self):
            fs.invalidate_cache()
            return dict(fs.info(path))

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes the file."""
        fs, path = self.opened()
        with remote_errors("removing", self):
            try:
                fs.rm_file(path)
            except FileNotFoundError:
                if not missing_ok:
                    raise
            fs.invalidate_cache()


def redacted(text: str) -> str:
    """`text` without what URLs in it may say of credentials: users, passwords and signed queries."""
    return _QUERY.sub(r"\1?***", _USER.sub(r"\1***@", text))


@contextlib.contextmanager
def remote_errors(doing: str, where: RemotePath, writes: bool = False) -> Iterator[None]:
    """Inside, what a file system raises becomes an error of ours.

    Args:
        writes: what is missing then is no file, but the bucket for one.
    """
    try:
        yield
    except TierewriteError:
        raise
    except (ImportError, ValueError) as error:
        protocol = where.url.partition("://")[0]
        unknown = isinstance(error, ImportError) or "protocol not known" in str(error).lower()
        if not unknown:
            raise _failure(doing, where, error) from None
        raise UsageError(
            f"a URL of the file system '{shown(protocol)}' cannot be opened: {_said(error, where)}; "
            "pip install 'tierewrite[remote]' brings s3:// and gs://, other kinds have packages of their own",
            file=where,
        ) from None
    except FileNotFoundError as error:
        if writes:
            raise SystemFailure(
                f"{doing} failed: {_said(error, where)}; make the bucket, or check its name", file=where
            ) from None
        raise SourceError(f"{doing} failed: nothing is there; check the URL", file=where) from None
    except MemoryError:
        raise
    except Exception as error:
        raise _failure(doing, where, error) from None


def _failure(doing: str, where: RemotePath, error: Exception) -> SystemFailure:
    """A store raises whatever its library raises; a refusal of access wants other advice than the rest."""
    said = _said(error, where)
    refused = isinstance(error, PermissionError) or re.search(
        r"credential|access ?denied|forbidden|unauthori|InvalidAccessKey|SignatureDoesNotMatch|\b40[13]\b", said, re.I
    )
    if refused:
        advice = (
            "the store does not let us: check the credentials (they are the file system's own: environment, "
            "configuration files, or fsspec's), and what they may do there"
        )
    else:
        advice = "check the network and the store, and run again (a rewrite that was killed goes on with --resume)"
    return SystemFailure(f"{doing} failed: {said}; {advice}", file=where)


def _said(error: BaseException, where: RemotePath) -> str:
    """What an error says, on one line, without the credentials that its library may have put into it."""
    text = redacted(first_line(error))
    for secret in sorted(_secrets(where), key=len, reverse=True):  # one may be a part of another
        text = text.replace(secret, "***")
    return shown(text)


def _secrets(where: RemotePath) -> set[str]:
    """Texts that must not be shown: of the environment, of fsspec's settings, of the URL."""
    found = {value for name, value in os.environ.items() if _SECRET.search(name)}
    with contextlib.suppress(Exception):  # an error is being told already
        import fsspec

        waiting: list[Any] = [fsspec.config.conf, fsspec.core.url_to_fs(where.url)[0].storage_options]
        while waiting:
            for name, value in waiting.pop().items():
                if isinstance(value, Mapping):
                    waiting.append(value)
                elif isinstance(value, str) and _SECRET.search(str(name)):
                    found.add(value)
    found = {value for value in found if len(value) >= _SECRET_CHARACTERS}
    user = _USER.search(where.url)
    if user:
        text = user.group().removeprefix("://").removesuffix("@")
        found |= {text, *(part for part in text.split(":") if len(part) >= _SECRET_CHARACTERS // 2)} - {""}
    return found | {unquote(value) for value in found}


def identity(info: Mapping[str, Any]) -> str:
    """What changes when the object does: the store's own tag, else times; with the size."""
    tags = ("ETag", "etag", "generation", "md5Hash", "blob_id")
    for name in (*tags, "mtime", "LastModified", "last_modified", "created"):
        value = info.get(name)
        if value:
            # One file system gives a time as a number in its listing and as a datetime elsewhere.
            return f"{info.get('size')} {value.timestamp() if hasattr(value, 'timestamp') else value}"
    return str(info.get("size"))


def listing(folder: RemotePath) -> dict[str, dict[str, Any]]:
    """Every file at or below `folder`, as fsspec's info, by its path below; {} if there is none. Sorted by name.

    Raises:
        UsageError, SystemFailure.
    """
    fs, base = folder.opened()
    with remote_errors("listing", folder):
        fs.invalidate_cache()
        try:
            found = fs.find(base, detail=True)
        except FileNotFoundError:
            found = {}
    prefix = base.rstrip("/") + "/"
    # Some stores keep an empty object in the place of a folder.
    files = {
        path.removeprefix(prefix): info
        for path, info in found.items()
        if path.startswith(prefix) and not path.endswith("/") and info.get("type", "file") == "file"
    }
    return dict(sorted(files.items()))


class RemoteFile:
    """Ranges of a remote file that must not change while it is open; any thread may read.

    Args:
        path: the file.
        size: its bytes.
        version: its `identity` when its header was read; "" is not compared.
    """

    def __init__(self, path: RemotePath, size: int, version: str) -> None:
        self.path, self.size, self.version = path, size, version
        self._fs, self._path = path.opened()

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`, in one request.

        Raises:
            SourceChanged: there are fewer. SystemFailure: they cannot be read.
        """
        if start == end:
            return b""
        with remote_errors("reading", self.path), self._still_there(start):
            data = self._fs.cat_file(self._path, start=start, end=end)
        if len(data) != end - start:
            raise SourceChanged(
                f"gave {len(data):,} of {end - start:,} bytes from offset {start:,}; it is shorter than its header "
                "promises, or changed: run again when nothing writes to it",
                file=self.path,
            )
        return bytes(data)

    def give(self, fd: int, start: int, end: int, position: int) -> Copied:
        """See `SourceFile`; a store has nothing of the kind."""
        return Copied()

    def read_runs(self, runs: Sequence[tuple[int, int]], into: memoryview) -> None:
        """Fills `into` with the ranges `runs` (start, end), one after the other.

        Ranges with a small gap between them are one request, which reads the gap too.
        """
        place = first = 0
        for i in range(1, len(runs) + 1):
            if (
                i < len(runs)
                and 0 <= runs[i][0] - runs[i - 1][1] <= _GAP_BYTES
                and runs[i][1] - runs[first][0] <= len(into) + _WASTE_BYTES
            ):
                continue
            base = runs[first][0]
            data = memoryview(self.read(base, runs[i - 1][1]))
            for start, end in runs[first:i]:
                into[place : place + end - start] = data[start - base : end - base]
                place += end - start
            first = i

    def finish(self) -> None:
        """Raises SourceChanged unless the file is still the one whose header was read."""
        if not self.version:
            return
        with remote_errors("looking at", self.path), self._still_there(0):
            self._fs.invalidate_cache()
            now = identity(self._fs.info(self._path))
        if now != self.version:
            raise SourceChanged(
                "the object changed while it was being read; run again when nothing writes to it", file=self.path
            )

    @contextlib.contextmanager
    def _still_there(self, start: int) -> Iterator[None]:
        """Its header was read, or it was listed: if the store does not know it now, it changed."""
        try:
            yield
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                what = "was removed"
            elif error.errno == errno.EINVAL and "satisf" in str(error):  # "The requested range is not satisfiable"
                what = f"became shorter than {start:,} bytes"
            else:
                raise
            raise SourceChanged(
                f"{what} while it was being read; run again when nothing writes to it", file=self.path
            ) from None

    def close(self) -> None:
        """Nothing is kept open."""

    def __enter__(self) -> RemoteFile:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


def part_bytes(size: int) -> int:
    """Bytes of a part in the upload of a file of `size` bytes."""
    return max(_PART_BYTES, least_part_bytes(size))


def least_part_bytes(size: int) -> int:
    """Bytes that every part but the last has at least."""
    return max(_LEAST_PART_BYTES, -(-size // _MAX_PARTS))


class Upload:
    """One new file, written from its first byte to its last, in parts; it exists once `commit` returns.

    At most a part of it is in memory, as far as the file system streams (all object stores do).
    """

    def __init__(self, path: RemotePath, size: int) -> None:
        self.path = path
        fs, target = path.opened()
        with remote_errors("beginning", path, writes=True):
            self._file: Any = fs.open(target, "wb", block_size=part_bytes(size))

    def write(self, data: memoryview) -> None:
        """The next bytes.

        Raises:
            SystemFailure: the store does not take them.
        """
        with remote_errors("writing", self.path, writes=True):
            self._file.write(data)

    def commit(self) -> None:
        """Completes the upload.

        Raises:
            SystemFailure: the store does not take it.
        """
        with remote_errors("completing", self.path, writes=True):
            self._file.close()

    def abort(self) -> None:
        """Leaves nothing of it, as far as the store can be reached."""
        with_timeout(lambda: self._file.discard())  # files that do not stream have no such thing
        with contextlib.suppress(AttributeError):
            self._file.closed = True  # else the garbage collector would complete it


def with_timeout(act: Callable[[], object]) -> bool:
    """Whether `act` came to its end without an error, and soon. For clean-up: an error is being told already.

    A store that does not answer is not waited for as long as for work. `act` may still go on afterwards, so it must be
    harmless at any time.
    """
    done = threading.Event()

    def run() -> None:
        with contextlib.suppress(Exception):
            act()
            done.set()

    thread = threading.Thread(target=run, name="tierewrite-cleanup", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the system starts no further thread: then it takes as long as it takes
        run()
    else:
        thread.join(_CLEANUP_SECONDS)
    return done.is_set()
