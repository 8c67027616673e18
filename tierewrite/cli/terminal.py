"""What the commands write to: a console for people, and JSON on standard output for programs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from tierewrite.json_text import chunks

if TYPE_CHECKING:
    from rich.console import Console


def console(stderr: bool = False) -> Console:
    """For standard output or error. Lines are not cut to 80 columns where it is piped: scripts want whole lines."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, soft_wrap=True, width=None if stream.isatty() else 200)


def print_json(data: dict[str, Any]) -> None:
    """One JSON object, in ASCII."""
    sys.stdout.writelines(chunks(data, ascii_only=True))
