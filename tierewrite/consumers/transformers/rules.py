"""What transformers demands of a checkpoint.

`from_pretrained` initialises at random what it does not find, with a table on the log, and goes on.

The functions' docstrings name the file and function of transformers 5.23 in which the behaviour was read. Nothing is
imported from transformers here; the model class is asked by `TieMap.resolve`.

Not checked: how a quantizer that transformers knows turns its tensors into layers; companions that some format knows
are taken to be right for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tierewrite.consumers import common_rules
from tierewrite.consumers.findings import Finding
from tierewrite.consumers.rules import Rule, RuleSet
from tierewrite.consumers.subject import Subject
from tierewrite.consumers.transformers.names import missed_names
from tierewrite.source.folder import loader_of
from tierewrite.source.table import INDEX_NAME
from tierewrite.ties.fit import is_former_buffer, is_ignored
from tierewrite.ties.on_disk import WHOLE, Part, on_disk
from tierewrite.ties.quantizers import FLOAT8_STAYS, QUANT_METHODS
from tierewrite.ties.quantizers import quant_method as quant_method_of

MODELING = "modeling_utils.py"
WHOLE_FILE = "model.safetensors"
RULES: RuleSet[Subject] = RuleSet()

INDEX_NAMES_MISSING_FILE = Rule(
    id="index-names-missing-file",
    title="the index names files that are not there",
    severity="error",
    consequence="transformers refuses to load",
    fix="bring the files, or export again",
    source=f"{MODELING} _get_resolved_checkpoint_files",
)
INDEX_MISSING = Rule(
    id="index-missing",
    title="there is neither an index nor model.safetensors",
    when="its files are named as nobody's in particular",
    severity="error",
    consequence="transformers looks for model.safetensors or the index, and finds neither",
    fix="rewrite writes an index",
    fixed_by="rewrite",
    source=f"{MODELING} _get_resolved_checkpoint_files",
)
NO_MODEL_HERE = replace(
    INDEX_MISSING,
    when="its files are named as another loader's: an adapter, a variant, a model of diffusers, ...",
    fix="give the folder of a model, or merge what is here into one first",
    fixed_by=None,
)
INDEX_SHADOWED = Rule(
    id="index-shadowed",
    title="model.safetensors lies beside shards that the index names",
    severity="error",
    consequence="transformers reads model.safetensors alone",
    fix="remove it, or the index and the shards",
    source=f"{MODELING} _get_resolved_checkpoint_files",
)


@RULES.add(INDEX_NAMES_MISSING_FILE, INDEX_MISSING, NO_MODEL_HERE, INDEX_SHADOWED)
def files(s: Subject) -> Iterator[Finding]:
    """modeling_utils.py `_get_resolved_checkpoint_files`: model.safetensors first, then the index, else OSError."""
    yield from common_rules.absent_files(s, INDEX_NAMES_MISSING_FILE)
    names = [shard.name for shard in s.folder.shards]
    if s.folder.weight_map is None and names != [WHOLE_FILE]:
        kinds = {loader_of(name) for name in names}
        if None in kinds:
            yield INDEX_MISSING.at(names, f"{len(names)} safetensors files and no {INDEX_NAME}")
        else:
            yield NO_MODEL_HERE.at(names, f"{', '.join(sorted(filter(None, kinds)))}, and no model")
    listed = set((s.folder.weight_map or {}).values())
    if names == [WHOLE_FILE] and listed - {WHOLE_FILE}:
        yield INDEX_SHADOWED.at((WHOLE_FILE,), f"{WHOLE_FILE} lies beside shards that {INDEX_NAME} names")


DUPLICATE_KEY = Rule(
    id="duplicate-key",
    title="a tensor is in several files, with different bytes",
    severity="error",
    consequence="the file that is read last wins",
    fix="keep one of them",
    source=f"{MODELING} _load_pretrained_model",
)


@RULES.add(DUPLICATE_KEY)
def duplicate_key(s: Subject) -> Iterator[Finding]:
    """modeling_utils.py `_load_pretrained_model`: files in the index's order; the name that is read last stays."""
    return common_rules.repeated_keys(s, DUPLICATE_KEY)


ARCHITECTURES = Rule(
    id="architectures",
    title="the model class cannot be built",
    severity="error",
    consequence="the class cannot be built",
    fix="correct config.json, or install the version that it was made with",
    source="models/auto/auto_factory.py _BaseAutoModelClass.from_pretrained",
)


@RULES.add(ARCHITECTURES)
def architectures(s: Subject) -> Iterator[Finding]:
    """models/auto/auto_factory.py `_BaseAutoModelClass.from_pretrained`."""
    if s.ties is None and s.class_problem is not None:
        yield ARCHITECTURES.at(("config.json: architectures",), s.class_problem)


QUANT_METHOD_UNKNOWN = Rule(
    id="quant-method-unknown",
    title="the method of quantization is none that transformers knows",
    severity="error",
    when="quant_method names another",
    consequence="their tensors are taken for plain weights: other names are left out and their weights initialised at "
    "random, shapes that do not fit are refused, the rest loads as it is",
    fix="serve it with vLLM, or export in a format that transformers reads",
    source="quantizers/auto.py AutoHfQuantizer.supports_quant_method",
)
QUANT_METHOD_MISSING = replace(
    QUANT_METHOD_UNKNOWN,
    when="there is no quantization_config",
    fix="restore quantization_config from the export, or load it with the library that wrote it",
)


QUANT_METHOD_UNNAMED = replace(
    QUANT_METHOD_UNKNOWN,
    when="quantization_config names none, or is no object",
    consequence="transformers refuses to load",
    fix="restore quantization_config from the export, or remove it where nothing is quantized",
)


def quantization(s: Subject) -> dict[str, Any] | None:
    """The quantization config that transformers sees: config.json's only."""
    found = s.config.get("quantization_config")
    return found if isinstance(found, dict) else None


@RULES.add(QUANT_METHOD_UNKNOWN, QUANT_METHOD_MISSING, QUANT_METHOD_UNNAMED)
def quant_method(s: Subject) -> Iterator[Finding]:
    """quantizers/auto.py `AutoHfQuantizer.supports_quant_method`: an unknown method is skipped with a warning, and
    the packed tensors meet plain parameters.
    """
    config = quantization(s)
    where = ("config.json: quantization_config.quant_method",)
    if config is None and s.config.get("quantization_config") is not None:
        yield QUANT_METHOD_UNNAMED.at(("config.json: quantization_config",), "quantization_config is no object")
        return
    named = ("quant_method", "load_in_8bit", "load_in_4bit")
    if config is not None and all(config.get(entry) in (None, False) for entry in named):
        yield QUANT_METHOD_UNNAMED.at(where, "quantization_config has no quant_method")
        return
    if not s.count_quantized:
        return
    method = str((config or {}).get("quant_method") or "").lower()
    if method not in QUANT_METHODS:
        rule = QUANT_METHOD_UNKNOWN if config else QUANT_METHOD_MISSING
        what = f"quant_method '{method}' is none that transformers knows" if config else "no quantization_config"
        yield rule.at(where, f"{s.count_quantized} modules are quantized; {what}")


EXPERTS_UNPACKED = Rule(
    id="experts-unpacked",
    title="experts' weights are stored one by one, and the class has them fused",
    severity="error",
    consequence="transformers finds none of them: the fused parameters are initialised at random",
    fix="serve it with vLLM; transformers reads the fused form",
    source="core_model_loading.py convert_and_load_state_dict_in_model",
)


@RULES.add(EXPERTS_UNPACKED)
def unpacked_experts(s: Subject) -> Iterator[Finding]:
    """core_model_loading.py `convert_and_load_state_dict_in_model`: only what conversion_mapping.py names is fused."""
    keys = tuple(key for key, (_, part) in s.places.items() if part != WHOLE and part[0] == "expert")
    if keys:
        yield EXPERTS_UNPACKED.at(keys, f"{len(keys)} {EXPERTS_UNPACKED.title}")


PARAMETER_MISSING = Rule(
    id="parameter-missing",
    title="parameters are filled by no key",
    severity="error",
    consequence="transformers initialises them at random, with a table on the log",
    fix="export again, or copy them from a complete checkpoint",
    source=f"{MODELING} _initialize_missing_keys",
)


@RULES.add(PARAMETER_MISSING)
def missing_parameters(s: Subject) -> Iterator[Finding]:
    """modeling_utils.py `_initialize_missing_keys`; `tie_weights`: a declared tie of which every name is absent is
    reported as "This checkpoint seem corrupted".
    """
    plain, _, experts = common_rules.missing_parameters(s)
    if plain or experts:
        names = (*plain, *experts)
        yield PARAMETER_MISSING.at(names, f"{len(names)} {PARAMETER_MISSING.title}")


SCALE_MISSING = Rule(
    id="scale-missing",
    title="tensors that a quantizer adds to a tied module are there on one side only",
    severity="error",
    consequence="transformers ties parameters by name, and these by none: they stay uninitialised, with a table on the "
    "log",
    fix="expand with --for transformers writes them out again; rewrite with --for transformers keeps them",
    source=f"{MODELING} PreTrainedModel.tie_weights",
)


@RULES.add(SCALE_MISSING)
def scales_of_one_side(s: Subject) -> Iterator[Finding]:
    """modeling_utils.py `PreTrainedModel.tie_weights`: only the names in `_tied_weights_keys` are tied."""
    if s.ties is None or s.folder.absent:
        return
    keys = missed_names(s.config, on_disk(s.ties, s.entries), s.entries)
    if keys:
        yield SCALE_MISSING.at(keys, f"{len(keys)} {SCALE_MISSING.title}")


UNEXPECTED_TENSOR = Rule(
    id="unexpected-tensor",
    title="tensors belong to no parameter",
    severity="warning",
    consequence="transformers lists and ignores them",
    fix="if they matter, the class or the config is wrong",
    source=f"{MODELING} log_state_dict_report",
)


@RULES.add(UNEXPECTED_TENSOR)
def unexpected_tensors(s: Subject) -> Iterator[Finding]:
    """modeling_utils.py `log_state_dict_report`: UNEXPECTED in the table; never an error. Not in it is what
    `_adjust_missing_and_unexpected_keys` takes out.
    """
    model = s.model
    if model is None:
        return
    known = quantization(s) is not None
    odd = (key for key in s.entries if key not in s.places and key not in s.in_unknown_format)
    listed = (key for key in odd if not is_former_buffer(key) and not is_ignored(key, model))
    keys = tuple(key for key in listed if not (known and s.belongs_to_weight(key)))
    if keys:
        yield UNEXPECTED_TENSOR.at(keys, f"{len(keys)} {UNEXPECTED_TENSOR.title}")


WRONG_SHAPE = Rule(
    id="wrong-shape",
    title="tensors have other shapes than their parameters",
    severity="error",
    consequence="transformers refuses to load",
    fix="correct the config, or export again",
    source="core_model_loading.py set_param_for_module",
)


@RULES.add(WRONG_SHAPE)
def shapes(s: Subject) -> Iterator[Finding]:
    """core_model_loading.py `set_param_for_module`: a mismatch raises unless `ignore_mismatched_sizes`."""
    wrong = common_rules.of_other_shape(s, experts=False)
    wrong += [key for key, (parameter, part) in s.places.items() if _too_many(s, parameter, part)]
    if wrong:
        yield WRONG_SHAPE.at(wrong, f"{len(wrong)} {WRONG_SHAPE.title}")


def _too_many(s: Subject, parameter: str, part: Part) -> bool:
    """The weight of an expert beyond those that the class has: all are stacked (core_model_loading.py)."""
    shape = s.model.shapes[parameter] if s.model is not None else ()
    return part[:1] == ("converter",) and "*" in str(part[1]) and len(shape) == 3 and part[3] >= shape[0]


TIE_NOT_CONFIRMED = Rule(
    id="tie-not-confirmed",
    title="names of a declared tie hold other bytes than its canonical name",
    when="any other dtypes",
    severity="warning",
    consequence="transformers declines the tie and loads each",
    fix="if they are meant to differ, rewrite --on-mismatch keep --fix-config makes config.json say what is stored",
    source=f"{MODELING} PreTrainedModel.tie_weights",
)
TIE_OF_FLOAT8 = Rule(
    id="tie-not-confirmed",
    title=TIE_NOT_CONFIRMED.title,
    when="one is FP8 and the other is not, of a quantizer that leaves it so",
    severity="error",
    consequence="the load fails where transformers compares them: torch promotes no FP8 type to another",
    fix="rewrite --on-mismatch keep --fix-config makes config.json say that they are not tied",
    source=f"{MODELING} PreTrainedModel.tie_weights; torch.equal",
)
DUPLICATE_NAMES = Rule(
    id="duplicate-names",
    title="names of a declared tie are stored more than once",
    when="torchao packed none of them",
    severity="warning",
    consequence="transformers ties them; disk and loading time are wasted",
    fix="rewrite keeps one of each",
    fixed_by="rewrite",
    source=f"{MODELING} PreTrainedModel.tie_weights",
)


TORCHAO = "torchao packed one of them"
TIE_OF_TORCHAO = replace(
    TIE_OF_FLOAT8,
    when=TORCHAO,
    consequence="the load fails where transformers compares them: torchao's tensors have no torch.equal",
)
DUPLICATE_OF_TORCHAO = replace(DUPLICATE_NAMES, when=TORCHAO, severity="error", consequence=TIE_OF_TORCHAO.consequence)


@RULES.add(TIE_NOT_CONFIRMED, TIE_OF_FLOAT8, TIE_OF_TORCHAO, DUPLICATE_NAMES, DUPLICATE_OF_TORCHAO)
def ties(s: Subject) -> Iterator[Finding]:
    """modeling_utils.py `PreTrainedModel.tie_weights`: a declared tie whose sides are both there and differ is
    declined, and both are kept.
    """
    sides: dict[str, list[str]] = {}
    for key, (parameter, part) in s.places.items():
        if part == WHOLE:
            sides.setdefault(s.canonical.get(parameter, parameter), []).append(key)
    leads = {root: next((k for k in keys if s.places[k][0] == root), keys[0]) for root, keys in sides.items()}
    pairs = [(leads[root], key) for root, keys in sides.items() for key in keys if key != leads[root]]
    pairs.sort(key=lambda pair: s.entries[pair[0]].nbytes)
    verdicts = s.equal((s.entries[lead], s.entries[key]) for lead, key in pairs)
    found: dict[Rule, dict[str, None]] = {}
    for pair, verdict in zip(pairs, verdicts, strict=True):
        if verdict is not False:
            torchao = any(_packed_by_torchao(s, key) for key in pair)
            found.setdefault(DUPLICATE_OF_TORCHAO if torchao else DUPLICATE_NAMES, {}).update(dict.fromkeys(pair))
        else:
            found.setdefault(_rule_of_a_refuted_tie(s, *pair), {})[pair[1]] = None
    for rule in (TIE_OF_FLOAT8, TIE_OF_TORCHAO, TIE_NOT_CONFIRMED):
        if keys := found.get(rule):
            when = "" if rule is TIE_NOT_CONFIRMED else f": {rule.when}"
            yield rule.at(keys, f"{len(keys)} {rule.title}{when}")
    for rule in (DUPLICATE_NAMES, DUPLICATE_OF_TORCHAO):
        if keys := found.get(rule):
            yield rule.at(keys, f"{len(keys)} names of declared ties, stored more than once")


def _rule_of_a_refuted_tie(s: Subject, one: str, other: str) -> Rule:
    if _packed_by_torchao(s, one) or _packed_by_torchao(s, other):
        return TIE_OF_TORCHAO
    if quant_method_of(s.config) in FLOAT8_STAYS and _cannot_be_compared(s, one, other):
        return TIE_OF_FLOAT8
    return TIE_NOT_CONFIRMED


def _packed_by_torchao(s: Subject, key: str) -> bool:
    """Whether a tensor of torchao's is made of it (0.18: none of its types implements `aten.equal`)."""
    packed = key.rpartition(".")[2] != s.places[key][0].rpartition(".")[2]
    return packed and quant_method_of(s.config) == "torchao"


def _cannot_be_compared(s: Subject, one: str, other: str) -> bool:
    """Whether torch.equal raises for two tensors: of one shape, and one of them FP8."""
    a, b = s.entries[one], s.entries[other]
    return a.shape == b.shape and a.dtype != b.dtype and any(e.dtype.startswith("F8_") for e in (a, b))
