"""The configs of a rewrite for vLLM: ignore lists that say to vLLM what lies on disk.

formats.ignore_lists corrects lists by what entries mean to their exporter; this module by what they do in vLLM, where
they match as substrings and fused projections have to be named as one. What no list can say (experts of one layer, or
shards of one parameter, of which only some are quantized) is left to the findings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tierewrite.consumers.subject import Module
from tierewrite.consumers.vllm.subject import VllmSubject
from tierewrite.json_text import in_style_of
from tierewrite.source.table import CONFIG_NAMES


def consistent_ignore(s: VllmSubject) -> list[str] | None:
    """An ignore list that says to vLLM what lies on disk, or None where the present one does or no list can.

    Entries that exclude a quantized module, or a part of a fused one, go; in their place, and where nothing named
    them, come the unquantized linear modules by their own names, under every side's spelling, with all shards of a
    fused parameter. All other entries stay as they are.
    """
    q = s.quantization
    if q is None or not q.lists_known or q.problem is not None or s.declared_otherwise or not s.quantized:
        return None
    if not s.known or s.ignore.unreadable:
        return None
    drop = _misleading(s)
    kept = tuple(e for i, e in enumerate(q.ignore) if i not in drop)
    verdict = s.ignore_of(kept)
    added: list[str] = []
    head = s.plain_head
    if head is not None and not verdict.reasons(head):
        added.append("lm_head" if s.ignore_of(("lm_head",)).reasons(head) else head)
    for name, parts in s.linear.items():
        if name in ("lm_head", head) or any(part in s.quantized for part in parts):
            continue
        if verdict.reasons(name) and not verdict.partly(name):
            continue
        added += _entries(s, name, parts)
    # What a dropped entry protected without being a linear module of vLLM's (a router, a vision tower) needs no entry
    # there; other consumers read the list too, so it is named again.
    for number in drop:
        alone = s.ignore_of((q.ignore[number],))
        for name, module in s.modules.items():
            weight = module.weight
            if name in s.quantized or weight is None or name.endswith("embed_tokens"):
                continue
            if len(s.entries[weight].shape) != 2:
                continue
            if s.built_as(name) not in s.linear and alone.reasons(name) and not verdict.reasons(name):
                added += [k.rpartition(".")[0] for ks in module.leaves.values() for k in ks]
    found = list(dict.fromkeys([*kept, *added]))
    return None if found == list(q.ignore) else found


def _misleading(s: VllmSubject) -> set[int]:
    """The entries that exclude a quantized module, or a part of one."""
    drop: set[int] = set()
    for name, parts in s.linear.items():
        if any(part in s.quantized for part in parts):
            drop |= s.ignore.reasons(name).keys()
            named = s.ignore.partly(name)
            parent = name.rpartition(".")[0]
            alone = (s.ignore_of((entry,)) for entry in s.ignore.entries)
            drop |= {
                i
                for i, one in enumerate(alone if named else ())
                if any(one.reasons(f"{parent}.{shard}") for shard in named) and one.partly(name)
            }
    return drop


def _entries(s: VllmSubject, name: str, parts: Mapping[str, Module]) -> list[str]:
    """Entries that exclude a module of vLLM's, as the checkpoint spells the modules that it is made of."""
    parent, _, leaf = name.rpartition(".")
    shards = s.backbone.fused.get(leaf, ())
    if s.facts is None:
        return [spelled for shard in shards or (leaf,) for spelled in _spellings(s, f"{parent}.{shard}")]
    above = next(iter(parts)).rpartition(".")[0]
    entries = tuple(f"{above}.{shard}" for shard in shards) if len(parts) > 1 or shards else tuple(parts)
    if leaf == "experts":
        entries = tuple(parts)
    return list(entries if s.ignore_of(entries).reasons(name) else (name,))


def _spellings(s: VllmSubject, name: str) -> list[str]:
    """A backbone name as the checkpoint spells it, on every side."""
    sides = [side for side in s.backbone.sides if s.backbone.map(side) and name.startswith(s.backbone.map(side))]
    return [side + name.removeprefix(s.backbone.map(side)) for side in sides] or [name]


def corrected_ignore_lists(s: VllmSubject) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The configs of a checkpoint with the list of `consistent_ignore`, where they need it.

    Both config.json and hf_quant_config.json get it, each under the key that it uses. Everything else in them stays,
    in its order; the indentation is kept.

    Returns:
        New contents by name, and one sentence for each.
    """
    patterns = consistent_ignore(s)
    if patterns is None:
        return {}, ()
    contents = {}
    for name in CONFIG_NAMES:
        path = s.folder.root / name
        if not path.exists():
            continue
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        lists = list(_lists(content))
        for part, key in lists:
            part[key] = patterns
        if lists:
            contents[name] = in_style_of(text, content).encode()
    sentence = "{}: the ignore list was rewritten so that vLLM builds what is on disk"
    return contents, tuple(sentence.format(name) for name in contents)


LISTS = ("ignore", "exclude_modules", "ignored_layers", "modules_to_not_convert")


def _lists(content: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """The parts of a config that hold a list of modules that are not quantized, with its key."""
    text = content.get("text_config")
    for part in (content, text if isinstance(text, dict) else {}):
        for name in ("quantization_config", "quantization"):
            inner = part.get(name)
            for found in (inner, inner.get("quantization") if isinstance(inner, dict) else None):
                if not isinstance(found, dict):
                    continue
                listed = [key for key in LISTS if isinstance(found.get(key), list)]
                if found.get("quant_method") == "quark":
                    listed = ["exclude"]
                if not listed and found.get("quant_method") == "fp8":
                    listed = ["modules_to_not_convert"]
                yield from ((found, key) for key in listed)
