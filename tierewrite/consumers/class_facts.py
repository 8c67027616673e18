"""What a consumer's own model classes do with names, as data: read from a table that a script made by running them.

A name stands for all that differ in numbers alone: `model.layers.*.self_attn.q_proj.weight`. What the table lacks is
not known, which is never a verdict. The table of vLLM is `vllm/classes.json`; tests/vllm_loader/classes.py made it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tierewrite.formats.numbered import pattern_of, with_numbers

What = Literal["reads", "ignored", "refused"]


@dataclass(frozen=True)
class NameMapper:
    """A renaming that a model class applies to names and to ignore lists (vLLM's WeightsMapper).

    Attributes:
        steps: (kind, what is looked for, what takes its place), in the order in which they are applied. Kinds:
            "renaming" and "regex" (patterns), "substr", "prefix", "suffix".
    """

    steps: tuple[tuple[str, str, str], ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> NameMapper:
        """{kind: [[from, to], ...]}, kinds in order."""
        return cls(tuple((kind, str(a), str(b)) for kind, pairs in data.items() for a, b in pairs))

    def map(self, name: str) -> str:
        """As vLLM does (models/utils.py `WeightsMapper._map_name_with_shard`)."""
        for kind, old, new in self.steps:
            if kind == "regex":
                name = re.sub(old, new, name)
            elif kind == "substr":
                name = name.replace(old, new, 1)
            elif kind == "prefix" and name.startswith(old):
                name = new + name[len(old) :]
            elif kind == "suffix" and name.endswith(old):
                name = name[: len(name) - len(old)] + new
        return name


@dataclass(frozen=True)
class ClassFacts:
    """What a consumer does with the names of one model class. Everything but `architecture` may be empty: not known.

    Attributes:
        architecture: as config.json names it.
        registered: the consumer has a class of its own for it.
        refusal: the consumer's own words where it cannot load the class at all.
        problem: why the class could not be asked, so that `reads` and its kin are empty.
        mappers: renamings, in the order in which they are applied.
        packed: module of the consumer's -> the projections that it is made of (vLLM's packed_modules_mapping).
        takes: name of a module of the consumer's, as ignore lists have it -> its kind: "linear", "head", "experts",
            "attention", "embedding". Only these can be quantized.
        listed_as: parameter of the consumer's -> its module's name in `takes`, where that differs.
        reads: key -> the consumer's parameter that it fills or is a part of, without `.weight`.
        ignored: keys that the consumer passes over.
        refused: beginnings of keys, in whole components, at which the consumer aborts.
        unneeded: parameters of transformers' class that the consumer does not have, or does not read.
        odd: what happens to names that are no parameter's ("unknown", "mtp", "beyond layer", "buffer masked_bias",
            "kv k_proj.k_scale", ...).
        head: names in `takes` of the language model's head, with `tie_word_embeddings`; and without.
    """

    architecture: str
    registered: bool = False
    refusal: str = ""
    problem: str = ""
    mappers: tuple[NameMapper, ...] = ()
    packed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    takes: Mapping[str, str] = field(default_factory=dict)
    listed_as: Mapping[str, str] = field(default_factory=dict)
    reads: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    refused: frozenset[str] = frozenset()
    unneeded: frozenset[str] = frozenset()
    odd: Mapping[str, What] = field(default_factory=dict)
    head: tuple[str, str] = ("", "")

    @classmethod
    def from_json(cls, architecture: str, data: Mapping[str, Any]) -> ClassFacts:
        """One entry of the table."""
        reads = dict(data.get("reads", {}))
        same = {key: _without_weight(key) for key in reads.pop("same", ())}
        tied, untied = data.get("head", ("", ""))
        return cls(
            architecture=architecture,
            registered=bool(data.get("registered")),
            refusal=data.get("refusal", ""),
            problem=data.get("problem", ""),
            mappers=tuple(map(NameMapper.from_json, data.get("mappers", ()))),
            packed={k: tuple(v) for k, v in data.get("packed", {}).items()},
            takes=data.get("takes", {}),
            listed_as=data.get("listed_as", {}),
            reads=same | reads,
            ignored=frozenset(data.get("ignored", ())),
            refused=frozenset(data.get("refused", ())),
            unneeded=frozenset(data.get("unneeded", ())),
            odd={label: answer for answer, labels in data.get("odd", {}).items() for label in labels},
            head=(tied, untied),
        )

    @property
    def asked(self) -> bool:
        """Whether the class was built and given names."""
        return bool(self.reads)

    def map(self, name: str) -> str:
        """A key or an entry of an ignore list under the consumer's names."""
        for mapper in self.mappers:
            name = mapper.map(name)
        return name

    def what(self, key: str) -> What | None:
        """What the consumer does with the unquantized key; None where that is not known."""
        name = pattern_of(key)
        if name in self.reads:
            return "reads"
        if name in self.ignored:
            return "ignored"
        end = name.find(".")
        while end != -1:
            if name[:end] in self.refused:
                return "refused"
            end = name.find(".", end + 1)
        return "refused" if name in self.refused else None

    def parameter(self, key: str) -> str | None:
        """The consumer's parameter that the unquantized key is a part of, without `.weight`; None where not known."""
        found = self.reads.get(pattern_of(key))
        return None if found is None else with_numbers(found, key)

    def module(self, key: str) -> str | None:
        """The consumer's module that the unquantized key is a part of, as ignore lists name it; None if not known."""
        found = self.reads.get(pattern_of(key))
        if found is None:
            return None
        owner = self.listed_as.get(found, found)
        parent, _, leaf = found.rpartition(".")
        if owner not in self.takes and _EXPERTS.fullmatch(leaf):
            owner = self.listed_as.get(parent, parent)
        return with_numbers(owner, key)

    def kind(self, module: str) -> str | None:
        """The kind of a module of `takes`; None where it takes no quantization or is not known."""
        return self.takes.get(pattern_of(module))


_EXPERTS = re.compile(r"w\d+")  # w13, w2: the parameters of fused experts; in some classes modules of a dense MLP


def _without_weight(name: str) -> str:
    return name.removesuffix(".weight").removesuffix("_weight")


class ClassTable:
    """The facts of every class that was asked. The file is read when the first of them is needed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _data(self) -> Mapping[str, Any]:
        data: Mapping[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return data

    def of(self, architecture: str) -> ClassFacts | None:
        """The facts of one class; None where the table does not name it."""
        rows = self._data["classes"]
        row = rows.get(architecture)
        if row is None:
            return None
        like = rows[row["like"]] if "like" in row else row
        return ClassFacts.from_json(architecture, like)
