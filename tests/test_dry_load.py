"""Asking a consumer's own loader: the process, its answers, what follows from them. No consumer is needed here."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tierewrite
from tests.checkpoints import FIXTURES, digests
from tierewrite import cli, consumers
from tierewrite.consumers.dry_load import DryLoader, LoaderOptions, dry_load, interpreter, reason_for_people
from tierewrite.consumers.expected_keys import ExpectedKeys
from tierewrite.consumers.folder import Folder
from tierewrite.consumers.loaded import LOADED_SCHEMA, Cast, DryLoad, Overwritten, Rank, RefusedKey, Unfilled, read
from tierewrite.consumers.loader_process.dry_coverage import Write, box_of, coverage
from tierewrite.consumers.sparse_copy import as_local_folder
from tierewrite.errors import SystemFailure, UsageError

QWEN = FIXTURES / "qwen3_tied_bf16" / "naive"
Script = Callable[[str], DryLoader]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """A loader whose script is the given text; `answer(folder, ...)` in it prints one."""

    def make(text: str) -> DryLoader:
        path = tmp_path / "script.py"
        head = f"""
            import json, os, signal, sys, time
            folders = sys.argv[sys.argv.index("--") + 1:]
            def answer(folder, **facts):
                known = {{"schema": "{LOADED_SCHEMA}", "consumer": "toy", "version": "1"}}
                print(json.dumps({{**known, **facts}}), flush=True)
            """
        path.write_text(textwrap.dedent(head) + textwrap.dedent(text), encoding="utf-8")
        return DryLoader("Toy", "toy", path)

    return make


def ask(loader: DryLoader, *folders: Path, **options: Any) -> list[DryLoad]:
    chosen = LoaderOptions(python=sys.executable, **options)
    return dry_load(loader, {folder: folder.name for folder in folders or (QWEN,)}, chosen)


# --- the process -------------------------------------------------------------------------------------------


def test_facts_come_back_one_a_folder_in_their_order(script: Script, tmp_path: Path) -> None:
    loader = script('for f in folders: answer(f, outcome="refused", reason=f"no: {f}/config.json")')
    first, second = ask(loader, tmp_path / "a", tmp_path / "b")
    assert (first.reason, second.reason) == ("no: a/config.json", "no: b/config.json")
    assert first.ran
    assert not first.loaded


def test_command_line_of_a_script(script: Script) -> None:
    loader = script('answer("", outcome="refused", reason=" ".join(sys.argv[1:-1]))')
    assert ask(loader)[0].reason == "--tensor-parallel-size 1 --"
    with_code = ask(loader, tensor_parallel_size=4, trust_remote_code=True)[0]
    assert with_code.reason == "--tensor-parallel-size 4 --trust-remote-code --"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sys.exit(3)", "its process ended with status 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "its process was ended by SIGKILL"),
        ("raise ValueError('no such thing')", "ValueError: no such thing"),
        ("print('a banner', flush=True)", "its output could not be read"),
        ('print(json.dumps({"schema": "tierewrite/dry-load/99", "consumer": "", "version": "", "outcome": "loaded"}))',
         "schema 'tierewrite/dry-load/99'"),
        ('answer("", outcome="perhaps")', "its output could not be read"),
        ('answer("", outcome="loaded", ranks=[{"rank": "zero"}])', "its output could not be read"),
        ("", "it ended early"),
        ("sys.stderr.write('\\x1b[31mred'); sys.exit(1)", r"\x1b[31mred"),
    ],
)  # fmt: skip
def test_every_fault_of_the_process_is_a_note_and_no_verdict(script: Script, text: str, said: str) -> None:
    found = ask(script(text))
    assert [one.outcome for one in found] == ["not-run"]
    assert said in found[0].reason


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("ValidationError: Please pass the argument `trust_remote_code=True`", "without --trust-remote-code"),
        ("AssertionError: assert speculative_config is not None", "a draft model"),
        ("Error: two\n  lines", "Error: two lines"),
    ],
)
def test_reasons_are_said_in_one_line(reason: str, said: str) -> None:
    assert said in reason_for_people(DryLoad.not_run("vllm", reason))
    assert "\n" not in reason_for_people(DryLoad.not_run("vllm", reason))


def test_what_was_answered_before_the_process_ended_counts(script: Script, tmp_path: Path) -> None:
    loader = script('answer("", outcome="loaded"); os.kill(os.getpid(), signal.SIGKILL)')
    assert [one.outcome for one in ask(loader, tmp_path / "a", tmp_path / "b")] == ["loaded", "not-run"]


def test_a_process_that_hangs_is_ended_with_those_that_it_started(script: Script, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    loader = script(f"""
        child = os.fork()
        open({str(pids)!r}, "a").write(f"{{os.getpid()}}\\n")
        time.sleep(600)
        """)
    found = ask(loader, timeout=3.0)[0]
    assert found.reason == "it did not end within 3 seconds"
    for pid in pids.read_text().split():
        wait_for(lambda pid=pid: not running(int(pid)))  # type: ignore[misc]


def running(pid: int) -> bool:
    """The process is there, and no zombie that its new parent has not fetched yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_a_signal_ends_the_process(script: Script, tmp_path: Path) -> None:
    loader = script(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()) + '.'); time.sleep(600)")
    code = f"""
import sys
from pathlib import Path
from tierewrite import interrupts
from tierewrite.consumers.dry_load import *
interrupts.install()
try:
    loader = DryLoader("Toy", "toy", Path({str(loader.script)!r}))
    dry_load(loader, {{Path("x"): "x"}}, LoaderOptions(python=sys.executable))
except BaseException as stopped:
    print(type(stopped).__name__)
"""
    asking = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("."))
    asking.send_signal(signal.SIGTERM)
    assert asking.communicate(timeout=60)[0] == "Interrupted\n"
    assert not running(int((tmp_path / "pid").read_text().rstrip(".")))


def wait_for(what: Callable[[], bool]) -> None:
    for _ in range(600):
        if what():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen")


def test_the_python_is_the_one_named_else_the_variables_else_this_one_if_it_has_the_consumer(
    script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loader = script("")
    assert loader.variable == "TIEREWRITE_TOY_PYTHON"
    assert interpreter(loader, None) is None
    assert interpreter(replace(loader, package="json"), None) == Path(sys.executable)
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    monkeypatch.setenv(loader.variable, str(link))
    assert interpreter(loader, None) == link  # a virtual environment's interpreter is known by its own name
    assert interpreter(loader, sys.executable) == Path(os.path.abspath(sys.executable))
    for named in (tmp_path, tmp_path / "nothing", QWEN / "config.json"):
        with pytest.raises(UsageError, match="no program that can be run"):
            interpreter(loader, named)


@pytest.mark.parametrize("wrong", [{"mode": "perhaps"}, {"tensor_parallel_size": 0}, {"tensor_parallel_size": 65}])
def test_options_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected"):
        LoaderOptions(**wrong)


# --- check and rewrite -------------------------------------------------------------------------------------


@pytest.fixture
def vllm_is(monkeypatch: pytest.MonkeyPatch, script: Script) -> Callable[[str], None]:
    """From now on this script is vLLM's loader, and this Python has it."""

    def make(text: str) -> None:
        loader = replace(script(text), title="vLLM", package="vllm")
        known = dict(consumers.CONSUMERS)
        known["vllm"] = replace(known["vllm"], dry_loader=loader)
        monkeypatch.setattr(consumers, "CONSUMERS", known)
        monkeypatch.setenv("TIEREWRITE_VLLM_PYTHON", sys.executable)

    return make


def test_a_loader_that_cannot_be_asked_is_a_note_and_rules_decide(vllm_is: Callable[[str], None]) -> None:
    vllm_is("sys.exit(3)")
    report = tierewrite.check(QWEN)
    assert any("vLLM's own loader was not asked" in note and "status 3" in note for note in report.notes)
    assert report.ids() == tierewrite.check(QWEN, loader="off").ids()
    with pytest.raises(SystemFailure, match="status 3"):
        tierewrite.check(QWEN, loader="require")


def test_without_vllm_the_report_says_that_the_loader_was_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIEREWRITE_VLLM_PYTHON", raising=False)
    if interpreter(consumers.CONSUMERS["vllm"].dry_loader, None) is not None:  # type: ignore[arg-type]
        pytest.skip("this Python has vLLM")
    assert any("this Python has no vLLM; name one" in note for note in tierewrite.check(QWEN).notes)
    assert any('loader="off"' in note for note in tierewrite.check(QWEN, loader="off").notes)


def test_a_refusal_is_an_error_in_the_consumers_own_words_and_its_version_is_the_reports(
    vllm_is: Callable[[str], None],
) -> None:
    vllm_is('answer("", outcome="refused", reason="ValueError: not with me", version="9.9")')
    report = tierewrite.check(QWEN)
    assert report.consumer_version == "9.9"
    assert "ValueError: not with me" in next(f.found for f in report.errors if f.id == "loader-refuses")


def test_where_the_loader_is_content_rules_that_it_decides_are_silent(
    vllm_is: Callable[[str], None], tmp_path: Path
) -> None:
    """A folder without q_proj: the rules miss it, and this loader does not."""
    broken = tmp_path / "broken"
    broken.mkdir()
    drop = "model.layers.0.self_attn.q_proj.weight"
    from tests.defects import Draft

    draft = Draft.read(QWEN)
    draft.drop(drop)
    draft.write(broken / "x")
    vllm_is('answer("", outcome="loaded", ranks=[{}])')
    assert "fused-shard-missing" in tierewrite.check(broken / "x", loader="off").ids()
    assert "fused-shard-missing" not in tierewrite.check(broken / "x").ids()


def test_rewrite_for_a_consumer_asks_about_the_output_and_calls_it_by_its_name(
    vllm_is: Callable[[str], None], tmp_path: Path
) -> None:
    vllm_is('answer("", outcome="refused", reason=f"ValueError: in {folders[0]}")')
    dst = tmp_path / "served"
    with pytest.raises(tierewrite.NotReady, match=f"in {dst}") as refused:
        tierewrite.rewrite(QWEN, dst, consumer="vllm")
    assert "staging" not in str(refused.value)
    assert not dst.exists()
    assert os.listdir(tmp_path) == ["script.py"]
    tierewrite.rewrite(QWEN, dst, consumer="vllm", loader="off")
    assert dst.exists()


def test_an_interpreter_that_is_none_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no program"):
        tierewrite.rewrite(QWEN, tmp_path / "out", consumer="vllm", consumer_python=tmp_path / "python")
    assert cli.run(["check", str(QWEN), "--consumer-python", str(tmp_path / "python")]) == 2
    assert os.listdir(tmp_path) == []


def test_nothing_is_written_into_the_checkpoint_by_asking(vllm_is: Callable[[str], None]) -> None:
    vllm_is('open("left-over", "w").write(os.environ["TMPDIR"]); answer("", outcome="loaded", ranks=[{}])')
    before = digests(QWEN)
    tierewrite.check(QWEN)
    assert digests(QWEN) == before
    assert not Path("left-over").exists()


# --- facts -------------------------------------------------------------------------------------------------


def loaded(*ranks: Rank) -> DryLoad:
    return DryLoad(LOADED_SCHEMA, "vllm", "1", "loaded", ranks=ranks)


def test_facts_are_read_by_their_names_and_paths_become_what_users_call_them() -> None:
    rank = {"written": {"p": ["a", "b"]}, "refused": [{"key": "a", "error": "in /staging/x.safetensors"}]}
    facts = {"schema": LOADED_SCHEMA, "consumer": "vllm", "version": "1", "outcome": "loaded", "ranks": [rank]}
    found = read([json.dumps(facts).encode()], {"/staging": "out"})[0]
    assert found.ranks[0].refused == (RefusedKey("a", "in out/x.safetensors"),)
    assert found.ranks[0].parameters_of == {"a": ("p",), "b": ("p",)}
    assert dict(found.keys_together()) == {"p": ("a", "b")}


def test_paths_that_are_no_ascii_or_no_text_become_what_users_call_them_too() -> None:
    for path in ("/tmp/mod\u00e8le", '/tmp/a"b', os.fsdecode(b"/tmp/\xff")):
        facts = {
            "schema": LOADED_SCHEMA,
            "consumer": "vllm",
            "version": "1",
            "outcome": "refused",
            "reason": f"in {path}",
        }
        assert read([json.dumps(facts).encode()], {path: "out"})[0].reason == "in out"


def test_kv_scales_of_which_one_half_or_none_is_filled() -> None:
    def unset(name: str) -> Unfilled:
        return Unfilled(name, (), 1, 1, "default")

    facts = loaded(Rank(unfilled=(unset("l.0.attn.v_scale"), unset("l.1.attn.k_scale"), unset("l.1.attn.v_scale"))))
    assert facts.kv_scales() == (["l.0.attn.v_scale"], ["l.1.attn"])


def test_names_of_keys_that_are_not_there_come_from_other_layers_and_other_experts() -> None:
    qkv = Unfilled("m.1.qkv.weight", (3,), 1, 3)
    w2 = Unfilled("m.0.experts.w2", (3, 1), 1, 3, rows=(1,))
    rank = Rank(
        written={
            "m.0.qkv.weight": ("l.0.q.weight", "l.0.k.weight", "l.0.v.weight"),
            "m.1.qkv.weight": ("l.1.q.weight", "l.1.v.weight"),
            "m.0.experts.w2": ("l.0.experts.0.down.weight", "l.0.experts.2.down.weight"),
        },
        unfilled=(qkv, w2),
    )
    expected = ExpectedKeys(rank)
    assert expected.of(qkv) == ("l.1.k.weight",)
    assert expected.of(w2) == ("l.0.experts.1.down.weight",)
    assert expected.of(Unfilled("m.norm.weight", (3,), 3, 3)) == ()


@pytest.mark.parametrize(
    ("rank", "finding"),
    [
        (Rank(unfilled=(Unfilled("model.norm.weight", (8,), 8, 8),)), "error parameter-missing"),
        (Rank(unfilled=(Unfilled("x", (8,), 8, 8, "unused"),)), None),
        (Rank(unfilled=(Unfilled("x.attn.k_scale", (), 1, 1, "default"),)), None),
        (Rank(unfilled=(Unfilled("x.table", (8,), 8, 8, "default", buffer=True),)), None),
        (Rank(refused=(RefusedKey("lm_head.weight", "KeyError: 'lm_head'"),)), "error unexpected-tensor"),
        (Rank(refused=(RefusedKey("lm_head.weight", "AssertionError: in x"),)), "error wrong-shape"),
        (Rank(refused=(RefusedKey("lm_head.weight", "OverflowError: what"),)), "error load-aborts"),
        (Rank(failed="RuntimeError: what"), "error load-aborts"),
        (Rank(ignored=("model.norm.weight",)), None),
        (Rank(casts=(Cast("model.norm.weight", "x", "BF16", "F32"),)), None),
        (Rank(casts=(Cast("model.norm.weight", "x", "BF16", "U8"),)), "error wrong-dtype"),
        (Rank(casts=(Cast("model.norm.weight", "x", "I8", "U8"),)), "warning wrong-dtype"),
    ],
)
def test_verdicts_follow_from_facts(rank: Rank, finding: str | None) -> None:
    vllm = consumers.CONSUMERS["vllm"]
    subject = vllm.subject(QWEN)
    subject.loaded = loaded(rank)
    found = [f"{f.severity} {f.id}" for f in vllm.loader_rules.findings(subject)]
    assert found == ([] if finding is None else [finding])


@pytest.mark.parametrize(
    ("keys", "said"),
    [(("model.norm.weight",), "1 tensor that"), (("lm_head.weight", "model.norm.weight"), "2 tensors that")],
)
def test_what_the_loader_passes_over_is_counted_in_a_note(keys: tuple[str, ...], said: str) -> None:
    vllm = consumers.CONSUMERS["vllm"]
    subject = vllm.subject(QWEN)
    subject.loaded = loaded(Rank(ignored=keys))
    assert list(vllm.loader_rules.findings(subject)) == []
    assert [note for note in subject.notes if f"reads {said} it does not use" in note]


def test_keys_that_one_parameter_gets_are_compared_by_their_bytes() -> None:
    vllm = consumers.CONSUMERS["vllm"]
    subject = vllm.subject(FIXTURES / "qwen3_tied_but_diverged_bf16" / "naive")
    pair = Overwritten("embed", "model.embed_tokens.weight", "lm_head.weight", 8)
    subject.loaded = loaded(Rank(overwritten=(pair,)))
    assert "name-conflict" in {f.id for f in vllm.findings(subject)}


# --- regions of parameters ---------------------------------------------------------------------------------


def test_regions_of_a_parameter_are_boxes_of_its_dimensions() -> None:
    shape, stride = (4, 6), (6, 1)
    assert box_of(shape, stride, 0, Write((), 0, (4, 6), (6, 1))) == ((0, 4), (0, 6))
    assert box_of(shape, stride, 0, Write((), 6, (2, 6), (6, 1))) == ((1, 3), (0, 6))
    assert box_of(shape, stride, 0, Write((), 2, (4, 3), (6, 1))) == ((0, 4), (2, 5))
    assert box_of(shape, stride, 0, Write((), 12, (12,), (1,))) == ((2, 4), (0, 6))  # two rows as one
    assert box_of(shape, stride, 0, Write((), 2, (3, 4), (1, 6))) == ((0, 4), (2, 5))  # transposed
    assert box_of(shape, stride, 0, Write((), 3, (8,), (1,))) is None
    assert box_of(shape, stride, 24, Write((), 0, (6,), (1,))) is None
    assert box_of((), (), 5, Write((), 5, (), ())) == ()


def test_elements_that_nothing_wrote_are_counted_with_their_rows() -> None:
    shape, stride = (3, 4, 2), (8, 2, 1)
    writes = [Write(("a",), 0, (2, 2), (2, 1)), Write(("b",), 4, (2, 2), (2, 1)), Write(("c",), 16, (4, 2), (2, 1))]
    found = coverage(shape, stride, 0, writes)
    assert (found.missing, found.rows, found.overwritten, found.known) == (8, [1], {}, True)


def test_elements_that_two_keys_wrote_are_counted_and_padding_is_nobodys() -> None:
    a, b = Write(("a",), 0, (6,), (1,)), Write(("b",), 4, (4,), (1,))
    found = coverage((8,), (1,), 0, [Write((), 0, (8,), (1,)), a, b, Write((), 7, (1,), (1,))])
    assert (found.missing, found.overwritten) == (0, {(("a",), ("b",)): 2})


def test_a_scalar_is_filled_by_one_write() -> None:
    assert coverage((), (), 0, []).missing == 1
    assert coverage((), (), 0, [Write(("a",), 0, (), ())]).missing == 0


# --- checkpoints of a store --------------------------------------------------------------------------------


def test_a_store_s_checkpoint_becomes_a_local_one_with_holes_in_the_place_of_weights() -> None:
    import fsspec
    from safetensors import safe_open

    source = FIXTURES / "dg_nvfp4_sharded" / "naive"
    memory = fsspec.filesystem("memory")
    memory.put(str(source), "/sparse", recursive=True)
    folder = Folder.open("memory://sparse", "consolidated*.safetensors")
    with as_local_folder(folder) as local:
        names = {path.name for path in local.iterdir()}
        assert {path.name for path in source.iterdir() if path.suffix in (".safetensors", ".json")} <= names
        for shard in source.glob("*.safetensors"):
            with safe_open(str(shard), "np") as real, safe_open(str(local / shard.name), "np") as copy:
                assert list(real.keys()) == list(copy.keys())
                for key in (key for key in real.keys() if key.endswith("input_scale")):  # noqa: SIM118
                    assert real.get_tensor(key).tobytes() == copy.get_tensor(key).tobytes()
    assert not local.exists()
    memory.rm("/sparse", recursive=True)


@pytest.mark.parametrize(
    ("error", "of_the_environment"),
    [
        (ValueError("Model architectures ['Llava'] failed to be inspected. Please check the logs"), True),
        (ModuleNotFoundError("No module named 'mistral_common'"), True),
        (RuntimeError("Triton is not available"), True),
        (ValueError("There is no module or parameter named 'model.layers.0.x'"), False),
        (AssertionError("Tried to load weights of size 3"), False),
    ],
)
def test_what_the_environment_lacks_is_no_verdict_on_a_checkpoint(
    error: Exception, of_the_environment: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(consumers.__file__).parent / "loader_process")
    dry_process = importlib.import_module("dry_process")  # as a consumer's own Python finds it
    assert dry_process.of_the_environment(error, "folder") is of_the_environment


def test_a_value_is_not_taken_for_unset_memory_that_was_at_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.tensor` is a view to the dispatcher; a sound FP8 checkpoint was at times an error for vLLM."""
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(Path(consumers.__file__).parent / "loader_process")
    building = importlib.import_module("dry_writes").Building()
    with building, torch.device("meta"):
        for _ in range(50):
            torch.empty(4)
            value = torch.tensor(-1.0)
            assert value.untyped_storage()._cdata not in building.unset
        unset = torch.empty(4)
        assert unset.untyped_storage()._cdata in building.unset
        unset.fill_(0)
        assert unset.untyped_storage()._cdata not in building.unset
