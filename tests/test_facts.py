"""What is known to bite, as end-to-end tests: each starts from files, calls `tierewrite.rewrite`, and reads
files.

Sources are the fixtures, edited in a temporary folder where no exporter gives the case. Everything here reads
and writes safetensors by itself: an 8-byte length, a JSON header, the data.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import stat
import struct
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

import tierewrite
from tests.checkpoints import FIXTURES, Tensors, read_header, read_shard, read_tensors, write_checkpoint, write_shard
from tests.checkpoints import Tensor as T
from tierewrite.errors import EXIT_REFUSED, Refused

ALIAS, CANONICAL = "model.encoder.language_model.", "model.decoder."


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a fixture's naive checkpoint, in one shard, after `edit(tensors)`; with `config` changed if given."""

    def make(fixture: str, edit: Callable[[Tensors], None] = lambda _: None, **quantization: Any) -> Path:
        source = FIXTURES / fixture / "naive"
        folder = tmp_path / "src"
        tensors = read_tensors(source)
        edit(tensors)
        write_checkpoint(folder, tensors)
        for path in source.glob("*.json"):
            if not path.name.endswith(".index.json"):
                shutil.copy(path, folder)
        for name, parts in (
            ("config.json", ("quantization_config",)),
            ("hf_quant_config.json", ("quantization",)),
        ):
            if quantization and (folder / name).exists():
                config = json.loads((folder / name).read_text())
                config[parts[0]].update(quantization)
                (folder / name).write_text(json.dumps(config, indent=2))
        return folder

    return make


def rewritten(source: Path, **options: Any) -> tuple[Tensors, Any]:
    target = source.parent / "dst"
    report = tierewrite.rewrite(source, target, device="cpu", **options)
    return read_tensors(target), report


def answer(fixture: str) -> dict[str, dict[str, Any]]:
    return json.loads((FIXTURES / fixture / "right_answer.json").read_text())


def described(tensors: Tensors) -> dict[str, dict[str, Any]]:
    return {
        name: {"dtype": t.dtype, "shape": list(t.shape), "blake3": blake3(t.data).hexdigest()}
        for name, t in sorted(tensors.items())
    }


def f32(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def value(tensor: T) -> float:
    assert tensor.dtype == "F32"
    (number,) = struct.unpack("<f", tensor.data)
    return number


def flip(tensor: T) -> T:
    """The same tensor with its last bit turned over."""
    return tensor._replace(data=tensor.data[:-1] + bytes([tensor.data[-1] ^ 1]))


def assert_refused(source: Path, *mentions: str) -> Refused:
    """By default: exit 3, the reason names what it is about, and nothing at all is written."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(Refused) as caught:
        tierewrite.rewrite(source, source.parent / "dst", device="cpu")
    assert caught.value.exit_code == EXIT_REFUSED
    told = json.dumps(caught.value.to_json(), ensure_ascii=False)
    for text in mentions:
        assert text in told
    assert sorted(source.parent.iterdir()) == before
    return caught.value


def refused_groups(error: Refused) -> set[str]:
    return {group["id"] for group in error.details["groups"]}


def assert_kept_whole(source: Path, result: Tensors, *modules: str) -> None:
    """Every tensor of the modules is in the result as it was in the source, on both sides."""
    tensors = read_tensors(source)
    kept = [
        name
        for name in tensors
        if name.rpartition(".")[0] in modules or name.startswith(tuple(f"{m}." for m in modules))
    ]
    assert kept
    for name in kept:
        assert result.get(name) == tensors[name], name


def assert_rest_rewritten(result: Tensors, *kept: str) -> None:
    """No other alias is left, except what is per side by nature."""
    left = {
        name for name in result if name.startswith(ALIAS) and not name.endswith(("layer_scalar", "k_scale", "v_scale"))
    }
    assert {name for name in left if not name.startswith(tuple(f"{ALIAS}{module}" for module in kept))} == set()


def both(module: str) -> tuple[str, str]:
    return CANONICAL + module, ALIAS + module


def experts_module(layer: int, expert: int, projection: str) -> str:
    return f"layers.{layer}.experts.{expert}.{projection}"


# -- the eleven facts
# ------------------------------------------------------------------------------------------------


def test_fact_01_a_tie_pattern_is_expanded_over_parameters_and_never_over_keys(
    edited: Callable[..., Path],
) -> None:
    # As declared by the class: both match more keys than parameters.
    assert re.match(
        r"encoder\.language_model\.layers\.(?:[^.]+\.)*weight",
        "encoder.language_model.layers.0.q.weight_scale",
    )
    assert re.match(r".*down_proj", "decoder.layers.0.experts.0.down_proj.input_scale")
    source = edited("dg_nvfp4")
    before = read_tensors(source)
    result, _ = rewritten(source)
    assert described(result) == answer("dg_nvfp4")
    manifest = json.loads((source.parent / "dst" / "tierewrite.json").read_text())
    for names in manifest["ties"]["map"].items():
        for name in names:
            assert not name.endswith(("weight_scale", "weight_scale_2", "input_scale"))
    differing = [
        name
        for name in before
        if name.endswith(".input_scale")
        and name.startswith(CANONICAL)
        and before[name].data != before[ALIAS + name.removeprefix(CANONICAL)].data
    ]
    assert differing, "scales that differ are what a pattern over keys would wrongly hold to be equal"
    for name in differing:
        sides = [value(before[name]), value(before[ALIAS + name.removeprefix(CANONICAL)])]
        assert value(result[name]) == max(sides)


@pytest.mark.parametrize("side", [CANONICAL, ALIAS], ids=["canonical", "alias"])
@pytest.mark.parametrize("what", ["one expert", "whole side"])
def test_fact_02_input_scale_that_one_side_lacks_is_taken_from_the_other(
    edited: Callable[..., Path], side: str, what: str
) -> None:
    removed: list[str] = []

    def edit(tensors: Tensors) -> None:
        removed.extend(
            name
            for name in tensors
            if name.startswith(side)
            and name.endswith(".input_scale")
            and (what == "whole side" or ".layers.1.experts.2.down_proj." in name)
        )
        for name in removed:
            del tensors[name]

    source = edited("dg_nvfp4", edit)
    before = read_tensors(source)
    result, _ = rewritten(source)
    assert result.keys() == answer("dg_nvfp4").keys()
    for name in removed:
        tail = name.removeprefix(side)
        other = ALIAS if side == CANONICAL else CANONICAL
        assert result[CANONICAL + tail] == before[other + tail]
    assert len(removed) > 30 if what == "whole side" else len(removed) == 1


def test_fact_02_a_whole_side_that_calibration_never_reached_in_a_real_export(edited: Callable[..., Path]) -> None:
    source = edited("dg_nvfp4_decoder_uncalibrated")
    before = read_tensors(source)
    missing = [
        name.replace("weight_scale_2", "input_scale")
        for name in before
        if name.startswith(CANONICAL)
        and name.endswith("weight_scale_2")
        and name.replace("weight_scale_2", "input_scale") not in before
    ]
    assert len(missing) == 37
    result, _ = rewritten(source)
    for name in missing:
        assert result[name] == before[ALIAS + name.removeprefix(CANONICAL)]
    assert_rest_rewritten(result)


@pytest.mark.parametrize("never", [1.6e-43, 0.0, math.inf, math.nan, 1.0, -5.0], ids=str)
@pytest.mark.parametrize("side", [CANONICAL, ALIAS], ids=["canonical", "alias"])
def test_fact_03_input_global_scale_that_was_never_calibrated_takes_no_part(
    edited: Callable[..., Path], never: float, side: str
) -> None:
    tail = experts_module(0, 1, "up_proj") + ".input_global_scale"

    def edit(tensors: Tensors) -> None:
        tensors[CANONICAL + tail] = tensors[ALIAS + tail] = T("F32", [1], f32(321.0))
        tensors[side + tail] = T("F32", [1], f32(never))

    result, report = rewritten(edited("llmcompressor_nvfp4_dg", edit))
    assert value(result[CANONICAL + tail]) == 321.0
    assert ALIAS + tail not in result
    assert not any(tail in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("fixture", "part", "canonical", "alias"),
    [
        ("llmcompressor_nvfp4_dg", "input_global_scale", T("F32", [1], f32(1.6e-43)), T("F32", [1], f32(1.0))),
        ("dg_nvfp4", "input_scale", T("F32", [], f32(0.0)), T("F32", [], f32(math.nan))),
    ],
    ids=["llm-compressor", "modelopt"],
)
def test_fact_03_if_no_side_was_calibrated_the_bytes_stay_and_the_report_warns(
    edited: Callable[..., Path], fixture: str, part: str, canonical: T, alias: T
) -> None:
    tail = f"{experts_module(0, 1, 'up_proj')}.{part}"
    result, report = rewritten(
        edited(fixture, lambda tensors: tensors.update({CANONICAL + tail: canonical, ALIAS + tail: alias}))
    )
    assert result[CANONICAL + tail] == canonical
    assert ALIAS + tail not in result
    assert any("never calibrated" in warning and CANONICAL + tail in warning for warning in report.warnings)
    (scale,) = [scale for scale in report.scales if not scale.calibrated]
    assert scale.target == CANONICAL + tail


def pre_quant_scale(tensors: Tensors, module: str, canonical: float = 1.0, alias: float = 1.0) -> None:
    """Gives both sides of a module a `pre_quant_scale`, all of one value each."""
    width = tensors[f"{CANONICAL}{module}.weight"].shape[-1] * 2
    for side, number in zip(both(module), (canonical, alias), strict=True):
        half = struct.pack("<f", number)[2:]
        tensors[f"{side}.pre_quant_scale"] = T("BF16", [width], half * width)


O_PROJ = "layers.0.self_attn.o_proj"


@pytest.mark.parametrize("algorithm", ["NVFP4_AWQ", "W8A8_SQ_PER_CHANNEL", "NVFP4_SVD"])
def test_fact_04_equal_pre_quant_scales_go_with_the_weight(edited: Callable[..., Path], algorithm: str) -> None:
    source = edited("dg_nvfp4", lambda tensors: pre_quant_scale(tensors, O_PROJ), quant_algo=algorithm)
    result, _ = rewritten(source)
    assert f"{CANONICAL}{O_PROJ}.pre_quant_scale" in result
    assert_rest_rewritten(result)


@pytest.mark.parametrize("algorithm", ["NVFP4_AWQ", "W8A8_SQ_PER_CHANNEL", "NVFP4_SVD"])
def test_fact_04_sides_with_another_pre_quant_scale_are_no_tie_even_if_their_weights_are_equal(
    edited: Callable[..., Path], algorithm: str
) -> None:
    def edit(tensors: Tensors) -> None:
        pre_quant_scale(tensors, O_PROJ, 1.0, 1.25)
        for part in ("weight", "weight_scale", "weight_scale_2"):
            assert len({tensors[f"{side}.{part}"].data for side in both(O_PROJ)}) == 1

    source = edited("dg_nvfp4", edit, quant_algo=algorithm)
    error = assert_refused(source, f"{CANONICAL}{O_PROJ}.pre_quant_scale")
    assert refused_groups(error) == {f"{CANONICAL}{O_PROJ}.weight"}
    result, _ = rewritten(source, on_mismatch="keep")
    assert_kept_whole(source, result, *both(O_PROJ))
    assert_rest_rewritten(result, O_PROJ)


def test_fact_04_pre_quant_scale_on_one_side_only_is_no_tie(edited: Callable[..., Path]) -> None:
    def edit(tensors: Tensors) -> None:
        pre_quant_scale(tensors, O_PROJ)
        del tensors[f"{ALIAS}{O_PROJ}.pre_quant_scale"]

    source = edited("dg_nvfp4", edit, quant_algo="NVFP4_AWQ")
    assert_refused(source, f"{CANONICAL}{O_PROJ}.pre_quant_scale", ALIAS + O_PROJ)
    result, _ = rewritten(source, on_mismatch="keep")
    assert_kept_whole(source, result, *both(O_PROJ))
    assert_rest_rewritten(result, O_PROJ)


@pytest.mark.parametrize("factor", ["weight_quantizer._svdquant_lora_a", "weight_quantizer._svdquant_lora_b"])
def test_fact_04_svdquant_factors_decide_though_weights_and_scales_are_equal(
    edited: Callable[..., Path], factor: str
) -> None:
    def edit(tensors: Tensors) -> None:
        pre_quant_scale(tensors, O_PROJ)
        for side in both(O_PROJ):
            for part in ("a", "b"):
                tensors[f"{side}.weight_quantizer._svdquant_lora_{part}"] = T("BF16", [2, 4], b"\x80\x3f" * 8)

    def diverge(tensors: Tensors) -> None:
        edit(tensors)
        tensors[f"{ALIAS}{O_PROJ}.{factor}"] = flip(tensors[f"{ALIAS}{O_PROJ}.{factor}"])

    equal, _ = rewritten(edited("dg_nvfp4", edit, quant_algo="NVFP4_SVD"))
    assert f"{CANONICAL}{O_PROJ}.{factor}" in equal
    assert_rest_rewritten(equal)
    source = edited("dg_nvfp4", diverge, quant_algo="NVFP4_SVD")
    shutil.rmtree(source.parent / "dst")
    error = assert_refused(source, f"{ALIAS}{O_PROJ}.{factor}")
    assert refused_groups(error) == {f"{CANONICAL}{O_PROJ}.weight"}
    result, _ = rewritten(source, on_mismatch="keep")
    assert_kept_whole(source, result, *both(O_PROJ))
    assert_rest_rewritten(result, O_PROJ)


@pytest.mark.parametrize(
    "fixture", ["dg_nvfp4_awq", "dg_int4_awq", "dg_w4a8_awq", "dg_int8_smoothquant", "dg_nvfp4_svdquant"]
)
def test_fact_04_real_smoothed_exports_have_diverged_sides(edited: Callable[..., Path], fixture: str) -> None:
    """As ModelOpt 0.45 wrote them, on a random model: other calibration inputs on each side, other smoothing."""
    source = edited(fixture)
    before = read_tensors(source)
    error = assert_refused(source)
    refused = refused_groups(error)
    assert refused
    result, report = rewritten(source, on_mismatch="keep")
    kept = {group.group.id for group in report.groups if group.status == "kept"}
    assert kept == refused
    for group in report.groups:
        if group.status == "kept" and group.group.id.endswith(".weight"):
            modules = [name.removesuffix(".weight") for name in (group.group.id, *group.group.aliases)]
            assert_kept_whole(source, result, *modules)
    # Whatever was dropped had an equal twin, unless it is an activation scale.
    for name in before.keys() - result.keys():
        twin = before.get(CANONICAL + name.removeprefix(ALIAS))
        assert name.endswith("input_scale") or twin is None or twin == before[name], name
    for name in result:
        if not name.endswith("input_scale"):
            assert result[name] in (before.get(name), before.get(ALIAS + name.removeprefix(CANONICAL)))


def test_fact_04_svdquant_sides_with_equal_weights_and_other_factors_are_in_a_real_export() -> None:
    before = read_tensors(FIXTURES / "dg_nvfp4_svdquant" / "naive")
    misleading = [
        name
        for name in before
        if name.startswith(CANONICAL)
        and name.endswith(".weight")
        and before.get(twin := ALIAS + name.removeprefix(CANONICAL)) == before[name]
        and f"{name}_scale" in before
        and before[f"{name}_scale"] == before[f"{twin}_scale"]
        and any(
            before[key] != before[ALIAS + key.removeprefix(CANONICAL)]
            for key in before
            if key.startswith(name.removesuffix("weight")) and key.endswith(("pre_quant_scale", "lora_a", "lora_b"))
        )
    ]
    assert misleading, "equality of the weight alone would have confirmed these"


NORM = "layers.0.input_layernorm"


def test_fact_04_a_layernorm_that_was_folded_differently_takes_its_layers_linears_with_it(
    edited: Callable[..., Path],
) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[f"{CANONICAL}{NORM}.weight"] = tensors[f"{ALIAS}{NORM}.weight"]
        tensors[f"{CANONICAL}{NORM}.weight"] = flip(tensors[f"{CANONICAL}{NORM}.weight"])

    source = edited("dg_nvfp4", edit, quant_algo="NVFP4_AWQ")
    assert_refused(source, f"{CANONICAL}{NORM}.weight", f"{CANONICAL}layers.0.self_attn.q_proj")
    result, _ = rewritten(source, on_mismatch="keep")
    assert_kept_whole(source, result, *both(NORM), *both("layers.0.self_attn.q_proj"))
    assert f"{ALIAS}layers.1.self_attn.q_proj.weight" not in result


def test_fact_04_without_smoothing_a_diverged_layernorm_stands_alone(edited: Callable[..., Path]) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[f"{CANONICAL}{NORM}.weight"] = flip(tensors[f"{ALIAS}{NORM}.weight"])

    source = edited("dg_nvfp4", edit)
    error = assert_refused(source, f"{CANONICAL}{NORM}.weight")
    assert refused_groups(error) == {f"{CANONICAL}{NORM}.weight"}
    result, _ = rewritten(source, on_mismatch="keep")
    assert_kept_whole(source, result, *both(NORM))
    assert_rest_rewritten(result, NORM)


def test_fact_05_one_side_left_in_bf16_is_refused_and_kept_on_request() -> None:
    source = FIXTURES / "dg_nvfp4_encoder_bf16" / "naive"
    with pytest.raises(Refused) as caught:
        tierewrite.rewrite(source, source.parent / "nowhere", device="cpu")
    assert not (source.parent / "nowhere").exists()
    assert f"{CANONICAL}{O_PROJ}.weight" in refused_groups(caught.value)
    assert "stored differently" in str(caught.value)


@pytest.mark.parametrize("plain_side", [CANONICAL, ALIAS], ids=["canonical", "alias"])
def test_fact_05_keep_leaves_the_half_quantized_module_and_rewrites_the_rest(
    edited: Callable[..., Path], plain_side: str
) -> None:
    def edit(tensors: Tensors) -> None:
        weight = tensors[f"{plain_side}{O_PROJ}.weight"]
        rows, half = weight.shape
        for part in ("weight_scale", "weight_scale_2", "input_scale"):
            del tensors[f"{plain_side}{O_PROJ}.{part}"]
        tensors[f"{plain_side}{O_PROJ}.weight"] = T("BF16", [rows, half * 2], b"\x80\x3f" * rows * half * 2)

    source = edited("dg_nvfp4", edit)
    error = assert_refused(source, CANONICAL + O_PROJ, ALIAS + O_PROJ)
    assert refused_groups(error) == {f"{CANONICAL}{O_PROJ}.weight"}
    result, _ = rewritten(source, on_mismatch="keep")
    assert_kept_whole(source, result, *both(O_PROJ))
    assert_rest_rewritten(result, O_PROJ)


def test_fact_06_a_v_scale_without_a_v_proj_weight_is_kept_on_both_sides_or_merged(
    edited: Callable[..., Path],
) -> None:
    source = edited("dg_nvfp4_kvfp8")
    before = read_tensors(source)
    lonely = [
        name for name in before if name.endswith("v_proj.v_scale") and name.replace("v_scale", "weight") not in before
    ]
    assert {name.startswith(ALIAS) for name in lonely} == {True, False}
    result, _ = rewritten(source)
    assert described(result) == answer("dg_nvfp4_kvfp8")
    for name in lonely:
        assert result[name] == before[name]
    shutil.rmtree(source.parent / "dst")
    merged, _ = rewritten(source, kv_scales="merge")
    for name in lonely:
        tail = name.removeprefix(ALIAS).removeprefix(CANONICAL)
        assert value(merged[CANONICAL + tail]) == max(value(before[CANONICAL + tail]), value(before[ALIAS + tail]))
        assert ALIAS + tail not in merged


@pytest.mark.parametrize("larger", [CANONICAL, ALIAS], ids=["canonical", "alias"])
def test_fact_06_merged_kv_scales_are_the_larger_and_a_large_ratio_is_a_warning(
    edited: Callable[..., Path], larger: str
) -> None:
    tail = "layers.0.self_attn.k_proj.k_scale"

    def edit(tensors: Tensors) -> None:
        tensors[CANONICAL + tail] = tensors[ALIAS + tail] = T("F32", [], f32(0.5))
        tensors[larger + tail] = T("F32", [], f32(3.5))

    result, report = rewritten(edited("dg_nvfp4_kvfp8", edit), kv_scales="merge")
    assert value(result[CANONICAL + tail]) == 3.5
    assert not [name for name in result if name.startswith(ALIAS) and name.endswith(("k_scale", "v_scale"))]
    # Layer 1 is a full-attention layer: it has a v_scale but no v_proj.weight.
    assert f"{CANONICAL}layers.1.self_attn.v_proj.v_scale" in result
    assert f"{CANONICAL}layers.1.self_attn.v_proj.weight" not in result
    assert any("k_proj.k_scale" in warning and "7" in warning for warning in report.warnings)


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "different"])
@pytest.mark.parametrize(
    ("shift", "tensor"), [("k_proj.k_bias", T("F32", [], f32(0.5))), ("k_zero_point", T("I8", [1], b"\5"))]
)
def test_kv_scales_with_a_shift_are_merged_only_where_all_of_a_layers_are_equal(
    edited: Callable[..., Path], shift: str, tensor: T, equal: bool
) -> None:
    rest = ("k_proj.k_scale", "v_proj.v_scale", shift)
    attention = "layers.0.self_attn"

    def edit(tensors: Tensors) -> None:
        for name in rest[:2]:
            tensors[f"{ALIAS}{attention}.{name}"] = tensors[f"{CANONICAL}{attention}.{name}"]
        tensors[f"{CANONICAL}{attention}.{shift}"] = tensor
        tensors[f"{ALIAS}{attention}.{shift}"] = tensor if equal else flip(tensor)

    source = edited("dg_nvfp4_kvfp8", edit)
    before = read_tensors(source)
    result, report = rewritten(source, kv_scales="merge")
    assert any("biases" in warning for warning in report.warnings) != equal
    assert f"{ALIAS}layers.1.self_attn.k_proj.k_scale" in before
    assert f"{ALIAS}layers.1.self_attn.k_proj.k_scale" not in result, "of another layer"
    for name in rest:
        assert result[f"{CANONICAL}{attention}.{name}"] == before[f"{CANONICAL}{attention}.{name}"]
        assert result.get(f"{ALIAS}{attention}.{name}") == (None if equal else before[f"{ALIAS}{attention}.{name}"])
    verified = tierewrite.verify(source, source.parent / "dst", kv_scales="merge")
    assert verified.ok, verified.problems


@pytest.mark.parametrize("tied", ["qv", "q", "v"])
def test_a_kv_scale_beside_a_weight_that_is_not_tied_stays_with_it_however_often_it_is_rewritten(
    tied: str, tmp_path: Path
) -> None:
    source = {}
    for side, k_scale in (("a", 1.0), ("b", 2.0)):
        for word in "qkv":
            data = (word if word in tied else word + side).encode() * 16
            source[f"{side}.attn.{word}_proj.weight"] = T("F8_E4M3", [4, 4], data[:16])
        source[f"{side}.attn.k_proj.k_scale"] = T("F32", [], f32(k_scale))
    write_checkpoint(tmp_path / "src", source)
    ties = {f"b.attn.{word}_proj.weight": f"a.attn.{word}_proj.weight" for word in tied}
    report = tierewrite.rewrite(tmp_path / "src", tmp_path / "once", ties=ties, kv_scales="merge")
    assert any("'b.attn.k_proj.weight' is stored too, and not tied" in warning for warning in report.warnings)
    tierewrite.rewrite(tmp_path / "once", tmp_path / "twice", ties=ties, kv_scales="merge")
    once = read_tensors(tmp_path / "once")
    assert once == read_tensors(tmp_path / "twice")
    for name in ("a.attn.k_proj.k_scale", "b.attn.k_proj.k_scale", "b.attn.k_proj.weight"):
        assert once[name] == source[name]
    verified = tierewrite.verify(tmp_path / "src", tmp_path / "once", ties=ties, kv_scales="merge")
    assert verified.ok, verified.problems


@pytest.mark.parametrize("k_of_b", ["a", "c"])
@pytest.mark.parametrize("lacking", ["", "a", "b", "ab"])
def test_kv_scales_of_three_sides_become_one_and_a_second_run_has_nothing_to_do(
    lacking: str, k_of_b: str, tmp_path: Path
) -> None:
    """Also where the key projections are tied to one another's otherwise than the rest of their attention."""
    source = {}
    for side, scale in zip("abc", (1.0, 4.0, 2.0), strict=True):
        for word in "qkv":
            source[f"{side}.attn.{word}_proj.weight"] = T("F8_E4M3", [4, 4], word.encode() * 16)
        if side not in lacking:
            source[f"{side}.attn.k_proj.k_scale"] = T("F32", [], f32(scale))
        source[f"{side}.attn.v_proj.v_scale"] = T("F32", [], f32(2 * scale))
    write_checkpoint(tmp_path / "src", source)
    ties = {f"{side}.attn.{word}_proj.weight": f"a.attn.{word}_proj.weight" for side in "bc" for word in "qkv"}
    if k_of_b == "c":
        ties["b.attn.k_proj.weight"] = "c.attn.k_proj.weight"
        del ties["c.attn.k_proj.weight"]
    options: dict[str, Any] = {"ties": ties, "kv_scales": "merge", "verify": True}
    tierewrite.rewrite(tmp_path / "src", tmp_path / "once", **options)
    once = read_tensors(tmp_path / "once")
    scales = {name: value(tensor) for name, tensor in once.items() if name.endswith("_scale")}
    there = {side: value(t) for side in "abc" if (t := source.get(f"{side}.attn.k_proj.k_scale")) is not None}
    wanted = {"a.attn.v_proj.v_scale": 8.0}
    together = ("abc",) if k_of_b == "a" else ("a", "cb")
    wanted |= {
        f"{sides[0]}.attn.k_proj.k_scale": max(there[side] for side in sides if side in there)
        for sides in together
        if any(side in there for side in sides)
    }
    assert scales == wanted
    report = tierewrite.rewrite(tmp_path / "once", tmp_path / "twice", **options)
    assert read_tensors(tmp_path / "twice") == once
    assert "Nothing to do" in str(report)


def test_fact_07_a_streaming_export_that_lost_canonical_names_gets_them_back(
    edited: Callable[..., Path],
) -> None:
    def edit(tensors: Tensors) -> None:
        tensors.pop("lm_head.weight", None)
        for name in ("embed_tokens.weight", "norm.weight"):
            tensor = tensors.pop(CANONICAL + name, None)
            tensors.setdefault(ALIAS + name, tensor)  # type: ignore[arg-type]
        assert not {"lm_head.weight", f"{CANONICAL}embed_tokens.weight", f"{CANONICAL}norm.weight"} & tensors.keys()

    result, _ = rewritten(edited("dg_nvfp4", edit))
    assert described(result) == answer("dg_nvfp4")


@pytest.mark.parametrize("shape", [[0], [0, 32]])
@pytest.mark.parametrize("also_differs", [False, True])
def test_a_name_without_data_is_not_said_to_be_a_tensor_of_its_own(
    edited: Callable[..., Path], shape: list[int], also_differs: bool
) -> None:
    """What a rank of a partitioned model leaves: to keep both would untie an empty head."""

    def edit(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = T("BF16", shape, b"")
        for name in ("model.decoder.norm.weight", "model.encoder.language_model.norm.weight"):
            if also_differs:
                tensors[name] = T("BF16", [64], name.encode().ljust(128, b"x")[:128])

    error = assert_refused(edited("dg_bf16", edit), "'lm_head.weight' has no elements")
    assert ("on_mismatch" in str(error)) == also_differs


@pytest.mark.parametrize("fixture", ["llava_tied_bf16", "mixtral_tied_bf16"])
def test_fact_08_names_on_disk_that_differ_from_names_in_memory(edited: Callable[..., Path], fixture: str) -> None:
    result, _ = rewritten(edited(fixture))
    assert described(result) == answer(fixture)


def test_fact_08_mixtral_under_its_names_in_memory(edited: Callable[..., Path]) -> None:
    def edit(tensors: Tensors) -> None:
        experts = [name for name in tensors if ".block_sparse_moe.experts." in name]
        assert experts
        layers = {name.partition(".block_sparse_moe")[0] for name in experts}
        for layer in layers:
            count = len({n.split(".experts.")[1].split(".")[0] for n in experts if n.startswith(f"{layer}.")})

            def take(expert: int, part: str, layer: str = layer) -> T:
                return tensors.pop(f"{layer}.block_sparse_moe.experts.{expert}.{part}.weight")

            gate_up, down = b"", b""
            for expert in range(count):
                w1, w3, w2 = (take(expert, part) for part in ("w1", "w3", "w2"))
                gate_up += w1.data + w3.data
                down += w2.data
            inner, hidden = w1.shape
            tensors[f"{layer}.mlp.experts.gate_up_proj"] = T("BF16", [count, 2 * inner, hidden], gate_up)
            tensors[f"{layer}.mlp.experts.down_proj"] = T("BF16", [count, hidden, inner], down)
            gate = tensors.pop(f"{layer}.block_sparse_moe.gate.weight")
            tensors[f"{layer}.mlp.gate.weight"] = gate

    source = edited("mixtral_tied_bf16", edit)
    before = read_tensors(source)
    result, _ = rewritten(source)
    assert before.keys() - result.keys() == {"lm_head.weight"}
    assert all(result[name] == before[name] for name in result)


def test_fact_08_t5_ties_its_embeddings_whatever_config_json_says(tmp_path: Path) -> None:
    config = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 32,
        "num_layers": 1,
        "num_decoder_layers": 1,
        "num_heads": 4,
        "vocab_size": 32,
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
    }
    embedding = T("F32", [32, 16], os.urandom(32 * 16 * 4))
    names = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    source = write_checkpoint(
        tmp_path / "src",
        dict.fromkeys(names, embedding) | {"encoder.final_layer_norm.weight": T("F32", [16], f32(*[1.0] * 16))},
    )
    (source / "config.json").write_text(json.dumps(config))
    result, _ = rewritten(source)
    assert sorted(result) == ["encoder.final_layer_norm.weight", "shared.weight"]
    assert result["shared.weight"] == embedding


def test_fact_09_a_declared_tie_that_differs_is_refused_with_the_pair_named_and_kept_on_request(
    edited: Callable[..., Path],
) -> None:
    source = edited("qwen3_tied_but_diverged_bf16")
    assert_refused(source, "lm_head.weight", "model.embed_tokens.weight")
    result, report = rewritten(source, on_mismatch="keep")
    assert result == read_tensors(source)
    assert report.count("kept") == 1


def test_fact_09_one_bit_is_enough_and_equal_nans_are_equal(edited: Callable[..., Path]) -> None:
    nan = struct.pack("<H", 0x7FC1)

    def edit(tensors: Tensors) -> None:
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            tensors[name] = tensors[name]._replace(data=nan + tensors[name].data[2:])

    def negative_zero(tensors: Tensors) -> None:
        edit(tensors)
        for name, zero in (("lm_head.weight", b"\0\0"), ("model.embed_tokens.weight", b"\0\x80")):
            tensors[name] = tensors[name]._replace(data=zero + tensors[name].data[2:])

    result, _ = rewritten(edited("qwen3_tied_bf16", edit))
    assert "lm_head.weight" not in result
    shutil.rmtree(edited("qwen3_tied_bf16").parent / "dst")
    assert_refused(edited("qwen3_tied_bf16", negative_zero), "lm_head.weight")


@pytest.mark.parametrize("umask", [0o022, 0o027], ids=oct)
def test_fact_10_files_have_the_mode_that_the_umask_gives_and_not_0600(edited: Callable[..., Path], umask: int) -> None:
    source = edited("qwen3_tied_bf16")
    (source / "model.safetensors").chmod(0o600)
    previous = os.umask(umask)
    try:
        rewritten(source)
    finally:
        os.umask(previous)
    for path in (source.parent / "dst").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path.name
    assert stat.S_IMODE((source.parent / "dst").stat().st_mode) == 0o777 & ~umask


STRANGE = {
    "zero_d": T("F32", [], f32(1.5)),
    "zero_d_u8": T("U8", [], b"\7"),
    "empty": T("F32", [0], b""),
    "empty_2d": T("BF16", [3, 0], b""),
    "e8m0": T("F8_E8M0", [3], b"\x7f\x80\xff"),
    "e4m3": T("F8_E4M3", [2, 2], b"\x7f\xff\x00\x80"),
    "e5m2": T("F8_E5M2", [1], b"\x7c"),
    "f4": T("F4", [2, 4], b"\x12\x34\x56\x78"),
    "f6_e2m3": T("F6_E2M3", [4], b"\x12\x34\x56"),
    "f6_e3m2": T("F6_E3M2", [4], b"\x65\x43\x21"),
    "c64": T("C64", [1], f32(1.0, -1.0)),
    "bool": T("BOOL", [2], b"\0\1"),
    "odd": T("U8", [3], b"abc"),
}


@pytest.mark.parametrize("tied", [False, True], ids=["beside a tie", "as a tie"])
def test_fact_11_every_dtype_and_shape_is_copied_as_bytes(
    edited: Callable[..., Path], tmp_path: Path, tied: bool
) -> None:
    source = edited("qwen3_tied_bf16", lambda tensors: tensors.update({f"x.{name}": t for name, t in STRANGE.items()}))
    if tied:
        strange = {f"{side}.{name}.weight": t for side in "ab" for name, t in STRANGE.items()}
        write_checkpoint(source, strange)
        ties = tmp_path / "ties.json"
        ties.write_text(json.dumps({f"b.{name}.weight": f"a.{name}.weight" for name in STRANGE}))
        result, _ = rewritten(source, ties=ties)
        assert result == {f"a.{name}.weight": t for name, t in STRANGE.items()}
        return
    before = read_tensors(source)
    result, _ = rewritten(source)
    assert before.keys() - result.keys() == {"lm_head.weight"}
    for name in STRANGE:
        assert result[f"x.{name}"] == before[f"x.{name}"]


def test_fact_11_the_output_has_no_holes_overlaps_or_shared_bytes(edited: Callable[..., Path]) -> None:
    source = edited("dg_nvfp4")
    rewritten(source)
    for path in (source.parent / "dst").glob("*.safetensors"):
        header, start = read_header(path)
        header.pop("__metadata__", None)
        spans = sorted(tuple(info["data_offsets"]) for info in header.values())
        assert spans[0][0] == 0
        assert all(end == begin for (_, end), (begin, _) in pairwise(spans))
        assert start + spans[-1][1] == path.stat().st_size


# -- what must be refused
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixture", ["dg_nvfp4", "dg_fp8", "dg_w4a16_nvfp4", "llmcompressor_nvfp4_dg"])
@pytest.mark.parametrize("side", [CANONICAL, ALIAS], ids=["canonical", "alias"])
def test_a_single_diverged_expert_is_refused_and_kept_alone_on_request(
    edited: Callable[..., Path], fixture: str, side: str
) -> None:
    module = experts_module(1, 3, "down_proj")
    main = "weight_packed" if fixture.startswith("llm") else "weight"

    def edit(tensors: Tensors) -> None:
        tensors[f"{side}{module}.{main}"] = flip(tensors[f"{side}{module}.{main}"])

    source = edited(fixture, edit)
    error = assert_refused(source, f"{CANONICAL}{module}.{main}", f"{ALIAS}{module}.{main}")
    assert len(refused_groups(error)) == 1
    result, report = rewritten(source, on_mismatch="keep")
    # A tie of a fused parameter is a tie of all its experts: the container's down projections stay together.
    container = [experts_module(1, expert, "down_proj") for expert in range(4)]
    assert_kept_whole(source, result, *(name for one in container for name in both(one)))
    assert_rest_rewritten(result, *container)
    untouched = tuple(f"{name}." for one in container for name in both(one))
    rest = {name: tensor for name, tensor in result.items() if not name.startswith(untouched)}
    assert described(rest) == {k: v for k, v in answer(fixture).items() if not k.startswith(untouched)}
    (kept,) = [group for group in report.groups if group.status == "kept"]
    assert kept.group.canonical == f"{CANONICAL}layers.1.experts.down_proj"
    assert f"{side}{module}.{main}" in str(kept.group.reason)
    assert f"{ALIAS}{experts_module(1, 3, 'up_proj')}.{main}" not in result


@pytest.mark.parametrize(
    ("fixture", "part"),
    [
        ("dg_nvfp4", "weight_scale"),
        ("dg_nvfp4", "weight_scale_2"),
        ("dg_fp8", "weight_scale"),
        ("llmcompressor_nvfp4_dg", "weight_global_scale"),
        ("llmcompressor_nvfp4_dg", "weight_scale"),
    ],
)
def test_weight_derived_scale_that_differs_in_one_bit_is_no_tie(
    edited: Callable[..., Path], fixture: str, part: str
) -> None:
    name = f"{ALIAS}{O_PROJ}.{part}"
    source = edited(fixture, lambda tensors: tensors.update({name: flip(tensors[name])}))
    error = assert_refused(source, name)
    assert refused_groups(error) == {f"{CANONICAL}{O_PROJ}.weight"}
    result, _ = rewritten(source, on_mismatch="keep")
    assert_kept_whole(source, result, *both(O_PROJ))
    assert_rest_rewritten(result, O_PROJ)


@pytest.mark.parametrize("suffix", ["weight_quantizer._amax", "input_quantizer._amax", "flux_capacitor"])
@pytest.mark.parametrize("side", [CANONICAL, ALIAS], ids=["canonical", "alias"])
def test_a_companion_that_no_family_knows_is_refused_by_name_and_never_dropped(
    edited: Callable[..., Path], suffix: str, side: str
) -> None:
    name = f"{side}{O_PROJ}.{suffix}"
    source = edited("dg_nvfp4", lambda tensors: tensors.update({name: T("F32", [], f32(1.0))}))
    error = assert_refused(source, name, suffix)
    assert refused_groups(error) == {f"{CANONICAL}{O_PROJ}.weight"}
    result, _ = rewritten(source, on_mismatch="keep")
    assert_kept_whole(source, result, *both(O_PROJ))
    assert_rest_rewritten(result, O_PROJ)


def test_an_unknown_format_outside_of_ties_passes_through_unharmed(edited: Callable[..., Path]) -> None:
    odd = {f"model.encoder.vision_tower.odd.{name}": t for name, t in STRANGE.items()}
    source = edited("dg_nvfp4", lambda tensors: tensors.update(odd))
    result, _ = rewritten(source)
    assert {name: result[name] for name in odd} == odd
    assert described({name: t for name, t in result.items() if name not in odd}) == answer("dg_nvfp4")


# -- every family, as two tied linears
# ---------------------------------------------------------------------------------

# Companions of a linear [4, 32] in each family: name -> (tensor, what the merge of the two sides must be).
# `None` stands for byte-identical; a number is what the alias's differs by, and max or min says which one
# stays.
FAMILIES: dict[str, dict[str, tuple[T, str | None]]] = {
    "modelopt-nvfp4": {
        "weight": (T("U8", [4, 16], bytes(range(64))), None),
        "weight_scale": (T("F8_E4M3", [4, 2], b"\x38" * 8), None),
        "weight_scale_2": (T("F32", [], f32(0.01)), None),
        "input_scale": (T("F32", [], f32(0.02)), "max"),
    },
    "modelopt-fp8": {
        "weight": (T("F8_E4M3", [4, 32], bytes(128)), None),
        "weight_scale": (T("F32", [], f32(0.01)), None),
        "input_scale": (T("F32", [], f32(0.02)), "max"),
    },
    "modelopt-fp8-blocks": {
        "weight": (T("F8_E4M3", [4, 32], bytes(128)), None),
        "weight_scale": (T("F32", [1, 1], f32(0.01)), None),
    },
    "modelopt-mxfp8": {
        "weight": (T("F8_E4M3", [4, 32], bytes(128)), None),
        "weight_scale": (T("U8", [4, 1], b"\x7f" * 4), None),
    },
    "modelopt-mxfp4": {
        "weight": (T("U8", [4, 16], bytes(64)), None),
        "weight_scale": (T("U8", [4, 1], b"\x7f" * 4), None),
    },
    "modelopt-int4-awq": {
        "weight": (T("U8", [2, 32], bytes(64)), None),
        "weight_scale": (T("F32", [4, 1], f32(1, 2, 3, 4)), None),
        "pre_quant_scale": (T("BF16", [32], b"\x80\x3f" * 32), None),
    },
    "modelopt-int8-sq": {
        "weight": (T("I8", [4, 32], bytes(128)), None),
        "weight_scale": (T("F32", [4], f32(1, 2, 3, 4)), None),
        "input_scale": (T("F32", [], f32(0.02)), "max"),
        "pre_quant_scale": (T("BF16", [32], b"\x80\x3f" * 32), None),
    },
    "compressed-tensors-nvfp4": {
        "weight_packed": (T("U8", [4, 16], bytes(64)), None),
        "weight_scale": (T("F8_E4M3", [4, 2], b"\x38" * 8), None),
        "weight_global_scale": (T("F32", [1], f32(900.0)), None),
        "input_global_scale": (T("F32", [1], f32(300.0)), "min"),
    },
    "compressed-tensors-mxfp4": {
        "weight_packed": (T("U8", [4, 16], bytes(64)), None),
        "weight_scale": (T("U8", [4, 1], b"\x7f" * 4), None),
    },
    "compressed-tensors-pack": {
        "weight_packed": (T("I32", [4, 4], bytes(64)), None),
        "weight_scale": (T("BF16", [4, 1], b"\x80\x3f" * 4), None),
        "weight_shape": (T("I64", [2], struct.pack("<2q", 4, 32)), None),
        "weight_zero_point": (T("I32", [1, 1], b"\7\0\0\0"), None),
        "weight_g_idx": (T("I32", [32], bytes(128)), None),
    },
    "compressed-tensors-fp8-static": {
        "weight": (T("F8_E4M3", [4, 32], bytes(128)), None),
        "weight_scale": (T("BF16", [1], b"\x80\x3f"), None),
        "input_scale": (T("BF16", [1], b"\x80\x3e"), "max"),
    },
    "compressed-tensors-int8-asymmetric": {
        "weight": (T("I8", [4, 32], bytes(128)), None),
        "weight_scale": (T("BF16", [4, 1], b"\x80\x3f" * 4), None),
        "input_scale": (T("BF16", [1], b"\x80\x3e"), "max"),
        "input_zero_point": (T("I8", [1], b"\5"), None),
    },
    "deepseek-fp8": {
        "weight": (T("F8_E4M3", [4, 32], bytes(128)), None),
        "weight_scale_inv": (T("F32", [1, 1], f32(0.01)), None),
        "activation_scale": (T("F32", [], f32(0.5)), "max"),
    },
    "gptq": {
        "qweight": (T("I32", [4, 4], bytes(64)), None),
        "qzeros": (T("I32", [1, 1], bytes(4)), None),
        "scales": (T("F16", [1, 4], b"\0\x3c" * 4), None),
        "g_idx": (T("I32", [32], bytes(128)), None),
    },
    "bitsandbytes-nf4": {
        "weight": (T("U8", [64, 1], bytes(64)), None),
        "weight.absmax": (T("U8", [2], b"\1\2"), None),
        "weight.quant_map": (T("F32", [16], f32(*range(16))), None),
        "weight.nested_absmax": (T("F32", [1], f32(3.0)), None),
        "weight.nested_quant_map": (T("F32", [256], bytes(1024)), None),
        "weight.quant_state.bitsandbytes__nf4": (T("U8", [2], b"{}"), None),
    },
    "bitsandbytes-int8": {
        "weight": (T("I8", [4, 32], bytes(128)), None),
        "SCB": (T("F32", [4], f32(1, 2, 3, 4)), None),
        "weight_format": (T("U8", [], b"\0"), None),
    },
    "quark-mxfp4": {
        "weight": (T("U8", [4, 16], bytes(64)), None),
        "weight_scale": (T("U8", [4, 1], b"\x7f" * 4), None),
    },
    "quark-fp8": {
        "weight": (T("F8_E4M3", [4, 32], bytes(128)), None),
        "weight_scale": (T("F32", [], f32(0.01)), None),
        "input_scale": (T("F32", [], f32(0.02)), "max"),
        "output_scale": (T("F32", [], f32(0.03)), "max"),
    },
    "torchao-int8-static": {
        "_weight_qdata": (T("I8", [4, 32], bytes(128)), None),
        "_weight_scale": (T("F32", [4, 1], f32(1, 2, 3, 4)), None),
        "_weight_zero_point": (T("I8", [4, 1], bytes(4)), None),
        "_weight_act_quant_scale": (T("F32", [1, 1], f32(0.5)), "max"),
    },
    "quanto-int4": {
        "weight._data._data": (T("U8", [2, 32], bytes(64)), None),
        "weight._scale": (T("BF16", [4, 1], b"\x80\x3f" * 4), None),
        "weight._shift": (T("BF16", [4, 1], b"\x80\x3f" * 4), None),
        "input_scale": (T("BF16", [], b"\x80\x3e"), "max"),
    },
    "auto-round-w4a8": {
        "qweight": (T("I32", [4, 4], bytes(64)), None),
        "qzeros": (T("I32", [1, 1], bytes(4)), None),
        "scales": (T("F16", [1, 4], b"\0\x3c" * 4), None),
        "w_bf16_to_fp8_scale": (T("BF16", [1], b"\x80\x3f"), None),
        "act_scales": (T("BF16", [1], b"\x80\x3e"), "max"),
    },
    "mlx": {
        "weight": (T("U32", [4, 4], bytes(64)), None),
        "scales": (T("BF16", [4, 1], b"\x80\x3f" * 4), None),
        "biases": (T("BF16", [4, 1], b"\x80\x3f" * 4), None),
    },
    "exl3": {
        "trellis": (T("I16", [2, 1, 4], bytes(16)), None),
        "suh": (T("F16", [32], b"\0\x3c" * 32), None),
        "svh": (T("F16", [16], b"\0\x3c" * 16), None),
        "mcg": (T("I32", [], bytes(4)), None),
    },
    "hqq": {
        "W_q": (T("U8", [4, 16], bytes(64)), None),
        "scale": (T("BF16", [4, 1], b"\x80\x3f" * 4), None),
        "zero": (T("BF16", [4, 1], b"\x80\x3f" * 4), None),
        "nbits": (T("I32", [], b"\4\0\0\0"), None),
    },
}


def doubled(tensor: T) -> T:
    """The tensor with its exponent raised by one: twice the value in F32 and BF16."""
    if tensor.dtype == "F32":
        return tensor._replace(data=f32(2 * value(tensor)))
    (bits,) = struct.unpack("<H", tensor.data)
    return tensor._replace(data=struct.pack("<H", bits + 0x80))


def tied_linears(tmp_path: Path, sides: Mapping[str, Mapping[str, T]]) -> tuple[Path, Path]:
    source = write_checkpoint(
        tmp_path / "src",
        {f"{side}.{name}": t for side, tensors in sides.items() for name, t in tensors.items()},
    )
    (source / "config.json").write_text("{}")
    ties = tmp_path / "ties.json"
    ties.write_text(json.dumps({"enc.proj.weight": "dec.proj.weight"}))
    return source, ties


@pytest.mark.parametrize("larger", ["alias", "canonical"])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_becomes_one_copy_that_covers_both_sides(tmp_path: Path, family: str, larger: str) -> None:
    small = {name: t for name, (t, _) in FAMILIES[family].items()}
    large = {name: doubled(t) if rule else t for name, (t, rule) in FAMILIES[family].items()}
    dec, enc = (small, large) if larger == "alias" else (large, small)
    bias = T("BF16", [4], b"\x80\x3f" * 4)  # equal by chance, and not tied
    source, ties = tied_linears(tmp_path, {"dec.proj": {**dec, "bias": bias}, "enc.proj": {**enc, "bias": bias}})
    result, _ = rewritten(source, ties=ties)
    expected = {
        f"dec.proj.{name}": (large if rule == "max" else small)[name] for name, (_, rule) in FAMILIES[family].items()
    }
    assert result == {**expected, "dec.proj.bias": bias, "enc.proj.bias": bias}


@pytest.mark.parametrize("canonical", ["absent", "present"])
@pytest.mark.parametrize(
    ("family", "name"),
    [(family, name) for family, rows in FAMILIES.items() for name, (_, rule) in rows.items() if not rule],
)
def test_family_is_refused_when_one_weight_derived_tensor_differs_or_has_no_twin(
    tmp_path: Path, family: str, name: str, canonical: str
) -> None:
    dec = {part: t for part, (t, _) in FAMILIES[family].items()}
    enc = dict(dec)
    if canonical == "present":
        enc[name] = flip(enc[name])
    else:
        del dec[name]
    source, ties = tied_linears(tmp_path, {"dec.proj": dec, "enc.proj": enc})
    if not dec or (canonical == "absent" and len(dec) == 0):
        pytest.skip("a family of one tensor")
    with pytest.raises(Refused) as caught:
        tierewrite.rewrite(source, tmp_path / "dst", ties=ties, device="cpu")
    assert f"enc.proj.{name}" in str(caught.value)
    assert not (tmp_path / "dst").exists()
    result, _ = rewritten(source, ties=ties, on_mismatch="keep")
    assert result == read_tensors(source)


TORCHAO = {
    "_weight_qdata": T("I8", [4, 32], bytes(128)),
    "_weight_scale": T("F32", [4, 1], f32(1, 2, 3, 4)),
}


def described_by(target_dtype: str) -> str:
    data = {"target_dtype": {"_type": "torch.dtype", "_data": target_dtype}, "block_size": [1, 32]}
    return json.dumps({"_type": "IntxUnpackedToInt8Tensor", "_data": data, "_tensor_data_names": ["qdata", "scale"]})


def describe(source: Path, entries: dict[str, str]) -> None:
    """Writes torchao's description of these parameters into the header."""
    tensors, _ = read_shard(source / "model.safetensors")
    write_shard(source / "model.safetensors", tensors, {**entries, "tensor_names": json.dumps(list(entries))})


def test_sides_that_torchao_describes_differently_are_two_weights(tmp_path: Path) -> None:
    source, ties = tied_linears(tmp_path, {"dec.proj": TORCHAO, "enc.proj": TORCHAO})
    describe(source, {"dec.proj.weight": described_by("int4"), "enc.proj.weight": described_by("int8")})
    with pytest.raises(Refused, match=r"metadata describes 'dec\.proj\.weight' and 'enc\.proj\.weight' differently"):
        tierewrite.rewrite(source, tmp_path / "dst", ties=ties, device="cpu")
    result, _ = rewritten(source, ties=ties, on_mismatch="keep")
    assert result == read_tensors(source)


@pytest.mark.parametrize("dropped_before", [False, True])
def test_torchaos_description_goes_and_is_renamed_with_the_tensors(tmp_path: Path, dropped_before: bool) -> None:
    bias = {"bias": T("BF16", [4], bytes(8))}  # the module of the alias stays
    canonical = {} if dropped_before else TORCHAO
    source, ties = tied_linears(tmp_path, {"dec.proj": {**canonical, **bias}, "enc.proj": {**TORCHAO, **bias}})
    entry, plain = described_by("int4"), json.dumps({"_type": "Tensor"})
    entries = {"enc.proj.weight": entry, "enc.proj.bias": plain, "dec.proj.bias": plain}
    describe(source, entries if dropped_before else {**entries, "dec.proj.weight": entry})
    dst = tmp_path / "dst"
    tierewrite.rewrite(source, dst, ties=ties, device="cpu")
    metadata = read_shard(dst / "model.safetensors")[1]
    left = {"dec.proj.weight": entry, "dec.proj.bias": plain, "enc.proj.bias": plain}
    assert {key: value for key, value in metadata.items() if key != "tensor_names"} == left
    assert sorted(json.loads(metadata["tensor_names"])) == sorted(left)
    assert tierewrite.verify(source, dst, ties=ties).ok


@pytest.mark.parametrize(
    "names", ["", "{", "3", '["a", 3]', "[" * 100_000], ids=["empty", "half", "number", "mixed", "deep"]
)
def test_a_list_of_names_that_is_none_is_carried_over(tmp_path: Path, names: str) -> None:
    source, ties = tied_linears(tmp_path, {"dec.proj": TORCHAO, "enc.proj": TORCHAO})
    tensors, _ = read_shard(source / "model.safetensors")
    write_shard(source / "model.safetensors", tensors, {"format": "pt", "tensor_names": names})
    tierewrite.rewrite(source, tmp_path / "dst", ties=ties, device="cpu")
    assert read_shard(tmp_path / "dst" / "model.safetensors")[1] == {"format": "pt", "tensor_names": names}
    assert tierewrite.verify(source, tmp_path / "dst", ties=ties).ok


def test_exl3s_list_of_tensors_follows_them(tmp_path: Path) -> None:
    exl3 = {name: t for name, (t, _) in FAMILIES["exl3"].items()}
    source, ties = tied_linears(tmp_path, {"dec.proj": exl3, "enc.proj": exl3})
    listed = {
        module: {"stored_tensors": {f"{module}.{name}": {"shape": t[1]} for name, t in exl3.items()}}
        for module in ("dec.proj", "enc.proj", "norm")
    }
    beside = source / "quantization_config.json"
    beside.write_text(json.dumps({"quant_method": "exl3", "tensor_storage": listed}, indent=4))
    tierewrite.rewrite(source, tmp_path / "dst", ties=ties, device="cpu")
    made = (tmp_path / "dst" / "quantization_config.json").read_text()
    del listed["enc.proj"]
    assert made == json.dumps({"quant_method": "exl3", "tensor_storage": listed}, indent=4)
    assert tierewrite.verify(source, tmp_path / "dst", ties=ties).ok


FUSED: dict[str, dict[str, tuple[T, str | None]]] = {
    "modelopt": {
        "": (T("U8", [2, 4, 16], bytes(128)), None),
        "_weight_scale": (T("F8_E4M3", [2, 4, 2], b"\x38" * 16), None),
        "_weight_scale_2": (T("F32", [], f32(0.01)), None),
        "_input_scale": (T("F32", [], f32(0.02)), "max"),
    },
    "gpt-oss-mxfp4": {
        "_blocks": (T("U8", [2, 4, 1, 16], bytes(128)), None),
        "_scales": (T("U8", [2, 4, 1], b"\x7f" * 8), None),
    },
    "transformers-fp8": {
        "": (T("F8_E4M3", [2, 4, 32], bytes(256)), None),
        "_scale_inv": (T("F32", [2, 1, 1], f32(1, 2)), None),
    },
    "fbgemm-fp8": {
        "": (T("F8_E4M3", [2, 4, 32], bytes(256)), None),
        "_scale": (T("F32", [2, 1, 32], bytes(256)), None),
    },
    "bitsandbytes": {
        "": (T("U8", [128, 1], bytes(128)), None),
        ".absmax": (T("F32", [4], f32(1, 2, 3, 4)), None),
        ".quant_map": (T("F32", [16], f32(*range(16))), None),
        ".quant_state.bitsandbytes__nf4": (T("U8", [2], b"{}"), None),
    },
}


@pytest.mark.parametrize("family", FUSED)
def test_fused_container_of_a_family_becomes_one_copy(tmp_path: Path, family: str) -> None:
    bias = T("BF16", [2, 4], b"\x80\x3f" * 8)
    tensors: Tensors = {}
    for side in ("dec", "enc"):
        for suffix, (tensor, rule) in FUSED[family].items():
            other = doubled(tensor) if rule and side == "enc" else tensor
            tensors[f"{side}.experts.gate_up_proj{suffix}"] = other
            tensors[f"{side}.experts.down_proj{suffix}"] = other  # not tied: untouched
        tensors[f"{side}.experts.gate_up_proj_bias"] = bias
    source = write_checkpoint(tmp_path / "src", tensors)
    (source / "config.json").write_text("{}")
    ties = tmp_path / "ties.json"
    ties.write_text(json.dumps({"enc.experts.gate_up_proj": "dec.experts.gate_up_proj"}))
    result, _ = rewritten(source, ties=ties)
    gone = {f"enc.experts.gate_up_proj{suffix}" for suffix in FUSED[family]}
    assert tensors.keys() - result.keys() == gone
    for suffix, (tensor, rule) in FUSED[family].items():
        assert result[f"dec.experts.gate_up_proj{suffix}"] == (doubled(tensor) if rule else tensor)
    untouched = [name for name in result if "gate_up_proj" not in name or name.endswith("_bias")]
    assert all(result[name] == tensors[name] for name in untouched)
