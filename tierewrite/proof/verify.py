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
    not-unified      linears that consumers fuse have several scales, though --unify-fused-scales was asked for
    index, total-size, metadata, shard-name, shard-size
                     the index, its total_size, the metadata that is carried over, names and sizes of shards
    side-file        a file that is missing, not expected, not regular, or different; or a folder
    manifest         a statement of tierewrite.json that is not true
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tierewrite.errors import SourceError, SystemFailure
from tierewrite.proof import Problem
from tierewrite.proof.compare import Proof
from tierewrite.proof.files import check_layout, check_side_files, read_manifest
from tierewrite.proof.reading import hash_tensors, may_be_merged
from tierewrite.source.open import Place, fetched, name_of, open_checkpoint
from tierewrite.source.table import MANIFEST_NAME, Checkpoint
from tierewrite.stores.remote import PathLike
from tierewrite.ties.on_disk import on_disk
from tierewrite.ties.tie_map import Tie, TieMap

__all__ = ["VERIFICATION_SCHEMA", "Problem", "Verification", "verify"]

VERIFICATION_SCHEMA = "tierewrite/verification/1"

# Problems that a better knowledge of the model's names may solve
_MAY_BE_NAMES = {"missing", "undeclared-drop", "unconfirmed-drop", "tie-left", "unexpected"}


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
    src: Place,
    dst: Place,
    *,
    ties: PathLike | None = None,
    trust_remote_code: bool = False,
    ignore_unindexed: bool = False,
    fix_ignore: bool = False,
    revision: str | None = None,
    advance: Callable[[int], None] | None = None,
) -> Verification:
    """Compare the checkpoint in `dst` with what the one in `src` has to become.

    Reads every byte of both once, in pieces of 8 MiB; nothing is written.

    Args:
        src, dst: the folders, or their URLs. `src` may be a hub id `org/name`: its
            snapshot is taken from the cache, or fetched.
        ties: JSON {alias: canonical}, instead of the manifest or the model class.
        trust_remote_code: run the model code that `src` brings, if its class has to be asked.
        ignore_unindexed: leave out tensors that the index of `src` lacks, as the rewrite was told to.
        fix_ignore: the lists of unquantized modules in configs may have been mended (a manifest says so itself).
        revision: branch, tag or commit of a hub id; None: its main branch.
        advance: called with numbers of bytes as they are read, from any thread.

    Returns:
        What was found. A `dst` that cannot be read is a problem, not an exception.

    Raises:
        SourceError: something is wrong in `src`, or its class cannot be asked. UsageError: the ties file is broken.
        SystemFailure: `src` cannot be read. SourceChanged: it changed meanwhile.
    """
    if isinstance(src, (str, os.PathLike)):
        src = fetched(src, revision=revision)
    dst_name = name_of(dst)
    source = open_checkpoint(src, ignore_unindexed=ignore_unindexed, trust_remote_code=trust_remote_code)
    try:
        target = open_checkpoint(dst, plain=True)
    except (SourceError, SystemFailure) as e:
        return Verification(False, (Problem("unreadable", str(e.file or dst_name), str(e)),))
    problems: list[Problem] = []
    manifest = read_manifest(target.root / MANIFEST_NAME, problems)

    scale_keys = {key for key in source.tensors if may_be_merged(key)}
    before = hash_tensors(source, scale_keys, advance)
    try:
        after = hash_tensors(target, {key for key in target.tensors if may_be_merged(key)}, advance)
    except (SourceError, SystemFailure) as e:
        return Verification(False, (*problems, Problem("unreadable", str(e.file or dst_name), str(e))))

    proofs: list[Proof] = []
    for declared in _declarations(source, manifest, ties, trust_remote_code):
        disk = on_disk(declared, source.tensors.keys())
        proof = Proof(source, target, before, after, manifest)
        proof.run(disk, declared)
        proofs.append(proof)
        if not any(problem.id in _MAY_BE_NAMES for problem in proof.problems):
            break
    # The last one is the one that was asked of whoever knows most; an earlier one only stands if it proves all.
    proof = proofs[-1]
    problems += proof.problems
    problems += check_layout(source, target, manifest)
    fix_ignore = fix_ignore or (manifest is not None and manifest["options"].get("fix_ignore") is True)
    problems += check_side_files(source, target, advance, fix_ignore)
    return Verification(
        ok=not problems,
        problems=tuple(problems),
        ties_source=proof.ties.source,
        ties_detail=proof.ties.detail,
        notes=tuple(dict.fromkeys((*source.warnings, *proof.ties.warnings, *proof.notes))),
        **proof.counts,
    )


def _declarations(
    source: Checkpoint, manifest: Mapping[str, Any] | None, ties: PathLike | None, trust_remote_code: bool
) -> Iterator[TieMap]:
    """Who may declare the ties, in order; the next one is asked only where the one before did not prove DST."""
    if ties is None and manifest is not None:
        pairs = manifest["ties"]["map"]
        listed = tuple(Tie(alias, canonical, MANIFEST_NAME) for alias, canonical in pairs.items())
        chained = [tie for tie in listed if tie.canonical in pairs]
        yield TieMap(() if chained else listed, "manifest", MANIFEST_NAME)
        if not pairs and manifest["ties"]["source"] == "none":
            return
    try:
        asked = TieMap.of(source, ties, trust_remote_code)
    except SourceError:
        if ties is not None or manifest is None:
            raise  # with a manifest there is somebody else to ask: its ties were tried and stand
    else:
        yield asked
