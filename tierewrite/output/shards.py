"""The output's shards: laid out, written in one pass or by jobs, or taken over from a killed run."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from blake3 import blake3

from tierewrite.engines import Engine
from tierewrite.engines.local import LocalEngine
from tierewrite.engines.progress import Progress
from tierewrite.errors import SourceError, system_errors
from tierewrite.output.files import PartFiles, create, part, write_all
from tierewrite.output.jobs import Job, Piece, Result
from tierewrite.output.one_pass import tasks
from tierewrite.output.safetensors import shard_header
from tierewrite.output.staging import Staged
from tierewrite.planning.plan import Action, OutShard, RewritePlan, needed_for_confirmation
from tierewrite.report import ShardSize
from tierewrite.source.bytes import open_source, read_tensors
from tierewrite.source.open import header_of
from tierewrite.source.table import Checkpoint
from tierewrite.stores.remote import FilePath
from tierewrite.values.filled import Fills
from tierewrite.values.merged import ScaleValues
from tierewrite.values.reencoded import Reencoding, Reencodings
from tierewrite.values.reencoded import write as write_reencoded


class Output:
    """The output shards of a plan in a folder. A context manager.

    Args:
        checkpoint: the source.
        plan: what to write.
        values: the merged scales.
        anew: the NVFP4 blobs that are encoded anew.
        fills: scales that are filled in.
        staging: where.
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
        staging: Staged,
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
        self.staging = staging
        self.paths: list[FilePath] = [staging.folder / shard.name for shard in plan.shards]
        self.finished: set[int] = set()
        self._files: PartFiles | None = None

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._files is not None:
            self._files.close()

    def durable(self, progress: Progress) -> None:
        """Waits until all shards are on the disk, under their names. Raises SystemFailure."""
        if self._files is not None:
            progress.start("flushing to the disk", sum(shard.nbytes for shard in self.sizes()))
            self._files.durable(progress.advance)

    def write(self, engine: Engine, known: dict[str, bytes]) -> None:
        """Writes what is not finished; the digests that confirm the groups go into `known`.

        The disk may still be at it afterwards: see `durable`.

        Raises:
            SourceChanged, SystemFailure: as `Engine.carry_out`.
        """
        wanted = digests_wanted(self.plan) - known.keys()
        if isinstance(engine, LocalEngine) and isinstance(self.staging.folder, Path):
            known.update(self._in_one_pass(engine, wanted))
        else:
            known.update(self._by_jobs(engine, wanted))

    def _in_one_pass(self, engine: LocalEngine, wanted: set[str]) -> dict[str, bytes]:
        """Each byte of the source is read once, in its order, and goes to its place in any of the shards."""
        paths: dict[int, Path] = {}
        for index, (shard, header, path) in enumerate(zip(self.plan.shards, self.headers, self.paths, strict=True)):
            assert isinstance(path, Path)
            if index in self.finished:
                continue
            with system_errors("creating", path):
                fd = create(part(path))
                try:
                    write_all(fd, header, 0)
                    os.ftruncate(fd, len(header) + shard.nbytes)
                finally:
                    os.close(fd)
            paths[index] = path
        starts = [len(header) for header in self.headers]
        self._reencode(starts)
        self._add(starts)
        work = tasks(
            self.checkpoint, wanted, self.plan.shards, starts, self.finished, self.anew.copied_elsewhere
        )
        self._files = PartFiles(paths)
        return engine.transfer(self.checkpoint, work, "rewriting", self._files, self.patches, self.originals)

    def _by_jobs(self, engine: Engine, wanted: set[str]) -> dict[str, bytes]:
        """Each shard is a job by itself; what is in none of them is hashed first."""
        token = secrets.token_hex(4)
        jobs = [
            self._job(index, wanted, token) for index in range(len(self.plan.shards)) if index not in self.finished
        ]
        written = {piece.key for job in jobs for piece in job.pieces}
        digests = engine.hash(self.checkpoint, wanted - written, "hashing")
        results = engine.carry_out(jobs, "rewriting")
        self._tidy()
        for result in results:
            digests.update(result.digests)
        self._enter(results)
        return digests

    def _tidy(self) -> None:
        """Removes from the folder what is no shard of the plan: parts, by workers that died."""
        if isinstance(self.staging.folder, Path):
            self._leave_only_planned(self.staging.kept())

    def _leave_only_planned(self, there: Iterable[FilePath]) -> None:
        planned = set(self.paths)
        for path in there:
            if path not in planned:
                with system_errors("removing what a killed run left", path):
                    path.unlink()

    def _job(self, index: int, wanted: set[str], token: str) -> Job:
        """One output shard as a piece of work that any process can carry out."""
        pieces: list[Piece] = []
        added: dict[str, bytes] = {}
        keys: list[str] = []
        for tensor in self.plan.shards[index].tensors:
            if tensor.added:
                added[tensor.name] = self.fills.added[tensor.name]
                pieces.append(Piece(tensor.name, -1, 0, tensor.end - tensor.start, False))
                continue
            entry = self.checkpoint.tensors[tensor.source]
            keys.append(entry.name)
            pieces.append(Piece(entry.name, entry.shard, entry.start, entry.end, entry.name in wanted))
        here = set(keys)
        anew = tuple(job for job in self.anew.work if here.intersection(job.parts))
        entries = {
            key: self.checkpoint.tensors[key]
            for job in anew
            for blob in (job.blob, *job.others)
            for key in (blob.weight, blob.weight_scale, blob.scale)
        }
        numbers = {piece.shard for piece in pieces if piece.shard >= 0} | {e.shard for e in entries.values()}
        return Job(
            {number: self.checkpoint.shards[number] for number in sorted(numbers)},
            tuple(pieces),
            self.paths[index],
            self.headers[index],
            {key: self.patches[key] for key in keys if key in self.patches},
            {key: self.originals[key] for key in keys if key in self.originals},
            added,
            anew,
            entries,
            token,
        )

    def _enter(self, results: Iterable[Result]) -> None:
        """What the jobs found out about the blobs that they encoded anew."""
        encoded = {key: digest for result in results for key, digest in result.encoded.items()}
        moved = {module: found for result in results for module, found in result.moved.items()}
        self.reencoded = [moved[job.module].entered(job) for job in self.anew.work]
        self.digests = encoded | {job.blob.scale: blake3(job.scale).digest() for job in self.anew.work}

    def _part(self, index: int) -> Path:
        path = self.paths[index]
        assert isinstance(path, Path)
        return part(path)

    def _add(self, starts: Sequence[int]) -> None:
        """Writes the few scales that the source does not have; the plan has only those that can be filled."""
        for index, shard in enumerate(self.plan.shards):
            for tensor in shard.tensors:
                if tensor.added:
                    path = self._part(index)
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
            tensor.source: (self._part(index), starts[index] + tensor.start)
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

    def keep_finished(self, engine: Engine, known: dict[str, bytes]) -> None:
        """Takes over the shards that a killed run finished, if they are what this plan would write.

        Header and digest of every tensor are compared with the source's (or the merged value's); anything else in their
        place is removed.
        """
        there = self.staging.kept()
        self._leave_only_planned(there)
        for index, (shard, path) in enumerate(zip(self.plan.shards, self.paths, strict=True)):
            if path not in there:
                continue
            # What is encoded anew is written anew: its digests are known only then.
            anew = any(t.added or t.source in self.anew.copied_elsewhere for t in shard.tensors)
            with system_errors("checking what a killed run finished", path):
                if not anew and self._is_right(index, shard, path, engine, known):
                    self.finished.add(index)
                else:
                    path.unlink()

    def _is_right(
        self, index: int, shard: OutShard, path: FilePath, engine: Engine, known: dict[str, bytes]
    ) -> bool:
        header = self.headers[index]
        try:
            staged_shard, entries = header_of(path)
        except SourceError:
            return False
        if staged_shard.size != len(header) + shard.nbytes or staged_shard.data_start != len(header):
            return False
        with open_source(staged_shard) as file:
            found_header = bytearray(len(header))
            file.read_runs([(0, len(header))], memoryview(found_header))
        if found_header != header:
            return False
        staged = Checkpoint.of(Path(), (staged_shard,), {entry.name: entry for entry in entries})
        found = engine.hash(staged, [tensor.name for tensor in shard.tensors], "checking what was finished")
        wanted = [
            tensor.source
            for tensor in shard.tensors
            if tensor.source not in known and tensor.source not in self.patches
        ]
        known.update(engine.hash(self.checkpoint, wanted, "hashing"))
        return all(
            found[tensor.name]
            == (blake3(self.patches[tensor.source]).digest() if tensor.source in self.patches else known[tensor.source])
            for tensor in shard.tensors
        )

    def remove(self) -> None:
        """Removes the shards, flushed or not: the plan did not hold."""
        if self._files is not None:
            self._files.close()
        for path in self.paths:
            if isinstance(path, Path):
                part(path).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            else:
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
    drop, merge = Action.DROP, Action.MERGE  # looked up once: there are as many as tensors
    fates = plan.tensors.values()
    # Few, where most is tied: a set of what all that is dropped stands for would cost more than the rest.
    others = {
        fate.target: fate.name
        for fate in fates
        if fate.name not in wanted and fate.action is not drop and fate.action is not merge
    }
    wanted.update([name for target, name in others.items() if name != target])
    wanted.update([others[fate.target] for fate in fates if fate.action is drop and fate.target in others])
    return wanted
