"""Nothing that is not ours is touched: folders of our names, devices, places that meet, permissions."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

import tierewrite
from tierewrite import pages


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
