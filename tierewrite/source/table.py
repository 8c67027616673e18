"""What a checkpoint holds, as far as headers tell: tensors, shards, side files. Data only."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tierewrite.stores.places import FilePath
from tierewrite.stores.remote import RemotePath

INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
QUANT_CONFIG_NAME = "hf_quant_config.json"
"""ModelOpt's, beside config.json."""
CONFIG_NAMES = (CONFIG_NAME, QUANT_CONFIG_NAME)
"""What says how a checkpoint is quantized: a rewrite may change these, and `Checkpoint` holds them."""
MANIFEST_NAME = "tierewrite.json"
STAGING_MARK_NAME = ".tierewrite-staging.json"
"""Stands in a folder of this machine for as long as a rewrite stages its output there."""
INCOMPLETE_NAME = "tierewrite.incomplete.json"
"""Stands in a store that cannot rename for as long as a rewrite writes there; the index comes last."""

DTYPE_BITS: Mapping[str, int] = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits an element takes, for the dtypes that safetensors 0.8 knows. A dtype may be missing here: use `.get`."""


class TensorEntry(NamedTuple):
    """One tensor: its name and where its bytes are.

    Attributes:
        name: the key in the checkpoint.
        dtype: as the header spells it (`BF16`, `F8_E4M3`, ...); possibly one that is not in DTYPE_BITS.
        shape: () for a scalar.
        shard: position of its file in `Checkpoint.shards`.
        start, end: byte range in that file, absolute, end exclusive.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.end - self.start


Kind = tuple[str, tuple[int, ...]]
"""A dtype and a shape: what a header says of a tensor besides its name and place."""


class Names(Collection[str]):
    """The keys of a checkpoint as a table: a row each, split around their last dot.

    A million names share few leaves, and a few make a module: who looks at all names asks these columns.

    Attributes:
        names: row -> key.
        modules, leaves: the two halves of the names around their last dot, each once, with their numbers. A name
            without a dot (or with none but its first character) is a leaf of the module "": so a name is always
            `f"{module}.{leaf}"`, or its leaf alone where the module is "".
        module, leaf: int32 [rows], the numbers of a row's halves in `modules` and `leaves`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    @cached_property
    def row(self) -> dict[str, int]:
        """Key -> row."""
        return dict(zip(self.names, range(len(self.names)), strict=True))

    @cached_property
    def _halves(self) -> tuple[dict[str, int], dict[str, int], np.ndarray, np.ndarray]:
        modules: dict[str, int] = {}
        leaves: dict[str, int] = {}
        module: list[int] = []
        leaf: list[int] = []
        for name in self.names:
            parent, _, rest = name.rpartition(".")
            module.append(modules.setdefault(parent, len(modules)))
            leaf.append(leaves.setdefault(rest if parent else name, len(leaves)))
        return modules, leaves, np.array(module, np.int32), np.array(leaf, np.int32)

    @property
    def modules(self) -> dict[str, int]:
        """Module -> number, in order of their numbers."""
        return self._halves[0]

    @cached_property
    def leaves(self) -> list[str]:
        """Number -> leaf."""
        return list(self._halves[1])

    @property
    def module(self) -> np.ndarray:
        """int32 [rows], the number of its module in `modules`."""
        return self._halves[2]

    @property
    def leaf(self) -> np.ndarray:
        """int32 [rows], the number of its leaf in `leaves`."""
        return self._halves[3]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.row


def as_names(keys: Collection[str]) -> Names:
    """The table of `keys`, in their order; `keys` themselves where they are one."""
    return keys if isinstance(keys, Names) else Names(list(keys))


class Tensors(Names, Mapping[str, TensorEntry]):
    """The tensors of a checkpoint as a table: a row each, ordered by shard, then offset.

    Stages that look at all tensors ask the columns; `tensors[name]` makes one `TensorEntry` for whoever asks for one.

    Attributes, besides those of `Names`:
        shard: int32 [rows], position of its file in `Checkpoint.shards`.
        start, end: int64 [rows], byte range in that file, absolute, end exclusive.
        kind: int32 [rows], position of its dtype and shape in `kinds`.
        kinds: the dtypes and shapes that occur, each once.
    """

    def __init__(
        self,
        names: Sequence[str],
        shard: np.ndarray,
        start: np.ndarray,
        end: np.ndarray,
        kind: np.ndarray,
        kinds: Sequence[Kind],
    ) -> None:
        super().__init__(names)
        self.shard = shard
        self.start = start
        self.end = end
        self.kind = kind
        self.kinds = tuple(kinds)

    @classmethod
    def of(cls, entries: Iterable[TensorEntry]) -> Tensors:
        """The table of `entries`, in their order."""
        rows = list(entries)
        number: dict[Kind, int] = {}
        kind = [number.setdefault((entry.dtype, entry.shape), len(number)) for entry in rows]
        return cls(
            [entry.name for entry in rows],
            np.array([entry.shard for entry in rows], np.int32),
            np.array([entry.start for entry in rows], np.int64),
            np.array([entry.end for entry in rows], np.int64),
            np.array(kind, np.int32),
            tuple(number),
        )

    @classmethod
    def concatenated(cls, tables: Sequence[Tensors]) -> Tensors:
        """The rows of all `tables`, at least one, in their order."""
        number: dict[Kind, int] = {}
        kind = [
            np.array([number.setdefault(kind, len(number)) for kind in table.kinds], np.int32)[table.kind]
            for table in tables
        ]
        return cls(
            [name for table in tables for name in table.names],
            np.concatenate([table.shard for table in tables]),
            np.concatenate([table.start for table in tables]),
            np.concatenate([table.end for table in tables]),
            np.concatenate(kind),
            tuple(number),
        )

    def where(self, wanted: np.ndarray) -> Tensors:
        """The rows for which `wanted`, bool [rows], is true."""
        numbers, kind = np.unique(self.kind[wanted], return_inverse=True)
        return Tensors(
            list(compress(self.names, wanted)),
            self.shard[wanted],
            self.start[wanted],
            self.end[wanted],
            kind.astype(np.int32),
            [self.kinds[number] for number in numbers],
        )

    def in_shard(self, number: int) -> Tensors:
        """The same rows, of the shard of that number."""
        shard = np.full(len(self), number, np.int32)
        return Tensors(self.names, shard, self.start, self.end, self.kind, self.kinds)

    def named(self, names: Sequence[str]) -> Tensors:
        """The same rows under other `names`, one a row."""
        return Tensors(names, self.shard, self.start, self.end, self.kind, self.kinds)

    @property
    def total_bytes(self) -> int:
        """Sum of all tensors' bytes, exact even where 64 bits do not hold it (files may have holes)."""
        nbytes = self.nbytes
        return (int((nbytes >> 32).sum()) << 32) + int((nbytes & 0xFFFFFFFF).sum())

    @property
    def nbytes(self) -> np.ndarray:
        """int64 [rows], bytes of data."""
        size: np.ndarray = self.end - self.start
        return size

    def entry(self, row: int) -> TensorEntry:
        """One row."""
        dtype, shape = self.kinds[self.kind[row]]
        return TensorEntry(
            self.names[row], dtype, shape, int(self.shard[row]), int(self.start[row]), int(self.end[row])
        )

    def __getitem__(self, name: str) -> TensorEntry:
        return self.entry(self.row[name])

    def __repr__(self) -> str:
        return f"<{len(self):,} tensors, {self.total_bytes:,} bytes>"

    def __reduce__(self) -> tuple[Any, ...]:
        return Tensors, (self.names, self.shard, self.start, self.end, self.kind, self.kinds)


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file.

    Attributes:
        name: file name in the checkpoint folder.
        path: the regular file it leads to, links resolved; or the remote file.
        size, mtime_ns, inode, ctime_ns: of that file when its header was read (bytes, ns); to notice a change.
        version: of a remote file, for the same.
        data_start: offset of the first data byte.
        metadata: its `__metadata__`.
        header_digest: BLAKE3 of its first `data_start` bytes (length and JSON), in hex; "" where only huggingface_hub
            has seen them.
    """

    name: str
    path: FilePath
    size: int
    mtime_ns: int
    inode: int
    data_start: int
    metadata: Mapping[str, str]
    ctime_ns: int = 0
    version: str = ""
    header_digest: str = ""


Header = tuple[Shard, Tensors]
"""What the header of one file says."""


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file that is carried along unchanged.

    Attributes:
        name: its POSIX path below the root.
        path: the regular file it leads to, links resolved; or the remote file.
        size, mtime_ns, inode, ctime_ns: of that file when it was listed (bytes, ns); to notice a change.
        version: of a remote file, for the same.
    """

    name: str
    path: FilePath
    size: int
    mtime_ns: int
    version: str = ""
    inode: int = 0
    ctime_ns: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, as far as headers, index and configurations tell.

    Attributes:
        root: the folder, resolved.
        shards: the files whose tensors count, in natural order of their names.
        tensors: by name, ordered by shard, then offset.
        index_metadata: the index's `metadata` ({} if it has none); None without an index.
        side_files: everything else but the index and an old manifest, sorted by name; links as the files they lead to.
        directories: the folders below the root, empty ones too, sorted.
        config, quant_config: config.json and hf_quant_config.json, {} where absent.
        warnings: sentences for the report.
        origin: the remote folder, if it is one; `root` then holds copies of its index and configurations alone.
        copies: who removes these once nobody needs them.
    """

    root: Path
    shards: tuple[Shard, ...]
    tensors: Tensors
    index_metadata: dict[str, Any] | None
    side_files: tuple[SideFile, ...]
    directories: tuple[str, ...]
    config: dict[str, Any]
    quant_config: dict[str, Any]
    warnings: tuple[str, ...]
    origin: RemotePath | None = None
    copies: object = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, root: Path, shards: tuple[Shard, ...], tensors: Mapping[str, TensorEntry]) -> Checkpoint:
        """Shards and tensors alone: enough to read from."""
        table = tensors if isinstance(tensors, Tensors) else Tensors.of(tensors.values())
        return cls(root, shards, table, None, (), (), {}, {}, ())

    @property
    def place(self) -> Path | RemotePath:
        """Where it is, for messages."""
        return self.origin or self.root

    @property
    def total_bytes(self) -> int:
        """Sum of all tensors' bytes."""
        return self.tensors.total_bytes
