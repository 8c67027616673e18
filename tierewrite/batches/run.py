"""Many checkpoints: one after the other, or several at a time; one that fails does not stop the others.

Everything that is wrong with the batch itself (a list, an option, two DSTs that are one) is found before anything
starts. What an earlier run finished is not done again (`done_before`). With `jobs` above 1 each rewrite has a thread;
an interrupt reaches it through its progress, whose next `start` or `advance` raises. (What tells no progress is
finished first: a model class that is being asked, a header that is being read.)

Of a finished checkpoint only numbers and the error are kept.
"""

from __future__ import annotations

import contextlib
import logging
import os
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tierewrite.batches import done_before
from tierewrite.batches.collection import Gatherer, Item
from tierewrite.engines import select
from tierewrite.engines.progress import Progress
from tierewrite.errors import EXIT_FINDINGS, EXIT_OK, Interrupted, Refused, UsageError, shown, to_tierewrite_error
from tierewrite.planning.plan import RewritePlan
from tierewrite.report import Report
from tierewrite.rewriting import run as rewriting
from tierewrite.rewriting.options import ITEM_TYPES, BatchOptions, EngineOptions
from tierewrite.source.open import fetched, name_of
from tierewrite.stores.remote import PathLike, located

if TYPE_CHECKING:
    from typing_extensions import Unpack

BATCH_SCHEMA = "tierewrite/batch/1"

STATUSES = ("rewritten", "planned", "canonical", "already-done", "refused", "failed", "stopped", "not-started")

log = logging.getLogger(__name__)

_READING = ("ties", "trust_remote_code", "ignore_unindexed")


@dataclass(frozen=True, slots=True)
class BatchResult:
    """One checkpoint of a batch, in numbers.

    Attributes:
        src, dst: as they were given or found, without credentials; `dst` is None where nothing is written.
        status: "rewritten"; "canonical" (there was nothing to rewrite; DST is a copy); "already-done" (by an earlier
            run); "refused" (a tie is not confirmed); "failed"; "stopped" by an interrupt, which leaves DST whole or
            absent; "not-started" before one; with `plan_only` "planned" or "canonical".
        exit_code: what `rewrite` would have ended with; of "stopped" and "not-started", the interrupt's.
        error: the error as JSON; None without one.
        seconds: how long it took.
        before_bytes, after_bytes: tensor bytes of SRC and DST; with `plan_only`, of what DST would be if the bytes
            confirm every tie that the headers allow. None where it did not come to that.
        before_tensors, after_tensors: number of tensors.
        groups: declared ties of which something is on disk.
        kept: how many of them stay on every side; with `plan_only`, those that the headers do not confirm (a rewrite
            refuses them unless told otherwise).
        merged_scales: activation scales that stand for several sides; None with `plan_only`.
        median_ratio, max_ratio: how far apart these sides were.
        consumer_errors: what the consumer that DST was prepared for would still stumble over.
        warnings: as in the report or plan.
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

    @property
    def ok(self) -> bool:
        return self.exit_code == EXIT_OK

    @property
    def saved_bytes(self) -> int:
        """Tensor bytes that DST has less than SRC; 0 where that is not known."""
        return (self.before_bytes or 0) - (self.after_bytes or 0) if self.after_bytes is not None else 0

    def to_json(self) -> dict[str, Any]:
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
        }


@dataclass(frozen=True)
class BatchReport:
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
    """SIGINT or SIGTERM arrived during a batch: what was finished stays, nothing half-done was left (exit 130, 143).

    Attributes:
        report: of what was done until then.
    """

    def __init__(self, signum: int, report: BatchReport) -> None:
        super().__init__(signum)
        self.report = report


def batch(
    items: PathLike | Iterable[PathLike | Mapping[str, Any]],
    *,
    into: PathLike | None = None,
    plan_only: bool = False,
    jobs: int = 1,
    progress: Progress | None = None,
    **options: Unpack[BatchOptions],
) -> BatchReport:
    """Rewrites many checkpoints; one that fails does not stop the others.

    A DST that an earlier run made of the same SRC with the same options and version is left as it is and reported as
    "already-done" (unless `overwrite`); see `batches.done_before` for what is compared. Any other DST that is not empty
    fails, as in `rewrite`.

    Args:
        items: what to rewrite, each of them one of
            - a folder, or the URL of one: every checkpoint at or below it goes to `into`/<its path below the folder>
              (the folder itself, if it is one, to `into`/<its name>); see `batches.collection` for what is passed
              over;
            - a text file that lists checkpoints, one a line: a SRC (goes to `into`/<its name>), or a JSON object with
              `src`, and optionally `dst` and options of `rewrite`; paths in it are relative to its own folder;
            - a hub id `org/name`: that checkpoint;
            - a mapping like such a JSON object.
        into: folder or URL below which the outputs are made.
        plan_only: write nothing and read headers only: report what could be saved. Needs no `into`.
        jobs: how many at a time.
        progress: told of each checkpoint by its `part`, and through what that returns, from any thread.
        options: of `rewrite`, for every checkpoint that does not choose otherwise: all but `dst`, `in_place` and
            `backup`.

    Returns:
        A report with one result a checkpoint. Look at `failed`: what is wrong with one checkpoint is not raised.

    Raises:
        UsageError: nothing was begun: an option or a list is wrong, a DST is missing, or two checkpoints would meet in
            one place (exit 2).
        SourceError: nothing was begun: a folder holds no checkpoint (exit 4).
        SystemFailure: nothing was begun: a list or folder cannot be read, or there is no cluster (exit 5).
        BatchInterrupted: a signal arrived, and the handler raised `Interrupted`, as the command line's does. (A
            KeyboardInterrupt is passed on; it, too, leaves nothing half-done.)
    """
    engine_options, item_options = _split(options)
    if jobs < 1:
        raise UsageError(f"jobs is {jobs}; expected at least 1")
    given = [items] if isinstance(items, (str, os.PathLike)) else items
    gatherer = Gatherer(None if into is None else os.fspath(into), item_options, plan_only)
    found = gatherer.gather(given)
    with contextlib.ExitStack() as kept:
        if not plan_only:
            # Held for as long as the batch runs: what is wrong with it ends the batch before anything starts, and a
            # cluster that would be started for one rewrite is there for all of them.
            engine = kept.enter_context(select(**engine_options))
            log.info("hashing begins on %s", engine.device)
            kept.enter_context(_parents_of(found))
        return _Batch(found, plan_only, jobs, engine_options, progress or Progress()).run()


def _split(options: Mapping[str, Any]) -> tuple[EngineOptions, dict[str, Any]]:
    """The options of the engine, and those that an item may choose otherwise. Raises UsageError: there is no such."""
    engine_options = EngineOptions.__optional_keys__
    for name in options:
        if name not in ITEM_TYPES and name not in engine_options:
            known = ", ".join(sorted((*ITEM_TYPES, *engine_options)))
            raise UsageError(f"a batch has no option '{shown(name)}'; expected one of {known}")
    chosen = {name: value for name, value in options.items() if name in engine_options}
    return cast(EngineOptions, chosen), {name: value for name, value in options.items() if name in ITEM_TYPES}


@contextlib.contextmanager
def _parents_of(items: Sequence[Item]) -> Iterator[None]:
    """Makes the folders that will hold the outputs; those that stay empty are removed.

    Several rewrites at a time would make and remove them under each other's feet.
    """
    made: list[Path] = []
    try:
        for item in items:
            target = located(item.dst or "")
            if isinstance(target, Path):
                with contextlib.suppress(OSError, RuntimeError):  # its rewrite meets that again, and says what is wrong
                    _make(target.resolve().parent, made)
        yield
    finally:
        for folder in sorted(made, key=lambda path: len(path.parts), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()


def _make(folder: Path, made: list[Path]) -> None:
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for one in reversed(missing):
        one.mkdir()
        made.append(one)


class _Stop(BaseException):
    """Raised in a rewrite when the batch is to end. No Exception: nobody may take it for a failure and go on."""


class _Stoppable(Progress):
    """Passes everything on until the batch is to end."""

    def __init__(self, inner: Progress, stop: threading.Event) -> None:
        self.inner, self.stop = inner, stop
        self.shown = inner.shown

    def start(self, phase: str, total: int) -> None:
        self._go_on()
        self.inner.start(phase, total)

    def advance(self, nbytes: int) -> None:
        self._go_on()
        self.inner.advance(nbytes)

    def note(self, text: str) -> None:
        self.inner.note(text)

    def _go_on(self) -> None:
        if self.stop.is_set():
            raise _Stop


class _Batch:
    """A batch on its way. `results` are entered by whoever carries an item out."""

    def __init__(
        self, items: Sequence[Item], plan_only: bool, jobs: int, engine_options: EngineOptions, progress: Progress
    ) -> None:
        self.items = items
        self.plan_only = plan_only
        self.jobs = jobs
        self.engine_options = engine_options
        self.progress = progress
        self.results: dict[int, BatchResult] = {}
        self.begun: set[int] = set()
        self.stop = threading.Event()
        self.began_at = time.monotonic()

    def run(self) -> BatchReport:
        try:
            if self.jobs == 1 or len(self.items) == 1:
                for index in range(len(self.items)):
                    self._carry_out(index)
            else:
                self._at_a_time()
            return self._report(None)
        except Interrupted as interrupt:
            raise BatchInterrupted(interrupt.exit_code - 128, self._report(interrupt)) from None

    def _at_a_time(self) -> None:
        pool = ThreadPoolExecutor(self.jobs, thread_name_prefix="tierewrite-batch")
        try:
            futures = [pool.submit(self._carry_out, index) for index in range(len(self.items))]
            wait(futures)
            for future in futures:
                future.result()
        finally:
            self.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _report(self, interrupt: Interrupted | None) -> BatchReport:
        results: list[BatchResult] = []
        for index, item in enumerate(self.items):
            result = self.results.get(index)
            if result is None:
                assert interrupt is not None
                status = "stopped" if index in self.begun else "not-started"
                result = BatchResult(*_places(item), status, interrupt.exit_code)
            results.append(result)
        if self.plan_only:
            results.sort(key=lambda result: (not result.ok, -result.saved_bytes))
        seconds = time.monotonic() - self.began_at
        return BatchReport(tuple(results), self.plan_only, seconds, interrupt.exit_code if interrupt else None)

    def _carry_out(self, index: int) -> None:
        """One checkpoint, whatever becomes of it.

        Raises:
            Interrupted: in the main thread.
        """
        if self.stop.is_set():
            return
        self.begun.add(index)
        item = self.items[index]
        progress = self.progress.part(item.name, index + 1, len(self.items))
        began_at = time.monotonic()
        try:
            result = self._outcome(item, progress)
        except _Stop:
            progress.finish(None)
            return
        except BaseException:
            progress.finish(None)
            raise
        result = replace(result, seconds=time.monotonic() - began_at)
        self.results[index] = result
        progress.finish(result)

    def _outcome(self, item: Item, progress: Progress) -> BatchResult:
        src, dst = _places(item)
        try:
            if self.plan_only:
                return _planned(src, self._plan(item))
            return self._made_before(item, src, dst) or _done(src, dst, self._rewrite(item, progress))
        except Interrupted:
            raise
        except Exception as exception:
            log.debug("%s ended early", src, exc_info=True)
            # No name for the error: it holds this frame, and with it all that the rewrite had in memory.
            told = to_tierewrite_error(exception).to_json()
            status = "refused" if isinstance(exception, Refused) else "failed"
            return BatchResult(src, dst, status, told["exit_code"], told)

    def _plan(self, item: Item) -> RewritePlan:
        return rewriting.plan(item.src, **item.policy.to_json(), **_chosen(item, (*_READING, "revision")))

    def _rewrite(self, item: Item, progress: Progress) -> Report:
        options = {**self.engine_options, **item.options}
        return rewriting.rewrite(item.src, item.dst, progress=_Stoppable(progress, self.stop), **options)

    def _made_before(self, item: Item, src: str, dst: str | None) -> BatchResult | None:
        """The result, if an earlier run left just what this one would make.

        Raises:
            UsageError: DST is something else, and must not be overwritten.
        """
        assert item.dst is not None
        options = item.options
        target = located(item.dst)
        if options.get("overwrite") or not done_before.has_manifest(target):
            return None
        place = fetched(item.src, revision=options.get("revision"))
        made = done_before.made(place, target, item.policy, **_chosen(item, _READING))
        if isinstance(made, str):
            raise UsageError(
                f"DST is not empty, and no run with these options would make what it holds: {made}; choose another "
                "folder, or use --overwrite",
                file=target,
            )
        consumer = options.get("consumer")
        errors = None
        if consumer is not None:
            from tierewrite.consumers import check

            trusted = bool(options.get("trust_remote_code"))
            errors = len(check(item.dst, consumer, trust_remote_code=trusted).errors)
        return BatchResult(
            src,
            dst,
            "already-done",
            EXIT_FINDINGS if errors else EXIT_OK,
            before_bytes=made.before_bytes,
            after_bytes=made.after_bytes,
            before_tensors=made.before_tensors,
            after_tensors=made.after_tensors,
            groups=made.groups,
            kept=made.kept,
            merged_scales=made.merged_scales,
            median_ratio=made.median_ratio,
            max_ratio=made.max_ratio,
            consumer_errors=errors,
        )


def _places(item: Item) -> tuple[str, str | None]:
    """SRC and DST for people: without credentials."""
    return name_of(item.src), None if item.dst is None else name_of(item.dst)


def _chosen(item: Item, names: Iterable[str]) -> dict[str, Any]:
    """Those of these options that were chosen for the item."""
    return {name: item.options[name] for name in names if name in item.options}


def _planned(src: str, plan: RewritePlan) -> BatchResult:
    unconfirmed = len(plan.unconfirmed())
    return BatchResult(
        src,
        None,
        "planned" if plan.planned() or unconfirmed or plan.total_bytes != plan.source_bytes else "canonical",
        EXIT_OK,
        before_bytes=plan.source_bytes,
        after_bytes=plan.total_bytes,
        before_tensors=len(plan.tensors),
        after_tensors=sum(len(shard.tensors) for shard in plan.shards),
        groups=len(plan.groups),
        kept=unconfirmed,
        warnings=plan.warnings,
    )


def _done(src: str, dst: str | None, report: Report) -> BatchResult:
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
