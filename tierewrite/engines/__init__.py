"""Who does the work of a pass: this process and its threads, or a Ray cluster. The output is the same.

An engine hashes tensors and carries out jobs (`tierewrite.output.jobs`); the driver plans, confirms, commits and
verifies, and is the only one that decides. `local` writes an output on this machine in one pass over the source
instead, each byte read once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

from tierewrite.engines.progress import Progress
from tierewrite.errors import UsageError, shown
from tierewrite.output.engine import Engine as Worker

DEVICES = ("auto", "cpu", "cuda")
ENGINES = ("local", "ray")


class Engine(Worker, Protocol):
    """Carries out the work of one pass. A context manager.

    Attributes:
        progress: gets the progress of the pass.
    """

    progress: Progress

    @property
    def device(self) -> str:
        """What does the hashing, for people."""

    def __enter__(self) -> Engine: ...

    def __exit__(self, *exc: object) -> None: ...


@contextlib.contextmanager
def open_engine(
    engine: str = "local",
    *,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    ray_address: str | None = None,
) -> Iterator[Engine]:
    """The engine of that name, for as long as the body runs.

    Args:
        engine: "local" or "ray".
        device: "auto", "cpu" or "cuda".
        threads: workers of the local engine; None: as many as there are cores, at most 8.
        progress: gets the number of bytes that have moved.
        ray_address: the cluster, as `ray.init` takes it; None: RAY_ADDRESS, else the one that runs here, else a new
            one on this machine.

    Raises:
        UsageError: no such engine or device, Ray is not installed, or an option of another engine.
        SystemFailure: there is no cluster at that address.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise UsageError(f"threads is {threads!r}; expected a whole number of workers, at least 1")
    if device not in DEVICES:
        raise UsageError(f"there is no device '{shown(device)}'; expected one of {', '.join(DEVICES)}")
    if engine == "local":
        if ray_address is not None:
            raise UsageError("--ray-address belongs to --engine ray; leave one of them out, or add the other")
        from tierewrite.engines.local import LocalEngine

        with LocalEngine(device, threads, progress or Progress()) as local:
            yield local
        return
    if engine != "ray":
        raise UsageError(f"there is no engine '{shown(engine)}'; expected one of {', '.join(ENGINES)}")
    if threads is not None:
        raise UsageError("--threads belongs to the local engine; on Ray the cluster says how many tasks run at a time")
    from tierewrite.engines.on_ray import RayEngine

    with RayEngine(device, progress or Progress(), ray_address) as cluster:
        yield cluster
