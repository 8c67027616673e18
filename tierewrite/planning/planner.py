"""What to do: a pure function of what is on disk, what the model declares and what the caller wants.

`plan()` reads no tensor bytes. It answers: if every tie is confirmed, what becomes of each tensor of the source, and
in which output shard does each survivor stand? Groups that the headers alone refute are listed as unconfirmed and their
tensors kept. The result is data: printed by `tierewrite plan`, executed as it stands by the pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from tierewrite import formats
from tierewrite.formats.fused import FusedSets
from tierewrite.formats.nvfp4_blobs import fused_sets
from tierewrite.planning.checks import Checks, ScaleMerge, ScaleMerges
from tierewrite.planning.experts import expert_scales
from tierewrite.planning.fates import Fates
from tierewrite.planning.kv_scales import Attentions, KvScales
from tierewrite.planning.layout import shards
from tierewrite.planning.needed_names import NeededNames
from tierewrite.planning.outcomes import Differing, Outcome, outcomes
from tierewrite.planning.plan import (
    ExpertScales,
    GroupPlan,
    RewritePlan,
    Survivors,
    kind_of,
)
from tierewrite.planning.policy import Policy
from tierewrite.source.table import Checkpoint, Tensors
from tierewrite.spelling import said_once
from tierewrite.ties.on_disk import DiskTies


def plan(
    checkpoint: Checkpoint,
    ties: DiskTies,
    policy: Policy | None = None,
    *,
    ties_source: str = "none",
    ties_detail: str = "",
    unpaired: tuple[str, ...] = (),
    warnings: Iterable[str] = (),
    refuted: Mapping[str, str] | None = None,
    differing: Differing | None = None,
    separate_kv: Iterable[str] = (),
    repacked: Mapping[str, frozenset[str]] | None = None,
    unfillable: frozenset[str] = frozenset(),
    needed: NeededNames | None = None,
) -> RewritePlan:
    """What will be done with `checkpoint` if every tie that the headers allow is confirmed.

    Args:
        checkpoint: the source, headers only.
        ties: the declared ties under the names that are on disk.
        policy: the options; defaults to `Policy()`.
        ties_source, ties_detail, unpaired: who declared the ties, for the record.
        warnings: what reading the checkpoint and asking for its ties had to say.
        refuted: group id -> reason, for groups that their bytes have already refuted: they are kept whole.
        differing: which sides of them do, where the others agree: with `on_mismatch="keep"` only these are kept.
        separate_kv: targets of KV-scale merges that are not to be carried out (their biases differ).
        repacked: group id -> modules whose NVFP4 blobs are known to differ by scaling alone.
        unfillable: output keys of scales that are missing and stay so.
        needed: names that a consumer has to find: none of them is dropped.

    Returns:
        A plan in which each tensor of the source occurs once.
    """
    policy = policy or Policy()
    tensors = checkpoint.tensors
    families = formats.detect(checkpoint.config, checkpoint.quant_config, tensors.leaves)
    needed = needed or NeededNames()
    fates = Fates(tensors, [tie.id for tie in ties.groups], needed.names)
    made = outcomes(
        checkpoint, ties, families, fates, refuted or {}, differing or {}, split=policy.on_mismatch == "keep"
    )
    kv = KvScales(tensors, families, fates, {tie.id: n for n, tie in enumerate(ties.groups)}, frozenset(separate_kv))
    if policy.kv_scales == "merge":
        kv.plan(_attentions(made).paired())
    groups = [
        _group(tensors, outcome, (repacked or {}).get(outcome.tie.id, frozenset()), kv.merges.get(outcome.tie.id, ()))
        for outcome in made
    ]
    for group in groups:
        fates.repack(group.differing.rows[:, 0])
    survivors = Survivors(tensors, fates.action, fates.new_names)
    if policy.unify_fused_scales:
        # Headers do not tell whether the fused scales differ already: these may be re-encoded.
        fates.repack([survivors.row[key] for key in _fused(survivors, FusedSets.of(checkpoint.config))])
    experts: tuple[ExpertScales, ...] = ()
    if policy.fill_missing_scales:
        pairs = zip(survivors.names, map(tensors.names.__getitem__, survivors.rows.tolist()), strict=True)
        experts = expert_scales(pairs, families, unfillable)
    return RewritePlan(
        source=tensors,
        action=fates.action,
        stands_for=fates.stands_for,
        merged=fates.merged,
        group=fates.group,
        new_names=fates.new_names,
        groups=_counted(groups, fates, tensors),
        shards=shards(
            tensors,
            survivors.rows,
            survivors.names,
            fates.merged,
            _added(experts, tensors),
            policy.max_shard_size,
        ),
        policy=policy,
        warnings=said_once(warnings, kv.warnings, _said(needed, fates)),
        ties_source=ties_source,
        ties_detail=ties_detail,
        unpaired=unpaired,
        source_bytes=tensors.total_bytes,
        source_shards=len(checkpoint.shards),
        families=families,
        expert_scales=experts,
    )


def _attentions(outcomes: Iterable[Outcome]) -> Attentions:
    """The attention modules around the projections of all groups."""
    attentions = Attentions()
    for outcome in outcomes:
        if outcome.draft is None:
            attentions.block(outcome.tie)
        else:
            attentions.add(outcome.planned, outcome.draft.slots.tolist())
    return attentions


def _group(tensors: Tensors, outcome: Outcome, repacked: frozenset[str], kv: Iterable[ScaleMerge]) -> GroupPlan:
    """The plan of a group, without what is dropped for it.

    Args:
        repacked: modules of NVFP4 blobs that differ by scaling alone.
        kv: the merges of KV-cache scales that are listed under it.
    """
    tie, draft = outcome.tie, outcome.draft
    nothing = np.empty((0, len(tie.slots[0])), np.int64)
    checks = Checks(tensors, nothing, nothing) if draft is None else draft.checks
    merges = ScaleMerges(tensors, nothing, nothing[:, 0], (), {}) if draft is None else draft.merges
    merges = ScaleMerges(tensors, merges.rows, merges.companion, merges.companions, merges.targets, tuple(kv))
    if draft is None:
        repacked = frozenset()
    differs = np.zeros(len(checks), bool)
    if repacked:
        differs[:] = [keys[0].rpartition(".")[0] in repacked for keys in checks]
    planned = draft is not None and (draft.touched or len(merges.kv) > 0)
    return GroupPlan(
        tie.id,
        tie.canonical,
        tie.aliases,
        tie.origins,
        status="unconfirmed" if draft is None else "planned" if planned else "canonical",
        reason=outcome.reason,
        differing_aliases=outcome.differing_aliases,
        absent=outcome.absent,
        checks=checks.where(~differs),
        merges=merges,
        repacked=repacked,
        differing=checks.where(differs),
        kind=kind_of(tie.canonical),
        dropped=0,
        dropped_bytes=0,
    )


def _counted(groups: Iterable[GroupPlan], fates: Fates, tensors: Tensors) -> tuple[GroupPlan, ...]:
    """The groups with what is dropped for each, and the names that stay because they are needed."""
    kept: dict[int, list[str]] = {}
    for row in np.flatnonzero(fates.kept_name).tolist():
        kept.setdefault(int(fates.group[row]), []).append(tensors.names[row])
    return tuple(
        replace(group, dropped=count, dropped_bytes=nbytes, kept_names=tuple(sorted(kept.get(number, ()))))
        for number, (group, count, nbytes) in enumerate(zip(groups, *fates.dropped(), strict=True))
    )


def _said(needed: NeededNames, fates: Fates) -> list[str]:
    """What a person should know of the names that stay because they are needed."""
    count = int(fates.kept_name.sum())
    if not count:
        return [] if needed.of_dropped and not fates.drops_companions() else list(needed.notes)
    what = "1 tensor of a tied module stays" if count == 1 else f"{count:,} tensors of tied modules stay"
    said = f"{what} on every side, with one value: {needed.consumer} needs the names"
    return [said, *needed.notes]


def _fused(survivors: Survivors, sets: FusedSets) -> Iterator[str]:
    """Keys of the output's NVFP4 weights that a consumer fuses with others."""
    for modules in fused_sets(survivors, sets):
        for module, parts in modules.items():
            yield from (f"{module}.{part}" for part in parts)


def _added(experts: Iterable[ExpertScales], tensors: Tensors) -> list[tuple[str, int]]:
    """The scales that the source does not have, with the row of another expert's, whose header they get."""
    return [(name, tensors.row[next(iter(scales.members.values()))]) for scales in experts for name in scales.missing]
