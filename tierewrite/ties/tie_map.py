"""What the model says: which parameters are one tensor, and who declared it.

A tie is `alias -> canonical`, both names of parameters in memory. Declarations come from three places, asked in this
order; the first that speaks decides:

1. a ties file: JSON `{alias: canonical}`: names, module names or regular expressions, as transformers writes them;
2. `_tied_weights_keys` in config.json itself;
3. the model class that config.json names, built by the installed transformers on the meta device (names and shapes, no
   weights). transformers itself expands and gates the declarations: a (sub)config whose `tie_word_embeddings` is false
   declares nothing, whatever the values on disk.

This room refuses: a cycle of ties, a class that transformers does not know or cannot build from this config, remote
code without leave, and configurations whose sizes no real model has. It never reads a tensor, never touches the network
and never lets transformers talk to the user. torch and transformers are imported only when a class has to be asked.

The form of the declarations is transformers' own: `PreTrainedModel.get_expanded_tied_weights_keys` (transformers 5).
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import threading
import time
import warnings
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from importlib import import_module
from itertools import cycle
from pathlib import Path
from typing import Any

from tierewrite.errors import ConfigError, Interrupted, TieFileError, shown
from tierewrite.source.open import told_of
from tierewrite.source.table import Checkpoint

# A count in a config (layers, experts, labels ...) above this is no real model's. The largest models today have a few
# hundred layers and under a thousand experts.
MAX_COUNT = 1_000_000
MAX_LAYERS = 4_096
# Both bounds are far above what the largest class of transformers needs.
MAX_MODULES = 2_000_000
MAX_BUILD_SECONDS = 60.0
MAX_CONFIG_DEPTH = 64
_TIES_WANTED = "expected a JSON object {alias: canonical}"
_CONFIG_MEND = "mend config.json, or say what is tied with --ties FILE"

_LAYER_KEY = re.compile(r"(layers?|blocks?|stages?|depths?|hidden_layers|modules)$", re.IGNORECASE)
_COUNT_KEY = re.compile(r"^(num|n)_|_(num|count)$|experts?|labels?$", re.IGNORECASE)
_SIZE_KEY = re.compile(
    r"vocab|position|token|ctx|context|params?|frames|samples|steps|_id$|embeddings?$", re.IGNORECASE
)
# What a config may carry that changes how a model runs, never which parameters it has. Each can make transformers
# import a kernel package or a quantizer, or fetch weights.
_RUN_TIME_KEYS = frozenset(
    {
        "quantization_config",
        "compression_config",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "experts_implementation",
        "_experts_implementation",
        "dtype",
        "torch_dtype",
        "gradient_checkpointing",
    }
)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\Z")
_BUILD_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class Tie:
    """One declared tie of two parameters.

    Attributes:
        alias: the parameter that is stored under another name, as it is called in memory.
        canonical: the parameter whose name stays; never itself an alias (chains are followed to their root).
        origin: who declared it, for people: "class DiffusionGemmaModel at 'model'", "config.json", "ties.json".
    """

    alias: str
    canonical: str
    origin: str


@dataclass(frozen=True)
class ModelNames:
    """What the model class knows about names: plain data, no module and no weights.

    Attributes:
        class_name: the class that was asked.
        base_model_prefix: transformers' attribute of that name ("" if none).
        shapes: every parameter and persistent buffer by its name in memory, with its shape; empty where the class could
            not be built.
        transforms: transformers' conversion mapping for the class (`WeightRenaming`, `WeightConverter`, ...), in the
            order of loading, legacy names included.
        hub_transforms: the same without the legacy names, which nothing writes any more.
    """

    class_name: str
    base_model_prefix: str
    shapes: Mapping[str, tuple[int, ...]]
    transforms: tuple[Any, ...]
    hub_transforms: tuple[Any, ...]


@dataclass(frozen=True)
class TieMap:
    """All active ties of one model.

    Attributes:
        ties: the ties, each alias once, canonical names resolved to the root of their chain.
        source: which source spoke: "ties-file", "mapping", "config", "class" or "none".
        detail: the class or file that spoke.
        unpaired: aliases of legacy list declarations whose counterpart nothing names.
        warnings: what a reader of the report should know.
        model: names of the model's parameters for `names.on_disk`; None when no class was asked.
    """

    ties: tuple[Tie, ...]
    source: str
    detail: str = ""
    unpaired: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    model: ModelNames | None = field(default=None, repr=False, compare=False)

    @classmethod
    def resolve(
        cls,
        root: Path,
        config: dict[str, Any],
        *,
        keys: Collection[str] = (),
        ties_file: Path | None = None,
        trust_remote_code: bool = False,
    ) -> TieMap:
        """Ask the sources in order for the ties of the checkpoint in `root`.

        Args:
            root: the checkpoint's folder (remote code is read from it; the network never).
            config: its config.json, parsed ({} without one).
            keys: the checkpoint's keys; a ties file and regular expressions in config.json are expanded over them.
            ties_file: JSON {alias: canonical}; speaks first and alone.
            trust_remote_code: run the Python files that config.json's `auto_map` names.

        Raises:
            TieFileError: the ties file is unreadable, malformed, cyclic or matches nothing of the checkpoint.
            ConfigError: config.json is malformed, or its class is unknown, cannot be built, or is remote code.
        """
        if ties_file is not None:
            return _from_file(Path(ties_file), root, config, keys, trust_remote_code)
        _check_config(root, config)
        declared = config.get("_tied_weights_keys")
        if declared is not None:
            result = _from_config(root, config, declared, keys, trust_remote_code)
            if result is not None:
                return result
        return _from_class(root, config, trust_remote_code)

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, ties_file: str | os.PathLike[str] | None = None, trust_remote_code: bool = False
    ) -> TieMap:
        """The ties of an open checkpoint, wherever it lies. Arguments and errors as of `resolve`."""
        with told_of(checkpoint.origin, checkpoint.root):
            return cls.resolve(
                checkpoint.root,
                checkpoint.config,
                keys=checkpoint.tensors.keys(),
                ties_file=None if ties_file is None else Path(ties_file),
                trust_remote_code=trust_remote_code,
            )

    @classmethod
    def from_model(cls, model: Any) -> TieMap:
        """The ties of a live transformers model (any device; no weight is read)."""
        pairs, origins, unpaired, warned = _declared_by(model, {})
        ties = _rooted(pairs, origins, ConfigError, None)
        return cls(ties, "class", type(model).__name__, unpaired, warned, _names_of(model))

    @classmethod
    def from_mapping(cls, declared: Mapping[str, str], keys: Collection[str]) -> TieMap:
        """Ties as a mapping {alias: canonical}: names, module names or regular expressions, as in a ties file.

        Args:
            declared: the mapping.
            keys: what the names are expanded over.

        Raises:
            TieFileError: as for a ties file: not of names, cyclic, or it matches nothing of `keys`.
        """
        what = "the mapping of ties"
        checked = _checked_mapping(dict(declared), None, TieFileError, what)
        return replace(_declared(checked, None, keys, what), source="mapping", detail="")

    def to_json(self) -> dict[str, Any]:
        """The ties as a JSON object, `{"source", "detail", "ties": [{alias, canonical, origin}], ...}`."""
        return {
            "source": self.source,
            "detail": self.detail,
            "ties": [{"alias": t.alias, "canonical": t.canonical, "origin": t.origin} for t in self.ties],
            "unpaired": list(self.unpaired),
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TieMap:
        """What `to_json` wrote; the model's names are not part of it, so disk names are taken as they stand."""
        return cls(
            tuple(Tie(t["alias"], t["canonical"], t["origin"]) for t in data["ties"]),
            data["source"],
            data.get("detail", ""),
            tuple(data.get("unpaired", ())),
            tuple(data.get("warnings", ())),
        )


# --- roots ------------------------------------------------------------------------------------------------------------


def _rooted(
    pairs: Mapping[str, str],
    origins: Mapping[str, str],
    error: type[TieFileError] | type[ConfigError],
    file: Path | None,
) -> tuple[Tie, ...]:
    """Follow every chain to its root; a cycle is an error that names its members."""
    roots: dict[str, str] = {}
    for start in pairs:
        trail: dict[str, None] = {}
        name = start
        while name in pairs and name not in roots:
            if name in trail:
                members = list(trail)[list(trail).index(name) :]
                loop = " -> ".join(shown(n) for n in [*members, name])
                raise error(
                    f"the declared ties form a cycle: {loop}; one of these names must be the canonical one",
                    file=file,
                    details={"cycle": members},
                )
            trail[name] = None
            name = pairs[name]
        root = roots.get(name, name)
        for passed in trail:
            roots[passed] = root
    return tuple(Tie(alias, roots[alias], origins[alias]) for alias in pairs if roots[alias] != alias)


# --- expansion without a model ----------------------------------------------------------------------------------------


def _is_regex(pattern: str) -> bool:
    return _PLAIN_NAME.match(pattern) is None


def parameters_of(keys: Iterable[str]) -> dict[str, None]:
    """Names of parameters that the keys of a checkpoint speak of, as if nothing were quantized; an ordered set.

    A tie pattern must never see companions (`weight_scale`, `input_scale`), so every key contributes itself only if
    nothing says it is a companion: whatever shares a module with `weight` and starts with `weight_`, or stands where
    only a quantized module can (see `_COMPANION`), contributes `<module>.weight` instead. Per-expert modules
    (`experts.3.gate_proj.weight`) contribute the fused parameters they may be in memory (`experts.gate_up_proj`) too.
    """
    names: dict[str, None] = {}
    modules: set[str] = set()
    containers: dict[str, set[str]] = {}
    companions: list[tuple[str, str, str]] = []
    for key in keys:
        parent, _, leaf = key.rpartition(".")
        if leaf == "weight":
            names[key] = None
            modules.add(parent)
        elif _is_companion(leaf):
            companions.append((key, parent, leaf))
        else:
            # A fused MXFP4 parameter is on disk as its blocks (and scales) only, as in gpt-oss.
            names[key.removesuffix("_blocks")] = None
    companions = [companion for companion in companions if companion[1] not in modules]
    for _, parent, leaf in companions:
        if _WEIGHT_FORM.match(leaf) and parent not in modules:
            # The weight itself is there in packed form only.
            names[f"{parent}.weight" if parent else "weight"] = None
            modules.add(parent)
    for key, parent, _ in companions:
        if parent not in modules:
            names[key] = None
    for parent in modules:
        head, _, projection = parent.rpartition(".")
        container, _, index = head.rpartition(".")
        if container and index.isdecimal():
            containers.setdefault(container, set()).add(projection)
    for container, projections in containers.items():
        for projection in sorted(projections):
            names[f"{container}.{projection}"] = None
        if {"gate_proj", "up_proj"} <= projections:
            names[f"{container}.gate_up_proj"] = None
    return names


# Leaves that belong to a module's weight wherever the module has one.
_COMPANION = re.compile(
    r"weight_|q(weight|zeros)$|scales$|qscales$|zeros$|g_idx$|perm$|input_|output_|k_scale$|v_scale$|q_scale$|pre_quant_scale$"
    r"|absmax$|quant_map$|nested_|quant_state|SCB$|.*_(scale|scale_2|scale_inv|zero_point|amax|global_scale)$",
)


@lru_cache(maxsize=4096)
def _is_companion(leaf: str) -> bool:
    return _COMPANION.match(leaf) is not None


# Leaves that stand for the weight where `weight` itself is missing.
_WEIGHT_FORM = re.compile(r"weight_packed$|weight_scale|qweight$|weight_q|weight_v$|weight_g$")


def _matcher(pattern: str, file: Path | None, error: type[TieFileError] | type[ConfigError]) -> re.Pattern[str]:
    """`pattern` as transformers searches it (anchored at the start), ended at a dot or at the name's end."""
    try:
        # The end is ours: transformers searches `^...weight` over parameters only, where nothing longer exists.
        return re.compile(f"(?:{pattern})(?=\\.|\\Z)")
    except re.error as exc:
        raise error(f"the tie pattern '{shown(pattern)}' is no regular expression: {exc}", file=file) from exc


_TAIL = re.compile(r"(?<![\\A-Za-z0-9_])[A-Za-z0-9_]+\Z")


def _tail_of(matcher: re.Pattern[str], pattern: str) -> str:
    """Text that every match of `pattern` ends with; "" where that takes more than a look. Only a filter for speed."""
    found = _TAIL.search(pattern)
    return found[0] if found and "|" not in pattern and matcher.flags == re.UNICODE else ""


def _matches(
    pattern: str, ordered: Sequence[str], file: Path | None, error: type[TieFileError] | type[ConfigError]
) -> list[str]:
    """The names that `pattern` speaks of, in order: itself and what is below it, or what a regex matches."""
    if _is_regex(pattern):
        matcher = _matcher(pattern, file, error)
        tail = _tail_of(matcher, pattern)
        return [name for name in ordered if tail in name and matcher.match(name)]
    found = []
    at = bisect_left(ordered, pattern)
    if at < len(ordered) and ordered[at] == pattern:
        found.append(pattern)
    below = pattern + "."
    for at in range(bisect_left(ordered, below), len(ordered)):
        if not ordered[at].startswith(below):
            break
        found.append(ordered[at])
    return found


def _expand(
    declared: Mapping[str, str],
    names: Collection[str],
    file: Path | None,
    error: type[TieFileError] | type[ConfigError],
) -> tuple[dict[str, str], list[str]]:
    """Expand declarations over `names` by transformers' rule; returns (pairs, idle declarations).

    The rule (`PreTrainedModel.get_expanded_tied_weights_keys`): both patterns are searched, anchored at the start; the
    sorted matches of the alias pattern are paired with the sorted matches of the canonical pattern, cycled. Where the
    canonical side is incomplete on disk that pairing would be off by one, so here each alias is first paired with the
    name that differs from it as the patterns do (`_counterpart`), and the cycle serves only what remains.
    """
    pairs: dict[str, str] = {}
    idle: list[str] = []
    known = names if isinstance(names, (set, frozenset, dict)) else set(names)
    ordered: list[str] | None = None
    for alias, canonical in declared.items():
        if not _is_regex(alias) and not _is_regex(canonical) and (alias in known or canonical in known):
            pairs[alias] = canonical
            continue
        if ordered is None:
            ordered = sorted(known)
        targets = _matches(alias, ordered, file, error)
        sources = _matches(canonical, ordered, file, error)
        if not targets and not sources:
            idle.append(alias)
            continue
        made = _pair(alias, canonical, targets, sources)
        if made is None:
            raise error(
                f"the tie '{shown(alias)}' -> '{shown(canonical)}' matches {len(targets)} and {len(sources)} "
                "parameters: they cannot be paired; name each alias and its canonical parameter",
                file=file,
                details={"alias": targets[:20], "canonical": sources[:20]},
            )
        for target, source in made:
            if target != source:
                pairs[target] = pairs.get(source, source) if source in pairs and pairs[source] != target else source
    _prefer_fused(pairs)
    return pairs, idle


def _prefer_fused(pairs: dict[str, str]) -> None:
    """Where patterns tie a fused parameter and its unpacked parts alike, the fused one speaks: one group, not many."""
    covered: list[str] = []
    for alias, canonical in pairs.items():
        module, _, leaf = alias.rpartition(".")
        if leaf in ("weight", "bias"):
            head, _, projection = module.rpartition(".")
            container, _, index = head.rpartition(".")
            if not container or not index.isdecimal():
                continue
            tail = f".{index}.{projection}.{leaf}"
        else:
            container, projection, tail = module, leaf, f".{leaf}"
        for fused in (f"{container}.{projection}", f"{container}.gate_up_proj"):
            if fused == alias or (fused.endswith("gate_up_proj") and projection not in ("gate_proj", "up_proj", fused)):
                continue
            other = pairs.get(fused)
            if other is not None and canonical == other.rpartition(".")[0] + tail:
                covered.append(alias)
                break
    for alias in covered:
        del pairs[alias]


_HEAD = re.compile(r"(?:[A-Za-z0-9_.]|\\\.)*")


def _split_pattern(pattern: str) -> tuple[str, str]:
    """The part of a pattern that every match starts with (a dot in it counts as a literal dot), and the rest."""
    head = _HEAD.match(pattern)
    text = head.group(0) if head else ""
    rest = pattern[len(text) :]
    if rest[:1] in ("*", "?", "{", "+") and text:
        kept = text[:-2] if text.endswith("\\.") else text[:-1]
        text, rest = kept, pattern[len(kept) :]
    return text.replace("\\.", "."), rest


def _pair(alias: str, canonical: str, targets: Sequence[str], sources: Sequence[str]) -> list[tuple[str, str]] | None:
    """Pair the names that two patterns match; None where nothing says how."""
    alias_head, alias_tail = _split_pattern(alias)
    canonical_head, canonical_tail = _split_pattern(canonical)
    if not _is_regex(alias) and not _is_regex(canonical):
        # Names of modules: what is below one is what is below the other.
        alias_head, canonical_head, alias_tail, canonical_tail = f"{alias}.", f"{canonical}.", "", ""
    if alias_tail == canonical_tail and alias_head != canonical_head:
        # The patterns differ in their heads only: a name's counterpart is the name with the other head.
        by_head = {t: canonical_head + t[len(alias_head) :] for t in targets if t.startswith(alias_head)}
        for source in sources:
            if source.startswith(canonical_head):
                by_head.setdefault(alias_head + source[len(canonical_head) :], source)
        if all(t in by_head for t in targets):
            return sorted(by_head.items())
    if not targets or not sources or len(targets) % len(sources) != 0:
        return None
    return list(zip(targets, cycle(sources)))


def _read_ties(path: Path) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) and exc.strerror else exc
        raise TieFileError(f"the ties file cannot be read: {why}; {_TIES_WANTED}", file=path) from exc

    def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for name, value in items:
            if name in seen and seen[name] != value:
                what = f"the ties file names the alias '{shown(name)}' twice, with two values; leave one of them"
                raise TieFileError(what, file=path)
            seen[name] = value
        return seen

    try:
        data = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as exc:
        raise TieFileError(f"the ties file is not JSON: {exc}; {_TIES_WANTED}", file=path) from exc
    return _checked_mapping(data, path, TieFileError, "the ties file")


def _checked_mapping(
    data: Any, file: Path | None, error: type[TieFileError] | type[ConfigError], what: str
) -> dict[str, str]:
    if not isinstance(data, dict):
        raise error(f"{what} holds a {type(data).__name__}; expected an object {{alias: canonical}}", file=file)
    for alias, canonical in data.items():
        if not isinstance(canonical, str) or not canonical or not alias:
            raise error(
                f"{what} ties '{shown(alias)}' to {shown(json.dumps(canonical))}; expected the name of a parameter",
                file=file,
            )
        if alias == canonical:
            raise error(f"{what} ties '{shown(alias)}' to itself", file=file, details={"cycle": [alias]})
    return data


def _from_file(
    path: Path, root: Path, config: dict[str, Any], keys: Collection[str], trust_remote_code: bool
) -> TieMap:
    declared = _read_ties(path)
    try:
        return _declared(declared, path, keys, "the ties file")
    except TieFileError as idle:
        if "idle" not in idle.details:
            raise
        # The names may be those in memory, of a checkpoint that is written under the hub's or is canonical already: the
        # class knows them.
        try:
            _check_config(root, config)
            names = _from_class(root, config, trust_remote_code).model
        except ConfigError:
            raise idle from None
        shapes = names.shapes if names is not None else {}
        pairs, _ = _expand(declared, shapes, path, TieFileError)
        known = {a: c for a, c in pairs.items() if a in shapes and c in shapes}
        if not known:
            raise
        ties = _rooted(known, dict.fromkeys(known, path.name), TieFileError, path)
        return TieMap(ties, "ties-file", str(path), model=names)


def _declared(declared: Mapping[str, str], path: Path | None, keys: Collection[str], what: str) -> TieMap:
    """The ties of a checked mapping, which messages call `what`; `path` is the file it came from, if any."""
    label = what if path is None else path.name
    # A cycle among the declarations is an error whatever is on disk.
    _rooted(declared, dict.fromkeys(declared, label), TieFileError, path)
    names = parameters_of(keys)
    pairs, idle = _expand(declared, names, path, TieFileError)
    if not any(alias in names for alias in pairs):
        raise TieFileError(
            f"{what} matches nothing of the checkpoint: none of its aliases is there; write the names as they "
            "are in the checkpoint (without companions such as weight_scale), or patterns that match them",
            file=path,
            details={"idle": list(declared)[:50]},
        )
    warned = [f"{label}: the tie of '{shown(a)}' matches nothing of the checkpoint" for a in idle]
    scopes = Scopes(keys)
    for alias, canonical in pairs.items():
        # Only names that the file spells out can be misspelt; what a pattern pairs may well be absent (exporters that
        # keep the first name of shared tensors write no canonical side).
        written_out = declared.get(alias) == canonical
        if written_out and alias in names and canonical not in names and canonical not in pairs:
            scope = canonical.rpartition(".")[0].rpartition(".")[0]
            if scope and scope not in scopes and scope.rpartition(".")[0] not in scopes:
                raise TieFileError(
                    f"{what} ties '{shown(alias)}' to '{shown(canonical)}', but the checkpoint has neither that "
                    f"parameter nor anything under '{shown(scope)}': correct the name",
                    file=path,
                    tensor=canonical,
                )
            warned.append(f"{label}: '{shown(canonical)}' is not in the checkpoint; '{shown(alias)}' takes its name")
    ties = _rooted(pairs, dict.fromkeys(pairs, label), TieFileError, path)
    return TieMap(ties, "ties-file", str(path or ""), (), tuple(warned), None)


class Scopes:
    """Which dotted paths there are keys below."""

    def __init__(self, keys: Collection[str]) -> None:
        self._keys = keys

    @cached_property
    def _sorted(self) -> list[str]:
        return sorted(self._keys)

    def __contains__(self, path: str) -> bool:
        below = f"{path}."
        at = bisect_left(self._sorted, below)
        return path != "" and at < len(self._sorted) and self._sorted[at].startswith(below)


def _from_config(
    root: Path, config: dict[str, Any], declared: Any, keys: Collection[str], trust_remote_code: bool
) -> TieMap | None:
    file = root / "config.json"
    if isinstance(declared, (list, tuple)):
        # The legacy form says which names are aliases, not of what: only the class can pair them.
        if not all(isinstance(name, str) for name in declared):
            raise ConfigError(f"_tied_weights_keys holds more than names; {_CONFIG_MEND}", file=file)
        if not declared:
            return None
        asked = _from_class(root, config, trust_remote_code)
        found = {tie.alias for tie in asked.ties}
        left = tuple(n for n in declared if n not in found and not any(re.search(_safe(n), f) for f in found))
        return TieMap(asked.ties, asked.source, asked.detail, (*asked.unpaired, *left), asked.warnings, asked.model)
    declared = _checked_mapping(declared, file, ConfigError, "_tied_weights_keys")
    if config.get("tie_word_embeddings") is False:
        return TieMap((), "config", "config.json", warnings=("config.json declares ties and switches them off",))
    if not declared:
        return None
    _rooted(declared, dict.fromkeys(declared, "config.json"), ConfigError, file)
    names = parameters_of(keys)
    pairs, _ = _expand(declared, names, file, ConfigError)
    model = None
    if not any(alias in names or canonical in names for alias, canonical in pairs.items()):
        # Names of parameters that are called otherwise on disk: the class knows how.
        asked = _from_class(root, config, trust_remote_code)
        model = asked.model
        if model is not None and model.shapes:
            pairs, _ = _expand(declared, model.shapes, file, ConfigError)
    ties = _rooted(pairs, dict.fromkeys(pairs, "config.json"), ConfigError, file)
    return TieMap(ties, "config", "config.json", model=model)


def _safe(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error:
        return re.escape(pattern)
    return pattern


# --- the class --------------------------------------------------------------------------------------------------------


def _check_config(root: Path, config: Any) -> None:
    """Refuse, before transformers sees it, what no real config holds: huge counts, deep nesting, no object."""
    file = root / "config.json"
    if not isinstance(config, dict):
        raise ConfigError(f"expected a JSON object, found a {type(config).__name__}; {_CONFIG_MEND}", file=file)
    stack: list[tuple[str, Any, int]] = [("", config, 0)]
    while stack:
        path, value, depth = stack.pop()
        if depth > MAX_CONFIG_DEPTH:
            raise ConfigError(
                f"nested more than {MAX_CONFIG_DEPTH} levels deep; no model is built from this (use --ties FILE)",
                file=file,
            )
        if isinstance(value, dict):
            if depth == 0 or not path.startswith("quantization_config"):
                stack.extend((f"{path}.{k}" if path else str(k), v, depth + 1) for k, v in value.items())
        elif isinstance(value, list):
            stack.extend((path, v, depth + 1) for v in value[:100_000])
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            name = path.rpartition(".")[2]
            limit = None
            if _SIZE_KEY.search(name):
                limit = None
            elif _LAYER_KEY.search(name):
                limit = MAX_LAYERS
            elif _COUNT_KEY.search(name):
                limit = MAX_COUNT
            if limit is not None and value > limit:
                raise ConfigError(
                    f"{shown(path)} is {value}; more than {limit:,} is not believed and no model is built from it "
                    "(use --ties FILE to say what is tied)",
                    file=file,
                )


def _versions(config: Mapping[str, Any]) -> str:
    import transformers

    written = config.get("transformers_version")
    wrote = (
        f"config.json was written by transformers {shown(written)}"
        if written
        else "config.json names no transformers_version"
    )
    here = f"{transformers.__version__} is installed"
    return f"{wrote}, {here}: install one that fits, or say what is tied with --ties FILE"


def _from_class(root: Path, config: dict[str, Any], trust_remote_code: bool) -> TieMap:
    file = root / "config.json"
    if not config:
        raise ConfigError(
            "no config.json with content: nothing says which weights are tied; add it, or use --ties FILE",
            file=file,
        )
    architectures = config.get("architectures")
    if architectures is not None and (
        not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures)
    ):
        raise ConfigError(
            f"architectures is {shown(json.dumps(architectures))}; expected a list of class names: {_CONFIG_MEND}",
            file=file,
        )
    model_type = config.get("model_type")
    if model_type is not None and not isinstance(model_type, str):
        what = f"model_type is {shown(json.dumps(model_type))}; expected a string"
        raise ConfigError(f"{what}: {_CONFIG_MEND}", file=file)
    auto_map = config.get("auto_map")
    if auto_map is not None and not isinstance(auto_map, dict):
        what = f"auto_map is {shown(json.dumps(auto_map))}; expected an object"
        raise ConfigError(f"{what}: {_CONFIG_MEND}", file=file)
    if not architectures and not model_type and not auto_map:
        raise ConfigError(
            "names neither architectures nor model_type: nothing says which weights are tied; use --ties FILE",
            file=file,
        )
    wanted = architectures[0] if architectures else None
    with _BUILD_LOCK, _quiet(), _offline():
        config_class, model_class, remote = _classes(root, config, wanted, trust_remote_code)
        clean = _without_run_time(config)
        try:
            built_config = config_class.from_dict(_as_loaded(config_class, clean))
        except BaseException as exc:
            _stop_if_fatal(exc)
            raise ConfigError(
                f"{config_class.__name__} does not accept this config: {_first_line(exc)}; {_versions(config)}",
                file=file,
            ) from exc
        if model_class is None:
            model_class = _auto_class(built_config, config, file)
        name = model_class.__name__
        try:
            model, legacy = _build(model_class, built_config)
        except _TooLarge as exc:
            raise ConfigError(f"{name}: {exc}; no model is built from this (use --ties FILE)", file=file) from exc
        except BaseException as exc:
            _stop_if_fatal(exc)
            return _class_level(model_class, built_config, config, exc, file)
        try:
            pairs, origins, unpaired, warned = _declared_by(model, legacy)
            names = _names_of(model)
        except ConfigError:
            raise
        except Exception as exc:
            _stop_if_fatal(exc)
            raise ConfigError(
                f"{name} does not say what is tied: {_first_line(exc)}; {_versions(config)}", file=file
            ) from exc
    if remote:
        warned = (*warned, f"{name} is remote code from {shown(root.name)}")
    return TieMap(_rooted(pairs, origins, ConfigError, file), "class", name, unpaired, warned, names)


# What is no answer of the class: the user, a signal or the interpreter stops the program.
_FATAL = (KeyboardInterrupt, GeneratorExit, Interrupted)


def _stop_if_fatal(exc: BaseException | None) -> None:
    """Raise the user's or a signal's exception again, even if transformers' validators wrapped it in one of theirs."""
    seen: set[int] = set()
    while exc is not None and id(exc) not in seen:
        if isinstance(exc, _FATAL):
            raise exc
        seen.add(id(exc))
        exc = exc.__cause__ or exc.__context__


class _TooLarge(Exception):
    """The class makes more modules, or takes longer, than any real model."""


def _first_line(exc: BaseException) -> str:
    text = str(exc).strip().replace("\n", " ")
    return shown(f"{type(exc).__name__}: {text}" if text else type(exc).__name__)


def _without_run_time(value: Any) -> Any:
    if isinstance(value, dict):
        out = {k: _without_run_time(v) for k, v in value.items() if k not in _RUN_TIME_KEYS}
        for key in ("use_pretrained_backbone",):
            # Weights of a backbone would be fetched; its names are the same without.
            if key in out:
                out[key] = False
        return out
    if isinstance(value, list):
        return [_without_run_time(v) for v in value]
    return value


def _as_loaded(config_class: Any, config: dict[str, Any]) -> dict[str, Any]:
    """The dict that `config_class.from_pretrained` would take from this config.json.

    transformers writes infinities as {"__float__": "Infinity"}, and a class may take its own part of a composite config
    (`base_config_key`, e.g. CLIPTextModel from a CLIP checkpoint).
    """
    decode = getattr(config_class, "_decode_special_floats", None)
    if decode is not None:
        config = decode(config)
    part = config.get(getattr(config_class, "base_config_key", "") or "")
    if isinstance(part, dict) and config.get("model_type") != config_class.model_type:
        return part
    return config


def _native(name: str, module_of: Any = None) -> Any:
    """The class `name` of the installed transformers, or None; importing it may fail for want of its packages."""
    import transformers
    from transformers import PreTrainedModel

    found = None
    if _PLAIN_NAME.match(name) and "." not in name:
        found = getattr(transformers, name, None)
        if found is None and module_of is not None:
            path = module_of.__module__.replace(".configuration_", ".modeling_")
            with contextlib.suppress(ImportError):
                found = getattr(import_module(path), name, None)
    if not isinstance(found, type):
        return None
    if getattr(found, "is_dummy", False) or not issubclass(found, PreTrainedModel):
        return None
    return found


def _classes(root: Path, config: dict[str, Any], wanted: str | None, trust_remote_code: bool) -> tuple[Any, Any, bool]:
    """(config class, model class or None for AutoModel's choice, is it remote code)."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    file = root / "config.json"
    model_type, auto_map = config.get("model_type"), config.get("auto_map") or {}
    remote_models = {k: v for k, v in auto_map.items() if k.startswith("AutoModel")}
    config_class = None
    if model_type in CONFIG_MAPPING:
        try:
            config_class = CONFIG_MAPPING[model_type]
        except Exception as exc:
            _stop_if_fatal(exc)
            raise ConfigError(
                f"model_type '{shown(model_type)}': {_first_line(exc)}; {_versions(config)}", file=file
            ) from exc
    model_class = None
    if wanted is not None:
        try:
            model_class = _native(wanted, config_class)
        except Exception as exc:
            _stop_if_fatal(exc)
            raise ConfigError(
                f"{shown(wanted)} cannot be imported: {_first_line(exc)}; {_versions(config)}", file=file
            ) from exc
    if auto_map and trust_remote_code and remote_models:
        return *_remote_classes(root, config, wanted, remote_models, config_class, file), True
    if auto_map and (config_class is None or (wanted is not None and model_class is None)):
        raise ConfigError(
            f"{shown(wanted or model_type)} is defined by Python files in the folder (auto_map), which are not run "
            "without leave: use --trust-remote-code after reading them, or --ties FILE",
            file=file,
        )
    if wanted is not None and model_class is None:
        raise ConfigError(f"the class '{shown(wanted)}' is unknown; {_versions(config)}", file=file)
    if config_class is None:
        config_class = getattr(model_class, "config_class", None)
        if model_type is not None or config_class is None:
            raise ConfigError(f"model_type '{shown(model_type)}' is unknown; {_versions(config)}", file=file)
    elif model_class is not None:
        own = getattr(model_class, "config_class", None)
        if own is not None and config.get(getattr(own, "base_config_key", "") or "") is not None:
            config_class = own
        elif own is not None and not issubclass(config_class, own) and not issubclass(own, config_class):
            raise ConfigError(
                f"architectures names {shown(wanted)}, which takes a {own.__name__}, but model_type is "
                f"'{shown(model_type)}' ({config_class.__name__}): {_CONFIG_MEND}",
                file=file,
            )
    return config_class, model_class, False


def _remote_classes(
    root: Path,
    config: dict[str, Any],
    wanted: str | None,
    remote_models: Mapping[str, Any],
    config_class: Any,
    file: Path,
) -> tuple[Any, Any]:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    references = [r[0] if isinstance(r, (list, tuple)) and r else r for r in remote_models.values()]
    if not all(isinstance(r, str) and "." in r for r in references):
        raise ConfigError(
            f"auto_map is {shown(json.dumps(dict(remote_models)))}; expected 'file.Class' references: {_CONFIG_MEND}",
            file=file,
        )
    chosen = next((r for r in references if wanted is not None and r.rpartition(".")[2] == wanted), references[0])
    config_reference = (config.get("auto_map") or {}).get("AutoConfig")
    try:
        if isinstance(config_reference, str):
            config_class = get_class_from_dynamic_module(config_reference, str(root), local_files_only=True)
        model_class = get_class_from_dynamic_module(chosen, str(root), local_files_only=True)
    except BaseException as exc:
        _stop_if_fatal(exc)
        raise ConfigError(
            f"remote code {shown(chosen)} cannot be imported: {_first_line(exc)}; {_versions(config)}",
            file=file,
        ) from exc
    if config_class is None:
        config_class = getattr(model_class, "config_class", None)
    if config_class is None or not hasattr(config_class, "from_dict"):
        raise ConfigError(f"remote code {shown(chosen)} names no config class; {_versions(config)}", file=file)
    return config_class, model_class


def _auto_class(built_config: Any, config: Mapping[str, Any], file: Path) -> Any:
    from transformers import MODEL_MAPPING

    try:
        found = MODEL_MAPPING[type(built_config)]
    except Exception as exc:
        _stop_if_fatal(exc)
        raise ConfigError(
            f"AutoModel has no class for model_type '{shown(config.get('model_type'))}'; {_versions(config)}",
            file=file,
        ) from exc
    return found[0] if isinstance(found, (list, tuple)) else found


class _Collector(logging.Handler):
    """Takes transformers' log records and keeps none."""

    def emit(self, record: logging.LogRecord) -> None:
        return


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing that transformers, torch or remote code says reaches the user; loggers are as before afterwards."""
    import transformers  # configures its logger on import

    _ = transformers
    saved = []
    for name in ("transformers", "huggingface_hub", "torch", "transformers_modules"):
        logger = logging.getLogger(name)
        saved.append((logger, logger.handlers[:], logger.propagate))
        logger.handlers = [_Collector()]
        logger.propagate = False
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, handlers, propagate in saved:
            logger.handlers = handlers
            logger.propagate = propagate


class _TrueHere:
    """A switch that is on in the thread that made it, and elsewhere what it was."""

    def __init__(self, elsewhere: object) -> None:
        self._thread, self._elsewhere = threading.get_ident(), elsewhere

    def __bool__(self) -> bool:
        return bool(self._elsewhere) or threading.get_ident() == self._thread


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """huggingface_hub behaves as under HF_HUB_OFFLINE=1 in this thread; its setting is as before afterwards."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = _TrueHere(before)  # another checkpoint of a batch may be downloading
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Inside, building more modules than any real model has, or for longer, raises `_TooLarge`."""
    from torch.nn.modules.module import register_module_module_registration_hook as watch

    count = 0
    deadline = time.monotonic() + MAX_BUILD_SECONDS

    def on_module(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > MAX_MODULES or (count % 1024 == 0 and time.monotonic() > deadline):
            raise _TooLarge(f"more than {MAX_MODULES:,} modules or {MAX_BUILD_SECONDS:.0f} s to build")

    handle = watch(on_module)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _legacy_lists(found: dict[int, list[str]]) -> Iterator[None]:
    """Inside, a class whose `_tied_weights_keys` is a legacy list builds; `found` takes the list, by id(module)."""
    from transformers import PreTrainedModel

    original = PreTrainedModel.get_expanded_tied_weights_keys

    def expanded(self: Any, all_submodels: bool = False) -> dict[str, str]:
        declared = self._tied_weights_keys
        if not all_submodels and declared is not None and not isinstance(declared, dict):
            if getattr(self.config, "tie_word_embeddings", False):
                found[id(self)] = [d for d in declared if isinstance(d, str)]
            return {}
        expanded_here: dict[str, str] = original(self, all_submodels=all_submodels)
        return expanded_here

    PreTrainedModel.get_expanded_tied_weights_keys = expanded
    try:
        yield
    finally:
        PreTrainedModel.get_expanded_tied_weights_keys = original


def _build(model_class: Any, built_config: Any) -> tuple[Any, dict[int, list[str]]]:
    """The model on the meta device: names and shapes, no storage, no initialisation."""
    import torch
    from transformers import initialization

    legacy: dict[int, list[str]] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_bounded())
        stack.enter_context(_legacy_lists(legacy))
        stack.enter_context(torch.device("meta"))
        for name in ("no_init_weights", "no_tie_weights"):
            context = getattr(initialization, name, None)
            if context is not None:
                stack.enter_context(context())
        return model_class(built_config), legacy


def _declared_by(
    model: Any, legacy: Mapping[int, list[str]]
) -> tuple[dict[str, str], dict[str, str], tuple[str, ...], tuple[str, ...]]:
    """(pairs, origins, unpaired, warnings) of a built model; names are parameters or buffers that exist."""
    from transformers import PreTrainedModel

    expanded: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    existing = _existing(model)
    submodels = [(p, m) for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, PreTrainedModel)]
    declaring = [
        (p, type(m).__name__, [re.compile(_safe(k)) for k in m._tied_weights_keys])
        for p, m in submodels
        if m._tied_weights_keys
    ]
    pairs = {a: c for a, c in expanded.items() if a != c and a in existing and c in existing}
    origins: dict[str, str] = {}
    for alias, canonical in pairs.items():
        # The innermost declarer whose patterns can speak of both names.
        prefix, name = "", type(model).__name__
        for inner, class_name, patterns in reversed(declaring):
            lead = f"{inner}." if inner else ""
            if alias.startswith(lead) and canonical.startswith(lead):
                part = alias[len(lead) :]
                if any(pattern.match(part) for pattern in patterns):
                    prefix, name = inner, class_name
                    break
        origins[alias] = f"class {name} at '{prefix}'" if prefix else f"class {name}"
    unpaired: list[str] = []
    for prefix, module in submodels:
        if id(module) in legacy:
            made, left = _pair_legacy(module, prefix, legacy[id(module)], existing)
            for alias, canonical in made.items():
                if alias not in pairs:
                    pairs[alias] = canonical
                    where = f" at '{prefix}'" if prefix else ""
                    origins[alias] = f"class {type(module).__name__}{where} (legacy list)"
            unpaired.extend(left)
    notes = [f"the declaration '{shown(n)}' names no counterpart; it is not treated as tied" for n in unpaired]
    return pairs, origins, tuple(unpaired), tuple(notes)


def _existing(model: Any) -> dict[str, tuple[int, ...]]:
    """Every parameter and persistent buffer under every name of it, with its shape."""
    return {n: tuple(t.shape) for n, t in model.state_dict().items() if hasattr(t, "shape")}


def _pair_legacy(
    module: Any, prefix: str, declared: Sequence[str], existing: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, str], list[str]]:
    """Pair a legacy list with the input embedding, where an entry is another matrix of the same shape.

    transformers 4 tied the output embedding (and, in encoder-decoder models, the stacks' embeddings) to
    `get_input_embeddings()`; entries of any other shape (biases) were tied by code that nothing declares.
    """
    lead = f"{prefix}." if prefix else ""
    try:
        embedding = module.get_input_embeddings()
    except Exception as exc:
        _stop_if_fatal(exc)
        embedding = None
    weight = getattr(embedding, "weight", None)
    canonical = next(
        (n for n, p in module.named_parameters(remove_duplicate=False) if weight is not None and p is weight),
        None,
    )
    made: dict[str, str] = {}
    left: list[str] = []
    for entry in declared:
        names = [n for n in (k[len(lead) :] for k in existing if k.startswith(lead)) if re.search(_safe(entry), n)]
        if not names:
            left.append(lead + entry)
        for name in names:
            if name == canonical:
                continue
            fits = canonical is not None and existing[lead + name] == existing[lead + canonical]
            if fits and name.endswith("weight"):
                made[lead + name] = f"{lead}{canonical}"
            else:
                left.append(lead + name)
    return made, left


def _names_of(model: Any) -> ModelNames:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping

    hub = tuple(get_model_conversion_mapping(model, add_legacy=False))
    # What get_model_conversion_mapping appends by default.
    every = (*hub, *(get_checkpoint_conversion_mapping("legacy") or ()))
    return ModelNames(type(model).__name__, str(model.base_model_prefix or ""), _existing(model), every, hub)


def _class_level(
    model_class: Any, built_config: Any, config: Mapping[str, Any], cause: BaseException, file: Path
) -> TieMap:
    """The ties of a class that cannot be built: its own declarations, if they are plain full names."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    name = model_class.__name__
    why = _first_line(cause)
    declared = model_class._tied_weights_keys or {}
    if not getattr(built_config, "tie_word_embeddings", False):
        declared = {}
    plain = isinstance(declared, dict) and all(
        not _is_regex(n) and n.rpartition(".")[2] in ("weight", "bias") for pair in declared.items() for n in pair
    )
    if not plain:
        raise ConfigError(
            f"{name} cannot be built ({why}), and its ties cannot be read without that; {_versions(config)}",
            file=file,
        ) from cause
    hub = get_checkpoint_conversion_mapping(name) or get_checkpoint_conversion_mapping(config.get("model_type")) or []
    every = (*hub, *(get_checkpoint_conversion_mapping("legacy") or []))
    names = ModelNames(name, str(getattr(model_class, "base_model_prefix", "") or ""), {}, every, tuple(hub))
    origins = dict.fromkeys(declared, f"class {name} (not built)")
    note = f"{name} cannot be built here ({why}); only its own class-level declarations are used"
    return TieMap(_rooted(declared, origins, ConfigError, file), "class", name, (), (note,), names)
