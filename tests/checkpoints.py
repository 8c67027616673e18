"""What tests need to look at checkpoints with: an own reader and writer, so that ours is not checked against itself."""

from __future__ import annotations

import json
import re
import resource
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TypeVar

from blake3 import blake3

FIXTURES = Path(__file__).parent.parent / "fixtures"


class Tensor(NamedTuple):
    """One tensor as a safetensors file stores it; as read, the shape is a list."""

    dtype: str
    shape: Sequence[int]
    data: bytes


Tensors = dict[str, Tensor]
Result = TypeVar("Result")
Given = Mapping[str, tuple[str, Sequence[int], bytes]]  # what is written: a plain tuple will do for a tensor


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of one file, `__metadata__` included, and where the data begin. The data are not read."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


def read_shard(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of one file in file order, and its metadata."""
    header, start = read_header(path)
    metadata = header.pop("__metadata__", {})
    data = path.read_bytes()[start:]
    rows = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    tensors = {name: Tensor(info["dtype"], info["shape"], data[slice(*info["data_offsets"])]) for name, info in rows}
    return tensors, metadata


def read_shapes(folder: Path) -> dict[str, list[int]]:
    """name -> shape of all tensors of a checkpoint, in the order of the headers, without reading the data."""
    headers = [read_header(path)[0] for path in sorted(folder.glob("*.safetensors"))]
    return {name: info["shape"] for header in headers for name, info in header.items() if name != "__metadata__"}


def read_tensors(folder: Path) -> Tensors:
    """All tensors of a checkpoint; a name may occur once."""
    tensors: Tensors = {}
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


def _header_bytes(
    sizes: Mapping[str, tuple[str, Sequence[int], int]],
    metadata: Mapping[str, str] | None = None,
    separators: tuple[str, str] | None = None,
) -> bytes:
    """The length and the header of tensors of these dtypes, shapes and bytes that lie one behind the other."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape, size) in sizes.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=separators).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_shard(path: Path, tensors: Given, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file by hand."""
    sizes = {name: (dtype, shape, len(data)) for name, (dtype, shape, data) in tensors.items()}
    path.write_bytes(_header_bytes(sizes, metadata) + b"".join(data for _, _, data in tensors.values()))


def write_sparse_shard(path: Path, sizes: Mapping[str, tuple[str, Sequence[int], int]]) -> int:
    """Writes a safetensors file of zeros that takes no room on disk: name -> (dtype, shape, bytes), a compact header.

    Returns where the data begin.
    """
    header = _header_bytes(sizes, separators=(",", ":"))
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(size for _, _, size in sizes.values()))
    return len(header)


def write_checkpoint(
    folder: Path,
    tensors: Given,
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


def edit_tensors(folder: Path, changes: Mapping[str, tuple[str, Sequence[int], bytes] | None]) -> None:
    """Replaces, adds or (None) removes tensors of a one-file checkpoint."""
    path = folder / "model.safetensors"
    tensors, metadata = read_shard(path)
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = Tensor(*value)
    write_shard(path, tensors, metadata)


def count_calls(work: Callable[[], Result]) -> tuple[Result, int]:
    """The result, and how many functions this thread called for it: work that no busy machine makes longer."""
    number = 0

    def count(_frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal number
        number += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        return work(), number
    finally:
        sys.setprofile(before)


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
