"""Where the tensors of the output stand: in which file, in which order, at which offset."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tierewrite.planning.alignment import arranged, has_runs
from tierewrite.planning.plan import OutShard
from tierewrite.source.table import Tensors
from tierewrite.stores.sharing import BLOCK_BYTES


def shards(
    tensors: Tensors,
    rows: np.ndarray,
    names: Sequence[str],
    merged: np.ndarray,
    added: Sequence[tuple[str, int]],
    limit: int | None,
) -> tuple[OutShard, ...]:
    """The output's files.

    Where nothing is renamed or added, and each file of the source that is written at all is written whole, these files
    stay as they are: a canonical checkpoint comes out as it went in. Where large runs are copied unchanged, no file of
    the source is cut if that makes no more files: then fewer runs meet in a file, and each has its small tensors there.

    Args:
        tensors: the source.
        rows: int64, what is written of it, ascending.
        names: their keys in the output.
        merged: bool [tensors of the source], where other bytes are written.
        added: key in the output, and the row whose header it gets, of tensors that the source does not have.
        limit: most tensor bytes in a file; a larger tensor has one for itself. None: the fullest file of the source.
    """
    rows = np.concatenate([rows, np.array([row for _, row in added], np.int64)])
    names = [*names, *(name for name, _ in added)]
    is_added = np.arange(len(rows)) >= len(rows) - len(added)
    copied = ~is_added & ~merged[rows]
    width = element_sizes(tensors, rows)[tensors.kind[rows]]
    sizes = tensors.nbytes[rows]
    most = fullest(tensors) if limit is None else min(limit, int(sizes.sum()))  # a limit may be beyond 64 bits
    files = split(sizes, most) or [np.arange(0)]
    unchanged = not added and all(name == tensors.names[row] for name, row in zip(names, rows.tolist(), strict=True))
    whole = _whole_files(tensors, rows, width) if unchanged else []
    if whole and (limit is None or (len(whole) <= len(files) and all(_fits(sizes[at], most) for at in whole))):
        files, copied = whole, ~is_added  # other bytes stand where theirs stood
    else:
        shard = tensors.shard[rows]
        apart = [np.flatnonzero(shard == number) for number in np.flatnonzero(np.bincount(shard))]
        if any(has_runs(tensors, rows[at], width[at], copied[at]) for at in apart):
            files = _uncut(apart, sizes, most, len(files)) or _cut(sizes, most)
    made = []
    for number, members in enumerate(files):
        within = arranged(tensors, rows[members], width[members], copied[members])
        order = members[within.order]
        made.append(
            OutShard(
                shard_name(number, len(files)),
                tensors,
                list(map(names.__getitem__, order.tolist())),
                rows[order],
                np.cumsum(sizes[order]),
                is_added[order],
                within.data_start,
            )
        )
    return tuple(made)


def shard_name(number: int, count: int) -> str:
    """The file of the shard of this number, from 0 on, of `count`; as transformers and huggingface_hub name them."""
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def fullest(tensors: Tensors) -> int:
    """Bytes of the tensors in the fullest file of the source."""
    return int(np.bincount(tensors.shard, weights=tensors.nbytes).max(initial=0))


def _whole_files(tensors: Tensors, rows: np.ndarray, width: np.ndarray) -> list[np.ndarray]:
    """Positions in `rows` of each file's tensors, if all files are written whole or not at all, else []."""
    shard = tensors.shard[rows]
    written, there = (
        np.bincount(some, minlength=int(tensors.shard.max(initial=0)) + 1) for some in (shard, tensors.shard)
    )
    if (written[written > 0] != there[written > 0]).any():
        return []
    files = [np.flatnonzero(shard == number) for number in np.flatnonzero(written)]
    kept = (
        (np.diff(width[at]) <= 0).all()
        or (np.diff(arranged(tensors, rows[at], width[at], np.ones(len(at), bool)).order) == 1).all()
        for at in files
    )
    return files if all(kept) else []


def _uncut(apart: list[np.ndarray], sizes: np.ndarray, limit: int, count: int) -> list[np.ndarray]:
    """At most `count` files, each with all that is written of one file of the source, or of several; [] if that fails.

    Those that have to share a file are packed largest first, each into the first file that has room for it.
    """
    if not all(_fits(sizes[at], limit) for at in apart):
        return []
    if len(apart) == count:
        return apart
    made: list[list[np.ndarray]] = []
    room: list[int] = []
    for at in sorted(apart, key=lambda at: int(-sizes[at].sum())):
        nbytes = int(sizes[at].sum())
        into = next((number for number, left in enumerate(room) if nbytes <= left), len(made))
        if into == len(made):
            made.append([])
            room.append(limit)
        made[into].append(at)
        room[into] -= nbytes
    if len(made) > count:
        return []
    return sorted((np.sort(np.concatenate(some)) for some in made), key=lambda at: int(at[0]))


def _cut(sizes: np.ndarray, limit: int) -> list[np.ndarray]:
    """As `split`, but small tensors are spread over all files, those of each size alike, to fill gaps there.

    In a file of the source all scales come first: cut there, most files would have none.
    """
    small, large = np.flatnonzero(sizes < BLOCK_BYTES), np.flatnonzero(sizes >= BLOCK_BYTES)
    small = small[np.argsort(sizes[small], kind="stable")]
    _, first, count = np.unique(sizes[small], return_index=True, return_counts=True)
    among_its_size = (np.arange(len(small)) - np.repeat(first, count) + 0.5) / np.repeat(count, count)
    before = np.cumsum(sizes[large])
    place = 2 * np.arange(len(sizes))
    place[small] = 2 * large[np.searchsorted(before, before[-1] * among_its_size)] + 1  # just behind it
    order = np.argsort(place, kind="stable")
    return [np.sort(order[members]) for members in split(sizes[order], limit)]


def _fits(sizes: np.ndarray, limit: int) -> bool:
    return len(sizes) == 1 or int(sizes.sum()) <= limit


def split(sizes: np.ndarray, limit: int) -> list[np.ndarray]:
    """Positions of the tensors of each file, as Hugging Face splits: in their order, each file as full as it may be.

    Source: huggingface_hub.serialization.split_state_dict_into_shards_factory. A tensor above the limit has a file for
    itself, which comes before the one that is being filled at that moment.

    Args:
        sizes: int64 [tensors], bytes.
        limit: most bytes in a file.
    """
    large = np.flatnonzero(sizes > limit)
    closed = [(int(at), np.array([at])) for at in large]  # the tensor at which the file is closed, and its members
    small = np.flatnonzero(sizes <= limit)
    before = np.concatenate([[0], np.cumsum(sizes[small])])
    at = 0
    while at < len(small):
        stop = int(np.searchsorted(before, before[at] + limit, side="right")) - 1
        closed.append((int(small[stop]) if stop < len(small) else len(sizes), small[at:stop]))
        at = stop
    closed.sort(key=lambda file: file[0])
    return [members for _, members in closed]


def element_sizes(tensors: Tensors, rows: np.ndarray) -> np.ndarray:
    """int64 [kinds], bytes an element of each kind of `rows` (0 for less than one): a new dtype needs no table."""
    kinds, where = np.unique(tensors.kind[rows], return_index=True)
    nbytes = tensors.nbytes[rows[where]]
    by_dtype: dict[str, int] = {}
    for kind, size in zip(kinds.tolist(), nbytes.tolist(), strict=True):
        dtype, shape = tensors.kinds[kind]
        if not by_dtype.get(dtype):
            by_dtype[dtype] = size // (math.prod(shape) or 1)
    return np.array([by_dtype.get(dtype, 0) for dtype, _ in tensors.kinds] or [0], np.int64)
