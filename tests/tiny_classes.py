"""Tiny checkpoints of many model classes, made by code: names and shapes from transformers, on the meta device.

`plain` is what `save_pretrained` writes; `nvfp4`, `fp8_blocks`, `compressed_fp8`, `awq` and `mxfp4` are what exporters
make of it, with sound scales. Weights hold zeros: no rule of a consumer looks at them.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from functools import cache
from typing import Any

from tests.defects import Draft, Raw, bf16, f32
from tests.zoo import hub_checkpoint, quiet

SHARD = "model.safetensors"
TEXT = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
NO_HEAD_DIM = {k: v for k, v in TEXT.items() if k != "head_dim"}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
ROUTED = EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
MLA = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32}
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
SLIDING = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
# fmt: off
CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": TEXT,
    "Qwen3ForCausalLM": TEXT,
    "Phi3ForCausalLM": NO_HEAD_DIM | {"pad_token_id": 0},
    "MixtralForCausalLM": TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3MoeForCausalLM": TEXT | EXPERTS | {"num_experts": 4},
    "DeepseekV3ForCausalLM": NO_HEAD_DIM | ROUTED | MLA | {"num_key_value_heads": 2, "first_k_dense_replace": 1} | {
        "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    },
    "Glm4MoeForCausalLM": TEXT | ROUTED | {"first_k_dense_replace": 1},
    "GptOssForCausalLM": TEXT | SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GPT2LMHeadModel": {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "Lfm2ForCausalLM": NO_HEAD_DIM | {"layer_types": ["conv", "full_attention"]},
    "Gemma4ForCausalLM": TEXT
    | {
        "sliding_window": 32,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "global_head_dim": 32,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 64,
    },
    "WhisperForConditionalGeneration": {
        "vocab_size": 64,
        "d_model": 64,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "max_source_positions": 64,
        "max_target_positions": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 3,
    },
    "BartForConditionalGeneration": {
        "vocab_size": 64,
        "d_model": 64,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "max_position_embeddings": 64,
    },
    "Gemma3ForConditionalGeneration": {
        "text_config": TEXT | SLIDING | {"query_pre_attn_scalar": 32},
        "vision_config": VISION | {"image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
    },
    "Qwen3VLForConditionalGeneration": {
        "text_config": TEXT
        | {
            "rope_parameters": {
                "rope_theta": 10000.0,
                "rope_type": "default",
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            }
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 64,
            "out_hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "patch_size": 14,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        "tie_word_embeddings": False,
    },
}
# fmt: on
SIZES = {"BF16": 2, "F32": 4, "I64": 8, "U8": 1, "I8": 1, "F8_E4M3": 1, "I32": 4}


def zeros(dtype: str, *shape: int) -> Raw:
    return Raw(dtype, shape, bytes(SIZES[dtype] * math.prod(shape)))


def ones(*shape: int) -> Raw:
    """Block scales of one."""
    return Raw("F8_E4M3", shape, b"\x38" * math.prod(shape))


@cache
def _named(architecture: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """config.json, and the shapes under the hub's names and in memory."""
    import torch
    import transformers

    model_class = getattr(transformers, architecture)
    with quiet():
        config = model_class.config_class(**copy.deepcopy(CONFIGS[architecture]))
        with torch.device("meta"):
            model = model_class(config)
            model.tie_weights(recompute_mapping=False)
        state = {k: v for k, v in model.state_dict(keep_vars=True).items() if hasattr(v, "shape")}
        tied = set(model.all_tied_weights_keys)
        state = {k: v for k, v in state.items() if k not in tied}
        hub = hub_checkpoint(model, state, {})
    written = json.loads(config.to_json_string(use_diff=False)) | {"architectures": [architecture]}
    memory = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return written, {name: shape for name, (_, shape) in hub.entries.items()}, memory


def plain(architecture: str, *, memory: bool = False) -> Draft:
    """The BF16 checkpoint of a class, under the hub's names, or under those in transformers' memory."""
    config, hub, names = _named(architecture)
    tensors = {name: bf16(1.0, shape) if len(shape) == 1 else zeros("BF16", *shape)
               for name, shape in (names if memory else hub).items()}  # fmt: skip
    return Draft({SHARD: tensors}, copy.deepcopy(config), None, None, None)


def linears(draft: Draft, *without: str) -> list[str]:
    """Modules with a two-dimensional weight that quantizers take: not embeddings, heads, routers, convolutions."""
    skipped = ("embed", "lm_head", "proj_out", "mlp.gate.", "router", "block_sparse_moe.gate.", "norm", *without)
    return [
        name.removesuffix(".weight")
        for name in draft.names()
        if name.endswith(".weight") and len(draft[name].shape) == 2 and not any(s in name for s in skipped)
    ]


def nvfp4(draft: Draft, *without: str, ignore: tuple[str, ...] = ("lm_head",), kv: bool = False) -> Draft:
    """ModelOpt's NVFP4 of every linear but those whose names contain one of `without`."""
    for module in linears(draft, *without):
        rows, columns = draft[f"{module}.weight"].shape
        draft[f"{module}.weight"] = zeros("U8", rows, columns // 2)
        draft[f"{module}.weight_scale"] = ones(rows, columns // 16)
        draft[f"{module}.weight_scale_2"] = f32(0.5)
        draft[f"{module}.input_scale"] = f32(0.25)
    args = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    draft.config["quantization_config"] = {
        "quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": list(ignore),
        "config_groups": {"group_0": {"input_activations": args, "weights": args, "targets": ["Linear"]}},
        "producer": {"name": "modelopt", "version": "0.47.0"},
    }  # fmt: skip
    if kv:
        draft.config["quantization_config"]["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return draft


def fp8_blocks(draft: Draft, *without: str) -> Draft:
    """DeepSeek's FP8 with scales for blocks of 32."""
    for module in linears(draft, *without):
        rows, columns = draft[f"{module}.weight"].shape
        draft[f"{module}.weight"] = zeros("F8_E4M3", rows, columns)
        draft[f"{module}.weight_scale_inv"] = f32(0.5, (math.ceil(rows / 32), math.ceil(columns / 32)))
    draft.config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 32],
    }  # fmt: skip
    return draft


def compressed_fp8(draft: Draft, *without: str, ignore: tuple[str, ...] = ("lm_head",)) -> Draft:
    """compressed-tensors' FP8, a scale for each row, dynamic activations."""
    for module in linears(draft, *without):
        rows, columns = draft[f"{module}.weight"].shape
        draft[f"{module}.weight"] = zeros("F8_E4M3", rows, columns)
        draft[f"{module}.weight_scale"] = bf16(0.5, (rows, 1))
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "channel"}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}
    draft.config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": list(ignore),
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
    }  # fmt: skip
    return draft


def quark_fp8(draft: Draft, *without: str, exclude: tuple[str, ...] = ("lm_head",)) -> Draft:
    """Quark's FP8: one scale for a weight, one for its activations."""
    for module in linears(draft, *without):
        draft[f"{module}.weight"] = zeros("F8_E4M3", *draft[f"{module}.weight"].shape)
        draft[f"{module}.weight_scale"] = draft[f"{module}.input_scale"] = f32(0.5)
    spec = {"dtype": "fp8_e4m3", "is_dynamic": False, "qscheme": "per_tensor", "symmetric": None, "group_size": None}
    draft.config["quantization_config"] = {
        "quant_method": "quark", "exclude": list(exclude), "layer_quant_config": {}, "layer_type_quant_config": {},
        "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
        "global_quant_config": {"bias": None, "input_tensors": spec, "output_tensors": None, "weight": spec},
    }  # fmt: skip
    return draft


def awq(draft: Draft) -> Draft:
    """AWQ with 4 bits and groups of 32."""
    for module in linears(draft):
        rows, columns = draft[f"{module}.weight"].shape
        draft.drop(f"{module}.weight")
        draft[f"{module}.qweight"] = zeros("I32", columns, rows // 8)
        draft[f"{module}.qzeros"] = zeros("I32", columns // 32, rows // 8)
        draft[f"{module}.scales"] = bf16(0.5, (columns // 32, rows))
    draft.config["quantization_config"] = {
        "quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True,
    }  # fmt: skip
    return draft


def gptq(draft: Draft) -> Draft:
    """GPTQ with 4 bits and groups of 32."""
    for module in linears(draft):
        rows, columns = draft[f"{module}.weight"].shape
        draft.drop(f"{module}.weight")
        draft[f"{module}.qweight"] = zeros("I32", columns // 8, rows)
        draft[f"{module}.qzeros"] = zeros("I32", columns // 32, rows // 8)
        draft[f"{module}.scales"] = bf16(0.5, (columns // 32, rows))
        draft[f"{module}.g_idx"] = zeros("I32", columns)
    draft.config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
    }
    return draft


def mxfp4(draft: Draft) -> Draft:
    """gpt-oss' MXFP4: blocks and scales of the fused experts."""
    for name in [n for n in draft.names() if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = draft[name].shape  # gpt-oss keeps [in, out]
        draft.drop(name)
        draft[f"{name}_blocks"] = zeros("U8", experts, rows, columns // 32, 16)
        draft[f"{name}_scales"] = zeros("U8", experts, rows, columns // 32)
    draft.config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn"],
    }
    return draft


def renamed(draft: Draft, rename: Callable[[str], str]) -> Draft:
    """The same tensors under other names."""
    draft.shards = {shard: {rename(n): t for n, t in tensors.items()} for shard, tensors in draft.shards.items()}
    return draft
