"""What a caller may watch while a rewrite runs."""

from __future__ import annotations

from typing import Any


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
