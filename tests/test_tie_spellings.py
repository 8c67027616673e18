"""One tie, spelled by module, by parameter, by packed tensor or by pattern: the same groups, whatever the format.

And what came of it when it was not so: a side that lost its weight and kept what belongs to it (an orphan).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tierewrite
from tests.checkpoints import Tensor, read_tensors, write_checkpoint
from tierewrite.errors import Refused
from tierewrite.formats import FAMILIES, Companion, Family, Role
from tierewrite.proof.orphans import orphans
from tierewrite.proof.verify import verify
from tierewrite.source.table import TensorEntry
from tierewrite.ties.on_disk import on_disk
from tierewrite.ties.patterns import parameters_of
from tierewrite.ties.tie_map import TieMap

BELOW_A_WEIGHT = [(f, row) for f in FAMILIES.values() for row in f.companions if row.role is not Role.PER_SIDE]
FUSED = [(f, row) for f in FAMILIES.values() for row in f.fused if row.role is not Role.PER_SIDE]
KV = [(f, row) for f in FAMILIES.values() for row in f.kv]


def name_of(pair: tuple[Family, Companion]) -> str:
    return f"{pair[0].name}-{pair[1].suffix}"


def main_of(family: Family) -> str:
    """The weight's name in the form that only this family has, if there is one."""
    return [row.suffix for row in family.companions if row.main][-1]


def spellings(parameter: str, module: str) -> dict[str, dict[str, str]]:
    return {
        "module": {f"b.{module}": f"a.{module}"},
        "parameter": {f"b.{parameter}": f"a.{parameter}"},
        "pattern": {r"b\.(.*)": r"a\.(.*)"},
    }


def groups_of(declared: dict[str, str], keys: list[str], tmp_path: Path) -> list[Any]:
    """What a ties file, config.json and a mapping make of the declaration: always the same."""
    file = tmp_path / "ties.json"
    file.write_text(json.dumps(declared))
    found = [
        TieMap.resolve(tmp_path, {}, keys=keys, ties=file),
        TieMap.resolve(tmp_path, {"_tied_weights_keys": declared}, keys=keys),
        TieMap.from_mapping(declared, keys),
    ]
    groups = [[(g.id, g.aliases, g.slots) for g in on_disk(ties, keys).groups] for ties in found]
    assert groups[0] == groups[1] == groups[2]
    return groups[0]


# ---------------------------------------------------------------------------------------------------- every suffix


@pytest.mark.parametrize("pair", BELOW_A_WEIGHT, ids=name_of)
def test_every_suffix_below_a_weight_speaks_of_the_weight_alone(pair: tuple[Family, Companion], tmp_path: Path) -> None:
    family, row = pair
    main = row.suffix if row.main else main_of(family)
    keys = [f"{side}.q_proj.{suffix}" for side in "ab" for suffix in dict.fromkeys((main, row.suffix))]
    assert set(parameters_of(keys)) == {"a.q_proj.weight", "b.q_proj.weight"}
    for declared in spellings("q_proj.weight", "q_proj").values():
        ((group, aliases, _),) = groups_of(declared, keys, tmp_path)
        assert (group, aliases) == ("a.q_proj.weight", ("b.q_proj.weight",))
    ((group, _, _),) = groups_of({f"b.q_proj.{main}": f"a.q_proj.{main}"}, keys, tmp_path)
    assert group == "a.q_proj.weight"


@pytest.mark.parametrize("pair", FUSED, ids=name_of)
def test_every_suffix_of_a_fused_parameter_speaks_of_it_alone(pair: tuple[Family, Companion], tmp_path: Path) -> None:
    family, row = pair
    main = row.suffix if row.main else next((r.suffix for r in family.fused if r.main), "{leaf}")
    suffixes = [suffix.format(leaf="gate_up_proj") for suffix in dict.fromkeys((main, row.suffix))]
    keys = [f"{side}.experts.{suffix}" for side in "ab" for suffix in suffixes]
    assert set(parameters_of(keys)) == {"a.experts.gate_up_proj", "b.experts.gate_up_proj"}
    for declared in spellings("experts.gate_up_proj", "experts").values():
        ((group, aliases, _),) = groups_of(declared, keys, tmp_path)
        assert (group, aliases) == ("a.experts.gate_up_proj", ("b.experts.gate_up_proj",))


@pytest.mark.parametrize("pair", KV, ids=name_of)
def test_a_range_of_the_kv_cache_is_no_parameter(pair: tuple[Family, Companion]) -> None:
    keys = ["a.self_attn.k_proj.weight", "a.self_attn.v_proj.weight", f"a.self_attn.{pair[1].suffix}"]
    assert set(parameters_of(keys)) == set(keys[:2])


@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if f.companions], ids=lambda family: family.name)
def test_all_that_a_family_writes_for_a_weight_is_one_group_however_it_is_tied(family: Family, tmp_path: Path) -> None:
    suffixes = [row.suffix for row in family.companions if not row.main and row.role is not Role.PER_SIDE]
    keys = [f"{side}.q_proj.{suffix}" for side in "ab" for suffix in (main_of(family), *suffixes)]
    groups = [groups_of(declared, keys, tmp_path) for declared in spellings("q_proj.weight", "q_proj").values()]
    assert groups[0] == groups[1] == groups[2]
    assert [group for group, _, _ in groups[0]] == ["a.q_proj.weight"]


def test_a_bias_stays_a_parameter_of_its_own_whatever_stands_beside_it() -> None:
    keys = ["q.weight", "q.weight_scale", "q.bias", "q.bias_scale", "q.bias_zero_point", "q.bias_zero_point_2"]
    assert set(parameters_of(keys)) == {"q.weight", "q.bias"}
    fused = ["e.up_proj_blocks", "e.up_proj_scales", "e.up_proj_bias"]
    assert set(parameters_of(fused)) == {"e.up_proj", "e.up_proj_bias"}


# ------------------------------------------------------------------------------ equal weights, one companion differs


def u8(size: int, seed: int) -> Tensor:
    return "U8", [size], bytes((seed + i) % 256 for i in range(size))


WEIGHT, SAME, MINE, OTHER = u8(64, 1), u8(16, 2), u8(16, 3), u8(16, 4)

# format -> (what each side holds and is the same, the companion that differs, module, parameter)
DIFFERING = {
    "mxfp4": (["experts.gate_up_proj_blocks"], "experts.gate_up_proj_scales", "experts", "experts.gate_up_proj"),
    "bitsandbytes": (
        ["q_proj.weight", "q_proj.weight.absmax"],
        "q_proj.weight.quant_state.bitsandbytes__nf4",
        "q_proj",
        "q_proj.weight",
    ),
    "svdquant": (
        ["q_proj.weight", "q_proj.weight_scale", "q_proj.svdquant_lora_b"],
        "q_proj.svdquant_lora_a",
        "q_proj",
        "q_proj.weight",
    ),
    "compressed-tensors": (
        ["q_proj.weight_packed", "q_proj.weight_scale"],
        "q_proj.weight_global_scale",
        "q_proj",
        "q_proj.weight",
    ),
    "gptq": (["q_proj.qweight", "q_proj.scales"], "q_proj.qzeros", "q_proj", "q_proj.weight"),
}


def source_of(case: str, tmp_path: Path) -> dict[str, Tensor]:
    same, differing, _, _ = DIFFERING[case]
    tensors: dict[str, Tensor] = {"norm.weight": ("BF16", [4], bytes(8))}
    for side, value in (("a", MINE), ("b", OTHER)):
        tensors[f"{side}.{same[0]}"] = WEIGHT
        tensors.update({f"{side}.{name}": SAME for name in same[1:]})
        tensors[f"{side}.{differing}"] = value
    write_checkpoint(tmp_path / "src", tensors, {})
    return tensors


@pytest.mark.parametrize("spelling", ["module", "parameter", "pattern"])
@pytest.mark.parametrize("case", DIFFERING)
def test_a_differing_companion_keeps_both_sides_whole_or_refuses(case: str, spelling: str, tmp_path: Path) -> None:
    tensors = source_of(case, tmp_path)
    ties = tmp_path / "ties.json"
    ties.write_text(json.dumps(spellings(DIFFERING[case][3], DIFFERING[case][2])[spelling]))
    with pytest.raises(Refused):
        tierewrite.rewrite(tmp_path / "src", tmp_path / "no", ties=ties)
    tierewrite.rewrite(tmp_path / "src", tmp_path / "dst", ties=ties, on_mismatch="keep")
    assert read_tensors(tmp_path / "dst") == tensors
    assert verify(tmp_path / "src", tmp_path / "dst", ties=ties, on_mismatch="keep").ok


@pytest.mark.parametrize("spelling", ["module", "pattern"])
@pytest.mark.parametrize("case", DIFFERING)
def test_a_state_dict_with_a_mapping_keeps_both_sides_whole(case: str, spelling: str, tmp_path: Path) -> None:
    state = {k: torch.frombuffer(bytearray(v[2]), dtype=torch.uint8) for k, v in source_of(case, tmp_path).items()}
    declared = spellings(DIFFERING[case][3], DIFFERING[case][2])[spelling]
    result, _ = tierewrite.dedupe_state_dict(state, declared, on_mismatch="keep")
    assert list(result) == list(state)


@pytest.mark.parametrize("case", DIFFERING)
def test_ties_in_config_json_by_module_keep_both_sides_whole(case: str, tmp_path: Path) -> None:
    tensors = source_of(case, tmp_path)
    module = DIFFERING[case][2]
    config = {"model_type": "x", "_tied_weights_keys": {f"b.{module}": f"a.{module}"}}
    (tmp_path / "src" / "config.json").write_text(json.dumps(config))
    tierewrite.rewrite(tmp_path / "src", tmp_path / "dst", on_mismatch="keep")
    assert read_tensors(tmp_path / "dst") == tensors


@pytest.mark.parametrize("spelling", ["module", "parameter", "pattern"])
@pytest.mark.parametrize("case", DIFFERING)
def test_verify_says_no_to_a_side_that_lost_its_weight(case: str, spelling: str, tmp_path: Path) -> None:
    tensors = source_of(case, tmp_path)
    same, differing, module, parameter = DIFFERING[case]
    damaged = {name: value for name, value in tensors.items() if name not in {f"b.{name}" for name in same}}
    assert f"b.{differing}" in damaged
    write_checkpoint(tmp_path / "dst", damaged, {})
    ties = tmp_path / "ties.json"
    ties.write_text(json.dumps(spellings(parameter, module)[spelling]))
    result = verify(tmp_path / "src", tmp_path / "dst", ties=ties, on_mismatch="keep")
    assert not result.ok
    found = {problem.id: problem.where for problem in result.problems}
    assert found.keys() == {"unconfirmed-drop", "orphan"}
    assert found["orphan"] == f"b.{differing}"


# ------------------------------------------------------------------------------------------ verify's own reading


def entries_of(dtypes: dict[str, tuple[str, int]]) -> dict[str, TensorEntry]:
    return {name: TensorEntry(name, dtype, (size,), 0, 0, size) for name, (dtype, size) in dtypes.items()}


@pytest.mark.parametrize("pair", [pair for pair in BELOW_A_WEIGHT if not pair[1].main], ids=name_of)
def test_every_companion_that_stays_without_its_weight_is_an_orphan(pair: tuple[Family, Companion]) -> None:
    family, row = pair
    if row.suffix.startswith("output_"):
        names = ["down_proj"]  # below k_proj and v_proj these are ranges of the KV cache
    else:
        names = ["k_proj", "down_proj"]
    for module in names:
        weight, companion = f"b.{module}.{main_of(family)}", f"b.{module}.{row.suffix}"
        source = entries_of({weight: ("U8", 64), companion: ("F32", 4), "b.norm.weight": ("BF16", 8)})
        assert list(orphans(source, {companion, "b.norm.weight"}, ())) == [(companion, weight)]
        assert list(orphans(source, {"b.norm.weight"}, ())) == []
        assert list(orphans(source, set(source), ())) == []


@pytest.mark.parametrize("pair", [pair for pair in FUSED if not pair[1].main], ids=name_of)
def test_every_companion_of_a_fused_parameter_can_be_an_orphan(pair: tuple[Family, Companion]) -> None:
    family, row = pair
    form = next((r.suffix for r in family.fused if r.main), "{leaf}")
    names = {
        leaf: (f"b.experts.{form.format(leaf=leaf)}", f"b.experts.{row.suffix.format(leaf=leaf)}")
        for leaf in ("gate_up_proj", "down_proj")
    }
    source = entries_of({name: ("U8", 64) for pair_ in names.values() for name in pair_})
    weight, companion = names["down_proj"]
    assert list(orphans(source, source.keys() - {weight}, ())) == [(companion, weight)]
    assert list(orphans(source, source.keys() - {weight, companion}, ())) == []


@pytest.mark.parametrize(
    "stays",
    [
        "q_proj.bias", "q_proj.bias_scale", "q_proj.bias_zero_point_2", "k_proj.k_scale", "k_proj.output_scale",
        "k_scale", "v_zero_point", "k_proj.k_bias", "q_global_scale", "kv_scale", "norm.weight",
    ],
)  # fmt: skip
def test_what_rightly_stays_on_its_side_is_no_orphan(stays: str) -> None:
    source = entries_of(
        {
            **{f"b.attn.{word}_proj.weight": ("F8_E4M3", 64) for word in "qkv"},
            f"b.attn.{stays}": ("F32", 4),
        }
    )
    assert list(orphans(source, {f"b.attn.{stays}"}, ())) == []


def test_a_parameter_of_the_model_is_no_orphan() -> None:
    source = entries_of({"b.q.weight": ("U8", 64), "b.q.input_max": ("F32", 4)})
    assert list(orphans(source, {"b.q.input_max"}, {"b.q.input_max"})) == []
    assert list(orphans(source, {"b.q.input_max"}, ())) == [("b.q.input_max", "b.q.weight")]


@pytest.mark.parametrize("stays", ["eps", "input_scale", "layer_scalar"])
@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3"])
def test_a_packed_bias_alone_takes_nothing_of_its_module_along(dtype: str, stays: str, tmp_path: Path) -> None:
    source = entries_of({"b.q.bias": (dtype, 64), f"b.q.{stays}": ("F32", 4), "b.q.weight": ("BF16", 64)})
    assert list(orphans(source, {f"b.q.{stays}", "b.q.weight"}, ())) == []
    leaves = {"bias": (dtype, b"\1" * 64), stays: ("F32", None), "weight": ("BF16", None)}
    rows = {
        f"{side}.q.{leaf}": (kind, (64,), data or side.encode() * 64 * {"F32": 4, "BF16": 2}[kind])
        for side in "ab"
        for leaf, (kind, data) in leaves.items()
    }
    write_checkpoint(tmp_path / "src", rows)
    ties = {"b.q.bias": "a.q.bias"}
    tierewrite.rewrite(tmp_path / "src", tmp_path / "out", ties=ties)
    verified = tierewrite.verify(tmp_path / "src", tmp_path / "out", ties=ties)
    assert verified.ok, verified.problems
    assert verified.dropped == 1


def test_an_orphan_of_a_format_that_nobody_knows_is_found() -> None:
    source = entries_of({"b.q.codes": ("I32", 64), "b.q.codes_table": ("U8", 32), "b.q.act_range": ("F32", 4)})
    assert dict(orphans(source, {"b.q.codes_table", "b.q.act_range"}, ())) == {
        "b.q.codes_table": "b.q.codes",
        "b.q.act_range": "b.q.codes",
    }


# ---------------------------------------------------------------------------------- a format that nobody knows

UNKNOWN = {"qdata": ("I32", [16], bytes(range(64))), "qmeta": ("F32", [2], b"12345678")}


def unknown_source(tmp_path: Path, differing: str | None, more: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {"norm.weight": ("BF16", [4], bytes(8))}
    for side in "ab":
        for leaf, value in {**UNKNOWN, **(more or {})}.items():
            changed = (*value[:2], bytes(reversed(value[2])))
            tensors[f"{side}.q_proj.{leaf}"] = changed if (side, leaf) == ("b", differing) else value
    write_checkpoint(tmp_path / "src", tensors, {})
    return tensors


@pytest.mark.parametrize(
    "declared",
    [
        {"b.q_proj.qdata": "a.q_proj.qdata"},
        {"b.q_proj.qmeta": "a.q_proj.qmeta"},
        {"b.q_proj": "a.q_proj"},
        {r"b\.(.*)": r"a\.(.*)"},
        {"b.q_proj.weight": "a.q_proj.weight"},
    ],
    ids=["packed", "companion", "module", "pattern", "parameter"],
)
@pytest.mark.parametrize("differing", [None, "qdata", "qmeta"])
@pytest.mark.parametrize("more", [{}, {"input_scale": ("F32", [], b"abcd")}], ids=["alone", "with-a-known-scale"])
def test_a_module_of_an_unknown_format_is_refused_however_it_is_named(
    declared: dict[str, str], differing: str | None, more: dict[str, Tensor], tmp_path: Path
) -> None:
    tensors = unknown_source(tmp_path, differing, more)
    ties = tmp_path / "ties.json"
    ties.write_text(json.dumps(declared))
    if "b.q_proj.weight" in declared and not more:
        return  # no tensor speaks of a `weight`: the ties file matches nothing
    with pytest.raises(Refused, match="no known format"):
        tierewrite.rewrite(tmp_path / "src", tmp_path / "no", ties=ties)
    tierewrite.rewrite(tmp_path / "src", tmp_path / "dst", ties=ties, on_mismatch="keep")
    assert read_tensors(tmp_path / "dst") == tensors
    assert verify(tmp_path / "src", tmp_path / "dst", ties=ties, on_mismatch="keep").ok


def test_parameters_of_a_plain_module_are_tied_one_by_one_as_before(tmp_path: Path) -> None:
    names = ("mod.weight", "mod.latents", "lstm.weight_ih_l0", "lstm.weight_hh_l0")
    tensors: dict[str, Tensor] = {f"{side}.{name}": ("BF16", [4], bytes(8)) for side in "ab" for name in names}
    write_checkpoint(tmp_path / "src", tensors, {})
    (tmp_path / "ties.json").write_text('{"b.mod": "a.mod", "b.lstm": "a.lstm"}')
    tierewrite.rewrite(tmp_path / "src", tmp_path / "dst", ties=tmp_path / "ties.json")
    assert set(read_tensors(tmp_path / "dst")) == {f"a.{name}" for name in names}


# ------------------------------------------------------------------------------------ a format added by the recipe

RECIPE = '''"""A throwaway format."""

from __future__ import annotations

from tierewrite.formats.family import Family, Signs, activation, main, weight

FAMILY = Family(
    name="throwaway",
    signs=Signs(methods=("throwaway",), endings=("codes_table",)),
    companions=(*main("codes"), *weight("codes_table"), *activation("max", "act_range")),
)
'''


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package to which the format is added as formats/README.md says."""
    root = tmp_path_factory.mktemp("package")
    shutil.copytree(Path(tierewrite.__file__).parent, root / "tierewrite", ignore=shutil.ignore_patterns("__pycache__"))
    formats = root / "tierewrite" / "formats"
    (formats / "throwaway.py").write_text(RECIPE)
    families = formats / "families.py"
    families.write_text(families.read_text().replace("MODULES = (\n", 'MODULES = (\n    "throwaway",\n'))
    return root


@pytest.mark.parametrize("differing", [None, "codes_table"])
@pytest.mark.parametrize("spelling", ["module", "parameter", "pattern", "packed"])
def test_a_format_added_by_the_recipe_works_in_every_spelling(
    package: Path, spelling: str, differing: str | None, tmp_path: Path
) -> None:
    tensors: dict[str, Tensor] = {"norm.weight": ("BF16", [4], bytes(8))}
    for side, amax in (("a", b"\0\0\x80\x3f"), ("b", b"\0\0\0\x40")):  # 1.0 and 2.0
        tensors[f"{side}.q_proj.codes"] = WEIGHT
        tensors[f"{side}.q_proj.codes_table"] = OTHER if side == "b" and differing else SAME
        tensors[f"{side}.q_proj.act_range"] = "F32", [], amax
    write_checkpoint(tmp_path / "src", tensors, {})
    declared = {"packed": {"b.q_proj.codes": "a.q_proj.codes"}, **spellings("q_proj.weight", "q_proj")}[spelling]
    (tmp_path / "ties.json").write_text(json.dumps(declared))
    command = "import sys; from tierewrite import cli; sys.exit(cli.run(sys.argv[1:]))"
    for arguments in (["rewrite", "src", "dst", "--on-mismatch", "keep", "--quiet"], ["verify", "src", "dst"]):
        more = ["--ties", "ties.json", *(["--on-mismatch", "keep"] if arguments[0] == "verify" else [])]
        done = subprocess.run(
            [sys.executable, "-c", command, *arguments, *more],
            cwd=tmp_path,
            env={"PYTHONPATH": str(package)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    expected = dict(tensors)
    if not differing:
        for leaf in ("codes", "codes_table", "act_range"):
            del expected[f"b.q_proj.{leaf}"]
        expected["a.q_proj.act_range"] = tensors["b.q_proj.act_range"]
    assert read_tensors(tmp_path / "dst") == expected
