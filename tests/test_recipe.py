"""bin/recipe: the whole way of a DiffusionGemma, from quantization to vLLM's loader, on a tiny model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import FIXTURES, read_tensors
from tests.defects import DECODER, ENCODER

ROOT = FIXTURES.parent
PROMISE = "activation scales cover both sides, all else is as exported"

pytestmark = pytest.mark.long


def judge(folder: Path, loads: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "bin" / "recipe_loaded.py", folder / "exported", loads]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that bin/recipe leaves. Its environments, and those that are there already, are kept."""
    out = tmp_path_factory.mktemp("recipe") / "out"
    done = subprocess.run(["bin/recipe", out], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert PROMISE in done.stdout
    assert f"vllm serve {out}/served" in done.stdout
    return out


def test_every_tied_weight_is_served_once_with_the_bytes_of_the_export(recipe: Path) -> None:
    exported, served = read_tensors(recipe / "exported"), read_tensors(recipe / "served")
    assert {name for name in served if name.startswith(ENCODER)} == {
        f"{ENCODER}layers.{i}.layer_scalar" for i in range(2)
    }
    assert "lm_head.weight" not in served
    for name, tensor in served.items():
        sides = [exported[n] for n in (name, name.replace(DECODER, ENCODER)) if n in exported]
        assert tensor in sides, name


def test_what_the_recipe_leaves_out_is_not_quantized(recipe: Path) -> None:
    served = read_tensors(recipe / "served")
    packed = {name for name, (dtype, _, _) in served.items() if dtype == "U8"}
    assert {name.split(".")[4] for name in packed} == {"self_attn", "mlp", "experts"}
    assert all(name.startswith(f"{DECODER}layers.") for name in packed)


def test_what_vllm_needs_beside_the_weights_is_served(recipe: Path) -> None:
    names = {path.name for path in (recipe / "served").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names


def test_the_report_is_a_page(recipe: Path) -> None:
    assert "DiffusionGemmaForBlockDiffusion" in (recipe / "report.html").read_text()


@pytest.mark.parametrize("what", ["digests", "scales", "unloaded_params"])
def test_the_judge_sees_what_is_wrong(what: str, recipe: Path, tmp_path: Path) -> None:
    loads = tmp_path / "loads"
    for order in ("file", "reverse"):
        shutil.copytree(recipe / order, loads / order)
    assert judge(recipe, loads).returncode == 0
    path = loads / "reverse" / "served.json"
    found = json.loads(path.read_text())
    if what == "digests":
        found[what]["model.norm.weight"] = "other"
    elif what == "scales":
        found[what][next(n for n in found[what] if n.endswith("w2_input_scale"))][0]["value"] *= 0.5
    else:
        found[what] = ["model.norm.weight"]
    path.write_text(json.dumps(found))
    done = judge(recipe, loads)
    assert done.returncode == 1
    assert PROMISE not in done.stdout
