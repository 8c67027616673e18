"""What became of the checkpoints of a batch, in numbers; of a finished one nothing else is kept."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tierewrite.errors import EXIT_FINDINGS, EXIT_OK, Interrupted, shown
from tierewrite.planning.plan import RewritePlan
from tierewrite.report import Report
from tierewrite.tables import Summary, change, count, seconds, text
from tierewrite.units import size

if TYPE_CHECKING:
    from rich.console import RenderableType

BATCH_SCHEMA = "tierewrite/batch/1"

STATUSES = (
    "rewritten",
    "planned",
    "canonical",
    "already-done",
    "skipped",
    "refused",
    "failed",
    "stopped",
    "not-started",
)


@dataclass(frozen=True, slots=True, repr=False)
class BatchResult(Summary):
    """One checkpoint of a batch, in numbers.

    Attributes:
        src, dst: as they were given or found, without credentials; `dst` is None where nothing is written.
        status: "rewritten"; "canonical" (there was nothing to rewrite; DST is a copy); "already-done" (by an earlier
            run); "skipped" (nothing that a rewrite is for); "refused" (a tie is not confirmed); "failed"; "stopped" by
            an interrupt, which leaves DST whole or absent; "not-started" before one; with `plan_only` "planned" or
            "canonical".
        exit_code: what `rewrite` would have ended with; of "stopped" and "not-started", the interrupt's.
        error: the error as JSON; None without one.
        seconds: how long it took.
        before_bytes, after_bytes: tensor bytes of SRC and DST; with `plan_only`, of what DST would be if the bytes
            confirm every tie that the headers allow. None where it did not come to that.
        before_tensors, after_tensors: number of tensors.
        groups: declared ties of which something is on disk.
        kept: how many of them stay on every side; with `plan_only`, those that the headers do not confirm (a rewrite
            refuses them by default).
        merged_scales: activation scales that stand for several sides; None with `plan_only`.
        median_ratio, max_ratio: the ratio between these sides.
        consumer_errors: what the consumer that DST was prepared for would still stumble over.
        warnings: as in the report or plan.
        skipped: why it was skipped; None otherwise.
    """

    src: str
    dst: str | None
    status: str
    exit_code: int
    error: Mapping[str, Any] | None = None
    seconds: float = 0.0
    before_bytes: int | None = None
    after_bytes: int | None = None
    before_tensors: int | None = None
    after_tensors: int | None = None
    groups: int | None = None
    kept: int | None = None
    merged_scales: int | None = None
    median_ratio: float | None = None
    max_ratio: float | None = None
    consumer_errors: int | None = None
    warnings: tuple[str, ...] = ()
    skipped: str | None = None

    def one_line(self) -> str:
        """How it ended."""
        if self.skipped is not None:
            return f"skipped: {self.skipped}"
        if self.error is not None:
            return f"{self.status}: {self.reason}"
        assert self.before_bytes is not None
        assert self.after_bytes is not None
        line = f"{self.status}, {change(self.before_bytes, self.after_bytes)}"
        return f"{line}; {self.left_errors}" if self.consumer_errors else line

    def lines(self) -> Iterator[RenderableType]:
        """See `Summary`."""
        yield text(f"{shown(self.src)}: {self.one_line()}")

    @property
    def reason(self) -> str:
        """Why it failed, on one line; "" if it did not."""
        if self.error is None:
            return ""
        first, *rest = str(self.error["message"]).split("\n")
        # A line that ends with a colon says nothing without the first of what follows.
        return shown(f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first)

    @property
    def left_errors(self) -> str:
        """What is left for the consumer that it was prepared for."""
        left = count(self.consumer_errors or 0, "error")
        return f"written, with {left} left for its consumer (tierewrite check lists them)"

    @property
    def ok(self) -> bool:
        """Whether it ended well: exit code 0."""
        return self.exit_code == EXIT_OK

    @property
    def saved_bytes(self) -> int:
        """Tensor bytes that DST has less than SRC; 0 where that is not known."""
        return (self.before_bytes or 0) - (self.after_bytes or 0) if self.after_bytes is not None else 0

    def to_json(self) -> dict[str, Any]:
        """One entry of `results` of schema tierewrite/batch/1."""
        known = self.after_bytes is not None
        return {
            "src": self.src,
            "dst": self.dst,
            "status": self.status,
            "exit_code": self.exit_code,
            "error": self.error,
            "seconds": round(self.seconds, 3),
            "before": {"bytes": self.before_bytes, "tensors": self.before_tensors} if known else None,
            "after": {"bytes": self.after_bytes, "tensors": self.after_tensors} if known else None,
            "saved_bytes": self.saved_bytes if known else None,
            "groups": self.groups,
            "kept": self.kept,
            "merged_scales": self.merged_scales,
            "ratios": {"median": self.median_ratio, "max": self.max_ratio},
            "consumer_errors": self.consumer_errors,
            "warnings": list(self.warnings),
            "skipped": self.skipped,
        }


@dataclass(frozen=True, repr=False)
class BatchReport(Summary):
    """The outcome of a batch.

    Attributes:
        results: one a checkpoint, in the order in which they were given; with `plan_only` the largest saving first.
        plan_only: nothing was written.
        seconds: how long all of it took.
        stopped: the exit code of the interrupt that ended it early; None if it came to its end.
    """

    results: tuple[BatchResult, ...]
    plan_only: bool
    seconds: float
    stopped: int | None = None

    def one_line(self) -> str:
        """See `Summary`."""
        counts = ", ".join(f"{number} {status}" for status, number in self.counts().items() if number)
        saved = f"{size(self.before_bytes - self.after_bytes)} {'could be ' if self.plan_only else ''}saved"
        return f"{counts}; {size(self.before_bytes)} -> {size(self.after_bytes)}, {saved}; {seconds(self.seconds)}"

    def lines(self) -> Iterator[RenderableType]:
        """See `Summary`."""
        from tierewrite.batches.summary import batch_lines

        return batch_lines(self)

    @property
    def failed(self) -> tuple[BatchResult, ...]:
        """Those that did not end well: refused, failed, stopped, not begun, or with errors left for a consumer."""
        return tuple(result for result in self.results if not result.ok)

    @property
    def before_bytes(self) -> int:
        """Tensor bytes of the sources that were rewritten (planned, done already)."""
        return sum(result.before_bytes or 0 for result in self.results)

    @property
    def after_bytes(self) -> int:
        """Tensor bytes of what was made of them."""
        return sum(result.after_bytes or 0 for result in self.results)

    @property
    def exit_code(self) -> int:
        """0, 6 if any checkpoint failed, or the interrupt's."""
        if self.stopped is not None:
            return self.stopped
        return EXIT_FINDINGS if self.failed else EXIT_OK

    def counts(self) -> dict[str, int]:
        """Status -> number of checkpoints, of all statuses."""
        found = Counter(result.status for result in self.results)
        return {status: found[status] for status in STATUSES}

    def to_json(self) -> dict[str, Any]:
        """The object that `tierewrite batch --json` prints (schema tierewrite/batch/1)."""
        return {
            "schema": BATCH_SCHEMA,
            "plan_only": self.plan_only,
            "exit_code": self.exit_code,
            "seconds": round(self.seconds, 3),
            "counts": {"checkpoints": len(self.results), **self.counts()},
            "before": {"bytes": self.before_bytes},
            "after": {"bytes": self.after_bytes},
            "saved_bytes": self.before_bytes - self.after_bytes,
            "results": [result.to_json() for result in self.results],
        }


class BatchInterrupted(Interrupted):
    """A signal arrived during a batch: what was finished stays, nothing half-done was left (exit 128 + its number).

    Attributes:
        report: of what was done until then.
    """

    def __init__(self, signum: int, report: BatchReport) -> None:
        super().__init__(signum)
        self.report = report


def planned(src: str, plan: RewritePlan) -> BatchResult:
    """The result of a checkpoint that was only planned."""
    unconfirmed = len(plan.unconfirmed())
    return BatchResult(
        src,
        None,
        "planned" if plan.planned() or unconfirmed or plan.total_bytes != plan.source_bytes else "canonical",
        EXIT_OK,
        before_bytes=plan.source_bytes,
        after_bytes=plan.total_bytes,
        before_tensors=len(plan.tensors),
        after_tensors=plan.total_tensors,
        groups=len(plan.groups),
        kept=unconfirmed,
        warnings=plan.warnings,
    )


def rewritten(src: str, dst: str | None, report: Report) -> BatchResult:
    """The result of a checkpoint that was rewritten."""
    idle = report.count("canonical") == len(report.groups) and not (report.reencoded or report.filled)
    scales = report.scales
    ratios = [scale.ratio for scale in scales if scale.ratio is not None]
    errors = None if report.readiness is None else len(report.readiness.errors)
    return BatchResult(
        src,
        dst,
        "canonical" if idle else "rewritten",
        EXIT_FINDINGS if errors else EXIT_OK,
        before_bytes=report.before_bytes,
        after_bytes=report.after_bytes,
        before_tensors=report.before_tensors,
        after_tensors=report.after_tensors,
        groups=len(report.groups),
        kept=report.count("kept"),
        merged_scales=len(scales),
        median_ratio=statistics.median(ratios) if ratios else None,
        max_ratio=max(ratios, default=None),
        consumer_errors=errors,
        warnings=report.warnings,
    )
