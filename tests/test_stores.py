"""Checkpoints in object stores: equal bytes in every direction, few requests, and what is refused.

Against moto's S3 server behind a proxy that counts (tests/s3_server.py), and fsspec's memory:// for the rest. What goes
wrong on the way is in test_stores_faults.py.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import tierewrite
from tests.checkpoints import FIXTURES, edit_tensors, read_header, read_shard, write_checkpoint
from tests.hub_server import Hub, Repo
from tests.s3_server import Store
from tests.test_hub import Client
from tests.test_memory import large as sparse
from tierewrite.stores import remote

ROOT = FIXTURES.parent
MiB = 1 << 20
CASES = sorted(path.parent.name for path in FIXTURES.glob("*/right_answer.json"))
Naive = Callable[[str], Path]
Copied = Callable[[str], Path]
Files = dict[str, bytes]


def files(folder: Path) -> Files:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def headers_end(path: Path) -> int:
    return read_header(path)[1]


def large(folder: Path) -> dict[str, Any]:
    """A checkpoint of two shards with tensors larger than a buffer; returns the options that rewrite it."""
    rng = np.random.default_rng(0)
    tied, alone, other = (rng.bytes(n * MiB + 5) for n in (11, 17, 9))
    tensors = {
        "a.weight": ("U8", [len(tied)], tied),
        "b.weight": ("U8", [len(tied)], tied),
        "c.weight": ("U8", [len(alone)], alone),
        "d.weight": ("U8", [len(other)], other),
        **{f"e.{i}.weight": ("U8", [4096], rng.bytes(4096)) for i in range(40)},
    }
    write_checkpoint(folder, tensors, {"model_type": "none"}, shards=2)
    ties = folder.parent / "ties.json"
    ties.write_text('{"b.weight": "a.weight"}')
    return {"ties": ties}


def one_scale_missing(folder: Path) -> dict[str, Any]:
    lost = "layers.1.experts.2.down_proj.input_scale"
    edit_tensors(folder, {f"{side}.{lost}": None for side in ("model.encoder.language_model", "model.decoder")})
    return {"fill_missing_scales": True}


def with_folders(folder: Path) -> dict[str, Any]:
    for name in ("tokenizer/vocab.txt", "tokenizer/more/merges.txt", "a name with ümlauts & 100%+#.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "empty.txt").touch()
    return {}


SOURCES: dict[str, tuple[str, Callable[[Path], dict[str, Any]]]] = {
    "several shards": ("dg_nvfp4_sharded", lambda folder: {}),
    "re-encoding": ("dg_nvfp4", lambda folder: {"unify_fused_scales": True, "max_shard_size": 200_000}),
    "a scale filled in": ("dg_nvfp4", one_scale_missing),
    "files in folders": ("qwen3_tied_bf16", with_folders),
    "tensors larger than a buffer": ("", large),
}


@pytest.mark.parametrize("what", SOURCES)
def test_bytes_are_those_of_a_local_rewrite_in_every_direction(
    what: str, copied: Copied, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_PART_BYTES", 5 * MiB)
    case, change = SOURCES[what]
    src = copied(case) if case else tmp_path / "large"
    options = change(src)
    tierewrite.rewrite(src, tmp_path / "expected", **options)
    expected = files(tmp_path / "expected")
    there = store.upload(src)
    tierewrite.rewrite(there, tmp_path / "down", **options)
    assert files(tmp_path / "down") == expected
    tierewrite.rewrite(src, store.url("up"), **options)
    assert store.objects("up") == expected
    tierewrite.rewrite(there, store.url("across"), verify=True, **options)
    assert store.objects("across") == expected
    assert store.unfinished() == []


def test_large_shard_is_uploaded_in_parts_and_the_rest_whole(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_PART_BYTES", 5 * MiB)
    options = large(tmp_path / "src")
    tierewrite.rewrite(tmp_path / "src", store.url("out"), **options)
    sizes = {name: len(data) for name, data in store.objects().items()}
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        parts = store.asked("part", ending=name)
        assert len(parts) > 1
        assert sum(part.received for part in parts) == sizes[name]
        assert all(5 * MiB <= part.received < 5 * MiB + 8 * MiB for part in parts[:-1])
        assert [len(store.asked(op, ending=name)) for op in ("create", "complete", "abort", "put")] == [1, 1, 0, 0]
    assert {r.name.partition("/")[2] for r in store.asked("put")} == {
        *(name for name in sizes if not name.endswith(".safetensors")),
        "tierewrite.incomplete.json",
    }


# --- requests and bytes


def test_plan_reads_the_listing_the_configs_and_the_headers_only(naive: Naive, store: Store) -> None:
    src = store.upload(naive("dg_nvfp4_sharded"))
    plan = tierewrite.plan(src)
    assert plan.to_json() == tierewrite.plan(naive("dg_nvfp4_sharded")).to_json()
    shards = sorted(path.name for path in naive("dg_nvfp4_sharded").glob("*.safetensors"))
    size = {path.name: path.stat().st_size for path in naive("dg_nvfp4_sharded").iterdir()}
    asked = sorted((r.op, r.name, r.range) for r in store.log)
    configs = ("config.json", "generation_config.json", "hf_quant_config.json", "model.safetensors.index.json")
    assert asked == sorted(
        [
            ("list", "src", ""),
            *(("get", f"src/{name}", "") for name in configs),
            *(("get", f"src/{name}", f"bytes=0-{min(size[name], 100_000) - 1}") for name in shards),
        ]
    )
    assert sum(r.sent for r in store.asked("get")) == sum(
        min(size[name], 100_000) if name in shards else size[name] for name in (*configs, *shards)
    )


def test_header_longer_than_the_first_read_is_read_to_its_end_and_no_further(store: Store, tmp_path: Path) -> None:
    names = [f"model.layers.{i}.mlp.{'very_' * 8}long_name.weight" for i in range(1500)]
    folder = write_checkpoint(tmp_path / "src", {name: ("F32", [64], bytes(256)) for name in names})
    end = headers_end(folder / "model.safetensors")
    assert end > 100_000
    found = tierewrite.inspect(store.upload(folder), declared=False)
    assert {tensor.name for tensor in found.checkpoint.tensors.values()} == set(names)
    assert [r.range for r in store.asked("get")] == ["bytes=0-99999", f"bytes=100000-{end - 1}"]


def spans(store: Store, name: str) -> list[tuple[int, int]]:
    """What was read of an object, without the first look at its header."""
    found = [r.range.removeprefix("bytes=").split("-") for r in store.asked("get", ending=name)]
    return sorted((int(start), int(end) + 1) for start, end in found if start != "0")


@pytest.mark.parametrize("to", ["local", "s3"])
def test_each_byte_is_read_once_and_neighbours_together(to: str, store: Store, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    big = rng.bytes(3 * MiB)
    tensors = {
        "a.weight": ("U8", [len(big)], big),
        "b.weight": ("U8", [len(big)], big),  # tied to a: hashed, and not written
        **{f"c.{i}.weight": ("U8", [MiB // 4], rng.bytes(MiB // 4)) for i in range(8)},
        "d.weight": ("U8", [len(big)], big),  # tied to a as well
        **{f"e.{i}.weight": ("U8", [MiB // 4], rng.bytes(MiB // 4)) for i in range(8)},
    }
    folder = write_checkpoint(tmp_path / "src", tensors)
    path = folder / "model.safetensors"
    ties = tmp_path / "ties.json"
    ties.write_text('{"b.weight": "a.weight", "d.weight": "a.weight"}')
    src = store.upload(folder)
    tierewrite.rewrite(src, store.url("out") if to == "s3" else tmp_path / "out", ties=ties)
    read = spans(store, "src/model.safetensors")
    assert read[0][0] == headers_end(path)
    assert read[-1][1] == path.stat().st_size
    assert all(one[1] == two[0] for one, two in itertools.pairwise(read))  # all of it, and nothing twice
    assert len(read) <= 5
    assert len(store.asked("head", ending="src/model.safetensors")) <= 2


def test_dropped_bytes_that_need_no_digest_are_not_read(store: Store, tmp_path: Path) -> None:
    tensors = {
        "a.weight": ("U8", [MiB], bytes(MiB)),
        "unlisted.weight": ("U8", [3 * MiB], bytes(3 * MiB)),
        "z.weight": ("U8", [MiB], bytes(MiB)),
    }
    folder = write_checkpoint(tmp_path / "src", tensors)
    index = {"weight_map": {"a.weight": "model.safetensors", "z.weight": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "ties.json").write_text('{"z.weight": "a.weight"}')
    src = store.upload(folder)
    tierewrite.rewrite(src, tmp_path / "out", ties=tmp_path / "ties.json", ignore_unindexed=True)
    base = headers_end(folder / "model.safetensors")
    assert spans(store, "src/model.safetensors") == [(base, base + MiB), (base + 4 * MiB, base + 5 * MiB)]


@pytest.mark.parametrize(
    ("what", "requests"),
    [
        ("several shards", {"plan": 8, "down": 23, "up": 17, "across": 48, "verify": 44}),
        ("tensors larger than a buffer", {"plan": 5, "down": 20, "up": 18, "across": 42, "verify": 35}),
    ],
)
def test_requests_and_bytes_are_few(
    what: str, requests: dict[str, int], copied: Copied, store: Store, tmp_path: Path
) -> None:
    case, change = SOURCES[what]
    src = copied(case) if case else tmp_path / "large"
    options = change(src)
    there, ties = store.upload(src), {name: value for name, value in options.items() if name == "ties"}
    total = sum(path.stat().st_size for path in src.iterdir())
    # Every header is looked at first, with up to 100,000 bytes; scales and configurations are read twice.
    most = total + 100_000 * len(list(src.glob("*.safetensors"))) + 300_000
    runs: dict[str, tuple[Callable[[], object], int]] = {
        "plan": (lambda: tierewrite.plan(there, **ties), 400_000),
        "down": (lambda: tierewrite.rewrite(there, tmp_path / "down", **options), most),
        "up": (lambda: tierewrite.rewrite(src, store.url("up"), **options), 4096),
        "across": (lambda: tierewrite.rewrite(there, store.url("across"), **options), most),
        "verify": (lambda: tierewrite.verify(there, store.url("across"), ties=ties.get("ties")), 2 * most),
    }
    print(f"{what}: {total:,} bytes")
    for name, (run, bound) in runs.items():
        store.log.clear()
        run()
        sent, received = sum(r.sent for r in store.log), sum(r.received for r in store.log)
        print(f"{name}: {len(store.log)} requests, {sent:,} bytes read, {received:,} written")
        assert len(store.log) <= requests[name]
        assert sent <= bound


# --- the other commands


def client(store: Store, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """tierewrite's command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "tierewrite", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **settings},
        timeout=300,
        check=False,
    )


def test_every_command_takes_urls(naive: Naive, store: Store, tmp_path: Path) -> None:
    case = naive("dg_nvfp4_sharded")
    src, out = store.upload(case), store.url("out")
    report = tierewrite.rewrite(src, out, consumer="vllm", verify=True, kv_scales="merge", unify_fused_scales=True)
    assert (report.src, report.dst) == (src, out)
    tierewrite.rewrite(case, tmp_path / "out", consumer="vllm", kv_scales="merge", unify_fused_scales=True)
    assert store.objects() == files(tmp_path / "out")
    options = {"kv_scales": "merge", "unify_fused_scales": True, "fix_ignore": True}
    here = tierewrite.verify(case, tmp_path / "out", **options)
    assert tierewrite.verify(src, out, **options).to_json() == here.to_json()
    there, here = tierewrite.check(out, "vllm"), tierewrite.check(tmp_path / "out", "vllm")
    assert {**there.to_json(), "checkpoint": ""} == {**here.to_json(), "checkpoint": ""}
    assert there.to_json()["checkpoint"] == out
    one, two = (tierewrite.report_page(place, "vllm").facts.to_json() for place in (out, tmp_path / "out"))
    assert one.keys() == two.keys()
    assert [key for key in one if one[key] != two[key]] in ([], ["readiness", "consumers"])
    told, known = tierewrite.inspect(src).to_json(), tierewrite.inspect(case).to_json()
    assert told.pop("root") == src
    assert known.pop("root") == str(case)
    assert told == known
    store.put("out/tokenizer.json", b"another")
    assert [problem.where for problem in tierewrite.verify(src, out, **options).problems] == ["tokenizer.json"]


def test_command_line_takes_urls(naive: Naive, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIEREWRITE_CACHE", str(tmp_path / "answers"))
    src, out = store.upload(naive("qwen3_tied_bf16")), store.url("out")
    written = client(store, "rewrite", src, out, "--json", "--verify")
    assert (written.returncode, written.stderr) == (0, "")
    assert json.loads(written.stdout)["dst"] == out
    tierewrite.rewrite(naive("qwen3_tied_bf16"), tmp_path / "out")
    assert store.objects() == files(tmp_path / "out")
    proved = client(store, "verify", src, out)
    assert proved.returncode == 0, proved
    shown = client(store, "report", out, "--html", str(tmp_path / "report.html"), "--for", "vllm")
    assert shown.returncode == 0, shown
    assert "<html" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("command", ["rewrite", "plan", "verify", "inspect", "check", "report"])
def test_help_says_that_urls_are_taken(command: str) -> None:
    from click.testing import CliRunner

    from tierewrite.cli.commands import cli

    assert "s3://" in CliRunner().invoke(cli, [command, "--help"]).output


# --- memory://: every fixture


@pytest.fixture
def memory() -> Callable[[str], str]:
    """Gives URLs of folders in memory of their own."""
    run = uuid.uuid4().hex
    return lambda name: f"memory://{run}/{name}"


def keep(folder: Path, url: str) -> str:
    for name, data in files(folder).items():
        remote.RemotePath(f"{url}/{name}").write_bytes(data)
    return url


def kept(url: str) -> Files:
    folder = remote.RemotePath(url)
    return {name: (folder / name).read_bytes() for name in remote.listing(folder)}


@pytest.mark.parametrize("case", [*CASES, "dg_nvfp4_encoder_bf16", "qwen3_tied_but_diverged_bf16"])
def test_memory_gives_the_bytes_of_a_local_rewrite(
    case: str, naive: Naive, memory: Callable[[str], str], tmp_path: Path
) -> None:
    options = {"on_mismatch": "error" if case in CASES else "keep"}
    tierewrite.rewrite(naive(case), tmp_path / "expected", **options)
    expected = files(tmp_path / "expected")
    src = keep(naive(case), memory("src"))
    tierewrite.rewrite(src, memory("out"), **options)
    assert kept(memory("out")) == expected
    tierewrite.rewrite(src, tmp_path / "down", **options)
    assert files(tmp_path / "down") == expected
    tierewrite.rewrite(naive(case), memory("up"), **options)
    assert kept(memory("up")) == expected
    assert tierewrite.verify(src, memory("up"), **options).ok


@pytest.mark.parametrize("case", ["dg_nvfp4_encoder_bf16", "qwen3_tied_but_diverged_bf16"])
def test_refused_checkpoint_leaves_nothing(case: str, naive: Naive, memory: Callable[[str], str]) -> None:
    with pytest.raises(tierewrite.Refused):
        tierewrite.rewrite(naive(case), memory("out"))
    assert kept(memory("out")) == {}


def test_tie_that_only_the_bytes_refute_leaves_nothing_or_is_kept(
    copied: Copied, memory: Callable[[str], str], tmp_path: Path
) -> None:
    src = copied("dg_nvfp4")
    name = "model.encoder.language_model.layers.1.experts.2.down_proj.weight"
    dtype, shape, data = read_shard(src / "model.safetensors")[0][name]
    edit_tensors(src, {name: (dtype, shape, data[:-1] + bytes([data[-1] ^ 0x10]))})
    with pytest.raises(tierewrite.Refused):
        tierewrite.rewrite(src, memory("out"))
    assert kept(memory("out")) == {}
    tierewrite.rewrite(src, memory("out"), on_mismatch="keep")
    tierewrite.rewrite(src, tmp_path / "out", on_mismatch="keep")
    assert kept(memory("out")) == files(tmp_path / "out")


def test_hub_through_its_own_file_system_is_read_by_ranges(naive: Naive, tmp_path: Path) -> None:
    with Hub() as hub:
        hub.repos["org/name"] = Repo({"main": naive("qwen3_tied_bf16")})
        written, planned, refused = Client(hub, tmp_path)(
            "rewrite hf://org/name out",
            "plan hf://org/name --json",
            "plan hf://org/nothing",
            HF_TOKEN="hf_secret",
        )
        shards = hub.shard_requests()
        tokens = {request.token for request in hub.log if "org/name" in request.path}
    assert (written.code, planned.code, refused.code) == (0, 0, 4), (written, planned, refused)
    tierewrite.rewrite(naive("qwen3_tied_bf16"), tmp_path / "here")
    assert files(tmp_path / "out") == files(tmp_path / "here")
    assert planned.json() == tierewrite.plan(naive("qwen3_tied_bf16")).to_json()
    header, data, again = (request.range for request in shards)
    assert header == again
    assert data.startswith(f"bytes={headers_end(naive('qwen3_tied_bf16') / 'model.safetensors')}-")
    assert tokens == {"hf_secret"}
    assert "hf_secret" not in "".join(done.out + done.err for done in (written, planned, refused))


# --- what is refused


def refused(call: Callable[[], object], kind: type[Exception], *said: str) -> None:
    with pytest.raises(kind) as error:
        call()
    for text in said:
        assert text in str(error.value)


def test_places_that_cannot_be_written_to_are_refused(
    naive: Naive, memory: Callable[[str], str], tmp_path: Path
) -> None:
    case = naive("qwen3_tied_bf16")
    src = keep(case, memory("a/src"))
    for dst in (src, f"{src}/", memory("a/src/out"), memory("a"), src.replace("memory://", "memory:///")):
        refused(lambda dst=dst: tierewrite.rewrite(src, dst), tierewrite.UsageError, "SRC and DST")
    keep(case, memory("taken"))
    for options in ({}, {"overwrite": True}, {"resume": True}):
        refused(
            lambda options=options: tierewrite.rewrite(src, memory("taken"), **options),
            tierewrite.UsageError,
            memory("taken"),
            "config.json",
            "choose another place",
        )
    assert kept(memory("taken")) == files(case)
    refused(lambda: tierewrite.rewrite(src, in_place=True), tierewrite.UsageError, src, "name a DST")
    refused(lambda: tierewrite.plan(src, revision="main"), tierewrite.UsageError, "revision")
    assert kept(src) == files(case)


@pytest.mark.parametrize(
    "name", ["../up.txt", "a/../b.txt", "./c.txt", "a//b.txt", "back\\slash.txt", "a::b.txt", "a?versionId=1", "nul\0"]
)
def test_object_names_that_no_file_may_have_are_refused(
    name: str, naive: Naive, memory: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = keep(naive("qwen3_tied_bf16"), memory("src"))
    true = remote.listing
    monkeypatch.setattr("tierewrite.stores.mirror.listing", lambda folder: {**true(folder), name: {"size": 1}})
    refused(lambda: tierewrite.rewrite(src, tmp_path / "out"), tierewrite.SourceError, src, "rename that object")
    assert not (tmp_path / "out").exists()


def test_object_names_of_a_store_are_looked_at(naive: Naive, store: Store, tmp_path: Path) -> None:
    src = store.upload(naive("qwen3_tied_bf16"))
    store.put("src/a/../../b.txt", b"x")
    refused(lambda: tierewrite.rewrite(src, tmp_path / "out"), tierewrite.SourceError, src, "rename that object")


def test_url_of_nothing_is_exit_4(store: Store, memory: Callable[[str], str], tmp_path: Path) -> None:
    for url in (store.url("nothing"), "s3://there-is-no-such-bucket/src", memory("nothing")):
        for call in (tierewrite.plan, tierewrite.inspect, tierewrite.check, tierewrite.report_page):
            refused(lambda call=call, url=url: call(url), tierewrite.SourceError, url)
        refused(lambda url=url: tierewrite.rewrite(url, tmp_path / "out"), tierewrite.SourceError, url)
    assert not (tmp_path / "out").exists()


def test_missing_bucket_for_dst_is_exit_5(naive: Naive, store: Store) -> None:
    dst = "s3://there-is-no-such-bucket/out"
    refused(lambda: tierewrite.rewrite(naive("qwen3_tied_bf16"), dst), tierewrite.SystemFailure, dst, "make the bucket")


def test_kinds_of_file_system_that_are_not_there_are_exit_2(
    naive: Naive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for call in (lambda: tierewrite.plan("nosuch://a/b"), lambda: tierewrite.rewrite(naive("dg_fp8"), "nosuch://a/b")):
        refused(call, tierewrite.UsageError, "nosuch", "tierewrite[remote]")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    refused(lambda: tierewrite.plan("gs://bucket/src"), tierewrite.UsageError, "gs", "tierewrite[remote]")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    refused(lambda: tierewrite.plan("s3://bucket/src"), tierewrite.UsageError, "s3", "tierewrite[remote]")
    for url in ("s3://", "memory://", "file://"):
        refused(lambda url=url: tierewrite.plan(url), tierewrite.UsageError, url, "names no folder")
    refused(lambda: tierewrite.plan("s3://b/src?sig=abcdefgh"), tierewrite.UsageError, "s3://b/src?***", "query")


@pytest.mark.parametrize("scheme", ["file://", "local://"])
def test_url_of_this_machine_is_a_folder(scheme: str, copied: Copied, tmp_path: Path) -> None:
    src = copied("qwen3_tied_bf16")
    tierewrite.rewrite(src, tmp_path / "expected")
    tierewrite.rewrite(f"{scheme}{src}", f"{scheme}{tmp_path}/out", verify=True)
    assert files(tmp_path / "out") == files(tmp_path / "expected")
    assert tierewrite.verify(f"{scheme}{src}", f"{scheme}{tmp_path}/out").ok
    assert tierewrite.plan(f"{scheme}{src}").to_json() == tierewrite.plan(src).to_json()
    assert tierewrite.check(f"{scheme}{tmp_path}/out", "transformers").errors == ()
    tierewrite.rewrite(f"{scheme}{src}", in_place=True)
    assert files(src) == files(tmp_path / "expected")
    assert (src.parent / f"{src.name}.bak").is_dir()


@pytest.mark.parametrize("error", [NotImplementedError, TypeError, OSError(errno.ENOSYS, "NotImplemented")])
def test_store_that_cannot_promise_a_new_object_is_written_all_the_same(
    error: Any, naive: Naive, memory: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = MemoryFileSystem.pipe_file

    def pipe_file(self: MemoryFileSystem, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        if mode == "create":
            raise error
        true(self, path, value, mode, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
    tierewrite.rewrite(naive("qwen3_tied_bf16"), memory("out"))
    tierewrite.rewrite(naive("qwen3_tied_bf16"), tmp_path / "out")
    assert kept(memory("out")) == files(tmp_path / "out")


def test_error_of_a_file_that_cannot_be_discarded_is_told(
    naive: Naive, memory: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class File:
        def write(self, data: memoryview) -> None:
            raise OSError(errno.EDQUOT, "the quota is used up")

    true = MemoryFileSystem.open

    def opened(self: MemoryFileSystem, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        return File() if path.endswith(".safetensors") else true(self, path, mode, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "open", opened)
    refused(
        lambda: tierewrite.rewrite(naive("qwen3_tied_bf16"), memory("out")),
        tierewrite.SystemFailure,
        memory("out/model.safetensors"),
        "the quota is used up",
    )
    monkeypatch.undo()
    assert kept(memory("out")) == {}


# --- what it costs


def test_local_path_imports_no_file_system(tmp_path: Path) -> None:
    code = (
        "import sys; from tierewrite import cli; "
        "assert cli.run(['--help']) == 0; "
        "assert not [m for m in sys.modules if m.split('.')[0] in HEAVY | {'fsspec', 'transformers', 'torch'}]; "
        f"assert cli.run(['rewrite', {str(FIXTURES / 'qwen3_tied_bf16' / 'naive')!r}, {str(tmp_path / 'out')!r}, '-q',"
        f" '--ties', {str(tmp_path / 'ties.json')!r}]) == 0; "
        f"assert cli.run(['verify', {str(FIXTURES / 'qwen3_tied_bf16' / 'naive')!r}, {str(tmp_path / 'out')!r},"
        f" '--ties', {str(tmp_path / 'ties.json')!r}]) == 0; "
        "assert not [m for m in sys.modules if m.split('.')[0] in HEAVY | {'fsspec'}], sorted(sys.modules)"
    )
    heavy = {"s3fs", "gcsfs", "aiobotocore", "botocore", "aiohttp", "ray"}
    (tmp_path / "ties.json").write_text('{"lm_head.weight": "model.embed_tokens.weight"}')
    found = subprocess.run(
        [sys.executable, "-c", f"HEAVY = {heavy!r}; {code}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr


def peak(arguments: list[str]) -> int:
    """Peak resident bytes of a process of its own that runs the command line.

    Not getrusage's: a new process begins with the figure of the one that started it, and that one holds the store.
    """
    code = (
        "import re, sys; from pathlib import Path; from tierewrite import cli; "
        f"assert cli.run({arguments!r}) == 0; "
        "print(re.search(r'VmHWM:\\s*(\\d+) kB', Path('/proc/self/status').read_text())[1], file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, env=environment
    )
    return int(done.stderr.split()[-1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peak_is_far_below_a_file(store: Store, tmp_path: Path) -> None:
    ties = ["--ties", str(tmp_path / "ties.json"), "-q", "--threads", "2"]
    sparse(tmp_path / "small", 1)
    baseline = peak(["rewrite", store.upload(tmp_path / "small", "small"), store.url("small-out"), *ties])
    sparse(tmp_path / "src", 64)
    src = store.upload(tmp_path / "src")
    for arguments in (
        ["rewrite", src, str(tmp_path / "out"), *ties],
        ["rewrite", str(tmp_path / "src"), store.url("out"), *ties],
        ["verify", src, store.url("out"), "--json"],
    ):
        used = peak(arguments) - baseline
        print(f"{arguments[0]}: {used / MiB:.0f} MiB above the {baseline / MiB:.0f} MiB of a small one")
        assert used < 100 * MiB
    assert all(part.received < 32 * MiB for part in store.asked("part"))


def test_what_is_wrong_with_a_config_names_its_url(tmp_path: Path) -> None:
    source = FIXTURES / "qwen3_tied_bf16" / "naive"
    memory = MemoryFileSystem()
    for path in source.iterdir():
        memory.pipe_file(f"/wrong/{path.name}", path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    memory.pipe_file("/wrong/config.json", json.dumps({**config, "model_type": 7}).encode())
    for call in (
        lambda: tierewrite.plan("memory://wrong"),
        lambda: tierewrite.inspect("memory://wrong"),
        lambda: tierewrite.verify("memory://wrong", "memory://wrong"),
        lambda: tierewrite.rewrite("memory://wrong", tmp_path / "out"),
    ):
        with pytest.raises(tierewrite.ConfigError, match="model_type") as error:
            call()
        assert error.value.file == "memory://wrong/config.json"
