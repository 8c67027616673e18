"""The manifest names its source and what was written; DST alone is checked against it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

import tierewrite
from tests.checkpoints import FIXTURES, read_tensors
from tierewrite import cli
from tierewrite.errors import UsageError

CASE = "dg_nvfp4_sharded"
SNAPSHOT = f"models--org--some--name/snapshots/{'0a' * 20}"
MANIFEST = "tierewrite.json"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The fixture rewritten without and with the digests of all tensors. Not to be changed."""
    made = {}
    for name, digests in (("plain", False), ("digests", True)):
        made[name] = tmp_path_factory.mktemp("integrity") / name
        tierewrite.rewrite(FIXTURES / CASE / "naive", made[name], digests=digests)
    return made


def manifest_of(dst: Path) -> dict[str, Any]:
    found = json.loads((dst / MANIFEST).read_text())
    assert isinstance(found, dict)
    return found


def header_of(shard: Path) -> str:
    data = shard.read_bytes()
    return blake3(data[: 8 + int.from_bytes(data[:8], "little")]).hexdigest()


def digests_in(dst: Path) -> dict[str, str]:
    return {name: blake3(tensor.data).hexdigest() for name, tensor in read_tensors(dst).items()}


def run(*arguments: object) -> int:
    return cli.run([str(argument) for argument in arguments])


# ---------------------------------------------------------------------------------------------------- the manifest


def test_it_holds_the_digest_of_every_header_and_file(written: dict[str, Path]) -> None:
    src, dst = FIXTURES / CASE / "naive", written["plain"]
    manifest = manifest_of(dst)
    for folder, listed in ((src, manifest["source"]["shards"]), (dst, manifest["output"]["shards"])):
        shards = sorted(folder.glob("*.safetensors"))
        assert listed == [{"name": s.name, "size": s.stat().st_size, "header": header_of(s)} for s in shards]
    others = {
        path.name: path.read_bytes() for path in dst.iterdir() if path.suffix == ".json" and path.name != MANIFEST
    }
    assert manifest["output"]["files"] == {
        name: {"size": len(data), "blake3": blake3(data).hexdigest()} for name, data in others.items()
    }
    assert INDEX in others


def test_digests_of_every_tensor_are_there_on_request_and_nothing_else_changes(written: dict[str, Path]) -> None:
    plain, full = (manifest_of(written[name]) for name in ("plain", "digests"))
    listed = full["output"].pop("tensors")
    assert plain == full
    assert listed == {
        name: blake3(tensor.data).hexdigest() for name, tensor in read_tensors(written["digests"]).items()
    }
    for path in written["plain"].iterdir():
        assert path.name == MANIFEST or path.read_bytes() == (written["digests"] / path.name).read_bytes()


@pytest.mark.parametrize("options", [{"resume": True}, {"threads": 1}, {"on_mismatch": "keep", "kv_scales": "merge"}])
def test_they_are_true_whatever_was_rewritten_and_however(options: dict[str, Any], tmp_path: Path) -> None:
    dst = tmp_path / "out"
    tierewrite.rewrite(FIXTURES / "dg_nvfp4_kvfp8" / "naive", dst, digests=True, verify=True, **options)
    listed = manifest_of(dst)["output"]["tensors"]
    assert listed == digests_in(dst)


def test_digests_without_a_manifest_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="digests stand in the manifest"):
        tierewrite.rewrite(FIXTURES / CASE / "naive", tmp_path / "out", digests=True, manifest=False)
    assert run("rewrite", FIXTURES / CASE / "naive", tmp_path / "out", "--digests", "--no-manifest") == 2


def test_a_snapshot_of_the_hubs_is_named_and_a_copy_of_it_proves_the_rest(tmp_path: Path) -> None:
    src = tmp_path / "hub" / SNAPSHOT
    shutil.copytree(FIXTURES / "qwen3_tied_bf16" / "naive", src)
    tierewrite.rewrite(src, tmp_path / "out", verify=True)
    assert manifest_of(tmp_path / "out")["source"]["hub"] == {"id": "org/some/name", "commit": "0a" * 20}
    assert tierewrite.verify(src, tmp_path / "out").ok
    assert f"Made from `org/some/name` at commit `{'0a' * 20}`." in tierewrite.report_page(tmp_path / "out").card()
    elsewhere = tierewrite.verify(FIXTURES / "qwen3_tied_bf16" / "naive", tmp_path / "out")
    assert elsewhere.ok
    assert any("org/some/name at commit" in note and "not checked" in note for note in elsewhere.notes)
    other = tmp_path / "hub" / SNAPSHOT.replace("0a", "0b")
    shutil.copytree(src, other)
    assert {problem.id for problem in tierewrite.verify(other, tmp_path / "out").problems} == {"manifest"}


def _of(*keys: object) -> Callable[[dict[str, Any]], None]:
    """Changes the text at the end of a path of keys."""

    def change(manifest: dict[str, Any]) -> None:
        at: Any = manifest
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = 7 if isinstance(at[keys[-1]], int) else "0" * 64

    return change


LIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "source header": _of("source", "shards", 0, "header"),
    "output header": _of("output", "shards", 1, "header"),
    "output size": _of("output", "shards", 1, "size"),
    "file": _of("output", "files", "config.json", "blake3"),
    "no file": lambda manifest: manifest["output"]["files"].pop("config.json"),
    "no output": lambda manifest: manifest.pop("output"),
    "tensor": lambda manifest: manifest["output"]["tensors"].update({next(iter(manifest["output"]["tensors"])): "00"}),
    "no tensor": lambda manifest: manifest["output"]["tensors"].popitem(),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_proof_from_src_finds_each_statement_that_is_not_true(
    lie: str, written: dict[str, Path], tmp_path: Path
) -> None:
    dst = shutil.copytree(written["digests"], tmp_path / "dst")
    manifest = manifest_of(dst)
    LIES[lie](manifest)
    (dst / MANIFEST).write_text(json.dumps(manifest))
    found = tierewrite.verify(FIXTURES / CASE / "naive", dst)
    assert {problem.id for problem in found.problems} == {"manifest"}


def test_a_batch_that_wants_digests_does_not_take_an_output_without_them_for_done(tmp_path: Path) -> None:
    item: dict[str, Any] = {"src": FIXTURES / "qwen3_tied_bf16" / "naive", "dst": tmp_path / "out"}
    item["ties"] = {"lm_head.weight": "model.embed_tokens.weight"}
    (first,) = tierewrite.batch([item]).results
    (again,) = tierewrite.batch([item]).results
    (wanted,) = tierewrite.batch([item], digests=True).results
    assert (first.status, again.status, wanted.status) == ("rewritten", "already-done", "failed")
    assert wanted.error is not None
    assert "without a digest of every tensor" in str(wanted.error)
    (made,) = tierewrite.batch([item], digests=True, overwrite=True).results
    (done,) = tierewrite.batch([item], digests=True).results
    assert (made.status, done.status) == ("rewritten", "already-done")


# ------------------------------------------------------------------------------------------------------- DST alone


@pytest.mark.parametrize(("name", "all_of_them"), [("plain", False), ("digests", True)])
def test_what_was_written_is_ok_and_it_is_said_how_much_was_compared(
    name: str, all_of_them: bool, written: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = tierewrite.verify_integrity(written[name])
    assert found.ok
    assert (found.digests == found.tensors) is all_of_them
    assert 0 < found.digests <= found.tensors == len(read_tensors(written[name]))
    assert bool(found.notes) is not all_of_them
    assert run("verify", written[name]) == 0
    out = capsys.readouterr().out
    assert f"{found.digests} of {found.tensors} tensors by digest" in out
    assert "OK: DST is as tierewrite" in out
    assert "`tierewrite verify SRC DST` shows" in out
    assert run("verify", written[name], "--json") == 0
    assert json.loads(capsys.readouterr().out)["counts"]["digests"] == found.digests


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _retyped(dst: Path) -> None:
    shard = dst / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b'"dtype":"U8"', b'"dtype":"I8"', 1))


def _without_index_entry(dst: Path) -> None:
    (dst / INDEX).write_bytes((dst / INDEX).read_bytes().replace(b"{", b"{ ", 1))


DAMAGE: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "last byte of a tensor": (lambda dst: _flip(dst / "model-00002-of-00002.safetensors", -1), {"bytes"}),
    "dtype": (_retyped, {"header"}),
    "index": (_without_index_entry, {"size"}),
    "config": (lambda dst: _flip(dst / "generation_config.json", 3), {"bytes"}),
    "file gone": (lambda dst: (dst / "generation_config.json").unlink(), {"missing"}),
    "file more": (lambda dst: (dst / "modeling.py").write_text("1"), {"unexpected"}),
    "shard gone": (lambda dst: (dst / "model-00002-of-00002.safetensors").unlink(), {"unreadable"}),
    "marker": (lambda dst: (dst / ".tierewrite-staging.json").write_text("{}"), {"unfinished"}),
    "marker of a store": (lambda dst: (dst / "tierewrite.incomplete.json").write_text("{}"), {"unfinished"}),
    "manifest gone": (lambda dst: (dst / MANIFEST).unlink(), {"manifest"}),
    "manifest broken": (lambda dst: (dst / MANIFEST).write_text("{}"), {"manifest"}),
    "other shards": (
        lambda dst: (dst / "model-00001-of-00002.safetensors").write_bytes(
            (dst / "model-00001-of-00002.safetensors").read_bytes()[:-1]
        ),
        {"unreadable"},
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_changed_since_is_found_without_src(damage: str, written: dict[str, Path], tmp_path: Path) -> None:
    dst = shutil.copytree(written["digests"], tmp_path / "dst")
    assert tierewrite.verify_integrity(dst).ok
    change, expected = DAMAGE[damage]
    change(dst)
    found = tierewrite.verify_integrity(dst)
    assert {problem.id for problem in found.problems} == expected
    assert run("verify", dst) == 6


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS takes only names in UTF-8")
def test_names_of_files_may_be_anything(tmp_path: Path) -> None:
    src = shutil.copytree(FIXTURES / "qwen3_tied_bf16" / "naive", tmp_path / "src")
    (src / "inner" / "empty").mkdir(parents=True)
    for name in (b"no \xff utf-8.txt", b"two\nlines.txt", b"inner/\xe2\x98\x83", b"\\udcff.txt"):
        Path(os.fsdecode(os.fsencode(src) + b"/" + name)).write_bytes(name)
    dst = tmp_path / "dst"
    tierewrite.rewrite(src, dst, ties={"lm_head.weight": "model.embed_tokens.weight"}, verify=True)
    assert tierewrite.verify_integrity(dst).ok
    assert "no \\udcff utf-8.txt" in manifest_of(dst)["output"]["files"]
    Path(os.fsdecode(os.fsencode(dst) + b"/no \xff utf-8.txt")).write_bytes(b"no \xfe utf-8.txt")
    assert run("verify", dst) == 6


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS takes only names in UTF-8")
@pytest.mark.parametrize("changed", [b"\xff.txt", b"\\udcff.txt", b"\\x5cudcff.txt", b"\\\xff.txt"])
def test_a_file_whose_name_reads_like_the_escaped_name_of_another_is_a_file_of_its_own(
    changed: bytes, tmp_path: Path
) -> None:
    src = os.fsencode(shutil.copytree(FIXTURES / "qwen3_tied_bf16" / "naive", tmp_path / "src"))
    for name in (b"\xff.txt", b"\\udcff.txt", b"\\x5cudcff.txt", b"\\\xff.txt"):
        Path(os.fsdecode(src + b"/" + name)).write_bytes(b"one")
    dst = tmp_path / "dst"
    tierewrite.rewrite(tmp_path / "src", dst, ties={"lm_head.weight": "model.embed_tokens.weight"})
    assert len(manifest_of(dst)["output"]["files"]) == len(list(dst.iterdir())) - 2  # the shard and the manifest
    assert tierewrite.verify_integrity(dst).ok
    Path(os.fsdecode(os.fsencode(dst) + b"/" + changed)).write_bytes(b"two")
    assert [problem.id for problem in tierewrite.verify_integrity(dst).problems] == ["bytes"]


def test_a_manifest_of_an_earlier_version_cannot_vouch_for_files(written: dict[str, Path], tmp_path: Path) -> None:
    dst = shutil.copytree(written["plain"], tmp_path / "dst")
    manifest = manifest_of(dst)
    del manifest["output"]
    (dst / MANIFEST).write_text(json.dumps(manifest))
    (problem,) = tierewrite.verify_integrity(dst).problems
    assert problem.id == "manifest"
    assert "an earlier version wrote it" in problem.message


def test_what_the_hub_adds_is_a_note(written: dict[str, Path], tmp_path: Path) -> None:
    dst = shutil.copytree(written["digests"], tmp_path / "dst")
    for name in (".gitattributes", "README.md"):
        (dst / name).write_text("written by the hub")
    found = tierewrite.verify_integrity(dst)
    assert found.ok
    assert len(found.notes) == 2


def test_options_of_a_rewrite_need_src(written: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", written["plain"], "--on-mismatch", "keep") == 2
    assert "--on-mismatch needs SRC" in capsys.readouterr().err
    assert run("verify", written["plain"], "--for", "vllm") == 2
    assert "--for needs SRC" in capsys.readouterr().err
    assert run("verify", written["plain"], "--revision", "main") == 2  # no hub id


def test_only_tensors_with_digests_are_read(written: dict[str, Path]) -> None:
    class Bytes(tierewrite.Progress):
        total = 0

        def start(self, phase: str, total: int) -> None:
            if phase == "comparing with the manifest":
                self.total = total

    watched = Bytes()
    tierewrite.verify_integrity(written["plain"], progress=watched)
    tensors = read_tensors(written["plain"])
    listed = {name for group in manifest_of(written["plain"])["groups"] for name in group["tensors"]}
    assert watched.total == sum(len(tensors[name].data) for name in listed) < sum(len(t.data) for t in tensors.values())
