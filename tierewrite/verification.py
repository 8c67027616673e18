"""The proof: DST against SRC, from the files alone.

`verify` does not trust whoever wrote DST. It shares the header reader, the reader of declared ties and the table of
suffixes with the rest, and nothing else: what every tensor must have become is worked out here anew, from digests of
all bytes of SRC, and compared with digests of all bytes of DST. Every tensor of SRC is accounted for, every tensor of
DST has its origin, shards and index agree, other files are equal byte for byte, and the manifest, if there is one, is
true. A tensor that is missing from DST without a declared tie is a problem even where an equal one is there.

Who declares the ties: the --ties file, else DST's manifest (then neither torch nor transformers is imported), else
SRC's config.json or model class. Ties that only the class can translate to names on disk are asked of the class even
with a manifest.

Ids of problems:
    unreadable       DST, or a file of it, cannot be opened as what it should be
    missing          a tensor of SRC has no place in DST
    undeclared-drop  the same, though its bytes are there under another name: no declared tie says they are one
    unconfirmed-drop a tie was carried out that the bytes of SRC do not confirm
    tie-left         a tie that the bytes of SRC confirm was not carried out, or only in part
    unexpected       a tensor of DST that nothing in SRC accounts for
    header           another dtype or shape than the tensor it stands for
    bytes            other bytes than the tensor it stands for
    merge            not the value that covers every side
    index, total-size, metadata, shard-name, shard-size
                     the index, its total_size, the metadata that is carried over, names and sizes of shards
    side-file        a file that is missing, not expected, not regular, or different; or a folder
    manifest         a statement of tierewrite.json that is not true
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from tierewrite import formats
from tierewrite.checkpoint import INDEX_NAME, MANIFEST_NAME, Checkpoint, Shard, SideFile, TensorEntry
from tierewrite.errors import SourceChanged, SourceError, SystemFailure, TierewriteError, shown
from tierewrite.formats import Adjacency, Companion, Role
from tierewrite.names import DiskTies, TieGroup, on_disk
from tierewrite.ties import Tie, TieMap

VERIFICATION_SCHEMA = "tierewrite/verification/1"
_MANIFEST_SCHEMA = "tierewrite/manifest/1"
_MAX_MANIFEST_BYTES = 512 * 1024**2

_PIECE = 8 << 20  # bytes read at once
_RUN = 64 << 20  # bytes that one thread takes at a time; a larger tensor is a run of its own

# Problems that a better knowledge of the model's names may solve
_MAY_BE_NAMES = {"missing", "undeclared-drop", "unconfirmed-drop", "tie-left", "unexpected"}

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in DST that SRC does not account for.

    Attributes:
        id: what kind of problem, as the module's docstring lists them.
        where: the file, tensor or tie group concerned.
        message: what was found and what was expected; control characters are escaped, as they are not in `where`.
    """

    id: str
    where: str
    message: str

    def __post_init__(self) -> None:
        # Messages quote names that strangers chose, of which a terminal would obey some.
        pieces = (self.message[at : at + 25] for at in range(0, len(self.message), 25))
        object.__setattr__(self, "message", "".join(map(shown, pieces)))

    def to_json(self) -> dict[str, str]:
        return {"id": self.id, "where": self.where, "message": self.message}


@dataclass(frozen=True)
class Verification:
    """The outcome of comparing DST with SRC.

    Attributes:
        ok: nothing is wrong.
        problems: what is.
        kept, renamed, dropped, merged, repacked: how many tensors of SRC met which fate (where DST is right; a merged
            scale that also has a new name counts as merged).
        ties_source, ties_detail: who declared the ties: "ties-file", "manifest", "config", "class" or "none".
        notes: what a reader should know; nothing that is wrong.
    """

    ok: bool
    problems: tuple[Problem, ...]
    kept: int = 0
    renamed: int = 0
    dropped: int = 0
    merged: int = 0
    repacked: int = 0
    ties_source: str = "none"
    ties_detail: str = ""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object that `tierewrite verify --json` prints (schema tierewrite/verification/1)."""
        return {
            "schema": VERIFICATION_SCHEMA,
            "ok": self.ok,
            "ties": {"source": self.ties_source, "detail": self.ties_detail},
            "counts": {
                "kept": self.kept,
                "renamed": self.renamed,
                "dropped": self.dropped,
                "merged": self.merged,
                "repacked": self.repacked,
            },
            "problems": [problem.to_json() for problem in self.problems],
            "notes": list(self.notes),
        }


def verify(
    src: PathLike,
    dst: PathLike,
    *,
    ties_file: PathLike | None = None,
    trust_remote_code: bool = False,
    ignore_unindexed: bool = False,
    fix_ignore: bool = False,
    advance: Callable[[int], None] | None = None,
) -> Verification:
    """Compare the checkpoint in `dst` with what the one in `src` has to become.

    Reads every byte of both once, in pieces of 8 MiB; nothing is written.

    Args:
        src, dst: the folders.
        ties_file: JSON {alias: canonical}, instead of the manifest or the model class.
        trust_remote_code: run the model code that `src` brings, if its class has to be asked.
        ignore_unindexed: leave out tensors that the index of `src` lacks, as the rewrite was told to.
        fix_ignore: the lists of unquantized modules in configs may have been mended (a manifest says so itself).
        advance: called with numbers of bytes as they are read, from any thread.

    Returns:
        What was found. A `dst` that cannot be read is a problem, not an exception.

    Raises:
        SourceError: something is wrong in `src`, or its class cannot be asked. UsageError: the ties file is broken.
        SystemFailure: `src` cannot be read. SourceChanged: it changed meanwhile.
    """
    source = Checkpoint.open(src, ignore_unindexed=ignore_unindexed)
    try:
        target = Checkpoint.open(dst)
    except (SourceError, SystemFailure) as e:
        return Verification(False, (Problem("unreadable", str(e.file or dst), str(e)),))
    problems: list[Problem] = []
    manifest = _read_manifest(target.root / MANIFEST_NAME, problems)

    scale_keys = {key for key in source.tensors if _may_be_merged(key)}
    before = _hash_tensors(source, scale_keys, advance)
    try:
        after = _hash_tensors(target, {key for key in target.tensors if _may_be_merged(key)}, advance)
    except (SourceError, SystemFailure) as e:
        return Verification(False, (*problems, Problem("unreadable", str(e.file or dst), str(e))))

    proofs: list[_Proof] = []
    for ties in _declarations(source, manifest, ties_file, trust_remote_code):
        disk = on_disk(ties, source.tensors.keys())
        proof = _Proof(source, target, before, after, manifest)
        proof.run(disk, ties)
        proofs.append(proof)
        if not any(problem.id in _MAY_BE_NAMES for problem in proof.problems):
            break
    # The last one is the one that was asked of whoever knows most; an earlier one only stands if it proves all.
    proof = proofs[-1]
    problems += proof.problems
    problems += _check_layout(source, target, manifest)
    fix_ignore = fix_ignore or (manifest is not None and manifest["options"].get("fix_ignore") is True)
    problems += _check_side_files(source, target, advance, fix_ignore)
    return Verification(
        ok=not problems,
        problems=tuple(problems),
        ties_source=proof.ties.source,
        ties_detail=proof.ties.detail,
        notes=tuple(dict.fromkeys((*source.warnings, *proof.ties.warnings, *proof.notes))),
        **proof.counts,
    )


def _declarations(
    source: Checkpoint, manifest: Mapping[str, Any] | None, ties_file: PathLike | None, trust_remote_code: bool
) -> Iterator[TieMap]:
    """Who may declare the ties, in order; the next one is asked only where the one before did not prove DST."""
    if ties_file is None and manifest is not None:
        pairs = manifest["ties"]["map"]
        ties = tuple(Tie(alias, canonical, MANIFEST_NAME) for alias, canonical in pairs.items())
        chained = [tie for tie in ties if tie.canonical in pairs]
        yield TieMap(() if chained else ties, "manifest", MANIFEST_NAME)
        if not pairs and manifest["ties"]["source"] == "none":
            return
    try:
        yield TieMap.resolve(
            source.root,
            source.config,
            keys=source.tensors.keys(),
            ties_file=None if ties_file is None else Path(ties_file),
            trust_remote_code=trust_remote_code,
        )
    except SourceError:
        if ties_file is not None or manifest is None:
            raise  # with a manifest there is somebody else to ask: its ties were tried and stand


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Contents:
    """BLAKE3 of every tensor, and the bytes of those few whose values count."""

    digests: dict[str, bytes]
    values: dict[str, bytes]


def _may_be_merged(key: str) -> bool:
    """Whether any family merges tensors of that name; only their bytes are kept in memory."""
    return _MERGED_ENDINGS.search(key) is not None


def _merged_endings() -> re.Pattern[str]:
    rows = [row for family in formats.FAMILIES.values() for row in (*family.companions, *family.fused, *family.kv)]
    endings = {
        row.suffix.replace("{leaf}", "").rpartition(".")[2] for row in rows if row.role in (Role.ACTIVATION, Role.KV)
    }
    return re.compile("(?:" + "|".join(sorted(map(re.escape, endings - {""}))) + r")\Z")


_MERGED_ENDINGS = _merged_endings()


def _hash_tensors(checkpoint: Checkpoint, values: Collection[str], advance: Callable[[int], None] | None) -> _Contents:
    """Digests of all tensors of `checkpoint`, read in file order by several threads.

    Raises:
        SourceChanged: a shard is not the file any more whose header was read. SystemFailure: it cannot be read.
    """
    runs: list[tuple[Shard, list[TensorEntry]]] = []
    previous: tuple[int, int] | None = None
    taken = 0
    for entry in checkpoint.tensors.values():
        if previous != (entry.shard, entry.start) or taken + entry.nbytes > _RUN:
            runs.append((checkpoint.shards[entry.shard], []))
            taken = 0
        runs[-1][1].append(entry)
        taken += entry.nbytes
        previous = (entry.shard, entry.end)
    contents = _Contents({}, {})
    with ThreadPoolExecutor(max_workers=_threads()) as pool:
        for digests, kept in pool.map(lambda run: _hash_run(run[0], run[1], values, advance), runs):
            contents.digests.update(digests)
            contents.values.update(kept)
    return contents


def _threads() -> int:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, 8)


def _hash_run(
    shard: Shard, entries: Sequence[TensorEntry], values: Collection[str], advance: Callable[[int], None] | None
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Digests of neighbouring tensors of one shard; each byte is read once."""
    digests: dict[str, bytes] = {}
    kept: dict[str, bytes] = {}
    with _Reader(shard.path, shard.size, shard.mtime_ns, advance) as reader:
        reader.seek(entries[0].start, entries[-1].end)
        for entry in entries:
            if entry.nbytes <= len(reader.piece):  # nearly all of half a million small ones
                data = reader.at_hand(entry.nbytes)
                digests[entry.name] = blake3(data).digest()
                if entry.name in values:
                    kept[entry.name] = bytes(data)
                continue
            hasher = blake3(max_threads=blake3.AUTO) if entry.nbytes > _RUN else blake3()
            pieces: list[bytes] | None = [] if entry.name in values else None
            for piece in reader.take(entry.nbytes):
                hasher.update(piece)
                if pieces is not None:
                    pieces.append(bytes(piece))
            digests[entry.name] = hasher.digest()
            if pieces is not None:
                kept[entry.name] = b"".join(pieces)
        reader.check()
    return digests, kept


class _Reader:
    """A file that must not change, read once from one offset to another in bounded pieces."""

    def __init__(self, path: Path, size: int, mtime_ns: int, advance: Callable[[int], None] | None = None) -> None:
        self.path, self.size, self.mtime_ns = path, size, mtime_ns
        self.advance = advance
        self.piece = memoryview(b"")
        self.position = self.end = 0

    def __enter__(self) -> _Reader:
        try:
            self.fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as e:
            raise SystemFailure(f"cannot be opened again: {e.strerror}", file=self.path) from None
        try:
            self.check()
        except BaseException:
            os.close(self.fd)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def check(self) -> None:
        """Notice a file that is not what it was when its header or folder was read."""
        info = os.fstat(self.fd)
        if not stat.S_ISREG(info.st_mode) or (info.st_size, info.st_mtime_ns) != (self.size, self.mtime_ns):
            raise SourceChanged("changed while it was verified; run again when nothing writes to it", file=self.path)

    def seek(self, start: int, end: int) -> None:
        self.position, self.end = start, end
        self.piece = memoryview(b"")

    def at_hand(self, count: int) -> memoryview:
        """The next `count` bytes, of which `piece` has that many."""
        data, self.piece = self.piece[:count], self.piece[count:]
        return data

    def take(self, count: int) -> Iterator[memoryview]:
        """The next `count` bytes."""
        while count:
            if not self.piece:
                try:
                    read = os.pread(self.fd, min(_PIECE, self.end - self.position), self.position)
                except OSError as e:
                    raise SystemFailure(f"cannot be read: {e.strerror}", file=self.path) from None
                if not read:
                    raise SourceChanged("shrank while it was verified", file=self.path)
                self.position += len(read)
                self.piece = memoryview(read)
                if self.advance is not None:
                    self.advance(len(read))
            part = self.piece[:count]
            self.piece = self.piece[len(part) :]
            count -= len(part)
            yield part


def _hash_file(side: SideFile, advance: Callable[[int], None] | None) -> bytes:
    """BLAKE3 of a whole file."""
    hasher = blake3()
    with _Reader(side.path, side.size, side.mtime_ns, advance) as reader:
        reader.seek(0, side.size)
        for piece in reader.take(side.size):
            hasher.update(piece)
        reader.check()
    return hasher.digest()


# ---------------------------------------------------------------------------------------------------------------------
# What every tensor must have become
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Stand:
    """A tensor of DST and the tensors of SRC that it stands for, the one whose place it has first.

    `merge` is the companion whose rule made one value of several; None where the bytes are those of the first.
    """

    target: str
    sources: tuple[str, ...]
    merge: Companion | None = None
    group: str | None = None

    @property
    def action(self) -> str:
        """As manifests call it."""
        if self.target != self.sources[0]:
            return "rename"
        return "keep" if self.merge is None else "merge"

    @property
    def changes(self) -> bool:
        """Whether anything is different from leaving the tensor alone."""
        return self.sources != (self.target,)


@dataclass
class _Group:
    """A declared tie, judged by the bytes of SRC."""

    tie: TieGroup
    stands: dict[str, _Stand] = field(default_factory=dict)
    members: list[str] = field(default_factory=list)
    reason: str | None = None  # why it is not confirmed

    @property
    def dropped(self) -> set[str]:
        """Names that must be gone from DST."""
        return {key for stand in self.stands.values() for key in stand.sources if key not in self.stands}


class _NotOne(Exception):
    """Why the sides of a declared tie are not one tensor."""


_Parts = dict[str, tuple[str, Companion]]  # suffix with the parameter's own word as "*" -> key, companion


class _Judge:
    """Judges every declared tie by the bytes of SRC."""

    def __init__(self, source: Checkpoint, disk: DiskTies, digests: Mapping[str, bytes]) -> None:
        self.repack = False
        self.entries, self.digests, self.disk = source.tensors, digests, disk
        self.families = formats.detect(source.config, source.quant_config, self.entries.keys())
        self.adjacency = Adjacency(self.entries.keys(), source.config, source.quant_config)
        self.tied = {name: slot[0] for group in disk.groups for slot in group.slots for name in slot}
        self.claimed: dict[str, str] = {}
        # Keys by tied module: each key is listed under every ancestor that holds a tied parameter.
        self.below: dict[str, list[str]] = {name.rpartition(".")[0]: [] for name in self.tied}
        for key in self.entries:
            parent = key.rpartition(".")[0]
            while True:
                if parent in self.below:
                    self.below[parent].append(key)
                if not parent:
                    break
                parent = parent.rpartition(".")[0]

    def groups(self, repacked: Callable[[_Group], bool]) -> list[_Group]:
        """Every tie with what it must have become.

        Args:
            repacked: asked of a group that its bytes refute: may DST hold one NVFP4 blob for its sides all the same?
        """
        found = []
        for tie in self.disk.groups:
            group = self._attempt(tie)
            if group.reason is not None and repacked(group):
                self.repack = True
                again = self._attempt(tie)
                self.repack = False
                if again.reason is None:
                    group = again
            if group.reason is None:
                for stand in group.stands.values():
                    self.claimed.update(dict.fromkeys((*stand.sources, stand.target), tie.id))
            found.append(group)
        return found

    def _attempt(self, tie: TieGroup) -> _Group:
        group = _Group(tie)
        try:
            self._judge(group)
        except _NotOne as e:
            group = _Group(tie, reason=str(e))
            group.members = [key for slot in tie.slots for name in slot for key in self._keys(name)]
        return group

    def _keys(self, name: str) -> list[str]:
        """Keys that the tied parameter `name` may have become."""
        parent, _, leaf = name.rpartition(".")
        skip = len(parent) + 1 if parent else 0
        if not parent and leaf == "weight":
            return [key for key in self.below[""] if key.startswith("weight") and self._free(key, name)]
        return [key for key in self.below[parent] if formats.concerns(leaf, key[skip:]) and self._free(key, name)]

    def _free(self, key: str, name: str) -> bool:
        return key == name or (key not in self.tied and key not in self.disk.owned)

    def _parts(self, name: str) -> _Parts:
        parent, _, leaf = name.rpartition(".")
        skip = len(parent) + 1 if parent else 0
        parts: _Parts = {}
        for key in self._keys(name):
            suffix = key[skip:]
            companion = formats.classify(leaf, suffix, self.families) or formats.classify(leaf, suffix)
            if companion is None:
                raise _NotOne(f"no known format has '{key}' beside the tied '{name}'")
            if companion.role not in (Role.PER_SIDE, Role.KV):
                parts["*" + suffix[len(leaf) :] if suffix.startswith(leaf) else suffix] = key, companion
        return parts

    def _judge(self, group: _Group) -> None:
        if group.tie.problem is not None:
            raise _NotOne(group.tie.problem)
        for slot in group.tie.slots:
            self._judge_slot(group, slot)
        for stand in group.stands.values():
            for key in stand.sources:
                if key in self.claimed:
                    raise _NotOne(f"'{key}' already belongs to the tie of '{self.claimed[key]}'")
            if stand.target not in stand.sources and (
                stand.target in self.claimed or (stand.target in self.entries and stand.target not in group.members)
            ):
                raise _NotOne(f"the name '{stand.target}' belongs to another tensor")

    def _judge_slot(self, group: _Group, slot: tuple[str, ...]) -> None:
        canonical = slot[0]
        sides: list[tuple[str, _Parts, _Parts]] = []  # name, what is of the weight, what is of activations
        for name in slot:
            parts = self._parts(name)
            exact = {part: found for part, found in parts.items() if found[1].role is not Role.ACTIVATION}
            if exact:
                sides.append((name, exact, {part: f for part, f in parts.items() if part not in exact}))
                group.members += [key for key, _ in parts.values()]
        if not sides:
            return
        first, exact, _ = sides[0]
        for name, other, _ in sides[1:]:
            lone = exact.keys() ^ other.keys()
            if lone:
                raise _NotOne(f"'{first}' and '{name}' are stored differently: {', '.join(sorted(lone))}")
            blob = _blob_parts(exact) if self.repack else ()
            for part, (key, _) in other.items():
                self._same(exact[part][0], key, header_only=part in blob)
            self._same_neighbours(first, name)
        for part in exact:
            self._stand(group, canonical, part, tuple(other[part][0] for _, other, _ in sides), None)
        for part in dict.fromkeys(part for _, _, more in sides for part in more):
            found = [more[part] for _, _, more in sides if part in more]
            keys = tuple(key for key, _ in found)
            self._stand(group, canonical, part, keys, found[0][1])
            reason = _why_no_value([self.entries[key] for key in keys])
            if reason is not None and len(keys) > 1:
                raise _NotOne(f"{', '.join(keys)}: {reason}")

    def _same(self, one: str, other: str, header_only: bool = False) -> None:
        a, b = self.entries[one], self.entries[other]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            raise _NotOne(f"'{one}' is {a.dtype} {list(a.shape)}, '{other}' is {b.dtype} {list(b.shape)}")
        if not header_only and self.digests[one] != self.digests[other]:
            raise _NotOne(f"'{one}' and '{other}' hold different bytes")

    def _same_neighbours(self, one: str, other: str) -> None:
        """In a smoothed checkpoint, what the scale was folded into must be one as well."""
        if not self.adjacency.smoothed:
            return
        mine = {self._untied(key): key for key in self.adjacency.of(one.rpartition(".")[0])}
        for key in self.adjacency.of(other.rpartition(".")[0]):
            twin = mine.get(self._untied(key))
            if twin is not None and twin != key:
                self._same(twin, key)

    def _untied(self, key: str) -> str:
        """The canonical name of a parameter or of its companion, as the ties pair them; other names as they are."""
        if key in self.tied:
            return self.tied[key]
        parent, _, suffix = key.rpartition(".")
        canonical = self.tied.get(f"{parent}.weight")
        return key if canonical is None else f"{canonical.rpartition('.')[0]}.{suffix}"

    @staticmethod
    def _stand(group: _Group, canonical: str, part: str, keys: tuple[str, ...], merge: Companion | None) -> None:
        target = _target(canonical, part)
        group.stands[target] = _Stand(target, keys, None if keys == (target,) else merge, group.tie.id)


def _target(canonical: str, part: str) -> str:
    """The canonical key of a part."""
    parent, _, leaf = canonical.rpartition(".")
    suffix = leaf + part[1:] if part.startswith("*") else part
    return f"{parent}.{suffix}" if parent else suffix


# ---------------------------------------------------------------------------------------------------------------------
# Scales
# ---------------------------------------------------------------------------------------------------------------------

_F64 = npt.NDArray[np.float64]

# dtype -> NumPy dtype of its bits, smallest value that calibration can have given (a denormal is none, but see _valid)
_SCALARS: Mapping[str, tuple[str, float]] = {
    "F64": ("<u8", 2.0**-1022),
    "F32": ("<u4", 2.0**-126),
    "BF16": ("<u2", 2.0**-126),
    "F16": ("<u2", 2.0**-14),
    "F8_E4M3": ("u1", 2.0**-6),
    "F8_E5M2": ("u1", 2.0**-14),
    "F8_E8M0": ("u1", 2.0**-126),
}


@lru_cache(maxsize=4)
def _float8(dtype: str) -> _F64:
    """The 256 values of an 8-bit float (OCP OFP8 1.0 section 5.2; E8M0: OCP Microscaling 1.0 section 5.4.1)."""
    values = []
    for code in range(256):
        if dtype == "F8_E8M0":
            values.append(2.0 ** (code - 127) if code < 255 else np.nan)
            continue
        mantissa_bits, bias = (3, 7) if dtype == "F8_E4M3" else (2, 15)
        exponent, mantissa = (code & 127) >> mantissa_bits, code & (2**mantissa_bits - 1)
        if dtype == "F8_E5M2" and exponent == 31:
            value = np.nan if mantissa else np.inf
        elif dtype == "F8_E4M3" and code & 127 == 127:
            value = np.nan
        elif exponent:
            value = (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)
        else:
            value = mantissa / 2**mantissa_bits * 2.0 ** (1 - bias)
        values.append(-value if code & 128 else value)
    return np.array(values)


def _numbers(dtype: str, bits: npt.NDArray[Any]) -> _F64:
    """The values of bit patterns, exactly."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype.startswith("F8_"):
        return _float8(dtype)[bits]
    with np.errstate(invalid="ignore"):
        return bits.view({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float64)


def _bits(dtype: str, data: bytes) -> npt.NDArray[Any]:
    return np.frombuffer(data, _SCALARS[dtype][0])


def _why_no_value(entries: Sequence[TensorEntry]) -> str | None:
    """Why tensors cannot have one value that covers them all, by their headers."""
    for entry in entries:
        if entry.dtype not in _SCALARS or 0 in entry.shape:
            return f"{entry.dtype} {list(entry.shape)} is no scale"
    if len({tuple(dim for dim in entry.shape if dim != 1) for entry in entries}) > 1:
        return "scales of different shapes"
    return None


def _valid(dtype: str, numbers: _F64, companion: Companion) -> npt.NDArray[np.bool_]:
    """Which values calibration has set. A subnormal F16 is small but true where the largest counts."""
    floor = 2.0**-24 if dtype == "F16" and companion.merge == "max" else _SCALARS[dtype][1]
    valid = np.isfinite(numbers) & (numbers >= floor)
    for default in companion.uncalibrated:
        valid &= numbers != default
    return valid


@dataclass(frozen=True, slots=True)
class _Scale:
    """How a merged value compares with its sides: `right`, else `why` not; `ratio` between the sides; `calibrated`."""

    right: bool
    why: str
    ratio: float | None
    calibrated: bool


def _check_merge(companion: Companion, sides: Sequence[tuple[TensorEntry, bytes]], dtype: str, data: bytes) -> _Scale:
    """Whether `data` is the value that covers all sides: the nearest of its dtype that is not smaller in range.

    Nothing is encoded here: of a positive float the bit pattern plus or minus one is its neighbour, so the value is
    right if it reaches the extreme of the sides and its neighbour on the other side of the extreme does not.
    """
    up = companion.merge == "max"
    values = np.stack([_numbers(entry.dtype, _bits(entry.dtype, raw)).ravel() for entry, raw in sides])
    valid = np.stack([_valid(entry.dtype, row, companion) for (entry, _), row in zip(sides, values, strict=True)])
    largest = np.where(valid, values, -np.inf).max(axis=0)
    smallest = np.where(valid, values, np.inf).min(axis=0)
    several = valid.sum(axis=0) > 1
    with np.errstate(over="ignore"):
        ratio = float((largest[several] / smallest[several]).max()) if several.any() else None
    calibrated = bool(valid.any())

    bits = _bits(dtype, data)
    first = _bits(sides[0][0].dtype, sides[0][1])
    found = _numbers(dtype, bits)
    extreme = largest if up else smallest
    neighbour = _numbers(dtype, bits - 1 if up else bits + 1)
    with np.errstate(invalid="ignore"):
        covers = (found >= extreme) & ~(neighbour >= extreme) if up else (found <= extreme) & ~(neighbour <= extreme)
    right = np.where(valid.any(axis=0), np.isfinite(found) & (found > 0) & covers, bits == first)
    if right.all():
        return _Scale(True, "", ratio, calibrated)
    at = int(np.argmin(right))
    if not valid[:, at].any():
        why = "no side was calibrated: expected the bytes of the side that stays"
    else:
        said = ", ".join(f"{entry.name} {row[at]:.9g}" for (entry, _), row in zip(sides, values, strict=True))
        why = f"holds {found[at]:.9g}; expected {extreme[at]:.9g} or the next {dtype} beyond ({said})"
    return _Scale(False, why, ratio, calibrated)


# ---------------------------------------------------------------------------------------------------------------------
# NVFP4 blobs of different scales
# ---------------------------------------------------------------------------------------------------------------------

# The three tensors of an encoded weight: ModelOpt's, and compressed-tensors', whose last one is the reciprocal.
_FUSED = (("gate_proj", "up_proj"), ("w1", "w3"), ("q_proj", "k_proj", "v_proj"))
_BLOBS = (("weight", "weight_scale", "weight_scale_2"), ("weight_packed", "weight_scale", "weight_global_scale"))


def _blob_parts(parts: _Parts) -> tuple[str, ...]:
    """The parts of an NVFP4 blob among a side's parts, or ()."""
    for blob in _BLOBS:
        names = tuple("*" + name.removeprefix("weight") for name in blob)
        if all(name in parts for name in names):
            return names
    return ()


def _is_blob(entries: Sequence[TensorEntry]) -> bool:
    codes, scales, scale = entries
    one = all(dim == 1 for dim in scale.shape)
    return (codes.dtype, scales.dtype, scale.dtype) == ("U8", "F8_E4M3", "F32") and one and bool(codes.shape)


def _read(checkpoint: Checkpoint, key: str) -> npt.NDArray[Any]:
    """The bytes of one tensor in its shape; E4M3 as bytes."""
    entry = checkpoint.tensors[key]
    shard = checkpoint.shards[entry.shard]
    data = bytearray()
    with _Reader(shard.path, shard.size, shard.mtime_ns) as reader:
        reader.seek(entry.start, entry.end)
        for piece in reader.take(entry.nbytes):
            data += piece
    return np.frombuffer(data, "<f4" if entry.dtype == "F32" else np.uint8).reshape(entry.shape)


# ---------------------------------------------------------------------------------------------------------------------
# The comparison
# ---------------------------------------------------------------------------------------------------------------------


class _Proof:
    """One comparison under one declaration of ties."""

    def __init__(
        self,
        source: Checkpoint,
        target: Checkpoint,
        before: _Contents,
        after: _Contents,
        manifest: Mapping[str, Any] | None,
    ) -> None:
        self.source, self.target, self.before, self.after, self.manifest = source, target, before, after, manifest
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.counts: dict[str, int] = {}
        self.ties = TieMap((), "none")
        self.scales: dict[str, _Scale] = {}
        self.stands: dict[str, _Stand] = {}
        self.repacked: dict[str, str | None] = {}  # by module: why its blob is wrong, or None

    def run(self, disk: DiskTies, ties: TieMap) -> None:
        self.ties = ties
        groups = _Judge(self.source, disk, self.before.digests).groups(self._may_be_repacked)
        stands = self.stands
        for group in groups:
            if group.reason is None and self._untouched(group):
                if group.dropped or any(stand.changes for stand in group.stands.values()):
                    self._say(
                        "tie-left", group.tie.id, "its sides are one tensor in SRC, but DST still holds them apart"
                    )
                continue
            stands.update(group.stands)
        stands.update(self._kv_scales(groups, {key for stand in stands.values() for key in stand.sources}))
        placed = {key for stand in stands.values() for key in stand.sources}
        refuted = {key: group for group in groups if group.reason is not None for key in group.members}
        for key in self.source.tensors:
            if key not in placed and key not in stands:
                stands[key] = _Stand(key, (key,))
            elif key not in placed:
                self._say("unexpected", key, "its name was given to another tensor, its own bytes have no place")
        self._compare(stands, refuted)
        self._count(stands)
        if self.manifest is not None:
            self._check_manifest(stands, groups)

    def _say(self, id: str, where: str, message: str) -> None:
        self.problems.append(Problem(id, where, message))

    def _untouched(self, group: _Group) -> bool:
        """Whether DST holds the group's tensors exactly as SRC does."""
        keys = [key for stand in group.stands.values() for key in stand.sources]
        return all(self._same_tensor(key, key) for key in keys)

    def _same_tensor(self, key: str, name: str) -> bool:
        a, b = self.source.tensors[key], self.target.tensors.get(name)
        return (
            b is not None
            and (a.dtype, a.shape) == (b.dtype, b.shape)
            and self.before.digests[key] == self.after.digests[name]
        )

    def _compare(self, stands: Mapping[str, _Stand], refuted: Mapping[str, _Group]) -> None:
        held = set(self.after.digests.values())
        lost: dict[str, list[str]] = {}
        for name, stand in stands.items():
            if name not in self.target.tensors:
                first = stand.sources[0]
                if first in refuted and not stand.changes:
                    lost.setdefault(refuted[first].tie.id, []).append(first)
                elif not stand.changes and self.before.digests[first] in held:
                    self._say(
                        "undeclared-drop", first, "gone; equal bytes are there, but no declared tie makes them one"
                    )
                else:
                    also = f" for {', '.join(stand.sources)}" if stand.changes else ""
                    self._say("missing", name, f"not in DST; expected{also}")
            else:
                self._compare_one(stand)
        reasons = {group.tie.id: group.reason for group in refuted.values()}
        for group, keys in lost.items():
            listed = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
            self._say(
                "unconfirmed-drop", group, f"{listed} gone, though SRC does not confirm the tie: {reasons[group]}"
            )
        sources = {key: stand.target for stand in stands.values() for key in stand.sources}
        for name in self.target.tensors:
            if name not in stands:
                if name in sources:
                    self._say("tie-left", name, f"still there beside '{sources[name]}', which stands for it")
                else:
                    self._say("unexpected", name, "nothing in SRC accounts for it")

    def _compare_one(self, stand: _Stand) -> None:
        first, found = self.source.tensors[stand.sources[0]], self.target.tensors[stand.target]
        if (first.dtype, first.shape) != (found.dtype, found.shape):
            self._say(
                "header",
                stand.target,
                f"is {found.dtype} {list(found.shape)}; expected {first.dtype} {list(first.shape)} as '{first.name}'",
            )
        elif stand.merge is None or stand.merge.merge is None or _why_no_value([first]) is not None:
            if any(self.before.digests[key] != self.after.digests[stand.target] for key in stand.sources):
                why = self._why_not_repacked(stand.target)
                if why is not None:
                    self._say("bytes", stand.target, f"does not hold the bytes of '{first.name}'{why}")
        else:
            sides = [(self.source.tensors[key], self.before.values[key]) for key in stand.sources]
            scale = _check_merge(stand.merge, sides, found.dtype, self.after.values[stand.target])
            self.scales[stand.target] = scale
            if not scale.right:
                self._say("merge", stand.target, scale.why)

    def _count(self, stands: Mapping[str, _Stand]) -> None:
        self.counts = dict.fromkeys(("kept", "renamed", "dropped", "merged", "repacked"), 0)
        for stand in stands.values():
            fate = "merged" if stand.merge is not None else "renamed" if stand.action == "rename" else "kept"
            if self._is_repacked(stand.target):
                fate = "repacked"
            self.counts[fate] += 1
            self.counts["dropped"] += len(stand.sources) - 1

    # -- NVFP4 blobs of different scales ------------------------------------------------------------------------------

    def _option(self, name: str) -> Any:
        """An option of the rewrite; True where there is no manifest to tell, so that the bytes decide."""
        return True if self.manifest is None else self.manifest["options"].get(name)

    def _may_be_repacked(self, group: _Group) -> bool:
        """Whether DST holds one blob for sides of different scales: it was asked for, and not all sides are there."""
        if self._option("on_mismatch") not in (True, "repack"):
            return False
        return any(key not in self.target.tensors for key in group.members)

    def _is_repacked(self, name: str) -> bool:
        module, _, suffix = name.rpartition(".")
        return suffix.startswith("weight") and self.repacked.get(module, "") is None

    def _why_not_repacked(self, name: str) -> str | None:
        """None if `name` is part of an NVFP4 blob that is legitimately encoded anew; else a remark for the problem."""
        module, _, suffix = name.rpartition(".")
        for blob in _BLOBS:
            names = [f"{module}.{part}" for part in blob]
            if suffix in blob and all(n in self.stands and n in self.target.tensors for n in names):
                if not _is_blob([self.target.tensors[n] for n in names]):
                    continue
                if module not in self.repacked:
                    self.repacked[module] = self._judge_blob(module, names, reciprocal=blob[0] != "weight")
                return self.repacked[module]
        return ""

    def _judge_blob(self, module: str, names: list[str], reciprocal: bool) -> str | None:
        """Whether DST's blob is one of the sides' encoded anew to a scale that covers all of them.

        The sides must agree with each other within the rounding of their encodings, element by element.
        """
        from tierewrite import nvfp4

        mismatch = self._option("on_mismatch") in (True, "repack")
        unify = bool(self._option("unify_fused_scales"))
        if not (mismatch or unify):
            return ""
        rows = [self.stands[name].sources for name in names]
        if len({len(row) for row in rows}) > 1 or not all(
            _is_blob([self.source.tensors[key] for key in side]) for side in zip(*rows, strict=True)
        ):
            return ""
        sides = [
            (_read(self.source, codes), _read(self.source, scales), _read(self.source, scale))
            for codes, scales, scale in zip(*rows, strict=True)
        ]
        try:
            new_codes, new_scales, new_scale = (_read(self.target, name) for name in names)
        except (SystemFailure, SourceChanged) as e:
            return f": {e}"
        try:
            for i, one in enumerate(sides):
                for other in sides[:i]:
                    if not nvfp4.agree_up_to_scaling(one, other, reciprocal=reciprocal):
                        return ": its sides differ by more than their scaling"
            covering = nvfp4.widest([side[2] for side in sides], reciprocal=reciprocal)
            wanted = {covering.tobytes()}
            if unify:
                wanted |= self._fused_scales(module, names[2].rpartition(".")[2])
            if (
                new_scale.tobytes() not in wanted
                or nvfp4.widest([new_scale, covering], reciprocal=reciprocal) != new_scale
            ):
                return f": its scale {new_scale.item():.9g} is not the one that covers {covering.item():.9g}"
            for side in sides:
                again = nvfp4.repack(*side, new_scale, reciprocal=reciprocal)
                if [part.tobytes() for part in again] == [new_codes.tobytes(), new_scales.tobytes()]:
                    return None
        except ValueError as e:
            return f": {e}"
        return ": it is none of its sides encoded anew to its scale"

    def _fused_scales(self, module: str, suffix: str) -> set[bytes]:
        """The scales of the linears beside `module` that a consumer fuses with it, in DST."""
        parent, _, name = module.rpartition(".")
        return {
            _read(self.target, f"{parent}.{sibling}.{suffix}").tobytes()
            for fused in _FUSED
            if name in fused
            for sibling in fused
            if f"{parent}.{sibling}.{suffix}" in self.target.tensors and sibling != name
        }

    # -- KV-cache scales ------------------------------------------------------------------------------------------

    def _kv_scales(self, groups: Iterable[_Group], taken: Collection[str]) -> dict[str, _Stand]:
        """KV-cache scales that DST holds merged, where that is legitimate: on request, under confirmed ties."""
        if self._option("kv_scales") == "keep":
            return {}
        modules: dict[str, dict[str, tuple[str, Companion]]] = {}
        families = formats.detect(self.source.config, self.source.quant_config, self.source.tensors.keys())
        for key in self.source.tensors:
            hit = formats.kv_scale(key, families) or formats.kv_scale(key)
            if hit is not None and key not in taken:
                modules.setdefault(hit[0], {})[hit[1]] = key, hit[2]
        pairs: dict[str, dict[tuple[str, ...], str]] = {}
        blocked: set[str] = set()
        for group in groups:
            for slot in group.tie.slots:
                sides = tuple(name.rpartition(".")[0].rpartition(".")[0] for name in slot)
                if len(set(sides)) == len(sides) > 1 and all(sides):
                    pairs.setdefault(sides[0], {}).setdefault(sides, group.tie.id)
                    if group.reason is not None:
                        blocked.add(sides[0])
        stands: dict[str, _Stand] = {}
        for canonical, found in pairs.items():
            sides, owner = next(iter(found.items()))
            parts = [modules.get(side, {}) for side in sides]
            if canonical in blocked or not self._kv_agree(parts):
                continue
            for rest in dict.fromkeys(rest for part in parts for rest in part):
                there = [part[rest] for part in parts if rest in part]
                keys = tuple(key for key, _ in there)
                target = f"{canonical}.{rest}"
                gone = all(key not in self.target.tensors for key in keys if key != target)
                entries = [self.source.tensors[key] for key in keys]
                if there[0][1].merge is not None and _why_no_value(entries) is not None:
                    continue
                if keys != (target,) and gone and target in self.target.tensors:
                    stands[target] = _Stand(target, keys, there[0][1], owner)
        return stands

    def _kv_agree(self, parts: Sequence[Mapping[str, tuple[str, Companion]]]) -> bool:
        """Sides whose keys or values are also shifted (a bias) stand for each other only where all of it is equal."""
        if not any(companion.merge is None for part in parts for _, companion in part.values()):
            return True
        with_any = [part for part in parts if part]
        names = set().union(*with_any)
        for rest in names:
            keys = [part[rest][0] for part in with_any if rest in part]
            if len(keys) != len(with_any) and with_any[0].get(rest, next(iter(with_any[0].values())))[1].merge is None:
                return False
            if len({self.before.digests[key] for key in keys}) > 1:
                return False
        return True

    # -- the manifest ---------------------------------------------------------------------------------------------

    def _check_manifest(self, stands: Mapping[str, _Stand], groups: Sequence[_Group]) -> None:
        """Every statement of the manifest about tensors and groups, against the bytes."""
        assert self.manifest is not None
        say = lambda message: self._say("manifest", MANIFEST_NAME, message)  # noqa: E731
        expected = [{"name": shard.name, "size": shard.size} for shard in self.source.shards]
        if self.manifest["source"]["shards"] != expected:
            say("names other source shards, or other sizes, than SRC has")
        told: dict[str, tuple[str, Mapping[str, Any]]] = {}
        statuses: dict[str, str] = {}
        aliases = 0
        for group in self.manifest["groups"]:
            statuses[group["id"]] = group["status"]
            statuses.setdefault(group["canonical"], group["status"])
            aliases += len(group["aliases"])
            for name, entry in group["tensors"].items():
                if name in told:
                    say(f"lists '{name}' twice")
                told[name] = group["id"], entry
            # A group that was canonical already is listed only where fused scales were unified.
            changed = any(entry["action"] != "repack" for entry in group["tensors"].values())
            if (group["status"] == "rewritten") != bool(group["tensors"]) and (
                changed or group["status"] != "canonical" or not self._option("unify_fused_scales")
            ):
                say(f"says that '{group['id']}' is {group['status']}, with {len(group['tensors'])} tensors")
        if aliases != len(self.manifest["ties"]["map"]) or len(self.manifest["groups"]) != len(
            {group["id"] for group in self.manifest["groups"]}
        ):
            say("its groups and its map of ties do not fit together")
        for name, (_, entry) in told.items():
            self._check_entry(name, entry, stands.get(name))
        for name, stand in stands.items():
            if stand.changes and name not in told:
                say(f"does not list '{name}', which stands for {', '.join(stand.sources)}")
        for found in groups:
            status = statuses.get(found.tie.id)
            if found.reason is not None and status in ("rewritten", "canonical"):
                say(f"says that '{found.tie.id}' is {status}; the bytes of SRC do not confirm it: {found.reason}")

    def _check_entry(self, name: str, entry: Mapping[str, Any], stand: _Stand | None) -> None:
        """One tensor as the manifest has it."""
        wrong: list[str] = []
        if stand is None or name not in self.target.tensors:
            self._say("manifest", MANIFEST_NAME, f"lists '{name}', which DST does not hold")
            return
        if entry["from"][:1] != [stand.sources[0]] or sorted(entry["from"]) != sorted(stand.sources):
            wrong.append(f"from {', '.join(map(str, entry['from']))}; expected {', '.join(stand.sources)}")
        if entry["blake3"] != self.after.digests[name].hex():
            wrong.append("blake3 is not the digest of its bytes in DST")
        if entry["action"] != stand.action and not (entry["action"] == "repack" and self._is_repacked(name)):
            wrong.append(f"action {entry['action']}; expected {stand.action}")
        scale = self.scales.get(name)
        if entry["merged"] is not (scale is not None):
            wrong.append(f"merged is {entry['merged']}")
        elif scale is not None:
            ratio = entry.get("ratio")
            if type(ratio) not in (float, int, type(None)) or not _close(ratio, scale.ratio):
                wrong.append(f"ratio {ratio}; expected {scale.ratio}")
            if entry.get("calibrated") is not scale.calibrated:
                wrong.append(f"calibrated {entry.get('calibrated')}; expected {scale.calibrated}")
        for text in wrong:
            self._say("manifest", MANIFEST_NAME, f"'{name}': {text}")


def _close(told: float | None, found: float | None) -> bool:
    if told is None or found is None:
        return told is found
    return told == found or abs(told - found) <= 1e-9 * abs(found)


# ---------------------------------------------------------------------------------------------------------------------
# Files around the tensors
# ---------------------------------------------------------------------------------------------------------------------

_SHARD_NAME = re.compile(r"model-([0-9]{5,})-of-([0-9]{5,})\.safetensors\Z")


def _check_layout(source: Checkpoint, target: Checkpoint, manifest: Mapping[str, Any] | None) -> list[Problem]:
    """Index, metadata, names and sizes of DST's shards. (To open it, index and shards had to agree.)"""
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
        carried = {key: value for key, value in (source.index_metadata or {}).items() if key != "total_size"}
        if _frozen({key: value for key, value in metadata.items() if key != "total_size"}) != _frozen(carried):
            problems.append(Problem("metadata", INDEX_NAME, "metadata is not that of SRC's index"))
    union: dict[str, str] = {}
    for shard in source.shards:
        for key, value in shard.metadata.items():
            union.setdefault(key, value)
    fullest = [0] * len(source.shards)
    for entry in source.tensors.values():
        fullest[entry.shard] += entry.nbytes
    sizes = [0] * len(target.shards)
    counts = [0] * len(target.shards)
    for entry in target.tensors.values():
        sizes[entry.shard] += entry.nbytes
        counts[entry.shard] += 1
    limit = None if manifest is None else manifest["options"].get("max_shard_size") or max(fullest)
    for number, shard in enumerate(target.shards, 1):
        if dict(shard.metadata) != union:
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
        if shard.path != target.root / shard.name:
            problems.append(Problem("shard-name", shard.name, "is a link; expected the file itself"))
    return problems


def _frozen(value: Any) -> str:
    """JSON in one spelling: 1, 1.0 and true differ."""
    return json.dumps(value, sort_keys=True)


# Lists of modules that are not quantized, in config.json's quantization_config and in hf_quant_config.json
_IGNORE_LISTS = {
    *("ignore", "exclude_modules", "exclude", "modules_to_not_convert", "ignored_layers", "llm_int8_skip_modules"),
}


def _without_ignore_lists(value: Any, depth: int = 0) -> Any:
    """A config without its lists of unquantized modules."""
    if isinstance(value, dict) and depth < 4:
        return {
            key: _without_ignore_lists(child, depth + 1)
            for key, child in value.items()
            if not (key in _IGNORE_LISTS and isinstance(child, list))
        }
    return value


def _check_side_files(
    source: Checkpoint, target: Checkpoint, advance: Callable[[int], None] | None, fix_ignore: bool
) -> list[Problem]:
    """Every other file and folder of SRC arrives unchanged, and nothing beside them."""
    problems: list[Problem] = []
    expected = {side.name: side for side in source.side_files}
    found = {side.name: side for side in target.side_files}
    for name in sorted(expected.keys() - found.keys()):
        problems.append(Problem("side-file", name, "missing in DST"))
    for name in sorted(found.keys() - expected.keys()):
        problems.append(Problem("side-file", name, "is not in SRC"))
    for name in sorted(set(source.directories) ^ set(target.directories)):
        where = "DST" if name in source.directories else "SRC"
        problems.append(Problem("side-file", name, f"this folder is missing in {where}"))
    pairs = [(expected[name], found[name]) for name in sorted(expected.keys() & found.keys())]

    def compare(pair: tuple[SideFile, SideFile]) -> Problem | None:
        mine, other = pair
        if other.path != target.root / other.name:
            return Problem("side-file", other.name, "is a link in DST; expected a file")
        if fix_ignore and mine.name in ("config.json", "hf_quant_config.json"):
            name = "config" if mine.name == "config.json" else "quant_config"
            one, two = (_frozen(_without_ignore_lists(getattr(side, name))) for side in (source, target))
            return None if one == two else Problem("side-file", other.name, "differs in more than its ignore lists")
        if mine.size != other.size:
            return Problem("side-file", other.name, f"has {other.size} bytes; expected {mine.size}")
        digest = _hash_file(mine, advance)
        try:
            same = digest == _hash_file(other, advance)
        except SystemFailure as e:
            return Problem("unreadable", other.name, str(e))
        return None if same else Problem("side-file", other.name, "does not hold the bytes of SRC's")

    with ThreadPoolExecutor(max_workers=_threads()) as pool:
        problems += [problem for problem in pool.map(compare, pairs) if problem is not None]
    return problems


def _read_manifest(path: Path, problems: list[Problem]) -> dict[str, Any] | None:
    """DST's manifest, if it has one of the right form; else None, with a problem where there is a broken one."""
    if not os.path.lexists(path):
        return None
    try:
        info = os.lstat(path)
        if not stat.S_ISREG(info.st_mode) or info.st_size > _MAX_MANIFEST_BYTES:
            raise ValueError("is no regular file, or huge")
        manifest = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_unique)
        why = _form_problem(manifest)
    except (OSError, ValueError, RecursionError, TierewriteError) as e:
        why = f"cannot be read: {e}"
    if why is None:
        assert isinstance(manifest, dict)
        return manifest
    problems.append(Problem("manifest", MANIFEST_NAME, why))
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found


def _form_problem(manifest: Any) -> str | None:
    """Why a manifest is not of the schema; None if it is."""

    def has(value: Any, **types: Any) -> bool:
        return isinstance(value, dict) and all(
            name in value and isinstance(value[name], kind) for name, kind in types.items()
        )

    if not has(manifest, schema=str, tool=dict, source=dict, options=dict, ties=dict, groups=list):
        return "lacks schema, tool, source, options, ties or groups"
    if manifest["schema"] != _MANIFEST_SCHEMA:
        return f"schema is {shown(manifest['schema'])}; expected {_MANIFEST_SCHEMA}"
    if not has(manifest["tool"], name=str, version=str) or manifest["tool"]["name"] != "tierewrite":
        return "tool is not tierewrite with its version"
    if not has(manifest["source"], shards=list):
        return "source lists no shards"
    ties = manifest["ties"]
    if not has(ties, source=str, detail=str, map=dict) or {type(name) for name in ties["map"].values()} - {str}:
        return "ties is not source, detail and a map of names"
    if ties["source"] not in ("ties-file", "config", "class", "none"):
        return f"ties come from {shown(ties['source'])}, which is no source"
    options = manifest["options"]
    if options.get("on_mismatch") not in ("error", "keep", "repack") or options.get("kv_scales") not in (
        "keep",
        "merge",
    ):
        return "options lack on_mismatch or kv_scales, or hold unknown values"
    limit = options.get("max_shard_size", False)
    if limit is not None and (type(limit) is not int or limit <= 0):
        return "options lack max_shard_size, or it is no size"
    for group in manifest["groups"]:
        if not has(group, id=str, canonical=str, aliases=list, status=str, reason=(str, type(None)), tensors=dict):
            return "a group lacks id, canonical, aliases, status, reason or tensors"
        if group["status"] not in ("rewritten", "kept", "unconfirmed", "canonical"):
            return f"'{shown(group['id'])}' has the unknown status {shown(group['status'])}"
        if (group["reason"] is not None) != (group["status"] in ("kept", "unconfirmed")):
            return f"'{shown(group['id'])}' is {group['status']}, with the reason {shown(group['reason'])}"
        for name, entry in group["tensors"].items():
            if not has(entry, action=str, merged=bool, blake3=str) or not isinstance(entry.get("from"), list):
                return f"'{shown(name)}' lacks from, action, merged or blake3"
            if not entry["from"] or not all(isinstance(key, str) for key in entry["from"]):
                return f"'{shown(name)}' is from nothing"
    return None
