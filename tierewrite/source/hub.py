"""Checkpoints on the Hugging Face Hub: `org/name` in the place of a folder.

`fetched` takes a snapshot for a rewrite, `open_checkpoint` reads headers only. Everything goes through huggingface_hub:
its endpoint (HF_ENDPOINT), its cache, its tokens and its offline switch (HF_HUB_OFFLINE) are honoured, and it is
imported only when a hub id is given. Offline, what the cache holds completely serves.

A text is a hub id only if it has the form `org/name` and nothing of that path is on disk; `./org/name` never is one.

Of a header on the hub, the gate for files checks what huggingface_hub's parser passes on: names, dtypes, shapes,
offsets without holes or overlaps, and that the file is long enough for the shortest such header. What it does not pass
on (keys that come twice, the exact end of the file) is checked when the snapshot is read.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tierewrite.errors import (
    HeaderError,
    ShardIndexError,
    SourceError,
    SystemFailure,
    TierewriteError,
    UsageError,
    first_line,
    shown,
)
from tierewrite.source.folder import assembled, open_folder, safetensors_among
from tierewrite.source.header import MAX_HEADER_BYTES, parse_header
from tierewrite.source.suggestion import did_you_mean
from tierewrite.source.table import CONFIG_NAMES, INDEX_NAME, Checkpoint, Header, Shard, SideFile
from tierewrite.stores.base import PathLike

if TYPE_CHECKING:
    from huggingface_hub import HfApi


_PARALLEL = 8

# The rules of huggingface_hub.utils.validate_repo_id, with the namespace that it lets out: a single word is a folder.
_WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"{_WORD}/{_WORD}")


def repo_id(src: PathLike) -> str | None:
    """`src` as a hub id, if it looks like one and nothing on disk has that path; else None."""
    text = os.fspath(src)
    return text if is_repo_id(text) and not os.path.lexists(text) else None


def is_repo_id(text: str) -> bool:
    """Whether `text` has the form of a hub id, `org/name`."""
    if len(text) > 96 or "--" in text or ".." in text or text.endswith(".git"):
        return False
    return _REPO_ID.fullmatch(text) is not None


class HubCommit(NamedTuple):
    """One commit of a repository: its id (`org/name`) and the commit's hash."""

    repo: str
    commit: str


_SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{40})\Z")


def commit_of(folder: Path) -> HubCommit | None:
    """Which commit a folder is the snapshot of, as huggingface_hub's cache names it; None for any other folder."""
    found = _SNAPSHOT.search(folder.as_posix())
    return HubCommit(found[1].replace("--", "/"), found[2]) if found else None


def fetched(src: PathLike, *, revision: str | None = None, bars: bool = False) -> Path:
    """The folder that `src` stands for: itself, or the snapshot of a hub id in huggingface_hub's cache.

    Args:
        src: folder or hub id.
        revision: branch, tag or commit of a hub id; None: its main branch.
        bars: let huggingface_hub show its progress.

    Raises:
        UsageError: a revision of something that is no hub id.
        SourceError: no such repository, revision or file.
        SystemFailure: no network, no access, a disk that is full.
    """
    repo = repo_id(src)
    if repo is None:
        _no_revision(src, revision)
        return Path(src)
    with _hub(repo, revision, bars):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repo, revision=revision, **_library()))


def open_checkpoint(
    src: PathLike,
    *,
    revision: str | None = None,
    ignore_unindexed: bool = False,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """The headers of the folder or hub id `src`. Of a hub id only headers, index and configurations are fetched.

    Each header costs one request of huggingface_hub's for the first 100,000 bytes of the file, and another one for a
    header that is longer.

    Args:
        src: folder or hub id.
        revision: branch, tag or commit of a hub id; None: its main branch.
        ignore_unindexed: as in `folder.open_folder`.
        trust_remote_code: fetch the repository's Python files too, for the model class to be asked.

    Raises:
        As `folder.open_folder` and `fetched`.
    """
    repo = repo_id(src)
    if repo is None:
        _no_revision(src, revision)
        return open_folder(Path(src), ignore_unindexed=ignore_unindexed)
    with _hub(repo, revision, bars=False):
        from huggingface_hub import constants, snapshot_download

        if constants.HF_HUB_OFFLINE:
            folder = snapshot_download(repo, revision=revision, **_library())
            return open_folder(Path(folder), ignore_unindexed=ignore_unindexed)
        return _Remote(api(), repo, revision).checkpoint(ignore_unindexed, trust_remote_code)


def local_only(src: PathLike, doing: str) -> None:
    """Raises UsageError if `src` is a hub id; `doing` is what cannot be done with one."""
    repo = repo_id(src)
    if repo is not None:
        raise UsageError(f"'{repo}' is no folder here; {doing} needs one (of a hub id, name a DST to write to)")


def _no_revision(src: PathLike, revision: str | None) -> None:
    if revision is not None:
        raise UsageError(
            f"'{shown(os.fspath(src))}' is a folder or no hub id (org/name); a revision belongs to a hub id. Leave out "
            "--revision, or check the id"
        )


def api() -> HfApi:
    """huggingface_hub's client, under our name."""
    from huggingface_hub import HfApi

    return HfApi(**_library())


def _library() -> dict[str, str]:
    import tierewrite

    return {"library_name": "tierewrite", "library_version": tierewrite.__version__}


class _Remote:
    """One revision of a repository, pinned to its commit by the first request."""

    def __init__(self, api: HfApi, repo: str, revision: str | None) -> None:
        info = api.model_info(repo, revision=revision, files_metadata=True)
        self.api = api
        self.repo = repo
        self.commit = info.sha
        self.sizes: dict[str, int | None] = {
            file.rfilename: file.size for file in sorted(info.siblings or (), key=lambda file: file.rfilename)
        }

    def name(self, file: str) -> str:
        """What messages call a file of the repository."""
        return f"{self.repo}/{file}"

    def checkpoint(self, ignore_unindexed: bool, trust_remote_code: bool) -> Checkpoint:
        """All that `open_folder` would read, and nothing more (Python files if they may be run)."""
        wanted = [name for name in (*CONFIG_NAMES, INDEX_NAME) if name in self.sizes]
        if trust_remote_code:
            wanted += [name for name in self.sizes if name.endswith(".py")]
        root = Path(self.repo)
        for name in wanted:
            path = Path(self.api.hf_hub_download(self.repo, name, revision=self.commit))
            root = path.parents[name.count("/")]
        top = sorted({name.partition("/")[0] for name in self.sizes})
        with prefetched(safetensors_among(top), self.header) as header:
            return assembled(
                root,
                top,
                self._indexed,
                header,
                lambda listed, warnings: self._others(listed),
                ignore_unindexed=ignore_unindexed,
            )

    def _indexed(self, name: str) -> None:
        if name not in self.sizes:
            raise ShardIndexError(f"names '{shown(name)}', which the repository lacks", file=self.name(INDEX_NAME))

    def _others(self, listed: set[str]) -> tuple[tuple[SideFile, ...], tuple[str, ...]]:
        names = [name for name in self.sizes if name not in listed]
        sides = [SideFile(name, Path(self.name(name)), self.sizes[name] or 0, 0) for name in names]
        return tuple(sides), folders_of(self.sizes)

    def header(self, name: str) -> Header:
        """The header of one file, by huggingface_hub's own call, through the gate for headers.

        Raises:
            HeaderError: it is malformed, or the file is too short for it.
        """
        from huggingface_hub import errors

        file = self.name(name)
        with _hub(self.repo, self.commit, bars=False):
            try:
                found = self.api.parse_safetensors_file_metadata(self.repo, name, revision=self.commit)
            except errors.SafetensorsParsingError as error:
                advice = "download the repository to see more"
                raise HeaderError(_shown_line(error), file=file, advice=advice) from error
            except (TypeError, AttributeError, KeyError, ValueError) as error:
                if isinstance(error, errors.HfHubHTTPError):
                    raise
                raise HeaderError(f"huggingface_hub cannot read its header: {_shown_line(error)}", file=file) from error
        text = {"__metadata__": found.metadata} if found.metadata else {}
        text.update(
            (key, {"dtype": info.dtype, "shape": info.shape, "data_offsets": list(info.data_offsets)})
            for key, info in found.tensors.items()
        )
        ends = [info.data_offsets[-1] for info in found.tensors.values() if info.data_offsets]
        data_bytes = max((end for end in ends if isinstance(end, int)), default=0)
        try:
            # as short as it can be written, which bounds the real one's length from below
            header = json.dumps(text, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
        except (TypeError, ValueError) as error:
            raise HeaderError(f"huggingface_hub cannot read its header: {_shown_line(error)}", file=file) from error
        size = self.sizes.get(name)
        base = 8 if size is None else size - data_bytes
        metadata, tensors = parse_header(header, data_bytes, file=file, base=base)
        needed = 8 + len(header) + data_bytes
        if size is not None and not needed <= size <= 8 + MAX_HEADER_BYTES + data_bytes:
            raise HeaderError(f"has {size} bytes; header and tensors take at least {needed}: truncated?", file=file)
        return Shard(name, Path(file), base + data_bytes, 0, 0, base, metadata), tensors


@contextlib.contextmanager
def prefetched(names: Iterable[str], header: Callable[[str], Header]) -> Iterator[Callable[[str, int], Header]]:
    """A function (name, number) that gives a header by `header`; those of `names` are on their way already.

    All of them will be asked for, one after the other; asked together they take one round trip, not one each.
    """
    with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="headers") as pool:
        waiting = {name: pool.submit(header, name) for name in names}

        def numbered(name: str, number: int) -> Header:
            shard, tensors = waiting[name].result() if name in waiting else header(name)
            return shard, tensors.in_shard(number)

        try:
            yield numbered
        finally:
            pool.shutdown(cancel_futures=True)


def folders_of(names: Iterable[str]) -> tuple[str, ...]:
    """The folders that files of these names lie in, sorted."""
    return tuple(sorted({"/".join(parts[:i]) for parts in (n.split("/") for n in names) for i in range(1, len(parts))}))


@contextlib.contextmanager
def _hub(repo: str, revision: str | None, bars: bool) -> Iterator[None]:
    """Inside, what huggingface_hub raises becomes an error of ours that names the id and what to do."""
    with contextlib.nullcontext() if bars else without_bars():
        try:
            yield
        except TierewriteError:
            raise
        except Exception as error:
            ours = _translated(error, repo, revision)
            if ours is None:
                raise
            raise ours from error


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Inside, huggingface_hub shows no bars of its own; afterwards as before."""
    from huggingface_hub import utils

    silenced = not utils.are_progress_bars_disabled()
    if silenced:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if silenced:
            utils.enable_progress_bars()


def _translated(error: Exception, repo: str, revision: str | None) -> TierewriteError | None:
    """Our error for one of huggingface_hub's or of the network's; None for any other.

    The hub answers 401 for a repository that does not exist as for one that is private, so that nobody can find out
    names: that counts as one that does not exist (exit 4), and the message names both.
    """
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        # huggingface_hub says "not in the cache" also where the hub answered with an error: that answer is reported
        answers = [e for e in _chain(error) if isinstance(e, errors.HfHubHTTPError)]
        error = answers[0] if answers else error
    what = f"'{repo}'" if revision is None else f"'{repo}' at revision '{shown(revision)}'"
    meant = did_you_mean(Path(repo)).removeprefix("; ")
    here = f"there is no folder '{repo}' here{f' ({meant})' if meant else ''}, and as a hub id"
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.HFValidationError):
        return SourceError(f"{here} huggingface_hub does not take it: {_shown_line(error)}")
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{repo}"
        return SystemFailure(f"{what} is gated: ask for access on its page ({page}), then {log_in}")
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceError(f"{what}: the repository has no such revision; name one of its branches, tags or commits")
    if isinstance(error, errors.RepositoryNotFoundError):
        return SourceError(
            f"{here} {constants.ENDPOINT} knows none of that name, or it is private. Check the name; for a private one "
            f"{log_in}"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return _of_status(error, what, here, log_in)
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return SourceError(f"{what}: {_shown_line(error)}")
    if constants.HF_HUB_OFFLINE and isinstance(error, (ConnectionError, errors.LocalEntryNotFoundError)):
        return SystemFailure(
            f"{here} {what} is not (completely) in the cache {constants.HF_HUB_CACHE}, while HF_HUB_OFFLINE forbids to "
            f"ask {constants.ENDPOINT}. Unset it, or run `hf download {repo}` where there is a network"
        )
    if isinstance(error, errors.LocalEntryNotFoundError) or is_of_the_network(error):
        return SystemFailure(
            f"{here} {what} cannot be fetched from {constants.ENDPOINT}: {cause(error)}. Check the network and try "
            "again (what has arrived is kept); HF_HUB_OFFLINE=1 takes what is in the cache"
        )
    if isinstance(error, OSError):
        return SystemFailure(f"{what} cannot be fetched: {error.strerror or _shown_line(error)}", file=error.filename)
    return None


def _of_status(error: Any, what: str, here: str, log_in: str) -> TierewriteError:
    from huggingface_hub import constants

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        refused = f"{constants.ENDPOINT} refuses {what} ({status})"
        return SystemFailure(f"{refused}: the token is invalid or lacks rights; {log_in}")
    if status in (404, 410):
        return SourceError(f"{here} {constants.ENDPOINT} does not have {what} ({status}). Check the name")
    return SystemFailure(
        f"{constants.ENDPOINT} answers {status} to a request for {what}; try again later (what has arrived is kept)"
    )


_NETWORK = ("httpx", "httpx2", "httpcore", "httpcore2", "requests")


def is_of_the_network(error: BaseException) -> bool:
    """Whether it, or what it came from, says that a connection failed."""
    failed = isinstance(error, (ConnectionError, TimeoutError))
    return failed or any(type(e).__module__.partition(".")[0] in _NETWORK for e in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def cause(error: BaseException) -> str:
    """The innermost reason that says something."""
    texts = [_shown_line(e) for e in _chain(error)]
    return texts[-1] if texts else _shown_line(error)


def _shown_line(error: BaseException) -> str:
    return shown(first_line(error))
