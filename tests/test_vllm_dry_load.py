"""vLLM 0.33's own loader, run dry: its facts against the real load of the same folder, and the verdicts from them.

Needs the venv that tests/vllm_loader/setup.sh makes, named by TIEREWRITE_VLLM_VENV.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

import tierewrite
from tests.checkpoints import FIXTURES
from tests.defects import CONTROLS, DEFECTS, Defect, make_all
from tests.vllm_loader.behaviour import HERE, RECORD, VENV_VARIABLE, python
from tierewrite import consumers
from tierewrite.consumers.dry_load import LoaderOptions, dry_load
from tierewrite.consumers.loaded import DryLoad
from tierewrite.consumers.loader_rules import KV_LEAVES
from tierewrite.consumers.vllm import VLLM

INTERPRETER = python()
REASON = f"{VENV_VARIABLE} names no venv of vLLM; tests/vllm_loader/setup.sh DIR makes one"
pytestmark = [pytest.mark.vllm, pytest.mark.skipif(INTERPRETER is None, reason=REASON)]


def asked(folders: Iterable[Path], **options: Any) -> dict[str, DryLoad]:
    """Facts by the folders' names, from one process."""
    assert VLLM.dry_loader is not None
    paths = {folder: folder.name for folder in folders}
    found = dry_load(VLLM.dry_loader, paths, LoaderOptions(python=INTERPRETER, timeout=7200.0, **options))
    return dict(zip(paths.values(), found, strict=True))


def unfilled(facts: DryLoad) -> dict[str, int]:
    """Elements that no key wrote, by parameter, without those of the KV cache's scales and those that nobody reads."""
    return {
        one.parameter: one.missing
        for rank in facts.ranks[:1]
        for one in rank.unfilled
        if one.parameter.rpartition(".")[2] not in KV_LEAVES and one.initial != "unused"
    }


def outcome(facts: DryLoad) -> str:
    """In the words of tests/vllm_behaviour.json; "loads" for all that loads everything."""
    if not facts.loaded:
        return "aborts" if "missing: {" in facts.reason else facts.outcome  # a shard is missing
    return "aborts" if facts.ranks[0].refused else "unfilled" if unfilled(facts) else "loads"


# --- DiffusionGemma: 112 defects and 24 controls -----------------------------------------------------------


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every variant's folder, by name."""
    goods, made = make_all(tmp_path_factory.mktemp("variants"), [*DEFECTS, *CONTROLS])
    return {path.name: path for path in goods.values()} | made


@pytest.fixture(scope="module")
def facts(variants: dict[str, Path]) -> dict[str, DryLoad]:
    """What the dry load finds in each of them."""
    return asked(variants.values())


def test_the_dry_load_ends_as_the_real_load_did(facts: dict[str, DryLoad]) -> None:
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))["variants"]
    same = {"changed": "loads", "same": "loads", "fails": "loads"}
    for name, row in recorded.items():
        assert outcome(facts[name]) == same.get(row["outcome"], row["outcome"]), name
        if "key" in row:
            rank = facts[name].ranks[0]
            assert rank.refused[0].key == row["key"], name
            assert len(rank.refused) == row["keys"] or not rank.refused_all, name
        listed = {parameter for parameter in row.get("unfilled", ()) if not parameter.startswith("and ")}
        assert listed <= unfilled(facts[name]).keys() or row["outcome"] == "aborts", name


@pytest.fixture
def checked(
    facts: dict[str, DryLoad], variants: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], consumers.ReadinessReport]:
    """`check` of a variant, with the facts that are known already."""
    assert INTERPRETER is not None
    monkeypatch.setenv("TIEREWRITE_VLLM_PYTHON", str(INTERPRETER))
    monkeypatch.setattr(consumers, "dry_load", lambda loader, folders, options: [facts[path.name] for path in folders])
    return lambda name: consumers.check(variants[name], "vllm", loader="require")


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_every_defect_is_found_by_its_id(defect: Defect, checked: Callable[[str], consumers.ReadinessReport]) -> None:
    assert (defect.severity, defect.finding) in {(f.severity, f.id) for f in checked(defect.name).findings}


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.name)
def test_no_control_is_an_error(control: Defect, checked: Callable[[str], consumers.ReadinessReport]) -> None:
    assert not checked(control.name).errors


# --- end to end --------------------------------------------------------------------------------------------


def test_rewrite_for_vllm_asks_vllm_about_its_output(tmp_path: Path) -> None:
    source, out = FIXTURES / "dg_nvfp4" / "naive", tmp_path / "out"
    report = tierewrite.rewrite(source, out, consumer="vllm", loader="require", consumer_python=INTERPRETER)
    assert report.readiness is not None
    assert report.readiness.consumer_version == "0.33.0"
    assert not any("not asked" in note for note in getattr(report.readiness, "notes", ()))


def test_every_rank_of_a_group_is_loaded_and_a_group_that_cannot_be_is_refused(tmp_path: Path) -> None:
    good = tmp_path / "out"
    tierewrite.rewrite(FIXTURES / "dg_nvfp4" / "naive", good, kv_scales="merge")
    two = asked([good], tensor_parallel_size=2)["out"]
    assert [rank.rank for rank in two.ranks] == [0, 1]
    assert not unfilled(two)
    three = asked([good], tensor_parallel_size=3)["out"]
    assert three.outcome == "refused"
    assert "divisible by tensor parallel size (3)" in three.reason


# --- many classes, against the full loader -----------------------------------------------------------------

CLASSES = [
    "llama:nvfp4", "llama:fp8", "llama:ctfp8", "qwen2:bf16", "qwen3:nvfp4", "phi3:nvfp4", "gemma3:nvfp4",
    "mixtral:nvfp4", "mixtral:bf16", "qwen3moe:nvfp4", "olmoe:nvfp4", "glm4moe:nvfp4", "deepseek3:nvfp4",
    "granitemoe:bf16", "gpt2:bf16", "opt:bf16", "gptneox:bf16", "qwen3vl:nvfp4", "whisper:nvfp4",
    "starcoder2:ctfp8",
]  # fmt: skip


def fully_loaded(folders: Iterable[Path]) -> list[Mapping[str, Any]]:
    """What the real loader does with real bytes."""
    command = [str(INTERPRETER), str(HERE / "full_load.py"), *map(str, folders)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def agree(dry: DryLoad, real: Mapping[str, Any]) -> bool:
    """Both end alike, at the same key, with the same elements unfilled."""
    if not dry.loaded:
        return dry.outcome == real["outcome"]
    rank = dry.ranks[0]
    if rank.refused:
        return real["outcome"] == "aborts" and real["key"] == rank.refused[0].key
    if real["outcome"] != "loaded" or bool(real["failed"]) != bool(rank.failed):
        return False
    left = {name: n for name, n in real["unfilled"].items() if name.rpartition(".")[2] not in KV_LEAVES}
    return left == unfilled(dry)


@pytest.mark.parametrize(("name", "ends"), [("llama", "aborts"), ("qwen3moe", "loaded")])
def test_scales_of_a_module_that_is_built_plain_are_refused_or_passed_over(
    name: str, ends: str, tmp_path: Path
) -> None:
    """What the rules say of them: by the class, the load is aborted or the weights are taken unscaled."""
    from tests.vllm_loader.breakages import Checkpoint, compressed_fp8, quantized_but_ignored
    from tests.vllm_loader.tiny_models import save

    made = compressed_fp8(Checkpoint.read(save(name, tmp_path / "plain")))
    assert quantized_but_ignored(made) is True
    (real,) = fully_loaded([made.write(tmp_path / "ignored")])
    assert real["outcome"] == ends
    assert real.get("key", "").endswith("o_proj.weight_scale") is (ends == "aborts")


@pytest.mark.parametrize("scales", [False, True], ids=["without", "with"])
def test_layers_of_vllms_in_a_model_of_transformers_have_their_own_values(scales: bool, tmp_path: Path) -> None:
    """vLLM has no Starcoder2: it puts its layers into transformers', whose parameters it allocates anew."""
    from tests.defects import f32
    from tests.vllm_loader.breakages import Checkpoint, compressed_fp8
    from tests.vllm_loader.tiny_models import save

    made = compressed_fp8(Checkpoint.read(save("starcoder2", tmp_path / "plain")))
    if scales:
        made.config["quantization_config"]["kv_cache_scheme"] = {
            "num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False,
        }  # fmt: skip
        for layer in (0, 1):
            for kind in ("k_scale", "v_scale"):
                made.tensors[f"model.layers.{layer}.self_attn.{kind}"] = f32(0.1)
    facts = asked([made.write(tmp_path / "sound")])["sound"]
    assert facts.model_class == "TransformersForCausalLM"
    assert {one.initial for one in facts.ranks[0].unfilled} == {"default"}
    subject = VLLM.subject(tmp_path / "sound")
    subject.loaded = facts
    assert [finding for finding in VLLM.findings(subject) if finding.severity == "error"] == []
    assert not any(cast.key.endswith(("k_scale", "v_scale")) for cast in facts.ranks[0].casts)


@pytest.mark.long
@pytest.mark.parametrize("which", CLASSES)
def test_the_dry_load_agrees_with_the_full_load_sound_and_broken(which: str, tmp_path: Path) -> None:
    """And `check` says what it finds: nothing of a sound checkpoint, an error of what does not load whole."""
    from tests.vllm_loader.breakages import FORMATS, Checkpoint, broken
    from tests.vllm_loader.tiny_models import save

    name, form = which.split(":")
    good = FORMATS[form](Checkpoint.read(save(name, tmp_path / "plain")))
    folders = [good.write(tmp_path / "sound"), *(made.write(tmp_path / kind) for kind, made in broken(good))]
    dry, real = asked(folders), fully_loaded(folders)
    assert [f.name for f, row in zip(folders, real, strict=True) if not agree(dry[f.name], row)] == []
    for folder in folders:
        subject = VLLM.subject(folder)
        subject.loaded = dry[folder.name]
        errors = [finding for finding in VLLM.findings(subject) if finding.severity == "error"]
        converted = folder.name == "weight_as_bytes" and form != "nvfp4"  # loads, and makes other numbers of the bytes
        assert bool(errors) == (outcome(dry[folder.name]) != "loads" or converted), folder.name
