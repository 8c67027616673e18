"""What to do: a pure function of what is on disk, what the model declares and what the caller wants.

`plan()` reads no tensor bytes. It answers: if every tie is confirmed, what becomes of each tensor of the source, and
in which output shard does each survivor stand? Groups that the headers alone refute are listed as unconfirmed and their
tensors kept. The result is data: printed by `tierewrite plan`, executed as it stands by the pass.

Refused here (the group is kept whole and the reason recorded):
  - sides with different sets of weight-derived tensors, or with different dtypes or shapes of them;
  - a companion that no family knows (`suffix` below the module of a tied weight);
  - a key that two groups claim, or a canonical name that is taken by something else.
"""

from __future__ import annotations

import bisect
import math
import operator
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, repeat
from typing import Any, NamedTuple, TypeVar, cast

from tierewrite import formats
from tierewrite.formats import Companion, Role
from tierewrite.formats.nvfp4_blobs import blob_of, fused_sets
from tierewrite.numbers import merging
from tierewrite.planning.plan import (
    Action,
    ExpertScales,
    GroupPlan,
    Merge,
    OutShard,
    OutTensor,
    RewritePlan,
    TensorPlan,
    kind_of,
)
from tierewrite.planning.policy import Policy
from tierewrite.source.rows import rows_of
from tierewrite.source.table import Checkpoint, TensorEntry, gc_paused
from tierewrite.ties.on_disk import DiskTies, TieGroup

_T = TypeVar("_T")


_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.([^.]+)\.([^.]+)")


# An enum's members take several times as long to look up as a name of the module, and there is one a tensor.
_KEEP, _RENAME, _DROP, _MERGE = Action.KEEP, Action.RENAME, Action.DROP, Action.MERGE


@gc_paused()
def plan(
    checkpoint: Checkpoint,
    ties: DiskTies,
    policy: Policy | None = None,
    *,
    ties_source: str = "none",
    ties_detail: str = "",
    unpaired: tuple[str, ...] = (),
    warnings: Iterable[str] = (),
    refuted: Mapping[str, str] | None = None,
    separate_kv: Iterable[str] = (),
    repacked: Mapping[str, frozenset[str]] | None = None,
    unfillable: frozenset[str] = frozenset(),
) -> RewritePlan:
    """What will be done with `checkpoint` if every tie that the headers allow is confirmed.

    Args:
        checkpoint: the source, headers only.
        ties: the declared ties under the names that are on disk.
        policy: the options; defaults to `Policy()`.
        ties_source, ties_detail, unpaired: who declared the ties, for the record.
        warnings: what reading the checkpoint and asking for its ties had to say.
        refuted: group id -> reason, for groups that their bytes have already refuted: they are kept whole.
        separate_kv: targets of KV-scale merges that are not to be carried out (their biases differ).
        repacked: group id -> modules whose NVFP4 blobs are known to differ by scaling alone.
        unfillable: output keys of scales that are missing and stay so.

    Returns:
        A plan in which each tensor of the source occurs once.
    """
    policy = policy or Policy()
    drafted = _Planner(
        checkpoint, ties, policy, refuted or {}, frozenset(separate_kv), repacked or {}, unfillable
    ).run()
    said = tuple(dict.fromkeys((*warnings, *drafted.warnings)))
    return replace(drafted, ties_source=ties_source, ties_detail=ties_detail, unpaired=unpaired, warnings=said)


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the suffixes below one parameter are; the same for every expert, so it is worked out once.

    Attributes:
        exact: part -> index of its suffix, for the tensors that must be identical on all sides.
        ranges: part -> (index, companion), for the activation scales.
        unknown: index of the first suffix that no family knows, or -1.
    """

    exact: dict[str, int]
    ranges: dict[str, tuple[int, Companion]]
    unknown: int = -1


_Header = tuple[str, tuple[int, ...]]
_first = operator.itemgetter(0)
_header_of = operator.itemgetter(1, 2)
"""Dtype and shape of an entry."""

_TOGETHER = (256, 16, 1)
"""How many slots are planned together: fewer where one of them is unlike the first, or refuted by its headers."""


class _Column(NamedTuple):
    """One side of the slots that are planned together; each slot has the same suffixes there.

    Attributes:
        names: the parameter's name in each slot.
        keys: for each suffix, its key in each slot.
        headers: for each suffix, dtype and shape in each slot.
        layout: what the suffixes are.
    """

    names: Sequence[str]
    keys: list[list[str]]
    headers: list[list[_Header]]
    layout: _Layout


class _Rows(NamedTuple):
    """Tensors of which one survives, in each slot.

    Attributes:
        keys: for each side, its key in each slot; the first side's survives.
        targets: the survivor's key in the output, in each slot.
        merged: whether a merged value takes its place.
    """

    keys: list[list[str]]
    targets: list[str]
    merged: bool = False

    @property
    def action(self) -> Action:
        """What becomes of the survivor."""
        return _RENAME if self.keys[0] != self.targets else _MERGE if self.merged else _KEEP


class _Unconfirmed(Exception):
    """Raised inside the planner when headers refute a group."""


@dataclass
class _Draft:
    """A group while it is planned."""

    tie: TieGroup
    tensors: dict[str, TensorPlan] = field(default_factory=dict)
    checks: list[tuple[str, ...]] = field(default_factory=list)
    merges: list[Merge] = field(default_factory=list)
    attention: dict[str, tuple[str, ...]] = field(default_factory=dict)
    touched: bool = False


class _Planner:
    def __init__(
        self,
        checkpoint: Checkpoint,
        ties: DiskTies,
        policy: Policy,
        refuted: Mapping[str, str],
        separate_kv: frozenset[str],
        repacked: Mapping[str, frozenset[str]],
        unfillable: frozenset[str],
    ) -> None:
        self.entries = checkpoint.tensors
        self.checkpoint = checkpoint
        self.ties = ties
        self.policy = policy
        self.refuted = refuted
        self.separate_kv = separate_kv
        self.repacked = repacked
        self.unfillable = unfillable
        last_words = {name.rpartition(".")[2] for name in self.entries}  # all that detection looks at
        self.families = formats.detect(checkpoint.config, checkpoint.quant_config, last_words)
        self.adjacency = formats.Adjacency(self.entries.keys(), checkpoint.config, checkpoint.quant_config)
        self.canonical_of = (
            {name: slot[0] for group in ties.groups for slot in group.slots for name in slot}
            if self.adjacency.smoothed
            else {}
        )
        # Looking half a million keys up costs more than all else here: what can be walked in an order is not looked up.
        self.sorted_entries = sorted(self.entries.values(), key=_first)
        self.sorted_keys = [entry[0] for entry in self.sorted_entries]
        # A tied parameter's own name is never a companion of its neighbour (a tied bias beside a tied weight).
        self.reserved = {name for group in ties.groups for slot in group.slots for name in slot}
        self.reserved |= ties.owned
        # None until a group decides; what none does is kept, in the end.
        self.fates: dict[str, TensorPlan | None] = dict.fromkeys(self.entries)
        self.plans: dict[str, TensorPlan] = {}
        self.layouts: dict[tuple[str, tuple[str, ...]], _Layout] = {}
        self.mergeable: dict[tuple[_Header, ...], str | None] = {}
        self.planned: set[str] = set()
        self.taken: set[str] = set()
        self.warnings: list[str] = []

    def run(self) -> RewritePlan:
        groups: list[GroupPlan] = []
        attention: dict[str, dict[str, tuple[str, ...]]] = {}
        blocked: set[str] = set()
        for tie in self.ties.groups:
            draft = _Draft(tie)
            reason = self.refuted.get(tie.id) or tie.problem
            if reason is None:
                try:
                    self._slots(draft, tie.slots)
                    self._claim(draft)
                except _Unconfirmed as error:
                    reason = str(error)
            if reason is not None:
                groups.append(self._group(tie, "unconfirmed", reason=reason))
                blocked.update(_attention_of(slot[0]) for slot in tie.slots)
                for key in self._members(tie):
                    self.fates[key] = TensorPlan(key, Action.KEEP, key, group=tie.id)
                continue
            self.fates.update(draft.tensors)
            for alias, canonical in draft.attention.items():
                attention.setdefault(alias, {}).setdefault(tie.id, canonical)
            modules = self.repacked.get(tie.id, frozenset())
            differing = (
                tuple(row for row in draft.checks if blob_of(row[0], self.entries)[0] in modules) if modules else ()
            )
            replaced = set(differing)
            for row in differing:
                self.fates[row[0]] = draft.tensors[row[0]]._replace(action=Action.REPACK)
            groups.append(
                self._group(
                    tie,
                    "planned" if draft.touched else "canonical",
                    checks=tuple(row for row in draft.checks if row not in replaced),
                    merges=tuple(draft.merges),
                    repacked=modules,
                    differing=differing,
                )
            )
        by_id = {group.id: group for group in groups}
        if self.policy.kv_scales == "merge":
            self._kv_scales({a: o for a, o in attention.items() if a not in blocked}, by_id)
        undecided = [name for name, fate in self.fates.items() if fate is None]
        self.fates.update(zip(undecided, map(TensorPlan, undecided, repeat(_KEEP), undecided), strict=True))
        self.plans = cast("dict[str, TensorPlan]", self.fates)
        if self.policy.unify_fused_scales:
            self._mark_fused()
        survivors, shard_bytes = self._counted(by_id)
        expert_scales = self._expert_scales() if self.policy.fill_missing_scales else ()
        return RewritePlan(
            expert_scales=expert_scales,
            tensors=self.plans,
            groups=tuple(by_id.values()),
            shards=self._layout(survivors, expert_scales, max(shard_bytes, default=0)),
            policy=self.policy,
            warnings=tuple(self.warnings),
            source_bytes=sum(shard_bytes),
            source_shards=len(self.checkpoint.shards),
            families=self.families,
            by_id=by_id,
        )

    def _counted(self, by_id: dict[str, GroupPlan]) -> tuple[dict[str, TensorEntry], list[int]]:
        """Writes into the groups what is dropped; returns output key -> entry of all else, and each shard's bytes."""
        shard_bytes = [0] * len(self.checkpoint.shards)
        survivors: dict[str, TensorEntry] = {}
        dropped: dict[str | None, list[int]] = {name: [] for name in by_id}
        for entry, (_, action, target, _, owner) in zip(self.entries.values(), self.plans.values(), strict=True):
            _, _, _, shard, start, end = entry
            shard_bytes[shard] += end - start
            if action is _DROP:
                dropped[owner].append(end - start)
            else:
                survivors[target] = entry
        for name, group in by_id.items():
            if sizes := dropped[name]:
                by_id[name] = replace(group, dropped=len(sizes), dropped_bytes=sum(sizes))
        return survivors, shard_bytes

    @staticmethod
    def _group(tie: TieGroup, status: str, **more: Any) -> GroupPlan:
        return GroupPlan(tie.id, tie.canonical, tie.aliases, tie.origins, status, kind=kind_of(tie.canonical), **more)

    # -- one parameter as it is on disk --------------------------------------------------------------------------

    def _below(self, prefix: str) -> list[TensorEntry]:
        """The tensors whose keys begin with `prefix`, by bisection: no list is searched."""
        keys = self.sorted_keys
        start = end = bisect.bisect_left(keys, prefix)
        while end < len(keys) and keys[end].startswith(prefix):
            end += 1
        return self.sorted_entries[start:end]

    def _side(self, name: str) -> tuple[list[TensorEntry], _Layout]:
        """What the parameter `name` became on disk.

        A part is the same on every side of a tie: the suffix below the module, with the parameter's own last word
        written as "*" (sides may call it differently).

        Raises:
            _Unconfirmed: a suffix that no family knows.
        """
        parent, _, leaf = name.rpartition(".")
        stem = f"{parent}." if parent else ""
        if leaf == "weight":
            entries = self._below(stem) if parent else self._below(leaf)
        else:
            entries = [*self._below(f"{name}_"), *self._below(f"{name}.")]
            if name in self.entries:
                entries.insert(0, self.entries[name])
        reserved = self.reserved
        entries = [entry for entry in entries if (key := entry[0]) not in reserved or key == name]
        cut = len(stem)
        suffixes = tuple([entry[0][cut:] for entry in entries])
        layout = self.layouts.get((leaf, suffixes))
        if layout is None:
            layout = self.layouts[leaf, suffixes] = self._classified(leaf, suffixes)
        if layout.unknown >= 0:
            raise _Unconfirmed(
                f"no known format has the tensor '{entries[layout.unknown].name}' (suffix "
                f"'{suffixes[layout.unknown]}') beside the tied parameter '{name}'"
            )
        return entries, layout

    def _column(self, names: Sequence[str]) -> _Column:
        """What the parameters `names`, one side of as many slots, became on disk.

        Raises:
            _Unconfirmed: as `_side` does for the first; or another is unlike the first.
        """
        entries, layout = self._side(names[0])
        count = len(entries)
        if len(names) > 1:
            entries = self._alike(names, [entry.name for entry in entries])
        keys = [entry[0] for entry in entries]
        headers = list(map(_header_of, entries))
        return _Column(
            names, [keys[i::count] for i in range(count)], [headers[i::count] for i in range(count)], layout
        )

    def _alike(self, names: Sequence[str], first: Sequence[str]) -> list[TensorEntry]:
        """The tensors below the weights `names`, one after the other.

        Args:
            first: the keys below the first: every other has to have the same suffixes, and none that is reserved.

        Raises:
            _Unconfirmed: one has not.
        """
        stems = [name.removesuffix("weight") for name in names]
        suffixes = [key[len(stems[0]) :] for key in first]
        count = len(first)
        starts = [bisect.bisect_left(self.sorted_keys, stem) for stem in stems]
        entries = [entry for start in starts for entry in self.sorted_entries[start : start + count]]
        following = [self.sorted_keys[start + count : start + count + 1] for start in starts]
        keys = [stem + suffix for stem in stems for suffix in suffixes]
        if (
            not all(name.endswith(".weight") for name in names)
            or [entry[0] for entry in entries] != keys
            or any(key.startswith(stem) for stem, more in zip(stems, following, strict=True) for key in more)
            or any(not self.reserved.isdisjoint(keys[i::count]) for i in range(count) if suffixes[i] != "weight")
        ):
            raise _Unconfirmed(f"'{names[0]}' and the other {len(names) - 1} are not alike")
        return entries

    def _classified(self, leaf: str, suffixes: tuple[str, ...]) -> _Layout:
        exact: dict[str, int] = {}
        ranges: dict[str, tuple[int, Companion]] = {}
        for index, suffix in enumerate(suffixes):
            companion = formats.classify(leaf, suffix, self.families) or formats.classify(leaf, suffix)
            if companion is None:
                return _Layout(exact, ranges, unknown=index)
            part = "*" + suffix[len(leaf) :] if suffix.startswith(leaf) else suffix
            if companion.role.identical:
                exact[part] = index
            elif companion.role is Role.ACTIVATION:
                ranges[part] = (index, companion)
        return _Layout(exact, ranges)

    def _canonical_key(self, name: str, part: str) -> str:
        parent, _, leaf = name.rpartition(".")
        suffix = leaf + part[1:] if part.startswith("*") else part
        return f"{parent}.{suffix}" if parent else suffix

    def _slots(self, draft: _Draft, slots: Sequence[tuple[str, ...]], sizes: Sequence[int] = _TOGETHER) -> None:
        """Plans all `slots`, as many together as the first of `sizes` says.

        Raises:
            _Unconfirmed: headers refute one of them: the first.
        """
        size, *smaller = sizes
        for at in range(0, len(slots), size):
            some = slots[at : at + size]
            try:
                self._together(draft, some)
            except _Unconfirmed:
                if len(some) == 1:
                    raise
                self._slots(draft, some, smaller)

    def _together(self, draft: _Draft, slots: Sequence[tuple[str, ...]]) -> None:
        """Plans slots that are alike, as the thousands of a mixture of experts are: by columns, which is faster.

        Raises:
            _Unconfirmed: headers refute one of them, or several are not alike. Nothing is planned then.
        """
        columns = [self._column(names) for names in zip(*slots, strict=True)]
        present = [column for column in columns if column.layout.exact]
        if not present:
            return
        first = present[0]
        self._compare(present)
        rows = []
        for part in first.layout.exact:
            keys = [column.keys[column.layout.exact[part]] for column in present]
            targets = self._targets(columns[0], first, part, keys[0])
            rows.append(_Rows(keys, targets))
        checks = self._checks(rows, present) if len(present) > 1 else []
        merges = []
        ranges = {part: companion for column in present for part, (_, companion) in column.layout.ranges.items()}
        for part, companion in ranges.items():
            found = [(column, column.layout.ranges[part][0]) for column in present if part in column.layout.ranges]
            keys = [column.keys[index] for column, index in found]
            for headers in set(zip(*[column.headers[index] for column, index in found], strict=True)):
                reason = self._unmergeable([column[0] for column in keys], headers)
                if reason is not None:
                    raise _Unconfirmed(reason)
            targets = self._targets(columns[0], found[0][0], part, keys[0])
            merged = len(keys) > 1 or keys[0] != targets
            rows.append(_Rows(keys, targets, merged))
            if merged:
                merges.append(map(Merge, targets, zip(*keys, strict=True), repeat(companion)))
        draft.tensors.update(_fates(rows, draft.tie.id))
        draft.checks.extend(checks)
        draft.merges.extend(_in_turn(merges))
        if first is not columns[0] or len(present) > 1:
            draft.touched = True
        if self.policy.kv_scales == "merge" and len(columns) > 1:
            for slot in slots:
                attention = _attention_of(slot[0])
                if attention:
                    draft.attention[attention] = tuple(map(_attention_of, slot))

    def _targets(self, canonical: _Column, survivor: _Column, part: str, keys: list[str]) -> list[str]:
        """The output's keys for the `keys` of `survivor`: its own if it is the canonical side, else put together."""
        return keys if survivor is canonical else [self._canonical_key(name, part) for name in canonical.names]

    def _checks(self, rows: Sequence[_Rows], present: Sequence[_Column]) -> list[tuple[str, ...]]:
        """What must be equal, slot by slot: weight-derived tensors, and in a smoothed checkpoint their neighbours."""
        exact = [zip(*row.keys, strict=True) for row in rows]
        if not self.adjacency.smoothed:
            return _in_turn(exact)
        checks: list[tuple[str, ...]] = []
        sides = zip(*[column.names for column in present], strict=True)
        for names, of_slot in zip(sides, zip(*exact, strict=True), strict=True):
            checks.extend(of_slot)
            checks.extend(self._neighbours(names))
        return checks

    def _compare(self, present: Sequence[_Column]) -> None:
        """The weight-derived tensors of the first side, the same set with the same headers, against every other's.

        Raises:
            _Unconfirmed: with the first difference.
        """
        first = present[0]
        exact = first.layout.exact
        for side in present[1:]:
            other = side.layout.exact
            if other.keys() != exact.keys():
                lacking = sorted(exact.keys() - other.keys())
                extra = sorted(other.keys() - exact.keys())
                have = first.keys[exact[lacking[0]]][0] if lacking else side.keys[other[extra[0]]][0]
                name = side.names[0] if lacking else first.names[0]
                raise _Unconfirmed(
                    f"'{first.names[0]}' and '{side.names[0]}' are stored differently: '{have}' has no twin on the "
                    f"side of '{name}'"
                )
            for part, index in other.items():
                if first.headers[exact[part]] != side.headers[index]:
                    mine, theirs = self.entries[first.keys[exact[part]][0]], self.entries[side.keys[index][0]]
                    raise _Unconfirmed(
                        f"'{mine.name}' is {_header_text(mine)} but '{theirs.name}' is {_header_text(theirs)}"
                    )

    def _neighbours(self, names: Sequence[str]) -> Iterator[tuple[str, str]]:
        """In a smoothed checkpoint, what a side's scale was folded into must be one as well."""
        first, *others = (
            {self._untied(key): key for key in self.adjacency.of(name.rpartition(".")[0])} for name in names
        )
        for other in others:
            for untied, key in other.items():
                twin = first.get(untied, key)
                if twin == key:
                    continue
                mine, theirs = self.entries[twin], self.entries[key]
                if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
                    raise _Unconfirmed(
                        f"'{twin}' is {_header_text(mine)} but '{key}' is {_header_text(theirs)}, and both were "
                        f"smoothed together with '{names[0]}'"
                    )
                yield twin, key

    def _untied(self, key: str) -> str:
        """The canonical name of a tied parameter or of its companion; any other key as it is."""
        if key in self.canonical_of:
            return self.canonical_of[key]
        parent, _, suffix = key.rpartition(".")
        canonical = self.canonical_of.get(f"{parent}.weight")
        return key if canonical is None else f"{canonical.rpartition('.')[0]}.{suffix}"

    def _claim(self, draft: _Draft) -> None:
        """A tensor belongs to one group, and a canonical name to one survivor."""
        renamed = [target for _, action, target, _, _ in draft.tensors.values() if action is _RENAME]
        if renamed or any(map(self.fates.get, draft.tensors)):
            for key, fate in draft.tensors.items():
                if self._claimed(key):
                    raise _Unconfirmed(f"'{key}' already belongs to the tie of '{self._claimed(key)}'")
                target = fate.target
                if fate.action is _RENAME and (
                    (target in self.entries and target not in draft.tensors) or target in self.taken
                ):
                    raise _Unconfirmed(f"'{key}' would become '{target}', a name that another tensor has")
        self.planned.add(draft.tie.id)
        self.taken.update(renamed)

    def _claimed(self, key: str) -> str | None:
        """The planned group that `key` belongs to; a group that is kept whole claims nothing."""
        fate = self.fates[key]
        return fate.group if fate is not None and fate.group in self.planned else None

    def _members(self, tie: TieGroup) -> list[str]:
        """Keys that belong to an unconfirmed group: the named parameters and what stands below their modules."""
        members: list[str] = []
        for slot in tie.slots:
            for name in slot:
                if name.endswith(".weight"):
                    below = self._below(name[: -len("weight")])
                else:
                    below = [*self._below(f"{name}_"), *self._below(f"{name}.")]
                members.extend(
                    entry.name
                    for entry in below
                    if entry.name not in self.reserved and not self._claimed(entry.name)
                )
                if name in self.entries and not self._claimed(name):
                    members.append(name)
        return members

    def _unmergeable(self, keys: Sequence[str], headers: tuple[_Header, ...]) -> str | None:
        """Why the scales `keys` cannot become one, by their headers; None if they can."""
        if headers not in self.mergeable:
            self.mergeable[headers] = merging.mergeable(headers)
        reason = self.mergeable[headers]
        return None if reason is None else f"{', '.join(repr(key) for key in keys)}: {reason}"

    # -- KV-cache scales -----------------------------------------------------------------------------------------

    def _kv_scales(
        self, attention: dict[str, dict[str, tuple[str, ...]]], by_id: dict[str, GroupPlan]
    ) -> None:
        """Merges the KV-cache scales of attention modules whose projections are tied.

        The pairing of the attention modules comes from the ties of their projections, so that a layer which has a
        `v_proj.v_scale` but no `v_proj.weight` is paired too.
        """
        found: dict[str, dict[str, tuple[str, Companion]]] = {}
        for key in self.sorted_keys:
            hit = formats.kv_scale(key, self.families) or formats.kv_scale(key)
            if hit is not None:
                module, rest, companion = hit
                found.setdefault(module, {})[rest] = (key, companion)
        claimed = {key for rests in found.values() for key, _ in rests.values() if self._claimed(key)}
        for canonical, owners in sorted(attention.items()):
            sides = next(iter(owners.values()))
            rests = sorted({rest for side in sides for rest in found.get(side, {})})
            # Biases and zero points have no common value: they are equal, or the layer's scales stay apart.
            exact = [r for r in rests if any(r in found.get(s, {}) and found[s][r][1].merge is None for s in sides)]
            biases = tuple(
                keys
                for rest in exact
                for keys in [tuple(found[s][rest][0] for s in sides if rest in found.get(s, {}))]
                if len(keys) > 1
            )
            scales_ = tuple(
                tuple(found[s][rest][0] for s in sides if rest in found.get(s, {})) for rest in rests
            )
            lone_bias = any(
                sum(rest in found.get(side, {}) for side in sides) != len([s for s in sides if s in found])
                for rest in exact
            )
            if lone_bias:
                self.warnings.append(f"KV scales of '{canonical}' are kept apart: a bias has no twin on another side")
                continue
            for rest in rests:
                keys = tuple(found[s][rest][0] for s in sides if rest in found.get(s, {}))
                companion = found[next(s for s in sides if rest in found.get(s, {}))][rest][1]
                target = f"{canonical}.{rest}"
                owner = self._kv_owner(rest, owners)
                if keys == (target,) or target in self.separate_kv:
                    continue
                headers = tuple((self.entries[key].dtype, self.entries[key].shape) for key in keys)
                if companion.merge is None:
                    apart = len(set(headers)) > 1
                else:
                    apart = self._unmergeable(keys, headers) is not None
                if apart or not claimed.isdisjoint(keys):
                    self.warnings.append(f"KV scale '{target}' is kept apart: its sides are stored differently")
                    continue
                # With a bias the zero point moves too: only equal scales and biases stand for each other.
                merge = Merge(target, keys, companion, kv=True, only_if_equal=scales_ if biases else ())
                group = by_id[owner]
                by_id[owner] = replace(group, merges=(*group.merges, merge), status="planned")
                row = _Rows([[key] for key in keys], [target], companion.merge is not None)
                self.fates.update(_fates([row], owner))

    @staticmethod
    def _kv_owner(rest: str, owners: Iterable[str]) -> str:
        """The group that a KV scale is listed under: its own projection's, else the attention's first."""
        word = rest.partition(".")[0]
        for group in sorted(owners):
            if f".{word}." in f".{group}.":
                return group
        return min(owners)

    def _expert_scales(self) -> tuple[ExpertScales, ...]:
        """The activation scales of unpacked experts, projection by projection."""
        have: dict[tuple[str, str, str], dict[str, str]] = {}
        weights: dict[tuple[str, str], dict[str, None]] = {}
        companions: dict[str, Companion | None] = {}
        for plan_ in self.plans.values():
            if plan_.action is Action.DROP:
                continue
            found = _EXPERT.match(plan_.target)
            if found is None:
                continue
            prefix, number, projection, suffix = found.groups()
            companion = formats.classify("weight", suffix, self.families) or formats.classify("weight", suffix)
            companions[suffix] = companion
            if companion is None:
                continue
            if companion.main:
                weights.setdefault((prefix, projection), {})[number] = None
            elif companion.role is Role.ACTIVATION and companion.merge is not None:
                have.setdefault((prefix, projection, suffix), {})[number] = plan_.name
        sets = []
        for (prefix, projection, suffix), members in have.items():
            companion = companions[suffix]
            assert companion is not None
            sets.append(
                ExpertScales(
                    f"{prefix}.*.{projection}.{suffix}",
                    companion,
                    {f"{prefix}.{number}.{projection}.{suffix}": key for number, key in members.items()},
                    tuple(
                        name
                        for number in weights.get((prefix, projection), {})
                        if number not in members
                        and (name := f"{prefix}.{number}.{projection}.{suffix}") not in self.unfillable
                    ),
                )
            )
        return tuple(sets)

    def _mark_fused(self) -> None:
        """Which weights may be re-encoded: headers do not tell whether the fused scales differ already."""
        survivors = {p.target: self.entries[p.name] for p in self.plans.values() if p.action is not Action.DROP}
        for modules in fused_sets(survivors):
            for module, parts in modules.items():
                for part in parts:
                    name = survivors[f"{module}.{part}"].name
                    self.plans[name] = self.plans[name]._replace(action=Action.REPACK)

    # -- where the survivors stand -------------------------------------------------------------------------------

    def _layout(
        self, survivors: dict[str, TensorEntry], expert_scales: tuple[ExpertScales, ...], fullest: int
    ) -> tuple[OutShard, ...]:
        """The output's shards, of `survivors` and of the scales that are added; `fullest` limits them by default."""
        limit = fullest if self.policy.max_shard_size is None else self.policy.max_shard_size
        added = {name: group for group in expert_scales for name in group.missing}
        for name, group in added.items():
            survivors[name] = self.entries[next(iter(group.members.values()))]
        if not survivors:
            return (OutShard("model.safetensors", ()),)
        widths = _element_sizes(survivors.values())
        shards = []
        for filename, names in _files(survivors, limit).items():
            # Wide dtypes first keeps every tensor aligned to its element, as safetensors' own serializer does; within a
            # width the source's order makes neighbours of neighbours, so that runs are copied in one piece.
            rows = [
                (widths[dtype], name, source, end - start)
                for name in names
                for source, dtype, _, _, start, end in [survivors[name]]
            ]
            rows.sort(key=_first, reverse=True)
            ordered = [row[1] for row in rows]
            ends = list(accumulate([row[3] for row in rows]))
            columns = (ordered, [row[2] for row in rows], [0, *ends[:-1]], ends, map(added.__contains__, ordered))
            shards.append(OutShard(filename, tuple(rows_of(OutTensor, zip(*columns, strict=True)))))
        return tuple(shards)


def _in_turn(columns: Iterable[Iterable[_T]]) -> list[_T]:
    """The first of each column, then the second of each, and so on."""
    return list(chain.from_iterable(zip(*columns, strict=True)))


def _fates(rows: Sequence[_Rows], group: str) -> dict[str, TensorPlan]:
    """The plans of all keys in `rows`, slot by slot."""
    columns = [
        zip(keys, repeat(action), row.targets, repeat(merged), repeat(group), strict=False)
        for row in rows
        for keys, action, merged in [
            (row.keys[0], row.action, row.merged),
            *((others, _DROP, False) for others in row.keys[1:]),
        ]
    ]
    return {plan_[0]: plan_ for plan_ in _in_turn([rows_of(TensorPlan, column) for column in columns])}


def _files(survivors: Mapping[str, TensorEntry], limit: int) -> Mapping[str, Collection[str]]:
    """File name -> names, as Hugging Face's own splitting has it, which is asked only where there is more than one."""
    if sum([end - start for _, _, _, _, start, end in survivors.values()]) <= limit:
        return {"model.safetensors": survivors.keys()}
    from huggingface_hub.serialization import split_state_dict_into_shards_factory

    return split_state_dict_into_shards_factory(
        survivors,
        get_storage_size=lambda entry: entry.end - entry.start,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    ).filename_to_tensors


def _attention_of(name: str) -> str:
    """The module around a projection: "a.self_attn" for "a.self_attn.k_proj.weight"."""
    return name.rpartition(".")[0].rpartition(".")[0]


def _header_text(entry: TensorEntry) -> str:
    return f"{entry.dtype} {list(entry.shape)}"


def _element_sizes(entries: Iterable[TensorEntry]) -> dict[str, int]:
    """Bytes an element of each dtype (0 for less than one): derived, so that a new dtype needs no table."""
    sizes: dict[str, int] = {}
    for _, dtype, shape, _, start, end in entries:
        if not sizes.get(dtype):
            count = math.prod(shape)
            sizes[dtype] = (end - start) // count if count else 0
    return sizes
