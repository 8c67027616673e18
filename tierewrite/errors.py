"""The family of errors, and the exit code that each stands for.

Every message says what was looked at (file, tensor), what was found, what was expected and what to do.
The command line turns an error into one message on standard error and its exit code; the library raises it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import unicodedata
from collections.abc import Iterator
from typing import Any, TypeVar

from tierewrite.spelling import spelled

EXIT_OK = 0
EXIT_INTERNAL = 1
EXIT_USAGE = 2
EXIT_REFUSED = 3
EXIT_SOURCE = 4
EXIT_SYSTEM = 5
EXIT_FINDINGS = 6
EXIT_SIGHUP = 129
EXIT_SIGINT = 130
EXIT_SIGQUIT = 131
EXIT_SIGALRM = 142
EXIT_SIGTERM = 143
EXIT_SIGXCPU = 152

EXIT_CODES: dict[int, str] = {
    EXIT_OK: "done",
    EXIT_INTERNAL: "internal error (a bug: please report it)",
    EXIT_USAGE: "wrong usage: DST not empty, SRC and DST overlap, a broken, cyclic or idle --ties file",
    EXIT_REFUSED: "refused: a declared tie was not confirmed, or a tied module has an unknown companion",
    EXIT_SOURCE: "something is wrong in SRC: headers, index, configs, model class, remote code, file kinds",
    EXIT_SYSTEM: "the system failed: disk full, no permission, I/O error, no thread starts, torch or transformers "
    "cannot be imported, SRC changed underfoot, or standard output did not take the result",
    EXIT_FINDINGS: "verify or check found something wrong (an unreadable DST too), or one of a batch failed",
    EXIT_SIGHUP: "the terminal was closed (SIGHUP, unless it is ignored, as nohup has it)",
    EXIT_SIGINT: "interrupted (SIGINT)",
    EXIT_SIGQUIT: "interrupted (SIGQUIT)",
    EXIT_SIGALRM: "a timer ran out (SIGALRM)",
    EXIT_SIGTERM: "terminated (SIGTERM)",
    EXIT_SIGXCPU: "the limit of CPU time is reached (SIGXCPU)",
}


def escaped(text: str, keep: str = "") -> str:
    """`text` with its control, format and unpaired surrogate characters and line separators escaped, but for `keep`."""
    plain = text
    for character in keep:
        plain = plain.replace(character, "")
    if plain.isprintable():  # as nearly every text is: none of its characters is of the categories below
        return text
    return "".join(
        c.encode("unicode_escape").decode("ascii")
        if c not in keep and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else c
        for c in text
    )


def shown(name: object) -> str:
    """`name` as it may be printed: control, format and unpaired surrogate characters escaped.

    Tensor and file names come from strangers; a terminal escape in one must not reach the terminal.
    Names over 300 characters are cut in the middle.
    """
    text = escaped(str(name))
    return text if len(text) <= 300 else f"{text[:180]}...{text[-100:]}"


class TierewriteError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        exit_code: the command line's exit status for it.
        advice: what to do, where a message of this class does not say it itself.
        file: the file concerned, as text, or None.
        tensor: the tensor (key) concerned, or None.
        details: further facts for --json; JSON-serialisable.
    """

    exit_code = EXIT_INTERNAL
    advice = ""

    def __init__(
        self,
        message: str,
        *,
        file: object | None = None,
        tensor: str | None = None,
        details: dict[str, Any] | None = None,
        advice: str | None = None,
    ) -> None:
        advice = self.advice if advice is None else advice
        super().__init__(f"{message}; {advice}" if advice else message)
        self.file = None if file is None else str(file)
        self.tensor = tensor
        self.details = details or {}

    def __str__(self) -> str:
        where = [shown(self.file)] if self.file is not None else []
        if self.tensor is not None:
            where.append(f"tensor '{shown(self.tensor)}'")
        message = spelled(super().__str__())
        return f"{', '.join(where)}: {message}" if where else message

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.args, self.__dict__)

    def to_json(self) -> dict[str, Any]:
        """The error as a JSON object (the `error` member of a command's --json output)."""
        return {
            "type": type(self).__name__,
            "exit_code": self.exit_code,
            "message": str(self),
            "file": self.file,
            "tensor": self.tensor,
            "details": self.details,
        }


_Sent = TypeVar("_Sent", bound="TierewriteError | Interrupted")


def _again(kind: type[_Sent], args: tuple[Any, ...], state: dict[str, Any]) -> _Sent:
    """An error that was sent from another process. Its class is not called: it may take, or add, something else."""
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class UsageError(TierewriteError):
    """The call itself cannot be carried out (exit 2)."""

    exit_code = EXIT_USAGE


class TieFileError(UsageError):
    """The --ties file is unreadable, malformed, cyclic or matches nothing (exit 2)."""


class Refused(TierewriteError):
    """A declared tie is not confirmed by the bytes, or a companion is of no known format (exit 3).

    `details["groups"]` lists every such group with its reason.
    """

    exit_code = EXIT_REFUSED


class SourceError(TierewriteError):
    """Something is wrong in SRC (exit 4)."""

    exit_code = EXIT_SOURCE


class HeaderError(SourceError):
    """A safetensors file whose header is malformed or disagrees with the file (exit 4)."""

    advice = "download or export this file again"


class ShardIndexError(SourceError):
    """`model.safetensors.index.json` is malformed or disagrees with the shards (exit 4)."""

    advice = "download or export the checkpoint again, or correct the index"


class ConfigError(SourceError):
    """A configuration file is malformed, or the class it names cannot be asked for its ties (exit 4)."""


class SystemFailure(TierewriteError):
    """The operating system failed us: disk, permission, I/O (exit 5)."""

    exit_code = EXIT_SYSTEM


class SourceChanged(SystemFailure):
    """SRC changed while it was read (exit 5)."""


class VerificationFailed(TierewriteError):
    """DST is not what rewriting SRC gives (exit 6)."""

    exit_code = EXIT_FINDINGS


class NotReady(TierewriteError):
    """The output would not be served right by the consumer that it was prepared for (exit 6).

    `details["readiness"]` is the whole report.
    """

    exit_code = EXIT_FINDINGS


class Undelivered(SystemFailure):
    """Standard output did not take what was to be printed (exit 5).

    Args:
        said: what the system says of it.
        reader_gone: whether it is a pipe that nobody reads any more.
        state: how things stand: "DST is complete".
    """

    def __init__(self, said: str, reader_gone: bool = False, state: str = "") -> None:
        super().__init__(f"standard output did not take the result: {said}" + (f"; {state}" if state else ""))
        self.said = said
        self.reader_gone = reader_gone and not state

    def with_state(self, state: str) -> Undelivered:
        """The same, for a message that says how things stand, whoever reads it."""
        return Undelivered(self.said, self.reader_gone, state)


class Interrupted(BaseException):
    """A signal arrived; everything staged has been removed (exit 128 + its number, see EXIT_CODES).

    No Exception, and so no TierewriteError: whoever goes on after what fails must not go on after this.
    """

    def __init__(self, signum: int, state: str = "nothing half-done was left behind") -> None:
        super().__init__(f"stopped by signal {signum}; {state}")
        self.signum = signum
        self.exit_code = 128 + signum

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.args, self.__dict__)

    def to_json(self) -> dict[str, Any]:
        """As `TierewriteError.to_json`."""
        error = TierewriteError(str(self)).to_json()
        return {**error, "type": type(self).__name__, "exit_code": self.exit_code}


def to_tierewrite_error(error: BaseException) -> TierewriteError:
    """Any exception as one of the family, where it ends a command or one checkpoint of a batch."""
    if isinstance(error, TierewriteError):
        return error
    if isinstance(error, OSError):
        advice = advice_of(error, "check permissions and the disk")
        return SystemFailure(f"{error.strerror or error}", file=error.filename, advice=advice)
    if isinstance(error, MemoryError):
        return SystemFailure("out of memory; use fewer --threads or a larger machine")
    if isinstance(error, RuntimeError) and "start new thread" in str(error):  # CPython's thread.error
        return SystemFailure(
            "the system starts no further thread: raise the limit of processes (ulimit -u, or the container's), or use "
            "fewer --threads"
        )
    return TierewriteError(
        f"internal error: {type(error).__name__}: {error}; this is a bug, please report it (-vv shows where)"
    )


def without_a_folder() -> str:
    """What to do where nothing is found because this process is in a folder that was removed; "" if it is not."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the current folder was removed: go to another one (cd), and run again"
    return ""


_ADVICE = {
    errno.ENOSPC: "free some space, or choose another disk",
    errno.EDQUOT: "free some of your quota, or choose another disk",
    errno.EACCES: "check the permissions of the file and of its folder",
    errno.EPERM: "check the permissions of the file and of its folder",
    errno.EROFS: "the file system is read-only: choose another one",
    errno.EFBIG: "a file may not grow this large here: raise the limit, or use a smaller --max-shard-size",
    errno.ENOTDIR: "a part of its path is a file, not a folder: choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "the device reports an I/O error: check the disk",
    errno.EXDEV: "a folder that a container's image holds, say, cannot be moved: write to another place",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def advice_of(error: OSError, otherwise: str = "see the system's message") -> str:
    """What to do about an error of the system's."""
    if error.errno == errno.ENOENT and (gone := without_a_folder()):
        return gone
    return _ADVICE.get(error.errno or 0, otherwise)


def first_line(error: BaseException) -> str:
    """The type of an exception and the first line of what it says, for messages; not yet escaped (`shown`)."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextlib.contextmanager
def system_errors(what: str, file: object) -> Iterator[None]:
    """Turns an OSError inside into a SystemFailure that names `file` and what was being done."""
    try:
        yield
    except OSError as error:
        raise SystemFailure(
            f"{what} failed: {error.strerror or error} ({errno.errorcode.get(error.errno or 0, '?')}); "
            f"{advice_of(error)}",
            file=file,
        ) from error
