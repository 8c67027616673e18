"""The proof: DST is what rewriting SRC with these options makes, shown from SRC alone.

Every expected value comes from SRC and from what the caller gives (options, --ties), never from DST or its manifest:
which tensors stand for which is judged from digests of all bytes of SRC; a merged scale, a filled one, a re-encoded
NVFP4 weight and the one scale of fused linears are computed from SRC's tensors; --ties, config.json or the model class
is asked for the ties again. Every tensor of SRC is accounted for, every tensor of DST has its origin, shards and index
agree, other files are equal byte for byte, and every statement of the manifest, if there is one, is true. A tensor that
is missing from DST without a declared tie is a problem even where an equal one is there.

Where nobody can be asked for the ties (a class that the installed transformers lacks) DST's manifest speaks: then the
bytes are proved under its ties, and not the ties, and a note says so.

Shared with the code that rewrites, and why:
    the header reader   it refuses more than safetensors' own, which reads DST once more at the end
    declared ties       who declares them, and how a parameter is called on disk, is what transformers says
    names that stay     which names a consumer's loader would miss, is what its record says
    fused linears       which linears a class loads into one parameter is what consumers' loaders do
    table of suffixes   formats/ is the one place that knows them; tests hold it against exporters' own output
    NVFP4 codec         tested bit by bit against ModelOpt's; what is encoded to which scale is worked out here
    plan to manifest    `exact` alone, for the files around the tensors; what a tensor holds is judged without it

Ids of problems:
    unreadable       DST, or a file of it, cannot be opened as what it should be
    unfinished       the marker of a rewrite that did not come to its end is in DST
    refused          the bytes of SRC do not confirm a tie, so that a rewrite with these options makes nothing
    missing          a tensor of SRC has no place in DST
    undeclared-drop  the same, though its bytes are there under another name: no declared tie says they are one
    unconfirmed-drop a tie was carried out that the bytes of SRC do not confirm
    tie-left         a tie that the bytes of SRC confirm was not carried out, or only in part
    orphan           a tensor that belonged to a packed weight is there under its own name, and the weight is gone
    unexpected       a tensor of DST that nothing in SRC accounts for
    prefix           with strip_prefix, a name that is not SRC's without names of wrappers
    header           another dtype or shape than the tensor it stands for
    bytes            other bytes than the tensor it stands for
    merge            not the value that covers every side
    fill             not the widest scale of the layer's other experts
    not-unified      not encoded to the one scale of the linears that consumers fuse
    index, total-size, metadata, shard-name, shard-size, layout
                     the index, its total_size, the metadata that is carried over, names, sizes and order of shards
    side-file        a file that is missing, not expected, not regular, or different; or a folder
    manifest         a statement of tierewrite.json that is not true, or that is not what the caller asked to be proved
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tierewrite.consumers.needed import with_needed_names
from tierewrite.engines.progress import ProgressLike, progress_of
from tierewrite.errors import SourceError, SystemFailure
from tierewrite.planning.policy import ConsumerName, Policy, PolicyOptions
from tierewrite.proof import Problem, problem_lines, verdict
from tierewrite.proof.compare import Proof, check_statements
from tierewrite.proof.exact import check_files, check_manifest, exact_files, unchecked_commit
from tierewrite.proof.files import (
    check_claims,
    check_finished,
    check_index_file,
    check_layout,
    check_side_files,
    check_with_safetensors,
    corrected_for,
    manifest_or_problem,
)
from tierewrite.proof.flags import check_flags
from tierewrite.proof.reading import hash_files, hash_tensors, is_scale
from tierewrite.proof.stripped import check_stripped
from tierewrite.source.open import fetched, name_in_messages, open_checkpoint
from tierewrite.source.table import MANIFEST_NAME, Checkpoint
from tierewrite.spelling import said_once, spelled
from tierewrite.stores.mirror import Place
from tierewrite.tables import Summary, text
from tierewrite.ties import class_memory
from tierewrite.ties.on_disk import on_disk
from tierewrite.ties.tie import Tie, TiesGiven
from tierewrite.ties.tie_map import TieMap
from tierewrite.values.opened import Opened

if TYPE_CHECKING:
    from rich.console import RenderableType
    from typing_extensions import Unpack

__all__ = ["VERIFICATION_SCHEMA", "Problem", "Verification", "verify"]

VERIFICATION_SCHEMA = "tierewrite/verification/1"


@dataclass(frozen=True, repr=False)
class Verification(Summary):
    """The outcome of comparing DST with SRC.

    Attributes:
        ok: nothing is wrong.
        problems: what is.
        kept, renamed, dropped, merged, repacked: how many tensors of SRC met which fate (where DST is right; a merged
            scale that also has a new name counts as merged).
        ties_source, ties_detail: who declared the ties: "class", "config", "ties-file", "mapping" or "none"; "manifest"
            where only DST's own could be asked, which proves the bytes and not the ties.
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

    def one_line(self) -> str:
        """See `Summary`."""
        return f"{verdict(self.problems)}; {', '.join(f'{number:,} {fate}' for fate, number in self.counts().items())}"

    def lines(self) -> Iterator[RenderableType]:
        """See `Summary`."""
        yield text(", ".join(f"{number:,} {fate}" for fate, number in self.counts().items()))
        yield from problem_lines(self.problems, self.notes)
        if self.ok:
            under = f" under the ties that DST's {MANIFEST_NAME} declares" if self.ties_source == "manifest" else ""
            yield text(f"OK: DST is exactly what rewriting SRC gives{under}.", "green")

    def counts(self) -> dict[str, int]:
        """Fate -> how many tensors of SRC met it."""
        fates = ("kept", "renamed", "dropped", "merged", "repacked")
        return {fate: getattr(self, fate) for fate in fates}

    def to_json(self) -> dict[str, Any]:
        """The object that `tierewrite verify --json` prints (schema tierewrite/verification/1)."""
        return {
            "schema": VERIFICATION_SCHEMA,
            "ok": self.ok,
            "ties": {"source": self.ties_source, "detail": self.ties_detail},
            "counts": self.counts(),
            "problems": [problem.to_json() for problem in self.problems],
            "notes": list(self.notes),
        }


@class_memory.not_believed()
def verify(
    src: Place,
    dst: Place,
    *,
    ties: TiesGiven | None = None,
    trust_remote_code: bool = False,
    ignore_unindexed: bool = False,
    revision: str | None = None,
    progress: ProgressLike = None,
    consumer: ConsumerName | None = None,
    **options: Unpack[PolicyOptions],
) -> Verification:
    """Proves that the checkpoint in `dst` is what rewriting the one in `src` with these options makes.

    Reads every byte of both once, in pieces of 8 MiB; nothing is written.

    Args:
        src, dst: the folders, or their URLs. `src` may be a hub id `org/name`: its
            snapshot is taken from the cache, or fetched.
        ties: JSON file {alias: canonical}, or such a mapping, instead of asking the model class; as the rewrite was
            given it.
        trust_remote_code: run the model code that `src` brings, if its class has to be asked.
        ignore_unindexed: leave out tensors that the index of `src` lacks, as the rewrite was told to.
        revision: branch, tag or commit of a hub id; None: its main branch.
        progress: a `Progress`, or a bar such as tqdm's or rich's: told of bytes as they are read, from any thread.
        consumer: as the rewrite was given it; it makes the choices that `options` does not.
        options: those of the rewrite that decide content, as `rewrite` takes them. A manifest that states others is
            a problem: what it says of itself proves nothing.

    Returns:
        What was found. A `dst` that cannot be read is a problem, not an exception.

    Raises:
        SourceError: something is wrong in `src`, or its class cannot be asked. UsageError: the ties file is broken.
        SystemFailure: `src` cannot be read. SourceChanged: it changed meanwhile.
    """
    policy, watched, dst_name = Policy.of(consumer, **options), progress_of(progress), name_in_messages(dst)
    if isinstance(src, (str, os.PathLike)):
        src = fetched(src, revision=revision)
    source = open_checkpoint(src, ignore_unindexed=ignore_unindexed, trust_remote_code=trust_remote_code)
    try:
        target = open_checkpoint(dst, plain=True)
    except (SourceError, SystemFailure) as e:
        return Verification(False, (Problem("unreadable", str(e.file or dst_name), str(e)),))
    problems: list[Problem] = []
    manifest = manifest_or_problem(target.root / MANIFEST_NAME, problems)
    watched.start("proving", sum(map(_nbytes, (source, target))))
    advance = watched.advance
    tie_map, note = _declared(source, manifest, ties, trust_remote_code)
    opened = Opened(source, tie_map, on_disk(tie_map, source.tensors, source.tensors)).under(policy)
    if policy.strip_prefix:
        problems += check_stripped(source.tensors, opened.checkpoint.tensors)
    source, disk = opened.checkpoint, opened.disk
    before = hash_tensors(source, set(filter(is_scale, source.tensors)), advance)
    try:
        after = hash_tensors(target, set(), advance)
    except (SourceError, SystemFailure) as e:
        return Verification(False, (*problems, Problem("unreadable", str(e.file or dst_name), str(e))))

    opened = with_needed_names(opened, policy)
    proof = Proof(source, target, before, after, policy, opened.needed.names)
    proof.run(disk)
    if manifest is not None:  # first of all: other options than those of the rewrite explain what follows
        problems += check_claims(manifest, policy, tie_map, disk)
    problems += proof.problems
    if manifest is not None:
        problems += check_statements(proof, manifest)
    if policy.fix_config:
        problems += check_flags(source, target, proof.groups, tie_map)
    exact = None
    if policy.fix_ignore or policy.fix_config or (manifest is not None and not problems):
        exact = exact_files(replace(opened, ties=_as_told(tie_map, manifest)), policy, before.digests)
    told = None if problems else manifest  # where something differs, it was said already
    if exact is not None and told is not None:
        problems += check_files(exact, target)
    problems += check_index_file(target)
    if isinstance(dst, (str, os.PathLike)):  # a rewrite proves its output before it takes its marker away
        problems += check_finished(target)
    problems += check_layout(source, target, proof.expected, manifest, policy)
    configs = exact.configs if exact is not None else {}
    if consumer is not None and policy.fix_ignore:
        configs = corrected_for(consumer, source, dst, configs, ties, trust_remote_code)
    sides = hash_files(source.side_files, advance)
    problems += check_side_files(source, target, configs, sides, advance)
    if exact is not None and told is not None:
        problems += check_manifest(exact.manifest(source, sides, configs, told), target)
        note += unchecked_commit(source, told)
    not_asked = check_with_safetensors(target, problems)
    return Verification(
        ok=not problems,
        problems=tuple(replace(problem, message=spelled(problem.message)) for problem in problems),
        ties_source=tie_map.source,
        ties_detail=tie_map.detail,
        notes=said_once(note, not_asked, source.warnings, tie_map.warnings, disk.warnings, proof.notes),
        **proof.counts,
    )


def _nbytes(checkpoint: Checkpoint) -> int:
    """Bytes of its tensors and of its other files."""
    return checkpoint.total_bytes + sum(side.size for side in checkpoint.side_files)


def _as_told(ties: TieMap, manifest: Mapping[str, Any] | None) -> TieMap:
    """The ties as a manifest tells of them: where only the manifest could be asked, it says who declared them."""
    if ties.source != "manifest" or manifest is None:
        return ties
    return replace(ties, source=manifest["ties"]["source"], detail=manifest["ties"]["detail"])


def _declared(
    source: Checkpoint, manifest: Mapping[str, Any] | None, ties: TiesGiven | None, trust_remote_code: bool
) -> tuple[TieMap, tuple[str, ...]]:
    """The ties of SRC, and a note where only DST's manifest could be asked for them.

    Raises:
        SourceError, UsageError: nobody declares them, and there is no manifest either.
    """
    try:
        return TieMap.of(source, ties, trust_remote_code), ()
    except SourceError as error:
        if ties is not None or manifest is None:
            raise
        declared = manifest["ties"]["map"]
        pairs = tuple(Tie(alias, canonical, MANIFEST_NAME) for alias, canonical in declared.items())
        chained = any(tie.canonical in declared for tie in pairs)
        note = (
            f"the ties themselves are not proved, only the bytes under the ties that DST's {MANIFEST_NAME} declares: "
            f"nobody could be asked for them ({error})"
        )
        return TieMap(() if chained else pairs, "manifest", MANIFEST_NAME), (note,)
