"""This process and its threads."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from tierewrite import digest
from tierewrite.checkpoint import Checkpoint
from tierewrite.engines import Progress
from tierewrite.jobs import Job, Result, carry_out
from tierewrite.transfer import Task, Transfer, default_threads, tasks


class LocalEngine:
    """See `tierewrite.engines.Engine`. What it learns of a failing GPU it keeps from one pass to the next."""

    def __init__(self, device: str = "auto", threads: int | None = None, progress: Progress | None = None) -> None:
        self.digester = digest.select(device, threads=1)
        self.threads = threads
        self.progress = progress or Progress()

    @property
    def device(self) -> str:
        return self.digester.description

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def hash(self, source: Checkpoint, keys: Iterable[str], phase: str) -> dict[str, bytes]:
        return self.transfer(source, tasks(source, keys), phase)

    def transfer(
        self,
        source: Checkpoint,
        work: Sequence[Task],
        phase: str,
        outputs: Sequence[Path | None] = (),
        patches: Mapping[str, bytes] | None = None,
        originals: Mapping[str, bytes] | None = None,
        progress: Progress | None = None,
    ) -> dict[str, bytes]:
        """Carries out `work` in one pass; returns the digests. Raises what `Transfer.run` raises."""
        progress = progress or self.progress
        progress.start(phase, sum(task.nbytes for task in work))
        transfer = Transfer(
            source,
            self.digester,
            outputs,
            patches,
            originals,
            threads=self.threads,
            advance=progress.advance,
        )
        try:
            return transfer.run(work)
        finally:
            self.digester = transfer.digester

    def carry_out(self, jobs: Sequence[Job], phase: str) -> list[Result]:
        self.progress.start(phase, sum(job.nbytes for job in jobs))
        stop = threading.Event()
        with ThreadPoolExecutor(self.threads or default_threads(), thread_name_prefix="tierewrite") as pool:
            futures = [pool.submit(carry_out, job, self.digester, self.progress.advance, stop) for job in jobs]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in futures:
                    if future in done and (error := future.exception()) is not None:
                        raise error
            finally:
                stop.set()
                for future in futures:
                    future.cancel()
        return [future.result() for future in futures]
