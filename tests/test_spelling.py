"""Messages name options as their reader writes them: flags for a command, keyword arguments for a call."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path

import click
import pytest

import tierewrite
from tests.checkpoints import FIXTURES
from tierewrite import cli
from tierewrite.cli.commands import cli as command_line
from tierewrite.planning.policy import OPTIONS
from tierewrite.spelling import RENAMED, SWITCHES, VALUES, of_a_command, spelled

DIVERGED = FIXTURES / "qwen3_tied_but_diverged_bf16" / "naive"
FUNCTIONS = (
    tierewrite.batch,
    tierewrite.check,
    tierewrite.expand,
    tierewrite.plan,
    tierewrite.push,
    tierewrite.report_page,
    tierewrite.rewrite,
    tierewrite.verify,
)
KEYWORDS = {name for function in FUNCTIONS for name in inspect.signature(function).parameters} | set(OPTIONS)


@pytest.mark.parametrize(
    ("message", "python"),
    [
        ("Keep both with --on-mismatch keep; with --fix-config as well", 'on_mismatch="keep"; with fix_config=True as'),
        ("use fewer --threads or a larger machine", "use fewer threads or a larger machine"),
        ("no model is built from this (use --ties FILE)", "(use ties=FILE)"),
        ("--ray-address belongs to --engine ray", 'ray_address belongs to engine="ray"'),
        ("leave out --no-backup, --no-manifest", "leave out backup=False, manifest=False"),
        ("not checked (--for vllm)", '(consumer="vllm")'),
        ("`tierewrite explain --list` names --values", "`tierewrite explain --list` names values=True"),
        ("to go on: hf upload a b . --private", "to go on: hf upload a b . --private"),
        ("vllm serve --load-format tierewrite", "--load-format tierewrite"),
        ("a--force.safetensors", "a--force.safetensors"),
    ],
)
def test_flags_become_keyword_arguments(message: str, python: str) -> None:
    assert python in spelled(message)
    with of_a_command():
        assert spelled(message) == message


def test_every_spelling_is_an_argument_and_every_option_that_is_one_is_spelled() -> None:
    known = SWITCHES | VALUES
    assert {name.replace("-", "_") for name in known} <= KEYWORDS
    assert set(RENAMED.values()) <= KEYWORDS
    options = {
        flag.removeprefix("--").removeprefix("no-"): parameter
        for command in command_line.commands.values()
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for flag in parameter.opts
        if flag.startswith("--")
    }
    shared = {name for name in options if name.replace("-", "_") in KEYWORDS}
    assert shared - known == set()
    assert {name for name in known & set(options) if options[name].is_flag} == SWITCHES & set(options)
    for name in VALUES & set(options):
        for choice in getattr(options[name].type, "choices", ()):
            assert spelled(f"--{name} {choice}") == f'{name.replace("-", "_")}="{choice}"'


def test_an_error_of_the_library_speaks_python_and_one_of_a_command_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(tierewrite.Refused) as refused:
        tierewrite.rewrite(DIVERGED, tmp_path / "out")
    assert 'Keep both with on_mismatch="keep"; with fix_config=True as well' in str(refused.value)
    (failed,) = tierewrite.batch([DIVERGED], into=tmp_path / "several").failed
    assert failed.error is not None
    assert 'on_mismatch="keep"' in failed.error["message"]
    assert cli.run(["rewrite", str(DIVERGED), str(tmp_path / "out")]) == 3
    assert "Keep both with --on-mismatch keep; with --fix-config as well" in capsys.readouterr().err
    half = FIXTURES / "dg_nvfp4_encoder_bf16" / "naive"  # its other ties hold, and the flag is theirs as well
    assert cli.run(["rewrite", str(half), str(tmp_path / "out")]) == 3
    assert capsys.readouterr().err.endswith("Keep both with --on-mismatch keep.\n")
    assert "--" not in str(refused.value)


def test_results_of_the_library_speak_python_and_those_of_a_command_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    shutil.copytree(FIXTURES / "qwen3_tied_bf16" / "naive", src)
    (src / "pytorch_model.bin").write_bytes(b"weights")
    assert cli.run(["rewrite", str(src), str(dst)]) == 0
    assert "--exclude leaves them out" in capsys.readouterr().out
    said = [
        *tierewrite.plan(src).warnings,
        *tierewrite.plan(src, duplicates=True).warnings,
        *tierewrite.stream(src).warnings,
        *tierewrite.inspect(src).warnings,
        *tierewrite.rewrite(src, tmp_path / "again").warnings,
        *tierewrite.verify(src, dst).notes,
        *tierewrite.expand(dst, tmp_path / "expanded").warnings,
    ]
    assert len([one for one in said if "exclude leaves them out" in one]) >= 4
    notes = tierewrite.check(dst, "vllm", loader="off").notes
    assert any('(loader="off")' in note for note in notes)
    problems = tierewrite.verify(DIVERGED, dst).problems
    assert any('only with on_mismatch="keep"' in problem.message for problem in problems)
    assert not [one for one in (*said, *notes, *(problem.message for problem in problems)) if "--" in one]


def test_the_repr_of_an_error_says_what_its_text_says(tmp_path: Path) -> None:
    with pytest.raises(tierewrite.Refused) as refused:
        tierewrite.rewrite(DIVERGED, tmp_path / "out")
    assert repr(refused.value) == f"Refused({str(refused.value)!r})"
    with pytest.raises(tierewrite.SourceError) as missing:
        tierewrite.plan(tmp_path / "nowhere")
    assert "nowhere" in repr(missing.value)


def test_what_is_no_model_declares_no_ties() -> None:
    with pytest.raises(tierewrite.UsageError, match=r"of type int; expected a model of transformers"):
        tierewrite.TieMap.from_model(3)  # type: ignore[arg-type]
