"""What a buffer holds: spans of tensors, the rule by which a tensor is cut over buffers, and the book kept on it.

Refuses (ValueError) spans outside their buffer, cuts elsewhere than at multiples of PIECE, pieces out of order,
tensors handed over twice and tensors that never came to their end. Knows nothing of hashing or of devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

CHUNK = 1024
"""Bytes of a BLAKE3 chunk, the leaf of its tree (BLAKE3 specification, section 2.1)."""

PIECE = 1 << 20
"""Bytes. A tensor that does not fit into what is left of a buffer may be cut at multiples of this, counted from
the tensor's first byte. A power of two of chunks, so each piece is a whole subtree of BLAKE3's tree."""

Bytes = npt.NDArray[np.uint8]
Columns = npt.NDArray[np.int64]
Row = tuple[int, int, int, int, int]
"""The fields of a `Span`, in their order: a plain tuple costs a fraction of a named one."""


class Span(NamedTuple):
    """`length` bytes of a tensor, at `start` of a buffer.

    Attributes:
        tensor: the caller's number for the tensor, unique within a stream.
        start: first byte in the buffer; any alignment.
        length: bytes here: all of the tensor, or a multiple of PIECE, or the tensor's end.
        total: bytes of the whole tensor.
        position: which byte of the tensor comes first here.
    """

    tensor: int
    start: int
    length: int
    total: int
    position: int


def cut(remaining: int, room: int) -> int:
    """How many of a tensor's `remaining` bytes go into a buffer that has `room` bytes left.

    All of them if they fit; else the largest multiple of PIECE that does; 0 asks for a new buffer.
    """
    return remaining if remaining <= room else room // PIECE * PIECE


def layout(lengths: Iterable[int], buffer_size: int) -> Iterator[list[Span]]:
    """Spans that put tensors of these lengths one after the other into buffers of `buffer_size` bytes.

    Tensors are numbered from 0 in the order given; one list of spans is one buffer.
    """
    if buffer_size < PIECE:
        raise ValueError(f"a buffer of {buffer_size} bytes is too small: at least {PIECE} are needed")
    spans: list[Span] = []
    filled = 0
    for tensor, total in enumerate(lengths):
        position = 0
        while True:
            take = cut(total - position, buffer_size - filled)
            if take or total == 0:
                spans.append(Span(tensor, filled, take, total, position))
                filled += take
                position += take
            if position == total:
                break
            yield spans
            spans, filled = [], 0
    if spans:
        yield spans


class Ledger:
    """Checks the spans of each buffer on arrival, and that every tensor has come whole by the end."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._open: dict[int, tuple[int, int]] = {}  # tensor -> (bytes so far, bytes in all)

    def take(self, spans: Sequence[Row] | Columns, size: int | Columns) -> tuple[list[Row], list[Row]]:
        """Enters spans, each of a buffer of `size` bytes (one for all of them, or int64 (n,)).

        Returns:
            The spans that are whole tensors, and the pieces, as tuples in the order of Span's fields.
        """
        rows = np.asarray(spans, np.int64).reshape(-1, 5)
        tensor, start, length, total, position = rows.T
        outside = (rows[:, 1:] < 0).any(axis=1) | (start + length > size) | (position + length > total)
        if outside.any():
            first = int(outside.argmax())
            room = np.broadcast_to(size, len(rows))[first]
            raise ValueError(f"{Span(*rows[first].tolist())} does not lie in its buffer of {room} bytes")
        whole = length == total
        for number in tensor[whole].tolist():
            if number in self._seen:
                raise ValueError(f"tensor {number} was handed over twice")
            self._seen.add(number)
        pieces = rows[~whole].tolist()
        for piece in pieces:
            self._piece(Span(*piece))
        return rows[whole].tolist(), pieces

    def _piece(self, piece: Span) -> None:
        if piece.tensor not in self._open:
            if piece.tensor in self._seen:
                raise ValueError(f"tensor {piece.tensor} was handed over twice")
            self._seen.add(piece.tensor)
            self._open[piece.tensor] = (0, piece.total)
        done, total = self._open[piece.tensor]
        if (done, total) != (piece.position, piece.total):
            raise ValueError(f"{piece} out of order: byte {done} of {total} is the next of tensor {piece.tensor}")
        end = piece.position + piece.length
        if piece.length == 0 or (piece.length % PIECE and end != total):
            raise ValueError(f"{piece}: a tensor may be cut at multiples of {PIECE} bytes only")
        if end == total:
            del self._open[piece.tensor]
        else:
            self._open[piece.tensor] = (end, total)

    def close(self) -> None:
        """Raises ValueError if a tensor lacks its end."""
        for tensor, (done, total) in self._open.items():
            raise ValueError(f"tensor {tensor} ended at byte {done} of {total}")


def host_bytes(data: object) -> Bytes:
    """The bytes of a host object, in row-major order: bytes-like, NumPy array of any dtype, or torch CPU tensor.

    No copy unless the data are not contiguous.
    """
    if isinstance(data, (np.ndarray, np.generic)):
        array = np.asarray(data)
    elif type(data).__module__.partition(".")[0] == "torch":
        import torch

        assert isinstance(data, torch.Tensor)
        # through uint8: NumPy has no name for bfloat16 and the 8-bit floats
        array = data.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    else:
        array = np.frombuffer(memoryview(data).cast("B"), np.uint8) if len(data) else np.empty(0, np.uint8)  # type: ignore[arg-type]
    flat: Bytes = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return flat
