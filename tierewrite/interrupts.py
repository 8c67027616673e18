"""Signals that end a command: each is remembered, and raised once, where raising it can do no harm.

Python runs a handler between any two instructions of the main thread. An exception raised between the taking of a lock
and the `with` that would give it back leaves it taken, and whoever wants it next waits for ever; one raised while a
module is imported leaves half a module. So inside the modules of `_LOCKS`, `_IMPORTS` and `_PATIENT` a handler only
asks, by a timer, to be called again soon. Elsewhere it raises, in other people's code too: a model class or a download
may take minutes. Whoever swallows it there (a bare `except`, an object that is being deleted) only delays it: it is
raised again by `check`, which stands at the steps of ours.

Only the command line installs handlers. Without them `check` never raises, and `held` holds back whatever handlers
there are.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from tierewrite.errors import EXIT_CODES, Interrupted

SIGNALS = tuple(signal.Signals(code - 128) for code in EXIT_CODES if code > 128)
"""Those that end a command, and what it has staged with it."""

_LOCKS = frozenset({"threading", "queue", "logging", "weakref", "_weakrefset"})
_IMPORTS = frozenset({"importlib._bootstrap", "importlib._bootstrap_external"})
_PATIENT = ("asyncio.", "ray.")
"""Packages whose state, half-made, makes another error of it."""
_AGAIN_SECONDS = 0.01
_BLOCKED = 5
"""Looks in a row that find the main thread at one instruction: it waits in C, and has not got what it waits for."""
_PATIENCE = 300
"""Looks that an import, Ray or asyncio is waited for: 3 s and what its calls into C take."""


class _State:
    """What has arrived, for the one main thread.

    Attributes:
        pending: the first signal; those that follow change nothing.
        raised: whether it was raised once: from then on only `check` raises it.
        over: whether the command has ended: nothing is raised any more.
        held: how many `held` are open.
        looks: how often the handler looked since `pending` arrived.
        place, stayed: the instruction at the last look, and for how many looks it has been the same.
        said: how things stand, of the work with a point of no return that began last.
        standing: how many `standing` are open.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self.raised = False
        self.over = False
        self.held = 0
        self.looks = 0
        self.place: tuple[int, int] | None = None
        self.stayed = 0
        self.said: list[str] = []
        self.standing = 0


_state = _State()


def install() -> None:
    """From now on the signals in `SIGNALS` end the command. For the main thread, before anything heavy is imported.

    SIGHUP stays ignored where it is: so `nohup` asks.
    """
    reset()
    for signum in SIGNALS:
        if not (signum == signal.SIGHUP and signal.getsignal(signum) is signal.SIG_IGN):
            signal.signal(signum, _arrived)
    sys.unraisablehook = _unraisable


def reset() -> None:
    """Forgets what has arrived."""
    global _state
    _state = _State()


def end() -> None:
    """The command is over: no signal may disturb the interpreter while it ends, which takes handlers of ours away."""
    _state.over = True
    signal.setitimer(signal.ITIMER_REAL, 0)
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def pending() -> Interrupted | None:
    """What `check` would raise."""
    return None if _state.pending is None else _interrupted(_state.pending)


def _interrupted(signum: int) -> Interrupted:
    return Interrupted(signum, *_state.said[-1:])


def check() -> None:
    """A step of ours: raises Interrupted if a signal has arrived, in the main thread."""
    if _state.pending is not None and not _state.held and threading.current_thread() is threading.main_thread():
        _state.raised = True
        raise _interrupted(_state.pending)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Holds signals back while steps belong together; they arrive afterwards. In other threads: nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    _state.held += 1
    before: dict[int, Any] = {}
    try:
        for signum in SIGNALS:
            before[signum] = signal.getsignal(signum)
            signal.signal(signum, lambda number, frame: arrived.append(number))
        yield
    finally:
        for held_back, handler in before.items():
            signal.signal(held_back, handler if handler is not None else signal.SIG_DFL)
        _state.held -= 1
        for number in arrived:
            signal.raise_signal(number)
        if _state.pending is not None and not (_state.raised or _state.over):
            _look_again()


@contextlib.contextmanager
def standing() -> Iterator[list[str]]:
    """Around work with a point of no return: what is appended says how things stand to whoever is interrupted later.

    Later is also after this work, until other such work begins: a command that is stopped while it ends says it too.
    Of work within work, such as a batch's, nothing is said once it is over.
    """
    said: list[str] = []
    outer = _state.said
    main = threading.current_thread() is threading.main_thread()  # nothing is raised in others
    if main:
        _state.said = said
        _state.standing += 1
    try:
        yield said
    except Interrupted as stopped:
        if said:
            raise Interrupted(stopped.signum, said[-1]) from None
        raise
    finally:
        if main:
            _state.standing -= 1
            if _state.standing:
                _state.said = outer


def _arrived(signum: int, frame: FrameType | None) -> None:
    """The handler, also of the timer that it asks to be called again by."""
    if _state.over or _state.raised:
        return
    if _state.pending is None:
        _state.pending = signum
    _state.looks += 1
    if _state.held:
        return
    if _may_raise(frame):
        _state.raised = True
        raise _interrupted(_state.pending)
    _look_again()


def _unraisable(what: Any) -> None:
    """What a destructor swallowed: a signal is raised again soon. What half-made objects say of it is not printed."""
    if _state.pending is None:
        sys.__unraisablehook__(what)
    elif isinstance(what.exc_value, Interrupted) and not _state.over:
        _state.raised = False
        _look_again()


def _look_again() -> None:
    signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)


def _may_raise(frame: FrameType | None) -> bool:
    """Whether an exception may be raised at this instruction."""
    place = None if frame is None else (id(frame), frame.f_lasti)
    _state.stayed = _state.stayed + 1 if place == _state.place else 1
    _state.place = place
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if (module in _LOCKS or module.startswith("concurrent.futures")) and _state.stayed < _BLOCKED:
            return False
        if (module in _IMPORTS or module.startswith(_PATIENT)) and _state.looks < _PATIENCE:
            return False
        frame = frame.f_back
    return True
