"""What is installed here that decides what a model class answers, by content; nothing of it is imported for that."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from blake3 import blake3

_OWN = Path(__file__).parent.parent
_OWN_ROOMS = ("ties", "formats", "source")
_IMPORTED_NS = time.time_ns()
_ALWAYS = frozenset({"__init__.py", "configuration_utils.py", "conversion_mapping.py", "core_model_loading.py"})
"""Files of transformers that every answer depends on."""


def digest() -> bytes | None:
    """What changes when another Python, torch, transformers or tierewrite would answer; None where that cannot be told.

    Packages that transformers only uses where they are there count by the folders that packages are installed in: by
    their times, which change when one comes or goes.
    """
    transformers, torch = folder_of("transformers"), folder_of("torch")
    if transformers is None or torch is None:
        return None
    rows = [sys.version, str(transformers), str(torch), *map(repr, _package_folders())]
    hasher = blake3("\n".join(rows).encode("utf-8", "surrogateescape"))
    try:
        for path in (torch / "version.py", *_own_files()):
            hasher.update(blake3(path.read_bytes()).digest())
    except OSError:
        return None
    return hasher.digest()


def folder_of(package: str) -> Path | None:
    """The folder of an installed package, or None."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _package_folders() -> Iterator[tuple[str, int]]:
    """The folders that Python finds installed packages in, and when each last changed."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    for folder in dict.fromkeys(sys.path):
        if folder in given or os.path.basename(folder) in ("site-packages", "dist-packages"):
            try:
                yield folder, os.stat(folder).st_mtime_ns
            except OSError:
                yield folder, 0


def files_of_transformers() -> tuple[str, ...] | None:
    """The files that were imported of transformers, relative to its folder; None where one of them is elsewhere."""
    root = folder_of("transformers")
    found: set[str] = set()
    for name, module in sorted(sys.modules.items()):
        if name != "transformers" and not name.startswith("transformers."):
            continue
        file = getattr(module, "__file__", None)
        if root is None or not isinstance(file, str) or not Path(file).is_relative_to(root):
            return None
        found.add(Path(file).relative_to(root).as_posix())
    return tuple(sorted(found)) if found >= _ALWAYS else None


def is_as_imported(files: Iterable[str]) -> bool:
    """Whether this process imported what is on disk now: somebody may upgrade or edit packages while it runs.

    Args:
        files: as `files_of_transformers` has them.
    """
    transformers, torch = folder_of("transformers"), folder_of("torch")
    if transformers is None or torch is None:
        return False
    try:
        newest = max(os.stat(path).st_ctime_ns for path in (*(transformers / name for name in files), *_own_files()))
        versions = ((transformers / "__init__.py", "transformers"), (torch / "version.py", "torch"))
        said = all(str(sys.modules[name].__version__) in file.read_text(encoding="utf-8") for file, name in versions)
    except (OSError, KeyError, AttributeError, UnicodeDecodeError):
        return False
    return said and newest < _IMPORTED_NS


def _own_files() -> list[Path]:
    """The files of tierewrite that say how a class is asked and how its answer is understood."""
    paths = (path for room in _OWN_ROOMS for path in (_OWN / room).iterdir())
    return sorted(path for path in paths if path.suffix in (".py", ".json"))


def content_of_transformers(files: Iterable[str]) -> str | None:
    """The BLAKE3 of these files of the installed transformers, hexadecimal; None if they are not what answers need.

    Args:
        files: as `files_of_transformers` has them.
    """
    root, names = folder_of("transformers"), tuple(files)
    if root is None or not _ALWAYS.issubset(names):
        return None
    hasher = blake3()
    for name in names:
        path = Path(name)
        if path.is_absolute() or ".." in path.parts or path.suffix != ".py":
            return None
        try:
            hasher.update(blake3((root / path).read_bytes()).digest())
        except OSError:
            return None
    return hasher.hexdigest()
