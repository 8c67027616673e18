"""Many checkpoints: what is found and listed, one that fails among others, running again, many at a time, signals."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import tierewrite
from tests.checkpoints import FIXTURES, digests, read_header, right_answer, write_shard
from tests.conftest import snapshot
from tests.hub_server import Hub, Repo
from tierewrite import cli, digest, interrupts
from tierewrite.batches import collection, done_before, folders
from tierewrite.batches.results import BATCH_SCHEMA, BatchInterrupted, BatchReport, BatchResult
from tierewrite.errors import Interrupted, SourceError, UsageError
from tierewrite.rewriting import run as rewriting
from tierewrite.source import bytes as source_bytes
from tierewrite.source import folder, hub
from tierewrite.stores import local
from tierewrite.ties import meta_model

ROOT = Path(__file__).parent.parent
TIES = {"lm_head.weight": "model.embed_tokens.weight"}


def run(*arguments: object) -> int:
    return cli.run(["batch", *map(str, arguments)])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file at or below a folder, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def naive(case: str) -> Path:
    return FIXTURES / case / "naive"


def put(case: str, where: Path) -> Path:
    where.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copytree(naive(case), where))


def tiny(where: Path, seed: int = 0, rows: int = 4) -> Path:
    """A checkpoint of three tensors whose ties `ties_file` says, so that no class is asked."""
    where.mkdir(parents=True)
    embedding = bytes((seed + i) % 251 for i in range(rows * 8))
    tensors: dict[str, Any] = {
        "lm_head.weight": ("F32", [rows, 2], embedding),
        "model.embed_tokens.weight": ("F32", [rows, 2], embedding),
        "model.norm.weight": ("F32", [2], bytes((seed + i) % 7 for i in range(8))),
    }
    write_shard(where / "model.safetensors", tensors, {"format": "pt"})
    (where / "config.json").write_text('{"model_type": "tiny"}')
    return where


@pytest.fixture
def ties_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ties") / "ties.json"
    path.write_text(json.dumps(TIES))
    return path


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A collection of five: two to rewrite, one with nothing to do, one refused, one malformed."""
    folder = tmp_path / "models"
    put("dg_nvfp4", folder / "dg")
    put("qwen3_tied_bf16", folder / "more" / "deep" / "tied")
    put("qwen3_untied_equal_bf16", folder / "more" / "untied")
    put("qwen3_tied_but_diverged_bf16", folder / "diverged")
    bad = put("qwen3_tied_bf16", folder / "bad") / "model.safetensors"
    bad.write_bytes(bad.read_bytes()[:-1])
    return folder


def results(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


# --------------------------------------------------------------------------------------------------- a whole batch


def test_one_that_fails_does_not_stop_the_others_and_each_output_is_a_single_rewrites(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(models)
    assert run(models, "--into", tmp_path / "out", "--json") == 6
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert data["schema"] == BATCH_SCHEMA
    status = {Path(result["src"]).relative_to(models).as_posix(): result["status"] for result in data["results"]}
    assert status == {
        "bad": "failed",
        "dg": "rewritten",
        "diverged": "refused",
        "more/deep/tied": "rewritten",
        "more/untied": "canonical",
    }
    for name in ("dg", "more/deep/tied", "more/untied"):
        tierewrite.rewrite(models / name, tmp_path / "single" / name)
    assert contents(tmp_path / "out") == contents(tmp_path / "single")
    assert digests(tmp_path / "out" / "dg") == right_answer("dg_nvfp4")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dg", "more"]
    assert snapshot(models) == before
    # Whoever reads JSON still sees on standard error which ones failed, and why.
    assert len(err.splitlines()) == 2
    assert "[1/5] bad: failed: " in err
    assert "model.safetensors" in err
    assert (
        "[3/5] diverged: refused: 1 declared tie not confirmed, nothing was written: 'model.embed_tokens.weight' and "
        in err
    )


def test_json_has_each_checkpoints_numbers_and_the_totals(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(models, "--into", tmp_path / "out", "--json")
    data = results(capsys)
    assert data["exit_code"] == 6
    assert data["counts"] == {
        "checkpoints": 5,
        "rewritten": 2,
        "planned": 0,
        "canonical": 1,
        "already-done": 0,
        "skipped": 0,
        "refused": 1,
        "failed": 1,
        "stopped": 0,
        "not-started": 0,
    }
    bad, dg, diverged, tied, untied = data["results"]
    single = tierewrite.rewrite(models / "dg", tmp_path / "single").to_json()
    assert dg["dst"] == str(tmp_path / "out" / "dg")
    assert dg["before"] == {"bytes": single["before"]["bytes"], "tensors": 346}
    assert dg["after"] == {"bytes": single["after"]["bytes"], "tensors": 198}
    assert dg["saved_bytes"] == single["before"]["bytes"] - single["after"]["bytes"]
    assert (dg["groups"], dg["kept"], dg["merged_scales"]) == (43, 0, single["counts"]["merged_scales"])
    assert dg["ratios"] == single["ratios"]
    assert dg["seconds"] > 0
    assert (dg["exit_code"], dg["error"]) == (0, None)
    assert bad["exit_code"] == 4
    assert bad["error"]["type"] == "HeaderError"
    assert bad["error"]["file"] == str(models / "bad" / "model.safetensors")
    assert bad["before"] is bad["after"] is bad["saved_bytes"] is None
    assert diverged["exit_code"] == 3
    assert diverged["error"]["details"]["groups"][0]["aliases"] == ["lm_head.weight"]
    assert (untied["status"], untied["saved_bytes"]) == ("canonical", 0)
    assert data["before"]["bytes"] == sum(one["before"]["bytes"] for one in (dg, tied, untied))
    assert data["saved_bytes"] == dg["saved_bytes"] + tied["saved_bytes"]


def test_the_table_names_every_checkpoint_with_its_reason(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(models, "--into", tmp_path / "out") == 6
    out, err = capsys.readouterr()
    head, *lines = out.splitlines()
    assert head == f"In {models}/:"
    assert {line.split()[0]: line.split()[1] for line in lines[1:6]} == {
        "bad": "failed",
        "dg": "rewritten",
        "diverged": "refused",
        "more/deep/tied": "rewritten",
        "more/untied": "canonical",
    }
    assert out.count(f"{models}/bad") == 1
    assert f"\n{models}/bad/model.safetensors: " in out
    assert f"\n{models}/diverged: 1 declared tie not confirmed" in out
    assert out.count("--on-mismatch keep") == 1
    assert "2 rewritten, 1 canonical, 1 refused, 1 failed; 390.41 KiB -> 313.62 KiB, 76.79 KiB saved" in out
    assert "[2/5] dg: rewritten, 245.54 KiB -> 186.75 KiB (-23.9%)" in err.splitlines()


def test_all_well_exits_0_and_quiet_says_nothing(
    tmp_path: Path, ties_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny(tmp_path / "models" / "a")
    tiny(tmp_path / "models" / "b", seed=1)
    assert run(tmp_path / "models", "--into", tmp_path / "out", "--ties", ties_file, "-q") == 0
    assert capsys.readouterr() == ("", "")
    assert sorted(digests(tmp_path / "out" / "b")) == ["model.embed_tokens.weight", "model.norm.weight"]


def test_an_internal_error_of_one_is_exit_code_1_and_does_not_stop_the_others(
    tmp_path: Path, ties_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        tiny(tmp_path / "models" / name)
    real = rewriting.rewrite

    def rewrite(src: str, *args: Any, **options: Any) -> Any:
        if src.endswith("/b"):
            raise ZeroDivisionError("oh")
        if src.endswith("/c"):
            raise OSError(5, "Input/output error", "/dev/x")
        return real(src, *args, **options)

    monkeypatch.setattr(rewriting, "rewrite", rewrite)
    report = tierewrite.batch(tmp_path / "models", into=tmp_path / "out", ties=ties_file)
    assert [(result.status, result.exit_code) for result in report.results] == [
        ("rewritten", 0),
        ("failed", 1),
        ("failed", 5),
    ]
    assert report.results[1].error is not None
    assert "ZeroDivisionError: oh" in report.results[1].error["message"]
    assert report.exit_code == 6


@pytest.mark.parametrize("jobs", [2, 3])
def test_several_at_a_time_give_equal_bytes(models: Path, tmp_path: Path, jobs: int) -> None:
    one = tierewrite.batch(models, into=tmp_path / "one")
    many = tierewrite.batch([models], into=tmp_path / "many", jobs=jobs)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert [result.status for result in many.results] == [result.status for result in one.results]
    assert [Path(result.dst or "").name for result in many.results] == ["bad", "dg", "diverged", "tied", "untied"]


def test_a_class_that_is_asked_offline_keeps_no_other_thread_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, is_offline_mode

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with ThreadPoolExecutor(1) as other, meta_model.offline():
        assert is_offline_mode()
        assert not other.submit(lambda: bool(is_offline_mode())).result()
    assert constants.HF_HUB_OFFLINE is False


def test_folders_for_the_outputs_are_there_before_any_begins_and_go_if_they_stay_empty(
    tmp_path: Path, ties_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewrites at the same time would make and remove them under each other's feet."""
    (tmp_path / "models").mkdir()
    for name in ("x/a", "x/b", "y/c"):
        tiny(tmp_path / "models" / name)
    (tmp_path / "out" / "mine").mkdir(parents=True)
    seen: list[bool] = []

    def rewrite(src: str, dst: str, **options: Any) -> Any:
        seen.append(Path(dst).parent.is_dir())
        raise SourceError("no")

    monkeypatch.setattr(rewriting, "rewrite", rewrite)
    report = tierewrite.batch(tmp_path / "models", into=tmp_path / "out", jobs=3)
    assert seen == [True] * 3
    assert [result.exit_code for result in report.results] == [4] * 3
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["mine"]


def test_what_a_finished_one_held_in_memory_is_gone_when_the_next_begins(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    real = rewriting.Opened.open
    counts: list[int] = []

    def open_(*args: Any, **options: Any) -> Any:
        counts.append(sum(found() is not None for found in alive))
        opened = real(*args, **options)
        alive.extend((weakref.ref(opened.checkpoint), weakref.ref(opened.ties)))
        return opened

    monkeypatch.setattr(rewriting.Opened, "open", open_)
    tierewrite.batch(models, plan_only=True)  # the first import of a class leaves cycles of its own, once
    counts.clear()
    gc.collect()
    gc.disable()  # what would wait for it could be large, and wait for long
    try:
        report = tierewrite.batch(models, into=tmp_path / "out")
    finally:
        gc.enable()
    assert counts == [0] * 5
    assert len(alive) == 16  # twice; the malformed one never opened
    assert not [found for found in alive if found() is not None]
    assert len(report.results) == 5


def test_for_a_consumer_its_choices_are_made_and_errors_left_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put("dg_nvfp4", tmp_path / "models" / "dg")
    put("dg_nvfp4_kvfp8", tmp_path / "models" / "kv")
    code = run(tmp_path / "models", "--into", tmp_path / "out", "--for", "vllm", "--json")
    data = results(capsys)
    for name, result in zip(("dg", "kv"), data["results"], strict=True):
        single = tierewrite.prepare_for_vllm(tmp_path / "models" / name, tmp_path / "single" / name)
        assert single.readiness is not None
        assert result["consumer_errors"] == len(single.readiness.errors)
        assert result["exit_code"] == (6 if single.readiness.errors else 0)
        assert contents(tmp_path / "out" / name) == contents(tmp_path / "single" / name)
    assert code == max(result["exit_code"] for result in data["results"])
    # What was found then is found again where nothing is done again.
    assert run(tmp_path / "models", "--into", tmp_path / "out", "--for", "vllm", "--json") == code
    again = results(capsys)
    assert [one["status"] for one in again["results"]] == ["already-done"] * 2
    assert [one["consumer_errors"] for one in again["results"]] == [one["consumer_errors"] for one in data["results"]]


# ------------------------------------------------------------------------------------------------------ plan only


def test_plan_only_shows_the_largest_saving_first_and_writes_nothing(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(tmp_path)
    assert run(models, "--plan-only", "--json") == 6
    data = results(capsys)
    assert data["plan_only"] is True
    found = [(Path(one["src"]).name, one["status"], one["saved_bytes"], one["kept"]) for one in data["results"]]
    assert found == [
        ("dg", "planned", 60200, 0),
        ("diverged", "planned", 18432, 0),
        ("tied", "planned", 18432, 0),
        ("untied", "canonical", 0, 0),
        ("bad", "failed", None, None),
    ]
    assert all(one["dst"] is None for one in data["results"])
    plan = tierewrite.plan(models / "dg")
    assert data["results"][0]["after"] == {
        "bytes": plan.total_bytes,
        "tensors": sum(len(shard.tensors) for shard in plan.shards),
    }
    assert snapshot(tmp_path) == before


def test_plan_only_counts_what_the_headers_do_not_confirm(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(naive("dg_nvfp4_encoder_bf16"), "--plan-only", "--json") == 0
    (one,) = results(capsys)["results"]
    assert one["kept"] == 17


def test_plan_only_reads_headers_only(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (models / "bad" / "model.safetensors").unlink()
    tiny(models / "bad" / "x")
    (models / "bad" / "config.json").unlink()
    shutil.copy(naive("qwen3_tied_bf16") / "config.json", models / "bad" / "x")
    read: dict[str, int] = {}
    real_read = os.read

    def counted(fd: int, count: int) -> bytes:
        data = real_read(fd, count)
        path = os.readlink(f"/proc/self/fd/{fd}")
        read[path] = read.get(path, 0) + len(data)
        return data

    def never(*_: Any) -> Any:
        raise AssertionError("tensor data was read")

    monkeypatch.setattr(folder.os, "read", counted)
    monkeypatch.setattr(source_bytes, "open_source", never)
    monkeypatch.setattr(local, "_pread_into", never)
    report = tierewrite.batch(models, plan_only=True)
    assert not report.failed
    shards = {path: count for path, count in read.items() if path.endswith(".safetensors")}
    assert len(shards) == 5
    for path, count in shards.items():
        assert count == read_header(Path(path))[1]


def test_plan_only_of_known_ties_imports_no_torch(tmp_path: Path, ties_file: Path) -> None:
    for number in range(3):
        tiny(tmp_path / "models" / str(number))
    code = (
        f"import sys; from tierewrite import cli; code = cli.run({['batch', str(tmp_path / 'models'), '--plan-only', '--ties', str(ties_file)]!r}); "  # noqa: E501
        "heavy = {'torch', 'transformers', 'fsspec', 'ray'} & sys.modules.keys(); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------------------- what is in a folder


def found_in(folder: Path, into: Path | None = None) -> list[str]:
    items = collection.Gatherer(None if into is None else str(into), {}, into is None).gather([folder])
    return [os.path.relpath(item.src, folder) for item in items if item.skipped is None]


def test_a_checkpoint_is_a_folder_with_an_index_or_a_safetensors_file(tmp_path: Path) -> None:
    tiny(tmp_path / "model10")
    tiny(tmp_path / "model2")
    (tmp_path / "index-only").mkdir()
    (tmp_path / "index-only" / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "a-folder.safetensors").mkdir()
    (tmp_path / "hidden-file").mkdir()
    (tmp_path / "hidden-file" / ".x.safetensors").write_bytes(b"x")
    assert found_in(tmp_path) == ["index-only", "model2", "model10"]


def test_what_lies_below_a_checkpoint_belongs_to_it(tmp_path: Path) -> None:
    tiny(tmp_path / "run")
    tiny(tmp_path / "run" / "checkpoint-500")
    assert found_in(tmp_path) == ["run"]


def test_hidden_folders_backups_and_the_output_are_passed_over(tmp_path: Path) -> None:
    for name in ("a", "a.bak", "b.bak", ".a.tierewrite", ".cache/x", "out/a"):
        tiny(tmp_path / name)
    assert found_in(tmp_path, tmp_path / "out") == ["a", "b.bak"]  # b.bak: there is no b that it could be the backup of
    assert found_in(tmp_path) == ["a", "b.bak", "out/a"]


def test_links_are_followed_and_each_folder_counts_once(tmp_path: Path) -> None:
    tiny(tmp_path / "elsewhere" / "far")
    models = tmp_path / "models"
    tiny(models / "v3")
    (models / "latest").symlink_to("v3")
    (models / "loop").symlink_to(".")
    (models / "up").symlink_to("..")
    (models / "self").symlink_to("self")
    (models / "nothing").symlink_to("nowhere")
    (models / "linked").symlink_to(tmp_path / "elsewhere" / "far")
    assert found_in(models) == ["linked", "v3"]


def test_links_that_lead_to_each_other_in_many_ways_end(tmp_path: Path) -> None:
    for a in range(12):
        (tmp_path / f"d{a}").mkdir()
    for a in range(12):
        for b in range(12):
            (tmp_path / f"d{a}" / f"l{b}").symlink_to(tmp_path / f"d{b}")
    tiny(tmp_path / "d3" / "model")
    assert found_in(tmp_path) == ["d3/model"]


def test_a_folder_three_hundred_deep_is_walked(tmp_path: Path) -> None:
    depth = 300
    deep = tmp_path.joinpath(*["d"] * depth)
    deep.mkdir(parents=True)
    tiny(deep / "model")
    assert found_in(tmp_path) == ["/".join(["d"] * depth) + "/model"]


def test_more_folders_than_anybody_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "MAX_FOLDERS", 3)
    for number in range(4):
        tiny(tmp_path / str(number))
    with pytest.raises(SourceError, match="more than 3 folders"):
        found_in(tmp_path)


def test_a_hub_cache_is_a_collection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Blobs by digest, snapshots of links to them, one revision without weights."""
    repo = tmp_path / "hub" / "models--org--name"
    snapshot_ = repo / "snapshots" / "0123abcd"
    snapshot_.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, path in enumerate(sorted(naive("qwen3_tied_bf16").iterdir())):
        shutil.copy(path, repo / "blobs" / f"b{number}")
        (snapshot_ / path.name).symlink_to(f"../../blobs/b{number}")
    (repo / "snapshots" / "without").mkdir()
    (repo / "snapshots" / "without" / "config.json").symlink_to("../../blobs/b0")
    (tmp_path / "hub" / ".locks").mkdir()
    assert run(tmp_path / "hub", "--into", tmp_path / "out", "--json") == 0
    one, other = results(capsys)["results"]
    assert other["status"] == "skipped"
    assert one["dst"] == str(tmp_path / "out" / "models--org--name" / "snapshots" / "0123abcd")
    assert digests(Path(one["dst"])) == right_answer("qwen3_tied_bf16")


def test_a_folder_that_is_a_checkpoint_itself_goes_under_its_name(tmp_path: Path, ties_file: Path) -> None:
    one, other = tiny(tmp_path / "one"), tiny(tmp_path / "other")
    assert run(one, f"{other}/", "--into", tmp_path / "out", "--ties", ties_file, "-q") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one", "other"]


def test_an_empty_collection_exits_4_and_says_what_was_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "models" / "empty").mkdir(parents=True)
    assert run(tmp_path / "models", "--into", tmp_path / "out") == 4
    err = capsys.readouterr().err
    assert "2 folders hold neither model.safetensors.index.json nor a *.safetensors file" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not stop root")
def test_a_folder_that_cannot_be_listed_fails_by_itself(tmp_path: Path, ties_file: Path) -> None:
    tiny(tmp_path / "models" / "a")
    (tmp_path / "models" / "locked").mkdir(mode=0o000)
    report = tierewrite.batch(tmp_path / "models", into=tmp_path / "out", ties=ties_file)
    assert [(one.status, one.exit_code) for one in report.results] == [("rewritten", 0), ("failed", 5)]


def test_a_folder_that_the_system_cannot_list_is_an_item_that_fails(
    tmp_path: Path, ties_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(tmp_path / "models" / "a")
    (tmp_path / "models" / "broken").mkdir()

    def failing(real: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def call(path: Any) -> Any:
            if os.fspath(path).endswith("broken"):
                raise OSError(5, "Input/output error", os.fspath(path))
            return real(path)

        return call

    monkeypatch.setattr(folders.os, "scandir", failing(os.scandir))
    monkeypatch.setattr(folder.os, "listdir", failing(os.listdir))
    report = tierewrite.batch(tmp_path / "models", into=tmp_path / "out", ties=ties_file)
    assert [(one.status, one.exit_code) for one in report.results] == [("rewritten", 0), ("failed", 5)]


# ---------------------------------------------------------------------------------------------------------- lists


def test_a_list_names_sources_and_describes_them(
    tmp_path: Path, ties_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = tmp_path / "lists"
    tiny(lists / "relative")
    tiny(tmp_path / "other" / "absolute", seed=1)
    put("qwen3_tied_but_diverged_bf16", lists / "diverged")
    (lists / "own.json").write_text(json.dumps(TIES))
    (lists / "list.txt").write_text(
        "\ufeff# what we have\r\n"
        "\n"
        "   relative  \r\n"
        f"{tmp_path}/other/absolute\n"
        "  # not this one\n"
        '{"src": "diverged", "dst": "../elsewhere/kept", "on_mismatch": "keep", "ties": "own.json", "verify": true}\n'
    )
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    assert run("../lists/list.txt", "--into", "out", "--ties", ties_file, "--json") == 0
    data = results(capsys)
    assert [one["status"] for one in data["results"]] == ["rewritten"] * 3
    assert [one["dst"] for one in data["results"]] == ["out/relative", "out/absolute", "../lists/../elsewhere/kept"]
    assert data["results"][2]["kept"] == 1
    tierewrite.rewrite(lists / "diverged", tmp_path / "single", on_mismatch="keep", ties=ties_file)
    assert contents(tmp_path / "elsewhere" / "kept") == contents(tmp_path / "single")
    assert sorted(digests(tmp_path / "cwd" / "out" / "absolute")) == ["model.embed_tokens.weight", "model.norm.weight"]
    assert sorted(path.name for path in (tmp_path / "cwd").iterdir()) == ["out"]


def test_a_line_is_never_taken_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ties_file: Path
) -> None:
    """org/name exists where the command runs, and not where the list is: it fails rather than take the wrong one."""
    tiny(tmp_path / "cwd" / "org" / "name")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "list").write_text("org/name\n")
    monkeypatch.chdir(tmp_path / "cwd")
    report = tierewrite.batch("../lists/list", into="out", ties=ties_file)
    assert report.results[0].status == "failed"
    assert report.results[0].src == "../lists/org/name"
    assert not Path("out").exists()


def test_what_the_lists_folder_has_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(tmp_path / "lists" / "org" / "name")
    (tmp_path / "lists" / "list").write_text("org/name\norg/other\n")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    items = collection.Gatherer("out", {}).gather(["../lists/list"])
    assert [(item.src, item.dst) for item in items] == [("../lists/org/name", "out/name"), ("org/other", "out/other")]


@pytest.mark.parametrize("folder", ["lists", "."])
def test_a_path_that_does_not_exist_does_not_become_a_hub_id_by_its_lists_folder(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(folder).mkdir(exist_ok=True)
    (Path(folder) / "list").write_text("missing\n")
    (item,) = collection.Gatherer("out", {}).gather([f"{folder}/list"])
    assert hub.repo_id(item.src) is None
    assert Path(item.src) == Path(folder) / "missing"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"src": "a", "on-mismatch": "keep"}', "no option 'on-mismatch'"),
        ('{"src": "a", "in_place": true}', "no option 'in_place'"),
        ('{"src": "a", "engine": "ray"}', "no option 'engine'"),
        ('{"src": "a", "\\u001b[31m": 1}', r"no option '\x1b[31m'"),
        ('{"src": "a", "verify": "yes"}', '`verify` is "yes"; expected true or false'),
        ('{"src": "a", "max_shard_size": true}', "expected a number or a text"),
        ('{"src": "a", "max_shard_size": "5XB"}', "5XB"),
        ('{"src": "a", "on_mismatch": "perhaps"}', "on_mismatch is 'perhaps'"),
        ('{"src": "a", "consumer": "nobody"}', "consumer is 'nobody'"),
        ('{"src": "a", "ties": null}', "`ties` is null; expected a text"),
        ('{"dst": "a"}', "`src` is null"),
        ('{"src": ""}', '`src` is ""'),
        ('{"src": "a", "dst": ["b"]}', '`dst` is ["b"]'),
        ('{"src": "a", "src": "b"}', "comes twice"),
        ('{"src": "a"', "JSON"),
        ('{"src": "a"} trailing', "JSON"),
        ('{"a":' * 2000, "JSON"),
        ("nul\0here", "NUL"),
        ("/", "has no name"),
    ],
)
def test_a_wrong_line_is_refused_by_number_before_anything_starts(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], ties_file: Path
) -> None:
    tiny(tmp_path / "good")
    (tmp_path / "list").write_text(f"good\n\n{line}\n")
    assert run(tmp_path / "list", "--into", tmp_path / "out", "--ties", ties_file) == 2
    err = capsys.readouterr().err
    assert "line 3" in err
    assert message in err
    assert "\x1b" not in err
    assert "\0" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "lists no checkpoint"), (b"# only this\n\n", "lists no checkpoint"), (b"\x80abc", "not UTF-8 at byte 0")],
)
def test_what_is_no_list_exits_2(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list").write_bytes(content)
    assert run(tmp_path / "list", "--into", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_a_shard_in_the_place_of_a_list_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny(tmp_path / "a") / "model.safetensors", "--into", tmp_path / "out") == 2
    assert "name the folder that holds it" in capsys.readouterr().err


def test_a_huge_file_in_the_place_of_a_list_is_not_read_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(1 << 40)
    assert run(tmp_path / "huge", "--into", tmp_path / "out") == 2
    assert "is no list of checkpoints" in capsys.readouterr().err


def test_hostile_names_are_shown_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list").write_text("evil\x1b[31m\u202ename\n")
    evil = tmp_path / "models" / "x\x1b[2J[bold]y"
    evil.mkdir(parents=True)
    (evil / "model.safetensors").write_bytes(b"x")
    for arguments in ((tmp_path / "list",), (tmp_path / "models",), (tmp_path / "models", "--plan-only")):
        assert run(*arguments, "--into", tmp_path / "out") == 6
        out, err = capsys.readouterr()
        for stream in (out, err):
            assert "\\x1b" in stream
            assert "\x1b" not in stream
            assert "\u202e" not in stream
    assert "[bold]" in out


def test_a_list_without_into_needs_a_dst_in_each_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny(tmp_path / "a")
    (tmp_path / "list").write_text('{"src": "a", "dst": "b"}\na\n')
    assert run(tmp_path / "list") == 2
    assert "line 2" in (err := capsys.readouterr().err)
    assert "--into" in err


def test_what_does_not_exist_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "nothing", "--into", tmp_path / "out") == 2
    assert "does not exist; expected a folder" in capsys.readouterr().err


def test_the_library_takes_mappings_and_refuses_unknown_options(tmp_path: Path, ties_file: Path) -> None:
    tiny(tmp_path / "a")
    report = tierewrite.batch([{"src": tmp_path / "a", "dst": tmp_path / "b", "ties": ties_file, "manifest": False}])
    assert isinstance(report, BatchReport)
    assert isinstance(report.results[0], BatchResult)
    assert report.results[0].status == "rewritten"
    assert not (tmp_path / "b" / "tierewrite.json").exists()
    with pytest.raises(UsageError, match="no option 'in_place'"):
        tierewrite.batch(tmp_path, into=tmp_path / "out", in_place=True)
    with pytest.raises(UsageError, match="jobs is 0"):
        tierewrite.batch(tmp_path, into=tmp_path / "out", jobs=0)
    with pytest.raises(UsageError, match="nothing to do"):
        tierewrite.batch([], into=tmp_path / "out")
    with pytest.raises(UsageError, match="no engine 'spark'"):
        tierewrite.batch(tmp_path, into=tmp_path / "out", engine="spark")


# -------------------------------------------------------------------------------------------------------- clashes


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a", "x/a"], "the same DST"),
        (["a", '{"src": "b", "dst": "out/a"}'], "the same DST"),
        (["a", '{"src": "b", "dst": "link/a"}'], "the same DST"),
        (["a", '{"src": "b", "dst": "out/a/b"}'], "inside one another"),
        (['{"src": "a", "dst": "b"}', "b"], "lies inside of, the SRC"),
        (['{"src": "a", "dst": "b/new"}', "b"], "lies inside of, the SRC"),
        (['{"src": "a", "dst": "x"}', "x/a"], "holds the SRC"),
        (['{"src": "a", "dst": "a/new"}'], "lies inside of, the SRC"),
    ],
)
def test_two_that_would_meet_are_refused_before_anything_starts(
    lines: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "x/a"):
        tiny(tmp_path / name)
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    (tmp_path / "list").write_text("\n".join(lines))
    before = snapshot(tmp_path)
    assert run(tmp_path / "list", "--into", tmp_path / "out", "--overwrite") == 2
    err = capsys.readouterr().err
    assert message in err
    assert f"line {len(lines)}" in err
    assert snapshot(tmp_path) == before


def test_two_collections_with_one_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny(tmp_path / "one" / "llama")
    tiny(tmp_path / "two" / "llama")
    assert run(tmp_path / "one", tmp_path / "two", "--into", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert str(tmp_path / "one" / "llama") in err
    assert str(tmp_path / "two" / "llama") in err


def test_one_source_may_be_listed_twice(tmp_path: Path, ties_file: Path) -> None:
    tiny(tmp_path / "a")
    (tmp_path / "list").write_text('{"src": "a", "dst": "b"}\n{"src": "a", "dst": "c", "manifest": false}\n')
    assert run(tmp_path / "list", "--ties", ties_file, "-q") == 0
    assert contents(tmp_path / "b").keys() - contents(tmp_path / "c").keys() == {"tierewrite.json"}


# --------------------------------------------------------------------------------------------------------- again


def statuses(*arguments: Any, **options: Any) -> list[str]:
    return [result.status for result in tierewrite.batch(*arguments, **options).results]


def test_a_second_run_leaves_what_is_done_and_does_the_rest(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = tierewrite.batch(models, into=out)
    shutil.rmtree(out / "more" / "untied")
    before = snapshot(out / "dg")
    shutil.copy(naive("qwen3_tied_bf16") / "model.safetensors", models / "bad")
    second = tierewrite.batch(models, into=out)
    assert [result.status for result in second.results] == [
        "rewritten",
        "already-done",
        "refused",
        "already-done",
        "canonical",
    ]
    assert snapshot(out / "dg") == before
    for one, other in zip(first.results[1::2], second.results[1::2], strict=True):
        assert {**one.to_json(), "seconds": 0, "status": ""} == {**other.to_json(), "seconds": 0, "status": ""} or (
            one.status == "refused"
        )
    numbers = second.results[1]
    assert (numbers.before_tensors, numbers.after_tensors, numbers.groups, numbers.merged_scales) == (346, 198, 43, 37)
    assert numbers.max_ratio == first.results[1].max_ratio
    assert numbers.median_ratio == first.results[1].median_ratio


def older(folder: Path) -> None:
    """As if it had been there for a while."""
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 1000,) * 2)


def _newer_config(src: Path, dst: Path) -> None:
    os.utime(src / "config.json", (time.time() + 5,) * 2)


def _other_weights(src: Path, dst: Path) -> None:
    shutil.rmtree(src)
    tiny(src, seed=3)
    older(src)


def _other_sizes(src: Path, dst: Path) -> None:
    shutil.rmtree(src)
    tiny(src, rows=5)
    older(src)


def _other_side_files(src: Path, dst: Path) -> None:
    (src / "tokenizer.json").write_text("{}")
    older(src)


def _missing_side_file(src: Path, dst: Path) -> None:
    (dst / "config.json").unlink()


def _tensor_gone(src: Path, dst: Path) -> None:
    (shard,) = dst.glob("*.safetensors")
    write_shard(shard, {"model.embed_tokens.weight": ("F32", [4, 2], bytes(range(32)))}, {"format": "pt"})
    index = dst / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    del listed["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(listed))


def _other_index(src: Path, dst: Path) -> None:
    with open(dst / "model.safetensors.index.json", "a") as file:
        file.write("\n")


def _other_version(src: Path, dst: Path) -> None:
    manifest = json.loads((dst / "tierewrite.json").read_text())
    manifest["tool"]["version"] = "0.0.1"
    (dst / "tierewrite.json").write_text(json.dumps(manifest))


def _broken_manifest(src: Path, dst: Path) -> None:
    (dst / "tierewrite.json").write_text("{")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_newer_config, "'config.json' of SRC is newer"),
        (_other_weights, "from other weights"),
        (_other_sizes, "shards of other names, sizes or headers"),
        (_other_side_files, "side files"),
        (_missing_side_file, "side files"),
        (_tensor_gone, "sizes and headers that were written"),
        (_other_index, "sizes and headers that were written"),
        (_other_version, "tierewrite 0.0.1 made it"),
        (_broken_manifest, "cannot be read"),
    ],
)
def test_a_dst_that_is_not_what_would_be_made_fails_and_says_why(
    change: Callable[[Path, Path], None], reason: str, tmp_path: Path, ties_file: Path
) -> None:
    src = tiny(tmp_path / "models" / "a")
    older(src)
    dst = tmp_path / "out" / "a"
    options: dict[str, Any] = {"into": tmp_path / "out", "ties": ties_file}
    assert statuses(tmp_path / "models", **options) == ["rewritten"]
    assert statuses(tmp_path / "models", **options) == ["already-done"]
    change(src, dst)
    before = snapshot(dst)
    (result,) = tierewrite.batch(tmp_path / "models", **options).results
    assert (result.status, result.exit_code) == ("failed", 2)
    assert result.error is not None
    assert reason in result.error["message"]
    assert "overwrite=True" in result.error["message"]
    assert snapshot(dst) == before
    assert statuses(tmp_path / "models", **options, overwrite=True) == ["rewritten"]
    assert digests(dst)["model.embed_tokens.weight"] == digests(src)["model.embed_tokens.weight"]


def test_other_options_or_ties_are_not_done_already(tmp_path: Path, ties_file: Path) -> None:
    tiny(tmp_path / "models" / "a")
    options: dict[str, Any] = {"into": tmp_path / "out", "ties": ties_file}
    assert statuses(tmp_path / "models", **options) == ["rewritten"]
    (result,) = tierewrite.batch(tmp_path / "models", **options, on_mismatch="keep").results
    assert "other options" in (result.error or {})["message"]
    ties_file.write_text(json.dumps({"model.embed_tokens.weight": "lm_head.weight"}))
    (result,) = tierewrite.batch(tmp_path / "models", **options).results
    assert "other ties" in (result.error or {})["message"]


def test_weights_that_nothing_ties_are_compared_too(tmp_path: Path) -> None:
    src = put("qwen3_untied_equal_bf16", tmp_path / "models" / "a")
    older(src)
    assert statuses(tmp_path / "models", into=tmp_path / "out") == ["canonical"]
    assert statuses(tmp_path / "models", into=tmp_path / "out") == ["already-done"]
    path = src / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2000:] = bytes(byte ^ 1 for byte in data[-2000:])
    path.write_bytes(data)
    older(src)
    (result,) = tierewrite.batch(tmp_path / "models", into=tmp_path / "out").results
    assert "other weights" in (result.error or {})["message"]


def test_a_dst_that_somebody_else_filled_fails_as_in_rewrite(tmp_path: Path, ties_file: Path) -> None:
    tiny(tmp_path / "models" / "a")
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "precious").write_text("mine")
    (result,) = tierewrite.batch(tmp_path / "models", into=tmp_path / "out", ties=ties_file).results
    assert (result.status, result.exit_code) == ("failed", 2)
    assert "not empty" in (result.error or {})["message"]
    assert contents(tmp_path / "out") == {"a/precious": b"mine"}


@pytest.mark.parametrize(
    ("info", "seconds"),
    [
        ({"mtime": 5.5}, 5.5),
        ({"LastModified": "1970-01-01T00:01:00Z"}, 60.0),
        ({"updated": "1970-01-01T00:00:01.5+00:00"}, 1.5),
        ({"created": "yesterday"}, None),
        ({"size": 3}, None),
    ],
)
def test_times_of_stores(info: dict[str, Any], seconds: float | None) -> None:
    assert done_before._time(info) == seconds


# --------------------------------------------------------------------------------------------------- stores, hub


@pytest.fixture
def memory() -> Iterator[str]:
    fsspec = pytest.importorskip("fsspec")
    fs = fsspec.filesystem("memory")
    yield "memory://batch-test"
    fs.rm("/batch-test", recursive=True)


def upload(folder: Path, url: str) -> None:
    import fsspec

    fsspec.filesystem("memory").put(str(folder), url, recursive=True)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_collection_in_a_store(
    memory: str, models: Path, tmp_path: Path, jobs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny(models / "dg" / "below")  # belongs to dg
    tiny(models / ".hidden")
    upload(models, f"{memory}/models")
    assert run(f"{memory}/models/", "--into", f"{memory}/models/out", "-j", jobs, "--json") == 6
    data = results(capsys)
    assert [(one["src"].removeprefix(f"{memory}/models/"), one["status"]) for one in data["results"]] == [
        ("bad", "failed"),
        ("dg", "rewritten"),
        ("diverged", "refused"),
        ("more/deep/tied", "rewritten"),
        ("more/untied", "canonical"),
    ]
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.get("/batch-test/models/out", str(tmp_path / "back"), recursive=True)
    for name in ("dg", "more/deep/tied", "more/untied"):
        tierewrite.rewrite(models / name, tmp_path / "single" / name)
    assert contents(tmp_path / "back") == contents(tmp_path / "single")
    assert run(f"{memory}/models", "--into", f"{memory}/models/out", "--json") == 6
    again = [one["status"] for one in results(capsys)["results"]]
    assert again == ["failed", "already-done", "refused", "already-done", "already-done"]
    assert run(f"{memory}/models/more", "--plan-only", "--json") == 0
    planned = results(capsys)["results"]
    assert [(Path(one["src"]).name, one["saved_bytes"]) for one in planned] == [("tied", 18432), ("untied", 0)]


@pytest.mark.parametrize("name", ["../evil/model.safetensors", "a//model.safetensors", "a\\b/model.safetensors"])
def test_an_object_whose_name_leads_out_of_the_collection_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "listing", lambda folder: {name: {}})
    with pytest.raises(SourceError, match="no name that a file could have"):
        tierewrite.batch("memory://m", into=tmp_path / "out")


def test_urls_and_credentials_in_a_list(memory: str, tmp_path: Path, ties_file: Path) -> None:
    upload(tiny(tmp_path / "a"), f"{memory}/a")
    (tmp_path / "list").write_text(f'{{"src": "{memory}/a", "dst": "b"}}\nmemory://user:secret@host/missing\n')
    report = tierewrite.batch(tmp_path / "list", into=tmp_path / "out", ties=ties_file)
    good, missing = report.results
    assert (good.status, good.dst) == ("rewritten", str(tmp_path / "b"))
    assert missing.status == "failed"
    assert "secret" not in json.dumps(report.to_json())


def test_hub_ids_in_a_list_and_on_the_command_line(tmp_path: Path, ties_file: Path) -> None:
    """huggingface_hub reads its settings when it is imported: in a process of its own."""
    (tmp_path / "list").write_text("org/name\n")
    with Hub() as server:
        server.repos["org/name"] = Repo({"main": naive("qwen3_tied_bf16")})
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))},
            "HF_ENDPOINT": server.endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "PYTHONPATH": str(ROOT),
        }

        def answer(*arguments: object) -> dict[str, Any]:
            command = [sys.executable, "-m", "tierewrite", "batch", *map(str, arguments), "--ties", str(ties_file)]
            done = subprocess.run(
                [*command, "--json"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            found: dict[str, Any] = json.loads(done.stdout)["results"][0]
            return found

        planned = answer("org/name", "--plan-only")
        assert (planned["src"], planned["status"], planned["saved_bytes"]) == ("org/name", "planned", 18432)
        full = (naive("qwen3_tied_bf16") / "model.safetensors").stat().st_size
        assert sum(request.sent for request in server.shard_requests()) <= full
        assert answer("list", "--into", "out")["status"] == "rewritten"
        assert digests(tmp_path / "out" / "name") == right_answer("qwen3_tied_bf16")
        assert answer("org/name", "--into", "out")["status"] == "already-done"


# ----------------------------------------------------------------------------------------------------- interrupts


class Interrupting(tierewrite.Progress):
    """Sends this process a signal once the `at`-th checkpoint has begun to write."""

    def __init__(self, at: int, signum: int) -> None:
        self.at, self.signum, self.number = at, signum, 0

    def part(self, name: str, number: int, total: int) -> tierewrite.Progress:
        self.number = number
        return self

    def start(self, phase: str, total: int) -> None:
        if self.number == self.at and phase == "rewriting":
            os.kill(os.getpid(), self.signum)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_what_is_finished_and_nothing_half_done(
    signum: int, code: int, tmp_path: Path, ties_file: Path
) -> None:
    for name in "abc":
        tiny(tmp_path / "models" / name)
    with pytest.raises(BatchInterrupted) as stopped:
        tierewrite.batch(
            tmp_path / "models", into=tmp_path / "out" / "deep", ties=ties_file, progress=Interrupting(2, signum)
        )
    report = stopped.value.report
    assert stopped.value.exit_code == report.exit_code == report.stopped == code
    assert [result.status for result in report.results] == ["rewritten", "stopped", "not-started"]
    assert {result.exit_code for result in report.results[1:]} == {code}
    assert [path.name for path in (tmp_path / "out" / "deep").iterdir()] == ["a"]
    assert isinstance(stopped.value, Interrupted)
    interrupts.install()  # as a new command would find them
    again = tierewrite.batch(tmp_path / "models", into=tmp_path / "out" / "deep", ties=ties_file)
    assert [result.status for result in again.results] == ["already-done", "rewritten", "rewritten"]


@pytest.mark.usefixtures("handlers")
def test_an_interrupt_before_the_first_is_finished_leaves_no_folder(tmp_path: Path, ties_file: Path) -> None:
    tiny(tmp_path / "models" / "a")
    with pytest.raises(BatchInterrupted):
        tierewrite.batch(
            tmp_path / "models", into=tmp_path / "x" / "y", ties=ties_file, progress=Interrupting(1, signal.SIGINT)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


SLOW = """
import json, sys, threading, time
from pathlib import Path
from tierewrite import cli
from tierewrite.output import one_pass, work

# Every piece of `slow` ones takes long: the interrupt finds two rewrites in the middle of their bytes.
real = one_pass.Transfer._batch
def batch(self, task, *args):
    if "slow" in str(self.work.checkpoint.root) and self.outputs:
        with Path(seen, self.work.checkpoint.root.name).open("a") as pieces:
            pieces.write("x")
        time.sleep(0.3)
    return real(self, task, *args)
one_pass.Transfer._batch = batch
work._TENSORS_PER_TASK = 1
seen, arguments = sys.argv[1:]
sys.argv = ["tierewrite", *json.loads(arguments)]
cli.main()
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_rewrites_in_threads_in_the_middle_of_their_bytes(
    signum: int, tmp_path: Path, ties_file: Path
) -> None:
    tiny(tmp_path / "models" / "a-quick")
    for name in ("b-slow", "c-slow"):
        tiny(tmp_path / "models" / name, rows=8)
        tensors: dict[str, Any] = {f"t{i}": ("U8", [1 << 16], bytes(1 << 16)) for i in range(200)}
        tensors |= {name: ("U8", [4], b"abcd") for name in ("lm_head.weight", "model.embed_tokens.weight")}
        write_shard(tmp_path / "models" / name / "model.safetensors", tensors)
    tiny(tmp_path / "models" / "d-later")
    (tmp_path / "seen").mkdir()
    arguments = ["batch", tmp_path / "models", "--into", tmp_path / "out", "--ties", ties_file, "-j", "2", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(tmp_path / "seen"), json.dumps([*map(str, arguments)])],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "seen").iterdir())) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    pieces = {path.name: len(path.read_text()) for path in (tmp_path / "seen").iterdir()}
    assert pieces.keys() == {"b-slow", "c-slow"}
    assert max(pieces.values()) < 50, "of the two hundred that either has"
    assert process.returncode == 128 + signum, err
    assert "Traceback" not in err
    assert f"stopped by signal {signum}" in err
    data = json.loads(out)
    assert data["exit_code"] == 128 + signum
    assert [one["status"] for one in data["results"]] == ["rewritten", "stopped", "stopped", "not-started"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a-quick"]


def test_an_interrupt_during_the_proof_leaves_no_dst(
    tmp_path: Path, ties_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stops a rewrite in a thread reaches it while it proves, too."""
    tiny(tmp_path / "a")

    class Stops(tierewrite.Progress):
        proving = False

        def start(self, phase: str, total: int) -> None:
            self.proving = phase == "proving"

        def advance(self, nbytes: int) -> None:
            if self.proving:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tierewrite.rewrite(tmp_path / "a", tmp_path / "out", ties=ties_file, verify=True, progress=Stops())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("method", ["start", "advance", "part", "finish"])
def test_what_the_callers_progress_raises_is_passed_on(method: str, jobs: int, tmp_path: Path, ties_file: Path) -> None:
    """It was told as an internal error of each checkpoint."""
    for name in "abc":
        tiny(tmp_path / "models" / name)

    def give_up(*args: object) -> None:
        raise OverflowError("my own") from KeyError("why")

    progress = type("Watch", (tierewrite.Progress,), {method: give_up})()
    with pytest.raises(OverflowError, match="my own") as raised:
        tierewrite.batch(tmp_path / "models", into=tmp_path / "out", ties=ties_file, jobs=jobs, progress=progress)
    assert isinstance(raised.value.__cause__, KeyError)
    left = [path.name for path in (tmp_path / "out").rglob("*")] if method == "finish" else []
    assert [name for name in left if name.startswith(".")] == []
    assert (tmp_path / "out").exists() is (method == "finish")  # what was finished stays


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_signal_while_the_folders_above_the_outputs_are_made_leaves_none(
    depth: int, tmp_path: Path, ties_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(tmp_path / "models" / "a")
    below = Path("out", "1", "2", "3")
    mkdir = Path.mkdir

    def struck(path: Path, *args: Any, **options: Any) -> None:
        mkdir(path, *args, **options)
        if path == tmp_path.joinpath(*below.parts[:depth]):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Path, "mkdir", struck)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where tests run in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            tierewrite.batch(tmp_path / "models", into=tmp_path / below, ties=ties_file)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ a person watching


def test_progress_is_told_of_each_checkpoint_and_how_it_ended(models: Path, tmp_path: Path) -> None:
    class Watch(tierewrite.Progress):
        def __init__(self) -> None:
            self.lines: list[object] = []

        def part(self, name: str, number: int, total: int) -> tierewrite.Progress:
            self.lines.append((name, number, total))
            return self

        def finish(self, result: BatchResult | None) -> None:
            assert result is not None
            self.lines.append(result.status)

    watch = Watch()
    tierewrite.batch(models / "more", into=tmp_path / "out", progress=watch)
    assert watch.lines == [("deep/tied", 1, 2), "rewritten", ("untied", 2, 2), "canonical"]


def test_bars_of_several_at_a_time_on_a_terminal(tmp_path: Path) -> None:
    from io import StringIO

    from rich.console import Console

    from tierewrite.cli.progress_bar import Bar

    screen = StringIO()
    result = BatchResult("[b]a", "d", "rewritten", 0, before_bytes=4096, after_bytes=1024)
    with Bar(Console(file=screen, force_terminal=True, width=120)) as bar:
        parts = [bar.part(name, number, 2) for number, name in enumerate(("[b]a", "b"), 1)]
        for part in parts:
            part.start("rewriting", 1000)
        bar._appear()
        for part in parts:
            part.advance(500)
        bar._display.refresh()
        parts[0].finish(result)
        parts[1].finish(None)
    text = screen.getvalue()
    assert "[1/2] [b]a: rewriting" in text
    assert "[2/2] b: rewriting" in text
    assert "[1/2] [b]a: rewritten, 4.00 KiB -> 1.00 KiB (-75.0%)" in text


def test_a_device_that_is_not_there_ends_the_batch_before_anything_starts(tmp_path: Path) -> None:
    try:
        digest.select("cuda")
    except UsageError:
        pass
    else:
        pytest.skip("a GPU works here")
    with pytest.raises(UsageError, match="cuda"):
        tierewrite.batch([FIXTURES / "qwen3_tied_bf16"], into=tmp_path / "out", device="cuda")
    assert not (tmp_path / "out").exists()


# --- what people keep beside checkpoints -------------------------------------------------------------------


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1234\n"
BESIDE: dict[str, tuple[dict[str, str], str]] = {
    "adapter": ({"adapter_model.safetensors": "x", "adapter_config.json": "{}"}, "a PEFT adapter"),
    "pipeline": (
        {"model_index.json": "{}", "unet/diffusion_pytorch_model.safetensors": "x"},
        "a pipeline of diffusers",
    ),
    "gguf": ({"model-q4.gguf": "x", "config.json": "{}"}, "holds GGUF weights ('model-q4.gguf')"),
    "old": ({"pytorch_model.bin": "x", "config.json": "{}"}, "weights in another format than safetensors"),
    "pointer": ({"model.safetensors": POINTER, "config.json": "{}"}, "Git LFS pointers ('model.safetensors')"),
    "words": ({"tokenizer.json": "{}", "tokenizer_config.json": "{}"}, "a tokenizer or a config, and no weights"),
}


def lay(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("plan_only", [False, True])
def test_what_lies_beside_checkpoints_is_skipped_with_its_reason(plan_only: bool, tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(FIXTURES / "qwen3_tied_bf16" / "naive", models / "zoo" / "model")
    lay(models / "zoo", {"tokenizer.json": "{}"})  # it holds a checkpoint: not worth a word
    for name, (files, _) in BESIDE.items():
        lay(models / name, files)
    report = tierewrite.batch([models], into=tmp_path / "out", plan_only=plan_only)
    by_name = {Path(result.src).name: result for result in report.results}
    assert by_name.keys() == {"model", *BESIDE}
    for name, (_, why) in BESIDE.items():
        assert (by_name[name].status, by_name[name].exit_code) == ("skipped", 0)
        assert why in str(by_name[name].skipped)
    assert report.exit_code == 0
    assert report.counts()["skipped"] == len(BESIDE)
    made = [] if plan_only else ["zoo/model"]
    assert [str(path.parent.relative_to(tmp_path / "out")) for path in tmp_path.glob("out/**/config.json")] == made
    if not plan_only:
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"zoo"}


def test_a_list_and_a_store_skip_them_too(tmp_path: Path) -> None:
    import fsspec

    lay(tmp_path / "adapter", BESIDE["adapter"][0])
    (tmp_path / "list.txt").write_text("adapter\n")
    report = tierewrite.batch([tmp_path / "list.txt"], into=tmp_path / "out")
    assert [(result.status, result.exit_code) for result in report.results] == [("skipped", 0)]
    assert not (tmp_path / "out").exists()
    store = fsspec.filesystem("memory")
    store.pipe("/skips/adapter/adapter_model.safetensors", b"x")
    try:
        report = tierewrite.batch(["memory://skips"], plan_only=True)
        assert [result.status for result in report.results] == ["skipped"]
        assert report.exit_code == 0
    finally:
        store.rm("/skips", recursive=True)


def test_where_everything_is_skipped_the_command_says_why_and_ends_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lay(tmp_path / "models", BESIDE["gguf"][0])
    assert cli.run(["batch", str(tmp_path / "models"), "--plan-only"]) == 0
    out = capsys.readouterr().out
    assert "models: skipped: holds GGUF weights ('model-q4.gguf')" in out
    assert "1 skipped" in out
