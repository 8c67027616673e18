"""An opened source: its headers and ties, and the plan that follows from them and from what its bytes say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

from tierewrite.planning.needed_names import NeededNames
from tierewrite.planning.outcomes import Differing
from tierewrite.planning.plan import RewritePlan
from tierewrite.planning.planner import plan as make_plan
from tierewrite.planning.policy import Policy
from tierewrite.source.open import open_checkpoint
from tierewrite.source.side_files import excluding, other_weights
from tierewrite.source.table import Checkpoint
from tierewrite.stores.mirror import Place
from tierewrite.ties.on_disk import DiskTies, on_disk, without_wrappers
from tierewrite.ties.tie import TiesGiven
from tierewrite.ties.tie_map import TieMap
from tierewrite.values.confirm import differing_sides, refusal
from tierewrite.values.decide import CannotBe
from tierewrite.values.reencoded import reconcile

NOT_REPACKED = "names of it stay on every side for a consumer, and such sides are not re-encoded"
"""Why `--on-mismatch repack` refuses a tie whose names are needed."""


@dataclass(frozen=True)
class Evidence:
    """What the bytes have said about a plan that the headers did not.

    Attributes:
        reasons: group id -> why its bytes refute it.
        differing: group id -> alias -> why its side differs, for refuted groups with several aliases.
        separate_kv: targets of KV-scale merges that must not be carried out.
        repacked: group id -> modules whose NVFP4 blobs differ by scaling alone.
        unfillable: output keys of missing scales that nothing can be chosen for.
    """

    reasons: Mapping[str, str] = field(default_factory=dict)
    differing: Differing = field(default_factory=dict)
    separate_kv: frozenset[str] = frozenset()
    repacked: Mapping[str, frozenset[str]] = field(default_factory=dict)
    unfillable: frozenset[str] = frozenset()

    def without(self, values: CannotBe) -> Evidence:
        """This, and that the values of scales do not allow what `values` names."""
        return replace(
            self,
            separate_kv=self.separate_kv | values.separate_kv,
            unfillable=self.unfillable | values.unfillable,
        )

    def with_refuted(
        self, checkpoint: Checkpoint, plan: RewritePlan, digests: Mapping[str, bytes], found: Mapping[str, str]
    ) -> Evidence:
        """This, and that the bytes refute the groups in `found` (id -> reason), taken as the policy wants it.

        Raises:
            Refused: the policy is "error", or "repack" and a group differs by more than scaling.
        """
        if plan.policy.on_mismatch == "keep":
            differing = {
                group_id: {
                    **self.differing.get(group_id, {}),
                    **differing_sides(checkpoint, plan.by_id[group_id], digests),
                }
                for group_id in found
            }
            return replace(self, reasons={**self.reasons, **found}, differing={**self.differing, **differing})
        if plan.policy.on_mismatch == "error":
            raise refusal(checkpoint, plan, found, digests)
        repacked = dict(self.repacked)
        refused: dict[str, str] = {}
        for group_id, reason in found.items():
            group = plan.by_id[group_id]
            if group.kept_names:
                refused[group_id] = f"{reason}; {NOT_REPACKED}"
                continue
            modules, why = reconcile(checkpoint, group, digests)
            if why is None:
                repacked[group_id] = modules
            else:
                refused[group_id] = f"{reason}; {why}"
        if refused:
            raise refusal(checkpoint, plan, refused, digests)
        return replace(self, repacked=repacked)


@dataclass(frozen=True)
class Opened:
    """A source with its ties: everything that a plan is made of.

    Attributes:
        checkpoint, ties, disk: the headers, the declared ties, and those under the names on disk.
        needed: names that have to stay for a consumer (`consumers.needed` finds them).
    """

    checkpoint: Checkpoint
    ties: TieMap
    disk: DiskTies
    needed: NeededNames = field(default_factory=NeededNames)

    @classmethod
    def open(
        cls,
        src: Place,
        *,
        ties: TiesGiven | None = None,
        trust_remote_code: bool = False,
        ignore_unindexed: bool = False,
        revision: str | None = None,
        meanwhile: Callable[[Checkpoint], AbstractContextManager[None]] | None = None,
    ) -> Opened:
        """Reads the headers and asks who declares ties.

        Args:
            meanwhile: entered while a model class may have to be asked, which takes seconds.

        Raises:
            What `open_checkpoint` and `TieMap.resolve` raise.
        """
        checkpoint = open_checkpoint(
            src, revision=revision, ignore_unindexed=ignore_unindexed, trust_remote_code=trust_remote_code
        )
        with meanwhile(checkpoint) if meanwhile is not None and ties is None else nullcontext():
            tie_map = TieMap.of(checkpoint, ties, trust_remote_code)
        return cls(checkpoint, tie_map, on_disk(tie_map, checkpoint.tensors, checkpoint.tensors))

    def under(self, policy: Policy) -> Opened:
        """This as `policy` wants it read: without the side files that it excludes, and the names of wrappers."""
        checkpoint = excluding(self.checkpoint, policy.exclude) if policy.exclude else self.checkpoint
        if not policy.strip_prefix:
            return replace(self, checkpoint=checkpoint)
        checkpoint = without_wrappers(checkpoint, self.ties)
        return Opened(checkpoint, self.ties, on_disk(self.ties, checkpoint.tensors, checkpoint.tensors))

    def plan(self, policy: Policy, evidence: Evidence | None = None) -> RewritePlan:
        """The plan for this source, with the ties' provenance and what the bytes have said so far."""
        evidence = evidence or Evidence()
        return make_plan(
            self.checkpoint,
            self.disk,
            policy,
            ties_source=self.ties.source,
            ties_detail=self.ties.detail,
            unpaired=self.ties.unpaired,
            warnings=(
                *self.checkpoint.warnings,
                *other_weights(self.checkpoint),
                *self.ties.warnings,
                *self.disk.warnings,
            ),
            refuted=evidence.reasons,
            differing=evidence.differing,
            separate_kv=evidence.separate_kv,
            repacked=evidence.repacked,
            unfillable=evidence.unfillable,
            needed=self.needed,
        )
