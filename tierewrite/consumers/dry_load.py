"""Asks a consumer's own loader: runs its script in a Python that has the consumer, and reads what it prints.

The script runs in a process of its own, in a session and a temporary folder of its own, without a GPU and without the
network. Whatever goes wrong there is no verdict on the checkpoint: it becomes a `DryLoad` that did not run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, get_args

from tierewrite import interrupts
from tierewrite.consumers.loaded import DryLoad, read
from tierewrite.errors import UsageError, shown
from tierewrite.stores.base import PathLike
from tierewrite.stores.places import local_file

LoaderMode = Literal["auto", "require", "off"]
TIMEOUT_SECONDS = 1800.0
_LOOK_SECONDS = 0.2
_TAIL = 4000  # bytes of standard error that are looked at
_KNOWN_REASONS = (
    ("trust_remote_code", "the checkpoint brings model code of its own, which is not run without --trust-remote-code"),
    ("speculative_config", "its class is a draft model's, which is loaded only beside the model that it drafts for"),
)
"""Words of a reason why a loader could not be asked, and what they mean."""


@dataclass(frozen=True)
class DryLoader:
    """How a consumer's own loader is asked.

    Attributes:
        title: the consumer's name as its makers write it: "vLLM".
        package: what a Python has to have: "vllm".
        script: the script that it runs; consumers/LOADER.md says what it has to print.
    """

    title: str
    package: str
    script: Path

    @property
    def variable(self) -> str:
        """The environment variable that may name a Python that has the consumer."""
        return f"TIEREWRITE_{self.package.upper()}_PYTHON"


@dataclass(frozen=True)
class LoaderOptions:
    """What the caller chooses.

    Attributes:
        mode: "auto": ask the loader if a Python that has it is known, and say so if not; "require": it is an error if
            the loader does not run; "off": do not ask.
        python: the interpreter that has the consumer; None: what the environment variable names, else this one.
        tensor_parallel_size: of how many ranks.
        trust_remote_code: the consumer may run the model code that the checkpoint brings.
        timeout: seconds that the process may take.
    """

    mode: LoaderMode = "auto"
    python: PathLike | None = None
    tensor_parallel_size: int = 1
    trust_remote_code: bool = False
    timeout: float = field(default=TIMEOUT_SECONDS, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in get_args(LoaderMode):
            raise UsageError(f"loader is {self.mode!r}; expected one of {', '.join(get_args(LoaderMode))}")
        if not 1 <= self.tensor_parallel_size <= 64:
            raise UsageError(f"tensor_parallel_size is {self.tensor_parallel_size}; expected 1 to 64")


def interpreter(loader: DryLoader, python: PathLike | None) -> Path | None:
    """The Python that has the consumer: the given one, the environment variable's, or this one; None if none is known.

    Raises:
        UsageError: the one that was named is no program.
    """
    named = python if python is not None else os.environ.get(loader.variable)
    if named:
        # Not resolved: a virtual environment's interpreter is a link, and is known by its own name.
        path = Path(os.path.abspath(local_file(named, "a Python interpreter")))
        if not os.access(path, os.X_OK) or path.is_dir():
            raise UsageError(f"is no program that can be run; name the Python that has {loader.title}", file=path)
        return path
    spec = importlib.util.find_spec(loader.package)
    return Path(sys.executable) if spec is not None and spec.origin is not None else None


def dry_load(loader: DryLoader, folders: Mapping[Path, str], options: LoaderOptions) -> list[DryLoad]:
    """What the consumer's loader does with each of `folders`, in their order; one process for all of them.

    Args:
        folders: paths of this machine -> what messages call them.

    Raises:
        UsageError: the interpreter that was named is no program.
        Interrupted: a signal arrived; the process is gone.
    """
    python = interpreter(loader, options.python)
    if python is None:
        reason = f"this Python has no {loader.title}"
        return [DryLoad.not_run(loader.package, reason)] * len(folders)
    names = {os.path.abspath(folder): shown(name) for folder, name in folders.items()}
    command = [
        str(python), str(loader.script), "--tensor-parallel-size", str(options.tensor_parallel_size),
        *(["--trust-remote-code"] if options.trust_remote_code else []), "--", *names,
    ]  # fmt: skip
    with (
        tempfile.TemporaryDirectory(prefix="tierewrite-load-", ignore_cleanup_errors=True) as home,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        status = _run(command, Path(home), out, err, options.timeout)
        out.seek(0)
        lines = [line for line in out.read().split(b"\n") if line]
        try:
            found = read(lines, names)
        except (ValueError, UnicodeDecodeError) as e:
            found, status = [], f"its output could not be read: {e}"
        missing = len(folders) - len(found)
        reason = f"{status or 'it ended early'}{_last_words(err)}"
        return [*found[: len(folders)], *([DryLoad.not_run(loader.package, reason)] * missing)]


def reason_for_people(facts: DryLoad) -> str:
    """Why the loader did not run, in one line."""
    known = (meaning for words, meaning in _KNOWN_REASONS if words in facts.reason)
    text = next(known, " ".join(facts.reason.split()))
    return text if len(text) <= 300 else f"{text[:300]}..."


def _run(command: Sequence[str], home: Path, out: IO[bytes], err: IO[bytes], timeout: float) -> str:
    """Runs the script to its end; what went wrong, or ""."""
    environment = {**os.environ, "TMPDIR": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        # Standard input stays open while we live: a script that reads its end knows that nobody waits any more.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=err, cwd=home, env=environment, start_new_session=True
        )
    except OSError as e:
        return f"'{shown(command[0])}' could not be started: {e.strerror}"
    until = time.monotonic() + timeout
    try:
        while time.monotonic() < until:
            try:
                status = process.wait(_LOOK_SECONDS)
            except subprocess.TimeoutExpired:
                interrupts.check()
                continue
            return "" if status == 0 else _ended(status)
        return f"it did not end within {timeout:,.0f} seconds"
    finally:
        _end(process)


def _ended(status: int) -> str:
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    return f"its process ended with status {status}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and those that it started; they have a session of their own."""
    with interrupts.held():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


def _last_words(err: IO[bytes]) -> str:
    """The last line of standard error, for people."""
    size = err.seek(0, os.SEEK_END)
    err.seek(max(0, size - _TAIL))
    lines = [line.strip() for line in err.read().decode("utf-8", "replace").splitlines()]
    last = next((line for line in reversed(lines) if line), "")
    return f": {shown(last)[:300]}" if last else ""
