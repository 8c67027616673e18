"""What tests need to look at checkpoints with: an own reader and writer, so that ours is not checked against itself."""

from __future__ import annotations

import json
import re
import resource
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

FIXTURES = Path(__file__).parent.parent / "fixtures"

Tensor = tuple[str, list[int], bytes]  # dtype, shape, bytes


def read_shard(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of one file in file order, and its metadata."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    base = 8 + length
    rows = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return {
        name: (info["dtype"], info["shape"], data[base + info["data_offsets"][0] : base + info["data_offsets"][1]])
        for name, info in rows
    }, metadata


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint; a name may occur once."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        shard, _ = read_shard(path)
        assert not tensors.keys() & shard.keys()
        tensors.update(shard)
    return tensors


def digests(folder: Path) -> dict[str, dict[str, Any]]:
    """name -> dtype, shape and BLAKE3, as right_answer.json holds them."""
    return {
        name: {"dtype": dtype, "shape": shape, "blake3": blake3(data).hexdigest()}
        for name, (dtype, shape, data) in read_tensors(folder).items()
    }


def write_shard(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file by hand."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A checkpoint of one or several shards, with an index where there are several."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    if shards == 1:
        write_shard(folder / "model.safetensors", tensors, metadata or {"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        mine = names[number::shards]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        write_shard(folder / file, {name: tensors[name] for name in mine}, metadata or {"format": "pt"})
        weight_map.update(dict.fromkeys(mine, file))
    total = sum(len(data) for _, _, data in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total, "note": "kept"}, "weight_map": weight_map})
    )
    return folder


def right_answer(case: str) -> dict[str, dict[str, Any]]:
    """What the exporter that knows ties writes for a fixture."""
    answer: dict[str, dict[str, Any]] = json.loads((FIXTURES / case / "right_answer.json").read_text())
    return answer


def edit_tensors(folder: Path, changes: Mapping[str, Tensor | None]) -> None:
    """Replaces, adds or (None) removes tensors of a one-file checkpoint."""
    path = folder / "model.safetensors"
    tensors, metadata = read_shard(path)
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    write_shard(path, tensors, metadata)


def peak_bytes() -> int:
    """This process's own peak of resident memory.

    On Linux not `ru_maxrss`: that begins with what the parent had when it forked.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert found is not None
        return int(found.group(1)) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
