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
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tierewrite import interrupts
from tierewrite.batches import done_before
from tierewrite.batches.collection import Gatherer
from tierewrite.batches.item import Item
from tierewrite.batches.results import BatchInterrupted, BatchReport, BatchResult, planned, rewritten
from tierewrite.engines import open_engine
from tierewrite.engines.progress import Progress, ProgressLike, progress_of
from tierewrite.errors import EXIT_FINDINGS, EXIT_OK, Interrupted, Refused, UsageError, shown, to_tierewrite_error
from tierewrite.planning.plan import RewritePlan
from tierewrite.report import Report
from tierewrite.rewriting import run as rewriting
from tierewrite.rewriting.options import ITEM_TYPES, BatchOptions, EngineOptions
from tierewrite.rewriting.steps import refuse_unusable_loader
from tierewrite.source.open import fetched, name_in_messages
from tierewrite.stores.base import PathLike
from tierewrite.stores.places import is_local, located

if TYPE_CHECKING:
    from typing_extensions import Unpack

log = logging.getLogger(__name__)

_READING = ("ties", "trust_remote_code", "ignore_unindexed")


def batch(
    items: PathLike | Iterable[PathLike | Mapping[str, Any]],
    *,
    into: PathLike | None = None,
    plan_only: bool = False,
    jobs: int = 1,
    progress: ProgressLike = None,
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
        progress: its `part` is called for each checkpoint, and what that returns as it moves on, from any thread.
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
            KeyboardInterrupt, and whatever `progress` raises, is passed on; it, too, leaves nothing half-done.)
    """
    engine_options, item_options = _split(options)
    if jobs < 1:
        raise UsageError(f"jobs is {jobs}; expected at least 1")
    given = [items] if isinstance(items, (str, os.PathLike)) else items
    gatherer = Gatherer(None if into is None else os.fspath(into), item_options, plan_only)
    found = gatherer.gather(given)
    if not plan_only:
        _refuse_without_consumer(found)
    with contextlib.ExitStack() as kept:
        if not plan_only:
            # Held for as long as the batch runs: what is wrong with it ends the batch before anything starts, and a
            # cluster that would be started for one rewrite is there for all of them.
            engine = kept.enter_context(open_engine(**engine_options))
            log.info("hashing begins on %s", engine.device)
            kept.enter_context(_parents_of(found))
        return _Batch(found, plan_only, jobs, engine_options, progress_of(progress)).run()


_OF_CONSUMERS = ("force", "loader", "consumer_python")
"""Options that mean nothing to a checkpoint that no consumer is named for, where others have one."""


def _refuse_without_consumer(items: Sequence[Item]) -> None:
    """Raises UsageError where one of `_OF_CONSUMERS` is given, and no checkpoint has a consumer."""
    if any(item.options.get("consumer") is not None for item in items):
        return
    for item in items:
        options = item.options
        refuse_unusable_loader(
            None, options.get("force", False), options.get("loader", "auto"), options.get("consumer_python")
        )


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
            if item.skipped is not None:
                continue
            target = located(item.dst or "")
            if is_local(target):
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
        with interrupts.held():  # one that is made is one that is removed
            one.mkdir()
            made.append(one)


class _Stop(BaseException):
    """Raised in a rewrite when the batch is to end. No Exception: no handler takes it for a failure and goes on."""


class _CallersOwn(BaseException):
    """What the caller's progress raised: it ends the batch, as it ends a rewrite. No Exception, as `_Stop`."""

    def __init__(self, raised: Exception) -> None:
        super().__init__(raised)
        self.raised = raised


class _Stoppable(Progress):
    """Passes everything on until the batch is to end."""

    def __init__(self, inner: Progress, stop: threading.Event) -> None:
        self.inner, self.stop = inner, stop
        self.shown = inner.shown

    def start(self, phase: str, total: int) -> None:
        self._go_on()
        with _callers_own():
            self.inner.start(phase, total)

    def advance(self, nbytes: int) -> None:
        self._go_on()
        with _callers_own():
            self.inner.advance(nbytes)

    def note(self, text: str) -> None:
        with _callers_own():
            self.inner.note(text)

    def _go_on(self) -> None:
        if self.stop.is_set():
            raise _Stop


@contextlib.contextmanager
def _callers_own() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _CallersOwn(error) from error


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
        with interrupts.standing():  # what stands after one checkpoint is not said of all
            try:
                if self.jobs == 1 or len(self.items) == 1:
                    for index in range(len(self.items)):
                        self._run_item(index)
                else:
                    self._at_a_time()
                return self._report(None)
            except Interrupted as interrupt:
                raise BatchInterrupted(interrupt.exit_code - 128, self._report(interrupt)) from None
            except _CallersOwn as own:
                raised = own.raised
            raise raised  # with the causes that it has, and no others

    def _at_a_time(self) -> None:
        pool = ThreadPoolExecutor(self.jobs, thread_name_prefix="tierewrite-batch")
        try:
            futures = [pool.submit(self._run_item, index) for index in range(len(self.items))]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
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

    def _run_item(self, index: int) -> None:
        """One checkpoint, whatever becomes of it.

        Raises:
            Interrupted: in the main thread.
        """
        interrupts.check()
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
        if item.skipped is not None:
            return BatchResult(src, None, "skipped", EXIT_OK, skipped=item.skipped)
        try:
            if self.plan_only:
                return planned(src, self._plan(item))
            return self._made_before(item, src, dst) or rewritten(src, dst, self._rewrite(item, progress))
        except Exception as exception:
            interrupts.check()  # somebody may have made an error of a signal
            log.debug("%s ended early", src, exc_info=True)
            # No name for the error: it holds this frame, and with it all that the rewrite had in memory.
            described = to_tierewrite_error(exception).to_json()
            status = "refused" if isinstance(exception, Refused) else "failed"
            return BatchResult(src, dst, status, described["exit_code"], described)

    def _plan(self, item: Item) -> RewritePlan:
        return rewriting.plan(item.src, **item.policy.to_json(), **_chosen(item, (*_READING, "revision")))

    def _rewrite(self, item: Item, progress: Progress) -> Report:
        unused = _OF_CONSUMERS if item.options.get("consumer") is None else ()
        options = {**self.engine_options, **{name: x for name, x in item.options.items() if name not in unused}}
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
        made = done_before.made(place, target, item.policy, **_chosen(item, (*_READING, "digests")))
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

            chosen = _chosen(item, ("ties", "trust_remote_code", "loader", "consumer_python"))
            errors = len(check(item.dst, consumer, **chosen).errors)
        code = EXIT_FINDINGS if errors else EXIT_OK
        return BatchResult(src, dst, "already-done", code, consumer_errors=errors, **asdict(made))


def _places(item: Item) -> tuple[str, str | None]:
    """SRC and DST for people: without credentials."""
    return name_in_messages(item.src), None if item.dst is None else name_in_messages(item.dst)


def _chosen(item: Item, names: Iterable[str]) -> dict[str, Any]:
    """Those of these options that were chosen for the item."""
    return {name: item.options[name] for name in names if name in item.options}
