"""The one door to the terminal: what it escapes, output that cannot be delivered; and threads that do not start."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

import tierewrite
from tests.checkpoints import FIXTURES, write_checkpoint
from tests.faults import REPOSITORY, contents, names_in
from tierewrite import cli
from tierewrite.cli.terminal import Door, LogHandler
from tierewrite.errors import EXIT_CODES, SystemFailure, Undelivered, to_tierewrite_error
from tierewrite.tables import tied_parameters

QWEN = FIXTURES / "qwen3_tied_bf16" / "naive"
EVIL = "\x1b]0;owned\x07\x1b[31m\x9b2J\r\u202e\u2066"
FORBIDDEN = "\x1b\x9b\x07\r\u202e\u2066"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}


@pytest.fixture
def ties(tmp_path: Path) -> Path:
    path = tmp_path / "ties.json"
    path.write_text('{"lm_head": "model.embed_tokens"}')
    return path


# ------------------------------------------------------------------------------------------------- what strangers wrote


@pytest.fixture
def evil(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint whose every name holds escapes, and its ties."""
    data = ("BF16", [2, 4], bytes(range(16)))
    other = ("BF16", [2, 4], bytes(16))
    tensors = {
        f"a{EVIL}.weight": data,
        f"b{EVIL}.weight": data,
        f"c{EVIL}.weight": data,
        f"d{EVIL}.weight": other,
        f"e{EVIL}.weight": data,
        f"f{EVIL}.weight": data,
        f"f{EVIL}.weight_{EVIL}": other,
    }
    config = {
        "model_type": f"type{EVIL}",
        "architectures": [f"Class{EVIL}"],
        "quantization_config": {"quant_method": f"method{EVIL}", "ignore": [f"a{EVIL}"]},
    }
    src = write_checkpoint(tmp_path / f"src{EVIL.replace('/', '')}", tensors, config)
    (src / f"notes{EVIL}.txt").write_text(EVIL)
    ties = tmp_path / f"ties{EVIL}.json"
    ties.write_text(json.dumps({f"{alias}.*[.]weight": f"{name}.*[.]weight" for alias, name in ("ba", "dc", "fe")}))
    return src, ties


def test_no_escape_of_a_name_reaches_the_terminal_from_any_command(
    evil: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src, ties = evil
    out, broken = tmp_path / f"out{EVIL}", tmp_path / f"broken{EVIL}"
    with_ties = ("--ties", str(ties))
    keep = ("--on-mismatch", "keep")
    listed = tmp_path / f"list{EVIL}.txt"
    listed.write_text(json.dumps({"src": str(src), EVIL: 1}))
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(EVIL.encode())
    (broken / "config.json").write_text(json.dumps({"architectures": [EVIL], "model_type": EVIL}))
    commands: tuple[tuple[str | Path, ...], ...] = (
        ("plan", src, *with_ties),
        ("plan", src),
        ("plan", src, *with_ties, "--max-shard-size", EVIL),
        ("plan", src, f"--{EVIL}"),
        (EVIL,),
        ("inspect", src, *with_ties),
        ("inspect", src, "--no-ties"),
        ("rewrite", src, out, *with_ties),
        ("-vv", "rewrite", src, out, *with_ties, *keep),
        ("rewrite", src, out, *with_ties, *keep),
        ("verify", src, out, *with_ties, *keep),
        ("verify", src, src, *with_ties),
        ("check", src, *with_ties),
        ("check", src),
        ("report", out),
        ("report", src),
        ("batch", tmp_path, "--plan-only", *with_ties),
        ("batch", tmp_path, "--into", tmp_path / f"all{EVIL}", *with_ties, *keep),
        ("batch", listed, "--plan-only"),
        ("plan", broken),
        ("plan", broken, "--json"),
        ("plan", tmp_path / EVIL),
        ("explain", EVIL),
    )
    codes = set()
    for command in commands:
        codes.add(code := cli.run([str(part) for part in command]))
        said = capsys.readouterr()
        for stream in (said.out, said.err):
            assert not set(stream) & set(FORBIDDEN), (command, stream)
        assert code in EXIT_CODES, command
        assert "internal error" not in said.err, (command, said.err)
    assert {0, 2, 3, 4, 6} <= codes


class Terminal(io.StringIO):
    """Standard error of a person."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_the_consoles_own_codes_pass_and_those_of_names_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Terminal()
    console = Door(cast(io.TextIOWrapper, screen)).console()
    table = Table(f"head{EVIL}")
    table.add_row(Text(f"cell{EVIL}", style="red"))
    console.print(table)
    console.print(Text(EVIL))
    console.print(EVIL, markup=False)
    text = screen.getvalue()
    assert "\x1b[31mcell" in text  # red, by rich
    assert "\x1b]0;" not in text
    assert not set(text) & set(FORBIDDEN) - {"\x1b"}
    assert r"\x1b]0;owned" in text


def test_a_log_line_is_escaped_also_above_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    door = Door(cast(io.TextIOWrapper, screen))
    monkeypatch.setattr(sys, "stderr", door)
    record = logging.LogRecord("tierewrite", logging.WARNING, "", 0, "found %s", (EVIL,), None)
    LogHandler().emit(record)
    door.console()
    LogHandler().emit(record)
    assert screen.getvalue().count(r"\x1b[31m") == 2
    assert not set(screen.getvalue()) & set(FORBIDDEN) - {"\x1b"}
    assert "\x1b[31m" not in screen.getvalue()


def test_what_an_encoding_lacks_is_escaped() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    Door(stream).write("größe\n")
    assert raw.getvalue() == rb"gr\xf6\xdfe" + b"\n"


# ------------------------------------------------------------------------------------------------- not delivered


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A line of bash in which $tw is the command."""
    command = f"{sys.executable} -m tierewrite"
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line.replace("$tw", command)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=folder,
        timeout=120,
    )


FULL, CLOSED, GONE = ">/dev/full", ">&-", "| true"


@pytest.mark.parametrize(
    ("command", "where", "code"),
    [
        ("--help", FULL, 5),
        ("--version", FULL, 5),
        ("--version", CLOSED, 5),
        ("rewrite --help", FULL, 5),
        ("plan SRC --ties ties.json", FULL, 5),
        ("plan SRC --ties ties.json", CLOSED, 5),
        ("plan SRC --ties ties.json --json", FULL, 5),
        ("explain --list", CLOSED, 5),
        ("plan nothing-there --json", FULL, 4),
        ("plan nothing-there --json", CLOSED, 4),
        ("plan --nonsense --json", FULL, 2),
    ],
)
def test_output_that_cannot_be_delivered_is_exit_5_and_an_error_keeps_its_code(
    command: str, where: str, code: int, ties: Path, tmp_path: Path
) -> None:
    done = shell(f"$tw {command.replace('SRC', str(QWEN))} {where}", tmp_path)
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("tierewrite: ")]) == (code in (4, 5)), done
    if code == 5:
        assert "standard output did not take the result" in done.stderr


def test_a_reader_that_has_gone_is_exit_5_without_a_word(ties: Path, tmp_path: Path) -> None:
    for command in ("--help", f"plan {QWEN} --ties ties.json --json", f"plan {QWEN} --ties ties.json"):
        done = shell(f"(sleep 0.1; $tw {command}) | true", tmp_path)
        assert (done.returncode, done.stderr) in ((5, ""), (0, "")), (command, done)
    done = shell(f"$tw plan {QWEN} --ties ties.json --json | (exec <&-; sleep 3)", tmp_path)
    assert (done.returncode, done.stderr) == (5, ""), done


@pytest.mark.parametrize(("form", "where"), [("", FULL), ("--json", FULL), ("", CLOSED), ("-q", CLOSED)])
def test_after_a_rewrite_it_is_said_that_dst_is_complete(where: str, form: str, ties: Path, tmp_path: Path) -> None:
    done = shell(f"$tw rewrite {QWEN} out --ties ties.json {form} {where}", tmp_path)
    assert names_in(tmp_path) == ["out", "ties.json"]
    assert tierewrite.verify(QWEN, tmp_path / "out", ties=ties).ok
    if form == "-q":  # nothing was to be printed
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode == 5
        assert done.stderr.endswith("; DST is complete\n")


@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-"])
def test_what_standard_error_does_not_take_changes_no_exit_code(where: str, ties: Path, tmp_path: Path) -> None:
    assert shell(f"$tw plan nothing-there {where}", tmp_path).returncode == 4
    done = shell(f"$tw -v rewrite {QWEN} out --ties ties.json --json {where}", tmp_path)
    assert done.returncode == 0, done
    assert json.loads(done.stdout)["schema"]


def test_no_file_of_ours_takes_the_number_of_a_closed_standard_stream(ties: Path, tmp_path: Path) -> None:
    """What a library prints to file 1 or 2 must not land in a shard."""
    assert shell(f"$tw rewrite {QWEN} right --ties ties.json -q", tmp_path).returncode == 0
    code = (
        "import os; from tierewrite.stores import local; write = local.write_all\n"
        "def noisy(*args):\n"
        "    for number in (1, 2): os.write(number, b'noise')\n"
        "    return write(*args)\n"
        "local.write_all = noisy\n"
        "from tierewrite.output import files; files.write_all = noisy\n"
        "from tierewrite.cli import main; main()\n"
    )
    (tmp_path / "noisy.py").write_text(code)
    line = f"{sys.executable} noisy.py rewrite {QWEN} out --ties ties.json -q <&- >&- 2>&-"
    assert shell(line, tmp_path).returncode == 0
    right, out = contents(tmp_path / "right"), contents(tmp_path / "out")
    assert right is not None
    assert out is not None
    assert {n: d for n, d in out.items() if n != "tierewrite.json"} == {
        n: d for n, d in right.items() if n != "tierewrite.json"
    }


def test_a_door_fails_once(tmp_path: Path) -> None:
    with open("/dev/full", "w", buffering=1) as full:
        door = Door(full, must_arrive=True)
        with pytest.raises(Undelivered, match="ENOSPC"):
            door.write("line\n")
        door.write("line\n")
        with pytest.raises(Undelivered, match="ENOSPC"):  # whoever went on after the first
            door.flush()


# ------------------------------------------------------------------------------------------------- threads


def no_thread(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """From then on the system starts no thread."""
    start = threading.Thread.start
    left = [after]

    def refused(self: threading.Thread) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refused)


COMMANDS: dict[str, Callable[[Path, Path, Path], object]] = {
    "rewrite": lambda right, ties, out: tierewrite.rewrite(QWEN, out, ties=ties, device="cpu"),
    "proved": lambda right, ties, out: tierewrite.rewrite(QWEN, out, ties=ties, device="auto", verify=True),
    "verify": lambda right, ties, out: tierewrite.verify(QWEN, right, ties=ties),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_where_no_thread_starts_that_is_a_failure_of_the_system_and_none_is_left(
    command: str, ties: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, work = tmp_path / "right", tmp_path / "work"
    tierewrite.rewrite(QWEN, right, ties=ties)
    work.mkdir()
    before = threading.active_count()
    failed = 0
    for after in range(8):
        with monkeypatch.context() as patched:
            no_thread(patched, after)
            try:
                COMMANDS[command](right, ties, work / "out")
            except (RuntimeError, SystemFailure) as error:
                failed += 1
                ours = to_tierewrite_error(error)
                assert isinstance(ours, SystemFailure)
                assert "starts no further thread" in str(ours)
                assert names_in(work) == []
        assert threading.active_count() == before
        shutil.rmtree(work / "out", ignore_errors=True)
    assert failed


def test_a_command_says_so_with_exit_5(
    ties: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_thread(monkeypatch, 0)
    assert cli.run(["rewrite", str(QWEN), str(tmp_path / "out"), "--ties", str(ties)]) == 5
    assert "the system starts no further thread" in capsys.readouterr().err
    assert names_in(tmp_path) == ["ties.json"]


@pytest.mark.parametrize("name", ["experts.gate_up_proj", "decoder.layers.post_feedforward_layernorm_1"])
def test_no_name_of_a_table_is_cut_in_eighty_columns(name: str) -> None:
    made = tied_parameters([name], "groups", "kept", "tensors dropped", "bytes dropped", "scales merged", "ratio")
    made.add_row(name, "2", "0", "1,064", "18.12 KiB", "16", "1.05x, 1.08x")
    lines = io.StringIO()
    Console(file=lines, width=80).print(made)
    shown = lines.getvalue().splitlines()
    assert max(map(len, shown)) <= 80
    assert name in "".join(line.split("  ")[0] for line in shown)


def test_a_row_of_a_summary_is_one_line_in_eighty_columns(tmp_path: Path) -> None:
    report = tierewrite.rewrite(FIXTURES / "dg_nvfp4" / "naive", tmp_path / "out")
    lines = io.StringIO()
    Console(file=lines, width=80).print(report)
    rows = [line for line in lines.getvalue().splitlines() if line.startswith("experts.")]
    assert [row.split()[-2:] for row in rows] == [["1.05x,", "1.08x"], ["1.59x,", "2.15x"]]
