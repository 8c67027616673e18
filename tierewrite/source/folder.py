"""What is on disk: a checkpoint's shards, tensors, index, configurations and side files. Headers only.

This is the one gate for input. A header or an index is validated in full here, before anything is planned, so
that no later room has to ask whether an offset lies inside its file. Nothing is opened for writing, no tensor
data is read, and time and memory are bounded by the size of the headers, whatever they say.

Refused: anything but regular files; headers that safetensors' own reader refuses (length field beyond the
file, over 100 MB, not UTF-8, not JSON, wrong types, negative or huge numbers, overflow, overlaps, holes,
trailing or missing bytes, sizes that disagree with dtype and shape); and, unlike there, duplicate names or
JSON keys anywhere, tensors given as arrays, dtypes given as objects. Accepted, unlike there: dtypes that
nobody here knows, as long as the offsets tile the file.

The format: https://github.com/huggingface/safetensors#format (8 bytes little-endian header length N, N bytes
of JSON, then the data). The rules were compared with `safetensors` 0.8.0 by running it; tests/test_fuzz.py
keeps them equal.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from tierewrite.errors import (
    ConfigError,
    ShardIndexError,
    SourceError,
    shown,
)
from tierewrite.source.header import read_header
from tierewrite.source.index import check_against_index, check_total, read_index
from tierewrite.source.regular_files import kind_of_file, names_in, read_small, resolved_path, stat_of
from tierewrite.source.strict_json import kind_of_json
from tierewrite.source.table import (
    INCOMPLETE_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    Checkpoint,
    Shard,
    SideFile,
    TensorEntry,
    Tensors,
    gc_paused,
)
from tierewrite.stores.remote import FilePath, RemotePath

WANTED = "expected a checkpoint folder holding *.safetensors files"
_MEND_JSON = "correct it, or copy it from the original model"
MAX_CONFIG_BYTES = 64 * 1024**2
MAX_SIDE_ENTRIES = 1_000_000  # files and folders; ends the walk through folders that link to each other


@gc_paused()
def open_folder(path: str | os.PathLike[str], *, ignore_unindexed: bool = False) -> Checkpoint:
    """Read the headers, index and configurations of the checkpoint folder `path`.

    With an index, the index decides which files are shards; without one, every `*.safetensors` of the
    folder is read, as vLLM does. Safetensors files beside an index are side files, unless their keys
    overlap.

    Args:
        path: the folder (a link to one is followed).
        ignore_unindexed: leave out, with a warning, tensors that a shard holds and the index lacks.

    Raises:
        HeaderError, ShardIndexError, ConfigError, SourceError: something is wrong in the folder.
        SystemFailure: the system does not let us read it.
    """
    try:
        root = resolved_path(Path(path))
    except SourceError as e:
        raise SourceError(f"{e.args[0]}; {WANTED}", file=path) from None
    if not root.is_dir():
        raise SourceError(f"not a folder; {WANTED}", file=path)
    return assembled(
        root,
        names_in(root),
        lambda name: _check_shard_link(root, name, root / INDEX_NAME),
        lambda name, number: read_header(root / name, shard=number, name=name),
        lambda listed, warnings: _walk(root, listed, warnings),
        ignore_unindexed=ignore_unindexed,
    )


def assembled(
    root: Path,
    top: list[str],
    indexed: Callable[[str], None],
    header: Callable[[str, int], tuple[Shard, list[TensorEntry]]],
    others: Callable[[set[str], list[str]], tuple[tuple[SideFile, ...], tuple[str, ...]]],
    *,
    ignore_unindexed: bool = False,
    origin: RemotePath | None = None,
    copies: object = None,
) -> Checkpoint:
    """A checkpoint from its parts: the one place where index, headers and configurations are held together.

    Args:
        root: the folder that holds the index and the configurations, if there are any.
        top: sorted names of the files and folders at the checkpoint's top.
        indexed: told each file that the index names, before any header is asked for; raises if it is not there.
        header: gives the header of the file of that name and number, validated.
        others: gives side files and folders; told the names that are none of them, and where to put warnings.
        ignore_unindexed: as in `open_folder`.
        origin, copies: as the attributes.

    Raises:
        As `open_folder`.
    """
    refuse_half_written(top, origin or root)
    warnings: list[str] = []
    config = _read_config(root / "config.json", warnings)
    quant_config = _read_config(root / "hf_quant_config.json", warnings)

    index_path = root / INDEX_NAME
    metadata: dict[str, Any] | None = None
    weight_map: dict[str, str] | None = None
    local = [name for name in top if name.endswith(".safetensors") and not name.startswith(".")]
    if INDEX_NAME in top:
        metadata, weight_map = read_index(index_path)
        listed_files = set(weight_map.values())
        names = sorted(listed_files, key=natural_key)
        for name in names:
            indexed(name)
        strays = [name for name in local if name not in listed_files]
    else:
        names, strays = sorted(local, key=natural_key), []
        if not names:
            raise SourceError(f"no *.safetensors file here; {what_is_here(top)}", file=origin or root)

    shards: list[Shard] = []
    tensors: dict[str, TensorEntry] = {}
    unindexed: list[TensorEntry] = []
    for number, name in enumerate(names):
        shard, entries = header(name, number)
        shards.append(shard)
        held = {entry.name: entry for entry in entries}
        if not tensors.keys().isdisjoint(held):
            key = next(key for key in held if key in tensors)
            raise ShardIndexError(
                f"also stored in {shown(shards[tensors[key].shard].name)}; expected each name in one shard only",
                file=root / name,
                tensor=key,
                advice="remove the copy that is not meant",
            )
        tensors.update(held)
        if weight_map is not None and not held.keys() <= weight_map.keys():
            unindexed.extend(entry for entry in entries if entry.name not in weight_map)
    if weight_map is not None:
        check_against_index(weight_map, tensors, shards, index_path)
        if unindexed:
            listed = ", ".join(f"'{shown(entry.name)}'" for entry in unindexed[:5])
            more = f" and {len(unindexed) - 5} more" if len(unindexed) > 5 else ""
            if not ignore_unindexed:
                raise ShardIndexError(
                    f"holds {len(unindexed)} tensors that {INDEX_NAME} lacks: {listed}{more}. Loaders would not "
                    "read them",
                    file=root / shards[unindexed[0].shard].name,
                    tensor=unindexed[0].name,
                    details={"unindexed": [entry.name for entry in unindexed]},
                    advice="add them to the index, or pass --ignore-unindexed to leave them out",
                )
            for entry in unindexed:
                del tensors[entry.name]
            warnings.append(f"left out {len(unindexed)} tensors that the index lacks: {listed}{more}")
        check_total(metadata or {}, tensors, warnings)
    for name in strays:
        _, entries = header(name, 0)
        twice = [entry.name for entry in entries if entry.name in tensors]
        if twice:
            raise ShardIndexError(
                f"is not in {INDEX_NAME}, yet holds {len(twice)} of its tensors",
                file=root / name,
                tensor=twice[0],
                details={"overlap": twice},
                advice="remove the file, or the index if the file is what counts",
            )
        warnings.append(f"{shown(name)} is not in {INDEX_NAME}: copied as it is, its tensors are not looked at")
    if not tensors:
        raise SourceError("the safetensors files hold no tensors; nothing to rewrite", file=root)
    side_files, directories = others({*names, INDEX_NAME, MANIFEST_NAME, INCOMPLETE_NAME}, warnings)
    return Checkpoint(
        root=root,
        shards=tuple(shards),
        tensors=Tensors.of(tensors.values()),
        index_metadata=metadata,
        side_files=side_files,
        directories=directories,
        config=config,
        quant_config=quant_config,
        warnings=tuple(warnings),
        origin=origin,
        copies=copies,
    )


def is_half_written(top: Collection[str]) -> bool:
    """Whether the names at a checkpoint's top are those of a rewrite that did not come to its end."""
    return INCOMPLETE_NAME in top and INDEX_NAME not in top


def refuse_half_written(top: Collection[str], where: FilePath) -> None:
    """Raises SourceError if the names at a checkpoint's top are such."""
    if is_half_written(top):
        raise SourceError(
            f"holds {INCOMPLETE_NAME} and no index: a rewrite to this place was killed, or is still going; finish it "
            "with --resume",
            file=where,
        )


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts `model-2` before `model-10`; names that only differ in leading zeros stay apart."""
    parts: list[tuple[int, int, str]] = []
    for part in re.split("([0-9]+)", name):
        # int() of thousands of digits is slow and refused by Python: such a part is compared as text
        parts.append(
            (0, int(part), part) if part[:1].isdecimal() and part.isascii() and len(part) < 20 else (1, 0, part)
        )
    return parts


def _check_shard_link(root: Path, name: str, index_path: Path) -> None:
    """An indexed file may be a link, but only to a file of this folder or of the hub cache that the folder is
    in.
    """
    path = root / name
    try:
        resolved = resolved_path(path)
    except SourceError as e:
        raise ShardIndexError(f"names '{shown(name)}', which cannot be found: {e}", file=index_path) from None
    if not _belongs(root, resolved):
        raise ShardIndexError(
            f"names '{shown(name)}', a link that leaves the folder to {shown(resolved)}",
            file=index_path,
            advice="put the file itself there",
        )


def _belongs(root: Path, resolved: Path) -> bool:
    """Whether a link's end is the folder's own: below it, or a blob of the hub cache whose snapshot the
    folder is.

    The cache keeps `models--<org>--<name>/snapshots/<revision>/<file>` as links to `blobs/<hash>` beside `snapshots`
    (https://huggingface.co/docs/huggingface_hub/guides/manage-cache). Since huggingface_hub 2 those may be links
    themselves, to `blobs/<2 digits>/<hash>` beside all `models--*` (its `utils/_shared_blobs.py`).
    """
    if resolved.is_relative_to(root):
        return True
    for folder in root.parents:
        if folder.name == "snapshots":
            if resolved.is_relative_to(folder.parent / "blobs"):
                return True
            shared = folder.parent.parent / "blobs"
            if folder.parent.name.startswith("models--") and resolved.is_relative_to(shared):
                return True
    return False


# --------------------------------------------------------------------------------- configurations, side files


def _read_config(path: Path, warnings: list[str]) -> dict[str, Any]:
    """A JSON object from a configuration file, as `json.load` sees it (NaN and Infinity included); {} if
    absent.
    """
    if not os.path.lexists(path):
        return {}
    raw = read_small(path, MAX_CONFIG_BYTES, ConfigError)
    repeated: list[str] = []

    def pairs_hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            repeated.append(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
        return found

    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs_hook)
    except UnicodeDecodeError as e:
        raise ConfigError(f"is not UTF-8 at byte {e.start}; {_MEND_JSON}", file=path) from None
    except RecursionError:
        raise ConfigError(f"is nested too deeply; {_MEND_JSON}", file=path) from None
    except ValueError as e:
        raise ConfigError(f"is no valid JSON: {e}; {_MEND_JSON}", file=path) from None
    if type(found) is not dict:
        raise ConfigError(f"is {kind_of_json(found)}; expected an object: {_MEND_JSON}", file=path)
    if repeated:
        warnings.append(f"{path.name}: '{shown(repeated[0])}' comes twice in one object; the last one counts")
    return found


def what_is_here(names: list[str]) -> str:
    """What a folder without safetensors holds instead, for the error."""
    if not names:
        return "the folder is empty"
    weights = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".gguf", ".ckpt", ".msgpack", ".h5", ".onnx"))]
    if weights:
        listed = ", ".join(shown(name) for name in weights[:5])
        return f"found weights in other formats ({listed}): convert them to safetensors first"
    listed = ", ".join(shown(name) for name in names[:8])
    return f"found {listed}{' ...' if len(names) > 8 else ''}; give the folder that holds the shards"


def _walk(root: Path, leave_out: set[str], warnings: list[str]) -> tuple[tuple[SideFile, ...], tuple[str, ...]]:
    """All other files and all folders below `root`, links followed; `leave_out` are names at the top."""
    files: list[SideFile] = []
    folders: list[str] = []
    waiting: list[tuple[str, Path, tuple[Path, ...]]] = [("", root, (root,))]
    while waiting:
        prefix, folder, above = waiting.pop()
        for name in names_in(folder):
            if not prefix and name in leave_out:
                continue
            if len(files) + len(folders) >= MAX_SIDE_ENTRIES:
                raise SourceError(f"holds more than {MAX_SIDE_ENTRIES} files and folders", file=root)
            path = folder / name
            relative = prefix + name
            linked = path.is_symlink()
            resolved = resolved_path(path) if linked else path
            info = stat_of(resolved, path)
            if stat.S_ISDIR(info.st_mode):
                if resolved in above:
                    raise SourceError("is a link to a folder that holds it, a loop: remove it", file=path)
                if linked and not _belongs(root, resolved):
                    raise SourceError(
                        f"is a link to the folder {shown(resolved)}, outside of the checkpoint; "
                        "copy it, or remove the link",
                        file=path,
                    )
                folders.append(relative)
                waiting.append((relative + "/", resolved, (*above, resolved)))
            elif stat.S_ISREG(info.st_mode):
                if linked and not _belongs(root, resolved):
                    warnings.append(f"{shown(relative)} is a link to {shown(resolved)}: that file is copied")
                files.append(SideFile(relative, resolved, info.st_size, info.st_mtime_ns))
            else:
                what = f"is {kind_of_file(info.st_mode)}; only regular files can be copied: move it away"
                raise SourceError(what, file=path)
    return tuple(sorted(files, key=lambda side: side.name)), tuple(sorted(folders))
