"""What a class answered is remembered: same plan, same bytes, nothing imported; nothing believed that may differ."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import msgspec
import pytest
from blake3 import blake3

import tierewrite
from tests.checkpoints import FIXTURES, read_shapes
from tierewrite.kept_files import KeptFiles
from tierewrite.ties import class_memory, installed, model_class
from tierewrite.ties.on_disk import on_disk
from tierewrite.ties.tie_map import TieMap

Naive = Callable[[str], Path]
QWEN = "qwen3_tied_bf16"
CASES = ("qwen3_tied_bf16", "bart_bf16", "llava_tied_bf16", "mixtral_tied_bf16", "dg_nvfp4", "qwen3_torchao_head")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Answers are kept below this folder, which is not there yet."""
    monkeypatch.setenv("TIEREWRITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "classes"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Which model was asked itself, each time."""
    times: list[str] = []
    ask = model_class._asked_now

    def counting(root: Path, config: dict[str, Any], *rest: Any) -> Any:
        times.append(str(config.get("model_type")))
        return ask(root, config, *rest)

    monkeypatch.setattr(model_class, "_asked_now", counting)
    return times


def resolve(case: str, config: dict[str, Any] | None = None, **options: Any) -> TieMap:
    folder = FIXTURES / case / "naive"
    config = config or json.loads((folder / "config.json").read_text())
    return TieMap.resolve(folder, config, keys=list(read_shapes(folder)), **options)


def only_file(cache: Path) -> Path:
    (path,) = cache.glob("*.json")
    return path


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes what a file says, and makes its first line right again."""
    said = json.loads(path.read_bytes().partition(b"\n")[2])
    change(said)
    text = json.dumps(said).encode()
    path.write_bytes(blake3(text).hexdigest().encode() + b"\n" + text)


@pytest.mark.parametrize("case", CASES)
def test_a_remembered_answer_is_the_one_that_was_given(case: str, asked: list[str]) -> None:
    folder = FIXTURES / case / "naive"
    keys = list(read_shapes(folder))
    first = resolve(case)
    disk = on_disk(first, keys)
    again = resolve(case)
    assert (first.remembered, again.remembered) == (False, True)
    assert on_disk(again, keys) == disk
    assert again == first
    assert again.model is not None
    assert first.model is not None
    for name in ("class_name", "base_model_prefix", "shapes", "flags", "optional", "ignored", "embeddings"):
        assert getattr(again.model, name) == getattr(first.model, name)
    assert list(again.model.shapes) == list(first.model.shapes)
    assert len(asked) == 1


@pytest.mark.parametrize("case", ["dg_nvfp4", "mixtral_tied_bf16", "qwen3_tied_bf16"])
def test_the_output_is_the_same_with_and_without(case: str, naive: Naive, tmp_path: Path, asked: list[str]) -> None:
    os.environ["TIEREWRITE_CACHE"] = ""
    tierewrite.rewrite(naive(case), tmp_path / "asked")
    plan = tierewrite.plan(naive(case)).to_json()
    os.environ["TIEREWRITE_CACHE"] = str(tmp_path / "cache")
    tierewrite.rewrite(naive(case), tmp_path / "first")
    asked.clear()
    tierewrite.rewrite(naive(case), tmp_path / "second")
    assert tierewrite.plan(naive(case)).to_json() == plan
    assert asked == []
    files = sorted(path.name for path in (tmp_path / "asked").iterdir())
    for other in ("first", "second"):
        assert sorted(path.name for path in (tmp_path / other).iterdir()) == files
        for name in files:
            assert (tmp_path / other / name).read_bytes() == (tmp_path / "asked" / name).read_bytes(), name


def imported_by(*arguments: str) -> set[str]:
    """Which of torch and transformers a command imports, in a process of its own."""
    code = (
        "import sys\nfrom tierewrite.cli import run\n"
        f"code = run({list(arguments)!r})\n"
        "print(sorted({'torch', 'transformers', 'sympy'} & set(sys.modules)), file=sys.stderr)\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.strip().splitlines()[-1].replace("'", '"')))


def test_a_second_process_imports_neither_torch_nor_transformers(naive: Naive, tmp_path: Path) -> None:
    src = str(naive("mixtral_tied_bf16"))
    assert imported_by("rewrite", src, str(tmp_path / "first")) >= {"torch", "transformers"}
    assert imported_by("rewrite", src, str(tmp_path / "second")) == set()
    assert imported_by("inspect", src, "--json") == set()
    assert imported_by("verify", src, str(tmp_path / "second")) >= {"torch", "transformers"}


def test_inspect_says_whether_the_answer_is_remembered(naive: Naive) -> None:
    for remembered in (False, True):
        found = tierewrite.inspect(naive(QWEN))
        assert found.to_json()["ties"]["remembered"] is remembered
        assert ("remembered" in str(found)) is remembered
    assert tierewrite.inspect(naive(QWEN), ties={}).to_json()["ties"]["remembered"] is False


def test_a_proof_asks_the_class_itself(naive: Naive, tmp_path: Path, asked: list[str], cache: Path) -> None:
    src = naive(QWEN)
    tierewrite.rewrite(src, tmp_path / "out", verify=True)
    assert asked == ["qwen3", "qwen3"]
    rewritten(only_file(cache), lambda said: said.update(ties=[]))
    tierewrite.rewrite(src, tmp_path / "untied")
    assert asked == ["qwen3", "qwen3"]
    assert not tierewrite.verify(src, tmp_path / "untied").ok
    assert tierewrite.verify(src, tmp_path / "out").ok
    assert len(asked) == 4
    assert resolve(QWEN).ties  # what the class said has replaced what was there


def test_names_that_were_not_asked_before_are_asked_then(cache: Path, asked: list[str]) -> None:
    keys = list(read_shapes(FIXTURES / "mixtral_tied_bf16" / "naive"))
    disk = on_disk(resolve("mixtral_tied_bf16"), keys)
    rewritten(only_file(cache), lambda said: said.update(loaded={}, saved=[]))
    again = resolve("mixtral_tied_bf16")
    assert again.remembered
    assert len(asked) == 1
    assert on_disk(again, keys) == disk
    assert len(asked) == 2
    assert on_disk(resolve("mixtral_tied_bf16"), keys) == disk
    assert len(asked) == 2


def test_an_answer_that_the_class_does_not_give_is_no_ground_to_go_on(cache: Path) -> None:
    keys = list(read_shapes(FIXTURES / "mixtral_tied_bf16" / "naive"))
    resolve("mixtral_tied_bf16")
    rewritten(only_file(cache), lambda said: said.update(loaded={}, saved=[], ties=[]))
    with pytest.raises(tierewrite.ConfigError, match="changed while it was used"):
        on_disk(resolve("mixtral_tied_bf16"), keys)


# --- what is asked again


@pytest.mark.parametrize("differs", ["config", "order", "names", "package", "torch", "tierewrite"])
def test_it_is_asked_again_if_anything_differs(
    differs: str, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    (tmp_path / "site-packages").mkdir()
    folder = FIXTURES / QWEN / "naive"
    config, keys = json.loads((folder / "config.json").read_text()), list(read_shapes(folder))
    TieMap.resolve(folder, config, keys=keys)
    TieMap.resolve(folder, config, keys=keys)
    assert len(asked) == 1
    if differs == "config":
        config["eos_token_id"] = 7
    elif differs == "order":
        config = dict(reversed(config.items()))
    elif differs == "names":
        keys = keys[1:]
    elif differs == "package":
        (tmp_path / "site-packages" / "timm").mkdir()
    else:
        own = Path(tmp_path / "own")
        (own / "ties").mkdir(parents=True)
        (own / "version.py").write_text("__version__ = '9'")
        find = installed.folder_of
        if differs == "torch":
            monkeypatch.setattr(installed, "folder_of", lambda name: own if name == "torch" else find(name))
        else:
            monkeypatch.setattr(installed, "_OWN", own)
            monkeypatch.setattr(installed, "_OWN_ROOMS", ("ties",))
    TieMap.resolve(folder, config, keys=keys)
    assert len(asked) == 2


def test_it_is_asked_again_if_a_file_of_transformers_changed(
    asked: list[str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(QWEN)
    files = json.loads(only_file(cache).read_bytes().partition(b"\n")[2])["files"]
    assert "models/qwen3/modeling_qwen3.py" in files
    root, copy = installed.folder_of("transformers"), tmp_path / "transformers"
    assert root is not None
    for name in files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((root / name).read_bytes())
    read = installed.content_of_transformers
    before = read(files)
    find = installed.folder_of
    monkeypatch.setattr(installed, "folder_of", lambda name: copy if name == "transformers" else find(name))
    assert read(files) == before
    changed = copy / "models/qwen3/modeling_qwen3.py"
    times = changed.stat()
    changed.write_bytes(changed.read_bytes().replace(b"lm_head.weight", b"lm_hea_.weight"))
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert read(files) not in (before, None)
    monkeypatch.undo()
    monkeypatch.setenv("TIEREWRITE_CACHE", str(cache.parent))
    monkeypatch.setattr(installed, "content_of_transformers", lambda files: "0" * 64)
    assert not resolve(QWEN).remembered


@pytest.mark.parametrize("how", ["auto_map", "leave", "off", "registered config", "registered model", "relative"])
def test_it_is_not_remembered(how: str, cache: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((FIXTURES / QWEN / "naive" / "config.json").read_text())
    options = {}
    if how == "auto_map":
        config["auto_map"] = {"AutoModelForCausalLM": "modeling.Own"}
    elif how == "leave":
        options = {"trust_remote_code": True}
    elif how == "off":
        monkeypatch.setenv("TIEREWRITE_CACHE", "")
    elif how == "relative":
        monkeypatch.setenv("TIEREWRITE_CACHE", "cache")
    elif how == "registered config":
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        monkeypatch.setitem(CONFIG_MAPPING._extra_content, "qwen3", CONFIG_MAPPING["qwen3"])
    else:
        from transformers.models.auto.modeling_auto import MODEL_MAPPING

        monkeypatch.setitem(MODEL_MAPPING._extra_content, dict, dict)
    for _ in range(2):
        assert not resolve(QWEN, config, **options).remembered
    assert len(asked) == 2
    assert not cache.exists()


@pytest.mark.parametrize("package", ["transformers", "torch", "a file"])
def test_nothing_is_remembered_if_packages_changed_while_the_process_runs(
    package: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(QWEN)
    only_file(cache).unlink()
    if package == "a file":
        monkeypatch.setattr(installed, "_IMPORTED_NS", 0)
    else:
        monkeypatch.setattr(sys.modules[package], "__version__", "4.99.9")
    resolve(QWEN)
    assert not list(cache.iterdir())


def test_a_class_with_parts_from_other_packages_is_not_remembered(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    from transformers.models.qwen3 import modeling_qwen3

    monkeypatch.setattr(modeling_qwen3.Qwen3MLP, "__module__", "elsewhere.layers")
    resolve(QWEN)
    assert not cache.exists()


# --- what may lie there


def drop_ties(said: dict[str, Any]) -> None:
    del said["ties"]


def tie_companion(said: dict[str, Any]) -> None:
    scale = "model.layers.0.mlp.up_proj.weight_scale"
    said["shapes"] |= {scale: [], scale.replace("0", "1"): []}
    said["ties"].append([scale, scale.replace("0", "1"), "class"])


def tie_unknown(said: dict[str, Any]) -> None:
    said["ties"].append(["a.weight", "b.weight", "class"])


def tie_in_chain(said: dict[str, Any]) -> None:
    said["ties"].append(["model.embed_tokens.weight", "lm_head.weight", "class"])


def tie_twice(said: dict[str, Any]) -> None:
    said["ties"].append(said["ties"][0])


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no ties": drop_ties,
    "a companion": tie_companion,
    "an unknown parameter": tie_unknown,
    "a chain": tie_in_chain,
    "a tie twice": tie_twice,
    "a number for a name": lambda said: said["ties"][0].__setitem__(0, 3),
    "a text for ties": lambda said: said.update(ties="lm_head.weight"),
    "a negative size": lambda said: said["shapes"].update({"lm_head.bias": [-1]}),
    "a fraction for a size": lambda said: said["shapes"].update({"lm_head.bias": [0.5]}),
    "no shapes": lambda said: said.update(shapes={}, ties=[], optional=[], embeddings=None),
    "an unknown member": lambda said: said.update(more=1),
    "another key": lambda said: said.update(key="0" * 64),
    "another schema": lambda said: said.update(schema="tierewrite/class/0"),
    "no files": lambda said: said.update(files=[]),
    "files elsewhere": lambda said: said["files"].append("../../etc/passwd.py"),
    "an absolute file": lambda said: said["files"].append("/etc/passwd"),
    "other content": lambda said: said.update(content="0" * 64),
    "a pattern of nobody": lambda said: said["loaded"].update({"a": ["lm_head.weight", "pattern"]}),
    "a stack of tensors that it has not": lambda said: said["transforms"][0].__setitem__(3, -1),
    "an optional stranger": lambda said: said["optional"].append("stranger"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_cannot_be_true_is_ignored(lie: str, cache: Path, asked: list[str]) -> None:
    first = resolve(QWEN)
    rewritten(only_file(cache), LIES[lie])
    again = resolve(QWEN)
    assert not again.remembered
    assert again == first
    assert resolve(QWEN).remembered
    assert len(asked) == 2


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def nest(path: Path) -> None:
    text = b"[" * 200_000
    path.write_bytes(blake3(text).hexdigest().encode() + b"\n" + text)


def huge(path: Path) -> None:
    os.truncate(path, class_memory._MOST_BYTES + 1)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": cut,
    "empty": lambda path: path.write_bytes(b""),
    "no JSON": lambda path: path.write_bytes(blake3(b"{").hexdigest().encode() + b"\n{"),
    "nested": nest,
    "one byte": lambda path: path.write_bytes(path.read_bytes().replace(b"lm_head", b"lm_hea_", 1)),
    "huge": huge,
    "a symlink": link,
    "a FIFO": pipe,
    "a folder": folder,
    "writable for all": lambda path: path.chmod(0o666),
    "in a folder that is writable for all": lambda path: path.parent.chmod(0o777),
    "in a folder that the group can write to": lambda path: path.parent.chmod(0o770),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_was_not_written_by_us_is_ignored(damage: str, cache: Path, asked: list[str]) -> None:
    first = resolve(QWEN)
    DAMAGE[damage](only_file(cache))
    again = resolve(QWEN)
    assert not again.remembered
    assert again == first
    assert len(asked) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("of", ["file", "folder"])
def test_what_belongs_to_another_user_is_ignored(of: str, cache: Path, asked: list[str]) -> None:
    resolve(QWEN)
    os.chown(only_file(cache) if of == "file" else cache, 65534, 65534)
    assert not resolve(QWEN).remembered


@pytest.mark.parametrize("where", ["file", "below a file"])
def test_a_cache_that_cannot_be_is_no_error(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TIEREWRITE_CACHE", str(tmp_path / "file" if where == "file" else tmp_path / "file" / "below"))
    assert resolve(QWEN) == resolve(QWEN)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root mounts, and only on Linux")
def test_an_answer_on_a_read_only_file_system_is_taken(cache: Path) -> None:
    """A cache that a container is given, say: nothing can be noted there, not even that a file was used."""
    first = resolve(QWEN)
    steps = (["--bind", str(cache), str(cache)], ["-o", "remount,bind,ro", str(cache)])
    if subprocess.run(["mount", *steps[0]], capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        subprocess.run(["mount", *steps[1]], capture_output=True, check=True)
        again = resolve(QWEN)
    finally:
        subprocess.run(["umount", str(cache)], check=True)
    assert again.remembered
    assert again == first


@pytest.mark.parametrize("options", [{}, {"verify": True}, {"in_place": True}])
def test_nothing_is_kept_inside_the_checkpoint(
    options: dict[str, Any], copied: Naive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container may have its home folder there; the checkpoint would change while it is read."""
    folder = copied(QWEN)
    before = sorted(path.name for path in folder.iterdir())
    (tmp_path / "home").symlink_to(folder)
    monkeypatch.delenv("TIEREWRITE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    tierewrite.rewrite(folder, *([] if "in_place" in options else [tmp_path / "out"]), **options)
    list(tierewrite.stream(folder, remember=True))
    left = folder.with_name(f"{folder.name}.bak") if "in_place" in options else folder
    assert sorted(path.name for path in left.iterdir()) == before
    assert not (folder / ".cache").exists()


@pytest.mark.parametrize("case", ["llava_tied_bf16", "mixtral_tied_bf16"])
def test_an_inspection_goes_to_other_processes_whether_or_not_it_was_remembered(case: str) -> None:
    """As all results do: what a pool of processes returns is a pickle."""
    for remembered in (False, True):
        found = tierewrite.inspect(FIXTURES / case / "naive")
        there = pickle.loads(pickle.dumps(found))
        assert there.to_json() == found.to_json()
        assert there.ties.remembered is remembered
        assert there.ties.model is not None
        with pytest.raises(tierewrite.UsageError, match="came from another process"):
            there.ties.model.renames.live()
        copied = deepcopy(found).ties
        assert copied is not None
        assert copied.model is not None
        assert copied.model.renames.live().every


# --- the files


A, B, C, D, E, F = (letter * 64 for letter in "abcdef")
"""Names of kept files, as digests are written."""


def test_kept_files_are_bounded_and_the_one_used_longest_ago_goes_first(tmp_path: Path) -> None:
    kept = KeptFiles(tmp_path / "kept", 3, 200, 1000)
    for number, name in enumerate((A, B, C)):
        kept.keep(name, name[:1].encode())
        os.utime(kept.path(name), ns=(number, number))
    assert kept.read(A) == b"a"
    kept.keep(D, b"d")
    assert [kept.read(name) for name in (A, B, C, D)] == [b"a", b"", b"c", b"d"]
    kept.keep(F, b"." * 200)
    assert kept.read(F) == b""
    few = KeptFiles(tmp_path / "kept", 3, 200, 140)
    few.keep(E, b"e")
    assert [bool(few.read(name)) for name in (A, C, D, E)].count(True) == 2
    assert few.read(E) == b"e"


def test_only_what_is_called_as_ours_is_goes(tmp_path: Path) -> None:
    """A user may name a folder that holds files of theirs, such as one of classes.json."""
    kept = KeptFiles(tmp_path / "kept", 1, 200, 1000)
    kept.make_folder()
    theirs = ["labels.json", "poetry.lock", ".download.part", f"{A[:40]}.json", f"{A}.txt"]
    for name in theirs:
        (kept.folder / name).write_text("theirs")
        os.utime(kept.folder / name, (0, 0))
    (kept.folder / f"{F}.json").mkdir()
    for name in (A, B):
        kept.keep(name, b"ours")
        os.utime(kept.path(name), (1, 1))
    kept.keep(C, b"ours")
    assert {path.name for path in kept.folder.iterdir()} == {*theirs, f"{F}.json", f"{C}.json"}


def test_files_of_a_time_when_the_clock_was_wrong_go_first(tmp_path: Path) -> None:
    kept = KeptFiles(tmp_path / "kept", 3, 200, 1000)
    for name in (A, B, C):
        kept.keep(name, b"old")
        os.utime(kept.path(name), ns=(2**62, 2**62))
    part = kept.folder / f".{A}.killed.part"
    part.touch()
    os.utime(part, ns=(2**62, 2**62))
    kept.keep(D, b"d")
    kept.keep(E, b"e")
    assert (kept.read(D), kept.read(E)) == (b"d", b"e")
    assert not part.exists()


def test_the_unfinished_file_of_a_writer_that_was_killed_goes(tmp_path: Path) -> None:
    kept = KeptFiles(tmp_path / "kept", 3, 200, 1000)
    kept.keep(A, b"a")
    old, new = kept.folder / f".{A}.old.part", kept.folder / f".{A}.new.part"
    for path in (old, new):
        path.write_bytes(b"")
    os.utime(old, (0, 0))
    kept.keep(B, b"b")
    assert (old.exists(), new.exists()) == (False, True)


def test_the_lock_of_what_was_not_kept_in_the_end_goes(tmp_path: Path) -> None:
    """Digests of files that were written a moment ago are not kept, and each such load leaves a lock."""
    kept = KeptFiles(tmp_path / "kept", 3, 200, 1000)
    kept.keep(A, b"a")
    for name in (f"{A}.lock", f"{E}.lock", "somebody's"):
        (kept.folder / name).touch()
        os.utime(kept.folder / name, (0, 0))
    (kept.folder / f"{F}.lock").touch()
    kept.keep(B, b"b")
    there = sorted(path.name for path in kept.folder.iterdir())
    assert there == [f"{A}.json", f"{A}.lock", f"{B}.json", f"{F}.lock", "somebody's"]


def test_several_writers_leave_one_whole_file(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tierewrite.kept_files import KeptFiles\n"
        "kept = KeptFiles(Path(sys.argv[1]), 3, 1 << 20, 1 << 21)\n"
        "for _ in range(50):\n"
        "    kept.keep('a', sys.argv[2].encode() * 60000)\n"
        "    assert len(set(kept.read('a'))) == 1 and len(kept.read('a')) == 60000"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "kept"), letter]) for letter in "xyz"]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["a.json"]


def test_what_another_process_learned_is_kept_too(cache: Path) -> None:
    resolve("mixtral_tied_bf16")
    name = "model.layers.77.block_sparse_moe.experts.0.w1.weight"
    rewritten(only_file(cache), lambda said: said["loaded"].update({name: ["elsewhere", None]}))
    with class_memory.not_believed():
        resolve("mixtral_tied_bf16")
    said = msgspec.json.decode(only_file(cache).read_bytes().partition(b"\n")[2])
    assert said["loaded"][name] == ["elsewhere", None]
