"""TensorRT-LLM by rules alone: read in its sources, never run."""

from __future__ import annotations

from pathlib import Path

import pytest

import tierewrite
from tests.checkpoints import FIXTURES, read_tensors
from tests.defects import Draft, Raw, f32
from tests.sglang_defects import (
    AMAX,
    BASES,
    A,
    Edit,
    M,
    X,
    again,
    both,
    drop,
    halved,
    ignore,
    labelled,
    moved_to_hf_quant_config,
    no_quantization_config,
    nothing,
    plain,
    put,
    top,
)
from tierewrite.consumers import check
from tierewrite.consumers.tensorrt_llm import TENSORRT_LLM, known_architectures

pytestmark = pytest.mark.usefixtures("remembered_ties")


def other_lists(d: Draft) -> None:
    inside = dict(d.quantization)
    moved_to_hf_quant_config(d)
    d.config["quantization_config"] = {**inside, "ignore": ["lm_head", "model.layers.0*"]}


def other_cache(d: Draft) -> None:
    inside = dict(d.quantization)
    moved_to_hf_quant_config(d)
    assert d.hf_quant is not None
    d.hf_quant["quantization"]["kv_cache_quant_algo"] = "FP8"
    d.config["quantization_config"] = inside


def repeated(change: bool) -> Edit:
    def edit(d: Draft) -> None:
        t = d["model.norm.weight"]
        other = Raw(t.dtype, t.shape, t.data[:-1] + bytes([t.data[-1] ^ 1])) if change else t
        d.shards["other.safetensors"] = {"model.norm.weight": other}

    return edit


def stray(d: Draft) -> None:
    repeated(True)(d)
    d.index = {"metadata": {}, "weight_map": dict.fromkeys(d.shards["model.safetensors"], "model.safetensors")}
    d.index_follows = False


def shard_missing(d: Draft) -> None:
    d.index = {"metadata": {}, "weight_map": dict.fromkeys(d.names(), "model.safetensors") | {"x": "gone.safetensors"}}
    d.index_follows = False


GATE = f"{M}gate_proj"
ROWS: list[tuple[str, Edit, str | None, str]] = [
    ("qwen3", nothing, None, ""),
    ("llama", nothing, None, ""),
    ("qwen3-moe", nothing, None, ""),
    ("mixtral", nothing, None, ""),
    ("mixtral", drop("lm_head.weight"), None, ""),  # it ties every class
    ("qwen3", moved_to_hf_quant_config, None, ""),
    ("qwen3", put(f"{A}q_proj.{AMAX}", f32(1.0)), None, ""),  # left over names are never looked at
    ("llama", both(plain(f"{M}down_proj"), ignore(f"{M}down_proj")), None, ""),
    ("llama", both(plain(f"{M}down_proj"), ignore("re:.*layers.0.mlp.down_proj")), None, ""),
    ("llama", both(plain(GATE), plain(f"{M}up_proj"), ignore(f"{M}gate_up_proj")), None, ""),
    ("qwen3", put(f"{A}q_proj.input_scale", f32(0.5)), "fused-input-scale-differs", "error"),
    ("qwen3", put(f"{A}q_proj.weight_scale_2", f32(0.5)), "fused-weight-scale-differs", "error"),
    ("qwen3-moe", put(f"{X}gate_proj.input_scale", f32(0.5)), "fused-input-scale-differs", "error"),
    ("qwen3-moe", put(f"{X}gate_proj.input_scale", f32(0.02 * (1 + 1e-7))), None, ""),  # torch.allclose
    ("qwen3", drop("model.norm.weight"), "parameter-missing", "error"),
    ("qwen3", drop(f"{A}q_proj."), "parameter-missing", "error"),
    ("qwen3", halved("model.norm.weight"), "wrong-shape", "error"),
    ("qwen3", drop(f"{A}o_proj.input_scale"), "scale-missing", "error"),
    ("qwen3", labelled(f"{A}o_proj.weight_scale", "U8"), "wrong-dtype", "error"),
    ("qwen3", halved(f"{A}o_proj.weight_scale"), "wrong-scale-shape", "error"),
    ("qwen3", put(f"{A}o_proj.weight_scale_2", f32(0.0)), "scale-not-positive", "error"),
    ("qwen3", put(f"{A}o_proj.input_scale", f32(float("inf"))), "scale-not-finite", "error"),
    ("qwen3", no_quantization_config, "quant-config-missing", "error"),
    ("qwen3", other_lists, "quant-config-disagrees", "error"),
    ("qwen3", other_cache, "quant-config-disagrees", "warning"),
    ("qwen3", ignore(f"{A}o_proj"), "ignored-but-quantized", "error"),
    ("qwen3", ignore("model.layers.1.*"), "ignored-but-quantized", "error"),
    ("llama", plain(f"{M}down_proj"), "unlisted-unquantized", "error"),
    ("qwen3", repeated(True), "duplicate-key", "error"),
    ("qwen3", repeated(False), "duplicate-key", "warning"),
    ("qwen3", stray, "duplicate-key", "warning"),
    ("qwen3", shard_missing, "index-names-missing-file", "error"),
    ("diffusion-gemma", nothing, "architectures", "error"),
    ("qwen3", both(again("lm_head.weight", "model.embed_tokens.weight", True), top()), None, ""),  # passed over
]


@pytest.mark.parametrize(("base", "edit", "finding", "severity"), ROWS, ids=[f"{n}-{r[2]}" for n, r in enumerate(ROWS)])
def test_defect_is_found_by_its_id(base: str, edit: Edit, finding: str | None, severity: str, tmp_path: Path) -> None:
    draft = BASES[base]()
    edit(draft)
    draft.write(tmp_path / "variant")
    report = check(tmp_path / "variant", "tensorrt-llm")
    assert {(f.id, f.severity) for f in report.findings} == (set() if finding is None else {(finding, severity)})
    assert any("was not run" in note for note in report.notes)


def test_every_rule_has_a_row_and_says_that_it_was_read_alone() -> None:
    assert {rule.id for rule in TENSORRT_LLM.rules.records} == {row[2] for row in ROWS} - {None}
    assert all(rule.source.startswith("read, not run: ") for rule in TENSORRT_LLM.rules.records)
    assert {"LlamaForCausalLM", "MixtralForCausalLM"} <= known_architectures()


def test_a_rewrite_for_it_gives_fused_projections_one_weight_scale(tmp_path: Path) -> None:
    draft = BASES["qwen3"]()
    put(f"{A}q_proj.weight_scale_2", f32(0.04))(draft)
    draft.write(tmp_path / "src")
    report = tierewrite.rewrite(tmp_path / "src", tmp_path / "out", consumer="tensorrt-llm")
    assert report.readiness is not None
    assert report.readiness.errors == ()
    out = read_tensors(tmp_path / "out")
    assert len({out[f"{A}{n}_proj.weight_scale_2"].data for n in "qkv"}) == 1


def test_a_rewrite_for_it_drops_every_tied_head(tmp_path: Path) -> None:
    tierewrite.rewrite(FIXTURES / "mixtral_tied_bf16" / "naive", tmp_path / "out", consumer="tensorrt-llm")
    assert "lm_head.weight" not in read_tensors(tmp_path / "out")
