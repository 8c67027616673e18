"""A checkpoint against its own manifest: whether its files are as the rewrite wrote them.

It needs no SRC. What it shows is that nothing has changed since: in transfer, on a disk, by hand. That the rewrite was
right, `verify` shows, from SRC. The manifest is not signed: who can change the files can change it too.

Ids of problems:
    unreadable   DST, or a file of it, cannot be opened as what it should be
    unfinished   the marker of a rewrite that did not come to its end is in DST
    manifest     tierewrite.json is missing or broken, or an earlier version wrote it, which listed no files
    missing      a file that was written is not there
    unexpected   a file that was not written is there
    size         a file has another size
    header       a shard has another header: other names, dtypes, shapes or offsets
    bytes        a tensor or a file has other bytes
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from tierewrite.engines.progress import ProgressLike, progress_of
from tierewrite.errors import SourceChanged, SourceError, SystemFailure, shown, system_errors
from tierewrite.output.manifest import name_of_file
from tierewrite.proof import Problem, problem_lines, verdict
from tierewrite.proof.files import manifest_or_problem
from tierewrite.proof.reading import hash_files, hash_tensors
from tierewrite.source.open import fetched, name_in_messages, open_checkpoint
from tierewrite.source.table import (
    INCOMPLETE_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    STAGING_MARK_NAME,
    Checkpoint,
)
from tierewrite.stores.base import PathLike
from tierewrite.stores.places import store_of
from tierewrite.tables import Summary, count, text

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["INTEGRITY_SCHEMA", "Integrity", "verify_integrity"]

INTEGRITY_SCHEMA = "tierewrite/integrity/1"
_OF_THE_HUB = (".gitattributes", "README.md")
"""Files that the hub writes, or has people write, in a repository that holds DST."""
_DOWNLOAD_NOTES = ".cache/huggingface/"
"""Where `hf download --local-dir` notes what it has fetched."""


@dataclass(frozen=True, repr=False)
class Integrity(Summary):
    """What was found in a checkpoint that was held against its own manifest.

    Attributes:
        ok: every file is there as it was written, as far as the manifest has digests.
        problems: what is not.
        version: of the tierewrite that wrote it; "" where the manifest cannot be read.
        source: (hub id, commit) that it was made from, where the manifest says so.
        tensors, digests: how many tensors there are, and of how many the digests were compared. Of the others names,
            dtypes, shapes and sizes were, by the digests of the headers.
        files: how many files were compared.
        notes: what a reader should know; nothing that is wrong.
    """

    ok: bool
    problems: tuple[Problem, ...]
    version: str = ""
    source: tuple[str, str] | None = None
    tensors: int = 0
    digests: int = 0
    files: int = 0
    notes: tuple[str, ...] = ()

    def one_line(self) -> str:
        """See `Summary`."""
        return f"{verdict(self.problems)}; {self._compared()}"

    def _compared(self) -> str:
        return f"{count(self.files, 'file')}, {self.digests:,} of {count(self.tensors, 'tensor')} by digest"

    def lines(self) -> Iterator[RenderableType]:
        """See `Summary`."""
        if self.source is not None:
            yield text(f"Made from {shown(self.source[0])} at commit {shown(self.source[1])}.")
        yield text(f"Compared: {self._compared()}.")
        yield from problem_lines(self.problems, self.notes)
        if self.ok:
            yield text(f"OK: DST is as tierewrite {shown(self.version)} wrote it.", "green")
            yield text("That the rewrite was right, `tierewrite verify SRC DST` shows. The manifest is not signed.")

    def to_json(self) -> dict[str, Any]:
        """The object that `tierewrite verify DST --json` prints (schema tierewrite/integrity/1)."""
        return {
            "schema": INTEGRITY_SCHEMA,
            "ok": self.ok,
            "version": self.version,
            "source": None if self.source is None else {"id": self.source[0], "commit": self.source[1]},
            "counts": {"files": self.files, "tensors": self.tensors, "digests": self.digests},
            "problems": [problem.to_json() for problem in self.problems],
            "notes": list(self.notes),
        }


def verify_integrity(dst: PathLike, *, revision: str | None = None, progress: ProgressLike = None) -> Integrity:
    """Checks the checkpoint in `dst` against its manifest: is each file as the rewrite wrote it?

    Compared are all files, the headers of the shards, and the digests of tensors that the manifest has: of all of them
    after a rewrite with `digests`, else of those that it read for their ties. Only those tensors are read.

    Args:
        dst: a folder that a rewrite wrote, its URL, or a hub id `org/name`, of which a snapshot is taken.
        revision: branch, tag or commit of a hub id; None: its main branch.
        progress: a `Progress`, or a bar such as tqdm's or rich's: told of bytes as they are read, from any thread.

    Returns:
        What was found. A `dst` that cannot be read is a problem, not an exception.

    Raises:
        UsageError: a revision of what is no hub id. SourceError, SystemFailure: a hub id cannot be fetched.
        SourceChanged: `dst` changed meanwhile.
    """
    watched = progress_of(progress)
    place = fetched(dst, revision=revision, bars=watched.shown)
    try:
        target = open_checkpoint(place, plain=True)
        markers = [name for name in (INCOMPLETE_NAME, STAGING_MARK_NAME) if name in store_of(place).names(place)]
    except (SourceError, SystemFailure) as error:
        return Integrity(False, (Problem("unreadable", str(error.file or name_in_messages(dst)), str(error.args[0])),))
    problems = [Problem("unfinished", name, "a rewrite into DST is still going, or was killed") for name in markers]
    manifest = _manifest(target, problems)
    if manifest is None:
        return Integrity(False, tuple(problems), tensors=len(target.tensors))
    problems += _shards(target, manifest["output"]["shards"])
    try:
        found, notes = _files(target, manifest["output"]["files"], watched.advance)
        problems += found
        digests = _digests(manifest)
        watched.start("comparing with the manifest", _nbytes(target, digests))
        problems += _tensors(target, digests, watched.advance)
    except SourceChanged:
        raise
    except SystemFailure as error:
        problems.append(Problem("unreadable", str(error.file or name_in_messages(dst)), str(error.args[0])))
        return Integrity(False, tuple(problems), manifest["tool"]["version"], tensors=len(target.tensors))
    others = len(target.tensors) - len(digests)
    if others > 0:
        notes.append(
            f"of {count(others, 'tensor')} the manifest has no digest: names, dtypes, shapes and sizes were compared, "
            "and not the bytes (`rewrite --digests` has all of them)"
        )
    hub = manifest["source"].get("hub")
    return Integrity(
        ok=not problems,
        problems=tuple(problems),
        version=manifest["tool"]["version"],
        source=None if hub is None else (hub["id"], hub["commit"]),
        tensors=len(target.tensors),
        digests=len(digests),
        files=len(manifest["output"]["shards"]) + len(manifest["output"]["files"]),
        notes=tuple(notes),
    )


def _manifest(target: Checkpoint, problems: list[Problem]) -> Mapping[str, Any] | None:
    """DST's manifest, if it says what was written."""
    path = target.root / MANIFEST_NAME
    if not path.exists():
        said = "missing: nothing says what was written; give SRC too, and DST is compared with that"
        problems.append(Problem("manifest", MANIFEST_NAME, said))
        return None
    manifest = manifest_or_problem(path.resolve(), problems)  # in the hub's cache it is a link
    if manifest is not None and "output" not in manifest:
        said = "lists no files: an earlier version wrote it; give SRC too, or rewrite it again"
        problems.append(Problem("manifest", MANIFEST_NAME, said))
        return None
    return manifest


def _digests(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Key -> digest in hex, of all tensors whose digests the manifest has."""
    told: dict[str, str] = {}
    for group in manifest["groups"]:
        told.update((name, entry["blake3"]) for name, entry in group["tensors"].items())
    told.update(manifest["output"].get("tensors", {}))
    return told


def _shards(target: Checkpoint, listed: list[dict[str, Any]]) -> Iterator[Problem]:
    there = {shard.name: shard for shard in target.shards}
    told = {entry["name"]: entry for entry in listed}
    for name in sorted(told.keys() - there.keys()):
        yield Problem("missing", name, "the rewrite wrote this shard, and it is not there")
    for name in sorted(there.keys() - told.keys()):
        yield Problem("unexpected", name, "the rewrite wrote no such shard")
    for name in sorted(told.keys() & there.keys()):
        if there[name].size != told[name]["size"]:
            said = f"has {there[name].size:,} bytes; the rewrite wrote {told[name]['size']:,}"
            yield Problem("size", name, said)
        if there[name].header_digest != told[name].get("header"):
            said = "its header is not the one that was written: names, dtypes, shapes or offsets differ"
            yield Problem("header", name, said)


def _files(
    target: Checkpoint, listed: Mapping[str, Mapping[str, Any]], advance: Callable[[int], None]
) -> tuple[list[Problem], list[str]]:
    """Every other file, and notes about those that the hub may add or change."""
    problems: list[Problem] = []
    sides = {name_of_file(side.name): side for side in target.side_files}
    compared = [side for name, side in sides.items() if name in listed and side.size == listed[name]["size"]]
    digests = {name_of_file(name): digest.hex() for name, digest in hash_files(compared, advance).items()}
    there = {name: (side.size, digests.get(name, "")) for name, side in sides.items()}
    index = target.root / INDEX_NAME
    if target.index_metadata is not None:
        with system_errors("reading", index):
            data = index.read_bytes()
        there[INDEX_NAME] = len(data), blake3(data).hexdigest()
    for name in sorted(listed.keys() | there.keys()):
        problem = _wrong_file(name, listed.get(name), there.get(name))
        if problem is not None:
            problems.append(problem)
    of_the_hub = [one for one in problems if one.where in _OF_THE_HUB or one.where.startswith(_DOWNLOAD_NOTES)]
    wrong = [problem for problem in problems if problem not in of_the_hub]
    notes = [f"{shown(one.where)}: {one.message}; the hub and its users write this file" for one in of_the_hub[:3]]
    return wrong, notes


def _wrong_file(name: str, told: Mapping[str, Any] | None, found: tuple[int, str] | None) -> Problem | None:
    """What is wrong with one file.

    Args:
        told: its size and digest, as the manifest has them; None: it has none of that name.
        found: its size and digest in DST; None: it is not there.
    """
    if told is None:
        return Problem("unexpected", name, "the rewrite wrote no such file")
    if found is None:
        return Problem("missing", name, "the rewrite wrote this file, and it is not there")
    if found[0] != told["size"]:
        return Problem("size", name, f"has {found[0]:,} bytes; the rewrite wrote {told['size']:,}")
    if found[1] != told["blake3"]:
        return Problem("bytes", name, "does not hold the bytes that the rewrite wrote")
    return None


def _nbytes(target: Checkpoint, digests: Mapping[str, str]) -> int:
    return int(target.tensors.nbytes[_rows(target, digests)].sum())


def _rows(target: Checkpoint, digests: Mapping[str, str]) -> np.ndarray:
    """bool [rows]: the tensors of DST whose digests the manifest has."""
    wanted = np.zeros(len(target.tensors), bool)
    wanted[[target.tensors.row[name] for name in digests if name in target.tensors]] = True
    return wanted


def _tensors(target: Checkpoint, digests: Mapping[str, str], advance: Callable[[int], None]) -> Iterator[Problem]:
    """The bytes of the tensors whose digests the manifest has."""
    rows = target.tensors.where(_rows(target, digests))
    found = hash_tensors(Checkpoint.of(target.root, target.shards, rows), (), advance).digests if len(rows) else {}
    for name, digest in digests.items():
        if name not in found:
            yield Problem("missing", name, "the manifest has a digest of this tensor, and DST does not hold it")
        elif found[name].hex() != digest:
            yield Problem("bytes", name, "does not hold the bytes that the rewrite wrote")
