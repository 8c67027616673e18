"""A checkpoint folder as a loader reads it: contradictions of files and index are kept for the rules."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tierewrite.errors import SourceError
from tierewrite.source.folder import (
    WANTED,
    natural_key,
    read_config,
    refuse_half_written,
    safetensors_among,
    what_is_here,
)
from tierewrite.source.header import read_header
from tierewrite.source.index import read_index
from tierewrite.source.open import RemoteCheckpoint, rename_in_errors
from tierewrite.source.suggestion import did_you_mean, not_a_folder
from tierewrite.source.table import (
    CONFIG_NAME,
    CONFIG_NAMES,
    INDEX_NAME,
    QUANT_CONFIG_NAME,
    Checkpoint,
    Header,
    Shard,
    TensorEntry,
    Tensors,
)
from tierewrite.stores.mirror import Place, folder_of, is_remote_folder
from tierewrite.stores.places import FilePath


@dataclass(frozen=True)
class Folder:
    """A checkpoint folder as a loader sees it.

    Attributes:
        root: the folder; of a remote one, what holds copies of its small files.
        shards: the files that the loader reads, in its order.
        entries: the tensors in them by name; of a name that several hold, the one that is read last.
        repeated: names that several of the files hold, with all their entries in reading order.
        weight_map: the index, or None.
        absent: files that the index names and that are not there.
        unread: the other safetensors files with the names they hold.
        alone: files that the loader reads alone because of their names; () where it goes by the index or reads all.
        config, quant_config, generation: config.json, hf_quant_config.json, generation_config.json; {} where
            absent.
        copies: of a remote folder: who removes `root` once nobody needs it.
    """

    root: Path
    shards: tuple[Shard, ...]
    entries: dict[str, TensorEntry]
    repeated: dict[str, tuple[TensorEntry, ...]]
    weight_map: dict[str, str] | None
    absent: tuple[str, ...]
    unread: dict[str, tuple[str, ...]]
    alone: tuple[str, ...]
    config: dict[str, Any]
    quant_config: dict[str, Any]
    generation: dict[str, Any]
    copies: object = None

    def with_configs(self, folder: Path) -> Folder:
        """This folder with the config.json and hf_quant_config.json of another."""
        config, quant_config = (read_config(folder / name, []) for name in CONFIG_NAMES)
        return replace(self, root=folder, config=config, quant_config=quant_config)

    @classmethod
    def open(cls, path: Place, reads_alone: str) -> Folder:
        """Reads headers, index and configs of `path` as a loader does.

        Args:
            path: the folder, or its URL.
            reads_alone: wildcard of the safetensors files that the loader reads alone, where there are any. Else it
                reads the files that the index names, whole, or every *.safetensors without one.

        Raises:
            SourceError and its kin: no folder, no safetensors file, a malformed header, index or config.
            SystemFailure: the system does not let us read it.
        """
        place = folder_of(path)
        mirror = RemoteCheckpoint(place, python=True) if is_remote_folder(place) else None
        where: FilePath
        if is_remote_folder(place):
            assert mirror is not None
            root, where, top = mirror.root, place.base, mirror.top
        else:
            root = where = place
            if not root.is_dir():
                if os.path.lexists(root):
                    raise SourceError(not_a_folder(root), file=root)
                raise SourceError(f"does not exist; {WANTED}{did_you_mean(root)}", file=root)
            top = [p.name for p in root.iterdir()]
        refuse_half_written(top, where)
        there = sorted(safetensors_among(top), key=natural_key)
        alone = tuple(n for n in there if fnmatchcase(n, reads_alone))
        weight_map = read_index(root / INDEX_NAME)[1] if (root / INDEX_NAME).exists() else None
        absent: list[str] = []
        if alone:
            names = list(alone)
        elif weight_map is not None:
            listed = sorted(set(weight_map.values()), key=natural_key)
            names = [n for n in listed if n in there]
            absent = [n for n in listed if n not in there]
        else:
            names = there
        if not there:
            raise SourceError(f"no *.safetensors file here; {what_is_here(sorted(top))}", file=where)
        shards: list[Shard] = []
        entries: dict[str, TensorEntry] = {}
        repeated: dict[str, list[TensorEntry]] = {}
        unread = {}
        headers = nullcontext(_local_header(root)) if mirror is None else mirror.headers(there)
        with rename_in_errors(where, root), headers as header:
            for number, name in enumerate(names):
                shard, found = header(name, number)
                shards.append(shard)
                for entry in found.values():
                    earlier = entries.get(entry.name)
                    if earlier is not None:
                        repeated.setdefault(entry.name, [earlier]).append(entry)
                    entries[entry.name] = entry
            for name in there:
                if name not in names:
                    unread[name] = tuple(header(name, 0)[1])
        return cls(
            root,
            tuple(shards),
            entries,
            {name: tuple(found_) for name, found_ in repeated.items()},
            weight_map,
            tuple(absent),
            unread,
            alone,
            read_config(root / CONFIG_NAME, []),
            read_config(root / QUANT_CONFIG_NAME, []),
            read_config(root / "generation_config.json", []),
            mirror,
        )

    def as_checkpoint(self, entries: Mapping[str, TensorEntry] | None = None) -> Checkpoint:
        """The same as a `Checkpoint` that `source.bytes.read_tensors` reads from."""
        found = Tensors.of((self.entries if entries is None else entries).values())
        return Checkpoint(self.root, self.shards, found, None, (), (), self.config, self.quant_config, ())


def _local_header(root: Path) -> Callable[[str, int], Header]:
    return lambda name, number: read_header(root / name, shard=number, name=name)
