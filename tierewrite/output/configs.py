"""The configs of the output: ignore lists that disagree with what is on disk, and `tie_word_embeddings`."""

from __future__ import annotations

import json
from collections.abc import Mapping

from tierewrite.formats import descriptions
from tierewrite.formats import ignore_lists as entries
from tierewrite.json_text import in_style_of
from tierewrite.output.metadata import moved_parameters
from tierewrite.output.tie_flags import fixed_flags, with_flags
from tierewrite.planning.plan import RewritePlan
from tierewrite.source.bytes import read_side_file
from tierewrite.source.table import CONFIG_NAME, Checkpoint
from tierewrite.ties.on_disk import DiskTies
from tierewrite.ties.tie_map import TieMap


def configs_of(
    checkpoint: Checkpoint, plan: RewritePlan, disk: DiskTies, ties: TieMap
) -> tuple[Mapping[str, bytes], tuple[str, ...]]:
    """The configs that the options let change, and what describes tensors that are no longer stored as they were.

    Returns:
        New contents of config.json, hf_quant_config.json and of files that describe modules by name, by the file's
        name, only where something changes; and warnings.

    Raises:
        SourceChanged: a config is not what was read when the source was opened.
        SystemFailure: reading failed.
    """
    contents, warnings = _ignore_lists(checkpoint, plan, disk)
    contents = {**_module_files(checkpoint, plan), **contents}
    if not plan.policy.fix_config:
        return contents, warnings
    changes, said = fixed_flags(checkpoint.config, plan, ties)
    for side in checkpoint.side_files:
        if changes and side.name == CONFIG_NAME:
            text = (contents.get(side.name) or read_side_file(side)).decode()
            made = in_style_of(text, with_flags(json.loads(text), changes))
            contents = {**contents, side.name: made.encode()}
    return contents, (*warnings, *said)


def _module_files(checkpoint: Checkpoint, plan: RewritePlan) -> dict[str, bytes]:
    """The files that describe stored modules by name, where one's weight is no longer stored or has another name."""
    contents: dict[str, bytes] = {}
    for side in checkpoint.side_files:
        member = descriptions.MODULE_FILES.get(side.name)
        if member is None:
            continue
        try:
            text = read_side_file(side).decode()
            found = json.loads(text)
        except (ValueError, RecursionError):  # it is carried over as it is
            continue
        made = descriptions.moved_modules(found, member, moved_parameters(plan))
        if made is not found:
            contents[side.name] = in_style_of(text, made).encode()
    return contents


def _ignore_lists(
    checkpoint: Checkpoint, plan: RewritePlan, ties: DiskTies
) -> tuple[Mapping[str, bytes], tuple[str, ...]]:
    """Holds the ignore lists against what will be on disk.

    Returns:
        New contents, only with `fix_ignore`, and warnings: one an entry.
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
