"""What follows from what a consumer's own loader did: the rules for every consumer whose loader is asked.

Each consumer has records of its own, made here with its name; they see `Subject.loaded`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from tierewrite import formats
from tierewrite.consumers.expected_keys import ExpectedKeys, is_weight
from tierewrite.consumers.findings import Finding
from tierewrite.consumers.loaded import Cast, Rank, RefusedKey, Unfilled
from tierewrite.consumers.rules import Rule, RuleSet
from tierewrite.consumers.subject import FLOATS, Subject, numbers, rounded_to_e4m3
from tierewrite.formats.experts import expert_of
from tierewrite.formats.numbered import pattern_of
from tierewrite.tables import count

KV_LEAVES = frozenset(f"{of}_{what}" for of in ("q", "k", "v", "prob") for what in ("scale", "zero_point"))
"""Scales of the KV cache: loaders have a default for them, and rules of their own speak of those that are missing."""
_NO_PARAMETER = (
    "no module or parameter named", "has no parameter", "has no attribute", "keyerror", "unexpected key", "not found",
)  # fmt: skip
_SHAPES = ("assertionerror", "size", "shape", "dimension", "length", "indexerror", "tensor_model_parallel")
_NOT_INITIALISED = "not initialized"


_SAYS = "its own loader says so"
_SOURCE = "consumers/loader_process/dry_process.py loaded (the consumer's own loader)"
# "{0}" is the consumer's name.
REFUSED = Rule(
    id="loader-refuses",
    title="the checkpoint is refused before a tensor is read",
    when=_SAYS,
    severity="error",
    consequence="{0} does not load it",
    fix="correct the config that its words name, or export again",
    source=_SOURCE,
)
ABORTS = replace(
    REFUSED,
    id="load-aborts",
    title="the load is aborted",
    fix="export again; if a config is to blame, another finding names the entry",
)
UNEXPECTED = replace(
    ABORTS,
    id="unexpected-tensor",
    title="tensors belong to no parameter",
    when=f"plain tensors; {_SAYS}",
    consequence="the load aborts at the first of them",
    fix="export again under the names that its class reads; delete only what nothing needs",
)
UNEXPECTED_QUANTIZED = replace(
    UNEXPECTED,
    when=f"tensors of quantized modules; {_SAYS}",
    fix="export again, or correct the quantization config: it has to say which modules are quantized, and how",
)
WRONG_SHAPE = replace(
    UNEXPECTED,
    id="wrong-shape",
    title="tensors have other shapes than their parameters",
    when=f"the load aborts; {_SAYS}",
    fix="export again, or correct the config that says how large or how quantized the modules are",
)
SHORT = replace(
    WRONG_SHAPE,
    when=f"a part of the parameter is filled; {_SAYS}",
    consequence="{0} copies what there is and does not notice: the rest stays uninitialised",
    fix="export again",
)
MISSING = replace(
    REFUSED,
    id="parameter-missing",
    title="parameters are filled by no key",
    consequence="{0} does not notice: uninitialised memory is used",
    fix="export again, or copy them from a complete checkpoint",
)
SHARDS_MISSING = replace(
    MISSING, id="fused-shard-missing", title="shards of fused projections are missing while others are there"
)
EXPERTS_MISSING = replace(MISSING, id="expert-missing", title="experts have no weight at all")
SCALES_MISSING = replace(
    MISSING,
    id="scale-missing",
    title="scales are missing",
    when=f"any other scale; {_SAYS}",
    fix="calibrate and export again",
)
EXPERT_SCALES_MISSING = replace(
    SCALES_MISSING,
    when=f"input scales of experts; {_SAYS}",
    fix="rewrite --fill-missing-scales takes it from the tied side, else from the layer's other experts",
    fixed_by="rewrite --fill-missing-scales",
)
IGNORED = replace(
    REFUSED,
    id="ignored-tensor",
    title="tensors that {0} has no use for (biases, experts beyond the config's number)",
    severity="warning",
    consequence="{0} passes over them without a warning",
    fix="if they matter, the config is wrong",
)
LOSSY = replace(
    REFUSED,
    id="wrong-dtype",
    title="tensors have other dtypes than their parameters",
    when=f"values are lost; {_SAYS}",
    consequence="{0} converts them by value: other numbers come out",
    fix="export again",
)
LOSSLESS = replace(
    LOSSY,
    when=f"every value survives; {_SAYS}",
    severity="warning",
    consequence="{0} converts them by value; other consumers may not",
)


class _Rules:
    """The rules for one consumer.

    Args:
        title: the consumer's name as its makers write it.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.refused, self.failed, self.unexpected, self.unexpected_quantized, self.shape, self.short = map(
            self._named, (REFUSED, ABORTS, UNEXPECTED, UNEXPECTED_QUANTIZED, WRONG_SHAPE, SHORT)
        )
        self.missing, self.shards, self.experts, self.scales, self.expert_scales = map(
            self._named, (MISSING, SHARDS_MISSING, EXPERTS_MISSING, SCALES_MISSING, EXPERT_SCALES_MISSING)
        )
        self.ignored, self.lossy, self.lossless = map(self._named, (IGNORED, LOSSY, LOSSLESS))

    def _named(self, rule: Rule) -> Rule:
        title, consequence = (text.format(self.title) for text in (rule.title, rule.consequence))
        return replace(rule, title=title, consequence=consequence)

    def set(self) -> RuleSet[Subject]:
        """The rules, to be put into the consumer's record."""
        rules: RuleSet[Subject] = RuleSet()
        rules.add(self.refused)(self.refusal)
        rules.add(self.failed, self.unexpected, self.unexpected_quantized, self.shape)(self.refused_keys)
        rules.add(self.missing, self.shards, self.experts, self.scales, self.expert_scales, self.short)(self.unfilled)
        rules.add(self.ignored)(self.ignored_keys)
        rules.add(self.lossy, self.lossless)(self.casts)
        return rules

    def refusal(self, s: Subject) -> Iterator[Finding]:
        """The consumer refused the folder."""
        if s.loaded is not None and s.loaded.outcome == "refused":
            yield self.refused.at(("config.json",), f"{self.title} says: {_brief(s.loaded.reason)}")

    def refused_keys(self, s: Subject) -> Iterator[Finding]:
        """Keys at which the load is aborted, and what the consumer says after the last."""
        by_rule: dict[Rule, dict[str, RefusedKey]] = {}
        for rank in _ranks(s):
            for one in rank.refused:
                by_rule.setdefault(self._of_words(s, one), {}).setdefault(one.key, one)
        more = "" if all(rank.refused_all for rank in _ranks(s)) else " or more"
        for rule, keys in by_rule.items():
            said = next(iter(keys.values())).error
            yield rule.at(keys, f"{len(keys)}{more} {rule.title}; {self.title} says: {_brief(said)}")
        failed = dict.fromkeys(rank.failed for rank in _ranks(s) if rank.failed)
        for said in failed:
            if _NOT_INITIALISED not in said:
                yield self.failed.at(("*.safetensors",), f"after the last tensor {self.title} says: {_brief(said)}")

    def _of_words(self, s: Subject, one: RefusedKey) -> Rule:
        said = one.error.lower()
        if any(words in said for words in _NO_PARAMETER):
            return self.unexpected_quantized if _of_quantized(s, one.key) else self.unexpected
        return self.shape if any(words in said for words in _SHAPES) else self.failed

    def unfilled(self, s: Subject) -> Iterator[Finding]:
        """Parameters with elements that no key wrote."""
        found: dict[Rule, dict[str, Unfilled]] = {}
        refuses = any(rank.failed and _NOT_INITIALISED in rank.failed for rank in _ranks(s))
        for rank in _ranks(s):
            if not s.folder.absent and rank.refused_all:
                for rule, key, one in self._of_rank(s, rank):
                    found.setdefault(rule, {}).setdefault(key, one)
        for rule, keys in found.items():
            defaults = sum(one.initial == "default" for one in keys.values())
            finding = rule.at(keys, f"{len(keys)} {rule.title}")
            if refuses:
                finding = replace(finding, consequence=f"{self.title} refuses to load")
            elif defaults == len(keys):
                finding = replace(finding, consequence=f"{self.title} does not notice: initial values stay")
            yield finding

    def _of_rank(self, s: Subject, rank: Rank) -> Iterator[tuple[Rule, str, Unfilled]]:
        """What is missing on one rank, by the key that would have filled it, or the parameter where none is known."""
        expected = ExpectedKeys(rank)
        lacking = [one for one in rank.unfilled if _matters(expected, one)]
        gone = _whole_experts(lacking, expected)
        shapes = _common_shapes(s) if lacking else {}
        for one in lacking:
            keys = expected.of(one)
            rule = self._of_unfilled(expected, one)
            if rank.refused:  # the others are missing because the load had to go without those
                keys = tuple(key for key in keys if key not in s.entries)
            elif not keys:
                wrote = rank.written.get(one.parameter, ())
                keys = tuple(key for key in wrote if _shape_of(s, key) != shapes.get(pattern_of(key)))
                rule = self.short if keys else rule
                keys = keys or (one.parameter,)
            for key in keys:
                expert = expert_of(key)
                if rule in (self.missing, self.shards) and expert is not None and expert in gone:
                    yield self.experts, expert, one
                else:
                    yield rule, key, one

    def _of_unfilled(self, expected: ExpectedKeys, one: Unfilled) -> Rule:
        if expected.is_scale(one.parameter):
            leaf = one.parameter.rpartition(".")[2]
            of_expert = "experts" in one.parameter and leaf.endswith(("input_scale", "input_global_scale"))
            return self.expert_scales if of_expert else self.scales
        fused = one.parameter in expected.rank.written and one.missing < one.elements
        by_row = "experts" in one.parameter and len(one.rows) > 0 and one.missing % len(one.rows) == 0
        whole_rows = by_row and one.missing == len(one.rows) * (one.elements // max(one.shape[0], 1))
        return self.shards if fused and not whole_rows else self.missing

    def ignored_keys(self, s: Subject) -> Iterator[Finding]:
        """Keys that wrote nothing: no rank has a use for them."""
        ranks = _ranks(s)
        if not ranks:
            return
        ignored = set(ranks[0].ignored).intersection(*(rank.ignored for rank in ranks[1:]))
        used = {container for rank in ranks for key in rank.parameters_of if (container := _container(key))}
        modules = {key.rpartition(".")[0] for rank in ranks for key in rank.parameters_of}
        odd = [
            key
            for key in s.entries
            if key in ignored
            and (_container(key) in used or (key.endswith(".bias") and key.removesuffix(".bias") in modules))
        ]
        if odd:
            yield self.ignored.at(odd, f"{len(odd)} {self.ignored.title}")
        others = len(ignored) - len(odd)
        if others:
            example = next(key for key in ranks[0].ignored if key in ignored and key not in set(odd))
            unused = f"{count(others, 'tensor')} that it does not use, such as '{example}'"
            s.notes.append(f"{self.title} reads {unused}; other consumers may")
        unknown = sorted({name for rank in ranks for name in rank.unknown})
        if unknown:
            s.notes.append(
                f"what fills {len(unknown)} of {self.title}'s parameters could not be followed, such as '{unknown[0]}'"
            )

    def casts(self, s: Subject) -> Iterator[Finding]:
        """Keys whose values were converted to another dtype."""
        lossy: dict[str, None] = {}
        lossless: dict[str, None] = {}
        read: dict[str, None] = {}
        for one in {(c.key, c.found, c.wanted): c for rank in _ranks(s) for c in rank.casts}.values():
            if one.key not in s.entries:
                continue
            kind = _kind_of_cast(s, one)
            if kind == "read":
                read[one.key] = None
            elif kind is not None:
                (lossy if kind == "lossy" else lossless)[one.key] = None
        for key, data in s.read(read):
            exact = bool(rounded_to_e4m3(numbers(s.entries[key].dtype, data)).all())
            (lossless if exact else lossy)[key] = None
        if lossy:
            yield self.lossy.at(lossy, f"{len(lossy)} tensors have dtypes that their parameters do not")
        if lossless:
            found = f"{len(lossless)} {self.lossless.title}; the values survive the conversion"
            yield self.lossless.at(lossless, found)


def loader_rules(title: str) -> RuleSet[Subject]:
    """The rules for the consumer that its makers call `title`."""
    return _Rules(title).set()


def _ranks(s: Subject) -> tuple[Rank, ...]:
    return s.loaded.ranks if s.loaded is not None else ()


def _matters(expected: ExpectedKeys, one: Unfilled) -> bool:
    """Somebody reads the parameter, and a checkpoint is to fill it.

    A buffer with a value of its own is a table that the class computes, unless keys fill its like in other layers.
    """
    if one.initial == "unused" or (one.initial == "default" and one.parameter.rpartition(".")[2] in KV_LEAVES):
        return False
    return not (one.buffer and one.initial == "default" and not expected.has_like(one))


def _container(key: str) -> str:
    """The experts among which a key's is; "" where it is none's."""
    return (expert_of(key) or "").rpartition(".")[0]


def _whole_experts(lacking: list[Unfilled], expected: ExpectedKeys) -> set[str]:
    """Experts of which no weight is there."""
    weights = [key for one in lacking if is_weight(one.parameter.rpartition(".")[2]) for key in expected.of(one)]
    candidates = {expert for key in weights if (expert := expert_of(key))}
    there = {expert_of(key) for keys in expected.rank.written.values() for key in keys}
    return candidates - there


def _brief(said: str) -> str:
    """The beginning of a consumer's words, in one line."""
    text = " ".join(said.split(". The available")[0].split())
    return text if len(text) <= 240 else f"{text[:240]}..."


def _shape_of(s: Subject, key: str) -> tuple[int, ...] | None:
    entry = s.entries.get(key)
    return None if entry is None else entry.shape


def _common_shapes(s: Subject) -> dict[str, tuple[int, ...]]:
    """The shape that most tensors of a name have, whatever its numbers."""
    found: dict[str, Counter[tuple[int, ...]]] = {}
    for key, entry in s.entries.items():
        found.setdefault(pattern_of(key), Counter())[entry.shape] += 1
    return {like: shapes.most_common(1)[0][0] for like, shapes in found.items()}


def _of_quantized(s: Subject, key: str) -> bool:
    """The key is a part of a module that is quantized on disk."""
    module, _, leaf = key.rpartition(".")
    part = formats.classify("weight", leaf)
    return (part is not None and part.role.quantizes) or s.backbone.map(module) in s.quantized


def _by_modelopt(s: Subject) -> bool:
    config = s.config.get("quantization_config")
    method = config.get("quant_method") if isinstance(config, dict) else None
    return bool(s.folder.quant_config) or str(method).startswith("modelopt")


def _odd_scale(s: Subject, one: Cast) -> bool:
    """A scale in another float than the others of its name. What an exporter writes throughout, it means."""
    leaf = one.key.rpartition(".")[2]
    part = formats.classify("weight", leaf)
    if part is None or formats.is_main(leaf) or leaf in KV_LEAVES:
        return False
    if _by_modelopt(s) and s.entries[one.key].shape in ((), (1,)):
        return one.found != "F32"  # so it writes scales of whole tensors
    usual = Counter(entry.dtype for key, entry in s.entries.items() if key.endswith(f".{leaf}")).most_common(1)
    return one.found != usual[0][0]


def _kind_of_cast(s: Subject, one: Cast) -> str | None:
    """What becomes of the values: "lossy", "lossless", "read" if the bytes have to tell; None where nobody minds."""
    both = {one.found, one.wanted}
    if both <= FLOATS:
        return "lossless" if _odd_scale(s, one) else None
    if both == {"I8", "U8"}:
        return "lossless"
    if one.found in FLOATS and one.wanted == "F8_E4M3":
        return "read"
    return "lossy"
