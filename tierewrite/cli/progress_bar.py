"""Progress for people: bars on standard error, and a line for each checkpoint of a batch that is over."""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from tierewrite.engines.progress import Progress
from tierewrite.errors import shown

if TYPE_CHECKING:
    from tierewrite.batches.results import BatchResult

_VISIBLE_AFTER = 0.3
"""Seconds: what is over sooner needs no display."""


class Bar(Progress):
    """A rich progress display on standard error; appears on a terminal once a phase has lasted for 0.3 s."""

    def __init__(self, console: Console, shown: bool = True) -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as RichProgress

        self._display = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            # Rich would take the escapes of what is printed meanwhile for colours.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._console = console
        self._notes = shown
        self._bars = self.shown = shown and console.is_terminal
        self._task: Any = None
        self._started = False
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            started, self._bars = self._started, False
        if started:
            self._display.stop()

    def start(self, phase: str, total: int) -> None:
        """See `Progress`."""
        self._task = self.begin(self._task, phase, total)

    def advance(self, nbytes: int) -> None:
        """See `Progress`."""
        self.move(self._task, nbytes)

    def note(self, text: str) -> None:
        """See `Progress`."""
        if self._notes:
            self._console.print(Text(text))

    def part(self, name: str, number: int, total: int) -> Progress:
        """See `Progress`."""
        return _CheckpointBar(self, f"[{number}/{total}] {shown(name)}")

    def begin(self, task: Any, phase: str, total: int) -> Any:
        """A bar in the place of `task`."""
        self.end(task)
        if self._bars and not self._started and self._timer is None:
            self._timer = threading.Timer(_VISIBLE_AFTER, self._appear)
            self._timer.daemon = True
            with contextlib.suppress(RuntimeError):  # no thread can be started: the work goes on without a display
                self._timer.start()
        return self._display.add_task(phase, total=total or None)

    def _appear(self) -> None:
        with self._lock:
            if self._bars and not self._started:
                self._started = True
                self._display.start()

    def move(self, task: Any, nbytes: int) -> None:
        """The bar `task` grows."""
        if self._bars:
            self._display.update(task, advance=nbytes)

    def end(self, task: Any) -> None:
        """Removes the bar `task`."""
        if task is not None:
            self._display.remove_task(task)

    def over(self, text: str, ok: bool) -> None:
        """How a checkpoint ended; that one failed is said whatever else is shown."""
        if self._notes or not ok:
            self._console.print(Text(text, style="" if ok else "red"))


class _CheckpointBar(Progress):
    """One checkpoint of a batch: a bar of its own, and a line when it is over."""

    def __init__(self, bar: Bar, name: str) -> None:
        self._bar, self._name = bar, name
        self.shown = bar.shown
        self._task: Any = None

    def start(self, phase: str, total: int) -> None:
        # Square brackets would be taken for markup.
        self._task = self._bar.begin(self._task, f"{escape(self._name)}: {phase}", total)

    def advance(self, nbytes: int) -> None:
        self._bar.move(self._task, nbytes)

    def note(self, text: str) -> None:
        self._bar.note(f"{self._name}: {text}")

    def finish(self, result: BatchResult | None) -> None:
        self._bar.end(self._task)
        if result is not None:
            self._bar.over(f"{self._name}: {result.one_line()}", result.ok)
