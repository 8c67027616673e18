"""An attacker who knows the format changes DST and its manifest together, consistently: `verify` believes neither.

Each change leaves a checkpoint that is whole by itself: header, index, total size, digests and statements fit together.
Only SRC tells that it is wrong.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

import tierewrite
from tests.checkpoints import FIXTURES, Tensor, read_shard, write_checkpoint
from tests.test_rewrite_against_verify import checkpoint
from tierewrite.errors import Refused, TieFileError
from tierewrite.numbers import nvfp4

INDEX = "model.safetensors.index.json"
MANIFEST = "tierewrite.json"
COUNTS = {
    "qwen3_tied_bf16": 1080,
    "dg_nvfp4": 30,
    "dg_nvfp4_kvfp8": 30,
    "dg_nvfp4_sharded": 30,
    "llmcompressor_nvfp4_dg": 30,
}
CASES: dict[str, dict[str, Any]] = {
    "qwen3_tied_bf16": {},
    "dg_nvfp4": {"unify_fused_scales": True, "fix_ignore": True},
    "dg_nvfp4_kvfp8": {"kv_scales": "merge"},
    "dg_nvfp4_sharded": {"fill_missing_scales": True},
    "llmcompressor_nvfp4_dg": {},
}


class Forger:
    """A DST in memory, to be changed and written out again as a rewrite would write it."""

    def __init__(self, dst: Path, rng: random.Random) -> None:
        self.rng = rng
        self.shards = {path.name: read_shard(path) for path in sorted(dst.glob("*.safetensors"))}
        self.manifest: dict[str, Any] = json.loads((dst / MANIFEST).read_text())
        self.index: dict[str, Any] = json.loads((dst / INDEX).read_text())
        self.others = {path.name: path.read_bytes() for path in dst.iterdir() if path.suffix != ".safetensors"}
        self.keep_manifest = True

    def write(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, data in self.others.items():
            (folder / name).write_bytes(data)
        weight_map = {}
        total = 0
        for name, (tensors, metadata) in self.shards.items():
            (folder / name).write_bytes(serialized(tensors, metadata))
            weight_map.update(dict.fromkeys(tensors, name))
            total += sum(len(tensor.data) for tensor in tensors.values())
        self.index["metadata"]["total_size"] = total
        self.index["weight_map"] = dict(sorted(weight_map.items()))
        (folder / INDEX).write_text(json.dumps(self.index, indent=2) + "\n")
        (folder / MANIFEST).unlink()
        if self.keep_manifest:
            (folder / MANIFEST).write_text(json.dumps(self.manifest))

    def all(self) -> dict[str, str]:
        """Tensor -> shard."""
        return {key: name for name, (tensors, _) in self.shards.items() for key in tensors}

    def get(self, key: str) -> Tensor:
        return self.shards[self.all()[key]][0][key]

    def put(self, key: str, data: bytes) -> None:
        """Other bytes for a tensor, and their digest in the manifest."""
        tensors, _ = self.shards[self.all()[key]]
        tensors[key] = tensors[key]._replace(data=data)
        for entry in self.entries(key):
            entry["blake3"] = blake3(data).hexdigest()

    def entries(self, key: str) -> list[dict[str, Any]]:
        return [group["tensors"][key] for group in self.manifest["groups"] if key in group["tensors"]]

    def pick(self, test: Callable[[str], bool] = lambda key: True) -> str | None:
        keys = [key for key in self.all() if test(key) and self.get(key).data]
        return self.rng.choice(keys) if keys else None


def serialized(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """As a rewrite writes it: compact, metadata first, padded to 8."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for key, (dtype, shape, data) in tensors.items():
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())


# Each returns whether it changed anything.


def other_bytes(f: Forger) -> bool:
    key = f.pick()
    assert key is not None
    data = bytearray(f.get(key).data)
    data[f.rng.randrange(len(data))] ^= 1 << f.rng.randrange(8)
    f.put(key, bytes(data))
    return True


def other_scale(f: Forger) -> bool:
    """A merged scale of one side only, or a wider one, with the ratio that fits."""
    key = f.pick(lambda key: any(entry["merged"] for entry in f.entries(key)))
    if key is None:
        return False
    bits = {"F32": "<f4", "F64": "<f8", "BF16": "<u2", "F16": "<u2"}.get(f.get(key).dtype, "u1")
    value = np.frombuffer(f.get(key).data, bits)
    f.put(key, (value * value.dtype.type(2)).tobytes())
    return f.get(key).data != value.tobytes()


def swapped(f: Forger) -> bool:
    first = f.pick()
    assert first is not None
    like = f.get(first)
    other = f.pick(lambda key: f.get(key)[:2] == like[:2] and f.get(key).data != like.data)
    if other is None:
        return False
    data = f.get(other).data
    f.put(other, like.data)
    f.put(first, data)
    return True


def dropped_under_a_tie(f: Forger) -> bool:
    """A tensor is gone, and the manifest says that it was tied to another of the same shape."""
    key = f.pick(lambda key: key.endswith("weight"))
    if key is None:
        return False
    like = f.get(key)
    other = f.pick(lambda name: name != key and f.get(name)[:2] == like[:2])
    if other is None:
        return False
    del f.shards[f.all()[key]][0][key]
    for group in f.manifest["groups"]:
        group["tensors"].pop(key, None)
    f.manifest["ties"]["map"][key] = other
    entry = {"from": [other, key], "action": "keep", "merged": False, "blake3": blake3(f.get(other).data).hexdigest()}
    f.manifest["groups"].append(
        {
            "id": other, "canonical": other, "aliases": [key], "status": "rewritten", "reason": None,
            "tensors": {other: entry},
        }
    )  # fmt: skip
    return True


def dropped(f: Forger) -> bool:
    key = f.pick()
    assert key is not None
    del f.shards[f.all()[key]][0][key]
    for group in f.manifest["groups"]:
        group["tensors"].pop(key, None)
    return True


def renamed(f: Forger) -> bool:
    key = f.pick()
    assert key is not None
    tensors, metadata = f.shards[f.all()[key]]
    name = f"{key}{f.rng.randrange(10)}"
    f.shards[f.all()[key]] = ({name if k == key else k: v for k, v in tensors.items()}, metadata)
    for group in f.manifest["groups"]:
        if key in group["tensors"]:
            group["tensors"][name] = group["tensors"].pop(key)
    return True


def added(f: Forger) -> bool:
    key = f.pick()
    assert key is not None
    tensors, _ = f.shards[f.all()[key]]
    tensors[f"{key}.copy"] = f.get(key)
    return True


def alias_back(f: Forger) -> bool:
    """A tied tensor under both names, and a manifest that knows of no tie."""
    aliases = [name for name in f.manifest["ties"]["map"].items() if name[1] in f.all() and name[0] not in f.all()]
    if not aliases:
        return False
    alias, canonical = f.rng.choice(aliases)
    f.shards[f.all()[canonical]][0][alias] = f.get(canonical)
    del f.manifest["ties"]["map"][alias]
    f.manifest["groups"] = [group for group in f.manifest["groups"] if alias not in group["aliases"]]
    return True


def reordered(f: Forger) -> bool:
    name = f.rng.choice(list(f.shards))
    tensors, metadata = f.shards[name]
    keys = list(tensors)
    f.rng.shuffle(keys)
    f.shards[name] = {key: tensors[key] for key in keys}, metadata
    return keys != list(tensors)


def moved_to_another_shard(f: Forger) -> bool:
    if len(f.shards) < 2:
        return False
    key = f.pick()
    assert key is not None
    here = f.all()[key]
    there = f.rng.choice([name for name in f.shards if name != here])
    f.shards[there][0][key] = f.shards[here][0].pop(key)
    return True


def rescaled(f: Forger) -> bool:
    """NVFP4 weights re-encoded to a much wider scale: all zero."""
    key = f.pick(lambda key: key.endswith(".weight_scale_2"))
    if key is None:
        return False
    parent = key.removesuffix(".weight_scale_2").rpartition(".")[0]
    for name in [k for k in f.all() if k.startswith(parent) and k.endswith(".weight_scale_2")]:
        names = [name.removesuffix("weight_scale_2") + part for part in ("weight", "weight_scale", "weight_scale_2")]
        if not f.all().keys() >= set(names):
            return False
        codes, scales = (np.frombuffer(f.get(n).data, np.uint8).reshape(f.get(n).shape) for n in names[:2])
        old = np.frombuffer(f.get(name).data, "<f4")
        wide = (old * np.float32(1e9)).astype("<f4")
        try:
            encoded = nvfp4.repack(codes, scales, old, wide)
        except ValueError:  # scales that nothing can be encoded to
            return False
        for n, array in zip(names, (*encoded, wide), strict=True):
            f.put(n, array.tobytes())
            for entry in f.entries(n):
                entry["action"] = "repack"
    f.manifest["options"]["unify_fused_scales"] = True
    return True


def ignore_list(f: Forger) -> bool:
    if "config.json" not in f.others:
        return False
    config = json.loads(f.others["config.json"])
    inner = config.setdefault("quantization_config", {})
    inner["ignore"] = f.rng.choice([["*"], [], ["lm_head", "model.layers.0*"]])
    f.others["config.json"] = json.dumps(config, indent=2).encode()
    f.manifest["options"]["fix_ignore"] = True
    return True


def option(f: Forger) -> bool:
    name, value = f.rng.choice(
        [("on_mismatch", "keep"), ("kv_scales", "merge"), ("max_shard_size", 10**12), ("fix_ignore", True),
         ("unify_fused_scales", True), ("fill_missing_scales", True)]
    )  # fmt: skip
    was = f.manifest["options"][name]
    f.manifest["options"][name] = value if was != value else None
    return True


def statement(f: Forger) -> bool:
    if not f.manifest["groups"]:
        return False
    group = f.rng.choice(f.manifest["groups"])
    what = f.rng.randrange(5)
    if what == 0:
        group["aliases"] = [f"{name}x" for name in group["aliases"]] or ["x"]
    elif what == 1:
        group["status"], group["reason"], group["tensors"] = "kept", "they differ", {}
    elif what == 2:
        f.manifest["tool"]["version"] = "9.9.9"
    elif what == 3:
        f.manifest["ties"]["detail"] = f"{f.manifest['ties']['detail']}X"
    else:
        group["id"] = group["canonical"] = f"{group['canonical']}x"
    return True


def metadata(f: Forger) -> bool:
    name = f.rng.choice(list(f.shards))
    f.shards[name][1][f.rng.choice(["format", "note"])] = "np"
    return True


def index_member(f: Forger) -> bool:
    f.rng.choice([f.index, f.index["metadata"]])["note"] = 1
    return True


CHANGES = (
    other_bytes, other_scale, swapped, dropped_under_a_tie, dropped, renamed, added, alias_back, reordered,
    moved_to_another_shard, rescaled, ignore_list, option, statement, metadata, index_member,
)  # fmt: skip


def attack(
    src: Path, ties: Path, options: dict[str, Any], count: int, rng: random.Random, folder: Path
) -> Counter[str]:
    """Makes `count` forgeries of what rewriting `src` makes; returns how often each kind of change was made."""
    dst = folder / "dst"
    tierewrite.rewrite(src, dst, ties=ties, **options)
    right = {path.name: path.read_bytes() for path in dst.iterdir()}
    made: Counter[str] = Counter()
    done = 0
    for _ in range(20 * count):
        if done == count:
            return made
        forger = Forger(dst, rng)
        chosen = rng.sample(CHANGES, rng.choice((1, 1, 2, 3)))
        changed = [change.__name__ for change in chosen if change(forger)]
        if not changed:
            continue
        forger.keep_manifest = rng.random() < 0.5  # without one it tells nothing, and proves nothing
        forger.write(folder / "forged")
        there = {path.name: path.read_bytes() for path in (folder / "forged").iterdir()}
        if same_checkpoint(there, right, forger.keep_manifest):
            continue
        result = tierewrite.verify(src, folder / "forged", ties=ties, **options)
        assert not result.ok, f"{src.parent.name}, number {done}: {changed}, manifest {forger.keep_manifest}"
        made.update(changed)
        done += 1
    raise AssertionError(f"only {done} of {count} forgeries could be made")


def attack_fixture(case: str, count: int, seed: int, folder: Path) -> Counter[str]:
    """Forgeries of a fixture's output."""
    src = FIXTURES / case / "naive"
    ties = folder / "ties.json"
    ties.write_text(json.dumps(ties_of(src, folder)))
    return attack(src, ties, CASES[case], count, random.Random(seed), folder)


def attack_random(seeds: range, each: int, folder: Path) -> Counter[str]:
    """Forgeries of what becomes of random checkpoints, which hold all that a rewrite does in a few tensors."""
    made: Counter[str] = Counter()
    for seed in seeds:
        rng = random.Random(seed)
        place = folder / str(seed)
        place.mkdir()
        tensors, declared = checkpoint(rng)
        src = write_checkpoint(place / "src", tensors, config={"model_type": "x"}, shards=rng.choice([1, 2]))
        ties = place / "ties.json"
        ties.write_text(json.dumps(declared))
        options: dict[str, Any] = {
            "on_mismatch": "keep",
            "kv_scales": rng.choice(["keep", "merge"]),
            "unify_fused_scales": rng.random() < 0.5,
        }
        try:
            made += attack(src, ties, options, each, rng, place)
        except (Refused, TieFileError):
            continue
        finally:
            shutil.rmtree(place)
    return made


def same_checkpoint(there: dict[str, bytes], right: dict[str, bytes], with_manifest: bool) -> bool:
    """Whether nothing that SRC decides is different: without a manifest order and shards of tensors are anybody's."""
    return there == right if with_manifest else content(there) == content(right)


def content(files: dict[str, bytes]) -> Any:
    """All that is in a checkpoint, wherever it stands."""
    tensors: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, data in files.items():
        if name == INDEX:
            others[name] = json.loads(data)["metadata"]
        elif name.endswith(".safetensors"):
            (length,) = struct.unpack("<Q", data[:8])
            header = json.loads(data[8 : 8 + length])
            others[name] = header.pop("__metadata__", {})
            for key, info in header.items():
                start, end = info["data_offsets"]
                tensors[key] = info["dtype"], info["shape"], data[8 + length + start : 8 + length + end]
        elif name != MANIFEST:
            others[name] = data
    return tensors, others


def ties_of(src: Path, folder: Path) -> dict[str, str]:
    """The ties that the class declares, as a manifest has them."""
    tierewrite.rewrite(src, folder / "asked")
    ties: dict[str, str] = json.loads((folder / "asked" / MANIFEST).read_text())["ties"]["map"]
    return ties


@pytest.mark.parametrize("case", COUNTS)
def test_no_forgery_is_accepted(case: str, tmp_path: Path) -> None:
    made = attack_fixture(case, COUNTS[case], 2026, tmp_path)
    assert len(made) >= 10, made


def test_no_forgery_of_a_random_checkpoint_is_accepted(tmp_path: Path) -> None:
    made = attack_random(range(40), 20, tmp_path)
    assert made.total() >= 500, made
    assert len(made) == len(CHANGES), made


@pytest.mark.parametrize("case", CASES)
def test_what_the_forger_writes_without_a_change_is_accepted(case: str, tmp_path: Path) -> None:
    src, options = FIXTURES / case / "naive", CASES[case]
    dst = tmp_path / "dst"
    tierewrite.rewrite(src, dst, **options)
    forger = Forger(dst, random.Random(0))
    forger.write(tmp_path / "same")
    for path in dst.iterdir():
        if path.name not in (MANIFEST, INDEX):
            assert (tmp_path / "same" / path.name).read_bytes() == path.read_bytes()
    shutil.copy(dst / MANIFEST, tmp_path / "same")
    shutil.copy(dst / INDEX, tmp_path / "same")
    assert tierewrite.verify(src, tmp_path / "same", **options).problems == ()


# 100,000 forgeries, in parts that processes share (pytest -n auto --dist load)


@pytest.mark.long
@pytest.mark.parametrize("part", range(10))
@pytest.mark.parametrize("case", COUNTS)
def test_none_of_a_thousand_forgeries_is_accepted(case: str, part: int, tmp_path: Path) -> None:
    made = attack_fixture(case, 1000, 7 + part, tmp_path)
    assert made.total() >= 1000, made


@pytest.mark.long
@pytest.mark.parametrize("part", range(50))
def test_none_of_a_thousand_forgeries_of_random_checkpoints_is_accepted(part: int, tmp_path: Path) -> None:
    made = attack_random(range(1000 + 55 * part, 1000 + 55 * (part + 1)), 20, tmp_path)
    assert made.total() >= 1000, made
