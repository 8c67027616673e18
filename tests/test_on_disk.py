"""Parameter <-> key: memory names, hub names, missing or added prefixes, unpacked experts, and mixtures of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import FIXTURES, read_shapes
from tierewrite.ties.on_disk import DiskTies, TieGroup, on_disk, places
from tierewrite.ties.renames import Renames
from tierewrite.ties.tie import Tie
from tierewrite.ties.tie_map import TieMap
from tierewrite.ties.translator import _expert_of

COMPANIONS = ("weight", "weight_scale", "weight_scale_2", "input_scale")


def config_of(case: str) -> dict[str, Any]:
    return dict(json.loads((FIXTURES / case / "naive" / "config.json").read_text()))


@cache
def ties_of(case: str) -> TieMap:
    return TieMap.resolve(Path("nowhere"), config_of(case))


def keys_of(case: str) -> list[str]:
    return list(read_shapes(FIXTURES / case / "naive"))


def group(disk: DiskTies, name: str) -> TieGroup:
    return next(g for g in disk.groups if g.id == name)


def declared(pairs: dict[str, str]) -> TieMap:
    return TieMap(tuple(Tie(a, c, "ties.json") for a, c in pairs.items()), "ties-file")


# --- names in memory, names of the hub


def test_names_in_memory_are_found_as_they_stand() -> None:
    disk = on_disk(ties_of("bart_bf16"), keys_of("bart_bf16"))
    (only,) = disk.groups
    assert only.canonical == "model.shared.weight"
    assert only.slots == ((only.canonical, *only.aliases),)
    assert set(only.aliases) == {
        "lm_head.weight",
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
    }
    assert len(only.origins) == 3
    assert disk.idle == ()


HUB = ["language_model.model.embed_tokens.weight", "language_model.lm_head.weight", "language_model.model.norm.weight"]
MEMORY = ["model.language_model.embed_tokens.weight", "lm_head.weight", "model.language_model.norm.weight"]


@pytest.mark.parametrize("canonical", [HUB[0], MEMORY[0], "model.language_model.model.embed_tokens.weight"])
@pytest.mark.parametrize("alias", [HUB[1], MEMORY[1]])
def test_hub_names_and_memory_names_may_be_mixed(canonical: str, alias: str) -> None:
    (found,) = on_disk(ties_of("llava_tied_bf16"), [canonical, alias]).groups
    assert found.canonical == "model.language_model.embed_tokens.weight"
    assert found.slots == ((canonical, alias),)


@pytest.mark.parametrize(("style", "canonical"), [(HUB, HUB[0]), (MEMORY, MEMORY[0])])
def test_an_absent_canonical_is_named_in_the_style_of_the_checkpoint(style: list[str], canonical: str) -> None:
    (found,) = on_disk(ties_of("llava_tied_bf16"), style[1:]).groups
    assert found.slots == ((canonical, style[1]),)


@pytest.mark.parametrize("style", [HUB, MEMORY])
def test_an_absent_alias_leaves_a_group_with_nothing_to_drop(style: list[str]) -> None:
    (found,) = on_disk(ties_of("llava_tied_bf16"), [style[0], style[2]]).groups
    assert found.slots[0][0] == style[0]
    assert found.slots[0][1] not in (style[0], style[2])
    assert found.slots[0][1].endswith("lm_head.weight")


def test_a_missing_base_model_prefix_is_followed() -> None:
    keys = [key.removeprefix("model.") for key in keys_of("bart_bf16")]
    (found,) = on_disk(ties_of("bart_bf16"), keys).groups
    assert found.slots[0][0] == "shared.weight"
    assert set(found.slots[0][1:]) == {"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    without = [key for key in keys if key != "shared.weight"]
    (found,) = on_disk(ties_of("bart_bf16"), without).groups
    assert found.slots[0][0] == "shared.weight"


def test_an_added_base_model_prefix_is_followed() -> None:
    config = {k: v for k, v in config_of("bart_bf16").items() if k != "architectures"}
    ties = TieMap.resolve(Path("nowhere"), config)
    keys = [key for key in keys_of("bart_bf16") if key.startswith("model.")]
    (found,) = on_disk(ties, keys).groups
    assert found.canonical == "shared.weight"
    assert found.slots[0][0] == "model.shared.weight"
    (found,) = on_disk(ties, [key for key in keys if key != "model.shared.weight"]).groups
    assert found.slots[0][0] == "model.shared.weight"


def test_a_tie_of_which_nothing_is_on_disk_is_idle() -> None:
    disk = on_disk(ties_of("qwen3_tied_bf16"), ["model.norm.weight"])
    assert disk.groups == ()
    assert disk.idle == ("model.embed_tokens.weight",)


def test_legacy_names_are_found_as_transformers_finds_them() -> None:
    from transformers import BertConfig

    config = BertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16).to_dict()
    ties = TieMap.resolve(Path("nowhere"), {**config, "architectures": ["BertForMaskedLM"]})
    keys = [
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.LayerNorm.gamma",
        "cls.predictions.decoder.weight",
        "cls.predictions.decoder.bias",
        "cls.predictions.bias",
    ]
    disk = on_disk(ties, keys)
    assert {g.slots for g in disk.groups} == {
        (("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),),
        (("cls.predictions.bias", "cls.predictions.decoder.bias"),),
    }
    assert all(key in disk.owned for key in keys)


# --- quantized modules


@pytest.mark.parametrize(
    "leaves",
    [
        COMPANIONS,
        ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
        ("qweight", "qzeros", "scales", "g_idx"),
        ("weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"),
        ("weight", "weight_scale", "weight_quantizer._svdquant_lora_a", "pre_quant_scale"),
        ("weight_quantizer._svdquant_lora_a",),
        ("weight.quant_state.bitsandbytes__nf4",),
    ],
    ids=str,
)
def test_a_slot_is_named_as_if_the_module_were_not_quantized(leaves: Iterable[str]) -> None:
    sides = ("model.decoder", "model.encoder.language_model")
    keys = [f"{side}.layers.0.mlp.down_proj.{leaf}" for side in sides for leaf in leaves]
    disk = on_disk(ties_of("dg_bf16"), keys)
    (found,) = disk.groups
    assert found.slots == (tuple(f"{side}.layers.0.mlp.down_proj.weight" for side in sides),)
    assert all((key in disk.owned) == key.endswith("proj.weight") for key in keys)


def test_a_bias_alone_is_no_sign_of_its_neighbours_weight() -> None:
    disk = on_disk(ties_of("qwen3_tied_bf16"), ["lm_head.bias", "model.norm.weight"])
    assert disk.groups == ()


def test_what_the_map_does_not_name_belongs_to_no_group() -> None:
    disk = on_disk(ties_of("dg_nvfp4"), keys_of("dg_nvfp4"))
    named = {name for g in disk.groups for slot in g.slots for name in slot}
    assert not any("layer_scalar" in name or "vision_tower" in name or "_scale_2" in name for name in named)
    assert "model.decoder.layers.0.layer_scalar" in disk.owned
    assert "model.decoder.layers.0.mlp.down_proj.input_scale" not in disk.owned


def test_parameters_called_scale_are_tied_parameters_and_no_companions() -> None:
    disk = on_disk(ties_of("dg_bf16"), keys_of("dg_bf16"))
    for leaf in ("scale", "per_expert_scale", "proj.weight"):
        name = f"layers.1.router.{leaf}"
        assert group(disk, f"model.decoder.{name}").slots == (
            (f"model.decoder.{name}", f"model.encoder.language_model.{name}"),
        )
        assert f"model.decoder.{name}" in disk.owned


# --- experts

SIDES = ("model.decoder.layers.0.experts", "model.encoder.language_model.layers.0.experts")


def test_fused_experts_are_one_slot() -> None:
    disk = on_disk(ties_of("dg_bf16"), keys_of("dg_bf16"))
    for leaf in ("gate_up_proj", "down_proj"):
        assert group(disk, f"{SIDES[0]}.{leaf}").slots == (tuple(f"{side}.{leaf}" for side in SIDES),)


def test_unpacked_experts_are_one_group_with_a_slot_for_every_expert_and_projection() -> None:
    disk = on_disk(ties_of("dg_nvfp4"), keys_of("dg_nvfp4"))
    gate_up = group(disk, f"{SIDES[0]}.gate_up_proj")
    assert gate_up.slots == tuple(
        tuple(f"{side}.{e}.{p}_proj.weight" for side in SIDES) for e in range(4) for p in ("gate", "up")
    )
    down = group(disk, f"{SIDES[0]}.down_proj")
    assert down.slots == tuple(tuple(f"{side}.{e}.down_proj.weight" for side in SIDES) for e in range(4))


def test_an_expert_that_one_side_lacks_is_still_a_slot() -> None:
    gone = f"{SIDES[0]}.2.down_proj."
    keys = [key for key in keys_of("dg_nvfp4") if not key.startswith(gone)]
    down = group(on_disk(ties_of("dg_nvfp4"), keys), f"{SIDES[0]}.down_proj")
    assert down.slots[2] == tuple(f"{side}.2.down_proj.weight" for side in SIDES)


def test_a_fused_side_and_an_unpacked_side_are_a_problem_and_not_a_guess() -> None:
    keys = [f"{SIDES[0]}.down_proj", *(f"{SIDES[1]}.{e}.down_proj.weight" for e in range(4))]
    down = group(on_disk(ties_of("dg_bf16"), keys), f"{SIDES[0]}.down_proj")
    assert down.problem is not None
    assert "cannot be compared" in down.problem


def test_only_the_projections_that_are_tied_are_touched() -> None:
    a, b = "enc.experts", "dec.experts"
    keys = [
        f"{c}.{e}.{p}_proj.{leaf}"
        for c in (a, b)
        for e in range(3)
        for p in ("gate", "up", "down")
        for leaf in COMPANIONS
    ]
    disk = on_disk(declared({f"{a}.down_proj": f"{b}.down_proj"}), keys)
    (found,) = disk.groups
    assert found.slots == tuple((f"{b}.{e}.down_proj.weight", f"{a}.{e}.down_proj.weight") for e in range(3))


def test_projections_may_be_tied_to_different_containers() -> None:
    keys = [f"{c}.{e}.{p}_proj.weight" for c in ("a.x", "b.x", "c.x") for e in range(2) for p in ("gate", "up", "down")]
    disk = on_disk(declared({"a.x.gate_up_proj": "b.x.gate_up_proj", "a.x.down_proj": "c.x.down_proj"}), keys)
    assert group(disk, "c.x.down_proj").slots == tuple(
        (f"c.x.{e}.down_proj.weight", f"a.x.{e}.down_proj.weight") for e in (0, 1)
    )
    assert len(group(disk, "b.x.gate_up_proj").slots) == 4


def test_non_gated_experts_have_a_single_up_projection() -> None:
    keys = [f"{c}.{e}.{p}_proj.weight" for c in ("a.x", "b.x") for e in range(2) for p in ("up", "down")]
    disk = on_disk(declared({"a.x.up_proj": "b.x.up_proj"}), keys)
    assert disk.groups[0].slots == tuple((f"b.x.{e}.up_proj.weight", f"a.x.{e}.up_proj.weight") for e in (0, 1))


def test_unpacked_expert_biases_follow_their_fused_bias() -> None:
    keys = [
        f"{c}.{e}.{p}_proj.{leaf}"
        for c in ("a.x", "b.x")
        for e in (0, 1)
        for p in ("gate", "up")
        for leaf in ("weight", "bias")
    ]
    disk = on_disk(declared({"a.x.gate_up_proj_bias": "b.x.gate_up_proj_bias"}), keys)
    assert disk.groups[0].slots == tuple(
        (f"b.x.{e}.{p}_proj.bias", f"a.x.{e}.{p}_proj.bias") for e in (0, 1) for p in ("gate", "up")
    )


def tied_mixtral() -> TieMap:
    """Mixtral whose second layer's experts are the first's: no class ties them; the map is ours, the names its own."""
    asked = ties_of("mixtral_tied_bf16")
    assert asked.model is not None
    more = [
        Tie(f"model.layers.1.mlp.experts.{leaf}", f"model.layers.0.mlp.experts.{leaf}", "test")
        for leaf in ("gate_up_proj", "down_proj")
    ]
    return TieMap((*asked.ties, *more), "class", model=asked.model)


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("block_sparse_moe.experts", {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}),
        ("mlp.experts", {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}),
        ("mlp.experts", {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}),
    ],
)
@pytest.mark.parametrize("leaves", [("weight",), COMPANIONS, ("weight_packed", "weight_scale")])
@pytest.mark.parametrize("present", [(0, 1), (1,)])
def test_the_hubs_own_expert_names_are_translated(
    path: str, names: dict[str, tuple[str, ...]], leaves: tuple[str, ...], present: tuple[int, ...]
) -> None:
    keys = [
        f"model.layers.{layer}.{path}.{e}.{p}.{leaf}"
        for layer in present
        for e in range(4)
        for projections in names.values()
        for p in projections
        for leaf in leaves
    ]
    random.Random(0).shuffle(keys)
    disk = on_disk(tied_mixtral(), keys)
    for fused, projections in names.items():
        found = group(disk, f"model.layers.0.mlp.experts.{fused}")
        assert found.problem is None
        assert found.slots == tuple(
            tuple(f"model.layers.{layer}.{path}.{e}.{p}.weight" for layer in (0, 1))
            for e in range(4)
            for p in projections
        )


def test_fused_experts_under_memory_names_are_found_in_a_model_whose_hub_unpacks_them() -> None:
    keys = [f"model.layers.{layer}.mlp.experts.{leaf}" for layer in (0, 1) for leaf in ("gate_up_proj", "down_proj")]
    disk = on_disk(tied_mixtral(), keys)
    assert [g.slots for g in disk.groups] == [((keys[0], keys[2]),), ((keys[1], keys[3]),)]


def test_a_pattern_with_several_wildcards_counts_experts_and_not_layers() -> None:
    from transformers.core_model_loading import MergeModulelist, WeightConverter

    from tierewrite.ties.tie import ModelNames

    transform = WeightConverter("layers.*.experts.*.w2.weight", "layers.*.experts.down_proj", [MergeModulelist(dim=0)])
    assert [_expert_of(p, "enc.layers.7.experts.3.w2.weight") for p in transform.source_patterns] == [3]
    assert _expert_of(r"\.experts.*.w2.weight", "enc.layers.7.experts.12.w2.weight") == 12
    plain = WeightConverter(".experts.*.w2.weight", ".experts.down_proj", [MergeModulelist(dim=0)])
    model = ModelNames(
        "Any", "", {"a.experts.down_proj": (2,), "b.experts.down_proj": (2,)}, Renames.of((plain,), (plain,))
    )
    ties = TieMap((Tie("a.experts.down_proj", "b.experts.down_proj", "test"),), "class", model=model)
    keys = [f"{side}.experts.{e}.w2.weight" for side in "ab" for e in range(12)]
    assert on_disk(ties, keys).groups[0].slots == tuple((keys[12 + e], keys[e]) for e in range(12))


# --- one tensor on disk that is several parameters


def test_a_tensor_that_also_holds_an_untied_parameter_is_a_problem() -> None:
    from transformers.core_model_loading import Chunk, WeightConverter

    from tierewrite.ties.tie import ModelNames

    transform = WeightConverter("attn.qkv.weight", ["attn.q.weight", "attn.k.weight", "attn.v.weight"], [Chunk(dim=0)])
    shapes = {f"{side}.attn.{p}.weight": (4, 4) for side in ("a", "b") for p in "qkv"}
    model = ModelNames("Any", "", shapes, Renames.of((transform,), (transform,)))
    keys = ["a.attn.qkv.weight", "b.attn.qkv.weight"]

    def tied(parts: str) -> TieMap:
        return TieMap(
            tuple(Tie(f"a.attn.{p}.weight", f"b.attn.{p}.weight", "test") for p in parts), "class", model=model
        )

    every = on_disk(tied("qkv"), keys)
    assert [(g.slots, g.problem) for g in every.groups] == [((("b.attn.qkv.weight", "a.attn.qkv.weight"),), None)]
    assert every.idle == ()
    some = on_disk(tied("qk"), keys)
    assert some.groups[0].problem is not None
    assert "a.attn.v.weight" in some.groups[0].problem


# --- without a class


def test_without_a_class_no_key_is_owned() -> None:
    disk = on_disk(declared({"a.weight": "b.weight"}), ["a.weight", "b.weight"])
    assert "a.weight" not in disk.owned
    assert disk.groups[0].slots == (("b.weight", "a.weight"),)


def test_no_ties_no_groups() -> None:
    assert on_disk(TieMap((), "class"), ["a.weight"]).groups == ()


def test_places_tells_where_a_name_is_loaded() -> None:
    model = ties_of("mixtral_tied_bf16").model
    assert model is not None
    names = ["model.layers.0.block_sparse_moe.experts.3.w2.weight", "lm_head.weight", "nowhere.weight"]
    found = places(model, names)
    assert found["lm_head.weight"][0] == "lm_head.weight"
    assert found[names[0]][0] == "model.layers.0.mlp.experts.down_proj"
    assert "nowhere.weight" not in found


@pytest.mark.parametrize("case", ["dg_nvfp4", "llava_tied_bf16", "mixtral_tied_bf16", "bart_bf16"])
def test_the_order_of_keys_changes_nothing(case: str) -> None:
    keys = keys_of(case)
    first = on_disk(ties_of(case), keys)
    random.Random(1).shuffle(keys)
    again = on_disk(ties_of(case), keys)
    assert first.groups == again.groups
    assert set(first.owned) == set(again.owned)  # type: ignore[call-overload]
