"""The pass: open, declare, plan, confirm, write. One direction; every step is a function of the one before.

Writing is optimistic: bytes are hashed and written in the same read, as if every tie were confirmed. Only when the
digests say otherwise is the plan made anew (`--on-mismatch keep`) or the staged output removed (`error`).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

from blake3 import blake3

import tierewrite
from tierewrite import digest
from tierewrite.checkpoint import Checkpoint
from tierewrite.confirm import ScaleValues, merge_scales, refusal, refuted
from tierewrite.errors import UsageError
from tierewrite.names import DiskTies, on_disk
from tierewrite.planning import Action, Policy, RewritePlan, needed_for_confirmation
from tierewrite.planning import plan as make_plan
from tierewrite.report import GroupReport, Manifest, Report, ShardSize, Written
from tierewrite.ties import TieMap
from tierewrite.transfer import Transfer, tasks
from tierewrite.writer import (
    INDEX_NAME,
    MANIFEST_NAME,
    Staging,
    Target,
    check_space,
    copy_side_files,
    create,
    index_bytes,
    merged_metadata,
    shard_header,
    side_file_clashes,
    system_errors,
    write_all,
    write_file,
)

log = logging.getLogger(__name__)

PathLike = Union[str, "os.PathLike[str]"]


class Progress:
    """What a caller may watch. Subclass it; both methods may be called from any thread."""

    def start(self, phase: str, total: int) -> None:
        """A phase begins that will move `total` bytes."""

    def advance(self, nbytes: int) -> None:
        """`nbytes` more bytes have moved."""


@dataclass(frozen=True)
class Opened:
    """A source with its ties: everything that a plan is made of."""

    checkpoint: Checkpoint
    ties: TieMap
    disk: DiskTies

    @classmethod
    def open(
        cls,
        src: PathLike,
        *,
        ties: PathLike | None = None,
        trust_remote_code: bool = False,
        ignore_unindexed: bool = False,
    ) -> Opened:
        """Reads the headers and asks who declares ties. Raises what `Checkpoint.open` and `TieMap.resolve` raise."""
        checkpoint = Checkpoint.open(Path(src), ignore_unindexed=ignore_unindexed)
        keys = checkpoint.tensors.keys()
        tie_map = TieMap.resolve(
            checkpoint.root,
            checkpoint.config,
            keys=keys,
            ties_file=None if ties is None else Path(ties),
            trust_remote_code=trust_remote_code,
        )
        return cls(checkpoint, tie_map, on_disk(tie_map, keys))

    def plan(
        self, policy: Policy, refuted: Mapping[str, str] | None = None, separate_kv: frozenset[str] = frozenset()
    ) -> RewritePlan:
        """The plan for this source, with the ties' provenance filled in."""
        return make_plan(
            self.checkpoint,
            self.disk,
            policy,
            ties_source=self.ties.source,
            ties_detail=self.ties.detail,
            unpaired=self.ties.unpaired,
            refuted=refuted,
            separate_kv=separate_kv,
        )


def policy_of(
    on_mismatch: str = "error", kv_scales: str = "keep", max_shard_size: int | str | None = None
) -> Policy:
    """The options that decide content, checked.

    Raises:
        UsageError: an unknown choice, or a size that is none ("5GB", "500MB": powers of 1000, or plain bytes).
    """
    for name, value, allowed in (
        ("on_mismatch", on_mismatch, ("error", "keep")),
        ("kv_scales", kv_scales, ("keep", "merge")),
    ):
        if value not in allowed:
            raise UsageError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")
    if isinstance(max_shard_size, str):
        max_shard_size = _size(max_shard_size)
    if max_shard_size is not None and max_shard_size <= 0:
        raise UsageError(f"max_shard_size is {max_shard_size}; expected at least 1 byte")
    return Policy(on_mismatch, kv_scales, max_shard_size)


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
    ties: PathLike | None = None,
    trust_remote_code: bool = False,
    ignore_unindexed: bool = False,
) -> RewritePlan:
    """What `rewrite` would do with `src`, if the bytes confirm every tie that the headers allow. Reads headers only.

    Args and Raises: as `rewrite`; never `Refused`: groups that the headers refute are listed as unconfirmed.
    """
    policy = policy_of(on_mismatch, kv_scales, max_shard_size)
    opened = Opened.open(src, ties=ties, trust_remote_code=trust_remote_code, ignore_unindexed=ignore_unindexed)
    return opened.plan(policy)


def rewrite(
    src: PathLike,
    dst: PathLike,
    *,
    on_mismatch: str = "error",
    kv_scales: str = "keep",
    max_shard_size: int | str | None = None,
    ties: PathLike | None = None,
    trust_remote_code: bool = False,
    ignore_unindexed: bool = False,
    device: str = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    manifest: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Rewrites the checkpoint in `src` to `dst`: every tied tensor once, under its canonical name.

    Args:
        src: folder with `model.safetensors` or shards with `model.safetensors.index.json`. Never written to.
        dst: folder to make; absent or empty, unless `overwrite`. It appears whole, by one rename, or not at all.
        on_mismatch: "error" refuses when a declared tie is not confirmed by the bytes; "keep" leaves such groups whole.
        kv_scales: "keep" leaves KV-cache scales on every side; "merge" leaves one merged canonical value.
        max_shard_size: most tensor bytes a shard, as bytes or as "5GB"; None: as the fullest shard of `src`.
        ties: JSON file {alias: canonical}, instead of asking the model class.
        trust_remote_code: run the model code that `src` brings, to ask it for its ties.
        ignore_unindexed: leave out tensors that the index does not list, instead of refusing.
        device: "auto", "cpu" or "cuda": where the hashing happens. The output is the same.
        threads: workers that read, hash and write; None: as many as there are cores, at most 8.
        overwrite: swap out what `dst` holds once the new checkpoint is complete.
        manifest: write `tierewrite.json` with what was done and the digests.
        progress: told how many bytes have moved.

    Returns:
        A report of what was done, group by group.

    Raises:
        UsageError: the call cannot be carried out (exit 2).
        Refused: a tie is not confirmed, or a companion is of no known format; nothing was written (exit 3).
        SourceError: something is wrong in `src` (exit 4).
        SystemFailure: disk, permission, I/O, or `src` changed meanwhile; nothing was left behind (exit 5).
    """
    src, dst = Path(src), Path(dst)
    progress = progress or Progress()
    policy = policy_of(on_mismatch, kv_scales, max_shard_size)
    target = Target.check(src, dst, overwrite)
    digester = digest.select(device, threads=1)
    log.info("hashing on %s", digester.description)
    opened = Opened.open(src, ties=ties, trust_remote_code=trust_remote_code, ignore_unindexed=ignore_unindexed)
    checkpoint = opened.checkpoint
    planned = opened.plan(policy)
    if policy.on_mismatch == "error" and planned.unconfirmed():
        # Nothing will be written, but the list of what is not confirmed has to be complete.
        digests = _hash(checkpoint, planned, digester, threads, progress)
        raise refusal(planned.groups, refuted(checkpoint, planned, digests))
    metadata, warnings = merged_metadata(checkpoint)
    side_bytes = sum(side.size for side in checkpoint.side_files)
    check_space(target.path.parent, planned.total_bytes + side_bytes)
    known: dict[str, bytes] = {}
    reasons: dict[str, str] = {}
    with Staging(target) as staging:
        while True:
            side_file_clashes(checkpoint, planned.shards)
            values = merge_scales(checkpoint, planned)
            if values.apart:
                planned = opened.plan(policy, reasons, values.apart)
                values = _with_warnings(merge_scales(checkpoint, planned), values.warnings)
            paths = _write(checkpoint, planned, values, staging, digester, known, metadata, threads, progress)
            found = refuted(checkpoint, planned, known)
            if not found:
                break
            if policy.on_mismatch == "error":
                raise refusal(planned.groups, found)
            for path in paths:
                path.unlink()
            reasons.update(found)
            planned = opened.plan(policy, reasons)
        write_file(staging.path / INDEX_NAME, index_bytes(planned.shards, checkpoint.index_metadata))
        progress.start("copying other files", side_bytes)
        copy_side_files(checkpoint.side_files, checkpoint.directories, staging.path, progress.advance)
        report = _report(opened, planned, values, paths, src, dst, digester.description, warnings)
        if manifest:
            written = _written(planned, values, known)
            _write_manifest(staging.path / MANIFEST_NAME, opened, report, written)
        staging.commit()
    return report


def _hash(
    checkpoint: Checkpoint,
    planned: RewritePlan,
    digester: digest.Digester,
    threads: int | None,
    progress: Progress,
) -> dict[str, bytes]:
    """Digests of everything that confirms the planned groups; nothing is written."""
    work = tasks(checkpoint, needed_for_confirmation(planned.groups))
    progress.start("hashing", sum(task.nbytes for task in work))
    return Transfer(checkpoint, digester, threads=threads, advance=progress.advance).run(work)


def _write(
    checkpoint: Checkpoint,
    planned: RewritePlan,
    values: ScaleValues,
    staging: Staging,
    digester: digest.Digester,
    known: dict[str, bytes],
    metadata: Mapping[str, str],
    threads: int | None,
    progress: Progress,
) -> list[Path]:
    """Writes and flushes the output shards; the digests of what confirms the groups go into `known`."""
    paths: list[Path] = []
    starts: list[int] = []
    for shard in planned.shards:
        header = shard_header(shard, checkpoint.tensors, metadata)
        path = staging.path / shard.name
        with system_errors("creating", path):
            fd = create(path)
            try:
                write_all(fd, header, 0)
                os.ftruncate(fd, len(header) + shard.nbytes)
            finally:
                os.close(fd)
        paths.append(path)
        starts.append(len(header))
    wanted = {key for key in _digests_wanted(planned) if key not in known}
    work = tasks(checkpoint, wanted, planned.shards, starts)
    progress.start("rewriting", sum(task.nbytes for task in work))
    transfer = Transfer(
        checkpoint, digester, paths, values.patches, values.originals, threads=threads, advance=progress.advance
    )
    known.update(transfer.run(work))
    return paths


def _digests_wanted(planned: RewritePlan) -> set[str]:
    """What has to be confirmed, and what the manifest gives digests of."""
    wanted = needed_for_confirmation(planned.groups)
    stands_for = {t.target for t in planned.tensors.values() if t.action is Action.DROP}
    wanted.update(
        t.name
        for t in planned.tensors.values()
        if t.action is Action.RENAME or (t.action is Action.KEEP and t.target in stands_for)
    )
    return wanted


def _written(planned: RewritePlan, values: ScaleValues, known: Mapping[str, bytes]) -> dict[str, dict[str, Written]]:
    """Per group, the output tensors that stand for several source tensors or have a new name."""
    sources: dict[str, list[str]] = {}
    for tensor in planned.tensors.values():
        if tensor.action is Action.DROP:
            sources.setdefault(tensor.target, []).append(tensor.name)
    result: dict[str, dict[str, Written]] = {}
    for tensor in planned.tensors.values():
        if tensor.group is None or tensor.action is Action.DROP:
            continue
        others = sources.get(tensor.target, [])
        if tensor.action is Action.KEEP and not others:
            continue
        _, scale = values.merged.get(tensor.target, (None, None))
        data = values.patches.get(tensor.name)
        hashed = known[tensor.name] if data is None else blake3(data).digest()
        result.setdefault(tensor.group, {})[tensor.target] = Written(
            (tensor.name, *others), tensor.action.value, hashed, scale
        )
    return result


def _with_warnings(values: ScaleValues, more: tuple[str, ...]) -> ScaleValues:
    return ScaleValues(
        values.patches, values.originals, values.merged, values.apart, tuple(dict.fromkeys(values.warnings + more))
    )


def _report(
    opened: Opened,
    planned: RewritePlan,
    values: ScaleValues,
    paths: list[Path],
    src: Path,
    dst: Path,
    device: str,
    warnings: list[str],
) -> Report:
    checkpoint = opened.checkpoint
    by_group: dict[str, list[Any]] = {}
    for group, scale in values.merged.values():
        by_group.setdefault(group, []).append(scale)
    status = {"planned": "rewritten", "unconfirmed": "kept", "canonical": "canonical"}
    return Report(
        src=str(src),
        dst=str(dst),
        policy=planned.policy,
        before_bytes=checkpoint.total_bytes,
        after_bytes=planned.total_bytes,
        before_tensors=len(checkpoint.tensors),
        after_tensors=sum(len(shard.tensors) for shard in planned.shards),
        before_shards=tuple(ShardSize(shard.name, shard.size) for shard in checkpoint.shards),
        after_shards=tuple(ShardSize(path.name, path.stat().st_size) for path in paths),
        groups=tuple(
            GroupReport(group, status[group.status], tuple(by_group.get(group.id, ()))) for group in planned.groups
        ),
        ties_source=opened.ties.source,
        ties_detail=opened.ties.detail,
        unpaired=opened.ties.unpaired,
        formats=planned.families,
        device=device,
        warnings=tuple(
            dict.fromkeys((*checkpoint.warnings, *opened.ties.warnings, *warnings, *planned.warnings, *values.warnings))
        ),
    )


def _write_manifest(
    path: Path, opened: Opened, report: Report, written: Mapping[str, Mapping[str, Written]]
) -> None:
    ties: dict[str, str] = {}
    for group in opened.disk.groups:
        # One slot: the names on disk, which need no model class to be understood. Unpacked experts: the parameters.
        rows = [group.slots[0]] if len(group.slots) == 1 else [(group.canonical, *group.aliases)]
        for canonical, *aliases in rows:
            ties.update((alias, canonical) for alias in aliases)
    manifest = Manifest(
        version=tierewrite.__version__,
        source_shards=report.before_shards,
        policy=report.policy,
        ties_source=report.ties_source,
        ties_detail=report.ties_detail if report.ties_source == "class" else "",
        ties=ties,
        groups=report.groups,
        written=written,
    )
    text = json.dumps(manifest.to_json(), indent=1, ensure_ascii=False) + "\n"
    write_file(path, text.encode())
