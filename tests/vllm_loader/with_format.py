#!/usr/bin/env python3
"""Loads checkpoints through vLLM's real plugin discovery and loaders, with any load format, on a CPU.

    with_format.py JOBS.json OUT.json

A job is {"name", "folder", "format" (null: vLLM's default), "extra", "ranks", "version" (to pretend)}; what comes out,
by name, is a list with one object a rank: the loader's class, digests of all parameters, those that nothing was written
to, bytes that were hashed, what it took ("cpu" and "wall" in seconds, in bytes the "anonymous" memory that it added and
the "peak" of all memory); or "error" and "trace". Each rank is a forked process.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import load as harness
import torch

UNTOUCHED = 0x11


def memory(kind: str) -> int:
    """Bytes of this process's memory: "RssAnon", that no file stands behind, or "VmHWM", the peak of all."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) << 10
    return 0


def loaded(job: dict[str, Any], rank: int, rendezvous: str) -> dict[str, Any]:
    """What vLLM's loader makes of a folder, on one rank."""
    ranks = job.get("ranks", 1)
    options: dict[str, Any] = {"max_model_len": 64}
    if job.get("format"):
        options["load_format"] = job["format"]
    if job.get("extra"):
        options["model_loader_extra_config"] = job["extra"]
    if ranks > 1:
        options |= {"tensor_parallel_size": ranks, "distributed_executor_backend": "mp"}
    config = harness.prepare(job["folder"], rank, ranks, rendezvous, **options)
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.utils.torch_utils import set_default_torch_dtype

    if "version" in job:
        import vllm

        vllm.__version__ = job["version"]
    with set_current_vllm_config(config):
        cpu, wall, anonymous = time.process_time(), time.perf_counter(), memory("RssAnon")
        loader = get_model_loader(config.load_config)
        config.compilation_config.static_forward_context.clear()
        with set_default_torch_dtype(config.model_config.dtype):
            model = loader.create_model(config, config.model_config)
        targets = harness.targets(model)
        for tensor in targets.values():
            if tensor.numel():
                harness.raw(tensor.data).fill_(UNTOUCHED)
        loader.load_weights(model, config.model_config)
        took = {
            "cpu": time.process_time() - cpu,
            "wall": time.perf_counter() - wall,
            "anonymous": memory("RssAnon") - anonymous,
            "peak": memory("VmHWM"),
        }
    return {
        "loader": f"{type(loader).__module__}.{type(loader).__name__}",
        "digests": {name: harness.digest(tensor.data) for name, tensor in targets.items()},
        "unfilled": [
            name for name, tensor in targets.items()
            if tensor.numel() and bool((harness.raw(tensor.data) == UNTOUCHED).all())
        ],
        "hashed": sum(stream.hashed_bytes for stream in getattr(loader, "_streams", {}).values()),
        **took,
    }  # fmt: skip


def in_a_fork(job: dict[str, Any], rank: int, rendezvous: str) -> tuple[int, Path]:
    """Starts a rank; its process and the file that it writes its result to."""
    out = Path(tempfile.mktemp(prefix="rank"))
    pid = os.fork()
    if pid == 0:
        try:
            found = loaded(job, rank, rendezvous)
        except BaseException as error:
            found = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-3000:]}
        out.write_text(json.dumps(found), encoding="utf-8")
        os._exit(0)
    return pid, out


def main() -> int:
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    harness.import_vllm()
    torch.set_num_threads(1)
    results: dict[str, list[Any]] = {}
    for job in jobs:
        rendezvous = tempfile.mktemp(prefix="vllm_rdzv")
        ranks = [in_a_fork(job, rank, rendezvous) for rank in range(job.get("ranks", 1))]
        for pid, _ in ranks:
            os.waitpid(pid, 0)
        results[job["name"]] = [json.loads(out.read_text(encoding="utf-8")) for _, out in ranks if out.exists()]
        for _, out in ranks:
            out.unlink(missing_ok=True)
    Path(sys.argv[2]).write_text(json.dumps(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
