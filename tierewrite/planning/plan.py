"""TODO."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tierewrite.formats import Companion
from tierewrite.planning.policy import Policy
from tierewrite.source.table import gc_paused

PLAN_SCHEMA = "tierewrite/plan/1"


class Action(str, enum.Enum):
    """What becomes of one tensor of the source."""

    KEEP = "keep"
    RENAME = "rename"
    DROP = "drop"
    MERGE = "merge"
    REPACK = "repack"


class TensorPlan(NamedTuple):
    """The fate of one source tensor (a tuple, since there are as many as tensors).

    Attributes:
        name: its key in the source.
        action: see `Action`; the canonical side of a merged scale is MERGE, its other sides DROP.
        target: the key in the output that holds it or stands for it.
        merged: True where a merged value is written under `target` by this tensor's place.
        group: id of the tie group it belongs to, or None.
    """

    name: str
    action: Action
    target: str
    merged: bool = False
    group: str | None = None


class Merge(NamedTuple):
    """Scales of several sides that become one value (a tuple: there is one an expert).

    Attributes:
        target: key in the output.
        keys: source keys, the carrying one first: its dtype, shape and place are kept.
        companion: the role, with the direction of the merge.
        kv: True for a KV-cache scale (merged only on request).
        only_if_equal: keys per companion bias, one tuple a bias, that must agree byte for byte, or nothing is merged.
    """

    target: str
    keys: tuple[str, ...]
    companion: Companion
    kv: bool = False
    only_if_equal: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """One tie with everything that its parameter became on disk: dropped whole or kept whole.

    Attributes:
        id: the canonical parameter's name.
        status: "planned" (will be rewritten if the bytes confirm it), "canonical" (nothing to do) or "unconfirmed".
        reason: why it is unconfirmed, else None.
        checks: keys that must be equal byte for byte, canonical (or surviving) side first.
        merges: scales that become one.
        repacked: modules of NVFP4 blobs whose sides differ by scaling alone: one is written, re-encoded.
        differing: the checks that those replace.
        kind: what sort of parameter it is, e.g. "experts.down_proj", for summaries.
    """

    id: str
    canonical: str
    aliases: tuple[str, ...]
    origins: tuple[str, ...]
    status: str
    reason: str | None = None
    checks: tuple[tuple[str, ...], ...] = ()
    merges: tuple[Merge, ...] = ()
    repacked: frozenset[str] = frozenset()
    differing: tuple[tuple[str, ...], ...] = ()
    kind: str = ""
    dropped: int = 0
    dropped_bytes: int = 0


class OutTensor(NamedTuple):
    """A tensor of the output: the bytes of `source`, unless a merged value takes their place.

    `start` and `end` are byte offsets in the data section of its shard, end exclusive. `added`: the source has no such
    tensor; only the header of `source` is taken.
    """

    name: str
    source: str
    start: int
    end: int
    added: bool = False


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


@dataclass(frozen=True, slots=True)
class OutShard:
    """One file of the output; tensors in file order, offsets without holes."""

    name: str
    tensors: tuple[OutTensor, ...]

    @property
    def nbytes(self) -> int:
        return self.tensors[-1].end if self.tensors else 0


@dataclass(frozen=True)
class RewritePlan:
    """Everything that will be done, before a byte moves."""

    tensors: Mapping[str, TensorPlan]
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
    by_id: Mapping[str, GroupPlan] = field(default_factory=dict, repr=False)

    @property
    def total_bytes(self) -> int:
        """Tensor bytes of the output."""
        return sum(shard.nbytes for shard in self.shards)

    def unconfirmed(self) -> list[GroupPlan]:
        return [group for group in self.groups if group.status == "unconfirmed"]

    def planned(self) -> list[GroupPlan]:
        return [group for group in self.groups if group.status == "planned"]

    @gc_paused()
    def to_json(self) -> dict[str, Any]:
        """The object that `tierewrite plan --json` prints (schema tierewrite/plan/1)."""
        return {
            "schema": PLAN_SCHEMA,
            "options": self.policy.to_json(),
            "ties": {"source": self.ties_source, "detail": self.ties_detail, "unpaired": list(self.unpaired)},
            "formats": list(self.families),
            "before": {"tensors": len(self.tensors), "bytes": self.source_bytes},
            "after": {
                "tensors": sum(len(shard.tensors) for shard in self.shards),
                "bytes": self.total_bytes,
                "shards": [
                    {"name": s.name, "tensors": len(s.tensors), "bytes": s.nbytes} for s in self.shards
                ],
            },
            "groups": [group_json(group) for group in self.groups],
            "tensors": [
                {
                    "name": t.name,
                    "action": t.action.value,
                    "target": t.target,
                    "merged": t.merged,
                    "group": t.group,
                }
                for t in self.tensors.values()
            ],
            "warnings": list(self.warnings),
        }


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
    }


def kind_of(parameter: str) -> str:
    """The last two words of a parameter's module, without numbers: "experts.down_proj", "self_attn.q_proj"."""
    return ".".join([part for part in parameter.removesuffix(".weight").split(".") if not part.isdigit()][-2:])


def needed_for_confirmation(groups: Sequence[GroupPlan]) -> set[str]:
    """Keys whose digests decide whether the planned `groups` are confirmed."""
    return {key for group in groups if group.status == "planned" for row in group.checks for key in row}
