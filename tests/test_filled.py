"""Experts' input scales that calibration never reached."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import tierewrite
from tests.checkpoints import edit_tensors, read_tensors, right_answer

Naive = Callable[[str], Path]
ENCODER, DECODER = "model.encoder.language_model", "model.decoder"
LOST = "layers.1.experts.2.down_proj.input_scale"


def value(tensors: dict[str, tuple[str, list[int], bytes]], key: str) -> float:
    return float(struct.unpack("<f", tensors[key][2])[0])


def others(tensors: dict[str, tuple[str, list[int], bytes]]) -> list[float]:
    return [value(tensors, f"{DECODER}.layers.1.experts.{e}.down_proj.input_scale") for e in (0, 1, 3)]


def uneven(src: Path) -> None:
    """Gives the experts scales of their own, so that the largest can be told from the rest."""
    names = [f"{side}.layers.1.experts.{e}.down_proj.input_scale" for side in (ENCODER, DECODER) for e in range(4)]
    edit_tensors(src, {name: ("F32", [], struct.pack("<f", 0.01 + 0.003 * (i % 4))) for i, name in enumerate(names)})


def test_missing_on_both_sides_is_taken_from_the_largest_other_expert(copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4")
    uneven(src)
    edit_tensors(src, {f"{ENCODER}.{LOST}": None, f"{DECODER}.{LOST}": None})
    plain = tierewrite.rewrite(src, tmp_path / "plain")
    assert plain.filled == ()
    assert f"{DECODER}.{LOST}" not in read_tensors(tmp_path / "plain")
    report = tierewrite.rewrite(src, tmp_path / "out", fill_missing_scales=True)
    after = read_tensors(tmp_path / "out")
    assert after.keys() == right_answer("dg_nvfp4").keys()
    assert value(after, f"{DECODER}.{LOST}") == max(others(after))
    assert tierewrite.verify(src, tmp_path / "out", fill_missing_scales=True).ok
    (entry,) = report.filled
    assert entry.target == f"{DECODER}.{LOST}"
    assert entry.missing
    assert entry.taken_from == f"{DECODER}.layers.1.experts.3.down_proj.input_scale"
    assert {k: v for k, v in after.items() if k != f"{DECODER}.{LOST}"} == read_tensors(tmp_path / "plain")


@pytest.mark.parametrize("bad", [b"\0\0\0\0", b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xbf", b"\x01\0\0\0"])
def test_never_calibrated_on_both_sides_is_filled_too(bad: bytes, copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4")
    edit_tensors(src, {f"{side}.{LOST}": ("F32", [], bad) for side in (ENCODER, DECODER)})
    report = tierewrite.rewrite(src, tmp_path / "out", fill_missing_scales=True)
    after = read_tensors(tmp_path / "out")
    assert value(after, f"{DECODER}.{LOST}") == max(others(after))
    assert tierewrite.verify(src, tmp_path / "out", fill_missing_scales=True).ok
    assert [(e.target, e.missing) for e in report.filled] == [(f"{DECODER}.{LOST}", False)]


def test_the_tied_side_comes_first(copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4")
    mine = ("F32", [], struct.pack("<f", 0.125))
    edit_tensors(src, {f"{ENCODER}.{LOST}": mine, f"{DECODER}.{LOST}": None})
    report = tierewrite.rewrite(src, tmp_path / "out", fill_missing_scales=True)
    assert read_tensors(tmp_path / "out")[f"{DECODER}.{LOST}"] == mine
    assert report.filled == ()


def test_nothing_to_fill_from_is_left_missing_and_said(copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4")
    names = [f"{side}.layers.1.experts.{e}.down_proj.input_scale" for side in (ENCODER, DECODER) for e in range(4)]
    edit_tensors(src, {name: ("F32", [], b"\0\0\0\0") for name in names})
    edit_tensors(src, {f"{ENCODER}.{LOST}": None, f"{DECODER}.{LOST}": None})
    report = tierewrite.rewrite(src, tmp_path / "out", fill_missing_scales=True)
    assert f"{DECODER}.{LOST}" not in read_tensors(tmp_path / "out")
    assert any("nothing to fill in" in warning for warning in report.warnings)
    assert report.filled == ()


def test_a_complete_checkpoint_comes_out_as_without(naive: Naive, tmp_path: Path) -> None:
    tierewrite.rewrite(naive("dg_nvfp4"), tmp_path / "plain", manifest=False)
    tierewrite.rewrite(naive("dg_nvfp4"), tmp_path / "out", manifest=False, fill_missing_scales=True)
    for path in (tmp_path / "plain").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_verify_finds_a_filled_scale_that_is_not_the_widest(copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4")
    uneven(src)
    edit_tensors(src, {f"{ENCODER}.{LOST}": None, f"{DECODER}.{LOST}": None})
    tierewrite.rewrite(src, tmp_path / "out", fill_missing_scales=True, manifest=False)
    edit_tensors(tmp_path / "out", {f"{DECODER}.{LOST}": ("F32", [], struct.pack("<f", 0.011))})
    result = tierewrite.verify(src, tmp_path / "out", fill_missing_scales=True)
    assert [(p.id, p.where) for p in result.problems] == [("fill", f"{DECODER}.{LOST}")]


def test_prepared_for_vllm_with_the_gap_filled_is_ready(copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4")
    edit_tensors(src, {f"{ENCODER}.{LOST}": None, f"{DECODER}.{LOST}": None})
    report = tierewrite.prepare_for_vllm(src, tmp_path / "out", fill_missing_scales=True)
    assert report.readiness is not None
    assert report.readiness.only_per_side_conflicts()


def test_every_scale_is_filled_in_its_own_dtype(copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4")
    scales: list[tuple[str, list[int], bytes]] = [
        ("BF16", [], struct.pack("<f", 0.75)[2:]),
        ("F32", [1], struct.pack("<f", -1.0)),
        ("F16", [], struct.pack("<e", 0.0)),
        ("F64", [], struct.pack("<d", 3 / 256)),
    ]
    names = [f"layers.1.experts.{e}.down_proj.input_scale" for e in range(4)]
    edit_tensors(
        src, {f"{s}.{name}": scale for s in (ENCODER, DECODER) for name, scale in zip(names, scales, strict=True)}
    )
    report = tierewrite.rewrite(src, tmp_path / "out", fill_missing_scales=True)
    after = read_tensors(tmp_path / "out")
    filled = {name: after[f"{DECODER}.{name}"] for name in names[1:3]}
    assert filled == {
        names[1]: ("F32", [1], struct.pack("<f", 0.75)),
        names[2]: ("F16", [], struct.pack("<e", 0.75)),
    }
    assert [entry.target for entry in report.filled] == [f"{DECODER}.{name}" for name in names[1:3]]
    assert tierewrite.verify(src, tmp_path / "out", fill_missing_scales=True).ok


def test_a_value_that_one_of_the_dtypes_cannot_hold_fills_nothing(copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4")
    names = [f"{s}.layers.1.experts.{e}.down_proj.input_scale" for e in (0, 1) for s in (ENCODER, DECODER)]
    edit_tensors(src, {name: ("F32", [], struct.pack("<f", 1e6)) for name in names[:2]})
    edit_tensors(src, {name: ("F16", [], struct.pack("<e", 0.0)) for name in names[2:]})
    report = tierewrite.rewrite(src, tmp_path / "out", fill_missing_scales=True)
    assert report.filled == ()
    assert any(
        "no one value fits the scales of all experts of the layer (F32 [], F16 [])" in w for w in report.warnings
    )
    assert tierewrite.verify(src, tmp_path / "out", fill_missing_scales=True).ok
