"""What the rules look at: a folder as a loader reads it, its names, its quantization config and its scales.

Names are those under the consumer's backbone. Nothing is decided here. Unlike `open_folder`, which refuses one that
contradicts itself, a folder is read the way loaders read it: what an index lacks or invents, and names that several
files hold, become facts for the rules. Malformed headers and configs that are no JSON are refused all the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from tierewrite import formats
from tierewrite.consumers.backbone import Backbone, BackboneTable
from tierewrite.consumers.folder import Folder
from tierewrite.consumers.loaded import DryLoad
from tierewrite.consumers.parts import parts_missing
from tierewrite.errors import SystemFailure, TierewriteError
from tierewrite.formats.experts import expert_of
from tierewrite.formats.numbered import pattern_of, with_numbers
from tierewrite.numbers.float8 import float8_values
from tierewrite.source.bytes import open_source, read_tensors
from tierewrite.source.table import TensorEntry
from tierewrite.ties.fit import weights_around
from tierewrite.ties.on_disk import WHOLE, Part, on_disk, wrappers_of
from tierewrite.ties.tie import ModelNames, TiesGiven
from tierewrite.ties.tie_map import TieMap
from tierewrite.ties.translator import Translator
from tierewrite.ties.unpacked import projections

FLOATS = frozenset({"F64", "F32", "BF16", "F16"})
BATCH = 64 << 20  # bytes of scales held at a time
PACKED = frozenset({"U8", "I8", "F4"})


@dataclass
class Module:
    """One module under the backbone's name: leaf -> the checkpoint keys that are mapped to it."""

    name: str
    leaves: dict[str, list[str]] = field(default_factory=dict)

    def key(self, leaf: str) -> str | None:
        """The key that counts for the leaf: the canonical side's, which is read first."""
        keys = self.leaves.get(leaf)
        return keys[0] if keys else None

    @property
    def weight(self) -> str | None:
        """The key of its weight, plain or packed."""
        return self.key("weight") or next((self.key(leaf) for leaf in self.leaves if formats.is_main(leaf)), None)

    @property
    def stem(self) -> str:
        """The module's name in the checkpoint, for messages."""
        first = next(iter(self.leaves.values()))[0]
        return first.rpartition(".")[0]


class Unexplained(NamedTuple):
    """What a tensor in an unknown format belongs to, by its module.

    Attributes:
        weight: the module's weight, as it would be on disk if nothing were quantized.
        parameter, part: where that is loaded.
    """

    weight: str
    parameter: str
    part: Part


class Subject:
    """A checkpoint, prepared for the rules; everything is computed once, in time linear in the names."""

    def __init__(
        self,
        folder: Folder,
        backbones: BackboneTable,
        *,
        ties: TiesGiven | None = None,
        trust_remote_code: bool = False,
        compare_limit: int = 4 << 30,
    ) -> None:
        self.folder = folder
        self.entries = folder.entries
        self.config = folder.config
        self.compare_limit = compare_limit
        self.bytes_read = 0
        self.notes: list[str] = []
        self.loaded: DryLoad | None = None  # what the consumer's own loader did, where it was asked and ran
        named = self.config.get("architectures")
        self.architectures = [a for a in named if isinstance(a, str)] if isinstance(named, list) else []
        self.architecture = self.architectures[0] if self.architectures else ""
        self.backbone: Backbone = backbones.of(self.architecture)
        self.class_problem: str | None = None
        try:
            self.ties: TieMap | None = TieMap.resolve(
                folder.root,
                self.config,
                keys=self.entries,
                ties=ties,
                trust_remote_code=trust_remote_code,
            )
        except TierewriteError as e:
            if ties is not None or isinstance(e, SystemFailure):  # this machine's fault is no finding
                raise
            self.ties, self.class_problem = None, str(e)
        if self.ties is not None and self.ties.instead_of:
            self.class_problem = self.ties.instead_of
        worn = None if self.ties is None else wrappers_of(self.ties, self.entries)
        if worn is not None:
            self.notes.append(f"{worn.said}, which no loader knows; rewrite --strip-prefix takes it off")

    @property
    def model(self) -> ModelNames | None:
        """The model class's names and shapes; None where none is named, or it was not asked or could not be built."""
        if self.ties is None or self.ties.model is None or not self.architectures:
            return None
        return self.ties.model if self.ties.model.shapes else None

    @cached_property
    def targets(self) -> dict[str, list[str]]:
        """Backbone name -> keys that are mapped to it, the canonical side's first."""
        moved = self._moved
        found: dict[str, list[str]] = {}
        for key in self.entries:
            module, dot, leaf = key.rpartition(".")
            canonical = moved.get(key) or (moved[module] + dot + leaf if module in moved else key)
            found.setdefault(self.backbone.map(canonical), []).append(key)
        first = self.backbone.sides[0] if self.backbone.sides else None
        for keys in found.values():
            if len(keys) > 1:
                keys.sort(key=lambda k: (first is not None and not k.startswith(first), k))
        return found

    @cached_property
    def _moved(self) -> dict[str, str]:
        """Alias -> canonical, as far as the consumer has one parameter for both: modules, and other parameters.

        Where the backbone names its sides, its prefixes say it all. A head that is tied to the embedding is a
        parameter of its own to a loader that finds it stored.
        """
        if self.backbone.sides or self.ties is None:
            return {}
        moved: dict[str, str] = {}
        for group in on_disk(self.ties, self.entries).groups:
            for canonical, *aliases in group.slots:
                for alias in aliases:
                    if alias.endswith("lm_head.weight"):
                        continue
                    if alias.endswith(".weight") and canonical.endswith(".weight"):
                        moved[alias.removesuffix(".weight")] = canonical.removesuffix(".weight")
                    else:
                        moved[alias] = canonical
        return moved

    @property
    def destinations(self) -> Mapping[str, list[str]]:
        """Name of the consumer's -> the keys that become it."""
        return self.targets

    def meeting(self) -> list[list[str]]:
        """Names that become one parameter, of which the last that is read stays: as the consumer's own loader found it,
        where it was asked.
        """
        if self.loaded is None or not self.loaded.loaded:
            groups = (keys for keys in self.destinations.values() if len(keys) > 1)
            return [keys for keys in groups if not self.backbone.passes_over(self.backbone.map(keys[0]))]
        pairs = {(one.first, one.last) for rank in self.loaded.ranks for one in rank.overwritten}
        return [list(pair) for pair in sorted(pairs) if self.entries.keys() >= set(pair) and not _siblings(*pair)]

    def sharing(self, leaf: str) -> Iterator[list[str]]:
        """Keys of companions `leaf` that went into one parameter, as the consumer's own loader found it; an expert's
        alone. Of names that meet, the one that is read last.
        """
        if self.loaded is None:
            return
        lost = {keys[0] for keys in self.meeting()}
        for _, keys in self.loaded.keys_together():
            sets: dict[str | None, list[str]] = {}
            for key in keys:
                if key.rpartition(".")[2] == leaf and key in self.entries and key not in lost:
                    sets.setdefault(expert_of(key), []).append(key)
            yield from (each for each in sets.values() if len(each) > 1)

    @cached_property
    def modules(self) -> dict[str, Module]:
        """Every module, by its backbone name."""
        found: dict[str, Module] = {}
        for target, keys in self.targets.items():
            module, _, leaf = target.rpartition(".")
            there = found.get(module)
            if there is None:
                there = found[module] = Module(module)
            there.leaves[leaf] = keys
        return found

    @cached_property
    def places(self) -> dict[str, tuple[str, Part]]:
        """Key -> parameter in memory and part, for the keys that are weights or parameters themselves."""
        return self._translated[0]

    @cached_property
    def split_keys(self) -> dict[str, tuple[str, ...]]:
        """Keys that fill several parameters in memory (a fused q/k/v) -> all of them."""
        return self._translated[1]

    @cached_property
    def _translated(self) -> tuple[dict[str, tuple[str, Part]], dict[str, tuple[str, ...]]]:
        if self.model is None:
            return {}, {}
        plain: dict[str, str] = {}
        for key in self.entries:
            plain[formats.main_parameter(key) or key] = key
        translator = Translator(self.model, {})
        located = {name: translator.locate(name) for name in translator.in_loading_order(plain)}
        self.model.renames.settled()
        places = {plain[name]: place for name, place in located.items() if place is not None}
        return places, {plain[name]: all_of_it for name, all_of_it in translator.covers.items()}

    @cached_property
    def canonical(self) -> dict[str, str]:
        """Parameter in memory -> the parameter that it is tied to."""
        return {} if self.ties is None else {t.alias: t.canonical for t in self.ties.ties}

    @cached_property
    def families(self) -> tuple[str, ...]:
        """Names of the quantization formats that it is written in."""
        return formats.written_in(self._recognised)

    @cached_property
    def _recognised(self) -> tuple[formats.Recognised, ...]:
        return formats.recognise(self.config, self.folder.quant_config, self.entries)

    def belongs_to_weight(self, key: str) -> bool:
        """Whether a format gives the tensor to a weight that is another tensor, or to the KV cache: one that the
        checkpoint is written in, or any other. Of several words (`weight.absmax`) or called like a fused parameter
        (`gate_up_proj_scales`) too.
        """
        leaf = key.rpartition(".")[2]
        found = formats.classify("weight", leaf, self.families) or formats.classify("weight", leaf)
        part = formats.part_of_weight(key)
        return (
            (found is not None and not found.main)
            or (part is not None and not part[1].main)
            or formats.kv_scale(key) is not None
            or any(main in self.places for p in formats.fused_parameters(key) for main in formats.main_names(p))
        )

    @cached_property
    def unknown_format(self) -> str | None:
        """The method of quantization that a config names, where it is that of no format known here."""
        return next((one.family for one in self._recognised if one.is_unknown), None)

    @cached_property
    def in_unknown_format(self) -> Mapping[str, Unexplained]:
        """Keys that no format explains, in modules of which the class has a weight; only where there is an
        `unknown_format`, which may call its tensors anything.
        """
        if self.model is None or self.unknown_format is None:
            return {}
        odd = (key for key in self.entries if key not in self.places and not self.belongs_to_weight(key))
        weights = {key: weights_around(key) for key in odd}
        translator = Translator(self.model, {})
        names = dict.fromkeys(weight for found in weights.values() for weight in found)
        located = {name: translator.locate(name) for name in translator.in_loading_order(names)}
        self.model.renames.settled()
        found: dict[str, Unexplained] = {}
        for key, around in weights.items():
            weight = next((weight for weight in around if located[weight] is not None), None)
            if weight is not None and (place := located[weight]) is not None:
                found[key] = Unexplained(weight, *place)
        return found

    @cached_property
    def quantized(self) -> dict[str, Module]:
        """Modules whose weight on disk is quantized: packed or FP8, or with a scale beside it."""
        return {name: m for name, m in self.modules.items() if self._is_quantized(m)}

    @cached_property
    def count_quantized(self) -> int:
        """How many modules hold a quantized weight: those of `quantized`, and those whose packed tensor is no
        `<module>.<leaf>`, but below the weight's own name (`weight._data`), called like a fused parameter
        (`_gate_up_proj_qdata`), or called as only an unknown format knows.
        """
        owners = {formats.main_parameter(target) for target in self.targets}
        owners.update(self.backbone.map(found.weight) for found in self.in_unknown_format.values())
        return len(self.quantized.keys() | {owner.rpartition(".")[0] for owner in owners if owner is not None})

    def _is_quantized(self, module: Module) -> bool:
        if any(_shows_quantization(leaf) for leaf in module.leaves):
            return True
        key = module.key("weight")
        return key is not None and self.entries[key].dtype not in FLOATS and len(self.entries[key].shape) == 2

    def size(self, key: str) -> tuple[int, ...] | None:
        """The unquantized shape of the weight `key`, by the model class; None where that is not known."""
        place = self.places.get(key)
        if place is None or self.model is None or key in self.split_keys:
            return None
        parameter, part = place
        shape = self.model.shapes[parameter]
        if part == WHOLE:
            return shape
        if part[0] == "converter":
            stacked = next(t.stacked for t in self.model.renames.transforms if t.converts and part[1] in t.sources)
            return (shape[1] // stacked, *shape[2:]) if stacked and len(shape) > 1 else None
        if part[0] == "expert" and len(shape) == 3:
            stem = parameter.rpartition(".")[2]
            count = len(projections(stem)) if part[1] != stem else 1
            return shape[1] // count, shape[2]
        return None

    def missing(self) -> tuple[list[str], list[str], list[str]]:
        """What the model class has and no key fills: (parameters, shards of fused projections of which others are
        there, experts without any weight). Parameters that are one to the consumer are filled together.
        """
        assert self.model is not None
        filled: dict[str, dict[Part, str]] = {}
        for key, (parameter, part) in self.places.items():
            filled.setdefault(self._group(parameter), {})[part] = key
        for key, found in self.in_unknown_format.items():
            filled.setdefault(self._group(found.parameter), {}).setdefault(found.part, key)
        for key, parameters in self.split_keys.items():
            filled |= {self._group(parameter): {WHOLE: key} for parameter in parameters}
        wanted: dict[str, str] = {}
        for parameter in self.model.shapes:
            wanted.setdefault(self._group(parameter), self.canonical.get(parameter, parameter))
        plain: list[str] = []
        bare: dict[str, None] = {}  # experts that a parameter has nothing of
        for group, parameter in wanted.items():
            parts = filled.get(group, {})
            if parts and WHOLE not in parts:
                names, experts = parts_missing(parts, self.model, parameter)
                plain += names
                bare.update(dict.fromkeys(experts))
            elif not parts and self.needs(parameter):
                plain.append(parameter)
        gone = [expert for expert in bare if expert not in self._experts_there]
        lost = set(gone)
        plain = [name for name in plain if expert_of(name) not in lost]
        shards = [name for name in plain if name.endswith(".weight") and self.partner_there(name)]
        of_fused = set(shards)
        return [self._as_stored(name) for name in plain if name not in of_fused], shards, gone

    def _as_stored(self, parameter: str) -> str:
        """Its name as keys write that of another layer: checkpoints may have other names than the class."""
        like = self._keys_of_like.get(pattern_of(parameter), "*")
        return with_numbers(like, parameter) if like.count("*") == pattern_of(parameter).count("*") else parameter

    @cached_property
    def _keys_of_like(self) -> dict[str, str]:
        """Parameters' names without their numbers -> those of the keys that are such parameters."""
        whole = [
            (pattern_of(parameter), pattern_of(key)) for key, (parameter, part) in self.places.items() if part == WHOLE
        ]
        return dict(whole) | {parameter: key for parameter, key in whole if parameter == key}

    def _group(self, parameter: str) -> str:
        """What the consumer has one parameter for."""
        return self.backbone.map(self.canonical.get(parameter, parameter))

    @cached_property
    def _experts_there(self) -> set[str]:
        return {expert for key in self.places if (expert := expert_of(key)) is not None}

    def needs(self, parameter: str) -> bool:
        """Whether the consumer reads this parameter of the model class."""
        return not self.backbone.passes_over(self.backbone.map(parameter))

    def partner_there(self, name: str) -> bool:
        """Another shard of the fused parameter that `name` is a part of is on disk."""
        parent, _, projection = self.backbone.map(name.rpartition(".")[0]).rpartition(".")
        for shards in self.backbone.fused.values():
            if projection in shards:
                modules = (self.modules.get(f"{parent}.{x}") for x in shards if x != projection)
                return any(m is not None and m.weight is not None for m in modules)
        return False

    def read(self, keys: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """The bytes of `keys`, in batches of at most some 64 MiB."""
        checkpoint = self.folder.as_checkpoint()
        batch: list[str] = []
        size = 0
        ordered = sorted(keys, key=lambda k: (self.entries[k].shard, self.entries[k].start))
        for key in ordered:
            batch.append(key)
            size += self.entries[key].nbytes
            if size >= BATCH:
                yield from read_tensors(checkpoint, batch).items()
                batch, self.bytes_read, size = [], self.bytes_read + size, 0
        yield from read_tensors(checkpoint, batch).items()
        self.bytes_read += size

    @cached_property
    def scalars(self) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
        """Values of the per-tensor scales (at most 4096 elements), by key, as float64."""
        wanted = [
            key
            for key, e in self.entries.items()
            if key.endswith(SCALE_ENDINGS) and e.dtype in FLOATS and e.nbytes <= 4096 * 8
        ]
        return {key: numbers(self.entries[key].dtype, data) for key, data in self.read(wanted)}

    def same_bytes(self, first: TensorEntry, second: TensorEntry) -> bool:
        """Whether two tensors of one size hold the same bytes; reads in pieces."""
        piece = 8 << 20
        sides = [(open_source(self.folder.shards[e.shard]), e.start) for e in (first, second)]
        try:
            buffers = bytearray(piece), bytearray(piece)
            for at in range(0, first.nbytes, piece):
                count = min(piece, first.nbytes - at)
                views = [memoryview(buffer)[:count] for buffer in buffers]
                for (file, start), view in zip(sides, views, strict=True):
                    file.read_runs([(start + at, start + at + count)], view)
                self.bytes_read += 2 * count
                if views[0] != views[1]:
                    return False
            return True
        finally:
            for file, _ in sides:
                file.close()

    def equal(self, groups: Iterable[tuple[TensorEntry, ...]]) -> Iterator[bool | None]:
        """For each group of entries, whether all hold the same bytes; None where the limit is spent.

        Smaller groups should come first: the limit is on the sum of bytes. Small tensors are read many at a time.
        """
        spent = size = 0
        batch: list[tuple[TensorEntry, ...]] = []
        for group in groups:
            first = group[0]
            alike = all((e.dtype, e.shape) == (first.dtype, first.shape) for e in group[1:])
            spent += first.nbytes * len(group) if alike else 0
            if alike and first.nbytes * len(group) <= BATCH // 4 and spent <= self.compare_limit:
                batch.append(group)
                size += first.nbytes * len(group)
                if size >= BATCH:
                    yield from self._equal_batch(batch)
                    batch, size = [], 0
                continue
            yield from self._equal_batch(batch)
            batch, size = [], 0
            if not alike:
                yield False
            elif spent > self.compare_limit:
                yield None
            else:
                yield all(self.same_bytes(first, e) for e in group[1:])
        yield from self._equal_batch(batch)

    def _equal_batch(self, groups: list[tuple[TensorEntry, ...]]) -> Iterator[bool]:
        numbered = {f"{i}.{j}": e._replace(name=f"{i}.{j}") for i, g in enumerate(groups) for j, e in enumerate(g)}
        data = read_tensors(self.folder.as_checkpoint(numbered), numbered)
        self.bytes_read += sum(map(len, data.values()))
        for i, group in enumerate(groups):
            yield all(data[f"{i}.{j}"] == data[f"{i}.0"] for j in range(1, len(group)))


def _siblings(first: str, second: str) -> bool:
    """Companions of two projections, such as gate and up, of which the consumer keeps one value for both."""
    (one, leaf), (other, _) = (f".{key}".rsplit(".", 2)[-2:] for key in (first, second))
    return one != other and formats.is_companion(leaf)


def _shows_quantization(leaf: str) -> bool:
    part = formats.classify("weight", leaf) if leaf != "weight" else None
    return part is not None and part.role.quantizes


SCALE_ENDINGS = ("_scale", "_scale_2", "_scale_inv")  # weight_global_scale, k_scale, input_scale, ...
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1"}


def numbers(dtype: str, data: bytes) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Values of F64, F32, F16, BF16 or F8_E4M3 bytes as float64, exact."""
    raw = np.frombuffer(data, dtype=_NUMPY[dtype])
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype == "F8_E4M3":
        values: np.ndarray[Any, np.dtype[np.float64]] = float8_values(dtype)[raw]
        return values
    with np.errstate(invalid="ignore"):
        return raw.astype(np.float64)


def rounded_to_e4m3(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which values E4M3 holds exactly."""
    exact = float8_values("F8_E4M3")
    return np.isin(values, exact[~np.isnan(exact)])
