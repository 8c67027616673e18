"""The buffers that go through a stream: lent to whoever reads next, before the bytes of others have been hashed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from tierewrite.digest import Digester, Ticket
from tierewrite.digest.spans import Bytes
from tierewrite.output.result import BUFFER_BYTES

_SPARE = 3  # on their way to a GPU while every worker has one


class Buffer:
    """Host memory, and the ticket of what it was handed over for.

    Attributes:
        array: uint8 (BUFFER_BYTES,).
        ticket: None: its bytes may be changed.
    """

    def __init__(self, array: Bytes) -> None:
        self.array = array
        self.ticket: Ticket | None = None

    def wait(self) -> None:
        """Blocks until its bytes may be changed. Raises DeviceFailed."""
        if self.ticket is not None:
            self.ticket.wait()
            self.ticket = None


class Buffers:
    """Buffers for a number of workers, each of which has one at a time, and a few more: so nobody waits for a copy.

    Made when they are first needed: where hashing is done within the call, as on a CPU, there are none to spare.
    """

    def __init__(self, digester: Digester, workers: int) -> None:
        self._digester = digester
        self._most = workers + _SPARE
        self._made = 0
        self._given_back: deque[Buffer] = deque()
        self._lock = threading.Lock()

    @contextmanager
    def one(self) -> Iterator[Buffer]:
        """One whose bytes may be changed. Raises DeviceFailed: making it, or what it was handed over for, failed."""
        buffer = self._take()
        try:
            buffer.wait()
            yield buffer
        finally:
            with self._lock:
                self._given_back.append(buffer)

    def _take(self) -> Buffer:
        """The one that was given back first, or a new one if that is not through and there may be more."""
        with self._lock:
            first = self._given_back[0] if self._given_back else None
            if self._made == self._most or (first is not None and (first.ticket is None or first.ticket.done())):
                return self._given_back.popleft()
            self._made += 1
        try:
            return Buffer(self._digester.host_buffer(BUFFER_BYTES))
        except BaseException:  # the others go on until they are told to stop: what is counted has to be there
            with self._lock:
                self._made -= 1
            raise
