"""The example scripts of the README, run as a person runs them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.checkpoints import FIXTURES, digests, read_tensors, right_answer

EXAMPLES = Path(__file__).parent / "examples"


def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs an example in a process of its own."""
    return subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parents[1]), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 30


def test_a_modelopt_export_becomes_canonical(tmp_path: Path) -> None:
    done = run("after_modelopt.py", "--exported", FIXTURES / "dg_nvfp4" / "naive", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "37 activation scales merged" in done.stdout
    assert digests(tmp_path / "out") == right_answer("dg_nvfp4")


@pytest.mark.skipif(importlib.util.find_spec("modelopt") is None, reason="nvidia-modelopt is not installed")
def test_a_model_is_quantized_exported_and_made_canonical(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 16}
    config = Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    done = run("after_modelopt.py", tmp_path / "model", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    written = read_tensors(tmp_path / "out")
    assert written["model.layers.0.mlp.up_proj.weight"][0] == "U8"
    assert "model.embed_tokens.weight" in written
    assert "lm_head.weight" not in written


def test_a_conversion_keeps_the_ties_that_casting_broke(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    src = FIXTURES / "qwen3_tied_bf16" / "naive"
    done = run("in_a_conversion.py", src, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "lm_head.weight -> model.embed_tokens.weight: rewritten" in done.stdout
    written = read_tensors(tmp_path / "out")
    assert written.keys() == right_answer("qwen3_tied_bf16").keys()
    assert {dtype for dtype, _, _ in written.values()} == {"F16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_a_checkpoint_is_prepared_for_vllm_and_what_it_cannot_represent_is_said(tmp_path: Path) -> None:
    done = run("before_vllm.py", FIXTURES / "dg_nvfp4" / "naive", tmp_path / "out")
    assert done.returncode == 6, done.stderr
    assert "layer_scalar" in done.stdout
    written = read_tensors(tmp_path / "out")
    assert written.keys() == right_answer("dg_nvfp4").keys()


def test_what_cannot_be_prepared_for_vllm_is_one_message(tmp_path: Path) -> None:
    done = run("before_vllm.py", FIXTURES / "qwen3_tied_but_diverged_bf16" / "naive", tmp_path / "out")
    assert done.returncode == 3
    assert "'model.embed_tokens.weight' and 'lm_head.weight' " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
