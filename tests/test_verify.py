"""`verify` proves what is right and finds what is wrong, one corruption at a time."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tierewrite
from tests.checkpoints import (
    FIXTURES,
    Tensor,
    read_shard,
    read_tensors,
    write_checkpoint,
    write_shard,
    write_sparse_shard,
)
from tierewrite.errors import SourceChanged, SourceError, SystemFailure, TierewriteError
from tierewrite.numbers import nvfp4
from tierewrite.proof.verify import Verification, verify
from tierewrite.stores import local

INDEX = "model.safetensors.index.json"
MANIFEST = "tierewrite.json"


@pytest.fixture(scope="session")
def rewritten(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A fixture's rewritten checkpoint, made once per set of options. Not to be changed."""
    made: dict[tuple[Any, ...], Path] = {}

    def rewrite(case: str, **options: Any) -> Path:
        key = (case, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(case) / "dst"
            tierewrite.rewrite(FIXTURES / case / "naive", made[key], **options)
        return made[key]

    return rewrite


def source(case: str) -> Path:
    return FIXTURES / case / "naive"


def ids(result: Verification) -> set[str]:
    assert result.ok is not bool(result.problems)
    return {problem.id for problem in result.problems}


# ---------------------------------------------------------------------------------------------------- what is right

CASES = [path.parent.name for path in sorted(FIXTURES.glob("*/naive"))]


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "no-manifest"])
@pytest.mark.parametrize("case", CASES)
def test_every_rewritten_fixture_is_proved(case: str, manifest: bool, rewritten: Callable[..., Path]) -> None:
    try:
        dst = rewritten(case, on_mismatch="keep", manifest=manifest)
    except TierewriteError as e:
        pytest.skip(f"not rewritten: {e}")
    result = verify(source(case), dst, on_mismatch="keep")
    assert result.problems == ()
    assert result.ties_source in ("class", "config", "none")
    before, after = read_tensors(source(case)), read_tensors(dst)
    assert result.kept + result.renamed + result.merged + result.repacked == len(after)
    assert result.dropped == len(before) - len(after)
    assert result.dropped == len(before.keys() - after.keys()) - len(after.keys() - before.keys())


@pytest.mark.parametrize("manifest", [True, False])
def test_kv_scales_are_kept_or_merged_as_the_caller_says(manifest: bool, rewritten: Callable[..., Path]) -> None:
    case = "dg_nvfp4_kvfp8"
    dst_kept = rewritten(case, manifest=manifest)
    dst_merged = rewritten(case, manifest=manifest, kv_scales="merge")
    kept, merged = verify(source(case), dst_kept), verify(source(case), dst_merged, kv_scales="merge")
    assert kept.ok
    assert merged.ok
    assert merged.merged > kept.merged
    assert "missing" in ids(verify(source(case), dst_merged))
    assert "tie-left" in ids(verify(source(case), dst_kept, kv_scales="merge"))


def test_a_checkpoint_that_somebody_else_deduplicated_by_hand_is_proved(tmp_path: Path) -> None:
    tensors = read_tensors(source("qwen3_tied_bf16"))
    del tensors["lm_head.weight"]
    dst = write_checkpoint(tmp_path / "dst", dict(reversed(tensors.items())))
    for name in ("config.json", "generation_config.json"):
        shutil.copy(source("qwen3_tied_bf16") / name, dst)
    result = verify(source("qwen3_tied_bf16"), dst)
    assert result.problems == ()
    assert (result.kept, result.dropped) == (len(tensors), 1)


def test_a_canonical_checkpoint_is_its_own_proof(rewritten: Callable[..., Path]) -> None:
    result = verify(rewritten("dg_nvfp4"), rewritten("dg_nvfp4", manifest=False))
    assert result.ok
    assert result.dropped == result.renamed == result.merged == 0


def test_json_has_a_schema_and_counts(rewritten: Callable[..., Path]) -> None:
    data = json.loads(json.dumps(verify(source("dg_fp8"), rewritten("dg_fp8")).to_json()))
    assert data["schema"] == "tierewrite/verification/1"
    assert data["ok"] is True
    assert data["problems"] == []
    assert data["ties"] == {"source": "class", "detail": "DiffusionGemmaForBlockDiffusion"}
    assert data["counts"] == {"kept": 98, "renamed": 26, "dropped": 111, "merged": 37, "repacked": 0}


def test_with_a_ties_file_neither_torch_nor_transformers_is_imported(tmp_path: Path) -> None:
    ties = tmp_path / "ties.json"
    ties.write_text('{"lm_head.weight": "model.embed_tokens.weight"}')
    src, dst = str(source("qwen3_tied_bf16")), str(tmp_path / "dst")
    code = (
        "import sys, tierewrite\n"
        f"tierewrite.rewrite({src!r}, {dst!r}, ties={str(ties)!r})\n"
        f"assert tierewrite.verify({src!r}, {dst!r}, ties={str(ties)!r}).ok\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


class Counting(tierewrite.Progress):
    """Calls a function with each number of bytes."""

    def __init__(self, called: Callable[[int], None]) -> None:
        self.called = called

    def advance(self, nbytes: int) -> None:
        self.called(nbytes)


def test_each_byte_is_read_once(rewritten: Callable[..., Path]) -> None:
    src, dst = source("dg_nvfp4_sharded"), rewritten("dg_nvfp4_sharded")
    read: list[int] = []
    assert verify(src, dst, progress=Counting(read.append)).ok
    tensors = sum(len(data) for folder in (src, dst) for _, _, data in read_tensors(folder).values())
    other = sum(p.stat().st_size for p in src.iterdir() if p.suffix == ".json" and p.name != INDEX)
    assert sum(read) == tensors + 2 * other


def test_memory_is_bounded_whatever_the_size_of_a_tensor(tmp_path: Path) -> None:
    size = 1 << 29
    for folder, names in (("src", ["a.weight", "b.weight"]), ("dst", ["a.weight"])):
        (tmp_path / folder).mkdir()
        scalars = dict.fromkeys(names, ("F32", [], 4))
        write_sparse_shard(tmp_path / folder / "model.safetensors", {"big": ("U8", [size], size), **scalars})
    (tmp_path / "ties.json").write_text('{"b.weight": "a.weight"}')
    code = (
        "import tierewrite, tierewrite.proof.verify\n"
        "from tests.checkpoints import peak_bytes\n"
        "before = peak_bytes()\n"
        f"r = tierewrite.verify({str(tmp_path / 'src')!r}, {str(tmp_path / 'dst')!r},"
        f" ties={str(tmp_path / 'ties.json')!r})\n"
        "assert r.ok, r\n"
        "print((peak_bytes() - before) >> 20)\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=300, capture_output=True, text=True, cwd=root
    )
    assert int(done.stdout) < 128


# ---------------------------------------------------------------------------------------------------- what is wrong


def dropped_by_hand(case: str, key: str, folder: Path) -> Path:
    tensors = read_tensors(source(case))
    del tensors[key]
    write_checkpoint(folder, tensors)
    for name in ("config.json", "generation_config.json"):
        shutil.copy(source(case) / name, folder)
    return folder


def test_a_drop_without_a_declared_tie_is_wrong_though_equal_bytes_are_there(tmp_path: Path) -> None:
    dst = dropped_by_hand("qwen3_untied_equal_bf16", "lm_head.weight", tmp_path / "dst")
    result = verify(source("qwen3_untied_equal_bf16"), dst)
    assert [(p.id, p.where) for p in result.problems] == [("undeclared-drop", "lm_head.weight")]


def test_a_drop_that_the_bytes_do_not_confirm_is_wrong(tmp_path: Path) -> None:
    dst = dropped_by_hand("qwen3_tied_but_diverged_bf16", "lm_head.weight", tmp_path / "dst")
    result = verify(source("qwen3_tied_but_diverged_bf16"), dst)
    where = "model.embed_tokens.weight"
    assert [(p.id, p.where) for p in result.problems] == [("refused", where), ("unconfirmed-drop", where)]
    result = verify(source("qwen3_tied_but_diverged_bf16"), dst, on_mismatch="keep")
    assert [(p.id, p.where) for p in result.problems] == [("unconfirmed-drop", where)]


def test_an_output_of_a_source_that_would_be_refused_is_not_proved(tmp_path: Path) -> None:
    src = source("qwen3_tied_but_diverged_bf16")
    assert ids(verify(src, src)) == {"refused"}
    assert ids(verify(src, src, on_mismatch="repack")) == {"refused"}
    assert verify(src, src, on_mismatch="keep").ok


def test_a_dropped_tensor_of_no_tie_is_missing(tmp_path: Path) -> None:
    dst = dropped_by_hand("qwen3_tied_but_diverged_bf16", "model.norm.weight", tmp_path / "dst")
    result = verify(source("qwen3_tied_but_diverged_bf16"), dst, on_mismatch="keep")
    assert ids(result) <= {"missing", "undeclared-drop"}
    assert [p.where for p in result.problems] == ["model.norm.weight"]


@pytest.mark.parametrize("case", ["qwen3_tied_bf16", "dg_nvfp4"])
def test_an_untouched_copy_of_a_tied_checkpoint_has_its_ties_left(case: str) -> None:
    result = verify(source(case), source(case))
    assert ids(result) == {"tie-left"}


def test_an_alias_only_survivor_that_was_not_renamed_is_a_tie_left(
    tmp_path: Path, rewritten: Callable[..., Path]
) -> None:
    names = read_tensors(source("dg_nvfp4")).keys() - read_tensors(rewritten("dg_nvfp4")).keys()
    alias = "model.encoder.language_model.norm.weight"
    assert alias in names
    dst = shutil.copytree(rewritten("dg_nvfp4", manifest=False), tmp_path / "dst")
    tensors, metadata = read_shard(dst / "model.safetensors")
    tensors[alias] = tensors.pop("model.decoder.norm.weight")
    write_shard(dst / "model.safetensors", tensors, metadata)
    (dst / INDEX).unlink()
    result = verify(source("dg_nvfp4"), dst)
    assert [(p.id, p.where) for p in result.problems] == [("tie-left", "model.decoder.norm.weight")]


# ------------------------------------------------------------------------------------------------------------ scales


def f32(value: float) -> Tensor:
    return "F32", [], struct.pack("<f", value)


def bf16(bits: int) -> Tensor:
    return "BF16", [1], struct.pack("<H", bits)


TINY = struct.unpack("<f", struct.pack("<I", 7))[0]  # a denormal
CASES_OF_SCALES = {
    # name: (canonical's input_scale, alias's, right result, wrong results)
    "the largest counts": (f32(2.0), f32(3.0), f32(3.0), [f32(2.0), f32(3.0000002), f32(2.9999998), f32(0.0)]),
    "also when it is the canonical": (f32(3.0), f32(2.0), f32(3.0), [f32(2.0), f32(6.0), f32(-3.0)]),
    "a missing side": (None, f32(0.5), f32(0.5), [f32(0.25), f32(float("nan"))]),
    "a side that was never calibrated": (f32(float("inf")), f32(0.5), f32(0.5), [f32(float("inf")), f32(0.0)]),
    "NaN": (f32(0.5), f32(float("nan")), f32(0.5), [f32(float("nan"))]),
    "negative, zero, denormal": (f32(-1.0), f32(TINY), f32(-1.0), [f32(TINY), f32(0.0), f32(1.0)]),
    "BF16 rounds up": (bf16(0x3F80), f32(1.001), bf16(0x3F81), [bf16(0x3F80), bf16(0x3F82)]),
    "BF16 holds it": (bf16(0x3F80), f32(0.5), bf16(0x3F80), [bf16(0x3F00), bf16(0x3F81)]),
}


@pytest.mark.parametrize("case", CASES_OF_SCALES)
def test_a_merged_scale_is_right_for_one_value_only(case: str, tmp_path: Path) -> None:
    canonical, alias, right, wrong = CASES_OF_SCALES[case]
    weight: Tensor = ("F8_E4M3", [2], b"\x01\x02")
    tensors = {"a.weight": weight, "b.weight": weight, "a.input_scale": canonical, "b.input_scale": alias}
    src = write_checkpoint(tmp_path / "src", {k: v for k, v in tensors.items() if v is not None})
    ties = tmp_path / "ties.json"
    ties.write_text('{"b.weight": "a.weight"}')
    dst = tmp_path / "dst"
    write_checkpoint(dst, {"a.weight": weight, "a.input_scale": right})
    assert verify(src, dst, ties=ties).problems == ()
    for value in wrong:
        write_checkpoint(dst, {"a.weight": weight, "a.input_scale": value})
        assert ids(verify(src, dst, ties=ties)) == {"merge"}
    write_checkpoint(dst, {"a.weight": weight})
    assert ids(verify(src, dst, ties=ties)) == {"missing"}


@pytest.mark.parametrize("sides", [(3.0, 2.0), (2.0, 3.0)])
def test_a_reciprocal_is_merged_to_the_smallest(sides: tuple[float, float], tmp_path: Path) -> None:
    weight: Tensor = ("U8", [2], b"\x01\x02")
    tensors = {"a.weight_packed": weight, "b.weight_packed": weight}
    scales = {f"{n}.input_global_scale": f32(v) for n, v in zip("ab", sides, strict=True)}
    src = write_checkpoint(tmp_path / "src", tensors | scales)
    ties = tmp_path / "ties.json"
    ties.write_text('{"b.weight": "a.weight"}')
    for value in (2.0, 3.0, 1.9999999):
        dst = write_checkpoint(tmp_path / "dst", {"a.weight_packed": weight, "a.input_global_scale": f32(value)})
        assert ids(verify(src, dst, ties=ties)) == (set() if value == 2.0 else {"merge"})


# ------------------------------------------------------------------------------------------------------------- NVFP4


def blob(codes: Any, scales: Any, scale: float) -> dict[str, Tensor]:
    return {
        "weight": ("U8", list(codes.shape), codes.tobytes()),
        "weight_scale": ("F8_E4M3", list(scales.shape), scales.tobytes()),
        "weight_scale_2": ("F32", [], struct.pack("<f", scale)),
    }


def encoded(seed: int, factor: float = 1.0) -> tuple[Any, Any, float]:
    weight = np.random.default_rng(seed).standard_normal((4, 64)).astype(np.float32)
    codes, scales, scale = nvfp4.encode(weight)
    if factor == 1.0:
        return codes, scales, float(scale)
    new = np.float32(scale * np.float32(factor))
    return (*nvfp4.repack(codes, scales, scale, new), float(new))


def named(module: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{module}.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("wider", ["a", "b"])
def test_one_blob_for_sides_of_different_scales_is_right_at_the_larger_scale(wider: str, tmp_path: Path) -> None:
    small, large = blob(*encoded(0)), blob(*encoded(0, 2.5))
    sides = {"a": large, "b": small} if wider == "a" else {"a": small, "b": large}
    src = write_checkpoint(tmp_path / "src", named("a", sides["a"]) | named("b", sides["b"]))
    ties = tmp_path / "ties.json"
    ties.write_text('{"b.weight": "a.weight"}')

    def outcome(tensors: dict[str, Tensor]) -> Verification:
        dst = write_checkpoint(tmp_path / "dst", named("a", tensors))
        return verify(src, dst, ties=ties, on_mismatch="repack")

    right = outcome(large)
    assert right.problems == ()
    assert (right.repacked, right.dropped) == (3, 3)
    assert not outcome(small).ok
    assert not outcome(large | {"weight_scale_2": small["weight_scale_2"]}).ok
    for name in ("weight", "weight_scale"):
        dtype, shape, data = large[name]
        assert not outcome(large | {name: (dtype, shape, bytes([data[0] ^ 1]) + data[1:])}).ok
    assert verify(src, src, ties=ties, on_mismatch="keep").ok
    assert ids(verify(src, src, ties=ties)) == {"refused"}


def test_one_blob_for_sides_that_differ_by_more_than_scaling_is_wrong(tmp_path: Path) -> None:
    one, other = blob(*encoded(0)), blob(*encoded(1, 2.5))
    src = write_checkpoint(tmp_path / "src", named("a", one) | named("b", other))
    ties = tmp_path / "ties.json"
    ties.write_text('{"b.weight": "a.weight"}')
    for tensors in (one, other):
        dst = write_checkpoint(tmp_path / "dst", named("a", tensors))
        assert "unconfirmed-drop" in ids(verify(src, dst, ties=ties, on_mismatch="repack"))


def test_a_linear_reencoded_to_the_scale_of_the_one_it_is_fused_with_is_right(tmp_path: Path) -> None:
    gate, up = blob(*encoded(0)), blob(*encoded(1, 2.5))
    codes, scales, scale = encoded(0)
    new = np.float32(encoded(1, 2.5)[2])
    reencoded = blob(*nvfp4.repack(codes, scales, np.float32(scale), new), float(new))
    more: dict[str, Tensor] = {"x.weight": ("U8", [1], b"1")}
    tied = more | {"y.weight": more["x.weight"]}
    src = write_checkpoint(tmp_path / "src", named("m.gate_proj", gate) | named("m.up_proj", up) | tied)
    ties = tmp_path / "ties.json"
    ties.write_text('{"y.weight": "x.weight"}')
    dst = write_checkpoint(tmp_path / "dst", named("m.gate_proj", reencoded) | named("m.up_proj", up) | more)
    result = verify(src, dst, ties=ties, unify_fused_scales=True)
    assert result.problems == ()
    assert result.repacked == 3
    assert ids(verify(src, dst, ties=ties)) == {"bytes"}
    alone = write_checkpoint(tmp_path / "src2", named("m.other_proj", gate) | named("m.up_proj", up) | tied)
    dst = write_checkpoint(tmp_path / "dst", named("m.other_proj", reencoded) | named("m.up_proj", up) | more)
    assert ids(verify(alone, dst, ties=ties, unify_fused_scales=True)) == {"bytes"}


def test_fused_scales_wider_than_those_of_src_are_wrong_though_they_are_equal(tmp_path: Path) -> None:
    gate, up = encoded(0), encoded(1, 2.5)
    more: dict[str, Tensor] = {"x.weight": ("U8", [1], b"1")}
    tied = more | {"y.weight": more["x.weight"]}
    src = write_checkpoint(tmp_path / "src", named("m.gate_proj", blob(*gate)) | named("m.up_proj", blob(*up)) | tied)
    ties = tmp_path / "ties.json"
    ties.write_text('{"y.weight": "x.weight"}')
    wide = np.float32(up[2] * np.float32(1e10))
    zeroed = {
        name: blob(*nvfp4.repack(codes, scales, np.float32(scale), wide), float(wide))
        for name, (codes, scales, scale) in {"m.gate_proj": gate, "m.up_proj": up}.items()
    }
    tensors = named("m.gate_proj", zeroed["m.gate_proj"]) | named("m.up_proj", zeroed["m.up_proj"])
    dst = write_checkpoint(tmp_path / "dst", tensors | more)
    assert ids(verify(src, dst, ties=ties, unify_fused_scales=True)) == {"bytes", "not-unified"}
    assert ids(verify(src, dst, ties=ties)) == {"bytes"}


def with_rescaled_sides(folder: Path, *modules: str) -> Path:
    """A copy of dg_nvfp4 in which `modules` hold the same weights under a larger weight_scale_2."""
    shutil.copytree(source("dg_nvfp4"), folder)
    tensors, metadata = read_shard(folder / "model.safetensors")
    for module in modules:
        names = [f"{module}.{part}" for part in ("weight", "weight_scale", "weight_scale_2")]
        codes, scales = (np.frombuffer(tensors[n][2], np.uint8).reshape(tensors[n][1]) for n in names[:2])
        old = np.frombuffer(tensors[names[2]][2], "<f4")
        new = np.float32(old[0] * np.float32(2.5))
        for name, data in zip(names, (*nvfp4.repack(codes, scales, old, new), new), strict=True):
            tensors[name] = (*tensors[name][:2], data.tobytes())
    write_shard(folder / "model.safetensors", tensors, metadata)
    return folder


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("unify", [True, False])
@pytest.mark.parametrize("side", ["model.decoder.", "model.encoder.language_model."])
def test_a_repacked_checkpoint_is_proved(side: str, unify: bool, manifest: bool, tmp_path: Path) -> None:
    src = with_rescaled_sides(
        tmp_path / "src", f"{side}layers.0.experts.1.gate_proj", f"{side}layers.1.self_attn.q_proj"
    )
    dst = tmp_path / "dst"
    options: dict[str, Any] = {"on_mismatch": "repack", "unify_fused_scales": unify}
    tierewrite.rewrite(src, dst, manifest=manifest, **options)
    result = verify(src, dst, **options)
    assert result.problems == ()
    assert result.repacked > 6 if unify else result.repacked == 6
    tensors, metadata = read_shard(dst / "model.safetensors")
    name = "model.decoder.layers.0.experts.1.gate_proj.weight"
    dtype, shape, data = tensors[name]
    tensors[name] = dtype, shape, bytes([data[0] ^ 1]) + data[1:]
    write_shard(dst / "model.safetensors", tensors, metadata)
    assert "bytes" in ids(verify(src, dst, **options))


def test_fused_scales_that_were_to_be_unified_and_are_not_are_found(tmp_path: Path) -> None:
    src = with_rescaled_sides(tmp_path / "src", "model.decoder.layers.1.self_attn.q_proj")
    dst = tmp_path / "dst"
    tierewrite.rewrite(src, dst, on_mismatch="repack")
    manifest = json.loads((dst / MANIFEST).read_text())
    manifest["options"]["unify_fused_scales"] = True
    (dst / MANIFEST).write_text(json.dumps(manifest))
    assert ids(verify(src, dst, on_mismatch="repack")) == {"manifest"}
    assert "not-unified" in ids(verify(src, dst, on_mismatch="repack", unify_fused_scales=True))


# ------------------------------------------------------------------------------------------------------ the manifest


def first_entry(manifest: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    return next(
        entry
        for group in manifest["groups"]
        for entry in group["tensors"].values()
        if all(entry[key] == value for key, value in wanted.items())
    )


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "schema": lambda m: m.update(schema="tierewrite/manifest/2"),
    "tool": lambda m: m["tool"].update(name="other"),
    "a source shard's size": lambda m: m["source"]["shards"][0].update(size=1),
    "a source shard": lambda m: m["source"]["shards"].pop(),
    "an option": lambda m: m["options"].update(kv_scales="drop"),
    "a missing option": lambda m: m["options"].pop("on_mismatch"),
    "a source of ties": lambda m: m["ties"].update(source="guess"),
    "a tie less": lambda m: m["ties"]["map"].popitem(),
    "a tie more": lambda m: m["ties"]["map"].update(x="y"),
    "a group less": lambda m: m["groups"].remove(next(g for g in m["groups"] if g["status"] == "rewritten")),
    "a group twice": lambda m: m["groups"].append(m["groups"][0]),
    "a status": lambda m: next(g for g in m["groups"] if g["status"] == "rewritten").update(status="canonical"),
    "a kept group": lambda m: next(g for g in m["groups"] if g["tensors"]).update(status="kept", reason="differs"),
    "a digest": lambda m: first_entry(m).update(blake3="0" * 64),
    "an origin": lambda m: first_entry(m, action="merge")["from"].pop(),
    "the carrier": lambda m: first_entry(m, action="merge")["from"].reverse(),
    "an action": lambda m: first_entry(m, action="rename").update(action="keep"),
    "merged": lambda m: first_entry(m, merged=True).update(merged=False),
    "a ratio": lambda m: first_entry(m, merged=True).update(ratio=1.0),
    "calibrated": lambda m: first_entry(m, merged=True).update(calibrated=False),
    "a tensor that is not there": lambda m: m["groups"][0]["tensors"].update({"x": first_entry(m)}),
    "aliases of a group": lambda m: m["groups"][0].update(aliases=["nobody"] * len(m["groups"][0]["aliases"])),
    "the canonical name of a group": lambda m: m["groups"][0].update(canonical="nobody"),
    "the id of a group": lambda m: m["groups"][0].update(id="nobody", canonical="nobody"),
    "who declared the ties": lambda m: m["ties"].update(source="ties-file", detail=""),
    "the class": lambda m: m["ties"].update(detail="Other"),
    "a limit": lambda m: m["options"].update(max_shard_size=10**15),
    "another option": lambda m: m["options"].update(on_mismatch="keep"),
    "an option of another kind": lambda m: m["options"].update(fill_missing_scales="no"),
    "an option that nobody knows": lambda m: m["options"].update(colour="red"),
    "a tensor less": lambda m: next(g for g in m["groups"] if len(g["tensors"]) > 1)["tensors"].popitem(),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_in_the_manifest_is_found(lie: str, tmp_path: Path, rewritten: Callable[..., Path]) -> None:
    dst = shutil.copytree(rewritten("dg_nvfp4"), tmp_path / "dst")
    manifest = json.loads((dst / MANIFEST).read_text())
    LIES[lie](manifest)
    (dst / MANIFEST).write_text(json.dumps(manifest))
    assert "manifest" in ids(verify(source("dg_nvfp4"), dst))


@pytest.mark.parametrize("text", ["", "{}", "[]", "nonsense", '{"schema": 1, "schema": 2}', "[" * 100_000, "\ud800"])
def test_a_manifest_that_is_none_is_a_problem_and_no_crash(
    text: str, tmp_path: Path, rewritten: Callable[..., Path]
) -> None:
    dst = shutil.copytree(rewritten("qwen3_tied_bf16"), tmp_path / "dst")
    (dst / MANIFEST).write_bytes(text.encode("utf-8", "surrogatepass"))
    result = verify(source("qwen3_tied_bf16"), dst)
    assert ids(result) == {"manifest"}
    assert result.ties_source == "class"


def test_a_hostile_manifest_crashes_nothing(tmp_path: Path, rewritten: Callable[..., Path]) -> None:
    dst = shutil.copytree(rewritten("dg_nvfp4_kvfp8"), tmp_path / "dst")
    text = (dst / MANIFEST).read_text()
    ties = tmp_path / "ties.json"
    ties.write_text(json.dumps(json.loads(text)["ties"]["map"]))
    rng = random.Random(0)
    odd: list[Any] = [
        None,
        True,
        0,
        -1,
        1e308,
        "",
        "a",
        "\x1b[2J\ud800",
        [],
        {},
        [[]],
        {"a": 1},
        "model.decoder",
        10**400,
    ]
    for _ in range(150):
        manifest = json.loads(text)
        for _ in range(rng.choice((1, 1, 2))):
            parent, key = manifest, rng.choice(list(manifest))
            while isinstance(parent[key], (dict, list)) and parent[key] and rng.random() < 0.85:
                parent = parent[key]
                key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
            parent[key] = rng.choice(odd)
        (dst / MANIFEST).write_text(json.dumps(manifest))
        result = verify(source("dg_nvfp4_kvfp8"), dst, ties=ties if rng.random() < 0.8 else None)
        json.dumps(result.to_json())
        assert "\x1b" not in "".join(problem.message for problem in result.problems)


def test_tensors_that_the_index_lacks_are_left_out_on_request(tmp_path: Path, copied: Callable[[str], Path]) -> None:
    src = copied("dg_nvfp4_sharded")
    index = json.loads((src / INDEX).read_text())
    del index["weight_map"]["model.decoder.layers.0.layer_scalar"]
    (src / INDEX).write_text(json.dumps(index))
    tierewrite.rewrite(src, tmp_path / "dst", ignore_unindexed=True)
    assert verify(src, tmp_path / "dst", ignore_unindexed=True).ok
    with pytest.raises(SourceError):
        verify(src, tmp_path / "dst")


def test_a_proof_under_the_manifests_own_ties_does_not_claim_more(tmp_path: Path) -> None:
    same = ("U8", [4], b"same")
    config = {"architectures": ["NobodyKnows"]}
    src = write_checkpoint(tmp_path / "src", {"embed.weight": same, "head.weight": same}, config=config)
    tierewrite.rewrite(src, tmp_path / "dst", ties={"head.weight": "embed.weight"})
    result = verify(src, tmp_path / "dst")
    assert (result.ok, result.ties_source) == (True, "manifest")
    assert "what rewriting SRC gives under the ties that DST's tierewrite.json declares." in str(result)


# -------------------------------------------------------------------------------------------------------- unreadable


def test_an_unreadable_dst_is_a_problem_an_unreadable_src_an_error(tmp_path: Path) -> None:
    src = source("qwen3_tied_bf16")
    assert ids(verify(src, tmp_path / "nowhere")) == {"unreadable"}
    assert ids(verify(src, src / "config.json")) == {"unreadable"}
    (tmp_path / "empty").mkdir()
    assert ids(verify(src, tmp_path / "empty")) == {"unreadable"}
    for wrong in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(SourceError):
            verify(wrong, src)


def test_the_index_is_a_file_of_dst_with_the_members_of_an_index(
    tmp_path: Path, rewritten: Callable[..., Path]
) -> None:
    src = source("qwen3_tied_bf16")
    dst = shutil.copytree(rewritten("qwen3_tied_bf16", manifest=False), tmp_path / "dst")
    text = (dst / INDEX).read_text()
    (dst / INDEX).write_text(json.dumps({**json.loads(text), "note": 1}))
    assert [(p.id, p.where) for p in verify(src, dst).problems] == [("index", INDEX)]
    (tmp_path / "elsewhere").write_text(text)
    (dst / INDEX).unlink()
    (dst / INDEX).symlink_to(tmp_path / "elsewhere")
    assert [(p.id, p.where) for p in verify(src, dst).problems] == [("index", INDEX)]
    (dst / INDEX).unlink()
    (dst / INDEX).write_text(text)
    (dst / "tierewrite.incomplete.json").write_text("{}")
    assert [p.id for p in verify(src, dst).problems] == ["unfinished"]


def test_a_dtype_that_the_installed_safetensors_does_not_know_is_noted_and_nothing_else(tmp_path: Path) -> None:
    """A rewrite copies such bytes; that a newer safetensors wrote them is no fault of DST."""
    new, old = Tensor("F8_OF_TOMORROW", [3], b"abc"), Tensor("BF16", [1], b"ab")
    tensors = {"a.weight": new, "b.weight": new, "c.weight": old}
    src = write_checkpoint(tmp_path / "src", tensors, {"_tied_weights_keys": {"b.weight": "a.weight"}})
    tierewrite.rewrite(src, tmp_path / "dst", max_shard_size=3, verify=True)
    found = verify(src, tmp_path / "dst", max_shard_size=3)
    assert found.ok
    assert ["1 shard could not be opened" in note and "F8_OF_TOMORROW" in note for note in found.notes] == [True]
    shard = tmp_path / "dst" / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert not verify(src, tmp_path / "dst", max_shard_size=3).ok


@pytest.mark.parametrize("what", ["fifo", "folder", "truncated", "index"])
def test_a_dst_with_a_broken_file_is_unreadable(what: str, tmp_path: Path, rewritten: Callable[..., Path]) -> None:
    dst = shutil.copytree(rewritten("qwen3_tied_bf16"), tmp_path / "dst")
    shard = dst / "model.safetensors"
    if what == "truncated":
        os.truncate(shard, shard.stat().st_size - 1)
    elif what == "index":
        (dst / INDEX).write_text("{")
    else:
        shard.unlink()
        os.mkfifo(shard) if what == "fifo" else shard.mkdir()
    assert ids(verify(source("qwen3_tied_bf16"), dst)) == {"unreadable"}


def test_a_source_that_changes_while_it_is_read_is_noticed(tmp_path: Path, copied: Callable[[str], Path]) -> None:
    src = copied("qwen3_tied_bf16")
    dst = tmp_path / "dst"
    tierewrite.rewrite(src, dst)
    shard = src / "model.safetensors"

    def touch(_: int) -> None:
        os.utime(shard, ns=(1, 1))

    with pytest.raises(SourceChanged):
        verify(src, dst, progress=Counting(touch))


def test_short_reads_are_continued_and_io_errors_of_src_and_dst_differ(
    rewritten: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    src, dst = source("dg_nvfp4_sharded"), rewritten("dg_nvfp4_sharded")
    real = local._pread_into
    monkeypatch.setattr(local, "_pread_into", lambda fd, into, at: real(fd, into[:4099], at))
    assert verify(src, dst).ok
    for folder in (src, dst):
        inodes = {path.stat().st_ino for path in folder.glob("*.safetensors")}

        def failing(fd: int, into: memoryview, at: int, inodes: set[int] = inodes) -> int:
            if os.fstat(fd).st_ino in inodes:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(fd, into, at)

        monkeypatch.setattr(local, "_pread_into", failing)
        if folder == dst:
            assert ids(verify(src, dst)) == {"unreadable"}
        else:
            with pytest.raises(SystemFailure):
                verify(src, dst)


# ------------------------------------------------------------------------------------------- one corruption at a time


class Corruptor:
    """Makes one random change to a checkpoint at a time and takes it back."""

    def __init__(self, case: str, dst: Path, folder: Path, seed: int) -> None:
        self.case, self.random = case, random.Random(seed)
        self.original = {p.relative_to(dst).as_posix(): p.read_bytes() for p in dst.rglob("*") if p.is_file()}
        self.folder = Path(shutil.copytree(dst, folder))
        self.shards = [name for name in self.original if name.endswith(".safetensors")]
        self.sides = [name for name in self.original if name not in (*self.shards, INDEX, MANIFEST)]
        self.contents = {name: read_shard(dst / name) for name in self.shards}
        self.source = read_tensors(source(case))
        manifest = json.loads(self.original[MANIFEST])
        self.merged = {
            name: entry["from"]
            for group in manifest["groups"]
            for name, entry in group["tensors"].items()
            if entry["merged"]
        }
        self.kinds = [k for k in self.KINDS if (k != "wrong merge" or self.merged)]

    KINDS = (
        "bit in data",
        "bit in header",
        "bit in index",
        "swapped data",
        "swapped names",
        "dropped tensor",
        "dropped tensor, index too",
        "wrong merge",
        "side file",
        "alias back",
        "renamed tensor",
        "cut file",
    )

    def restore(self) -> None:
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and name not in self.original:
                path.unlink()
        for name, data in self.original.items():
            path = self.folder / name
            if not path.is_file() or path.read_bytes() != data:
                path.write_bytes(data)

    def flip(self, name: str, start: int, end: int) -> str:
        data = bytearray(self.original[name])
        at, bit = self.random.randrange(start, end), self.random.randrange(8)
        data[at] ^= 1 << bit
        (self.folder / name).write_bytes(data)
        return f"{name}: bit {bit} of byte {at}"

    def rewrite(self, name: str, tensors: dict[str, Tensor]) -> None:
        write_shard(self.folder / name, tensors, self.contents[name][1])

    def reindex(self) -> None:
        index = json.loads(self.original[INDEX])
        index["weight_map"] = {key: name for name in self.shards for key in read_shard(self.folder / name)[0]}
        index["metadata"]["total_size"] = sum(len(data) for _, _, data in read_tensors(self.folder).values())
        (self.folder / INDEX).write_text(json.dumps(index))

    def pair(self, tensors: dict[str, Tensor]) -> tuple[str, str] | None:
        """Two tensors of one dtype and shape with different bytes."""
        names = list(tensors)
        self.random.shuffle(names)
        for one in names[:20]:
            for other in names:
                if tensors[one][:2] == tensors[other][:2] and tensors[one][2] != tensors[other][2]:
                    return one, other
        return None

    def corrupt(self, kind: str) -> str | None:
        """Make one change; says which, or None where this one is not possible here."""
        rng = self.random
        shard = rng.choice(self.shards)
        raw = self.original[shard]
        start = 8 + int.from_bytes(raw[:8], "little")
        tensors = dict(self.contents[shard][0])
        if kind == "bit in data":
            return self.flip(shard, start, len(raw))
        if kind == "bit in header":
            return self.flip(shard, 0, start)
        if kind == "bit in index":
            return self.flip(INDEX, 0, len(self.original[INDEX]))
        if kind in ("swapped data", "swapped names"):
            found = self.pair(tensors)
            if found is None:
                return None
            one, other = found
            tensors[one], tensors[other] = tensors[other], tensors[one]
            self.rewrite(shard, tensors)
            return f"{kind} {one} {other}"
        if kind.startswith("dropped"):
            name = rng.choice(list(tensors))
            del tensors[name]
            self.rewrite(shard, tensors)
            if kind.endswith("too"):
                self.reindex()
            return f"{kind} {name}"
        if kind == "wrong merge":
            name = rng.choice([n for n in self.merged if n in tensors] or [""])
            if not name:
                return None
            dtype, shape, data = tensors[name]
            (value,) = struct.unpack("<f", data)
            others = [self.source[key][2] for key in self.merged[name]]
            wrong = [
                d for d in (*others, *(struct.pack("<f", value * k) for k in (0.5, 1.0000002, 2, 0, -1))) if d != data
            ]
            tensors[name] = dtype, shape, rng.choice(wrong)
            self.rewrite(shard, tensors)
            return f"{kind} {name}"
        if kind == "side file":
            name = rng.choice(self.sides)
            path, data = self.folder / name, self.original[name]
            how = rng.randrange(5)
            if how == 0:
                path.unlink()
            elif how == 1:
                path.write_bytes(data[:-1])
            elif how == 2:
                path.write_bytes(data + b"\n")
            elif how == 3:
                (self.folder / "extra.txt").write_text("")
            else:
                return self.flip(name, 0, len(data))
            return f"{kind} {name} {how}"
        if kind == "alias back":
            gone = sorted(self.source.keys() - {key for held, _ in self.contents.values() for key in held})
            if not gone:
                return None
            name = rng.choice(gone)
            tensors[name] = self.source[name]
            self.rewrite(shard, tensors)
            self.reindex()
            return f"{kind} {name}"
        if kind == "renamed tensor":
            name = rng.choice(list(tensors))
            tensors[f"{name[:-1]}x"] = tensors.pop(name)
            self.rewrite(shard, tensors)
            self.reindex()
            return f"{kind} {name}"
        assert kind == "cut file"
        name = rng.choice([shard, INDEX])
        (self.folder / name).write_bytes(self.original[name][: rng.randrange(len(self.original[name]))])
        return f"{kind} {name}"


def corrupted(
    case: str, dst: Path, folder: Path, count: int, seed: int, keep_manifest: bool, options: dict[str, Any]
) -> dict[str, int]:
    """Verify `count` single corruptions; returns how many of each kind. Fails on the first that is not found."""
    ties = folder.parent / f"{folder.name}-ties.json"
    manifest = json.loads((dst / MANIFEST).read_text())
    ties.write_text(json.dumps(manifest["ties"]["map"]))
    made = folder.with_name(folder.name + "-made")
    tierewrite.rewrite(source(case), made, ties=ties, **options)  # so that its manifest tells of the file
    breaker = Corruptor(case, made, folder, seed)
    if not keep_manifest:
        del breaker.original[MANIFEST]
    breaker.restore()
    breaker_kinds = dict.fromkeys(breaker.kinds, 0)
    assert verify(source(case), breaker.folder, ties=ties, **options).ok
    done = 0
    while done < count:
        kind = breaker.random.choice(breaker.kinds)
        what = breaker.corrupt(kind)
        if what is not None:
            assert not verify(source(case), breaker.folder, ties=ties, **options).ok, f"seed {seed}, {case}: {what}"
            breaker_kinds[kind] += 1
            done += 1
        breaker.restore()
    assert verify(source(case), breaker.folder, ties=ties, **options).ok
    return breaker_kinds


@pytest.mark.parametrize(
    ("case", "options", "count", "keep_manifest"),
    [
        ("qwen3_tied_bf16", {}, 300, True),
        ("bart_bf16", {}, 250, False),
        ("dg_nvfp4_kvfp8", {"kv_scales": "merge"}, 200, True),
        ("llmcompressor_nvfp4_dg", {}, 100, False),
        ("dg_nvfp4_sharded", {}, 150, True),
    ],
)
def test_every_one_of_a_thousand_single_corruptions_is_found(
    case: str, options: dict[str, Any], count: int, keep_manifest: bool, tmp_path: Path, rewritten: Callable[..., Path]
) -> None:
    kinds = corrupted(case, rewritten(case, **options), tmp_path / "dst", count, 2026, keep_manifest, options)
    assert sum(kinds.values()) == count
    assert all(kinds.values()), kinds


@pytest.mark.long
def test_every_one_of_ten_thousand_single_corruptions_is_found(tmp_path: Path, rewritten: Callable[..., Path]) -> None:
    for case in ("qwen3_tied_bf16", "dg_fp8", "dg_nvfp4_kvfp8", "dg_nvfp4_sharded", "llmcompressor_nvfp4_dg"):
        kinds = corrupted(case, rewritten(case), tmp_path / case, 2_000, 7, True, {})
        print(case, kinds)


def test_options_that_are_not_those_of_the_rewrite_are_said_first(tmp_path: Path) -> None:
    """Of a model's thousands of problems only the first are shown: the cause must be among them."""
    src = FIXTURES / "dg_nvfp4_kvfp8" / "naive"
    tierewrite.rewrite(src, tmp_path / "dst", kv_scales="merge")
    first, *others = tierewrite.verify(src, tmp_path / "dst").problems
    assert "give verify the options of the rewrite" in first.message
    assert {problem.id for problem in others} - {"manifest"}
