"""Names of wrappers in keys, ties of which nothing is on disk, large undeclared duplicates, and ties as a mapping."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import tierewrite
from tests.checkpoints import FIXTURES, edit_tensors, read_tensors, write_checkpoint
from tierewrite import cli
from tierewrite.errors import EXIT_SOURCE, ConfigError, TieFileError
from tierewrite.ties.on_disk import on_disk, wrappers_of
from tierewrite.ties.renames import Renames
from tierewrite.ties.tie import ModelNames, Tie
from tierewrite.ties.tie_map import TieMap
from tierewrite.ties.wrappers import unwrapped

NAIVE = FIXTURES / "qwen3_tied_bf16" / "naive"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TIE = {HEAD: EMBEDDING}


def renamed(folder: Path, rename: Mapping[str, str] | str, source: Path = NAIVE) -> Path:
    """A copy of a fixture whose tensors have other names: with a prefix, or each as the mapping says."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = read_tensors(source)
    named = {(rename + key if isinstance(rename, str) else rename.get(key, key)): t for key, t in tensors.items()}
    write_checkpoint(folder, named)
    return folder


def ties_file(folder: Path, ties: Mapping[str, str]) -> Path:
    (folder / "ties.json").write_text(json.dumps(ties))
    return folder / "ties.json"


def dropped(plan: tierewrite.RewritePlan) -> dict[str, str]:
    return {key: p.target for key, p in plan.tensors.items() if p.action.value == "drop"}


PREFIXES = [
    "_orig_mod.",
    "module.",
    "_fsdp_wrapped_module.",
    "base_model.model.",
    "pretrained_model.",
    "actor_module.",
    "llm.",
    "language_model.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "base_model.model._fsdp_wrapped_module._orig_mod.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_ties_are_found_below_the_names_of_wrappers(prefix: str, tmp_path: Path) -> None:
    src = renamed(tmp_path / "src", prefix)
    plan = tierewrite.plan(src)
    assert dropped(plan) == {prefix + HEAD: prefix + EMBEDDING}
    assert [f"every name begins with '{prefix}'" in warning for warning in plan.warnings] == [True]


@pytest.mark.parametrize("prefix", ["module._orig_mod.", "language_model."])
@pytest.mark.parametrize("consumer", ["vllm", "sglang", "tensorrt-llm", "transformers"])
def test_check_says_what_takes_the_names_of_wrappers_off(consumer: str, prefix: str, tmp_path: Path) -> None:
    src = renamed(tmp_path / "src", prefix)
    report = tierewrite.check(src, consumer, loader="off")
    assert report.errors
    (note,) = [note for note in report.notes if f"'{prefix}'" in note]
    assert "strip_prefix" in note
    tierewrite.rewrite(src, tmp_path / "dst", strip_prefix=True)
    after = tierewrite.check(tmp_path / "dst", consumer, loader="off")
    assert not after.errors
    assert not any("begins with" in note for note in after.notes)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._fsdp_wrapped_module."])
def test_the_output_keeps_the_names_of_wrappers_and_an_option_strips_them(prefix: str, tmp_path: Path) -> None:
    src = renamed(tmp_path / "src", prefix)
    report = tierewrite.rewrite(src, tmp_path / "kept", verify=True)
    assert any(prefix in warning and "strip_prefix=True takes it off" in warning for warning in report.warnings)
    right = {key: tensor for key, tensor in read_tensors(NAIVE).items() if key != HEAD}
    assert read_tensors(tmp_path / "kept") == {prefix + key: tensor for key, tensor in right.items()}
    report = tierewrite.rewrite(src, tmp_path / "stripped", verify=True, strip_prefix=True)
    assert read_tensors(tmp_path / "stripped") == right
    assert any(f"'{prefix}' was taken off every name" in warning for warning in report.warnings)
    assert tierewrite.verify(src, tmp_path / "stripped", strip_prefix=True).ok
    assert not tierewrite.verify(src, tmp_path / "stripped").ok
    assert not tierewrite.verify(src, tmp_path / "kept", strip_prefix=True).ok


def test_a_stripped_output_with_another_name_is_no_proof(tmp_path: Path) -> None:
    src, dst = renamed(tmp_path / "src", "_orig_mod."), tmp_path / "dst"
    tierewrite.rewrite(src, dst, strip_prefix=True, manifest=False)
    (dst / "model.safetensors.index.json").unlink()
    tensor = read_tensors(dst)["model.norm.weight"]
    edit_tensors(dst, {"model.norm.weight": None, "norm.weight": tensor})
    found = tierewrite.verify(src, dst, strip_prefix=True)
    problems = {(problem.id, problem.where) for problem in found.problems}
    assert {("undeclared-drop", "model.norm.weight"), ("unexpected", "norm.weight")} <= problems


def test_the_proof_reads_the_names_of_wrappers_by_itself() -> None:
    from tierewrite.proof.stripped import check_stripped
    from tierewrite.source.table import Names

    before = ["module._orig_mod.a.weight", "module._orig_mod.b._orig_mod.c.weight"]
    assert check_stripped(Names(before), Names(["a.weight", "b.c.weight"])) == []
    assert check_stripped(Names(before), Names(before)) == []
    wrong = check_stripped(Names(before), Names(["_orig_mod.a.weight", "b.c.weight"]))
    assert [(p.id, p.where) for p in wrong] == [("prefix", "_orig_mod.a.weight")]


def test_torchs_own_wrappers_count_inside_names_too(tmp_path: Path) -> None:
    names = {key: key.replace("model.", "model._orig_mod.", 1) for key in read_tensors(NAIVE)}
    names |= {key: name.replace(".mlp.", "._fsdp_wrapped_module.mlp.") for key, name in names.items()}
    src = renamed(tmp_path / "src", names)
    plan = tierewrite.plan(src)
    assert dropped(plan) == {HEAD: "model._orig_mod.embed_tokens.weight"}
    assert "some names hold those of wrappers" in plan.warnings[0]
    report = tierewrite.rewrite(src, tmp_path / "dst", strip_prefix=True, verify=True)
    assert set(read_tensors(tmp_path / "dst")) == set(read_tensors(NAIVE)) - {HEAD}
    assert "names of wrappers were taken off" in report.warnings[0]


@pytest.mark.parametrize(
    ("rename", "canonical"),
    [("module.", "module.model.embed_tokens.weight"), ("inner", "model._orig_mod.embed_tokens.weight")],
)
def test_an_alias_that_stands_alone_takes_the_canonical_name_as_the_others_are_wrapped(
    rename: str, canonical: str, tmp_path: Path
) -> None:
    inner = {key: key.replace("model.", "model._orig_mod.", 1) for key in read_tensors(NAIVE)}
    src = renamed(tmp_path / "src", inner if rename == "inner" else rename)
    edit_tensors(src, {canonical: None})
    plan = tierewrite.plan(src)
    changed = [p for p in plan.tensors.values() if p.action.value != "keep"]
    assert [(p.action.value, p.target) for p in changed] == [("rename", canonical)]


@pytest.mark.parametrize("spelled", ["", "_orig_mod."])
def test_a_ties_file_may_speak_of_the_names_with_or_without_wrappers(spelled: str, tmp_path: Path) -> None:
    src = renamed(tmp_path / "src", "_orig_mod.")
    (src / "config.json").unlink()
    plan = tierewrite.plan(src, ties={spelled + HEAD: spelled + EMBEDDING})
    assert dropped(plan) == {f"_orig_mod.{HEAD}": f"_orig_mod.{EMBEDDING}"}


@pytest.mark.parametrize("alone", [HEAD, "model.norm.weight"])
def test_a_ties_file_may_speak_of_one_side_that_is_there_without_wrappers(alone: str, tmp_path: Path) -> None:
    """Nobody knows the class: what stands alone takes its own canonical name, spelled as the others are."""
    src = renamed(tmp_path / "src", "module.")
    (src / "config.json").write_text("{}")
    edit_tensors(src, {f"module.{EMBEDDING}": None})
    plan = tierewrite.plan(src, ties={alone: EMBEDDING})
    assert [(p.name, p.target) for p in plan.tensors.values() if p.action.value == "rename"] == [
        (f"module.{alone}", f"module.{EMBEDDING}")
    ]


def test_what_a_class_calls_its_parts_is_no_wrapper() -> None:
    keys = ["module.head.weight", "module.embed.weight"]
    model = ModelNames("Own", "", dict.fromkeys(keys, (4, 4)), Renames.of((), ()))
    ties = TieMap((Tie(*keys, "test"),), "class", model=model)
    assert wrappers_of(ties, keys) is None
    assert on_disk(ties, keys).groups[0].slots == (("module.embed.weight", "module.head.weight"),)


def test_a_part_that_its_class_calls_language_model_is_no_wrapper_though_it_stands_alone(tmp_path: Path) -> None:
    """LLaVA without its vision tower: all names that are left begin alike, and the class has them so."""
    llava = FIXTURES / "llava_tied_bf16" / "naive"
    src = tmp_path / "src"
    shutil.copytree(llava, src, ignore=shutil.ignore_patterns("*.safetensors*"))
    parts = {key: tensor for key, tensor in read_tensors(llava).items() if key.startswith("language_model.")}
    write_checkpoint(src, parts)
    plan = tierewrite.plan(src, strip_prefix=True)
    assert dropped(plan) == {f"language_model.{HEAD}": f"language_model.{EMBEDDING}"}
    assert any("no name begins with one of a wrapper" in warning for warning in plan.warnings)


@pytest.mark.parametrize(
    ("keys", "prefix", "names"),
    [
        (["module.a", "module.b"], "module.", ["a", "b"]),
        (["module.llm.a", "module.b"], "module.", ["llm.a", "b"]),
        (["modules.a", "modules.b"], None, None),
        (["module.a", "b"], None, None),
        (["base_model.a", "base_model.b"], None, None),
        (["a._orig_mod.w", "a.w"], None, None),  # they would become one
        (["a._orig_mod.w", "b.w"], "", ["a.w", "b.w"]),
        ([], None, None),
    ],
)
def test_names_without_wrappers(keys: list[str], prefix: str | None, names: list[str] | None) -> None:
    found = unwrapped(keys)
    assert (found and found.prefix, found and found.names.names) == (prefix, names)


def test_strip_prefix_without_wrappers_says_so_and_changes_nothing(tmp_path: Path) -> None:
    report = tierewrite.rewrite(NAIVE, tmp_path / "dst", strip_prefix=True, verify=True)
    assert "no name begins with one of a wrapper" in report.warnings[0]
    assert set(read_tensors(tmp_path / "dst")) == set(read_tensors(NAIVE)) - {HEAD}


# --- a declared tie of which nothing is on disk


def test_a_declared_tie_that_finds_nothing_is_said_everywhere(tmp_path: Path) -> None:
    said = (
        f"nothing is on disk of the declared tie of '{HEAD}' to '{EMBEDDING}': none of the 25 names is a parameter of "
        "Qwen3ForCausalLM; all of them begin with 'student.'"
    )
    src = renamed(tmp_path / "src", "student.")
    assert said in tierewrite.plan(src).warnings
    assert said in tierewrite.inspect(src).warnings
    assert said in tierewrite.rewrite(src, tmp_path / "dst").warnings
    assert said in tierewrite.verify(src, tmp_path / "dst").notes


def test_state_dicts_of_wrapped_models() -> None:
    torch = pytest.importorskip("torch")
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.Qwen3Config(**sizes, num_key_value_heads=2, head_dim=4, vocab_size=32)
    config.tie_word_embeddings = True
    model = transformers.Qwen3ForCausalLM(config)
    state = {f"_orig_mod.{key}": torch.clone(tensor) for key, tensor in model.state_dict().items()}
    result, report = tierewrite.dedupe_state_dict(state, model)
    assert state.keys() - result.keys() == {f"_orig_mod.{HEAD}"}
    assert any("_orig_mod." in warning for warning in report.warnings)
    state = {key.replace("_orig_mod", "student"): tensor for key, tensor in state.items()}
    result, report = tierewrite.dedupe_state_dict(state, model)
    assert result.keys() == state.keys()
    assert any("nothing is on disk of the declared tie" in warning for warning in report.warnings)
    assert tierewrite.dedupe_state_dict({}, model)[1].warnings == ()


# --- large tensors that hold the same bytes


def test_undeclared_duplicates_are_a_hint_and_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large, other = bytes(1 << 20), bytes([1]) + bytes((1 << 20) - 1)
    small, changed = bytes(1 << 10), bytes((1 << 20) - 5000) + b"\1" + bytes(4999)
    tensors = {name: ("U8", (len(data),), data) for name, data in
               {"a.weight": large, "b.weight": large, "c.weight": other, "d.weight": changed,
                "e.weight": small, "f.weight": small}.items()}  # fmt: skip
    src = tmp_path / "src"
    src.mkdir()
    write_checkpoint(src, tensors)
    hint = (
        "hint: 'a.weight', 'b.weight' hold the same 1.00 MiB, and no tie between them is declared or confirmed: all "
        "are kept"
    )
    assert tierewrite.plan(src, ties={}).warnings == ()
    plan = tierewrite.plan(src, ties={}, duplicates=True)
    assert plan.warnings == (hint,)
    assert dropped(plan) == {}
    assert tierewrite.plan(src, ties={"b.weight": "a.weight"}, duplicates=True).warnings == ()
    assert cli.run(["plan", str(src), "--ties", str(ties_file(tmp_path, {})), "--duplicates"]) == 0
    assert "hold the same 1.00 MiB" in " ".join(capsys.readouterr().out.split())


# --- ties that the caller gives


def test_an_empty_object_says_that_nothing_is_tied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = tmp_path / "src"
    shutil.copytree(NAIVE, src)
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLMEagle3"]}))
    edit_tensors(src, {"fc.weight": ("BF16", (1,), b"\0\0")})
    with pytest.raises(ConfigError, match=r"ties=FILE \({} in it: nothing is\)") as caught:
        tierewrite.plan(src)
    assert caught.value.exit_code == EXIT_SOURCE
    ties = ties_file(tmp_path, {})
    assert cli.run(["plan", str(src), "--ties", str(ties)]) == 0
    assert "ties.json: nothing is tied" in "".join(capsys.readouterr().out.split("\n"))
    assert cli.run(["rewrite", str(src), str(tmp_path / "dst"), "--ties", str(ties), "--verify", "--quiet"]) == 0
    assert read_tensors(tmp_path / "dst") == read_tensors(src)


def test_a_ties_file_on_what_it_made_has_nothing_to_do(tmp_path: Path) -> None:
    src = tmp_path / "src"
    shutil.copytree(NAIVE, src)
    (src / "config.json").write_text(json.dumps({"architectures": ["NoSuchModel"], "model_type": "no_such"}))
    ties = ties_file(tmp_path, TIE)
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert cli.run(["rewrite", str(src), str(once), "--ties", str(ties), "--quiet"]) == 0
    assert cli.run(["rewrite", str(once), str(twice), "--ties", str(ties), "--verify", "--quiet"]) == 0
    assert read_tensors(twice) == read_tensors(once)
    plan = tierewrite.plan(once, ties=ties)
    assert [group.status for group in plan.groups] == ["canonical"]
    assert "nothing is left to do, unless the aliases are misspelt" in plan.warnings[0]
    with pytest.raises(TieFileError, match="matches nothing"):
        tierewrite.plan(once, ties={"a.weight": "b.weight"})


def test_every_function_takes_ties_as_a_mapping(tmp_path: Path) -> None:
    assert dropped(tierewrite.plan(NAIVE, ties=TIE)) == TIE
    report = tierewrite.rewrite(NAIVE, tmp_path / "dst", ties=TIE, verify=True)
    assert (report.ties_source, report.ties_detail) == ("mapping", "")
    assert tierewrite.verify(NAIVE, tmp_path / "dst", ties=TIE).ok
    assert not tierewrite.verify(NAIVE, tmp_path / "dst", ties={}).ok
    assert tierewrite.check(tmp_path / "dst", "transformers", ties=TIE).errors == ()
    assert tierewrite.inspect(NAIVE, ties=TIE).disk.groups[0].aliases == (HEAD,)  # type: ignore[union-attr]
    given: dict[str, Any] = {"src": NAIVE, "dst": tmp_path / "batch", "ties": TIE}
    assert tierewrite.batch([given]).exit_code == 0
    assert tierewrite.batch([NAIVE], into=tmp_path / "into", ties=TIE).exit_code == 0
    assert read_tensors(tmp_path / "batch") == read_tensors(tmp_path / "dst")
    (tmp_path / "list.jsonl").write_text(json.dumps({"src": str(NAIVE), "dst": "listed", "ties": TIE}))
    assert tierewrite.batch(tmp_path / "list.jsonl").exit_code == 0
    again = tierewrite.batch(tmp_path / "list.jsonl").results[0]
    assert again.status == "already-done"
