"""The command line as people and pipelines see it: help, summaries, suggestions, topics, formats of findings."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

import tierewrite
from tests import tables
from tests.checkpoints import FIXTURES, edit_tensors, read_tensors
from tierewrite import cli
from tierewrite.cli import progress_bar
from tierewrite.cli.commands import cli as command_line
from tierewrite.cli.topics import PARTS, SCHEMAS, TOPICS
from tierewrite.errors import EXIT_CODES, Refused
from tierewrite.formats.families import FAMILIES
from tierewrite.planning.policy import OPTIONS
from tierewrite.spelling import spelled

Naive = Callable[[str], Path]
Printed = pytest.CaptureFixture[str]


def run(*arguments: object) -> int:
    return cli.run([str(argument) for argument in arguments])


# --- help ---------------------------------------------------------------------------------------------------


def test_help_lists_options_below_headings_at_the_terminals_width(
    capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = {}
    for columns in (60, 140):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert run("rewrite", "--help") == 0
        out = capsys.readouterr().out
        longest[columns] = max(map(len, out.splitlines()))
        headings = (
            "Arguments:",
            "What the output holds:",
            "What is read:",
            "How the work is done:",
            "Where the output goes:",
            "Options:",
        )
        assert [out.index(heading) for heading in headings] == sorted(out.index(heading) for heading in headings)
        holds = out[out.index("What the output holds:") : out.index("What is read:")]
        assert all(f"--{name.replace('_', '-')}" in holds for name in OPTIONS)
        assert "\x1b" not in out
    assert longest[60] < 100 < longest[140] <= 140


@pytest.mark.parametrize("command", sorted(command_line.commands))
def test_help_says_what_every_argument_is(command: str, capsys: Printed) -> None:
    assert run(command, "--help") == 0
    out = capsys.readouterr().out
    options = out[out.index("\nOptions:\n") :].partition("\n\n")[0]
    assert not re.search(r"^  \[?[A-Z|]", options, re.MULTILINE), "without a word about it"
    assert re.search(r"\nArguments:\n  [A-Z|.]+  \S", out)


@pytest.mark.parametrize(("no_colour", "bold"), [("", True), ("1", False)])
def test_headings_are_bold_on_a_terminal_unless_no_color_is_set(
    no_colour: str, bold: bool, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", no_colour)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run("plan", "--help") == 0
    assert ("\x1b[1mOptions:\x1b[0m" in capsys.readouterr().out) is bold


@pytest.mark.parametrize("arguments", [("-v", "plan"), ("plan", "-v")])
def test_verbose_counts_before_a_command_and_after_it(
    arguments: tuple[str, ...], naive: Naive, capsys: Printed
) -> None:
    import logging

    assert run(*arguments, naive("qwen3_tied_bf16")) == 0
    assert logging.getLogger("tierewrite").level == logging.INFO
    assert run(*arguments, "-v", naive("qwen3_tied_bf16")) == 0
    assert logging.getLogger("tierewrite").level == logging.DEBUG
    assert run("plan", naive("qwen3_tied_bf16")) == 0
    assert logging.getLogger("tierewrite").level == logging.WARNING
    capsys.readouterr()


# --- summaries ----------------------------------------------------------------------------------------------


def test_summary_names_what_goes_folds_what_stays_and_ends_with_what_it_took(
    naive: Naive, tmp_path: Path, capsys: Printed
) -> None:
    assert run("rewrite", naive("qwen3_tied_bf16"), tmp_path / "out", "--verify") == 0
    out = capsys.readouterr().out
    assert "Names that go: lm_head.weight.\n" in out
    last = out.splitlines()[-1]
    assert last.startswith(f"{tmp_path / 'out'} is written: 72.44 KiB -> 54.44 KiB in ")
    assert " s; verified; hashed on " in last
    assert "/s" not in last  # of so few bytes the time is not that of moving them
    assert run("rewrite", naive("dg_nvfp4"), tmp_path / "dg") == 0
    out = capsys.readouterr().out
    assert "\n26 ties stored once under an alias, now renamed: decoder.embed_tokens, decoder.norm, " in out
    assert "Names that go: model.encoder.language_model.layers.*.mlp.down_proj.weight, " in out
    assert "0 B" not in out
    assert "; not verified; hashed on " in out


def test_a_rate_is_told_of_what_is_large(naive: Naive, tmp_path: Path) -> None:
    small = tierewrite.rewrite(naive("qwen3_tied_bf16"), tmp_path / "out")
    large = dataclasses.replace(small, after_bytes=3 << 30, seconds=1.5)
    assert " -> 3.00 GiB in 1.5 s, 2.00 GiB/s; not verified; hashed on " in "".join(map(str, large.lines()))


def test_nothing_to_do_is_one_sentence(naive: Naive, tmp_path: Path, capsys: Printed) -> None:
    tierewrite.rewrite(naive("qwen3_tied_bf16"), tmp_path / "once")
    said = "Nothing to do: every tied tensor is stored once, under its canonical name."
    for command in (["plan", tmp_path / "once"], ["rewrite", tmp_path / "once", tmp_path / "twice"]):
        assert run(*command) == 0
        more = " The same tensors are written." if command[0] == "rewrite" else ""
        assert f"{said}{more}\n" in capsys.readouterr().out
    assert run("plan", naive("qwen3_tied_bf16")) == 0
    assert said not in capsys.readouterr().out


def test_a_summary_names_the_configs_that_changed(naive: Naive, tmp_path: Path, capsys: Printed) -> None:
    case, keep = naive("qwen3_tied_but_diverged_bf16"), ("--on-mismatch", "keep")
    assert run("rewrite", case, tmp_path / "kept", *keep) == 0
    assert "Changed beside" not in capsys.readouterr().out
    assert run("rewrite", case, tmp_path / "said", *keep, "--fix-config") == 0
    assert "Changed beside the tensors: config.json.\n" in capsys.readouterr().out
    report = tierewrite.rewrite(case, tmp_path / "again", on_mismatch="keep", fix_config=True)
    assert report.to_json()["configs"] == ["config.json"]


def test_a_plan_says_whether_it_is_a_promise(naive: Naive, capsys: Printed) -> None:
    assert run("plan", naive("dg_nvfp4")) == 0
    assert "--confirm" in capsys.readouterr().out
    assert run("plan", naive("dg_nvfp4"), "--confirm") == 0
    assert "Confirmed: " in capsys.readouterr().out
    for options, confirmed in ((), False), (("--confirm",), True):
        assert run("plan", naive("dg_nvfp4"), *options, "--json") == 0
        assert json.loads(capsys.readouterr().out)["confirmed"] is confirmed
    assert run("plan", naive("qwen3_tied_but_diverged_bf16")) == 0
    capsys.readouterr()
    assert run("plan", naive("qwen3_tied_but_diverged_bf16"), "--confirm") == 3
    assert "lm_head.weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    "case", ["dg_nvfp4", "qwen3_tied_but_diverged_bf16", "dg_nvfp4_encoder_bf16", "dg_nvfp4_kvfp8"]
)
@pytest.mark.parametrize("options", [{}, {"on_mismatch": "keep"}, {"on_mismatch": "keep", "kv_scales": "merge"}])
def test_a_confirmed_plan_is_what_the_rewrite_does(case: str, options: dict[str, str], tmp_path: Path) -> None:
    source = FIXTURES / case / "naive"
    try:
        report = tierewrite.rewrite(source, tmp_path / "out", **options)  # type: ignore[arg-type]
    except Refused:
        with pytest.raises(Refused):
            tierewrite.plan(source, confirm=True, **options)  # type: ignore[arg-type]
        return
    plan = tierewrite.plan(source, confirm=True, **options)  # type: ignore[arg-type]
    assert plan.confirmed
    status = {"planned": "rewritten", "unconfirmed": "kept", "canonical": "canonical"}
    assert [(g.id, status[g.status]) for g in plan.groups] == [(g.group.id, g.status) for g in report.groups]
    assert plan.total_tensors == report.after_tensors


def test_who_is_asked_is_shown_while_it_is_asked(naive: Naive) -> None:
    phases: list[str] = []

    class Watching(tierewrite.Progress):
        def start(self, phase: str, total: int) -> None:
            phases.append(phase)

    tierewrite.plan(naive("dg_nvfp4"), progress=Watching())
    assert phases == ["asking DiffusionGemmaForBlockDiffusion for its ties"]


def test_the_display_appears_by_itself_while_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    from threading import Event

    from rich.console import Console

    appeared = Event()
    monkeypatch.setattr(progress_bar, "_VISIBLE_AFTER", 0.0)
    with progress_bar.Bar(Console(force_terminal=True, file=open("/dev/null", "w"))) as bar:
        monkeypatch.setattr(bar._display, "start", appeared.set)
        monkeypatch.setattr(bar._display, "stop", lambda: None)
        bar.start("asking X for its ties", 0)
        assert appeared.wait(30)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("dg_nvfp/naive", "dg_nvfp4/naive"), ("dg_nvfp4/naiv", "dg_nvfp4/naive"), ("dg_nvfp4/other", None)],
)
def test_a_mistyped_path_gets_a_suggestion(typed: str, meant: str | None, capsys: Printed) -> None:
    for command in ("plan", "check"):
        assert run(command, FIXTURES / typed) == 4
        err = capsys.readouterr().err
        assert "does not exist" in err
        assert ("did you mean" in err) is (meant is not None)
        assert meant is None or f"did you mean '{FIXTURES / meant}'?" in err


def test_whoever_names_a_shard_is_told_the_folder(capsys: Printed) -> None:
    folder = FIXTURES / "qwen3_tied_bf16" / "naive"
    for command in ("plan", "check"):
        assert run(command, folder / "model.safetensors") == 4
        assert f"not a folder; give the one that it is in: '{folder}'" in capsys.readouterr().err


def test_a_summary_has_columns_for_scales_where_there_are_some(naive: Naive, tmp_path: Path, capsys: Printed) -> None:
    for case, there in (("qwen3_tied_bf16", False), ("dg_nvfp4", True)):
        assert run("rewrite", naive(case), tmp_path / case) == 0
        assert ("(median, max)" in capsys.readouterr().out) is there


def test_what_looks_like_a_hub_id_gets_a_suggestion_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Printed
) -> None:
    (tmp_path / "exports" / "gemma-nvfp4").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert run("plan", "exports/gemma-nvfp5") in (4, 5)
    assert "no folder 'exports/gemma-nvfp5' here (did you mean 'exports/gemma-nvfp4'?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify"], "Missing argument 'DST'."),
        (["check", "x", "--json", "--format", "sarif"], "--json is --format json; leave it out, or --format sarif"),
        (["explain", "scale-missin"], "'scale-missin'; did you mean 'scale-missing'?"),
        (["explain", "exit-code"], "did you mean 'exit-codes'?"),
        (["explain", "modelop"], "did you mean 'modelopt'?"),
        (["rewrite", "x", "y", "--max-shard-size", "5gib"], "--max-shard-size '5gib' is no size; write it as 5GB"),
        (["rewrite", "x", "y", "--max-shard-size", "0"], "--max-shard-size is 0; expected at least 1 byte"),
    ],
)
def test_what_is_typed_wrong_is_named_as_it_was_typed(arguments: list[str], said: str, capsys: Printed) -> None:
    assert run(*arguments) == 2
    assert said in capsys.readouterr().err


# --- topics -------------------------------------------------------------------------------------------------


def test_topics_are_made_from_the_records(capsys: Printed) -> None:
    assert run("explain", "--list") == 0
    topics = capsys.readouterr().out.partition("\n\n")[0]
    assert [line.split()[0] for line in topics.splitlines()] == list(TOPICS)
    assert all(family in topics for family in FAMILIES), "each of them is a topic"
    assert run("explain", "exit-codes") == 0
    assert capsys.readouterr().out.splitlines() == [f"{code:>3}  {text}" for code, text in EXIT_CODES.items()]
    assert run("explain", "json") == 0
    out = capsys.readouterr().out
    assert all(schema.name in out for schema in SCHEMAS)
    assert run("explain", "formats") == 0
    assert [*FAMILIES] == [line for line in capsys.readouterr().out.splitlines()[2:] if line and line[0] != " "]
    assert run("explain", "gptq-awq") == 0
    assert "qzeros, scales, g_idx" in capsys.readouterr().out


@pytest.mark.parametrize("topic", ["exit-codes", "json", "formats", "gptq-awq"])
def test_a_topic_that_has_no_object_says_so(topic: str, capsys: Printed) -> None:
    """Not that there is no such topic."""
    assert run("explain", topic, "--json") == 2
    out, err = capsys.readouterr()
    assert f"'{topic}' is explained in words only; leave out --json" in err
    assert json.loads(out)["error"]["exit_code"] == 2


def test_every_schema_that_is_printed_is_explained() -> None:
    package = Path(tierewrite.__file__).parent
    used = {
        found
        for path in package.rglob("*.py")
        for found in re.findall(r'SCHEMA = "(tierewrite/\w+/\d+)"', path.read_text(encoding="utf-8"))
    }
    internal = {"tierewrite/staging/1", "tierewrite/incomplete/1", "tierewrite/digests/1", "tierewrite/class/2"}
    assert {schema.name for schema in SCHEMAS} >= {name for name in used if name not in internal}


DATA = {"actions", "dtypes", "metadata", "differing_aliases", "files", "map", "written", "tensors"}
"""Members whose own members are named by what was found: keys, files, dtypes."""


def members(value: object, inside: str = "") -> Iterator[str]:
    """All names of members that our JSON has, but for those that the checkpoint chose."""
    if isinstance(value, list):
        for one in value:
            yield from members(one)
    elif isinstance(value, dict):
        for name, below in value.items():
            if inside not in DATA:
                yield name
            yield from members(below, name if inside not in DATA else "")


def test_every_member_of_an_object_is_explained(tmp_path: Path, capsys: Printed) -> None:
    src, dst = FIXTURES / "qwen3_tied_bf16" / "naive", tmp_path / "dst"
    nvfp4, served = FIXTURES / "dg_nvfp4" / "naive", tmp_path / "served"
    refused, kept = FIXTURES / "qwen3_tied_but_diverged_bf16" / "naive", tmp_path / "kept"
    explained = {schema.name: set(re.findall(r"`([\w-]+)`", schema.members)) for schema in SCHEMAS}
    inside = {part.name: set(re.findall(r"`([\w-]+)`", part.members)) for part in PARTS}
    seen, deep = set(), set()
    for arguments in (
        ("plan", src),
        ("rewrite", src, dst, "--digests"),
        ("rewrite", nvfp4, served, "--for", "vllm", "--loader", "off"),
        ("rewrite", nvfp4, tmp_path / "repacked", "--on-mismatch", "repack", "--fill-missing-scales"),
        ("rewrite", refused, tmp_path / "refused"),
        ("rewrite", refused, kept, "--on-mismatch", "keep"),
        ("inspect", nvfp4),
        ("verify", src, dst),
        ("verify", src, kept),
        ("verify", dst),
        ("verify", src),
        ("check", served, "--loader", "off"),
        ("explain", "parameter-missing"),
        ("expand", dst, tmp_path / "expanded", "--for", "sglang"),
        ("batch", src, "--plan-only"),
        ("report", served, "--for", "vllm", "--for", "sglang"),
        ("report", kept),
        ("plan", tmp_path / "nowhere"),
    ):
        run(*arguments, "--json")
        found = json.loads(capsys.readouterr().out)
        seen.add(found["schema"])
        assert found.keys() - explained[found["schema"]] == {"schema"}, arguments
        deep |= {(found["schema"], name) for name in members(found)}
    for folder in (dst, served, kept):
        manifest = json.loads((folder / "tierewrite.json").read_text(encoding="utf-8"))
        assert manifest.keys() - explained[manifest["schema"]] == {"schema"}
        deep |= {(manifest["schema"], name) for name in members(manifest)}
    assert {*seen, manifest["schema"]} == explained.keys()
    holding: dict[str, set[str]] = {name: {"schema"} | known for name, known in explained.items()}
    for part in PARTS:
        for kind in part.stands_in.split(", "):
            holding[f"tierewrite/{kind}/1"] |= inside[part.name]
    for name in ("report", "expansion", "page"):  # these hold a whole object of that schema
        holding[f"tierewrite/{name}/1"] |= holding["tierewrite/readiness/1"]
    assert [(schema, name) for schema, name in sorted(deep) if name not in holding[schema]] == []


@pytest.mark.parametrize("readme", sorted({place for place, _ in tables.TABLES.values()}))
def test_tables_of_readmes_are_those_of_the_records(readme: str) -> None:
    text = (tables.ROOT / readme).read_text(encoding="utf-8")
    assert text == tables.with_tables(readme, text), "python -m tests.tables"


# --- findings for pipelines -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with one error and two warnings for vLLM."""
    out = tmp_path_factory.mktemp("findings") / "a:b,100%"
    tierewrite.rewrite(FIXTURES / "dg_nvfp4" / "naive", out)
    return out


def test_findings_as_annotations_of_github(written: Path, capsys: Printed) -> None:
    assert run("check", written, "--format", "github") == 6
    lines = capsys.readouterr().out.splitlines()
    place = str(written).replace("%", "%25").replace(":", "%3A").replace(",", "%2C")
    assert lines[0].startswith(f"::error file={place},title=vllm%3A per-side-conflict::4 names are read")
    assert [line.split()[0] for line in lines[:3]] == ["::error", "::warning", "::warning"]
    assert all(line.startswith("::notice ") for line in lines[3:])


def test_findings_as_sarif(written: Path, capsys: Printed) -> None:
    assert run("check", written, "--format", "sarif") == 6
    log = json.loads(capsys.readouterr().out)
    assert log["version"] == "2.1.0"
    (found,) = log["runs"]
    ids = {rule["id"] for rule in found["tool"]["driver"]["rules"]}
    assert [(r["ruleId"], r["level"]) for r in found["results"]] == [
        ("per-side-conflict", "error"),
        ("alignment", "warning"),
        ("generation-config", "warning"),
    ]
    assert {result["ruleId"] for result in found["results"]} <= ids
    where = found["results"][0]["locations"][0]["logicalLocations"][0]["fullyQualifiedName"]
    assert where == "model.decoder.layers.0.layer_scalar"
    place = found["results"][0]["locations"][0]["physicalLocation"]
    assert place["region"]["startLine"] == 1
    assert place["artifactLocation"]["uri"] == str(written).replace("%", "%25"), "a URI, and no path"
    (invocation,) = found["invocations"]
    assert "own loader was not asked" in invocation["toolExecutionNotifications"][0]["message"]["text"]


def test_findings_as_a_test_report(written: Path, tmp_path: Path, capsys: Printed) -> None:
    assert run("check", written, "--format", "junit") == 6
    suite = ElementTree.fromstring(capsys.readouterr().out)
    assert (suite.get("tests"), suite.get("failures")) == ("3", "1")
    assert [case.get("name") for case in suite if case.find("failure") is not None] == ["per-side-conflict"]
    assert "own loader was not asked" in str(suite.findtext("system-out"))
    assert run("check", written, "--format", "junit", "--strict") == 6
    suite = ElementTree.fromstring(capsys.readouterr().out)
    assert suite.get("failures") == "3", "it is what fails the job"
    assert len(suite.findall("testcase/failure")) == 3
    tierewrite.rewrite(FIXTURES / "qwen3_tied_bf16" / "naive", tmp_path / "good")
    assert run("check", tmp_path / "good", "--format", "junit", "--for", "transformers") == 0
    suite = ElementTree.fromstring(capsys.readouterr().out)
    assert [case.get("name") for case in suite.findall("testcase")] == ["ready"]


def test_format_json_is_json(written: Path, capsys: Printed) -> None:
    assert run("check", written, "--format", "json") == 6
    one = capsys.readouterr().out
    assert run("check", written, "--json") == 6
    assert capsys.readouterr().out == one


# --- in other people's pipelines ------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent


def checking_step(folder: Path, **given: str) -> subprocess.CompletedProcess[str]:
    """What the action's last step does, as GitHub's runner carries it out where this tierewrite is installed."""
    action = yaml.safe_load((ROOT / ".github" / "actions" / "check" / "action.yml").read_text())
    values = {name: given.get(name, known.get("default")) for name, known in action["inputs"].items()}
    step = action["runs"]["steps"][-1]
    command = folder / "tierewrite" / "bin" / "tierewrite"
    command.parent.mkdir(parents=True, exist_ok=True)
    command.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m tierewrite "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "RUNNER_TEMP": str(folder)}
    for name, value in step["env"].items():
        environment[name] = re.sub(r"\$\{\{ inputs\.(\w+) \}\}", lambda found: values[found[1]], value)
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    return subprocess.run(shell, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def test_the_action_annotates_and_fails_where_check_does(written: Path, tmp_path: Path) -> None:
    done = checking_step(tmp_path, checkpoint=str(written), sarif="findings.sarif")
    assert done.returncode == 6, done
    assert "title=vllm%3A per-side-conflict::4 names are read into 2 parameters" in done.stdout
    (result, *_) = json.loads((tmp_path / "findings.sarif").read_text())["runs"][0]["results"]
    assert result["ruleId"] == "per-side-conflict"


def test_the_actions_inputs_are_no_commands(tmp_path: Path) -> None:
    done = checking_step(tmp_path, checkpoint="$(touch owned); touch owned")
    assert done.returncode == 4, done
    assert not (tmp_path / "owned").exists()


def test_the_action_leaves_no_empty_file_where_nothing_could_be_checked(tmp_path: Path) -> None:
    done = checking_step(tmp_path, checkpoint="nowhere", sarif="findings.sarif")
    assert done.returncode == 4, done
    assert not (tmp_path / "findings.sarif").exists()


def test_the_action_fails_on_warnings_where_it_is_strict(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "out")
    edit_tensors(
        tmp_path / "out", {name: None for name in read_tensors(written) if re.search("encoder.*layer_scalar", name)}
    )
    found = tierewrite.check(tmp_path / "out", "vllm")
    assert found.warnings
    assert not found.errors
    assert checking_step(tmp_path, checkpoint="out").returncode == 0
    assert checking_step(tmp_path, checkpoint="out", strict="true").returncode == 6


def test_the_pre_commit_hook_is_a_command_that_looks_at_what_a_checkpoint_has(written: Path, capsys: Printed) -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    name, *arguments = hook["entry"].split()
    assert name == "tierewrite"
    assert run(*arguments, written, "--for", "vllm") == 6
    names = ["model.safetensors", "model.safetensors.index.json", "config.json", "a/hf_quant_config.json"]
    assert [bool(re.search(hook["files"], at)) for at in [*names, "README.md"]] == [True] * 4 + [False]


# --- results in an interpreter --------------------------------------------------------------------------------


def test_a_result_is_one_line_in_an_interpreter_and_the_commands_table_when_printed(
    tmp_path: Path, capsys: Printed
) -> None:
    source = FIXTURES / "dg_nvfp4" / "naive"
    plan, report = tierewrite.plan(source), tierewrite.rewrite(source, tmp_path / "out")
    inspection = tierewrite.inspect(source)
    assert inspection.ties is not None
    results = [
        (plan, ["plan", source]),
        (inspection, ["inspect", source]),
        (tierewrite.verify(source, tmp_path / "out"), ["verify", source, tmp_path / "out"]),
        (tierewrite.check(tmp_path / "out", "vllm"), ["check", tmp_path / "out"]),
        (report, None),
        (tierewrite.batch([source], plan_only=True), None),
        (inspection.ties, None),
        (plan.groups[0], None),
        (report.groups[0], None),
    ]
    for result, command in results:
        assert "\n" not in repr(result)
        assert repr(result).startswith(f"<{type(result).__name__}: ")
        assert len(repr(result)) < 200
        html = result._repr_html_()
        assert html.startswith("<pre>")
        assert str(result).splitlines()[0].split()[0] in html
        if command is not None:
            run(*command)
            lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
            assert str(result).splitlines() == list(map(spelled, lines))
            assert "--confirm" not in str(result)
    assert repr(plan) == "<RewritePlan: 346 -> 198 tensors, 245.54 KiB -> 186.75 KiB (-23.9%), 43 ties>"
    assert repr(plan.tensors) == "<what becomes of 346 tensors, by name in the source>"
    fates = [{**fate._asdict(), "action": fate.action.value} for fate in plan.tensors.values()]
    assert fates == plan.to_json()["tensors"]
    page = tierewrite.report_page(tmp_path / "out")
    assert repr(page) == f"<Page: {tmp_path / 'out'}>"
    assert page._repr_html_().startswith('<iframe srcdoc="&lt;!doctype html')


def test_no_public_result_is_long_in_an_interpreter(tmp_path: Path) -> None:
    """Of the largest fixture, and of every class that has results: one that is new has to be looked at here."""
    source, out = FIXTURES / "dg_nvfp4_sharded" / "naive", tmp_path / ("a long name " * 15)
    report = tierewrite.rewrite(source, out, digests=True)
    plan, inspection, readiness = tierewrite.plan(source), tierewrite.inspect(source), tierewrite.check(out, "vllm")
    batch = tierewrite.batch([source], plan_only=True)
    page = tierewrite.report_page(out, "vllm")
    results = [plan, report, inspection, inspection.ties, readiness, batch, batch.results[0], page]
    results += [tierewrite.verify(source, out), tierewrite.verify_integrity(out), tierewrite.stream(source)]
    results += [tierewrite.expand(out, tmp_path / "expanded")]
    classes = {type(result) for result in results}
    public = {thing for name in dir(tierewrite) if inspect.isclass(thing := getattr(tierewrite, name))}
    assert {c for c in public if not issubclass(c, BaseException)} - classes == {tierewrite.Progress}
    parts = [*plan.groups, *plan.tensors.values(), *report.groups, *report.scales, *readiness.findings, page.facts]
    assert len(report.scales) == 122
    assert readiness.findings
    for result in [*results, *parts]:
        assert "\n" not in repr(result)
        assert len(repr(result)) < 200, result
    merged = report.scales[0]
    assert repr(merged) == f"<MergedScale: 2 sides, {merged.ratio:.2f}x, {merged.target}>"


def test_what_is_written_prints_as_the_command_does(tmp_path: Path, capsys: Printed) -> None:
    source, out, again = FIXTURES / "dg_nvfp4" / "naive", tmp_path / "out", tmp_path / "again"
    pairs: list[tuple[Callable[[], object], list[object]]] = [
        (lambda: tierewrite.rewrite(source, out), ["rewrite", source, out, "--overwrite"]),
        (lambda: tierewrite.verify_integrity(out), ["verify", out]),
        (lambda: tierewrite.expand(out, again), ["expand", out, again, "--overwrite"]),
        (lambda: tierewrite.batch([out], plan_only=True), ["batch", out, "--plan-only"]),
    ]
    for function, command in pairs:
        made = function()
        assert run(*command) == 0, command
        shown = [re.sub(r"\b\d+\.\d s\b(, [\d.]+ \w+/s)?", "T", text) for text in (str(made), capsys.readouterr().out)]
        printed = [[line.rstrip() for line in text.splitlines()] for text in shown]
        assert printed[0] == printed[1], command
        assert repr(made).startswith(f"<{type(made).__name__}: ")
