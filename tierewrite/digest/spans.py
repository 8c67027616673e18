"""What a buffer holds: spans of tensors, the rule by which a tensor is cut over buffers, and the book kept on them.

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


def checked(spans: Sequence[Row] | Columns, size: int | Columns) -> Columns:
    """Spans as int64 (n, 5), each of which lies in its buffer and is cut where it may be.

    Args:
        spans: tuples in the order of Span's fields, or int64 (n, 5).
        size: bytes of their buffer; int64 (n,) if they lie in several.

    Raises:
        ValueError: one does not.
    """
    rows: Columns = np.asarray(spans, np.int64).reshape(-1, 5)
    start, length, total, position = rows.T[1:]
    end = position + length
    negative = (start | length | total | position) < 0  # the sign bit of one is the sign bit of all
    outside = negative | (start + length > size) | (end > total)
    if outside.any():
        first = int(outside.argmax())
        room = np.broadcast_to(size, len(rows))[first]
        raise ValueError(f"{Span(*rows[first].tolist())} does not lie in its buffer of {room} bytes")
    is_cut = length != total
    if is_cut.any():
        elsewhere = is_cut & ((length == 0) | ((length % PIECE != 0) & (end != total)))
        if elsewhere.any():
            span = Span(*rows[int(elsewhere.argmax())].tolist())
            raise ValueError(f"{span}: a tensor may be cut at multiples of {PIECE} bytes only")
    return rows


def pieces(spans: Columns) -> Columns:
    """Spans of at most PIECE bytes in place of longer ones; int64 (n, 5) both."""
    count = -(-spans[:, 2] // PIECE)
    found: Columns = np.repeat(spans, count, axis=0)
    past = (np.arange(len(found)) - np.repeat(np.cumsum(count) - count, count)) * PIECE
    found[:, 1] += past
    found[:, 2] = np.minimum(PIECE, found[:, 2] - past)
    found[:, 4] += past
    return found


class Ledger:
    """All that was handed over, to see at the end that every tensor came whole, once, and in its order."""

    def __init__(self) -> None:
        self._entered: list[Columns] = []

    def enter(self, spans: Columns) -> None:
        """Spans in the order of their arrival; they must not be changed afterwards."""
        self._entered.append(spans)

    def close(self) -> None:
        """Raises ValueError if a tensor came in another order than its own, twice, or without its end."""
        rows = np.concatenate([np.empty((0, 5), np.int64), *self._entered])
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        tensor, _, length, total, position = np.ascontiguousarray(rows.T)
        end = position + length
        same = np.zeros(len(rows), bool)  # the span before is of the same tensor
        same[1:] = tensor[1:] == tensor[:-1]
        expected = np.where(same, np.roll(end, 1), 0)
        ended = same & (np.roll(end == total, 1))
        wrong = ended | (position != expected) | (same & (np.roll(total, 1) != total))
        if wrong.any():
            at = int(wrong.argmax())
            span = Span(*rows[at].tolist())
            if ended[at]:
                raise ValueError(f"tensor {span.tensor} was handed over twice")
            raise ValueError(
                f"{span} out of order: byte {expected[at]} of {span.total} is the next of tensor {span.tensor}"
            )
        last = np.ones(len(rows), bool)
        last[:-1] = ~same[1:]
        open_ = last & (end != total)
        if open_.any():
            at = int(open_.argmax())
            raise ValueError(f"tensor {tensor[at]} ended at byte {end[at]} of {total[at]}")


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
