"""`tierewrite.json`: what was done, in terms that can be checked against the files.

It holds nothing that two runs on the same input and options could differ in: no device, threads, paths, times or host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite

from tierewrite.json_text import JsonText, dumps, encode, quoted
from tierewrite.planning.plan import Action, RewritePlan, TensorPlan
from tierewrite.report import GroupReport, Report
from tierewrite.source.table import gc_paused
from tierewrite.ties.on_disk import DiskTies
from tierewrite.values.content import Made
from tierewrite.values.merged import MergedScale

MANIFEST_SCHEMA = "tierewrite/manifest/1"


@gc_paused()
def written_tensors(
    plan: RewritePlan,
    made: Mapping[str, Made],
    merged: Mapping[str, tuple[str, MergedScale]],
    known: Mapping[str, bytes],
) -> dict[str, list[str]]:
    """Per group, as JSON text, the output tensors that stand for several source tensors or have a new name.

    Args:
        made: output key -> what was written, where that is no copy.
        merged: target -> (group id, how the value came about).
        known: source key -> digest.
    """
    keep, drop, repack = Action.KEEP, Action.DROP, Action.REPACK  # looked up once: there are as many as tensors
    dropped: dict[str, str] = {}  # target -> the first name that was dropped for it
    further: dict[str, list[str]] = {}  # target -> the others, where there are more than two sides
    stay: list[TensorPlan] = []
    for fate in plan.tensors.values():
        name, action, target, _, group = fate
        if action is drop:
            if dropped.setdefault(target, name) is not name:
                further.setdefault(target, []).append(name)
        elif group is not None:
            stay.append(fate)
    result: dict[str, list[str]] = {group.id: [] for group in plan.groups}
    for name, action, target, _, group in stay:
        assert group is not None
        if action is repack and target not in made:
            action = keep if name == target else Action.RENAME  # it had the right scale already
        twin = dropped.get(target)
        if action is keep and twin is None:
            continue
        digest = made[target].digest if target in made else known[name]
        how = "false"
        more = ""
        value = merged.get(target)
        if value is not None:
            _, _, ratio, calibrated, _, _ = value[1]
            how = "true"
            shown = repr(ratio) if ratio is not None and isfinite(ratio) else encode(ratio)
            more = f', "ratio": {shown}, "calibrated": {"true" if calibrated else "false"}'
        did = '"keep"' if action is keep else quoted(action)
        key = quoted(target)
        origin = key if name == target else quoted(name)  # the carrying one first
        if twin is not None:
            origin = f"{origin}, {quoted(twin)}"
            if target in further:
                origin = ", ".join((origin, *map(quoted, further[target])))
        result[group].append(
            f'{key}: {{"from": [{origin}], "action": {did}, "merged": {how}, '
            f'"blake3": "{digest.hex()}"{more}}}'
        )
    return result


def ties_on_disk(disk: DiskTies) -> dict[str, str]:
    """Alias -> canonical, as the manifest has it."""
    ties: dict[str, str] = {}
    for group in disk.groups:
        # One slot: the names on disk, which need no model class to be understood. Unpacked experts: the parameters.
        canonical, *aliases = group.slots[0] if len(group.slots) == 1 else (group.canonical, *group.aliases)
        ties.update((alias, canonical) for alias in aliases)
    return ties


@gc_paused()
def build_manifest(
    report: Report, disk: DiskTies, written: Mapping[str, Sequence[str]], version: str
) -> bytes:
    """The manifest's JSON text.

    Args:
        written: what `written_tensors` gives.
    """
    data = {
        "schema": MANIFEST_SCHEMA,
        "tool": {"name": "tierewrite", "version": version},
        "source": {"shards": [{"name": shard.name, "size": shard.nbytes} for shard in report.before_shards]},
        "options": report.policy.to_json(),
        "ties": {
            "source": report.ties_source,
            # A ties file's name is the user's, and no part of the content.
            "detail": report.ties_detail if report.ties_source == "class" else "",
            "map": ties_on_disk(disk),
        },
        "groups": [_group_text(entry, written.get(entry.group.id, ())) for entry in report.groups],
    }
    return dumps(data).encode()


def _group_text(entry: GroupReport, tensors: Sequence[str]) -> JsonText:
    group = entry.group
    return JsonText(
        f'{{"id": {quoted(group.id)}, "canonical": {quoted(group.canonical)}, '
        f'"aliases": [{", ".join(map(quoted, group.aliases))}], "status": {quoted(entry.status)}, '
        f'"reason": {"null" if group.reason is None else quoted(group.reason)}, "tensors": {{{", ".join(tensors)}}}}}'
    )
