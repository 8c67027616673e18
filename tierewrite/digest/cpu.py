"""BLAKE3 on the CPU, by the `blake3` package.

Small tensors are spread over threads, large ones over the package's own threads; it lets go of the interpreter
lock while it hashes. Refuses nothing but spans that break the rules of `spans`.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from blake3 import blake3

from tierewrite.digest.spans import PIECE, Bytes, Columns, Ledger, Row, checked, host_bytes
from tierewrite.source.threads import usable_cpus

_LARGE = 4 << 20
"""Bytes from which one tensor is worth all threads; below, tensors are dealt out to threads whole."""
_INLINE = 256 << 10
"""Bytes of a batch under which handing it to other threads costs more than it brings."""


class _Done:
    """The ticket of work done within the call."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return None


class CpuDigester:
    """BLAKE3 by the `blake3` package; see `tierewrite.digest.Digester`.

    Args:
        threads: how many may hash at once; 1 hashes in the calling thread alone; None takes all it may run on.
        why: why it is not a GPU, for the description.
    """

    device = "cpu"

    def __init__(self, threads: int | None = None, *, why: str | None = None) -> None:
        self.threads = usable_cpus() if threads is None else max(1, threads)
        # one thread: whoever calls has threads of its own, and that many hash
        of = f", {self.threads} threads" if self.threads > 1 else ""
        self.description = f"CPU{of}" + (f" ({why})" if why else "")
        self._pool: ThreadPoolExecutor | None = None

    @property
    def parallelism(self) -> int:
        """The `max_threads` of the blake3 package for one large tensor."""
        return 1 if self.threads == 1 else blake3.AUTO

    def digest(self, data: object) -> bytes:
        """See `Digester`."""
        view = host_bytes(data).data
        return self._one(view) if len(view) >= _LARGE else blake3(view).digest()

    def digest_many(self, data: object, spans: Iterable[tuple[int, int]]) -> list[bytes]:
        """See `Digester`."""
        view = host_bytes(data).data
        ranges = list(spans)
        for start, length in ranges:
            if start < 0 or length < 0 or start + length > len(view):
                raise ValueError(f"bytes {start} to {start + length} leave a buffer of {len(view)} bytes")
        return self._views([view[start : start + length] for start, length in ranges])

    def digest_arrays(self, arrays: Iterable[object]) -> list[bytes]:
        """See `Digester`."""
        return self._views([host_bytes(array).data for array in arrays])

    def host_buffer(self, nbytes: int) -> Bytes:
        """See `Digester`."""
        return np.frombuffer(mmap.mmap(-1, max(1, nbytes)), np.uint8)[:nbytes]

    def stream(self, buffer_size: int) -> CpuStream:
        """See `Digester`."""
        return CpuStream(self, buffer_size)

    def _one(self, view: memoryview) -> bytes:
        return blake3(view, max_threads=self.parallelism).digest()

    def _views(self, views: Sequence[memoryview]) -> list[bytes]:
        if self.threads == 1 or sum(map(len, views)) < _INLINE:
            return [blake3(view).digest() for view in views]
        sizes = np.array([len(view) for view in views], dtype=np.int64)
        digests: list[bytes] = [b""] * len(views)
        for i in np.flatnonzero(sizes >= _LARGE).tolist():
            digests[i] = self._one(views[i])
        small = np.flatnonzero(sizes < _LARGE)
        if not len(small):
            return digests
        # contiguous shares of about equal cost; the constant stands for the call itself, about 1 us
        cost = np.cumsum(sizes[small] + 2048)
        ends = np.searchsorted(cost, cost[-1] * np.arange(1, self.threads) / self.threads)
        shares = np.split(small, ends)

        def work(share: Sequence[int]) -> None:
            for i in share:
                digests[i] = blake3(views[i]).digest()

        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="blake3")
        for future in [self._pool.submit(work, share.tolist()) for share in shares if len(share)]:
            future.result()
        return digests


class CpuStream:
    """Digests of tensors that arrive buffer by buffer; see `tierewrite.digest.Stream`. `update` hashes at once."""

    def __init__(self, digester: CpuDigester, buffer_size: int) -> None:
        if buffer_size < PIECE:
            raise ValueError(f"a buffer of {buffer_size} bytes is too small: at least {PIECE} are needed")
        self.buffer_size = buffer_size
        self._digester = digester
        self._ledger = Ledger()
        self._digests: dict[int, bytes] = {}
        self._hashers: dict[int, blake3] = {}

    def update(self, buffer: Bytes, spans: Sequence[Row] | Columns) -> _Done:
        """See `Stream`."""
        view = host_bytes(buffer).data  # a slice of which costs a third of an array's
        if len(view) > self.buffer_size:
            raise ValueError(f"a buffer of {len(view)} bytes: this stream takes up to {self.buffer_size}")
        rows = checked(spans, len(view))
        self._ledger.enter(rows)
        is_whole = rows[:, 2] == rows[:, 3]
        for tensor, start, length, total, position in rows[~is_whole].tolist():
            hasher = self._hashers.get(tensor)
            if hasher is None:
                hasher = self._hashers[tensor] = blake3(max_threads=self._digester.parallelism)
            hasher.update(view[start : start + length])
            if position + length == total:
                self._digests[tensor] = hasher.digest()
                del self._hashers[tensor]
        whole = rows[is_whole].tolist()
        found = self._digester._views([view[start : start + length] for _, start, length, _, _ in whole])
        self._digests.update(zip([row[0] for row in whole], found, strict=True))
        return _Done()

    def finish(self) -> dict[int, bytes]:
        """See `Stream`."""
        self._ledger.close()
        return self._digests

    def salvage(self) -> dict[int, bytes]:
        """See `Stream`."""
        return dict(self._digests)

    def close(self) -> None:
        """See `Stream`."""
        self._hashers.clear()

    def __enter__(self) -> CpuStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
