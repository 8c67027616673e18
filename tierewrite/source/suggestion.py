"""The path that a mistyped one was meant to be."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from tierewrite.errors import shown, without_a_folder


def not_a_folder(path: Path) -> str:
    """For a path that is there and no folder: most often a file of the checkpoint that was meant."""
    return f"not a folder; give the one that it is in: '{shown(path.parent)}'"


def did_you_mean(path: Path) -> str:
    """For a path that does not exist: "; did you mean 'exported/naive'?", or "" where nothing is called like it.

    Where no relative path can be found, this says why.
    """
    if not path.is_absolute() and (gone := without_a_folder()):
        return f"; {gone}"
    first_missing = next((one for one in [*reversed(path.parents), path] if not os.path.exists(one)), None)
    if first_missing is None:
        return ""
    try:
        there = os.listdir(first_missing.parent)
    except OSError:  # the error that is being told says enough
        return ""
    for name in difflib.get_close_matches(first_missing.name, there, n=3):
        meant = first_missing.with_name(name) / path.relative_to(first_missing)
        if os.path.exists(meant):
            return f"; did you mean '{shown(meant)}'?"
    return ""
