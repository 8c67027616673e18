"""`check --values`: what is broken in the values of weights is found, by name; what is normal is not told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tierewrite
from tests.checkpoints import FIXTURES, write_checkpoint
from tierewrite.consumers import explain, values
from tierewrite.consumers.findings import Finding
from tierewrite.consumers.folder import Folder
from tierewrite.consumers.value_rules import VALUE_RULES, look_at_values
from tierewrite.errors import UsageError
from tierewrite.numbers import nvfp4
from tierewrite.numbers.float8 import float32_to_e4m3

Tensors = dict[str, tuple[str, list[int], bytes]]
EXPERTS = "model.layers.0.mlp.experts"
CONFIG = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 96}


def look(folder: Path, sample: int | None = None) -> tuple[dict[str, Finding], Any]:
    """The findings by id, and the subject with its notes; nobody's rules but those on values."""
    opened = Folder.open(folder, "")
    subject = SimpleNamespace(folder=opened, entries=opened.entries, config=opened.config, notes=[], bytes_read=0)
    found = look_at_values(subject, sample=sample, device="cpu")  # type: ignore[arg-type]
    assert len({finding.id for finding in found}) == len(found)
    return {finding.id: finding for finding in found}, subject


def normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(np.float32)


def bf16(weight: np.ndarray) -> tuple[str, list[int], bytes]:
    return "BF16", list(weight.shape), (weight.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def plain(name: str, weight: np.ndarray) -> Tensors:
    return {f"{name}.weight": bf16(weight)}


def f32(name: str, weight: np.ndarray) -> Tensors:
    return {f"{name}.weight": ("F32", list(weight.shape), weight.tobytes())}


def fp8(name: str, weight: np.ndarray) -> Tensors:
    scale = np.float32(max(np.nanmax(np.abs(weight)), 1e-12) / 448)
    codes = float32_to_e4m3(weight / scale)
    return {
        f"{name}.weight": ("F8_E4M3", list(weight.shape), codes.tobytes()),
        f"{name}.weight_scale": ("F32", [], scale.tobytes()),
    }


def int8(name: str, weight: np.ndarray) -> Tensors:
    scale = np.maximum(np.abs(weight).max(axis=1, keepdims=True), 1e-12).astype(np.float32) / 127
    return {
        f"{name}.weight": ("I8", list(weight.shape), np.rint(weight / scale).astype(np.int8).tobytes()),
        f"{name}.weight_scale": ("F32", list(scale.shape), scale.tobytes()),
    }


def modelopt(name: str, weight: np.ndarray) -> Tensors:
    scale = np.float32(max(np.abs(weight).max(), 1e-12) / (6 * 448))
    codes, scales, _ = nvfp4.encode(weight, scale)
    return {
        f"{name}.weight": ("U8", list(codes.shape), codes.tobytes()),
        f"{name}.weight_scale": ("F8_E4M3", list(scales.shape), scales.tobytes()),
        f"{name}.weight_scale_2": ("F32", [], scale.tobytes()),
    }


def compressed(name: str, weight: np.ndarray) -> Tensors:
    made = modelopt(name, weight)
    scale = np.frombuffer(made.pop(f"{name}.weight_scale_2")[2], np.float32)
    made[f"{name}.weight_packed"] = made.pop(f"{name}.weight")
    made[f"{name}.weight_global_scale"] = ("F32", [1], (1 / scale).astype(np.float32).tobytes())
    return made


STORED: Mapping[str, Callable[[str, np.ndarray], Tensors]] = {
    "BF16": plain, "F32": f32, "FP8": fp8, "INT8": int8, "NVFP4": modelopt, "NVFP4 of compressed-tensors": compressed,
}  # fmt: skip
MAIN = {"NVFP4 of compressed-tensors": "weight_packed"}


def model(stored: str, change: Callable[[dict[str, np.ndarray]], None] = lambda weights: None) -> Tensors:
    """Six experts and two dense layers, and around them all that may hold zeros in a sound model."""
    weights = {f"{EXPERTS}.{number}.up_proj": normal((32, 64), number) for number in range(6)}
    weights["model.layers.0.mlp.down_proj"] = normal((64, 32), 10)
    weights["model.layers.0.self_attn.q_proj"] = normal((64, 64), 11)
    change(weights)
    tensors: Tensors = {}
    for name, weight in weights.items():
        tensors |= STORED[stored](name, weight)
    embedding = normal((96, 64), 12)
    embedding[90:] = 0  # padding
    zeros = np.zeros((8, 64), np.float32)
    return tensors | {
        "model.embed_tokens.weight": bf16(embedding),
        "lm_head.weight": bf16(embedding),
        "output.weight": bf16(embedding),  # as many rows as the vocabulary has words
        "model.layers.0.mlp.gate.weight": bf16(zeros),
        "model.layers.0.self_attn.q_proj.bias": bf16(zeros[0]),
        "model.layers.0.self_attn.q_proj.lora_B.weight": bf16(zeros),
        "model.norm.weight": bf16(np.zeros(64, np.float32)),
        "model.causal_mask": ("F32", [2], np.array([0, -np.inf], np.float32).tobytes()),
        "model.position_ids": ("I64", [4], bytes(32)),
    }


def scaled(factor: float, name: str = f"{EXPERTS}.2.up_proj") -> Callable[[dict[str, np.ndarray]], None]:
    def change(weights: dict[str, np.ndarray]) -> None:
        weights[name] = (weights[name] * np.float32(factor)).astype(np.float32)

    return change


def rows_of(name: str, value: float, rows: slice) -> Callable[[dict[str, np.ndarray]], None]:
    def change(weights: dict[str, np.ndarray]) -> None:
        weights[name][rows] = value

    return change


def main_key(stored: str, name: str) -> str:
    return f"{name}.{MAIN.get(stored, 'weight')}"


@pytest.mark.parametrize("stored", STORED)
def test_a_sound_model_has_no_finding(stored: str, tmp_path: Path) -> None:
    found, subject = look(write_checkpoint(tmp_path / "m", model(stored), CONFIG))
    assert found == {}
    assert subject.notes == ["the values of 1 tensor (32 bytes) were not checked: packed or integers (I64)"]


@pytest.mark.parametrize("case", sorted(path.name for path in FIXTURES.iterdir() if (path / "naive").is_dir()))
def test_no_fixture_has_a_finding(case: str) -> None:
    assert look(FIXTURES / case / "naive")[0] == {}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("factor", [100, 0.01])
def test_an_expert_that_is_off_its_siblings_is_told(stored: str, factor: float, tmp_path: Path) -> None:
    found, _ = look(write_checkpoint(tmp_path / "m", model(stored, scaled(factor)), CONFIG))
    assert {id: finding.where for id, finding in found.items()} == {
        "expert-off-its-siblings": (main_key(stored, f"{EXPERTS}.2.up_proj"),)
    }


@pytest.mark.parametrize("stored", STORED)
def test_experts_may_differ_by_a_factor_of_eight(stored: str, tmp_path: Path) -> None:
    assert look(write_checkpoint(tmp_path / "m", model(stored, scaled(8)), CONFIG))[0] == {}


@pytest.mark.parametrize("stored", STORED)
def test_an_expert_of_zeros_is_told(stored: str, tmp_path: Path) -> None:
    found, _ = look(write_checkpoint(tmp_path / "m", model(stored, scaled(0)), CONFIG))
    assert found["expert-of-zeros"].where == (main_key(stored, f"{EXPERTS}.2.up_proj"),)
    assert not {"weight-of-zeros", "rows-of-zeros", "expert-off-its-siblings"} & found.keys()


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", [f"{EXPERTS}.3.up_proj", "model.layers.0.mlp.down_proj"])
def test_rows_of_zeros_are_told(stored: str, name: str, tmp_path: Path) -> None:
    found, _ = look(write_checkpoint(tmp_path / "m", model(stored, rows_of(name, 0, slice(5, 9))), CONFIG))
    assert {id: finding.where for id, finding in found.items()} == {"rows-of-zeros": (main_key(stored, name),)}
    assert found["rows-of-zeros"].found == "4 rows are zero, in 1 weight"


@pytest.mark.parametrize("stored", ["BF16", "F32", "FP8"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_told(stored: str, value: float, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    tensors = model(stored)
    dtype, shape, data = tensors[f"{name}.weight"]
    bits = {"BF16": b"\xc0\x7f" if np.isnan(value) else b"\x80\xff", "F32": np.float32(value).tobytes(), "FP8": b"\xff"}
    tensors[f"{name}.weight"] = dtype, shape, data[:64] + bits[stored] + data[64 + len(bits[stored]) :]
    found, _ = look(write_checkpoint(tmp_path / "m", tensors, CONFIG))
    assert {id: finding.where for id, finding in found.items()} == {"values-not-finite": (f"{name}.weight",)}


def test_a_scale_that_is_not_finite_is_told(tmp_path: Path) -> None:
    tensors = model("INT8")
    name = "model.layers.0.mlp.down_proj.weight_scale"
    dtype, shape, data = tensors[name]
    tensors[name] = dtype, shape, data[:-4] + np.float32(np.nan).tobytes()
    assert look(write_checkpoint(tmp_path / "m", tensors, CONFIG))[0]["values-not-finite"].where == (name,)


@pytest.mark.parametrize(
    ("stored", "scale", "told"),
    [
        ("FP8", "weight_scale", "weight-of-zeros"),
        ("NVFP4", "weight_scale_2", "weight-of-zeros"),
        ("INT8", "weight_scale", "rows-of-zeros"),
        ("NVFP4", "weight_scale", "rows-of-zeros"),
    ],
)
def test_a_scale_of_zero_makes_zeros(stored: str, scale: str, told: str, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj"
    tensors = model(stored)
    dtype, shape, data = tensors[f"{name}.{scale}"]
    tensors[f"{name}.{scale}"] = dtype, shape, bytes(4) + data[4:]  # the only one, or of one or two rows
    assert look(write_checkpoint(tmp_path / "m", tensors, CONFIG))[0][told].where == (f"{name}.weight",)


def test_bytes_that_are_not_those_that_were_written_show_as_numbers_that_no_model_has(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = model("BF16")
    dtype, shape, data = tensors[name]
    noise = (np.random.default_rng(1).integers(0, 0x7F00, 64).astype("<u2")).tobytes()  # no NaN, no infinity
    tensors[name] = dtype, shape, data[:128] + noise + data[256:]
    found, _ = look(write_checkpoint(tmp_path / "m", tensors, CONFIG))
    assert {id: finding.where for id, finding in found.items()} == {"values-too-large": (name,)}


@pytest.mark.parametrize("stored", ["NVFP4", "NVFP4 of compressed-tensors"])
@pytest.mark.parametrize(("byte", "id"), [(0x7E, "block-scales-at-limit"), (0x01, "block-scales-at-bottom")])
def test_block_scales_at_their_limits_are_told(stored: str, byte: int, id: str, tmp_path: Path) -> None:
    tensors = model(stored)
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    dtype, shape, data = tensors[name]
    tensors[name] = dtype, shape, bytes([byte]) * 64 + data[64:]
    found, _ = look(write_checkpoint(tmp_path / "m", tensors, CONFIG))
    assert {id: finding.where for id, finding in found.items()} == {id: (name,)}


def fused(change: Callable[[np.ndarray], None]) -> Tensors:
    weight = normal((6, 32, 64), 3)
    change(weight)
    return {f"{EXPERTS}.gate_up_proj": bf16(weight)}


def test_of_fused_experts_the_one_is_named(tmp_path: Path) -> None:
    def change(weight: np.ndarray) -> None:
        weight[1] *= 200
        weight[4] = 0

    found, _ = look(write_checkpoint(tmp_path / "m", fused(change), CONFIG))
    assert {id: finding.where for id, finding in found.items()} == {
        "expert-off-its-siblings": (f"{EXPERTS}.gate_up_proj[1]",),
        "expert-of-zeros": (f"{EXPERTS}.gate_up_proj[4]",),
    }


def test_a_layer_of_zeros_is_a_warning(tmp_path: Path) -> None:
    """Models that are extended by new layers begin with such."""
    name = "model.layers.0.mlp.down_proj"
    found, _ = look(write_checkpoint(tmp_path / "m", model("BF16", scaled(0, name)), CONFIG))
    assert [(finding.id, finding.severity, finding.where) for finding in found.values()] == [
        ("weight-of-zeros", "warning", (f"{name}.weight",))
    ]


@pytest.mark.parametrize("stored", STORED)
def test_pieces_of_any_size_tell_the_same(stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(weights: dict[str, np.ndarray]) -> None:
        scaled(100)(weights)
        rows_of("model.layers.0.mlp.down_proj", 0, slice(30, 40))(weights)

    folder = write_checkpoint(tmp_path / "m", model(stored, change), CONFIG, shards=3)
    whole, _ = look(folder)
    monkeypatch.setattr(values, "PIECE", 300)
    pieces, subject = look(folder)
    assert pieces == whole
    assert len(whole) == 2
    assert subject.bytes_read == sum(entry.nbytes for entry in subject.entries.values() if entry.dtype != "I64")


def test_a_sample_reads_so_many_weights_and_says_so(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", model("FP8"), CONFIG)
    _, subject = look(folder, sample=2)
    read = subject.bytes_read
    assert 0 < read < sum(entry.nbytes for entry in subject.entries.values()) / 3
    assert any("--sample 2" in note for note in subject.notes)


def test_check_tells_it_with_what_else_it_found_and_not_unless_asked(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", model("BF16", scaled(0)), CONFIG)
    asked = tierewrite.check(folder, "transformers", values=True)
    assert "expert-of-zeros" in asked.ids()
    assert asked.exit_code() == 6
    assert "expert-of-zeros" not in tierewrite.check(folder, "transformers").ids()
    with pytest.raises(UsageError, match="sample"):
        tierewrite.check(folder, "transformers", sample=3)


@pytest.mark.parametrize("rule", VALUE_RULES.records, ids=lambda rule: rule.id)
def test_every_rule_is_explained(rule: Any) -> None:
    assert f"check --values: {rule.title}" in explain.explained(rule.id)
    assert rule.id in explain.listed()
