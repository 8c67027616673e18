"""The command line as scripts see it: exit codes, JSON, messages, and what is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import FIXTURES, digests, read_tensors, right_answer
from tierewrite import cli, errors
from tierewrite.cli import commands, terminal

Naive = Callable[[str], Path]


def run(*arguments: object) -> int:
    return cli.run([str(argument) for argument in arguments])


def test_rewrite_prints_a_report_as_one_json_object(
    naive: Naive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("rewrite", naive("dg_nvfp4"), tmp_path / "out", "--json") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert err == ""
    assert report["schema"] == "tierewrite/report/1"
    assert report["before"]["tensors"] == 346
    assert report["after"]["tensors"] == 198
    assert report["counts"]["dropped_tensors"] == 148
    assert digests(tmp_path / "out") == right_answer("dg_nvfp4")


def test_plan_lists_each_source_tensor_once_and_writes_nothing(
    naive: Naive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(naive("dg_nvfp4").iterdir())
    assert run("plan", naive("dg_nvfp4"), "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["schema"] == "tierewrite/plan/1"
    names = [tensor["name"] for tensor in plan["tensors"]]
    assert sorted(names) == sorted(read_tensors(naive("dg_nvfp4")))
    assert {tensor["action"] for tensor in plan["tensors"]} == {"keep", "rename", "drop", "merge"}
    survivors = {tensor["target"] for tensor in plan["tensors"] if tensor["action"] != "drop"}
    assert survivors == right_answer("dg_nvfp4").keys()
    assert sorted(naive("dg_nvfp4").iterdir()) == before


@pytest.mark.parametrize("whole", [True, False])
def test_a_signal_that_comes_while_the_result_is_printed_adds_no_second_object(
    whole: bool, naive: Naive, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = terminal.chunks

    def struck(data: dict[str, Any], ascii_only: bool) -> Iterator[str]:
        text = "".join(pieces(data, ascii_only=ascii_only))
        yield text if whole else text[:1000]
        raise errors.Interrupted(signal.SIGTERM)

    monkeypatch.setattr(terminal, "chunks", struck)
    assert run("plan", naive("qwen3_tied_bf16"), "--json") == 143
    out, err = capsys.readouterr()
    assert out.count('"schema"') == 1
    assert "tierewrite/plan/1" in out
    assert "stopped by signal 15" in err
    if whole:
        json.loads(out)


def test_plan_names_actions_and_targets_of_a_merged_scale(naive: Naive, capsys: pytest.CaptureFixture[str]) -> None:
    run("plan", naive("dg_nvfp4"), "--json")
    tensors = {tensor["name"]: tensor for tensor in json.loads(capsys.readouterr().out)["tensors"]}
    stem = "layers.0.mlp.up_proj.input_scale"
    group = "model.decoder.layers.0.mlp.up_proj.weight"
    assert tensors[f"model.decoder.{stem}"] == {
        "name": f"model.decoder.{stem}",
        "action": "merge",
        "target": f"model.decoder.{stem}",
        "merged": True,
        "group": group,
    }
    assert tensors[f"model.encoder.language_model.{stem}"] == {
        "name": f"model.encoder.language_model.{stem}",
        "action": "drop",
        "target": f"model.decoder.{stem}",
        "merged": False,
        "group": group,
    }
    assert tensors["model.encoder.language_model.norm.weight"]["action"] == "rename"
    assert tensors["model.encoder.language_model.norm.weight"]["target"] == "model.decoder.norm.weight"
    assert tensors["model.encoder.language_model.layers.0.layer_scalar"]["group"] is None


def test_plan_of_a_headers_refuted_tie_is_unconfirmed_and_exits_0(
    naive: Naive, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("plan", naive("dg_nvfp4_encoder_bf16"), "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    unconfirmed = {group["id"] for group in plan["groups"] if group["status"] == "unconfirmed"}
    assert len(unconfirmed) == 17
    mine = [tensor for tensor in plan["tensors"] if tensor["group"] in unconfirmed]
    assert mine
    assert {tensor["action"] for tensor in mine} == {"keep"}
    assert all(group["reason"] for group in plan["groups"] if group["status"] == "unconfirmed")


def test_inspect_shows_where_each_tie_was_declared(naive: Naive, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", naive("dg_nvfp4"), "--json") == 0
    inspection = json.loads(capsys.readouterr().out)
    assert inspection["schema"] == "tierewrite/inspection/1"
    assert inspection["formats"] == ["modelopt"]
    assert inspection["dtypes"]["U8"]["tensors"] > 0
    assert inspection["ties"]["source"] == "class"
    assert all(origin for group in inspection["ties"]["groups"] for origin in group["origins"])
    assert len(inspection["tensors"]) == 346


def test_refusal_exits_3_with_the_groups_on_both_streams(
    naive: Naive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("rewrite", naive("qwen3_tied_but_diverged_bf16"), tmp_path / "out", "--json") == 3
    out, err = capsys.readouterr()
    error = json.loads(out)
    assert error["schema"] == "tierewrite/error/1"
    assert error["error"]["exit_code"] == 3
    assert error["error"]["details"]["groups"][0]["aliases"] == ["lm_head.weight"]
    assert "lm_head.weight" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_dst_that_is_not_empty_exits_2(naive: Naive, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    assert run("rewrite", naive("dg_nvfp4"), tmp_path / "out") == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


def test_empty_dst_is_filled(naive: Naive, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert run("rewrite", naive("dg_nvfp4"), tmp_path / "out", "-q") == 0
    assert digests(tmp_path / "out") == right_answer("dg_nvfp4")


def test_overwrite_swaps_the_old_one_out_only_when_the_new_is_complete(naive: Naive, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    assert run("rewrite", naive("qwen3_tied_but_diverged_bf16"), out, "--overwrite", "-q") == 3
    assert [path.name for path in out.iterdir()] == ["old.txt"]
    assert run("rewrite", naive("dg_nvfp4"), out, "--overwrite", "-q") == 0
    assert not (out / "old.txt").exists()
    assert digests(out) == right_answer("dg_nvfp4")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("where", [".", "inside", "../.."])
def test_src_and_dst_that_overlap_exit_2(where: str, copied: Naive, capsys: pytest.CaptureFixture[str]) -> None:
    src = copied("qwen3_tied_bf16")
    assert run("rewrite", src, src / where, "--overwrite") == 2
    assert "SRC" in capsys.readouterr().err


def test_dst_that_is_a_link_to_src_exits_2(copied: Naive, tmp_path: Path) -> None:
    src = copied("qwen3_tied_bf16")
    (tmp_path / "link").symlink_to(src)
    before = digests(src)
    assert run("rewrite", src, tmp_path / "link", "--overwrite") == 2
    assert digests(src) == before


def test_dst_that_is_a_file_exits_2(naive: Naive, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    assert run("rewrite", naive("qwen3_tied_bf16"), tmp_path / "out", "--overwrite") == 2
    assert (tmp_path / "out").read_text() == "a file"


def test_missing_parents_of_dst_are_made_and_removed_again_on_failure(naive: Naive, tmp_path: Path) -> None:
    assert run("rewrite", naive("qwen3_tied_but_diverged_bf16"), tmp_path / "a" / "b" / "out") == 3
    assert list(tmp_path.iterdir()) == []
    assert run("rewrite", naive("qwen3_tied_bf16"), tmp_path / "a" / "b" / "out", "-q") == 0
    assert digests(tmp_path / "a" / "b" / "out") == right_answer("qwen3_tied_bf16")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ('{"lm_head.weight": 3}', "lm_head.weight"),
        ('{"a.weight": "b.weight", "b.weight": "a.weight"}', "a.weight"),
        ('{"nothing.like.this": "nor.this"}', "nothing"),
    ],
)
def test_unusable_ties_file_exits_2(
    content: str, message: str, naive: Naive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ties = tmp_path / "ties.json"
    ties.write_text(content)
    assert run("rewrite", naive("qwen3_tied_bf16"), tmp_path / "out", "--ties", ties) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "ties.json" in err
    assert [path.name for path in tmp_path.iterdir()] == ["ties.json"]


def test_source_without_safetensors_exits_4_and_says_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "pytorch_model.bin").write_bytes(b"pickle")
    assert run("rewrite", tmp_path / "src", tmp_path / "out") == 4
    assert "pytorch_model.bin" in capsys.readouterr().err


def test_truncated_shard_exits_4(copied: Naive, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = copied("qwen3_tied_bf16")
    path = src / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert run("rewrite", src, tmp_path / "out") == 4
    assert "model.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unknown_class_exits_4_and_offers_ties(
    copied: Naive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = copied("qwen3_tied_bf16")
    (src / "config.json").write_text('{"architectures": ["Nobody"], "model_type": "nobody"}')
    assert run("rewrite", src, tmp_path / "out") == 4
    assert "--ties" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["rewrite"], ["rewrite", "a"], ["nonsense"], ["plan", "x", "--kv-scales", "y"]])
def test_wrong_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert capsys.readouterr().err


def test_wrong_usage_with_json_is_an_object_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "--json", "--nonsense") == 2
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2


@pytest.mark.parametrize("size", ["0", "-5", "5XB", "GB", "nan GB", "1e400GB"])
def test_nonsensical_shard_size_exits_2(size: str, naive: Naive, tmp_path: Path) -> None:
    assert run("rewrite", naive("qwen3_tied_bf16"), tmp_path / "out", f"--max-shard-size={size}") == 2
    assert list(tmp_path.iterdir()) == []


def test_read_only_parent_exits_5(naive: Naive, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # /proc cannot hold a folder, whoever asks (tests may run as root, whom permissions do not stop)
    assert run("rewrite", naive("qwen3_tied_bf16"), "/proc/tierewrite-out") == 5
    assert "/proc" in capsys.readouterr().err


def test_help_lists_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    text = capsys.readouterr().out
    for code in errors.EXIT_CODES:
        assert f"{code:>3}  " in text


@pytest.mark.parametrize("command", sorted(commands.cli.commands))
def test_help_shows_each_example_on_a_line_of_its_own(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    examples = text.partition("\n  Examples:\n")[2].partition("\n\n")[0].splitlines()
    assert len(examples) >= 2
    assert all(line.startswith(f"    tierewrite {command} ") for line in examples)


def test_plan_and_inspect_say_that_a_canonical_name_of_the_ties_file_is_not_there(
    naive: Naive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ties = tmp_path / "ties.json"
    ties.write_text('{"lm_head.weight": "model.embed_token.weight"}')
    src = naive("qwen3_tied_bf16")
    said = "'model.embed_token.weight' is not in the checkpoint; 'lm_head.weight' takes its name"
    for command in ("plan", "inspect"):
        assert run(command, src, "--ties", ties) == 0
        assert said in capsys.readouterr().out
    assert run("plan", src, "--ties", ties, "--json") == 0
    assert [said in warning for warning in json.loads(capsys.readouterr().out)["warnings"]] == [True]


@pytest.mark.parametrize(("option", "needed"), [("--no-backup", "--in-place"), ("--force", "--for")])
def test_an_option_without_the_one_that_it_belongs_to_exits_2(
    option: str, needed: str, naive: Naive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("rewrite", naive("qwen3_tied_bf16"), tmp_path / "out", option) == 2
    assert f"{option} goes with {needed}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["plan", "inspect", "check"])
def test_a_mistyped_folder_is_one_message_with_what_was_expected(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, tmp_path / "nope") == 4
    wanted = "does not exist; expected a checkpoint folder holding *.safetensors files"
    assert capsys.readouterr().err == f"tierewrite: {tmp_path}/nope: {wanted}\n"
    (tmp_path / "naive").mkdir()
    assert run(command, tmp_path) == 4
    found = "no *.safetensors file here; found naive; give the folder that holds the shards"
    assert capsys.readouterr().err == f"tierewrite: {tmp_path}: {found}\n"


def test_a_folder_that_may_not_be_read_is_no_wrong_usage(naive: Naive, monkeypatch: pytest.MonkeyPatch) -> None:
    # root may read everything, so only what click asks is answered with no
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK)
    assert run("inspect", naive("qwen3_tied_bf16"), "--no-ties") == 0


def test_an_absent_dst_is_named_once_by_verify(
    naive: Naive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", naive("qwen3_tied_bf16"), tmp_path / "nope") == 6
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith(f"unreadable: {tmp_path}/nope: does not exist; expected")
    assert lines[-1] == "1 problem found."


def test_a_page_that_is_written_is_said(naive: Naive, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("rewrite", naive("qwen3_tied_bf16"), tmp_path / "out", "-q") == 0
    assert run("report", tmp_path / "out", "--html", tmp_path / "page.html") == 0
    assert capsys.readouterr().out == f"{tmp_path}/page.html is written.\n"
    assert run("report", tmp_path / "out", "--html", tmp_path / "no" / "page.html") == 5
    assert "name a file in a folder that exists" in capsys.readouterr().err


def test_control_characters_in_names_are_shown_escaped(
    copied: Naive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.checkpoints import write_shard

    src = copied("qwen3_tied_bf16")
    write_shard(src / "stray\x1b[31m.safetensors", read_tensors(src))
    run("inspect", src)
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err


def script(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tierewrite", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=FIXTURES.parent,
        **options,  # type: ignore[call-overload]
    )


def python_exits_with_0(code: str) -> None:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FIXTURES.parent, check=False)
    assert done.returncode == 0, done.stderr


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from tierewrite import cli; cli.run(['--help']); "
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'huggingface_hub', 'blake3', 'cupy'} & sys.modules.keys(); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    python_exits_with_0(code)


@pytest.mark.parametrize("command", ["plan", "inspect", "rewrite"])
def test_known_ties_need_neither_torch_nor_transformers(command: str, naive: Naive, tmp_path: Path) -> None:
    ties = tmp_path / "ties.json"
    ties.write_text('{"lm_head.weight": "model.embed_tokens.weight"}')
    arguments = [command, str(naive("qwen3_tied_bf16")), "--ties", str(ties), "--json"]
    if command == "rewrite":
        arguments.insert(2, str(tmp_path / "out"))
    code = (
        f"import sys; from tierewrite import cli; code = cli.run({arguments!r}); "
        "heavy = {'torch', 'transformers'} & sys.modules.keys(); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    python_exits_with_0(code)


def test_no_ties_never_asks_the_class(naive: Naive) -> None:
    code = (
        f"import sys; from tierewrite import cli; src = {str(naive('dg_nvfp4'))!r}; "
        "code = cli.run(['inspect', '--no-ties', src]); "
        "heavy = {'torch', 'transformers'} & sys.modules.keys(); sys.exit(f'imported {heavy}' if heavy else code)"
    )
    python_exits_with_0(code)


def test_module_and_version() -> None:
    done = script("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("tierewrite, version ")


def test_a_process_ends_with_what_libraries_want_done_and_takes_nothing_apart() -> None:
    code = (
        "import atexit, os, sys, types; from tierewrite.cli import main, running\n"
        "class Model:\n"
        "    def __del__(self, write=os.write): write(2, b'taken apart')\n"
        "def run(arguments):\n"
        "    sys.modules['library'] = types.ModuleType('library')\n"
        "    sys.modules['library'].model = Model()\n"
        "    atexit.register(print, 'what a library registered')\n"
        "    return 3\n"
        "running.run = run; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "what a library registered\n", "")


def test_piped_output_that_is_closed_early_gives_no_traceback(naive: Naive) -> None:
    command = f"{sys.executable} -m tierewrite inspect --no-ties --json {naive('dg_nvfp4_sharded')} | head -c 10"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=FIXTURES.parent, check=False)
    assert "Traceback" not in done.stderr


def test_package_is_importable_without_side_effects() -> None:
    code = "import sys, tierewrite; sys.exit(len({'numpy', 'click', 'rich'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=FIXTURES.parent, check=False).returncode == 0


def test_every_public_name_is_there() -> None:
    import tierewrite

    for name in tierewrite.__all__:
        assert getattr(tierewrite, name) is not None
    with pytest.raises(AttributeError):
        tierewrite.nonsense  # noqa: B018


def test_device_cuda_without_one_exits_2(naive: Naive, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tierewrite import digest

    try:
        digest.select("cuda")
    except errors.UsageError:
        assert run("rewrite", naive("qwen3_tied_bf16"), tmp_path / "out", "--device", "cuda") == 2
        assert "--device cpu" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []
    else:
        assert run("rewrite", naive("qwen3_tied_bf16"), tmp_path / "out", "--device", "cuda", "-q") == 0


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_source_on_a_read_only_mode_is_enough(copied: Naive, tmp_path: Path) -> None:
    src = copied("qwen3_tied_bf16")
    for path in [*src.iterdir(), src]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert run("rewrite", src, tmp_path / "out", "-q") == 0
        for path in (tmp_path / "out").iterdir():
            assert os.access(path, os.W_OK)
    finally:
        src.chmod(0o755)


def test_verify_proves_what_was_written_and_exits_6_on_anything_else(
    copied: Naive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = copied("dg_nvfp4")
    config = json.loads((src / "config.json").read_text())
    config["quantization_config"]["ignore"].append("model.encoder.language_model.layers.0.mlp.up_proj")
    (src / "config.json").write_text(json.dumps(config, indent=4))
    assert run("rewrite", src, tmp_path / "out", "-q", "--verify", "--fix-ignore", "--no-manifest") == 0
    assert run("verify", src, tmp_path / "out") == 6
    capsys.readouterr()
    assert run("verify", src, tmp_path / "out", "--fix-ignore", "--json") == 0
    verification = json.loads(capsys.readouterr().out)
    assert verification["schema"] == "tierewrite/verification/1"
    assert verification["ok"] is True
    assert run("verify", src, tmp_path / "nothing") == 6
    assert run("verify", tmp_path / "nothing", tmp_path / "out") == 4


def test_unindexed_tensors_are_left_out_on_request_and_the_result_proved(copied: Naive, tmp_path: Path) -> None:
    src = copied("dg_nvfp4_sharded")
    index = json.loads((src / "model.safetensors.index.json").read_text())
    name = "model.encoder.vision_tower.patch_embedder.input_proj.weight"
    del index["weight_map"][name]
    (src / "model.safetensors.index.json").write_text(json.dumps(index))
    assert run("rewrite", src, tmp_path / "out") == 4
    assert run("rewrite", src, tmp_path / "out", "--ignore-unindexed", "--verify", "-q") == 0
    assert name not in read_tensors(tmp_path / "out")
    assert run("verify", src, tmp_path / "out", "--ignore-unindexed") == 0


@pytest.mark.parametrize(("options", "shown"), [((), False), (("-v",), True)])
def test_what_libraries_log_is_shown_on_request_only(options: tuple[str, ...], shown: bool, tmp_path: Path) -> None:
    code = (
        "import logging, sys; from tierewrite import cli, errors;"
        "import tierewrite.rewriting.run as rewriting;"
        "library = logging.getLogger('gcsfs');"
        "rewriting.plan = lambda *a, **o: (library.error('out of retries'), logging.getLogger('tierewrite.x')"
        ".warning('ours'));"
        "sys.exit(cli.run(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *options, "plan", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert "WARNING tierewrite.x: ours" in done.stderr
    assert ("ERROR gcsfs: out of retries" in done.stderr) is shown
