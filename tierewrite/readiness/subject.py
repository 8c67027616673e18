"""What the rules look at: a checkpoint folder as a loader reads it, its names under the consumer's backbone,
its quantization config, and the bytes of its scales. Decides nothing.

Unlike `Checkpoint.open`, which refuses a folder that contradicts itself, the folder is read here the way
loaders read it: what an index lacks or invents, and names that several files hold, become facts for the rules.
Headers that are malformed and configs that are no JSON are refused all the same.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from fnmatch import translate
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tierewrite import formats
from tierewrite.checkpoint import (
    INDEX_NAME,
    WANTED,
    Checkpoint,
    Shard,
    TensorEntry,
    natural_key,
    read_header,
    read_index,
    refuse_half_written,
    what_is_here,
)
from tierewrite.errors import ConfigError, SourceError, TierewriteError, UsageError
from tierewrite.names import WHOLE, Part, on_disk, places
from tierewrite.reading import open_source, read_tensors
from tierewrite.remote import FilePath
from tierewrite.sources import Mirror, Place, RemoteFolder, folder_of, told_of
from tierewrite.ties import ModelNames, TieMap

Files = Literal["vllm", "transformers"]

FLOATS = frozenset({"F64", "F32", "BF16", "F16"})
PACKED = frozenset({"U8", "I8", "F4"})
WEIGHTS = ("weight", "weight_packed")  # what a linear module's weight is called on disk
_BATCH = 64 << 20  # bytes of scales held at a time


# ------------------------------------------------------------------------------------------------- the folder


@dataclass(frozen=True)
class Folder:
    """A checkpoint folder as a loader sees it.

    Attributes:
        root: the folder; of a remote one, what holds copies of its small files.
        shards: the files that the loader reads, in its order.
        entries: the tensors in them by name; of a name that several hold, the one that is read last.
        repeated: names that several of the files hold, with all their entries in reading order.
        weight_map: the index, or None.
        absent: files that the index names and that are not there.
        unread: the other safetensors files with the names they hold.
        consolidated: files called consolidated*.safetensors, which vLLM then reads alone.
        config, quant_config, generation: config.json, hf_quant_config.json, generation_config.json; {} where
            absent.
        copies: of a remote folder: who removes `root` once nobody needs it.
    """

    root: Path
    shards: tuple[Shard, ...]
    entries: dict[str, TensorEntry]
    repeated: dict[str, tuple[TensorEntry, ...]]
    weight_map: dict[str, str] | None
    absent: tuple[str, ...]
    unread: dict[str, tuple[str, ...]]
    consolidated: tuple[str, ...]
    config: dict[str, Any]
    quant_config: dict[str, Any]
    generation: dict[str, Any]
    copies: object = None

    @classmethod
    def open(cls, path: Place, reader: Files = "vllm") -> Folder:
        """Read headers, index and configs of `path` by the rules of `reader`.

        vLLM reads the files that the index names, whole, or every *.safetensors without one; files called
        consolidated* alone where there are any (default_loader.py `_prepare_weights`). transformers reads
        model.safetensors alone where it is there, else the files that the index names, whole
        (modeling_utils.py `_get_resolved_checkpoint_files`, `_load_pretrained_model`).

        Raises:
            SourceError and its kin: no folder, no safetensors file, a malformed header, index or config.
            SystemFailure: the system does not let us read it.
        """
        place = folder_of(path)
        mirror = Mirror(place, python=True) if isinstance(place, RemoteFolder) else None
        where: FilePath
        if isinstance(place, RemoteFolder):
            assert mirror is not None
            root, where, top = mirror.root, place.base, mirror.top
        else:
            root = where = place
            if not root.is_dir():
                what = "not a folder" if os.path.lexists(root) else "does not exist"
                raise SourceError(f"{what}; {WANTED}", file=root)
            top = [p.name for p in root.iterdir()]
        refuse_half_written(top, where)
        there = sorted((n for n in top if n.endswith(".safetensors")), key=natural_key)
        consolidated = tuple(n for n in there if n.startswith("consolidated")) if reader == "vllm" else ()
        weight_map = read_index(root / INDEX_NAME)[1] if (root / INDEX_NAME).exists() else None
        absent: list[str] = []
        if consolidated:
            names = list(consolidated)
        elif reader == "transformers" and "model.safetensors" in there:
            names = ["model.safetensors"]
        elif weight_map is not None:
            listed = sorted(set(weight_map.values()), key=natural_key)
            names = [n for n in listed if n in there]
            absent = [n for n in listed if n not in there]
        else:
            names = there
        if not there:
            raise SourceError(f"no *.safetensors file here; {what_is_here(sorted(top))}", file=where)
        shards: list[Shard] = []
        entries: dict[str, TensorEntry] = {}
        repeated: dict[str, list[TensorEntry]] = {}
        unread = {}
        headers = nullcontext(_local_header(root)) if mirror is None else mirror.headers(there)
        with told_of(where, root), headers as header:
            for number, name in enumerate(names):
                shard, found = header(name, number)
                shards.append(shard)
                for entry in found:
                    earlier = entries.get(entry.name)
                    if earlier is not None:
                        repeated.setdefault(entry.name, [earlier]).append(entry)
                    entries[entry.name] = entry
            for name in there:
                if name not in names:
                    unread[name] = tuple(e.name for e in header(name, 0)[1])
        return cls(
            root,
            tuple(shards),
            entries,
            {name: tuple(found_) for name, found_ in repeated.items()},
            weight_map,
            tuple(absent),
            unread,
            consolidated,
            _json(root / "config.json"),
            _json(root / "hf_quant_config.json"),
            _json(root / "generation_config.json"),
            mirror,
        )

    def as_checkpoint(self, entries: Mapping[str, TensorEntry] | None = None) -> Checkpoint:
        """The same as a `Checkpoint` that `transfer.read_tensors` reads from."""
        found = dict(self.entries if entries is None else entries)
        return Checkpoint(self.root, self.shards, found, None, (), (), self.config, self.quant_config, ())


def _local_header(root: Path) -> Callable[[str, int], tuple[Shard, list[TensorEntry]]]:
    return lambda name, number: read_header(root / name, shard=number, name=name)


def _json(path: Path) -> dict[str, Any]:
    """A JSON object from a config file; {} if absent."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"is no valid JSON: {e}; correct it, or copy it from the original model", file=path) from None
    except OSError as e:
        raise SourceError(f"cannot be read: {e.strerror or e}", file=path) from None
    if not isinstance(found, dict):
        raise ConfigError(f"is {type(found).__name__}; expected an object", file=path)
    return found


# ----------------------------------------------------------------------------------------------- the backbone


@dataclass(frozen=True)
class Backbone:
    """How a consumer maps checkpoint names to its parameters; from backbones.json or a file of the user's.

    Attributes: as that file explains them. `architectures` is empty for the entry that serves all others.
    """

    architectures: tuple[str, ...]
    source: str
    prefixes: tuple[tuple[str, str], ...]
    sides: tuple[str, ...]
    fused: Mapping[str, tuple[str, ...]]
    linear: tuple[Mapping[str, Any], ...]
    plain: tuple[str, ...]
    not_read: tuple[str, ...]
    generation: Mapping[str, Any] | None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Backbone:
        """One entry of the file. Raises KeyError or TypeError where it is not of that form."""
        return cls(
            architectures=tuple(data.get("architectures", ())),
            source=data.get("source", ""),
            prefixes=tuple((str(a), str(b)) for a, b in data["prefixes"]),
            sides=tuple(data.get("sides", ())),
            fused={k: tuple(v) for k, v in data.get("fused", {}).items()},
            linear=tuple(data.get("linear", ())),
            plain=tuple(data.get("plain", ())),
            not_read=tuple(data.get("not_read", ())),
            generation=data.get("generation"),
        )

    @classmethod
    def of(cls, architecture: str, file: str | os.PathLike[str] | None = None) -> Backbone:
        """The entry for `architecture`, the user's file asked before our own; the one for all others if none fits.

        Raises:
            UsageError: the user's file is unreadable or not of that form.
        """
        if file is not None:
            try:
                given = json.loads(Path(file).read_text(encoding="utf-8"))
                entries = given.get("backbones", [given])
                for backbone in map(cls.from_json, entries):
                    if not backbone.architectures or architecture in backbone.architectures:
                        return backbone
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
                raise UsageError(
                    f"is no description of a backbone: {e!r}; expected the form of tierewrite/readiness/backbones.json",
                    file=file,
                ) from None
        known, others = _backbones()
        return known.get(architecture, others)

    def map(self, name: str) -> str:
        """`name` under the backbone's names (WeightsMapper, models/utils.py `_map_name_with_shard`)."""
        for old, new in self.prefixes:
            if name.startswith(old):
                name = new + name[len(old) :]
        return name

    def passes_over(self, mapped: str) -> bool:
        """Whether the consumer drops or ignores the name without a word."""
        return matches(mapped, self.not_read)

    def side(self, name: str) -> str | None:
        """The prefix of the side that a checkpoint name (or ignore pattern) belongs to."""
        return next((s for s in self.sides if name.startswith((s, s.removesuffix(".")))), None)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a shell wildcard of `patterns` is the whole name's."""
    return _union(patterns).match(name) is not None


@lru_cache(maxsize=64)
def _union(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(translate(pattern) for pattern in patterns) or "(?!)")


@lru_cache(maxsize=1)
def _backbones() -> tuple[dict[str, Backbone], Backbone]:
    data = json.loads((Path(__file__).parent / "backbones.json").read_text(encoding="utf-8"))
    entries = [Backbone.from_json(entry) for entry in data["backbones"]]
    return {a: entry for entry in entries for a in entry.architectures}, Backbone.from_json(data["others"])


# ----------------------------------------------------------------------------------------------- the subject


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
        return self.key("weight") or self.key("weight_packed")

    @property
    def stem(self) -> str:
        """The module's name in the checkpoint, for messages."""
        first = next(iter(self.leaves.values()))[0]
        return first.rpartition(".")[0]


class Subject:
    """A checkpoint, prepared for the rules; everything is computed once, in time linear in the names."""

    def __init__(
        self,
        folder: Folder,
        *,
        backbone: Backbone | str | os.PathLike[str] | None = None,
        ties_file: str | os.PathLike[str] | None = None,
        trust_remote_code: bool = False,
        compare_limit: int = 4 << 30,
    ) -> None:
        self.folder = folder
        self.entries = folder.entries
        self.config = folder.config
        self.compare_limit = compare_limit
        self.bytes_read = 0
        self.notes: list[str] = []
        named = self.config.get("architectures")
        self.architectures = [a for a in named if isinstance(a, str)] if isinstance(named, list) else []
        self.architecture = self.architectures[0] if self.architectures else ""
        self.backbone: Backbone = (
            backbone if isinstance(backbone, Backbone) else Backbone.of(self.architecture, backbone)
        )
        self.class_problem: str | None = None
        try:
            self.ties: TieMap | None = TieMap.resolve(
                folder.root,
                self.config,
                keys=self.entries,
                ties_file=None if ties_file is None else Path(ties_file),
                trust_remote_code=trust_remote_code,
            )
        except TierewriteError as e:
            if ties_file is not None:
                raise
            self.ties, self.class_problem = None, str(e)

    # -- names

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
        if self.model is None:
            return {}
        plain: dict[str, str] = {}
        for key in self.entries:
            plain[f"{key.removesuffix('_packed')}" if key.endswith(".weight_packed") else key] = key
        return {plain[name]: place for name, place in places(self.model, plain).items()}

    @cached_property
    def canonical(self) -> dict[str, str]:
        """Parameter in memory -> the parameter that it is tied to."""
        return {} if self.ties is None else {t.alias: t.canonical for t in self.ties.ties}

    @cached_property
    def families(self) -> tuple[str, ...]:
        return formats.detect(self.config, self.folder.quant_config, self.entries)

    # -- modules

    @cached_property
    def quantized(self) -> dict[str, Module]:
        """Modules whose weight on disk is quantized: packed or FP8, or with a scale beside it."""
        return {name: m for name, m in self.modules.items() if self._is_quantized(m)}

    def _is_quantized(self, module: Module) -> bool:
        if any(leaf in module.leaves for leaf in ("weight_packed", "weight_scale", "weight_scale_2", "qweight")):
            return True
        key = module.key("weight")
        return key is not None and self.entries[key].dtype not in FLOATS and len(self.entries[key].shape) == 2

    def size(self, key: str) -> tuple[int, ...] | None:
        """The unquantized shape of the weight `key`, by the model class; None where that is not known."""
        place = self.places.get(key)
        if place is None or self.model is None:
            return None
        parameter, part = place
        shape = self.model.shapes[parameter]
        if part == WHOLE:
            return shape
        if part[0] == "expert" and len(shape) == 3:
            stem = parameter.rpartition(".")[2]
            count = len(self.projections(stem)) if part[1] != stem else 1
            return shape[1] // count, shape[2]
        return None

    @staticmethod
    def projections(fused: str) -> tuple[str, ...]:
        """The modules that exporters unpack a fused parameter into: gate_up_proj -> gate_proj, up_proj."""
        words = fused.split("_")
        return tuple(f"{word}_{words[-1]}" for word in words[:-1]) if len(words) > 2 else (fused,)

    # -- completeness

    def missing(self) -> tuple[list[str], list[str], list[str]]:
        """What the model class has and no key fills: (parameters, shards of fused projections of which others are
        there, experts without any weight). Parameters that are one to the consumer are filled together.
        """
        assert self.model is not None
        shapes = self.model.shapes
        filled: dict[str, dict[Part, str]] = {}
        for key, (parameter, part) in self.places.items():
            filled.setdefault(self._group(parameter), {})[part] = key
        wanted: dict[str, str] = {}
        for parameter in shapes:
            wanted.setdefault(self._group(parameter), self.canonical.get(parameter, parameter))
        plain: list[str] = []
        lacking: dict[str, dict[int, list[str]]] = {}  # container -> expert -> missing weights
        present: dict[str, set[int]] = {}  # container -> experts that have some weight
        for group, parameter in wanted.items():
            parts = filled.get(group, {})
            if not parts and not self.backbone.passes_over(self.backbone.map(parameter)):
                plain.append(parameter)
            unpacked = {p for p in parts if p and p[0] == "expert"}
            if WHOLE in parts or not unpacked:
                continue
            container, _, stem = parameter.rpartition(".")
            _, projection, leaf, _ = next(iter(unpacked))
            for number in range(shapes[parameter][0]):
                for name in (stem,) if projection == stem else self.projections(stem):
                    if ("expert", name, leaf, number) in unpacked:
                        present.setdefault(container, set()).add(number)
                    else:
                        full = f"{container}.{number}.{name}.{leaf}"
                        lacking.setdefault(container, {}).setdefault(number, []).append(full)
        gone: list[str] = []
        for container, experts in lacking.items():
            for number, names in experts.items():
                if number in present.get(container, ()):
                    plain.extend(names)
                else:
                    gone.append(f"{container}.{number}")
        shards = [name for name in plain if name.endswith(".weight") and self._partner_there(name)]
        apart = set(shards)
        return [name for name in plain if name not in apart], shards, gone

    def _group(self, parameter: str) -> str:
        """What the consumer has one parameter for."""
        return self.backbone.map(self.canonical.get(parameter, parameter))

    def _partner_there(self, name: str) -> bool:
        """Another shard of the fused parameter that `name` is a part of is on disk."""
        parent, _, projection = self.backbone.map(name.rpartition(".")[0]).rpartition(".")
        for shards in self.backbone.fused.values():
            if projection in shards:
                modules = (self.modules.get(f"{parent}.{x}") for x in shards if x != projection)
                return any(m is not None and m.weight is not None for m in modules)
        return False

    # -- bytes

    def read(self, keys: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """The bytes of `keys`, in batches of at most some 64 MiB."""
        checkpoint = self.folder.as_checkpoint()
        batch: list[str] = []
        size = 0
        ordered = sorted(keys, key=lambda k: (self.entries[k].shard, self.entries[k].start))
        for key in ordered:
            batch.append(key)
            size += self.entries[key].nbytes
            if size >= _BATCH:
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
            if alike and first.nbytes * len(group) <= _BATCH // 4 and spent <= self.compare_limit:
                batch.append(group)
                size += first.nbytes * len(group)
                if size >= _BATCH:
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


SCALE_ENDINGS = ("_scale", "_scale_2", "_scale_inv")  # weight_global_scale, k_scale, input_scale, ...
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1"}


def numbers(dtype: str, data: bytes) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Values of F64, F32, F16, BF16 or F8_E4M3 bytes as float64, exact."""
    raw = np.frombuffer(data, dtype=_NUMPY[dtype])
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype == "F8_E4M3":
        return _e4m3()[raw]
    with np.errstate(invalid="ignore"):
        return raw.astype(np.float64)


@lru_cache(maxsize=1)
def _e4m3() -> np.ndarray[Any, np.dtype[np.float64]]:
    """The 256 values of OCP E4M3 (OFP8, section 5.2): bias 7, no infinities, 0x7F and 0xFF are NaN."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, (code & 7) / 8.0
    value = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7.0))
    value = np.where((code & 0x7F) == 0x7F, np.nan, value)
    return np.where(code & 0x80, -value, value)


def rounded_to_e4m3(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which values E4M3 holds exactly."""
    return np.isin(values, _e4m3()[~np.isnan(_e4m3())])
