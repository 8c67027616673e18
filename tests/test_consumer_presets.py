"""Rewriting for a consumer: the choices it needs, and the check before the output appears."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import tierewrite
from tests.checkpoints import edit_tensors, read_tensors
from tierewrite import cli

Naive = Callable[[str], Path]
ENCODER, DECODER = "model.encoder.language_model", "model.decoder"


def same_layer_scalars(src: Path) -> Path:
    """Makes the only tensors equal that no rewrite can merge."""
    tensors = read_tensors(src)
    edit_tensors(
        src,
        {f"{ENCODER}.layers.{n}.layer_scalar": tensors[f"{DECODER}.layers.{n}.layer_scalar"] for n in range(2)},
    )
    return src


def test_prepared_checkpoint_has_no_errors_left(copied: Naive, tmp_path: Path) -> None:
    src = same_layer_scalars(copied("dg_nvfp4_kvfp8"))
    assert tierewrite.check(src, "vllm").errors
    report = tierewrite.prepare_for_vllm(src, tmp_path / "out")
    assert report.readiness is not None
    assert report.readiness.errors == ()
    assert report.readiness.checkpoint == str(tmp_path / "out")
    assert tierewrite.check(tmp_path / "out", "vllm").errors == ()
    assert not [k for k in read_tensors(tmp_path / "out") if "encoder" in k and k.endswith(("k_scale", "v_scale"))]
    options = {"kv_scales": "merge", "unify_fused_scales": True, "fix_ignore": True}
    assert tierewrite.verify(src, tmp_path / "out", **options).ok


def test_only_per_side_conflicts_left_writes_dst_and_exits_6(
    naive: Naive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["rewrite", str(naive("dg_nvfp4")), str(tmp_path / "out"), "--for", "vllm", "--json"]) == 6
    report = json.loads(capsys.readouterr().out)
    errors = [f for f in report["readiness"]["findings"] if f["severity"] == "error"]
    assert {finding["id"] for finding in errors} == {"per-side-conflict"}
    assert f"{DECODER}.layers.0.layer_scalar" in errors[0]["where"]
    assert report["options"]["kv_scales"] == "merge"
    assert report["options"]["unify_fused_scales"] is True
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_other_errors_leave_no_dst_unless_forced(
    copied: Naive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = same_layer_scalars(copied("dg_nvfp4"))
    lost = "layers.1.experts.2.down_proj.input_scale"
    edit_tensors(src, {f"{ENCODER}.{lost}": None, f"{DECODER}.{lost}": None})
    arguments = ["rewrite", str(src), str(tmp_path / "out"), "--for", "vllm"]
    assert cli.run(arguments) == 6
    assert "input_scale" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [src.name]
    with pytest.raises(tierewrite.NotReady) as error:
        tierewrite.prepare_for_vllm(src, tmp_path / "out")
    assert error.value.details["readiness"]["errors"] >= 1
    assert cli.run([*arguments, "--force"]) == 6
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_choices_given_on_the_command_line_win(naive: Naive, tmp_path: Path) -> None:
    code = cli.run(
        ["rewrite", str(naive("dg_nvfp4_kvfp8")), str(tmp_path / "out"), "--for", "vllm", "--kv-scales", "keep", "-q"]
    )
    assert code == 6
    assert [k for k in read_tensors(tmp_path / "out") if "encoder" in k and k.endswith("k_scale")]


def test_check_exit_codes(copied: Naive, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = same_layer_scalars(copied("dg_nvfp4"))
    assert cli.run(["check", str(src), "--for", "vllm"]) == 6
    tierewrite.prepare_for_vllm(src, tmp_path / "out")
    capsys.readouterr()
    assert cli.run(["check", str(tmp_path / "out"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ready"] is True
    assert cli.run(["check", str(tmp_path / "out"), "--strict"]) == 6  # alignment of the tiny model is a warning


def test_check_for_transformers_of_a_canonical_checkpoint(naive: Naive, tmp_path: Path) -> None:
    tierewrite.rewrite(naive("qwen3_tied_bf16"), tmp_path / "out")
    assert tierewrite.check(tmp_path / "out", "transformers").errors == ()


def test_merged_kv_scale_is_the_larger_of_the_sides(copied: Naive, tmp_path: Path) -> None:
    src = same_layer_scalars(copied("dg_nvfp4_kvfp8"))
    key = "layers.0.self_attn.k_proj.k_scale"
    edit_tensors(src, {f"{ENCODER}.{key}": ("F32", [], struct.pack("<f", 2.5))})
    tierewrite.prepare_for_vllm(src, tmp_path / "out")
    assert read_tensors(tmp_path / "out")[f"{DECODER}.{key}"][2] == struct.pack("<f", 2.5)
