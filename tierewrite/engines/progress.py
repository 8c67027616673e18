"""What a caller may watch while a rewrite runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from tierewrite.errors import UsageError

if TYPE_CHECKING:
    import rich.progress


class Progress:
    """What a caller may watch. Subclass it; the methods may be called from any thread.

    Attributes:
        shown: whether a person is watching (a download then shows its own bars).
    """

    shown: bool = False

    def start(self, phase: str, total: int) -> None:
        """A phase begins that will move `total` bytes."""

    def advance(self, nbytes: int) -> None:
        """`nbytes` more bytes have moved."""

    def note(self, text: str) -> None:
        """Something a person should know before it happens."""

    def part(self, name: str, number: int, total: int) -> Progress:
        """The checkpoint `name` of a batch begins, the `number`-th of `total`. Returns its `Progress`."""
        return self

    def finish(self, result: Any) -> None:
        """What `part` began is over: its `BatchResult`, or None if the batch was interrupted."""


class TqdmLike(Protocol):
    """A bar such as tqdm's; of its other methods `reset` and `set_description` are called where it has them."""

    def update(self, n: float = 1) -> Any:
        """`n` more bytes have moved."""


ProgressLike: TypeAlias = "Progress | TqdmLike | rich.progress.Progress | None"
"""What functions take as `progress`."""


class _OnTqdm(Progress):
    """Shows on a bar such as tqdm's. It is begun again for each phase, with the phase's number of bytes."""

    shown = True

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def start(self, phase: str, total: int) -> None:
        """See `Progress`."""
        if hasattr(self._bar, "set_description"):
            self._bar.set_description(phase)
        if hasattr(self._bar, "reset"):
            self._bar.reset(total=total)

    def advance(self, nbytes: int) -> None:
        """See `Progress`."""
        self._bar.update(nbytes)


class _OnRich(Progress):
    """Shows on a `rich.progress.Progress`, as one task of it: it is begun again for each phase."""

    shown = True

    def __init__(self, bars: rich.progress.Progress) -> None:
        self._bars = bars
        self._task = bars.add_task("", total=None)

    def start(self, phase: str, total: int) -> None:
        """See `Progress`."""
        from rich.markup import escape  # a class's name may look like markup

        self._bars.reset(self._task, description=escape(phase), total=total)

    def advance(self, nbytes: int) -> None:
        """See `Progress`."""
        self._bars.advance(self._task, nbytes)


def progress_of(given: ProgressLike) -> Progress:
    """What is told of a run's progress: `given` itself, a bar such as tqdm's, a display of rich's, or nobody.

    Raises:
        UsageError: it is neither.
    """
    if given is None or isinstance(given, Progress):
        return given or Progress()
    if callable(getattr(given, "add_task", None)):
        return _OnRich(cast("rich.progress.Progress", given))
    if not callable(getattr(given, "update", None)):
        raise UsageError(
            f"progress is of type {type(given).__name__}; expected a tierewrite.Progress, a bar such as tqdm's, or a "
            "rich.progress.Progress"
        )
    return _OnTqdm(given)
