"""`stream` gives what `rewrite` writes: the same tensors, the same refusals, in bounded memory."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import threading
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import tierewrite
from tests.checkpoints import FIXTURES, Tensor, read_tensors, write_checkpoint, write_sparse_shard
from tierewrite.errors import NotReady, Refused, SourceChanged, TierewriteError, UsageError
from tierewrite.output.unwritten import UnwrittenOutput
from tierewrite.source.dtypes import TORCH_OF_SAFETENSORS
from tierewrite.source.open import open_checkpoint
from tierewrite.stores.in_process import served
from tierewrite.stores.remote import listing
from tierewrite.streaming import remembered, tensors
from tierewrite.streaming.remembered import Digests, identity_of

Naive = Callable[[str], Path]

CASES = sorted(path.parent.name for path in FIXTURES.glob("*/naive"))
ALL: dict[str, Any] = {
    "on_mismatch": "repack",
    "kv_scales": "merge",
    "unify_fused_scales": True,
    "fix_ignore": True,
    "fix_config": True,
    "fill_missing_scales": True,
    "max_shard_size": "100KB",
}
BY_DEFAULT = [case for case in CASES if not case.startswith("dg_")] + ["dg_nvfp4", "dg_nvfp4_awq", "dg_nvfp4_sharded"]
"""The other options leave the others' plans as they are by default, or change one thing of them."""
UNCHANGED_CONFIGS = {**ALL, "fix_ignore": False, "fix_config": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "all": ALL,
    "vllm": {"consumer": "vllm", "on_mismatch": "keep"},
}


TIED = {"embed.weight": ("U8", [4], b"same"), "lm_head.weight": ("U8", [4], b"same")}


def with_ties(folder: Path) -> Path:
    """The folder, with a ties file for `TIED`."""
    (folder / "ties.json").write_text('{"lm_head.weight": "embed.weight"}')
    return folder


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def as_stored(tensor: torch.Tensor) -> Tensor:
    """A tensor as a safetensors file would hold it (of whole bytes)."""
    names = {torch_name: name for name, torch_name in TORCH_OF_SAFETENSORS.items()}
    return Tensor(names[str(tensor.dtype).removeprefix("torch.")], list(tensor.shape), bytes_of(tensor))


def result(work: Callable[[], Any]) -> tuple[Any, str]:
    """What came out, or the error's type and text."""
    try:
        return work(), ""
    except TierewriteError as error:
        return None, f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("case", "options"),
    [(case, options) for case in CASES for options in OPTIONS if options != "default" or case in BY_DEFAULT],
)
def test_every_tensor_is_the_one_that_a_rewrite_writes(case: str, options: str, naive: Naive, tmp_path: Path) -> None:
    given = {"device": "cpu", **OPTIONS[options]}
    streamed, refused = result(lambda: tierewrite.stream(naive(case), **given))
    written, refused_to_write = result(lambda: tierewrite.rewrite(naive(case), tmp_path / "out", **given))
    assert refused == refused_to_write
    if written is None:
        return
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    expected = read_tensors(tmp_path / "out")
    assert {name: as_stored(tensor) for name, tensor in streamed} == expected
    assert list(streamed.names) == list(expected)
    assert len(streamed) == len(expected)
    for name in ("config.json", "hf_quant_config.json"):
        if name in files:
            changed = files[name].read_bytes() != (naive(case) / name).read_bytes()
            assert streamed.configs.get(name) == (files[name].read_bytes() if changed else None)
    if written.readiness is not None:
        assert streamed.readiness.findings == written.readiness.findings


@pytest.mark.parametrize("case", ["dg_nvfp4_sharded", "qwen3_tied_bf16"])
def test_by_name_is_the_order_in_which_safetensors_gives_the_keys_of_the_output(
    case: str, naive: Naive, tmp_path: Path
) -> None:
    tierewrite.rewrite(naive(case), tmp_path / "out", max_shard_size="100KB")
    keys: list[str] = []
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            keys += file.keys()
    found = tierewrite.stream(naive(case), max_shard_size="100KB").tensors(by_name=True)
    assert [name for name, _ in found] == keys


def test_what_is_not_wanted_is_left_out(naive: Naive) -> None:
    stream = tierewrite.stream(naive("mixtral_tied_bf16"))
    found = [name for name, _ in stream.tensors(wanted=lambda name: ".experts." not in name)]
    assert found == [name for name in stream.names if ".experts." not in name]
    assert 0 < len(found) < len(stream)


@pytest.mark.parametrize("options", ["default", "all", "vllm"])
@pytest.mark.parametrize("case", ["dg_nvfp4_sharded", "dg_fp8", "llmcompressor_nvfp4_dg"])
def test_another_readers_tensors_become_the_same(case: str, options: str, naive: Naive) -> None:
    stream = tierewrite.stream(naive(case), **OPTIONS[options])

    def other() -> Iterable[tuple[str, torch.Tensor]]:
        for path in sorted(naive(case).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, file.get_tensor(name)

    found = {name: as_stored(tensor) for name, tensor in stream.through(other())}
    assert found == {name: as_stored(tensor) for name, tensor in stream}


def test_another_readers_tensors_have_the_names_of_the_files_where_those_of_wrappers_are_stripped(
    tmp_path: Path,
) -> None:
    src = write_checkpoint(tmp_path / "src", {f"module.{name}": tensor for name, tensor in TIED.items()})
    stream = tierewrite.stream(src, ties=with_ties(tmp_path) / "ties.json", strip_prefix=True)
    other = load_file(src / "model.safetensors")
    assert [name for name, _ in stream.through(other.items())] == ["embed.weight"]


def test_transformers_verdict_is_the_one_on_a_written_output(naive: Naive, tmp_path: Path) -> None:
    case, given = naive("dg_nvfp4"), {"consumer": "transformers", "force": True}
    written = tierewrite.rewrite(case, tmp_path / "out", **given).readiness
    streamed = tierewrite.stream(case, **given).readiness
    assert written is not None
    assert streamed is not None
    assert streamed.findings == written.findings


# Files


@pytest.mark.parametrize("case", ["dg_nvfp4_sharded", "llmcompressor_nvfp4_dg", "dg_nvfp4_kvfp8"])
def test_an_unwritten_output_has_the_files_of_a_written_one(case: str, naive: Naive, tmp_path: Path) -> None:
    tierewrite.rewrite(naive(case), tmp_path / "out", manifest=False, **UNCHANGED_CONFIGS)
    stream = tierewrite.stream(naive(case), **UNCHANGED_CONFIGS)
    with UnwrittenOutput(stream._checkpoint, stream.plan, stream._contents) as output, served(output.files()) as base:
        there = {str(p.relative_to(tmp_path / "out")): p for p in (tmp_path / "out").rglob("*") if p.is_file()}
        infos = listing(base)
        assert infos.keys() == there.keys()
        for name, path in there.items():
            data = path.read_bytes()
            assert infos[name]["size"] == len(data)
            file = output.files()[name]
            assert file.read(0, len(data)) == data
            for step in (1_000, 4_097):
                parts = [file.read(at, min(len(data), at + step)) for at in range(0, len(data), step)]
                assert b"".join(parts) == data
            assert (base / name).read_bytes() == data
        with pytest.raises(FileNotFoundError):
            base.opened()[0].info(f"{base.opened()[1]}/other")
    assert listing(base) == {}


def test_a_url_gives_the_same_tensors(naive: Naive) -> None:
    memory = fsspec.filesystem("memory")
    folder = naive("dg_nvfp4_sharded")
    for path in folder.iterdir():
        memory.pipe_file(f"/streamed/{path.name}", path.read_bytes())
    try:
        there = tierewrite.stream("memory://streamed", **ALL)
        here = tierewrite.stream(folder, **ALL)
        assert [(n, as_stored(t)) for n, t in there] == [(n, as_stored(t)) for n, t in here]
        by_name = [(n, as_stored(t)) for n, t in there.tensors(by_name=True)]
        assert by_name == [(n, as_stored(t)) for n, t in here.tensors(by_name=True)]
    finally:
        memory.rm("/streamed", recursive=True)


# Refusals


def test_all_is_refused_before_the_first_tensor(naive: Naive) -> None:
    with pytest.raises(Refused, match="1 declared tie not confirmed"):
        tierewrite.stream(naive("qwen3_tied_but_diverged_bf16"))
    with pytest.raises(UsageError, match="on_mismatch is 'kep'"):
        tierewrite.stream(naive("qwen3_tied_bf16"), on_mismatch="kep")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="consumer is 'vlm'"):
        tierewrite.stream(naive("qwen3_tied_bf16"), consumer="vlm")  # type: ignore[arg-type]


def test_what_a_consumer_would_not_load_is_refused(copied: Naive) -> None:
    folder = copied("dg_nvfp4")
    stored = read_tensors(folder)
    lost = [name for name in stored if name.endswith("layers.0.self_attn.o_proj.weight_scale_2")]
    assert len(lost) == 2
    write_checkpoint(folder, {name: tensor for name, tensor in stored.items() if name not in lost})
    with pytest.raises(NotReady, match="scale-missing"):
        tierewrite.stream(folder, consumer="vllm")
    forced = tierewrite.stream(folder, consumer="vllm", force=True)
    assert forced.readiness is not None
    assert "scale-missing" in forced.readiness.ids()


def test_a_dtype_that_torch_lacks_is_refused(copied: Naive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "TORCH_OF_SAFETENSORS", {**TORCH_OF_SAFETENSORS, "BF16": "a_dtype_of_the_future"})
    with pytest.raises(UsageError, match="torch has no dtype for BF16"):
        tierewrite.stream(copied("qwen3_tied_bf16"))


def test_tensors_that_are_not_aligned_and_those_without_elements(tmp_path: Path) -> None:
    stored = {
        "one.byte": ("U8", [1], b"a"),
        "odd.weight": ("F32", [2], bytes(range(8))),
        "none.weight": ("F32", [0, 3], b""),
        "scalar": ("F64", [], bytes(range(8))),
        "pairs": ("F4", [2, 4], bytes(range(4))),
        **TIED,
    }
    folder = with_ties(write_checkpoint(tmp_path / "x", stored))
    found = dict(tierewrite.stream(folder, ties=folder / "ties.json"))
    assert found["odd.weight"].data_ptr() % 4 == 0
    assert found["none.weight"].shape == (0, 3)
    assert found["scalar"].shape == ()
    assert found["pairs"].shape == (2, 2)
    expected = {name: data for name, (_, _, data) in stored.items() if name != "lm_head.weight"}
    assert {name: bytes_of(tensor) for name, tensor in found.items()} == expected


def test_a_file_that_changes_while_it_is_read_is_refused(copied: Naive) -> None:
    folder = copied("qwen3_tied_bf16")
    stream = tierewrite.stream(folder)
    one_by_one = iter(stream)
    next(one_by_one)
    file = folder / "model.safetensors"
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"\xff")
    with pytest.raises(SourceChanged, match=r"model\.safetensors"):
        list(one_by_one)
    with pytest.raises(SourceChanged, match=r"model\.safetensors"):
        next(iter(stream))


def test_a_file_that_another_reader_read_and_that_changed_is_refused(copied: Naive) -> None:
    """What was dropped or passed on was confirmed in bytes that are there no more."""
    folder = copied("qwen3_tied_bf16")
    stream = tierewrite.stream(folder)
    file = folder / "model.safetensors"
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"\xff")
    with pytest.raises(SourceChanged, match=r"model\.safetensors"):
        list(stream.through(load_file(file).items()))


def test_writing_to_a_tensor_reaches_nothing_else(copied: Naive) -> None:
    folder = copied("qwen3_tied_bf16")
    before = (folder / "model.safetensors").read_bytes()
    stream = tierewrite.stream(folder)
    for _, tensor in stream:
        tensor.fill_(7)
    assert (folder / "model.safetensors").read_bytes() == before
    assert not all(bool((tensor == 7).all()) for _, tensor in stream)


# Memory


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("only Linux says how much of a process's memory is anonymous")
    found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
    assert found is not None
    return int(found.group(1)) << 10


def test_survivors_of_a_folder_take_no_memory_of_their_own(tmp_path: Path) -> None:
    size = 64 << 20
    sizes = {f"layers.{number}.weight": ("U8", [size], size) for number in range(6)}
    tied = {name: (dtype, shape, len(data)) for name, (dtype, shape, data) in TIED.items()}
    write_sparse_shard(tmp_path / "model.safetensors", {**sizes, **tied})
    stream = tierewrite.stream(with_ties(tmp_path), ties=tmp_path / "ties.json")
    start = anonymous_bytes()
    peak, total = 0, 0
    for _, tensor in stream:
        total += int(tensor.sum()) + tensor.numel()
        peak = max(peak, anonymous_bytes() - start)
    assert total == 6 * size + 4
    assert peak < size


def test_what_comes_from_a_store_is_held_a_few_loads_at_a_time(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    size = 6 << 20
    stored = {f"layers.{number}.weight": ("U8", [size], bytes(size)) for number in range(12)}
    write_checkpoint(tmp_path, {**stored, **TIED})
    memory.pipe_file("/streamed-memory/model.safetensors", (tmp_path / "model.safetensors").read_bytes())
    try:
        stream = tierewrite.stream("memory://streamed-memory", ties=with_ties(tmp_path) / "ties.json")
        tracemalloc.start()
        seen = sum(tensor.numel() for _, tensor in stream)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    finally:
        memory.rm("/streamed-memory", recursive=True)
    assert seen == 12 * size + 4
    # A load waits as the store's bytes and as ours: at most three of each, and the one that is used.
    assert peak < 8 * size


# Digests that are remembered


class Counting:
    """Hashes nothing: gives a digest by the name, and counts."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def hash(self, source: Any, keys: Iterable[str], phase: str) -> dict[str, bytes]:
        keys = sorted(keys)
        self.asked += keys
        return {key: key.encode().ljust(32, b".")[:32] for key in keys}


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was just made counts as one that is not changing."""
    monkeypatch.setattr(remembered, "_SETTLED_NS", -(10**12))


@pytest.mark.usefixtures("settled")
def test_digests_are_computed_once_for_a_source(naive: Naive, tmp_path: Path) -> None:
    source = open_checkpoint(naive("qwen3_tied_bf16"))
    keys = list(source.tensors)[:3]
    first, second = Counting(), Counting()
    found = Digests(first, tmp_path / "cache").hash(source, keys[:2], "")
    digests = Digests(second, tmp_path / "cache")
    assert digests.hash(source, keys, "") == {**found, **Counting().hash(source, keys[2:], "")}
    assert (first.asked, second.asked) == (sorted(keys[:2]), keys[2:])
    assert digests.nbytes == source.tensors[keys[2]].nbytes
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


@pytest.mark.usefixtures("settled")
def test_a_second_stream_hashes_nothing(naive: Naive, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TIEREWRITE_CACHE", str(tmp_path))
    folder = naive("dg_nvfp4_sharded")
    assert tierewrite.stream(folder, remember=True).hashed_bytes > 0
    assert tierewrite.stream(folder, remember=True).hashed_bytes == 0
    assert tierewrite.stream(folder).hashed_bytes > 0
    monkeypatch.setenv("TIEREWRITE_CACHE", "")
    assert tierewrite.stream(folder, remember=True).hashed_bytes > 0


def test_a_canonical_checkpoint_has_nothing_to_hash(naive: Naive, tmp_path: Path) -> None:
    tierewrite.rewrite(naive("dg_fp8"), tmp_path / "out")
    stream = tierewrite.stream(tmp_path / "out")
    assert stream.hashed_bytes == 0
    assert {name: as_stored(tensor) for name, tensor in stream} == read_tensors(tmp_path / "out")


@pytest.mark.usefixtures("settled")
def test_a_source_whose_path_is_no_text_is_remembered_too(
    naive: Naive, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TIEREWRITE_CACHE", str(tmp_path / "cache"))
    try:
        folder = shutil.copytree(naive("qwen3_tied_bf16"), tmp_path / os.fsdecode(b"\xff"))
    except OSError:
        pytest.skip("file names here are text")
    assert tierewrite.stream(folder, remember=True).hashed_bytes > 0
    assert tierewrite.stream(folder, remember=True).hashed_bytes == 0


@pytest.mark.usefixtures("settled")
def test_the_lock_of_a_folder_that_others_can_write_to_is_not_waited_for(naive: Naive, tmp_path: Path) -> None:
    source = open_checkpoint(naive("qwen3_tied_bf16"))
    keys = list(source.tensors)[:1]
    tmp_path.chmod(0o777)
    with (tmp_path / f"{identity_of(source)}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = Counting()
        thread = threading.Thread(target=lambda: Digests(waiting, tmp_path).hash(source, keys, ""), daemon=True)
        thread.start()
        thread.join(60)
        assert waiting.asked == keys


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("change", ["bytes", "digest", "schema", "empty", "writable", "link", "folder"])
def test_what_is_kept_is_ignored_unless_it_is_what_we_wrote(change: str, naive: Naive, tmp_path: Path) -> None:
    source = open_checkpoint(naive("qwen3_tied_bf16"))
    keys = list(source.tensors)[:2]
    Digests(Counting(), tmp_path).hash(source, keys, "")
    path = tmp_path / f"{identity_of(source)}.json"
    data = path.read_bytes()
    if change == "bytes":
        path.write_bytes(data.replace(b"a", b"b"))
    elif change == "digest":
        path.write_bytes(b"0" * 64 + data[64:])
    elif change == "schema":
        text = data.partition(b"\n")[2].replace(b"digests/1", b"digests/2")
        path.write_bytes(remembered.blake3(text).hexdigest().encode() + b"\n" + text)
    elif change == "empty":
        path.write_bytes(b"")
    elif change == "writable":
        path.chmod(0o666)
    elif change == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.unlink()
        path.mkdir()
    again = Counting()
    Digests(again, tmp_path).hash(source, keys, "")
    assert again.asked == sorted(keys)


@pytest.mark.usefixtures("settled")
def test_a_source_that_changed_is_hashed_again(copied: Naive, tmp_path: Path) -> None:
    folder = copied("qwen3_tied_bf16")
    before = open_checkpoint(folder)
    key = next(iter(before.tensors))
    Digests(Counting(), tmp_path).hash(before, [key], "")
    os.utime(folder / "model.safetensors")
    again = Counting()
    Digests(again, tmp_path).hash(open_checkpoint(folder), [key], "")
    assert again.asked == [key]


def test_a_file_that_was_just_written_is_not_remembered(copied: Naive, tmp_path: Path) -> None:
    source = open_checkpoint(copied("qwen3_tied_bf16"))
    os.utime(tmp_path)
    Digests(Counting(), tmp_path / "cache").hash(source, list(source.tensors)[:1], "")
    assert not list((tmp_path / "cache").glob("*.json"))


@pytest.mark.usefixtures("settled")
def test_of_several_that_ask_at_once_one_hashes(naive: Naive, tmp_path: Path) -> None:
    source = open_checkpoint(naive("qwen3_tied_bf16"))
    keys = list(source.tensors)[:2]
    hashing, go_on = threading.Event(), threading.Event()

    class Slow(Counting):
        def hash(self, source: Any, keys: Iterable[str], phase: str) -> dict[str, bytes]:
            hashing.set()
            assert go_on.wait(60)
            return super().hash(source, keys, phase)

    first, others = Slow(), [Counting() for _ in range(3)]
    found: list[dict[str, bytes]] = []
    threads = [
        threading.Thread(target=lambda one=one: found.append(Digests(one, tmp_path).hash(source, keys, "")))
        for one in (first, *others)
    ]
    threads[0].start()
    assert hashing.wait(60)
    for thread in threads[1:]:
        thread.start()
    go_on.set()
    for thread in threads:
        thread.join()
    assert found == [found[0]] * 4
    assert first.asked == sorted(keys)
    assert [one.asked for one in others] == [[], [], []]


@pytest.mark.usefixtures("settled")
def test_a_bounded_number_of_sources_is_remembered(
    naive: Naive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "_KEPT", 2)
    for case in ("qwen3_tied_bf16", "mixtral_tied_bf16", "bart_bf16"):
        source = open_checkpoint(naive(case))
        Digests(Counting(), tmp_path).hash(source, list(source.tensors)[:1], "")
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_a_folder_that_cannot_be_made_is_no_error(naive: Naive, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    source = open_checkpoint(naive("qwen3_tied_bf16"))
    keys = list(source.tensors)[:1]
    again = Counting()
    assert Digests(again, tmp_path / "file" / "cache").hash(source, keys, "")
    assert again.asked == keys
