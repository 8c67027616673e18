"""The families' tables: every suffix an exporter writes has one meaning, and everything else has none."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest

from tests.checkpoints import FIXTURES, read_shapes
from tierewrite.formats import FAMILIES, Adjacency, Role, classify, concerns, detect, kv_scale
from tierewrite.formats.detection import recognise, unknown_words
from tierewrite.formats.ignore_lists import EntryProblem, fixed, fixed_text, inconsistencies, sorted_modules
from tierewrite.source.table import CONFIG_NAME, QUANT_CONFIG_NAME

CHECKPOINTS = sorted({path.parent for path in FIXTURES.rglob("config.json") if list(path.parent.glob("*.safetensors"))})


def configs_of(folder: Path) -> tuple[dict, dict]:
    quant = folder / "hf_quant_config.json"
    return json.loads((folder / "config.json").read_text()), json.loads(quant.read_text()) if quant.exists() else {}


W, A, P, J, K = Role.WEIGHT, Role.ACTIVATION, Role.PER_SIDE, Role.ADJACENT, Role.KV

# What each exporter writes beside (or as) `weight`, and what it must be taken for.
WRITTEN = [
    ("ModelOpt NVFP4", {"weight": W, "weight_scale": W, "weight_scale_2": W, "input_scale": (A, "max")}),
    ("ModelOpt W4A16_NVFP4", {"weight": W, "weight_scale": W, "weight_scale_2": W}),
    (
        "ModelOpt W4A8_NVFP4_FP8",
        {"weight": W, "weight_scale": W, "weight_scale_2": W, "input_scale": (A, "max")},
    ),
    ("ModelOpt FP8", {"weight": W, "weight_scale": W, "input_scale": (A, "max")}),
    ("ModelOpt FP8 per channel, blocks, MXFP8, MXFP4, INT4", {"weight": W, "weight_scale": W}),
    ("ModelOpt AWQ", {"weight": W, "weight_scale": W, "pre_quant_scale": J, "input_scale": (A, "max")}),
    (
        "ModelOpt SVDQuant",
        {
            "pre_quant_scale": J,
            "weight_quantizer._svdquant_lora_a": W,
            "weight_quantizer._svdquant_lora_b": W,
            "svdquant_lora_a": W,
            "svdquant_lora_b": W,
        },
    ),
    ("ModelOpt KV cache", {"k_scale": (K, "max"), "v_scale": (K, "max"), "k_bias": K, "v_bias": K}),
    (
        "compressed-tensors nvfp4-pack-quantized",
        {
            "weight_packed": W,
            "weight_scale": W,
            "weight_global_scale": W,
            "weight_zero_point": W,
            "input_global_scale": (A, "min"),
        },
    ),
    ("compressed-tensors mxfp4-pack-quantized", {"weight_packed": W, "weight_scale": W}),
    (
        "compressed-tensors pack-quantized",
        {"weight_packed": W, "weight_scale": W, "weight_shape": W, "weight_zero_point": W, "weight_g_idx": W},
    ),
    (
        "compressed-tensors float-quantized, static",
        {"weight": W, "weight_scale": W, "input_scale": (A, "max")},
    ),
    (
        "compressed-tensors int-quantized, asymmetric",
        {
            "weight": W,
            "weight_scale": W,
            "input_scale": (A, "max"),
            "input_zero_point": W,
            "weight_zero_point": W,
        },
    ),
    ("DeepSeek FP8", {"weight": W, "weight_scale_inv": W, "activation_scale": (A, "max")}),
    ("FBGEMM FP8", {"weight": W, "weight_scale": W, "input_scale_ub": W}),
    ("GPTQ", {"qweight": W, "qzeros": W, "scales": W, "g_idx": W}),
    ("AutoAWQ", {"qweight": W, "qzeros": W, "scales": W}),
    (
        "bitsandbytes 4-bit",
        {
            "weight": W,
            "weight.absmax": W,
            "weight.quant_map": W,
            "weight.nested_absmax": W,
            "weight.nested_quant_map": W,
            "weight.quant_state.bitsandbytes__nf4": W,
            "weight.quant_state.bitsandbytes__fp4": W,
        },
    ),
    ("bitsandbytes 8-bit", {"weight": W, "SCB": W, "weight_format": W}),
    (
        "Quark",
        {
            "weight": W,
            "weight_scale": W,
            "weight_zero_point": W,
            "input_scale": (A, "max"),
            "output_scale": (A, "max"),
            "input_scale_2": (A, "max"),
            "bias_scale": P,
            "input_rotation": J,
        },
    ),
    ("AutoRound FP8", {"weight": W, "weight_scale": W, "weight_zp": W, "input_scale": (A, "max")}),
    ("AutoRound W4A8", {"qweight": W, "w_bf16_to_fp8_scale": W, "act_scales": (A, "max")}),
    (
        "torchao",
        {
            "_weight_qdata": W,
            "_weight_scale": W,
            "_weight_zero_point": W,
            "_weight_per_tensor_scale": W,
            "_weight_act_pre_scale": J,
            "_weight_act_quant_scale": (A, "max"),
            "_weight_act_per_tensor_scale": (A, "max"),
        },
    ),
    ("quanto", {"weight._data": W, "weight._data._data": W, "weight._scale": W, "weight._shift": W}),
    ("MLX", {"weight": W, "scales": W, "biases": W}),
    ("EXL3", {"trellis": W, "suh": W, "svh": W, "su": W, "sv": W, "mcg": W, "mul1": W}),
    ("plain", {"weight": W, "bias": P}),
]
FUSED = [
    ("gate_up_proj", "gate_up_proj", W, None),
    ("gate_up_proj", "gate_up_proj_bias", P, None),
    ("gate_up_proj", "gate_up_proj_weight_scale", W, None),  # ModelOpt, Llama 4 and gpt-oss
    ("gate_up_proj", "gate_up_proj_weight_scale_2", W, None),
    ("gate_up_proj", "gate_up_proj_input_scale", A, "max"),
    ("gate_up_proj", "gate_up_proj_scale", W, None),  # FBGEMM, Llama 4
    ("down_proj", "down_proj_scale_inv", W, None),  # transformers FP8
    ("down_proj", "down_proj_activation_scale", A, "max"),
    ("down_proj", "down_proj_blocks", W, None),  # gpt-oss MXFP4
    ("down_proj", "down_proj_scales", W, None),
    ("down_proj", "down_proj.absmax", W, None),  # bitsandbytes on a parameter
    ("down_proj", "down_proj.quant_state.bitsandbytes__nf4", W, None),
    ("gate_up_proj", "_gate_up_proj_qdata", W, None),  # torchao
    ("gate_up_proj", "_gate_up_proj_act_quant_scale", A, "max"),
    ("bias", "bias", W, None),  # a bias that the tie map names is a weight of its own
    ("scale", "scale", W, None),  # DiffusionGemma's router.scale
    ("per_expert_scale", "per_expert_scale", W, None),
    ("in_proj_weight", "in_proj_weight", W, None),
]


@pytest.mark.parametrize(
    ("suffix", "meaning"),
    [pytest.param(suffix, meaning, id=f"{name}: {suffix}") for name, row in WRITTEN for suffix, meaning in row.items()],
)
def test_suffix_has_its_role(suffix: str, meaning: Role | tuple[Role, str]) -> None:
    role, merge = meaning if isinstance(meaning, tuple) else (meaning, None)
    companion = classify("weight", suffix)
    assert companion is not None
    assert (companion.role, companion.merge) == (role, merge)
    assert companion.suffix == suffix or kv_scale(f"self_attn.{companion.suffix}") is not None


@pytest.mark.parametrize(("leaf", "suffix", "role", "merge"), FUSED)
def test_fused_parameter_owns_itself_and_what_its_name_begins(
    leaf: str, suffix: str, role: Role, merge: str | None
) -> None:
    companion = classify(leaf, suffix)
    assert companion is not None
    assert (companion.role, companion.merge, companion.suffix) == (role, merge, suffix)


@pytest.mark.parametrize(
    "suffix",
    [
        "weight_quantizer._amax",
        "input_quantizer._amax",
        "_amax",
        "weight_quantizer._scale",
        "weight_scale_3",
        "weightscale",
        "lora_A.default.weight",
        "",
        "Weight",
        "weight ",
        "B",
        "workspace",
        "weight_sf",
    ],
)
def test_suffix_that_no_family_knows_is_none(suffix: str) -> None:
    assert classify("weight", suffix) is None


def test_other_leaves_do_not_claim_their_neighbours() -> None:
    assert classify("bias", "weight_scale") is None
    assert classify("gate_up_proj", "down_proj") is None
    assert classify("scale", "per_expert_scale") is None
    assert not concerns("gate_up_proj", "down_proj_scales")
    assert not concerns("scale", "scaled")
    assert concerns("weight", "anything.at.all")


@pytest.mark.parametrize(
    ("suffix", "main"),
    [("weight", True), ("weight_packed", True), ("qweight", True), ("weight_scale", False), ("bias", False)],
)
def test_main_says_which_companion_is_the_weight_itself(suffix: str, main: bool) -> None:
    companion = classify("weight", suffix)
    assert companion is not None
    assert companion.main is main


def test_no_two_families_contradict_each_other_in_the_default_union() -> None:
    for one, other in combinations(FAMILIES.values(), 2):
        for table in ("companions", "fused", "kv"):
            mine = {row.suffix: row.meaning for row in getattr(one, table) if row.suffix not in one.own_only}
            theirs = {row.suffix: row.meaning for row in getattr(other, table) if row.suffix not in other.own_only}
            for suffix in mine.keys() & theirs.keys():
                assert mine[suffix] == theirs[suffix], (one.name, other.name, suffix)


def test_merging_rules_exist_exactly_where_values_may_differ() -> None:
    for family in FAMILIES.values():
        for row in (*family.companions, *family.fused, *family.kv):
            if row.role is Role.ACTIVATION:
                assert row.merge is not None, (family.name, row.suffix)
            elif row.role is not Role.KV:
                assert row.merge is None, (family.name, row.suffix)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_no_table_lists_a_suffix_twice(family) -> None:
    for rows in (family.companions, family.fused, family.kv):
        assert len({row.suffix for row in rows}) == len(rows)


def test_asking_detected_families_only_leaves_out_the_others() -> None:
    assert classify("weight", "qweight", ("modelopt",)) is None
    assert classify("weight", "weight_scale_2", ("modelopt",)) is not None
    assert classify("weight", "weight", ("gptq-awq",)) is not None  # plain is everywhere


@pytest.mark.parametrize(
    ("key", "parent", "rest", "merge"),
    [
        ("model.layers.0.self_attn.k_proj.k_scale", "model.layers.0.self_attn", "k_proj.k_scale", "max"),
        ("model.layers.0.self_attn.v_proj.v_scale", "model.layers.0.self_attn", "v_proj.v_scale", "max"),
        ("model.layers.0.self_attn.k_proj.k_bias", "model.layers.0.self_attn", "k_proj.k_bias", None),
        ("model.layers.0.self_attn.k_scale", "model.layers.0.self_attn", "k_scale", "max"),
        ("self_attn.k_global_scale", "self_attn", "k_global_scale", "min"),
        (
            "model.layers.0.self_attn.k_proj.output_scale",
            "model.layers.0.self_attn",
            "k_proj.output_scale",
            "max",
        ),
    ],
)
def test_kv_scale_splits_off_the_attention_module(key: str, parent: str, rest: str, merge: str | None) -> None:
    found = kv_scale(key)
    assert found is not None
    assert found[:2] == (parent, rest)
    assert (found[2].role, found[2].merge) == (Role.KV, merge)


@pytest.mark.parametrize(
    "key",
    ["k_scale", "a.k_proj.weight", "a.q_proj.output_scale", "a.k_proj.input_scale", "a.k_proj.k_scale.x", ""],
)
def test_kv_scale_is_none_for_anything_else(key: str) -> None:
    assert kv_scale(key) is None


@pytest.mark.parametrize(
    ("config", "quant_config", "keys", "families"),
    [
        ({}, {}, ["a.weight", "a.bias"], ("plain",)),
        ({"quantization_config": {"quant_method": "modelopt"}}, {}, ["a.weight_scale"], ("modelopt",)),
        ({}, {"producer": {"name": "modelopt"}}, ["a.weight_scale"], ("modelopt",)),
        (
            {"quantization_config": {"quant_method": "compressed-tensors"}},
            {},
            ["a.weight_scale"],
            ("compressed-tensors",),
        ),
        (
            {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
            {},
            ["a.activation_scale"],
            ("deepseek-fp8",),
        ),
        ({"quantization_config": {"quant_method": "AWQ"}}, {}, ["a.scales"], ("gptq-awq",)),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, {}, ["a.weight_format"], ("bitsandbytes",)),
        ({"quantization_config": {"quant_method": "quark"}}, {}, ["a.weight_scale"], ("quark",)),
        ({"quantization_config": {"quant_method": "mxfp4"}}, {}, ["a.per_expert_scales"], ("plain",)),
        (
            {"quantization_config": {"quant_method": "fbgemm_fp8"}},
            {},
            ["e.up_proj", "e.up_proj_scale"],
            ("fbgemm-fp8",),
        ),
        ({"quantization_config": {"quant_method": "auto-round"}}, {}, ["a.weight_scale"], ("auto-round",)),
        ({"quantization_config": {"quant_method": "auto-round"}}, {}, ["a.qweight"], ("gptq-awq", "auto-round")),
        ({}, {}, ["a.trellis"], ("exl3",)),
        ({}, {}, ["a.W_q"], ("hqq",)),
        ({}, {}, ["a.scale", "a.zero", "a.shape"], ("plain",)),
        ({}, {}, ["a.weight", "a.scales", "a.biases"], ("mlx",)),
        ({"quantization": {"mode": "mxfp4"}}, {}, ["a.weight", "a.scales"], ("mlx",)),
        ({"quantization_config": {"quant_method": "fbgemm_fp8"}}, {}, ["a.weight_scale"], ("fbgemm-fp8",)),
        ({}, {}, ["a.weight_scale_2"], ("modelopt",)),
        ({}, {}, ["a.weight_packed"], ("compressed-tensors",)),
        ({}, {}, ["a.weight_scale_inv"], ("deepseek-fp8",)),
        ({}, {}, ["a.qweight"], ("gptq-awq",)),
        ({}, {}, ["a.weight.absmax"], ("bitsandbytes",)),
        ({}, {}, ["experts.gate_up_proj_blocks"], ("mxfp4",)),
        ({}, {}, ["a._weight_qdata"], ("torchao",)),
        ({}, {}, ["experts._gate_up_proj_qdata"], ("torchao",)),
        ({}, {}, ["a.weight._data"], ("quanto",)),
        ({}, {}, ["a.weight_scale_2", "b.qweight"], ("modelopt", "gptq-awq")),
        ({"quantization_config": {"quant_method": "torchao"}}, {}, ["a.weight", "a.bias"], ("plain",)),
        ({"quantization_config": None}, {"producer": None}, [], ("plain",)),
        ({"quantization_config": ["x"], "text_config": 3}, {"quantization": []}, [], ("plain",)),
    ],
)
def test_detect(config: dict, quant_config: dict, keys: list[str], families: tuple[str, ...]) -> None:
    assert detect(config, quant_config, keys) == families


def test_recognise_says_by_what() -> None:
    config = {"quantization_config": {"quant_method": "TorchAO"}}
    (found,) = recognise(config, {}, ["a._weight_qdata", "a._weight_scale", "b._up_proj_qdata", "b.weight"])
    assert (found.family, found.keys, found.configs) == ("torchao", ("*_qdata",), ("quant_method TorchAO",))
    assert found.by == "tensors *_qdata; quant_method TorchAO"


def test_a_config_alone_shows_no_format() -> None:
    (found,) = recognise({"quantization_config": {"quant_method": "torchao"}}, {}, ["a.weight"])
    assert (found.family, found.keys) == ("torchao", ())
    (strange,) = recognise({"quantization_config": {"quant_method": "aqlm"}}, {}, ["a.codes"])
    assert (strange.family, strange.keys, strange.configs) == ("aqlm", (), ("quant_method aqlm",))


def test_packed_tensors_of_no_known_format_are_named() -> None:
    tensors = [("a.codes", "I16"), ("b.codes", "I16"), ("a.codebooks", "F16"), ("a.qweight", "I32"), ("a.scale", "U8")]
    assert unknown_words(tensors, ("plain",)) == {"codes": ("I16", 2), "scale": ("U8", 1)}
    assert unknown_words(tensors, ("hqq",)) == {"codes": ("I16", 2)}


EXPECTED_FAMILY = [
    ("llmcompressor", "compressed-tensors"),
    ("bnb", "bitsandbytes"),
    ("_bf16", "plain"),
    ("torchao", "torchao"),
    ("quark", "quark"),
    ("autoround", "auto-round"),
    ("dg_", "modelopt"),
]


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda path: path.relative_to(FIXTURES).as_posix())
def test_fixture_is_detected_and_every_suffix_in_it_is_known(folder: Path) -> None:
    keys = list(read_shapes(folder))
    families = detect(*configs_of(folder), keys)
    quantized = "quantization_config" in configs_of(folder)[0]
    assert not quantized or families != ("plain",)
    for mark, family in EXPECTED_FAMILY:
        if mark in folder.parent.name and (quantized or family == "plain") and not (quantized and family == "plain"):
            assert family in families
            break
    # Modules with a weight are what quantizers touch; parameters of other names stand for themselves.
    weights = ("weight", "weight_packed", "qweight", "weight_scale", "weight_quantizer._svdquant_lora_a")
    modules = {key.removesuffix(f".{mark}") for key in keys for mark in weights if key.endswith(f".{mark}")}
    checked = 0
    for key in keys:
        parts = key.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            if ".".join(parts[:cut]) in modules:
                suffix = ".".join(parts[cut:])
                if suffix not in ("per_expert_scale", "scale"):
                    assert classify("weight", suffix) is not None, key
                    assert classify("weight", suffix, families) is not None or kv_scale(key), key
                    checked += 1
                break
    assert checked


LAYER = "model.layers.3"
SMOOTHED = {"quantization_config": {"quant_algo": "NVFP4_AWQ", "quant_method": "modelopt"}}
LAYER_KEYS = [
    f"{LAYER}.input_layernorm.weight",
    f"{LAYER}.pre_feedforward_layernorm.weight",
    f"{LAYER}.self_attn.q_proj.weight",
    f"{LAYER}.self_attn.q_proj.weight_scale",
    f"{LAYER}.self_attn.v_proj.weight",
    f"{LAYER}.self_attn.v_proj.weight_scale",
    f"{LAYER}.self_attn.v_proj.input_scale",
    f"{LAYER}.self_attn.o_proj.weight",
    f"{LAYER}.self_attn.o_proj.weight_scale",
    f"{LAYER}.mlp.experts.7.up_proj.weight_packed",
    f"{LAYER}.mlp.experts.7.down_proj.weight_packed",
    f"{LAYER}.mlp.router.weight",
    "model.layers.4.input_layernorm.weight",
    "model.norm.weight",
]


def test_smoothed_linear_needs_the_norms_of_its_layer() -> None:
    norms = (f"{LAYER}.input_layernorm.weight", f"{LAYER}.pre_feedforward_layernorm.weight")
    adjacency = Adjacency(LAYER_KEYS, SMOOTHED, {})
    assert adjacency.of(f"{LAYER}.self_attn.q_proj") == norms
    assert adjacency.of(f"{LAYER}.mlp.experts.7.up_proj") == norms
    for other in ("lm_head", f"{LAYER}.input_layernorm", f"{LAYER}.mlp.router"):
        assert adjacency.of(other) == (), "only what is quantized was smoothed"


def test_smoothed_linear_needs_the_linear_that_its_scale_was_folded_into() -> None:
    adjacency = Adjacency(LAYER_KEYS, SMOOTHED, {})
    assert adjacency.of(f"{LAYER}.self_attn.o_proj")[2:] == (
        f"{LAYER}.self_attn.v_proj.weight",
        f"{LAYER}.self_attn.v_proj.weight_scale",
    )
    assert adjacency.of(f"{LAYER}.mlp.experts.7.down_proj")[2:] == (f"{LAYER}.mlp.experts.7.up_proj.weight_packed",)


@pytest.mark.parametrize(
    ("config", "quant_config", "extra", "smoothed"),
    [
        ({}, {}, [], False),
        ({"quantization_config": {"quant_algo": "NVFP4"}}, {}, [], False),
        (SMOOTHED, {}, [], True),
        ({}, {"quantization": {"quant_algo": "W4A16_AWQ"}}, [], True),
        ({}, {"quantization": {"quant_algo": "NVFP4_SVD"}}, [], True),
        ({}, {"quantization": {"quant_algo": "W8A8_SQ_PER_CHANNEL"}}, [], True),
        ({}, {"quantization": {"quantized_layers": {"a.b": {"quant_algo": "W4A8_AWQ"}}}}, [], True),
        ({"quantization_config": {"quant_method": "awq"}}, {}, [], True),
        ({}, {}, ["a.o_proj.pre_quant_scale"], True),
    ],
)
def test_smoothing_shows_in_the_config_or_in_its_own_tensors(
    config: dict, quant_config: dict, extra: list[str], smoothed: bool
) -> None:
    adjacency = Adjacency([*LAYER_KEYS, *extra], config, quant_config)
    assert adjacency.smoothed is smoothed
    assert bool(adjacency.of(f"{LAYER}.self_attn.q_proj")) is smoothed


PAIRS = [("enc.layers.1.q", "dec.layers.1.q"), ("enc.layers.1.router", "dec.layers.1.router")]
MODELOPT = {"quant_method": "modelopt"}
CT = {"quant_method": "compressed-tensors"}
BNB = {"quant_method": "bitsandbytes"}


def config_with(part: dict, key: str, *entries: object) -> dict:
    return {"model_type": "x", "quantization_config": {**part, key: list(entries), "z": 1}}


@pytest.mark.parametrize(
    ("part", "key", "entry", "covers"),
    [
        (MODELOPT, "ignore", "enc.layers.1.q", True),
        (MODELOPT, "ignore", "enc.layers.1*", True),
        (MODELOPT, "ignore", "enc", True),
        (MODELOPT, "ignore", "enc.layers.1.q.deeper", False),
        (MODELOPT, "ignore", "nc.layers.1.q", False),
        (MODELOPT, "ignore", "e[mn]c.layers", True),
        (MODELOPT, "ignore", "enc.layers.?.q", True),
        (MODELOPT, "ignore", "enc.layers[.1", False),
        (CT, "ignore", "enc.layers.1.q", True),
        (CT, "ignore", "enc.layers.1", False),
        (CT, "ignore", "enc.layers.1*", False),
        (CT, "ignore", r"re:enc.*\.q$", True),
        (CT, "ignore", r"re:.*\.k$", False),
        (CT, "ignore", "re:[", False),
        ({"quant_method": "quark"}, "exclude", "*.layers.1.q", True),
        ({"quant_method": "quark"}, "exclude", "enc.layers.1", False),
        (BNB, "llm_int8_skip_modules", "enc.layers.1", True),
        (BNB, "llm_int8_skip_modules", "enc.lay", False),
        (BNB, "modules_to_not_convert", "layers.1.q", True),
        (BNB, "modules_to_not_convert", "enc.layers.*", True),
    ],
)
def test_each_list_is_read_in_its_own_language(part: dict, key: str, entry: str, covers: bool) -> None:
    found = inconsistencies(config_with(part, key, entry), {}, PAIRS[:1], {"dec.layers.1.q"}, ())
    assert [f.entry for f in found] == ([entry] if covers else [])
    assert all(f.problem is EntryProblem.EXCLUDES_QUANTIZED for f in found)


def test_entry_that_names_an_alias_whose_canonical_is_quantized_is_removed() -> None:
    config = config_with(MODELOPT, "ignore", "lm_head", "enc.layers.1.q", "vision*")
    (finding,) = inconsistencies(config, {}, PAIRS[:1], {"dec.layers.1.q"}, {"lm_head", "vision.a"})
    assert finding.replacement == ()
    assert "'enc.layers.1.q'" in finding.message
    assert fixed(config, CONFIG_NAME, [finding]) == config_with(MODELOPT, "ignore", "lm_head", "vision*")


def test_wildcard_that_covers_more_keeps_what_is_not_quantized() -> None:
    config = config_with(MODELOPT, "ignore", "enc*", "enc.vision.b")
    plain = ["enc.vision.a", "enc.vision.b", "dec.layers.1.router"]
    findings = inconsistencies(config, {}, PAIRS[:1], {"dec.layers.1.q"}, plain)
    assert fixed(config, CONFIG_NAME, findings) == config_with(MODELOPT, "ignore", "enc.vision.a", "enc.vision.b")


def test_what_takes_an_entrys_place_has_an_order_of_its_own() -> None:
    config = config_with(MODELOPT, "ignore", "enc*")
    plain = {f"enc.vision.{letter}" for letter in "fbdace"}  # a set has another order in each process
    (finding,) = inconsistencies(config, {}, PAIRS[:1], {"dec.layers.1.q"}, plain)
    assert finding.replacement == tuple(f"enc.vision.{letter}" for letter in "abcdef")


def test_entry_that_names_an_alias_whose_canonical_is_plain_gains_the_canonical() -> None:
    quant_config = {"quantization": {"exclude_modules": ["enc.layers.1.router*", "lm_head"]}}
    (finding,) = inconsistencies({}, quant_config, PAIRS, {"dec.layers.1.q"}, {"dec.layers.1.router"})
    assert finding.problem is EntryProblem.MISSES_PLAIN
    assert finding.path == ("quantization", "exclude_modules")
    assert fixed(quant_config, QUANT_CONFIG_NAME, [finding]) == {
        "quantization": {"exclude_modules": ["enc.layers.1.router*", "dec.layers.1.router", "lm_head"]}
    }
    assert fixed({"a": 1}, CONFIG_NAME, [finding]) == {"a": 1}


def test_a_head_is_listed_without_the_embedding_that_it_is_tied_to() -> None:
    config = config_with(MODELOPT, "ignore", "lm_head")
    assert inconsistencies(config, {}, [("lm_head", "model.embed_tokens")], (), {"model.embed_tokens"}) == ()


def test_modules_are_sorted_by_what_stands_beside_their_weight() -> None:
    shapes = {"a.weight": (4, 2), "a.weight_scale": (4,), "b.weight": (4, 4), "c.weight": (4,), "d.qweight": (1, 4)}
    assert sorted_modules({**shapes, "b.bias": (4,), "e.k_scale": ()}.items()) == ({"a", "d"}, {"b"})


def test_lists_that_name_both_sides_are_consistent() -> None:
    config = config_with(MODELOPT, "ignore", "enc.layers.1.router*", "dec.layers.1.router*", "lm_head")
    assert inconsistencies(config, {}, PAIRS, {"dec.layers.1.q"}, {"dec.layers.1.router", "lm_head"}) == ()


def test_unconfirmed_tie_with_one_plain_side_is_reported_and_not_changed() -> None:
    config = config_with(MODELOPT, "ignore", "enc.layers.1.q")
    (finding,) = inconsistencies(config, {}, PAIRS[:1], {"dec.layers.1.q"}, {"enc.layers.1.q"})
    assert finding.problem is EntryProblem.SIDES_DIFFER
    assert finding.replacement is None
    assert fixed(config, CONFIG_NAME, [finding]) == config


@pytest.mark.parametrize("style", [{"indent": 2}, {"indent": 4}, {"indent": "\t"}, {}], ids=["2", "4", "tab", "none"])
@pytest.mark.parametrize("end", ["", "\n"], ids=["no newline", "newline"])
def test_fixed_text_keeps_the_files_style(style: dict, end: str) -> None:
    config = {
        "ü": "é",
        **config_with(MODELOPT, "ignore", "enc.layers.1.q", "lm_head"),
        "eps": 1e-06,
        "a": [1.0, None],
    }
    for escaped in (True, False):
        text = json.dumps(config, ensure_ascii=escaped, **style) + end
        findings = inconsistencies(config, {}, PAIRS[:1], {"dec.layers.1.q"}, ())
        config_after = fixed(config, CONFIG_NAME, findings)
        assert config_after != config
        assert fixed_text(text, CONFIG_NAME, findings) == json.dumps(config_after, ensure_ascii=escaped, **style) + end
        assert fixed_text(text, CONFIG_NAME, []) is text


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda path: path.relative_to(FIXTURES).as_posix())
def test_real_exporters_lists_name_both_sides(folder: Path) -> None:
    """What exporters write is consistent: they list modules of the live model, which has both sides."""
    config, quant_config = configs_of(folder)
    keys = list(read_shapes(folder))
    modules = {key.rpartition(".")[0] for key in keys}
    old, new = "model.encoder.language_model.", "model.decoder."
    pairs = [(m, new + m.removeprefix(old)) for m in modules if m.startswith(old)]
    pairs.append(("lm_head", new + "embed_tokens"))
    quantized, plain = sorted_modules((key, tuple(shape)) for key, shape in read_shapes(folder).items())
    if folder.parent.name == "dg_nvfp4_encoder_bf16":
        found = inconsistencies(config, quant_config, pairs, quantized, plain)
        assert found
        assert {f.problem for f in found} == {EntryProblem.SIDES_DIFFER}
    else:
        assert inconsistencies(config, quant_config, pairs, quantized, plain) == ()
