"""What an output asks of whoever does its work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from tierewrite.output.files import PartFiles
from tierewrite.output.jobs import Job
from tierewrite.output.result import Result
from tierewrite.output.work import Work
from tierewrite.source.table import Checkpoint


class Meter(Protocol):
    """Told how many bytes have moved."""

    def start(self, phase: str, total: int) -> None:
        """A phase begins that will move `total` bytes."""

    def advance(self, nbytes: int) -> None:
        """`nbytes` more bytes have moved."""


RunPass = Callable[[Work, str, "PartFiles | None"], Result]


class Hasher(Protocol):
    """Hashes tensors."""

    def hash(self, source: Checkpoint, keys: Iterable[str], phase: str) -> dict[str, bytes]:
        """BLAKE3 of the tensors `keys` of `source`.

        Raises:
            SourceChanged: it is not what it was when its headers were read. SystemFailure: reading failed.
        """


class Engine(Hasher, Protocol):
    """Does the work: it hashes, and writes shards."""

    def run_jobs(self, jobs: Sequence[Job], phase: str) -> list[Result]:
        """Carries out all of `jobs`; their results, in the same order.

        Raises:
            SourceChanged, SystemFailure: a job failed for good; those that were finished stay.
        """

    @property
    def run_pass(self) -> RunPass | None:
        """Carries out a whole pass over the source in this process; None if the workers are other processes.

        A function of the work, the phase's name and the files that are written.

        Raises:
            SourceChanged, SystemFailure: as `Transfer.run`.
        """
