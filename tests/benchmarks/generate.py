"""Makes naive NVFP4 DiffusionGemma checkpoints of any scale, as ModelOpt's exporter writes them.

What comes out has the keys, dtypes, shapes, order and configuration files of ModelOpt 0.45's
`nvfp4_experts_only` export (fixtures/dg_nvfp4_experts_only is a real one): the experts under both names of
their tie, byte-identical but for `input_scale`; norms, attention, router, dense MLP and embedding under the
encoder's (the alias's) name only; `layer_scalar` under both names with different values; no
`lm_head.weight`. Every preset's config.json builds with transformers' `DiffusionGemmaForBlockDiffusion`.

The payload is random (PCG64, seeded per tensor, so a tensor is the same whatever is written beside it),
never zeros: file systems and copies treat zeros specially. Packed codes are any bytes, block scales
positive finite E4M3, BF16 values finite and below 2, scalars positive finite. Nothing is ever held beyond a
few chunks: a checkpoint of any size needs the same memory.

Refused: sizes that NVFP4 cannot hold (an axis that is no multiple of 16).

    python -m tests.benchmarks.generate DST --preset 2gb-6000
    python -m tests.benchmarks.generate DST --layers 2 --experts 64 --hidden 1024

Library: `generate(path, "2gb-6000") -> Generated`; for any other size a `Recipe` instead of the name.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import struct
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TEMPLATE = Path(__file__).resolve().parents[2] / "fixtures" / "dg_nvfp4_experts_only" / "naive"
ALIAS = "model.encoder.language_model."
CANONICAL = "model.decoder."
CHUNK = 8 << 20
"""Bytes made and written at a time; two more chunks than threads exist at once."""
BLOCK = 16
"""NVFP4: weights that share one scale, along the last axis."""
FULL_ATTENTION_EVERY = 6
"""Gemma's pattern: five sliding layers, then a full one; the last layer is always full."""

WIDTH = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}
ORDER = {"F32": 0, "BF16": 1, "F8_E4M3": 2, "U8": 3}
"""safetensors lays tensors out by descending alignment of their dtype, then by name."""


@dataclass(frozen=True)
class Recipe:
    """Sizes of a checkpoint; the defaults are DiffusionGemma 26B-A4B's, with two of its thirty layers."""

    layers: int = 2
    experts: int = 128
    hidden: int = 2816
    moe_intermediate: int = 704
    intermediate: int = 2112
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 256
    global_kv_heads: int = 2
    global_head_dim: int = 512
    vocabulary: int = 262_144
    vision_hidden: int = 32
    max_shard_bytes: int = 10_000_000_000
    dense_on_both_sides: bool = False
    """Also write the unquantized tied tensors under both names."""
    headers_only: bool = False
    """Leave the data a hole in the file: for what reads headers alone."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "moe_intermediate"):
            if getattr(self, name) % BLOCK:
                raise ValueError(f"{name} = {getattr(self, name)} is no multiple of {BLOCK}, as NVFP4 needs")
        for name in ("layers", "experts", "vocabulary", "hidden", "moe_intermediate", "intermediate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")

    @property
    def layer_types(self) -> list[str]:
        kinds = [
            "sliding_attention" if (layer + 1) % FULL_ATTENTION_EVERY else "full_attention"
            for layer in range(self.layers)
        ]
        kinds[-1] = "full_attention"
        return kinds


_SMALL = Recipe(
    hidden=64, moe_intermediate=32, intermediate=64, heads=2, kv_heads=1, head_dim=32, global_kv_heads=1,
    global_head_dim=64, vocabulary=512,
)  # fmt: skip

PRESETS: dict[str, Recipe] = {
    # a few MB, several shards: what the tests run on
    "tiny": dataclasses.replace(_SMALL, experts=8, hidden=256, moe_intermediate=128, max_shard_bytes=1_000_000),
    "tiny-10x": dataclasses.replace(_SMALL, experts=80, hidden=256, moe_intermediate=16),
    "tiny-plan": dataclasses.replace(_SMALL, experts=40, max_shard_bytes=1 << 62, headers_only=True),
    # the two-layer 26B-A4B shape with a small vocabulary: 1.86 GiB
    "1.8gb": Recipe(vocabulary=1024),
    # the same with the vocabulary that makes it 2.06 GB, 6,207 tensors
    "2gb-6000": Recipe(vocabulary=12_288),
    # the two-layer shape with the real vocabulary: 3.2 GiB
    "2-layer": Recipe(),
    # by size, tensors of their real size
    "0.5gb": Recipe(experts=20, vocabulary=1024),
    "1gb": Recipe(experts=57, vocabulary=1024),
    "2gb": Recipe(experts=132, vocabulary=1024),
    "4gb": Recipe(experts=281, vocabulary=1024),
    # the same bytes in 1 and in 10 times the tensors (tensors a tenth of the size)
    "many-1x": Recipe(experts=128, moe_intermediate=640, vocabulary=1024),
    "many-10x": Recipe(experts=1280, moe_intermediate=64, vocabulary=1024),
    # the real thing: 26B-A4B, experts only
    "full": Recipe(layers=30),
    # more than 500,000 tensors (575,456), a header of 77 MB, no data
    "plan-500k": Recipe(layers=65, experts=368, vocabulary=262_144, max_shard_bytes=1 << 62, headers_only=True),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor to write. `content` names what its bytes are: tensors of one content have equal bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: str

    @property
    def nbytes(self) -> int:
        return WIDTH[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class Generated:
    """What was written, and what a rewrite must leave of it."""

    path: Path
    ties_file: Path
    recipe: Recipe
    shards: int
    tensors: int
    data_bytes: int
    header_bytes: int
    canonical_tensors: int
    """Tensors that remain when every tie is stored once."""
    canonical_bytes: int
    """Tensor bytes that remain."""
    largest_tensor: int
    seconds: float


def tensors(recipe: Recipe) -> Iterator[Tensor]:
    """Every tensor of the naive checkpoint, in the order of the model's state dict (encoder first)."""
    r = recipe
    yield _dense(ALIAS + "embed_tokens.weight", r.vocabulary, r.hidden)
    yield from _layers(r, ALIAS)
    yield _dense(ALIAS + "norm.weight", r.hidden)
    yield from _vision(r)
    if r.dense_on_both_sides:
        yield _dense(CANONICAL + "embed_tokens.weight", r.vocabulary, r.hidden)
    yield from _layers(r, CANONICAL)
    if r.dense_on_both_sides:
        yield _dense(CANONICAL + "norm.weight", r.hidden)
    yield _dense(CANONICAL + "self_conditioning.pre_norm.weight", r.hidden)
    yield from _gated_mlp(CANONICAL + "self_conditioning.", r.hidden, r.intermediate)


def _dense(name: str, *shape: int) -> Tensor:
    return Tensor(name, "BF16", shape, _canonical(name))


def _canonical(name: str) -> str:
    return CANONICAL + name[len(ALIAS) :] if name.startswith(ALIAS) else name


def _gated_mlp(prefix: str, hidden: int, intermediate: int, suffix: str = "weight") -> Iterator[Tensor]:
    yield _dense(f"{prefix}gate_proj.{suffix}", intermediate, hidden)
    yield _dense(f"{prefix}up_proj.{suffix}", intermediate, hidden)
    yield _dense(f"{prefix}down_proj.{suffix}", hidden, intermediate)


def _layers(r: Recipe, side: str) -> Iterator[Tensor]:
    for layer, kind in enumerate(r.layer_types):
        prefix = f"{side}layers.{layer}."
        # a buffer that is not tied: its value is the side's own
        yield Tensor(prefix + "layer_scalar", "BF16", (1,), prefix + "layer_scalar")
        if side == ALIAS or r.dense_on_both_sides:
            yield from _dense_layer(r, prefix, sliding=kind == "sliding_attention")
        for expert in range(r.experts):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                yield from _quantized(r, f"{prefix}experts.{expert}.", projection)


def _dense_layer(r: Recipe, prefix: str, *, sliding: bool) -> Iterator[Tensor]:
    head = r.head_dim if sliding else r.global_head_dim
    key_heads = r.kv_heads if sliding else r.global_kv_heads
    attention = prefix + "self_attn."
    yield _dense(attention + "q_proj.weight", r.heads * head, r.hidden)
    yield _dense(attention + "k_proj.weight", key_heads * head, r.hidden)
    if sliding:  # full-attention layers use the keys as values and have no v_proj
        yield _dense(attention + "v_proj.weight", key_heads * head, r.hidden)
    yield _dense(attention + "o_proj.weight", r.hidden, r.heads * head)
    yield _dense(attention + "q_norm.weight", head)
    yield _dense(attention + "k_norm.weight", head)
    yield from _gated_mlp(prefix + "mlp.", r.hidden, r.intermediate)
    for norm in (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
        "post_feedforward_layernorm_1",
        "post_feedforward_layernorm_2",
        "pre_feedforward_layernorm_2",
    ):
        yield _dense(f"{prefix}{norm}.weight", r.hidden)
    yield _dense(prefix + "router.scale", r.hidden)
    yield _dense(prefix + "router.per_expert_scale", r.experts)
    yield _dense(prefix + "router.proj.weight", r.experts, r.hidden)


def _quantized(r: Recipe, expert: str, projection: str) -> Iterator[Tensor]:
    out, inner = (r.hidden, r.moe_intermediate) if projection == "down_proj" else (r.moe_intermediate, r.hidden)
    module = f"{expert}{projection}."
    content = _canonical(module)
    # gate and up share their input and, as consumers fuse them, their second scale
    fused = expert + ("down_proj." if projection == "down_proj" else "gate_proj.")
    yield Tensor(module + "weight", "U8", (out, inner // 2), content + "weight")
    yield Tensor(module + "weight_scale", "F8_E4M3", (out, inner // BLOCK), content + "weight_scale")
    yield Tensor(module + "weight_scale_2", "F32", (), _canonical(fused) + "weight_scale_2")
    yield Tensor(module + "input_scale", "F32", (), fused + "input_scale")  # calibrated per side


def _vision(r: Recipe) -> Iterator[Tensor]:
    """A vision tower of one small layer, which no tie concerns (sizes: `config`)."""
    h, head = r.vision_hidden, 16
    tower = "model.encoder.vision_tower."
    yield _dense(tower + "patch_embedder.input_proj.weight", h, 3 * 16 * 16)
    yield _dense(tower + "patch_embedder.position_embedding_table", 2, 16, h)
    layer = tower + "encoder.layers.0."
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield _dense(f"{layer}self_attn.{projection}.linear.weight", h, h)
    yield _dense(layer + "self_attn.q_norm.weight", head)
    yield _dense(layer + "self_attn.k_norm.weight", head)
    yield from _gated_mlp(layer + "mlp.", h, h, "linear.weight")
    for norm in (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ):
        yield _dense(f"{layer}{norm}.weight", h)
    yield _dense("model.encoder.embed_vision.embedding_projection.weight", r.hidden, h)


def config(recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and hf_quant_config.json: the real exporter's, with this recipe's sizes."""
    r = recipe
    main = json.loads((TEMPLATE / "config.json").read_text())
    quant = json.loads((TEMPLATE / "hf_quant_config.json").read_text())
    main["text_config"].update(
        hidden_size=r.hidden,
        intermediate_size=r.intermediate,
        moe_intermediate_size=r.moe_intermediate,
        num_attention_heads=r.heads,
        num_key_value_heads=r.kv_heads,
        head_dim=r.head_dim,
        num_experts=r.experts,
        top_k_experts=min(8, r.experts),
        num_hidden_layers=r.layers,
        layer_types=r.layer_types,
        per_layer_config={
            str(layer): {"head_dim": r.global_head_dim, "num_key_value_heads": r.global_kv_heads}
            for layer, kind in enumerate(r.layer_types)
            if kind == "full_attention"
        },
        vocab_size=r.vocabulary,
    )
    main["vision_config"].update(
        hidden_size=r.vision_hidden, intermediate_size=r.vision_hidden, num_attention_heads=r.vision_hidden // 16,
        num_key_value_heads=r.vision_hidden // 16,
    )  # fmt: skip
    unquantized = sorted(
        ["lm_head", "model.decoder.self_conditioning*", "model.encoder.embed_vision*", "model.encoder.vision_tower*"]
        + [
            f"{side}layers.{layer}.{part}*"
            for side in (ALIAS, CANONICAL)
            for layer in range(r.layers)
            for part in ("mlp", "router", "self_attn")
        ]
    )
    main["quantization_config"]["ignore"] = unquantized
    quant["quantization"]["exclude_modules"] = unquantized
    return main, quant


def ties() -> dict[str, str]:
    """The ties of `DiffusionGemmaForBlockDiffusion`, as its classes declare them and with full names."""
    deep = r"(?:[^.]+\.)*"
    layered = ("weight", "scale", "per_expert_scale", "gate_up_proj", "down_proj")
    return {
        "lm_head.weight": CANONICAL + "embed_tokens.weight",
        ALIAS + "embed_tokens.weight": CANONICAL + "embed_tokens.weight",
        ALIAS + "norm.weight": CANONICAL + "norm.weight",
        **{rf"{ALIAS}layers\.{deep}{leaf}": rf"{CANONICAL}layers\.{deep}{leaf}" for leaf in layered},
    }


def generate(
    path: str | os.PathLike[str],
    recipe: Recipe | str = "2gb-6000",
    *,
    ties_file: str | os.PathLike[str] | None = None,
    threads: int | None = None,
) -> Generated:
    """Write the checkpoint into the new or empty folder `path`, and its ties to `ties_file`.

    `ties_file` defaults to `<path>.ties.json`, beside the folder: it is no part of the checkpoint. The same
    recipe gives the same bytes with any number of threads. Nothing is flushed to the disk.
    """
    started = time.perf_counter()
    recipe = PRESETS[recipe] if isinstance(recipe, str) else recipe
    root = Path(path)
    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()):
        raise FileExistsError(f"{root} is not empty")
    ties_path = Path(ties_file) if ties_file is not None else root.with_name(root.name + ".ties.json")
    ties_path.write_text(json.dumps(ties(), indent=2) + "\n")
    for name, content in zip(("config.json", "hf_quant_config.json"), config(recipe), strict=True):
        (root / name).write_text(json.dumps(content, indent=4) + "\n")
    (root / "generation_config.json").write_bytes((TEMPLATE / "generation_config.json").read_bytes())

    shards = list(_shards(tensors(recipe), recipe.max_shard_bytes))
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    header_bytes = 0
    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        for name, shard in zip(names, shards, strict=True):
            header_bytes += _write_shard(root / name, shard, recipe, pool)
    everything = [tensor for shard in shards for tensor in shard]
    data_bytes = sum(tensor.nbytes for tensor in everything)
    if len(shards) > 1:
        weight_map = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        index = {"metadata": {"total_size": data_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (root / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    # an untied per-side buffer is kept on both sides; every other name collapses onto the canonical one
    kept = {t.name if t.name.endswith("layer_scalar") else _canonical(t.name): t.nbytes for t in everything}
    return Generated(
        path=root,
        ties_file=ties_path,
        recipe=recipe,
        shards=len(shards),
        tensors=len(everything),
        data_bytes=data_bytes,
        header_bytes=header_bytes,
        canonical_tensors=len(kept),
        canonical_bytes=sum(kept.values()),
        largest_tensor=max(tensor.nbytes for tensor in everything),
        seconds=time.perf_counter() - started,
    )


def _shards(source: Iterable[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Greedy in state-dict order, as huggingface_hub does it; within a shard in safetensors' order."""
    shard: list[Tensor] = []
    size = 0
    for tensor in source:
        if shard and size + tensor.nbytes > limit:
            yield sorted(shard, key=lambda t: (ORDER[t.dtype], t.name))
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.nbytes
    yield sorted(shard, key=lambda t: (ORDER[t.dtype], t.name))


def _write_shard(path: Path, shard: list[Tensor], recipe: Recipe, pool: ThreadPoolExecutor) -> int:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (offset, offset + tensor.nbytes),
        }
        offset += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb", buffering=0) as file:
        _write(file.fileno(), struct.pack("<Q", len(header)) + header)
        if recipe.headers_only:
            file.truncate(8 + len(header) + offset)
            return 8 + len(header)
        waiting: deque[Future[list[bytes | memoryview]]] = deque()
        limit = pool._max_workers + 2
        for pieces in _pieces(shard):
            waiting.append(pool.submit(_fill, pieces, recipe.seed))
            if len(waiting) >= limit:
                _write(file.fileno(), *waiting.popleft().result())
        while waiting:
            _write(file.fileno(), *waiting.popleft().result())
    return 8 + len(header)


Piece = tuple[Tensor, int, int]
"""A tensor and the range of its bytes."""


def _pieces(shard: list[Tensor]) -> Iterator[list[Piece]]:
    """The shard's bytes in order, in runs of at most CHUNK bytes (or a few more of small tensors)."""
    run: list[Piece] = []
    size = 0
    for tensor in shard:
        for start in range(0, tensor.nbytes, CHUNK):
            stop = min(start + CHUNK, tensor.nbytes)
            run.append((tensor, start, stop))
            size += stop - start
            if size >= CHUNK // 2:
                yield run
                run, size = [], 0
    if run:
        yield run


def _fill(pieces: list[Piece], seed: int) -> list[bytes | memoryview]:
    made: list[bytes | memoryview] = []
    for tensor, start, stop in pieces:
        if tensor.dtype == "F32" or tensor.name.endswith("layer_scalar"):
            made.append(_scalar(tensor, seed))
        else:
            made.append(_random(tensor, start, stop, seed).data)
    return made


def _hash(seed: int, content: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {content}".encode(), digest_size=16).digest(), "little")


def _random(tensor: Tensor, start: int, stop: int, seed: int) -> np.ndarray[Any, Any]:
    """Bytes start..stop of the tensor's random content; `start` is a multiple of CHUNK."""
    generator = np.random.PCG64(np.random.SeedSequence(_hash(seed, tensor.content)))
    words = np.asarray(generator.advance(start // 8).random_raw(-(-(stop - start) // 8)))
    if tensor.dtype == "BF16":
        words &= np.uint64(0xBFFF_BFFF_BFFF_BFFF)  # the exponent's top bit: finite, below 2
    elif tensor.dtype == "F8_E4M3":
        words &= np.uint64(0x3F3F_3F3F_3F3F_3F3F)
        words += np.uint64(0x2020_2020_2020_2020)  # 0x20..0x5f: positive, normal, finite
    return words.view(np.uint8)[: stop - start]


def _scalar(tensor: Tensor, seed: int) -> bytes:
    """A positive scale, log-uniform; `input_scale` differs between the sides by a factor of up to 4."""
    uniform = (_hash(seed, tensor.content) & 0xFFFF_FFFF) / 2**32
    if tensor.dtype == "BF16":
        return struct.pack("<f", 0.5 + uniform / 2)[2:]
    if tensor.name.endswith("input_scale"):
        shared = (_hash(seed, "shared " + _canonical(tensor.content)) & 0xFFFF_FFFF) / 2**32
        return struct.pack("<f", 1e-5 * 100**shared * 2 ** (2 * uniform - 1))
    return struct.pack("<f", 1e-5 * 100**uniform)


def _write(fd: int, *buffers: bytes | memoryview) -> None:
    for data in buffers:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make a naive NVFP4 DiffusionGemma checkpoint of any scale.")
    parser.add_argument("dst", type=Path, help="new or empty folder")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="start from this one (default: the two-layer shape)")
    parser.add_argument("--ties-file", type=Path, help="where the ties go (default: DST.ties.json)")
    parser.add_argument("--threads", type=int)
    for field in dataclasses.fields(Recipe):
        option = "--" + field.name.replace("_", "-")
        if field.type == "bool":
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=None)
        else:
            parser.add_argument(option, type=int)
    arguments = vars(parser.parse_args(argv))
    recipe = PRESETS[arguments["preset"]] if arguments["preset"] else Recipe()
    changes = {f.name: arguments[f.name] for f in dataclasses.fields(Recipe) if arguments[f.name] is not None}
    made = generate(
        arguments["dst"],
        dataclasses.replace(recipe, **changes),
        ties_file=arguments["ties_file"],
        threads=arguments["threads"],
    )
    rate = "" if recipe.headers_only else f", {made.data_bytes / made.seconds / 1e9:.2f} GB/s"
    print(
        f"{made.path}: {made.tensors:,} tensors, {made.data_bytes / 2**30:.2f} GiB ({made.data_bytes:,} bytes) in "
        f"{made.shards} shard(s), headers {made.header_bytes / 1e6:.1f} MB; {made.seconds:.1f} s{rate}\n"
        f"canonical: {made.canonical_tensors:,} tensors, {made.canonical_bytes / 2**30:.2f} GiB; ties: {made.ties_file}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
