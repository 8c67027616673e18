"""The reverse of `rewrite`, for loaders that need every name of a tie: aliases written out again.

An alias gets the bytes of the canonical side, merged activation scales included: what the naive checkpoint would hold
if both sides had had these values from the start. Every tensor and file of the source stays as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tierewrite import interrupts
from tierewrite.engines import Engine, open_engine
from tierewrite.engines.progress import Progress, ProgressLike, progress_of
from tierewrite.errors import Refused, SourceError, UsageError, VerificationFailed, shown
from tierewrite.formats.numbered import pattern_of
from tierewrite.output.manifest import read_manifest
from tierewrite.output.metadata import header_metadata, index_metadata, with_descriptions
from tierewrite.output.safetensors import index_bytes
from tierewrite.output.shards import Output
from tierewrite.output.side_files import copy_side_files
from tierewrite.output.staging import Staged
from tierewrite.output.target import side_file_clashes
from tierewrite.planning.expansion import Alias, expansion, missing_aliases
from tierewrite.planning.needed_names import NeededNames
from tierewrite.planning.plan import RewritePlan
from tierewrite.planning.policy import ConsumerName, KVScales, Policy, Size
from tierewrite.report import ShardSize
from tierewrite.rewriting.options import Device
from tierewrite.rewriting.run import Route, asking
from tierewrite.rewriting.steps import check_for
from tierewrite.source.open import name_in_messages, open_checkpoint
from tierewrite.source.table import INDEX_NAME, MANIFEST_NAME, Checkpoint, TensorEntry, Tensors
from tierewrite.spelling import said_once
from tierewrite.stores.base import PathLike
from tierewrite.tables import Summary, sizes, some, text
from tierewrite.ties.on_disk import on_disk
from tierewrite.ties.tie import TiesGiven
from tierewrite.units import size
from tierewrite.values.content import Duplicate, range_of
from tierewrite.values.opened import Opened

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tierewrite.consumers import ReadinessReport

EXPANSION_SCHEMA = "tierewrite/expansion/1"


@dataclass(frozen=True, repr=False)
class Expansion(Summary):
    """The outcome of `expand`.

    Attributes:
        src, dst: the folders, as they were given.
        written: name that was written out -> the tensor of SRC that it is a copy of.
        before_bytes, after_bytes: tensor bytes of source and output.
        before_tensors, after_tensors: number of tensors.
        before_shards: number of the source's files.
        shards: the output's files, with the bytes of their tensors.
        ties_source, ties_detail: who declared the ties, as in a `Report`.
        verified: the output was proved from the source.
        readiness: what the consumer will do with the output, if it was expanded for one.
        warnings: what a person should look at.
        seconds: how long it took.
    """

    src: str
    dst: str
    written: Mapping[str, str]
    before_bytes: int
    after_bytes: int
    before_tensors: int
    after_tensors: int
    before_shards: int
    shards: tuple[ShardSize, ...]
    ties_source: str
    ties_detail: str
    verified: bool = False
    readiness: ReadinessReport | None = None
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0

    def one_line(self) -> str:
        """See `Summary`."""
        return f"{len(self.written):,} names written out, {size(self.before_bytes)} -> {size(self.after_bytes)}"

    def lines(self) -> Iterator[RenderableType]:
        """See `Summary`."""
        before = self.before_bytes, self.before_tensors, self.before_shards
        yield sizes(before, (self.after_bytes, self.after_tensors, len(self.shards)))
        kinds = [*dict.fromkeys(map(pattern_of, self.written))]
        yield text(f"Names written out: {some(kinds)}." if kinds else "Nothing was to be written out.")
        for warning in self.warnings:
            yield text(f"warning: {warning}", "yellow")
        if self.readiness is not None:
            yield from self.readiness.lines()
        proved = "verified" if self.verified else "not verified"
        yield text(f"{shown(self.dst)} is written in {self.seconds:.1f} s; {proved}.", "green")

    def to_json(self) -> dict[str, Any]:
        """The object that `tierewrite expand --json` prints (schema tierewrite/expansion/1)."""
        return {
            "schema": EXPANSION_SCHEMA,
            "src": self.src,
            "dst": self.dst,
            "ties": {"source": self.ties_source, "detail": self.ties_detail},
            "before": {"bytes": self.before_bytes, "tensors": self.before_tensors, "shards": self.before_shards},
            "after": {
                "bytes": self.after_bytes,
                "tensors": self.after_tensors,
                "shards": [{"name": shard.name, "bytes": shard.nbytes} for shard in self.shards],
            },
            "written": dict(self.written),
            "verified": self.verified,
            "readiness": None if self.readiness is None else self.readiness.to_json(),
            "warnings": list(self.warnings),
            "seconds": self.seconds,
        }


def expand(
    src: PathLike,
    dst: PathLike,
    *,
    consumer: ConsumerName | None = None,
    ties: TiesGiven | None = None,
    trust_remote_code: bool = False,
    ignore_unindexed: bool = False,
    revision: str | None = None,
    kv_scales: KVScales | None = None,
    max_shard_size: Size | None = None,
    device: Device = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    verify: bool = False,
    force: bool = False,
    progress: ProgressLike = None,
) -> Expansion:
    """Writes the checkpoint in `src` to `dst` with every tied tensor under each of its names.

    `rewrite` of the result, with the default `max_shard_size`, gives the shards, index and other files of `src` again,
    byte for byte, where `src` is an output of `rewrite`. A manifest is not written.

    Args:
        src, dst: as for `rewrite`.
        consumer: write out only the names that its loader needs, and check the output for it before it appears.
        ties, trust_remote_code, ignore_unindexed, revision: as for `rewrite`.
        kv_scales: "merge" writes KV-cache scales out for sides that have none; "keep" does not; None: what the
            manifest of `src` says of the rewrite that made it, else "keep".
        max_shard_size: as for `rewrite`; None leaves the shards of `src` as they are and puts the aliases into further
            ones, none fuller.
        device, threads, overwrite, progress: as for `rewrite`.
        verify: prove the output from the source before it appears: each tensor is that of `src`, and rewriting the
            output gives `src` again.
        force: with `consumer`, let the output appear though it will not be served right.

    Raises:
        UsageError: the call cannot be carried out, or it is not known which names `consumer` needs (exit 2).
        Refused: a companion is of no known format, a name is that of another tensor, or a side whose weight is not
            stored has a scale of another weight (exit 3).
        SourceError: something is wrong in `src` (exit 4). SystemFailure: disk, permission, I/O (exit 5).
        NotReady, VerificationFailed: as for `rewrite` (exit 6). Whatever is raised, nothing is left behind.
    """
    started = time.monotonic()
    if force and consumer is None:
        raise UsageError("--force goes with --for; leave it out, or add that")
    ask = _asked_names(consumer)
    limit = Policy.of(max_shard_size=max_shard_size).max_shard_size
    watched = progress_of(progress)
    route = Route.between(src, dst, overwrite, False, revision, watched)
    with (
        interrupts.standing() as said,
        open_engine("local", device=device, threads=threads, progress=watched, ray_address=None) as workers,
    ):
        opened = Opened.open(
            route.src,
            meanwhile=partial(asking, watched),
            ties=ties,
            trust_remote_code=trust_remote_code,
            ignore_unindexed=ignore_unindexed,
        )
        interrupts.check()
        checkpoint = opened.checkpoint
        kv = kv_scales or _kv_scales_of(checkpoint)
        aliases = missing_aliases(checkpoint, opened.disk, kv)
        needed = ask(_with_aliases(opened, aliases)) if ask is not None else None
        if needed is not None:
            aliases = [alias for alias in aliases if alias.name in needed.names]
        _refuse_mixtures(checkpoint, aliases, workers)
        notes = needed.notes if needed is not None else ()
        plan = expansion(checkpoint, aliases, limit, (*checkpoint.warnings, *opened.ties.warnings, *notes))
        side_file_clashes(checkpoint, plan.shards)
        route.check_space(plan.total_bytes + sum(side.size for side in checkpoint.side_files), watched, checkpoint)
        with route.staging(False) as staging:
            _write(checkpoint, plan, aliases, staging, workers)
            if verify:
                _prove(opened, aliases, staging, kv, watched, whole=consumer is None)
            readiness = None
            if consumer is not None:
                readiness = check_for(
                    consumer,
                    staging.view(),
                    route.dst,
                    ties=ties,
                    trust_remote_code=trust_remote_code,
                    force=force,
                )
            staging.commit(lambda: said.append("the expansion is complete"))
    made = _outcome(name_in_messages(src), str(route.dst), opened, plan, aliases)
    return replace(made, verified=verify, readiness=readiness, seconds=time.monotonic() - started)


def _kv_scales_of(checkpoint: Checkpoint) -> KVScales:
    """Whether KV-cache scales were merged, as the manifest of the rewrite says that made the checkpoint."""
    try:
        told = read_manifest(checkpoint.root / MANIFEST_NAME)["options"]["kv_scales"]
    except SourceError:
        return "keep"
    return "merge" if told == "merge" else "keep"


def _asked_names(consumer: str | None) -> Callable[[Opened], NeededNames] | None:
    """What says which names the loader of `consumer` needs; None without a consumer.

    Raises:
        UsageError: nobody knows.
    """
    if consumer is None:
        return None
    Policy.of(consumer)  # whether there is such a consumer
    from tierewrite.consumers import CONSUMERS

    ask = CONSUMERS[consumer].needed_names
    if ask is None:
        raise UsageError(
            f"it is not known that {consumer} needs names which a canonical checkpoint lacks; leave out --for to write "
            "out all of them"
        )
    return ask


def _with_aliases(opened: Opened, aliases: Sequence[Alias]) -> Opened:
    """The headers that the output would have with all of `aliases`, behind those of the source."""
    tensors = opened.checkpoint.tensors
    entries = list(tensors.values())
    entries += [
        TensorEntry(alias.name, like.dtype, like.shape, like.shard, like.start, like.end)
        for alias in aliases
        for like in (tensors.entry(alias.row),)
    ]
    checkpoint = replace(opened.checkpoint, tensors=Tensors.of(entries))
    return Opened(checkpoint, opened.ties, on_disk(opened.ties, checkpoint.tensors, checkpoint.tensors))


def _refuse_mixtures(checkpoint: Checkpoint, aliases: Sequence[Alias], workers: Engine) -> None:
    """What a side has of its weight already (a scale whose weight is gone) is what the first side has.

    Raises:
        Refused: it is not: what is written out would belong to another weight than what is there.
        SourceError, SourceChanged, SystemFailure: reading failed.
    """
    tensors = checkpoint.tensors
    pairs = {(tensors.names[one], tensors.names[own]): alias.name for alias in aliases for one, own in alias.beside}
    if not pairs:
        return
    digests = workers.hash(checkpoint, {key for pair in pairs for key in pair}, "hashing")
    for (first, own), lacking in pairs.items():
        kinds = [(tensors[key].dtype, tensors[key].shape) for key in (first, own)]
        if kinds[0] != kinds[1] or digests[first] != digests[own]:
            raise Refused(
                f"'{shown(own)}' differs from '{shown(first)}', and '{shown(lacking)}' beside it is not stored: copied "
                "from the other side, it would belong to another weight. Export again, or leave "
                f"'{shown(own)}' out of SRC",
                file=checkpoint.place,
                tensor=own,
            )


def _modules(tensors: Tensors, aliases: Sequence[Alias]) -> dict[str, list[str]]:
    """Module -> the modules that get copies of its tensors."""
    found: dict[str, dict[str, None]] = {}
    for alias in aliases:
        module = tensors.names[alias.row].rpartition(".")[0]
        found.setdefault(module, {})[alias.name.rpartition(".")[0]] = None
    return {module: list(others) for module, others in found.items()}


def _write(
    checkpoint: Checkpoint, plan: RewritePlan, aliases: Sequence[Alias], staging: Staged, workers: Engine
) -> None:
    """Writes shards and index, and copies the other files.

    Raises:
        SourceChanged, SystemFailure: reading or writing failed.
    """
    progress = workers.progress
    names = checkpoint.tensors.names
    contents = {alias.name: Duplicate(range_of(checkpoint, names[alias.row])) for alias in aliases}
    metadata, _ = header_metadata(checkpoint, plan)
    described = with_descriptions(metadata, _modules(checkpoint.tensors, aliases))
    with Output(checkpoint, plan, contents, staging, described) as output:
        output.write(workers, {})
        output.share(progress)
        output.durable(progress)
    staging.put(INDEX_NAME, index_bytes(plan.shards, index_metadata(checkpoint, plan)))
    sides = {side.name: side.size for side in checkpoint.side_files}
    staging.expect({**sides, **{shard.name: shard.nbytes for shard in output.sizes()}})
    progress.start("copying other files", sum(sides.values()))
    copy_side_files(checkpoint, staging, progress.advance)


def _outcome(src: str, dst: str, opened: Opened, plan: RewritePlan, aliases: Sequence[Alias]) -> Expansion:
    checkpoint = opened.checkpoint
    _, warnings = header_metadata(checkpoint, plan)
    return Expansion(
        src,
        dst,
        {alias.name: checkpoint.tensors.names[alias.row] for alias in aliases},
        checkpoint.total_bytes,
        plan.total_bytes,
        len(checkpoint.tensors),
        plan.total_tensors,
        len(checkpoint.shards),
        tuple(ShardSize(shard.name, shard.nbytes) for shard in plan.shards),
        opened.ties.source,
        opened.ties.detail,
        warnings=said_once(plan.warnings, warnings),
    )


def _prove(
    opened: Opened, aliases: Sequence[Alias], staging: Staged, kv_scales: KVScales, progress: Progress, *, whole: bool
) -> None:
    """Reads what was written: each tensor is that of the source, and the ties make the source of it again.

    Args:
        whole: all aliases are there, so that the proof of a rewrite holds in the other direction.

    Raises:
        VerificationFailed: one of them does not hold.
    """
    from tierewrite.proof.compare import Proof
    from tierewrite.proof.reading import Contents, hash_tensors, is_scale

    source, names = opened.checkpoint, opened.checkpoint.tensors.names
    written = open_checkpoint(staging.view(), plain=True)
    progress.start("proving", source.total_bytes + written.total_bytes)
    before = hash_tensors(source, set(filter(is_scale, source.tensors)), progress.advance)
    after = hash_tensors(written, set(filter(is_scale, written.tensors)), progress.advance)
    expected = {**before.digests, **{alias.name: before.digests[names[alias.row]] for alias in aliases}}
    wrong = sorted(
        name for name in expected.keys() | after.digests.keys() if expected.get(name) != after.digests.get(name)
    )
    if whole and not wrong:
        policy = Policy(on_mismatch="keep", kv_scales=kv_scales)

        def unlike_source(checkpoint: Checkpoint, contents: Contents) -> list[str]:
            """Where a rewrite of `checkpoint` is not the source."""
            proof = Proof(checkpoint, source, contents, before, policy)
            proof.run(on_disk(opened.ties, checkpoint.tensors, checkpoint.tensors))
            return [problem.where for problem in proof.problems]

        wrong = unlike_source(written, after)
        in_part = [names[own] for alias in aliases for _, own in alias.beside]
        if wrong and (not_canonical := unlike_source(source, before) or in_part):
            raise VerificationFailed(
                f"rewriting the output cannot give SRC again: SRC itself is not what a rewrite makes, as at "
                f"'{shown(not_canonical[0])}'; nothing was left behind. Rewrite SRC first, or leave out --verify",
                details={"tensors": not_canonical},
            )
    if wrong:
        raise VerificationFailed(
            f"the output is not what expanding SRC gives ({len(wrong)} differ, the first is '{shown(wrong[0])}'); "
            "nothing was left behind. This is a bug or a failing disk: please report it",
            details={"tensors": wrong},
        )
