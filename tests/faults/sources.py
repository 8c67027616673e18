"""Sources for crash and fault tests, with ties files, so that no model class is imported."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.checkpoints import FIXTURES, Tensor, write_checkpoint

LAST_YEAR = 1_700_000_000_000_000_000  # ns; so that a change shows in the times however fast it follows


@dataclass(frozen=True)
class Source:
    """A checkpoint, its ties file, and the options that give many shards."""

    path: Path
    ties: Path
    options: tuple[str, ...]


def age(folder: Path) -> None:
    """Gives every file an old modification time."""
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, ns=(LAST_YEAR, LAST_YEAR))


def real(folder: Path) -> Source:
    """A copy of the sharded NVFP4 export of DiffusionGemma; it is rewritten to 8 shards."""
    src = folder / "naive"
    shutil.copytree(FIXTURES / "dg_nvfp4_sharded" / "naive", src)
    (src / "remote" / "code").mkdir(parents=True)
    (src / "remote" / "code" / "model.py").write_text("# carried along\n")
    age(src)
    keys = json.loads((src / "model.safetensors.index.json").read_text())["weight_map"]
    encoder = "model.encoder.language_model."
    declared = {
        key: "model.decoder." + key.removeprefix(encoder)
        for key in keys
        if key.startswith(encoder) and key.endswith((".weight", ".scale", ".per_expert_scale"))
    }
    declared["lm_head.weight"] = "model.decoder.embed_tokens.weight"
    ties = folder / "ties.json"
    ties.write_text(json.dumps(declared))
    return Source(src, ties, ("--ties", str(ties), "--max-shard-size", "50KB", "--threads", "2", "-q"))


def shareable(folder: Path) -> Source:
    """Runs of 1.5 MB that a file system can share: tied weights, one that is not, and scales, in two files."""
    chance = random.Random(11)
    tensors: dict[str, Tensor] = {}
    declared: dict[str, str] = {}
    for layer in range(2):
        alias, canonical = f"encoder.{layer}.weight", f"decoder.{layer}.weight"
        tensors[canonical] = tensors[alias] = Tensor("U8", [3 << 19], chance.randbytes(3 << 19))
        tensors[f"own.{layer}.weight"] = Tensor("BF16", [3 << 18], chance.randbytes(3 << 19))
        for number in range(700):
            tensors[f"norms.{layer}.{number}.weight"] = Tensor("F32", [], chance.randbytes(4))
        declared[alias] = canonical
    src = write_checkpoint(folder / "shareable", tensors, {"model_type": "none"}, shards=2)
    age(src)
    ties = folder / "ties.json"
    ties.write_text(json.dumps(declared))
    return Source(src, ties, ("--ties", str(ties), "--threads", "2", "-q"))


def synthetic(folder: Path, megabytes: int) -> Source:
    """Random BF16 weights under two names each, of 4 KB to 12 MB (more than a worker's buffer), in 5 shards."""
    chance = random.Random(7)
    tensors: dict[str, Tensor] = {}
    declared: dict[str, str] = {}
    size = number = 0
    while size < megabytes << 20:
        rows = 6144 if number % 20 == 0 else chance.choice([2, 16, 128, 512])
        data = chance.randbytes(rows * 1024 * 2)
        canonical, alias = f"decoder.layers.{number}.weight", f"encoder.layers.{number}.weight"
        tensors[canonical] = tensors[alias] = ("BF16", [rows, 1024], data)
        tensors[f"encoder.own.{number}.weight"] = ("F32", [3], chance.randbytes(12))
        declared[alias] = canonical
        size += 2 * len(data)
        number += 1
    src = write_checkpoint(folder / "synthetic", tensors, {"model_type": "none"}, shards=5)
    age(src)
    ties = folder / "ties.json"
    ties.write_text(json.dumps(declared))
    return Source(src, ties, ("--ties", str(ties), "--max-shard-size", "2MB", "--threads", "2", "-q"))
