"""Tensors that `check` and the search for a class must not mistake: in formats that are not known, of known formats
under names of several words, and what transformers and SGLang pass over.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import FIXTURES
from tests.defects import Draft, f32
from tests.tiny_classes import linears, mxfp4, plain, zeros
from tierewrite import cli, inspect, plan
from tierewrite.consumers import CONSUMERS, ReadinessReport, check

# Names as the exporters write them (transformers 5.24, integrations/aqlm.py, vptq.py, spqr.py, eetq.py, higgs.py).
FORMATS = {
    "aqlm": ("codes", "codebooks", "scales"),
    "vptq": ("indices", "centroids.weight", "weight_scale", "perm"),
    "spqr": ("dense_weights", "row_offsets", "col_vals"),
    "eetq": ("weight", "weight_scales"),
    "higgs": ("weight", "scales", "tables"),
}
LAST = "model.layers.1.mlp.down_proj"


def packed(method: str, *, head: bool = False) -> Draft:
    """Every linear of a Qwen3 in a format that is not known here; the tied head too, or as the embedding is."""
    draft = plain("Qwen3ForCausalLM")
    draft.config |= {"tie_word_embeddings": True, "quantization_config": {"quant_method": method}}
    draft["lm_head.weight"] = draft["model.embed_tokens.weight"]
    for module in (*linears(draft), *(("lm_head",) if head else ())):
        draft.drop(f"{module}.weight")
        for suffix in FORMATS[method]:
            draft[f"{module}.{suffix}"] = zeros("I32", 4, 4)
    return draft


def checked(draft: Draft, folder: Path, consumer: str) -> ReadinessReport:
    draft.write(folder)
    return check(folder, consumer, loader="off")


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("method", FORMATS)
def test_of_a_format_that_is_not_known_nothing_is_said_to_be_missing(
    method: str, consumer: str, tmp_path: Path
) -> None:
    report = checked(packed(method), tmp_path / "v", consumer)
    found = {finding.id for finding in report.findings}
    assert found <= {"quant-config-invalid", "lm-head-stored", "duplicate-names"}
    assert report.ready == (consumer in ("transformers", "tensorrt-llm"))  # the others have no such method
    assert any(f"quant_method {method}, and that format is not known here" in note for note in report.notes)


def test_what_a_known_format_lacks_is_missing_whatever_lies_beside_it(tmp_path: Path) -> None:
    draft = plain("Qwen3ForCausalLM")
    draft.config["quantization_config"] = {"quant_method": "fp8"}
    draft.drop(f"{LAST}.weight")
    draft[f"{LAST}.weight_quantizer._amax"] = f32(1.0)
    missing = [f.where for f in checked(draft, tmp_path / "v", "transformers").errors if f.id == "parameter-missing"]
    assert missing == [(f"{LAST}.weight",)]


def test_a_method_that_transformers_does_not_know_leaves_its_weights_at_random(tmp_path: Path) -> None:
    draft = packed("aqlm")
    draft.config["quantization_config"] = {"quant_method": "of_the_lab"}
    (error,) = checked(draft, tmp_path / "v", "transformers").errors
    assert error.id == "quant-method-unknown"
    assert error.found.startswith("14 modules are quantized")


@pytest.mark.parametrize("method", FORMATS)
def test_tensors_of_an_unknown_format_are_no_evidence_against_the_class(method: str, tmp_path: Path) -> None:
    packed(method).write(tmp_path / "v")
    made = plan(tmp_path / "v")
    assert [name for name, row in made.tensors.items() if row.action == "drop"] == ["lm_head.weight"]
    assert made.warnings == ()


def test_a_part_of_a_quantized_module_is_not_said_to_be_the_other_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = packed("vptq", head=True)
    draft.drop("model.embed_tokens.weight")
    for suffix in FORMATS["vptq"]:
        draft[f"model.embed_tokens.{suffix}"] = draft[f"lm_head.{suffix}"]
    draft.write(tmp_path / "v")
    assert cli.run(["rewrite", str(tmp_path / "v"), str(tmp_path / "out")]) == 3
    said = capsys.readouterr().err
    assert "is quantized and" not in said
    assert "no known format has the tensor" in said


def test_inspect_names_a_format_that_is_not_known(tmp_path: Path) -> None:
    packed("spqr").write(tmp_path / "v")
    assert inspect(tmp_path / "v").one_line().endswith("formats: spqr (not known here)")


@pytest.mark.parametrize("consumer", ["transformers", "sglang"])
def test_companions_of_several_words_and_of_fused_parameters_belong_to_their_weights(
    consumer: str, tmp_path: Path
) -> None:
    """bitsandbytes' `weight.absmax`, and gpt-oss' `gate_up_proj_scales`, which both read."""
    report = check(FIXTURES / "dg_bnb_nf4" / "naive", consumer, loader="off")
    assert "unexpected-tensor" not in {finding.id for finding in report.findings}
    assert checked(mxfp4(plain("GptOssForCausalLM")), tmp_path / "v", consumer).findings == ()


def test_a_weight_that_nobody_has_is_unexpected_in_a_quantized_checkpoint_too(tmp_path: Path) -> None:
    draft = plain("Qwen3ForCausalLM")
    draft.config["quantization_config"] = {"quant_method": "fp8"}
    draft["model.extra.weight"] = zeros("BF16", 4, 4)
    (finding,) = checked(draft, tmp_path / "v", "transformers").findings
    assert (finding.id, finding.where) == ("unexpected-tensor", ("model.extra.weight",))


@pytest.mark.parametrize("consumer", ["transformers", "sglang"])
def test_tables_of_older_checkpoints_are_passed_over_without_a_word(consumer: str, tmp_path: Path) -> None:
    draft = plain("Qwen3ForCausalLM")
    draft["model.layers.0.self_attn.rotary_emb.inv_freq"] = zeros("F32", 16)
    assert checked(draft, tmp_path / "v", consumer).findings == ()


def test_what_a_class_says_that_it_passes_over_is_not_listed(tmp_path: Path) -> None:
    """modeling_gpt2.py `_keys_to_ignore_on_load_unexpected`: the masks of attention."""
    draft = plain("GPT2LMHeadModel")
    draft["transformer.h.0.attn.bias"] = zeros("U8", 1, 1, 64, 64)
    draft["transformer.h.0.attn.other"] = zeros("U8", 1)
    found = checked(draft, tmp_path / "v", "transformers").findings
    assert [f.where for f in found if f.id == "unexpected-tensor"] == [("transformer.h.0.attn.other",)]


def test_a_router_of_layers_for_further_tokens_is_no_left_over_of_calibration(tmp_path: Path) -> None:
    draft = plain("Glm4MoeForCausalLM")
    draft.config["num_nextn_predict_layers"] = 1
    draft["model.layers.2.mlp.gate.e_score_correction_bias"] = zeros("F32", 4)
    assert checked(draft, tmp_path / "v", "sglang").findings == ()
