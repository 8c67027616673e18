"""NVFP4 blobs that are re-encoded: sides of one weight under two scales, and fused projections."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tierewrite
from tests.checkpoints import Tensor, digests, edit_tensors, read_tensors, right_answer
from tierewrite.errors import Refused
from tierewrite.numbers import nvfp4

Naive = Callable[[str], Path]
ENCODER, DECODER = "model.encoder.language_model", "model.decoder"
MODULE = "layers.0.mlp.down_proj"


def blob(tensors: dict[str, Tensor], module: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes, block scales, weight_scale_2) of a ModelOpt NVFP4 weight."""
    return tuple(  # type: ignore[return-value]
        np.frombuffer(tensors[f"{module}.{part}"][2], dtype).reshape(tensors[f"{module}.{part}"][1])
        for part, dtype in (("weight", np.uint8), ("weight_scale", np.uint8), ("weight_scale_2", np.float32))
    )


def rescaled(src: Path, module: str, factor: float) -> None:
    """Re-encodes one module of a checkpoint to `factor` times its weight_scale_2."""
    tensors = read_tensors(src)
    codes, scales, scale = blob(tensors, module)
    new = np.float32(scale * np.float32(factor))
    new_codes, new_scales = nvfp4.repack(codes, scales, scale, new)
    edit_tensors(
        src,
        {
            f"{module}.weight": ("U8", list(codes.shape), new_codes.tobytes()),
            f"{module}.weight_scale": ("F8_E4M3", list(scales.shape), new_scales.tobytes()),
            f"{module}.weight_scale_2": ("F32", [], struct.pack("<f", new)),
        },
    )


def test_sides_that_differ_by_scaling_are_refused_by_default(copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4")
    rescaled(src, f"{ENCODER}.{MODULE}", 1.7)
    with pytest.raises(tierewrite.Refused, match=r"down_proj"):
        tierewrite.rewrite(src, tmp_path / "out")


@pytest.mark.parametrize("side", [ENCODER, DECODER])
def test_repack_writes_one_blob_at_the_larger_scale(side: str, copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4")
    rescaled(src, f"{side}.{MODULE}", 1.7)
    tensors = read_tensors(src)
    larger = max(blob(tensors, f"{s}.{MODULE}")[2] for s in (ENCODER, DECODER))
    report = tierewrite.rewrite(src, tmp_path / "out", on_mismatch="repack", verify=True)
    after = read_tensors(tmp_path / "out")
    assert after.keys() == right_answer("dg_nvfp4").keys()
    codes, scales, scale = blob(after, f"{DECODER}.{MODULE}")
    assert scale == larger
    old = blob(tensors, f"{DECODER}.{MODULE}")
    want_codes, want_scales = nvfp4.repack(*old, larger)
    assert (codes.tobytes(), scales.tobytes()) == (want_codes.tobytes(), want_scales.tobytes())
    (job,) = report.reencoded
    assert job.reason == "mismatch"
    assert job.module == f"{DECODER}.{MODULE}"
    sides = [blob(tensors, f"{s}.{MODULE}") for s in (ENCODER, DECODER)]
    moved = [nvfp4.change(one, (codes, scales, scale)) for one in sides]
    assert job.largest == pytest.approx(max(change.largest for change in moved))
    assert job.rms == pytest.approx(float(np.sqrt(np.mean([change.rms**2 for change in moved]))))
    manifest = json.loads((tmp_path / "out" / "tierewrite.json").read_text())
    (group,) = [g for g in manifest["groups"] if g["canonical"] == f"{DECODER}.{MODULE}.weight"]
    entry = group["tensors"][f"{DECODER}.{MODULE}.weight"]
    assert entry["action"] == "repack"
    assert entry["blake3"] == digests(tmp_path / "out")[f"{DECODER}.{MODULE}.weight"]["blake3"]


def test_repack_of_identical_sides_is_a_plain_rewrite(naive: Naive, tmp_path: Path) -> None:
    report = tierewrite.rewrite(naive("dg_nvfp4"), tmp_path / "out", on_mismatch="repack")
    assert report.reencoded == ()
    assert digests(tmp_path / "out") == right_answer("dg_nvfp4")


def test_repack_refuses_weights_that_differ_by_more_than_rounding(copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4")
    rescaled(src, f"{ENCODER}.{MODULE}", 1.7)
    name = f"{ENCODER}.{MODULE}.weight"
    dtype, shape, data = read_tensors(src)[name]
    edit_tensors(src, {name: (dtype, shape, bytes([data[0] ^ 0x88]) + data[1:])})  # two signs turned
    with pytest.raises(tierewrite.Refused, match="more than their scaling"):
        tierewrite.rewrite(src, tmp_path / "out", on_mismatch="repack")
    assert [path.name for path in tmp_path.iterdir()] == [src.name]


def test_repack_refuses_what_is_no_nvfp4(naive: Naive, tmp_path: Path) -> None:
    with pytest.raises(tierewrite.Refused, match="no part of an NVFP4 weight"):
        tierewrite.rewrite(naive("qwen3_tied_but_diverged_bf16"), tmp_path / "out", on_mismatch="repack")


def test_repack_refuses_like_error_when_one_side_is_bf16(naive: Naive, tmp_path: Path) -> None:
    with pytest.raises(tierewrite.Refused):
        tierewrite.rewrite(naive("dg_nvfp4_encoder_bf16"), tmp_path / "out", on_mismatch="repack")


def test_plan_marks_fused_projections_as_repack(naive: Naive) -> None:
    plan = tierewrite.plan(naive("dg_nvfp4"), unify_fused_scales=True)
    marked = {t.name for t in plan.tensors.values() if t.action == "repack"}
    assert f"{DECODER}.layers.0.mlp.gate_proj.weight_scale_2" in marked
    assert f"{DECODER}.layers.0.self_attn.q_proj.weight" in marked
    assert not any("down_proj" in name or "o_proj" in name for name in marked)


def test_unify_gives_fused_projections_the_largest_scale(naive: Naive, tmp_path: Path) -> None:
    report = tierewrite.rewrite(naive("dg_nvfp4"), tmp_path / "out", unify_fused_scales=True, verify=True)
    want, after = right_answer("dg_nvfp4"), read_tensors(tmp_path / "out")
    assert after.keys() == want.keys()
    tierewrite.rewrite(naive("dg_nvfp4"), tmp_path / "plain")
    plain = read_tensors(tmp_path / "plain")
    sets = 0
    for key in after:
        for words in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            if not key.endswith(f".{words[0]}.weight_scale_2"):
                continue
            stem = key.removesuffix(f"{words[0]}.weight_scale_2")
            modules = [stem + word for word in words if f"{stem}{word}.weight_scale_2" in after]
            old = [blob(plain, module) for module in modules]
            largest = max(one[2] for one in old)
            for module, one in zip(modules, old, strict=True):
                new = blob(after, module)
                assert new[2] == largest
                codes, scales = nvfp4.repack(*one, largest)
                assert (new[0].tobytes(), new[1].tobytes()) == (codes.tobytes(), scales.tobytes())
            sets += 1
    assert sets == 2 * (1 + 1 + 4)  # two layers: attention, mlp, four experts
    moved = {job.module for job in report.reencoded}
    assert moved == {
        module.removesuffix(".weight_scale_2")
        for module in after
        if module.endswith(".weight_scale_2") and after[module] != plain[module]
    }
    untouched = {name for name in after if not any(name.startswith(f"{module}.weight") for module in moved)}
    assert all(after[name] == plain[name] for name in untouched)


def test_unify_takes_the_smallest_of_compressed_tensors_reciprocals(copied: Naive, tmp_path: Path) -> None:
    src = copied("llmcompressor_nvfp4_dg")
    tensors = read_tensors(src)
    part = "layers.0.mlp.gate_proj.weight_global_scale"
    (old,) = struct.unpack("<f", tensors[f"{DECODER}.{part}"][2])
    halved = ("F32", [1], struct.pack("<f", old / 2))
    edit_tensors(src, {f"{side}.{part}": halved for side in (ENCODER, DECODER)})
    report = tierewrite.rewrite(src, tmp_path / "out", unify_fused_scales=True, verify=True)
    (job,) = report.reencoded
    assert (job.module, job.reason) == (f"{DECODER}.layers.0.mlp.up_proj", "fused")
    after = read_tensors(tmp_path / "out")
    up = f"{DECODER}.layers.0.mlp.up_proj"
    assert after[f"{up}.weight_global_scale"] == after[f"{DECODER}.{part}"] == halved
    names = (("weight_packed", np.uint8), ("weight_scale", np.uint8), ("weight_global_scale", np.float32))
    codes, scales, scale = (
        np.frombuffer(tensors[f"{up}.{name}"][2], dtype).reshape(tensors[f"{up}.{name}"][1]) for name, dtype in names
    )
    want = nvfp4.repack(codes, scales, scale, np.float32(old / 2), reciprocal=True)
    assert after[f"{up}.weight_packed"][2] == want[0].tobytes()
    assert after[f"{up}.weight_scale"][2] == want[1].tobytes()


def test_unified_output_is_unified_already(naive: Naive, tmp_path: Path) -> None:
    tierewrite.rewrite(naive("dg_nvfp4"), tmp_path / "once", unify_fused_scales=True)
    report = tierewrite.rewrite(tmp_path / "once", tmp_path / "twice", unify_fused_scales=True)
    assert report.reencoded == ()
    assert digests(tmp_path / "twice") == digests(tmp_path / "once")


def test_unify_leaves_a_set_with_a_zero_scale_alone_and_says_so(copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4")
    zero = ("F32", [], b"\0\0\0\0")
    edit_tensors(src, {f"{side}.layers.0.mlp.up_proj.weight_scale_2": zero for side in (ENCODER, DECODER)})
    report = tierewrite.rewrite(src, tmp_path / "out", unify_fused_scales=True)
    after = read_tensors(tmp_path / "out")
    assert after[f"{DECODER}.layers.0.mlp.up_proj.weight_scale_2"] == zero
    assert any("not unified" in warning and "layers.0.mlp" in warning for warning in report.warnings)


@pytest.mark.parametrize("byte", [0x7F, 0x80, 0xFF, 0xB0])
def test_unify_leaves_a_set_with_a_broken_block_scale_alone_and_says_so(
    byte: int, copied: Naive, tmp_path: Path
) -> None:
    src = copied("dg_nvfp4")
    tensors = read_tensors(src)
    word, name = "up_proj", "layers.0.mlp.up_proj.weight_scale"
    dtype, shape, data = tensors[f"{DECODER}.{name}"]
    larger = struct.pack("<f", 2 * blob(tensors, f"{DECODER}.layers.0.mlp.gate_proj")[2])
    for side in (ENCODER, DECODER):
        edit_tensors(
            src,
            {
                f"{side}.{name}": (dtype, shape, bytes([byte]) + data[1:]),
                f"{side}.layers.0.mlp.gate_proj.weight_scale_2": ("F32", [], larger),
            },
        )
    report = tierewrite.rewrite(src, tmp_path / "out", unify_fused_scales=True, verify=True)
    after = read_tensors(tmp_path / "out")
    for leaf in ("weight", "weight_scale", "weight_scale_2"):
        kept = f"{DECODER}.layers.0.mlp.{word}.{leaf}"
        assert after[kept] == read_tensors(src)[kept]
    assert any("not unified" in warning and f"{word}.weight_scale" in warning for warning in report.warnings)


@pytest.mark.parametrize("byte", [0x7F, 0x80])
def test_repack_refuses_a_broken_block_scale(byte: int, copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4")
    rescaled(src, f"{ENCODER}.layers.0.mlp.up_proj", 9.0)
    tensors = read_tensors(src)
    broken = {}
    for side in (ENCODER, DECODER):
        name = f"{side}.layers.0.mlp.up_proj.weight_scale"
        dtype, shape, data = tensors[name]
        broken[name] = (dtype, shape, bytes([byte]) + data[1:])
        codes, codes_shape, codes_data = tensors[f"{side}.layers.0.mlp.up_proj.weight"]
        broken[f"{side}.layers.0.mlp.up_proj.weight"] = (codes, codes_shape, bytes(8) + codes_data[8:])  # zeros
    edit_tensors(src, broken)
    with pytest.raises(Refused, match="up_proj"):
        tierewrite.rewrite(src, tmp_path / "out", on_mismatch="repack")
    assert not (tmp_path / "out").exists()


def test_repack_and_unify_together_choose_the_largest_of_all(copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4")
    rescaled(src, f"{ENCODER}.layers.0.mlp.up_proj", 9.0)
    tensors = read_tensors(src)
    largest = max(
        blob(tensors, f"{side}.layers.0.mlp.{word}")[2]
        for side in (ENCODER, DECODER)
        for word in ("up_proj", "gate_proj")
    )
    tierewrite.rewrite(src, tmp_path / "out", on_mismatch="repack", unify_fused_scales=True, verify=True)
    after = read_tensors(tmp_path / "out")
    for word in ("up_proj", "gate_proj"):
        assert blob(after, f"{DECODER}.layers.0.mlp.{word}")[2] == largest


def test_fix_ignore_rewrites_only_what_disagrees(copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4")
    config = json.loads((src / "config.json").read_text())
    # names one side only, of a module that is quantized on both
    config["quantization_config"]["ignore"].append(f"{ENCODER}.layers.0.mlp.up_proj")
    (src / "config.json").write_text(json.dumps(config, indent=4))
    plain = tierewrite.rewrite(src, tmp_path / "plain")
    assert any("up_proj" in warning and "fix_ignore=True" in warning for warning in plain.warnings)
    assert (tmp_path / "plain" / "config.json").read_bytes() == (src / "config.json").read_bytes()
    tierewrite.rewrite(src, tmp_path / "fixed", fix_ignore=True)
    fixed = json.loads((tmp_path / "fixed" / "config.json").read_text())
    ignore = config["quantization_config"]["ignore"]
    assert fixed["quantization_config"]["ignore"] == ignore[:-1]
    fixed["quantization_config"]["ignore"] = ignore
    assert fixed == config
    assert (tmp_path / "fixed" / "hf_quant_config.json").read_bytes() == (src / "hf_quant_config.json").read_bytes()
    assert digests(tmp_path / "fixed") == right_answer("dg_nvfp4")
    assert tierewrite.verify(src, tmp_path / "fixed", fix_ignore=True).ok
    assert tierewrite.verify(src, tmp_path / "plain").ok
