"""`--load-format tierewrite`: vLLM's plugin discovery and loaders give what they give for a rewritten checkpoint.

What needs vLLM is marked `vllm`, as tests/test_vllm_loader.py is, and runs in the venv that TIEREWRITE_VLLM_VENV names.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tierewrite
from tests.checkpoints import FIXTURES
from tests.defects import CONTROLS, DEFECTS, make_all
from tests.vllm_loader.behaviour import VENV_VARIABLE, python
from tests.vllm_loader.installed import ROOT, as_installed, entry_points
from tierewrite.consumers.vllm import plugin
from tierewrite.consumers.vllm.plugin_options import TESTED, checked_options, refuse_untested
from tierewrite.errors import TierewriteError, UsageError

ENTRY_POINT = "tierewrite.consumers.vllm.plugin:register"
FORCED = {"force": True, "on_mismatch": "keep"}
OTHERWISE = ("dg_nvfp4", "dg_nvfp4_sharded", "dg_fp8")
"""Fixtures of which vLLM alone loads other numbers than the rewrite holds."""
CASES = sorted(path.parent.name for path in FIXTURES.glob("*/naive"))
INTERPRETER = python()
REASON = f"{VENV_VARIABLE} names no venv of vLLM; tests/vllm_loader/setup.sh DIR makes one"


def same_python() -> bool:
    """Whether that venv can import this one's packages: tierewrite's own dependencies come from here."""
    assert INTERPRETER is not None
    asked = [str(INTERPRETER), "-c", "import sys; print(sys.version_info[:2])"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip() == str(sys.version_info[:2])


needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(INTERPRETER is None, reason=REASON),
    pytest.mark.skipif(INTERPRETER is not None and not same_python(), reason="that venv is of another Python"),
]


# Without vLLM


def test_the_package_declares_the_entry_point() -> None:
    assert f"[vllm.general_plugins]\ntierewrite = {ENTRY_POINT}\n" in entry_points()


def test_registering_without_vllm_raises_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert "--load-format tierewrite is not available" in caplog.text


def test_the_plugin_imports_nothing_of_vllm() -> None:
    code = (
        "import sys, tierewrite.consumers.vllm.plugin as p; print([m for m in ('vllm', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_options_are_those_of_a_rewrite_and_few_of_its_own() -> None:
    given = {"on_mismatch": "keep", "ties": "ties.json", "force": True, "threads": 2}
    assert checked_options(given) == {"loader": "off", "remember": True, **given}
    assert checked_options({"remember": False})["remember"] is False
    assert checked_options({"ties": {"alias": "canonical"}})["ties"] == {"alias": "canonical"}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"on_mismach": "keep"}, "has no 'on_mismach'"),
        ({"force": "yes"}, "'force' in --model-loader-extra-config is 'yes'; expected true or false"),
        ({"ties": 3}, "'ties' in --model-loader-extra-config is 3; expected a text or an object"),
        ({"threads": True}, "expected a number"),
        ({"inner_format": "runai_streamer"}, "expected one of safetensors, fastsafetensors, instanttensor"),
    ],
)
def test_a_wrong_option_is_refused(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        checked_options(extra)
    assert message in str(error.value)


def test_a_version_that_was_not_tested_is_refused_unless_one_says_so() -> None:
    for version in (*TESTED, f"{TESTED[0]}+cpu"):
        refuse_untested(version, False)
    for version in ("0.34.0", "0.33.1", "0.3.0", "1.0"):
        with pytest.raises(UsageError, match="any_version"):
            refuse_untested(version, False)
        refuse_untested(version, True)


# With vLLM


Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[dict[str, Any]]], Results]:
    """Loads folders in vLLM's environment, where the package is found as an installed one is: by its entry point."""
    work = tmp_path_factory.mktemp("plugin")
    environment = as_installed(work / "site")

    def load(jobs: list[dict[str, Any]]) -> Results:
        (work / "jobs.json").write_text(json.dumps([{**job, "folder": str(job["folder"])} for job in jobs]))
        script = ROOT / "tests" / "vllm_loader" / "with_format.py"
        done = subprocess.run(
            [str(INTERPRETER), str(script), str(work / "jobs.json"), str(work / "out.json")],
            capture_output=True, text=True, check=False, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        found: Results = json.loads((work / "out.json").read_text(encoding="utf-8"))
        return found

    return load


def by_plugin(name: str, folder: Path, **extra: Any) -> dict[str, Any]:
    return {"name": name, "folder": folder, "format": "tierewrite", "extra": extra or None}


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[str]:
    """Where ranks differ: names of parameters, or errors."""
    wrong: list[str] = []
    for one, other in zip(found, expected, strict=True):
        if "error" in one or "error" in other:
            # A checkpoint that vLLM cannot load does not become one that it can.
            ends = [side.get("error", "").split("\n")[0][:60] for side in (one, other)]
            wrong += [] if ends[0] == ends[1] else [str(ends)]
            continue
        assert one["loader"].endswith(".CanonicalModelLoader")
        assert other["loader"].endswith(".DefaultModelLoader")
        names = one["digests"].keys() | other["digests"].keys()
        wrong += sorted(name for name in names if one["digests"].get(name) != other["digests"].get(name))
        wrong += [] if one["unfilled"] == other["unfilled"] else ["unfilled"]
    return wrong


@pytest.fixture(scope="module")
def fixtures(load: Any, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Every fixture: naive through the plugin ("plugin"), rewritten through vLLM's own loader ("rewritten")."""
    out = tmp_path_factory.mktemp("rewritten")
    jobs: list[dict[str, Any]] = []
    for case in CASES:
        naive = FIXTURES / case / "naive"
        tierewrite.rewrite(naive, out / case, consumer="vllm", **FORCED)
        jobs += [
            by_plugin(f"{case} plugin", naive, **FORCED),
            {"name": f"{case} rewritten", "folder": out / case},
        ]
    return load([*jobs, *({"name": f"{case} naive", "folder": FIXTURES / case / "naive"} for case in OTHERWISE)])


class TestVllm:
    pytestmark = needs_vllm

    @pytest.mark.parametrize("case", CASES)
    def test_every_parameter_is_the_rewritten_checkpoints(self, case: str, fixtures: Results) -> None:
        assert same(fixtures[f"{case} plugin"], fixtures[f"{case} rewritten"]) == []

    def test_most_fixtures_load_and_many_load_otherwise_without_the_plugin(self, fixtures: Results) -> None:
        loaded = [case for case in CASES if "error" not in fixtures[f"{case} plugin"][0]]
        assert {"dg_nvfp4", "dg_nvfp4_sharded", "dg_fp8", "dg_bf16", "qwen3_tied_bf16", "mixtral_tied_bf16"} <= {
            *loaded
        }
        for case in OTHERWISE:
            naive, canonical = (fixtures[f"{case} {kind}"][0]["digests"] for kind in ("naive", "rewritten"))
            assert any(naive[name] != canonical[name] for name in naive)

    def test_two_ranks_load_their_parts_and_hash_once(self, load: Any, tmp_path: Path) -> None:
        jobs: list[dict[str, Any]] = []
        cases = ("dg_nvfp4_sharded", "qwen3_tied_bf16", "mixtral_tied_bf16")
        for case in cases:
            naive = FIXTURES / case / "naive"
            tierewrite.rewrite(naive, tmp_path / case, consumer="vllm", **FORCED)
            jobs += [
                {**by_plugin(f"{case} alone", naive, remember=False, **FORCED), "ranks": 2},
                {**by_plugin(f"{case} plugin", naive, ignore_unindexed=True, **FORCED), "ranks": 2},
                {"name": f"{case} rewritten", "folder": tmp_path / case, "ranks": 2},
            ]
        found = load(jobs)
        for case in cases:
            assert "error" not in found[f"{case} rewritten"][0]
            assert same(found[f"{case} plugin"], found[f"{case} rewritten"]) == []
            first, second = (rank["digests"] for rank in found[f"{case} plugin"])
            assert first != second
            alone = [rank["hashed"] for rank in found[f"{case} alone"]]
            assert alone[0] == alone[1] > 0
            # The module's cache may hold this source already, from a test before.
            assert sum(rank["hashed"] for rank in found[f"{case} plugin"]) in (0, alone[0])

    @pytest.mark.long
    def test_every_variant_is_refused_or_loads_as_its_rewrite(self, load: Any, tmp_path: Path) -> None:
        variants = [*DEFECTS, *CONTROLS]
        _, made = make_all(tmp_path, variants)
        jobs: list[dict[str, Any]] = []
        refused: dict[str, str] = {}
        for name, folder in made.items():
            try:
                tierewrite.prepare_for_vllm(folder, tmp_path / f"{name}-out")
            except TierewriteError as error:
                refused[name] = str(error)
            else:
                jobs.append({"name": f"{name} rewritten", "folder": tmp_path / f"{name}-out"})
            jobs.append(by_plugin(f"{name} plugin", folder))
        found = load(jobs)
        wrong: dict[str, Any] = {}
        for name in made:
            one = found[f"{name} plugin"]
            if name not in refused:
                differ = same(one, found[f"{name} rewritten"])
                wrong |= {name: differ} if differ else {}
            elif "error" not in one[0]:
                wrong[name] = "loaded"
        assert wrong == {}
        assert len(refused) > 40
        # What vLLM's own config does not refuse first is refused with the message of the rewrite.
        told = [n for n in refused if found[f"{n} plugin"][0]["error"].startswith(("NotReady", "Refused", "Source"))]
        assert len(told) > 30
        for name in told:
            first = refused[name].split("\n")[0].replace(str(made[name]), "")
            assert first in found[f"{name} plugin"][0]["error"].replace(str(made[name]), "")

    def test_options_and_other_readers(self, load: Any, tmp_path: Path) -> None:
        naive = FIXTURES / "dg_nvfp4" / "naive"
        diverged = FIXTURES / "qwen3_tied_but_diverged_bf16" / "naive"
        tierewrite.prepare_for_vllm(naive, tmp_path / "out", force=True)
        tierewrite.prepare_for_vllm(diverged, tmp_path / "kept", on_mismatch="keep", force=True)
        found = load(
            [
                {"name": "rewritten", "folder": tmp_path / "out"},
                by_plugin("inner", naive, force=True, inner_format="safetensors"),
                by_plugin("threads", naive, force=True, inner_format="safetensors", enable_multithread_load=True),
                by_plugin("diverged", diverged),
                by_plugin("kept", diverged, on_mismatch="keep", force=True),
                {"name": "kept rewritten", "folder": tmp_path / "kept"},
                by_plugin("misspelt", naive, on_mismach="keep"),
                by_plugin("no choice", naive, on_mismatch="kep"),
                {**by_plugin("version", naive, force=True), "version": "0.99.0"},
                {**by_plugin("any", naive, force=True, any_version=True), "version": "0.99.0"},
            ]
        )
        # Per-side tensors are decided by the order of the keys, which is the reader's.
        for name in ("inner", "threads"):
            assert [n for n in same(found[name], found["rewritten"]) if not n.endswith("layer_scalar")] == []
        assert "1 declared tie not confirmed" in found["diverged"][0]["error"]
        assert same(found["kept"], found["kept rewritten"]) == []
        assert "has no 'on_mismach'" in found["misspelt"][0]["error"]
        assert "on_mismatch is 'kep'" in found["no choice"][0]["error"]
        assert "was tested with vLLM" in found["version"][0]["error"]
        assert same(found["any"], found["rewritten"]) == []
