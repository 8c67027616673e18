"""What vLLM does with tensors that it has no parameter for, and with names that are not those of its class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tierewrite import formats
from tierewrite.consumers.findings import Finding
from tierewrite.consumers.rules import Rule, RuleSet
from tierewrite.consumers.vllm.sources import MODEL_UTILS
from tierewrite.consumers.vllm.subject import MTP_MODULES, VllmSubject

RULES: RuleSet[VllmSubject] = RuleSet()

# Tables that older versions of transformers stored.
BUFFERS = ("inv_freq", "masked_bias", "attn_bias", "bias", "position_ids", "cos_cached", "sin_cached")

UNEXPECTED_TENSOR = Rule(
    id="unexpected-tensor",
    title="tensors belong to no parameter",
    severity="error",
    consequence="the load aborts at the first of them",
    fix="export again",
    source=f"{MODEL_UTILS} AutoWeightsLoader._load_module",
    decided_by_loader=True,
)
IGNORED_TENSOR = Rule(
    id="ignored-tensor",
    title="tensors that vLLM has no use for (biases, experts beyond the config's number)",
    severity="warning",
    consequence="vLLM passes over them without a warning",
    fix="if they matter, the config is wrong",
    source=f"{MODEL_UTILS} AutoWeightsLoader.load_weights",
    decided_by_loader=True,
)
OTHER_NAMES = Rule(
    id="names-not-read",
    title="tensors have names that transformers reads and vLLM's class does not",
    when="it refuses them",
    severity="error",
    consequence="the load aborts at the first of them",
    fix="give them the names of the model's original checkpoint",
    source=f"{MODEL_UTILS} AutoWeightsLoader._load_module",
    decided_by_loader=True,
)
PASSED_OVER = Rule(
    id=OTHER_NAMES.id,
    title=OTHER_NAMES.title,
    when="it passes over them",
    severity="error",
    consequence="vLLM does not notice: uninitialised memory is used for their parameters",
    fix=OTHER_NAMES.fix,
    source=f"{MODEL_UTILS} AutoWeightsLoader.load_weights",
    decided_by_loader=True,
)


@dataclass
class Unread:
    """Keys by what becomes of them."""

    other_names: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    not_known: list[str] = field(default_factory=list)


@RULES.add(UNEXPECTED_TENSOR, IGNORED_TENSOR, OTHER_NAMES, PASSED_OVER)
def unread_tensors(s: VllmSubject) -> Iterator[Finding]:
    """models/utils.py `AutoWeightsLoader._load_module` ("There is no module or parameter named"), `_load_param`
    (nested weight); fused_moe/routed_experts.py `load_weights` (AttributeError). Not an error there: `.bias`,
    `*.g_idx`, rotary tables, KV scales of modules without attention, experts beyond the last. What a class does with
    names that are not its own was seen by giving it such names (vllm/classes.json).
    """
    found = Unread()
    for key in s.entries:
        list_of = _place_of(s, found, key)
        if list_of is not None:
            list_of.append(key)
    for rule, keys in (
        (OTHER_NAMES, found.other_names),
        (PASSED_OVER, found.passed_over),
        (UNEXPECTED_TENSOR, found.unexpected),
        (IGNORED_TENSOR, found.ignored),
    ):
        if keys:
            yield rule.at(keys, f"{len(keys)} {rule.title}")
    if found.not_known:
        named = ", ".join(found.not_known[:3]) + (", ..." if len(found.not_known) > 3 else "")
        s.notes.append(
            f"{len(found.not_known)} tensors were not checked, since it is not known what vLLM does: {named}"
        )


def _place_of(s: VllmSubject, found: Unread, key: str) -> list[str] | None:
    """The list that the key belongs in; None where vLLM reads it, or where its module's weight tells."""
    unquantized = formats.main_parameter(key) or key
    what = None if s.facts is None else s.facts.what(unquantized)
    if key in s.places:
        if _beyond_the_last_expert(s, key):
            return found.ignored
        if what == "refused" or (what is None and _prefixed_once_more(s, unquantized)):
            return found.other_names
        return found.passed_over if what == "ignored" and s.places[key][1] else None
    if (s.model is None and what is None) or key in s.in_unknown_format:
        return None
    if key in s.mtp_keys and not s.backbone.passes_over(s.backbone.map(key)):
        return _of_mtp(s, found, key)
    if what == "reads":
        if s.model is None or s.shares_kv:
            return None
        return _of_odd(s, found, key, in_layer=True) if s.beyond_its_stack(key) else found.not_known
    if key.endswith(".bias") and what != "refused" and len(s.entries[key].shape) < 2:
        return found.ignored if s.known else found.not_known
    if what == "ignored" or s.backbone.passes_over(s.backbone.map(key)):
        return None  # tables that are computed anyway are no loss
    return _unplaced(s, found, key, what == "refused")


def _prefixed_once_more(s: VllmSubject, name: str) -> bool:
    """The name is one that the class reads, with the base model's prefix before it, as a trainer's module leaves it."""
    prefix = f"{s.model.base_model_prefix}." if s.model is not None and s.model.base_model_prefix else ""
    if not prefix or not name.startswith(prefix) or s.facts is None or s.facts.odd.get("unknown") != "refused":
        return False
    bare = name.removeprefix(prefix)
    return s.facts.what(bare) == "reads" and s.facts.map(bare) != s.facts.map(name)


def _of_mtp(s: VllmSubject, found: Unread, key: str) -> list[str] | None:
    """Layers for multi-token prediction, which the main model skips and speculative decoding reads."""
    if s.facts is None:
        return found.unexpected if s.known else found.not_known
    below_mtp = key.split(".", 1)[0] in MTP_MODULES
    what = s.facts.odd.get("mtp" if below_mtp else "beyond layer")
    if not below_mtp and what != "refused" and not s.of_declared_mtp(key):
        what = s.facts.odd.get("unknown in a layer")  # the class counts the layers that config.json declares
    if what is None:
        return found.not_known
    return None if what != "refused" else found.unexpected


def _unplaced(s: VllmSubject, found: Unread, key: str, refused: bool) -> list[str] | None:
    """Of a key that transformers has no place for and that is not known by its name."""
    mapped = s.backbone.map(key)
    module, _, leaf = mapped.rpartition(".")
    owner = s.modules.get(module)
    weight = owner.weight if owner is not None else None
    part = formats.part_of_weight(key)
    if s.quantization is not None and s.scheme is None and part is not None and part[0] in s.places:
        return None  # such as bitsandbytes' `weight.nested_absmax`: its own loader reads it
    if formats.kv_scale(key, s.families) or formats.kv_scale(key):
        return found.unexpected if _kv_scale_without_config(s, key) else None
    if leaf in BUFFERS and s.facts is not None:
        what = s.facts.odd.get(f"buffer {leaf}") or s.facts.odd.get(f"buffer rotary_emb.{leaf}")
        return None if what in ("ignored", "reads") else found.unexpected if what == "refused" else found.not_known
    if weight is not None and weight in s.places and _beyond_the_last_expert(s, weight):
        return found.ignored
    if (
        owner is not None
        and (weight is None or weight in s.places or _reads(s, weight))
        and _known_leaf(s, module, leaf)
    ):
        return None  # where the weight itself is missing, that is another rule's finding
    if formats.fused_parameters(key) and any(_reads(s, owner) for owner in formats.fused_parameters(key)):
        return None
    if s.facts is None:
        return found.unexpected if s.known and s.model is not None else found.not_known
    if refused:
        return found.unexpected
    in_layer = s.facts.what(key) is None and any(part.isdecimal() for part in key.split("."))
    return _of_odd(s, found, key, in_layer=in_layer)


def _kv_scale_without_config(s: VllmSubject, key: str) -> bool:
    """Without a quantization config attention has no scales: a class that reads them otherwise looks for the name as it
    is (model_loader/weight_utils.py `maybe_remap_kv_scale_name`).
    """
    if s.quantization is not None or s.facts is None or s.facts.odd.get("unknown in a layer") != "refused":
        return False
    return s.facts.odd.get("kv k_proj.k_scale") == "reads"


def _of_odd(s: VllmSubject, found: Unread, key: str, *, in_layer: bool) -> list[str]:
    """By what the class does with a name that it cannot know."""
    assert s.facts is not None
    leftover = key.rpartition(".")[2] == "pre_quant_scale" or "quantizer" in key
    what = s.facts.odd.get("leftover" if leftover else "unknown in a layer" if in_layer else "unknown")
    return {"refused": found.unexpected, "ignored": found.ignored}.get(what or "", found.not_known)


def _reads(s: VllmSubject, key: str) -> bool:
    return s.facts is not None and s.facts.what(formats.main_parameter(key) or key) == "reads"


def _beyond_the_last_expert(s: VllmSubject, key: str) -> bool:
    """The key is an expert's weight, of a higher number than the model has."""
    parameter, part = s.places[key]
    shape = s.model.shapes[parameter] if s.model is not None else ()
    return bool(part) and part[0] in ("expert", "converter") and len(shape) == 3 and part[3] >= shape[0]


def _known_leaf(s: VllmSubject, module: str, leaf: str) -> bool:
    """vLLM has a parameter for this companion, or another rule reports it."""
    if formats.is_main(leaf):
        return True
    scheme = s.scheme
    if scheme is None or s.declared_otherwise or s.never_quantized(module):
        # Without a scheme nothing can be said of a companion that some format knows.
        return formats.classify("weight", leaf) is not None
    return leaf in scheme.leaves
