"""`tierewrite.json`: what was done, in terms that can be checked against the files. Written and read here.

The form is declared once, below: it is written from the declaration, and what is read is held against it. It holds
nothing that two runs on the same input and options could differ in: no device, threads, paths, times or host.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import numpy as np
from blake3 import blake3
from msgspec import UNSET, UnsetType

from tierewrite.errors import SourceError, SystemFailure, UsageError, shown
from tierewrite.json_text import dumps
from tierewrite.planning.plan import ACTIONS, Action, RewritePlan
from tierewrite.planning.policy import Policy
from tierewrite.report import Report, Status
from tierewrite.source.hub import commit_of
from tierewrite.source.strict_json import unique_members
from tierewrite.source.table import Checkpoint
from tierewrite.ties.on_disk import DiskTies
from tierewrite.values.content import Made
from tierewrite.values.merged import MergedScale

MANIFEST_SCHEMA = "tierewrite/manifest/1"
MAX_MANIFEST_BYTES = 512 * 1024**2
"""The most that are read."""


TieSource = Literal["ties-file", "mapping", "config", "class", "none"]


class ManifestTensor(msgspec.Struct, gc=False):
    """A tensor of the output that stands for several source tensors, has a new name or was re-encoded.

    Attributes:
        sources: source keys that it stands for, the carrying one first; at least one.
        action: of the carrying one.
        merged: whether its value was merged from theirs; only then it has the last two.
        blake3: of its bytes, in hex.
        ratio: as `MergedScale.ratio`; null also where it is beyond float64.
        calibrated: as `MergedScale.calibrated`.
    """

    sources: list[str] = msgspec.field(name="from")
    action: Action
    merged: bool
    blake3: str
    ratio: float | UnsetType | None = UNSET
    calibrated: bool | UnsetType = UNSET


class ManifestGroup(msgspec.Struct):
    """A tie group.

    Attributes:
        reason: why it was kept; null for the others.
        kept_names: names that stay for a consumer, though another tensor has their value; only where there are any.
        differing_aliases: alias -> why its side was kept, of a group whose other sides are one; only where there are
            any.
    """

    id: str
    canonical: str
    aliases: tuple[str, ...]
    status: Status
    reason: str | None
    tensors: dict[str, ManifestTensor]
    kept_names: tuple[str, ...] | UnsetType = UNSET
    differing_aliases: dict[str, str] | UnsetType = UNSET


class ManifestTool(msgspec.Struct):
    """What wrote it."""

    name: Literal["tierewrite"]
    version: str


class ManifestShard(msgspec.Struct):
    """A shard.

    Attributes:
        size: of the file, in bytes.
        header: BLAKE3 of its length field and header, in hex. Earlier versions did not say it.
    """

    name: str
    size: int
    header: str | UnsetType = UNSET


class ManifestHub(msgspec.Struct):
    """Where on the Hugging Face Hub the source is: `org/name`, and the commit's hash."""

    id: str
    commit: str


class ManifestSource(msgspec.Struct):
    """The source; `hub` only where it is a snapshot in huggingface_hub's cache."""

    shards: list[ManifestShard]
    hub: ManifestHub | UnsetType = UNSET


class ManifestFile(msgspec.Struct):
    """A file of the output: its size in bytes, and BLAKE3 of its bytes, in hex."""

    size: int
    blake3: str

    @classmethod
    def of(cls, data: bytes) -> ManifestFile:
        """The file that holds `data`."""
        return cls(len(data), blake3(data).hexdigest())


class ManifestOutput(msgspec.Struct):
    """The files of the output.

    Attributes:
        shards: in the order of their names.
        files: every other file but the manifest, by name.
        tensors: key -> BLAKE3 of its bytes, in hex, for every tensor; only with `digests`.
    """

    shards: list[ManifestShard]
    files: dict[str, ManifestFile]
    tensors: dict[str, str] | UnsetType = UNSET


class ManifestTies(msgspec.Struct):
    """Who declared the ties, and alias -> canonical as on disk."""

    source: TieSource
    detail: str
    map: dict[str, str]


class Manifest(msgspec.Struct):
    """All of it.

    Attributes:
        options: the fields of `Policy`.
        output: what was written; earlier versions did not say it.
    """

    schema: str
    tool: ManifestTool
    source: ManifestSource
    options: dict[str, Any]
    ties: ManifestTies
    groups: list[ManifestGroup]
    output: ManifestOutput | UnsetType = UNSET


def written_tensors(
    plan: RewritePlan,
    made: Mapping[str, Made],
    merged: Mapping[str, tuple[str, MergedScale]],
    known: Mapping[str, bytes],
) -> dict[str, dict[str, ManifestTensor]]:
    """Per group, the output tensors that stand for several source tensors or have a new name.

    Args:
        made: output key -> what was written, where that is no copy.
        merged: output key -> (group id, how the value came about).
        known: source key -> digest.
    """
    names, group, action = plan.source.names, plan.group.tolist(), plan.action.tolist()
    others: dict[int, list[str]] = {}  # row -> the keys that were dropped for it
    dropped = np.flatnonzero(plan.action == Action.DROP.code)
    for row, holder in zip(dropped.tolist(), plan.stands_for[dropped].tolist(), strict=True):
        others.setdefault(holder, []).append(names[row])
    listed = (plan.action != Action.DROP.code) & (plan.action != Action.KEEP.code)
    listed[list(others)] = True
    result: dict[str, dict[str, ManifestTensor]] = {one.id: {} for one in plan.groups}
    for row in np.flatnonzero(listed & (plan.group >= 0)).tolist():
        name, did = names[row], ACTIONS[action[row]]
        target = plan.new_names.get(row, name)
        if did is Action.REPACK and target not in made:
            did = Action.KEEP if name == target else Action.RENAME  # it had the right scale already
            if did is Action.KEEP and row not in others:
                continue
        digest = made[target].digest if target in made else known[name]
        sources = [name, *others.get(row, ())]
        if target in merged and plan.groups[group[row]].kept_names:
            sources = list(merged[target][1].sources)  # its value covers sides that stay, too
        tensor = ManifestTensor(sources, did, target in merged, digest.hex())
        if target in merged:
            scale = merged[target][1]
            tensor.ratio, tensor.calibrated = scale.ratio, scale.calibrated
        result[plan.groups[group[row]].id][target] = tensor
    return result


def tensor_digests(plan: RewritePlan, made: Mapping[str, Made], known: Mapping[str, bytes]) -> dict[str, str]:
    """Key -> BLAKE3 of its bytes, in hex, for every tensor of the output, in the order of the files.

    Args:
        made: output key -> what was written, where that is no copy.
        known: source key -> digest, for all that are copied.
    """
    return {
        tensor.name: (made[tensor.name].digest if tensor.name in made else known[tensor.source]).hex()
        for shard in plan.shards
        for tensor in shard.tensors
    }


def source_of(checkpoint: Checkpoint) -> ManifestSource:
    """What the manifest says of the source."""
    shards = [ManifestShard(shard.name, shard.size, shard.header_digest or UNSET) for shard in checkpoint.shards]
    hub = commit_of(checkpoint.root) if checkpoint.origin is None else None
    return ManifestSource(shards, ManifestHub(hub.repo, hub.commit) if hub else UNSET)


def output_of(
    plan: RewritePlan, headers: Sequence[bytes], files: Mapping[str, ManifestFile], tensors: Mapping[str, str] | None
) -> ManifestOutput:
    """What the manifest says of the output.

    Args:
        headers: what stands before the data of each shard of the plan.
        files: every other file but the manifest, by name.
        tensors: what `tensor_digests` gives; None where not all of them are known.
    """
    shards = [
        ManifestShard(shard.name, len(header) + shard.nbytes, blake3(header).hexdigest())
        for shard, header in zip(plan.shards, headers, strict=True)
    ]
    named = {name_of_file(name): file for name, file in sorted(files.items())}
    return ManifestOutput(shards, named, UNSET if tensors is None else dict(tensors))


_LIKE_AN_ESCAPE = re.compile(r"\\(?=udc[89a-f][0-9a-f]|x5c)")


def name_of_file(name: str) -> str:
    r"""A file's name as the manifest has it: bytes that are no UTF-8, which JSON cannot hold, as in "\udcff.txt".

    A name that itself reads like that has its backslash as "\x5c": no two files have one name.
    """
    return _LIKE_AN_ESCAPE.sub(r"\\x5c", name).encode("utf-8", "backslashreplace").decode()


def ties_on_disk(disk: DiskTies) -> dict[str, str]:
    """Alias -> canonical, as the manifest has it."""
    ties: dict[str, str] = {}
    for group in disk.groups:
        # One slot: the names on disk, which need no model class to be understood. Unpacked experts: the parameters.
        canonical, *aliases = group.slots[0] if len(group.slots) == 1 else (group.canonical, *group.aliases)
        ties.update((alias, canonical) for alias in aliases)
    return ties


def build_manifest(
    report: Report,
    disk: DiskTies,
    written: Mapping[str, dict[str, ManifestTensor]],
    version: str,
    source: ManifestSource,
    output: ManifestOutput,
) -> bytes:
    """The manifest's JSON text.

    Args:
        written: what `written_tensors` gives.
        source, output: what `source_of` and `output_of` give.
    """
    # A ties file's name is the user's, and no part of the content.
    detail = report.ties_detail if report.ties_source == "class" else ""
    manifest = Manifest(
        MANIFEST_SCHEMA,
        ManifestTool("tierewrite", version),
        source,
        report.policy.to_json(),
        ManifestTies(cast(TieSource, report.ties_source), detail, ties_on_disk(disk)),
        [
            ManifestGroup(
                entry.group.id,
                entry.group.canonical,
                entry.group.aliases,
                entry.status,
                entry.group.reason,
                written.get(entry.group.id, {}),
                entry.group.kept_names or UNSET,
                dict(entry.group.differing_aliases) or UNSET,
            )
            for entry in report.groups
        ],
        output,
    )
    return dumps(msgspec.structs.asdict(manifest)).encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest as JSON values, its form checked.

    Raises:
        SourceError: not a regular file, too large, no JSON, or of another form. SystemFailure: unreadable.
    """
    try:
        if not path.is_file():
            raise SourceError("is no regular file; expected a manifest that a rewrite wrote", file=path)
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise SourceError(f"has more than {MAX_MANIFEST_BYTES} bytes, the most that are read", file=path)
        raw = path.read_bytes()
    except OSError as e:
        raise SystemFailure(f"cannot be read: {e.strerror or e}", file=path) from None
    try:
        manifest = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_members)
    except (ValueError, RecursionError) as e:
        why = "nested too deeply" if isinstance(e, RecursionError) else shown(str(e))
        raise SourceError(f"is no valid JSON: {why}; expected a manifest that a rewrite wrote", file=path) from None
    wrong = form_problem(manifest)
    if wrong is not None:
        raise SourceError(f"{wrong}; expected a manifest that a rewrite wrote ({MANIFEST_SCHEMA})", file=path)
    assert isinstance(manifest, dict)
    return manifest


def form_problem(manifest: Any) -> str | None:
    """Why a JSON value is no manifest; None if it is one."""
    if not isinstance(manifest, dict) or not isinstance(manifest.get("schema"), str):
        return "is no object with a schema"
    if manifest["schema"] != MANIFEST_SCHEMA:
        return f"its schema is {shown(manifest['schema'])}"
    try:
        found = msgspec.convert(manifest, Manifest)
        Policy(**found.options)
    except (msgspec.ValidationError, UnicodeEncodeError) as e:  # the latter for half a surrogate pair
        return f"is not of its form: {shown(str(e))}"
    except (TypeError, UsageError) as e:
        return f"its options cannot be: {shown(str(e))}"
    for group in found.groups:
        if (group.reason is not None) != (group.status == "kept"):
            return f"'{shown(group.id)}' is {group.status}, with the reason {shown(group.reason)}"
        if group.differing_aliases is not UNSET and not group.differing_aliases.keys() < set(group.aliases):
            return f"'{shown(group.id)}' has differing aliases that it does not have, or all of them"
        for name, tensor in group.tensors.items():
            if not _can_be(tensor):
                return f"the tensor '{shown(name)}' is not described as it should be"
    return None


def _can_be(tensor: ManifestTensor) -> bool:
    """Whether a tensor stands for something, and its ratio is one: earlier versions wrote Infinity."""
    if not tensor.sources:
        return False
    if not tensor.merged:
        return True
    ratio = tensor.ratio
    if ratio is UNSET or tensor.calibrated is UNSET:
        return False
    return ratio is None or (not math.isnan(ratio) and ratio >= 1)
