"""The output's shards in the staging folder: laid out, written in one pass, or taken over from a killed run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from blake3 import blake3

from tierewrite.checkpoint import Checkpoint, read_header
from tierewrite.confirm import ScaleValues
from tierewrite.digest import Digester
from tierewrite.errors import TierewriteError
from tierewrite.fill import Fills
from tierewrite.planning import Action, OutShard, RewritePlan, needed_for_confirmation
from tierewrite.reencode import Reencoding, Reencodings
from tierewrite.reencode import write as write_reencoded
from tierewrite.report import ShardSize
from tierewrite.transfer import Task, Transfer, read_tensors, tasks
from tierewrite.writer import create, part, shard_header, system_errors, write_all


class Progress:
    """What a caller may watch. Subclass it; the methods may be called from any thread.

    Attributes:
        shown: whether a person is watching (a download then shows its own bars).
    """

    shown: bool = False

    def start(self, phase: str, total: int) -> None:
        """A phase begins that will move `total` bytes."""

    def advance(self, nbytes: int) -> None:
        """`nbytes` more bytes have moved."""

    def note(self, text: str) -> None:
        """Something a person should know before it happens."""


class Mover:
    """Who carries out tasks on a source: digester, threads and progress, kept from one pass to the next."""

    def __init__(self, source: Checkpoint, digester: Digester, threads: int | None, progress: Progress) -> None:
        self.source = source
        self.digester = digester
        self.threads = threads
        self.progress = progress

    @property
    def device(self) -> str:
        """What does the hashing (after a GPU's failure, what does it now)."""
        return self.digester.description

    def run(
        self,
        work: Sequence[Task],
        phase: str,
        outputs: Sequence[Path | None] = (),
        patches: Mapping[str, bytes] | None = None,
        originals: Mapping[str, bytes] | None = None,
        source: Checkpoint | None = None,
    ) -> dict[str, bytes]:
        """Carries out `work`; returns the digests. Raises what `Transfer.run` raises."""
        self.progress.start(phase, sum(task.nbytes for task in work))
        transfer = Transfer(
            source or self.source,
            self.digester,
            outputs,
            patches,
            originals,
            threads=self.threads,
            advance=self.progress.advance,
        )
        try:
            return transfer.run(work)
        finally:
            self.digester = transfer.digester


class Output:
    """The output shards of a plan in a folder.

    Args:
        checkpoint: the source.
        plan: what to write.
        values: the merged scales.
        anew: the NVFP4 blobs that are encoded anew.
        fills: scales that are filled in.
        folder: the staging folder.
        metadata: `__metadata__` of every shard.

    Attributes:
        patches: source key -> bytes to write in its place: merged scales, and scales of re-encoded blobs.
        digests: source key -> digest of what was written in its place, for re-encoded blobs.
        reencoded: what was encoded anew, with how far it moved the weights.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: RewritePlan,
        values: ScaleValues,
        anew: Reencodings,
        fills: Fills,
        folder: Path,
        metadata: Mapping[str, str],
    ) -> None:
        self.checkpoint = checkpoint
        self.plan = plan
        self.anew = anew
        scales = read_tensors(checkpoint, [job.blob.scale for job in anew.work])
        self.fills = fills
        self.patches = {**values.patches, **fills.patches, **{job.blob.scale: job.scale for job in anew.work}}
        self.originals = {**fills.originals, **values.originals, **scales}
        self.digests: dict[str, bytes] = {}
        self.reencoded: list[Reencoding] = []
        self.headers = [shard_header(shard, checkpoint.tensors, metadata) for shard in plan.shards]
        self.paths = [folder / shard.name for shard in plan.shards]
        self.finished: set[int] = set()

    def write(self, mover: Mover, known: dict[str, bytes]) -> None:
        """Writes and flushes what is not finished; the digests that confirm the groups go into `known`.

        Raises:
            SourceChanged, SystemFailure: as `Transfer.run`.
        """
        outputs: list[Path | None] = []
        for index, (shard, header, path) in enumerate(zip(self.plan.shards, self.headers, self.paths, strict=True)):
            if index in self.finished:
                outputs.append(None)
                continue
            with system_errors("creating", path):
                fd = create(part(path))
                try:
                    write_all(fd, header, 0)
                    os.ftruncate(fd, len(header) + shard.nbytes)
                finally:
                    os.close(fd)
            outputs.append(path)
        wanted = {key for key in digests_wanted(self.plan) if key not in known}
        starts = [len(header) for header in self.headers]
        self._reencode(starts)
        self._add(starts)
        elsewhere = self.anew.copied_elsewhere
        work = tasks(self.checkpoint, wanted, self.plan.shards, starts, self.finished, elsewhere)
        known.update(mover.run(work, "rewriting", outputs, self.patches, self.originals))

    def _add(self, starts: Sequence[int]) -> None:
        """Writes the few scales that the source does not have; the plan has only those that can be filled."""
        for index, shard in enumerate(self.plan.shards):
            for tensor in shard.tensors:
                if tensor.added:
                    path = part(self.paths[index])
                    with system_errors("writing", path):
                        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                        try:
                            write_all(fd, self.fills.added[tensor.name], starts[index] + tensor.start)
                        finally:
                            os.close(fd)

    def _reencode(self, starts: Sequence[int]) -> None:
        """Writes the blobs that are encoded anew, one after the other, before the rest is copied around them."""
        elsewhere = self.anew.copied_elsewhere
        places = {
            tensor.source: (part(self.paths[index]), starts[index] + tensor.start)
            for index, shard in enumerate(self.plan.shards)
            for tensor in shard.tensors
            if tensor.source in elsewhere
        }
        self.reencoded, self.digests = [], {}
        for job in self.anew.work:
            done, digests = write_reencoded(
                self.checkpoint, job, places[job.blob.weight], places[job.blob.weight_scale]
            )
            self.reencoded.append(done)
            self.digests.update(digests)

    def keep_finished(self, mover: Mover, known: dict[str, bytes]) -> None:
        """Takes over the shards that a killed run finished, if they are what this plan would write.

        Header and digest of every tensor are compared with the source's (or the merged value's); anything else in their
        place is removed.
        """
        planned = set(self.paths)
        for path in self.paths[0].parent.iterdir() if self.paths else ():
            if path not in planned:
                with system_errors("removing what a killed run left", path):
                    path.unlink()
        for index, (shard, path) in enumerate(zip(self.plan.shards, self.paths, strict=True)):
            if not path.exists():
                continue
            # What is encoded anew is written anew: its digests are known only then.
            anew = any(t.added or t.source in self.anew.copied_elsewhere for t in shard.tensors)
            with system_errors("checking what a killed run finished", path):
                if not anew and self._is_right(index, shard, path, mover, known):
                    self.finished.add(index)
                else:
                    path.unlink()

    def _is_right(self, index: int, shard: OutShard, path: Path, mover: Mover, known: dict[str, bytes]) -> bool:
        header = self.headers[index]
        if path.stat().st_size != len(header) + shard.nbytes:
            return False
        with path.open("rb") as file:
            if file.read(len(header)) != header:
                return False
        try:
            staged_shard, entries = read_header(path)
        except TierewriteError:
            return False
        by_name = {entry.name: entry for entry in entries}
        staged = Checkpoint(path.parent, (staged_shard,), by_name, None, (), (), {}, {}, ())
        names = [tensor.name for tensor in shard.tensors]
        found = mover.run(tasks(staged, names), "checking what was finished", source=staged)
        wanted = [
            tensor.source
            for tensor in shard.tensors
            if tensor.source not in known and tensor.source not in self.patches
        ]
        known.update(mover.run(tasks(self.checkpoint, wanted), "hashing"))
        return all(
            found[tensor.name]
            == (blake3(self.patches[tensor.source]).digest() if tensor.source in self.patches else known[tensor.source])
            for tensor in shard.tensors
        )

    def remove(self) -> None:
        """Removes the shards: the plan did not hold."""
        for path in self.paths:
            path.unlink()

    def sizes(self) -> list[ShardSize]:
        """Names and sizes of the files, header included."""
        return [
            ShardSize(shard.name, len(header) + shard.nbytes)
            for shard, header in zip(self.plan.shards, self.headers, strict=True)
        ]


def digests_wanted(plan: RewritePlan) -> set[str]:
    """What has to be confirmed, and what the manifest gives digests of."""
    wanted = needed_for_confirmation(plan.groups)
    stands_for = {t.target for t in plan.tensors.values() if t.action is Action.DROP}
    wanted.update(
        t.name
        for t in plan.tensors.values()
        if t.action is Action.RENAME
        or (t.action in (Action.KEEP, Action.REPACK) and (t.target in stands_for or t.name != t.target))
    )
    return wanted
