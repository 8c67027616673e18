"""Rich's console behind a `Door`: its own codes pass, those in the text are escaped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, TYPE_CHECKING, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from tierewrite.errors import escaped

if TYPE_CHECKING:
    from tierewrite.cli.terminal import Door


class _Passing:
    """The file of the console: what it writes is escaped already."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self.encoding = door.encoding
        self.flush, self.isatty, self.fileno = door.flush, door.isatty, door.fileno

    def write(self, text: str) -> int:
        self._door.pass_on(text)
        return len(text)


class EscapingConsole(Console):
    """A console that draws no control character of anybody's text."""

    def __init__(self, door: Door) -> None:
        width = None if door.isatty() else 200
        super().__init__(file=cast(IO[str], _Passing(door)), highlight=False, soft_wrap=True, width=width)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Rich's segments, with their text escaped."""
        for segment in super().render(renderable, options):
            text = segment.text
            if segment.control is None and not text.isprintable():
                segment = Segment(escaped(text, keep="\n\t"), segment.style)
            yield segment
