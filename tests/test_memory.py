"""Memory is bounded by buffers, whatever the size of the checkpoint or of its largest tensor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import FIXTURES, write_sparse_shard

MiB = 1 << 20


def peak(arguments: list[str]) -> int:
    """Peak resident bytes of a process of its own that runs the command line."""
    code = (
        "import sys; from tierewrite import cli; "
        f"assert cli.run({arguments!r}) == 0; "
        "from tests.checkpoints import peak_bytes; print(peak_bytes(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=FIXTURES.parent, check=True)
    return int(done.stderr.split()[-1])


def large(folder: Path, mebibytes: int) -> None:
    """Two equal tensors of a size, and small ones, in a file that is sparse on disk."""
    folder.mkdir()
    size = mebibytes * MiB
    lengths = {"a.weight": size, "b.weight": size, **{f"c.{i}.weight": 4096 for i in range(64)}}
    path = folder / "model.safetensors"
    start = write_sparse_shard(path, {name: ("U8", [length], length) for name, length in lengths.items()})
    with path.open("r+b") as file:
        for offset in (12345, size + 12345):
            file.seek(start + offset)
            file.write(b"the same on both sides")
    (folder.parent / "ties.json").write_text('{"b.weight": "a.weight"}')


@pytest.mark.parametrize("command", ["rewrite", "verify"])
def test_peak_is_far_below_one_tensor(command: str, tmp_path: Path) -> None:
    large(tmp_path / "small", 1)
    ties = str(tmp_path / "ties.json")
    baseline = peak(["rewrite", str(tmp_path / "small"), str(tmp_path / "small-out"), "--ties", ties, "-q"])
    large(tmp_path / "src", 384)
    used = peak(["rewrite", str(tmp_path / "src"), str(tmp_path / "out"), "--ties", ties, "-q"])
    if command == "verify":
        used = peak(["verify", str(tmp_path / "src"), str(tmp_path / "out"), "--json"])
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 384 * MiB
    assert used - baseline < 96 * MiB
