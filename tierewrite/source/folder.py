"""A checkpoint folder opened: index, headers, configurations and side files, held against each other.

This is the one gate for input. Nothing is opened for writing, no tensor data is read, and time and memory are bounded
by the size of the headers, whatever they say. Anything but regular files is refused.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from tierewrite.errors import ConfigError, ShardIndexError, SourceError, shown
from tierewrite.source.header import read_header
from tierewrite.source.index import check_against_index, check_total, read_index
from tierewrite.source.regular_files import kind_of_file, names_in, read_small, resolved_path, stat_of
from tierewrite.source.side_files import in_other_formats
from tierewrite.source.strict_json import kind_of_json, repeated_key
from tierewrite.source.suggestion import did_you_mean, not_a_folder
from tierewrite.source.table import (
    CONFIG_NAME,
    INCOMPLETE_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    QUANT_CONFIG_NAME,
    STAGING_MARK_NAME,
    Checkpoint,
    Header,
    Shard,
    SideFile,
    Tensors,
)
from tierewrite.stores.base import PathLike
from tierewrite.stores.places import FilePath
from tierewrite.stores.remote import RemotePath
from tierewrite.tables import count

WANTED = "expected a checkpoint folder holding *.safetensors files"
_FIX_JSON = "correct it, or copy it from the original model"
MAX_CONFIG_BYTES = 64 * 1024**2
MAX_SIDE_ENTRIES = 1_000_000  # files and folders; ends the walk through folders that link to each other


def open_folder(path: PathLike, *, ignore_unindexed: bool = False) -> Checkpoint:
    """Read the headers, index and configurations of the checkpoint folder `path`.

    With an index, the index decides which files are shards; without one, every `*.safetensors` of the
    folder is read, as vLLM does, but those that are named for another loader (`loader_of`): such a file
    is no model. Other safetensors files are side files, unless their keys overlap.

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
        raise SourceError(f"{e.args[0]}; {WANTED}{did_you_mean(Path(path))}", file=path) from None
    if not root.is_dir():
        raise SourceError(not_a_folder(Path(path)), file=path)
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
    header: Callable[[str, int], Header],
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
    config = read_config(root / CONFIG_NAME, warnings)
    quant_config = read_config(root / QUANT_CONFIG_NAME, warnings)

    metadata, weight_map = read_index(root / INDEX_NAME) if INDEX_NAME in top else (None, None)
    names, strays = _shard_names(top, weight_map, origin or root)
    if weight_map is not None:
        for name in names:
            indexed(name)
    shards, tensors = _joined(names, header, root)
    if metadata is not None and weight_map is not None:
        check_against_index(weight_map, tensors, shards, root / INDEX_NAME)
        if len(tensors) > len(weight_map):
            tensors = _without_unindexed(tensors, weight_map, shards, root, ignore_unindexed, warnings)
        check_total(metadata, tensors, warnings)
    for name in strays:
        _check_stray(root / name, header(name, 0)[1], tensors, weight_map is not None, warnings)
    if not tensors:
        raise SourceError("the safetensors files hold no tensors; nothing to rewrite", file=root)
    ours = {INDEX_NAME, MANIFEST_NAME, INCOMPLETE_NAME, STAGING_MARK_NAME}
    side_files, directories = others({*names, *ours}, warnings)
    return Checkpoint(
        root=root,
        shards=shards,
        tensors=tensors,
        index_metadata=metadata,
        side_files=side_files,
        directories=directories,
        config=config,
        quant_config=quant_config,
        warnings=tuple(warnings),
        origin=origin,
        copies=copies,
    )


def safetensors_among(names: Iterable[str]) -> list[str]:
    """Those of the names in a folder that loaders' `glob("*.safetensors")` finds: no hidden ones.

    macOS puts a hidden `._X` beside every X on file systems of others.
    """
    return [name for name in names if name.endswith(".safetensors") and not name.startswith(".")]


def _shard_names(top: list[str], weight_map: dict[str, str] | None, where: FilePath) -> tuple[list[str], list[str]]:
    """The files that are shards, in natural order, and the safetensors files that the index does not name."""
    local = safetensors_among(top)
    if weight_map is not None:
        listed = set(weight_map.values())
        return sorted(listed, key=natural_key), [name for name in local if name not in listed]
    if not local:
        raise SourceError(f"no *.safetensors file here; {what_is_here(top)}", file=where)
    named_for = {name: kind for name in local if (kind := loader_of(name)) is not None}
    if len(named_for) == len(local):
        name, kind = next(iter(named_for.items()))
        raise SourceError(
            f"holds {kind} ({shown(name)}) and no model: under model.safetensors, which a rewrite writes, its loader "
            "would not find it; give the folder of a model, merge it into one first, or name its files in a "
            f"{INDEX_NAME}",
            file=where,
        )
    return sorted((name for name in local if name not in named_for), key=natural_key), list(named_for)


_NAMED_FOR = (
    (re.compile(r"adapter"), "a PEFT adapter"),
    (re.compile(r".*lora"), "LoRA weights"),
    (re.compile(r"consolidated"), "weights in a model author's own layout"),
    (re.compile(r"diffusion_pytorch_model"), "a model of diffusers"),
    (re.compile(r"open_clip"), "a model of OpenCLIP"),
    (re.compile(r"optimizer|scheduler|random_states"), "the state of a training run"),
    (re.compile(r"(?:pytorch_)?model(?:-[0-9]+-of-[0-9]+)?\.[^.]+(?:-[0-9]+-of-[0-9]+)?\."), "a variant of a model"),
)


def loader_of(name: str) -> str | None:
    """Whose weights a safetensors file holds that no loader of models looks for; None for any other name.

    PEFT, diffusers and the variants of transformers (`model.fp16.safetensors`) find their files by these names.
    """
    return next((kind for pattern, kind in _NAMED_FOR if pattern.match(name)), None)


def _joined(names: list[str], header: Callable[[str, int], Header], root: Path) -> tuple[tuple[Shard, ...], Tensors]:
    """The shards and all that they hold, each name in one of them only."""
    headers = [header(name, number) for number, name in enumerate(names)]
    shards = tuple(shard for shard, _ in headers)
    tensors = Tensors.concatenated([table for _, table in headers])
    if len(tensors.row) < len(tensors):
        _refuse_stored_twice(tensors, shards, root)
    return shards, tensors


def _refuse_stored_twice(tensors: Tensors, shards: tuple[Shard, ...], root: Path) -> None:
    """Raises ShardIndexError for the first name that an earlier row has too."""
    first: dict[str, int] = {}
    for row, name in enumerate(tensors.names):
        earlier = first.setdefault(name, row)
        if earlier != row:
            raise ShardIndexError(
                f"also stored in {shown(shards[tensors.shard[earlier]].name)}; expected each name in one shard only",
                file=root / shards[tensors.shard[row]].name,
                tensor=name,
                advice="remove the copy that is not meant",
            )


def _without_unindexed(
    tensors: Tensors,
    weight_map: dict[str, str],
    shards: tuple[Shard, ...],
    root: Path,
    ignore: bool,
    warnings: list[str],
) -> Tensors:
    """What the index lists of `tensors`, which hold more; with `ignore` a warning says what is left out.

    Raises:
        ShardIndexError: without `ignore`.
    """
    indexed = np.fromiter(map(weight_map.__contains__, tensors.names), bool, len(tensors))
    lacking = list(compress(tensors.names, ~indexed))
    listed = ", ".join(f"'{shown(name)}'" for name in lacking[:5])
    more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
    if not ignore:
        raise ShardIndexError(
            f"holds {count(len(lacking), 'tensor')} that {INDEX_NAME} lacks: {listed}{more}. Loaders read what it has",
            file=root / shards[tensors[lacking[0]].shard].name,
            tensor=lacking[0],
            details={"unindexed": lacking},
            advice="add to the index what it lacks, or leave it out with --ignore-unindexed",
        )
    warnings.append(f"left out {count(len(lacking), 'tensor')} that the index lacks: {listed}{more}")
    return tensors.where(indexed)


def _check_stray(path: Path, held: Tensors, tensors: Tensors, has_index: bool, warnings: list[str]) -> None:
    """A safetensors file that is no shard is a side file, unless it holds a name that a shard holds too.

    Raises:
        ShardIndexError: it does.
    """
    twice = [name for name in held.names if name in tensors.row]
    why = f"is not in {INDEX_NAME}" if has_index else f"is named as {loader_of(path.name)}"
    if twice:
        raise ShardIndexError(
            f"{why}, yet holds {len(twice)} of the model's tensors",
            file=path,
            tensor=twice[0],
            details={"overlap": twice},
            advice="remove the file, or the index if the file is what counts"
            if has_index
            else "remove the file, or the model's own if this one is what counts",
        )
    warnings.append(f"{shown(path.name)} {why}: copied as it is, its tensors are not looked at")


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
    """Sort key that puts `model-2` before `model-10`; names that only differ in leading zeros stay different."""
    parts: list[tuple[int, int, str]] = []
    for part in re.split("([0-9]+)", name):
        # int() of thousands of digits is slow and refused by Python: such a part is compared as text
        parts.append(
            (0, int(part), part) if part[:1].isdecimal() and part.isascii() and len(part) < 20 else (1, 0, part)
        )
    return parts


def _check_shard_link(root: Path, name: str, index_path: Path) -> None:
    """An indexed file may be a link, but only to a file of this folder or of the hub cache that the folder is in."""
    path = root / name
    try:
        resolved = resolved_path(path)
    except SourceError as e:
        why = str(e).removeprefix(f"{shown(path)}: ")
        raise ShardIndexError(f"names '{shown(name)}', which {why}", file=index_path) from None
    if not _belongs(root, resolved):
        raise ShardIndexError(
            f"names '{shown(name)}', a link that leaves the folder to {shown(resolved)}",
            file=index_path,
            advice="put the file itself there",
        )


def _belongs(root: Path, resolved: Path) -> bool:
    """Whether a link's end is the folder's own: below it, or a blob of the hub cache whose snapshot the folder is.

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


def read_config(path: Path, warnings: list[str]) -> dict[str, Any]:
    """A JSON object from a configuration file, as `json.load` sees it (NaN and Infinity included); {} if absent.

    A key that comes twice is added to `warnings`; the last one counts.

    Raises:
        ConfigError: it is too large, no UTF-8, no JSON, or no object.
    """
    if not os.path.lexists(path):
        return {}
    raw = read_small(path, MAX_CONFIG_BYTES, ConfigError)
    repeated: list[str] = []

    def pairs_hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        key = repeated_key(pairs)
        if key is not None:
            repeated.append(key)
        return dict(pairs)

    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs_hook)
    except UnicodeDecodeError as e:
        raise ConfigError(f"is not UTF-8 at byte {e.start}; {_FIX_JSON}", file=path) from None
    except RecursionError:
        raise ConfigError(f"is nested too deeply; {_FIX_JSON}", file=path) from None
    except ValueError as e:
        raise ConfigError(f"is no valid JSON: {e}; {_FIX_JSON}", file=path) from None
    if type(found) is not dict:
        raise ConfigError(f"is {kind_of_json(found)}; expected an object: {_FIX_JSON}", file=path)
    if repeated:
        warnings.append(f"{path.name}: '{shown(repeated[0])}' comes twice in one object; the last one counts")
    return found


def what_is_here(names: list[str]) -> str:
    """What a folder without safetensors holds instead, for the error."""
    if not names:
        return "the folder is empty"
    weights = in_other_formats(names)
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
                files.append(
                    SideFile(relative, resolved, info.st_size, info.st_mtime_ns, "", info.st_ino, info.st_ctime_ns)
                )
            else:
                what = f"is {kind_of_file(info.st_mode)}; only regular files can be copied: move it away"
                raise SourceError(what, file=path)
    return tuple(sorted(files, key=lambda side: side.name)), tuple(sorted(folders))
