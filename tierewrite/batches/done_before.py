"""Whether a DST is what a rewrite of SRC would make: asked before a batch does again what it has done.

Cheap, from headers, manifest and a few tensors; `tierewrite verify` is the proof. DST must have been written by this
version, from shards of the same names, sizes and headers, with the same options and ties; nothing in SRC may be newer
than it, every side file must be there in the same size, and the bytes of a few tensors must agree (two models of one
kind have the same names and sizes). Its own files must have the names, sizes and headers that its manifest lists.
"""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

import tierewrite
from tierewrite.errors import shown
from tierewrite.output.manifest import name_of_file, source_of, ties_on_disk
from tierewrite.planning.policy import Policy
from tierewrite.proof.files import manifest_or_problem
from tierewrite.source.bytes import read_tensors
from tierewrite.source.open import open_checkpoint
from tierewrite.source.table import CONFIG_NAMES, INDEX_NAME, MANIFEST_NAME, Checkpoint
from tierewrite.stores.places import FilePath, is_remote
from tierewrite.stores.remote import listing
from tierewrite.ties.tie import TiesGiven
from tierewrite.values.opened import Opened

_SAMPLES = 16
_SAMPLE_BYTES = 4 << 20


@dataclass(frozen=True)
class Made:
    """A DST that was made before, in numbers; see `batches.results.BatchResult`."""

    before_bytes: int
    after_bytes: int
    before_tensors: int
    after_tensors: int
    groups: int
    kept: int
    merged_scales: int
    median_ratio: float | None
    max_ratio: float | None


def has_manifest(dst: FilePath) -> bool:
    """Whether a rewrite left its manifest in `dst`. Raises SystemFailure: a store cannot be asked."""
    if is_remote(dst):
        return MANIFEST_NAME in listing(dst)
    return (dst / MANIFEST_NAME).is_file()


def made(
    src: FilePath,
    dst: FilePath,
    policy: Policy,
    *,
    ties: TiesGiven | None = None,
    trust_remote_code: bool = False,
    ignore_unindexed: bool = False,
    digests: bool = False,
) -> Made | str:
    """What is in `dst`, if a rewrite of `src` would make just that; else why it is not that.

    Args:
        src: the folder or URL (of a hub id: its snapshot).
        dst: a folder or URL with a manifest.
        policy: the options of the rewrite.
        ties, trust_remote_code, ignore_unindexed, digests: as for `rewrite`.

    Raises:
        What `Opened.open` raises for either of them.
    """
    target = open_checkpoint(dst, plain=True)
    manifest = manifest_or_problem(target.root / MANIFEST_NAME, [])
    if manifest is None:
        return f"its {MANIFEST_NAME} cannot be read"
    version = manifest["tool"]["version"]
    if version != tierewrite.__version__:
        return f"tierewrite {shown(version)} made it, and this is {tierewrite.__version__}"
    if manifest["options"] != policy.to_json():
        return "it was made with other options"
    if digests and "tensors" not in manifest.get("output", ()):
        return "it was made without a digest of every tensor"
    opened = Opened.open(src, ties=ties, trust_remote_code=trust_remote_code, ignore_unindexed=ignore_unindexed)
    opened = opened.under(policy)
    source = opened.checkpoint
    if manifest["source"]["shards"] != msgspec.to_builtins(source_of(source).shards):
        return "it was made from shards of other names, sizes or headers"
    if manifest["ties"]["map"] != ties_on_disk(opened.disk):
        return "it was made with other ties"
    changed = _newer(source, target)
    if changed is not None:
        return changed
    skipped = CONFIG_NAMES if policy.fix_ignore or policy.fix_config else ()
    if _sides(source, skipped) != _sides(target, skipped):
        return "its side files (configurations, tokenizer) are not those of SRC"
    if not _as_written(target, manifest):
        return "its files are not of the names, sizes and headers that were written"
    if not _sample_agrees(source, target, manifest):
        return "it was made from other weights"
    return _numbers(source, target, manifest)


def _as_written(target: Checkpoint, manifest: Mapping[str, Any]) -> bool:
    """Whether DST has the files that its manifest lists, by their names, sizes and headers."""
    output = manifest.get("output")
    if output is None or output["shards"] != msgspec.to_builtins(source_of(target).shards):
        return False
    there = {name_of_file(side.name): side.size for side in target.side_files}
    if target.index_metadata is not None:
        there[INDEX_NAME] = (target.root / INDEX_NAME).stat().st_size
    return there == {name: file["size"] for name, file in output["files"].items()}


def _sides(checkpoint: Checkpoint, skipped: tuple[str, ...]) -> list[tuple[str, int]]:
    return [(side.name, side.size) for side in checkpoint.side_files if side.name not in skipped]


def _newer(source: Checkpoint, target: Checkpoint) -> str | None:
    """Why times do not tell that SRC is as it was when DST was made; None if they do."""
    made_at = _times(target).get(MANIFEST_NAME)
    for name, written in _times(source).items():
        if written is None or made_at is None:
            return "its store does not say when files were written"
        if written > made_at:
            return f"'{shown(name)}' of SRC is newer"
    return None


def _times(checkpoint: Checkpoint) -> dict[str, float | None]:
    """When each file was last written, in seconds."""
    if checkpoint.origin is not None:
        return {name: _time(info) for name, info in listing(checkpoint.origin).items()}
    files = {shard.name: shard.mtime_ns for shard in checkpoint.shards}
    files.update((side.name, side.mtime_ns) for side in checkpoint.side_files)
    for name in (INDEX_NAME, MANIFEST_NAME):
        path = Path(checkpoint.root, name)
        if path.is_file():
            files[name] = path.stat().st_mtime_ns
    return {name: nanoseconds / 1e9 for name, nanoseconds in files.items()}


def _time(info: Mapping[str, Any]) -> float | None:
    """The time in a file system's info, which each of them calls and writes in its own way."""
    for name in ("LastModified", "last_modified", "mtime", "updated", "created"):
        value = info.get(name)
        if isinstance(value, str):
            try:
                value = datetime.datetime.fromisoformat(value.replace("Z", "+00:00"))
            except ValueError:
                continue
        if isinstance(value, datetime.datetime):
            return value.timestamp()
        if isinstance(value, (int, float)):
            return float(value)
    return None


def _sample_agrees(source: Checkpoint, target: Checkpoint, manifest: Mapping[str, Any]) -> bool:
    """Compares a few tensors that are copied as they are: the largest ones that are quickly read."""
    listed = {
        name: (entry["from"][0], entry["action"] in ("keep", "rename"))
        for group in manifest["groups"]
        for name, entry in group["tensors"].items()
    }
    pairs = [(key, name) for name, (key, copied) in listed.items() if copied]
    pairs = [(key, name) for key, name in pairs if key in source.tensors and name in target.tensors]
    if not pairs:  # nothing is tied: every tensor that the manifest does not mention has its own name still
        pairs = [(name, name) for name in target.tensors if name in source.tensors and name not in listed]
    pairs.sort(key=lambda pair: source.tensors[pair[0]].nbytes)
    quick = [pair for pair in pairs if source.tensors[pair[0]].nbytes <= _SAMPLE_BYTES]
    chosen = quick[-_SAMPLES:] or pairs[:1]
    before = read_tensors(source, [key for key, _ in chosen])
    after = read_tensors(target, [name for _, name in chosen])
    return all(before[key] == after[name] for key, name in chosen)


def _numbers(source: Checkpoint, target: Checkpoint, manifest: Mapping[str, Any]) -> Made:
    groups = manifest["groups"]
    scales = [entry for group in groups for entry in group["tensors"].values() if entry["merged"]]
    ratios = [entry["ratio"] for entry in scales if entry.get("ratio") is not None]
    return Made(
        source.total_bytes,
        target.total_bytes,
        len(source.tensors),
        len(target.tensors),
        len(groups),
        sum(group["status"] == "kept" for group in groups),
        len(scales),
        statistics.median(ratios) if ratios else None,
        max(ratios, default=None),
    )
