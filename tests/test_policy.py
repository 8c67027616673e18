"""One record of the options that decide content: everything that names such an option is made from it."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import click
import pytest

import tierewrite
from tests.checkpoints import FIXTURES
from tierewrite.cli.commands import cli
from tierewrite.consumers import LoaderMode
from tierewrite.errors import UsageError
from tierewrite.planning.policy import (
    FOR_CONSUMER,
    OPTIONS,
    ConsumerName,
    KVScales,
    OnMismatch,
    Policy,
    PolicyOptions,
    size_in_bytes,
)
from tierewrite.rewriting.options import ITEM_TYPES, Device, EngineName, ItemOptions, RewriteOptions
from tierewrite.spelling import spelled
from tierewrite.stores.base import CopyMode

FIELDS = tuple(field.name for field in dataclasses.fields(Policy))


def test_type_checkers_know_every_field_and_every_choice() -> None:
    assert tuple(PolicyOptions.__annotations__) == FIELDS
    assert OPTIONS["on_mismatch"].choices == get_args(OnMismatch)
    assert OPTIONS["kv_scales"].choices == get_args(KVScales)
    assert get_args(ConsumerName) == tuple(FOR_CONSUMER)


def test_a_list_may_choose_what_the_types_say() -> None:
    assert set(ITEM_TYPES) == set(ItemOptions.__optional_keys__)


def test_the_types_say_what_rewrite_takes() -> None:
    parameters = inspect.signature(tierewrite.rewrite).parameters.values()
    own = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    assert own | set(FIELDS) == set(RewriteOptions.__optional_keys__)


CHOICES: dict[str, Any] = {
    "consumer": ConsumerName,
    "copy": CopyMode,
    "device": Device,
    "engine": EngineName,
    "loader": LoaderMode,
}
"""The options of a run that are choices, with their types."""


@pytest.mark.parametrize("name", CHOICES)
def test_the_choices_of_an_option_of_a_run_are_those_of_its_type(name: str, tmp_path: Path) -> None:
    choices = get_args(CHOICES[name])
    shown = {str(one.type.choices) for command in cli.commands.values() for one in command.params if one.name == name}
    assert shown == {str(choices)}
    flag = {"consumer": "for"}.get(name, name)
    assert [spelled(f"--{flag} {choice}") for choice in choices] == [f'{name}="{choice}"' for choice in choices]
    options: dict[str, Any] = {"consumer": "vllm", name: "gpu"}
    with pytest.raises(UsageError, match=rf"'gpu'; expected one of {', '.join(choices)}"):
        tierewrite.rewrite(FIXTURES / "qwen3_tied_bf16" / "naive", tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["rewrite", "plan", "batch", "verify"])
def test_the_command_line_has_every_option_with_its_choices_and_help(command: str) -> None:
    options = {one.name: one for one in cli.commands[command].params if isinstance(one, click.Option)}
    for name in FIELDS:
        kind = options[name].type
        assert OPTIONS[name].help in (options[name].help or "")
        assert isinstance(kind, click.Choice) == bool(OPTIONS[name].choices)
        assert not isinstance(kind, click.Choice) or tuple(kind.choices) == OPTIONS[name].choices
        assert options[name].is_flag == (OPTIONS[name].types == (bool,))


def test_manifest_and_report_hold_every_option() -> None:
    policy = Policy(on_mismatch="keep", max_shard_size=5, fix_ignore=True)
    assert tuple(policy.to_json()) == FIELDS
    assert Policy(**policy.to_json()) == policy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_mismatch": "kep"}, "on_mismatch is 'kep'; expected one of error, keep, repack"),
        ({"kv_scales": None}, "kv_scales is None; expected one of keep, merge"),
        ({"kv_scales": ["keep"]}, "expected one of keep, merge"),
        ({"fix_ignore": "yes"}, "fix_ignore is 'yes'; expected true or false"),
        ({"fix_ignore": 1}, "fix_ignore is 1; expected true or false"),
        ({"max_shard_size": 0}, "max_shard_size is 0; expected at least 1 byte"),
        ({"max_shard_size": True}, "max_shard_size is True; expected a number"),
        ({"max_shard_size": 1.5}, "max_shard_size is 1.5; expected a number"),
        ({"max_shard_size": "0KB"}, "max_shard_size is 0; expected at least 1 byte"),
        ({"consumer": "nobody"}, f"consumer is 'nobody'; expected one of {', '.join(FOR_CONSUMER)}"),
        ({"on_mismach": "keep"}, "there is no option 'on_mismach'"),
    ],
)
def test_a_wrong_choice_is_refused_before_anything_is_read(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as error:
        tierewrite.rewrite("/no/such/place", tmp_path / "out", **options)
    assert message in str(error.value)


def test_a_record_can_only_be_right() -> None:
    with pytest.raises(UsageError, match="on_mismatch is 'kep'"):
        Policy(on_mismatch="kep")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least 1 byte"):
        Policy(max_shard_size=-1)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5_000_000_000),
        ("500mb", 500_000_000),
        (" 1.5 KB ", 1500),
        (".5TB", 500_000_000_000),
        ("2.GB", 2_000_000_000),
        ("123", 123),
        ("123456789012345678KB", 123456789012345678000),
    ],
)
def test_a_size_is_written_in_powers_of_1000(text: str, nbytes: int) -> None:
    assert size_in_bytes(text) == nbytes
    assert Policy.of(max_shard_size=text).max_shard_size == nbytes


@pytest.mark.parametrize("text", ["", "GB", "5XB", "5GiB", "1.5", "-5GB", "infGB", "nanGB", "1e3KB", "٣GB", "9" * 5000])
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match=r"max_shard_size '.*' is no size; write it as 5GB"):
        size_in_bytes(text)


def test_what_is_given_comes_before_what_the_consumer_needs_before_the_defaults() -> None:
    assert Policy.of("vllm", kv_scales="keep") == Policy(unify_fused_scales=True, fix_ignore=True)
    assert Policy.of("transformers") == Policy(keep_names_for="transformers")
    assert Policy.of() == Policy()


def test_rewrite_for_a_consumer_makes_its_choices_as_batch_and_the_command_line_do(tmp_path: Path) -> None:
    src = FIXTURES / "dg_nvfp4_kvfp8" / "naive"
    one = tierewrite.rewrite(src, tmp_path / "one", consumer="vllm", force=True)
    many = tierewrite.batch([src], into=tmp_path / "many", consumer="vllm", force=True)
    assert one.policy == Policy.of("vllm")
    assert one.readiness is not None
    assert many.results[0].error is None
    first = {path.name: path.read_bytes() for path in (tmp_path / "one").glob("*.safetensors")}
    second = {path.name: path.read_bytes() for path in (tmp_path / "many" / "naive").glob("*.safetensors")}
    assert first == second


def test_mypy_reports_a_wrong_choice(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    code = tmp_path / "wrong.py"
    code.write_text(
        "import tierewrite\n"
        'tierewrite.rewrite("a", "b", on_mismatch="keep", max_shard_size="5GB", consumer="vllm")\n'
        'tierewrite.rewrite("a", "b", on_mismatch="kep")\n'
        'tierewrite.plan("a", kv_scales="merg")\n'
        'tierewrite.batch(["a"], fix_ignor=True)\n'
        'tierewrite.prepare_for_vllm("a", "b", dvice="cpu")\n'
    )
    root = Path(tierewrite.__file__).parent.parent
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", str(code)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    lines = [line.split(":")[1] for line in done.stdout.splitlines() if ": error:" in line]
    assert lines == ["3", "4", "5", "6"], done.stdout + done.stderr
