"""Which declared ties the bytes of SRC confirm, and what their tensors must then have become.

A tie is one parameter with everything that it became on disk; it is confirmed whole or not at all. Not confirmed are
sides that are stored differently or hold other bytes, companions that no format knows, and names that are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tierewrite import formats
from tierewrite.formats import Adjacency, Companion, Role
from tierewrite.proof.values import BLOBS, why_no_value
from tierewrite.source.table import Checkpoint
from tierewrite.ties.on_disk import DiskTies, TieGroup


@dataclass(frozen=True, slots=True)
class Stand:
    """A tensor of DST and the tensors of SRC that it stands for, the one whose place it has first.

    Attributes:
        merge: the companion whose rule made one value of several; None where the bytes are those of the first.
        repacked: part of an NVFP4 weight whose sides hold other bytes: one is encoded again to the scale of all.
        values: the tensors whose values became one, its own first; () where those are `sources`.
        needed: its name stays only because a consumer needs it.
    """

    target: str
    sources: tuple[str, ...]
    merge: Companion | None = None
    group: str | None = None
    repacked: bool = False
    values: tuple[str, ...] = ()
    needed: bool = False

    @property
    def covered(self) -> tuple[str, ...]:
        """The tensors whose value it has, its own first: with names that are needed, more than it stands for."""
        return self.values or self.sources

    @property
    def action(self) -> str:
        """As manifests call it."""
        if self.target != self.sources[0]:
            return "rename"
        return "keep" if self.merge is None else "merge"

    @property
    def changes(self) -> bool:
        """Whether anything is different from leaving the tensor alone."""
        return self.moves or self.merge is not None

    @property
    def moves(self) -> bool:
        """Whether a name is gone or new for it."""
        return self.sources != (self.target,)

    def beside(self, needed: Collection[str]) -> Iterator[Stand]:
        """This without the names in `needed`, which stay, and those with the value that this has."""
        first, *others = self.sources
        stay = [key for key in others if key in needed]
        gone = tuple(key for key in others if key not in needed)
        yield replace(self, sources=(first, *gone), values=self.sources if stay and self.merge is not None else ())
        for key in stay:
            values = (key, *(other for other in self.sources if other != key)) if self.merge is not None else ()
            yield replace(self, target=key, sources=(key,), values=values, needed=True)


@dataclass
class Group:
    """A declared tie, judged by the bytes of SRC.

    Attributes:
        tie: the sides that are judged together: all, or without those that are `kept`.
        stands: by name in DST, what stands for which of its tensors.
        members: the keys of its tensors.
        reason: why it is not confirmed; None if it is.
        kept: alias -> why its side is not one with the others, which are confirmed.
        kept_keys: the keys of those sides.
    """

    tie: TieGroup
    stands: dict[str, Stand] = field(default_factory=dict)
    members: list[str] = field(default_factory=list)
    reason: str | None = None
    kept: dict[str, str] = field(default_factory=dict)
    kept_keys: list[str] = field(default_factory=list)

    @property
    def refuted_keys(self) -> list[str]:
        """The keys of all that SRC does not confirm to be one."""
        return self.members if self.reason is not None else self.kept_keys

    @property
    def dropped(self) -> set[str]:
        """Names that must be gone from DST."""
        return {key for stand in self.stands.values() for key in stand.sources if key not in self.stands}

    @property
    def kept_names(self) -> list[str]:
        """Names that stay though another tensor of the tie has their value."""
        return sorted(stand.target for stand in self.stands.values() if stand.needed)


class _NotOne(Exception):
    """Why the sides of a declared tie are not one tensor."""


_KeysBySuffix = dict[str, tuple[str, Companion]]  # suffix with the parameter's own word as "*" -> key, companion


class Judge:
    """Judges every declared tie by the bytes of SRC.

    Args:
        source, disk: SRC, and the ties under its names.
        digests: of all its tensors.
        needed: names that stay though another tensor stands for them.
        split: with `--on-mismatch keep`: of a tie with several aliases, those that differ are kept by themselves.
    """

    def __init__(
        self,
        source: Checkpoint,
        disk: DiskTies,
        digests: Mapping[str, bytes],
        needed: Collection[str] = (),
        *,
        split: bool = False,
    ) -> None:
        self.needed = needed
        self.repack = False
        self.split = split
        self.entries, self.digests, self.disk = source.tensors, digests, disk
        self.families = formats.detect(source.config, source.quant_config, self.entries.keys())
        self.adjacency = Adjacency(self.entries.keys(), source.config, source.quant_config)
        described = [shard.metadata for shard in source.shards if "tensor_names" in shard.metadata]
        self.described = {key: value for metadata in described for key, value in metadata.items()}
        self.tied = {name: slot[0] for group in disk.groups for slot in group.slots for name in slot}
        self.claimed: dict[str, str] = {}
        # Keys by tied module: each key is listed under every ancestor that holds a tied parameter.
        self.below: dict[str, list[str]] = {name.rpartition(".")[0]: [] for name in self.tied}
        for key in self.entries:
            parent = key.rpartition(".")[0]
            while True:
                if parent in self.below:
                    self.below[parent].append(key)
                if not parent:
                    break
                parent = parent.rpartition(".")[0]

    def groups(self, why_different: Callable[[Group], str | None] | None = None) -> list[Group]:
        """Every tie with what it must have become.

        Args:
            why_different: with `--on-mismatch repack`, asked of a group whose sides differ in NVFP4 weights alone: why
                they are not one weight under several scales, or None.
        """
        found = []
        for tie in self.disk.groups:
            group = self._attempt(tie)
            if group.reason is not None and self.split:
                group = self._without_those_that_differ(tie) or group
            if group.reason is not None and why_different is not None:
                self.repack = True
                again = self._attempt(tie)
                self.repack = False
                why = why_different(again) if again.reason is None else again.reason
                if again.kept_names:
                    why = "names of it stay for a consumer, and such sides are not re-encoded"
                if why is None:
                    group = again
                else:
                    group.reason = f"{group.reason}; {why}"
            if group.reason is None:
                for stand in group.stands.values():
                    self.claimed.update(dict.fromkeys((*stand.sources, stand.target), tie.id))
            found.append(group)
        return found

    def _attempt(self, tie: TieGroup) -> Group:
        group = Group(tie)
        try:
            self._judge(group)
        except _NotOne as e:
            group = Group(tie, reason=str(e))
            group.members = [key for slot in tie.slots for name in slot for key in self._keys(name)]
        return group

    def _without_those_that_differ(self, tie: TieGroup) -> Group | None:
        """The aliases that are one with the canonical side, if there are any beside others that are not.

        Each alias is judged alone with the canonical side, which has to be there wherever any side is.
        """
        if tie.problem is not None or not all(
            self._has_weight(s[0]) for s in tie.slots if any(map(self._has_weight, s))
        ):
            return None
        alone = {alias: self._attempt(_sides(tie, [at])) for at, alias in enumerate(tie.aliases, 1)}
        kept = {alias: group.reason for alias, group in alone.items() if group.reason is not None}
        agreeing = [at for at, alias in enumerate(tie.aliases, 1) if alias not in kept]
        if not any(self._has_weight(slot[at]) for slot in tie.slots for at in agreeing):
            return None
        group = self._attempt(_sides(tie, agreeing))
        if group.reason is not None:
            return None
        group.kept = kept
        group.kept_keys = [
            key
            for slot in tie.slots
            for name, alias in zip(slot[1:], tie.aliases, strict=True)
            if alias in kept
            for key in self._keys(name)
        ]
        return group

    def _has_weight(self, name: str) -> bool:
        """Whether any tensor of the weight of the parameter `name` is there."""
        try:
            return any(companion.role is not Role.ACTIVATION for _, companion in self._parts(name).values())
        except _NotOne:
            return bool(self._keys(name))

    def _keys(self, name: str) -> list[str]:
        """Keys that the tied parameter `name` may have become."""
        parent, _, leaf = name.rpartition(".")
        skip = len(parent) + 1 if parent else 0
        if not parent and leaf == "weight":
            return [key for key in self.below[""] if key.startswith("weight") and self._free(key, name)]
        return [key for key in self.below[parent] if formats.concerns(leaf, key[skip:]) and self._free(key, name)]

    def _free(self, key: str, name: str) -> bool:
        return key == name or (key not in self.tied and key not in self.disk.owned)

    def _parts(self, name: str) -> _KeysBySuffix:
        parent, _, leaf = name.rpartition(".")
        skip = len(parent) + 1 if parent else 0
        parts: _KeysBySuffix = {}
        for key in self._keys(name):
            suffix = key[skip:]
            companion = formats.classify(leaf, suffix, self.families) or formats.classify(leaf, suffix)
            if companion is None:
                raise _NotOne(f"no known format has '{key}' beside the tied '{name}'")
            if companion.role not in (Role.PER_SIDE, Role.KV):
                named = suffix.startswith((leaf, f"_{leaf}_"))
                parts[suffix.replace(leaf, "*", 1) if named else suffix] = key, companion
        return parts

    def _judge(self, group: Group) -> None:
        if group.tie.problem is not None:
            raise _NotOne(group.tie.problem)
        for slot in group.tie.slots:
            self._judge_slot(group, slot)
        for stand in group.stands.values():
            for key in stand.sources:
                if key in self.claimed:
                    raise _NotOne(f"'{key}' already belongs to the tie of '{self.claimed[key]}'")
            if stand.target not in stand.sources and (
                stand.target in self.claimed or (stand.target in self.entries and stand.target not in group.members)
            ):
                raise _NotOne(f"the name '{stand.target}' belongs to another tensor")

    def _judge_slot(self, group: Group, slot: tuple[str, ...]) -> None:
        canonical = slot[0]
        # name, what is of the weight, what is of activations
        sides: list[tuple[str, _KeysBySuffix, _KeysBySuffix]] = []
        for name in slot:
            parts = self._parts(name)
            exact = {part: found for part, found in parts.items() if found[1].role is not Role.ACTIVATION}
            if exact:
                sides.append((name, exact, {part: f for part, f in parts.items() if part not in exact}))
                group.members += [key for key, _ in parts.values()]
        if not sides:
            return
        first, exact, _ = sides[0]
        for name, other, _ in sides[1:]:
            lone = exact.keys() ^ other.keys()
            if lone:
                raise _NotOne(f"'{first}' and '{name}' are stored differently: {', '.join(sorted(lone))}")
            said = {self.described[side] for side in (first, name) if side in self.described}
            if len(said) > 1:
                raise _NotOne(f"the header's metadata describes '{first}' and '{name}' differently")
            blob = _blob_parts(exact) if self.repack else ()
            for part, (key, _) in other.items():
                self._same(exact[part][0], key, header_only=part in blob)
            self._same_neighbours(first, name)
        rows = {part: tuple(other[part][0] for _, other, _ in sides) for part in exact}
        blob = _blob_parts(exact) if self.repack else ()
        repacked = any(len({self.digests[key] for key in rows[part]}) > 1 for part in blob)
        for part, keys in rows.items():
            self._stand(group, canonical, part, keys, None, repacked=repacked and part in blob)
        for part in dict.fromkeys(part for _, _, more in sides for part in more):
            found = [more[part] for _, _, more in sides if part in more]
            keys = tuple(key for key, _ in found)
            self._stand(group, canonical, part, keys, found[0][1])
            reason = why_no_value([self.entries[key] for key in keys])
            if reason is not None:  # also of one: its value would be that of all sides, and it has none
                raise _NotOne(f"{', '.join(keys)}: {reason}")

    def _same(self, one: str, other: str, header_only: bool = False) -> None:
        a, b = self.entries[one], self.entries[other]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            raise _NotOne(f"'{one}' is {a.dtype} {list(a.shape)}, '{other}' is {b.dtype} {list(b.shape)}")
        if not header_only and self.digests[one] != self.digests[other]:
            raise _NotOne(f"'{one}' and '{other}' hold different bytes")

    def _same_neighbours(self, one: str, other: str) -> None:
        """In a smoothed checkpoint, what the scale was folded into must be one as well."""
        if not self.adjacency.smoothed:
            return
        mine = {self._untied(key): key for key in self.adjacency.of(one.rpartition(".")[0])}
        for key in self.adjacency.of(other.rpartition(".")[0]):
            twin = mine.get(self._untied(key))
            if twin is not None and twin != key:
                self._same(twin, key)

    def _untied(self, key: str) -> str:
        """The canonical name of a parameter or of its companion, as the ties pair them; other names as they are."""
        if key in self.tied:
            return self.tied[key]
        parent, _, suffix = key.rpartition(".")
        canonical = self.tied.get(f"{parent}.weight")
        return key if canonical is None else f"{canonical.rpartition('.')[0]}.{suffix}"

    def _stand(
        self,
        group: Group,
        canonical: str,
        part: str,
        keys: tuple[str, ...],
        merge: Companion | None,
        repacked: bool = False,
    ) -> None:
        target = _target(canonical, part)
        stand = Stand(target, keys, None if keys == (target,) else merge, group.tie.id, repacked)
        group.stands.update((one.target, one) for one in stand.beside(self.needed))


def _sides(tie: TieGroup, aliases: Sequence[int]) -> TieGroup:
    """`tie` with the canonical side and those of these numbers alone, 1 for the first alias."""
    return replace(
        tie,
        aliases=tuple(tie.aliases[at - 1] for at in aliases),
        origins=tuple(tie.origins[at - 1] for at in aliases),
        slots=tuple((slot[0], *(slot[at] for at in aliases)) for slot in tie.slots),
    )


def _target(canonical: str, part: str) -> str:
    """The canonical key of a part."""
    parent, _, leaf = canonical.rpartition(".")
    suffix = part.replace("*", leaf, 1)
    return f"{parent}.{suffix}" if parent else suffix


def _blob_parts(parts: _KeysBySuffix) -> tuple[str, ...]:
    """The parts of an NVFP4 blob among a side's parts, or ()."""
    for blob in BLOBS:
        names = tuple("*" + name.removeprefix("weight") for name in blob)
        if all(name in parts for name in names):
            return names
    return ()
