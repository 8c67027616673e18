"""`tierewrite.json`: what was done, in terms that can be checked against the files.

It holds nothing that two runs on the same input and options could differ in: no device, threads, paths, times or host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

from tierewrite.checkpoint import gc_paused
from tierewrite.jsontext import dumps
from tierewrite.names import DiskTies
from tierewrite.planning import Action, RewritePlan
from tierewrite.report import MergedScale, Report

MANIFEST_SCHEMA = "tierewrite/manifest/1"


@dataclass(frozen=True)
class Written:
    """A tensor of the output that stands for source tensors of a group, for the manifest.

    Attributes:
        sources: the source keys that it stands for, the carrying one first.
        action: keep, rename, merge or repack.
        blake3: digest of its bytes in the output, 32 bytes.
        scale: for a merged one, how the value came about.
    """

    sources: tuple[str, ...]
    action: str
    blake3: bytes
    scale: MergedScale | None = None

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "from": list(self.sources),
            "action": self.action,
            "merged": self.scale is not None,
            "blake3": self.blake3.hex(),
        }
        if self.scale is not None:
            data["ratio"] = self.scale.ratio
            data["calibrated"] = self.scale.calibrated
        return data


@gc_paused()
def written_tensors(
    plan: RewritePlan,
    patches: Mapping[str, bytes],
    reencoded: Mapping[str, bytes],
    merged: Mapping[str, tuple[str, MergedScale]],
    known: Mapping[str, bytes],
) -> dict[str, dict[str, Written]]:
    """Per group, the output tensors that stand for several source tensors or have a new name.

    Args:
        patches: source key -> the bytes that were written in its place.
        reencoded: source key -> digest of what was written in its place, for NVFP4 blobs that were encoded anew.
        merged: target -> (group id, how the value came about).
        known: source key -> digest.
    """
    sources: dict[str, list[str]] = {}
    for tensor in plan.tensors.values():
        if tensor.action is Action.DROP:
            sources.setdefault(tensor.target, []).append(tensor.name)
    result: dict[str, dict[str, Written]] = {}
    for tensor in plan.tensors.values():
        others = sources.get(tensor.target, [])
        action = tensor.action
        if action is Action.REPACK and tensor.name not in reencoded:
            action = Action.KEEP if tensor.name == tensor.target else Action.RENAME  # it had the right scale already
        if tensor.group is None or action is Action.DROP or (action is Action.KEEP and not others):
            continue
        _, scale = merged.get(tensor.target, (None, None))
        data = patches.get(tensor.name)
        if tensor.name in reencoded:
            digest = reencoded[tensor.name]
        else:
            digest = known[tensor.name] if data is None else blake3(data).digest()
        written = Written((tensor.name, *others), action.value, digest, scale)
        result.setdefault(tensor.group, {})[tensor.target] = written
    return result


def ties_on_disk(disk: DiskTies) -> dict[str, str]:
    """Alias -> canonical, as the manifest has it."""
    ties: dict[str, str] = {}
    for group in disk.groups:
        # One slot: the names on disk, which need no model class to be understood. Unpacked experts: the parameters.
        canonical, *aliases = group.slots[0] if len(group.slots) == 1 else (group.canonical, *group.aliases)
        ties.update((alias, canonical) for alias in aliases)
    return ties


@gc_paused()
def build_manifest(
    report: Report, disk: DiskTies, written: Mapping[str, Mapping[str, Written]], version: str
) -> bytes:
    """The manifest's JSON text."""
    data = {
        "schema": MANIFEST_SCHEMA,
        "tool": {"name": "tierewrite", "version": version},
        "source": {"shards": [{"name": shard.name, "size": shard.nbytes} for shard in report.before_shards]},
        "options": report.policy.to_json(),
        "ties": {
            "source": report.ties_source,
            # A ties file's name is the user's, and no part of the content.
            "detail": report.ties_detail if report.ties_source == "class" else "",
            "map": ties_on_disk(disk),
        },
        "groups": [
            {
                "id": entry.group.id,
                "canonical": entry.group.canonical,
                "aliases": list(entry.group.aliases),
                "status": entry.status,
                "reason": entry.group.reason,
                "tensors": {
                    target: tensor.to_json() for target, tensor in written.get(entry.group.id, {}).items()
                },
            }
            for entry in report.groups
        ],
    }
    return dumps(data).encode()
