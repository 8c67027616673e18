"""One checkpoint of a batch, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tierewrite.planning.policy import Policy


@dataclass(frozen=True)
class Item:
    """One checkpoint of a batch.

    Attributes:
        src: folder, URL or hub id, as `rewrite` takes it.
        dst: folder or URL; None where nothing is written.
        options: of `rewrite`, what was chosen for all of them included.
        policy: those among them that decide content, and what the consumer needs.
        name: what it is called while the batch runs.
        origin: where it was named, for messages: "list.txt, line 3".
        skipped: why it is no checkpoint that could be rewritten; None where it may be one.
    """

    src: str
    dst: str | None
    options: Mapping[str, Any]
    policy: Policy
    name: str
    origin: str
    skipped: str | None = None
