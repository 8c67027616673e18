"""Runs commands one after the other and prints what each used: wall, user and system seconds, peak resident memory.

A process of its own, started as `python -I -S measure.py STEPS`, because Linux counts the memory of the process that
starts a command into the command's own peak (`ru_maxrss` survives exec): this one is small and imports nothing big.
STEPS is JSON, a list of argument lists; the first that fails is the last that runs. Standard output of the commands is
discarded, the end of their standard error is in the answer.
"""

from __future__ import annotations

import json
import os
import sys
import time

KEPT_OF_STDERR = 4000


def measured(argv: list[str], log: int) -> dict[str, object]:
    null = os.open(os.devnull, os.O_RDWR)
    actions = [
        (os.POSIX_SPAWN_DUP2, null, 0),
        (os.POSIX_SPAWN_DUP2, null, 1),
        (os.POSIX_SPAWN_DUP2, log, 2),
    ]
    started = time.perf_counter()
    pid = os.posix_spawnp(argv[0], argv, os.environ, file_actions=actions)
    _, status, usage = os.wait4(pid, 0)
    wall = time.perf_counter() - started
    os.close(null)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return {
        "argv": argv,
        "exit": os.waitstatus_to_exitcode(status),
        "wall": wall,
        "user": usage.ru_utime,
        "system": usage.ru_stime,
        "peak": usage.ru_maxrss * unit,
    }


def main() -> None:
    steps = json.loads(sys.argv[1])
    log = os.open(sys.argv[2], os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    done = []
    for argv in steps:
        done.append(measured(argv, log))
        if done[-1]["exit"] != 0:
            break
    size = os.fstat(log).st_size
    tail = os.pread(log, KEPT_OF_STDERR, max(0, size - KEPT_OF_STDERR)).decode(errors="replace")
    print(json.dumps({"steps": done, "stderr": tail}))


if __name__ == "__main__":
    main()
