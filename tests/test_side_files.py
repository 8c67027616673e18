"""Side files: what plan and report say of weights in other formats, and what is left out on request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import tierewrite
from tests.checkpoints import write_checkpoint
from tierewrite.cli.commands import cli
from tierewrite.errors import UsageError
from tierewrite.planning.policy import Policy

TENSORS = {"a.weight": ("F32", [1], b"1234"), "b.weight": ("F32", [1], b"1234")}
OTHER = ("pytorch_model.bin", "consolidated.00.pth", "gguf/q4.gguf")
KEPT = ("tokenizer.json", "training_args.bin", "gguf/README.md")


@pytest.fixture
def src(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "src", TENSORS, config={})
    (folder / "gguf").mkdir()
    for name in (*OTHER, *KEPT):
        (folder / name).write_bytes(name.encode())
    (tmp_path / "ties.json").write_text(json.dumps({"a.weight": "b.weight"}))
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


OURS = {"config.json", "model.safetensors", "model.safetensors.index.json", "tierewrite.json"}


def test_weights_in_other_formats_are_named_in_plan_and_report(src: Path, tmp_path: Path) -> None:
    ties = tmp_path / "ties.json"
    plan, report = tierewrite.plan(src, ties=ties), tierewrite.rewrite(src, tmp_path / "out", ties=ties)
    for warnings in (plan.warnings, report.warnings):
        (said,) = (warning for warning in warnings if "other formats" in warning)
        assert f"{sum(map(len, OTHER))} bytes" in said
        assert all(name in said for name in OTHER)
        assert "training_args" not in said
    assert files(tmp_path / "out") == OURS | {*OTHER, *KEPT}


@pytest.mark.parametrize(
    ("patterns", "left_out"),
    [
        ("*.bin", {"pytorch_model.bin", "training_args.bin"}),
        (["pytorch_model*.bin", "*.pth", "*.gguf"], set(OTHER)),
        (["gguf/*"], {"gguf/q4.gguf", "gguf/README.md"}),
        (["*"], {*OTHER, *KEPT}),
        (["config.json", "nothing"], set()),
    ],
)
def test_what_is_excluded_is_not_there_and_the_proof_agrees(
    patterns: str | list[str], left_out: set[str], src: Path, tmp_path: Path
) -> None:
    ties, out = tmp_path / "ties.json", tmp_path / "out"
    report = tierewrite.rewrite(src, out, ties=ties, exclude=patterns, verify=True)
    assert files(out) == (OURS | {*OTHER, *KEPT}) - left_out
    stated = json.loads((out / "tierewrite.json").read_text())["options"]["exclude"]
    assert stated == ([patterns] if isinstance(patterns, str) else patterns)
    idle = [warning for warning in report.warnings if "exclude 'config.json', 'nothing' leaves out nothing" in warning]
    assert len(idle) == (not left_out)
    assert left_out.isdisjoint(name for warning in report.warnings for name in OTHER if name in warning)
    assert tierewrite.verify(src, out, ties=ties, exclude=patterns).ok
    found = tierewrite.verify(src, out, ties=ties)
    assert not found.ok
    assert {problem.where for problem in found.problems} >= left_out


def test_the_command_line_takes_several_patterns(src: Path, tmp_path: Path) -> None:
    ties, out = str(tmp_path / "ties.json"), str(tmp_path / "out")
    options = ("--ties", ties, "--exclude", "*.bin", "--exclude", "*.pth")
    assert CliRunner().invoke(cli, ["rewrite", str(src), out, *options]).exit_code == 0
    assert files(tmp_path / "out") == OURS | {"gguf/q4.gguf", "gguf/README.md", "tokenizer.json"}
    assert CliRunner().invoke(cli, ["verify", str(src), out, *options]).exit_code == 0
    assert CliRunner().invoke(cli, ["verify", str(src), out, "--ties", ties]).exit_code == 6


def test_a_batch_takes_them_of_all_or_of_one(src: Path, tmp_path: Path) -> None:
    ties = str(tmp_path / "ties.json")
    items = [
        {"src": str(src), "dst": str(tmp_path / "one"), "exclude": ["*.gguf", "*.pth"]},
        {"src": str(src), "dst": str(tmp_path / "two")},
    ]
    training = {"pytorch_model.bin", "training_args.bin"}
    for status in ("rewritten", "already-done"):
        done = tierewrite.batch(items, ties=ties, exclude="*.bin")
        assert [result.status for result in done.results] == [status, status]
    assert files(tmp_path / "one") == OURS | {"tokenizer.json", "gguf/README.md"} | training  # its own list alone
    assert files(tmp_path / "two") == (OURS | {*OTHER, *KEPT}) - training


@pytest.mark.parametrize("value", [1, [1], "", [""], {"a": 1}, None])
def test_what_is_no_pattern_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="exclude is"):
        Policy.of(exclude=value)  # type: ignore[arg-type]
