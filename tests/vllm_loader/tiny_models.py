"""Tiny models of many classes with random weights, as transformers saves them: what the dry load is tried on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t

BASE: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "num_key_value_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}  # fmt: skip
MROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_theta": 10000.0, "rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True,
    }
}  # fmt: skip
TOKENS = {"image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 248, "vision_end_token_id": 249}


def without(*names: str) -> dict[str, Any]:
    """`BASE` without some of its members."""
    return {name: value for name, value in BASE.items() if name not in names}


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**BASE, **UNTIED)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**without("head_dim"))),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**BASE, tie_word_embeddings=True)),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**without("head_dim"), **UNTIED)),
    "gemma3": lambda: t.Gemma3ForCausalLM(
        t.Gemma3TextConfig(
            **BASE, query_pre_attn_scalar=32, sliding_window=64, layer_types=["sliding_attention", "full_attention"]
        )
    ),
    "mixtral": lambda: t.MixtralForCausalLM(
        t.MixtralConfig(**BASE, **UNTIED, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    ),
    "qwen3moe": lambda: t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(**BASE, **UNTIED, **EXPERTS, moe_intermediate_size=64, norm_topk_prob=True)
    ),
    "olmoe": lambda: t.OlmoeForCausalLM(t.OlmoeConfig(**without("head_dim"), **UNTIED, **EXPERTS)),
    "glm4moe": lambda: t.Glm4MoeForCausalLM(t.Glm4MoeConfig(**BASE, **UNTIED, **ROUTED, use_qk_norm=True)),
    "deepseek3": lambda: t.DeepseekV3ForCausalLM(
        t.DeepseekV3Config(**without("head_dim", "num_key_value_heads"), **UNTIED, **ROUTED, **LATENT)
    ),
    "granitemoe": lambda: t.GraniteMoeForCausalLM(
        t.GraniteMoeConfig(**without("head_dim"), num_local_experts=4, num_experts_per_tok=2)
    ),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=2, n_positions=256)),
    "opt": lambda: t.OPTForCausalLM(
        t.OPTConfig(
            vocab_size=256, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=256, word_embed_proj_dim=64,
        )
    ),
    "gptneox": lambda: t.GPTNeoXForCausalLM(
        t.GPTNeoXConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=256,
        )
    ),
    "starcoder2": lambda: t.Starcoder2ForCausalLM(t.Starcoder2Config(**without("head_dim"))),
    "qwen3vl": lambda: t.Qwen3VLForConditionalGeneration(
        t.Qwen3VLConfig(
            text_config={**BASE, **MROPE},
            vision_config={
                "depth": 2, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "num_heads": 2,
                "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            **TOKENS,
            tie_word_embeddings=True,
        )
    ),
    "whisper": lambda: t.WhisperForConditionalGeneration(
        t.WhisperConfig(
            vocab_size=256, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=128, decoder_ffn_dim=128, max_source_positions=50,
            max_target_positions=64, num_mel_bins=80, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=3,
        )
    ),
}  # fmt: skip


def save(name: str, folder: Path) -> Path:
    """The model `name` in BF16, in `folder`."""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.05 + (1.0 if parameter.dim() == 1 else 0.0))
    model = model.to(torch.bfloat16)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    return folder
