"""What vLLM demands of config.json, hf_quant_config.json and generation_config.json."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tierewrite.consumers.findings import Finding
from tierewrite.consumers.rules import Rule, RuleSet
from tierewrite.consumers.vllm.quantization import DEPRECATED, Quantization
from tierewrite.consumers.vllm.sources import MODELOPT, SCALES_OF_PLAIN, WEIGHT_UTILS
from tierewrite.consumers.vllm.subject import VllmSubject
from tierewrite.errors import shown
from tierewrite.source.table import QUANT_CONFIG_NAME

RULES: RuleSet[VllmSubject] = RuleSet()

NO_ARCHITECTURE = Rule(
    id="architectures",
    title="the model class is not known",
    when="config.json names none",
    severity="error",
    consequence="vLLM guesses one from model_type and refuses what it does not know",
    fix="name the model class in config.json",
    source="model_executor/models/registry.py inspect_model_cls",
)
UNKNOWN_ARCHITECTURE = replace(
    NO_ARCHITECTURE,
    when="neither vLLM's registry nor the installed transformers has it",
    consequence="vLLM refuses a class that it does not know",
    fix="correct the name",
)
UNFIT_ARCHITECTURE = replace(
    NO_ARCHITECTURE,
    when="vLLM has no class for it, and cannot use that of transformers",
    consequence="vLLM refuses to load",
    fix="serve it with another engine",
)


@RULES.add(NO_ARCHITECTURE, UNKNOWN_ARCHITECTURE, UNFIT_ARCHITECTURE)
def architectures(s: VllmSubject) -> Iterator[Finding]:
    """models/registry.py `resolve_model_cls`: a class of its own, else that of transformers or of auto_map."""
    where = ("config.json: architectures",)
    facts = s.backbone.facts
    if not s.architectures:
        yield NO_ARCHITECTURE.at(where, "config.json names no architecture")
    elif facts is not None and facts.refusal:
        yield UNFIT_ARCHITECTURE.at(where, f"vLLM has no class for '{s.architecture}': {facts.refusal}")
    elif s.known:
        return
    elif facts is not None and facts.registered:
        s.notes.append(f"what vLLM's class {s.architecture} reads was not checked: {facts.problem}")
    elif s.class_problem is None or s.config.get("auto_map"):
        s.notes.append(f"vLLM has no class of its own for {s.architecture}; whether it can load it was not checked")
    else:
        found = f"neither vLLM's registry nor the installed transformers has '{s.architecture}'"
        yield UNKNOWN_ARCHITECTURE.at(where, found)


QUANT_CONFIG_MISSING = Rule(
    id="quant-config-missing",
    title="modules are quantized, and no config says so",
    severity="error",
    consequence=f"vLLM builds plain layers; {SCALES_OF_PLAIN}",
    fix="restore hf_quant_config.json or quantization_config from the export, or export in a format that has one",
    source=f"{WEIGHT_UTILS} get_quant_config",
)
QUANT_CONFIG_INVALID = Rule(
    id="quant-config-invalid",
    title="vLLM does not accept the quantization config",
    when="an entry is missing, or is none that vLLM takes",
    severity="error",
    consequence="vLLM refuses to load, or loads as if unquantized",
    fix="restore the config from the export",
    source=f"{MODELOPT} ModelOptQuantConfigBase.from_config",
)
QUANT_METHOD_UNKNOWN = replace(
    QUANT_CONFIG_INVALID,
    when="the method is none of vLLM's own",
    consequence="vLLM refuses to load, unless a plugin brings the method",
    fix="export in a format that vLLM reads, or serve it with another engine",
    source="config/model.py ModelConfig._verify_quantization",
)
QUANT_METHOD_DEPRECATED = replace(
    QUANT_METHOD_UNKNOWN,
    when="the method is deprecated",
    consequence="vLLM refuses to load without --allow-deprecated-quantization",
    fix="serve it with --allow-deprecated-quantization, or export in another format",
)
QUANT_ALGO_MISMATCH = Rule(
    id="quant-algo-mismatch",
    title="the config names another algorithm than the tensors have",
    when="they are quantized otherwise",
    severity="error",
    consequence="vLLM builds parameters of other shapes; the load aborts",
    fix="restore the config from the export",
    source=f"{MODELOPT} LINEAR_ALGOS",
)
NOTHING_QUANTIZED = replace(
    QUANT_ALGO_MISMATCH,
    when="none is quantized",
    consequence="vLLM builds quantized parameters: the load aborts, or takes the weights by value with scales unset",
    fix="remove the quantization config if plain weights are meant; else bring the quantized files",
)


@RULES.add(
    QUANT_CONFIG_MISSING,
    QUANT_CONFIG_INVALID,
    QUANT_METHOD_UNKNOWN,
    QUANT_METHOD_DEPRECATED,
    QUANT_ALGO_MISMATCH,
    NOTHING_QUANTIZED,
)
def quant_config(s: VllmSubject) -> Iterator[Finding]:
    """config/model.py `_verify_quantization`; modelopt.py `ModelOptQuantConfigBase.from_config`."""
    q = s.quantization
    if q is None:
        if s.count_quantized:
            found = f"{s.count_quantized} modules are quantized, and no config says so"
            yield QUANT_CONFIG_MISSING.at(("config.json: quantization_config",), found)
    elif q.problem is not None:
        if s.count_quantized or q.refused:
            yield QUANT_CONFIG_INVALID.at((q.where,), q.problem)
    elif q.unknown:
        yield QUANT_METHOD_UNKNOWN.at((f"{q.where}.quant_method",), f"vLLM 0.33 has no method '{shown(q.method)}'")
    elif q.method in DEPRECATED:
        yield QUANT_METHOD_DEPRECATED.at((f"{q.where}.quant_method",), f"{q.method} is deprecated in vLLM 0.33")
    elif s.declared_otherwise:
        found = f"the config says {q.declared or q.algo}, the tensors are {s.on_disk_format}"
        yield QUANT_ALGO_MISMATCH.at((f"{q.where}.quant_algo",), found)
    elif s.built_quantized_of_plain:
        found = f"the config says {q.declared or q.algo or q.method}, and no module is quantized"
        yield NOTHING_QUANTIZED.at((q.where,), found)
    elif q.scheme is None:
        s.notes.append(f"{q.algo or q.method}: names and completeness are checked, scales and shapes are not")


QUANT_CONFIG_DISAGREES = Rule(
    id="quant-config-disagrees",
    title="hf_quant_config.json and config.json differ",
    severity="warning",
    consequence="vLLM uses config.json; other readers may use the other",
    fix="make them equal, or remove hf_quant_config.json",
    source=f"{WEIGHT_UTILS} get_quant_config",
)


@RULES.add(QUANT_CONFIG_DISAGREES)
def quant_configs_disagree(s: VllmSubject) -> Iterator[Finding]:
    """`get_quant_config`: hf_quant_config.json is read only where config.json says nothing."""
    q = s.quantization
    if q is None or not s.folder.quant_config or q.where == QUANT_CONFIG_NAME or not q.modelopt:
        return
    other = Quantization.of({}, s.folder.quant_config)
    assert other is not None
    differing = []
    if other.declared != q.declared:
        differing.append("quant_algo")
    if other.kv_fp8 != q.kv_fp8:
        differing.append("kv_cache_quant_algo")
    if set(other.ignore) != set(q.ignore):
        differing.append("exclude_modules")
    if other.group_size != q.group_size:
        differing.append("group_size")
    if differing:
        where = (f"hf_quant_config.json: quantization.{d}" for d in differing)
        yield QUANT_CONFIG_DISAGREES.at(where, f"hf_quant_config.json and config.json differ in {', '.join(differing)}")


ACTIVATIONS_UNUSED = Rule(
    id="activations-unused",
    title="the config says weight-only, and input scales are stored",
    severity="warning",
    consequence="vLLM drops them and computes with 16-bit activations",
    fix="if activations were calibrated, restore input_activations in config_groups",
    source=f"{MODELOPT} ModelOptNvFp4Config._from_config",
)


@RULES.add(ACTIVATIONS_UNUSED)
def activations_unused(s: VllmSubject) -> Iterator[Finding]:
    """modelopt.py `ModelOptNvFp4Config._from_config`, `_DropInputScale`: weight-only, input scales are dropped."""
    if s.quantization is None or s.quantization.algo != "W4A16_NVFP4" or s.declared_otherwise:
        return
    keys = tuple(k for m in s.sound.values() for k in m.leaves.get("input_scale", ()))
    if keys:
        yield ACTIVATIONS_UNUSED.at(keys, f"the config says weight-only, yet {len(keys)} input scales are stored")


MTP_MISSING = Rule(
    id="mtp-missing",
    title="the config declares layers for multi-token prediction, and no key fills them",
    severity="warning",
    consequence="plain serving works; vLLM refuses speculative decoding with them (weights missing from checkpoint)",
    fix="copy the layers from the original checkpoint, or set the entry to 0",
    source="model_executor/models/deepseek_mtp.py DeepSeekMTP.load_weights",
)


@RULES.add(MTP_MISSING)
def mtp_missing(s: VllmSubject) -> Iterator[Finding]:
    """models/deepseek_mtp.py, glm4_moe_mtp.py: `model.layers.<num_hidden_layers>.*`; qwen3_next_mtp.py: `mtp.*`."""
    where, count = s.mtp
    if count and not s.mtp_keys:
        found = f"config.json declares {count} MTP layer{'s' if count > 1 else ''}, and no key fills them"
        yield MTP_MISSING.at((f"config.json: {where}",), found)


GENERATION_CONFIG = Rule(
    id="generation-config",
    title="generation_config.json lacks what the model's sampler needs",
    severity="warning",
    consequence="vLLM fails when the model is served, unless told to read another generation config",
    fix="copy the values from the original model's generation_config.json",
    source="model_executor/models/diffusion_gemma.py DiffusionGemmaModelState",
)


@RULES.add(GENERATION_CONFIG)
def generation_config(s: VllmSubject) -> Iterator[Finding]:
    """models/diffusion_gemma.py `DiffusionGemmaModelState.__init__`, `custom_sampler`. Serving can name another folder
    (`--generation-config`).
    """
    wanted = s.backbone.generation
    if wanted is None:
        return
    have = s.folder.generation
    lacking = [f"generation_config.json: {n}" for n in wanted["numbers"] if not isinstance(have.get(n), (int, float))]
    sampler = have.get("sampler_config")
    rules = wanted["sampler"]
    value = sampler.get(rules["positive"]) if isinstance(sampler, dict) else None
    named = isinstance(sampler, dict) and rules["class"] in str(sampler.get("_cls_name", ""))
    if not named or not isinstance(value, (int, float)) or not value > 0:
        lacking.append("generation_config.json: sampler_config")
    if lacking:
        found = f"generation_config.json lacks {', '.join(x.rpartition(' ')[2] for x in lacking)}"
        yield GENERATION_CONFIG.at(lacking, found)
