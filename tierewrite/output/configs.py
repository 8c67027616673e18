"""The configs of the output: entries of ignore lists that disagree with what is on disk, reported or corrected."""

from __future__ import annotations

from collections.abc import Mapping

from tierewrite.formats import ignore_lists as entries
from tierewrite.planning.plan import RewritePlan
from tierewrite.source.bytes import read_side_file
from tierewrite.source.table import Checkpoint
from tierewrite.ties.on_disk import DiskTies


def ignore_lists(
    checkpoint: Checkpoint, plan: RewritePlan, ties: DiskTies
) -> tuple[Mapping[str, bytes], tuple[str, ...]]:
    """Holds the ignore lists against what will be on disk.

    Returns:
        New contents of config.json and hf_quant_config.json, by name (only with `fix_ignore`, and only where something
        changes), and warnings: one an entry.

    Raises:
        SourceChanged: a config is not what was read when the source was opened.
        SystemFailure: reading failed.
    """
    shapes = [shape for _, shape in plan.source.kinds]
    quantized, plain = entries.sorted_modules(
        (name, shapes[kind])
        for shard in plan.shards
        for name, kind, added in zip(
            shard.names, plan.source.kind[shard.rows].tolist(), shard.added.tolist(), strict=True
        )
        if not added
    )
    pairs = [
        (alias.removesuffix(".weight"), canonical.removesuffix(".weight"))
        for group in ties.groups
        for canonical, *aliases in group.slots
        for alias in aliases
        if canonical.endswith(".weight")
    ]
    findings = entries.inconsistencies(checkpoint.config, checkpoint.quant_config, pairs, quantized, plain)
    if not plan.policy.fix_ignore:
        return {}, tuple(finding.message for finding in findings)
    contents: dict[str, bytes] = {}
    for side in checkpoint.side_files:
        mine = [f for f in findings if f.file == side.name and f.replacement is not None]
        if not mine:
            continue
        text = read_side_file(side).decode()
        contents[side.name] = entries.fixed_text(text, side.name, mine).encode()
    rewritten = "{0.file}: the entry '{0.entry}' was rewritten"
    return contents, tuple(f.message if f.replacement is None else rewritten.format(f) for f in findings)
