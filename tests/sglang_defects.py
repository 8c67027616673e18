"""Variants of five small checkpoints for SGLang: sound ones, and ones with one defect each.

What SGLang's real loader does with each is recorded in sglang_behaviour.json (tests/sglang_loader/behaviour.py). A
variant without a finding is one that it loads right, or as it is meant. Nothing here needs torch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints import FIXTURES
from tests.defects import DECODER, ENCODER, Draft, Raw, bf16, f32

HIDDEN, WIDE, LAYERS, HEADS, KV_HEADS, HEAD, VOCABULARY, EXPERTS = 64, 128, 2, 4, 2, 32, 128, 4
Edit = Callable[[Draft], None]


@dataclass(frozen=True)
class Variant:
    """One edit of a good checkpoint.

    Attributes:
        name: unique; the folder's name.
        base: one of `BASES`.
        edit: changes a Draft in place.
        finding: the id that `check(..., "sglang")` has to report by rules alone; None: no error is to be reported.
        severity: of that finding.
    """

    name: str
    base: str
    edit: Edit
    finding: str | None
    severity: str


# --- the good checkpoints ----------------------------------------------------------------------------------


class Maker:
    """Tensors of random values, always the same ones."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.tensors: dict[str, Raw] = {}

    def plain(self, name: str, *shape: int) -> None:
        values = (self.random.standard_normal(math.prod(shape)) * 0.1).astype("<f4").view("<u4")
        self.tensors[name] = Raw("BF16", shape, (values >> 16).astype("<u2").tobytes())

    def nvfp4(self, module: str, rows: int, columns: int) -> None:
        def codes(low: int, high: int, count: int) -> bytes:
            return self.random.integers(low, high, count).astype(np.uint8).tobytes()

        self.tensors |= {
            f"{module}.weight": Raw("U8", (rows, columns // 2), codes(0, 256, rows * columns // 2)),
            f"{module}.weight_scale": Raw("F8_E4M3", (rows, columns // 16), codes(48, 64, rows * columns // 16)),
            f"{module}.weight_scale_2": f32(0.01),
            f"{module}.input_scale": f32(0.02),
        }


def quantization(kv: bool = False) -> dict[str, Any]:
    """ModelOpt's config for NVFP4, as config.json has it."""
    sizes = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    found: dict[str, Any] = {
        "config_groups": {"group_0": {"input_activations": sizes, "weights": sizes, "targets": ["Linear"]}},
        "ignore": ["lm_head"], "quant_algo": "NVFP4", "quant_method": "modelopt",
        "producer": {"name": "modelopt", "version": "0.47.0"},
    }  # fmt: skip
    return found | ({"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}} if kv else {})


def decoder(architecture: str, model_type: str, *, tied: bool, quantized: bool, qk_norm: bool, experts: bool) -> Draft:
    """A decoder of two layers in the hub's names; experts are unpacked."""
    make = Maker()
    linear = make.nvfp4 if quantized else lambda module, rows, columns: make.plain(f"{module}.weight", rows, columns)
    make.plain("model.embed_tokens.weight", VOCABULARY, HIDDEN)
    make.plain("model.norm.weight", HIDDEN)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            make.plain(f"{at}{norm}.weight", HIDDEN)
        for norm in ("q_norm", "k_norm") if qk_norm else ():
            make.plain(f"{at}self_attn.{norm}.weight", HEAD)
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            linear(f"{at}self_attn.{name}_proj", heads * HEAD, HIDDEN)
        linear(f"{at}self_attn.o_proj", HIDDEN, HEADS * HEAD)
        if experts:
            make.plain(f"{at}mlp.gate.weight", EXPERTS, HIDDEN)
        for stem in [f"{at}mlp.experts.{e}" for e in range(EXPERTS)] if experts else [f"{at}mlp"]:
            linear(f"{stem}.gate_proj", WIDE, HIDDEN)
            linear(f"{stem}.up_proj", WIDE, HIDDEN)
            linear(f"{stem}.down_proj", HIDDEN, WIDE)
    if not tied:
        make.plain("lm_head.weight", VOCABULARY, HIDDEN)
    config: dict[str, Any] = {
        "architectures": [architecture], "model_type": model_type, "hidden_size": HIDDEN, "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD,
        "vocab_size": VOCABULARY, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": tied, "torch_dtype": "bfloat16", "hidden_act": "silu", "attention_bias": False,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if experts:
        config |= {
            "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": WIDE, "norm_topk_prob": True,
            "decoder_sparse_step": 1, "mlp_only_layers": [],
        }  # fmt: skip
    if quantized:
        config["quantization_config"] = quantization()
    return Draft({"model.safetensors": make.tensors}, config, None, None, None)


def qwen3() -> Draft:
    """Qwen3, NVFP4, tied: SGLang ties."""
    return decoder("Qwen3ForCausalLM", "qwen3", tied=True, quantized=True, qk_norm=True, experts=False)


def llama() -> Draft:
    """Llama, NVFP4, with a head of its own."""
    return decoder("LlamaForCausalLM", "llama", tied=False, quantized=True, qk_norm=False, experts=False)


def qwen3_moe() -> Draft:
    """Qwen3-MoE, NVFP4, with a head of its own."""
    return decoder("Qwen3MoeForCausalLM", "qwen3_moe", tied=False, quantized=True, qk_norm=True, experts=True)


def mixtral() -> Draft:
    """Mixtral, BF16, tied, both names stored: SGLang does not tie."""
    return Draft.read(FIXTURES / "mixtral_tied_bf16" / "naive")


def diffusion_gemma() -> Draft:
    """DiffusionGemma, BF16, as a rewrite leaves it."""
    draft = Draft.read(FIXTURES / "dg_bf16" / "naive")
    for name in draft.names():
        language = name.startswith(ENCODER) and not name.endswith("layer_scalar")
        if language or name == "lm_head.weight":
            draft.drop(name)
    return draft


BASES: dict[str, Callable[[], Draft]] = {
    "qwen3": qwen3, "llama": llama, "qwen3-moe": qwen3_moe, "mixtral": mixtral, "diffusion-gemma": diffusion_gemma,
}  # fmt: skip


# --- edits -------------------------------------------------------------------------------------------------


def drop(*parts: str) -> Edit:
    return lambda d: d.drop(*parts)


def put(name: str, value: Raw) -> Edit:
    def edit(d: Draft) -> None:
        d[name] = value

    return edit


def again(name: str, source: str, change: bool = False) -> Edit:
    """Stores the tensor `source` under `name` too, with its last byte changed if wanted."""

    def edit(d: Draft) -> None:
        t = d[source]
        d[name] = Raw(t.dtype, t.shape, t.data[:-1] + bytes([t.data[-1] ^ 1])) if change else t

    return edit


def shaped(name: str, *shape: int) -> Edit:
    """The same bytes in another shape."""

    def edit(d: Draft) -> None:
        d[name] = Raw(d[name].dtype, shape, d[name].data)

    return edit


def halved(name: str) -> Edit:
    """The first half of the rows."""

    def edit(d: Draft) -> None:
        t = d[name]
        d[name] = Raw(t.dtype, (t.shape[0] // 2, *t.shape[1:]), t.data[: len(t.data) // 2])

    return edit


def labelled(name: str, dtype: str) -> Edit:
    def edit(d: Draft) -> None:
        d[name] = Raw(dtype, d[name].shape, d[name].data)

    return edit


def ignore(*entries: str) -> Edit:
    return lambda d: d.ignore(*entries)


def config(**values: Any) -> Edit:
    """Sets members of quantization_config; None removes one."""

    def edit(d: Draft) -> None:
        for key, value in values.items():
            d.quantization[key] = value
            if value is None:
                del d.quantization[key]

    return edit


def top(**values: Any) -> Edit:
    return lambda d: d.config.update(values)


def both(*edits: Edit) -> Edit:
    def edit(d: Draft) -> None:
        for each in edits:
            each(d)

    return edit


def plain(module: str) -> Edit:
    return lambda d: d.unquantize(module)


def group_of_32(d: Draft) -> None:
    for kind in ("weights", "input_activations"):
        d.quantization["config_groups"]["group_0"][kind] = {"num_bits": 4, "type": "float", "group_size": 32}


def no_quantization_config(d: Draft) -> None:
    del d.config["quantization_config"]


def moved_to_hf_quant_config(d: Draft) -> None:
    del d.config["quantization_config"]
    d.hf_quant = {
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16,
                         "exclude_modules": ["lm_head"]},
    }  # fmt: skip


def fused_experts(d: Draft) -> None:
    """The experts of both layers as one tensor each, plain."""
    for layer in range(LAYERS):
        d.drop(f"model.layers.{layer}.mlp.experts.")
        d[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = bf16(0.01, (EXPERTS, 2 * WIDE, HIDDEN))
        d[f"model.layers.{layer}.mlp.experts.down_proj"] = bf16(0.01, (EXPERTS, HIDDEN, WIDE))
    d.ignore("*.mlp.experts*")


def weight_only(d: Draft) -> None:
    for name in [n for n in d.names() if n.endswith(".input_scale")]:
        d.drop(name)
    d.quantization["quant_algo"] = "W4A16_NVFP4"


def under_the_encoder(d: Draft) -> None:
    """All language weights under the encoder's names alone."""
    for name in [n for n in d.names() if n.startswith(DECODER) and ENCODER + n.removeprefix(DECODER) not in d.names()]:
        if ".self_conditioning" not in name:
            d[ENCODER + name.removeprefix(DECODER)] = d[name]
            d.drop(name)


def nothing(d: Draft) -> None:
    """Stays as it is."""


A, M, X = "model.layers.0.self_attn.", "model.layers.0.mlp.", "model.layers.0.mlp.experts.1."
B = "model.layers.0.block_sparse_moe.experts.1."
KV = {f"model.layers.{n}.self_attn.{k}_proj.{k}_scale": f32(0.5) for n in range(LAYERS) for k in ("k", "v")}
AMAX = "input_quantizer._amax"


def with_kv(d: Draft) -> None:
    for name, value in KV.items():
        d[name] = value
    if "quantization_config" in d.config:
        d.config["quantization_config"] |= quantization(kv=True)


def rows() -> list[tuple[str, str, Edit, str | None, str]]:
    """Base, name, edit, finding, severity."""
    e, w = "error", "warning"
    return [
        ("qwen3", "norm-missing", drop("model.layers.0.input_layernorm.weight"), "parameter-missing", e),
        ("qwen3", "q-proj-missing", drop(f"{A}q_proj."), "parameter-missing", e),
        ("qwen3", "o-input-scale-missing", drop(f"{A}o_proj.input_scale"), "scale-missing", e),
        ("qwen3", "o-weight-scale-2-missing", drop(f"{A}o_proj.weight_scale_2"), "scale-missing", e),
        ("qwen3", "o-block-scale-missing", drop(f"{A}o_proj.weight_scale"), "scale-missing", e),
        ("qwen3", "qkv-weight-scales-differ", put(f"{A}q_proj.weight_scale_2", f32(0.04)),
         "fused-weight-scale-differs", e),
        ("qwen3", "weight-scale-2-zero", put(f"{A}o_proj.weight_scale_2", f32(0.0)), "scale-not-positive", e),
        ("qwen3", "input-scale-nan", put(f"{A}o_proj.input_scale", f32(math.nan)), "scale-not-finite", e),
        ("qwen3", "amax-under-q", put(f"{A}q_proj.{AMAX}", f32(1.0)), "unexpected-tensor", e),
        ("qwen3", "block-scale-transposed", shaped(f"{A}o_proj.weight_scale", 8, 64), "wrong-scale-shape", e),
        ("qwen3", "input-scale-of-two", put(f"{A}o_proj.input_scale", Raw("F32", (2,), struct.pack("<2f", 0.02, 0.03))),
         "wrong-scale-shape", e),
        ("qwen3", "block-scale-as-bytes", labelled(f"{A}o_proj.weight_scale", "U8"), "wrong-dtype", e),
        ("qwen3", "stored-head-differs", again("lm_head.weight", "model.embed_tokens.weight", True),
         "name-conflict", e),
        ("qwen3", "only-head-stored", both(again("lm_head.weight", "model.embed_tokens.weight"),
                                           drop("model.embed_tokens.weight")), "only-alias-stored", e),
        ("qwen3", "o-ignored-though-quantized", ignore(f"{A}o_proj"), "ignored-but-quantized", e),
        ("qwen3", "word-of-a-name-ignored", ignore("mlp"), "ignored-but-quantized", e),
        ("qwen3", "pattern-for-a-layer-ignored", ignore("model.layers.1*"), "ignored-but-quantized", e),
        ("qwen3", "q-alone-ignored", ignore(f"{A}q_proj"), "ignore-partly-fused", e),
        ("qwen3", "o-plain-and-unlisted", plain(f"{A}o_proj"), "unlisted-unquantized", e),
        ("qwen3", "group-size-32", group_of_32, "group-size-mismatch", e),
        ("qwen3", "no-quantization-config", no_quantization_config, "quant-config-missing", e),
        ("qwen3", "algorithm-missing", config(quant_algo=None), "quant-config-invalid", e),
        ("qwen3", "algorithm-unknown", config(quant_algo="NVFP5"), "quant-config-invalid", e),
        ("qwen3", "kv-scales", with_kv, "kv-scales-unused", w),
        ("qwen3", "unchanged", nothing, None, ""),
        ("qwen3", "equal-head-stored", again("lm_head.weight", "model.embed_tokens.weight"), None, ""),
        ("qwen3", "weight-only", weight_only, None, ""),
        ("qwen3", "hf-quant-config-alone", moved_to_hf_quant_config, None, ""),
        ("qwen3", "method-missing", config(quant_method=None), None, ""),
        ("qwen3", "nothing-ignored", config(ignore=[]), None, ""),
        ("qwen3", "amax-under-o", put(f"{A}o_proj.{AMAX}", f32(1.0)), None, ""),
        ("qwen3", "bias-left-over", put(f"{A}q_proj.bias", bf16(0.5, (HEADS * HEAD,))), None, ""),
        ("llama", "head-missing", drop("lm_head.weight"), "parameter-missing", e),
        ("llama", "embedding-missing", drop("model.embed_tokens.weight"), "parameter-missing", e),
        ("llama", "norm-missing", drop("model.norm.weight"), "parameter-missing", e),
        ("llama", "up-proj-missing", drop(f"{M}up_proj."), "parameter-missing", e),
        ("llama", "down-weight-scale-2-missing", drop(f"{M}down_proj.weight_scale_2"), "scale-missing", e),
        ("llama", "gate-input-scale-missing", drop(f"{M}gate_proj.input_scale"), "scale-missing", e),
        ("llama", "gate-up-weight-scales-differ", put(f"{M}gate_proj.weight_scale_2", f32(0.5)),
         "fused-weight-scale-differs", e),
        ("llama", "weight-scale-2-infinite", put(f"{M}down_proj.weight_scale_2", f32(math.inf)),
         "scale-not-finite", e),
        ("llama", "norm-of-another-size", halved("model.layers.0.input_layernorm.weight"), "wrong-shape", e),
        ("llama", "block-scale-transposed", shaped(f"{M}down_proj.weight_scale", 8, 64), "wrong-scale-shape", e),
        ("llama", "block-scale-as-f32", put(f"{A}o_proj.weight_scale", Raw("F32", (64, 8), bytes(2048))),
         "wrong-dtype", e),
        ("llama", "head-not-ignored", config(ignore=[]), "unlisted-unquantized", e),
        ("llama", "gate-alone-ignored", ignore(f"{M}gate_proj"), "ignore-partly-fused", e),
        ("llama", "down-plain-and-unlisted", plain(f"{M}down_proj"), "unlisted-unquantized", e),
        ("llama", "v-scale-missing", both(with_kv, drop(f"{A}v_proj.v_scale")), "kv-scale-missing", e),
        ("llama", "unchanged", nothing, None, ""),
        ("llama", "kv-scales", with_kv, None, ""),
        ("llama", "amax-under-q", put(f"{A}q_proj.{AMAX}", f32(1.0)), None, ""),
        ("llama", "down-plain-and-listed", both(plain(f"{M}down_proj"), ignore(f"{M}down_proj")), None, ""),
        ("qwen3-moe", "gate-weight-missing", drop(f"{X}gate_proj.weight"), "parameter-missing", e),
        ("qwen3-moe", "expert-missing", drop(X), "parameter-missing", e),
        ("qwen3-moe", "down-input-scale-missing", drop(f"{X}down_proj.input_scale"), "scale-missing", e),
        ("qwen3-moe", "gate-weight-scale-2-missing", drop(f"{X}gate_proj.weight_scale_2"), "scale-missing", e),
        ("qwen3-moe", "gate-block-scale-missing", drop(f"{X}gate_proj.weight_scale"), "scale-missing", e),
        ("qwen3-moe", "gate-up-weight-scales-differ", put(f"{X}gate_proj.weight_scale_2", f32(0.5)),
         "fused-weight-scale-differs", e),
        ("qwen3-moe", "weight-too-short", halved(f"{X}gate_proj.weight"), "wrong-scale-shape", e),
        ("qwen3-moe", "experts-fused", fused_experts, "experts-fused", e),
        ("qwen3-moe", "experts-ignored", ignore(f"{M}experts"), "ignored-but-quantized", e),
        ("qwen3-moe", "tied-without-a-head", both(drop("lm_head.weight"), top(tie_word_embeddings=True)),
         "head-not-tied", e),
        ("qwen3-moe", "router-missing", drop(f"{M}gate.weight"), "parameter-missing", e),
        ("qwen3-moe", "weight-scale-2-negative", put(f"{X}up_proj.weight_scale_2", f32(-1.0)),
         "scale-not-positive", e),
        ("qwen3-moe", "block-scale-as-bytes", labelled(f"{X}down_proj.weight_scale", "U8"), "wrong-dtype", e),
        ("qwen3-moe", "unchanged", nothing, None, ""),
        ("qwen3-moe", "tied-with-a-head", both(again("lm_head.weight", "model.embed_tokens.weight"),
                                               top(tie_word_embeddings=True)), None, ""),
        ("qwen3-moe", "amax-under-an-expert", put(f"{X}gate_proj.{AMAX}", f32(1.0)), None, ""),
        ("qwen3-moe", "one-expert-ignored", ignore(f"{X}gate_proj"), None, ""),
        ("mixtral", "head-missing", drop("lm_head.weight"), "head-not-tied", e),
        ("mixtral", "only-head-stored", drop("model.embed_tokens.weight"), "only-alias-stored", e),
        ("mixtral", "expert-weight-missing", drop(f"{B}w1.weight"), "parameter-missing", e),
        ("mixtral", "expert-missing", drop(B), "parameter-missing", e),
        ("mixtral", "q-proj-missing", drop(f"{A}q_proj.weight"), "parameter-missing", e),
        ("mixtral", "norm-missing", drop("model.norm.weight"), "parameter-missing", e),
        ("mixtral", "router-missing", drop("model.layers.0.block_sparse_moe.gate.weight"), "parameter-missing", e),
        ("mixtral", "kv-scale", put(f"{A}k_proj.k_scale", f32(0.5)), "kv-scales-unused", e),
        ("mixtral", "amax-under-q", put(f"{A}q_proj.{AMAX}", f32(0.5)), "unexpected-tensor", e),
        ("mixtral", "norm-of-another-size", halved("model.norm.weight"), "wrong-shape", e),
        ("mixtral", "o-proj-of-another-size", halved(f"{A}o_proj.weight"), "wrong-shape", e),
        ("mixtral", "layer-missing", drop("model.layers.1."), "parameter-missing", e),
        ("mixtral", "unchanged", nothing, None, ""),
        ("mixtral", "head-differs", again("lm_head.weight", "model.embed_tokens.weight", True), None, ""),
        ("mixtral", "amax-under-o", put(f"{A}o_proj.{AMAX}", f32(0.5)), None, ""),
        ("mixtral", "unknown-module", put("model.extra.weight", bf16(0.5, (4,))), None, ""),
        ("diffusion-gemma", "norm-missing", drop(f"{DECODER}norm.weight"), "parameter-missing", e),
        ("diffusion-gemma", "q-proj-missing", drop(f"{DECODER}layers.0.self_attn.q_proj."), "parameter-missing", e),
        ("diffusion-gemma", "embedding-missing", drop(f"{DECODER}embed_tokens.weight"), "parameter-missing", e),
        ("diffusion-gemma", "experts-missing", drop(f"{DECODER}layers.1.experts.gate_up_proj"), "parameter-missing", e),
        ("diffusion-gemma", "router-missing", drop(f"{DECODER}layers.0.router.proj.weight"), "parameter-missing", e),
        ("diffusion-gemma", "down-proj-missing", drop(f"{DECODER}layers.1.mlp.down_proj."), "parameter-missing", e),
        ("diffusion-gemma", "layer-missing", drop(f"{DECODER}layers.1."), "parameter-missing", e),
        ("diffusion-gemma", "under-the-encoder", under_the_encoder, "only-alias-stored", e),
        ("diffusion-gemma", "stored-head-differs", again("lm_head.weight", f"{DECODER}embed_tokens.weight", True),
         "name-conflict", e),
        ("diffusion-gemma", "encoder-differs", again(f"{ENCODER}norm.weight", f"{DECODER}norm.weight", True),
         "name-conflict", e),
        ("diffusion-gemma", "norm-of-another-size", halved(f"{DECODER}norm.weight"), "wrong-shape", e),
        ("diffusion-gemma", "quantized", top(quantization_config=quantization()), "quantized-unsupported", e),
        ("diffusion-gemma", "unchanged", nothing, None, ""),
        ("diffusion-gemma", "both-names", again(f"{ENCODER}norm.weight", f"{DECODER}norm.weight"), None, ""),
        ("diffusion-gemma", "unknown-module", put("model.decoder.extra.weight", bf16(0.5, (4,))), None, ""),
    ]  # fmt: skip


VARIANTS = [Variant(f"{base}-{name}", base, *rest) for base, name, *rest in rows()]


def make_all(folder: Path, variants: list[Variant] = VARIANTS) -> dict[str, Path]:
    """Writes the variants, each to a folder of its name below `folder`."""
    found = {}
    for variant in variants:
        draft = BASES[variant.base]()
        variant.edit(draft)
        found[variant.name] = folder / variant.name
        draft.write(found[variant.name])
    return found
