"""What a pass or a job found out about the bytes that went through it."""

from __future__ import annotations

from dataclasses import dataclass, field

from tierewrite.digest import PIECE
from tierewrite.stores.base import Copied
from tierewrite.values.content import Made

BUFFER_BYTES = 8 << 20
"""A multiple of digest.PIECE, so that a large tensor may be cut at every buffer's end."""
assert BUFFER_BYTES % PIECE == 0


@dataclass
class Result:
    """Digests of what was read and of what was made.

    Attributes:
        digests: source key -> BLAKE3 of the source's bytes, where it was wanted.
        made: output key -> what was written, where that is no plain copy.
        copied: bytes that did not pass through this process.
    """

    digests: dict[str, bytes] = field(default_factory=dict)
    made: dict[str, Made] = field(default_factory=dict)
    copied: Copied = field(default_factory=Copied)
