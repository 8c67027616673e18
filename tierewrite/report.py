"""What happened: a dataclass; JSON and tables are views of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from tierewrite.errors import shown
from tierewrite.planning.plan import Action, GroupPlan, RewritePlan, group_json
from tierewrite.planning.policy import Policy
from tierewrite.planning.summary import NOTHING_TO_DO, changed_kinds, differing_lines, dropped_lines, unchanged_lines
from tierewrite.source.table import Checkpoint
from tierewrite.spelling import said_once
from tierewrite.tables import (
    Summary,
    change,
    count,
    kept_lines,
    seconds,
    sizes,
    some,
    text,
    tied_parameters,
    ties_lines,
    warning_lines,
)
from tierewrite.ties.tie_map import TieMap
from tierewrite.units import size
from tierewrite.values.filled import Filled
from tierewrite.values.merged import MergedScale
from tierewrite.values.reencoded import Reencoding

if TYPE_CHECKING:
    from rich.console import RenderableType

REPORT_SCHEMA = "tierewrite/report/1"

_RATE_FROM = 1 << 30  # bytes: of less, the time is that of asking the model class, and a rate would say nothing
_RATIO = "ratio\n(median, max)"
"""The column that says how far the sides of merged scales differ, largest by smallest. In two lines there is room for
it in 80 columns."""
Status = Literal["rewritten", "canonical", "kept"]


class Finding(Protocol):
    """One thing that a consumer will stumble over; see `consumers.findings.Finding`."""

    @property
    def id(self) -> str: ...
    @property
    def severity(self) -> str: ...
    @property
    def where(self) -> tuple[str, ...]: ...
    @property
    def found(self) -> str: ...
    @property
    def consequence(self) -> str: ...
    @property
    def fix(self) -> str: ...


class Readiness(Protocol):
    """What a consumer will do with an output; see `consumers.findings.ReadinessReport`, which comes after this room."""

    @property
    def consumer(self) -> str: ...
    @property
    def consumer_version(self) -> str: ...
    @property
    def checkpoint(self) -> str: ...
    @property
    def tensors(self) -> int: ...
    @property
    def findings(self) -> Sequence[Finding]: ...
    @property
    def errors(self) -> Sequence[Finding]: ...
    @property
    def warnings(self) -> Sequence[Finding]: ...
    @property
    def notes(self) -> Sequence[str]: ...
    def to_json(self) -> dict[str, Any]: ...
    def lines(self) -> Iterator[RenderableType]: ...


@dataclass(frozen=True, slots=True, repr=False)
class GroupReport(Summary):
    """One tie group and what was done with it.

    Attributes:
        group: as it was planned last.
        status: "rewritten" (dropped, renamed or merged), "canonical" (there was nothing to do) or "kept".
        scales: the merged scales of the group.
    """

    group: GroupPlan
    status: Status
    scales: tuple[MergedScale, ...] = ()

    @property
    def ratio(self) -> float | None:
        """The largest ratio between the sides of any of the group's scales."""
        return max((s.ratio for s in self.scales if s.ratio is not None), default=None)

    def one_line(self) -> str:
        """See `Summary`."""
        return (
            f"{shown(self.group.canonical)}, {self.status}, {self.group.dropped:,} dropped, {len(self.scales):,} merged"
        )

    def lines(self) -> Iterator[RenderableType]:
        """See `Summary`."""
        yield from self.group.lines()
        for scale in self.scales:
            yield text(f"  {shown(scale.target)}: merged" + (f", {scale.ratio:.2f}x" if scale.ratio else ""))

    def to_json(self) -> dict[str, Any]:
        """One entry of `groups` of the report's JSON."""
        return {
            **group_json(self.group),
            "status": self.status,
            "ratio": self.ratio,
            "scales": [scale.to_json() for scale in self.scales],
        }


@dataclass(frozen=True, slots=True)
class ShardSize:
    """A shard's file.

    Attributes:
        name: of the file.
        nbytes: its size in bytes, header included.
    """

    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Pushed:
    """Where an output was uploaded.

    Attributes:
        id: `org/name`.
        commit: its hash, 40 hex digits.
        url: the page of the commit.
    """

    id: str
    commit: str
    url: str

    def to_json(self) -> dict[str, str]:
        """All attributes, by name."""
        return {"id": self.id, "commit": self.commit, "url": self.url}


@dataclass(frozen=True, slots=True)
class Means:
    """How the bytes of the shards came into the output; shards that `resume` took over are in none of these.

    Attributes:
        shared: blocks of the disk that SRC and the output have in common, until one of them is written to.
        copied_in_kernel: copied by the kernel, or by the server of a network file system, without being read here.
        copied_by_store: copied by an object store.
        written: all others, headers included.
    """

    shared: int = 0
    copied_in_kernel: int = 0
    copied_by_store: int = 0
    written: int = 0

    def sentence(self) -> str:
        """For people; "" where all bytes were written."""
        parts = [
            f"{size(self.shared)} shared with SRC" if self.shared else "",
            f"{size(self.copied_in_kernel)} copied in the kernel" if self.copied_in_kernel else "",
            f"{size(self.copied_by_store)} copied by the store" if self.copied_by_store else "",
        ]
        said = [part for part in parts if part]
        return f"{', '.join(said)}, {size(self.written)} written" if said else ""


@dataclass(frozen=True, repr=False)
class Report(Summary):
    """The outcome of a rewrite.

    Attributes:
        src, dst: the folders, as they were given.
        policy: the options that decided what the output holds.
        before_bytes, after_bytes: tensor bytes of source and output.
        before_tensors, after_tensors: number of tensors.
        before_shards, after_shards: the files, with their sizes in bytes.
        groups: every declared tie of which something is on disk.
        ties_source, ties_detail: who declared the ties: "class", "config", "ties-file", "mapping" or "none", and which.
        unpaired: declared aliases whose partner is not known.
        formats: names of the quantization formats that were found; ("plain",) where there are none.
        device: what did the hashing.
        reencoded: the NVFP4 blobs that were re-encoded, with how far that moved their weights.
        configs: the names of config files that the options changed, or that describe tensors by names that changed.
        filled: experts' scales that were missing or never calibrated, and whose value they got.
        readiness: what the consumer will do with the output, if it was prepared for one.
        warnings: what a person should look at; none of them changes the exit code.
        seconds: how long it took, from opening the source to the appearance of the output.
        verified: whether the output was proved from the source before it appeared.
        pushed: where it was uploaded, if it was.
        means: how the bytes of the shards came there; None where nothing was written.
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
    reencoded: tuple[Reencoding, ...] = ()
    filled: tuple[Filled, ...] = ()
    readiness: Readiness | None = None
    warnings: tuple[str, ...] = ()
    configs: tuple[str, ...] = ()
    seconds: float = field(default=0.0, compare=False)
    verified: bool = False
    pushed: Pushed | None = None
    means: Means | None = field(default=None, compare=False)

    def one_line(self) -> str:
        """See `Summary`."""
        tensors = f"{self.before_tensors:,} -> {self.after_tensors:,} tensors"
        return f"{tensors}, {change(self.before_bytes, self.after_bytes)}, {count(len(self.groups), 'tie')}, {self.dst}"

    def lines(self) -> Iterator[RenderableType]:
        """See `Summary`."""
        before = (self.before_bytes, self.before_tensors, len(self.before_shards))
        yield sizes(before, (self.after_bytes, self.after_tensors, len(self.after_shards)))
        yield from ties_lines(self.ties_source, self.ties_detail, self.unpaired)
        yield from self._group_lines()
        never = sum(not scale.calibrated for scale in self.scales)
        if never:
            yield text(f"Never calibrated on any side: {count(never, 'scale')}.", "yellow")
        if self.filled:
            yield text(f"Filled in from their layer's others: {count(len(self.filled), 'expert scale')}.", "yellow")
        if self.reencoded:
            largest = max(job.largest or 0.0 for job in self.reencoded)
            weights = count(len(self.reencoded), "NVFP4 weight")
            yield text(f"Re-encoded: {weights}; an element moved by {largest:.3g} at most.")
        yield from warning_lines(self.warnings)
        if self.readiness is not None:
            yield from self.readiness.lines()
        if self.configs:
            yield text(f"Changed beside the tensors: {some(self.configs)}.")
        if not self.changed_anything():
            copied = " The same tensors are written." if self.after_shards else ""
            yield text(f"{NOTHING_TO_DO}{copied}", "green")
        if self.means is not None and self.means.sentence():
            yield text(f"Shards: {self.means.sentence()}.")
        if self.after_shards:
            told = self.seconds and self.after_bytes >= _RATE_FROM
            rate = f", {size(round(self.after_bytes / self.seconds))}/s" if told else ""
            took = f"{size(self.before_bytes)} -> {size(self.after_bytes)} in {seconds(self.seconds)}{rate}"
            done = f" is written: {took}; {'verified' if self.verified else 'not verified'}"
        else:  # in memory
            done = f": {change(self.before_bytes, self.after_bytes)}"
        yield text(f"{shown(self.dst)}{done}; hashed on {self.device}.", "green")
        if self.pushed is not None:
            yield text(f"It is uploaded to {self.pushed.id}: {shown(self.pushed.url)}", "green")

    def _group_lines(self) -> Iterator[RenderableType]:
        """What was done with which kind of parameter, and which names went or stayed."""
        by_id = {report.group.id: report for report in self.groups}
        changed, others = changed_kinds([report.group for report in self.groups])
        of_scales = ("scales merged", _RATIO) if any(report.scales for report in self.groups) else ()
        made = tied_parameters(changed, "groups", "kept", "tensors dropped", "bytes dropped", *of_scales)
        made.columns[-1].no_wrap = bool(of_scales)
        for kind, rows in changed.items():
            reports = [by_id[group.id] for group in rows]
            merged = [scale for report in reports for scale in report.scales]
            ratios = [scale.ratio for scale in merged if scale.ratio is not None]
            ratio = f"{statistics.median(ratios):.2f}x, {max(ratios):.2f}x" if ratios else ""
            made.add_row(
                text(shown(kind)),
                str(len(rows)),
                str(sum(report.status == "kept" for report in reports)),
                f"{sum(group.dropped for group in rows):,}",
                size(sum(group.dropped_bytes for group in rows)),
                *((f"{len(merged):,}" if merged else "", ratio) if of_scales else ()),
            )
        if changed:
            yield made
        yield from unchanged_lines(others)
        yield from dropped_lines([report.group for report in self.groups if report.status == "rewritten"])
        kept = [(report.group.canonical, report.group.reason) for report in self.groups if report.status == "kept"]
        yield from kept_lines(kept, "kept on every side")
        yield from differing_lines([report.group for report in self.groups if report.status == "rewritten"])

    def changed_anything(self) -> bool:
        """Whether a tie was rewritten or kept as it must not be, or a scale or weight has another value."""
        return bool(self.count("rewritten") or self.count("kept") or self.reencoded or self.filled)

    def count(self, status: str) -> int:
        """Number of groups with that status."""
        return sum(group.status == status for group in self.groups)

    @property
    def dropped_tensors(self) -> int:
        """How many tensors less DST has than SRC."""
        return self.before_tensors - self.after_tensors

    @property
    def scales(self) -> list[MergedScale]:
        """All merged scales, in the order of the groups."""
        return [scale for group in self.groups for scale in group.scales]

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
            "reencoded": [reencoding.to_json() for reencoding in self.reencoded],
            "filled": [entry.to_json() for entry in self.filled],
            "readiness": None if self.readiness is None else self.readiness.to_json(),
            "warnings": list(self.warnings),
            "configs": list(self.configs),
            "seconds": round(self.seconds, 3),
            "verified": self.verified,
            "pushed": None if self.pushed is None else self.pushed.to_json(),
            "means": None if self.means is None else asdict(self.means),
        }


def _side_json(nbytes: int, tensors: int, shards: tuple[ShardSize, ...]) -> dict[str, Any]:
    return {
        "bytes": nbytes,
        "tensors": tensors,
        "shards": [{"name": shard.name, "bytes": shard.nbytes} for shard in shards],
    }


def build_report(
    checkpoint: Checkpoint,
    ties: TieMap,
    plan: RewritePlan,
    merged: Mapping[str, tuple[str, MergedScale]],
    shards: Sequence[ShardSize],
    src: object,
    dst: object,
    device: str,
    *,
    reencoded: Sequence[Reencoding] = (),
    filled: Sequence[Filled] = (),
    warnings: Iterable[str] = (),
) -> Report:
    """The report of an executed plan.

    Args:
        merged: target -> (group id, how the value came about).
        shards: the output's files.
        reencoded: the NVFP4 blobs that were re-encoded.
        filled: the experts' scales that were filled in.
    """
    by_group: dict[str, list[MergedScale]] = {}
    for group_id, scale in merged.values():
        by_group.setdefault(group_id, []).append(scale)
    statuses = _statuses(plan)
    return Report(
        src=str(src),
        dst=str(dst),
        policy=plan.policy,
        before_bytes=checkpoint.total_bytes,
        after_bytes=plan.total_bytes,
        before_tensors=len(checkpoint.tensors),
        after_tensors=plan.total_tensors,
        before_shards=tuple(ShardSize(shard.name, shard.size) for shard in checkpoint.shards),
        after_shards=tuple(shards),
        groups=tuple(
            GroupReport(group, status, tuple(by_group.get(group.id, ())))
            for group, status in zip(plan.groups, statuses, strict=True)
        ),
        ties_source=ties.source,
        ties_detail=ties.detail,
        unpaired=ties.unpaired,
        formats=plan.families,
        device=device,
        reencoded=tuple(reencoded),
        filled=tuple(filled),
        warnings=said_once(checkpoint.warnings, ties.warnings, plan.warnings, warnings),
    )


def _statuses(plan: RewritePlan) -> Iterator[Status]:
    """What was done with each group of an executed plan."""
    changed = np.isin(plan.action, [action.code for action in (Action.DROP, Action.RENAME, Action.MERGE)])
    with_changes = set(plan.group[changed].tolist())
    for number, group in enumerate(plan.groups):
        if group.status == "unconfirmed":
            yield "kept"
        elif group.kept_names and number not in with_changes:
            yield "canonical"
        else:
            yield "rewritten" if group.status == "planned" else "canonical"
