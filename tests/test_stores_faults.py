"""What goes wrong between us and a store: connections, refusals, changes underfoot, kills; and what nobody may see.

Nothing here sleeps and hopes: the proxy before the store (tests/s3_server.py) strikes at the request that was named.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import tierewrite
from tests.checkpoints import FIXTURES, write_checkpoint
from tests.s3_server import KEY_ID, SECRET, Fault, Request, Store, of
from tests.test_stores import Files, files, kept
from tierewrite.errors import Interrupted
from tierewrite.output import store_staging
from tierewrite.source.folder import open_folder
from tierewrite.source.table import INCOMPLETE_NAME, INDEX_NAME
from tierewrite.stores import remote

ROOT = FIXTURES.parent
MiB = 1 << 20
EVER = 1_000_000
TRIES = 40  # s3fs tries a request five times; a few requests are under way at once
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
LATE = ["config.json", "hf_quant_config.json", INDEX_NAME]


class Case:
    """A checkpoint of ours and what becomes of it: three shards, the first of them large enough for parts."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        tied, alone = rng.bytes(3 * MiB), rng.bytes(12 * MiB)
        tensors = {
            "a.weight": ("U8", [len(alone)], alone),
            "b.weight": ("U8", [len(tied)], tied),
            "c.weight": ("U8", [len(tied)], tied),
            **{f"d.{i}.weight": ("U8", [MiB], rng.bytes(MiB)) for i in range(3)},
        }
        self.src = write_checkpoint(folder / "src", tensors, {"model_type": "none"})
        (self.src / "hf_quant_config.json").write_text("{}")
        (self.src / "tokenizer").mkdir()
        (self.src / "tokenizer" / "vocab.txt").write_text("a b c")
        (folder / "ties.json").write_text('{"c.weight": "b.weight"}')
        self.options: dict[str, Any] = {"ties": folder / "ties.json", "max_shard_size": 4 * MiB}
        self.words = ["--ties", str(folder / "ties.json"), "--max-shard-size", str(4 * MiB), "-q"]
        tierewrite.rewrite(self.src, folder / "expected", **self.options)
        self.expected = files(folder / "expected")
        assert [name for name in sorted(self.expected) if name in SHARDS] == SHARDS


@pytest.fixture(scope="session")
def session_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("stores"))


@pytest.fixture
def case(session_case: Case, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(remote, "_PART_BYTES", 5 * MiB)
    return session_case


@pytest.fixture
def impatient(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore's own setting; s3fs tries five times all the same."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


def up(case: Case, store: Store, **options: Any) -> Files:
    """A rewrite from here into the store."""
    tierewrite.rewrite(case.src, store.url("out"), **{**case.options, **options})
    return store.objects()


def down(case: Case, store: Store, folder: Path) -> Files:
    """A rewrite from the store to here."""
    if not store.objects("src"):
        store.upload(case.src)
    tierewrite.rewrite(store.url("src"), folder / "out", **case.options)
    return files(folder / "out")


# --- connections


SLOW_DOWN, TOO_MANY, BROKEN = (503, "SlowDown"), (429, "TooManyRequests"), (500, "InternalError")


@pytest.mark.parametrize(
    ("op", "how"),
    [
        *(("put", how) for how in ("cut", "lost", SLOW_DOWN, TOO_MANY, BROKEN)),
        *(("part", how) for how in ("cut", "lost", SLOW_DOWN, TOO_MANY, BROKEN)),
        *(("complete", how) for how in ("cut", "lost", SLOW_DOWN)),
        *((op, how) for op in ("create", "delete") for how in ("cut", "lost")),
        ("list", "cut"),
    ],
)
def test_upload_that_fails_twice_is_taken_up_again(op: str, how: Any, case: Case, store: Store) -> None:
    store.faults.append(Fault(of(op), how, 2))
    assert up(case, store) == case.expected
    assert store.faults[0].times == 0
    # Of an upload that was begun, but the answer lost, nobody knows the number: the bucket's lifecycle rule removes it.
    assert len(store.unfinished()) == (2 if (op, how) == ("create", "lost") else 0)


@pytest.mark.parametrize(
    ("op", "how"),
    [("get", "cut"), ("get", SLOW_DOWN), ("get", TOO_MANY), ("get", BROKEN), ("head", "cut"), ("head", BROKEN),
     ("list", "cut")],
)  # fmt: skip
def test_download_that_fails_twice_is_taken_up_again(
    op: str, how: Any, case: Case, store: Store, tmp_path: Path
) -> None:
    store.faults.append(Fault(of(op, "" if op == "list" else "model.safetensors"), how, 2))
    assert down(case, store, tmp_path) == case.expected
    assert store.faults[0].times == 0


@pytest.mark.parametrize(
    ("op", "how"),
    [("put", "cut"), ("put", BROKEN), ("create", "cut"), *(("part", how) for how in ("cut", SLOW_DOWN, BROKEN)),
     ("complete", "cut"), ("list", "cut")],
)  # fmt: skip
@pytest.mark.usefixtures("impatient")
def test_upload_that_always_fails_leaves_nothing(op: str, how: Any, case: Case, store: Store) -> None:
    of_shard = "" if op == "list" else "-of-00003.safetensors"
    store.faults.append(Fault(of(op, of_shard), how, EVER))
    with pytest.raises(tierewrite.SystemFailure) as error:
        up(case, store)
    assert EVER - store.faults[0].times <= TRIES
    assert store.url("out") in str(error.value)
    assert error.value.exit_code == 5
    assert store.objects() == {}
    assert store.unfinished() == []
    store.faults.clear()
    assert up(case, store) == case.expected


@pytest.mark.parametrize(
    ("op", "how"), [*(("get", how) for how in ("cut", SLOW_DOWN, BROKEN)), ("head", "cut"), ("list", "cut")]
)
@pytest.mark.usefixtures("impatient")
def test_download_that_always_fails_leaves_nothing(op: str, how: Any, case: Case, store: Store, tmp_path: Path) -> None:
    store.faults.append(Fault(of(op, "" if op == "list" else "model.safetensors"), how, EVER))
    with pytest.raises(tierewrite.SystemFailure) as error:
        down(case, store, tmp_path)
    assert EVER - store.faults[0].times <= TRIES
    assert store.url("src") in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("impatient")
def test_store_that_goes_away_keeps_the_marker_and_a_next_run_goes_on(
    case: Case, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(remote, "_CLEANUP_SECONDS", 1)
    gone = Fault(lambda request: True, "cut", 0)

    def strike(request: Request) -> None:
        if of("put", SHARDS[2])(request):
            gone.times = EVER

    store.after = strike
    store.faults.append(gone)
    with pytest.raises(tierewrite.SystemFailure) as error:
        up(case, store, threads=1)
    assert EVER - gone.times <= TRIES
    assert store.url("out") in str(error.value)
    assert "--resume" in caplog.text
    assert INCOMPLETE_NAME in store.objects()
    gone.times = 0
    store.log.clear()
    assert up(case, store, resume=True) == case.expected
    assert not [r for r in store.log if r.writes and r.name.endswith(tuple(SHARDS))]


# --- refusals


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied"])
def test_wrong_credential_is_exit_5_with_advice(code: str, case: Case, store: Store, tmp_path: Path) -> None:
    store.upload(case.src)
    store.faults.append(Fault(lambda request: True, (403, code), EVER))
    src = store.url("src")
    for call in (lambda: up(case, store), lambda: down(case, store, tmp_path), lambda: tierewrite.plan(src)):
        with pytest.raises(tierewrite.SystemFailure, match="check the credentials") as error:
            call()
        assert error.value.file is not None
        assert error.value.file.startswith(f"s3://{store.bucket}/")
        assert SECRET not in str(error.value)
        assert KEY_ID not in str(error.value)


def test_key_that_may_only_read_is_told_so_and_leaves_nothing(case: Case, store: Store) -> None:
    for op in ("put", "create"):
        store.faults.append(Fault(of(op), (403, "AccessDenied"), EVER))
    with pytest.raises(tierewrite.SystemFailure, match="what they may do there"):
        up(case, store)
    assert store.objects() == {}


def test_no_credentials_at_all_is_exit_5_with_advice(case: Case, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(tierewrite.SystemFailure, match="check the credentials"):
        up(case, store)
    assert store.log == []


# --- changes underfoot


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer/vocab.txt", "hf_quant_config.json"])
@pytest.mark.parametrize(
    ("to", "change"), [("local", "other bytes"), ("local", "shorter"), ("local", "removed"), ("s3", "other bytes")]
)
def test_object_that_changes_while_it_is_read_is_noticed(
    to: str, change: str, name: str, case: Case, store: Store, tmp_path: Path
) -> None:
    src = store.upload(case.src)
    data = (case.src / name).read_bytes()
    looks = 1 if name.endswith(".txt") else 2  # the first was at the header, or for the copies

    def strike(request: Request) -> None:
        nonlocal looks
        if of("get", f"src/{name}")(request):
            looks -= 1
            if looks == 0 and change == "removed":
                store.client.delete_object(Bucket=store.bucket, Key=f"src/{name}")
            elif looks == 0:
                store.put(f"src/{name}", data[:-1] if change == "shorter" else data[:-1] + bytes([data[-1] ^ 1]))

    store.before = strike
    dst = tmp_path / "out" if to == "local" else store.url("out")
    with pytest.raises(tierewrite.SourceChanged) as error:
        tierewrite.rewrite(src, dst, **case.options)
    assert error.value.file == f"{src}/{name}"
    assert error.value.exit_code == 5
    assert store.objects() == {}
    assert not (tmp_path / "out").exists()


# --- the commit


def test_order_of_writes_is_marker_shards_others_configs_index(case: Case, store: Store) -> None:
    assert up(case, store) == case.expected
    writes = [r for r in store.log if r.writes]
    names = [r.name.removeprefix("out/") for r in writes]
    assert (writes[0].op, names[0]) == ("put", INCOMPLETE_NAME)
    assert (writes[-1].op, names[-1]) == ("delete", INCOMPLETE_NAME)
    assert names[-4:-1] == LATE
    middle = list(dict.fromkeys(names[1:-4]))
    assert sorted(middle[:3]) == SHARDS
    assert sorted(middle[3:]) == ["tierewrite.json", "tokenizer/vocab.txt"]
    assert [r.op for r in writes if r.name.endswith(SHARDS[0])] == ["create", "part", "part", "complete"]
    assert {r.op for r in writes[1:-1] if not r.name.endswith(SHARDS[0])} == {"put"}


def test_failed_rewrite_leaves_nothing(case: Case, store: Store, tmp_path: Path) -> None:
    refuted = tmp_path / "ties.json"
    refuted.write_text('{"d.0.weight": "d.1.weight"}')
    with pytest.raises(tierewrite.Refused):
        up(case, store, ties=refuted)
    assert store.asked("complete", ending=".safetensors")  # it had got as far as that
    with pytest.raises(tierewrite.NotReady):
        up(case, store, consumer="vllm")
    assert store.objects() == {}
    assert store.unfinished() == []


def test_committed_checkpoint_is_never_overwritten(case: Case, store: Store) -> None:
    up(case, store)
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(tierewrite.UsageError, match="choose another place"):
            up(case, store, **options)
    assert store.objects() == case.expected


def theirs(store: Store) -> bytes:
    text = b'{"run": "another"}'
    store.put(f"out/{INCOMPLETE_NAME}", text)
    return text


def test_two_runs_that_start_together_do_not_mix(case: Case, store: Store) -> None:
    def strike(request: Request) -> None:
        if of("put", INCOMPLETE_NAME)(request):
            theirs(store)

    store.before = strike
    with pytest.raises(tierewrite.UsageError, match="another run"):
        up(case, store)
    assert store.objects() == {INCOMPLETE_NAME: theirs(store)}


def test_run_whose_place_another_took_over_stops_and_touches_nothing(case: Case, store: Store) -> None:
    def strike(request: Request) -> None:
        if of("put", "tierewrite.json")(request):
            theirs(store)

    store.before = strike
    with pytest.raises(tierewrite.UsageError, match="another run"):
        up(case, store)
    assert store.objects().keys() == {*SHARDS, "tokenizer/vocab.txt", "tierewrite.json", INCOMPLETE_NAME}
    assert store.objects()[INCOMPLETE_NAME] == theirs(store)
    assert not store.asked("delete")


def run_until(case: Case, store: Store, number: int, signum: int = signal.SIGKILL) -> subprocess.Popen[str]:
    """A rewrite in a process of its own, which gets a signal instead of an answer to its write of that number."""
    code = "from tierewrite import cli; from tierewrite.stores import remote; remote._PART_BYTES = 5 << 20; cli.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "rewrite", str(case.src), store.url("out"), *case.words, "--threads", "1"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    left = number

    def strike(request: Request) -> bool:
        nonlocal left
        left -= request.writes
        if left == 0 and request.writes:
            process.send_signal(signum)
            return signum == signal.SIGKILL
        return False

    store.before = strike
    process.wait(120)
    store.before = lambda request: None
    return process


WRITES = [
    INCOMPLETE_NAME, *[SHARDS[0]] * 4, SHARDS[1], SHARDS[2], "tokenizer/vocab.txt", "tierewrite.json", *LATE,
    INCOMPLETE_NAME,
]  # fmt: skip


def half_written_is_refused_by_all(case: Case, store: Store, folder: Path) -> None:
    out = store.url("out")
    found = tierewrite.verify(case.src, out, **case.options)
    assert [(problem.id, problem.where) for problem in found.problems] == [("unreadable", out)]
    assert INCOMPLETE_NAME in found.problems[0].message
    copy = folder / "copy"
    for name, data in store.objects().items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(data)
    calls: list[Callable[[Any], object]] = [
        tierewrite.plan,
        tierewrite.inspect,
        tierewrite.check,
        tierewrite.report_page,
        lambda src: tierewrite.check(src, "transformers"),
        lambda src: tierewrite.rewrite(src, folder / "of-half", **case.options),
    ]
    for call in calls:
        for place in (out, copy):
            with pytest.raises(tierewrite.SourceError, match=INCOMPLETE_NAME) as error:
                call(place)
            assert error.value.file == str(place)
    with pytest.raises(tierewrite.SourceError, match=INCOMPLETE_NAME):
        open_folder(copy)
    assert not (folder / "of-half").exists()
    with pytest.raises(tierewrite.UsageError, match="resume=True") as usage:
        up(case, store)
    assert usage.value.exit_code == 2
    assert "overwrite=True" in str(usage.value)


@pytest.mark.parametrize("number", range(1, len(WRITES) + 1))
def test_kill_at_each_write_is_recognised_and_resumed(number: int, case: Case, store: Store, tmp_path: Path) -> None:
    assert run_until(case, store, number).returncode == -signal.SIGKILL
    seen = [r.name.removeprefix("out/") for r in store.log if r.writes]
    assert seen == WRITES[:number]
    left = store.objects()
    store.log.clear()
    if number == 1:
        assert left == {}
        assert up(case, store) == case.expected
        return
    assert INCOMPLETE_NAME in left
    if number == len(WRITES):  # complete, and only the marker was not removed
        assert {name: data for name, data in left.items() if name != INCOMPLETE_NAME} == case.expected
        found = tierewrite.verify(case.src, store.url("out"), **case.options)
        assert [problem.id for problem in found.problems] == ["unfinished"]
        with pytest.raises(tierewrite.UsageError, match="choose another place"):
            up(case, store, resume=True)
        return
    half_written_is_refused_by_all(case, store, tmp_path)
    assert store.objects() == left
    assert not [r for r in store.log if r.writes]
    overwritten = number % 3 == 0
    store.put("out/model-00009-of-00009.safetensors", b"of a run with other options")
    assert up(case, store, resume=not overwritten, overwrite=overwritten) == case.expected
    again = {r.name.removeprefix("out/") for r in store.log if r.op in ("put", "complete")}
    assert again.isdisjoint(left.keys() & set(SHARDS)) or overwritten
    assert again >= set(case.expected) - set(left)


def test_resume_writes_a_shard_anew_that_is_not_what_it_should_be(case: Case, store: Store) -> None:
    run_until(case, store, WRITES.index("tierewrite.json") + 1)
    data = bytearray(store.objects()[SHARDS[1]])
    data[-1] ^= 1
    store.put(f"out/{SHARDS[1]}", bytes(data))
    store.put("out/stray.txt", b"of a run with other options")
    store.log.clear()
    assert up(case, store, resume=True) == case.expected
    assert {r.name for r in store.log if r.writes and "safetensors" in r.name} == {
        f"out/{SHARDS[1]}",
        f"out/{INDEX_NAME}",
    }


@pytest.mark.parametrize(
    ("number", "signum"),
    [(1, signal.SIGTERM), (4, signal.SIGINT), (7, signal.SIGTERM), (8, signal.SIGINT), (11, signal.SIGTERM)],
)
def test_signal_leaves_nothing(number: int, signum: int, case: Case, store: Store) -> None:
    process = run_until(case, store, number, signum)
    assert process.returncode == 128 + signum
    assert store.objects() == {}
    assert store.unfinished() == []


@pytest.mark.parametrize("number", [len(WRITES) - 1, len(WRITES)], ids=["index", "marker"])
def test_signal_once_the_index_is_being_written_comes_too_late(number: int, case: Case, store: Store) -> None:
    assert run_until(case, store, number, signal.SIGTERM).returncode == 128 + signal.SIGTERM
    assert store.objects() == case.expected


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("method", "name"), [("pipe_file", INDEX_NAME), ("rm_file", INCOMPLETE_NAME)])
def test_signal_right_after_the_index_or_the_marker_changes_nothing(
    method: str, name: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the main thread is: with another process, only one that waits in a lock would be met."""
    do = getattr(MemoryFileSystem, method)

    def do_and_send(fs: MemoryFileSystem, path: str, *args: Any, **kwargs: Any) -> None:
        do(fs, path, *args, **kwargs)
        if path.endswith(name):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(MemoryFileSystem, method, do_and_send)
    with pytest.raises(Interrupted, match="the rewrite is complete"):
        tierewrite.rewrite(case.src, f"memory://late-{method}/out", **case.options)
    assert kept(f"memory://late-{method}/out") == case.expected


# --- what nobody may see


CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIASECRETINENVIRON1",
    "AWS_SECRET_ACCESS_KEY": "secret/in+the=environment",
    "AWS_SESSION_TOKEN": "TokenInTheEnvironment==",
}
CONFIGURED = {"key": "AKIASECRETINFSSPEC01", "secret": "secret/of+fsspecs=settings", "token": "TokenOfFsspec=="}
IN_URL = ("KeyInTheUrl01", "SecretInTheUrl02")


def outputs(folder: Path, *arguments: str, **settings: str) -> str:
    """All that a command says or writes at its most talkative, with its exit code first."""
    done = subprocess.run(
        [sys.executable, "-m", "tierewrite", "-vv", *arguments, "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **settings},
        timeout=120,
        check=False,
    )
    written = [path.read_text(errors="replace") for path in folder.rglob("*") if path.suffix in (".json", ".html")]
    return "\n".join((f"exit {done.returncode}", done.stdout, done.stderr, *written))


def assert_silent(text: str, secrets: Mapping[str, str]) -> None:
    for secret in secrets.values():
        assert secret not in text
    assert "Signature=" not in text
    assert "AWS4-HMAC" not in text


@pytest.mark.parametrize("where", ["environment", "fsspec"])
def test_credentials_are_in_no_output(where: str, case: Case, store: Store, tmp_path: Path) -> None:
    src, out = store.upload(case.src), store.url("out")
    settings, secrets = CREDENTIALS, CREDENTIALS
    if where == "fsspec":
        (tmp_path / "fsspec").mkdir()
        (tmp_path / "fsspec" / "s3.ini").write_text("[s3]\n" + "".join(f"{k} = {v}\n" for k, v in CONFIGURED.items()))
        settings = {"FSSPEC_CONFIG_DIR": str(tmp_path / "fsspec")}
        secrets = CONFIGURED
    store.key_ids = {KEY_ID, secrets.get("key", secrets.get("AWS_ACCESS_KEY_ID", ""))}
    folder = tmp_path / "out"
    folder.mkdir()
    words = case.words[:-1]
    for arguments in (
        ["rewrite", src, out, *words],
        ["verify", src, out, *words],
        ["report", out, "--html", str(folder / "report.html")],
    ):
        said = outputs(folder, *arguments, **settings)
        assert said.startswith("exit 0"), said
        assert_silent(said, secrets)
    for data in store.objects().values():
        assert_silent(data.decode(errors="replace"), secrets)
    # A server that repeats what it was told.
    for name, secret in secrets.items():
        store.faults[:] = [Fault(lambda request: True, (403, f"AccessDenied: {name} {secret}"), EVER)]
        said = outputs(folder, "plan", src, **settings)
        assert said.startswith("exit 5"), said
        assert "AccessDenied" in said
        assert_silent(said, secrets)


def test_credentials_in_a_url_are_in_no_output(case: Case, store: Store, tmp_path: Path) -> None:
    secrets = {"key": IN_URL[0], "secret": IN_URL[1]}
    there = f"s3://{IN_URL[0]}:{IN_URL[1]}@{store.bucket}"
    for arguments in (
        ["plan", f"{there}/src"],
        ["rewrite", str(case.src), f"{there}/out", *case.words],
        ["rewrite", f"{there}/src", str(tmp_path / "out"), *case.words],
        ["plan", f"s3://{store.bucket}/src?X-Amz-Signature={IN_URL[1]}&X-Amz-Credential={IN_URL[0]}"],
        ["plan", f"nosuch://{IN_URL[0]}:{IN_URL[1]}@host/src"],
        ["rewrite", f"{there}/src", "--in-place"],
    ):
        said = outputs(tmp_path, *arguments)
        assert said.split("\n")[0] in ("exit 2", "exit 5"), said
        assert_silent(said, secrets)
        assert "***" in said


def test_credentials_in_a_url_are_in_no_report_or_manifest(case: Case) -> None:
    # A file system that takes the user of its URL, as those over ssh and ftp do.
    there = f"memory://{IN_URL[0]}:{IN_URL[1]}@host"
    folder = remote.RemotePath(f"{there}/src")
    for name, data in files(case.src).items():
        (folder / name).write_bytes(data)
    try:
        report = tierewrite.rewrite(folder.url, f"{there}/out", verify=True, **case.options)
        texts = [json.dumps(report.to_json()), repr(report)]
        texts += [(remote.RemotePath(f"{there}/out") / "tierewrite.json").read_bytes().decode()]
        texts += [json.dumps(tierewrite.inspect(f"{there}/out", declared=False).to_json())]
        texts += [json.dumps(tierewrite.check(f"{there}/out").to_json())]
        texts += [tierewrite.report_page(f"{there}/out").html()]
        for call in (
            lambda: tierewrite.rewrite(folder.url, f"{there}/out", **case.options),
            lambda: tierewrite.plan(f"{there}/nothing"),
            lambda: tierewrite.rewrite(folder.url, in_place=True),
        ):
            with pytest.raises(tierewrite.TierewriteError) as error:
                call()
            texts += [str(error.value), repr(error.value), json.dumps(error.value.to_json())]
            assert error.value.__cause__ is None
        for text in texts:
            assert_silent(text, {"key": IN_URL[0], "secret": IN_URL[1]})
        assert sum("***@host" in text for text in texts) >= 6
    finally:
        MemoryFileSystem.store.clear()


def test_exceptions_do_not_show_what_caused_them(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    import traceback

    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    store.key_ids = {CREDENTIALS["AWS_ACCESS_KEY_ID"]}
    store.faults.append(Fault(lambda r: True, (403, f"Denied {CREDENTIALS['AWS_SECRET_ACCESS_KEY']}"), EVER))
    with pytest.raises(tierewrite.SystemFailure, match=r"Denied \*\*\*") as error:
        tierewrite.plan(store.url("src"))
    assert_silent("".join(traceback.format_exception(error.value)), CREDENTIALS)
    assert_silent(repr(error.value.args), CREDENTIALS)


def test_marker_says_what_it_is(case: Case, store: Store) -> None:
    run_until(case, store, 3)
    text = json.loads(store.objects()[INCOMPLETE_NAME])
    assert text["schema"] == store_staging.INCOMPLETE_SCHEMA
    assert text.keys() == {"schema", "run", "note"}
