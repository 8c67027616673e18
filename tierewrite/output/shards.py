"""The output's shards: laid out, written in one pass or by jobs, or taken over from a killed run."""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from tierewrite.errors import SourceError, system_errors
from tierewrite.output.copied import STORE_RUN_BYTES, CopiedRun, copied_runs, rows_of
from tierewrite.output.engine import Engine, Meter, RunPass
from tierewrite.output.files import PartFiles
from tierewrite.output.jobs import Job, JobTensor
from tierewrite.output.safetensors import shard_header
from tierewrite.output.staging import Staged
from tierewrite.output.work import work_of
from tierewrite.planning import alignment
from tierewrite.planning.plan import OutShard, RewritePlan, digests_wanted
from tierewrite.report import Means, ShardSize
from tierewrite.source.bytes import open_source
from tierewrite.source.open import header_of
from tierewrite.source.table import Checkpoint
from tierewrite.stores.base import Copied, CopyMode
from tierewrite.stores.local import can_share, create, part_path, write_all
from tierewrite.stores.places import FilePath, is_local, store_of
from tierewrite.values.content import COPY, Content, Copy, Duplicate, Encode, Made, made_of


class Output:
    """The output shards of a plan in a folder. A context manager.

    Args:
        checkpoint: the source.
        plan: what to write.
        contents: output key -> what is written, where that is no copy.
        staging: where.
        metadata: `__metadata__` of every shard.
        digests: hash every tensor, and not only those that confirm the groups.
        copy: "auto": bytes that need not pass through this process do not, where system or store can; "never".

    Attributes:
        made: output key -> what was written, for all of `contents`, once it is.
        copied: bytes that did not pass through this process.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: RewritePlan,
        contents: Mapping[str, Content],
        staging: Staged,
        metadata: Mapping[str, str],
        digests: bool = False,
        copy: CopyMode = "auto",
    ) -> None:
        self.checkpoint = checkpoint
        self.plan = plan
        self.contents = contents
        self.made: dict[str, Made] = {}
        self.headers = [shard_header(shard, metadata) for shard in plan.shards]
        self.digests = digests
        self.copy = copy
        self.copied = Copied()
        self.staging = staging
        self.paths: list[FilePath] = [staging.folder / shard.name for shard in plan.shards]
        self.finished: set[int] = set()
        self._files: PartFiles | None = None
        self._left: dict[int, tuple[CopiedRun, ...]] = {}  # what `share` has to do

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._files is not None:
            self._files.close()

    def durable(self, progress: Meter) -> None:
        """Waits until all shards are on the disk, under their names. Raises SystemFailure."""
        if self._files is not None:
            progress.start("flushing to the disk", sum(shard.nbytes for shard in self.sizes()))
            self._files.durable(progress.advance)

    def write(self, engine: Engine, known: dict[str, bytes]) -> None:
        """Writes what is not finished; the digests that confirm the groups, or all of them, go into `known`.

        What is shared with the source is left to `share`. The disk may still be at it afterwards: see `durable`.

        Raises:
            SourceChanged, SystemFailure: as `Engine.run_jobs`.
        """
        wanted = set(digests_wanted(self.plan))
        if self.digests:
            every = (tensor for shard in self.plan.shards for tensor in shard.tensors)
            wanted.update(tensor.source for tensor in every if self._is_copied(tensor.name))
        wanted -= known.keys()
        if engine.run_pass is not None and is_local(self.staging.folder):
            known.update(self._in_one_pass(engine.run_pass, wanted))
        else:
            self._by_jobs(engine, wanted, known)

    def share(self, progress: Meter) -> None:
        """The ties are confirmed: what can be shared with the source is, and with that all shards are complete.

        Raises:
            SourceChanged: a file of the source is not the one whose header was read. SystemFailure.
        """
        files = self._files
        if files is None or not self._left:
            return
        progress.start("sharing with SRC", sum(run.nbytes for runs in self._left.values() for run in runs))
        with ExitStack() as opened:
            numbers = sorted({run.shard for runs in self._left.values() for run in runs})
            sources = {number: opened.enter_context(open_source(self.checkpoint.shards[number])) for number in numbers}
            for index, runs in self._left.items():
                for run in runs:
                    self.copied += files.put(index, sources[run.shard], run.start, run.end, run.position)
                    progress.advance(run.nbytes)
            for source in sources.values():
                source.finish()
        for index in self._left:
            files.let_go(index)
        self._left = {}

    def _is_copied(self, name: str) -> bool:
        return isinstance(self.contents.get(name, COPY), Copy)

    def _in_one_pass(self, run_pass: RunPass, wanted: set[str]) -> dict[str, bytes]:
        """Each byte of the source is read once, in its order, and goes to its place in any of the shards."""
        paths: dict[int, Path] = {}
        for index, (shard, header, path) in enumerate(zip(self.plan.shards, self.headers, self.paths, strict=True)):
            assert is_local(path)
            if index in self.finished:
                continue
            with system_errors("creating", path):
                fd = create(part_path(path))
                try:
                    write_all(fd, header, 0)
                    os.ftruncate(fd, len(header) + shard.nbytes)
                finally:
                    os.close(fd)
            paths[index] = path
        self._left = self._shared()
        starts = [len(header) for header in self.headers]
        work = work_of(
            self.checkpoint,
            wanted,
            self.plan.shards,
            starts,
            self.finished,
            self.contents,
            self._copied(wanted, self._left),
            self._left,
        )
        self._files = PartFiles(paths, self._left)
        result = run_pass(work, "rewriting", self._files)
        self.made.update(result.made)
        self.copied += result.copied
        return result.digests

    def _by_jobs(self, engine: Engine, wanted: set[str], known: dict[str, bytes]) -> None:
        """Each shard is a job by itself; what is in none of them is hashed first.

        So is what is to be copied without being read, with all of its tie: it is copied only once that is confirmed.
        """
        token = secrets.token_hex(4)
        copied = self._copied_by_jobs(wanted)
        rows = rows_of(self.plan, copied)
        ties = [group for group in self.plan.planned() if rows[group.checks.present_rows()].any()]
        for group in ties:
            rows[group.checks.present_rows()] = True
        first = set(map(self.plan.source.names.__getitem__, np.flatnonzero(rows).tolist()))
        jobs = [self._job(index, wanted - first, token, runs) for index, runs in copied.items()]
        read = {tensor.key for job in jobs for tensor in job.tensors if tensor.hashed}
        known.update(engine.hash(self.checkpoint, wanted - read, "hashing"))
        if not all(known[key] == known[keys[0]] for group in ties for keys in group.checks for key in keys[1:]):
            # The plan does not hold: nothing is written for it, and the rest is hashed to say all that differs.
            known.update(engine.hash(self.checkpoint, read, "hashing"))
            return
        results = engine.run_jobs(jobs, "rewriting")
        self._tidy()
        for result in results:
            known.update(result.digests)
            self.made.update(result.made)
            self.copied += result.copied

    def _runs(self, allowed: np.ndarray, least: int) -> dict[int, tuple[CopiedRun, ...]]:
        """For each shard that is not finished, its runs; see `copied_runs`."""
        return {
            index: copied_runs(shard, self.contents, allowed, len(self.headers[index]), least)
            for index, shard in enumerate(self.plan.shards)
            if index not in self.finished
        }

    def _of(self, numbers: Collection[int]) -> np.ndarray:
        """bool [tensors of the source], which are in the source's shards of these numbers."""
        found: np.ndarray = np.isin(self.plan.source.shard, list(numbers))
        return found

    def _shared(self) -> dict[int, tuple[CopiedRun, ...]]:
        """For each shard that has any, the runs that its file can share with the source."""
        folder = self.staging.folder
        local = {number: shard for number, shard in enumerate(self.checkpoint.shards) if is_local(shard.path)}
        if self.copy == "never" or not is_local(folder):
            return {}
        runs = {
            index: [run for run in found if run.can_be_shared]
            for index, found in self._runs(self._of(local), alignment.RUN_BYTES).items()
        }
        asked = {run.shard for found in runs.values() for run in found}
        if not asked:
            return {}
        can = can_share({number: local[number] for number in asked}, folder)
        kept = {index: tuple(run for run in found if run.shard in can) for index, found in runs.items()}
        return {index: found for index, found in kept.items() if found}

    def _copied(
        self, wanted: Collection[str], shared: Mapping[int, tuple[CopiedRun, ...]]
    ) -> dict[int, tuple[CopiedRun, ...]]:
        """For each shard, the runs that are neither hashed nor shared: the kernel copies them."""
        if self.copy == "never":
            return {}
        local = [number for number, shard in enumerate(self.checkpoint.shards) if is_local(shard.path)]
        allowed = self._of(local) & ~rows_of(self.plan, shared)
        allowed[[self.plan.source.row[key] for key in wanted]] = False
        return self._runs(allowed, alignment.RUN_BYTES)

    def _copied_by_jobs(self, wanted: Collection[str]) -> dict[int, tuple[CopiedRun, ...]]:
        """For each shard that is not finished, the runs that are copied without being read, in their order."""
        folder = self.staging.folder
        if self.copy == "never":
            return self._runs(self._of(()), 0)
        if is_local(folder):
            shared = self._shared()
            return {
                index: tuple(sorted((*runs, *shared.get(index, ()))))
                for index, runs in self._copied(wanted, shared).items()
            }
        store = store_of(folder)
        shards = enumerate(self.checkpoint.shards)
        sources = [number for number, shard in shards if store.copying([shard], folder, 0) is not None]
        return self._runs(self._of(sources), STORE_RUN_BYTES)

    def _tidy(self) -> None:
        """Removes from the folder what is no shard of the plan: parts, by workers that died."""
        if is_local(self.staging.folder):
            self._leave_only_planned(self.staging.kept())

    def _leave_only_planned(self, there: Iterable[FilePath]) -> None:
        planned = set(self.paths)
        for path in there:
            if path not in planned:
                with system_errors("removing what a killed run left", path):
                    path.unlink()

    def _job(self, index: int, wanted: set[str], token: str, copied: tuple[CopiedRun, ...]) -> Job:
        """One output shard as a piece of work that any process can carry out."""
        tensors: list[JobTensor] = []
        contents: dict[str, Content] = {}
        numbers: set[int] = set()
        number_of = {shard.name: number for number, shard in enumerate(self.checkpoint.shards)}
        for name, source, start, end, added in self.plan.shards[index].tensors:
            content = self.contents.get(name, COPY)
            if content is not COPY:
                contents[name] = content
            if isinstance(content, (Encode, Duplicate)):
                numbers.update(number_of[shard] for shard in content.shards)
            if added:
                tensors.append(JobTensor(name, "", -1, 0, end - start, False))
                continue
            entry = self.checkpoint.tensors[source]
            numbers.add(entry.shard)
            tensors.append(JobTensor(name, source, entry.shard, entry.start, entry.end, source in wanted))
        shards = {number: self.checkpoint.shards[number] for number in sorted(numbers)}
        return Job(shards, tuple(tensors), self.paths[index], self.headers[index], contents, token, copied)

    def keep_finished(self, engine: Engine, known: dict[str, bytes]) -> None:
        """Takes over the shards that a killed run finished, if they are what this plan would write.

        Header and digest of every tensor are compared with what would be written; anything else in their place is
        removed.
        """
        there = self.staging.kept()
        self._leave_only_planned(there)
        for index, (shard, path) in enumerate(zip(self.plan.shards, self.paths, strict=True)):
            if path not in there:
                continue
            with system_errors("checking what a killed run finished", path):
                if self._is_right(index, shard, path, engine, known):
                    self.finished.add(index)
                else:
                    path.unlink()

    def _is_right(self, index: int, shard: OutShard, path: FilePath, engine: Engine, known: dict[str, bytes]) -> bool:
        header = self.headers[index]
        try:
            staged_shard, tensors = header_of(path)
        except SourceError:
            return False
        if staged_shard.size != len(header) + shard.nbytes or staged_shard.data_start != len(header):
            return False
        with open_source(staged_shard) as file:
            found_header = bytearray(len(header))
            file.read_runs([(0, len(header))], memoryview(found_header))
        if found_header != header:
            return False
        staged = Checkpoint.of(Path(), (staged_shard,), tensors)
        found = engine.hash(staged, [tensor.name for tensor in shard.tensors], "checking what was finished")
        copied = [tensor for tensor in shard.tensors if tensor.name not in self.contents]
        unknown = [tensor.source for tensor in copied if tensor.source not in known]
        known.update(engine.hash(self.checkpoint, unknown, "hashing"))
        if any(found[tensor.name] != known[tensor.source] for tensor in copied):
            return False
        made: dict[str, Made] = {}
        for tensor in shard.tensors:
            content = self.contents.get(tensor.name, COPY)
            if isinstance(content, Copy):
                continue
            made[tensor.name] = made_of(content, tensor.end - tensor.start)
            if made[tensor.name].digest != found[tensor.name]:
                return False
        self.made.update(made)
        return True

    def remove(self) -> None:
        """Removes the shards, flushed or not: the plan did not hold."""
        if self._files is not None:
            self._files.close()
        for path in self.paths:
            if is_local(path):
                part_path(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)

    def means(self) -> Means:
        """How the shards that this run wrote came there."""
        sizes = (shard.nbytes for index, shard in enumerate(self.sizes()) if index not in self.finished)
        copied = self.copied
        written = sum(sizes) - copied.shared - copied.in_kernel - copied.by_store
        return Means(copied.shared, copied.in_kernel, copied.by_store, written)

    def sizes(self) -> list[ShardSize]:
        """Names and sizes of the files, header included."""
        return [
            ShardSize(shard.name, len(header) + shard.nbytes)
            for shard, header in zip(self.plan.shards, self.headers, strict=True)
        ]
