"""All contents of a plan that are not plain copies, decided before a byte moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tierewrite.planning.plan import RewritePlan
from tierewrite.source.table import Checkpoint
from tierewrite.values.content import Content
from tierewrite.values.filled import Filled, fill_missing_scales
from tierewrite.values.merged import MergedScale, merge_scales
from tierewrite.values.reencoded import Reencoding, reencodings


@dataclass(frozen=True)
class Values:
    """What the values of scales and blobs become.

    Attributes:
        contents: output key -> where its bytes come from; a tensor that is not here is a copy.
        merged: output key -> how a merged scale came about, with the id of its group.
        filled: scales that were missing or never calibrated.
        reencoded: NVFP4 weights that are re-encoded.
        warnings: for the report.
    """

    contents: Mapping[str, Content]
    merged: Mapping[str, tuple[str, MergedScale]]
    filled: tuple[Filled, ...]
    reencoded: tuple[Reencoding, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class CannotBe:
    """What of a plan the values do not allow: the next plan has to leave it out.

    Attributes:
        separate_kv: output keys of KV scales that must not be merged.
        unfillable: output keys of missing scales that nothing can be chosen for.
    """

    separate_kv: frozenset[str] = frozenset()
    unfillable: frozenset[str] = frozenset()


def decide(checkpoint: Checkpoint, plan: RewritePlan) -> Values | CannotBe:
    """Reads the plan's scales, and decides what is written in their place.

    Raises:
        Refused: a merged scale cannot be represented in its stored dtype.
        SourceChanged, SystemFailure: reading failed.
    """
    scales = merge_scales(checkpoint, plan)
    if scales.separate_kv:
        return CannotBe(separate_kv=scales.separate_kv)
    filled = fill_missing_scales(checkpoint, plan, scales.contents)
    if filled.unfillable:
        return CannotBe(unfillable=filled.unfillable)
    encodings = reencodings(checkpoint, plan)
    return Values(
        {**scales.contents, **filled.contents, **encodings.contents},
        scales.merged,
        filled.filled,
        encodings.work,
        (*scales.warnings, *filled.warnings, *encodings.warnings),
    )
