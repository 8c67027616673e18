"""What the weights of a checkpoint hold, tensor by tensor: read once, in pieces, as fast as the disk gives them.

Every tensor whose dtype can be decoded is read in pieces of whole rows; of each row only the largest magnitude is kept
(`numbers/extremes.py`). What follows from it is for `value_rules.py` to say. Memory does not grow with the tensors: a
buffer a thread, and a few bytes a row.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tierewrite import formats, interrupts
from tierewrite.consumers.folder import Folder
from tierewrite.formats.nvfp4_blobs import blob_of
from tierewrite.numbers.arithmetic import device_arrays, host_buffer
from tierewrite.numbers.extremes import LAYOUTS, Extremes, Magnitudes, extremes, values_of
from tierewrite.source.bytes import open_source, runs_of
from tierewrite.source.table import Shard, TensorEntry
from tierewrite.source.threads import io_threads

PIECE = 16 << 20
"""Bytes that are read at a time, unless a single row has more."""
_PIECES_FOR_GPU = 4
"""For a GPU so many times as much is read: starting work there costs the same for much as for little."""
_ALONE = 1 << 17
"""Bytes of a piece that a CPU looks at alone."""


@dataclass(frozen=True, slots=True)
class Values:
    """What one tensor holds.

    Attributes:
        entry: its header.
        kind: how its elements were read: one of `LAYOUTS`.
        matrices: of fused experts how many matrices it has; else 1.
        largest: [rows], the largest magnitude of each row along the last dimension, as bits.
        at_limit, at_bottom: elements at the limits of an 8-bit float scale.
    """

    entry: TensorEntry
    kind: str
    matrices: int
    largest: Magnitudes
    at_limit: int
    at_bottom: int

    @property
    def elements(self) -> int:
        """How many it has."""
        return math.prod(self.entry.shape)

    def zero_rows(self) -> npt.NDArray[np.bool_]:
        """bool [rows], whether all of a row is zero."""
        zeros: npt.NDArray[np.bool_] = self.largest == LAYOUTS[self.kind].zero
        return zeros

    def not_finite(self) -> tuple[int, int]:
        """How many rows hold a NaN, and how many others an infinity."""
        layout = LAYOUTS[self.kind]
        if layout.infinity == layout.limit:
            return int(np.count_nonzero(self.largest > layout.limit)), 0
        return (
            int(np.count_nonzero(self.largest > layout.infinity)),
            int(np.count_nonzero(self.largest == layout.infinity)),
        )

    def spread(self) -> npt.NDArray[np.float64]:
        """[matrices], the median of the largest magnitudes of the rows that are not zero; 0.0 where all are.

        Before any scale is applied.
        """
        rows = values_of(self.largest, self.kind).reshape(self.matrices, -1)
        return np.array([float(np.median(some)) if len(some := one[one > 0]) else 0.0 for one in rows])


def kind_of(entry: TensorEntry, entries: Mapping[str, TensorEntry]) -> str | None:
    """How the elements of a tensor are read; None where nothing can be said of them.

    Integers are weights or indices: of I8 only what is a weight by its name; of U8 only the codes of NVFP4.
    """
    if entry.dtype == "U8":
        module, parts = blob_of(entry.name, entries)
        return "E2M1" if parts is not None and entry.name == f"{module}.{parts[0]}" else None
    if entry.dtype == "I8":
        part = formats.part_of_weight(entry.name)
        return "I8" if part is not None and part[1].main else None
    return entry.dtype if entry.dtype in LAYOUTS else None


def sampled(entries: Mapping[str, TensorEntry], kinds: Mapping[str, str], count: int | None) -> list[str]:
    """The tensors to read: all that can be; or `count` weights at even distances, with the scales beside them."""
    if count is None:
        return list(kinds)
    weights = [name for name in kinds if len(entries[name].shape) > 1]
    step = max(1.0, len(weights) / max(1, count))
    chosen = [weights[int(number * step)] for number in range(min(count, len(weights)))]
    modules = {name.rpartition(".")[0] for name in chosen}
    beside = [name for name in kinds if name.rpartition(".")[0] in modules and formats.is_companion(leaf_of(name))]
    return list(dict.fromkeys((*chosen, *beside)))


def leaf_of(name: str) -> str:
    """The last word of a key."""
    return name.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of one tensor: bytes `start` to `end` of its file."""

    name: str
    start: int
    end: int
    columns: int


def read_values(
    folder: Folder,
    names: Collection[str],
    kinds: Mapping[str, str],
    *,
    device: str = "auto",
    advance: Callable[[int], None] | None = None,
) -> dict[str, Values]:
    """What the tensors `names` hold.

    Args:
        folder: where they are.
        kinds: name -> how it is read.
        device: "cpu", "cuda", or "auto": a GPU that works.
        advance: called with numbers of bytes as they are read.

    Raises:
        SourceChanged, SystemFailure: reading failed. Interrupted: a signal arrived.
    """
    xp = device_arrays(device)
    batches = list(_batches(folder, names, kinds, PIECE if xp is np else _PIECES_FOR_GPU * PIECE))
    found: dict[str, list[Extremes]] = {name: [] for name in names}
    buffers = threading.local()
    with ThreadPoolExecutor(io_threads(), thread_name_prefix="tierewrite-values") as pool:
        jobs = [pool.submit(_read, folder.shards[shard], pieces, kinds, xp, buffers) for shard, pieces in batches]
        try:
            for (_, pieces), job in zip(batches, jobs, strict=True):
                interrupts.check()
                for piece, one in zip(pieces, job.result(), strict=True):
                    found[piece.name].append(one)
                if advance is not None:
                    advance(sum(piece.end - piece.start for piece in pieces))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return {name: _joined(folder.entries[name], kinds[name], parts) for name, parts in found.items() if parts}


def _joined(entry: TensorEntry, kind: str, parts: list[Extremes]) -> Values:
    whole = Extremes.joined(parts)
    matrices = entry.shape[0] if len(entry.shape) == 3 else 1
    if matrices and len(whole.largest) % matrices:
        matrices = 1
    at_limit, at_bottom = (0 if n is None else int(n.sum()) for n in (whole.at_limit, whole.at_bottom))
    return Values(entry, kind, max(1, matrices), whole.largest, at_limit, at_bottom)


def _batches(
    folder: Folder, names: Iterable[str], kinds: Mapping[str, str], most: int
) -> Iterator[tuple[int, list[_Piece]]]:
    """What is read at a time, in the order of the files: a shard's number, and pieces of `most` bytes in all."""
    entries = sorted((folder.entries[name] for name in names), key=lambda entry: (entry.shard, entry.start))
    batch: list[_Piece] = []
    shard, size = -1, 0
    for entry in entries:
        for piece in _pieces(entry, kinds[entry.name], most):
            nbytes = piece.end - piece.start
            if batch and (entry.shard != shard or size + nbytes > most):
                yield shard, batch
                batch, size = [], 0
            shard = entry.shard
            batch.append(piece)
            size += nbytes
    if batch:
        yield shard, batch


def _pieces(entry: TensorEntry, kind: str, most: int) -> Iterator[_Piece]:
    """A tensor in pieces of whole rows along its last dimension; a vector is one row."""
    columns = entry.shape[-1] if entry.shape else 1
    row = columns * LAYOUTS[kind].raw().itemsize
    if kind == "E2M1":
        row = columns = entry.nbytes // math.prod(entry.shape[:-1]) if math.prod(entry.shape) else 0
    if not row or not entry.nbytes or entry.nbytes % row:
        return
    step = max(1, most // row) * row
    for start in range(entry.start, entry.end, step):
        yield _Piece(entry.name, start, min(entry.end, start + step), columns)


def _read(
    shard: Shard, pieces: list[_Piece], kinds: Mapping[str, str], xp: Any, buffers: threading.local
) -> list[Extremes]:
    """The extremes of some pieces, read at once into a buffer that the thread keeps."""
    ends = np.cumsum([piece.end - piece.start for piece in pieces]).tolist()
    if getattr(buffers, "data", None) is None or len(buffers.data) < ends[-1]:
        buffers.data = host_buffer(xp, max(ends[-1], PIECE))
    data = buffers.data[: ends[-1]]
    with open_source(shard) as file:
        file.read_runs(runs_of((piece.start, piece.end) for piece in pieces), data.data)
    data = xp.asarray(data)
    views = [data[end - (piece.end - piece.start) : end] for piece, end in zip(pieces, ends, strict=True)]
    # A call costs more than a few kilobytes: small pieces of one form are looked at together, on a GPU all of them.
    alike: dict[tuple[Any, ...], list[int]] = {}
    for at, piece in enumerate(pieces):
        alone = xp is np and len(views[at]) >= _ALONE
        count = kinds[piece.name] == "F8_E4M3" and _is_scale(piece.name)
        alike.setdefault((kinds[piece.name], piece.columns, count, at if alone else -1), []).append(at)
    found: dict[int, Extremes] = {}
    for (kind, columns, count, _), members in alike.items():
        part = _together([views[at] for at in members], xp, LAYOUTS[kind].raw().itemsize)
        rows = [len(views[at]) // (columns * LAYOUTS[kind].raw().itemsize) for at in members]
        found.update(zip(members, extremes(part, kind, columns, count=count).split(rows), strict=True))
    return [found[at] for at in range(len(pieces))]


def _together(views: list[Any], xp: Any, itemsize: int) -> Any:
    """The bytes of all views one after the other, at an address for elements of `itemsize` bytes."""
    if len(views) > 1:
        return xp.concatenate(views)
    address = views[0].ctypes.data if xp is np else views[0].data.ptr
    return views[0].copy() if address % itemsize else views[0]  # behind a neighbour of another dtype


def _is_scale(name: str) -> bool:
    return formats.is_companion(leaf_of(name))
