"""Answers for one consumer: loads checkpoint folders on the meta device, and prints what happened, a JSON line each.

    SCRIPT [--tensor-parallel-size N] [--trust-remote-code] -- FOLDER...

A script hands over a `Loader`. The import of the consumer is done once; every folder, and every rank of it, is loaded
in a forked child of its own. Standard output is for the JSON alone. The form of it is `consumers/loaded.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from dry_writes import Building, Feed, Recorder

SCHEMA = "tierewrite/dry-load/1"
MOST_REFUSED = 48  # keys that are left out before the script gives up
SECONDS_FOR_REFUSED = 60.0
# Words of PyTorch, of missing libraries, and of what is chosen when a model is served: they say something of this
# environment, not of the checkpoint.
OF_THE_ENVIRONMENT = (
    "meta tensor", "_opnamespace", "cuda", "triton", "flashinfer", "no kernel", "failed to find a kernel",
    "on the same device", "no module named", "cannot import name", "not compiled", "compute capability",
    "could not run 'aten::", "does not recognize this architecture", "not implemented for 'meta", "out of memory",
    "trust_remote_code", "speculative_config", "failed to be inspected",
)  # fmt: skip
OURS = frozenset({"dry_load.py", "dry_process.py", "dry_writes.py", "dry_coverage.py"})
NEEDS_BYTES = ("meta tensor", "on the same device", "no data")


class Unavailable(Exception):
    """The consumer is not here, or cannot be run this way; its text says why, for people."""


class Refusal(Exception):
    """The consumer refuses the folder; its text is the consumer's own."""


class Loader(Protocol):
    """What a script knows of its consumer."""

    consumer: str

    def imports(self) -> str:
        """Imports the consumer, once; its version. Raises Unavailable."""

    def prepare(self, folder: str, rank: int, ranks: int, meeting: str, trust_remote_code: bool) -> Any:
        """All that comes before the model: configs, process groups (which meet at the URL `meeting`).

        Whatever it raises is the consumer's refusal, unless `of_the_environment` says otherwise.
        """

    def build(self, prepared: Any) -> torch.nn.Module:
        """The consumer's model on the meta device, its parameters not yet filled."""

    def load(self, prepared: Any, model: torch.nn.Module, feed: Feed) -> None:
        """The consumer's own loading of the folder, with `feed.open` for `safe_open` and `feed.watched` around it."""

    def targets(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Everything that a checkpoint can fill."""

    def described(self, prepared: Any, model: torch.nn.Module) -> dict[str, Any]:
        """`model_class`, `quantization` and `unquantized`."""

    def unused(self, prepared: Any, parameter: str) -> bool:
        """The consumer never reads the parameter, whatever it holds."""


def of_the_environment(error: BaseException, folder: str) -> bool:
    """The error says something of this environment, and nothing of the checkpoint in `folder`."""
    if isinstance(error, Refusal):
        return False
    if isinstance(error, (ImportError, NotImplementedError, MemoryError, Unavailable)):
        return True
    text = words(error)
    if isinstance(error, OSError):
        return folder not in text
    return _raised_here(error) or any(words in text.lower() for words in OF_THE_ENVIRONMENT)


def _raised_here(error: BaseException) -> bool:
    """One of our own functions raised it: it replaces what this version of the consumer does not have."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and os.path.basename(frames[-1].filename) in OURS


def words(error: BaseException) -> str:
    """The consumer's own words; where it says nothing, the function that raised."""
    if isinstance(error, Refusal):
        return str(error)[:1000]
    # Of pydantic's account the sentence that the consumer wrote.
    text = str(error).partition("Value error, ")[2].partition(" [type=")[0] or str(error)
    if not text and (frames := traceback.extract_tb(error.__traceback__)):
        text = f"in {frames[-1].name} ({os.path.basename(frames[-1].filename)}): {frames[-1].line}"
    return f"{type(error).__name__}: {text}"[:1000]


class _Log(logging.Handler):
    """Collects warnings: they are all that tells of several defects."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):
            self.lines[record.getMessage()[:500]] = None


def loaded(loader: Loader, folder: str, rank: int, ranks: int, meeting: str, trust: bool) -> dict[str, Any]:
    """What the consumer does with one folder on one rank, as `DryLoad` has it, with this rank's facts alone."""
    began, before = time.process_time(), _peak()
    log = _Log()
    try:
        prepared = loader.prepare(folder, rank, ranks, meeting, trust)
        logging.getLogger(loader.consumer).addHandler(log)
        model, unset = _built(loader, prepared)
    except Exception as error:
        traceback.print_exc()
        return _no_facts(error, folder)
    attempt, refused, all_found = _attempts(loader, prepared, model, unset, folder)
    if isinstance(attempt, Exception):
        return _no_facts(attempt, folder)
    about = loader.described(prepared, attempt.model)
    facts = {
        "rank": rank,
        "refused": [{"key": key, "error": words(error)} for key, error in refused],
        "refused_all": all_found,
        "unquantized": about.pop("unquantized"),
        "warnings": list(log.lines),
        **attempt.facts(),
    }
    return {
        "outcome": "loaded",
        **about,
        "tensor_parallel_size": ranks,
        "ranks": [facts],
        "seconds": round(time.process_time() - began, 2),
        "peak_mib": _peak(),
        "import_mib": before,
    }


def _no_facts(error: Exception, folder: str) -> dict[str, Any]:
    return {"outcome": "not-run" if of_the_environment(error, folder) else "refused", "reason": words(error)}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "linux" else 1 << 20)


def _built(loader: Loader, prepared: Any) -> tuple[torch.nn.Module, Mapping[int, Any]]:
    building = Building()
    with building:
        model = loader.build(prepared)
    return model, building.unset


class Attempt:
    """One load of one model.

    Attributes:
        error: what ended it; None if it ran through.
        failed: what the consumer said after the last key.
    """

    def __init__(
        self, loader: Loader, prepared: Any, model: torch.nn.Module, unset: Mapping[int, Any], feed: Feed
    ) -> None:
        self.loader, self.prepared, self.model, self.unset, self.feed = loader, prepared, model, unset, feed
        self.error: Exception | None = None
        self.failed: str | None = None
        self.recorder = Recorder(feed, loader.targets(model))
        feed.start()
        try:
            with self.recorder:
                loader.load(prepared, model, feed)
        except Exception as error:
            traceback.print_exc()
            self.error = error

    def _initial(self, name: str, target: torch.Tensor) -> str:
        if self.loader.unused(self.prepared, name):
            return "unused"
        return "uninitialised" if target.untyped_storage()._cdata in self.unset else "default"

    @property
    def key(self) -> str | None:
        """The key that it ended at."""
        if self.error is None:
            return None
        if self.feed.key is not None:
            return self.feed.key
        # The loader had read all keys before it used one: it may name it.
        text = str(self.error)
        return next((key for key in self.feed.seen if key in text), None)

    def facts(self) -> dict[str, Any]:
        """The facts of a load that ran through."""
        recorder = self.recorder
        now = self.loader.targets(self.model)
        buffers = {name for name, _ in self.model.named_buffers()}
        unfilled: list[dict[str, Any]] = []
        overwritten: list[dict[str, Any]] = []
        unknown: list[str] = []
        wrote: dict[str, list[str]] = {}
        for name, target in recorder.targets.items():
            keys = dict.fromkeys(key for write in recorder.writes[name] for key in write.keys)
            if keys:
                wrote[name] = list(keys)
            if target.numel() == 0:
                continue
            if name in now and recorder.replaced(name, now[name]):
                unknown.append(name)
                continue
            found = recorder.coverage(name)
            if not found.known:
                unknown.append(name)
            if found.missing:
                unfilled.append(
                    {
                        "parameter": name, "shape": list(target.shape), "missing": found.missing,
                        "elements": target.numel(), "rows": found.rows[:64], "buffer": name in buffers,
                        "initial": self._initial(name, target),
                    }
                )  # fmt: skip
            for (first, last), elements in found.overwritten.items():
                overwritten.append({"parameter": name, "first": first[0], "last": last[-1], "elements": elements})
        used = {key for keys in wrote.values() for key in keys}
        casts = [
            {"key": key, "parameter": name, "found": found, "wanted": wanted}
            for (key, name), (found, wanted) in recorder.casts.items()
        ]  # fmt: skip
        return {
            "written": wrote, "failed": self.failed, "unfilled": unfilled, "overwritten": overwritten,
            "ignored": [key for key in self.feed.seen if key not in used], "casts": casts, "unknown": unknown,
        }  # fmt: skip


def _attempts(
    loader: Loader, prepared: Any, model: torch.nn.Module, unset: Mapping[int, Any], folder: str
) -> tuple[Attempt | Exception, list[tuple[str, Exception]], bool]:
    """Loads until it runs through: keys that abort it are left out, keys whose bytes are asked for are read.

    Returns:
        The load that ran through, or what ended it although no key is to blame; the keys that were left out; and
        whether these are all.
    """
    feed = Feed()
    refused: list[tuple[str, Exception]] = []
    until = time.monotonic() + SECONDS_FOR_REFUSED
    while True:
        attempt = Attempt(loader, prepared, model, unset, feed)
        error, key = attempt.error, attempt.key
        if error is None:
            return attempt, refused, True
        if of_the_environment(error, folder):
            if key is None or key in feed.real or not any(each in str(error).lower() for each in NEEDS_BYTES):
                return error, refused, False
            feed.real.add(key)
        elif key is None:
            if not feed.seen and not refused:
                return error, refused, False
            attempt.failed = words(error)
            return attempt, refused, True
        else:
            refused.append((key, error))
            if len(refused) >= MOST_REFUSED or time.monotonic() > until:
                return attempt, refused, False
            feed.dropped.add(key)
        model, unset = _built(loader, prepared)


def _child(work: Callable[[], Mapping[str, Any]], path: str) -> int:
    """Does `work` in a forked child, which writes its result to `path`; the child's process id."""
    pid = os.fork()  # consumers keep global state: process groups, names of layers
    if pid:
        return pid
    try:
        try:
            answer = dict(work())
        except BaseException as error:
            traceback.print_exc()
            answer = {"outcome": "not-run", "reason": words(error)}
        with open(path, "w", encoding="utf-8") as file:
            json.dump(answer, file)
        sys.stderr.flush()
    finally:
        os._exit(0)


def _answer_of(path: str, code: int) -> dict[str, Any]:
    """What a child wrote before it ended with `code`."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        ended = signal.Signals(-code).name if code < 0 else f"status {code}"
        return {"outcome": "not-run", "reason": f"its process was ended ({ended})"}


def _answers(loader: Loader, folder: str, ranks: int, trust: bool) -> dict[str, Any]:
    """All ranks of one folder."""
    with tempfile.TemporaryDirectory() as home:
        meeting = f"file://{home}/meeting"
        paths = [f"{home}/{rank}.json" for rank in range(ranks)]

        def work(rank: int) -> Callable[[], Mapping[str, Any]]:
            return lambda: loaded(loader, folder, rank, ranks, meeting, trust)

        waiting = {_child(work(rank), path): path for rank, path in enumerate(paths)}
        answers = []
        while waiting:
            child, status = os.waitpid(-1, 0)
            answers.append(_answer_of(waiting.pop(child), os.waitstatus_to_exitcode(status)))
            if answers[-1]["outcome"] != "loaded":
                # The others may wait for it, for ever.
                for rest in waiting:
                    os.kill(rest, signal.SIGKILL)
                    os.waitpid(rest, 0)
                return answers[-1]
    first, *others = sorted(answers, key=lambda answer: answer["ranks"][0]["rank"])
    for other in others:
        first["ranks"] += other["ranks"]
        first["seconds"] = max(first["seconds"], other["seconds"])
        first["peak_mib"] = max(first["peak_mib"], other["peak_mib"])
    return first


def _ends_with_its_parent() -> None:
    """Ends this session's processes when whoever asked is gone: then standard input ends."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def main(loader: Loader) -> None:
    """Carries out the command line; ends the process."""
    options = argparse.ArgumentParser()
    options.add_argument("--tensor-parallel-size", type=int, default=1)
    options.add_argument("--trust-remote-code", action="store_true")
    options.add_argument("folders", nargs="+")
    given = options.parse_args()
    if os.getpgid(0) == os.getpid() and not os.isatty(0):
        _ends_with_its_parent()
    # Consumers log to standard output; that is for the JSON alone.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(1)  # nothing is computed; and a forked child has no thread pool
    try:
        version, problem = loader.imports(), ""
    except Exception as error:
        traceback.print_exc()
        version, problem = "", words(error) if not isinstance(error, Unavailable) else str(error)
    for folder in given.folders:
        if problem:
            answer: dict[str, Any] = {"outcome": "not-run", "reason": problem}
        else:
            answer = _answers(loader, folder, given.tensor_parallel_size, given.trust_remote_code)
        out.write(json.dumps({"schema": SCHEMA, "consumer": loader.consumer, "version": version, **answer}) + "\n")
        out.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of libraries would keep the process alive


def persistent(
    model: torch.nn.Module, leave_out: Callable[[str], bool] = lambda name: False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and buffers that a checkpoint holds, by name; no tensor twice."""
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        seen.add(id(parameter))
        yield name, parameter
    for module_name, module in model.named_modules():
        for leaf, buffer in module.named_buffers(recurse=False):
            name = f"{module_name}.{leaf}" if module_name else leaf
            if buffer is None or leaf in module._non_persistent_buffers_set or id(buffer) in seen or leave_out(name):
                continue
            seen.add(id(buffer))
            yield name, buffer
