"""What a checkpoint holds, as far as headers tell: tensors, shards, side files. Data only."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tierewrite.stores.remote import FilePath, RemotePath

INDEX_NAME = "model.safetensors.index.json"
MANIFEST_NAME = "tierewrite.json"
INCOMPLETE_NAME = "tierewrite.incomplete.json"
"""Stands in a store that cannot rename for as long as a rewrite writes there; the index comes last."""

DTYPE_BITS: Mapping[str, int] = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits an element takes, for the dtypes that safetensors 0.8 knows. A dtype may be missing here: use `.get`.
"""


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """No cyclic garbage collection: it would scan a million young containers over and over, at twice the
    time.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            if not gc.get_freeze_count():
                # What was made meanwhile counts as old from here on: the next allocation would scan it all.
                gc.freeze()
                gc.unfreeze()
            gc.enable()


class TensorEntry(NamedTuple):
    """One tensor: its name and where its bytes are. A named tuple, because half a million dataclasses take
    seconds.

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


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file.

    Attributes:
        name: file name in the checkpoint folder.
        path: the regular file it leads to, links resolved; or the remote file.
        size, mtime_ns, inode, ctime_ns: of that file when its header was read (bytes, ns); to notice a
            change underfoot. `version` is that of a remote file.
        data_start: offset of the first data byte.
        metadata: its `__metadata__`.
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


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file that is carried along unchanged. `name` is its POSIX path below the root, `path` the resolved
    file; a remote one has a `version`.
    """

    name: str
    path: FilePath
    size: int
    mtime_ns: int
    version: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, as far as headers, index and configurations tell.

    Attributes:
        root: the folder, resolved.
        shards: the files whose tensors count, in natural order of their names.
        tensors: by name, ordered by shard, then offset.
        index_metadata: the index's `metadata` ({} if it has none); None without an index.
        side_files: everything else but the index and an old manifest, sorted by name; links as the files they
            lead to.
        directories: the folders below the root, empty ones too, sorted.
        config, quant_config: config.json and hf_quant_config.json, {} where absent.
        warnings: sentences for the report.
        origin: the remote folder, if it is one; `root` then holds copies of its index and configurations alone.
        copies: who removes these once nobody needs them.
    """

    root: Path
    shards: tuple[Shard, ...]
    tensors: dict[str, TensorEntry]
    index_metadata: dict[str, Any] | None
    side_files: tuple[SideFile, ...]
    directories: tuple[str, ...]
    config: dict[str, Any]
    quant_config: dict[str, Any]
    warnings: tuple[str, ...]
    origin: RemotePath | None = None
    copies: object = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, root: Path, shards: tuple[Shard, ...], tensors: dict[str, TensorEntry]) -> Checkpoint:
        """Shards and tensors alone: enough to read from."""
        return cls(root, shards, tensors, None, (), (), {}, {}, ())

    @property
    def place(self) -> Path | RemotePath:
        """Where it is, for messages."""
        return self.origin or self.root

    @property
    def total_bytes(self) -> int:
        """Sum of all tensors' bytes."""
        return sum(entry.end - entry.start for entry in self.tensors.values())
