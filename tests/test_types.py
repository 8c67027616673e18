"""Type checkers find what people misspell, and take any bar as `progress`."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
from pathlib import Path

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
from tqdm import tqdm

report = tierewrite.rewrite("a", "b", on_mismatch="keep", max_shard_size="5GB", consumer="vllm", progress=tqdm())
tierewrite.rewrite("a", "b", digests=True)
saved: int = report.before_bytes - report.after_bytes
ok: bool = tierewrite.verify("a", "b", on_mismatch="keep", progress=tierewrite.Progress()).ok
alone: bool = tierewrite.verify_integrity("b", revision="main").ok
url: str = tierewrite.push("b", "org/name", private=True).url
fix: str = tierewrite.check("b", "vllm").findings[0].fix
ties: tierewrite.TieMap | None = tierewrite.inspect("a").ties
print(tierewrite.batch(["a"], into="b", device="cpu").failed)
"""


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed (the extra `dev`)")
def test_mypy_finds_five_misspelt_options_and_nothing_wrong_in_what_is_right(tmp_path: Path) -> None:
    (tmp_path / "misspelt.py").write_text(MISSPELT)
    (tmp_path / "right.py").write_text(RIGHT)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "misspelt.py", "right.py"],
        cwd=tmp_path,
        env={"MYPYPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [line.split(":")[:2] for line in done.stdout.splitlines() if ": error: " in line and "stubs" not in line]
    assert errors == [["misspelt.py", str(line)] for line in (3, 4, 5, 6, 7)], done.stdout


@pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="pyright is not installed")
def test_pyright_finds_them_too(tmp_path: Path) -> None:
    (tmp_path / "misspelt.py").write_text(MISSPELT)
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, str(tmp_path / "misspelt.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = {int(line.split(":")[1]) for line in done.stdout.splitlines() if " - error: " in line}
    assert lines == {3, 4, 5, 6, 7}, done.stdout


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


def test_what_is_no_bar_is_refused(tmp_path: Path) -> None:
    for function in (tierewrite.rewrite, tierewrite.verify):
        with pytest.raises(UsageError, match=r"progress is of type int; expected a tierewrite\.Progress, or a bar"):
            function(FIXTURES / "qwen3_tied_bf16" / "naive", tmp_path / "out", progress=3)  # type: ignore[arg-type]
