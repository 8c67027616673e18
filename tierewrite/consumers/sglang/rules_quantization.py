"""What SGLang demands of quantized checkpoints: a config that it takes, a list that fits, and all the scales."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tierewrite import formats
from tierewrite.consumers import modelopt
from tierewrite.consumers.findings import Finding
from tierewrite.consumers.modelopt import CONFIG, HF_QUANT, LAYOUTS
from tierewrite.consumers.rules import Rule, RuleSet
from tierewrite.consumers.sglang.subject import SglangSubject
from tierewrite.errors import shown
from tierewrite.formats.experts import split_expert

RULES: RuleSet[SglangSubject] = RuleSet()
MODELOPT = "layers/quantization/modelopt_quant.py"

QUANTIZED_UNSUPPORTED = Rule(
    id="quantized-unsupported",
    title="the checkpoint is quantized, and the class takes no quantization",
    when="a config says so",
    severity="error",
    consequence="SGLang refuses to load",
    fix="serve the unquantized model, or use another server",
    source="models/gemma4_diffusion.py DiffusionGemmaForBlockDiffusion.__init__",
)
UNSUPPORTED_UNSAID = replace(
    QUANTIZED_UNSUPPORTED,
    when="no config says so",
    consequence="SGLang builds plain layers, and refuses to load as soon as a config says so",
)


@RULES.add(QUANTIZED_UNSUPPORTED, UNSUPPORTED_UNSAID)
def unsupported(s: SglangSubject) -> Iterator[Finding]:
    """models/gemma4_diffusion.py: NotImplementedError with any quantization config."""
    if s.known.quantized is not False:
        return
    found = f"{s.architecture} takes no quantization config in SGLang"
    if s.declared is not None or isinstance(s.config.get("quantization_config"), dict):
        yield QUANTIZED_UNSUPPORTED.at((CONFIG,), found)
    elif s.count_quantized:
        yield UNSUPPORTED_UNSAID.at((CONFIG,), found)


QUANT_CONFIG_MISSING = Rule(
    id="quant-config-missing",
    title="modules are quantized, and no config says so",
    severity="error",
    consequence="SGLang builds plain layers: the load aborts, or packed bytes are taken for numbers",
    fix="restore hf_quant_config.json or quantization_config from the export, or export in a format that has one",
    source="model_loader/weight_utils.py get_quant_config",
)


@RULES.add(QUANT_CONFIG_MISSING)
def no_config(s: SglangSubject) -> Iterator[Finding]:
    """weight_utils.py `get_quant_config`: config.json, else hf_quant_config.json."""
    if s.count_quantized and s.declared is None and not isinstance(s.config.get("quantization_config"), dict):
        yield QUANT_CONFIG_MISSING.at(
            ("config.json: quantization_config",), f"{s.count_quantized} modules are quantized, and no config says so"
        )


QUANT_CONFIG_INVALID = Rule(
    id="quant-config-invalid",
    title="SGLang does not accept the quantization config",
    when="an entry is missing, or is none that SGLang takes",
    severity="error",
    consequence="SGLang refuses to load",
    fix="restore the config from the export",
    source=f"{MODELOPT} ModelOptFp4Config.from_config",
)
QUANT_METHOD_UNKNOWN = replace(
    QUANT_CONFIG_INVALID,
    when="the method is none of SGLang's own",
    fix="export in a format that SGLang reads, or serve it with another engine",
    source="configs/model_config.py ModelConfig._verify_quantization",
)
METHODS = frozenset({
    "auto-round", "auto-round-int8", "awq", "awq_marlin", "bitsandbytes", "blockwise_int8", "compressed-tensors", "fp8",
    "gguf", "gptq", "gptq_marlin", "humming", "minimax_m3_nvfp4", "mlx_q4", "mlx_q8", "modelslim", "moe_wna16", "mxfp4",
    "mxfp8", "mxfp_w4a8", "nvfp4_online", "petit_nvfp4", "quark", "quark_int4fp8_moe", "quark_mxfp4", "w4afp8",
    "w8a8_fp8", "w8a8_int8",
})  # fmt: skip
"""quantization/__init__.py `QUANTIZATION_METHODS` of any platform, and what its overrides take, but for
ModelOpt's.
"""
QUANT_ALGO_UNCHECKED = (
    "its quantization is not ModelOpt's; scales, dtypes and lists of excluded modules were not checked"
)


@RULES.add(QUANT_CONFIG_INVALID, QUANT_METHOD_UNKNOWN)
def invalid_config(s: SglangSubject) -> Iterator[Finding]:
    """modelopt_quant.py `ModelOptFp4Config.from_config`: the algorithms that it lists, and no others."""
    declared = s.declared
    if declared is None:
        yield from _not_modelopt(s)
        return
    where = (f"{declared.where}.quant_algo",)
    if not declared.algo:
        yield QUANT_CONFIG_INVALID.at(where, "quant_algo is missing")
    elif "NVFP" in declared.algo and declared.algo not in LAYOUTS:
        yield QUANT_CONFIG_INVALID.at(where, f"quant_algo is {declared.algo}; known are {', '.join(LAYOUTS)}")
    elif declared.algo not in LAYOUTS:
        s.notes.append(f"quant_algo {declared.algo} was not checked: scales, dtypes and excluded modules")


def _not_modelopt(s: SglangSubject) -> Iterator[Finding]:
    """configs/model_config.py `_verify_quantization`: the methods of its table, by name."""
    config = s.config.get("quantization_config")
    if config is None:
        return
    method = config.get("quant_method", "") if isinstance(config, dict) else None
    if not isinstance(method, str):
        what = "quant_method is no name" if isinstance(config, dict) else "quantization_config is no object"
        yield QUANT_CONFIG_INVALID.at((CONFIG,), what)
    elif method.lower() not in METHODS and not method.lower().startswith("modelopt"):
        found = f"SGLang 0.5.23 has no method '{shown(method)}'" if method else "quant_method is missing"
        yield QUANT_METHOD_UNKNOWN.at((f"{CONFIG}.quant_method",), found)
    else:
        s.notes.append(QUANT_ALGO_UNCHECKED)


QUANT_CONFIG_DISAGREES = Rule(
    id="quant-config-disagrees",
    title="hf_quant_config.json and config.json differ",
    severity="warning",
    consequence="SGLang uses config.json; other readers may use the other",
    fix="make them equal, or remove hf_quant_config.json",
    source="model_loader/weight_utils.py get_quant_config",
)


@RULES.add(QUANT_CONFIG_DISAGREES)
def two_configs(s: SglangSubject) -> Iterator[Finding]:
    """weight_utils.py `get_quant_config`: hf_quant_config.json is opened where config.json says nothing."""
    inside, beside = modelopt.declared(s)
    if inside is not None and beside is not None:
        differ = [what for what in ("algo", "exclude") if _set(getattr(inside, what)) != _set(getattr(beside, what))]
        if differ:
            yield QUANT_CONFIG_DISAGREES.at((CONFIG, HF_QUANT), f"they differ in {' and '.join(differ)}")


def _set(value: str | tuple[str, ...]) -> str | frozenset[str]:
    return value if isinstance(value, str) else frozenset(value)


IGNORED_BUT_QUANTIZED = Rule(
    id="ignored-but-quantized",
    title="the list of excluded modules names modules that are quantized on disk",
    severity="error",
    consequence="SGLang builds them unquantized: packed bytes are taken for numbers, or the load aborts",
    fix="take the entries out",
    source=f"{MODELOPT} ModelOptQuantConfig.is_layer_excluded",
)
UNLISTED_UNQUANTIZED = Rule(
    id="unlisted-unquantized",
    title="modules are not quantized, and the list of excluded modules does not name them",
    severity="error",
    consequence="SGLang builds them quantized: numbers are taken for packed bytes without scales, or the load aborts",
    fix="add them to the list",
    source="layers/linear.py RowParallelLinear.weight_loader",
)
IGNORE_PARTLY_FUSED = Rule(
    id="ignore-partly-fused",
    title="the list of excluded modules names some projections of one fused parameter, not all",
    severity="error",
    consequence="SGLang refuses to load",
    fix="list all of them or none",
    source="layers/quantization/utils.py is_layer_skipped",
)


@RULES.add(IGNORED_BUT_QUANTIZED, UNLISTED_UNQUANTIZED, IGNORE_PARTLY_FUSED)
def excluded_modules(s: SglangSubject) -> Iterator[Finding]:
    """modelopt_quant.py `is_layer_excluded`: a wildcard is compared with the whole name and with each part of it."""
    if s.declared is None or s.layout is None or s.known.quantized is False:
        return
    entry = s.declared.entry
    partly: set[str] = set()
    wrong: dict[str, set[str]] = {}
    for name in s.quantized:
        numbers = s.excluded_by(name)
        # One expert's entry has no effect: the experts of a layer are one module, which it does not name.
        if numbers and any(not s.excluded_by(shard) for shard in s.shards_of(name)):
            partly.update(f"{entry}[{n}]" for n in numbers)
        elif numbers and (split_expert(name)[1] is None or s.excluded_by(split_expert(name)[0])):
            for n in numbers:
                wrong.setdefault(f"{entry}[{n}]", set()).add(name)
    if partly:
        yield IGNORE_PARTLY_FUSED.at(
            sorted(partly), f"{len(partly)} entries name some projections of a fused parameter"
        )
    if wrong:
        count = len({name for names in wrong.values() for name in names})
        yield IGNORED_BUT_QUANTIZED.at(
            sorted(wrong), f"{len(wrong)} entries exclude {count} modules that are quantized"
        )
    plain = [m.key("weight") or name for name, m in modelopt.plain_linears(s, s.built_quantized).items()
             if not s.excluded_by(name)]  # fmt: skip
    head = s.modules.get("lm_head")
    if head is not None and "lm_head" not in s.quantized and not s.excluded_by("lm_head") and _untied_head_is_built(s):
        plain.append(head.key("weight") or "lm_head")
    if plain:
        yield UNLISTED_UNQUANTIZED.at(plain, f"{len(plain)} modules are not quantized, and {entry} does not name them")


def _untied_head_is_built(s: SglangSubject) -> bool:
    """modelopt_quant.py `_get_quant_method`: a ParallelLMHead is quantized like a linear layer, where the class hands
    its quantization config on. Of those with a head of their own mixtral.py and stablelm.py do not.
    """
    if s.known.head == "own":
        return s.architecture in OWN_HEADS_QUANTIZED
    return s.known.head == "tied" and not s.config.get("tie_word_embeddings")


OWN_HEADS_QUANTIZED = frozenset({
    "ArceeForCausalLM", "Glm4MoeForCausalLM", "OlmoeForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM",
    "Glm4MoeLiteForCausalLM", "Lfm2MoeForCausalLM", "MiniMaxM2ForCausalLM", "Qwen3NextForCausalLM",
})  # fmt: skip
"""Seen of the first five, read of the others."""

SCALE_MISSING = Rule(
    id="scale-missing",
    title="scales are missing",
    when="any other scale",
    severity="error",
    consequence="SGLang computes with uninitialised memory, without a warning",
    fix="calibrate and export again",
    source=f"{MODELOPT} _make_per_tensor_scale_parameter",
)
INPUT_SCALE_MISSING = replace(
    SCALE_MISSING,
    when="input scales",
    consequence="SGLang computes with 1.0, or with the one of the projection that it is fused with",
)


@RULES.add(SCALE_MISSING, INPUT_SCALE_MISSING)
def missing_scales(s: SglangSubject) -> Iterator[Finding]:
    """modelopt_quant.py: `fill_value=1.0` for input scales, of which the largest counts; torch.empty for others."""
    if s.layout is None or s.folder.absent:
        return
    lost = modelopt.missing_scales(s.built_quantized, s.layout)
    inputs = [name for name in lost if name.endswith(".input_scale")]
    for rule, names in ((INPUT_SCALE_MISSING, inputs), (SCALE_MISSING, [n for n in lost if n not in set(inputs)])):
        if names:
            yield rule.at(names, f"{len(names)} {rule.title}")


NOT_FINITE = replace(
    SCALE_MISSING,
    id="scale-not-finite",
    title="scales are infinite or NaN",
    when="",
    consequence="SGLang computes with it; infinities and NaN follow",
    source=f"{MODELOPT} ModelOptFp4LinearMethod.process_weights_after_loading",
)
NOT_POSITIVE = replace(NOT_FINITE, id="scale-not-positive", title="scales are zero or negative")


@RULES.add(NOT_FINITE, NOT_POSITIVE)
def invalid_scales(s: SglangSubject) -> Iterator[Finding]:
    """modelopt_quant.py `process_weights_after_loading`: no scale is looked at."""
    if s.layout is None:
        return
    for rule, keys in zip(
        (NOT_FINITE, NOT_POSITIVE), modelopt.invalid_scales(s, s.built_quantized, s.layout), strict=True
    ):
        if keys:
            yield rule.at(keys, f"{len(keys)} {rule.title}")


WRONG_DTYPE = Rule(
    id="wrong-dtype",
    title="weights or scales have another dtype than their parameters",
    severity="error",
    consequence="SGLang converts the values, without a warning: they come out as other numbers",
    fix="export again",
    source="layers/parameter.py BasevLLMParameter._assert_and_load",
)


@RULES.add(WRONG_DTYPE)
def dtypes(s: SglangSubject) -> Iterator[Finding]:
    """parameter.py `copy_`: any dtype is converted by value."""
    if s.layout is None:
        return
    wrong = list(modelopt.wrong_dtypes(s, s.built_quantized, s.layout))
    if wrong:
        yield WRONG_DTYPE.at(
            [key for key, _ in wrong], f"{len(wrong)} tensors have another dtype; expected {wrong[0][1]}"
        )


SCALE_SHAPE = Rule(
    id="wrong-scale-shape",
    title="scales have other shapes than their weights need",
    severity="error",
    consequence="SGLang aborts the load with an AssertionError; of experts it fills what there is, without a warning",
    fix="export again",
    source="layers/parameter.py _ColumnvLLMParameter.load_column_parallel_weight",
)


@RULES.add(SCALE_SHAPE)
def scale_shapes(s: SglangSubject) -> Iterator[Finding]:
    """parameter.py asserts that shapes are equal; fused_moe_triton/layer.py narrows the parameter to what there is."""
    if s.layout is None:
        return
    wrong = modelopt.wrong_scale_shapes(s, s.built_quantized, s.layout, 16)
    if wrong:
        yield SCALE_SHAPE.at(wrong, f"{len(wrong)} {SCALE_SHAPE.title}")


GROUP_SIZE_MISMATCH = Rule(
    id="group-size-mismatch",
    title="the config says another group size than the block scales have",
    severity="error",
    consequence="SGLang aborts the load with an AssertionError",
    fix="restore the config from the export; NVFP4 has groups of 16",
    source="layers/parameter.py _ColumnvLLMParameter.load_column_parallel_weight",
)


@RULES.add(GROUP_SIZE_MISMATCH)
def group_size(s: SglangSubject) -> Iterator[Finding]:
    """parameter.py asserts that shapes are equal."""
    if s.layout is None or s.layout.block is None or s.declared is None or not s.declared.group_size:
        return
    wrong = []
    for module in s.built_quantized.values():
        weight, block = module.weight, module.key(s.layout.block)
        if weight is None or block is None or len(s.entries[weight].shape) != 2 or len(s.entries[block].shape) != 2:
            continue
        columns = s.entries[weight].shape[1] * 2
        if s.entries[block].shape[1] * s.declared.group_size != columns and s.entries[block].shape[1] * 16 == columns:
            wrong.append(block)
    if wrong:
        found = f"group_size is {s.declared.group_size}, and {len(wrong)} block scales are for 16 values"
        yield GROUP_SIZE_MISMATCH.at((s.declared.where, *wrong[:8]), found)


WEIGHT_SCALES_DIFFER = Rule(
    id="fused-weight-scale-differs",
    title="weight scales of projections that share one parameter differ",
    severity="error",
    consequence="SGLang uses one of them for all (the largest; of experts gate's): the others' weights come out scaled",
    fix="rewrite --unify-fused-scales re-encodes to one scale",
    fixed_by="rewrite --unify-fused-scales",
    source=f"{MODELOPT} ModelOptFp4LinearMethod.process_weights_after_loading",
)
INPUT_SCALES_DIFFER = replace(
    WEIGHT_SCALES_DIFFER,
    id="fused-input-scale-differs",
    title="input scales of projections that share one parameter differ",
    severity="warning",
    consequence="SGLang uses the largest for all; of experts, the one that is read last",
    fix="",
    fixed_by=None,
)


@RULES.add(WEIGHT_SCALES_DIFFER, INPUT_SCALES_DIFFER)
def fused_scales(s: SglangSubject) -> Iterator[Finding]:
    """modelopt_quant.py `process_weights_after_loading`: max() of both; the experts' w13_weight_scale_2[:, 0]."""
    if s.layout is None or s.layout.shared is None:
        return
    for rule, leaf in ((WEIGHT_SCALES_DIFFER, s.layout.shared), (INPUT_SCALES_DIFFER, "input_scale")):
        keys = [key for _, found in modelopt.fused_scales(s, s.built_quantized, leaf) for key in found]
        if keys:
            yield rule.at(keys, f"{len(keys)} {leaf} of projections that share one parameter differ")


KV_SCALES_UNUSED = Rule(
    id="kv-scales-unused",
    title="KV scales are stored, and the class does not load them",
    when="it passes them over",
    severity="warning",
    consequence="SGLang computes an FP8 cache with 1.0",
    fix="serve it with a 16-bit cache",
    source="models/qwen3.py Qwen3Attention.__init__, a RadixAttention without quant_config",
)
KV_SCALES_REFUSED = replace(
    KV_SCALES_UNUSED,
    when="it refuses them",
    severity="error",
    consequence="SGLang aborts the load with a KeyError",
    fix="export again without a calibrated cache",
    source="models/mixtral.py MixtralForCausalLM.load_weights",
)
ONE_KV_SCALE = Rule(
    id="kv-scale-missing",
    title="of k_scale and v_scale only one is stored",
    severity="error",
    consequence="SGLang uses k_scale for both, or 1.0",
    fix="calibrate the cache and export again",
    source="layers/quantization/kv_cache.py BaseKVCacheMethod.process_weights_after_loading",
)


@RULES.add(KV_SCALES_UNUSED, KV_SCALES_REFUSED, ONE_KV_SCALE)
def kv_scales(s: SglangSubject) -> Iterator[Finding]:
    """models/qwen3.py: RadixAttention gets no quant_config; mixtral.py: no `maybe_remap_kv_scale_name`."""
    stored: dict[str, dict[str, str]] = {}
    for key in s.entries:
        leaf = key.rpartition(".")[2]
        hit = (formats.kv_scale(key, s.families) or formats.kv_scale(key)) if leaf in ("k_scale", "v_scale") else None
        if hit is not None:
            stored.setdefault(hit[0], {})[leaf] = key
    keys = [key for pair in stored.values() for key in pair.values()]
    if not keys:
        return
    if s.known.kv_scales in ("ignored", "refused"):
        rule = KV_SCALES_UNUSED if s.known.kv_scales == "ignored" else KV_SCALES_REFUSED
        yield rule.at(keys, f"{len(keys)} KV scales are stored, and {s.architecture} does not load them")
        return
    single = [key for pair in stored.values() if len(pair) == 1 for key in pair.values()]
    if single and s.known.kv_scales == "loaded":
        yield ONE_KV_SCALE.at(single, f"{len(single)} layers have only one of k_scale and v_scale")
