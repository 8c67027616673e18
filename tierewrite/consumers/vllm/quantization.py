"""vLLM's reading of a quantization config: which algorithm, which tensors a quantized module has, which ignore list.

Follows vllm/model_executor/layers/quantization/modelopt.py (`ModelOptQuantConfigBase.from_config`) of vLLM 0.33,
quirks included: that is what the rules have to predict. Of other methods the list of plain modules is read, and
what modules have on disk (schemes.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tierewrite.consumers.vllm.schemes import Scheme, scheme_of
from tierewrite.source.table import QUANT_CONFIG_NAME

CONFIG = "config.json: quantization_config"
ALGOS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8", "MIXED_PRECISION")
# What the legacy file may say when config.json says nothing (model_arch_config_convertor.py
# `_normalize_quantization_config`).
LEGACY_ALGOS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "MIXED_PRECISION")
# model_executor/layers/quantization/__init__.py `QUANTIZATION_METHODS`, and what their `override_quantization_method`
# takes, as far as a checkpoint may declare it: not what only quantizes while it loads (`fp8_per_tensor`).
METHODS = frozenset({
    "auto-round", "auto_awq", "auto_gptq", "awq", "awq_marlin", "compressed-tensors", "deepseek_v4_fp8", "experts_int8",
    "fp8", "gpt_oss_mxfp4", "gptq", "gptq_marlin", "humming", "inc", "moe_wna16", "mxfp4", "mxfp8", "quark", "torchao",
})  # fmt: skip
# `DEPRECATED_QUANTIZATION_METHODS`.
DEPRECATED = frozenset({"fbgemm_fp8", "fp_quant"})
NO_METHOD = "quant_method is missing"
# Modules of these names are never quantized (modelopt.py `get_quant_method`).
VISION = ("vision_tower", "vision_model", "vit_large_projector")


@dataclass(frozen=True)
class Quantization:
    """The quantization config that vLLM uses.

    Attributes:
        where: the config entry that it comes from.
        method: quant_method, "" if absent.
        algo: for ModelOpt the algorithm as vLLM takes it (weight-only NVFP4 is W4A16_NVFP4), for
            compressed-tensors the format.
        declared: the algorithm as written.
        group_size: block size that vLLM will use.
        kv_fp8: it declares FP8 scales for the KV cache.
        ignore_path: the config entry that holds the ignore list.
        ignore: its patterns.
        problem: why vLLM refuses the config, or None.
        scheme: what modules have on disk; None for algorithms that are not checked in detail.
        targets: of compressed-tensors, what it quantizes: names or patterns of modules; () for every linear.
    """

    where: str
    method: str
    algo: str
    declared: str
    group_size: int
    kv_fp8: bool
    ignore_path: str
    ignore: tuple[str, ...]
    problem: str | None = None
    scheme: Scheme | None = None
    targets: tuple[str, ...] = ()

    @property
    def modelopt(self) -> bool:
        """Whether the quantization method is one of ModelOpt's."""
        return self.method.startswith("modelopt")

    @property
    def unknown(self) -> bool:
        """Whether the method is none of vLLM's own."""
        return bool(self.method) and not self.modelopt and self.method not in METHODS | DEPRECATED

    @property
    def refused(self) -> bool:
        """Whether the config aborts the load; one without a method is passed over instead."""
        return self.problem not in (None, NO_METHOD)

    @property
    def lists_known(self) -> bool:
        """Whether it is known how vLLM reads its list of modules that are not quantized."""
        if self.modelopt:
            return self.algo != "MIXED_PRECISION"  # a list of quantized layers says more
        if self.method == "quark":
            return self.scheme is not None  # the same for every layer
        return self.method in ("compressed-tensors", "fp8")

    @property
    def quantizes_head(self) -> bool:
        """Whether an untied lm_head that the list does not name is built quantized.

        fp8.py and quark.py quantize `LinearBase` alone; compressed_tensors.py finds no target for `ParallelLMHead`
        among Linear.
        """
        return self.modelopt

    @classmethod
    def of(cls, config: Mapping[str, Any], legacy: Mapping[str, Any]) -> Quantization | None:
        """The config that counts: config.json's, else its text config's, else hf_quant_config.json; None if none.

        transformers_utils/config.py `get_config`, weight_utils.py `get_quant_config`.
        """
        text = config.get("text_config")
        for where, found in (
            (CONFIG, config.get("quantization_config")),
            (
                "config.json: text_config.quantization_config",
                text.get("quantization_config") if isinstance(text, Mapping) else None,
            ),
            ("config.json: compression_config", config.get("compression_config")),
        ):
            if found is not None:
                return cls._read(where, found, legacy_file=False) if isinstance(found, Mapping) else cls._odd(where)
        if legacy:
            return cls._read(QUANT_CONFIG_NAME, legacy, legacy_file=True)
        return None

    @classmethod
    def _odd(cls, where: str) -> Quantization:
        """Of an entry that is no object."""
        return cls(where, "", "", "", 16, False, where, (), f"{where.rpartition(' ')[2]} is no object")

    @classmethod
    def _read(cls, where: str, found: Mapping[str, Any], *, legacy_file: bool) -> Quantization:
        nested = found.get("quantization")
        old = nested if isinstance(nested, Mapping) else None
        body = old if old is not None else found
        method = str(found.get("quant_method") or "").lower().replace("compressed_tensors", "compressed-tensors")
        producer = found.get("producer")
        declared = str(body.get("quant_algo") or "").upper()
        problem = None
        if isinstance(producer, Mapping) and producer.get("name") == "modelopt" and old is not None and declared:
            if declared in LEGACY_ALGOS:
                method = "modelopt"
            elif legacy_file:
                problem = f"quant_algo {declared} is not one that the legacy form may say ({', '.join(LEGACY_ALGOS)})"
        if not isinstance(found.get("quant_method", ""), str) and method != "modelopt":
            problem = "quant_method is no name"
        elif not method and problem is None:
            problem = NO_METHOD
        ignore_key = _ignore_key(method, body, old=old is not None)
        ignore = body.get(ignore_key, []) if method.startswith("modelopt") else body.get(ignore_key) or []
        group = body.get("group_size")
        algo = declared
        if method.startswith("modelopt") and problem is None:
            problem = _modelopt_problem(declared, body, ignore_key, ignore, old=old is not None)
            groups = found.get("config_groups")
            if declared == "NVFP4" and isinstance(groups, Mapping) and groups:
                silent = [isinstance(g, Mapping) and g.get("input_activations") is None for g in groups.values()]
                if all(silent):
                    algo = "W4A16_NVFP4"
        elif method == "compressed-tensors":
            algo = str(found.get("format") or "")
            problem = problem or _listed_oddly(found, "ignore", needed=False)
        elif method == "quark":
            problem = problem or _listed_oddly(found, "exclude", needed=True)
        try:
            group_size = 16 if group is None else int(group)
        except (TypeError, ValueError):
            group_size, problem = 16, problem or f"group_size is {group!r}, not a number"
        scheme = found.get("kv_cache_scheme")
        if old is not None:
            kv = str(body.get("kv_cache_quant_algo") or "").upper() == "FP8"
        else:
            kv = isinstance(scheme, Mapping) and scheme.get("type") == "float" and scheme.get("num_bits") == 8
        patterns = tuple(p for p in ignore if isinstance(p, str)) if isinstance(ignore, list) else ()
        path = f"{where}.quantization" if old is not None else where
        layout = scheme_of(method, algo, found)
        return cls(
            where,
            method,
            algo,
            declared,
            group_size,
            kv,
            f"{path}.{ignore_key}",
            patterns,
            problem,
            layout,
            _targets(method, found),
        )


def _ignore_key(method: str, body: Mapping[str, Any], *, old: bool) -> str:
    """The entry that lists the modules that are not quantized."""
    if method == "compressed-tensors":
        return "ignore"
    if method == "quark":
        return "exclude"
    if method == "fp8":
        return "ignored_layers" if body.get("ignored_layers") else "modules_to_not_convert"
    return "ignore" if not old and "ignore" in body else "exclude_modules"


def _modelopt_problem(declared: str, body: Mapping[str, Any], key: str, ignore: object, *, old: bool) -> str | None:
    """Why vLLM refuses a config of ModelOpt's: `key` and `ignore` are its list; `old`: it is the legacy form."""
    if not declared:
        return "quant_algo is missing"
    if declared not in ALGOS:
        return f"quant_algo {declared} is none that vLLM knows ({', '.join(ALGOS)})"
    if not isinstance(ignore, list):
        return f"{key} is {type(ignore).__name__}, not a list"
    if old and "NVFP4" in declared:
        lacking = [k for k in ("group_size", "kv_cache_quant_algo", "exclude_modules") if k not in body]
        if lacking:
            return f"{', '.join(lacking)} missing: the legacy form must have it for NVFP4"
    return None


def _listed_oddly(found: Mapping[str, Any], key: str, *, needed: bool) -> str | None:
    """What vLLM iterates over has to be a list; `needed`: it has to be there."""
    if key not in found:
        return f"{key} is missing" if needed else None
    return None if isinstance(found[key], list) else f"{key} is no list"


def _targets(method: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    """compressed_tensors/utils.py `find_matched_target`: a class's name that holds a target's is targeted too."""
    groups = found.get("config_groups")
    if method != "compressed-tensors" or not isinstance(groups, Mapping):
        return ()
    listed = [group.get("targets") for group in groups.values() if isinstance(group, Mapping)]
    targets = tuple(t for each in listed if isinstance(each, list) for t in each if isinstance(t, str))
    return () if any(t.lower() == "linear" for t in targets) else targets
