"""A plan that the bytes of its source confirm, with its contents, where nothing is written."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tierewrite.output.engine import Hasher
from tierewrite.output.metadata import header_metadata
from tierewrite.output.safetensors import shard_header
from tierewrite.output.target import side_file_clashes
from tierewrite.planning.plan import RewritePlan, needed_for_confirmation
from tierewrite.planning.policy import Policy
from tierewrite.rewriting.steps import refuse_unconfirmed
from tierewrite.values.confirm import refuted
from tierewrite.values.decide import CannotBe, Values, decide
from tierewrite.values.merged import separate_kv_warnings
from tierewrite.values.opened import Evidence, Opened


@dataclass(frozen=True)
class Confirmed:
    """What a rewrite would write.

    Attributes:
        warnings: what the values of scales and blobs are worth saying to a person.
    """

    plan: RewritePlan
    values: Values
    warnings: tuple[str, ...]


def confirmed(opened: Opened, policy: Policy, hasher: Hasher) -> Confirmed:
    """Plans until the bytes say nothing new; each plan knows more, so that there is an end.

    Reads the bytes that ties are confirmed by, and scales.

    Raises:
        Refused: a tie is not confirmed, and the policy does not let it be kept; or a merged scale cannot be
            represented.
        UsageError: a header would be longer than the format allows, or a side file has a shard's name.
        SourceError, SourceChanged, SystemFailure: reading failed.
    """
    checkpoint = opened.checkpoint
    evidence = Evidence()
    digests: dict[str, bytes] = {}
    while True:
        plan = opened.plan(policy, evidence)
        refuse_unconfirmed(opened, plan, hasher)
        side_file_clashes(checkpoint, plan.shards)
        values = decide(checkpoint, plan)
        if isinstance(values, CannotBe):
            evidence = evidence.without(values)
            continue
        metadata, metadata_warnings = header_metadata(checkpoint, plan)
        for shard in plan.shards:
            shard_header(shard, metadata)
        digests.update(hasher.hash(checkpoint, needed_for_confirmation(plan.groups) - digests.keys(), "hashing"))
        found = refuted(checkpoint, plan, digests)
        if found:
            evidence = evidence.with_refuted(checkpoint, plan, digests, found)
            continue
        return Confirmed(
            replace(plan, confirmed=True),
            values,
            (*plan.warnings, *metadata_warnings, *values.warnings, *separate_kv_warnings(evidence.separate_kv)),
        )
