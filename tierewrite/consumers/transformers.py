"""What transformers demands of a checkpoint: `from_pretrained` initialises at random what it does not find, with a
table on the log, and goes on.

Every rule's docstring names the file and function of transformers 5.23 in which the behaviour was read. Nothing is
imported from transformers here; the model class is asked by `TieMap.resolve`.

Not checked: how a quantizer that transformers knows turns its tensors into layers; companions that some format
knows are taken to be right for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tierewrite import formats
from tierewrite.consumers.backbone import Backbone
from tierewrite.consumers.findings import Finding, Mend
from tierewrite.consumers.subject import Subject
from tierewrite.source.table import INDEX_NAME
from tierewrite.ties.on_disk import WHOLE

VERSION = "5.23.0"
REWRITE: Mend = "rewrite"
MODELING = "modeling_utils.py"
# quantizers/auto.py AUTO_QUANTIZATION_CONFIG_MAPPING
QUANT_METHODS = frozenset(
    {
        "awq", "bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "gptq", "aqlm", "quanto", "quark",
        "fouroversix", "fp_quant", "eetq", "higgs", "hqq", "compressed-tensors", "fbgemm_fp8", "torchao", "bitnet",
        "vptq", "spqr", "fp8", "mxfp8", "auto-round", "mxfp4", "metal", "sinq", "nvfp4", "gguf", "gemma",
    }
)  # fmt: skip
PLAIN = Backbone((), f"{MODELING}", (), (), {}, (), (), (), None)
"""transformers loads names as they are; its own renamings are `names.places`' business."""

Rule = Callable[[Subject], Iterator[Finding]]
RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Registers a rule; they run in the order of this file."""
    RULES.append(function)
    return function


def quantization(s: Subject) -> dict[str, Any] | None:
    """The quantization config that transformers sees: config.json's only."""
    found = s.config.get("quantization_config")
    return found if isinstance(found, dict) else None


@rule
def files(s: Subject) -> Iterator[Finding]:
    """modeling_utils.py `_get_resolved_checkpoint_files`: model.safetensors first, then the index, else OSError."""
    source = f"{MODELING} _get_resolved_checkpoint_files"
    if s.folder.absent:
        yield Finding(
            "index-names-missing-file", "error", s.folder.absent,
            f"{INDEX_NAME} names {len(s.folder.absent)} files that are not in the folder",
            "transformers refuses to load", "bring the files, or export anew", None, source,
        )  # fmt: skip
    names = [shard.name for shard in s.folder.shards]
    if s.folder.weight_map is None and names != ["model.safetensors"]:
        yield Finding(
            "index-missing", "error", tuple(names), f"{len(names)} safetensors files and no {INDEX_NAME}",
            "transformers looks for model.safetensors or the index, and finds neither",
            "rewrite writes an index", REWRITE, source,
        )  # fmt: skip
    listed = set((s.folder.weight_map or {}).values())
    if names == ["model.safetensors"] and listed - {"model.safetensors"}:
        yield Finding(
            "index-shadowed", "error", ("model.safetensors",),
            f"model.safetensors lies beside shards that {INDEX_NAME} names",
            "transformers reads model.safetensors alone", "remove it, or the index and the shards", None, source,
        )  # fmt: skip


@rule
def duplicate_key(s: Subject) -> Iterator[Finding]:
    """modeling_utils.py `_load_pretrained_model`: files in the index's order; the name that is read last stays."""
    repeated = sorted(s.folder.repeated.items(), key=lambda item: item[1][0].nbytes)
    verdicts = s.equal(entries for _, entries in repeated)
    differ = tuple(name for (name, _), equal in zip(repeated, verdicts, strict=True) if not equal)
    if differ:
        yield Finding(
            "duplicate-key", "error", differ, f"{len(differ)} tensors are in several files, with different bytes",
            "the file that is read last wins", "keep one of them", None, f"{MODELING} _load_pretrained_model",
        )  # fmt: skip


@rule
def architectures(s: Subject) -> Iterator[Finding]:
    """models/auto/auto_factory.py `_BaseAutoModelClass.from_pretrained`."""
    if s.class_problem is not None:
        yield Finding(
            "architectures", "error", ("config.json: architectures",), s.class_problem,
            "the class cannot be built", "correct config.json, or install the version that it was made with", None,
            "models/auto/auto_factory.py _BaseAutoModelClass.from_pretrained",
        )  # fmt: skip


@rule
def quant_method(s: Subject) -> Iterator[Finding]:
    """quantizers/auto.py `AutoHfQuantizer.supports_quant_method`: an unknown method is skipped with a warning, and
    the packed tensors meet plain parameters.
    """
    if not s.quantized:
        return
    config = quantization(s)
    method = str((config or {}).get("quant_method") or "").lower()
    if method not in QUANT_METHODS:
        what = f"quant_method '{method}' is none that transformers knows" if config else "no quantization_config"
        yield Finding(
            "quant-method-unknown", "error", ("config.json: quantization_config.quant_method",),
            f"{len(s.quantized)} modules are quantized; {what}",
            "their tensors are taken for plain weights: shapes that do not fit are refused, others load as they are",
            "serve it with vLLM, or export in a format that transformers reads", None,
            "quantizers/auto.py AutoHfQuantizer.supports_quant_method",
        )  # fmt: skip


@rule
def unpacked_experts(s: Subject) -> Iterator[Finding]:
    """core_model_loading.py `convert_and_load_state_dict_in_model`: only what conversion_mapping.py names is fused."""
    keys = tuple(key for key, (_, part) in s.places.items() if part != WHOLE and part[0] == "expert")
    if keys:
        yield Finding(
            "experts-unpacked", "error", keys,
            f"{len(keys)} experts' weights are stored one by one, and the class has them fused",
            "transformers finds none of them: the fused parameters are initialised at random",
            "serve it with vLLM; transformers reads the fused form", None,
            "core_model_loading.py convert_and_load_state_dict_in_model",
        )  # fmt: skip


@rule
def missing_parameters(s: Subject) -> Iterator[Finding]:
    """modeling_utils.py `_initialize_missing_keys`; `tie_weights`: a declared tie of which every name is absent is
    reported as "This checkpoint seem corrupted".
    """
    if s.model is None:
        s.notes.append("completeness was not checked: no model class says which parameters there are")
        return
    if s.folder.absent:
        return
    plain, _, experts = s.missing()
    if plain or experts:
        yield Finding(
            "parameter-missing", "error", (*plain, *experts),
            f"{len(plain) + len(experts)} parameters are filled by no key",
            "transformers initialises them at random, with a table on the log",
            "export anew, or copy them from a complete checkpoint", None, f"{MODELING} _initialize_missing_keys",
        )  # fmt: skip


@rule
def unexpected_tensors(s: Subject) -> Iterator[Finding]:
    """modeling_utils.py `log_state_dict_report`: UNEXPECTED in the table; never an error."""
    if s.model is None:
        return
    known = quantization(s) is not None
    keys = tuple(
        key
        for key in s.entries
        if key not in s.places
        and not (known and (formats.classify("weight", key.rpartition(".")[2]) or formats.kv_scale(key)))
    )
    if keys:
        yield Finding(
            "unexpected-tensor", "warning", keys, f"{len(keys)} tensors belong to no parameter",
            "transformers lists and ignores them", "if they matter, the class or the config is wrong", None,
            f"{MODELING} log_state_dict_report",
        )  # fmt: skip


@rule
def shapes(s: Subject) -> Iterator[Finding]:
    """core_model_loading.py `set_param_for_module`: a mismatch raises unless `ignore_mismatched_sizes`."""
    packed = {
        key for m in s.quantized.values() for leaf, keys in m.leaves.items() if formats.is_main(leaf) for key in keys
    }
    wrong = tuple(
        key
        for key, (parameter, part) in s.places.items()
        if part == WHOLE and key not in packed and s.model is not None
        and s.entries[key].shape != s.model.shapes[parameter]
    )  # fmt: skip
    if wrong:
        yield Finding(
            "wrong-shape", "error", wrong, f"{len(wrong)} tensors have other shapes than their parameters",
            "transformers refuses to load", "correct the config, or export anew", None,
            "core_model_loading.py set_param_for_module",
        )  # fmt: skip


@rule
def ties(s: Subject) -> Iterator[Finding]:
    """modeling_utils.py `PreTrainedModel.tie_weights`: a declared tie whose sides are both there and differ is
    declined, and both are kept.
    """
    sides: dict[str, list[str]] = {}
    for key, (parameter, part) in s.places.items():
        if part == WHOLE:
            sides.setdefault(s.canonical.get(parameter, parameter), []).append(key)
    meeting = sorted((k for k in sides.values() if len(k) > 1), key=lambda keys: s.entries[keys[0]].nbytes)
    verdicts = s.equal(tuple(s.entries[k] for k in keys) for keys in meeting)
    differ: list[str] = []
    same: list[str] = []
    for keys, verdict in zip(meeting, verdicts, strict=True):
        (differ if verdict is False else same).extend(keys)
    source = f"{MODELING} PreTrainedModel.tie_weights"
    if differ:
        yield Finding(
            "tie-not-confirmed", "warning", tuple(differ), f"{len(differ)} names of declared ties hold different bytes",
            "transformers declines the tie and loads each",
            "set tie_word_embeddings to false if they are meant to differ",
            None, source,
        )  # fmt: skip
    if same:
        yield Finding(
            "duplicate-names", "warning", tuple(same), f"{len(same)} names of declared ties, stored more than once",
            "transformers ties them; disk and loading time are wasted", "rewrite keeps one of each", REWRITE, source,
        )  # fmt: skip


def findings(subject: Subject) -> Iterable[Finding]:
    """Run every rule."""
    for each in RULES:
        yield from each(subject)
