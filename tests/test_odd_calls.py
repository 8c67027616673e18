"""Calls and files that nobody thought of: an error of ours that says what to do, no internal one, no endless read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tierewrite
from tests.checkpoints import FIXTURES
from tierewrite import cli
from tierewrite.consumers import backbone
from tierewrite.errors import shown
from tierewrite.ties import patterns

SRC = FIXTURES / "qwen3_tied_bf16" / "naive"
TIES = {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize("size", [2**63 - 1, 2**63, "99999999999999999999GB"])
def test_size_beyond_64_bits_is_no_limit(size: Any) -> None:
    case = FIXTURES / "dg_nvfp4_sharded" / "naive"
    (shard,) = tierewrite.plan(case, max_shard_size=size).shards
    assert shard.names == tierewrite.plan(case, max_shard_size="1GB").shards[0].names


@pytest.mark.parametrize(
    ("package", "fault"),
    [
        ("torch", "OSError('libcudart.so.12: cannot open shared object file')"),
        ("torch", "ImportError('version GLIBCXX_3.4.32 not found')"),
        ("transformers", "ImportError('huggingface-hub>=1.0 is required')"),
        ("transformers", "RuntimeError('of another time')"),
    ],
)
@pytest.mark.parametrize("command", [("plan",), ("check", "--for", "transformers")])
def test_a_broken_installation_is_neither_an_internal_error_nor_the_fault_of_a_checkpoint(
    command: tuple[str, ...], package: str, fault: str, tmp_path: Path
) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(f"raise {fault}\n")
    root = Path(tierewrite.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "tierewrite", *command, str(SRC)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 5, done
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert f"cannot be imported here: {fault.partition('(')[0]}: " in done.stderr
    assert "--ties FILE" in done.stderr


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_threads_are_a_number_of_workers(threads: Any, tmp_path: Path) -> None:
    for call in (
        lambda: tierewrite.rewrite(SRC, tmp_path / "out", ties=TIES, threads=threads),
        lambda: tierewrite.plan(SRC, ties=TIES, threads=threads, confirm=True),
        lambda: list(tierewrite.stream(SRC, ties=TIES, threads=threads)),
    ):
        with pytest.raises(tierewrite.UsageError, match=r"threads is .*; expected a whole number"):
            call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ties", "said"),
    [
        ({1: "a"}, "has the key 1"),
        ({None: "a"}, "has the key None"),
        ({"a": b"b"}, "ties 'a' to"),
        ({"a": Path("b")}, "ties 'a' to"),
        ({"a": None}, "ties 'a' to null"),
    ],
)
def test_mapping_of_ties_holds_names(ties: Any, said: str) -> None:
    with pytest.raises(tierewrite.TieFileError, match=said):
        tierewrite.plan(SRC, ties=ties)


@pytest.mark.parametrize(
    ("module", "limit", "call"),
    [
        (patterns, "_MAX_TIES_BYTES", lambda file: tierewrite.plan(SRC, ties=file)),
        (backbone, "_MAX_FILE_BYTES", lambda file: tierewrite.check(SRC, ties=TIES, backbone=file)),
    ],
    ids=["ties", "backbone"],
)
def test_file_without_an_end_is_not_read_to_its_end(
    module: Any, limit: str, call: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, limit, 4096)
    with pytest.raises(tierewrite.UsageError, match="it has more than 4,096 bytes"):
        call(Path("/dev/zero"))


def test_ties_may_come_through_a_pipe(tmp_path: Path) -> None:
    """What a shell makes of `--ties <(jq ...)`."""
    pipe = tmp_path / "pipe"
    subprocess.run(["mkfifo", str(pipe)], check=True)
    writer = threading.Thread(target=pipe.write_text, args=('{"lm_head.weight": "model.embed_tokens.weight"}',))
    writer.start()
    assert tierewrite.plan(SRC, ties=pipe).total_tensors == 24
    writer.join()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested more than 127 deep"),
        ('{"prefixes": [], "prefixes": []}', "'prefixes' comes twice"),
        ("{}", "'prefixes' is missing"),
        ("{} x", "Extra data"),
        ("\ud800", "surrogates not allowed|can't decode"),
    ],
)
def test_backbone_that_is_none_is_wrong_usage(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "backbone.json"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(tierewrite.UsageError, match=f"is no description of a backbone: .*({said})"):
        tierewrite.check(SRC, ties=TIES, backbone=file)


@pytest.mark.parametrize("words", [["--loader", "require"], ["--consumer-python", "/bin/true"], ["--force"]])
def test_option_for_a_consumer_is_not_passed_over_where_there_is_none(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ties = tmp_path / "ties.json"
    ties.write_text("{}")
    assert cli.run(["rewrite", str(SRC), str(tmp_path / "out"), "--ties", str(ties), *words]) == 2
    assert not (tmp_path / "out").exists()
    assert f"{words[0]} goes with --for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loader": "require"}, "loader goes with consumer"),
        ({"consumer_python": "/bin/true"}, "consumer_python goes with consumer"),
        ({"force": True}, "force=True goes with consumer"),
        ({"backup": False}, "backup=False goes with in_place=True"),
    ],
)
def test_nor_is_it_by_the_library(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Whoever asks for the consumer's loader and forgets the consumer would get a checkpoint that nobody checked."""
    calls: list[Callable[[], object]] = [lambda: tierewrite.rewrite(SRC, tmp_path / "out", ties={}, **options)]
    if "backup" not in options:
        calls.append(lambda: tierewrite.stream(SRC, ties={}, **options))
        calls.append(lambda: tierewrite.batch([SRC], into=tmp_path / "several", ties={}, **options))
    for call in calls:
        with pytest.raises(tierewrite.UsageError, match=re.escape(f"{said}; leave it out, or add that")):
            call()
    assert not list(tmp_path.iterdir())


def test_ties_of_another_kind_are_told_with_what_to_give() -> None:
    ties = tierewrite.TieMap.from_mapping(TIES, [*TIES, *TIES.values()])
    kinds = {"ties is a TieMap; .* a TieMap's are {tie.alias: ": ties, "ties is a list; expected": [*TIES]}
    for said, given in kinds.items():
        with pytest.raises(tierewrite.UsageError, match=said):
            tierewrite.plan(SRC, ties=given)  # type: ignore[arg-type]
    pairs = {tie.alias: tie.canonical for tie in ties.ties}
    assert tierewrite.plan(SRC, ties=pairs).by_id.keys() == {"model.embed_tokens.weight"}


def test_in_a_batch_it_is_for_the_checkpoints_that_have_one(tmp_path: Path) -> None:
    one, other = {"src": str(SRC), "dst": str(tmp_path / "a")}, {"src": str(SRC), "dst": str(tmp_path / "b")}
    items = [{**one, "consumer": "transformers"}, other]
    report = tierewrite.batch(items, force=True, loader="off", ties={})
    assert [result.status for result in report.results] == ["canonical", "canonical"]


def test_loader_that_is_no_loader_is_told_with_what_to_do(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nprintf 'garbage \\033[31m' >&2; exit 3\n")
    program.chmod(0o755)
    with pytest.raises(tierewrite.SystemFailure) as error:
        tierewrite.check(SRC, "vllm", ties=TIES, loader="require", consumer_python=program)
    assert str(error.value) == (
        "vLLM's own loader could not be asked: its process ended with status 3: garbage \\x1b[31m; name a Python in "
        'which vLLM works (consumer_python), or leave out loader="require"'
    )


def test_a_current_folder_that_was_removed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for command, code in ((["rewrite", str(SRC), "out"], 5), (["plan", "."], 4), (["check", "out"], 4)):
        assert cli.run(command) == code
        assert "the current folder was removed: go to another one" in capsys.readouterr().err


def test_who_asks_a_class_from_a_folder_that_was_removed_is_not_told_to_repair_torch(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    script = (
        "import os, sys; os.chdir(sys.argv[1]); os.rmdir(sys.argv[1]); from tierewrite import cli; "
        "sys.exit(cli.run(['plan', sys.argv[2]]))"
    )
    environment = os.environ | {"TIEREWRITE_CACHE": "", "PYTHONPATH": str(Path(tierewrite.__file__).parent.parent)}
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "gone"), str(SRC.resolve())],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode in (0, 5)  # some versions of torch do without a current folder
    assert "repair" not in ended.stderr
    assert ended.returncode == 0 or "the current folder was removed: go to another one" in ended.stderr


def test_scan_counts_a_checkpoint_once_by_whatever_names(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(SRC)
    report = tierewrite.batch([SRC, f"{SRC}/", tmp_path / "link", tmp_path], plan_only=True, ties={})
    assert [result.src for result in report.results] == [str(SRC)]
    (tmp_path / "list.txt").write_text(f'{SRC}\n{{"src": "{SRC}", "kv_scales": "merge"}}\n')
    report = tierewrite.batch([tmp_path / "list.txt", SRC], plan_only=True, ties={})
    assert [result.src for result in report.results] == [str(SRC), str(SRC)]  # two plans


class Mode(str, Enum):
    KEEP = "keep"


@pytest.mark.parametrize(
    "options",
    [
        {"on_mismatch": Mode.KEEP},
        {"exclude": np.str_("*.txt")},
        {"exclude": [np.str_("*.txt")]},
        {"ties": {np.str_("lm_head.weight"): np.str_("model.embed_tokens.weight")}},
    ],
)
def test_texts_of_numpy_and_of_enumerations_are_texts(options: Any, tmp_path: Path) -> None:
    """They were found at the end of the rewrite, by the encoder of the manifest."""
    report = tierewrite.rewrite(SRC, tmp_path / "out", **{"ties": TIES, **options})
    assert report.to_json()["after"]["tensors"] == 24
    assert tierewrite.verify(SRC, tmp_path / "out", **{"ties": TIES, **options}).ok


def test_a_wildcard_that_is_no_text_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(tierewrite.UsageError, match=r"exclude is '\\udcff\*', which is no text in UTF-8; write \?"):
        tierewrite.rewrite(SRC, tmp_path / "out", ties=TIES, exclude="\udcff*")
    assert list(tmp_path.iterdir()) == []


def test_engine_that_is_no_text_in_utf_8_is_named_as_escapes(tmp_path: Path) -> None:
    with pytest.raises(tierewrite.UsageError) as error:
        tierewrite.rewrite(SRC, tmp_path / "out", ties=TIES, engine="\ud800")  # type: ignore[arg-type]
    assert str(error.value).encode() == rb"there is no engine '\ud800'; expected one of local, ray"


def test_sample_goes_with_values() -> None:
    with pytest.raises(tierewrite.UsageError, match="sample goes with values=True"):
        tierewrite.check(SRC, ties=TIES, sample=3)


def test_name_that_leaves_no_room_for_the_staging_folders_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(tierewrite.UsageError, match=r"has 255 bytes; it may have 238; hidden folders"):
        tierewrite.rewrite(SRC, tmp_path / ("a" * 255), ties=TIES)
    tierewrite.rewrite(SRC, tmp_path / ("a" * 238), ties=TIES)
    assert [path.name for path in tmp_path.iterdir()] == ["a" * 238]


def test_place_below_a_file_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(tierewrite.SystemFailure, match="a part of its path is a file, not a folder"):
        tierewrite.rewrite(SRC, tmp_path / "file" / "out", ties=TIES)


def test_name_of_a_page_is_shown_on_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tierewrite.rewrite(SRC, tmp_path / "out", ties=TIES)
    page = tmp_path / "a\n\x1b[31mpage.html"
    assert cli.run(["report", str(tmp_path / "out"), "--html", str(page)]) == 0
    assert capsys.readouterr().out == f"{shown(str(page))} is written.\n"
    assert page.exists()
