"""Everything around the tensors: index, metadata, shard names and sizes, other files, and the manifest's form."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors

from tierewrite.consumers import corrected_configs
from tierewrite.errors import SourceError, SystemFailure, TierewriteError, shown
from tierewrite.output import manifest as manifests
from tierewrite.output.manifest import ties_on_disk
from tierewrite.planning.policy import Policy
from tierewrite.proof import Problem
from tierewrite.proof.expected import Expected
from tierewrite.proof.metadata import expected_header_metadata, expected_index_metadata
from tierewrite.proof.reading import hash_file
from tierewrite.source.bytes import read_side_file
from tierewrite.source.strict_json import strict_json
from tierewrite.source.table import (
    CONFIG_NAMES,
    INCOMPLETE_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    Checkpoint,
    SideFile,
)
from tierewrite.source.threads import io_threads
from tierewrite.stores.mirror import Place
from tierewrite.stores.places import store_of
from tierewrite.tables import count
from tierewrite.ties.on_disk import DiskTies
from tierewrite.ties.tie import TiesGiven
from tierewrite.ties.tie_map import TieMap

_SHARD_NAME = re.compile(r"model-([0-9]{5,})-of-([0-9]{5,})\.safetensors\Z")


def check_claims(manifest: Mapping[str, Any], policy: Policy, ties: TieMap, disk: DiskTies) -> list[Problem]:
    """What the manifest says of how DST was made, against what the caller asked to be proved and who declares ties."""
    problems: list[Problem] = []

    def say(message: str) -> None:
        problems.append(Problem("manifest", MANIFEST_NAME, message))

    asked, told = policy.to_json(), manifest["options"]
    for name in sorted(asked.keys() | told.keys()):
        if name not in asked or name not in told:
            say(f"options {'lack' if name in asked else 'have the unknown'} {name}")
        elif type(told[name]) is not type(asked[name]) or told[name] != asked[name]:
            say(
                f"says that DST was made with {name} {told[name]}; asked to be proved was {asked[name]}: give verify "
                "the options of the rewrite"
            )
    if ties.source == "manifest":
        return problems
    detail = ties.detail if ties.source == "class" else ""
    if (manifest["ties"]["source"], manifest["ties"]["detail"]) != (ties.source, detail):
        said = f"{manifest['ties']['source']} {manifest['ties']['detail']}".strip()
        say(f"says that the ties were declared by {said}; asked was {f'{ties.source} {detail}'.strip()}")
    declared = ties_on_disk(disk)
    for alias in sorted(declared.keys() | manifest["ties"]["map"].keys()):
        mine, other = declared.get(alias), manifest["ties"]["map"].get(alias)
        if mine != other:
            say(f"ties '{alias}' to {other or 'nothing'}; by the {ties.source} it is tied to {mine or 'nothing'}")
    by_id = {group.id: group for group in disk.groups}
    for entry in manifest["groups"]:
        group = by_id.get(entry["id"])
        if group is not None and (entry["canonical"], entry["aliases"]) != (group.canonical, list(group.aliases)):
            say(f"gives the tie '{entry['id']}' another canonical name or other aliases than are declared")
    return problems


def check_index_file(target: Checkpoint) -> list[Problem]:
    """The index is a file of DST itself, with the members that an index has."""
    problems: list[Problem] = []
    if target.index_metadata is not None:
        path = target.root / INDEX_NAME
        if path.is_symlink():
            problems.append(Problem("index", INDEX_NAME, "is a link; expected the file itself"))
        for member in sorted(strict_json(path.read_text(encoding="utf-8")).keys() - {"metadata", "weight_map"}):
            problems.append(Problem("index", INDEX_NAME, f"has the member '{member}', which no index has"))
    return problems


def check_finished(target: Checkpoint) -> list[Problem]:
    """No marker of a rewrite that is still going, or was killed, lies in DST."""
    if INCOMPLETE_NAME not in store_of(target.place).names(target.place):
        return []
    return [Problem("unfinished", INCOMPLETE_NAME, "a rewrite into DST is still going, or was killed: --resume it")]


def check_layout(
    source: Checkpoint,
    target: Checkpoint,
    expected: Expected,
    manifest: Mapping[str, Any] | None,
    policy: Policy,
) -> list[Problem]:
    """Index, metadata, names and sizes of DST's shards. (To open it, index and shards had to agree.)

    Args:
        expected: what DST has to hold.
    """
    problems: list[Problem] = []
    metadata = target.index_metadata
    if metadata is None:
        # A lone file says all that an index would; a rewrite writes one all the same.
        if manifest is not None or len(target.shards) > 1:
            problems.append(Problem("index", INDEX_NAME, "missing"))
    else:
        total = target.total_bytes
        if type(metadata.get("total_size")) is not int or metadata["total_size"] != total:
            said = shown(metadata.get("total_size"))
            problems.append(Problem("total-size", INDEX_NAME, f"says {said}; the tensors have {total} bytes"))
        carried = expected_index_metadata(source, expected)
        if _frozen({key: value for key, value in metadata.items() if key != "total_size"}) != _frozen(carried):
            problems.append(Problem("metadata", INDEX_NAME, "metadata is not what follows from that of SRC's index"))
    about = expected_header_metadata(source, expected.stands)
    fullest = [0] * len(source.shards)
    for entry in source.tensors.values():
        fullest[entry.shard] += entry.nbytes
    sizes = [0] * len(target.shards)
    counts = [0] * len(target.shards)
    for entry in target.tensors.values():
        sizes[entry.shard] += entry.nbytes
        counts[entry.shard] += 1
    limit = policy.max_shard_size or (None if manifest is None else max(fullest))
    for number, shard in enumerate(target.shards, 1):
        if dict(shard.metadata) != about:
            problems.append(Problem("metadata", shard.name, f"__metadata__ is {shown(dict(shard.metadata))}"))
        match = _SHARD_NAME.match(shard.name)
        if len(target.shards) == 1:
            right = shard.name == "model.safetensors"
        else:
            right = match is not None and [int(text) for text in match.groups()] == [number, len(target.shards)]
        if not right:
            problems.append(Problem("shard-name", shard.name, f"is shard {number} of {len(target.shards)}"))
        if limit is not None and sizes[number - 1] > limit and counts[number - 1] > 1:
            problems.append(Problem("shard-size", shard.name, f"holds {sizes[number - 1]} bytes; at most {limit} fit"))
        if shard.path != target.place / shard.name:
            problems.append(Problem("shard-name", shard.name, "is a link; expected the file itself"))
    return problems


def _frozen(value: Any) -> str:
    """JSON in one spelling: 1, 1.0 and true differ."""
    return json.dumps(value, sort_keys=True)


def corrected_for(
    consumer: str,
    source: Checkpoint,
    dst: Place,
    configs: Mapping[str, bytes],
    ties: TiesGiven | None,
    trust_remote_code: bool,
) -> dict[str, bytes]:
    """The configurations that a rewrite for `consumer` changes: its ignore lists say what is on disk in its reading.

    Args:
        dst: whose tensors' names and shapes are looked at; they are proved.
        configs: the configurations that the rewrite has corrected before; the others are those of `source`.
    """
    own = [side for side in source.side_files if side.name in CONFIG_NAMES]
    contents = {side.name: read_side_file(side) for side in own} | dict(configs)
    with tempfile.TemporaryDirectory(prefix="tierewrite-") as folder:
        for name, data in contents.items():
            Path(folder, name).write_bytes(data)
        corrected, _ = corrected_configs(
            consumer, dst, configs=Path(folder), ties=ties, trust_remote_code=trust_remote_code
        )
    return {**configs, **corrected}


def check_with_safetensors(target: Checkpoint, problems: list[Problem]) -> tuple[str, ...]:
    """DST's shards, read by safetensors itself: the reader of most consumers.

    Args:
        problems: each that is found is added.

    Returns:
        A note where the installed version cannot be asked.
    """
    unknown = {dtype for dtype in {dtype for dtype, _ in target.tensors.kinds} if not _is_known_to_safetensors(dtype)}
    names: dict[int, set[str]] = {number: set() for number in range(len(target.shards))}
    beyond: set[int] = set()  # shards that the installed version does not read in SRC either
    for entry in target.tensors.values():
        names[entry.shard].add(entry.name)
        if entry.dtype in unknown:
            beyond.add(entry.shard)
    for number, shard in enumerate(target.shards):
        if not isinstance(shard.path, Path) or number in beyond:
            continue  # it reads local files only
        try:
            with safetensors.safe_open(shard.path, framework="np") as file:
                found = set(file.keys())
        except (OSError, safetensors.SafetensorError) as error:
            problems.append(Problem("unreadable", shard.name, f"safetensors cannot read it: {error}"))
            continue
        if found != names[number]:
            problems.append(Problem("unreadable", shard.name, "safetensors reads other names in it"))
    if not beyond:
        return ()
    return (
        f"{count(len(beyond), 'shard')} could not be opened with safetensors too: version {safetensors.__version__} "
        f"does not know the dtype {', '.join(shown(dtype) for dtype in sorted(unknown))}",
    )


def _is_known_to_safetensors(dtype: str) -> bool:
    header = json.dumps({"asked": {"dtype": dtype, "shape": [0], "data_offsets": [0, 0]}}).encode()
    try:
        safetensors.deserialize(len(header).to_bytes(8, "little") + header)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        return False
    return True


def check_side_files(
    source: Checkpoint,
    target: Checkpoint,
    configs: Mapping[str, bytes],
    sides: Mapping[str, bytes],
    advance: Callable[[int], None] | None,
) -> list[Problem]:
    """Every other file and folder of SRC arrives unchanged, and nothing beside them.

    Args:
        configs: the files that a rewrite changes, with the bytes that it writes.
        sides: BLAKE3 of SRC's, by name.
    """
    problems: list[Problem] = []
    expected = {side.name: side for side in source.side_files}
    found = {side.name: side for side in target.side_files}
    for name in sorted(expected.keys() - found.keys()):
        problems.append(Problem("side-file", name, "missing in DST"))
    for name in sorted(found.keys() - expected.keys()):
        problems.append(Problem("side-file", name, "is not in SRC"))
    # A store has no folders but in names; an empty one of SRC cannot be there.
    local = source.origin is None and target.origin is None
    for name in sorted(set(source.directories) ^ set(target.directories)) if local else ():
        where = "DST" if name in source.directories else "SRC"
        problems.append(Problem("side-file", name, f"this folder is missing in {where}"))
    pairs = [(expected[name], found[name]) for name in sorted(expected.keys() & found.keys())]

    def compare(pair: tuple[SideFile, SideFile]) -> Problem | None:
        mine, other = pair
        if other.path not in (target.place / other.name, target.root / other.name):
            return Problem("side-file", other.name, "is a link in DST; expected a file")
        if mine.name in configs:
            if read_side_file(other) == configs[mine.name]:
                return None
            return Problem("side-file", other.name, "is not SRC's with its ignore lists corrected")
        if mine.size != other.size:
            return Problem("side-file", other.name, f"has {other.size} bytes; expected {mine.size}")
        try:
            same = hash_file(other, advance) == sides[mine.name]
        except SystemFailure as e:
            return Problem("unreadable", other.name, str(e))
        return None if same else Problem("side-file", other.name, "does not hold the bytes of SRC's")

    with ThreadPoolExecutor(max_workers=io_threads()) as pool:
        problems += [problem for problem in pool.map(compare, pairs) if problem is not None]
    return problems


def manifest_or_problem(path: Path, problems: list[Problem]) -> dict[str, Any] | None:
    """DST's manifest, if it has one of the right form; else None, with a problem where there is a broken one."""
    if not os.path.lexists(path):
        return None
    try:
        if path.is_symlink():
            raise SourceError("is a link; expected the file itself")
        return manifests.read_manifest(path)
    except TierewriteError as e:
        problems.append(Problem("manifest", MANIFEST_NAME, str(e.args[0])))
        return None
