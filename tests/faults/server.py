"""Carries out command lines, each in a fork of itself, with the shim armed: imports are paid for once.

Started with the shim preloaded. Reads one JSON object a line from standard input, answers with one a line.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import resource
import signal
import sys
import time
from typing import Any

from tierewrite import cli, interrupts


def ready(write_end: int) -> None:
    """Has the command say so once its handlers are installed: signals are sent from then on."""
    install = interrupts.install

    def installed() -> None:
        install()
        os.write(write_end, b"!")

    interrupts.install = installed


def sent(pid: int, signals: list[list[float]], read_end: int) -> float:
    """Sends signals to a command that is ready, each so many seconds after the one before; returns when it began."""
    os.read(read_end, 1)
    began = time.monotonic()
    for seconds, signum in signals:
        time.sleep(seconds)
        os.kill(pid, int(signum))  # no other process: until it is waited for, it keeps its number
    return began


def child(job: dict[str, Any]) -> None:
    """Becomes the command: what it prints goes to files, what it does is counted from here on."""
    for name, fd in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        flags = os.O_RDONLY if fd == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        opened = os.open(job[name], flags, 0o666)
        os.dup2(opened, fd)
        os.close(opened)
    for limit, value in job["limits"].items():
        resource.setrlimit(getattr(resource, limit), (value, value))
    if job["uid"]:
        os.setgroups([])
        os.setgid(job["uid"])
        os.setuid(job["uid"])

    os.environ.update(job["environment"])
    faulthandler.enable()
    sys.argv = ["tierewrite", *job["argv"]]
    if job["exchange_missing"]:
        ctypes.CDLL(None).faults_no_exchange()
    if job["fault"]:
        fault = job["fault"]
        text = [fault[name].encode() for name in ("root", "calls", "part")]
        ctypes.CDLL(None).faults_arm(
            *text,
            ctypes.c_long(fault["first"]),
            ctypes.c_long(fault["last"]),
            fault["action"].encode(),
            ctypes.c_long(fault["argument"]),
            fault["log"].encode(),
        )
    cli.main()


def ended(pid: int, seconds: float) -> int | None:
    """The exit status (negative: the signal) of a child; None, and the child's end, when it takes too long."""
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGABRT)  # says where every thread is
            time.sleep(1)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.001)


def serve() -> None:
    """Answers until standard input ends."""
    import tierewrite.cli.progress_bar
    import tierewrite.proof.verify
    import tierewrite.rewriting.run

    for line in sys.stdin:
        job = json.loads(line)
        if job["warm"]:  # once in here: what a rewrite imports later is then there for every fork
            print(json.dumps({"code": tierewrite.cli.run(job["argv"])}), flush=True)
            continue
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0 and job["signals"] is not None:
            ready(write_end)
            child(job)  # ends as a command does: the interpreter's end is an instant too
        if pid == 0:
            code = 70
            try:
                child(job)
            except SystemExit as done:
                code = done.code if isinstance(done.code, int) else 0 if done.code is None else 1
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 71  # no exit code of ours: something got past the command line
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(write_end)
        began = time.monotonic() if job["signals"] is None else sent(pid, job["signals"], read_end)
        os.close(read_end)
        code = ended(pid, job["seconds"])
        print(json.dumps({"code": code, "seconds": time.monotonic() - began}), flush=True)


if __name__ == "__main__":
    serve()
