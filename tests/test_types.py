"""Type checkers find what people misspell, and take any bar as `progress`."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path
from shutil import which
from typing import Any

import pytest

import tierewrite
from tests.checkpoints import FIXTURES
from tierewrite.errors import UsageError

ROOT = Path(__file__).parent.parent
MISSPELT = """\
import tierewrite

tierewrite.rewrite("a", "b", on_mismatch="kep")
tierewrite.rewrite("a", "b", kv_scale="merge")
tierewrite.plan("a", max_shard_size=1.5)
tierewrite.verify("a", "b", consumer="vlm")
tierewrite.batch(["a"], into="b", devise="cpu")
"""
RIGHT = """\
import tierewrite
from rich.progress import Progress
from tqdm import tqdm

with Progress() as bars:
    print(tierewrite.rewrite("a", "b", progress=bars))
report = tierewrite.rewrite("a", "b", on_mismatch="keep", max_shard_size="5GB", consumer="vllm", progress=tqdm())
tierewrite.rewrite("a", "b", digests=True)
saved: int = report.before_bytes - report.after_bytes
ok: bool = tierewrite.verify("a", "b", on_mismatch="keep", progress=tierewrite.Progress()).ok
alone: bool = tierewrite.verify_integrity("b", revision="main").ok
url: str = tierewrite.push("b", "org/name", private=True).url
fix: str = tierewrite.check("b", "vllm").findings[0].fix
ties: tierewrite.TieMap | None = tierewrite.inspect("a").ties
print(tierewrite.batch(["a"], into="b", device="cpu").failed)
planned: tierewrite.RewritePlan = tierewrite.plan("a", ties={"lm_head": "model.embed_tokens"}, confirm=True)
expanded: tierewrite.Expansion = tierewrite.expand("b", "c", consumer="transformers")
served: tierewrite.Report = tierewrite.prepare_for_vllm("a", "b", kv_scales="merge")
for name, tensor in tierewrite.stream("a", consumer="vllm"):
    print(name, tensor)
page: bytes = tierewrite.report_page("b").png()
try:
    tierewrite.rewrite("a", in_place=True)
except (tierewrite.Refused, tierewrite.SourceError, tierewrite.SystemFailure) as error:
    print(error.exit_code, error.file, error.tensor)
"""


EXAMPLES = ("before_vllm.py", "in_a_conversion.py")
"""Those of which all imports are installed here."""


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed (the extra `dev`)")
def test_mypy_finds_five_misspelt_options_and_nothing_wrong_in_what_is_right(tmp_path: Path) -> None:
    (tmp_path / "misspelt.py").write_text(MISSPELT)
    (tmp_path / "right.py").write_text(RIGHT)
    for name in EXAMPLES:
        (tmp_path / name).write_bytes((ROOT / "tests" / "examples" / name).read_bytes())
    files = ["misspelt.py", "right.py", *EXAMPLES]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", *files],
        cwd=tmp_path,
        env={"MYPYPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line.split(":")[:2] for line in done.stdout.splitlines() if ": error: " in line and "stubs" not in line]
    assert errors == [["misspelt.py", str(line)] for line in (3, 4, 5, 6, 7)], done.stdout


@pytest.mark.skipif(which("pyright") is None, reason="there is no pyright on the PATH")
def test_pyright_finds_them_too(tmp_path: Path) -> None:
    (tmp_path / "misspelt.py").write_text(MISSPELT)
    (tmp_path / "right.py").write_text(RIGHT)
    command = ["pyright", "--pythonpath", sys.executable, "misspelt.py", "right.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    found = [line.strip().split(":")[:2] for line in done.stdout.splitlines() if " - error: " in line]
    assert found == [[str(tmp_path / "misspelt.py"), str(line)] for line in (3, 4, 5, 6, 7)], done.stdout


def test_a_bar_such_as_tqdms_is_told_of_each_phase_and_byte(tmp_path: Path) -> None:
    from tqdm import tqdm

    screen = io.StringIO()
    seen: list[tuple[str, int]] = []

    class Bar(tqdm):  # type: ignore[type-arg]
        def reset(self, total: float | None = None) -> None:
            seen.append((self.desc, int(total or 0)))
            super().reset(total)

    with Bar(file=screen, unit="B", mininterval=0) as bar:
        tierewrite.rewrite(FIXTURES / "qwen3_tied_bf16" / "naive", tmp_path / "out", progress=bar, verify=True)
        names = [name.removesuffix(": ") for name, _ in seen]
        assert names[0] == "asking Qwen3ForCausalLM for its ties"
        assert names[-1] == "proving"
        assert bar.n == bar.total  # the last phase has come to its end


def test_a_display_of_richs_is_told_of_each_phase_and_byte(tmp_path: Path) -> None:
    from rich.console import Console
    from rich.progress import Progress

    seen: list[tuple[str, int]] = []

    class Display(Progress):
        def reset(self, *given: Any, description: str = "", total: int = 0, **options: Any) -> None:
            seen.append((description, total))
            super().reset(*given, description=description, total=total, **options)

    with Display(console=Console(file=io.StringIO())) as bars:
        tierewrite.rewrite(FIXTURES / "qwen3_tied_bf16" / "naive", tmp_path / "out", progress=bars, verify=True)
        assert seen[0] == ("asking Qwen3ForCausalLM for its ties", 0)
        assert seen[-1][0] == "proving"
        (task,) = bars.tasks
        assert task.completed == task.total == seen[-1][1] > 0


def test_what_is_no_bar_is_refused(tmp_path: Path) -> None:
    for function in (tierewrite.rewrite, tierewrite.verify):
        with pytest.raises(UsageError, match=r"progress is of type int; expected a tierewrite\.Progress, a bar"):
            function(FIXTURES / "qwen3_tied_bf16" / "naive", tmp_path / "out", progress=3)  # type: ignore[arg-type]
