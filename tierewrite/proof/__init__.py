"""The proof of an output: what every tensor of SRC must have become in DST, by a reading of its own.

README.md here says what is shared with the code that plans and writes, and why.
"""

from __future__ import annotations

from dataclasses import dataclass

from tierewrite.errors import shown


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
