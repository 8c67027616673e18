"""What the commands write to. Everything that is printed goes through a `Door`, which escapes control characters.

Tensor names, config strings, file names, fields of a manifest and answers of servers are written by strangers: none of
them may move a cursor, set a title or turn the writing around.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TextIO, cast

from tierewrite.errors import Interrupted, Undelivered, escaped
from tierewrite.json_text import chunks

if TYPE_CHECKING:
    from rich.console import Console


class Door:
    """Standard output or error for everybody who prints: click, logging, warnings, other people's libraries.

    What cannot be written is remembered, and everything after it is dropped.

    Args:
        stream: where it goes; None where the process was started without it.
        must_arrive: raise Undelivered; for standard error there is nobody to tell.

    Attributes:
        object_begun: a JSON object was printed, or a part of one.
    """

    errors = "backslashreplace"
    closed = False

    def __init__(self, stream: TextIO | None, must_arrive: bool = False) -> None:
        self._stream = stream
        self._must_arrive = must_arrive
        self._failure: Undelivered | None = None
        self._console: Console | None = None
        self.object_begun = False
        self.encoding: str = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Writes `text`, escaped. Raises Undelivered."""
        if not isinstance(text, str):  # click finds out in this way that it is no file of bytes
            raise TypeError("text is expected")
        self.pass_on(escaped(text, keep="\n\t"))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes all of them. Raises Undelivered."""
        for line in lines:
            self.write(line)

    def pass_on(self, text: str) -> None:
        """Writes what holds no control character but our own. Raises Undelivered."""
        if self._failure is not None or not text:
            return
        if not text.isascii():
            text = text.encode(self.encoding, self.errors).decode(self.encoding)
        with self._arrives():
            if self._stream is None:
                raise OSError(errno.EBADF, "it is closed")
            self._stream.write(text)

    def flush(self) -> None:
        """Raises Undelivered, also for what somebody else's code has tried to write and went on."""
        if self._failure is not None:
            if self._must_arrive:
                raise self._failure
        elif self._stream is not None:
            with self._arrives():
                self._stream.flush()

    def isatty(self) -> bool:
        """Whether a person is looking."""
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        """The number of the open file. Raises OSError."""
        if self._stream is None:
            raise OSError(errno.EBADF, "it is closed")
        return self._stream.fileno()

    def writable(self) -> bool:
        """It is, for click."""
        return True

    def console(self) -> Console:
        """For tables and progress; there is one, so that lines and bars know of each other."""
        if self._console is None:
            from tierewrite.cli.escaping_console import EscapingConsole

            self._console = EscapingConsole(self)
        return self._console

    def line(self, text: str) -> None:
        """A line of its own, above the bars if there are any."""
        if self._console is None:
            self.write(f"{text}\n")
        else:
            from rich.text import Text

            self._console.print(Text(text))

    @contextlib.contextmanager
    def _arrives(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: somebody has closed it
            code = getattr(error, "errno", None) or 0
            said = f"{getattr(error, 'strerror', None) or error} ({errno.errorcode.get(code, '?')})"
            self._failure = Undelivered(said, reader_gone=isinstance(error, BrokenPipeError))
            with contextlib.suppress(OSError, ValueError):  # what is still buffered must not fail again at the end
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.fileno())
                os.close(null)
            if self._must_arrive:
                raise self._failure from error


def console(stderr: bool = False) -> Console:
    """For standard output or error. Lines are not cut to 80 columns where it is piped: scripts want whole lines."""
    stream: Any = sys.stderr if stderr else sys.stdout
    return (stream if isinstance(stream, Door) else Door(stream, must_arrive=not stderr)).console()


def print_json(data: dict[str, Any]) -> None:
    """One JSON object, in ASCII. Raises Undelivered."""
    # Its strings hold escapes for all but printable ASCII, so a Door has nothing to look for.
    write = sys.stdout.write
    if isinstance(sys.stdout, Door):
        write, sys.stdout.object_begun = sys.stdout.pass_on, True
    for text in chunks(data, ascii_only=True):
        write(text)


@contextlib.contextmanager
def said_of(state: str) -> Iterator[None]:
    """Around what is printed after the work is done: an error says how things stand.

    Args:
        state: "DST is complete".
    """
    try:
        yield
        sys.stdout.flush()
    except Undelivered as error:
        raise error.with_state(state) from error.__cause__
    except Interrupted as stopped:
        raise Interrupted(stopped.signum, state) from None


class LogHandler(logging.Handler):
    """Log lines go to standard error as it is when they come.

    Attributes:
        only_ours: leave out what libraries log.
    """

    only_ours = True

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(lambda record: not self.only_ours or record.name.partition(".")[0] == "tierewrite")

    def emit(self, record: logging.LogRecord) -> None:
        """Prints it. Never raises."""
        try:
            text = self.format(record)
        except Exception:  # a library's own mistake in a message
            text = f"{record.levelname} {record.name}: {record.msg}"
        stream: Any = sys.stderr
        (stream if isinstance(stream, Door) else Door(cast(TextIO, stream))).line(text)
