"""Which dotted paths of a checkpoint there are keys below."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection
from functools import cached_property


class Scopes:
    """Which dotted paths there are keys below."""

    def __init__(self, keys: Collection[str]) -> None:
        self._keys = keys

    @cached_property
    def _sorted(self) -> list[str]:
        return sorted(self._keys)

    def __contains__(self, path: str) -> bool:
        below = f"{path}."
        at = bisect_left(self._sorted, below)
        return path != "" and at < len(self._sorted) and self._sorted[at].startswith(below)
