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
from tierewrite.tables import count, some
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
    fixed_by="rewrite --kv-scales merge",
)
SIDES = replace(
    SIDES_KV,
    when="tensors that are not tied, one for each side",
    fix="a single backbone cannot represent both: choose one side's values, and store them for the other too",
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
    if meeting and not s.known:
        names = [key for keys in meeting for key in keys]
        s.notes.append(f"names that are one parameter in transformers may be several in vLLM's class: {some(names)}")
        return
    # Scales first: where they differ, the weights need not be read.
    meeting.sort(key=lambda keys: max(s.entries[k].nbytes for k in keys))
    verdicts = s.equal(tuple(s.entries[k] for k in keys) for keys in meeting)
    by_rule: dict[Rule, list[list[str]]] = {}
    for keys, equal in zip(meeting, verdicts, strict=True):
        rule = _of_names(s, keys, equal)
        if rule is not None:
            by_rule.setdefault(rule, []).append(keys)
    for rule, several in by_rule.items():
        names = [key for keys in several for key in keys]
        said = {DUPLICATE_NAMES: ", with equal bytes", NOT_COMPARED: "; they are too large to be compared here"}
        what = said.get(rule, f": {rule.when}")
        yield rule.at(names, f"{len(names):,} names are read into {count(len(several), 'parameter')}{what}")


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


EXPERT_MISSING = Rule(
    id="expert-missing",
    title="experts have no weight at all",
    severity="error",
    consequence="vLLM does not notice: uninitialised memory is used",
    fix="export again, or copy them from a complete checkpoint",
    source=f"{DEFAULT_LOADER} DefaultModelLoader.load_weights",
    decided_by_loader=True,
)
SHARD_MISSING = replace(
    EXPERT_MISSING,
    id="fused-shard-missing",
    title="shards of fused projections are missing while others are there",
)
PARAMETER_MISSING = replace(
    EXPERT_MISSING,
    id="parameter-missing",
    title="parameters are filled by no key",
    when="the checkpoint is quantized, or they are of a kind that could be",
)
NORM_MISSING = replace(
    PARAMETER_MISSING,
    when="the checkpoint is not quantized, and they are of a kind that never is (norms)",
    consequence="vLLM refuses to load",
)


@RULES.add(EXPERT_MISSING, SHARD_MISSING, PARAMETER_MISSING, NORM_MISSING)
def missing_parameters(s: VllmSubject) -> Iterator[Finding]:
    """model_loader/default_loader.py `load_weights`: only modules of unquantized models that have no
    `process_weights_after_loading` are tracked; layers/fused_moe and layers/linear.py create parameters with
    torch.empty, and one shard or expert that comes is enough.
    """
    plain, shards, experts = common_rules.missing_parameters(s)
    if not s.known and (plain or shards or experts):
        count = len(plain) + len(shards) + len(experts)
        s.notes.append(
            f"{count} parameters of transformers' class are not stored; whether vLLM reads them is not known"
        )
        return
    tracked = [name for name in plain if s.quantization is None and _is_norm(s, name)]
    untracked = [name for name in plain if name not in set(tracked)]
    rules = (EXPERT_MISSING, SHARD_MISSING, PARAMETER_MISSING, NORM_MISSING)
    for rule, names in zip(rules, (experts, shards, untracked, tracked), strict=True):
        if names:
            yield rule.at(names, f"{len(names)} {rule.title}")


def _is_norm(s: VllmSubject, name: str) -> bool:
    """vLLM has it in a module that no quantization concerns."""
    if s.facts is None or s.facts.module(name) is None:
        return "norm" in name.rpartition(".")[0].rpartition(".")[2]
    return s.facts.kind(s.facts.module(name) or "") is None


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
    fix="if the head is meant, rewrite --on-mismatch keep --fix-config makes config.json say so; else remove it",
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
