"""What goes wrong in the workers of a test's Ray cluster: Python imports this where the folder is on its PYTHONPATH.

`plan.json` in the folder that TIEREWRITE_TEST_FAULTS names says what: {"at": "half" or "start", "action": ..., "file":
the job's output or "" for jobs that hash, "times": how often}. Each time leaves a mark `N.mark` there, with
the process and the Ray node, before it happens.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import signal
import sys
import time
from pathlib import Path

_FOLDER = Path(os.environ["TIEREWRITE_TEST_FAULTS"])


def _plan() -> dict:
    try:
        return json.loads((_FOLDER / "plan.json").read_text())
    except FileNotFoundError:
        return {}


def _begins(plan: dict) -> bool:
    """Whether it is to happen once more; leaves the mark."""
    import ray

    text = json.dumps({"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()})
    for number in range(plan.get("times", 1_000_000)):
        try:
            with open(_FOLDER / f"{number}.new.{os.getpid()}", "w") as file:
                file.write(text)
            os.link(file.name, _FOLDER / f"{number}.mark")
            return True
        except FileExistsError:
            continue
        finally:
            os.unlink(file.name)
    return False


def _happen(action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "raise":
        raise RuntimeError("the cat sat on the keyboard")
    until = time.monotonic() + 120
    while not (_FOLDER / "release").exists() and time.monotonic() < until:
        try:
            time.sleep(0.02)
        except KeyboardInterrupt:
            if action != "deaf":
                raise


def _patch(jobs) -> None:
    plain = jobs.run_job

    def run_job(job, digester, advance=lambda n: None, stop=None):
        plan = _plan()
        name = job.out.name if job.out is not None else ""
        if plan.get("file") != name:
            return plain(job, digester, advance, stop)
        if plan["at"] == "start" and _begins(plan):
            _happen(plan["action"])
        done = 0

        def counted(nbytes: int) -> None:
            nonlocal done
            before, done = done, done + nbytes
            if plan["at"] == "half" and before < job.nbytes / 2 <= done and _begins(plan):
                _happen(plan["action"])
            advance(nbytes)

        return plain(job, digester, counted, stop)

    jobs.run_job = run_job


class _Finder:
    """Patches `tierewrite.output.jobs` as soon as it is imported; or has no tierewrite at all."""

    def find_spec(self, name, path=None, target=None):
        if name == "tierewrite" and _plan().get("action") == "lack":
            raise ModuleNotFoundError("No module named 'tierewrite'", name="tierewrite")
        if name == "tierewrite" and _plan().get("action") == "older":
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            return _after(spec, lambda module: setattr(module, "__version__", "0.0.9"))
        if name != "tierewrite.output.jobs":
            return None
        return _after(importlib.machinery.PathFinder.find_spec(name, path), _patch)


def _after(spec, then):
    run = spec.loader.exec_module

    def exec_module(module):
        run(module)
        then(module)

    spec.loader.exec_module = exec_module
    return spec


sys.meta_path.insert(0, _Finder())
