"""Whatever the rewrite makes of a random checkpoint, the proof accepts; two independent readings of the same rules.

Every checkpoint mixes formats, sides that are missing, diverged or scaled differently, scales that calibration never
reached, biases, KV scales and an unknown format, under random options. A refusal is an answer; a crash is none.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tierewrite
from tests.checkpoints import Tensor, read_tensors, write_checkpoint
from tierewrite.errors import Refused, TieFileError
from tierewrite.numbers import nvfp4

CANONICAL, ALIAS, THIRD = "dec.", "enc.", "mid."
LINEARS = [
    *(f"self_attn.{name}_proj" for name in "qkv"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.experts.0.down_proj", "mlp.experts.1.down_proj"),
]
FORMATS = ["nvfp4"] * 4 + ["fp8", "fp8", "compressed-tensors", "plain", "gptq", "unknown"]
ACTIVATION = {"nvfp4": "input_scale", "fp8": "input_scale", "compressed-tensors": "input_global_scale"}


def f32(value: float) -> Tensor:
    return "F32", [], struct.pack("<f", value)


def scale(rng: random.Random) -> Tensor:
    """A calibrated scale, one of the values that mean it is not, or a number of another dtype, also of one without
    a value.
    """
    value = rng.choice([*(rng.uniform(0.01, 5) for _ in range(3)), 1.0, 0.0, -1.0, float("nan"), float("inf"), 1e-42])
    data, shape = struct.pack("<f", value), rng.choice([[], [], [1]])
    other = rng.choice([None] * 8 + ["BF16", "BF16", "F16", "F64", "F8_E4M3", "F8_E8M0", "I8"])
    if other is None or other == "BF16":
        return (other, shape, data[2:]) if other else ("F32", shape, data)
    return other, shape, rng.randbytes({"F16": 2, "F64": 8}.get(other, 1))


def encoded(rng: random.Random, names: tuple[str, str, str]) -> dict[str, Tensor]:
    weight = np.random.default_rng(rng.randrange(2**32)).standard_normal((2, 32)).astype(np.float32)
    codes, scales, whole = nvfp4.encode(weight)
    if names[2] == "weight_global_scale":
        whole = np.float32(1) / np.float32(whole)
    return {
        names[0]: ("U8", list(codes.shape), codes.tobytes()),
        names[1]: ("F8_E4M3", list(scales.shape), scales.tobytes()),
        names[2]: f32(float(whole)),
    }


def linear(rng: random.Random, family: str) -> dict[str, Tensor]:
    """The weight-derived tensors of one linear."""
    if family == "nvfp4":
        return encoded(rng, ("weight", "weight_scale", "weight_scale_2"))
    if family == "compressed-tensors":
        return encoded(rng, ("weight_packed", "weight_scale", "weight_global_scale"))
    if family == "fp8":
        return {"weight": ("F8_E4M3", [2, 2], rng.randbytes(4)), "weight_scale": f32(rng.uniform(0.1, 1))}
    if family == "gptq":
        return {name: ("I32", [1], rng.randbytes(4)) for name in ("qweight", "qzeros", "scales", "g_idx")}
    if family == "unknown":
        return {"weight": ("BF16", [2], rng.randbytes(4)), "mystery": ("U8", [1], rng.randbytes(1))}
    return {"weight": ("BF16", [2, 2], rng.randbytes(8))}


def rescaled(rng: random.Random, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same NVFP4 weight under another scale of the whole."""
    names = list(tensors)
    codes, blocks = (np.frombuffer(tensors[n][2], np.uint8).reshape(tensors[n][1]) for n in names[:2])
    old = np.frombuffer(tensors[names[2]][2], "<f4")
    new = np.float32(old[0] * np.float32(rng.choice([2.5, 0.6])))
    again = nvfp4.repack(codes, blocks, old, new, reciprocal="global" in names[2])
    return {n: (*tensors[n][:2], data.tobytes()) for n, data in zip(names, (*again, new), strict=True)}


def sides(rng: random.Random, family: str, third: bool) -> Iterator[tuple[str, dict[str, Tensor]]]:
    base = linear(rng, family)
    present = rng.choice([(CANONICAL, ALIAS)] * 8 + [(CANONICAL,), (ALIAS,)])
    if third and rng.random() < 0.9:
        present = (*present, THIRD)
    for side in present:
        tensors = dict(base)
        if side != CANONICAL:
            if rng.random() < 0.08 and family in ("nvfp4", "compressed-tensors"):
                tensors = rescaled(rng, tensors)
            if rng.random() < 0.12:
                name = rng.choice(list(tensors))
                dtype, shape, data = tensors[name]
                tensors[name] = dtype, shape, bytes([data[0] ^ 1]) + data[1:]
            if rng.random() < 0.05:
                tensors.pop(rng.choice(list(tensors)))
        if family in ACTIVATION and rng.random() < 0.85:
            tensors[ACTIVATION[family]] = scale(rng)
        if rng.random() < 0.3:
            tensors["bias"] = "BF16", [2], rng.randbytes(4) if rng.random() < 0.5 else b"abcd"
        yield side, tensors


def checkpoint(rng: random.Random) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in random order, and the ties."""
    tensors: dict[str, Tensor] = {"other.weight": ("U8", [3], rng.randbytes(3))}
    ties: dict[str, str] = {}
    third = rng.random() < 0.3
    aliases = (ALIAS, THIRD) if third else (ALIAS,)
    linears = [f"layers.{layer}.{name}" for layer in range(rng.randint(1, 2)) for name in LINEARS]
    for module in [*linears, "embed", "norm"]:
        for side, found in sides(rng, rng.choice(FORMATS) if module in linears else "plain", third):
            tensors.update({f"{side}{module}.{name}": tensor for name, tensor in found.items()})
        for alias in aliases:
            if rng.random() < 0.85:
                ties[f"{alias}{module}.weight"] = f"{CANONICAL}{module}.weight"
                if rng.random() < 0.2:
                    ties[f"{alias}{module}.bias"] = f"{CANONICAL}{module}.bias"
    for attention in (f"{side}layers.{layer}.self_attn." for side in (CANONICAL, *aliases) for layer in range(2)):
        for word in "kv" if rng.random() < 0.5 else "":
            if rng.random() < 0.9:
                tensors[f"{attention}{word}_proj.{word}_scale"] = scale(rng)
            if rng.random() < 0.1:
                tensors[f"{attention}{word}_proj.{word}_bias"] = f32(rng.choice([0.0, 1.0]))
    if rng.random() < 0.4 and "dec.embed.weight" in tensors:
        tensors["head.weight"] = tensors["dec.embed.weight"]
        ties["head.weight"] = "dec.embed.weight"
    names = list(tensors)
    rng.shuffle(names)
    return {name: tensors[name] for name in names}, ties


SPLIT: list[int] = []
"""Seeds of checkpoints of which a group kept the aliases that differ, and dropped others."""


def attempt(seed: int, folder: Path) -> str:
    """Rewrite one random checkpoint and prove it; returns what became of it."""
    rng = random.Random(seed)
    tensors, ties = checkpoint(rng)
    src = write_checkpoint(folder / f"src{seed}", tensors, config={}, shards=rng.choice([1, 1, 2, 3]))
    ties_file = folder / f"ties{seed}.json"
    ties_file.write_text(json.dumps(ties))
    options: dict[str, Any] = {
        "on_mismatch": rng.choice(["keep", "keep", "repack", "error"]),
        "kv_scales": rng.choice(["keep", "merge"]),
        "unify_fused_scales": rng.random() < 0.3,
        "fill_missing_scales": rng.random() < 0.3,
        "manifest": rng.random() < 0.6,
        "max_shard_size": rng.choice([None, None, 100]),
    }
    options["digests"] = options["manifest"] and rng.random() < 0.5
    dst = folder / f"dst{seed}"
    try:
        tierewrite.rewrite(src, dst, ties=ties_file, **options)
    except (Refused, TieFileError) as e:
        assert not dst.exists()
        return type(e).__name__
    decisive = {name: value for name, value in options.items() if name not in ("manifest", "digests")}
    result = tierewrite.verify(src, dst, ties=ties_file, **decisive)
    if options["manifest"] and "differing_aliases" in (dst / "tierewrite.json").read_text():
        SPLIT.append(seed)
    assert result.problems == (), f"seed {seed}, {options}"
    alone = tierewrite.verify_integrity(dst)
    assert alone.ok is options["manifest"], f"seed {seed}, {options}"
    assert not options["digests"] or alone.digests == alone.tensors == len(read_tensors(dst))
    changed = result.dropped or result.renamed or result.merged or result.repacked
    return "rewritten" if changed else "kept"


def test_whatever_the_rewrite_makes_of_a_random_checkpoint_is_proved(tmp_path: Path) -> None:
    outcomes = Counter(attempt(seed, tmp_path) for seed in range(80))
    assert outcomes["rewritten"] > 20, outcomes
    assert outcomes["Refused"] > 5, outcomes
    assert SPLIT


@pytest.mark.long
def test_whatever_the_rewrite_makes_of_many_random_checkpoints_is_proved(tmp_path: Path) -> None:
    count = int(os.environ.get("TIEREWRITE_RANDOM_CHECKPOINTS", "3000"))
    print(Counter(attempt(seed, tmp_path) for seed in range(1_000, 1_000 + count)))
