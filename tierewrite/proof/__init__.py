"""The proof of an output: what every tensor of SRC must have become in DST, by a reading of its own.

README.md here says what is shared with the code that plans and writes, and why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierewrite.errors import shown
from tierewrite.tables import count, text

if TYPE_CHECKING:
    from rich.text import Text

_SHOWN = 50


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in DST that SRC does not account for.

    Attributes:
        id: what kind of problem, as the module's docstring lists them.
        where: the file, tensor or tie group concerned.
        message: what was found and what was expected; control characters are escaped, as they are not in `where`.
    """

    id: str
    where: str
    message: str

    def __post_init__(self) -> None:
        # Messages quote names that strangers chose, of which a terminal would obey some.
        pieces = (self.message[at : at + 25] for at in range(0, len(self.message), 25))
        object.__setattr__(self, "message", "".join(map(shown, pieces)))

    def to_json(self) -> dict[str, str]:
        """All attributes, by name."""
        return {"id": self.id, "where": self.where, "message": self.message}


def verdict(problems: Sequence[Problem]) -> str:
    """What matters most of what was found, for one line."""
    return f"{count(len(problems), 'problem')}, the first: {problems[0].id}" if problems else "OK"


def problem_lines(problems: Sequence[Problem], notes: Sequence[str]) -> Iterator[Text]:
    """What was found, for people: the first problems, how many more there are, and the notes."""
    for problem in problems[:_SHOWN]:
        where = shown(problem.where)
        message = problem.message.removeprefix(f"{where}: ")  # an error's own text begins with its file
        yield text(f"{problem.id}: {where}: {message}", "red")
    if len(problems) > _SHOWN:
        yield text(f"... and {len(problems) - _SHOWN} more (all of them with --json)", "red")
    for note in notes:
        yield text(f"note: {note}")
    if problems:
        yield text(f"{count(len(problems), 'problem')} found.", "red")
