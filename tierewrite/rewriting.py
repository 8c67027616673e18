"""The pass: open, declare, plan, confirm, write. One direction; every step is a function of the one before.

Writing is optimistic: bytes are hashed and written in the same read, as if every tie were confirmed. Only when the
digests say otherwise is the plan made anew (`--on-mismatch keep`) or the staged output removed (`error`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import tierewrite
from tierewrite.engines import select
from tierewrite.engines.progress import Progress
from tierewrite.errors import NotReady, UsageError, VerificationFailed, shown
from tierewrite.output.configs import ignore_lists
from tierewrite.output.manifest import build_manifest, written_tensors
from tierewrite.output.safetensors import index_bytes, merged_metadata
from tierewrite.output.shards import Output
from tierewrite.output.side_files import copy_side_files
from tierewrite.output.staging import Staged, Staging
from tierewrite.output.store_staging import RemoteStaging, RemoteTarget
from tierewrite.output.target import Target, check_space, listing, side_file_clashes, still_as_listed
from tierewrite.planning.groups import plan as make_plan
from tierewrite.planning.plan import RewritePlan, needed_for_confirmation
from tierewrite.planning.policy import Policy
from tierewrite.report import Report, build_report
from tierewrite.source import read_ahead
from tierewrite.source.open import Place, fetched, local_only, name_of, open_checkpoint
from tierewrite.source.table import INDEX_NAME, MANIFEST_NAME, Checkpoint, gc_paused
from tierewrite.stores.remote import FilePath, RemotePath, located
from tierewrite.ties.on_disk import DiskTies, on_disk
from tierewrite.ties.tie_map import TieMap
from tierewrite.values.confirm import refusal, refuted
from tierewrite.values.filled import fill
from tierewrite.values.merged import apart_warnings, merge_scales
from tierewrite.values.reencoded import reconcile, reencodings

if TYPE_CHECKING:
    from tierewrite.consumers import ReadinessReport

FOR_CONSUMER: dict[str, dict[str, Any]] = {
    "vllm": {"kv_scales": "merge", "unify_fused_scales": True, "fix_ignore": True},
    "transformers": {},
}
"""What a rewrite for a consumer chooses, where the caller does not."""

log = logging.getLogger(__name__)

PathLike = Union[str, "os.PathLike[str]"]


@dataclass
class Facts:
    """What the bytes have told about a plan that the headers did not.

    Attributes:
        reasons: group id -> why its bytes refute it.
        apart: targets of KV-scale merges that must not be carried out.
        repacked: group id -> modules whose NVFP4 blobs differ by scaling alone.
        unfillable: output keys of missing scales that nothing can be chosen for.
    """

    reasons: dict[str, str] = field(default_factory=dict)
    apart: frozenset[str] = frozenset()
    repacked: dict[str, frozenset[str]] = field(default_factory=dict)
    unfillable: frozenset[str] = frozenset()

    def learn(
        self, checkpoint: Checkpoint, plan: RewritePlan, digests: Mapping[str, bytes], found: Mapping[str, str]
    ) -> None:
        """Takes in which groups the bytes refute (`found`: id -> reason), as the policy wants it.

        Raises:
            Refused: the policy is "error", or "repack" and a group differs by more than scaling.
        """
        if plan.policy.on_mismatch == "keep":
            self.reasons.update(found)
            return
        refused = dict(found)
        if plan.policy.on_mismatch == "repack":
            for group_id, reason in found.items():
                modules, why = reconcile(checkpoint, plan.by_id[group_id], digests)
                if why is None:
                    del refused[group_id]
                    self.repacked[group_id] = modules
                else:
                    refused[group_id] = f"{reason}; {why}"
        if refused:
            raise refusal(plan.groups, refused)


@dataclass(frozen=True)
class Opened:
    """A source with its ties: everything that a plan is made of."""

    checkpoint: Checkpoint
    ties: TieMap
    disk: DiskTies

    @classmethod
    @gc_paused()
    def open(
        cls,
        src: Place,
        *,
        ties: PathLike | None = None,
        trust_remote_code: bool = False,
        ignore_unindexed: bool = False,
        revision: str | None = None,
        meanwhile: Callable[[Checkpoint], AbstractContextManager[None]] | None = None,
    ) -> Opened:
        """Reads the headers and asks who declares ties.

        Args:
            meanwhile: entered while a model class may have to be asked, which takes seconds.

        Raises:
            What `Checkpoint.open` and `TieMap.resolve` raise.
        """
        checkpoint = open_checkpoint(
            src, revision=revision, ignore_unindexed=ignore_unindexed, trust_remote_code=trust_remote_code
        )
        with meanwhile(checkpoint) if meanwhile is not None and ties is None else nullcontext():
            tie_map = TieMap.of(checkpoint, ties, trust_remote_code)
        return cls(checkpoint, tie_map, on_disk(tie_map, checkpoint.tensors.keys()))

    def plan(
        self,
        policy: Policy,
        facts: Facts | None = None,
    ) -> RewritePlan:
        """The plan for this source, with the ties' provenance and what the bytes have told so far."""
        facts = facts or Facts()
        return make_plan(
            self.checkpoint,
            self.disk,
            policy,
            ties_source=self.ties.source,
            ties_detail=self.ties.detail,
            unpaired=self.ties.unpaired,
            warnings=(*self.checkpoint.warnings, *self.ties.warnings),
            refuted=facts.reasons,
            separate_kv=facts.apart,
            repacked=facts.repacked,
            unfillable=facts.unfillable,
        )


def policy_of(
    on_mismatch: str = "error",
    kv_scales: str = "keep",
    max_shard_size: int | str | None = None,
    unify_fused_scales: bool = False,
    fix_ignore: bool = False,
    fill_missing_scales: bool = False,
) -> Policy:
    """The options that decide content, checked.

    Raises:
        UsageError: an unknown choice, or a size that is none ("5GB", "500MB": powers of 1000, or plain bytes).
    """
    for name, value, allowed in (
        ("on_mismatch", on_mismatch, ("error", "keep", "repack")),
        ("kv_scales", kv_scales, ("keep", "merge")),
    ):
        if value not in allowed:
            raise UsageError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")
    if isinstance(max_shard_size, str):
        max_shard_size = _size(max_shard_size)
    if max_shard_size is not None and max_shard_size <= 0:
        raise UsageError(f"max_shard_size is {max_shard_size}; expected at least 1 byte")
    return Policy(on_mismatch, kv_scales, max_shard_size, unify_fused_scales, fix_ignore, fill_missing_scales)


def _size(text: str) -> int:
    from huggingface_hub.serialization._base import parse_size_to_int

    if text.strip().isdecimal():
        return int(text)
    try:
        return parse_size_to_int(text)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"max_shard_size '{text}' is no size; write it as 5GB, 500MB, 200KB or plain bytes") from error


def plan(
    src: PathLike,
    *,
    on_mismatch: str = "error",
    kv_scales: str = "keep",
    max_shard_size: int | str | None = None,
    unify_fused_scales: bool = False,
    fix_ignore: bool = False,
    fill_missing_scales: bool = False,
    ties: PathLike | None = None,
    trust_remote_code: bool = False,
    ignore_unindexed: bool = False,
    revision: str | None = None,
) -> RewritePlan:
    """What `rewrite` would do with `src`, if the bytes confirm every tie that the headers allow. Reads headers only.

    Args and Raises: as `rewrite`; never `Refused`: groups that the headers refute are listed as unconfirmed.
    """
    policy = policy_of(on_mismatch, kv_scales, max_shard_size, unify_fused_scales, fix_ignore, fill_missing_scales)
    opened = Opened.open(
        src, ties=ties, trust_remote_code=trust_remote_code, ignore_unindexed=ignore_unindexed, revision=revision
    )
    return opened.plan(policy)


def rewrite(
    src: PathLike,
    dst: PathLike | None = None,
    *,
    on_mismatch: str = "error",
    kv_scales: str = "keep",
    max_shard_size: int | str | None = None,
    unify_fused_scales: bool = False,
    fix_ignore: bool = False,
    fill_missing_scales: bool = False,
    ties: PathLike | None = None,
    trust_remote_code: bool = False,
    ignore_unindexed: bool = False,
    revision: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    in_place: bool = False,
    backup: bool = True,
    resume: bool = False,
    verify: bool = False,
    engine: str = "local",
    ray_address: str | None = None,
    consumer: str | None = None,
    force: bool = False,
    manifest: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Rewrites the checkpoint in `src` to `dst`: every tied tensor once, under its canonical name.

    Args:
        src: folder with `model.safetensors` or shards with `model.safetensors.index.json`; the URL of one, of any
            fsspec file system; or a hub id `org/name`, of which a snapshot is taken. Never written to.
        dst: folder to make; absent or empty, unless `overwrite`. It appears whole, by one rename, or not at all. Or a
            URL where nothing is: in a store that cannot rename the index is written last, and makes it a checkpoint.
            None with `in_place`.
        on_mismatch: "error" refuses when a declared tie is not confirmed by the bytes; "keep" leaves such groups whole;
            "repack" writes one NVFP4 blob where the sides differ only by how they are scaled, and else refuses.
        kv_scales: "keep" leaves KV-cache scales on every side; "merge" leaves one merged canonical value.
        max_shard_size: most tensor bytes a shard, as bytes or as "5GB"; None: as the fullest shard of `src`.
        unify_fused_scales: one `weight_scale_2` for NVFP4 projections that a consumer fuses (q/k/v, gate/up).
        fix_ignore: rewrite the entries of ignore lists in the configs that disagree with what is on disk.
        fill_missing_scales: an expert's missing or never calibrated activation scale is taken from the largest of the
            same projection's other experts in its layer.
        ties: JSON file {alias: canonical}, instead of asking the model class.
        trust_remote_code: run the model code that `src` brings, to ask it for its ties.
        ignore_unindexed: leave out tensors that the index does not list, instead of refusing.
        revision: branch, tag or commit of a hub id; None: its main branch.
        device: where the hashing happens: "cpu", "cuda", or "auto", which takes a GPU that works, the CPU until it is
            ready. The output is the same.
        threads: workers that read, hash and write; None: as many as there are cores, at most 8.
        overwrite: swap out what `dst` holds once the new checkpoint is complete; at a URL only what a killed run left.
        in_place: the new checkpoint takes the place of `src`, by one rename, once it is complete.
        backup: with `in_place`, keep the original as `SRC.bak`.
        resume: use the shards that a killed run into `dst` finished, after checking their digests.
        verify: prove the output from the source before it appears.
        engine: "local", or "ray": hashing and writing are tasks on a Ray cluster whose nodes all see `src` and `dst`.
        ray_address: the cluster, as `ray.init` takes it; None: RAY_ADDRESS, else one on this machine.
        consumer: check the output for "vllm" or "transformers" before it appears; errors other than per-side conflicts,
            which no rewrite can merge, leave no `dst`. See `prepare_for_vllm` for the choices that vLLM needs.
        force: with `consumer`, let the output appear all the same.
        manifest: write `tierewrite.json` with what was done and the digests.
        progress: told how many bytes have moved. What its `start` or `advance` raises stops the rewrite, which then
            leaves nothing behind.

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
    given = src
    progress = progress or Progress()
    policy = policy_of(on_mismatch, kv_scales, max_shard_size, unify_fused_scales, fix_ignore, fill_missing_scales)
    target: Target | RemoteTarget
    swapped: Path | None = None
    if in_place:
        if dst is not None:
            raise UsageError("in place there is no DST; give SRC alone, or leave out --in-place")
        local_only(given, "a rewrite in place")
        where = place = located(given)
        assert isinstance(place, Path)
        swapped = place
        target = Target.in_place(swapped, backup)
    elif dst is None:
        raise UsageError("DST is missing; name a folder, or use --in-place")
    else:
        where = located(dst)
        target = _target(located(src), where, overwrite, resume)  # before a download that may take an hour
        place = fetched(given, revision=revision, bars=progress.shown)
        if place != located(src):
            target = _target(place, where, overwrite, resume)
    with select(engine, device=device, threads=threads, progress=progress, ray_address=ray_address) as workers:
        listed = listing(swapped) if swapped is not None else {}
        opened = Opened.open(
            place,
            ties=ties,
            trust_remote_code=trust_remote_code,
            ignore_unindexed=ignore_unindexed,
            meanwhile=read_ahead.reading if engine == "local" else None,
        )
        checkpoint = opened.checkpoint
        planned = opened.plan(policy)
        if policy.on_mismatch != "keep" and planned.unconfirmed():
            # Nothing will be written, but the list of what is not confirmed has to be complete.
            digests = workers.hash(checkpoint, needed_for_confirmation(planned.groups), "hashing")
            raise refusal(planned.groups, refuted(checkpoint, planned, digests))
        metadata, warnings = merged_metadata(checkpoint)
        side_bytes = sum(side.size for side in checkpoint.side_files)
        needed = planned.total_bytes + side_bytes
        if isinstance(target, Target):
            check_space(target.path, needed)
        if in_place:
            assert isinstance(target, Target)
            kept = f", and the original stays as '{target.backup}'" if target.backup else ""
            progress.note(f"in place: {needed:,} bytes are needed beside SRC until the swap{kept}")
        known: dict[str, bytes] = {}
        facts = Facts()
        with _staging(target, resume) as staging, ExitStack() as outputs:
            while True:
                side_file_clashes(checkpoint, planned.shards)
                values = merge_scales(checkpoint, planned)
                if values.apart:
                    facts.apart |= values.apart
                    planned = opened.plan(policy, facts)
                    continue
                fills = fill(checkpoint, planned, values.patches)
                if fills.hopeless:
                    facts.unfillable |= fills.hopeless
                    planned = opened.plan(policy, facts)
                    continue
                anew = reencodings(checkpoint, planned)
                output = outputs.enter_context(
                    Output(checkpoint, planned, values, anew, fills, staging, metadata)
                )
                if resume:
                    output.keep_finished(workers, known)
                output.write(workers, known)
                found = refuted(checkpoint, planned, known)
                if not found:
                    break
                facts.learn(checkpoint, planned, known, found)
                output.remove()
                planned = opened.plan(policy, facts)
            # All that takes long to work out comes first: the disk is still at work.
            index = index_bytes(planned.shards, checkpoint.index_metadata)
            configs, config_warnings = ignore_lists(checkpoint, planned, opened.disk)
            written = written_tensors(planned, output.patches, output.digests, values.merged, known) if manifest else {}
            output.durable(progress)
            staging.put(INDEX_NAME, index)
            progress.start("copying other files", side_bytes)
            copy_side_files(checkpoint.side_files, checkpoint.directories, staging, progress.advance, configs)
            if consumer == "vllm" and policy.fix_ignore:
                from tierewrite.consumers.vllm.ignore import mended_ignore_lists

                mended, sentences = mended_ignore_lists(staging.view(), trust_remote_code=trust_remote_code)
                for name, data in mended.items():
                    staging.put(name, data)
                config_warnings = (*config_warnings, *sentences)
            report = build_report(
                checkpoint,
                opened.ties,
                planned,
                values.merged,
                output.sizes(),
                name_of(given),
                where,
                workers.device,
                reencoded=output.reencoded,
                filled=fills.filled,
                warnings=(
                    *warnings,
                    *values.warnings,
                    *apart_warnings(facts.apart),
                    *fills.warnings,
                    *anew.warnings,
                    *config_warnings,
                ),
            )
            if manifest:
                text = build_manifest(report, opened.disk, written, tierewrite.__version__)
                staging.put(MANIFEST_NAME, text)
            if verify:
                progress.start("proving", checkpoint.total_bytes + planned.total_bytes)
                _verify(place, staging, ties, trust_remote_code, ignore_unindexed, policy, progress)
            if consumer is not None:
                found_ready = replace(_check(staging, consumer, trust_remote_code, force), checkpoint=str(where))
                report = replace(report, readiness=found_ready)
            if swapped is not None:
                still_as_listed(swapped, listed)
            staging.commit()
    return report


def _target(src: FilePath, dst: FilePath, overwrite: bool, resume: bool) -> Target | RemoteTarget:
    """Decides whether `dst` can be written. Raises UsageError, SystemFailure."""
    if isinstance(dst, RemotePath):
        return RemoteTarget.check(src, dst, overwrite, resume)
    return Target.check(src, dst, overwrite)


def _staging(target: Target | RemoteTarget, resume: bool) -> Staged:
    return RemoteStaging(target, resume) if isinstance(target, RemoteTarget) else Staging(target, resume)


def prepare_for_vllm(src: PathLike, dst: PathLike | None = None, **options: Any) -> Report:
    """Rewrites `src` to `dst` with the choices that vLLM needs, and checks the result before it appears.

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
    return rewrite(src, dst, **{**FOR_CONSUMER["vllm"], **options, "consumer": "vllm"})


def _check(staging: Staged, consumer: str, trust_remote_code: bool, force: bool) -> ReadinessReport:
    """What the consumer will do with the staged output.

    Raises:
        NotReady: errors that a rewrite could have mended, or that make the output useless.
    """
    from tierewrite.consumers import check

    found = check(staging.view(), consumer, trust_remote_code=trust_remote_code)
    if found.errors and not (found.only_per_side_conflicts() or force):
        lines = "\n".join(f"  {finding}" for finding in found.errors[:12])
        raise NotReady(
            f"{len(found.errors)} errors would be left for {consumer}, nothing was written:\n{lines}\n"
            "Mend the export, or write it all the same with --force.",
            details={"readiness": found.to_json()},
        )
    return found


def _verify(
    src: FilePath,
    staging: Staged,
    ties: PathLike | None,
    trust_remote_code: bool,
    ignore_unindexed: bool,
    policy: Policy,
    progress: Progress,
) -> None:
    """Proves the staged output from the source.

    Raises:
        VerificationFailed: it is not what the source makes.
    """
    from tierewrite.proof.verify import verify

    result = verify(
        src,
        staging.view(),
        ties=ties,
        trust_remote_code=trust_remote_code,
        ignore_unindexed=ignore_unindexed,
        **policy.to_json(),
        advance=progress.advance,
    )
    if not result.ok:
        first = result.problems[0]
        raise VerificationFailed(
            f"the output is not what SRC makes ({len(result.problems)} problems, the first at '{shown(first.where)}': "
            f"{first.message}); nothing was left behind. This is a bug or a failing disk: please report it",
            details={"verification": result.to_json()},
        )
