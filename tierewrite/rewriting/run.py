"""The public functions of the pass: `plan`, `rewrite`, `prepare_for_vllm`. Each reads as its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tierewrite import interrupts
from tierewrite.engines import open_engine
from tierewrite.engines.progress import Progress, ProgressLike, progress_of
from tierewrite.errors import UsageError, shown
from tierewrite.output.copied import shareable_runs
from tierewrite.output.destination import Destination, destination, destination_in_place
from tierewrite.output.staging import Staged
from tierewrite.output.target import listing, still_as_listed
from tierewrite.planning.plan import RewritePlan
from tierewrite.planning.policy import ConsumerName, Policy, PolicyOptions
from tierewrite.report import Report
from tierewrite.rewriting.confirmed import confirmed
from tierewrite.rewriting.duplicates import duplicate_hints
from tierewrite.rewriting.options import Device, EngineName, RewriteOptions, SourceOptions
from tierewrite.rewriting.steps import (
    Pass,
    check_for,
    finish,
    prove,
    refuse_unconfirmed,
    refuse_unusable_loader,
    with_needed,
    write_shards,
)
from tierewrite.source import read_ahead
from tierewrite.source.open import fetched, local_only, name_in_messages
from tierewrite.source.table import Checkpoint
from tierewrite.spelling import said_once
from tierewrite.stores.base import COPY_MODES, CopyMode, PathLike
from tierewrite.stores.places import FilePath, is_local, located
from tierewrite.ties.tie import TiesGiven
from tierewrite.values.opened import Opened

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tierewrite.consumers.dry_load import LoaderMode


def plan(
    src: PathLike,
    *,
    ties: TiesGiven | None = None,
    trust_remote_code: bool = False,
    ignore_unindexed: bool = False,
    revision: str | None = None,
    confirm: bool = False,
    duplicates: bool = False,
    device: Device = "auto",
    threads: int | None = None,
    progress: ProgressLike = None,
    **options: Unpack[PolicyOptions],
) -> RewritePlan:
    """What `rewrite` would do with `src`, if the bytes confirm every tie that the headers allow. Reads headers only.

    Args:
        confirm: read and hash the tied tensors too: the plan is then what `rewrite` does, and `plan.confirmed` says so.
        duplicates: read also tensors of 1 MiB or more that may be equal, and add a hint to the warnings for those that
            hold the same bytes though no tie is declared. Nothing else changes.
        others: as for `rewrite`.

    Raises:
        As `rewrite`; `Refused` only with `confirm`: else groups that the headers refute are listed as unconfirmed.
    """
    policy = Policy.of(**options)
    watched = progress_of(progress)
    opened = Opened.open(
        fetched(src, revision=revision, bars=watched.shown) if confirm or duplicates else src,
        ties=ties,
        trust_remote_code=trust_remote_code,
        ignore_unindexed=ignore_unindexed,
        revision=revision,
        meanwhile=partial(asking, watched),
    )
    opened = with_needed(opened.under(policy), policy)
    if not (confirm or duplicates):
        return opened.plan(policy)
    with interrupts.standing(), open_engine("local", device=device, threads=threads, progress=watched) as workers:
        planned = confirmed(opened, policy, workers).plan if confirm else opened.plan(policy)
        hints = duplicate_hints(opened.checkpoint, planned, workers) if duplicates else ()
    return replace(planned, warnings=said_once(planned.warnings, hints))


def rewrite(
    src: PathLike,
    dst: PathLike | None = None,
    *,
    ties: TiesGiven | None = None,
    trust_remote_code: bool = False,
    ignore_unindexed: bool = False,
    revision: str | None = None,
    device: Device = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    in_place: bool = False,
    backup: bool = True,
    resume: bool = False,
    verify: bool = False,
    engine: EngineName = "local",
    ray_address: str | None = None,
    copy: CopyMode = "auto",
    consumer: ConsumerName | None = None,
    force: bool = False,
    loader: LoaderMode = "auto",
    consumer_python: PathLike | None = None,
    manifest: bool = True,
    digests: bool = False,
    progress: ProgressLike = None,
    **options: Unpack[PolicyOptions],
) -> Report:
    """Rewrites the checkpoint in `src` to `dst`: every tied tensor once, under its canonical name.

    Args:
        src: folder with `model.safetensors` or shards with `model.safetensors.index.json`; the URL of one, of any
            fsspec file system; or a hub id `org/name`, of which a snapshot is taken. Never written to.
        dst: folder to make; absent or empty, unless `overwrite`. It appears whole, by one rename, or not at all. Or a
            URL where nothing is: in a store that cannot rename the index is written last, and makes it a checkpoint.
            None with `in_place`.
        ties: JSON file {alias: canonical}, or such a mapping, instead of asking the model class; {}: nothing is tied.
        trust_remote_code: run the model code that `src` brings, to ask it for its ties.
        ignore_unindexed: leave out tensors that the index does not list, instead of refusing.
        revision: branch, tag or commit of a hub id; None: its main branch.
        device: where the hashing happens: "cpu", "cuda", or "auto", which takes the CPU, and where that would be busy
            for more than three seconds a GPU that works, if it turns out to be faster. The output is the same.
        threads: workers that read, hash and write; None: as many as there are cores, at most 8.
        overwrite: swap out what `dst` holds once the new checkpoint is complete; at a URL only what a killed run left.
        in_place: the new checkpoint takes the place of `src`, by one rename, once it is complete.
        backup: with `in_place`, keep the original as `SRC.bak`.
        resume: use the shards that a killed run into `dst` finished, after checking their digests.
        verify: prove the output from the source before it appears.
        engine: "local", or "ray": hashing and writing are tasks on a Ray cluster whose nodes all see `src` and `dst`.
        ray_address: the cluster, as `ray.init` takes it; None: RAY_ADDRESS, else one on this machine.
        copy: "auto": large parts that stay as they are share their blocks with `src` where the file system can, and
            are copied by the kernel, or within an object store by the store, where that can; "never": all is written.
            The output is the same.
        consumer: make the choices that it needs (`FOR_CONSUMER`; "vllm", ...), where `options` does not, and
            check the output before it appears; errors other than per-side conflicts, which no rewrite can merge, leave
            no `dst`.
        force: with `consumer`, let the output appear all the same.
        loader, consumer_python: with `consumer`, whether its own loader is asked, and by which Python; as for `check`.
        manifest: write `tierewrite.json` with what was done, and what each file of the output is.
        digests: let the manifest hold the digest of every tensor, for `verify_integrity`; else of those that were read
            for their ties.
        progress: a `Progress`, or a bar such as tqdm's or rich's: called with how many bytes have moved. What its
            `start` or `advance` raises stops the rewrite, which then leaves nothing behind.
        options: what decides content, the fields of `planning.policy.Policy`: on_mismatch, kv_scales, max_shard_size
            (bytes, or a text such as "5GB"), ...; `planning.policy.OPTIONS` and `tierewrite rewrite --help` say what
            each of them does.

    Returns:
        A report of what was done, group by group.

    Raises:
        UsageError: the call cannot be carried out (exit 2).
        Refused: a tie is not confirmed, or a companion is of no known format; nothing was written (exit 3).
        SourceError: something is wrong in `src` (exit 4).
        SystemFailure: disk, permission, I/O, or `src` changed meanwhile; nothing was left behind (exit 5).
        NotReady: with `consumer`, the output would not be served right; nothing was left behind (exit 6).
        VerificationFailed: with `verify`, the output is not what `src` makes; nothing was left behind (exit 6).
    """
    started = time.monotonic()
    policy = Policy.of(consumer, **options)
    _refuse(copy, digests, manifest, in_place, backup)
    refuse_unusable_loader(consumer, force, loader, consumer_python)
    watched = progress_of(progress)
    reading: SourceOptions = {
        "ties": ties,
        "trust_remote_code": trust_remote_code,
        "ignore_unindexed": ignore_unindexed,
    }
    if in_place:
        route = Route.in_place(src, dst, backup)
    else:
        route = Route.between(src, dst, overwrite, resume, revision, watched)
    with (
        interrupts.standing() as said,
        open_engine(engine, device=device, threads=threads, progress=watched, ray_address=ray_address) as workers,
    ):
        unchanged = _unchanged(route.src) if verify or in_place else None
        asked = partial(asking, watched, ahead=engine == "local")
        opened = Opened.open(route.src, meanwhile=asked, **reading)
        interrupts.check()
        opened = with_needed(opened.under(policy), policy, consumer)
        planned = opened.plan(policy)
        refuse_unconfirmed(opened, planned, workers)
        side_bytes = sum(side.size for side in opened.checkpoint.side_files)
        shared = planned if copy == "auto" else None
        route.check_space(planned.total_bytes + side_bytes, watched, opened.checkpoint, shared)
        with route.staging(resume) as staging, ExitStack() as outputs:
            run = Pass(opened, policy, workers, staging, outputs, resume, digests, copy)
            written = write_shards(run, planned)
            report = finish(
                run,
                written,
                name_in_messages(src),
                route.dst,
                consumer=consumer,
                ties=ties,
                trust_remote_code=trust_remote_code,
                manifest=manifest,
            )
            if verify:
                prove(route.src, staging, policy, consumer, watched, reading, unchanged)
            if consumer is not None:
                readiness = check_for(
                    consumer,
                    staging.view(),
                    route.dst,
                    ties=ties,
                    trust_remote_code=trust_remote_code,
                    force=force,
                    loader=loader,
                    consumer_python=consumer_python,
                )
                report = replace(report, readiness=readiness)
            if in_place and unchanged is not None:
                unchanged()
            staging.commit(lambda: said.append("the rewrite is complete"))
    return replace(report, seconds=time.monotonic() - started, verified=verify)


def _unchanged(src: FilePath) -> Callable[[], None] | None:
    """What raises SourceChanged once a folder is not as it is now; None in a store, whose objects have ETags."""
    return partial(still_as_listed, src, listing(src)) if is_local(src) else None


def _refuse(copy: str, digests: bool, manifest: bool, in_place: bool, backup: bool) -> None:
    """Raises UsageError: these options cannot be."""
    if copy not in COPY_MODES:
        raise UsageError(f"there is no copy '{shown(copy)}'; expected one of {', '.join(COPY_MODES)}")
    if digests and not manifest:
        raise UsageError("digests stand in the manifest: leave out digests, or let the manifest be written")
    if not (in_place or backup):
        raise UsageError("--no-backup goes with --in-place; leave it out, or add that")


def prepare_for_vllm(src: PathLike, dst: PathLike | None = None, **options: Unpack[RewriteOptions]) -> Report:
    """`rewrite` with `consumer="vllm"`: the choices that vLLM needs, and a check before the result appears.

    KV scales are merged, the scales of fused projections unified, ignore lists made consistent, and a tied `lm_head`
    is dropped with every other alias. Where per-side tensors differ that no rewrite can merge (`layer_scalar`), the
    output is written all the same and the report's `readiness` lists them.

    Args:
        src, dst, options: as for `rewrite`; `kv_scales`, `unify_fused_scales` and `fix_ignore` are chosen here unless
            given.

    Returns:
        The report; `report.readiness.errors` is empty when vLLM will load the output and compute what was meant.

    Raises:
        NotReady: other errors would be left; nothing was written (unless `force`). Else as `rewrite`.
    """
    options["consumer"] = "vllm"
    return rewrite(src, dst, **options)


@contextmanager
def asking(progress: Progress, checkpoint: Checkpoint, ahead: bool = False) -> Iterator[None]:
    """While the model class is asked, which takes seconds: a person is told, and `ahead` the source is read."""
    named = checkpoint.config.get("architectures")
    who = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else "the model class"
    progress.start(f"asking {shown(who)} for its ties", 0)
    with read_ahead.reading(checkpoint) if ahead else nullcontext():
        yield


@dataclass(frozen=True)
class Route:
    """From where to where.

    Attributes:
        src: what is read: a folder or URL; of a hub id, its snapshot.
        dst: where the output appears, as it was given.
        target: the same, checked.
        swapped: in place, the folder that the output takes the place of; else None.
    """

    src: FilePath
    dst: FilePath
    target: Destination
    swapped: Path | None = None

    @classmethod
    def in_place(cls, src: PathLike, dst: PathLike | None, backup: bool) -> Route:
        """The output takes the place of its source.

        Raises:
            UsageError: there is a `dst`, `src` is not on this machine, or it cannot be swapped.
        """
        if dst is not None:
            raise UsageError("in place there is no DST; give SRC alone, or leave out --in-place")
        local_only(src, "a rewrite in place")
        place = located(src)
        assert is_local(place)
        return cls(place, place, destination_in_place(place, backup), place)

    @classmethod
    def between(
        cls,
        src: PathLike,
        dst: PathLike | None,
        overwrite: bool,
        resume: bool,
        revision: str | None,
        progress: Progress,
    ) -> Route:
        """The output goes from `src`, which is fetched if it is a hub id, to another place.

        Raises:
            UsageError: there is no `dst`, or it cannot be written.
            SourceError, SystemFailure: `src` cannot be fetched, or `dst` cannot be looked at.
        """
        if dst is None:
            raise UsageError("DST is missing; name a folder, or use --in-place")
        where = located(dst)
        target = destination(located(src), where, overwrite, resume)  # before a download that may take an hour
        place = fetched(src, revision=revision, bars=progress.shown)
        if place != located(src):
            target = destination(place, where, overwrite, resume)
        return cls(place, where, target)

    def check_space(
        self, needed: int, progress: Progress, source: Checkpoint, shared: RewritePlan | None = None
    ) -> None:
        """Whether the disk can hold `needed` bytes. (A store does not say.)

        Args:
            source: the checkpoint that the output may share blocks with.
            shared: the plan whose output does that, where it can.

        Raises:
            SystemFailure: it cannot.
        """
        shareable = shareable_runs(shared) if shared is not None else {}
        needed = self.target.check_space(needed, source.shards, shareable)
        if self.swapped is not None:
            kept = f", and the original stays as '{self.target.backup}'" if self.target.backup else ""
            progress.note(f"in place: {needed:,} bytes are needed beside SRC until the swap{kept}")

    def staging(self, resume: bool) -> Staged:
        """Where the output grows until it is complete."""
        return self.target.staging(resume, name_in_messages(self.src))
