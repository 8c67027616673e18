"""The tables that ship with the package are what the script makes that runs vLLM's own classes.

Needs the venv that tests/vllm_loader/setup.sh makes, named by TIEREWRITE_VLLM_VENV; see tests/test_vllm_loader.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.vllm_loader.behaviour import VENV_VARIABLE, python
from tierewrite import consumers, formats
from tierewrite.consumers.vllm import VLLM

INTERPRETER = python()
SCRIPTS = Path(__file__).parent / "vllm_loader"
CLASSES = Path(consumers.__file__).parent / "vllm" / "classes.json"
FUSED = Path(formats.__file__).parent / "fused_sets.json"
ASKED = [
    "BartForConditionalGeneration", "DeepseekV3ForCausalLM", "GPT2LMHeadModel", "Gemma3ForConditionalGeneration",
    "LlamaForCausalLM", "MixtralForCausalLM", "NemotronForCausalLM", "WhisperForConditionalGeneration",
]  # fmt: skip


def shipped(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_the_tables_are_of_the_version_that_the_rules_were_read_in() -> None:
    assert shipped(CLASSES)["vllm"] == shipped(FUSED)["vllm"] == VLLM.version


def test_every_class_that_is_like_another_names_one_that_was_asked() -> None:
    rows = shipped(CLASSES)["classes"]
    assert all("reads" in rows[row["like"]] for row in rows.values() if "like" in row)


@pytest.mark.vllm
@pytest.mark.skipif(INTERPRETER is None, reason=f"{VENV_VARIABLE} names no venv of vLLM")
def test_the_tables_are_what_the_script_makes(tmp_path: Path) -> None:
    import transformers

    versions = shipped(CLASSES)["transformers"]
    if transformers.__version__ not in versions:
        pytest.skip(f"the table is of transformers {', '.join(versions)}; {transformers.__version__} is installed")
    names = [tmp_path / "consumer.json", tmp_path / "here.json"]
    for interpreter, target in zip((INTERPRETER, sys.executable), names, strict=True):
        subprocess.run([str(interpreter), str(SCRIPTS / "class_names.py"), str(target), "--only", *ASKED], check=True)
    script = [str(INTERPRETER), str(SCRIPTS / "classes.py")]
    folder = str(tmp_path / "facts")
    subprocess.run([*script, "facts", folder, *map(str, names), "--only", *ASKED], check=True)
    made = [tmp_path / "classes.json", tmp_path / "fused_sets.json"]
    subprocess.run([*script, "table", folder, *map(str, made)], check=True)
    for path, ours in ((made[0], CLASSES), (made[1], FUSED)):
        rows = shipped(ours)["classes"]
        assert shipped(path)["classes"] == {name: rows[name] for name in ASKED if name in rows}
