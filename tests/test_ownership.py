"""Nothing that is not ours is touched: folders of our names, devices, places that meet, permissions."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tierewrite
from tests.checkpoints import write_shard
from tierewrite import pages
from tierewrite.stores.places import chain, located
from tierewrite.stores.remote import RemotePath

TENSOR = ("F32", [2], b"12345678")


def checkpoint(folder: Path) -> Path:
    """Two equal tensors, whose tie is in ties.json beside the folder; and a side file."""
    folder.mkdir(parents=True)
    write_shard(folder / "model.safetensors", {"a.weight": TENSOR, "b.weight": TENSOR})
    (folder / "config.json").write_text('{"model_type": "x"}')
    (folder.parent / "ties.json").write_text('{"a.weight": "b.weight"}')
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {os.fspath(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rewrite(src: Path, dst: Path | None, **options: Any) -> tierewrite.Report:
    return tierewrite.rewrite(src, dst, ties=src.parent / "ties.json", device="cpu", **options)


@pytest.mark.parametrize("name", [".out.tierewrite", ".out.tierewrite-old"])
@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}], ids=["plain", "resume", "overwrite"])
def test_a_users_folder_of_a_name_of_ours_is_refused_by_name_and_stays(
    tmp_path: Path, name: str, options: dict[str, bool]
) -> None:
    src, theirs = checkpoint(tmp_path / "src"), checkpoint(tmp_path / name)
    if "overwrite" in options:
        checkpoint(tmp_path / "out")
    before = files(tmp_path)
    with pytest.raises(tierewrite.UsageError, match="bears no mark") as raised:
        rewrite(src, tmp_path / "out", **options)
    assert str(theirs) in str(raised.value)
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", [".out.tierewrite", ".out.tierewrite-mark"])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_users_file_or_link_of_a_name_of_ours_is_refused_by_name_and_stays(
    tmp_path: Path, name: str, kind: str
) -> None:
    src = checkpoint(tmp_path / "src")
    if kind == "file":
        (tmp_path / name).write_text("mine")
    else:
        (tmp_path / name).symlink_to(checkpoint(tmp_path / "elsewhere"))
    before = files(tmp_path)
    with pytest.raises(tierewrite.UsageError, match="bears no mark"):
        rewrite(src, tmp_path / "out")
    assert files(tmp_path) == before
    assert (tmp_path / name).is_symlink() == (kind == "link")


@pytest.mark.parametrize("name", [".out.tierewrite", ".out.tierewrite-old", ".out.tierewrite/deeper"])
@pytest.mark.parametrize("there", [False, True], ids=["absent", "empty"])
def test_a_source_where_dst_would_be_staged_is_an_overlap(tmp_path: Path, name: str, there: bool) -> None:
    src = checkpoint(tmp_path / name)
    if there:
        (tmp_path / "out").mkdir()
    before = files(tmp_path)
    with pytest.raises(tierewrite.UsageError, match="staged"):
        rewrite(src, tmp_path / "out")
    assert files(tmp_path) == before


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("other", [".q.tierewrite", ".q.tierewrite-old", ".q.tierewrite/r"])
def test_an_item_of_a_batch_may_not_be_where_another_is_staged(tmp_path: Path, other: str, order: int) -> None:
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    items = [{"src": one, "dst": tmp_path / "out" / other}, {"src": two, "dst": tmp_path / "out/q"}][::order]
    with pytest.raises(tierewrite.UsageError, match="staged"):
        tierewrite.batch(items, ties=tmp_path / "ties.json")
    assert not (tmp_path / "out").exists()
    hidden = checkpoint(tmp_path / ".p.tierewrite")
    items = [{"src": hidden, "dst": tmp_path / "out/p"}, {"src": two, "dst": tmp_path / "p"}][::order]
    with pytest.raises(tierewrite.UsageError, match="staged"):
        tierewrite.batch(items, ties=tmp_path / "ties.json")


class At(tierewrite.Progress):
    """Acts once, when the last phase that writes begins."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def start(self, phase: str, total: int) -> None:
        if phase == "copying other files":
            self.act()


def _removed(staging: Path) -> None:
    shutil.rmtree(staging)
    staging.mkdir()


def _exchanged(staging: Path) -> None:
    staging.rename(staging.with_name("moved"))
    shutil.copytree(staging.with_name("moved"), staging)


@pytest.mark.parametrize(
    "act",
    [
        _removed,
        _exchanged,
        lambda staging: (staging / "model.safetensors").unlink(),
        lambda staging: os.truncate(staging / "model.safetensors", 20),
        lambda staging: (staging / "planted.safetensors").write_bytes(b"x"),
    ],
    ids=["removed", "exchanged", "shard-removed", "shard-cut", "file-added"],
)
@pytest.mark.parametrize("options", [{}, {"overwrite": True}], ids=["new", "overwrite"])
def test_what_happens_to_the_staging_folder_while_a_run_works_is_an_error_and_dst_stays(
    tmp_path: Path, act: Callable[[Path], object], options: dict[str, bool]
) -> None:
    src = checkpoint(tmp_path / "src")
    dst = tmp_path / "out"
    if options:
        checkpoint(dst)
    before = files(dst)
    with pytest.raises(tierewrite.SystemFailure, match="nothing else may write there"):
        rewrite(src, dst, progress=At(lambda: act(tmp_path / ".out.tierewrite")), **options)
    assert files(dst) == before
    assert dst.exists() == bool(options)


def test_the_mark_is_there_while_a_run_works_and_in_no_output(tmp_path: Path) -> None:
    src, seen = checkpoint(tmp_path / "src"), []
    mark = tmp_path / ".out.tierewrite/.tierewrite-staging.json"
    rewrite(src, tmp_path / "out", progress=At(lambda: seen.append(json.loads(mark.read_bytes()))))
    assert [(one["schema"], one["source"]) for one in seen] == [("tierewrite/staging/1", str(src))]
    assert sorted(files(tmp_path / "out")) == [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tierewrite.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "src", "ties.json"]


def test_what_cannot_be_cleared_after_the_swap_is_said_and_the_next_run_clears_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tierewrite.output import staging_mark

    src, dst = checkpoint(tmp_path / "src"), checkpoint(tmp_path / "out")
    old = files(dst)

    def failing(path: object, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(staging_mark.shutil, "rmtree", failing)
        with pytest.raises(tierewrite.SystemFailure, match="DST is complete, and what it held before") as raised:
            rewrite(src, dst, overwrite=True)
    assert ".out.tierewrite" in str(raised.value)
    assert files(tmp_path / ".out.tierewrite") == old
    assert "tierewrite.json" in files(dst)
    rewrite(src, dst, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "src", "ties.json"]


@pytest.mark.parametrize("backup", [True, False])
def test_modes_and_owners_are_kept_in_place(tmp_path: Path, backup: bool) -> None:
    src = checkpoint(tmp_path / "src")
    (src / "sub").mkdir()
    (src / "sub/notes").write_text("x")
    modes = {"model.safetensors": 0o640, "config.json": 0o604, "sub/notes": 0o600, "sub": 0o711, ".": 0o751}
    owner = (4242, 4343) if os.geteuid() == 0 else (os.getuid(), os.getgid())
    for name, mode in modes.items():
        os.chown(src / name, *owner)
        (src / name).chmod(mode)
    rewrite(src, None, in_place=True, backup=backup)
    modes.update(dict.fromkeys(("tierewrite.json", "model.safetensors.index.json"), 0o640))
    found = {name: (src / name).stat() for name in modes}
    assert {name: stat.S_IMODE(status.st_mode) for name, status in found.items()} == modes
    assert {(status.st_uid, status.st_gid) for status in found.values()} == {owner}
    assert (src.with_name("src.bak")).exists() == backup


def test_read_only_folders_inside_what_is_swapped_out_are_cleared(tmp_path: Path) -> None:
    src, dst = checkpoint(tmp_path / "src"), checkpoint(tmp_path / "out")
    (dst / "sub/deeper").mkdir(parents=True)
    (dst / "sub/deeper/file").write_text("x")
    for folder in (dst / "sub/deeper", dst / "sub", dst):
        folder.chmod(0o555)
    rewrite(src, dst, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "src", "ties.json"]


def test_a_link_to_src_and_a_folder_in_it_are_overlaps(tmp_path: Path) -> None:
    src = checkpoint(tmp_path / "src")
    (tmp_path / "link").symlink_to(src)
    before = files(src)
    for dst in (tmp_path / "link", tmp_path / "link/inside", tmp_path / "link/a/b"):
        with pytest.raises(tierewrite.UsageError, match="SRC"):
            rewrite(src, dst, overwrite=True)
    assert files(src) == before


def test_places_are_the_same_whatever_their_text(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert chain(tmp_path / "link/x/y") == chain(tmp_path / "real/x/y")
    assert chain(tmp_path / "real")[0] in chain(tmp_path / "link/x/y")
    assert chain(tmp_path / "real/x")[0] not in chain(tmp_path / "real/xy")
    pytest.importorskip("fsspec")
    for text in ("memory://a/b", "MEMORY://a/b", "memory:///a/b", "memory://a/b//"):
        assert chain(located(text)) == chain(RemotePath("memory://a/b")), text
    assert chain(located("memory://a"))[0] in chain(located("memory://a/b"))


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket//x",
        "s3://bucket/a//x",
        "s3:///x",
        "s3://bucket/../x",
        "s3://bucket/./x",
        "memory://a//b",
        "simplecache::s3://bucket//x",
        "file://folder/x",
        "file://host/x",
        "file:///tmp/a%20b",
    ],
)
def test_urls_that_could_mean_several_places_are_refused(url: str) -> None:
    with pytest.raises(tierewrite.UsageError) as raised:
        located(url)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("prefix", ["file://", "FILE://", "file://localhost", "local://"])
def test_a_url_of_this_machine_is_its_path_in_lists_and_options(tmp_path: Path, prefix: str) -> None:
    src = checkpoint(tmp_path / "src")
    assert located(f"{prefix}{src}/") == src
    listed = tmp_path / "list.txt"
    listed.write_text(json.dumps({"src": "src", "dst": f"{prefix}{tmp_path}/one"}) + f"\n{prefix}{src}\n")
    ties = f"{prefix}{tmp_path}/ties.json"
    report = tierewrite.batch(f"{prefix}{listed}", into=f"{prefix}{tmp_path}/two", ties=ties)
    assert [result.status for result in report.results] == ["rewritten"] * 2
    assert files(tmp_path / "one") == files(tmp_path / "two/src")
    both = [{"src": src, "dst": f"{prefix}{tmp_path}/out"}, {"src": src, "dst": tmp_path / "out"}]
    with pytest.raises(tierewrite.UsageError, match="the same DST"):
        tierewrite.batch(both, ties=ties)


@pytest.mark.parametrize("linked", [False, True], ids=["itself", "a-link-to-it"])
@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "nothing"])
def test_a_page_is_never_written_over_what_is_no_regular_file(tmp_path: Path, kind: str, linked: bool) -> None:
    thing = tmp_path / "thing"
    if kind == "fifo":
        os.mkfifo(thing)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(os.fspath(thing))
    elif kind == "device":
        thing = Path(os.devnull)
    elif not linked:
        pytest.skip("nothing is there: a page may be made")
    name = thing
    if linked or kind == "device":  # never the machine's own device, should this fail
        name = tmp_path / "link"
        name.symlink_to(thing)
    before = None if kind == "nothing" else stat.S_IFMT(thing.stat().st_mode)
    with pytest.raises(tierewrite.UsageError, match=r"is a(?! folder)|link"):
        pages._write(name, b"<html>")
    assert before == (None if kind == "nothing" else stat.S_IFMT(thing.stat().st_mode))
    assert name.is_symlink() == (name != thing)


def test_a_page_replaces_the_file_that_a_link_leads_to_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("old")
    (tmp_path / "link").symlink_to("page.html")
    pages._write(tmp_path / "link", b"new")
    assert (tmp_path / "page.html").read_bytes() == b"new"
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "page.html"]


# --- bind mounts: one folder at two places ---------------------------------------------------------------------


@pytest.fixture
def bound() -> Iterator[Callable[[Path, Path], Path]]:
    """Makes a folder appear at a second place; skips where the system does not let us."""
    mounted: list[Path] = []

    def bind(folder: Path, place: Path) -> Path:
        place.mkdir()
        done = subprocess.run(["mount", "--bind", folder, place], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no bind mount can be made here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    if shutil.which("mount") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("a bind mount needs root")
    yield bind
    for place in reversed(mounted):
        subprocess.run(["umount", place], check=True)


def test_src_at_a_second_place_is_src(tmp_path: Path, bound: Callable[[Path, Path], Path]) -> None:
    src = checkpoint(tmp_path / "work" / "src")
    view = bound(src, tmp_path / "view")
    before = files(src)
    for dst in (view, view / "out"):
        with pytest.raises(tierewrite.UsageError):
            rewrite(src, dst, overwrite=True)
    with pytest.raises(tierewrite.UsageError):
        tierewrite.rewrite(view, src, ties=src.parent / "ties.json", overwrite=True)
    assert files(src) == before


def test_a_dst_in_another_view_of_the_folder_that_holds_src_is_beside_it(
    tmp_path: Path, bound: Callable[[Path, Path], Path]
) -> None:
    src = checkpoint(tmp_path / "work" / "src")
    view = bound(src.parent, tmp_path / "view")
    with pytest.raises(tierewrite.UsageError):
        rewrite(src, view / "src", overwrite=True)
    with pytest.raises(tierewrite.UsageError):
        rewrite(src, view / "src" / "out")
    rewrite(src, view / "out")
    assert sorted(path.name for path in src.parent.iterdir()) == ["out", "src", "ties.json"]


def test_a_mount_is_neither_swapped_nor_replaced(tmp_path: Path, bound: Callable[[Path, Path], Path]) -> None:
    """Said before any work: after it the rename would fail."""
    src = checkpoint(tmp_path / "work" / "src")
    (tmp_path / "volume").mkdir()
    place = bound(tmp_path / "volume", tmp_path / "a place\\ ö")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(tierewrite.UsageError, match="mounted at DST"):
            rewrite(src, place, **options)
    rewrite(src, place / "out")
    view = bound(src, tmp_path / "view")
    with pytest.raises(tierewrite.UsageError, match="mounted at SRC"):
        tierewrite.rewrite(view, in_place=True, ties=src.parent / "ties.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [place.name, "view", "volume", "work"]


def test_a_folder_of_an_images_layer_stays_as_it_is_and_the_error_says_why(tmp_path: Path) -> None:
    """An overlay does not move folders of its lower layers; what is written beside them appears."""
    src = checkpoint(tmp_path / "lower" / "src")
    for name in ("upper", "work", "merged"):
        (tmp_path / name).mkdir()
    layers = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    mount = ["mount", "-t", "overlay", "overlay", "-o", layers, str(tmp_path / "merged")]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no overlay can be mounted here")
    try:
        merged = tmp_path / "merged" / "src"
        out = merged.with_name("out")
        rewrite(merged, out)
        begun: list[str] = []

        class Phases(tierewrite.Progress):
            def start(self, phase: str, total: int) -> None:
                begun.append(phase)

        immovable = "moving it out of its place failed: .*image"
        with pytest.raises(tierewrite.SystemFailure, match=immovable):
            rewrite(merged, None, in_place=True, progress=Phases())
        with pytest.raises(tierewrite.SystemFailure, match=immovable):
            rewrite(out, merged, overwrite=True, progress=Phases())
        assert begun == []  # found before the work
        rewrite(merged, out, overwrite=True)  # what the upper layer holds is moved
        assert sorted(path.name for path in merged.parent.iterdir()) == ["out", "src", "ties.json"]
        assert files(merged) == files(src)
    finally:
        subprocess.run(["umount", tmp_path / "merged"], check=True)


def test_what_is_asked_whether_it_can_be_moved_stays_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question is a rename onto a folder that is not empty. Even where somebody empties it, nothing is lost."""
    src = checkpoint(tmp_path / "src")
    rewrite(src, tmp_path / "out")
    before = files(tmp_path / "out")
    emptied: list[str] = []

    def emptying(folder: Path) -> bool:
        for path in folder.parent.glob(".*/*"):
            emptied.append(path.name)
            path.unlink()
        return True

    monkeypatch.setattr("tierewrite.output.staging.is_on_overlay", emptying)
    with pytest.raises(tierewrite.SystemFailure, match="it was removed while the run was using it"):
        rewrite(src, tmp_path / "out", overwrite=True)
    assert emptied
    assert files(tmp_path / "out") == before


def test_an_object_that_is_gone_in_mid_run_is_an_error_and_nothing_stays(tmp_path: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    src = checkpoint(tmp_path / "src")
    for path in src.iterdir():
        store.pipe(f"/vanishes/{path.name}", path.read_bytes())

    class Removing(tierewrite.Progress):
        def start(self, phase: str, total: int) -> None:
            store.rm("/vanishes/model.safetensors")

    try:
        with pytest.raises(tierewrite.TierewriteError) as raised:
            tierewrite.rewrite("memory://vanishes", tmp_path / "out", ties=tmp_path / "ties.json", progress=Removing())
        assert raised.value.exit_code in (4, 5)
        assert "vanishes/model.safetensors" in str(raised.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["src", "ties.json"]
    finally:
        store.rm("/vanishes", recursive=True)


@contextlib.contextmanager
def flagged(path: Path, flag: str) -> Iterator[None]:
    """`path` with a flag of chattr(1)."""
    if shutil.which("chattr") is None or subprocess.run(["chattr", f"+{flag}", path], capture_output=True).returncode:
        pytest.skip("needs root and a file system with such flags")
    try:
        yield
    finally:
        subprocess.run(["chattr", f"-{flag}", path], check=True)


@pytest.mark.parametrize("flag", ["i", "a"])
@pytest.mark.parametrize("which", ["a/src", "a", "a/src/config.json", "a/src/sub"])
@pytest.mark.parametrize("how", ["in place", "without backup", "overwrite"])
def test_what_cannot_be_swapped_out_is_found_before_the_work(
    how: str, which: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was found at the swap, after everything was written; or DST was complete and the old one stayed beside it."""
    src = checkpoint(tmp_path / "a" / "src")
    (src / "sub").mkdir()
    (src / "sub" / "file").touch()
    other = checkpoint(tmp_path / "other" / "src")
    before = files(tmp_path)

    def call() -> tierewrite.Report:
        if how == "overwrite":
            return rewrite(other, src, overwrite=True)
        return rewrite(src, None, in_place=True, backup=how == "in place")

    with flagged(tmp_path / which, flag):
        if how == "in place" and which.startswith("a/src/"):  # kept, not removed
            call()
            shutil.rmtree(src)
            (src.parent / "src.bak").rename(src)
        else:
            with monkeypatch.context() as patched:
                patched.setattr("tierewrite.rewriting.run.Opened.open", lambda *_, **__: pytest.fail("work was begun"))
                with pytest.raises(tierewrite.SystemFailure, match=f"{which}: is immutable or append-only.*chattr"):
                    call()
    assert files(tmp_path) == before


@pytest.mark.parametrize(("mode", "backup"), [(0o1777, True), (0o755, False)])
def test_another_users_folder_is_found_before_the_work(
    mode: int, backup: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = checkpoint(tmp_path / "a" / "src")
    src.parent.chmod(mode)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 4321)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(tierewrite.SystemFailure, match=r"belongs to another user.*run as its owner"):
        rewrite(src, None, in_place=True, backup=backup)
    assert sorted(path.name for path in src.parent.iterdir()) == ["src", "ties.json"]


@pytest.mark.parametrize("name", [".", "link"])
@pytest.mark.parametrize("how", ["in place", "in place, no backup", "overwrite", "empty"])
def test_whoever_stands_in_what_is_replaced_is_told_and_gets_the_same(
    how: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`cd SRC; rewrite . --in-place` leaves the shell in SRC.bak, where `.` is the old one; `rewrite SRC .` in none."""
    src, out = checkpoint(tmp_path / "src"), tmp_path / "out"
    rewrite(src, tmp_path / "expected")
    before = files(src)
    if how == "overwrite":
        shutil.copytree(src, out)
    in_place = how.startswith("in place")
    here = src if in_place else out
    here.mkdir(exist_ok=True)
    (tmp_path / "link").symlink_to(here)
    monkeypatch.chdir(here)
    place = Path(name) if name == "." else tmp_path / name
    options: dict[str, Any] = {"ties": tmp_path / "ties.json", "device": "cpu", "verify": True}
    if in_place:
        tierewrite.rewrite(place, None, in_place=True, backup=how == "in place", **options)
    else:
        tierewrite.rewrite(src, place, overwrite=how == "overwrite", **options)
    assert f"the current folder is '{here}'" in caplog.text
    assert f"(cd '{here}')" in caplog.text
    assert files(here) == files(tmp_path / "expected")
    kept = src if not in_place else tmp_path / "src.bak" if how == "in place" else None
    assert kept is None or files(kept) == before
