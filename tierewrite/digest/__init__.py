"""BLAKE3 digests of byte ranges: on the CPU (`cpu`) or on CUDA GPUs (`cuda`), one interface, the same 32 bytes.

The digest is plain BLAKE3, what the `blake3` package and `b3sum` print. `select` picks the implementation; both
answer to `Digester`. Data on the GPU stay there; a checkpoint on disk goes through a `Stream`:

    digester = select("auto")
    with digester.stream(buffer_size) as stream:
        buffer = digester.host_buffer(buffer_size)     # several of these; pinned memory on CUDA
        for each buffer filled:
            ticket = stream.update(buffer[:n], spans)  # returns at once on CUDA
            ...                                        # write from the same buffer meanwhile
            ticket.wait()                              # now the buffer may be filled again
        digests = stream.finish()                      # {tensor: 32 bytes}

A buffer may hold any number of tensors, and a tensor may go over any number of buffers, in order, cut where `cut`
says. Nothing here reads files, and importing this room imports neither CuPy nor torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Protocol

from tierewrite.digest.spans import CHUNK, PIECE, Bytes, Columns, Row, Span, cut, layout
from tierewrite.errors import SystemFailure, UsageError

__all__ = [
    "CHUNK",
    "PIECE",
    "DeviceFailed",
    "Digester",
    "Span",
    "Stream",
    "Ticket",
    "cut",
    "layout",
    "select",
]


class DeviceFailed(SystemFailure):
    """The GPU cannot do it, or no longer: no CuPy, no device, out of memory, driver error, wrong digests.

    After it a stream answers only `salvage` and `close`; what is missing there has to be hashed again, by
    `select("cpu")`, say.
    """


class Ticket(Protocol):
    """A buffer handed to a stream."""

    def done(self) -> bool:
        """Whether the buffer's bytes are no longer needed. False also where the device failed: `wait` says it."""

    def wait(self) -> None:
        """Blocks until the buffer's bytes are no longer needed. Raises DeviceFailed."""


class Stream(Protocol):
    """Digests of tensors that arrive buffer by buffer. A context manager that closes at its end.

    Calls may come from several threads, as long as the pieces of each tensor come in order.
    """

    buffer_size: int

    def update(self, buffer: Bytes, spans: Sequence[Row] | Columns) -> Ticket:
        """Takes the tensors and pieces in a buffer of at most `buffer_size` bytes.

        Args:
            buffer: uint8 (n,), host memory, no more of it than is filled. Its bytes must stay until the ticket is
                waited for.
            spans: Span tuples, plain ones with the same fields, or int64 (m, 5).

        Raises:
            ValueError: spans that break the rules of `spans`; at the latest `finish` raises it.
            DeviceFailed: see there.
        """

    def finish(self) -> dict[int, bytes]:
        """All digests, by tensor number, once everything handed over is hashed.

        Raises ValueError if a tensor did not come whole, once and in its order; and DeviceFailed.
        """

    def salvage(self) -> dict[int, bytes]:
        """The digests known so far, without asking the device for more. For use after DeviceFailed.

        On CUDA the last batches (see `Digester.stream`) may be missing.
        """

    def close(self) -> None:
        """Gives the memory back, also to the GPU. Idempotent; never raises."""

    def __enter__(self) -> Stream: ...

    def __exit__(self, *exc: object) -> None: ...


class Digester(Protocol):
    """BLAKE3 by one kind of device.

    Attributes:
        device: "cpu" or "cuda".
        description: what does the work, for people.
    """

    device: str
    description: str

    def digest(self, data: object) -> bytes:
        """32 bytes: the digest of one array's or buffer's bytes, in row-major order.

        `data` may be bytes-like, a NumPy array of any dtype or a torch CPU tensor; with "cuda" also a torch or
        CuPy array on the GPU or whatever speaks DLPack or __cuda_array_interface__, without a copy.
        """

    def digest_many(self, data: object, spans: Iterable[tuple[int, int]]) -> list[bytes]:
        """Digests of byte ranges (start, length) of one array or buffer. ValueError if one leaves it."""

    def digest_arrays(self, arrays: Iterable[object]) -> list[bytes]:
        """Digests of many arrays, each as in `digest`."""

    def host_buffer(self, nbytes: int) -> Bytes:
        """uint8 (nbytes,), writable, page-aligned; pinned on CUDA, so that copies to the GPU need no CPU."""

    def stream(self, buffer_size: int) -> Stream:
        """A new stream for buffers of at most `buffer_size` bytes (at least PIECE).

        Memory is bounded: on CUDA 80 buffers of that size on each GPU, 5 % more, and 3 MB of pinned memory,
        all taken as it is needed; on the CPU nothing to speak of.
        """


def select(device: str = "auto", *, threads: int | None = None) -> Digester:
    """The digester for `device`: "cpu", "cuda", or "auto", which takes the GPU if one works.

    A GPU works if CuPy imports, compiles the kernels and gets a few known digests right on it. All GPUs that
    do share the work. `threads` is for the CPU; None takes all it may run on.

    Raises:
        UsageError: "cuda" and none works, with what CuPy said; or another word.
    """
    from tierewrite.digest.cpu import CpuDigester

    if device == "cpu":
        return CpuDigester(threads)
    if device not in ("auto", "cuda"):
        raise UsageError(f"there is no device '{device}': expected auto, cpu or cuda")
    from tierewrite.digest.cuda import CudaDigester

    try:
        return CudaDigester()
    except DeviceFailed as error:
        if device == "cuda":
            raise UsageError(
                f"--device cuda needs a GPU on which CuPy works: {error}. "
                "Fix that, or take --device cpu: the output is the same"
            ) from error
        return CpuDigester(threads, why=str(error) if _nvidia_gpu_is_here() else None)


def _nvidia_gpu_is_here() -> bool:
    """Whether the system shows one, by its driver's device files: who has none needs no advice about CuPy."""
    return any(os.path.exists(path) for path in ("/dev/nvidia0", "/dev/dxg"))
