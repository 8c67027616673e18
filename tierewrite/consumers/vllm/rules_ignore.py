"""What vLLM demands of the list of modules that are not quantized."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tierewrite.consumers.findings import Finding
from tierewrite.consumers.rules import Rule, RuleSet
from tierewrite.consumers.vllm.quantization import Quantization
from tierewrite.consumers.vllm.sources import FOR_VLLM, MODELOPT, QUANTIZATION_UTILS, SCALES_OF_PLAIN
from tierewrite.consumers.vllm.subject import VllmSubject

RULES: RuleSet[VllmSubject] = RuleSet()

PARTLY_FUSED = Rule(
    id="ignore-partly-fused",
    title="the ignore list names some projections of one fused parameter, not all",
    when="all of them are quantized, or none",
    severity="error",
    consequence="vLLM refuses to load",
    fix="list all of them (those without a weight too) or none, as rewrite --for vllm does",
    fixed_by=FOR_VLLM,
    source=f"{QUANTIZATION_UTILS}/quant_utils.py is_layer_skipped",
)
PARTLY_QUANTIZED = replace(
    PARTLY_FUSED,
    when="only some of them are quantized",
    fix="quantize all of them or none; no list can say this",
    fixed_by=None,
)


@RULES.add(PARTLY_FUSED, PARTLY_QUANTIZED)
def ignore_partly_fused(s: VllmSubject) -> Iterator[Finding]:
    """utils/quant_utils.py `is_layer_skipped`: ValueError "some but not all shards"."""
    q = s.quantization
    if q is None:
        return
    for module in s.linear:
        named = s.ignore.partly(module)
        if named:
            parent, _, leaf = module.rpartition(".")
            others = [x for x in s.backbone.fused.get(leaf, ("others",)) if x not in named]
            plain = [n for n, m in s.linear[module].items() if n not in s.quantized and s.weight_of(m)]
            rule = PARTLY_QUANTIZED if 0 < len(plain) < len(s.linear[module]) else PARTLY_FUSED
            found = (
                f"'{parent}' is one parameter for {', '.join((*named, *others))}, and only {', '.join(named)} is listed"
            )
            yield rule.at((f"{q.ignore_path}: {parent}.{n}" for n in named), found)


EXPLAINED = {
    "ignore-everything": "after the mapping to one backbone the pattern covers everything",
    "ignore-one-expert": "an entry inside a layer's experts unquantizes all of them",
    "ignore-substring": "vLLM finds the pattern anywhere in a name",
    "ignore-side-conflict": "it was meant for one side, and both become one backbone",
    "ignored-but-quantized": "the patterns name them",
}
"""Id -> how patterns come to exclude modules that are quantized on disk."""
EXCLUDED = {
    which: Rule(
        id=which,
        title=f"ignore patterns exclude modules that are quantized on disk: {how}",
        when="each of the modules is quantized as a whole",
        severity="error",
        consequence=f"vLLM builds them unquantized; {SCALES_OF_PLAIN}",
        fix="take the patterns out, and list by name the unquantized modules that they stood for, as rewrite "
        "--for vllm does",
        fixed_by=FOR_VLLM,
        source=f"{MODELOPT} ModelOptQuantConfigBase.is_layer_excluded",
    )
    for which, how in EXPLAINED.items()
}
EXCLUDED_MIXED = {
    which: replace(
        rule,
        when="parts of one of the modules are quantized, and others are not",
        fix="make the experts of a layer all quantized or all plain; no list can say this",
        fixed_by=None,
    )
    for which, rule in EXCLUDED.items()
}


@RULES.add(*EXCLUDED.values(), *EXCLUDED_MIXED.values())
def ignored_but_quantized(s: VllmSubject) -> Iterator[Finding]:
    """modelopt.py `is_layer_excluded`, `apply_vllm_mapper`: entries of both sides are mapped to one backbone and
    merged, `X*` becomes `X` and `X.*`, and a bare entry matches as a substring.
    """
    q = s.quantization
    if q is None or not s.ignore.entries:
        return
    guilty: dict[tuple[str, int], list[str]] = {}
    quantized_linear = [n for n, parts in s.linear.items() if any(p in s.quantized for p in parts)]
    for module in quantized_linear:
        if s.ignore.partly(module):
            continue
        for number, kind in s.ignore.reasons(module).items():
            guilty.setdefault((kind, number), []).append(module)
    found: dict[str, list[tuple[int, list[str]]]] = {}
    for (kind, number), modules in guilty.items():
        found.setdefault(_how(s, q, kind, number), []).append((number, modules))
    for which, entries in found.items():
        modules = list(dict.fromkeys(m for _, ms in entries for m in ms))
        mixed = any(p not in s.quantized for m in modules for p in s.linear[m])
        rule = (EXCLUDED_MIXED if mixed else EXCLUDED)[which]
        yield rule.at(
            (*(f"{q.ignore_path}[{n}]: {q.ignore[n]}" for n, _ in entries), *modules),
            f"{len(entries)} ignore patterns exclude {len(modules)} modules that are quantized on disk"
            f" ({EXPLAINED[which]})",
        )


def _how(s: VllmSubject, q: Quantization, kind: str, number: int) -> str:
    """The id for the entry `number` that matches by `kind`."""
    if len(s.linear) > 1 and all(number in s.ignore.reasons(m) for m in s.linear):
        return "ignore-everything"
    if kind == "expert":
        return "ignore-one-expert"
    if kind == "substring":
        return "ignore-substring"
    return "ignore-side-conflict" if _one_sided(s, q.ignore[number]) else "ignored-but-quantized"


def _one_sided(s: VllmSubject, entry: str) -> bool:
    """The entry is spelled for one side, and no entry says the same for another side."""
    side = s.backbone.side(entry)
    if side is None or len(s.backbone.sides) < 2:
        return False
    rest = entry.removeprefix(side)
    return not any(f"{other}{rest}" in s.ignore.entries for other in s.backbone.sides if other != side)


UNLISTED_HEAD = Rule(
    id="unlisted-lm-head",
    title="lm_head is not quantized, and no ignore entry names it",
    when="any other format",
    severity="error",
    consequence="vLLM builds a quantized head without its scales; FP8's keep their initial values, without a warning",
    fix="add lm_head to the ignore list, as rewrite --for vllm does",
    fixed_by=FOR_VLLM,
    source=f"{MODELOPT} ModelOptQuantConfigBase.get_quant_method",
)
UNLISTED_NVFP4_HEAD = replace(
    UNLISTED_HEAD,
    when="NVFP4",
    consequence="vLLM builds a packed head and aborts: at its weight, or if that is tied at scales that are not there",
)
UNLISTED = Rule(
    id="unlisted-unquantized",
    title="unquantized weights of modules that the ignore list does not name",
    when="the whole module is unquantized",
    severity="error",
    consequence="vLLM builds packed parameters for them; the load aborts, or packs the numbers by value",
    fix="add the modules to the ignore list, as rewrite --for vllm does",
    fixed_by=FOR_VLLM,
    source=f"{MODELOPT} ModelOptQuantConfigBase.get_quant_method",
)
UNLISTED_PART = replace(
    UNLISTED,
    when="other parts of the fused parameter are quantized",
    fix="their neighbours in the fused parameter are quantized: quantize all of them or none",
    fixed_by=None,
)


@RULES.add(UNLISTED_NVFP4_HEAD, UNLISTED_HEAD, UNLISTED, UNLISTED_PART)
def unlisted_unquantized(s: VllmSubject) -> Iterator[Finding]:
    """modelopt.py `get_quant_method`: every linear layer that no entry names is built quantized, the head included."""
    q = s.quantization
    if q is None or not q.lists_known or q.problem is not None or s.declared_otherwise or not s.quantized:
        return
    if s.ignore.unreadable:
        s.notes.append(f"an entry of {q.ignore_path} cannot be matched: which modules are plain was not checked")
        return
    if not s.known:
        s.notes.append("which modules vLLM builds quantized is not known: ignore lists were not checked")
        return
    head = s.plain_head
    if head is not None and not s.ignore.reasons(head):
        rule = UNLISTED_NVFP4_HEAD if q.scheme is not None and q.scheme.family == "nvfp4" else UNLISTED_HEAD
        yield rule.at((q.ignore_path,), f"{head} is not quantized, and no ignore entry names it")
    whole: list[str] = []
    partly: list[str] = []
    for name, parts in s.linear.items():
        weights = (s.weight_of(m) for p, m in parts.items() if p not in s.quantized and name not in (head, "lm_head"))
        plain = [weight for weight in weights if weight is not None]
        if plain and name not in s.excluded and not s.ignore.partly(name):
            (whole if len(plain) == len(parts) else partly).extend(plain)
    for rule, keys in ((UNLISTED, whole), (UNLISTED_PART, partly)):
        if keys:
            yield rule.at(keys, f"{len(keys)} unquantized weights of modules that the ignore list does not name")


MATCHES_NOTHING = Rule(
    id="ignore-matches-nothing",
    title="ignore entries match no module",
    severity="warning",
    consequence="vLLM passes over them without a warning",
    fix="correct their names, if a module is meant",
    source=f"{QUANTIZATION_UTILS}/quant_utils.py is_layer_skipped",
)


@RULES.add(MATCHES_NOTHING)
def ignore_matches_nothing(s: VllmSubject) -> Iterator[Finding]:
    """utils/quant_utils.py `is_layer_skipped`: an entry is compared with names, and nothing says that it fits none."""
    q = s.quantization
    if q is None or not q.lists_known or q.problem is not None or s.facts is None or s.ignore.unreadable:
        return
    names = {name for module in s.modules for name in (module, s.built_as(module), s.facts.map(module))}
    names.update(s.facts.head)
    idle = [
        f"{q.ignore_path}[{number}]: {entry}"
        for number, entry in enumerate(s.ignore.entries)
        if "lm_head" not in entry and not any(s.ignore.touches(number, name) for name in names)
    ]
    if idle:
        yield MATCHES_NOTHING.at(idle, f"{len(idle)} {MATCHES_NOTHING.title}")


CANNOT_BE_QUANTIZED = Rule(
    id="cannot-be-quantized",
    title="modules are quantized that vLLM only builds plain",
    severity="error",
    consequence=SCALES_OF_PLAIN,
    fix="export with these modules excluded from quantization",
    source=f"{MODELOPT} get_quant_method",
)


@RULES.add(CANNOT_BE_QUANTIZED)
def cannot_be_quantized(s: VllmSubject) -> Iterator[Finding]:
    """models/gemma4.py `Gemma4Router` (GateLinear without a quantization config), diffusion_gemma.py
    `DiffusionGemmaSelfConditioning` (nn.Linear); modelopt.py `get_quant_method` for vision modules.
    """
    if s.quantization is not None and not s.quantization.lists_known:
        return
    keys = tuple(
        key
        for name, m in s.quantized.items()
        if s.never_quantized(name)
        for leaf, keys in m.leaves.items()
        for key in keys
        if leaf != "weight"
    )
    if keys:
        modules = {key.rpartition(".")[0] for key in keys}
        found = CANNOT_BE_QUANTIZED.at(keys, f"{len(modules)} modules are quantized that vLLM only builds plain")
        # Which modules are always plain was read in the sources of the architecture, where its backbone is known.
        yield replace(found, source=s.backbone.source or found.source)
