"""The README can be read, its commands run and print what it shows, and the links of all documents lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

import tierewrite
from tests.checkpoints import FIXTURES
from tierewrite import cli
from tierewrite.cli.commands import cli as command_line

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/**/*.md")]
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)


def blocks(text: str) -> list[list[str]]:
    """The indented blocks of a document, without their indent."""
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("    "):
            found[-1].append(line[4:])
        elif line.strip() and found[-1]:
            found.append([])
    return [block for block in found if block]


def shown(first: str) -> list[str]:
    """The block whose first line begins with `first`."""
    (block,) = (block for block in blocks(README) if block[0].lstrip().startswith(first))
    return block


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the fixtures are, as in a clone."""
    (tmp_path / "fixtures").symlink_to(FIXTURES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_is_at_most_200_lines() -> None:
    assert README.count("\n") <= 200


def test_commands_for_who_has_no_checkpoint_run_as_written(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown("tierewrite plan fixtures/dg_nvfp4/naive")
    assert len(lines) == 4
    for line in lines:
        expected = 6 if "exit 6" in line else 0
        program, *arguments = shlex.split(line, comments=True)
        assert program == "tierewrite"
        assert cli.run(arguments) == expected, line
    capsys.readouterr()


def test_what_is_shown_is_what_is_printed(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {
        "tensor bytes": (["rewrite", "fixtures/dg_nvfp4/naive", "canonical"], 0),
        "error: per-side-conflict": (["check", "canonical"], 6),
        "tierewrite: 1 declared tie not confirmed": (
            ["rewrite", "fixtures/qwen3_tied_but_diverged_bf16/naive", "no"],
            3,
        ),
    }
    for first, (arguments, code) in runs.items():
        assert cli.run(arguments) == code
        out, err = capsys.readouterr()
        printed = " ".join((out + err).split())
        for line in shown(first):
            assert " ".join(line.split()).partition("...")[0] in printed, line


def test_every_command_and_option_that_is_named_exists() -> None:
    commands = command_line.commands
    named = set(re.findall(r"^    tierewrite (\w+)", README, re.MULTILINE))
    assert named <= commands.keys()
    assert commands.keys() - named <= {"explain"} | named
    options = {name for command in commands.values() for parameter in command.params for name in parameter.opts}
    assert set(re.findall(r"`(--[a-z-]+)", README)) <= options


def test_the_library_lines_are_python_that_names_what_exists() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    compile(code, "README.md", "exec")
    for name in re.findall(r"tierewrite\.(\w+)", code):
        assert hasattr(tierewrite, name)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_anchors_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, anchor = target.partition("#")
        if re.match(r"https?:", place):
            continue
        there = path if not place else (path.parent / place).resolve()
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_by_their_path_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.name == "CHANGELOG.md":
        return  # what it tells of may be gone
    named = set(re.findall(r"`((?:tierewrite|tests|bin|fixtures|\.github)/[\w./-]+)", text))
    named = {name for name in named if not re.fullmatch(r"tierewrite/[\w-]+/\d+", name)}  # schemas of JSON
    assert {name for name in named if not (ROOT / name.rstrip("./").partition("::")[0]).exists()} == set()


def test_bin_scripts_say_what_they_do() -> None:
    for name in ("demo", "test", "bench", "recipe"):
        assert subprocess.run(["bash", "-n", ROOT / "bin" / name], check=False).returncode == 0
