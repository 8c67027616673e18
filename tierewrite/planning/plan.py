"""What will be done with each tensor of a source: columns over its rows, groups, and the shards of the output."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import msgspec
import numpy as np

from tierewrite.errors import shown
from tierewrite.formats import Companion
from tierewrite.json_text import Compact
from tierewrite.planning.checks import Checks, ScaleMerges
from tierewrite.planning.policy import Policy
from tierewrite.source.table import TensorEntry, Tensors
from tierewrite.tables import Summary, change, count, repr_of, text

if TYPE_CHECKING:
    from rich.console import RenderableType

PLAN_SCHEMA = "tierewrite/plan/1"


class Action(str, enum.Enum):
    """What becomes of one tensor of the source. `code` is its number in a plan's column."""

    KEEP = "keep"
    RENAME = "rename"
    DROP = "drop"
    MERGE = "merge"
    REPACK = "repack"

    @property
    def code(self) -> int:
        """Its position in `ACTIONS`."""
        return ACTIONS.index(self)


ACTIONS = tuple(Action)


class TensorPlan(NamedTuple):
    """The fate of one source tensor: one row of a plan, for whoever asks for it by name.

    Attributes:
        name: its key in the source.
        action: see `Action`; the canonical side of a merged scale is MERGE, its other sides DROP.
        target: the key in the output that holds it or stands for it.
        merged: True where a merged value is written under `target` in this tensor's place.
        group: id of the tie group it belongs to, or None.
    """

    name: str
    action: Action
    target: str
    merged: bool = False
    group: str | None = None

    def __repr__(self) -> str:
        group = f", of {shown(self.group)}" if self.group is not None else ""
        return repr_of(self, f"{self.action.value}, {shown(self.name)}{group}")


@dataclass(frozen=True, slots=True, repr=False)
class GroupPlan(Summary):
    """One tie with everything that its parameter became on disk: dropped whole or kept whole.

    Attributes:
        id: the canonical parameter's name.
        canonical: the same name.
        aliases: the parameters tied to it, in the order of their declaration.
        origins: who declared each, one per alias.
        status: "planned" (will be rewritten if the bytes confirm it), "canonical" (nothing to do) or "unconfirmed".
        reason: why it is unconfirmed, else None.
        differing_aliases: alias -> why its side is not one with the canonical one, where others are. A planned group
            keeps these sides whole; an unconfirmed one keeps all.
        absent: aliases of which nothing is on disk.
        checks: keys that must be equal byte for byte, canonical (or surviving) side first.
        merges: scales that become one.
        repacked: modules of NVFP4 blobs whose sides differ by scaling alone: one is written, re-encoded.
        differing: the checks that those replace.
        kind: what sort of parameter it is, e.g. "experts.down_proj", for summaries.
        dropped: number of tensors that are dropped for it.
        dropped_bytes: their size.
        kept_names: source keys that another tensor stands for, and that stay because a consumer needs their names.
    """

    id: str
    canonical: str
    aliases: tuple[str, ...]
    origins: tuple[str, ...]
    status: str
    reason: str | None
    differing_aliases: Mapping[str, str]
    absent: tuple[str, ...]
    checks: Checks
    merges: ScaleMerges
    repacked: frozenset[str]
    differing: Checks
    kind: str
    dropped: int
    dropped_bytes: int
    kept_names: tuple[str, ...] = ()

    @property
    def side_names(self) -> tuple[str, ...]:
        """The parameters of the sides that are planned, canonical first: `checks.sides` counts them."""
        return (self.canonical, *(alias for alias in self.aliases if alias not in self.differing_aliases))

    def one_line(self) -> str:
        """See `Summary`."""
        aliases = count(len(self.aliases), "alias", "aliases")
        return f"{shown(self.canonical)}, {self.status}, {aliases}, {self.dropped:,} dropped"

    def lines(self) -> Iterator[RenderableType]:
        """See `Summary`."""
        yield text(self.one_line())
        for alias, origin in zip(self.aliases, self.origins, strict=True):
            yield text(f"  {shown(alias)} (declared by {shown(origin)})")
        if self.reason is not None:
            yield text(f"  {self.reason}", "yellow")


class OutTensor(NamedTuple):
    """A tensor of the output: the bytes of `source`, unless a merged value takes their place.

    Attributes:
        name: its key in the output.
        source: the key in the source whose header it has.
        start, end: byte range in the data section of its shard, end exclusive.
        added: see `OutShard`.
    """

    name: str
    source: str
    start: int
    end: int
    added: bool = False


@dataclass(frozen=True, eq=False)
class OutShard:
    """One file of the output, as columns: tensors in file order, offsets without holes.

    Attributes:
        name, names, source: of the file; the keys in the output; the tensors of the source.
        rows: int64 [tensors], the row of the source that each tensor is of.
        end: int64 [tensors], end of each tensor in the data section; each starts where the one before ends.
        added: bool [tensors], whether the source has no such tensor: only the header of its row is taken.
        data_start: offset of the data section in the file, modulo `stores.sharing.BLOCK_BYTES`; None: where the header
            ends.
    """

    name: str
    source: Tensors = field(repr=False)
    names: Sequence[str] = field(repr=False)
    rows: np.ndarray = field(repr=False)
    end: np.ndarray = field(repr=False)
    added: np.ndarray = field(repr=False)
    data_start: int | None = None

    @classmethod
    def of(cls, name: str, source: Tensors, tensors: Sequence[OutTensor]) -> OutShard:
        """The file that holds `tensors`. Raises KeyError: one is of a tensor that the source does not have."""
        rows = np.array([source.row[tensor.source] for tensor in tensors], np.int64)
        end = np.array([tensor.end for tensor in tensors], np.int64)
        added = np.array([tensor.added for tensor in tensors], bool)
        return cls(name, source, [tensor.name for tensor in tensors], rows, end, added)

    @property
    def start(self) -> np.ndarray:
        """int64 [tensors], start of each tensor in the data section."""
        start: np.ndarray = self.end - self.source.nbytes[self.rows]
        return start

    @property
    def nbytes(self) -> int:
        """Size of the data section."""
        return int(self.end[-1]) if len(self.end) else 0

    @property
    def tensors(self) -> OutTensors:
        """The rows one by one."""
        return OutTensors(self)


class OutTensors(Sequence[OutTensor]):
    """The tensors of a shard in file order, each made for whoever asks for it."""

    def __init__(self, shard: OutShard) -> None:
        self._shard = shard

    def __len__(self) -> int:
        return len(self._shard.names)

    @overload
    def __getitem__(self, index: int) -> OutTensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[OutTensor]: ...
    def __getitem__(self, index: int | slice) -> OutTensor | list[OutTensor]:
        shard = self._shard
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        row, end = shard.rows[index], int(shard.end[index])
        start = end - int(shard.source.end[row] - shard.source.start[row])
        return OutTensor(shard.names[index], shard.source.names[row], start, end, bool(shard.added[index]))

    def __iter__(self) -> Iterator[OutTensor]:
        shard = self._shard
        sources = map(shard.source.names.__getitem__, shard.rows.tolist())
        columns = (shard.names, sources, shard.start.tolist(), shard.end.tolist(), shard.added.tolist())
        return map(OutTensor, *columns)


@dataclass(frozen=True, slots=True)
class ExpertScales:
    """One activation scale of one projection over a layer's experts.

    Attributes:
        name: where, with "*" for the expert's number.
        companion: the role, with the direction of the merge.
        members: output key -> source key, of those that are there.
        missing: output keys of experts that have the weight but not this scale.
    """

    name: str
    companion: Companion
    members: Mapping[str, str]
    missing: tuple[str, ...]


class TensorJson(msgspec.Struct, gc=False):
    """One tensor as `tierewrite plan --json` prints it."""

    name: str
    action: str
    target: str
    merged: bool
    group: str | None


@dataclass(frozen=True, eq=False, repr=False)
class RewritePlan(Summary):
    """Everything that will be done, before a byte moves: columns over the rows of the source.

    Attributes:
        source: the tensors of the source.
        action: int8 [rows], position in `ACTIONS`.
        stands_for: int64 [rows], the row that holds the tensor in the output: its own, unless it is dropped.
        merged: bool [rows], whether a merged value is written in the row's place.
        group: int32 [rows], position in `groups`; -1 for none.
        new_names: row -> key in the output, where that is not its key in the source.
        groups: every declared tie of which something is on disk.
        shards: the files of the output.
        policy: the options.
        warnings: sentences for people.
        ties_source, ties_detail: who declared the ties: "class", "config", "ties-file", "mapping" or "none", and which.
        unpaired: declared aliases whose partner is not known.
        source_bytes: tensor bytes of the source.
        source_shards: number of its files.
        families: names of the quantization formats that were found.
        expert_scales: activation scales of unpacked experts, with `fill_missing_scales`.
        confirmed: whether the bytes were asked, and confirm it: a rewrite does exactly this.
    """

    source: Tensors
    action: np.ndarray = field(repr=False)
    stands_for: np.ndarray = field(repr=False)
    merged: np.ndarray = field(repr=False)
    group: np.ndarray = field(repr=False)
    new_names: Mapping[int, str] = field(repr=False)
    groups: tuple[GroupPlan, ...]
    shards: tuple[OutShard, ...]
    policy: Policy
    warnings: tuple[str, ...] = ()
    ties_source: str = "none"
    ties_detail: str = ""
    unpaired: tuple[str, ...] = ()
    source_bytes: int = 0
    source_shards: int = 0
    families: tuple[str, ...] = ()
    expert_scales: tuple[ExpertScales, ...] = ()
    confirmed: bool = False

    @property
    def tensors(self) -> TensorPlans:
        """A mapping: source key -> what becomes of the tensor. (`to_json` has a list, each entry with its `name`.)"""
        return TensorPlans(self)

    @cached_property
    def by_id(self) -> dict[str, GroupPlan]:
        """The groups by their ids."""
        return {group.id: group for group in self.groups}

    @property
    def total_bytes(self) -> int:
        """Tensor bytes of the output."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def total_tensors(self) -> int:
        """Number of tensors of the output."""
        return sum(len(shard.names) for shard in self.shards)

    def survivors(self) -> Survivors:
        """What is not dropped, by its key in the output."""
        return Survivors(self.source, self.action, self.new_names)

    def target(self, row: int) -> str:
        """The key in the output that holds the tensor of `row` or stands for it."""
        holder = int(self.stands_for[row])
        return self.new_names.get(holder) or self.source.names[holder]

    def targets(self) -> list[str]:
        """`target` of every row."""
        names = self.source.names
        if self.new_names:
            names = list(names)
            for row, name in self.new_names.items():
                names[row] = name
        return list(map(names.__getitem__, self.stands_for.tolist()))

    def unconfirmed(self) -> list[GroupPlan]:
        """The groups that stay whole."""
        return [group for group in self.groups if group.status == "unconfirmed"]

    def planned(self) -> list[GroupPlan]:
        """The groups of which something is dropped, renamed or merged."""
        return [group for group in self.groups if group.status == "planned"]

    def one_line(self) -> str:
        """See `Summary`."""
        tensors = f"{len(self.source):,} -> {self.total_tensors:,} tensors"
        return f"{tensors}, {change(self.source_bytes, self.total_bytes)}, {count(len(self.groups), 'tie')}"

    def lines(self) -> Iterator[RenderableType]:
        """See `Summary`."""
        from tierewrite.planning.summary import plan_lines

        return plan_lines(self)

    def changes_anything(self) -> bool:
        """Whether a rewrite would change a tensor, or may: what re-encoding and filling do is known from the bytes."""
        may = self.policy.unify_fused_scales or self.policy.fill_missing_scales
        return may or any(group.status != "canonical" for group in self.groups)

    def to_json(self) -> dict[str, Any]:
        """The object that `tierewrite plan --json` prints (schema tierewrite/plan/1)."""
        data = self.to_structs()
        return {**data, "tensors": msgspec.to_builtins(data["tensors"])}

    def to_structs(self) -> dict[str, Any]:
        """`to_json`, with the tensors as `TensorJson`: less to build where it is only to be written."""
        return {
            "schema": PLAN_SCHEMA,
            "options": self.policy.to_json(),
            "confirmed": self.confirmed,
            "ties": {"source": self.ties_source, "detail": self.ties_detail, "unpaired": list(self.unpaired)},
            "formats": list(self.families),
            "before": {"tensors": len(self.source), "bytes": self.source_bytes},
            "after": {
                "tensors": self.total_tensors,
                "bytes": self.total_bytes,
                "shards": [{"name": s.name, "tensors": len(s.names), "bytes": s.nbytes} for s in self.shards],
            },
            "groups": [group_json(group) for group in self.groups],
            "tensors": self._tensor_json(),
            "warnings": list(self.warnings),
        }

    def _tensor_json(self) -> Compact:
        actions = [action.value for action in ACTIONS]
        ids = [*(group.id for group in self.groups), None]  # the last one for -1
        return Compact(
            map(
                TensorJson,
                self.source.names,
                map(actions.__getitem__, self.action.tolist()),
                self.targets(),
                self.merged.tolist(),
                map(ids.__getitem__, self.group.tolist()),
            )
        )


class TensorPlans(Mapping[str, TensorPlan]):
    """A plan's rows by source key, in the order of the source; each is made for whoever asks for it."""

    def __init__(self, plan: RewritePlan) -> None:
        self._plan = plan

    def __getitem__(self, name: str) -> TensorPlan:
        plan = self._plan
        row = plan.source.row[name]
        group = int(plan.group[row])
        owner = plan.groups[group].id if group >= 0 else None
        return TensorPlan(name, ACTIONS[plan.action[row]], plan.target(row), bool(plan.merged[row]), owner)

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan.source)

    def __len__(self) -> int:
        return len(self._plan.source)

    def __contains__(self, name: object) -> bool:
        return name in self._plan.source

    def __repr__(self) -> str:
        return f"<what becomes of {count(len(self), 'tensor')}, by name in the source>"


class Survivors(Mapping[str, TensorEntry]):
    """The tensors of the source that are not dropped, by their keys in the output.

    Attributes:
        rows: int64 [survivors], their rows in the source, ascending.
        names: their keys in the output.
    """

    def __init__(self, source: Tensors, action: np.ndarray, new_names: Mapping[int, str]) -> None:
        self._source = source
        self.rows = np.flatnonzero(action != Action.DROP.code)
        names = source.names
        if new_names:
            self.names = [new_names.get(row) or names[row] for row in self.rows.tolist()]
        else:
            self.names = list(map(names.__getitem__, self.rows.tolist()))

    @cached_property
    def row(self) -> dict[str, int]:
        """Key in the output -> row in the source."""
        return dict(zip(self.names, self.rows.tolist(), strict=True))

    def __getitem__(self, name: str) -> TensorEntry:
        """The source's entry, under its own key."""
        return self._source.entry(self.row[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.row


def group_json(group: GroupPlan) -> dict[str, Any]:
    """A group as JSON: the part that plan and report have in common."""
    return {
        "id": group.id,
        "canonical": group.canonical,
        "aliases": list(group.aliases),
        "origins": list(group.origins),
        "kind": group.kind,
        "status": group.status,
        "reason": group.reason,
        "dropped_tensors": group.dropped,
        "dropped_bytes": group.dropped_bytes,
        "kept_names": list(group.kept_names),
        **({"differing_aliases": dict(group.differing_aliases)} if group.differing_aliases else {}),
    }


def kind_of(parameter: str) -> str:
    """The last two words of a parameter's module, without numbers: "experts.down_proj", "self_attn.q_proj"."""
    return ".".join([part for part in parameter.removesuffix(".weight").split(".") if not part.isdigit()][-2:])


def needed_for_confirmation(groups: Sequence[GroupPlan]) -> set[str]:
    """Keys whose digests decide whether the planned `groups` are confirmed."""
    return {key for group in groups if group.status == "planned" for key in group.checks.all_keys()}


def digests_wanted(plan: RewritePlan) -> list[str]:
    """Keys whose digests confirm the groups, or stand in the manifest; in the order of the source."""
    wanted = np.zeros(len(plan.source), bool)
    for group in plan.planned():
        rows = group.checks.rows
        wanted[rows[rows >= 0]] = True
    # A tensor that stands for others, or has a new name; the value of a merge is known without reading it all.
    shown = np.zeros(len(plan.source), bool)
    shown[plan.stands_for[plan.action == Action.DROP.code]] = True
    shown[list(plan.new_names)] = True
    wanted |= shown & (plan.action != Action.DROP.code) & (plan.action != Action.MERGE.code)
    return list(map(plan.source.names.__getitem__, np.flatnonzero(wanted).tolist()))
