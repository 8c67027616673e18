"""Hashing while the model class is asked.

Importing torch and transformers and building a class takes seconds, on one core, and says nothing about the bytes. What
is probably tied shows in the headers: tensors of one dtype and shape whose names end alike. Those are hashed meanwhile,
so that the pass afterwards only copies them. A guess decides nothing: whether two names are tied is the model's word,
and a digest is a digest, whoever asked for it first.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
from collections.abc import Iterator

from tierewrite.checkpoint import Checkpoint
from tierewrite.engines import Engine, Progress
from tierewrite.engines.local import LocalEngine
from tierewrite.errors import TierewriteError
from tierewrite.transfer import Task, tasks

log = logging.getLogger(__name__)

_ROUND_BYTES = 256 << 20  # hashed between two looks at whether the class has answered
_SWITCH_SECONDS = 0.0005
_NUMBERED = re.compile(r"\.\d+\.")


def probably_tied(checkpoint: Checkpoint) -> list[str]:
    """Keys that share dtype, shape and the end of their name with another: from the first number on, or the leaf."""
    alike: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    for name, entry in checkpoint.tensors.items():
        numbered = _NUMBERED.search(name)
        tail = name[numbered.start() :] if numbered else name.rpartition(".")[2]
        alike.setdefault((tail, entry.dtype, entry.shape), []).append(name)
    return [name for names in alike.values() if len(names) > 1 for name in names]


@contextlib.contextmanager
def hashing(checkpoint: Checkpoint, engine: Engine, known: dict[str, bytes]) -> Iterator[None]:
    """Hashes what is probably tied for as long as the body runs; the digests go into `known`.

    Not what is on another machine, or by others: bytes that have to be sent are read once.

    Errors are left to the pass that needs the bytes: it meets them again, and knows what to say.
    """
    if not isinstance(engine, LocalEngine) or checkpoint.origin is not None:
        yield
        return
    local = engine
    over = threading.Event()

    def work() -> None:
        rounds: list[list[Task]] = [[]]
        nbytes = 0
        for task in tasks(checkpoint, probably_tied(checkpoint)):
            if nbytes >= _ROUND_BYTES:
                rounds.append([])
                nbytes = 0
            rounds[-1].append(task)
            nbytes += task.nbytes
        for part in rounds:
            if over.is_set() or not part:
                return
            try:
                known.update(local.transfer(checkpoint, part, "hashing", progress=Progress()))
            except TierewriteError as error:
                log.debug("hashing ahead ended early: %s", error)
                return

    # Each hash waits for the interpreter lock, which an import gives up only once an interval.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    thread = threading.Thread(target=work, name="tierewrite-ahead", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(interval)
