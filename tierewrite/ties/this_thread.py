"""What is changed for everybody in a process, changed for one thread only, while a model class is asked.

Others go on meanwhile: a notebook prints, a server logs, a script makes a model whose weights `torch.nn.init` fills.
What stands in for something asks for its thread at each call, and once it is over it passes everything on: whoever
has saved it meanwhile may put it back.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any


class ThisThread:
    """True in the thread that made it, until `end`; false in all others."""

    def __init__(self) -> None:
        self._thread: int | None = threading.get_ident()

    def __bool__(self) -> bool:
        return self._thread == threading.get_ident()

    def end(self) -> None:
        """From now on false everywhere."""
        self._thread = None


@contextlib.contextmanager
def _here() -> Iterator[ThisThread]:
    here = ThisThread()
    try:
        yield here
    finally:
        here.end()


@contextlib.contextmanager
def replaced(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Inside, a call of the function or method `owner.name` in this thread calls `replacement`."""
    original = getattr(owner, name)
    with _here() as here:

        def chosen(*args: Any, **kwargs: Any) -> Any:
            return (replacement if here else original)(*args, **kwargs)

        setattr(owner, name, chosen)
        try:
            yield
        finally:
            if getattr(owner, name) is chosen:
                setattr(owner, name, original)


class _Printed:
    """Standard output that takes nothing from one thread."""

    def __init__(self, to: Any, here: ThisThread) -> None:
        self._to, self._here = to, here

    def write(self, printed: str) -> int:
        return len(printed) if self._here or self._to is None else self._to.write(printed)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self._to is not None:
            self._to.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._to, name)


@contextlib.contextmanager
def printing_nothing() -> Iterator[None]:
    """Inside, what this thread prints reaches nobody."""
    original = sys.stdout
    with _here() as here:
        sys.stdout = printed = _Printed(original, here)
        try:
            yield
        finally:
            if sys.stdout is printed:
                sys.stdout = original


class _Logged(logging.Handler):
    """Takes the records of one thread and keeps none; those of others go where they would go without it."""

    def __init__(self, logger: logging.Logger, here: ThisThread) -> None:
        super().__init__()
        self._handlers, self._here = logger.handlers[:], here
        self._parent = logger.parent if logger.propagate else None

    def handle(self, record: logging.LogRecord) -> bool:  # without a lock: those that it stands for have their own
        if not self._here:
            for handler in self._handlers:
                if record.levelno >= handler.level:
                    handler.handle(record)
            if self._parent is not None:
                self._parent.callHandlers(record)
        return True


@contextlib.contextmanager
def logging_nothing(*names: str) -> Iterator[None]:
    """Inside, what this thread logs to loggers of these names and below reaches nobody."""
    with _here() as here:
        saved = []
        for name in names:
            logger = logging.getLogger(name)
            saved.append((logger, logger.handlers[:], logger.propagate))
            logger.handlers = [_Logged(logger, here)]
            logger.propagate = False
        try:
            yield
        finally:
            for logger, handlers, propagate in saved:
                logger.handlers = handlers
                logger.propagate = propagate


class _AnyTextHere:
    """In a filter of warnings, in place of a pattern: matches whatever one thread says."""

    def __init__(self, here: ThisThread) -> None:
        self._here = here

    def match(self, text: str) -> bool:
        return bool(self._here)


@contextlib.contextmanager
def warning_of_nothing(others_stay: bool = True) -> Iterator[None]:
    """Inside, no warning of this thread is shown.

    Not by `catch_warnings`: where another thread is in one of its own when this ends, either puts back the other's.

    Args:
        others_stay: whether filters that are made meanwhile stay, as those of a package that is imported should.
    """
    filters: list[Any] = warnings.filters  # type: ignore[assignment]  # declared as any sequence
    before = filters[:]
    with _here() as here:
        mine = ("ignore", _AnyTextHere(here), Warning, None, 0)
        filters.insert(0, mine)
        try:
            yield
        finally:
            filters[:] = [one for one in filters if one is not mine] if others_stay else before
