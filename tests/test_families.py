"""Real weights, tiny models: the rewritten checkpoint loads in transformers as `save_pretrained`'s own does.

Each family is built from a small config, its whole state dict is written under the hub's names with every name of every
tie (what an exporter writes that knows no ties), rewritten, and loaded again: no missing or unexpected key, the same
state and the same outputs as of the checkpoint that `save_pretrained` writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tierewrite
from tests.checkpoints import read_shapes
from tests.zoo import quiet

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    # encoder-decoder
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 1,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    # older spellings
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "embedding_size": 32,
    "state_size": 8,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
}


def tiny(config_class: type, **changes: Any) -> Any:
    """A small config: of `TINY` what the class knows, then `changes`."""
    known = config_class()
    fields = known.to_dict().keys() | known.attribute_map.keys()
    return config_class(**{**{k: v for k, v in TINY.items() if k in fields}, **changes})


def text(**more: Any) -> dict[str, Any]:
    import torch

    return {"input_ids": torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]]), **more}


def seq2seq(**more: Any) -> dict[str, Any]:
    import torch

    return text(decoder_input_ids=torch.tensor([[1, 21, 22], [1, 23, 24]]), **more)


def pixels(size: int = 32, **more: Any) -> dict[str, Any]:
    import torch

    return {"pixel_values": torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(7)), **more}


def causal(name: str, **changes: Any) -> Callable[[], tuple[Any, dict[str, Any]]]:
    def make() -> tuple[Any, dict[str, Any]]:
        import transformers

        model_class = getattr(transformers, name)
        return model_class(tiny(model_class.config_class, **changes)), text()

    return make


def translation(name: str, **changes: Any) -> Callable[[], tuple[Any, dict[str, Any]]]:
    def make() -> tuple[Any, dict[str, Any]]:
        import transformers

        model_class = getattr(transformers, name)
        return model_class(tiny(model_class.config_class, **changes)), seq2seq()

    return make


def tiny_clip() -> Any:
    from transformers import CLIPVisionConfig

    return tiny(CLIPVisionConfig, image_size=32, patch_size=16)


def tiny_siglip() -> Any:
    from transformers import SiglipVisionConfig

    return tiny(SiglipVisionConfig, image_size=32, patch_size=16)


def tiny_resnet() -> Any:
    import transformers

    stages = ["stage2", "stage3", "stage4"]
    return transformers.RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 16, 16, 32], depths=[1, 1, 1, 1], out_features=stages
    )


def llava() -> tuple[Any, dict[str, Any]]:
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=tiny_clip(), text_config=tiny(LlamaConfig), tie_word_embeddings=True, image_token_index=90
    )
    return LlavaForConditionalGeneration(config), text()


def paligemma() -> tuple[Any, dict[str, Any]]:
    from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration

    config = PaliGemmaConfig(
        vision_config=tiny_siglip(), text_config=tiny(GemmaConfig), projection_dim=32, image_token_index=90
    )
    return PaliGemmaForConditionalGeneration(config), text()


def gemma3() -> tuple[Any, dict[str, Any]]:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

    config = Gemma3Config(
        vision_config=tiny_siglip(), text_config=tiny(Gemma3TextConfig), mm_tokens_per_image=4, image_token_index=90
    )
    return Gemma3ForConditionalGeneration(config), text()


def qwen2_vl() -> tuple[Any, dict[str, Any]]:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(
        text_config={
            **{k: v for k, v in TINY.items() if k in TEXT_KEYS},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4},
        tie_word_embeddings=True,
    )
    return Qwen2VLForConditionalGeneration(config), text()


TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
)


def internvl() -> tuple[Any, dict[str, Any]]:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    config = InternVLConfig(
        vision_config=tiny(InternVLVisionConfig, image_size=[32, 32], patch_size=[16, 16]),
        text_config=tiny(Qwen2Config),
        image_token_id=90,
        tie_word_embeddings=True,
    )
    return InternVLForConditionalGeneration(config), text()


def idefics3() -> tuple[Any, dict[str, Any]]:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3VisionConfig, LlamaConfig

    config = Idefics3Config(
        vision_config=tiny(Idefics3VisionConfig, image_size=32, patch_size=16),
        text_config=tiny(LlamaConfig),
        image_token_id=90,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    return Idefics3ForConditionalGeneration(config), text()


def blip() -> tuple[Any, dict[str, Any]]:
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipTextConfig, BlipVisionConfig

    config = BlipConfig(
        text_config=tiny(BlipTextConfig, encoder_hidden_size=32).to_dict(),
        vision_config=tiny(BlipVisionConfig, image_size=32, patch_size=16).to_dict(),
        projection_dim=16,
    )
    return BlipForConditionalGeneration(config), pixels(**text(input_ids=text()["input_ids"][:1]))


def whisper() -> tuple[Any, dict[str, Any]]:
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = tiny(
        WhisperConfig, num_mel_bins=8, max_source_positions=20, max_target_positions=20, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    frames = torch.randn(1, 8, 40, generator=torch.Generator().manual_seed(3))
    return WhisperForConditionalGeneration(config), {
        "input_features": frames,
        "decoder_input_ids": torch.tensor([[1, 5, 6]]),
    }


def speech_to_text() -> tuple[Any, dict[str, Any]]:
    import torch
    from transformers import Speech2TextConfig, Speech2TextForConditionalGeneration

    config = tiny(
        Speech2TextConfig, input_feat_per_channel=8, conv_channels=16, num_conv_layers=1, conv_kernel_sizes=(3,)
    )
    frames = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(3))
    return Speech2TextForConditionalGeneration(config), {
        "input_features": frames,
        "decoder_input_ids": torch.tensor([[1, 5, 6]]),
    }


def moonshine() -> tuple[Any, dict[str, Any]]:
    import torch
    from transformers import MoonshineConfig, MoonshineForConditionalGeneration

    config = tiny(
        MoonshineConfig, encoder_num_hidden_layers=1, decoder_num_hidden_layers=1, encoder_num_attention_heads=4,
        decoder_num_attention_heads=4, encoder_num_key_value_heads=4, decoder_num_key_value_heads=4,
    )  # fmt: skip
    sound = torch.randn(1, 4000, generator=torch.Generator().manual_seed(3))
    return MoonshineForConditionalGeneration(config), {
        "input_values": sound,
        "decoder_input_ids": torch.tensor([[1, 5, 6]]),
    }


def bert_to_bert() -> tuple[Any, dict[str, Any]]:
    from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

    decoder = tiny(BertConfig, is_decoder=True, add_cross_attention=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(tiny(BertConfig), decoder)
    return EncoderDecoderModel(config=config), seq2seq()


def vision_encoder_decoder() -> tuple[Any, dict[str, Any]]:
    import torch
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    decoder = tiny(GPT2Config, is_decoder=True, add_cross_attention=True)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        tiny(ViTConfig, image_size=32, patch_size=16), decoder
    )
    return VisionEncoderDecoderModel(config=config), pixels(decoder_input_ids=torch.tensor([[1, 5, 6]]))


DETECTOR: dict[str, Any] = {
    "d_model": 32,
    "encoder_hidden_dim": 32,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_queries": 10,
    "decoder_in_channels": [32, 32, 32],
    "encoder_in_channels": [16, 16, 32],
    "num_labels": 5,
}


def d_fine() -> tuple[Any, dict[str, Any]]:
    from transformers import DFineConfig, DFineForObjectDetection, HGNetV2Config

    backbone = HGNetV2Config(
        stage_in_channels=[16, 16, 16, 16], stage_mid_channels=[16, 16, 16, 16], stage_out_channels=[16, 16, 16, 32],
        stage_num_blocks=[1, 1, 1, 1], stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, False, False], stage_kernel_size=[3, 3, 3, 3],
        stage_numb_of_layers=[1, 1, 1, 1],
        stem_channels=[3, 16, 16], hidden_sizes=[16, 16, 16, 32], out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    return DFineForObjectDetection(DFineConfig(backbone_config=backbone, **DETECTOR)), pixels(64)


def rt_detr_v2() -> tuple[Any, dict[str, Any]]:
    from transformers import RTDetrV2Config, RTDetrV2ForObjectDetection

    return RTDetrV2ForObjectDetection(RTDetrV2Config(backbone_config=tiny_resnet(), **DETECTOR)), pixels(64)


def grounding_dino() -> tuple[Any, dict[str, Any]]:
    from transformers import BertConfig, GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

    backbone = SwinConfig(
        window_size=7,
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )
    config = GroundingDinoConfig(
        backbone_config=backbone, text_config=tiny(BertConfig), d_model=32, encoder_layers=1, decoder_layers=2,
        encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4, num_queries=10,
        num_feature_levels=4,
    )  # fmt: skip
    return GroundingDinoForObjectDetection(config), pixels(128, **text(input_ids=text()["input_ids"][:1]))


FAMILIES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    # decoders
    "qwen3": causal("Qwen3ForCausalLM"),
    "llama": causal("LlamaForCausalLM"),
    "gemma": causal("GemmaForCausalLM"),
    "gemma2": causal("Gemma2ForCausalLM"),
    "gpt2": causal("GPT2LMHeadModel"),
    "opt": causal("OPTForCausalLM"),
    "bloom": causal("BloomForCausalLM"),
    "falcon": causal("FalconForCausalLM"),
    "phi3": causal("Phi3ForCausalLM"),
    "olmo2": causal("Olmo2ForCausalLM"),
    "mamba2": causal("Mamba2ForCausalLM", num_heads=8, head_dim=8, n_groups=2, chunk_size=8),
    "rwkv": causal("RwkvForCausalLM", attention_hidden_size=32),
    # experts
    "mixtral": causal("MixtralForCausalLM"),
    "qwen3_moe": causal("Qwen3MoeForCausalLM"),
    "olmoe": causal("OlmoeForCausalLM"),
    "granitemoe": causal("GraniteMoeForCausalLM"),
    "gpt_oss": causal("GptOssForCausalLM"),
    "switch": translation(
        "SwitchTransformersForConditionalGeneration", num_sparse_encoder_layers=1, num_sparse_decoder_layers=1
    ),
    # encoders, with tied biases
    "bert": causal("BertForMaskedLM"),
    "bert_pretraining": causal("BertForPreTraining"),
    "roberta": causal("RobertaForMaskedLM"),
    "distilbert": causal("DistilBertForMaskedLM"),
    "albert": causal("AlbertForMaskedLM"),
    "electra": causal("ElectraForMaskedLM"),
    "modernbert": causal("ModernBertForMaskedLM"),
    # encoder-decoders
    "bart": translation("BartForConditionalGeneration"),
    "mbart": translation("MBartForConditionalGeneration"),
    "marian": translation("MarianMTModel"),
    "pegasus": translation("PegasusForConditionalGeneration"),
    "m2m_100": translation("M2M100ForConditionalGeneration"),
    "t5": translation("T5ForConditionalGeneration"),
    "mt5": translation("MT5ForConditionalGeneration"),
    "bert_to_bert": bert_to_bert,
    # vision and language
    "llava": llava,
    "paligemma": paligemma,
    "gemma3": gemma3,
    "qwen2_vl": qwen2_vl,
    "internvl": internvl,
    "idefics3": idefics3,
    "blip": blip,
    "vision_encoder_decoder": vision_encoder_decoder,
    # speech
    "whisper": whisper,
    "speech_to_text": speech_to_text,
    "moonshine": moonshine,
    # detectors
    "d_fine": d_fine,
    "rt_detr_v2": rt_detr_v2,
    "grounding_dino": grounding_dino,
}


def shake(model: Any) -> None:
    """No two parameters are left equal by their initialisation (norms of ones, biases of zeros)."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)


def write_naive(model: Any, folder: Path) -> set[str]:
    """The whole state dict under the hub's names; returns the keys of the checkpoint."""
    from safetensors.torch import save_file
    from transformers.core_model_loading import revert_weight_conversion

    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    left_out = model._keys_to_ignore_on_save or ()
    whole = {k: v.detach().clone() for k, v in model.state_dict().items() if k not in left_out}
    state = revert_weight_conversion(model, whole)
    save_file({k: v.clone().contiguous() for k, v in state.items()}, folder / "model.safetensors", {"format": "pt"})
    return set(state)


def stored(folder: Path) -> set[str]:
    return set(read_shapes(folder))


def load(model_class: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    model, info = model_class.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    return model.eval(), info


def tensors_of(outputs: Any) -> list[Any]:
    import torch

    if isinstance(outputs, torch.Tensor):
        return [outputs]
    if isinstance(outputs, dict):
        outputs = outputs.values()
    return [t for o in outputs for t in tensors_of(o)] if isinstance(outputs, (list, tuple, type({}.values()))) else []


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rewritten_checkpoint_loads_as_the_one_that_save_pretrained_writes(family: str, tmp_path: Path) -> None:
    import torch

    naive, out, reference = tmp_path / "naive", tmp_path / "out", tmp_path / "reference"
    naive.mkdir()
    with quiet():
        torch.manual_seed(0)
        model, inputs = FAMILIES[family]()
        model.eval()
        shake(model)
        written = write_naive(model, naive)
        model.save_pretrained(reference)
    assert model.all_tied_weights_keys, "the family has no active ties: it proves nothing"

    tierewrite.rewrite(naive, out)

    assert stored(out) < written
    assert stored(out) == stored(reference)
    with quiet():
        ours, our_info = load(type(model), out)
        theirs, their_info = load(type(model), reference)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        ignored = type(model)._keys_to_ignore_on_load_missing or []
        found = {k for k in our_info[kind] if not any(re.search(p, str(k)) for p in ignored)}
        assert found == set(), kind
        assert set(our_info[kind]) == set(their_info[kind])
    right = theirs.state_dict()
    state = ours.state_dict()
    assert state.keys() == right.keys()
    for name, tensor in right.items():
        assert torch.equal(state[name], tensor), name
    with torch.no_grad():
        torch.manual_seed(1)
        our_outputs = tensors_of(ours(**inputs))
        torch.manual_seed(1)
        their_outputs = tensors_of(theirs(**inputs))
    assert our_outputs
    for one, other in zip(our_outputs, their_outputs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["qwen3", "bert", "bart", "t5", "mixtral", "llava", "whisper", "d_fine"])
def test_a_checkpoint_that_kept_only_the_aliases_names_comes_out_the_same(family: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    naive, out, again = tmp_path / "naive", tmp_path / "out", tmp_path / "again"
    naive.mkdir()
    with quiet():
        torch.manual_seed(0)
        model, _ = FAMILIES[family]()
        shake(model)
        write_naive(model, naive)
    tierewrite.rewrite(naive, out)
    canonical = {t.target for t in tierewrite.plan(naive).tensors.values() if t.action.value == "drop"}
    assert canonical
    state = {k: v for k, v in load_file(naive / "model.safetensors").items() if k not in canonical}
    save_file(state, naive / "model.safetensors", {"format": "pt"})

    tierewrite.rewrite(naive, again)

    right, found = load_file(out / "model.safetensors"), load_file(again / "model.safetensors")
    assert found.keys() == right.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in right.items())


def test_at_least_25_families_of_every_kind_are_loaded() -> None:
    assert len(FAMILIES) >= 25
