"""vLLM 0.33's real loader, on the CPU: the judge of what `check` says and of what a rewrite makes.

Needs the venv that tests/vllm_loader/setup.sh makes, named by TIEREWRITE_VLLM_VENV:

    tests/vllm_loader/setup.sh DIR && TIEREWRITE_VLLM_VENV=DIR pytest tests/test_vllm_loader.py -m vllm
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tierewrite
from tests.checkpoints import FIXTURES
from tests.defects import CONTROLS, DECODER, DEFECTS, ENCODER, Draft, make_all
from tests.vllm_loader.behaviour import RECORD, VENV_VARIABLE, facts, load, python
from tierewrite.consumers import check

INTERPRETER = python()
REASON = f"{VENV_VARIABLE} names no venv of vLLM; tests/vllm_loader/setup.sh DIR makes one"
pytestmark = [pytest.mark.vllm, pytest.mark.skipif(INTERPRETER is None, reason=REASON)]

SERVED = ["dg_nvfp4", "dg_nvfp4_experts_only", "dg_nvfp4_kvfp8", "dg_nvfp4_sharded"]
ORDERS = ["file", "reverse", "encoder-first", "decoder-first"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, dict[str, Any]]]:
    """Every served fixture, naive and rewritten, loaded in one key order; by case and "-naive" or "-rewritten"."""
    assert INTERPRETER is not None
    folder = tmp_path_factory.mktemp("served")
    paths: list[Path] = []
    for case in SERVED:
        tierewrite.rewrite(FIXTURES / case / "naive", folder / f"{case}-rewritten", kv_scales="merge")
        (folder / f"{case}-naive").symlink_to(FIXTURES / case / "naive")
        paths += [folder / f"{case}-naive", folder / f"{case}-rewritten"]
    done: dict[str, dict[str, dict[str, Any]]] = {}

    def by(order: str) -> dict[str, dict[str, Any]]:
        if order not in done:
            assert INTERPRETER is not None
            done[order] = load(INTERPRETER, paths, "--order", order)
        return done[order]

    return by


@pytest.fixture(scope="module")
def behaviours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the real loader does with every variant, recorded again."""
    assert INTERPRETER is not None
    variants = [*DEFECTS, *CONTROLS]
    goods, made = make_all(tmp_path_factory.mktemp("variants"), variants)
    found = load(INTERPRETER, [*goods.values(), *made.values()], "--process")
    return {v.name: facts(found[v.name], found[goods[v.base].name]) for v in variants}


@pytest.mark.parametrize("case", SERVED)
def test_naive_export_loads_with_conflicts(case: str, loaded: Callable[[str], dict[str, Any]]) -> None:
    out = loaded("file")[f"{case}-naive"]
    assert out["status"] == 0
    assert out["conflicts"]["different"] > 0
    scales = [c for c in out["conflicts"]["list"] if c["different"] and "input_scale" in c["param"]]
    assert scales
    # In one file the alias's names come last; over several shards the split decides.
    assert case == "dg_nvfp4_sharded" or all(c["winner"].startswith(ENCODER) for c in scales)


@pytest.mark.parametrize("case", SERVED)
def test_which_side_wins_depends_on_the_order_of_the_naive_keys(
    case: str, loaded: Callable[[str], dict[str, Any]]
) -> None:
    forwards, backwards = (loaded(order)[f"{case}-naive"]["digests"] for order in ("file", "reverse"))
    assert any(forwards[n] != backwards[n] for n in forwards if n.endswith("input_scale"))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", SERVED)
def test_rewritten_checkpoint_is_accepted_in_full(
    case: str, order: str, loaded: Callable[[str], dict[str, Any]]
) -> None:
    out = loaded(order)[f"{case}-rewritten"]
    assert out["status"] == 0
    assert (out["unexpected"], out["ignored"], out["unloaded_params"], out["partial_params"]) == ([], [], [], [])
    assert {c["param"].rpartition(".")[2] for c in out["conflicts"]["list"]} == {"layer_scalar"}


@pytest.mark.parametrize("order", ORDERS[1:])
@pytest.mark.parametrize("case", SERVED)
def test_rewritten_checkpoint_is_the_same_in_every_order_but_for_layer_scalar(
    case: str, order: str, loaded: Callable[[str], dict[str, Any]]
) -> None:
    first, other = (loaded(o)[f"{case}-rewritten"]["digests"] for o in ("file", order))
    assert first.keys() == other.keys()
    assert all(n.endswith("layer_scalar") for n in first if first[n] != other[n])


@pytest.mark.parametrize("case", SERVED)
def test_every_input_scale_that_vllm_holds_is_the_maximum_of_the_sides(
    case: str, loaded: Callable[[str], dict[str, Any]]
) -> None:
    naive = Draft.read(FIXTURES / case / "naive")
    names = set(naive.names())
    seen = 0
    for parameter, values in loaded("file")[f"{case}-rewritten"]["scales"].items():
        if not parameter.endswith("input_scale"):
            continue
        for value in values:
            sides = (value["key"], ENCODER + value["key"].removeprefix(DECODER))
            largest = max(struct.unpack("<f", naive[s].data)[0] for s in sides if s in names)
            assert value["value"] == largest
            seen += 1
    assert seen > 20


def test_real_loader_behaves_as_recorded(behaviours: dict[str, Any]) -> None:
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))["variants"]
    assert {n: b["outcome"] for n, b in behaviours.items()} == {n: b["outcome"] for n, b in recorded.items()}
    for name, behaviour in behaviours.items():
        for key in ("key", "keys", "unfilled", "ignored", "conflicts", "casts", "fails"):
            assert behaviour.get(key) == recorded[name].get(key), (name, key)


@pytest.mark.parametrize("case", SERVED)
def test_check_agrees_with_the_loader_on_the_rewritten_checkpoint(
    case: str, loaded: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    """Conflicts that the loader saw are the ones that `check` lists, tensor by tensor."""
    tierewrite.rewrite(FIXTURES / case / "naive", tmp_path / "out", kv_scales="merge")
    found = {n for f in check(tmp_path / "out", "vllm").errors for n in f.where}
    conflicts = loaded("file")[f"{case}-rewritten"]["conflicts"]["list"]
    assert found == {name for c in conflicts if c["different"] for name in (c["first"], c["winner"])}


def test_every_variant_that_a_rewrite_fixes_loads_clean_afterwards(tmp_path: Path) -> None:
    assert INTERPRETER is not None
    fixed = [d for d in DEFECTS if d.fixed]
    _, made = make_all(tmp_path, fixed)
    for defect in fixed:
        tierewrite.prepare_for_vllm(made[defect.name], tmp_path / f"{defect.name}-out", **defect.fix_options)
    found = load(INTERPRETER, [tmp_path / f"{d.name}-out" for d in fixed], "--process")
    for name, out in found.items():
        assert (out["status"], out["ignored"], out["conflicts"]["different"]) == (0, [], 0), name
        assert not [w for w in out["scale_notes"] if "not positive" in w or "w1 != w3" in w], name
