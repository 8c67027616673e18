"""What happened: a dataclass; JSON and tables are views of it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tierewrite.planning import GroupPlan, Policy, RewritePlan, group_json

REPORT_SCHEMA = "tierewrite/report/1"
MANIFEST_SCHEMA = "tierewrite/manifest/1"


@dataclass(frozen=True, slots=True)
class MergedScale:
    """One scale that stands for several sides.

    Attributes:
        target: its key in the output.
        sources: the source keys that it stands for, the carrying one first.
        ratio: largest valid side over smallest valid side; None with fewer than two valid sides.
        calibrated: False when no side had a valid value, and the first side's bytes were kept.
        invalid: source keys that took no part: missing values, 0, negative, NaN, inf, denormal.
        kv: True for a KV-cache scale.
    """

    target: str
    sources: tuple[str, ...]
    ratio: float | None
    calibrated: bool
    invalid: tuple[str, ...] = ()
    kv: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "sources": list(self.sources),
            "ratio": self.ratio,
            "calibrated": self.calibrated,
            "invalid": list(self.invalid),
            "kv": self.kv,
        }


@dataclass(frozen=True, slots=True)
class GroupReport:
    """One tie group and what was done with it.

    Attributes:
        group: as it was planned last.
        status: "rewritten" (dropped, renamed or merged), "canonical" (there was nothing to do) or "kept".
        scales: the merged scales of the group.
    """

    group: GroupPlan
    status: str
    scales: tuple[MergedScale, ...] = ()

    @property
    def ratio(self) -> float | None:
        """The largest ratio between the sides of any of the group's scales."""
        return max((s.ratio for s in self.scales if s.ratio is not None), default=None)

    def to_json(self) -> dict[str, Any]:
        return {
            **group_json(self.group),
            "status": self.status,
            "ratio": self.ratio,
            "scales": [scale.to_json() for scale in self.scales],
        }


@dataclass(frozen=True, slots=True)
class ShardSize:
    """A shard's name and its size in bytes, header included."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class Report:
    """The outcome of a rewrite.

    Attributes:
        src, dst: the folders, as they were given.
        before_bytes, after_bytes: tensor bytes of source and output.
        before_tensors, after_tensors: number of tensors.
        before_shards, after_shards: the files.
        groups: every declared tie of which something is on disk.
        ties_source, ties_detail: who declared the ties: "ties-file", "config" or "class", and which.
        unpaired: declared aliases whose partner is not known.
        device: what did the hashing.
        warnings: what a person should look at; none of them changes the exit code.
    """

    src: str
    dst: str
    policy: Policy
    before_bytes: int
    after_bytes: int
    before_tensors: int
    after_tensors: int
    before_shards: tuple[ShardSize, ...]
    after_shards: tuple[ShardSize, ...]
    groups: tuple[GroupReport, ...]
    ties_source: str
    ties_detail: str
    unpaired: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    device: str = ""
    warnings: tuple[str, ...] = ()

    def count(self, status: str) -> int:
        """Number of groups with that status."""
        return sum(group.status == status for group in self.groups)

    @property
    def dropped_tensors(self) -> int:
        return self.before_tensors - self.after_tensors

    @property
    def scales(self) -> list[MergedScale]:
        """All merged scales, in the order of the groups."""
        return [scale for group in self.groups for scale in group.scales]

    def with_warnings(self, warnings: tuple[str, ...]) -> Report:
        return replace(self, warnings=self.warnings + warnings)

    def to_json(self) -> dict[str, Any]:
        """The object that `tierewrite rewrite --json` prints (schema tierewrite/report/1)."""
        ratios = [scale.ratio for scale in self.scales if scale.ratio is not None]
        return {
            "schema": REPORT_SCHEMA,
            "src": self.src,
            "dst": self.dst,
            "options": self.policy.to_json(),
            "ties": {"source": self.ties_source, "detail": self.ties_detail, "unpaired": list(self.unpaired)},
            "formats": list(self.formats),
            "device": self.device,
            "before": _side_json(self.before_bytes, self.before_tensors, self.before_shards),
            "after": _side_json(self.after_bytes, self.after_tensors, self.after_shards),
            "counts": {
                "groups": len(self.groups),
                "rewritten": self.count("rewritten"),
                "canonical": self.count("canonical"),
                "kept": self.count("kept"),
                "dropped_tensors": self.dropped_tensors,
                "merged_scales": len(self.scales),
                "never_calibrated": sum(not scale.calibrated for scale in self.scales),
            },
            "ratios": {
                "median": statistics.median(ratios) if ratios else None,
                "max": max(ratios, default=None),
            },
            "groups": [group.to_json() for group in self.groups],
            "warnings": list(self.warnings),
        }


def _side_json(nbytes: int, tensors: int, shards: tuple[ShardSize, ...]) -> dict[str, Any]:
    return {
        "bytes": nbytes,
        "tensors": tensors,
        "shards": [{"name": shard.name, "bytes": shard.nbytes} for shard in shards],
    }


@dataclass(frozen=True)
class Written:
    """A tensor of the output that stands for source tensors of a group, for the manifest.

    Attributes:
        sources: the source keys that it stands for, the carrying one first.
        action: keep, rename, merge or repack.
        blake3: digest of its bytes in the output, 32 bytes.
        scale: for a merged one, how the value came about.
    """

    sources: tuple[str, ...]
    action: str
    blake3: bytes
    scale: MergedScale | None = None

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "from": list(self.sources),
            "action": self.action,
            "merged": self.scale is not None,
            "blake3": self.blake3.hex(),
        }
        if self.scale is not None:
            data["ratio"] = self.scale.ratio
            data["calibrated"] = self.scale.calibrated
        return data


@dataclass(frozen=True)
class Manifest:
    """`tierewrite.json`: what was done, in terms that can be checked against the files.

    It holds nothing that two runs on the same input and options could differ in: no device, threads, paths, times.
    """

    version: str
    source_shards: tuple[ShardSize, ...]
    policy: Policy
    ties_source: str
    ties_detail: str
    ties: Mapping[str, str]
    groups: tuple[GroupReport, ...]
    written: Mapping[str, Mapping[str, Written]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": MANIFEST_SCHEMA,
            "tool": {"name": "tierewrite", "version": self.version},
            "source": {"shards": [{"name": s.name, "size": s.nbytes} for s in self.source_shards]},
            "options": self.policy.to_json(),
            "ties": {"source": self.ties_source, "detail": self.ties_detail, "map": dict(self.ties)},
            "groups": [
                {
                    "id": report.group.id,
                    "canonical": report.group.canonical,
                    "aliases": list(report.group.aliases),
                    "status": report.status,
                    "reason": report.group.reason,
                    "tensors": {
                        target: written.to_json() for target, written in self.written.get(report.group.id, {}).items()
                    },
                }
                for report in self.groups
            ],
        }


def summary(plan: RewritePlan) -> dict[str, dict[str, int]]:
    """Groups, dropped tensors and dropped bytes per kind of parameter, for tables."""
    kinds: dict[str, dict[str, int]] = {}
    for group in plan.groups:
        row = kinds.setdefault(group.kind, {"groups": 0, "unconfirmed": 0, "dropped": 0, "bytes": 0})
        row["groups"] += 1
        row["unconfirmed"] += group.status == "unconfirmed"
        row["dropped"] += group.dropped
        row["bytes"] += group.dropped_bytes
    return kinds
