"""Shared set-up: no test may write to a source, and none may reach the network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from tests.checkpoints import FIXTURES

os.environ["HF_HUB_OFFLINE"] = "1"


def snapshot(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Modification time, mode and digest of everything in a folder; of folders the time and mode."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            path.stat().st_mode,
            blake3(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in [folder, *sorted(folder.rglob("*"))]
    }


@pytest.fixture(autouse=True)
def _sources_stay_as_they_are() -> Iterator[None]:
    """The naive fixtures' bytes, modes and times are the same after every test."""
    folders = sorted(FIXTURES.glob("*/naive"))
    before = [snapshot(folder) for folder in folders]
    yield
    assert [snapshot(folder) for folder in folders] == before


@pytest.fixture
def naive() -> Callable[[str], Path]:
    """The naive checkpoint of a fixture, in place."""
    return lambda case: FIXTURES / case / "naive"


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a fixture's naive checkpoint that a test may change."""

    def copy(case: str) -> Path:
        return Path(shutil.copytree(FIXTURES / case / "naive", tmp_path / f"{case}-naive"))

    return copy
