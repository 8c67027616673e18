"""A page about one rewrite, for people: sizes, how much the tied sides' activation scales differed, what was kept.

    page = tierewrite.report_page("DST")           # or the manifest alone
    page.write_html("report.html")                 # one file that needs no network
    page.write_png("report.png")
    page.facts.overall.median, page.facts.worst(5)

Everything shown was recorded by the rewrite or stands in headers; nothing is decided here. Pictures need matplotlib
(the extra `report`); facts and JSON do not. Refused: see `facts`; and to write into the checkpoint itself, whose files
`verify` accounts for.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from tierewrite.errors import SystemFailure, UsageError, advice_of, shown
from tierewrite.pages.facts import WORST_SHOWN, Facts, read_facts
from tierewrite.planning.policy import ConsumerName
from tierewrite.source.regular_files import kind_of_file
from tierewrite.source.table import INDEX_NAME
from tierewrite.stores.base import PathLike
from tierewrite.stores.places import FilePath, chain, is_local, local_file, located
from tierewrite.tables import repr_of

__all__ = ["Facts", "Page", "report_page"]


@dataclass(frozen=True, slots=True, repr=False)
class Page:
    """A page about one rewrite.

    Attributes:
        source: the folder or manifest that it is about.
        facts: what it says, as data.
        worst: how many of the scales that differ most it lists.
    """

    source: FilePath
    facts: Facts
    worst: int = WORST_SHOWN

    def __repr__(self) -> str:
        return repr_of(self, shown(self.source))

    def _repr_html_(self) -> str:
        """For notebooks: the page in a frame of its own, whose styles stay in it."""
        return f'<iframe srcdoc="{escape(self.html())}" style="width: 100%; height: 90vh; border: 0"></iframe>'

    def html(self) -> str:
        """The page as one self-contained HTML document; the same facts make the same text.

        Raises:
            UsageError: matplotlib is not installed.
        """
        from tierewrite.pages.html import page

        return page(self.facts, self.worst)

    def png(self) -> bytes:
        """Its figures and pictures as one PNG.

        Raises:
            UsageError: matplotlib is not installed.
        """
        from tierewrite.pages.charts import png

        return png(self.facts)

    def card(self) -> str:
        """A few lines of Markdown for the checkpoint's model card."""
        from tierewrite.pages.card import card

        return card(self.facts)

    def to_json(self) -> dict[str, Any]:
        """The facts (schema tierewrite/page/1)."""
        return self.facts.to_json(self.worst)

    def write_html(self, path: PathLike) -> None:
        """Writes the page to the file `path`, which appears whole or not at all.

        Raises:
            UsageError: matplotlib is not installed, or `path` lies inside the checkpoint or is a folder.
            SystemFailure: it cannot be written.
        """
        _write(self._checked(path), self.html().encode())

    def write_png(self, path: PathLike) -> None:
        """Writes the picture to the file `path`; otherwise as `write_html`."""
        _write(self._checked(path), self.png())

    def _checked(self, path: PathLike) -> Path:
        target = local_file(path, "a page")
        if target.is_dir():
            raise UsageError("is a folder; expected the name of a file to write", file=target)
        checkpoint = _checkpoint_of(self.source)
        if checkpoint is not None and chain(checkpoint)[0] in chain(target):
            what = f"lies inside of '{shown(checkpoint)}', whose every file counts for verify; write it elsewhere"
            raise UsageError(what, file=target)
        if is_local(self.source) and chain(self.source)[0] == chain(target)[0]:
            raise UsageError("is the manifest that the page is about; write it elsewhere", file=target)
        return target


def report_page(
    path: PathLike,
    consumer: ConsumerName | Sequence[ConsumerName] | None = None,
    *,
    backbone: PathLike | None = None,
    worst: int = WORST_SHOWN,
) -> Page:
    """The page about a rewrite.

    Args:
        path: the folder that it wrote, or its URL; or its manifest alone, for everything but the sizes.
        consumer: one or several, such as "vllm": what `tierewrite.check` finds in the folder is on the page.
        backbone: a JSON file for the check, as for `tierewrite.check`.
        worst: how many of the scales that differ most to list.

    Raises:
        UsageError: nothing there, a folder without a manifest, or a consumer asked for without a folder (exit 2).
        SourceError: a malformed manifest or checkpoint, or a manifest of another checkpoint (exit 4).
        SystemFailure: the system does not let us read it (exit 5).
    """
    return Page(located(path), read_facts(path, consumer, backbone=backbone), worst)


def _checkpoint_of(source: FilePath) -> Path | None:
    """The folder of this machine that a page is about: of a manifest the one that it lies in, if that has an index."""
    if not is_local(source):
        return None
    if source.is_dir():
        return source
    beside = Path(os.path.realpath(source)).parent
    return beside if (beside / INDEX_NAME).exists() else None


def _write(path: Path, data: bytes) -> None:
    """Writes a whole file, or none; a link is followed, and what is no regular file stays what it is."""
    staged: str | None = None
    try:
        path = _regular(path)
        fd, staged = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(fd, "wb") as out:
            out.write(data)
        os.chmod(staged, 0o666 & ~_umask())
        os.replace(staged, path)
        staged = None
    except OSError as e:
        advice = advice_of(e, "name a file in a folder that exists and may be written to")
        raise SystemFailure(f"cannot be written: {e.strerror or e}", file=path, advice=advice) from None
    finally:
        if staged is not None:
            with contextlib.suppress(OSError):
                os.unlink(staged)


def _regular(path: Path) -> Path:
    """Where a file of the name `path` is written: there, or where a link of that name leads to.

    Raises:
        UsageError: a device, a FIFO, a socket, a folder or a link to nothing is there.
        OSError: it cannot be looked at.
    """
    advice = "name a file that may be made or replaced"
    if path.is_symlink() and not path.exists():
        raise UsageError("is a link to nothing", file=path, advice=advice)
    if not path.exists():
        return path
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        what = f"is {kind_of_file(mode)}, or a link to one, and stays that"
        raise UsageError(what, file=path, advice=advice)
    return path.resolve()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
