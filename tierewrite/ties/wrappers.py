"""Names of wrappers around a model that were saved as a part of every tensor's name: `_orig_mod.`, `module.`, ...

`torch.compile`, DistributedDataParallel, FSDP, PEFT and trainers hold the model as a member of their own, and its name
is the beginning of every name in their state dict. No loader knows it; nor do the ties of the model.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile

from tierewrite.errors import shown
from tierewrite.source.table import Names, as_names
from tierewrite.ties.tie_group import DiskTies, TieGroup

OUTER = (
    "base_model.model",  # PEFT
    "_orig_mod",  # torch.compile
    "module",  # DistributedDataParallel, DeepSpeed
    "_fsdp_wrapped_module",  # FullyShardedDataParallel
    "_checkpoint_wrapped_module",  # torch's activation checkpointing
    "_forward_module",  # Lightning Fabric
    "pretrained_model",  # TRL's model with a value head
    "actor_module",  # trainers by reinforcement learning
    "llm",  # a language model inside a larger one, saved alone
    "language_model",  # the same, as LLaVA and others call it
)
"""Wrappers that count where every name begins with one, one inside the other in any order."""

INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""torch's own names of wrappers, which no model gives its parts: they count wherever they stand in a name."""

_OUTER = re.compile(rf"(?:(?:{'|'.join(map(re.escape, OUTER))})\.)+")
_INNER = re.compile(rf"(?<![^.])(?:{'|'.join(INNER)})\.")


@dataclass(frozen=True)
class Unwrapped:
    """The names of a checkpoint without those of wrappers.

    Attributes:
        prefix: the wrappers that every name begins with, e.g. "module._orig_mod."; "" if only parts are wrapped.
        names: the names without wrappers, row by row.
        keys: the names as they are on disk, row by row.
    """

    prefix: str
    names: Names
    keys: Names = field(repr=False)

    @property
    def said(self) -> str:
        """Where wrappers stand, in words."""
        return f"every name begins with '{shown(self.prefix)}'" if self.prefix else "some names hold those of wrappers"

    def on_disk(self, name: str) -> str:
        """The key of a name without wrappers; for one that has none, how it would be spelled beside the others."""
        row = self.names.row.get(name)
        if row is not None:
            return self.keys.names[row]
        scope = name
        while scope:
            scope = scope.rpartition(".")[0]
            below = f"{scope}." if scope else ""
            first = bisect_left(self._sorted, (below, 0))
            last = bisect_left(self._sorted, (f"{below}\U0010ffff", 0)) - 1
            if first <= last:
                ends = [self.keys.names[self._sorted[at][1]] for at in (first, last)]
                return self._wrapped(below, common_words(*ends)) + name[len(below) :]
        return self.prefix + name

    @cached_property
    def _sorted(self) -> list[tuple[str, int]]:
        return sorted((name, row) for row, name in enumerate(self.names.names))

    def _wrapped(self, scope: str, common: str) -> str:
        """`scope` as `common`, which the keys below it begin with, spells it; with the wrappers right after it."""
        rest, found = scope, self.prefix
        for word in common[len(self.prefix) :].split(".")[:-1]:
            if word in INNER and not rest.startswith(f"{word}."):
                found += f"{word}."
            elif rest.startswith(f"{word}."):
                found, rest = f"{found}{word}.", rest[len(word) + 1 :]
            else:
                break
        return found + rest

    def restored(self, disk: DiskTies) -> DiskTies:
        """Ties that were found under names without wrappers, under the keys on disk."""
        return replace(
            disk,
            groups=tuple(self._group(group) for group in disk.groups),
            owned={self.on_disk(name) for name in disk.owned},
        )

    def _group(self, group: TieGroup) -> TieGroup:
        return replace(group, slots=tuple(tuple(map(self.on_disk, slot)) for slot in group.slots))


def common_words(one: str, other: str) -> str:
    """The words between dots that both names begin with, with the dot after the last."""
    pairs = zip(one.split(".")[:-1], other.split(".")[:-1], strict=False)
    return "".join(f"{first}." for first, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def unwrapped(keys: Collection[str]) -> Unwrapped | None:
    """`keys` without the names of wrappers; None if there are none, or names would become equal.

    Only the names are looked at: whether a model calls a part of its own like a wrapper, its class knows.
    """
    table = as_names(keys)
    first = next(iter(table.names), "")
    outer = _OUTER.match(first)
    prefix = outer[0] if outer else ""
    while prefix and not all(name.startswith(prefix) for name in table.names):
        inner = _OUTER.match(prefix[: prefix[:-1].rfind(".") + 1])
        prefix = inner[0] if inner else ""
    inside = any(word in module for word in INNER for module in table.modules)
    if not prefix and not inside:
        return None
    names = [name[len(prefix) :] for name in table.names]
    if inside:
        names = [_INNER.sub("", name) for name in names]
    if len(set(names)) < len(names) or not all(names):
        return None
    return Unwrapped(prefix, Names(names), table)
