"""The steps of a rewrite once its source is open: attempts at the shards, the other files, the checks.

Writing is optimistic: bytes are hashed and written in the same read, as if every tie were confirmed. Only when the
digests say otherwise is there another attempt (`--on-mismatch keep`), or the staged output is removed (`error`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tierewrite
from tierewrite.engines import Engine
from tierewrite.engines.progress import Progress
from tierewrite.errors import NotReady, UsageError, VerificationFailed, shown
from tierewrite.output.configs import configs_of
from tierewrite.output.engine import Hasher
from tierewrite.output.manifest import (
    ManifestFile,
    build_manifest,
    output_of,
    source_of,
    tensor_digests,
    written_tensors,
)
from tierewrite.output.metadata import header_metadata, index_metadata
from tierewrite.output.safetensors import index_bytes
from tierewrite.output.shards import Output
from tierewrite.output.side_files import copy_side_files
from tierewrite.output.staging import Staged
from tierewrite.output.target import side_file_clashes
from tierewrite.planning.plan import RewritePlan, needed_for_confirmation
from tierewrite.planning.policy import ConsumerName, Policy
from tierewrite.report import Report, build_report
from tierewrite.rewriting.options import SourceOptions
from tierewrite.source.table import INDEX_NAME, MANIFEST_NAME
from tierewrite.stores.base import CopyMode, PathLike
from tierewrite.stores.mirror import RemoteFolder
from tierewrite.stores.places import FilePath
from tierewrite.tables import count
from tierewrite.ties.quantizers import quant_method
from tierewrite.ties.tie import TiesGiven
from tierewrite.values.confirm import refusal, refuted
from tierewrite.values.decide import CannotBe, Values, decide
from tierewrite.values.merged import separate_kv_warnings
from tierewrite.values.opened import Evidence, Opened

if TYPE_CHECKING:
    from tierewrite.consumers import ReadinessReport
    from tierewrite.consumers.dry_load import LoaderMode


@dataclass(frozen=True)
class Pass:
    """What all attempts at one output share.

    Attributes:
        outputs: closes what an attempt leaves open.
        resume: use what a killed run finished.
        every_digest: hash every tensor, for the manifest.
        copy: as for `rewrite`.
        digests: source key -> BLAKE3 of its bytes; each attempt adds to it.
    """

    opened: Opened
    policy: Policy
    workers: Engine
    staging: Staged
    outputs: ExitStack
    resume: bool
    every_digest: bool = False
    copy: CopyMode = "auto"
    digests: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """The shards of an output whose ties the bytes confirm."""

    plan: RewritePlan
    output: Output
    evidence: Evidence
    values: Values

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the values of scales and blobs are worth saying to a person."""
        return (*self.values.warnings, *separate_kv_warnings(self.evidence.separate_kv))


def with_needed(opened: Opened, policy: Policy, consumer: str | None = None) -> Opened:
    """`opened`, with the names that have to stay for a consumer (`policy.keep_names_for`).

    Args:
        consumer: for whom the output is.
    """
    of_nobody = policy.keep_names_for is None
    if of_nobody and (consumer is not None or quant_method(opened.checkpoint.config) is None):
        return opened  # the consumers, which take a tenth of a second to import, have nothing to say
    from tierewrite.consumers.needed import with_needed_names

    return with_needed_names(opened, policy, consumer)


def refuse_unconfirmed(opened: Opened, plan: RewritePlan, workers: Hasher) -> None:
    """Refuses before anything is written where the headers already refute a tie that must be confirmed.

    Raises:
        Refused: with the complete list: the other groups' bytes are compared for it.
    """
    if plan.policy.on_mismatch != "keep" and plan.unconfirmed():
        digests = workers.hash(opened.checkpoint, needed_for_confirmation(plan.groups), "hashing")
        raise refusal(opened.checkpoint, plan, refuted(opened.checkpoint, plan, digests), digests)


def attempt(run: Pass, plan: RewritePlan, evidence: Evidence) -> Written | Evidence:
    """Writes the shards of `plan`; or returns what its bytes say that the next plan has to know, and leaves nothing.

    Raises:
        Refused: the bytes do not confirm a tie, and the policy does not let it be kept.
        SourceError, SourceChanged, SystemFailure: reading or writing failed.
    """
    checkpoint = run.opened.checkpoint
    side_file_clashes(checkpoint, plan.shards)
    values = decide(checkpoint, plan)
    if isinstance(values, CannotBe):
        return evidence.without(values)
    metadata, _ = header_metadata(checkpoint, plan)
    output = Output(checkpoint, plan, values.contents, run.staging, metadata, run.every_digest, run.copy)
    run.outputs.enter_context(output)
    if run.resume:
        output.keep_finished(run.workers, run.digests)
    output.write(run.workers, run.digests)
    found = refuted(checkpoint, plan, run.digests)
    if found:
        evidence = evidence.with_refuted(checkpoint, plan, run.digests, found)
        output.remove()
        return evidence
    output.share(run.workers.progress)
    return Written(plan, output, evidence, values)


def write_shards(run: Pass, plan: RewritePlan) -> Written:
    """Attempts until the bytes say nothing new; each attempt knows more, so that there is an end.

    Raises:
        As `attempt`.
    """
    step = attempt(run, plan, Evidence())
    while isinstance(step, Evidence):
        step = attempt(run, run.opened.plan(run.policy, step), step)
    return step


def finish(
    run: Pass,
    written: Written,
    src: str,
    dst: object,
    *,
    consumer: ConsumerName | None,
    ties: TiesGiven | None,
    trust_remote_code: bool,
    manifest: bool,
) -> Report:
    """Writes all that is not a shard: index, other files, configurations and manifest.

    Args:
        src, dst: for the report.
        consumer: whose ignore lists may be corrected, if `fix_ignore` is chosen.
        ties, trust_remote_code: as for `rewrite`.

    Raises:
        SourceError, SourceChanged, SystemFailure: reading or writing failed.
    """
    opened, staging, progress = run.opened, run.staging, run.workers.progress
    checkpoint, plan, output = opened.checkpoint, written.plan, written.output
    # All that takes long to work out comes first: the disk is still at work.
    index = index_bytes(plan.shards, index_metadata(checkpoint, plan))
    configs, config_warnings = configs_of(checkpoint, plan, opened.disk, opened.ties)
    listed = written_tensors(plan, output.made, written.values.merged, run.digests) if manifest else {}
    output.durable(progress)
    staging.put(INDEX_NAME, index)
    sides = {side.name: side.size for side in checkpoint.side_files}
    staging.expect({**sides, **{shard.name: shard.nbytes for shard in output.sizes()}})
    progress.start("copying other files", sum(side.size for side in checkpoint.side_files))
    files = copy_side_files(checkpoint, staging, progress.advance, configs)
    files[INDEX_NAME] = ManifestFile.of(index)
    changed = set(configs)
    if consumer is not None and run.policy.fix_ignore:
        from tierewrite.consumers import corrected_configs

        corrected, sentences = corrected_configs(
            consumer, staging.view(), ties=ties, trust_remote_code=trust_remote_code
        )
        for name, data in corrected.items():
            staging.put(name, data)
            files[name] = ManifestFile.of(data)
            changed.add(name)
        config_warnings = (*config_warnings, *sentences)
    _, metadata_warnings = header_metadata(checkpoint, plan)
    report = build_report(
        checkpoint,
        opened.ties,
        plan,
        written.values.merged,
        output.sizes(),
        src,
        dst,
        run.workers.device,
        reencoded=[reencoding.done(output.made) for reencoding in written.values.reencoded],
        filled=written.values.filled,
        warnings=(*metadata_warnings, *written.warnings, *config_warnings),
    )
    if manifest:
        every = tensor_digests(plan, output.made, run.digests) if run.every_digest else None
        described = output_of(plan, output.headers, files, every)
        text = build_manifest(report, opened.disk, listed, tierewrite.__version__, source_of(checkpoint), described)
        staging.put(MANIFEST_NAME, text)
    return replace(report, means=output.means(), configs=tuple(sorted(changed)))


def prove(
    src: FilePath,
    staging: Staged,
    policy: Policy,
    consumer: ConsumerName | None,
    progress: Progress,
    reading: SourceOptions,
    unchanged: Callable[[], None] | None,
) -> None:
    """Proves the staged output from the source.

    Args:
        unchanged: raises SourceChanged where the source, which the proof reads again, is not what it was.

    Raises:
        VerificationFailed: it is not what the source makes. SourceChanged.
    """
    from tierewrite.proof.verify import verify  # not imported by rewrites that prove nothing: a tenth of a second

    result = verify(src, staging.view(), progress=progress, consumer=consumer, **reading, **policy.to_json())
    if not result.ok:
        if unchanged is not None:
            unchanged()
        first = result.problems[0]
        raise VerificationFailed(
            f"the output is not what rewriting SRC gives ({count(len(result.problems), 'problem')}, the first at "
            f"'{shown(first.where)}': "
            f"{first.message}); nothing was left behind. This is a bug or a failing disk: please report it",
            details={"verification": result.to_json()},
        )


def refuse_unusable_loader(
    consumer: str | None, force: bool, loader: LoaderMode, consumer_python: PathLike | None
) -> None:
    """Before any work is done: raises UsageError where `check_for` could not ask the consumer's own loader this way.

    Without a consumer nothing is checked, so that one who wants it checked, or forced, has forgotten to name one.
    """
    if consumer is None:
        for given, flag in ((force, "force"), (loader != "auto", "loader"), (consumer_python, "consumer-python")):
            if given:
                raise UsageError(f"--{flag} goes with --for; leave it out, or add that")
        return
    from tierewrite.consumers import LoaderOptions, refuse_no_interpreter

    refuse_no_interpreter(consumer, LoaderOptions(loader, consumer_python))


def check_for(
    consumer: ConsumerName,
    output: Path | RemoteFolder,
    dst: object,
    *,
    ties: TiesGiven | None,
    trust_remote_code: bool,
    force: bool,
    loader: LoaderMode = "auto",
    consumer_python: PathLike | None = None,
) -> ReadinessReport:
    """What the consumer will do with an output that has not appeared, and is to be `dst`.

    Args:
        ties, trust_remote_code, loader, consumer_python: as for `check`.

    Raises:
        NotReady: errors that a rewrite could have avoided, or that make the output useless, unless `force`.
    """
    from tierewrite.consumers import check

    found = check(
        output,
        consumer,
        ties=ties,
        trust_remote_code=trust_remote_code,
        loader=loader,
        consumer_python=consumer_python,
        name=dst,
    )
    if found.errors and not (found.only_per_side_conflicts() or force):
        lines = "\n".join(f"  {finding}" for finding in found.errors[:12])
        raise NotReady(
            f"{count(len(found.errors), 'error')} would be left for {consumer}, nothing was written:\n{lines}\n"
            "Fix the export, or write it all the same with --force.",
            details={"readiness": found.to_json()},
        )
    return found
