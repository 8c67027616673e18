"""Where the bytes of an output tensor come from: the same in any pieces, by either executor, after a killed run too."""

from __future__ import annotations

import itertools
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import pytest
from blake3 import blake3

import tierewrite
from tests.checkpoints import digests, edit_tensors, read_tensors, write_shard
from tierewrite.cli import run
from tierewrite.engines.local import LocalEngine
from tierewrite.errors import SourceChanged
from tierewrite.numbers import nvfp4
from tierewrite.output import staging
from tierewrite.source.table import Shard
from tierewrite.values.content import COPY, Added, Blob, Content, Encode, Maker, Patch, Range, fill, made_of

Naive = Callable[[str], Path]
ENCODER, DECODER = "model.encoder.language_model", "model.decoder"
LOST = "layers.1.experts.2.down_proj.input_scale"


def in_pieces(content: Content, before: bytes, cuts: list[int]) -> bytes:
    """The tensor that is made of `before`, filled in pieces that end at `cuts`."""
    made = bytearray(before)
    ends = [0, *cuts, len(before)]
    for start, end in itertools.pairwise(ends):
        fill(memoryview(made)[start:end], content, start)
    return bytes(made)


@pytest.mark.parametrize("cuts", [[], [1], [3, 3, 9]])
def test_copies_patches_and_additions_are_filled_in_any_pieces(cuts: list[int]) -> None:
    before, after = bytes(range(10)), bytes(range(10, 20))
    assert in_pieces(COPY, before, cuts) == before
    assert in_pieces(Patch(after, before, "a.input_scale"), before, cuts) == after
    assert in_pieces(Added(after), before, cuts) == after


def test_a_patch_of_other_bytes_than_those_that_were_read_is_refused() -> None:
    with pytest.raises(SourceChanged, match="a scale changed") as caught:
        fill(memoryview(bytearray(b"1234")), Patch(b"abcd", b"1235", "a.input_scale"))
    assert caught.value.tensor == "a.input_scale"


def blob_in_a_file(path: Path, blocks: int, scale: float) -> tuple[Blob, np.ndarray, np.ndarray]:
    """A random NVFP4 weight on disk, and its codes and block scales."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (blocks, 8), np.uint8)
    scales = rng.integers(1, 0x70, (blocks, 1), np.uint8)
    path.write_bytes(codes.tobytes() + scales.tobytes())
    status = path.stat()
    shard = Shard(path.name, path, status.st_size, status.st_mtime_ns, status.st_ino, 0, {}, status.st_ctime_ns)
    ends = codes.nbytes, codes.nbytes + scales.nbytes
    return Blob(Range(shard, 0, ends[0]), Range(shard, *ends), struct.pack("<f", scale), False), codes, scales


@pytest.mark.parametrize("codes", [True, False])
def test_a_weight_is_reencoded_in_any_pieces_as_in_one(
    codes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tierewrite.values.content._CHUNK_BLOCKS", 7)
    blob, old_codes, old_scales = blob_in_a_file(tmp_path / "weight", 50, 0.5)
    new = np.float32(0.75)
    content = Encode(blob, (), struct.pack("<f", 0.75), codes)
    want = nvfp4.repack(old_codes, old_scales, np.float32([0.5]), new)[0 if codes else 1].tobytes()
    rng = random.Random(0)
    for count in (0, 1, 5, 20):
        cuts = sorted(rng.randrange(len(want)) for _ in range(count))
        assert in_pieces(content, bytes(len(want)), cuts) == want
    made = made_of(content, len(want))
    assert made.digest == blake3(want).digest()
    assert made.moved.elements == (50 * 16 if codes else 0)
    maker = Maker(content)
    buffer = bytearray(len(want))
    maker.fill(memoryview(buffer)[:11])
    maker.fill(memoryview(buffer)[11:])
    assert (bytes(buffer), maker.made().digest) == (want, made.digest)


@pytest.fixture(params=["one pass", "jobs"])
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both of the executors; what is written by jobs goes to any engine's workers."""
    if request.param == "jobs":
        monkeypatch.setattr(LocalEngine, "run_pass", None)
        monkeypatch.setattr(LocalEngine, "hash", hash_by_jobs)
    return str(request.param)


def hash_by_jobs(engine: LocalEngine, source: object, keys: object, phase: str) -> dict[str, bytes]:
    from tierewrite.output.jobs import hash_jobs

    found: dict[str, bytes] = {}
    for result in engine.run_jobs(hash_jobs(source, keys, 1 << 20), phase):  # type: ignore[arg-type]
        found.update(result.digests)
    return found


def with_gaps(src: Path) -> None:
    """A fixture with two missing scales on both sides, and one side of a weight under another scale."""
    tensors = read_tensors(src)
    module = f"{ENCODER}.layers.0.mlp.up_proj"
    codes, scales, scale = (
        np.frombuffer(tensors[f"{module}.{part}"][2], dtype).reshape(tensors[f"{module}.{part}"][1])
        for part, dtype in (("weight", np.uint8), ("weight_scale", np.uint8), ("weight_scale_2", np.float32))
    )
    new = np.float32(scale * np.float32(1.7))
    new_codes, new_scales = nvfp4.repack(codes, scales, scale, new)
    edit_tensors(
        src,
        {
            f"{ENCODER}.{LOST}": None,
            f"{DECODER}.{LOST}": None,
            f"{module}.weight": ("U8", list(codes.shape), new_codes.tobytes()),
            f"{module}.weight_scale": ("F8_E4M3", list(scales.shape), new_scales.tobytes()),
            f"{module}.weight_scale_2": ("F32", [], struct.pack("<f", new)),
        },
    )


ALL = {"on_mismatch": "repack", "unify_fused_scales": True, "fill_missing_scales": True}


def test_both_executors_write_the_same_bytes_and_report_the_same(
    executor: str, copied: Naive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = copied("dg_nvfp4")
    with_gaps(src)
    report = tierewrite.rewrite(src, tmp_path / "out", verify=True, max_shard_size="20KB", **ALL)  # type: ignore[arg-type]
    monkeypatch.undo()
    plain = tierewrite.rewrite(src, tmp_path / "plain", max_shard_size="20KB", **ALL)  # type: ignore[arg-type]
    assert report.reencoded == plain.reencoded
    assert {one.reason for one in report.reencoded} == {"mismatch", "fused"}
    assert all(one.largest is not None and one.rms is not None for one in report.reencoded)
    assert [entry.target for entry in report.filled] == [f"{DECODER}.{LOST}"]
    for path in (tmp_path / "plain").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_merged_scale_that_is_larger_than_a_buffer_is_merged(
    executor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in ("one_pass", "work", "jobs"):
        monkeypatch.setattr(f"tierewrite.output.{room}.BUFFER_BYTES", 1 << 20)
    count = 300_000
    low, high = np.full(count, 0.5, "<f4"), np.full(count, 0.75, "<f4")
    low[::2] = 1.0
    weight = ("F8_E4M3", [4], b"\x38" * 4)
    src = tmp_path / "src"
    src.mkdir()
    write_shard(
        src / "model.safetensors",
        {
            "a.q_proj.weight": weight,
            "a.q_proj.input_scale": ("F32", [count], low.tobytes()),
            "b.q_proj.weight": weight,
            "b.q_proj.input_scale": ("F32", [count], high.tobytes()),
        },
    )
    (src / "config.json").write_text("{}")
    (tmp_path / "ties.json").write_text(json.dumps({"b.q_proj.weight": "a.q_proj.weight"}))
    tierewrite.rewrite(src, tmp_path / "out", ties=tmp_path / "ties.json", verify=True)
    merged = read_tensors(tmp_path / "out")["a.q_proj.input_scale"][2]
    assert merged == np.maximum(low, high).tobytes()
    manifest = json.loads((tmp_path / "out" / "tierewrite.json").read_text())
    assert manifest["groups"][0]["tensors"]["a.q_proj.input_scale"]["blake3"] == blake3(merged).hexdigest()


def test_resume_takes_over_shards_with_added_and_reencoded_tensors(
    copied: Naive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = copied("dg_nvfp4")
    scale = "layers.0.mlp.up_proj.weight_scale_2"
    (old,) = struct.unpack("<f", read_tensors(src)[f"{DECODER}.{scale}"][2])
    larger = ("F32", [], struct.pack("<f", 1.7 * old))  # than that of gate_proj, on both sides
    edit_tensors(src, {f"{side}.{LOST}": None for side in (ENCODER, DECODER)})
    edit_tensors(src, {f"{side}.{scale}": larger for side in (ENCODER, DECODER)})
    options = {**ALL, "max_shard_size": "20KB"}
    whole = tierewrite.rewrite(src, tmp_path / "whole", **options)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(staging.Staging, "commit", lambda *_: os._exit(9))
        if (child := os.fork()) == 0:
            try:
                tierewrite.rewrite(src, tmp_path / "out", **options)  # type: ignore[arg-type]
            finally:
                os._exit(1)
        os.waitpid(child, 0)
    folder = tmp_path / ".out.tierewrite"
    inodes = {path.name: path.stat().st_ino for path in folder.glob("*.safetensors")}
    report = tierewrite.rewrite(src, tmp_path / "out", resume=True, **options)  # type: ignore[arg-type]
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in inodes} == inodes
    assert len(inodes) > 1
    assert report.reencoded == whole.reencoded != ()
    assert report.filled == whole.filled != ()
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert (tmp_path / "out" / "tierewrite.json").read_bytes() == (tmp_path / "whole" / "tierewrite.json").read_bytes()


def test_strict_readers_take_every_json_of_ours_where_a_ratio_is_beyond_float64(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weight = ("F8_E4M3", [4], b"\x38" * 4)
    src, out = tmp_path / "src", tmp_path / "out"
    src.mkdir()
    write_shard(
        src / "model.safetensors",
        {
            "a.q_proj.weight": weight,
            "a.q_proj.input_scale": ("F64", [], struct.pack("<d", 1e300)),
            "b.q_proj.weight": weight,
            "b.q_proj.input_scale": ("F64", [], struct.pack("<d", 1e-300)),
        },
    )
    (src / "config.json").write_text("{}")
    ties = tmp_path / "ties.json"
    ties.write_text(json.dumps({"b.q_proj.weight": "a.q_proj.weight"}))
    found = {}
    for name, command in {
        "rewrite": ["rewrite", src, out, "--ties", ties, "--verify"],
        "plan": ["plan", src, "--ties", ties],
        "inspect": ["inspect", src, "--ties", ties],
        "verify": ["verify", src, out, "--ties", ties],
        "check": ["check", out, "--for", "vllm"],
        "report": ["report", out],
    }.items():
        run([*map(str, command), "--json"])
        found[name] = orjson.loads(capsys.readouterr().out)
    assert found["verify"]["ok"]
    assert found["rewrite"]["groups"][0]["ratio"] is None
    assert found["rewrite"]["ratios"] == {"median": None, "max": None}
    manifest = orjson.loads((out / "tierewrite.json").read_bytes())
    assert manifest["groups"][0]["tensors"]["a.q_proj.input_scale"]["ratio"] is None
