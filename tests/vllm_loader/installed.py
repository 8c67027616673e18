"""The package in the environment of a consumer as if it were installed there, with its entry points."""

from __future__ import annotations

import os
import re
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
_GROUP = re.compile(r'^\[project\.entry-points\."([^"]+)"\]\n((?:\w+ = "[^"]+"\n)+)', re.MULTILINE)


def entry_points() -> str:
    """The entry points that pyproject.toml declares, as an installed package has them."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return "\n".join(f"[{group}]\n{lines.replace(chr(34), '')}" for group, lines in _GROUP.findall(text))


def as_installed(folder: Path) -> dict[str, str]:
    """Environment variables under which a Python finds the package by its metadata, and all that it needs.

    Args:
        folder: to be made; it has to stay.
    """
    info = folder / "tierewrite-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tierewrite\nVersion: 0\n")
    (info / "entry_points.txt").write_text(entry_points())
    # Behind the environment's own packages: those of ours that it lacks.
    own = [path for path in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")) if path]
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.path += {own!r}\n")
    return {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "TIEREWRITE_CACHE": str(folder / "cache")}
