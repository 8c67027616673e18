"""The tasks of a Ray cluster: one for each output shard, or for each batch of ranges to hash.

The cluster's nodes have this tierewrite installed, as they have vLLM, and all see SRC and DST under the same paths. The
driver ships a job (`tierewrite.output.jobs`) and gets its result; bytes go between the nodes and the storage, never
through Ray. Scheduling, placement and retries are Ray's. A shard appears under its name whole or not at all, so a task
that dies may be carried out again, anywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import pickle
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlsplit

import tierewrite
from tierewrite import digest, interrupts
from tierewrite.digest import Digester
from tierewrite.engines.progress import Progress
from tierewrite.errors import Interrupted, SystemFailure, TierewriteError, UsageError
from tierewrite.output.jobs import Job, hash_jobs, run_job
from tierewrite.output.result import Result
from tierewrite.source.table import Checkpoint

log = logging.getLogger(__name__)

_RETRIES = 3  # of a task whose worker or node dies
_GPU_SHARE = 0.25  # of a GPU, a task: reading, not hashing, takes the time
_HASH_BYTES = (64 << 20, 1 << 30)  # the least and the most that a task hashes
_TASKS_PER_CPU = 4  # to hash with, at least: a slow node then holds nobody up for long
_OBJECT_STORE_BYTES = 256 << 20  # of a cluster that is started here: jobs and digests are small
_CONNECT_SECONDS = 10
_POLL_SECONDS = 1.0
_CANCEL_SECONDS = 20  # for a cancelled task to tidy up, before its process is killed
_ENVIRONMENT = {
    # Ray tries for a quarter of an hour to reach a cluster that is not there: 20 times 41 s.
    "RAY_NUM_REDIS_GET_RETRIES": "3",
    "RAY_py_gcs_connect_timeout_s": str(_CONNECT_SECONDS),
    "RAY_USAGE_STATS_ENABLED": "0",
}


class _Task(NamedTuple):
    """What Ray calls a task by, and the number of its job."""

    ref: Any
    number: int


class RayEngine:
    """See `tierewrite.engines.Engine`.

    A Ray that this process is connected to already is used, and left as it is. Else, as `ray.init` does it: the cluster
    at `address`; without one that of RAY_ADDRESS, else the latest that was started on this machine if it answers, else
    a new one on this machine, which ends with this engine ("local" asks for that one).

    Args:
        device: "auto", "cpu" or "cuda". With "auto" the GPUs are used if every node has one.
        progress: told of each task that has ended, and of 0 bytes now and then.
        address: as `ray.init` takes it.

    Raises on entry:
        UsageError: Ray is not installed, or "cuda" without a GPU in the cluster.
        SystemFailure: no cluster answers there, or it is of another version.
    """

    run_pass = None
    """Its workers are other processes: they take jobs."""

    def __init__(self, device: str = "auto", progress: Progress | None = None, address: str | None = None) -> None:
        self.progress = progress or Progress()
        self._asked = device
        self._address = address
        self._kept_open = ExitStack()

    def __enter__(self) -> RayEngine:
        with ExitStack() as cleanup, _environment():
            try:
                import ray
            except ImportError as error:
                raise UsageError(
                    f"--engine ray needs Ray ({error}): pip install 'tierewrite[ray]', or use --engine local"
                ) from error
            self._ray: Any = ray
            if not ray.is_initialized():
                cleanup.enter_context(_news_logged())
                cleanup.callback(ray.shutdown)
                _connect(ray, self._address)
            self._look()
            self._kept_open = cleanup.pop_all()
        return self

    def _look(self) -> None:
        """Learns what the cluster has."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        nodes = [node for node in nodes if node.get("CPU", 0) >= 1]
        self._nodes = len(nodes)
        self._cpus = int(sum(node["CPU"] for node in nodes))
        with_gpu = [node for node in nodes if node.get("GPU", 0) >= _GPU_SHARE]
        if self._asked == "cuda" and not with_gpu:
            raise UsageError(
                "--device cuda needs a GPU and no node of the Ray cluster has one; take --device cpu: the output is "
                "the same"
            )
        # Tasks that ask for a GPU run only where there is one: not worth leaving the other nodes idle.
        use_gpu = self._asked == "cuda" or (self._asked == "auto" and 0 < self._nodes == len(with_gpu))
        self._gpus = sum(node["GPU"] for node in with_gpu) if use_gpu else 0
        self._worker_device = self._asked if use_gpu else "cpu"
        if not nodes:
            self.progress.note("the Ray cluster has no node with a CPU yet; waiting for one")
        self._task = self._ray.remote(
            num_cpus=1,
            num_gpus=_GPU_SHARE if use_gpu else 0,
            max_retries=_RETRIES,
            retry_exceptions=False,
            scheduling_strategy="SPREAD",  # storage is read over every node's network
        )(_on_worker)

    @property
    def device(self) -> str:
        """See `Engine`."""
        parts = [_counted(self._nodes, "node"), _counted(self._cpus, "CPU")]
        if self._gpus:
            parts.append(_counted(int(self._gpus), "GPU"))
        return f"Ray, {', '.join(parts)}"

    def __exit__(self, *exc: object) -> None:
        self._kept_open.close()

    def hash(self, source: Checkpoint, keys: Iterable[str], phase: str) -> dict[str, bytes]:
        """See `Engine`."""
        keys = list(keys)
        total = sum(source.tensors[key].nbytes for key in keys)
        digests: dict[str, bytes] = {}
        for result in self.run_jobs(hash_jobs(source, keys, hash_batch(total, self._cpus)), phase):
            digests.update(result.digests)
        return digests

    def run_jobs(self, jobs: Sequence[Job], phase: str) -> list[Result]:
        """See `Engine`."""
        self.progress.start(phase, sum(job.nbytes for job in jobs))
        interrupts.check()
        results: dict[int, Result] = {}
        waiting: dict[Future[Result], _Task] = {}
        try:
            for number in sorted(range(len(jobs)), key=lambda number: -jobs[number].nbytes):
                task = self._task.remote(tierewrite.__version__, self._worker_device, pickle.dumps(jobs[number]))
                # A future, since `ray.wait` turns what a signal handler of ours raises into a SystemError.
                waiting[task.future()] = _Task(task, number)
            while waiting:
                done = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED).done
                interrupts.check()
                if not done:
                    self.progress.advance(0)  # who wants to stop the run raises there
                for ended in done:
                    number = waiting.pop(ended).number
                    results[number] = self._result(ended, jobs[number])
                    self.progress.advance(jobs[number].nbytes)
        finally:
            self._cancel(waiting)
        return [results[number] for number in range(len(jobs))]

    def _result(self, ended: Future[Result], job: Job) -> Result:
        """What a task that has ended returned.

        Raises:
            SystemFailure: it failed for good, or with its own error: that one.
        """
        try:
            return ended.result()
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            log.debug("a task failed: %s", error)
            if isinstance(cause, TierewriteError):
                raise cause from None
            if "No module named 'tierewrite" in str(error):
                raise SystemFailure(
                    "a node of the Ray cluster does not have tierewrite: install it on every node, for the Python that "
                    f"Ray runs there, in version {tierewrite.__version__}"
                ) from error
            raise SystemFailure(
                f"a Ray task failed ({job.name}): {type(cause).__name__}: {cause}; run again with -vv to see where"
            ) from error
        except self._ray.exceptions.RayError as error:
            said = " ".join(str(error).split())
            raise SystemFailure(
                f"a Ray task failed for good ({job.name}): {type(error).__name__}: {said}; Ray had tried it "
                f"{1 + _RETRIES} times if its worker or node died. Look at the nodes and their memory, then run again "
                "(--resume if this process was killed too)"
            ) from error

    def _cancel(self, tasks: Mapping[Future[Result], _Task]) -> None:
        """Ends tasks, and returns when none of them can write any more.

        A cancelled task is interrupted and removes what it has begun. A process that does not react is killed.
        """
        left = set(tasks)
        for force in (False, True):
            for future in left:
                self._ray.cancel(tasks[future].ref, force=force)
            left = wait(left, _CANCEL_SECONDS).not_done
        if left:
            log.warning("%d Ray tasks did not end when they were cancelled", len(left))


def hash_batch(total: int, cpus: int) -> int:
    """Bytes for a task to hash, of `total` on so many CPUs."""
    least, most = _HASH_BYTES
    return max(least, min(most, total // (_TASKS_PER_CPU * max(1, cpus))))


def _on_worker(version: str, device: str, data: bytes) -> Result:
    """The task: carries out the job that is pickled in `data`. Runs in a worker process of Ray's.

    Raises:
        SystemFailure: another version of tierewrite is installed there, or as `run_job`.
        UsageError: "cuda", and CuPy does not work there.
    """
    host = socket.gethostname()
    if version != tierewrite.__version__:  # before the data are read: another version's may mean something else
        raise SystemFailure(
            f"node '{host}' of the Ray cluster has tierewrite {tierewrite.__version__}, and this is {version}: install "
            "the same version on every node"
        )
    job: Job = pickle.loads(data)
    # A task that died may have left its file, and on a node that only seemed dead one may still write to it.
    job = dataclasses.replace(job, token=f"{job.token}{secrets.token_hex(4)}")
    try:
        return run_job(job, _digester(device))
    except SystemFailure as error:
        if isinstance(error.__cause__, FileNotFoundError):
            # (An error's text names its file by itself.)
            raise SystemFailure(
                f"{error.args[0]}; every node of the Ray cluster has to see SRC and DST under the same path, and "
                f"'{host}' does not",
                file=error.file,
            ) from error
        raise


@functools.cache
def _digester(device: str) -> Digester:
    """One for a worker: trying a GPU out takes a moment."""
    return digest.select(device, threads=1)


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def _connect(ray: Any, address: str | None) -> None:
    """Connects this process to a cluster, see `RayEngine`. Raises SystemFailure, Interrupted."""
    failed = f"cannot connect to a Ray cluster at '{address or os.environ.get('RAY_ADDRESS') or 'this machine'}'"
    advice = (
        "start one with `ray start --head`, give the address that it prints (HOST:PORT) with --ray-address, or leave "
        "--ray-address and RAY_ADDRESS out for a new one on this machine"
    )
    try:
        found, was_named = _address_of(ray, address)
        if found is not None and not _answers(found):
            if was_named:
                raise SystemFailure(f"{failed}: nothing answers at {found}; {advice}")
            log.info("the latest Ray cluster of this machine, at %s, is gone; starting a new one", found)
            found = None
        # Where nobody named the cluster Ray is to find it by itself: only then it takes the token that lies ready here.
        options: dict[str, Any] = {"address": found if was_named else None}
        if found is None:
            options = {"address": "local", "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        with _own_signals():
            ray.init(**options, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, OSError, ray.exceptions.RayError) as error:
        said = " ".join(str(error).split())
        if "AuthToken" in str(error.__cause__):
            advice = "it asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        raise SystemFailure(f"{failed}: {type(error).__name__}: {said}; {advice}") from error


def _address_of(ray: Any, address: str | None) -> tuple[str | None, bool]:
    """Where Ray would connect to, None for a new cluster; and whether somebody named it.

    Raises:
        ConnectionError, ValueError: Ray does not know.
    """
    named = address or os.environ.get("RAY_ADDRESS") or None
    try:
        from ray._private.services import canonicalize_bootstrap_address
    except ImportError:  # a Ray that keeps it elsewhere: then only a named cluster is joined
        named = None if named in ("auto", "local") else named
        return named, named is not None
    if named is not None and "://" in named:
        return named, True
    return canonicalize_bootstrap_address(named), named not in (None, "auto")


def _answers(address: str) -> bool:
    """Whether anything listens there; Ray itself would try for minutes."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        socket.create_connection((parts.hostname or "", parts.port or 10001), _CONNECT_SECONDS).close()
    except (OSError, ValueError):
        return False
    return True


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """What Ray is told by its environment, where the user has not."""
    mine = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _news_logged() -> Iterator[None]:
    """Logs what happens to the cluster (a node died): Ray prints it on standard output, whatever its settings are."""
    try:
        from ray._private import worker
    except ImportError:  # a Ray that keeps it elsewhere: then its news are printed
        yield
        return
    plain = getattr(worker, "print_to_stdstream", None)

    def logged(data: Mapping[str, Any], *args: Any, **options: Any) -> None:
        for line in data.get("lines", ()):
            log.info("Ray: %s", line)

    worker.print_to_stdstream = logged
    try:
        yield
    finally:
        worker.print_to_stdstream = plain


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """A signal ends `ray.init`, and is then what this process makes of it.

    `ray.init` goes on after most exceptions that a handler raises, and gives SIGTERM a handler of its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []

    def stop(signum: int, frame: object) -> NoReturn:
        arrived.append(signum)
        sys.exit(signum)

    before = {signum: signal.getsignal(signum) for signum in interrupts.SIGNALS}
    before = {signum: handler for signum, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    for signum in before:
        signal.signal(signum, stop)
    try:
        yield
    except SystemExit as stopped:
        if stopped.code not in before:
            raise
        arrived.append(stopped.code)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if arrived:
        signal.raise_signal(arrived[0])
        raise Interrupted(arrived[0])
    interrupts.check()  # one that arrived before may have been swallowed
