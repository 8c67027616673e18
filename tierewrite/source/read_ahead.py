"""Brings the source into the page cache while the model class is asked.

Importing torch and transformers and building a class takes seconds, on one core. Meanwhile the kernel is told to bring
the source into the page cache. For a source that is not there yet that saves its reading (2 cores, 2 GB: 6.2 s in place
of 8.2), and for one that is it costs nothing. Hashing meanwhile, by threads of this process, was slower than either
(6.9 s, and 5.7 in place of 5.2): it fights with the imports for the interpreter lock, and its bytes have to be read
again to be written.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from tierewrite.source.table import Checkpoint
from tierewrite.stores.places import is_local

log = logging.getLogger(__name__)

_STEP = 8 << 20  # bytes asked for at a time: between two, it can be told to stop
_SHARE = 4
"""At most one part in so many of the machine's memory: what pushes out what came before it would be read twice."""


def _memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _advised(path: Path, left: int, over: threading.Event) -> int:
    """Tells the kernel to read `path`, at most `left` bytes of it and until `over`; how many it was told."""
    told = 0
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        for start in range(0, os.fstat(fd).st_size, _STEP):
            if over.is_set() or left - told < _STEP:
                break
            os.posix_fadvise(fd, start, _STEP, os.POSIX_FADV_WILLNEED)
            told += _STEP
    finally:
        os.close(fd)
    return told


@contextlib.contextmanager
def reading(checkpoint: Checkpoint) -> Iterator[None]:
    """Has the kernel read the checkpoint's files, from the first on, for as long as the body runs.

    Not what is on another machine. Errors are left to the pass that needs the bytes: it meets them again, and knows
    what to say.
    """
    paths = [shard.path for shard in checkpoint.shards if is_local(shard.path)]
    if not paths or not hasattr(os, "posix_fadvise"):  # macOS
        yield
        return
    over = threading.Event()

    def work() -> None:
        left = _memory() // _SHARE
        try:
            for path in paths:
                if over.is_set() or left < _STEP:
                    return
                left -= _advised(path, left, over)
        except OSError as error:
            log.debug("reading ahead ended early: %s", error)

    thread = threading.Thread(target=work, name="tierewrite-ahead", daemon=True)
    try:
        try:
            thread.start()
        except RuntimeError as error:  # the system starts no further thread: whoever needs one says so
            log.debug("nothing is read ahead: %s", error)
        yield
    finally:
        over.set()
        if thread.ident is not None:
            thread.join()
