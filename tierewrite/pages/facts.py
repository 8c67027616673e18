"""What a page says, as data: read from a rewrite's manifest and, where there is a folder, from its headers.

    facts = read_facts("DST")                # a folder that `rewrite` wrote
    facts = read_facts("tierewrite.json")    # its manifest alone: everything but the sizes

Sizes of what was dropped are those of what stands for it: a rewrite drops equal bytes only, and merged scales are a few
bytes each. No tensor data is read.

Refused: a path that is not there or a folder without a manifest (UsageError, exit 2); a manifest or headers that are
malformed, or that do not belong together (SourceError, exit 4).
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from tierewrite import formats
from tierewrite.consumers.findings import ReadinessReport
from tierewrite.errors import SourceError, UsageError, system_errors
from tierewrite.output.manifest import read_manifest
from tierewrite.planning.plan import kind_of
from tierewrite.planning.policy import ConsumerName
from tierewrite.source.folder import natural_key, open_folder, refuse_half_written
from tierewrite.source.open import open_checkpoint, rename_in_errors
from tierewrite.source.table import MANIFEST_NAME, Checkpoint
from tierewrite.stores.base import PathLike
from tierewrite.stores.places import FilePath, is_local, is_remote, located
from tierewrite.tables import count, repr_of

PAGE_SCHEMA = "tierewrite/page/1"
WORST_SHOWN = 20
STATUSES = ("rewritten", "canonical", "kept")


@dataclass(frozen=True, slots=True)
class SizeRow:
    """Tensors of one kind (`name`) before and after: `before_tensors`, `after_tensors`, and the bytes of their data,
    `before_bytes`, `after_bytes`."""

    name: str
    before_tensors: int
    before_bytes: int
    after_tensors: int
    after_bytes: int

    def to_json(self) -> dict[str, Any]:
        """All attributes, by name."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Sizes:
    """What source and output hold.

    Attributes:
        total: everything.
        shards: the output's files.
        by_part: per part of the model ("experts.down_proj"), largest first.
        by_tensor: per last word and dtype ("weight_scale, F8_E4M3"), largest first.
    """

    total: SizeRow
    shards: int
    by_part: tuple[SizeRow, ...]
    by_tensor: tuple[SizeRow, ...]


@dataclass(frozen=True, slots=True)
class Scale:
    """One merged activation scale.

    Attributes:
        name: its key in the output.
        projection: the part of the model that it belongs to ("experts.down_proj"), with what sort of scale it is where
            that is not the input's.
        layer, expert: numbers from its name, None where it has none.
        ratio: largest valid side over smallest, at least 1; None where fewer than two sides had a valid value.
        calibrated: False when no side had a valid value.
        sources: the source keys that it stands for.
    """

    name: str
    projection: str
    layer: int | None
    expert: int | None
    ratio: float | None
    calibrated: bool
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Divergence:
    """How much the sides of one projection's scales differ.

    Attributes:
        projection: as in `Scale`.
        scales: in the order of layers and experts.
        ratios: those that exist, ascending.
        one_sided: scales with one valid side (missing, zero or not finite on the others).
        never: scales that calibration set on no side.
    """

    projection: str
    scales: tuple[Scale, ...]
    ratios: tuple[float, ...]
    one_sided: int
    never: int

    @property
    def median(self) -> float | None:
        """The median ratio; None where no scale has one."""
        return quantile(self.ratios, 0.5)

    @property
    def p90(self) -> float | None:
        """The 90th percentile, linearly interpolated."""
        return quantile(self.ratios, 0.9)

    @property
    def largest(self) -> Scale | None:
        """The first scale with the largest ratio."""
        return max((s for s in self.scales if s.ratio is not None), key=lambda s: s.ratio or 0, default=None)

    @property
    def max(self) -> float | None:
        """The largest ratio; None where no scale has one."""
        return self.ratios[-1] if self.ratios else None

    def to_json(self) -> dict[str, Any]:
        """One entry of `divergence` of schema tierewrite/page/1."""
        return {
            "projection": self.projection,
            "scales": len(self.scales),
            "median": self.median,
            "p90": self.p90,
            "max": self.max,
            "max_at": None if self.largest is None else self.largest.name,
            "one_sided": self.one_sided,
            "never_calibrated": self.never,
        }


@dataclass(frozen=True, slots=True)
class GroupRow:
    """Tie groups of one kind, and what became of their tensors.

    Attributes:
        kind: the tied parameter ("self_attn.q_proj").
        rewritten, canonical, kept: number of groups.
        dropped: source tensors that another one stands for now.
        actions: output tensors by action, of those that stand for several or have a new name.
    """

    kind: str
    rewritten: int
    canonical: int
    kept: int
    dropped: int
    actions: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """One entry of `groups` of schema tierewrite/page/1."""
        return {
            "kind": self.kind,
            "rewritten": self.rewritten,
            "canonical": self.canonical,
            "kept": self.kept,
            "dropped_tensors": self.dropped,
            "actions": dict(self.actions),
        }


@dataclass(frozen=True, slots=True)
class KeptGroup:
    """A declared tie, or `aliases` of one, left as it is beside its `canonical` parameter, and the `reason`."""

    canonical: str
    aliases: tuple[str, ...]
    reason: str


@dataclass(frozen=True, repr=False)
class Facts:
    """Everything that a page says.

    Attributes:
        name: of the folder, for the title.
        version: of the tierewrite that wrote the manifest.
        options: the options that decided content.
        ties_source, ties_detail: who declared the ties.
        source_shards: files of the source.
        sizes: None where the manifest came alone.
        scales: every merged scale.
        groups: per kind of tied parameter, most dropped tensors first.
        kept: the groups that were left alone.
        consumers: what a check for each consumer found; () where none was asked for.
        hub: hub id and commit of the source, where the manifest has them.
    """

    name: str
    version: str
    options: Mapping[str, Any]
    ties_source: str
    ties_detail: str
    source_shards: int
    sizes: Sizes | None
    scales: tuple[Scale, ...]
    groups: tuple[GroupRow, ...]
    kept: tuple[KeptGroup, ...]
    consumers: tuple[ReadinessReport, ...] = ()
    hub: tuple[str, str] | None = None

    def __repr__(self) -> str:
        return repr_of(
            self, f"{count(len(self.groups), 'kind')} of ties, {count(len(self.scales), 'scale')}, {self.name}"
        )

    @property
    def readiness(self) -> ReadinessReport | None:
        """What the check for the first consumer found; None where none was asked for."""
        return self.consumers[0] if self.consumers else None

    def count(self, status: str) -> int:
        """Number of groups with that status: "rewritten", "canonical" or "kept"."""
        return sum(getattr(row, status) for row in self.groups)

    @cached_property
    def divergence(self) -> tuple[Divergence, ...]:
        """Per projection, those that differ most first."""
        found: dict[str, list[Scale]] = {}
        for scale in self.scales:
            found.setdefault(scale.projection, []).append(scale)
        return tuple(
            sorted(
                (_divergence(name, scales) for name, scales in found.items()),
                key=lambda d: (-(d.max or 0), natural_key(d.projection)),
            )
        )

    @cached_property
    def overall(self) -> Divergence:
        """Of all scales together."""
        return _divergence("all", self.scales)

    def worst(self, count: int = WORST_SHOWN) -> list[Scale]:
        """The scales whose sides differ most, the largest ratio first."""
        rated = [scale for scale in self.scales if scale.ratio is not None]
        return sorted(rated, key=lambda s: (-(s.ratio or 0), natural_key(s.name)))[:count]

    def to_json(self, worst: int = WORST_SHOWN) -> dict[str, Any]:
        """The object that `tierewrite report --json` prints (schema tierewrite/page/1)."""
        sizes = self.sizes
        return {
            "schema": PAGE_SCHEMA,
            "name": self.name,
            "tool": {"name": "tierewrite", "version": self.version},
            "options": dict(self.options),
            "ties": {"source": self.ties_source, "detail": self.ties_detail},
            "hub": None if self.hub is None else {"id": self.hub[0], "commit": self.hub[1]},
            "sizes": None
            if sizes is None
            else {
                "total": sizes.total.to_json(),
                "before_shards": self.source_shards,
                "after_shards": sizes.shards,
                "by_part": [row.to_json() for row in sizes.by_part],
                "by_tensor": [row.to_json() for row in sizes.by_tensor],
            },
            "scales": {key: value for key, value in self.overall.to_json().items() if key != "projection"},
            "divergence": [d.to_json() for d in self.divergence],
            "worst": [{"name": s.name, "ratio": s.ratio, "from": list(s.sources)} for s in self.worst(worst)],
            "groups": [row.to_json() for row in self.groups],
            "kept": [{"canonical": k.canonical, "aliases": list(k.aliases), "reason": k.reason} for k in self.kept],
            "readiness": None if self.readiness is None else self.readiness.to_json(),
            "consumers": [report.to_json() for report in self.consumers],
        }


def quantile(ascending: Sequence[float], q: float) -> float | None:
    """The `q` quantile, interpolated between neighbours as numpy.percentile does; None of nothing."""
    if not ascending:
        return None
    at = q * (len(ascending) - 1)
    low, high = ascending[math.floor(at)], ascending[math.ceil(at)]
    return low if low == high else low + (high - low) * (at % 1)


def _divergence(name: str, scales: Iterable[Scale]) -> Divergence:
    ordered = tuple(scales)
    return Divergence(
        projection=name,
        scales=ordered,
        ratios=tuple(sorted(s.ratio for s in ordered if s.ratio is not None)),
        one_sided=sum(s.calibrated and s.ratio is None for s in ordered),
        never=sum(not s.calibrated for s in ordered),
    )


@lru_cache(maxsize=65536)
def _known_suffix(suffix: str) -> bool:
    return formats.classify("weight", suffix) is not None


def split_name(name: str) -> tuple[str, str]:
    """A key as (module, suffix): ("a.q_proj", "input_scale"), ("a.experts", "gate_up_proj_scale").

    The longest suffix that some format knows, of at most three words; else the last word, with which a parameter of its
    own name (`router.per_expert_scale`) is a part of the model by itself.
    """
    words = name.split(".")
    for length in range(min(3, len(words) - 1), 0, -1):
        suffix = ".".join(words[-length:])
        if _known_suffix(suffix):
            return ".".join(words[:-length]), suffix
    return name, words[-1]


def position(module: str) -> tuple[int | None, int | None]:
    """Layer and expert from a module's name: the first number, and the one after a word with "expert" in it."""
    layer: int | None = None
    expert: int | None = None
    words = module.split(".")
    for before, word in zip(["", *words], words, strict=False):
        # No model has as many layers as six digits say, and no picture could show such a number.
        if not (word.isascii() and word.isdigit() and len(word) < 6):
            continue
        if "expert" in before.lower():
            expert = int(word)
        elif layer is None:
            layer = int(word)
    return layer, expert


_INPUT_SCALES = ("input_scale", "input_global_scale")  # ModelOpt's and compressed-tensors' names for the usual case


def _scale(name: str, tensor: Mapping[str, Any]) -> Scale:
    module, suffix = split_name(name)
    layer, expert = position(module)
    projection = kind_of(module) or module
    if module != name and suffix not in _INPUT_SCALES:
        projection = f"{projection}: {suffix}"
    ratio = tensor["ratio"]
    ratio = None if ratio is None else float(ratio)
    return Scale(name, projection, layer, expert, ratio, tensor["calibrated"], tuple(tensor["from"]))


def read_facts(
    path: PathLike,
    consumer: ConsumerName | Sequence[ConsumerName] | None = None,
    *,
    backbone: PathLike | None = None,
) -> Facts:
    """The facts of one rewrite.

    Args:
        path: the folder that it wrote, or its URL; or a manifest alone.
        consumer: one or several, such as "vllm": what `tierewrite.check` finds is among the facts (a folder only).
        backbone: as for `tierewrite.check`.

    Raises:
        UsageError: nothing there, a folder without a manifest, or a consumer asked for without a folder.
        SourceError: a malformed manifest or checkpoint, or a manifest of another checkpoint.
        SystemFailure: the system does not let us read it.
    """
    where, folder, manifest_path = _found(path)
    wanted: tuple[ConsumerName, ...] = (consumer,) if isinstance(consumer, str) else tuple(consumer or ())
    if wanted and folder is None:
        what = "is a manifest alone; a check for a consumer needs the folder: give that, or leave out --for"
        raise UsageError(what, file=where)
    with rename_in_errors(where, manifest_path.parent):
        manifest = read_manifest(manifest_path)
        sizes = None if folder is None else _sizes(folder, manifest, manifest_path)
    consumers: tuple[ReadinessReport, ...] = ()
    if wanted:
        from tierewrite.consumers import check

        consumers = tuple(check(where, one, backbone=backbone) for one in dict.fromkeys(wanted))
    entries = [(name, tensor) for group in manifest["groups"] for name, tensor in group["tensors"].items()]
    scales = [_scale(name, tensor) for name, tensor in entries if tensor["merged"]]
    kept = [
        KeptGroup(group["canonical"], tuple(group["aliases"]), group["reason"] or "")
        for group in manifest["groups"]
        if group["status"] == "kept"
    ]
    kept += [
        KeptGroup(group["canonical"], (alias,), reason)
        for group in manifest["groups"]
        for alias, reason in group.get("differing_aliases", {}).items()
    ]
    if is_local(where):
        where = Path(os.path.realpath(where if folder is not None else where.absolute().parent))
    return Facts(
        name=where.name,
        version=manifest["tool"]["version"],
        options=manifest["options"],
        ties_source=manifest["ties"]["source"],
        ties_detail=manifest["ties"]["detail"],
        source_shards=len(manifest["source"]["shards"]),
        sizes=sizes,
        scales=tuple(sorted(scales, key=lambda s: natural_key(s.name))),
        groups=_group_rows(manifest["groups"]),
        kept=tuple(sorted(kept, key=lambda k: natural_key(k.canonical))),
        consumers=consumers,
        hub=(hub["id"], hub["commit"]) if (hub := manifest["source"].get("hub")) else None,
    )


def _found(path: PathLike) -> tuple[FilePath, Checkpoint | None, Path]:
    """What `path` is: itself, the checkpoint if it is a folder, and where the manifest can be read."""
    where = located(path)
    nothing_said = (
        f"holds no {MANIFEST_NAME}, so nothing says what was done; give the folder that a rewrite wrote "
        "(without --no-manifest)"
    )
    if is_remote(where):
        folder = open_checkpoint(where, ignore_unindexed=True)
        if not (folder.root / MANIFEST_NAME).exists():
            raise UsageError(nothing_said, file=where)
        return where, folder, folder.root / MANIFEST_NAME
    if not os.path.lexists(where):
        raise UsageError("does not exist; expected the folder that a rewrite wrote, or its manifest", file=where)
    if not where.is_dir():
        return where, None, where
    with system_errors("listing", where):
        refuse_half_written(os.listdir(where), where)
    if not (where / MANIFEST_NAME).exists():
        raise UsageError(nothing_said, file=where)
    return where, open_folder(where, ignore_unindexed=True), where / MANIFEST_NAME


def _group_rows(groups: Iterable[Mapping[str, Any]]) -> tuple[GroupRow, ...]:
    status: dict[str, Counter[str]] = {}
    actions: dict[str, Counter[str]] = {}
    dropped: Counter[str] = Counter()
    for group in groups:
        kind = kind_of(group["canonical"]) or group["canonical"]
        status.setdefault(kind, Counter())[group["status"]] += 1
        counter = actions.setdefault(kind, Counter())
        for tensor in group["tensors"].values():
            counter[tensor["action"]] += 1
            dropped[kind] += len(tensor["from"]) - 1
    rows = [
        GroupRow(
            kind,
            count["rewritten"],
            count["canonical"],
            count["kept"],
            dropped[kind],
            dict(sorted(actions[kind].items())),
        )
        for kind, count in status.items()
    ]
    return tuple(sorted(rows, key=lambda r: (-r.dropped, natural_key(r.kind))))


def _sizes(checkpoint: Checkpoint, manifest: Mapping[str, Any], path: Path) -> Sizes:
    copies: dict[str, int] = {}
    for group in manifest["groups"]:
        for name, tensor in group["tensors"].items():
            if name not in checkpoint.tensors:
                raise SourceError(
                    "the manifest lists it, but no shard beside holds it: it belongs to another checkpoint, or the "
                    "files were changed since; `tierewrite verify SRC DST` tells",
                    file=path,
                    tensor=name,
                )
            copies[name] = len(tensor["from"])
    parts: dict[str, list[int]] = {}
    tensors: dict[str, list[int]] = {}
    total = [0, 0, 0, 0]
    for name, entry in checkpoint.tensors.items():
        module, suffix = split_name(name)
        count = copies.get(name, 1)
        row = (count, count * entry.nbytes, 1, entry.nbytes)
        for sums in (
            total,
            parts.setdefault(kind_of(module) or module, [0, 0, 0, 0]),
            tensors.setdefault(f"{suffix}, {entry.dtype}", [0, 0, 0, 0]),
        ):
            for at, value in enumerate(row):
                sums[at] += value
    return Sizes(SizeRow("total", *total), len(checkpoint.shards), _rows(parts), _rows(tensors))


def _rows(table: Mapping[str, Sequence[int]]) -> tuple[SizeRow, ...]:
    rows = [SizeRow(name, *values) for name, values in table.items()]
    return tuple(sorted(rows, key=lambda r: (-r.before_bytes, natural_key(r.name))))
