"""Shared set-up: no test may write to a source, and none may reach the network."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from blake3 import blake3

from tests.checkpoints import FIXTURES
from tierewrite import interrupts
from tierewrite.ties.tie_map import TieMap

if TYPE_CHECKING:
    from tests.faults import Machine
    from tests.s3_server import Store

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TIEREWRITE_CACHE"] = ""  # classes are asked themselves, unless a test wants it otherwise
# Hundreds of tests start a Python, which would compile all of our modules each time (0.25 s of CPU).
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup; all that tests start would ignore it too
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

_LONGEST = (
    "test_zoo.py", "test_ray.py", "test_stores_faults.py", "test_stores.py", "test_verify.py", "test_adversary.py",
    "test_smoke.py", "test_crashes.py", "test_hub.py", "test_families.py", "test_streaming.py", "test_faults.py",
    "test_real_models.py",
)  # fmt: skip
"""Files that take longest begin first, so that no process waits for another at the end (bin/test)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


Snapshot = dict[str, tuple[int, int, int, str]]


def snapshot(folder: Path, content: bool = True) -> Snapshot:
    """Modification time, mode, size and digest of everything in a folder; of folders the time and mode."""
    found: Snapshot = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        status = path.stat()
        is_file = path.is_file()
        digest = blake3(path.read_bytes()).hexdigest() if is_file and content else ""
        size = status.st_size if is_file else 0
        found[str(path.relative_to(folder))] = (status.st_mtime_ns, status.st_mode, size, digest)
    return found


def _sources() -> list[Path]:
    return sorted(FIXTURES.glob("*/naive"))


@pytest.fixture(autouse=True, scope="module")
def _sources_keep_their_times() -> Iterator[None]:
    """The naive fixtures' files, sizes, modes and times are the same after every module of tests."""
    before = [snapshot(folder, content=False) for folder in _sources()]
    yield
    assert [snapshot(folder, content=False) for folder in _sources()] == before


@pytest.fixture(autouse=True, scope="session")
def _sources_keep_their_bytes() -> Iterator[None]:
    """And their bytes are the same after all of them."""
    before = [snapshot(folder) for folder in _sources()]
    yield
    assert [snapshot(folder) for folder in _sources()] == before


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


@pytest.fixture(scope="session")
def s3_servers() -> Iterator[Store]:
    """One S3 store for all tests."""
    from tests.s3_server import Store

    with Store() as running:
        yield running


@pytest.fixture
def store(s3_servers: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The S3 store, with a bucket `store.bucket` that is empty, and an environment that leads s3fs to it alone."""
    import s3fs

    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    for name, value in s3_servers.settings.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3_servers.reset()
    yield s3_servers
    s3_servers.reset()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def handlers() -> Iterator[None]:
    """The command line's handlers of signals; afterwards the test's own."""
    before = {signum: signal.getsignal(signum) for signum in interrupts.SIGNALS}
    hook = sys.unraisablehook
    interrupts.install()
    yield
    interrupts.end()
    sys.unraisablehook = hook
    for signum, handler in before.items():
        signal.signal(signum, handler)
    interrupts.reset()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine whose system calls fail on request; one for a file of tests."""
    from tests.faults import Machine, unavailable

    if unavailable() is not None:
        pytest.skip(str(unavailable()))
    made = Machine(tmp_path_factory.mktemp("machine"))
    yield made
    made.close()


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies remote code to its module cache: here one of the test's own."""
    from transformers import dynamic_module_utils
    from transformers.utils import hub

    monkeypatch.setattr(hub, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


_TIES: dict[str, TieMap] = {}


@pytest.fixture
def remembered_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variants with one config and the same names: their class is built once for all of them."""
    resolve = TieMap.resolve

    def remembered(root: Path, config: dict[str, Any], **options: Any) -> TieMap:
        chosen = {name: sorted(value) if name == "keys" else str(value) for name, value in options.items()}
        key = json.dumps([config, chosen], sort_keys=True)
        if key not in _TIES:
            _TIES[key] = resolve(root, config, **options)
        return _TIES[key]

    monkeypatch.setattr(TieMap, "resolve", remembered)
