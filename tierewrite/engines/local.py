"""This process and its threads."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

from tierewrite import digest, interrupts
from tierewrite.engines.progress import Progress
from tierewrite.engines.trial import Trial
from tierewrite.output.files import PartFiles
from tierewrite.output.jobs import Job, run_job
from tierewrite.output.one_pass import Transfer
from tierewrite.output.result import Result
from tierewrite.output.work import Work, work_of
from tierewrite.source.table import Checkpoint
from tierewrite.source.threads import io_threads

log = logging.getLogger(__name__)


class LocalEngine:
    """See `tierewrite.engines.Engine`. What it learns of a failing GPU it keeps from one pass to the next.

    Importing CuPy and preparing the GPUs takes a second or two. With "cuda" that begins at once, while headers are read
    and the plan is made; with "auto" the CPU hashes, and where much is left to do, the faster of both (see `Trial`).
    """

    def __init__(self, device: str = "auto", threads: int | None = None, progress: Progress | None = None) -> None:
        self.threads = threads
        self.progress = progress or Progress()
        self._cpu = digest.select("cpu", threads=1)
        self._digester: digest.Digester | None = self._cpu if device == "cpu" else None
        self._used: dict[str, None] = {}  # descriptions, in the order of their first use
        self._asked = device
        self._selecting = ThreadPoolExecutor(1, thread_name_prefix="tierewrite-device")
        self._selected: Future[digest.Digester] | None = None
        if device == "cuda":
            self._prepared()
        self._trial = Trial(self._cpu, self._ready)

    def _prepared(self) -> Future[digest.Digester]:
        """The digester that was asked for, being prepared since the first call."""
        if self._selected is None:
            self._selected = self._selecting.submit(digest.select, self._asked, threads=1)
        return self._selected

    def _ready(self) -> digest.Digester | None:
        prepared = self._prepared()
        return prepared.result() if prepared.done() else None

    def _now(self) -> digest.Digester:
        if self._digester is None and self._asked == "cuda":
            self._digester = self._prepared().result()
        return self._digester or self._trial.next()

    def _advance(self, nbytes: int) -> None:
        self._trial.moved(nbytes)
        self.progress.advance(nbytes)

    def digester(self) -> digest.Digester:
        """Where hashing happens now. Raises what `digest.select` raises."""
        now = self._now()
        if now.description not in self._used:
            self._used[now.description] = None
            log.info("hashing on %s", now.description)
        return now

    @property
    def device(self) -> str:
        """See `Engine`."""
        now, cpu = self._now(), self._cpu.description
        others = [name for name in self._used if name != cpu]
        if now.device != "cpu":
            return ", then ".join(self._used) or now.description
        return f"{cpu} (faster here than {', '.join(others)})" if others and self._trial.chosen is now else cpu

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self._selecting.shutdown(wait=True, cancel_futures=True)

    def hash(self, source: Checkpoint, keys: Iterable[str], phase: str) -> dict[str, bytes]:
        """See `Engine`."""
        return self.run_pass(work_of(source, keys), phase).digests

    def run_pass(self, work: Work, phase: str, outputs: PartFiles | None = None) -> Result:
        """Carries out `work` in one pass. Raises what `Transfer.run` raises."""
        self.progress.start(phase, work.nbytes)
        interrupts.check()
        self._trial.begin(work.nbytes)
        transfer = Transfer(work, self.digester, outputs, self.threads, self._advance)
        try:
            return transfer.run()
        finally:
            if transfer.failed:
                self._digester = self._cpu

    def run_jobs(self, jobs: Sequence[Job], phase: str) -> list[Result]:
        """See `Engine`."""
        self.progress.start(phase, sum(job.nbytes for job in jobs))
        interrupts.check()
        stop = threading.Event()
        pool = ThreadPoolExecutor(self.threads or io_threads(), thread_name_prefix="tierewrite")
        try:
            futures = [pool.submit(run_job, job, self.digester(), self.progress.advance, stop) for job in jobs]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future in done and (error := future.exception()) is not None:
                    raise error
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        return [future.result() for future in futures]
