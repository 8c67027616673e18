"""Defective variants of good checkpoints: one defect each, with the finding that names it.

A good checkpoint is a rewritten one whose sides agree wherever vLLM's single backbone reads both (`good`).
Every `Defect` edits a copy of one (`Defect.make`). What vLLM itself does with each of them is recorded in
vllm_behaviour.json beside this file; tests/test_vllm_loader.py records it again and compares. `CONTROLS` are
edits that look suspicious and that vLLM loads right: no finding of severity error may be made of them.

Nothing here needs torch: folders are edited as headers and bytes.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.checkpoints import read_shard, write_shard

DECODER = "model.decoder."
ENCODER = "model.encoder.language_model."
INDEX = "model.safetensors.index.json"
# Bits an element; only the dtypes that the fixtures and the defects use.
BITS = {"F64": 64, "F32": 32, "BF16": 16, "F16": 16, "F8_E4M3": 8, "U8": 8, "I8": 8, "I32": 32, "I64": 64}
# What vLLM's sampler for DiffusionGemma asks of generation_config.json; the values are the model's own.
GENERATION = {
    "max_denoising_steps": 48,
    "t_min": 0.4,
    "t_max": 0.8,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
}


@dataclass(frozen=True, slots=True)
class Raw:
    """One tensor as safetensors stores it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def __post_init__(self) -> None:
        assert len(self.data) * 8 == math.prod(self.shape) * BITS[self.dtype], (self.dtype, self.shape)


def f32(value: float, shape: tuple[int, ...] = ()) -> Raw:
    return Raw("F32", shape, struct.pack("<f", value) * math.prod(shape))


def bf16(value: float, shape: tuple[int, ...]) -> Raw:
    return Raw("BF16", shape, struct.pack("<f", value)[2:] * math.prod(shape))


@dataclass
class Draft:
    """A checkpoint folder in memory, to be edited: shards of raw tensors, and its JSON files."""

    shards: dict[str, dict[str, Raw]]
    config: dict[str, Any]
    hf_quant: dict[str, Any] | None
    generation: dict[str, Any] | None
    index: dict[str, Any] | None
    extra: dict[str, bytes] = field(default_factory=dict)
    index_follows: bool = True

    @classmethod
    def read(cls, folder: Path) -> Draft:
        def load(name: str) -> Any:
            path = folder / name
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

        shards: dict[str, dict[str, Raw]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors, _ = read_shard(path)
            shards[path.name] = {n: Raw(t.dtype, tuple(t.shape), t.data) for n, t in tensors.items()}
        return cls(shards, load("config.json"), load("hf_quant_config.json"),
                   load("generation_config.json"), load(INDEX))  # fmt: skip

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        for shard, tensors in self.shards.items():
            write_shard(folder / shard, {n: (t.dtype, t.shape, t.data) for n, t in tensors.items()}, {"format": "pt"})
        if self.index is not None and self.index_follows:
            self.index["weight_map"] = {n: shard for shard, ts in self.shards.items() for n in sorted(ts)}
        files = {"config.json": self.config, "hf_quant_config.json": self.hf_quant,
                 "generation_config.json": self.generation, INDEX: self.index}  # fmt: skip
        for name, content in files.items():
            if content is not None:
                (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
        for name, data in self.extra.items():
            (folder / name).write_bytes(data)

    def names(self) -> list[str]:
        return [n for tensors in self.shards.values() for n in tensors]

    def home(self, name: str) -> dict[str, Raw]:
        """The shard that holds the tensor."""
        return next(tensors for tensors in self.shards.values() if name in tensors)

    def __getitem__(self, name: str) -> Raw:
        return self.home(name)[name]

    def __setitem__(self, name: str, value: Raw) -> None:
        """Replace the tensor where it is; a new one goes into the last shard."""
        held = [tensors for tensors in self.shards.values() if name in tensors]
        (held[0] if held else list(self.shards.values())[-1])[name] = value

    def drop(self, *parts: str) -> None:
        """Remove tensors by name, or all below a part that ends in a dot; each must match something."""
        for part in parts:
            found = [n for n in self.names() if n == part or (part.endswith(".") and n.startswith(part))]
            assert found, part
            for name in found:
                del self.home(name)[name]

    def double(self, module: str) -> None:
        """Store the decoder's module under the encoder's name too, byte for byte."""
        for name in self.names():
            if name.startswith(f"{DECODER}{module}"):
                self[ENCODER + name.removeprefix(DECODER)] = self[name]

    @property
    def quantization(self) -> dict[str, Any]:
        found: dict[str, Any] = self.config["quantization_config"]
        return found

    def ignore(self, *patterns: str) -> None:
        """Add patterns to the ignore list of both quantization configs."""
        self.quantization["ignore"] = [*self.quantization["ignore"], *patterns]
        if self.hf_quant is not None:
            entry = self.hf_quant["quantization"]
            entry["exclude_modules"] = [*entry["exclude_modules"], *patterns]

    def unignore(self, *parts: str) -> None:
        """Remove the patterns that contain one of `parts` from both quantization configs."""

        def kept(patterns: list[str]) -> list[str]:
            left = [p for p in patterns if not any(part in p for part in parts)]
            assert len(left) < len(patterns), parts
            return left

        self.quantization["ignore"] = kept(self.quantization["ignore"])
        if self.hf_quant is not None:
            entry = self.hf_quant["quantization"]
            entry["exclude_modules"] = kept(entry["exclude_modules"])

    def unquantize(self, module: str, value: float = 0.01) -> None:
        """Make the NVFP4 or FP8 modules below `module` plain BF16 ones (of constant weight)."""
        for name in [n for n in self.names() if n.startswith(module) and n.endswith(".weight_scale")]:
            stem = name.removesuffix("_scale")
            rows, columns = self[stem].shape
            wide = columns * 2 if self[stem].dtype == "U8" else columns
            self[stem] = bf16(value, (rows, wide))
            for companion in ("weight_scale", "weight_scale_2", "input_scale"):
                full = f"{stem.removesuffix('weight')}{companion}"
                if full in self.names():
                    self.drop(full)


def good(source: Path, target: Path) -> None:
    """Make `target`, a checkpoint that vLLM loads right, of `source`, a rewritten one.

    What no rewrite can decide is decided here: the encoder's `layer_scalar` becomes the decoder's, KV scales
    that the sides share are merged (the larger one, under the decoder's name), and generation_config.json gets
    the values that vLLM's sampler needs.
    """
    draft = Draft.read(source)
    for name in draft.names():
        twin = DECODER + name.removeprefix(ENCODER)
        if name.startswith(ENCODER) and name.endswith(".layer_scalar"):
            draft[name] = draft[twin]
        elif name.startswith(ENCODER) and name.endswith((".k_scale", ".v_scale")):
            draft[twin] = max(draft[twin], draft[name], key=lambda t: struct.unpack("<f", t.data))
            draft.drop(name)
    draft.generation = {**(draft.generation or {}), **GENERATION}
    draft.write(target)


@dataclass(frozen=True, slots=True)
class Defect:
    """One edit of a good checkpoint.

    Attributes:
        name: unique; the folder's name.
        base: the fixture whose good checkpoint is edited.
        finding: the id that `check(..., "vllm")` must report; None for a control.
        severity: "error" or "warning"; None for a control.
        edit: changes a Draft in place.
        fixed: `rewrite --for vllm` makes it load clean (with the options in `fix_options`).
    """

    name: str
    base: str
    finding: str | None
    severity: str | None
    edit: Callable[[Draft], None]
    fixed: bool = False
    fix_options: dict[str, Any] = field(default_factory=dict)

    def make(self, source: Path, target: Path) -> None:
        """Write the variant of the good checkpoint `source` to the new folder `target`."""
        draft = Draft.read(source)
        self.edit(draft)
        draft.write(target)
        for path in source.iterdir():  # whatever else the folder holds
            known = (*draft.shards, "config.json", "hf_quant_config.json", "generation_config.json", INDEX)
            if path.name not in known and path.suffix != ".safetensors" and not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)


DEFECTS: list[Defect] = []
CONTROLS: list[Defect] = []


def defect(
    finding: str, severity: str = "error", base: str = "dg_nvfp4", fixed: bool = False, **fix_options: Any
) -> Callable[[Callable[[Draft], None]], Callable[[Draft], None]]:
    def register(edit: Callable[[Draft], None]) -> Callable[[Draft], None]:
        name = edit.__name__.replace("_", "-")
        DEFECTS.append(Defect(name, base, finding, severity, edit, fixed, fix_options))
        return edit

    return register


def control(base: str = "dg_nvfp4") -> Callable[[Callable[[Draft], None]], Callable[[Draft], None]]:
    def register(edit: Callable[[Draft], None]) -> Callable[[Draft], None]:
        CONTROLS.append(Defect(edit.__name__.replace("_", "-"), base, None, None, edit))
        return edit

    return register


# --- names that meet in one parameter ----------------------------------------------------------------------


@defect("name-conflict", fixed=True)
def alias_input_scale_differs(d: Draft) -> None:
    d.double("layers.0.mlp.down_proj.")
    d[f"{ENCODER}layers.0.mlp.down_proj.input_scale"] = f32(9.0)


@defect("name-conflict")
def alias_packed_weight_differs(d: Draft) -> None:
    d.double("layers.0.mlp.down_proj.")
    t = d[f"{DECODER}layers.0.mlp.down_proj.weight"]
    d[f"{ENCODER}layers.0.mlp.down_proj.weight"] = Raw(t.dtype, t.shape, bytes([t.data[0] ^ 1]) + t.data[1:])


@defect("name-conflict")
def alias_norm_differs(d: Draft) -> None:
    d[f"{ENCODER}layers.1.input_layernorm.weight"] = bf16(0.5, (64,))


@defect("name-conflict")
def alias_only_of_other_dtype(d: Draft) -> None:
    d[f"{ENCODER}layers.0.self_attn.o_proj.weight"] = bf16(0.5, (64, 64))


@defect("duplicate-names", "warning", fixed=True)
def alias_module_stored_twice_and_equal(d: Draft) -> None:
    d.double("layers.0.mlp.down_proj.")


@defect("per-side-conflict")
def layer_scalar_differs(d: Draft) -> None:
    d[f"{ENCODER}layers.1.layer_scalar"] = bf16(0.25, (1,))


@defect("per-side-conflict", base="dg_nvfp4_kvfp8", fixed=True)
def kv_scales_of_the_sides_differ(d: Draft) -> None:
    d[f"{ENCODER}layers.0.self_attn.k_proj.k_scale"] = f32(3.0)


@defect("duplicate-key", base="dg_nvfp4_sharded")
def two_files_hold_one_key_with_other_values(d: Draft) -> None:
    d.index = None
    name = f"{DECODER}layers.0.mlp.down_proj.input_scale"
    list(d.shards.values())[-1][name] = f32(7.0)
    next(iter(d.shards.values()))[name] = f32(8.0)


# --- parameters that no key fills --------------------------------------------------------------------------


@defect("parameter-missing")
def expert_down_weight_missing(d: Draft) -> None:
    d.drop(f"{DECODER}layers.0.experts.2.down_proj.weight")


@defect("expert-missing")
def one_expert_dropped(d: Draft) -> None:
    d.drop(f"{DECODER}layers.1.experts.3.")


@defect("fused-shard-missing")
def expert_gate_dropped(d: Draft) -> None:
    d.drop(f"{DECODER}layers.1.experts.0.gate_proj.")


@defect("parameter-missing")
def embedding_missing(d: Draft) -> None:
    d.drop(f"{DECODER}embed_tokens.weight")


@defect("fused-shard-missing")
def q_proj_missing(d: Draft) -> None:
    d.drop(f"{DECODER}layers.0.self_attn.q_proj.")


@defect("fused-shard-missing")
def v_proj_of_a_sliding_layer_missing(d: Draft) -> None:
    d.drop(f"{DECODER}layers.0.self_attn.v_proj.")


@defect("fused-shard-missing")
def dense_up_proj_missing(d: Draft) -> None:
    d.drop(f"{DECODER}layers.1.mlp.up_proj.")


@defect("parameter-missing")
def norm_missing(d: Draft) -> None:
    d.drop(f"{DECODER}norm.weight")


@defect("parameter-missing")
def layer_scalar_missing_on_both_sides(d: Draft) -> None:
    d.drop(f"{DECODER}layers.0.layer_scalar", f"{ENCODER}layers.0.layer_scalar")


@defect("parameter-missing")
def router_scale_missing(d: Draft) -> None:
    d.drop(f"{DECODER}layers.0.router.per_expert_scale")


@defect("parameter-missing")
def self_conditioning_missing(d: Draft) -> None:
    d.drop(f"{DECODER}self_conditioning.down_proj.weight")


@defect("parameter-missing")
def vision_weight_missing(d: Draft) -> None:
    d.drop("model.encoder.vision_tower.patch_embedder.input_proj.weight")


@defect("parameter-missing")
def untied_but_lm_head_missing(d: Draft) -> None:
    d.config["tie_word_embeddings"] = False
    d.config["text_config"]["tie_word_embeddings"] = False


@defect("parameter-missing")
def whole_layer_missing(d: Draft) -> None:
    d.drop(f"{DECODER}layers.1.", f"{ENCODER}layers.1.")


# --- scales that are missing or invalid --------------------------------------------------------------------


@defect("scale-missing", fixed=True, fill_missing_scales=True)
def expert_input_scale_missing(d: Draft) -> None:
    d.drop(f"{DECODER}layers.0.experts.1.up_proj.input_scale")


@defect("scale-missing")
def dense_input_scale_missing(d: Draft) -> None:
    d.drop(f"{DECODER}layers.0.self_attn.o_proj.input_scale")


@defect("scale-missing")
def dense_weight_scale_missing(d: Draft) -> None:
    d.drop(f"{DECODER}layers.0.mlp.down_proj.weight_scale")


@defect("scale-missing")
def expert_weight_scale_missing(d: Draft) -> None:
    d.drop(f"{DECODER}layers.0.experts.0.gate_proj.weight_scale")


@defect("scale-missing")
def expert_weight_scale_2_missing(d: Draft) -> None:
    d.drop(f"{DECODER}layers.1.experts.2.down_proj.weight_scale_2")


@defect("scale-missing", base="dg_fp8")
def fp8_weight_scale_missing(d: Draft) -> None:
    d.drop(f"{DECODER}layers.0.mlp.down_proj.weight_scale")


@defect("scale-missing", base="dg_w4a16_nvfp4")
def weight_only_declared_as_nvfp4(d: Draft) -> None:
    d.quantization["quant_algo"] = "NVFP4"
    d.quantization["config_groups"]["group_0"]["input_activations"] = {"num_bits": 4, "type": "float"}
    assert d.hf_quant is not None
    d.hf_quant["quantization"]["quant_algo"] = "NVFP4"


@defect("scale-not-positive", fixed=True, fill_missing_scales=True)
def expert_input_scale_zero(d: Draft) -> None:
    d[f"{DECODER}layers.0.experts.1.down_proj.input_scale"] = f32(0.0)


@defect("scale-not-positive")
def dense_input_scale_negative(d: Draft) -> None:
    d[f"{DECODER}layers.0.mlp.down_proj.input_scale"] = f32(-0.5)


@defect("scale-not-finite", fixed=True, fill_missing_scales=True)
def expert_input_scale_infinite(d: Draft) -> None:
    d[f"{DECODER}layers.1.experts.0.down_proj.input_scale"] = f32(math.inf)


@defect("scale-not-finite")
def dense_input_scale_nan(d: Draft) -> None:
    d[f"{DECODER}layers.0.self_attn.o_proj.input_scale"] = f32(math.nan)


@defect("scale-uncalibrated", fixed=True, fill_missing_scales=True)
def expert_input_scale_never_calibrated(d: Draft) -> None:
    d[f"{DECODER}layers.1.experts.0.down_proj.input_scale"] = f32(1.6e-43)


@defect("scale-uncalibrated", base="llmcompressor_nvfp4_dg")
def compressed_input_global_scale_uninitialised(d: Draft) -> None:
    name = f"{DECODER}layers.0.mlp.down_proj.input_global_scale"
    d[name] = f32(1.6e-43, d[name].shape)


@defect("scale-not-positive")
def weight_scale_2_zero(d: Draft) -> None:
    d[f"{DECODER}layers.0.mlp.down_proj.weight_scale_2"] = f32(0.0)


@defect("scale-not-finite")
def expert_weight_scale_2_nan(d: Draft) -> None:
    d[f"{DECODER}layers.0.experts.3.down_proj.weight_scale_2"] = f32(math.nan)


@defect("scale-not-finite")
def dense_block_scale_nan(d: Draft) -> None:
    t = d[f"{DECODER}layers.0.mlp.down_proj.weight_scale"]
    d[f"{DECODER}layers.0.mlp.down_proj.weight_scale"] = Raw(t.dtype, t.shape, b"\x7f" + t.data[1:])


@defect("scale-not-finite")
def expert_block_scale_nan(d: Draft) -> None:
    t = d[f"{DECODER}layers.0.experts.0.up_proj.weight_scale"]
    d[f"{DECODER}layers.0.experts.0.up_proj.weight_scale"] = Raw(t.dtype, t.shape, t.data[:-1] + b"\xff")


@defect("scale-not-positive")
def expert_block_scale_negative(d: Draft) -> None:
    t = d[f"{DECODER}layers.0.experts.0.up_proj.weight_scale"]
    negative = bytes([t.data[0] | 0x80]) + t.data[1:]
    d[f"{DECODER}layers.0.experts.0.up_proj.weight_scale"] = Raw(t.dtype, t.shape, negative)


@defect("scale-not-positive", base="dg_fp8")
def fp8_input_scale_zero(d: Draft) -> None:
    d[f"{DECODER}layers.0.mlp.down_proj.input_scale"] = f32(0.0)


# --- fused projections that disagree -----------------------------------------------------------------------


def doubled(t: Raw) -> Raw:
    (value,) = struct.unpack("<f", t.data)
    return Raw("F32", t.shape, struct.pack("<f", 2 * value))


@defect("fused-weight-scale-differs", fixed=True)
def expert_gate_and_up_weight_scale_2_differ(d: Draft) -> None:
    name = f"{DECODER}layers.0.experts.2.gate_proj.weight_scale_2"
    d[name] = doubled(d[name])


@defect("fused-weight-scale-differs", fixed=True)
def dense_gate_and_up_weight_scale_2_differ(d: Draft) -> None:
    name = f"{DECODER}layers.1.mlp.up_proj.weight_scale_2"
    d[name] = doubled(d[name])


@defect("fused-weight-scale-differs", fixed=True)
def qkv_weight_scale_2_differ(d: Draft) -> None:
    name = f"{DECODER}layers.0.self_attn.k_proj.weight_scale_2"
    d[name] = doubled(d[name])


@defect("fused-input-scale-differs", "warning")
def qkv_input_scales_differ(d: Draft) -> None:
    name = f"{DECODER}layers.0.self_attn.v_proj.input_scale"
    d[name] = doubled(d[name])


@defect("fused-weight-scale-differs", base="llmcompressor_nvfp4_dg")
def compressed_gate_and_up_global_scales_differ(d: Draft) -> None:
    name = f"{DECODER}layers.1.mlp.up_proj.weight_global_scale"
    d[name] = doubled(d[name])


@control("dg_fp8")
def fp8_qkv_weight_scales_differ(d: Draft) -> None:
    """vLLM requantizes the shards to the largest."""
    name = f"{DECODER}layers.0.self_attn.k_proj.weight_scale"
    d[name] = doubled(d[name])


# --- dtypes and shapes -------------------------------------------------------------------------------------


def retype(d: Draft, name: str, dtype: str, data: bytes | None = None) -> None:
    t = d[name]
    d[name] = Raw(dtype, t.shape, t.data if data is None else data)


def e4m3_as_float(byte: int) -> float:
    sign, exponent, mantissa = (-1.0 if byte & 0x80 else 1.0), (byte >> 3) & 15, byte & 7
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


@defect("wrong-dtype")
def weight_scale_stored_as_bytes(d: Draft) -> None:
    retype(d, f"{DECODER}layers.0.mlp.down_proj.weight_scale", "U8")


@defect("wrong-dtype")
def expert_weight_scale_stored_as_bytes(d: Draft) -> None:
    retype(d, f"{DECODER}layers.0.experts.0.up_proj.weight_scale", "U8")


@defect("wrong-dtype", "warning")
def weight_scale_stored_as_equal_floats(d: Draft) -> None:
    name = f"{DECODER}layers.0.mlp.down_proj.weight_scale"
    data = b"".join(struct.pack("<f", e4m3_as_float(b)) for b in d[name].data)
    retype(d, name, "F32", data)


@defect("wrong-dtype")
def weight_scale_stored_as_finer_floats(d: Draft) -> None:
    name = f"{DECODER}layers.0.mlp.down_proj.weight_scale"
    data = b"".join(struct.pack("<f", e4m3_as_float(b) * 1.05) for b in d[name].data)
    retype(d, name, "F32", data)


@defect("wrong-dtype", "warning")
def input_scale_stored_as_bf16(d: Draft) -> None:
    name = f"{DECODER}layers.0.mlp.down_proj.input_scale"
    retype(d, name, "BF16", d[name].data[2:])


@defect("wrong-dtype", "warning")
def packed_weight_stored_as_signed_bytes(d: Draft) -> None:
    retype(d, f"{DECODER}layers.0.mlp.down_proj.weight", "I8")


@defect("wrong-dtype")
def packed_weight_labelled_as_e4m3(d: Draft) -> None:
    retype(d, f"{DECODER}layers.0.mlp.down_proj.weight", "F8_E4M3")


@defect("wrong-dtype", "warning")
def weight_scale_2_stored_as_f64(d: Draft) -> None:
    name = f"{DECODER}layers.0.mlp.down_proj.weight_scale_2"
    (value,) = struct.unpack("<f", d[name].data)
    retype(d, name, "F64", struct.pack("<d", value))


@defect("wrong-shape")
def input_scale_of_two_values(d: Draft) -> None:
    d[f"{DECODER}layers.0.mlp.down_proj.input_scale"] = f32(0.5, (2,))


@defect("wrong-shape")
def weight_scale_transposed(d: Draft) -> None:
    name = f"{DECODER}layers.0.mlp.down_proj.weight_scale"
    t = d[name]
    d[name] = Raw(t.dtype, t.shape[::-1], t.data)


@defect("wrong-shape")
def expert_weight_scale_too_narrow(d: Draft) -> None:
    name = f"{DECODER}layers.0.experts.0.up_proj.weight_scale"
    rows, columns = d[name].shape
    d[name] = Raw("F8_E4M3", (rows, columns // 2), d[name].data[: rows * columns // 2])


@defect("wrong-shape")
def expert_weight_too_short(d: Draft) -> None:
    """vLLM copies what there is into the larger parameter, as if the rest were padding."""
    stem = f"{DECODER}layers.0.experts.0.up_proj.weight"
    for name in (stem, f"{stem}_scale"):
        rows, columns = d[name].shape
        d[name] = Raw(d[name].dtype, (rows // 2, columns), d[name].data[: rows // 2 * columns])


@defect("wrong-shape")
def norm_of_another_size(d: Draft) -> None:
    d[f"{DECODER}norm.weight"] = bf16(1.0, (32,))


@defect("not-divisible")
def intermediate_size_no_multiple_of_the_group(d: Draft) -> None:
    """A dense MLP of 56 columns: three and a half groups of 16."""
    d.config["text_config"]["intermediate_size"] = 56
    for layer in (0, 1):
        stem = f"{DECODER}layers.{layer}.mlp."
        for name in ("gate_proj", "up_proj"):
            d[f"{stem}{name}.weight"] = Raw("U8", (56, 32), bytes(56 * 32))
            d[f"{stem}{name}.weight_scale"] = Raw("F8_E4M3", (56, 4), b"\x38" * 56 * 4)
        d[f"{stem}down_proj.weight"] = Raw("U8", (64, 28), bytes(64 * 28))
        d[f"{stem}down_proj.weight_scale"] = Raw("F8_E4M3", (64, 4), b"\x38" * 64 * 4)
    for name, shape in (("gate_proj", (56, 64)), ("up_proj", (56, 64)), ("down_proj", (64, 56))):
        d[f"{DECODER}self_conditioning.{name}.weight"] = bf16(0.01, shape)


@defect("group-size-mismatch")
def config_says_group_of_32(d: Draft) -> None:
    d.quantization["group_size"] = 32


# --- leftovers and modules that cannot be quantized --------------------------------------------------------


@defect("unexpected-tensor")
def amax_left_over(d: Draft) -> None:
    d[f"{DECODER}layers.0.mlp.down_proj.weight_quantizer._amax"] = f32(1.0)


@defect("unexpected-tensor")
def expert_amax_left_over(d: Draft) -> None:
    d[f"{DECODER}layers.0.experts.0.down_proj.input_quantizer._amax"] = f32(1.0)


@defect("unexpected-tensor")
def pre_quant_scale_left_over(d: Draft) -> None:
    d[f"{DECODER}layers.0.self_attn.o_proj.pre_quant_scale"] = bf16(1.0, (64,))


@defect("unexpected-tensor")
def tensor_of_an_unknown_module(d: Draft) -> None:
    d[f"{DECODER}layers.0.mystery.weight"] = bf16(1.0, (64, 64))


@defect("unexpected-tensor")
def layer_beyond_the_last(d: Draft) -> None:
    d[f"{DECODER}layers.2.input_layernorm.weight"] = bf16(1.0, (64,))


@defect("ignored-tensor", "warning")
def expert_beyond_the_last(d: Draft) -> None:
    for name in [n for n in d.names() if n.startswith(f"{DECODER}layers.0.experts.3.")]:
        d[name.replace("experts.3.", "experts.4.")] = d[name]


@defect("ignored-tensor", "warning")
def bias_of_a_projection_without_one(d: Draft) -> None:
    d[f"{DECODER}layers.0.mlp.down_proj.bias"] = bf16(1.0, (64,))


def quantize_in_place(d: Draft, module: str) -> None:
    """Give a BF16 module the tensors of an NVFP4 one."""
    rows, columns = d[f"{module}.weight"].shape
    d[f"{module}.weight"] = Raw("U8", (rows, columns // 2), bytes(rows * columns // 2))
    d[f"{module}.weight_scale"] = Raw("F8_E4M3", (rows, columns // 16), b"\x38" * (rows * columns // 16))
    d[f"{module}.weight_scale_2"] = f32(0.01)
    d[f"{module}.input_scale"] = f32(0.01)


@defect("cannot-be-quantized")
def router_quantized(d: Draft) -> None:
    d.unignore("layers.0.router")
    quantize_in_place(d, f"{DECODER}layers.0.router.proj")


@defect("cannot-be-quantized")
def self_conditioning_quantized(d: Draft) -> None:
    d.unignore("self_conditioning")
    quantize_in_place(d, f"{DECODER}self_conditioning.up_proj")


@defect("lm-head-stored", "warning", fixed=True)
def tied_lm_head_stored_and_equal(d: Draft) -> None:
    d["lm_head.weight"] = d[f"{DECODER}embed_tokens.weight"]


@defect("lm-head-stored", "warning")
def tied_lm_head_stored_and_different(d: Draft) -> None:
    d["lm_head.weight"] = bf16(0.5, d[f"{DECODER}embed_tokens.weight"].shape)


# --- ignore patterns ---------------------------------------------------------------------------------------


def grow(d: Draft, layers: int) -> None:
    """Repeat layer 0 and end with a copy of layer 1, which attends in full, as the last layer must."""
    text = d.config["text_config"]
    for i in range(2, layers):
        like = 1 if i == layers - 1 else 0
        for side in (DECODER, ENCODER):
            for name in [n for n in d.names() if n.startswith(f"{side}layers.{like}.")]:
                d[name.replace(f".layers.{like}.", f".layers.{i}.")] = d[name]
        d.ignore(f"{DECODER}layers.{i}.router*", f"{ENCODER}layers.{i}.router*")
    text["num_hidden_layers"] = layers
    text["layer_types"] = [*text["layer_types"], *["sliding_attention"] * (layers - 3), "full_attention"]
    text["per_layer_config"] |= {str(layers - 1): text["per_layer_config"]["1"]}


@defect("ignore-substring", fixed=True)
def pattern_for_layer_1_also_excludes_layer_10(d: Draft) -> None:
    grow(d, 12)
    d.unquantize(f"{DECODER}layers.1.")
    d.ignore(f"{DECODER}layers.1*", f"{ENCODER}layers.1*")


@defect("ignore-substring", fixed=True)
def bare_word_excludes_every_module_that_contains_it(d: Draft) -> None:
    d.ignore("mlp")


@defect("ignore-side-conflict", fixed=True)
def encoder_only_entry(d: Draft) -> None:
    d.ignore(f"{ENCODER}layers.0.mlp*")


@defect("ignore-one-expert", fixed=True)
def entry_names_one_expert(d: Draft) -> None:
    d.ignore(f"{DECODER}layers.0.experts.1.gate_proj")


@defect("ignore-everything", fixed=True)
def entry_for_the_whole_encoder(d: Draft) -> None:
    d.ignore(f"{ENCODER.removesuffix('.')}*")


@defect("ignore-partly-fused", fixed=True)
def entry_for_q_alone(d: Draft) -> None:
    d.ignore(f"{DECODER}layers.0.self_attn.q_proj")


@defect("ignore-partly-fused", fixed=True)
def exact_entries_for_a_layer_without_v_proj(d: Draft) -> None:
    """Layer 1 attends in full: its values are its keys, and no exporter can list a v_proj that is not there."""
    d.unquantize(f"{DECODER}layers.1.self_attn.")
    d.ignore(*(f"{DECODER}layers.1.self_attn.{x}_proj" for x in "qko"))


@defect("ignore-partly-fused")
def only_q_unquantized(d: Draft) -> None:
    d.unquantize(f"{DECODER}layers.0.self_attn.q_proj.")
    d.ignore(f"{DECODER}layers.0.self_attn.q_proj")


@defect("ignored-but-quantized", fixed=True)
def both_sides_ignored_though_quantized(d: Draft) -> None:
    d.ignore(f"{DECODER}layers.0.mlp*", f"{ENCODER}layers.0.mlp*")


@defect("ignore-one-expert")
def one_expert_left_unquantized(d: Draft) -> None:
    d.unquantize(f"{DECODER}layers.0.experts.1.")
    for projection in ("gate_proj", "up_proj", "down_proj"):
        d.ignore(f"{DECODER}layers.0.experts.1.{projection}")


@defect("unlisted-lm-head", fixed=True)
def lm_head_not_in_the_ignore_list(d: Draft) -> None:
    d.unignore("lm_head")


@defect("unlisted-unquantized", fixed=True)
def unquantized_module_not_in_the_ignore_list(d: Draft) -> None:
    d.unquantize(f"{DECODER}layers.0.mlp.")


@defect("unlisted-unquantized", base="dg_nvfp4_experts_only", fixed=True)
def attention_entries_removed(d: Draft) -> None:
    d.unignore("layers.0.self_attn")


# --- configs -----------------------------------------------------------------------------------------------


@defect("quant-config-disagrees", "warning")
def hf_quant_config_ignores_other_modules(d: Draft) -> None:
    assert d.hf_quant is not None
    d.hf_quant["quantization"]["exclude_modules"] = ["lm_head"]


@defect("quant-config-disagrees", "warning", base="dg_nvfp4_kvfp8")
def hf_quant_config_has_no_kv_cache(d: Draft) -> None:
    assert d.hf_quant is not None
    d.hf_quant["quantization"]["kv_cache_quant_algo"] = None


@defect("quant-config-missing")
def no_quantization_config_at_all(d: Draft) -> None:
    del d.config["quantization_config"]
    d.hf_quant = None


@defect("quant-config-invalid")
def quant_algo_missing(d: Draft) -> None:
    del d.quantization["quant_algo"]


@defect("quant-config-invalid")
def quant_algo_unknown(d: Draft) -> None:
    d.quantization["quant_algo"] = "NVFP5"


@defect("quant-config-invalid")
def quant_method_missing(d: Draft) -> None:
    del d.quantization["quant_method"]


@defect("quant-config-invalid")
def hf_quant_config_alone_and_without_group_size(d: Draft) -> None:
    del d.config["quantization_config"]
    assert d.hf_quant is not None
    del d.hf_quant["quantization"]["group_size"]


@defect("quant-config-invalid", base="dg_w4a16_nvfp4")
def hf_quant_config_alone_for_weight_only(d: Draft) -> None:
    del d.config["quantization_config"]


@defect("quant-algo-mismatch")
def nvfp4_declared_as_fp8(d: Draft) -> None:
    d.quantization["quant_algo"] = "FP8"


@defect("activations-unused", "warning")
def config_without_input_activations(d: Draft) -> None:
    d.quantization["config_groups"]["group_0"]["input_activations"] = None


@defect("architectures")
def architectures_missing(d: Draft) -> None:
    del d.config["architectures"]


@defect("architectures")
def architectures_unknown(d: Draft) -> None:
    d.config["architectures"] = ["DiffusionGemmaForSomethingElse"]


@defect("generation-config", "warning")
def generation_config_without_sampler(d: Draft) -> None:
    assert d.generation is not None
    d.generation["sampler_config"] = None


@defect("generation-config", "warning")
def generation_config_without_thresholds(d: Draft) -> None:
    assert d.generation is not None
    del d.generation["stability_threshold"]


@defect("generation-config", "warning")
def generation_config_missing(d: Draft) -> None:
    d.generation = None


# --- KV scales ---------------------------------------------------------------------------------------------


@defect("kv-scale-missing", base="dg_nvfp4_kvfp8")
def v_scale_missing(d: Draft) -> None:
    d.drop(f"{DECODER}layers.0.self_attn.v_proj.v_scale")


@defect("kv-scale-missing", "warning", base="dg_nvfp4_kvfp8")
def both_kv_scales_of_a_layer_missing(d: Draft) -> None:
    d.drop(f"{DECODER}layers.0.self_attn.v_proj.v_scale", f"{DECODER}layers.0.self_attn.k_proj.k_scale")


@defect("scale-not-positive", base="dg_nvfp4_kvfp8")
def k_scale_zero(d: Draft) -> None:
    d[f"{DECODER}layers.0.self_attn.k_proj.k_scale"] = f32(0.0)


@defect("scale-not-positive", base="dg_nvfp4_kvfp8")
def kv_scales_negative(d: Draft) -> None:
    d[f"{DECODER}layers.0.self_attn.k_proj.k_scale"] = f32(-1.0)
    d[f"{DECODER}layers.0.self_attn.v_proj.v_scale"] = f32(-1.0)


@defect("kv-scales-unused", "warning", base="dg_nvfp4_kvfp8")
def kv_scheme_not_declared(d: Draft) -> None:
    del d.quantization["kv_cache_scheme"]
    assert d.hf_quant is not None
    d.hf_quant["quantization"]["kv_cache_quant_algo"] = None


# --- index and files ---------------------------------------------------------------------------------------


@defect("index-names-missing-file", base="dg_nvfp4_sharded")
def shard_missing(d: Draft) -> None:
    d.index_follows = False
    d.shards.pop(max(d.shards))


@defect("file-not-indexed", base="dg_nvfp4_sharded")
def shard_not_in_the_index(d: Draft) -> None:
    d.index_follows = False
    assert d.index is not None
    last = max(d.shards)
    d.index["weight_map"] = {n: f for n, f in d.index["weight_map"].items() if f != last}


@defect("file-not-indexed", "warning", base="dg_nvfp4_sharded")
def stray_file_repeats_a_key(d: Draft) -> None:
    d.index_follows = False
    d.shards["stray.safetensors"] = {f"{DECODER}norm.weight": d[f"{DECODER}norm.weight"]}


@defect("index-incomplete", "warning", base="dg_nvfp4_sharded")
def key_of_a_read_shard_not_in_the_index(d: Draft) -> None:
    d.index_follows = False
    assert d.index is not None
    del d.index["weight_map"][f"{DECODER}norm.weight"]


@defect("index-names-missing-tensor", "warning", base="dg_nvfp4_sharded")
def index_names_a_tensor_that_no_file_holds(d: Draft) -> None:
    d.index_follows = False
    assert d.index is not None
    d.index["weight_map"][f"{DECODER}layers.0.gone.weight"] = max(d.shards)


@defect("consolidated-file")
def consolidated_file_beside_the_shards(d: Draft) -> None:
    d.shards["consolidated.safetensors"] = {f"{DECODER}norm.weight": d[f"{DECODER}norm.weight"]}


# --- edits that vLLM loads right ---------------------------------------------------------------------------


@control()
def unchanged(d: Draft) -> None:
    pass


@control("dg_nvfp4_experts_only")
def experts_only_unchanged(d: Draft) -> None:
    pass


@control("dg_nvfp4_kvfp8")
def kv_fp8_unchanged(d: Draft) -> None:
    pass


@control("dg_nvfp4_sharded")
def sharded_unchanged(d: Draft) -> None:
    pass


@control("dg_fp8")
def fp8_unchanged(d: Draft) -> None:
    pass


@control("dg_w4a16_nvfp4")
def weight_only_unchanged(d: Draft) -> None:
    pass


@control("dg_bf16")
def bf16_unchanged(d: Draft) -> None:
    pass


@control("llmcompressor_nvfp4_dg")
def compressed_tensors_unchanged(d: Draft) -> None:
    pass


@control()
def scales_of_one_element(d: Draft) -> None:
    for name in d.names():
        if name.endswith((".input_scale", ".weight_scale_2")):
            d[name] = Raw("F32", (1,), d[name].data)


@control()
def router_not_in_the_ignore_list(d: Draft) -> None:
    d.unignore("router")


@control()
def self_conditioning_not_in_the_ignore_list(d: Draft) -> None:
    d.unignore("self_conditioning")


@control()
def vision_not_in_the_ignore_list(d: Draft) -> None:
    d.unignore("vision")


@control()
def hf_quant_config_alone(d: Draft) -> None:
    del d.config["quantization_config"]


@control()
def config_json_alone(d: Draft) -> None:
    d.hf_quant = None


@control()
def exclude_modules_instead_of_ignore(d: Draft) -> None:
    d.quantization["exclude_modules"] = d.quantization.pop("ignore")


@control()
def rotary_frequencies_stored(d: Draft) -> None:
    d[f"{DECODER}layers.0.self_attn.rotary_emb.inv_freq"] = f32(1.0, (16,))


@control("dg_nvfp4_sharded")
def several_files_without_an_index(d: Draft) -> None:
    d.index = None


@control()
def encoder_layer_scalars_dropped(d: Draft) -> None:
    d.drop(f"{ENCODER}layers.0.layer_scalar", f"{ENCODER}layers.1.layer_scalar")


@control()
def module_alias_named(d: Draft) -> None:
    """A module that only the alias's name holds still fills the one backbone."""
    for name in [n for n in d.names() if n.startswith(f"{DECODER}layers.0.mlp.down_proj.")]:
        d[ENCODER + name.removeprefix(DECODER)] = d[name]
        d.drop(name)


@control()
def one_module_unquantized_and_listed(d: Draft) -> None:
    d.unquantize(f"{DECODER}layers.0.mlp.")
    d.ignore(f"{DECODER}layers.0.mlp*", f"{ENCODER}layers.0.mlp*")


@control()
def one_module_unquantized_and_listed_for_one_side(d: Draft) -> None:
    d.unquantize(f"{DECODER}layers.0.mlp.")
    d.ignore(f"{DECODER}layers.0.mlp*")


@control()
def architectures_with_a_second_entry(d: Draft) -> None:
    d.config["architectures"] = [*d.config["architectures"], "Other"]


@control()
def expert_input_scales_differ_between_experts(d: Draft) -> None:
    for projection in ("gate_proj", "up_proj"):
        name = f"{DECODER}layers.0.experts.2.{projection}.input_scale"
        d[name] = doubled(d[name])


# --- making them -------------------------------------------------------------------------------------------


def make_good(base: str, folder: Path) -> Path:
    """The good checkpoint of a fixture, in a new folder below `folder`: rewritten, then `good`."""
    import tierewrite

    rewritten = folder / f"{base}-rewritten"
    tierewrite.rewrite(Path(__file__).parent.parent / "fixtures" / base / "naive", rewritten)
    good(rewritten, folder / f"{base}-good")
    shutil.rmtree(rewritten)
    return folder / f"{base}-good"


def make_all(folder: Path, variants: list[Defect]) -> tuple[dict[str, Path], dict[str, Path]]:
    """The good checkpoints and the variants made of them, by base and by name."""
    goods = {base: make_good(base, folder) for base in dict.fromkeys(v.base for v in variants)}
    for variant in variants:
        variant.make(goods[variant.base], folder / variant.name)
    return goods, {v.name: folder / v.name for v in variants}
