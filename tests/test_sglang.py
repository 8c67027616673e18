"""SGLang by rules alone, and a rewrite for it: five classes, sound and with one defect each, judged by its real loader.

What the loader does is recorded in sglang_behaviour.json; tests/test_sglang_loader.py records it again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tierewrite
from tests.checkpoints import FIXTURES, read_tensors
from tests.sglang_defects import BASES, VARIANTS, Variant, make_all
from tests.tiny_classes import nvfp4, plain
from tierewrite import cli
from tierewrite.consumers import check
from tierewrite.consumers.sglang import SGLANG
from tierewrite.consumers.sglang.classes import model_class, table

pytestmark = pytest.mark.usefixtures("remembered_ties")
RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "sglang_behaviour.json").read_text(encoding="utf-8"))
FINDINGS = [v for v in VARIANTS if v.finding is not None]
SOUND = [v for v in VARIANTS if v.finding is None]
# SGLang takes one of two that differ, and looks right: what was trained is lost. And what it does not read stays unset.
NOT_SEEN, NOT_READ = "name-conflict", {"qwen3-weight-only"}
RULES_OF_FILES = {"index-names-missing-file", "file-not-indexed", "duplicate-key", "quant-config-disagrees"}


def report_of(variant: Variant, folder: Path) -> tierewrite.ReadinessReport:
    return check(make_all(folder, [variant])[variant.name], "sglang", loader="off")


@pytest.mark.parametrize("variant", FINDINGS, ids=lambda v: v.name)
def test_defect_is_found_by_its_id(variant: Variant, tmp_path: Path) -> None:
    assert (variant.finding, variant.severity) in {(f.id, f.severity) for f in report_of(variant, tmp_path).findings}


@pytest.mark.parametrize("variant", SOUND, ids=lambda v: v.name)
def test_what_sglang_loads_right_has_no_error(variant: Variant, tmp_path: Path) -> None:
    assert report_of(variant, tmp_path).errors == ()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_severity_is_what_the_real_loader_justifies(variant: Variant) -> None:
    """All that is refused, aborted or left unfilled is an error, and nothing that loads like the good one."""
    outcome = RECORDED["variants"][variant.name]["outcome"]
    wrong = variant.finding is not None and variant.severity == "error"
    assert not wrong or outcome != "same" or variant.finding == NOT_SEEN
    assert wrong or outcome in ("same", "changed") or variant.name in NOT_READ


@pytest.mark.parametrize("fixture", ["dg_quanto_qint4", "dg_torchao_experts", "dg_torchao_int8", "dg_hqq"])
def test_a_class_without_quantization_is_none_for_packed_weights_of_any_name(fixture: str) -> None:
    """Whatever the format and whether a config says so or not: to restore a config makes SGLang refuse."""
    errors = {finding.id: finding for finding in check(FIXTURES / fixture / "naive", "sglang", loader="off").errors}
    assert errors.keys() == {"quant-config-missing", "quantized-unsupported"}
    assert errors["quantized-unsupported"].consequence.endswith("refuses to load as soon as a config says so")


def test_every_variant_has_a_recorded_behaviour_and_every_class_twelve_defects() -> None:
    assert RECORDED["variants"].keys() == {v.name for v in VARIANTS}
    assert RECORDED["sglang"] == SGLANG.version
    assert all(len([v for v in FINDINGS if v.base == base]) >= 12 for base in BASES)


def test_every_rule_has_a_defect() -> None:
    assert {rule.id for rule in SGLANG.rules.records} - RULES_OF_FILES <= {v.finding for v in FINDINGS} | {
        "fused-input-scale-differs"
    }


def test_the_table_of_classes_says_what_was_measured() -> None:
    assert len(table()) > 200
    assert {one.how for one in table().values()} == {"measured", "read", "not known"}
    assert all((one.head is None) or one.how != "not known" for one in table().values())
    for name in ("MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "Glm4MoeForCausalLM"):
        assert (model_class(name).how, model_class(name).head) == ("measured", "own")
    for name in ("Qwen3ForCausalLM", "LlamaForCausalLM", "Gemma3ForCausalLM", "Phi3ForCausalLM"):
        assert (model_class(name).how, model_class(name).head) == ("measured", "tied")
    assert model_class("DiffusionGemmaForBlockDiffusion").quantized is False
    assert model_class("NoSuchClass").how == "not known"


# --- a rewrite for it --------------------------------------------------------------------------------------


def test_the_head_stays_where_sglang_does_not_tie_it(tmp_path: Path) -> None:
    src = FIXTURES / "mixtral_tied_bf16" / "naive"
    report = tierewrite.rewrite(src, tmp_path / "out", consumer="sglang")
    out = read_tensors(tmp_path / "out")
    assert out["lm_head.weight"] == out["model.embed_tokens.weight"] == read_tensors(src)["lm_head.weight"]
    assert [name for group in report.groups for name in group.group.kept_names] == ["lm_head.weight"]
    assert any("head of its own" in warning for warning in report.warnings)
    assert report.readiness is not None
    assert report.readiness.errors == ()
    policy = json.loads((tmp_path / "out" / "tierewrite.json").read_text())["options"]
    assert policy["keep_names_for"] == "sglang"
    assert tierewrite.verify(src, tmp_path / "out", **policy).ok


def test_a_canonical_checkpoint_of_such_a_class_lacks_its_head(tmp_path: Path) -> None:
    tierewrite.rewrite(FIXTURES / "mixtral_tied_bf16" / "naive", tmp_path / "out")
    (found,) = check(tmp_path / "out", "sglang", loader="off").errors
    assert (found.id, found.where) == ("head-not-tied", ("lm_head.weight",))


def test_the_head_goes_where_sglang_ties_it(tmp_path: Path) -> None:
    report = tierewrite.rewrite(FIXTURES / "qwen3_tied_bf16" / "naive", tmp_path / "out", consumer="sglang")
    assert "lm_head.weight" not in read_tensors(tmp_path / "out")
    assert report.readiness is not None
    assert report.readiness.findings == ()


def test_the_head_stays_where_nothing_is_known_of_the_class(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    for path in (FIXTURES / "qwen3_tied_bf16" / "naive").iterdir():
        (src / path.name).write_bytes(path.read_bytes())
    config = json.loads((src / "config.json").read_text())
    config["architectures"] = ["Qwen3ForSomethingNew"]
    (src / "config.json").write_text(json.dumps(config))
    (tmp_path / "ties.json").write_text(json.dumps({"lm_head.weight": "model.embed_tokens.weight"}))
    report = tierewrite.rewrite(src, tmp_path / "out", consumer="sglang", ties=tmp_path / "ties.json")
    assert "lm_head.weight" in read_tensors(tmp_path / "out")
    assert report.readiness is not None
    assert report.readiness.errors == ()
    assert any("is not known" in note for note in report.readiness.notes)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = str(FIXTURES / "mixtral_tied_bf16" / "naive")
    assert cli.run(["rewrite", src, str(tmp_path / "out"), "--for", "sglang", "-q"]) == 0
    assert cli.run(["check", str(tmp_path / "out"), "--for", "sglang"]) == 0
    capsys.readouterr()
    assert cli.run(["explain", "head-not-tied"]) == 0
    assert "sglang 0.5.23" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("quantization", "found"),
    [
        ({"quant_method": "torchao"}, "SGLang 0.5.23 has no method 'torchao'"),
        ({"quant_method": "compressed_tensors"}, "SGLang 0.5.23 has no method 'compressed_tensors'"),
        ({"quant_method": "quanto", "weights": "int8"}, "SGLang 0.5.23 has no method 'quanto'"),
        ({}, "quant_method is missing"),
        ({"quant_method": None}, "quant_method is no name"),
        ("fp8", "quantization_config is no object"),
        ({"quant_method": "FP8"}, None),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, None),
        (None, None),
    ],
)
def test_a_method_that_sglang_does_not_take_is_an_error(
    quantization: object, found: str | None, tmp_path: Path
) -> None:
    draft = plain("LlamaForCausalLM")
    draft.config["quantization_config"] = quantization
    draft.write(tmp_path / "src")
    report = check(tmp_path / "src", "sglang", loader="off")
    assert [finding.found for finding in report.errors if finding.id == "quant-config-invalid"] == [found] * bool(found)


@pytest.mark.parametrize(
    ("architecture", "unlisted"),
    [("Qwen3MoeForCausalLM", True), ("MixtralForCausalLM", False), ("Qwen3ForCausalLM", True)],
)
def test_a_head_that_the_class_quantizes_has_to_be_listed(architecture: str, unlisted: bool, tmp_path: Path) -> None:
    nvfp4(plain(architecture), ignore=("*gate",)).write(tmp_path / "src")
    found = [finding.where for finding in check(tmp_path / "src", "sglang", loader="off").errors]
    assert found == [("lm_head.weight",)] * unlisted
