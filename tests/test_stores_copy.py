"""Survivors that S3 copies by itself: equal bytes, few of them uploaded, and only those of confirmed ties.

Against moto's S3 server behind the proxy that counts (tests/s3_server.py).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

import tierewrite
from tests.checkpoints import FIXTURES, read_header, write_checkpoint
from tests.s3_server import Fault, Request, Store, of
from tests.test_stores import Files, files, spans
from tierewrite.output import copied
from tierewrite.stores.places import located, store_of

MiB = 1 << 20
EVER = 1_000_000
SHARD = "model.safetensors"
LATER = partial(pytest.param, marks=pytest.mark.long)


class Case:
    """A checkpoint whose output is one shard: small tensors, an untied run, small ones, and a tied tensor."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        tied, odd = rng.bytes(10 * MiB), rng.bytes(MiB + 1)
        tensors = {
            "a.scale": ("F32", [], rng.bytes(4)),
            "b.0.weight": ("U8", [10 * MiB], rng.bytes(10 * MiB)),
            "b.1.weight": ("U8", [len(odd)], odd),
            "c.weight": ("U8", [len(tied)], tied),  # tied to f, and goes
            "d.weight": ("U8", [len(odd)], odd),
            "e.weight": ("U8", [3], rng.bytes(3)),  # tied to g, and goes
            "f.weight": ("U8", [len(tied)], tied),
            "g.weight": ("U8", [3], b""),
        }
        tensors["g.weight"] = tensors["e.weight"]
        self.src = write_checkpoint(folder / "src", tensors, {"model_type": "none"})
        (folder / "ties.json").write_text('{"c.weight": "f.weight", "e.weight": "g.weight"}')
        self.options: dict[str, Any] = {"ties": folder / "ties.json"}
        self.words = ["--ties", str(folder / "ties.json"), "-q"]
        tierewrite.rewrite(self.src, folder / "expected", **self.options)
        self.expected = files(folder / "expected")
        header, self.data_start = read_header(self.src / SHARD)
        self.places = {name: tuple(entry["data_offsets"]) for name, entry in header.items() if name in tensors}


@pytest.fixture(scope="session")
def session_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("stores_copy"))


@pytest.fixture
def case(session_case: Case, store: Store) -> Case:
    store.upload(session_case.src)
    return session_case


def across(case: Case, store: Store, **options: Any) -> Files:
    """A rewrite from the store into the store."""
    tierewrite.rewrite(store.url("src"), store.url("out"), **{**case.options, **options})
    return store.objects()


def copied_ranges(store: Store) -> list[tuple[int, int]]:
    found = [request.range.removeprefix("bytes=").split("-") for request in store.asked("copy")]
    return sorted((int(start), int(end) + 1) for start, end in found)


def test_survivors_are_copied_by_the_store_and_little_is_uploaded(case: Case, store: Store) -> None:
    assert across(case, store) == case.expected
    b0, b1 = case.places["b.0.weight"][0], case.places["b.1.weight"][1]
    f, g = case.places["f.weight"][0], case.places["g.weight"][1]
    header = read_header_bytes(case.expected[SHARD])
    # What stands before a run is uploaded with as much of it as makes 5 MiB: S3 takes no smaller part.
    before_b = header + 4
    before_f = MiB + 1
    expected = [(b0 + 5 * MiB - before_b, b1), (f + 5 * MiB - before_f, g)]
    assert copied_ranges(store) == [(case.data_start + start, case.data_start + end) for start, end in expected]
    parts = [request.received for request in store.asked("part")]
    assert sorted(parts) == [5 * MiB, 5 * MiB]
    assert store.unfinished() == []


def read_header_bytes(shard: bytes) -> int:
    """Bytes of a shard before its data."""
    return 8 + int.from_bytes(shard[:8], "little")


def test_report_counts_what_the_store_copied_and_never_uploads_all(case: Case, store: Store) -> None:
    report = tierewrite.rewrite(store.url("src"), store.url("out"), **case.options)
    assert report.means is not None
    assert report.means.copied_by_store == sum(end - start for start, end in copied_ranges(store))
    store.log.clear()
    report = tierewrite.rewrite(store.url("src"), store.url("other"), **case.options, copy="never")
    assert store.objects("other") == case.expected
    assert store.asked("copy") == []
    assert report.means is not None
    assert report.means.copied_by_store == 0


def test_digests_of_all_tensors_are_those_of_a_local_rewrite(case: Case, store: Store, tmp_path: Path) -> None:
    tierewrite.rewrite(case.src, tmp_path / "expected", **case.options, digests=True)
    assert across(case, store, digests=True) == files(tmp_path / "expected")
    assert store.asked("copy")


def test_bytes_that_need_no_digest_are_not_read(case: Case, store: Store) -> None:
    across(case, store)
    read = spans(store, f"src/{SHARD}")
    first, last = (
        case.data_start + at for at in (case.places["b.0.weight"][0] + 5 * MiB, case.places["b.1.weight"][1])
    )
    assert not [(start, end) for start, end in read if start < last and end > first]


def test_long_runs_are_copied_by_several_requests(case: Case, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copied, "_PIECE_BYTES", 6 * MiB)
    assert across(case, store) == case.expected
    assert len(copied_ranges(store)) == 2  # of four: the others fill the parts of 5 MiB before them
    assert store.unfinished() == []


def test_each_upload_of_several_shards_is_a_copy(case: Case, store: Store, tmp_path: Path) -> None:
    options = {**case.options, "max_shard_size": 12 * MiB}
    tierewrite.rewrite(case.src, tmp_path / "expected", **options)
    assert across(case, store, **options, verify=True) == files(tmp_path / "expected")
    assert len({request.name for request in store.asked("copy")}) == 2


def test_ties_that_are_not_confirmed_are_never_copied(case: Case, store: Store, tmp_path: Path) -> None:
    ties = tmp_path / "ties.json"
    ties.write_text('{"c.weight": "f.weight", "d.weight": "b.1.weight", "e.weight": "g.weight"}')
    place = case.places["d.weight"][0] + case.data_start
    data = bytearray((case.src / SHARD).read_bytes())
    data[place] ^= 1
    store.put(f"src/{SHARD}", bytes(data))
    with pytest.raises(tierewrite.Refused, match=r"d\.weight"):
        across(case, store, ties=ties)
    assert store.asked("copy", "create", "part") == []
    (tmp_path / "src").mkdir()
    for name, content in store.objects("src").items():
        (tmp_path / "src" / name).write_bytes(content)
    tierewrite.rewrite(tmp_path / "src", tmp_path / "expected", ties=ties, on_mismatch="keep")
    assert across(case, store, ties=ties, on_mismatch="keep") == files(tmp_path / "expected")
    assert len(store.asked("copy")) == 2


def test_object_that_is_replaced_before_it_is_copied_is_refused(case: Case, store: Store) -> None:
    data = bytearray((case.src / SHARD).read_bytes())
    data[-1] ^= 1

    def strike(request: Request) -> None:
        if of("copy")(request):
            store.put(f"src/{SHARD}", bytes(data))

    store.before = strike
    with pytest.raises(tierewrite.SourceChanged) as error:
        across(case, store)
    assert error.value.file == store.url(f"src/{SHARD}")
    assert [request.status for request in store.asked("copy")] == [412]
    assert store.objects() == {}
    assert store.unfinished() == []


def test_object_that_is_removed_before_it_is_copied_is_refused(case: Case, store: Store) -> None:
    def strike(request: Request) -> None:
        if of("copy")(request):
            store.client.delete_object(Bucket=store.bucket, Key=f"src/{SHARD}")

    store.before = strike
    with pytest.raises(tierewrite.SourceChanged) as error:
        across(case, store)
    assert error.value.file == store.url(f"src/{SHARD}")
    assert store.objects() == {}
    assert store.unfinished() == []


@pytest.mark.parametrize(("status", "code"), [(501, "NotImplemented"), (403, "AccessDenied")])
def test_store_that_refuses_to_copy_is_asked_once_and_gets_the_bytes(
    status: int, code: str, case: Case, store: Store
) -> None:
    store.faults.append(Fault(of("copy"), (status, code), EVER))
    assert across(case, store) == case.expected
    assert len(store.asked("copy")) == 1
    assert sum(request.received for request in store.asked("part")) == len(case.expected[SHARD])


@pytest.mark.parametrize(
    "how", ["cut", "lost", LATER((503, "SlowDown")), LATER((500, "InternalError")), LATER((429, "TooManyRequests"))]
)
def test_copy_that_fails_twice_is_taken_up_again(how: Any, case: Case, store: Store) -> None:
    store.faults.append(Fault(of("copy"), how, 2))
    assert across(case, store) == case.expected
    assert store.faults[0].times == 0
    assert store.unfinished() == []


@pytest.mark.parametrize(
    ("op", "how"), [("copy", "cut"), LATER("copy", (500, "InternalError")), LATER("complete", "cut")]
)
def test_copy_that_always_fails_leaves_nothing(
    op: str, how: Any, case: Case, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    store.faults.append(Fault(of(op), how, EVER))
    with pytest.raises(tierewrite.SystemFailure) as error:
        across(case, store)
    assert store.url("out") in str(error.value)
    assert store.objects() == {}
    assert store.unfinished() == []


def run_until(case: Case, store: Store, op: str, signum: int) -> int:
    """The exit code of a process that gets a signal when it asks for `op`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tierewrite", "rewrite", store.url("src"), store.url("out"), *case.words],
        env={**os.environ, "PYTHONPATH": str(FIXTURES.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )

    def strike(request: Request) -> bool:
        if request.op == op and process.poll() is None:
            process.send_signal(signum)
            return signum == signal.SIGKILL
        return False

    store.before = strike
    process.communicate(timeout=120)
    store.before = lambda request: None
    return process.returncode


@pytest.mark.parametrize("op", ["copy", LATER("complete")])
def test_signal_while_the_store_copies_leaves_nothing(op: str, case: Case, store: Store) -> None:
    assert run_until(case, store, op, signal.SIGTERM) == 128 + signal.SIGTERM
    assert store.objects() == {}
    assert store.unfinished() == []


@pytest.mark.parametrize("op", [LATER("create"), "copy", LATER("complete")])
def test_kill_while_the_store_copies_is_resumed(op: str, case: Case, store: Store) -> None:
    assert run_until(case, store, op, signal.SIGKILL) == -signal.SIGKILL
    assert across(case, store, resume=True) == case.expected


@pytest.mark.parametrize("settings", [{"fixed_upload_size": True}, None])
def test_only_a_store_that_can_is_asked(
    settings: dict[str, Any] | None, case: Case, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R2 wants all parts of an upload of one size; and no store copies from another."""
    if settings is not None:
        monkeypatch.setitem(fsspec.config.conf, "s3", settings)
    src = located(store.url(f"src/{SHARD}")) if settings is not None else located(case.src / SHARD)
    out = located(store.url("out"))
    assert store_of(out).copying([store_of(src).stamp(src)], out, 0) is None
