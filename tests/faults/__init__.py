"""Failures on purpose, at chosen instants: kills, signals, failing and short system calls under a real command line.

`shim.c` is preloaded in front of the C library and counts the calls that touch the files below one folder; `server.py`
is an interpreter with everything imported that forks once for every command line. Nothing here waits for "long
enough": an instant is the number of a system call, and a dry run tells how many there are.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent

# What writes, creates, renames, removes or flushes: the instants at which a crash can leave something else behind.
CHANGES = (
    "create", "write", "pwrite", "clone", "copy_range", "mkdir", "rename", "exchange", "unlink", "rmdir", "fsync",
    "ftruncate", "flock",
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What happens to which of the counted calls.

    Attributes:
        root: only calls on paths below it count.
        action: kill_before, kill_after, kill_torn (half of a write, then the kill), signal_before, signal_after, stop,
            fail, one_byte, half, end (a read finds the end of the file) or count.
        first, last: the calls, from 1, that it happens to; `last` 0 is all that follow, None the first alone.
        argument: the errno or the signal.
        calls: the names that count; empty: all.
        part: counts only if a path contains it.
    """

    root: Path
    action: str = "count"
    first: int = 0
    last: int | None = None
    argument: int = 0
    calls: Sequence[str] = ()
    part: str = ""

    def to_json(self, log: Path) -> dict[str, Any]:
        """The arguments of the shim's faults_arm."""
        return {
            "root": str(self.root),
            "calls": " ".join(self.calls),
            "part": self.part,
            "first": self.first,
            "last": self.first if self.last is None else self.last,
            "action": self.action,
            "argument": self.argument,
            "log": str(log),
        }


@dataclass(frozen=True)
class Call:
    """A counted system call: its number from 1, its name, what it returned, and the paths it was on."""

    number: int
    name: str
    result: int
    path: str
    other: str


@dataclass(frozen=True)
class Outcome:
    """How a command line ended: its exit status (-9 after a kill, None where it was hung), what it printed, what was
    counted, and how long it took."""

    code: int | None
    stdout: str
    stderr: str
    calls: list[Call] = field(repr=False)
    seconds: float = 0


class Machine:
    """Builds the shim and runs command lines under it.

    Args:
        folder: for the shim and for what the commands print.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.chmod(0o777)
        self.shim = folder / "shim.so"
        subprocess.run(
            ["gcc", "-Wall", "-Werror", "-O1", "-shared", "-fPIC", "-o", self.shim, HERE / "shim.c"], check=True
        )
        self.server = subprocess.Popen(
            [sys.executable, HERE / "server.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment(),
        )
        self.runs = 0

    def environment(self, fault: Fault | None = None, log: Path | None = None) -> dict[str, str]:
        """For a process with the shim; armed from its start with `fault`."""
        environment = {**os.environ, "LD_PRELOAD": str(self.shim), "PYTHONPATH": str(REPOSITORY)}
        if fault is not None:
            environment["FAULTS"] = "\n".join(str(value) for value in self._fields(fault, log))
        return environment

    def _fields(self, fault: Fault, log: Path | None) -> list[Any]:
        given = fault.to_json(log or Path(os.devnull))
        return [given[name] for name in ("root", "calls", "part", "first", "last", "action", "argument", "log")]

    def run(
        self,
        *argv: str | Path,
        fault: Fault | None = None,
        limits: dict[str, int] | None = None,
        uid: int = 0,
        exchange_missing: bool = False,
        seconds: float = 120,
        signals: Sequence[tuple[float, int]] | None = None,
        environment: dict[str, str] | None = None,
    ) -> Outcome:
        """Runs `tierewrite argv`.

        Args:
            argv: the command line.
            fault: what goes wrong.
            limits: names of resource limits and their values.
            uid: the user that it runs as.
            exchange_missing: as on a kernel that cannot swap two folders in one step.
            seconds: after which it counts as hung.
            signals: are sent to it once its handlers are installed, each so many seconds after the one before; and it
                ends as a process of its own does.
            environment: what it finds there besides.
        """
        self.runs += 1
        out, err, log = (self.folder / f"{self.runs}.{name}" for name in ("out", "err", "log"))
        answer = self._ask(
            argv,
            stdin=os.devnull,
            stdout=str(out),
            stderr=str(err),
            limits=limits or {},
            uid=uid,
            exchange_missing=exchange_missing,
            fault=fault.to_json(log) if fault else None,
            seconds=seconds,
            signals=signals,
            environment=environment or {},
        )
        code = answer["code"]
        outcome = Outcome(code, out.read_text(), err.read_text(), calls_in(log), answer["seconds"])
        for path in (out, err, log):
            path.unlink(missing_ok=True)
        assert code is not None, f"hung: {outcome}"
        return outcome

    def warm(self, *argv: str | Path) -> None:
        """Runs `tierewrite argv`, which prints nothing, in the server itself: later runs import nothing more."""
        assert self._ask(argv, warm=True)["code"] == 0

    def _ask(self, argv: Sequence[str | Path], **job: Any) -> Any:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        asked = {"argv": [str(argument) for argument in argv], "warm": False, **job}
        self.server.stdin.write(json.dumps(asked) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def close(self) -> None:
        """Ends the server."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.close()
        self.server.wait(30)
        self.server.stdout.close()


def calls_in(log: Path) -> list[Call]:
    """The calls that the shim noted, in the order in which they returned (flushes: in which they began)."""
    if not log.exists():
        return []
    rows = (line.split("\t") for line in log.read_text().splitlines())
    return [Call(int(number), name, int(result), path, other) for number, name, result, path, other in rows]


def contents(folder: Path) -> dict[str, str] | None:
    """Digest of every file below `folder`, "" for a folder; None where there is none."""
    if not folder.is_dir():
        return None
    return {
        str(path.relative_to(folder)): blake3(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def names_in(folder: Path) -> list[str]:
    """What a folder holds, hidden entries too."""
    return sorted(os.listdir(folder))


def unavailable() -> str | None:
    """Why the shim cannot be used on this machine."""
    if not sys.platform.startswith("linux"):
        return "the shim speaks to the Linux kernel"
    if shutil.which("gcc") is None:
        return "needs gcc"
    return None


__all__ = [
    "CHANGES",
    "Call",
    "Fault",
    "Machine",
    "Outcome",
    "calls_in",
    "contents",
    "names_in",
    "unavailable",
]
