"""DST file by file: what a rewrite of SRC with these options writes around the tensors, worked out without writing it.

The other half of the proof. `compare` judges by a reading of its own what each tensor has to hold; here the code that
rewrites says which bytes it would write: headers with their order and offsets, index, configurations, manifest. None of
them is asked of DST, and DST has to hold just these bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET

import tierewrite
from tierewrite.errors import Refused, shown
from tierewrite.output.configs import configs_of
from tierewrite.output.manifest import (
    ManifestFile,
    ManifestHub,
    ManifestTensor,
    build_manifest,
    output_of,
    source_of,
    tensor_digests,
    written_tensors,
)
from tierewrite.output.metadata import header_metadata, index_metadata
from tierewrite.output.safetensors import index_bytes, shard_header
from tierewrite.planning.plan import RewritePlan
from tierewrite.planning.policy import Policy
from tierewrite.proof import Problem
from tierewrite.report import Report, ShardSize, build_report
from tierewrite.source.bytes import open_source
from tierewrite.source.strict_json import strict_json
from tierewrite.source.table import INDEX_NAME, MANIFEST_NAME, Checkpoint
from tierewrite.ties.on_disk import DiskTies
from tierewrite.values.confirm import refuted
from tierewrite.values.content import Copy, Made, made_of
from tierewrite.values.decide import CannotBe, Values, decide
from tierewrite.values.opened import Evidence, Opened

_DIFFERENCES_SHOWN = 5


@dataclass(frozen=True)
class ExactFiles:
    """The files of DST, but for the tensors' bytes and what is carried over unchanged.

    Attributes:
        headers: shard -> its header, length field included, and the bytes of data behind it.
        index: the bytes of the index.
        configs: configurations whose ignore lists are corrected, by name; the others are SRC's.
        plan, made, written, report, disk, digests: what the manifest is made from.
    """

    headers: Mapping[str, tuple[bytes, int]]
    index: bytes
    configs: Mapping[str, bytes]
    plan: RewritePlan
    made: Mapping[str, Made]
    written: Mapping[str, dict[str, ManifestTensor]]
    report: Report
    disk: DiskTies
    digests: Mapping[str, bytes]

    def manifest(
        self, source: Checkpoint, sides: Mapping[str, bytes], configs: Mapping[str, bytes], found: Mapping[str, Any]
    ) -> bytes:
        """The bytes of tierewrite.json.

        Args:
            sides: name -> BLAKE3 of each other file of SRC.
            configs: the configurations that a rewrite changes, with the bytes that it writes.
            found: the manifest of DST. It says whether the digests of all tensors are in it, and, where SRC is no
                snapshot of the hub's, which commit it was; its other members are not asked.
        """
        files = {side.name: ManifestFile(side.size, sides[side.name].hex()) for side in source.side_files}
        files.update((name, ManifestFile.of(data)) for name, data in configs.items())
        files[INDEX_NAME] = ManifestFile.of(self.index)
        every = "tensors" in found.get("output", ())
        tensors = tensor_digests(self.plan, self.made, self.digests) if every else None
        headers = [self.headers[shard.name][0] for shard in self.plan.shards]
        told = source_of(source)
        if told.hub is UNSET or "hub" not in found["source"]:
            told.hub = msgspec.convert(found["source"]["hub"], ManifestHub) if "hub" in found["source"] else UNSET
        output = output_of(self.plan, headers, files, tensors)
        return build_manifest(self.report, self.disk, self.written, tierewrite.__version__, told, output)


def exact_files(opened: Opened, policy: Policy, digests: Mapping[str, bytes]) -> ExactFiles | None:
    """What a rewrite writes; None where it refuses SRC.

    Args:
        digests: source key -> BLAKE3 of its bytes, for all of SRC.

    Raises:
        SourceChanged, SystemFailure: reading scales or re-encoding weights failed.
    """
    try:
        plan, values = _settled(opened, policy, digests)
    except Refused:
        return None
    checkpoint = opened.checkpoint
    metadata, _ = header_metadata(checkpoint, plan)
    headers = {shard.name: (shard_header(shard, metadata), shard.nbytes) for shard in plan.shards}
    nbytes = {tensor.name: tensor.end - tensor.start for shard in plan.shards for tensor in shard.tensors}
    made = {
        name: made_of(content, nbytes[name])
        for name, content in values.contents.items()
        if not isinstance(content, Copy)
    }
    report = build_report(
        checkpoint,
        opened.ties,
        plan,
        values.merged,
        [ShardSize(name, len(header) + data) for name, (header, data) in headers.items()],
        src="",
        dst="",
        device="",
        reencoded=[reencoding.done(made) for reencoding in values.reencoded],
        filled=values.filled,
    )
    configs, _ = configs_of(checkpoint, plan, opened.disk, opened.ties)
    return ExactFiles(
        headers,
        index_bytes(plan.shards, index_metadata(checkpoint, plan)),
        configs,
        plan,
        made,
        written_tensors(plan, made, values.merged, digests),
        report,
        opened.disk,
        digests,
    )


def _settled(opened: Opened, policy: Policy, digests: Mapping[str, bytes]) -> tuple[RewritePlan, Values]:
    """The plan that a rewrite ends with, and what the values in it become.

    Raises:
        Refused: the bytes do not confirm a tie, and the policy does not let it be kept.
    """
    evidence = Evidence()
    while True:
        plan = opened.plan(policy, evidence)
        if policy.on_mismatch != "keep" and plan.unconfirmed():
            raise Refused("the headers refute a tie")
        values = decide(opened.checkpoint, plan)
        if isinstance(values, CannotBe):
            evidence = evidence.without(values)
            continue
        found = refuted(opened.checkpoint, plan, digests)
        if not found:
            return plan, values
        evidence = evidence.with_refuted(opened.checkpoint, plan, digests, found)


def check_files(exact: ExactFiles, target: Checkpoint) -> Iterator[Problem]:
    """Headers and index of DST against `exact`."""
    there = {shard.name: shard for shard in target.shards}
    for name in sorted(exact.headers.keys() ^ there.keys()):
        yield Problem("shard-name", name, "missing" if name in exact.headers else "no rewrite of SRC writes this file")
    for name in exact.headers.keys() & there.keys():
        header, nbytes = exact.headers[name]
        shard = there[name]
        if shard.size != len(header) + nbytes or shard.data_start != len(header):
            yield Problem("layout", name, f"has {shard.size:,} bytes; expected {len(header) + nbytes:,}")
            continue
        found = bytearray(len(header))
        with open_source(shard) as file:
            file.read_runs([(0, len(header))], memoryview(found))
        if found != header:
            yield Problem("layout", name, "its header has another order, other offsets or other text than expected")
    yield from _same_json("index", INDEX_NAME, exact.index, target)


def check_manifest(expected: bytes, target: Checkpoint) -> list[Problem]:
    """DST's manifest against the bytes that it has to hold."""
    return list(_same_json("manifest", MANIFEST_NAME, expected, target))


def unchecked_commit(source: Checkpoint, manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """A note where a manifest says which commit SRC was, and SRC is not here as huggingface_hub keeps one."""
    hub = manifest["source"].get("hub")
    if hub is None or source_of(source).hub is not UNSET:
        return ()
    return (
        f"{MANIFEST_NAME} says that SRC was {shown(hub['id'])} at commit {shown(hub['commit'])}; that is not checked, "
        "because SRC is no snapshot in huggingface_hub's cache",
    )


def _same_json(kind: str, name: str, expected: bytes, target: Checkpoint) -> Iterator[Problem]:
    """A JSON file of DST against the bytes that it has to hold; problems are of `kind`."""
    try:
        data = (target.root / name).read_bytes()
    except OSError as error:
        yield Problem(kind, name, f"cannot be read: {error.strerror}")
        return
    if data != expected:
        yield from (Problem(kind, name, said) for said in _differences(expected, data))


def _differences(expected: bytes, found: bytes) -> list[str]:
    """Where two JSON texts differ, for people: the first few places."""
    try:
        places = list(_places(json.loads(expected), strict_json(found.decode()), ""))
    except (ValueError, RecursionError) as error:
        return [f"is not the JSON that is expected: {error}"]
    if not places:
        return ["says the right things, but in other bytes than a rewrite writes"]
    more = [f"and {len(places) - _DIFFERENCES_SHOWN} more differences"] if len(places) > _DIFFERENCES_SHOWN else []
    return places[:_DIFFERENCES_SHOWN] + more


def _places(expected: Any, found: Any, at: str) -> Iterator[str]:
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected.keys() | found.keys()):
            if key not in found:
                yield f"lacks {at}{shown(key)}"
            elif key not in expected:
                yield f"has {at}{shown(key)}, which is not expected"
            else:
                yield from _places(expected[key], found[key], f"{at}{shown(key)} > ")
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for number, (one, other) in enumerate(zip(expected, found, strict=True)):
            yield from _places(one, other, f"{at}{number} > ")
    elif type(expected) is not type(found) or expected != found:
        yield f"{at.removesuffix(' > ')} is {_short(found)}; expected {_short(expected)}"


def _short(value: Any) -> str:
    text = shown(json.dumps(value, default=str))
    return text if len(text) <= 80 else f"{text[:80]}..."
