"""What vLLM demands of names: one tensor a parameter, one parameter a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tierewrite import formats
from tierewrite.consumers import common_rules
from tierewrite.consumers.findings import Finding
from tierewrite.consumers.rules import Rule, RuleSet
from tierewrite.consumers.vllm.sources import DEFAULT_LOADER, MODEL_UTILS, REWRITE
from tierewrite.consumers.vllm.subject import VllmSubject
from tierewrite.formats import Role
from tierewrite.source.table import TensorEntry
from tierewrite.ties.on_disk import WHOLE

RULES: RuleSet[VllmSubject] = RuleSet()

NAME_CONFLICT = Rule(
    id="name-conflict",
    title="tied names that become one parameter hold different bytes",
    when="activation scales that were calibrated per side",
    severity="error",
    consequence="the one that is read last wins, without a warning; another sharding has another winner",
    fix="rewrite merges them into one that covers all sides",
    fixed_by=REWRITE,
    source=f"{MODEL_UTILS} AutoWeightsLoader",
)
NAME_CONFLICT_WEIGHTS = replace(
    NAME_CONFLICT,
    when="tied weights, or scales computed from them, with different bytes",
    fix="the tie is not what the checkpoint holds; export again",
    fixed_by=None,
)
SIDES_KV = replace(
    NAME_CONFLICT,
    id="per-side-conflict",
    title="what every side has of its own becomes one parameter",
    when="KV-cache scales of the sides",
    fix="rewrite --kv-scales merge keeps the larger range",
)
SIDES = replace(
    SIDES_KV,
    when="tensors that are not tied, one a side",
    fix="a single backbone cannot represent both: choose one side's values",
    fixed_by=None,
)
DUPLICATE_NAMES = Rule(
    id="duplicate-names",
    title="one parameter is stored under several names",
    when="the bytes are equal",
    severity="warning",
    consequence="both are read; disk and loading time are wasted",
    fix="rewrite keeps one of each",
    fixed_by=REWRITE,
    source=f"{MODEL_UTILS} AutoWeightsLoader",
)
NOT_COMPARED = replace(
    DUPLICATE_NAMES,
    when="they are too large to be compared by a check",
    consequence="if they differ, the one that is read last wins",
    fix="rewrite compares them and keeps one of each",
)


@RULES.add(NAME_CONFLICT, NAME_CONFLICT_WEIGHTS, SIDES_KV, SIDES, DUPLICATE_NAMES, NOT_COMPARED)
def names_that_meet(s: VllmSubject) -> Iterator[Finding]:
    """models/utils.py `WeightsMapper`, `AutoWeightsLoader.load_weights`: names that are mapped to one parameter are
    loaded one after the other, in the order of files and of names; the last one stays.
    """
    meeting = s.meeting()
    # Scales first: where they differ, the weights need not be read.
    meeting.sort(key=lambda keys: max(s.entries[k].nbytes for k in keys))
    verdicts = s.equal(tuple(s.entries[k] for k in keys) for keys in meeting)
    by_rule: dict[Rule, list[str]] = {}
    for keys, equal in zip(meeting, verdicts, strict=True):
        rule = _of_names(s, keys, equal)
        if rule is not None:
            by_rule.setdefault(rule, []).extend(keys)
    for rule, names in by_rule.items():
        what = {DUPLICATE_NAMES: ", with equal bytes", NOT_COMPARED: "; they are too large to be compared here"}
        yield rule.at(names, f"{len(names)} names meet in one parameter each{what.get(rule, f': {rule.when}')}")


def _of_names(s: VllmSubject, keys: list[str], equal: bool | None) -> Rule | None:
    """The rule that keys of one parameter break; `equal` is None where their bytes were not compared."""
    tied, kv = _tied(s, keys), _is_kv(s, keys[0])
    if equal is None:
        return NOT_COMPARED
    if equal:
        return DUPLICATE_NAMES if tied and not kv else None  # what is not tied belongs to every side
    if kv:
        return SIDES_KV
    if not tied:
        return SIDES
    return NAME_CONFLICT if _role(s, keys[0]) is Role.ACTIVATION else NAME_CONFLICT_WEIGHTS


def _is_kv(s: VllmSubject, key: str) -> bool:
    return (formats.kv_scale(key, s.families) or formats.kv_scale(key)) is not None


def _tied(s: VllmSubject, keys: list[str]) -> bool:
    """The keys are (companions of) sides of one declared tie."""
    parameters = {s.canonical.get(p, p) for p in (_parameter(s, k) for k in keys) if p is not None}
    return len(parameters) == 1


def _parameter(s: VllmSubject, key: str) -> str | None:
    """The parameter in memory that a key is, or is a companion of."""
    place = s.places.get(key)
    if place is None:
        module = key.rpartition(".")[0]
        place = next((s.places[k] for w in ("weight", "weight_packed") if (k := f"{module}.{w}") in s.places), None)
    return None if place is None else place[0]


def _role(s: VllmSubject, key: str) -> Role | None:
    found = formats.classify("weight", key.rpartition(".")[2], s.families)
    return None if found is None else found.role


UNNOTICED = "vLLM does not notice: uninitialised memory is used"
REFUSED = "vLLM refuses an unquantized checkpoint that is incomplete"
EXPERT_MISSING = Rule(
    id="expert-missing",
    title="experts have no weight at all",
    when="the checkpoint is quantized",
    severity="error",
    consequence=UNNOTICED,
    fix="export again, or copy them from a complete checkpoint",
    source=f"{DEFAULT_LOADER} DefaultModelLoader.load_weights",
    decided_by_loader=True,
)
INCOMPLETE = (
    EXPERT_MISSING,
    replace(
        EXPERT_MISSING,
        id="fused-shard-missing",
        title="shards of fused projections are missing while others are there",
    ),
    replace(EXPERT_MISSING, id="parameter-missing", title="parameters are filled by no key"),
)
"""What `Subject.missing` lists, the last first."""
INCOMPLETE_PLAIN = tuple(
    replace(rule, when="the checkpoint is not quantized", consequence=REFUSED) for rule in INCOMPLETE
)


@RULES.add(*INCOMPLETE, *INCOMPLETE_PLAIN)
def missing_parameters(s: VllmSubject) -> Iterator[Finding]:
    """model_loader/default_loader.py `load_weights`: only unquantized models are tracked; layers/fused_moe and
    layers/linear.py create parameters with torch.empty, and one shard or expert that comes is enough.
    """
    plain, shards, experts = common_rules.missing_parameters(s)
    rules = INCOMPLETE_PLAIN if s.quantization is None else INCOMPLETE
    for rule, names in zip(rules, (experts, shards, plain), strict=True):
        if names:
            yield rule.at(names, f"{len(names)} {rule.title}")


UNEXPECTED_TENSOR = Rule(
    id="unexpected-tensor",
    title="tensors belong to no parameter",
    severity="error",
    consequence="the load aborts at the first of them",
    fix="export again, or remove them from the files",
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


@RULES.add(UNEXPECTED_TENSOR, IGNORED_TENSOR)
def unexpected_tensors(s: VllmSubject) -> Iterator[Finding]:
    """models/utils.py `AutoWeightsLoader._load_module` ("There is no module or parameter named"), `_load_param`
    (nested weight); fused_moe/routed_experts.py `load_weights` (AttributeError). Not an error there: `.bias`,
    `*.g_idx`, rotary tables, KV scales of modules without attention, experts beyond the last.
    """
    if s.model is None:
        return
    unexpected: list[str] = []
    ignored: list[str] = []
    beyond: list[str] = []
    for key in s.entries:
        if key in s.places:
            if _beyond_the_last_expert(s, key):
                beyond.append(key)
            continue
        mapped = s.backbone.map(key)
        module, _, leaf = mapped.rpartition(".")
        owner = s.modules.get(module)
        weight = owner.weight if owner is not None else None
        if leaf == "bias":
            ignored.append(key)
        elif s.backbone.passes_over(mapped) or _is_kv(s, key):
            continue  # tables that are computed anyway are no loss
        elif weight is not None and weight in s.places and _beyond_the_last_expert(s, weight):
            beyond.append(key)
        elif owner is not None and (weight is None or weight in s.places) and _known_leaf(s, module, leaf):
            continue  # where the weight itself is missing, that is another rule's finding
        else:
            unexpected.append(key)
    if unexpected:
        yield UNEXPECTED_TENSOR.at(unexpected, f"{len(unexpected)} {UNEXPECTED_TENSOR.title}")
    if ignored or beyond:
        yield IGNORED_TENSOR.at((*ignored, *beyond), f"{len(ignored) + len(beyond)} {IGNORED_TENSOR.title}")


def _beyond_the_last_expert(s: VllmSubject, key: str) -> bool:
    """The key is an expert's weight, of a higher number than the model has."""
    parameter, part = s.places[key]
    return s.model is not None and bool(part) and part[0] == "expert" and part[3] >= s.model.shapes[parameter][0]


def _known_leaf(s: VllmSubject, module: str, leaf: str) -> bool:
    """vLLM has a parameter for this companion, or another rule reports it."""
    if leaf in ("weight", "weight_packed"):
        return True
    scheme = s.scheme
    if scheme is None or s.declared_otherwise or s.never_quantized(module):
        # Without a scheme nothing can be said of a companion that some format knows.
        return formats.classify("weight", leaf) is not None
    return leaf in scheme.leaves


HEAD_STORED = Rule(
    id="lm-head-stored",
    title="the config ties lm_head, and the checkpoint stores it",
    when="with the embedding's bytes",
    severity="warning",
    consequence="vLLM unties the head and uses the stored one; memory is wasted",
    fix="rewrite drops it",
    fixed_by=REWRITE,
    source="config/model.py ModelConfig.maybe_untie_word_embeddings",
)
HEAD_DIFFERS = replace(
    HEAD_STORED,
    when="with other bytes",
    consequence="vLLM unties the head and uses the stored one",
    fix="set tie_word_embeddings to false if the head is meant, or remove it",
    fixed_by=None,
)


@RULES.add(HEAD_STORED, HEAD_DIFFERS)
def stored_tied_head(s: VllmSubject) -> Iterator[Finding]:
    """config/model.py `maybe_untie_word_embeddings`; model_loader/weight_tying.py `maybe_retie_word_embeddings`."""
    for alias, canonical in s.canonical.items():
        head = s.entries.get(alias)
        if head is None or not alias.endswith("lm_head.weight"):
            continue
        embedding = _entry_of(s, canonical)
        differs = embedding is not None and next(s.equal([(head, embedding)])) is False
        found = f"the config ties lm_head to '{canonical}', and the checkpoint stores it"
        if differs:
            yield HEAD_DIFFERS.at((alias,), f"{found} with other bytes")
        else:
            yield HEAD_STORED.at((alias,), f"{found} too")


def _entry_of(s: VllmSubject, parameter: str) -> TensorEntry | None:
    """The tensor that fills a parameter, under whichever of its tied names it is stored."""
    root = s.canonical.get(parameter, parameter)
    for key, (found, part) in s.places.items():
        if part == WHOLE and s.canonical.get(found, found) == root and not key.endswith("lm_head.weight"):
            return s.entries[key]
    return None
