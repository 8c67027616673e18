"""A look at a checkpoint: shards, tensors, dtypes, formats and declared ties. Headers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tierewrite.errors import shown
from tierewrite.formats.detection import Recognised, recognise, unknown_words, written_in
from tierewrite.source.open import open_checkpoint
from tierewrite.source.table import Checkpoint
from tierewrite.spelling import said_once
from tierewrite.stores.base import PathLike
from tierewrite.tables import Summary, table, text, ties_lines, warning_lines
from tierewrite.ties.on_disk import DiskTies, on_disk
from tierewrite.ties.tie import TiesGiven
from tierewrite.ties.tie_map import TieMap
from tierewrite.units import size

if TYPE_CHECKING:
    from rich.console import RenderableType

INSPECTION_SCHEMA = "tierewrite/inspection/1"


@dataclass(frozen=True, repr=False)
class Inspection(Summary):
    """What is on disk and what the model declares.

    Attributes:
        checkpoint: the headers.
        recognised: the quantization families, and what shows each; also those of which only a config speaks.
        ties: the declared ties; None if they were not asked for.
        disk: the same under the names that are on disk.
    """

    checkpoint: Checkpoint
    recognised: tuple[Recognised, ...]
    ties: TieMap | None
    disk: DiskTies | None

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the quantization families that tensors are written in; ("plain",) where there are none."""
        return written_in(self.recognised)

    def one_line(self) -> str:
        """See `Summary`."""
        there = f"{len(self.checkpoint.tensors):,} tensors, {size(self.checkpoint.total_bytes)}"
        strange = [f"{shown(found.family)} (not known here)" for found in self.recognised if found.is_unknown]
        named = [name for name in self.families if not strange or name != "plain"]
        return f"{shown(self.checkpoint.place)}: {there}, formats: {', '.join((*named, *strange))}"

    def lines(self) -> Iterator[RenderableType]:
        """See `Summary`."""
        yield text(self.one_line())
        for found in self.recognised:
            if found.keys:
                yield text(f"  {found.family}: {shown(found.by)}")
        shards = table("shard", "tensors", "file size")
        for shard, number in zip(self.checkpoint.shards, self.shard_counts, strict=True):
            shards.add_row(text(shown(shard.name)), f"{number:,}", size(shard.size))
        yield shards
        dtypes = table("dtype", "tensors", "bytes")
        for dtype, (number, nbytes) in self.dtypes.items():
            dtypes.add_row(text(shown(dtype)), f"{number:,}", size(nbytes))
        yield dtypes
        if self.ties is not None and self.disk is not None:
            yield from ties_lines(self.ties.source, self.ties.detail, self.ties.unpaired)
            if self.ties.remembered:
                yield text("The class was not asked now: its answer is remembered.")
            ties = table("alias", "canonical", "declared by", left=3)
            for group in self.disk.groups:
                for alias, origin in zip(group.aliases, group.origins, strict=True):
                    ties.add_row(text(shown(alias)), text(shown(group.canonical)), text(shown(origin)))
            if self.disk.groups:
                yield ties
        yield from warning_lines(self.warnings)

    @property
    def dtypes(self) -> dict[str, tuple[int, int]]:
        """dtype -> (number of tensors, bytes), the most bytes first."""
        tensors = self.checkpoint.tensors
        count: Counter[str] = Counter()
        nbytes: Counter[str] = Counter()
        sizes = np.zeros(len(tensors.kinds), np.int64)
        np.add.at(sizes, tensors.kind, tensors.nbytes)
        numbers = np.bincount(tensors.kind, minlength=len(tensors.kinds))
        for (dtype, _), number, total in zip(tensors.kinds, numbers.tolist(), sizes.tolist(), strict=True):
            count[dtype] += number
            nbytes[dtype] += total
        return {dtype: (count[dtype], nbytes[dtype]) for dtype in sorted(count, key=lambda d: (-nbytes[d], d))}

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should look at."""
        ties = self.ties.warnings if self.ties is not None else ()
        disk = self.disk.warnings if self.disk is not None else ()
        return said_once(self.checkpoint.warnings, ties, disk, self._format_warnings())

    def _format_warnings(self) -> Iterator[str]:
        for found in self.recognised:
            if found.is_unknown:
                yield f"a config says {shown(found.by)}: that format is not known here"
            elif not found.keys:
                yield f"a config says {shown(found.by)}, but no tensor is in the format '{found.family}'"
        tensors = self.checkpoint.tensors
        dtypes = [dtype for dtype, _ in tensors.kinds]
        packed = ((name, dtypes[kind]) for name, kind in zip(tensors.names, tensors.kind.tolist(), strict=True))
        for word, (dtype, number) in unknown_words(packed, self.families).items():
            yield f"tensors '{shown(word)}' ({number:,}, {dtype}) are packed in a format that is not known here"

    @property
    def shard_counts(self) -> list[int]:
        """Number of tensors in each shard."""
        counts: list[int] = np.bincount(self.checkpoint.tensors.shard, minlength=len(self.checkpoint.shards)).tolist()
        return counts

    def to_json(self) -> dict[str, Any]:
        """The object that `tierewrite inspect --json` prints (schema tierewrite/inspection/1)."""
        shards = self.checkpoint.shards
        return {
            "schema": INSPECTION_SCHEMA,
            "root": str(self.checkpoint.place),
            "bytes": self.checkpoint.total_bytes,
            "shards": [
                {"name": shard.name, "bytes": shard.size, "tensors": count, "metadata": dict(shard.metadata)}
                for shard, count in zip(shards, self.shard_counts, strict=True)
            ],
            "dtypes": {d: {"tensors": n, "bytes": total} for d, (n, total) in self.dtypes.items()},
            "formats": list(self.families),
            "recognised": [
                {"format": found.family, "tensors": list(found.keys), "configs": list(found.configs)}
                for found in self.recognised
            ],
            "side_files": [{"name": side.name, "bytes": side.size} for side in self.checkpoint.side_files],
            "ties": None if self.ties is None or self.disk is None else _ties_json(self.ties, self.disk),
            "tensors": [
                {
                    "name": entry.name,
                    "dtype": entry.dtype,
                    "shape": list(entry.shape),
                    "bytes": entry.nbytes,
                    "shard": shards[entry.shard].name,
                }
                for entry in self.checkpoint.tensors.values()
            ],
            "warnings": list(self.warnings),
        }


def _ties_json(ties: TieMap, disk: DiskTies) -> dict[str, Any]:
    return {
        "source": ties.source,
        "detail": ties.detail,
        "remembered": ties.remembered,
        "unpaired": list(ties.unpaired),
        "idle": list(disk.idle),
        "groups": [
            {
                "id": group.id,
                "canonical": group.canonical,
                "aliases": list(group.aliases),
                "origins": list(group.origins),
                "parameters_on_disk": [list(slot) for slot in group.slots],
            }
            for group in disk.groups
        ],
    }


def inspect(
    src: PathLike,
    *,
    ties: TiesGiven | None = None,
    trust_remote_code: bool = False,
    ignore_unindexed: bool = False,
    declared: bool = True,
    revision: str | None = None,
) -> Inspection:
    """Looks at the checkpoint in `src`. Reads headers only.

    Args:
        src: the folder, or a hub id `org/name`, of which only headers and configurations are fetched.
        ties: JSON file {alias: canonical}, or such a mapping, instead of asking the model class.
        trust_remote_code: run the model code that `src` brings, to ask it for its ties.
        ignore_unindexed: leave out tensors that the index does not list, instead of refusing.
        declared: also ask for the declared ties (imports transformers unless `ties` is given).
        revision: branch, tag or commit of a hub id; None: its main branch.

    Raises:
        SourceError: something is wrong in `src`.
        UsageError: the ties file is unusable.
        SystemFailure: reading failed.
    """
    checkpoint = open_checkpoint(
        src, revision=revision, ignore_unindexed=ignore_unindexed, trust_remote_code=trust_remote_code
    )
    keys = checkpoint.tensors
    tie_map = disk = None
    if declared:
        tie_map = TieMap.of(checkpoint, ties, trust_remote_code)
        disk = on_disk(tie_map, keys, checkpoint.tensors)
    recognised = recognise(checkpoint.config, checkpoint.quant_config, keys)
    return Inspection(checkpoint, recognised, tie_map, disk)
