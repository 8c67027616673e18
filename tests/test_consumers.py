"""Is it ready? Every defect found by its id, nothing of severity error on what loads right."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tierewrite
from tests import defects
from tests.checkpoints import FIXTURES, count_calls
from tests.defects import CONTROLS, DECODER, DEFECTS, ENCODER, Defect, Draft, Raw, make_good
from tests.sglang_defects import BASES, halved
from tests.test_vllm_classes import KINDS
from tests.tiny_classes import plain, zeros
from tierewrite import cli
from tierewrite.consumers import CONSUMERS, Finding, ReadinessReport, check, corrected_configs
from tierewrite.consumers.rules import Rule
from tierewrite.consumers.value_rules import VALUE_RULES
from tierewrite.consumers.vllm import VLLM
from tierewrite.consumers.vllm.corrected_ignore import consistent_ignore
from tierewrite.consumers.vllm.ignore import ModeloptIgnore
from tierewrite.errors import ConfigError, SourceError, UsageError
from tierewrite.planning.policy import FOR_CONSUMER
from tierewrite.ties.tie_map import TieMap

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "vllm_behaviour.json").read_text(encoding="utf-8"))
Good = Callable[[str], Path]
RESOLVED: dict[str, TieMap] = {}
# The tiny models' hidden size is no multiple of 128.
TINY = {"alignment"}


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    """The good checkpoint of a fixture: rewritten, its sides agreeing."""
    folder = tmp_path_factory.mktemp("good")
    made: dict[str, Path] = {}

    def make(base: str) -> Path:
        if base not in made:
            made[base] = make_good(base, folder)
        return made[base]

    return make


@pytest.fixture(autouse=True)
def _one_model_for_one_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most variants share a config: its class is built once, not three hundred times."""
    resolve = TieMap.resolve

    def remembered(root: Path, config: dict[str, Any], **options: Any) -> TieMap:
        key = json.dumps([config, options.get("trust_remote_code"), str(options.get("ties"))], sort_keys=True)
        if key not in RESOLVED:
            RESOLVED[key] = resolve(root, config, **options)
        return RESOLVED[key]

    monkeypatch.setattr(TieMap, "resolve", remembered)


def edited(good: Path, target: Path, edit: Callable[[Draft], None]) -> Path:
    Defect("edited", "", None, None, edit).make(good, target)
    return target


def only(report: ReadinessReport, which: str) -> Finding:
    (found,) = [f for f in report.findings if f.id == which]
    return found


# --- every defect ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.name)
def test_defect_is_found_by_its_id(defect: Defect, good: Good, tmp_path: Path) -> None:
    defect.make(good(defect.base), tmp_path / "variant")
    report = check(tmp_path / "variant", "vllm")
    found = {(f.id, f.severity) for f in report.findings}
    assert (defect.finding, defect.severity) in found
    assert all(made_by(f, "vllm") for f in report.findings)
    assert report.exit_code() == (6 if any(s == "error" for _, s in found) else 0)


@pytest.mark.parametrize("control", CONTROLS, ids=lambda d: d.name)
def test_what_vllm_loads_right_has_no_error(control: Defect, good: Good, tmp_path: Path) -> None:
    control.make(good(control.base), tmp_path / "variant")
    assert check(tmp_path / "variant", "vllm").errors == ()


@pytest.mark.parametrize("control", [c for c in CONTROLS if c.name.endswith("unchanged")], ids=lambda d: d.name)
def test_a_good_checkpoint_has_no_finding(control: Defect, good: Good) -> None:
    assert check(good(control.base), "vllm").ids() <= TINY


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.name)
def test_severity_is_what_the_real_loader_justifies(defect: Defect) -> None:
    """An error is never said of a variant that the real loader loaded like the good checkpoint."""
    assert defect.severity == "warning" or RECORDED["variants"][defect.name]["outcome"] != "same"


def test_every_variant_has_a_recorded_behaviour() -> None:
    assert RECORDED["variants"].keys() == {v.name for v in (*DEFECTS, *CONTROLS)}


def test_there_are_at_least_forty_defects_of_one_finding_each() -> None:
    assert len({d.name for d in DEFECTS}) == len(DEFECTS) >= 40


def test_every_rule_of_vllm_has_a_defect() -> None:
    """`alignment` is what every variant of the tiny models has; its test is the next."""
    assert {rule.id for rule in VLLM.rules.records} - TINY == {d.finding for d in DEFECTS} | {
        kind.finding for kind in KINDS.values()
    }


def test_alignment_is_a_warning_only_where_the_hidden_size_is_no_multiple_of_128(good: Good, tmp_path: Path) -> None:
    from tests.benchmarks.generate import generate

    generate(tmp_path / "aligned", "tiny")  # hidden size 256
    assert "alignment" not in check(tmp_path / "aligned", "vllm").ids()
    assert only(check(good("dg_nvfp4"), "vllm"), "alignment").severity == "warning"


# --- the records -------------------------------------------------------------------------------------------

RECORDS = [(consumer.name, rule) for consumer in CONSUMERS.values() for rule in consumer.records]


def made_by(finding: Finding, consumer: str) -> list[Rule]:
    """The records that say of the finding what it says, but for what depends on the checkpoint."""
    return [
        rule
        for rule in CONSUMERS[consumer].rules.records
        if all(getattr(rule, name) == getattr(finding, name) for name in ("id", "severity", "consequence", "fixed_by"))
    ]


@pytest.mark.parametrize(("consumer", "rule"), RECORDS, ids=lambda x: x if isinstance(x, str) else f"{x.id}-{x.when}")
def test_a_record_says_what_happens_and_where_that_was_read(consumer: str, rule: Rule) -> None:
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", rule.id)
    assert rule.title
    assert rule.consequence
    assert re.search(r"\.py [A-Z_a-z]", rule.source)
    assert rule.fixed_by is None or rule.fix


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_records_of_one_id_say_which_case_each_is_for(consumer: str) -> None:
    records = CONSUMERS[consumer].rules.records
    for which in {rule.id for rule in records}:
        cases = [rule for rule in records if rule.id == which]
        assert len({rule.when for rule in cases}) == len(cases)
        assert len({rule.title for rule in cases}) == 1
        assert len(cases) == 1 or all(rule.when for rule in cases)


@pytest.mark.parametrize("which", sorted({rule.id for _, rule in RECORDS}))
def test_explain_says_what_the_records_of_a_rule_say(which: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["explain", which]) == 0
    text = capsys.readouterr().out
    for name, rule in RECORDS:
        if rule.id == which:
            assert all(said in text for said in (name, rule.consequence, rule.fix, rule.source, rule.when))


def test_explain_lists_every_rule_and_refuses_what_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["explain", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["rules"]
    assert [(row["consumer"], row["id"], row["when"]) for row in listed] == [
        (c, r.id, r.when) for c, r in (*RECORDS, *(("check --values", rule) for rule in VALUE_RULES.records))
    ]
    assert cli.run(["explain", "--list"]) == 0
    lines = capsys.readouterr().out.rpartition("\n\n")[2].splitlines()
    assert {line.split()[0] for line in lines} == {rule.id for rule in (*(r for _, r in RECORDS), *VALUE_RULES.records)}
    assert cli.run(["explain", "no-such-rule"]) == 2
    assert "explain --list" in capsys.readouterr().err
    assert cli.run(["explain"]) == 2


def test_a_consumer_is_known_by_its_name_and_has_presets() -> None:
    assert {name: consumer.name for name, consumer in CONSUMERS.items()} == {name: name for name in CONSUMERS}
    assert {name: consumer.presets for name, consumer in CONSUMERS.items()} == FOR_CONSUMER


# --- the fixtures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["dg_nvfp4", "dg_nvfp4_experts_only", "dg_nvfp4_sharded", "dg_fp8"])
def test_naive_export_conflicts_and_rewriting_fixes_all_but_the_sides(case: str, tmp_path: Path) -> None:
    before = check(FIXTURES / case / "naive", "vllm")
    conflict = only(before, "name-conflict")
    assert all(name.endswith(".input_scale") for name in conflict.where)
    assert conflict.fixed_by == "rewrite"
    tierewrite.rewrite(FIXTURES / case / "naive", tmp_path / "out")
    after = check(tmp_path / "out", "vllm")
    assert {f.id for f in after.errors} == {"per-side-conflict"}
    assert after.only_per_side_conflicts()
    assert all(name.endswith(".layer_scalar") for name in only(after, "per-side-conflict").where)
    assert after.exit_code() == 6


def test_naive_conflicts_are_exactly_the_scales_whose_bytes_differ() -> None:
    draft = Draft.read(FIXTURES / "dg_nvfp4" / "naive")
    differing = {
        name
        for twin in draft.names()
        if twin.startswith(ENCODER) and twin.endswith(".input_scale")
        for name in (twin, DECODER + twin.removeprefix(ENCODER))
        if draft[DECODER + twin.removeprefix(ENCODER)] != draft[twin]
    }
    report = check(FIXTURES / "dg_nvfp4" / "naive", "vllm")
    assert differing
    assert set(only(report, "name-conflict").where) == differing


def test_kv_scales_of_the_sides_are_a_per_side_conflict_that_a_rewrite_merges(tmp_path: Path) -> None:
    tierewrite.rewrite(FIXTURES / "dg_nvfp4_kvfp8" / "naive", tmp_path / "kept")
    found = [f for f in check(tmp_path / "kept", "vllm").errors if f.fixed_by is not None]
    assert [(f.id, f.fixed_by) for f in found] == [("per-side-conflict", "rewrite --kv-scales merge")]
    assert all(name.endswith("_scale") for name in found[0].where)
    tierewrite.rewrite(FIXTURES / "dg_nvfp4_kvfp8" / "naive", tmp_path / "merged", kv_scales="merge")
    assert all(f.fixed_by is None for f in check(tmp_path / "merged", "vllm").errors)


OTHERS_FOR_VLLM = {"bart_bf16": {"architectures"}, "llava_tied_bf16": {"names-not-read"}}
"""vLLM has no class for BART, and refuses the names that transformers 5 writes for LLaVA's vision tower."""


@pytest.mark.parametrize(
    "case", ["bart_bf16", "qwen3_tied_bf16", "qwen3_untied_equal_bf16", "mixtral_tied_bf16", "llava_tied_bf16"]
)
@pytest.mark.parametrize("consumer", ["vllm", "transformers"])
def test_other_models_have_no_error(case: str, consumer: str, tmp_path: Path) -> None:
    wrong = OTHERS_FOR_VLLM.get(case, set()) if consumer == "vllm" else set()
    assert {f.id for f in check(FIXTURES / case / "naive", consumer).errors} == wrong
    tierewrite.rewrite(FIXTURES / case / "naive", tmp_path / "out")
    assert check(tmp_path / "out", consumer).ids() == wrong


# --- where a finding points --------------------------------------------------------------------------------


def test_missing_expert_and_missing_shard_are_named(good: Good, tmp_path: Path) -> None:
    def edit(d: Draft) -> None:
        d.drop(f"{DECODER}layers.0.experts.2.", f"{DECODER}layers.1.experts.0.up_proj.")

    report = check(edited(good("dg_nvfp4"), tmp_path / "v", edit), "vllm")
    assert only(report, "expert-missing").where == (f"{DECODER}layers.0.experts.2",)
    assert only(report, "fused-shard-missing").where == (f"{DECODER}layers.1.experts.0.up_proj.weight",)


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize(
    ("base", "router"),
    [("mixtral", "model.layers.1.block_sparse_moe.gate.weight"), ("qwen3-moe", "model.layers.1.mlp.gate.weight")],
)
def test_a_missing_parameter_has_the_name_that_checkpoints_have(
    base: str, router: str, consumer: str, tmp_path: Path
) -> None:
    """In memory Mixtral's router is `mlp.gate`."""
    draft = BASES[base]()
    draft.drop(router)
    draft.write(tmp_path / "v")
    assert only(check(tmp_path / "v", consumer, loader="off"), "parameter-missing").where == (router,)


def test_only_input_scales_of_experts_can_be_filled(good: Good, tmp_path: Path) -> None:
    def edit(d: Draft) -> None:
        d.drop(f"{DECODER}layers.0.experts.2.up_proj.input_scale", f"{DECODER}layers.0.mlp.down_proj.input_scale")

    report = check(edited(good("dg_nvfp4"), tmp_path / "v", edit), "vllm")
    by = {f.fixed_by: f.where for f in report.findings if f.id == "scale-missing"}
    assert by == {
        "rewrite --fill-missing-scales": (f"{DECODER}layers.0.experts.2.up_proj.input_scale",),
        None: (f"{DECODER}layers.0.mlp.down_proj.input_scale",),
    }


def test_alias_named_tensors_count_for_the_backbone(good: Good, tmp_path: Path) -> None:
    """What only the encoder's name holds is complete for vLLM, and for transformers too."""

    def edit(d: Draft) -> None:
        d[f"{ENCODER}norm.weight"] = d[f"{DECODER}norm.weight"]
        d.drop(f"{DECODER}norm.weight")

    folder = edited(good("dg_bf16"), tmp_path / "v", edit)
    assert check(folder, "vllm").errors == ()
    assert check(folder, "transformers").errors == ()


# --- ignore patterns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "module", "kinds"),
    [
        ("model.decoder.layers.1*", "model.layers.10.mlp.down_proj", {"substring"}),
        ("model.decoder.layers.1*", "model.layers.1.mlp.down_proj", {"prefix"}),
        ("model.decoder.layers.1*", "model.layers.2.mlp.down_proj", set()),
        ("model.encoder.language_model*", "model.layers.0.mlp.down_proj", {"wildcard"}),
        ("model.decoder.layers.0.experts.3.up_proj", "model.layers.0.experts", {"expert"}),
        ("lm_head", "lm_head", {"exact"}),
        ("mlp", "model.layers.0.mlp.gate_up_proj", {"substring"}),
    ],
)
def test_ignore_patterns_match_as_vllm_matches_them(entry: str, module: str, kinds: set[str]) -> None:
    ignore = ModeloptIgnore((entry,), VLLM.backbones.of("DiffusionGemmaForBlockDiffusion"))
    assert set(ignore.reasons(module).values()) == kinds


def test_fused_module_is_excluded_only_when_every_shard_is_listed() -> None:
    backbone = VLLM.backbones.of("DiffusionGemmaForBlockDiffusion")
    stem = "model.decoder.layers.0.self_attn."
    partly = ModeloptIgnore((f"{stem}q_proj", f"{stem}k_proj"), backbone)
    assert partly.partly("model.layers.0.self_attn.qkv_proj") == ("q_proj", "k_proj")
    whole = ModeloptIgnore((f"{stem}q_proj", f"{stem}k_proj", f"{stem}v_proj"), backbone)
    assert whole.partly("model.layers.0.self_attn.qkv_proj") == ()
    assert set(whole.reasons("model.layers.0.self_attn.qkv_proj").values()) == {"exact"}


IGNORE_DEFECTS = [d for d in DEFECTS if d.fixed and (d.finding or "").startswith(("ignore", "unlisted"))]


@pytest.mark.parametrize("defect", IGNORE_DEFECTS, ids=lambda d: d.name)
def test_consistent_ignore_list_fixes_the_pattern(defect: Defect, good: Good, tmp_path: Path) -> None:
    defect.make(good(defect.base), tmp_path / "variant")
    before = Draft.read(tmp_path / "variant")
    contents, sentences = corrected_configs("vllm", tmp_path / "variant")
    assert len(contents) == len(sentences) > 0
    for name, data in contents.items():
        (tmp_path / "variant" / name).write_bytes(data)
    assert check(tmp_path / "variant", "vllm").ids() <= TINY
    after = Draft.read(tmp_path / "variant")
    assert after.hf_quant is not None
    assert after.hf_quant["quantization"]["exclude_modules"] == after.quantization["ignore"]
    after.quantization["ignore"] = before.quantization["ignore"]
    assert after.config == before.config
    assert after.shards == before.shards


# Defects in which the list is at fault, whether or not another one would be right.
LISTS = ("ignore-", "unlisted", "quant", "architectures", "cannot")
OTHERS = [d for d in DEFECTS if not d.fixed and not (d.finding or "").startswith(LISTS)]


@pytest.mark.parametrize("defect", OTHERS, ids=lambda d: d.name)
def test_ignore_lists_stay_where_they_are_not_at_fault(defect: Defect, good: Good, tmp_path: Path) -> None:
    defect.make(good(defect.base), tmp_path / "variant")
    assert corrected_configs("vllm", tmp_path / "variant") == ({}, ())


@pytest.mark.parametrize("base", ["dg_nvfp4", "dg_nvfp4_experts_only", "dg_nvfp4_sharded", "dg_fp8"])
def test_a_right_ignore_list_stays(base: str, good: Good) -> None:
    assert consistent_ignore(VLLM.subject(good(base))) is None


# --- fixed by a rewrite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("defect", [d for d in DEFECTS if d.fixed], ids=lambda d: d.name)
def test_preparing_for_vllm_fixes_what_can_be_fixed(defect: Defect, good: Good, tmp_path: Path) -> None:
    defect.make(good(defect.base), tmp_path / "variant")
    report = tierewrite.prepare_for_vllm(tmp_path / "variant", tmp_path / "out", **defect.fix_options)
    assert report.readiness is not None
    assert report.readiness.ids() <= TINY
    assert check(tmp_path / "out", "vllm").ids() <= TINY


@pytest.mark.parametrize("defect", [d for d in DEFECTS if d.fixed], ids=lambda d: d.name)
def test_the_rewrite_that_a_finding_names_fixes_it(defect: Defect, good: Good, tmp_path: Path) -> None:
    defect.make(good(defect.base), tmp_path / "variant")
    found = [f for f in check(tmp_path / "variant", "vllm").findings if f.id == defect.finding]
    assert found
    for number, finding in enumerate(found):
        assert finding.fixed_by is not None
        done = ["rewrite", str(tmp_path / "variant"), str(tmp_path / str(number)), *finding.fixed_by.split()[1:]]
        assert cli.run([*done, "--quiet"]) == 0
        assert finding.id not in check(tmp_path / str(number), "vllm").ids()


@pytest.mark.parametrize("defect", [d for d in DEFECTS if not d.fixed], ids=lambda d: d.name)
def test_what_no_rewrite_fixes_says_so(defect: Defect, good: Good, tmp_path: Path) -> None:
    defect.make(good(defect.base), tmp_path / "variant")
    report = check(tmp_path / "variant", "vllm")
    assert None in {f.fixed_by for f in report.findings if (f.id, f.severity) == (defect.finding, defect.severity)}


# --- the report --------------------------------------------------------------------------------------------


def test_report_survives_json() -> None:
    report = check(FIXTURES / "dg_nvfp4" / "naive", "vllm")
    text = json.dumps(report.to_json())
    assert ReadinessReport.from_json(json.loads(text)) == report
    assert json.loads(text)["schema"] == "tierewrite/readiness/1"


def test_report_of_another_schema_is_refused() -> None:
    with pytest.raises(ValueError, match="tierewrite/readiness/1"):
        ReadinessReport.from_json({"schema": "tierewrite/readiness/2"})


def test_warnings_count_only_when_strict(good: Good, tmp_path: Path) -> None:
    def edit(d: Draft) -> None:
        d.generation = None

    report = check(edited(good("dg_nvfp4"), tmp_path / "v", edit), "vllm")
    assert report.errors == ()
    assert (report.exit_code(), report.exit_code(strict=True)) == (0, 6)


def test_check_writes_nothing_and_reads_no_weights(good: Good) -> None:
    folder = good("dg_nvfp4")
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}
    report = check(folder, "vllm")
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()} == before
    tensors = Draft.read(folder)
    scales = sum(len(tensors[n].data) for n in tensors.names() if "_scale" in n)
    sides = sum(len(tensors[n].data) for n in tensors.names() if n.endswith("layer_scalar"))
    assert 0 < report.bytes_read <= scales + sides


# --- names, backbones, refusals ----------------------------------------------------------------------------


def test_a_backbone_of_the_users_is_asked_first(good: Good, tmp_path: Path) -> None:
    """With a mapping that keeps the sides separate, nothing meets."""
    separate = {"architectures": [], "prefixes": [], "sides": [], "linear": [{"modules": "*.layers.*_proj"}]}
    (tmp_path / "separate.json").write_text(json.dumps(separate), encoding="utf-8")

    def edit(d: Draft) -> None:
        d[f"{ENCODER}layers.1.layer_scalar"] = d[f"{DECODER}layers.0.layer_scalar"]

    folder = edited(good("dg_nvfp4"), tmp_path / "v", edit)
    assert "per-side-conflict" in check(folder, "vllm").ids()
    assert "per-side-conflict" not in check(folder, "vllm", backbone=tmp_path / "separate.json").ids()


def test_a_broken_backbone_is_wrong_usage(good: Good, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"prefixes": 3}', encoding="utf-8")
    with pytest.raises(UsageError, match="backbone"):
        check(good("dg_nvfp4"), "vllm", backbone=tmp_path / "broken.json")


def test_an_unknown_consumer_is_wrong_usage(good: Good) -> None:
    with pytest.raises(UsageError, match=", ".join(CONSUMERS)):
        check(good("dg_nvfp4"), "nobody")


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"safetensors"):
        check(tmp_path, "vllm")


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("case", ["dg_nvfp4", "dg_nvfp4_sharded"])  # without an index, and with one
def test_hidden_files_are_read_by_nobody(case: str, consumer: str, tmp_path: Path) -> None:
    """macOS puts `._X` beside every X on others' file systems; no loader's `glob("*.safetensors")` finds it."""
    shutil.copytree(FIXTURES / case / "naive", tmp_path / "same")
    before = check(tmp_path / "same", consumer, loader="off")  # type: ignore[arg-type]
    for path in list((tmp_path / "same").glob("*.safetensors")):
        path.with_name(f"._{path.name}").write_bytes(b"Mac OS X        ")
    assert check(tmp_path / "same", consumer, loader="off") == before  # type: ignore[arg-type]


def test_a_config_that_is_no_json_is_refused(good: Good, tmp_path: Path) -> None:
    shutil.copytree(good("dg_nvfp4"), tmp_path / "v")
    (tmp_path / "v" / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"no valid JSON"):
        check(tmp_path / "v", "vllm")


def test_names_beyond_the_limit_are_reported_as_not_compared() -> None:
    report = check(FIXTURES / "dg_nvfp4" / "naive", "vllm", compare_limit=0)
    assert any("too large to be compared" in f.found for f in report.findings)
    assert "name-conflict" not in report.ids()


# --- transformers ------------------------------------------------------------------------------------------


def copy(target: str, source: str) -> Callable[[Draft], None]:
    """An edit that stores one tensor under (or over) another name."""
    return lambda d: d.__setitem__(target, d[source])


def whole_file_beside_shards(d: Draft) -> None:
    d.index_follows = False
    d.shards["model.safetensors"] = {NORM: d[NORM]}


NORM = f"{DECODER}norm.weight"
OTHER = f"{DECODER}layers.0.input_layernorm.weight"
TRANSFORMERS: list[tuple[str, str, str, Callable[[Draft], None]]] = [
    ("parameter-missing", "error", "dg_bf16", lambda d: d.drop(NORM)),
    ("unexpected-tensor", "warning", "dg_bf16", copy("mystery", NORM)),
    ("wrong-shape", "error", "dg_bf16", copy(NORM, f"{DECODER}layers.0.layer_scalar")),
    ("tie-not-confirmed", "warning", "dg_bf16", copy(f"{ENCODER}norm.weight", OTHER)),
    ("duplicate-names", "warning", "dg_bf16", copy(f"{ENCODER}norm.weight", NORM)),
    ("quant-method-unknown", "error", "dg_nvfp4", lambda d: None),
    ("experts-unpacked", "error", "dg_nvfp4", lambda d: None),
    ("scale-missing", "error", "llmc_fp8_static", lambda d: None),
    ("index-missing", "error", "dg_nvfp4_sharded", lambda d: setattr(d, "index", None)),
    ("index-names-missing-file", "error", "dg_nvfp4_sharded", defects.shard_missing),
    ("index-shadowed", "error", "dg_nvfp4_sharded", whole_file_beside_shards),
    ("duplicate-key", "error", "dg_nvfp4_sharded", defects.two_files_hold_one_key_with_other_values),
    ("architectures", "error", "dg_bf16", lambda d: d.config.update(architectures=["NoSuchModel"], model_type="x")),
]


def test_of_several_names_of_a_tie_only_those_that_differ_are_said_to(tmp_path: Path) -> None:
    draft = Draft.read(FIXTURES / "bart_bf16" / "naive")
    shared = draft["model.shared.weight"]
    draft["model.encoder.embed_tokens.weight"] = draft["model.decoder.embed_tokens.weight"] = shared
    draft["lm_head.weight"] = Raw(shared.dtype, shared.shape, bytes(len(shared.data)))
    draft.write(tmp_path / "v")
    report = check(tmp_path / "v", "transformers")
    (differing,) = [finding for finding in report.findings if finding.id == "tie-not-confirmed"]
    assert differing.where == ("lm_head.weight",)
    (same,) = [finding for finding in report.findings if finding.id == "duplicate-names"]
    assert "lm_head.weight" not in same.where
    assert len(same.where) == 3


@pytest.mark.parametrize(
    ("file", "fix"),
    [("adapter_model", "merge what is here"), ("model.fp16", "merge what is here"), ("weights", "writes an index")],
)
def test_no_index_is_promised_where_a_rewrite_refuses_files_of_another_loader(
    file: str, fix: str, tmp_path: Path
) -> None:
    naive = FIXTURES / "qwen3_tied_bf16" / "naive"
    src = tmp_path / "src"
    src.mkdir()
    shutil.copy(naive / "config.json", src)
    shutil.copy(naive / "model.safetensors", src / f"{file}.safetensors")
    (finding,) = [f for f in check(src, "transformers").findings if f.id == "index-missing"]
    assert fix in finding.fix
    refused = finding.fixed_by is None
    try:
        tierewrite.rewrite(src, tmp_path / "out")
    except SourceError:
        assert refused
    else:
        assert not refused


@pytest.mark.parametrize(
    ("fixture", "aborts"), [("dg_nvfp4", True), ("dg_w4a16_nvfp4", True), ("dg_fp8", False), ("dg_fp8_channel", False)]
)
def test_what_a_head_costs_that_no_list_names_depends_on_the_format(fixture: str, aborts: bool, tmp_path: Path) -> None:
    """Seen with vLLM 0.33: NVFP4 aborts, at a head of another shape or at scales that are still NaN; FP8 goes on."""
    draft = Draft.read(FIXTURES / fixture / "naive")
    draft.unignore("lm_head")
    draft.write(tmp_path / "v")
    found = only(check(tmp_path / "v", "vllm", loader="off"), "unlisted-lm-head")
    assert ("aborts" in found.consequence) is aborts
    assert ("initial values" in found.consequence) is not aborts


STACKED = {
    "mixtral": ("model.layers.1.block_sparse_moe.experts.3.", ("w1", "w2", "w3"), ("weight",)),
    "qwen3-moe": ("model.layers.1.mlp.experts.3.", ("gate_proj", "up_proj", "down_proj"), ("weight", "weight_scale")),
}
"""Base -> an expert, its projections, and the tensors of one that have its rows."""


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize(("base", "number"), [(base, number) for base in STACKED for number in range(3)])
def test_an_expert_has_the_shape_of_its_entry_in_what_transformers_stacks(
    base: str, number: int, consumer: str, tmp_path: Path
) -> None:
    """One that is too short: servers leave the rest uninitialised; with transformers the stacking fails."""
    expert, projections, leaves = STACKED[base]
    keys = [f"{expert}{projections[number]}.{leaf}" for leaf in leaves]
    draft = BASES[base]()
    draft.write(tmp_path / "good")
    for key in keys:
        halved(key)(draft)
    draft.write(tmp_path / "short")
    assert "wrong-shape" not in {finding.id for finding in check(tmp_path / "good", consumer, loader="off").findings}
    if (base, consumer) != ("qwen3-moe", "transformers"):  # which has no quantizer for this format
        found = only(check(tmp_path / "short", consumer, loader="off"), "wrong-shape")
        assert (found.severity, found.where[0]) == ("error", keys[0])


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("fixture", ["dg_quanto_qint4", "dg_torchao_experts"])
def test_packed_weights_of_any_name_are_quantized_modules_that_no_config_describes(fixture: str, consumer: str) -> None:
    report = check(FIXTURES / fixture / "naive", consumer, loader="off")
    which = "quant-method-unknown" if consumer == "transformers" else "quant-config-missing"
    (finding,) = [finding for finding in report.errors if finding.id == which]
    assert "modules are quantized" in finding.found
    assert "in a format that" in finding.fix or "the library that wrote it" in finding.fix


@pytest.mark.parametrize(
    ("config", "severity"),
    [({"quant_method": "compressed-tensors"}, "error"), ({"quant_method": "fp8"}, "warning"), (None, "warning")],
)
def test_an_fp8_head_beside_an_embedding_that_is_not_aborts_the_load(
    config: dict[str, str] | None, severity: str, tmp_path: Path
) -> None:
    """transformers 5.24 with compressed-tensors 0.20: "Promotion for Float8 Types is not supported"."""
    draft = Draft.read(FIXTURES / "qwen3_tied_bf16" / "naive")
    embedding = draft["model.embed_tokens.weight"]
    draft["lm_head.weight"] = Raw("F8_E4M3", embedding.shape, embedding.data[::2])
    if config is not None:
        draft.config["quantization_config"] = config
    draft.write(tmp_path / "v")
    report = check(tmp_path / "v", "transformers")
    assert [(f.severity, f.where) for f in report.findings if f.id == "tie-not-confirmed"] == [
        (severity, ("lm_head.weight",))
    ]


@pytest.mark.parametrize("plain", ["model.shared.weight", "model.encoder.embed_tokens.weight"])
def test_embeddings_that_get_a_plain_weight_need_no_scales_of_a_quantized_head(plain: str, tmp_path: Path) -> None:
    """amd-quark 0.13 with transformers 5.24: BART whose head alone is quantized loads with nothing missing."""
    draft = Draft.read(FIXTURES / "bart_bf16" / "naive")
    shared = draft["model.shared.weight"]
    for name in ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens"):
        draft.drop(f"{name}.weight")
    draft[plain] = shared
    draft["lm_head.weight"] = Raw("I8", shared.shape, shared.data[::2])
    draft["lm_head.weight_scale"] = Raw("F32", [], bytes(4))
    draft.config["quantization_config"] = {"quant_method": "quark"}
    draft.write(tmp_path / "v")
    assert [f.id for f in check(tmp_path / "v", "transformers").findings] == ["tie-not-confirmed"]


def test_a_tie_that_torchao_packed_on_both_sides_fails_to_load(tmp_path: Path) -> None:
    """torchao 0.18 with transformers 5.24: "attempting to run unimplemented operator/function: aten.equal"."""
    draft = Draft.read(FIXTURES / "qwen3_torchao_head" / "naive")
    draft.write(tmp_path / "equal")
    (equal,) = check(tmp_path / "equal", "transformers").findings
    assert (equal.id, equal.severity, equal.fixed_by) == ("duplicate-names", "error", "rewrite")
    head = draft["lm_head._weight_qdata"]
    draft["lm_head._weight_qdata"] = Raw(head.dtype, head.shape, bytes(len(head.data)))
    draft.write(tmp_path / "differ")
    (differ,) = check(tmp_path / "differ", "transformers").findings
    assert (differ.id, differ.severity, differ.where) == ("tie-not-confirmed", "error", ("lm_head._weight_qdata",))


@pytest.mark.parametrize(("which", "severity", "base", "edit"), TRANSFORMERS, ids=[row[0] for row in TRANSFORMERS])
def test_transformers_defect_is_found(
    which: str, severity: str, base: str, edit: Callable[[Draft], None], good: Good, tmp_path: Path
) -> None:
    def whole(d: Draft) -> None:
        # All norms of the tiny models are ones; this one is not, so that copying another is a difference.
        t = d[NORM]
        d[NORM] = type(t)(t.dtype, t.shape, b"\x00\x40" + t.data[2:])
        edit(d)

    report = check(edited(good(base), tmp_path / "v", whole), "transformers")
    assert (which, severity) in {(f.id, f.severity) for f in report.findings}
    assert all(made_by(f, "transformers") for f in report.findings)


def test_every_rule_of_transformers_has_a_defect() -> None:
    assert {rule.id for rule in CONSUMERS["transformers"].rules.records} == {row[0] for row in TRANSFORMERS}


def test_a_deduplicated_plain_checkpoint_is_ready_for_transformers(good: Good) -> None:
    assert check(good("dg_bf16"), "transformers").findings == ()


# --- scale -------------------------------------------------------------------------------------------------


def test_work_grows_with_the_number_of_tensors_and_not_with_its_square(tmp_path: Path) -> None:
    """The names of a whole DiffusionGemma 26B-A4B side, no data."""
    import dataclasses

    from tests.benchmarks.generate import PRESETS, generate

    small = dataclasses.replace(PRESETS["tiny-plan"], headers_only=True)
    work = []
    for number, experts in enumerate((small.experts, 8 * small.experts)):
        generate(tmp_path / str(number), dataclasses.replace(small, experts=experts))
        report, calls = count_calls(lambda number=number: check(tmp_path / str(number), "vllm", compare_limit=0))
        work.append((calls, report.tensors))
    (first, few), (second, many) = work
    assert many > 7 * few
    assert second < 2 * (many / few) * first


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ("1 tensors are missing", "1 tensor is missing"),
        ("1 names of a tie hold other bytes than its other", "1 name of a tie holds other bytes than its other"),
        ("1 entries exclude 2 modules that are quantized", "1 entry excludes 2 modules that are quantized"),
        ("1 ignore entries match no module", "1 ignore entry matches no module"),
        ("2 entries exclude 1 modules that are quantized", "2 entries exclude 1 module that is quantized"),
        ("1 weights have most of their scales at 448", "1 weight has most of its scales at 448"),
        ("group_size is 32, and 1 block scales are for 16", "group_size is 32, and 1 block scale is for 16"),
        ("1 weights of modules that the list does not name", "1 weight of modules that the list does not name"),
        ("1 tensors belong to none; vLLM says: 1 files are", "1 tensor belongs to none; vLLM says: 1 files are"),
        ("11 tensors are, 1,001 tensors are, k.1 tensors are", "11 tensors are, 1,001 tensors are, k.1 tensors are"),
    ],
)
def test_a_finding_speaks_of_one_in_the_singular(found: str, said: str) -> None:
    assert VLLM.rules.records[0].at((), found).found == said


@pytest.mark.parametrize(
    ("quantization", "found"),
    [
        ({}, "quantization_config has no quant_method"),
        ({"group_size": 64, "bits": 4}, "quantization_config has no quant_method"),
        ({"quant_method": None}, "quantization_config has no quant_method"),
        (["fp8"], "quantization_config is no object"),
        ("fp8", "quantization_config is no object"),
        ({"quant_method": ""}, None),
        ({"load_in_4bit": True}, None),
        ({"quant_method": "exl3"}, None),
        (None, None),
    ],
)
def test_transformers_refuses_a_quantization_config_without_a_method(
    quantization: object, found: str | None, tmp_path: Path
) -> None:
    draft = plain("LlamaForCausalLM")
    draft.config["quantization_config"] = quantization
    draft.write(tmp_path / "src")
    report = check(tmp_path / "src", "transformers")
    assert [finding.found for finding in report.errors] == [found] * bool(found)


@pytest.mark.parametrize("defect", ["another size", "one more"])
def test_transformers_cannot_fuse_an_expert_of_another_size_or_one_too_many(defect: str, tmp_path: Path) -> None:
    draft = plain("MixtralForCausalLM")
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    if defect == "one more":
        name = name.replace("experts.1", "experts.4")
        draft[name] = draft[name.replace("experts.4", "experts.1")]
    else:
        rows, columns = draft[name].shape
        draft[name] = zeros("BF16", rows - 1, columns)
    draft.write(tmp_path / "src")
    assert [(f.id, f.where) for f in check(tmp_path / "src", "transformers").errors] == [("wrong-shape", (name,))]
