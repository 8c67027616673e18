"""Names that stay because a consumer's loader would miss them: bytes, report, manifest, proof."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

import tierewrite
from tests.checkpoints import FIXTURES, edit_tensors, read_tensors
from tierewrite.consumers import CONSUMERS, needed
from tierewrite.consumers.dry_load import LoaderOptions, dry_load
from tierewrite.consumers.loaded import DryLoad, Rank, Unfilled
from tierewrite.consumers.transformers import names
from tierewrite.errors import Refused, UsageError
from tierewrite.planning.needed_names import NeededNames

SCALES = ("weight_scale", "input_scale")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """DiffusionGemma in FP8 under a quantizer that transformers loads itself; rewritten plainly, and with the names."""
    folder = tmp_path_factory.mktemp("names")
    made = {name: folder / name for name in ("naive", "plain", "kept")}
    shutil.copytree(FIXTURES / "dg_fp8" / "naive", made["naive"])
    path = made["naive"] / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["quant_method"] = "quark"
    path.write_text(json.dumps(config))
    tierewrite.rewrite(made["naive"], made["plain"])
    tierewrite.rewrite(made["naive"], made["kept"], keep_names_for="transformers", verify=True)
    return made


def alias_scales(folder: Path) -> list[str]:
    return [name for name in read_tensors(folder) if ".encoder." in name and name.endswith(SCALES)]


def canonical(name: str) -> str:
    return name.replace(".encoder.language_model.", ".decoder.")


def test_scales_of_an_alias_stay_with_the_one_value_of_their_tie(made: dict[str, Path]) -> None:
    source, plain, kept = (read_tensors(made[name]) for name in ("naive", "plain", "kept"))
    scales = alias_scales(made["naive"])
    assert scales
    assert not alias_scales(made["plain"])
    assert kept.keys() - plain.keys() == set(scales), "these stay, and nothing else"
    assert all(kept[name] == kept[canonical(name)] == plain[canonical(name)] for name in scales)
    assert any(kept[name] != source[name] for name in scales), "the sides were calibrated differently"


def test_the_plan_names_them_and_says_so(made: dict[str, Path]) -> None:
    plan = tierewrite.plan(made["naive"], keep_names_for="transformers")
    assert {name for group in plan.groups for name in group.kept_names} == set(alias_scales(made["naive"]))
    assert any("transformers needs the names" in warning for warning in plan.warnings)


def test_the_manifest_lists_them_and_a_rewrite_for_nobody_has_no_such_member(made: dict[str, Path]) -> None:
    plain, kept = (json.loads((made[name] / "tierewrite.json").read_text()) for name in ("plain", "kept"))
    assert not any("kept_names" in group for group in plain["groups"])
    listed = {name for group in kept["groups"] for name in group.get("kept_names", ())}
    assert listed == set(alias_scales(made["naive"]))
    assert kept["options"]["keep_names_for"] == "transformers"
    entries = {name: entry for group in kept["groups"] for name, entry in group["tensors"].items()}
    name = next(name for name in entries if ".encoder." in name and name.endswith("input_scale"))
    assert entries[name]["from"] == [name, canonical(name)]
    assert entries[canonical(name)]["from"] == [canonical(name), name]


def test_where_no_scale_goes_nobody_is_warned_of_it(tmp_path: Path) -> None:
    """A head that was quantized alone is no tie that its bytes confirm: both of its names stay."""
    source = shutil.copytree(FIXTURES / "qwen3_tied_bf16" / "naive", tmp_path / "src")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "quark"}
    (source / "config.json").write_text(json.dumps(config))
    rows, columns = read_tensors(source)["lm_head.weight"].shape
    packed = {
        "weight": ("F8_E4M3", [rows, columns], b"\x30" * rows * columns),
        "weight_scale": ("BF16", [], b"\x80\x3c"),
    }
    edit_tensors(source, {f"lm_head.{leaf}": tensor for leaf, tensor in packed.items()})
    plan = tierewrite.plan(source)
    assert [group.status for group in plan.groups] == ["unconfirmed"]
    assert not any("ties no scales" in warning for warning in plan.warnings)
    edit_tensors(source, {f"model.embed_tokens.{leaf}": tensor for leaf, tensor in packed.items()})
    assert any("ties no scales" in warning for warning in tierewrite.plan(source).warnings)


@pytest.mark.parametrize("suffix", SCALES)
def test_verify_finds_a_kept_scale_of_another_value(made: dict[str, Path], tmp_path: Path, suffix: str) -> None:
    dst = shutil.copytree(made["kept"], tmp_path / "dst")
    name = next(name for name in alias_scales(dst) if name.endswith(suffix))
    dtype, shape, data = read_tensors(dst)[name]
    edit_tensors(dst, {name: (dtype, shape, bytes([data[0] ^ 1]) + data[1:])})
    found = tierewrite.verify(made["naive"], dst, keep_names_for="transformers")
    assert {problem.where for problem in found.problems if problem.id in ("merge", "bytes")} == {name}


def test_verify_finds_a_needed_name_that_is_gone_and_one_that_nobody_needs(made: dict[str, Path]) -> None:
    scales = set(alias_scales(made["naive"]))
    gone = tierewrite.verify(made["naive"], made["plain"], keep_names_for="transformers")
    assert {problem.where for problem in gone.problems if problem.id == "missing"} == scales
    extra = tierewrite.verify(made["naive"], made["kept"])
    assert scales <= {problem.where for problem in extra.problems if problem.id in ("orphan", "tie-left")}


def test_verify_finds_a_manifest_that_lists_other_names(made: dict[str, Path], tmp_path: Path) -> None:
    dst = shutil.copytree(made["kept"], tmp_path / "dst")
    path = dst / "tierewrite.json"
    manifest = json.loads(path.read_text())
    next(group for group in manifest["groups"] if "kept_names" in group)["kept_names"].pop()
    path.write_text(json.dumps(manifest))
    found = tierewrite.verify(made["naive"], dst, keep_names_for="transformers")
    assert [problem.id for problem in found.problems] == ["manifest"]
    assert "stay for a consumer" in found.problems[0].message


def test_a_batch_keeps_them_too(made: dict[str, Path], tmp_path: Path) -> None:
    item = {"src": made["naive"], "dst": tmp_path / "dst", "keep_names_for": "transformers"}
    tierewrite.batch([item])
    assert read_tensors(tmp_path / "dst") == read_tensors(made["kept"])


def test_nothing_stays_for_a_quantizer_that_transformers_does_not_load(naive: Callable[[str], Path]) -> None:
    plan = tierewrite.plan(naive("dg_fp8"), keep_names_for="transformers")
    assert not any(group.kept_names for group in plan.groups)


@pytest.fixture
def head_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A consumer that needs the head of its own."""
    record = replace(
        CONSUMERS["transformers"],
        needed_names=lambda opened: NeededNames("somebody", frozenset({"lm_head.weight"})),
    )
    monkeypatch.setattr(needed, "CONSUMERS", {"transformers": record})


@pytest.mark.usefixtures("head_needed")
def test_a_head_that_is_needed_stays_and_nothing_changes(naive: Callable[[str], Path], tmp_path: Path) -> None:
    src, dst = naive("qwen3_tied_bf16"), tmp_path / "dst"
    report = tierewrite.rewrite(src, dst, keep_names_for="transformers", verify=True)
    assert read_tensors(dst) == read_tensors(src)
    assert [(group.status, group.group.kept_names) for group in report.groups] == [("canonical", ("lm_head.weight",))]


@pytest.mark.usefixtures("head_needed")
def test_a_needed_name_whose_bytes_differ_is_a_tie_that_is_not_confirmed(
    naive: Callable[[str], Path], tmp_path: Path
) -> None:
    src = naive("qwen3_tied_but_diverged_bf16")
    with pytest.raises(Refused, match="differ"):
        tierewrite.rewrite(src, tmp_path / "refused", keep_names_for="transformers")
    report = tierewrite.rewrite(src, tmp_path / "kept", keep_names_for="transformers", on_mismatch="keep", verify=True)
    assert [group.status for group in report.groups] == ["kept"]
    assert report.groups[0].group.kept_names == ()


@pytest.mark.usefixtures("head_needed")
def test_in_memory_the_very_tensor_stays() -> None:
    torch = pytest.importorskip("torch")
    weight = torch.arange(8.0).reshape(2, 4)
    state = {"embed.weight": weight, "lm_head.weight": weight.clone()}
    ties = {"lm_head.weight": "embed.weight"}
    result, report = tierewrite.dedupe_state_dict(state, ties, keep_names_for="transformers")
    assert result["lm_head.weight"] is state["lm_head.weight"]
    assert report.groups[0].group.kept_names == ("lm_head.weight",)
    dropped, _ = tierewrite.dedupe_state_dict(state, ties)
    assert list(dropped) == ["embed.weight"]


@pytest.mark.parametrize(
    ("method", "needed"),
    [
        ("quark", ["b.weight_scale"]),
        ("compressed-tensors", ["b.weight_scale"]),
        ("fp8", ["b.weight", "b.weight_scale"]),  # on a GPU its scales are missed, elsewhere its weight with them
        ("bitsandbytes", []),  # what it stores becomes one tied parameter
        ("torchao", []),
    ],
)
def test_the_rule_goes_by_how_a_quantizer_stores_a_weight(method: str, needed: list[str]) -> None:
    sides = {"b.weight": ["b.weight", "b.weight_scale"], "b.norm.weight": ["b.norm.weight"]}
    assert sorted(names.needed_by_rule(method, sides)) == needed


def test_a_side_that_no_name_is_missing_of_is_dropped(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers' loader answers decides; here it is asked for the canonical form and for the source."""
    asked: list[dict[str, object]] = []

    def answer(loader: object, folders: dict[Path, str], options: object) -> list[DryLoad]:
        headers = [json.loads((folder / "model.safetensors").read_bytes()[8:]) for folder in folders]
        asked.extend(headers)
        q_proj = Unfilled("model.encoder.language_model.layers.0.self_attn.q_proj.input_quantizer.scale", (), 1, 1)
        other = Unfilled("model.encoder.language_model.layers.1.self_attn.q_proj.input_quantizer.scale", (), 1, 1)
        ranks = [Rank(unfilled=(q_proj, other)), Rank(unfilled=(other,))]
        return [DryLoad("", "transformers", "5", "loaded", ranks=(rank,)) for rank in ranks]

    monkeypatch.setattr(names, "dry_load", answer)
    monkeypatch.setenv(names.LOADER.variable, "a Python that has Quark")
    names._missed.cache_clear()
    plan = tierewrite.plan(made["naive"], keep_names_for="transformers")
    names._missed.cache_clear()
    stem = "model.encoder.language_model.layers.0.self_attn.q_proj"
    assert [name for group in plan.groups for name in group.kept_names] == [
        f"{stem}.input_scale", f"{stem}.weight_scale"
    ]  # fmt: skip
    canonical_form, source = asked
    assert f"{stem}.weight" in source.keys() - canonical_form.keys()


@pytest.mark.skipif(find_spec("accelerate") is None, reason="from_pretrained on the meta device wants accelerate")
def test_transformers_itself_says_what_it_misses(naive: Callable[[str], Path], tmp_path: Path) -> None:
    lacking = copy_without(naive("qwen3_tied_bf16"), tmp_path / "lacking", "model.norm.weight")
    folders = {naive("qwen3_tied_bf16"): "whole", lacking: "lacking"}
    whole, other = dry_load(names.LOADER, folders, LoaderOptions())
    assert (whole.outcome, whole.reason, whole.ranks[0].unfilled) == ("loaded", "", ())
    assert [one.parameter for one in other.ranks[0].unfilled] == ["model.norm.weight"]


def copy_without(src: Path, dst: Path, name: str) -> Path:
    shutil.copytree(src, dst)
    edit_tensors(dst, {name: None})
    return dst


def test_a_plain_rewrite_warns_where_transformers_has_the_quantizer(made: dict[str, Path]) -> None:
    warned = [warning for warning in tierewrite.plan(made["naive"]).warnings if 'consumer="transformers"' in warning]
    assert len(warned) == 1
    assert "'quark'" in warned[0]
    assert tierewrite.check(made["plain"], "transformers").ids() >= {"scale-missing"}
    assert "scale-missing" not in tierewrite.check(made["kept"], "transformers").ids()
    assert "scale-missing" not in tierewrite.check(made["naive"], "transformers").ids()


def test_no_warning_where_nothing_is_missed(naive: Callable[[str], Path]) -> None:
    for case in ("dg_fp8", "dg_bf16", "dg_bnb_int8"):
        assert not any('consumer="transformers"' in warning for warning in tierewrite.plan(naive(case)).warnings)


def test_a_consumer_without_such_names_is_refused(naive: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="keep_names_for"):
        tierewrite.rewrite(naive("qwen3_tied_bf16"), tmp_path / "dst", keep_names_for="vllm")  # type: ignore[arg-type]
