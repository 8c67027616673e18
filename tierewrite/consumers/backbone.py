"""How a consumer maps the names of a checkpoint to its parameters: one entry an architecture, read from JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import translate
from functools import lru_cache
from pathlib import Path
from typing import Any

from tierewrite.consumers.class_facts import ClassFacts, ClassTable
from tierewrite.errors import UsageError, shown
from tierewrite.source.regular_files import read_bounded
from tierewrite.source.strict_json import strict_json
from tierewrite.stores.base import PathLike
from tierewrite.stores.places import local_file

_MAX_FILE_BYTES = 64 << 20


@dataclass(frozen=True)
class Backbone:
    """How a consumer maps checkpoint names to its parameters; from its backbones.json or a file of the user's.

    Attributes: as that file explains them. `architectures` is empty for the entry that serves all others. `facts` is
        what the consumer's own class does with names, where a table made by running it says so.
    """

    architectures: tuple[str, ...]
    source: str
    prefixes: tuple[tuple[str, str], ...]
    sides: tuple[str, ...]
    fused: Mapping[str, tuple[str, ...]]
    linear: tuple[Mapping[str, Any], ...]
    plain: tuple[str, ...]
    not_read: tuple[str, ...]
    generation: Mapping[str, Any] | None
    facts: ClassFacts | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Backbone:
        """One entry of the file. Raises KeyError or TypeError where it is not of that form."""
        return cls(
            architectures=tuple(data.get("architectures", ())),
            source=data.get("source", ""),
            prefixes=tuple((str(a), str(b)) for a, b in data["prefixes"]),
            sides=tuple(data.get("sides", ())),
            fused={k: tuple(v) for k, v in data.get("fused", {}).items()},
            linear=tuple(data.get("linear", ())),
            plain=tuple(data.get("plain", ())),
            not_read=tuple(data.get("not_read", ())),
            generation=data.get("generation"),
        )

    def map(self, name: str) -> str:
        """`name` under the backbone's names (WeightsMapper, models/utils.py `_map_name_with_shard`)."""
        for old, new in self.prefixes:
            if name.startswith(old):
                name = new + name[len(old) :]
        return name

    def listed(self, entry: str) -> str:
        """An entry of an ignore list under the consumer's names."""
        return self.map(entry) if self.facts is None else self.facts.map(entry)

    def passes_over(self, mapped: str) -> bool:
        """Whether the consumer drops or ignores the name without a warning."""
        return matches(mapped, self.not_read)

    def side(self, name: str) -> str | None:
        """The prefix of the side that a checkpoint name (or ignore pattern) belongs to."""
        return next((s for s in self.sides if name.startswith((s, s.removesuffix(".")))), None)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a shell wildcard of `patterns` is the whole name's."""
    return _union(patterns).match(name) is not None


@lru_cache(maxsize=64)
def _union(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(translate(pattern) for pattern in patterns) or "(?!)")


@dataclass(frozen=True)
class BackboneTable:
    """The backbones that are known of a consumer.

    Attributes:
        known: those of certain architectures; the first that fits counts.
        others: the one for all other architectures.
        classes: what is known of those by running the consumer's classes, or None.
    """

    known: tuple[Backbone, ...]
    others: Backbone
    classes: ClassTable | None = None

    @classmethod
    def names_unchanged(cls, source: str) -> BackboneTable:
        """The checkpoint's names are the consumer's, whatever the architecture; `source`: where that was read."""
        return cls((), Backbone((), source, (), (), {}, (), (), (), None))

    @classmethod
    def read(cls, path: Path, classes: Path | None = None) -> BackboneTable:
        """A table of our own: {"backbones": [...], "others": {...}}, and one of `ClassTable` beside it."""
        data = json.loads(path.read_text(encoding="utf-8"))
        table = None if classes is None else ClassTable(classes)
        return cls(tuple(map(Backbone.from_json, data["backbones"])), Backbone.from_json(data["others"]), table)

    def with_file(self, file: PathLike) -> BackboneTable:
        """This table, with a file of the user's asked first.

        Raises:
            UsageError: the file is unreadable or not of that form.
        """
        try:
            text = read_bounded(local_file(file, "a description of a backbone"), _MAX_FILE_BYTES).decode()
            given = strict_json(text)
            entries = tuple(map(Backbone.from_json, given.get("backbones", [given])))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else getattr(error, "strerror", None) or error
            raise UsageError(
                f"is no description of a backbone: {shown(str(why))}; expected the form of "
                "consumers/vllm/backbones.json",
                file=file,
            ) from None
        return replace(self, known=(*entries, *self.known))

    def of(self, architecture: str) -> Backbone:
        """The entry for `architecture`. An entry of the user's that names none fits every one."""
        fits = (b for b in self.known if not b.architectures or architecture in b.architectures)
        found = next(fits, None)
        if found is not None:
            return found
        facts = None if self.classes is None else self.classes.of(architecture)
        if facts is None:
            return self.others
        return replace(self.others, fused=facts.packed or self.others.fused, facts=facts)
