"""`check --for vllm` without vLLM: every kind of defect, and what only looks like one, over many model classes.

What vLLM 0.33's own loader does with each kind was measured; consumers/vllm/classes.json is what its classes do with
names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tierewrite
from tests.defects import Draft, bf16, f32
from tests.tiny_classes import (
    awq,
    compressed_fp8,
    fp8_blocks,
    gptq,
    linears,
    mxfp4,
    nvfp4,
    ones,
    plain,
    quark_fp8,
    renamed,
    zeros,
)
from tierewrite.consumers import ReadinessReport, check
from tierewrite.errors import NotReady

# The tiny models' hidden size is no multiple of 128.
TINY = {"alignment"}


def checked(draft: Draft, folder: Path, **options: Any) -> ReadinessReport:
    draft.write(folder / "src")
    return check(folder / "src", "vllm", loader="off", **options)


def errors(report: ReadinessReport) -> set[str]:
    return {finding.id for finding in report.errors}


def warnings(report: ReadinessReport) -> set[str]:
    return {finding.id for finding in report.warnings} - TINY


def where(report: ReadinessReport, which: str) -> tuple[str, ...]:
    (found,) = [finding for finding in report.findings if finding.id == which]
    return found.where


# --- sound checkpoints of many classes and formats ---------------------------------------------------------


def with_mtp(draft: Draft) -> Draft:
    """The layer for multi-token prediction that GLM-4.5 and DeepSeek-V3 store behind the last one."""
    last = "model.layers.2"
    for name in [n for n in draft.names() if n.startswith("model.layers.1.")]:
        draft[name.replace("layers.1", "layers.2", 1)] = draft[name]
    for leaf in ("eh_proj", "embed_tokens", "shared_head.head"):
        draft[f"{last}.{leaf}.weight"] = zeros("BF16", 64, 64)
    for leaf in ("enorm", "hnorm", "shared_head.norm"):
        draft[f"{last}.{leaf}.weight"] = bf16(1.0, (64,))
    draft.config["num_nextn_predict_layers"] = 1
    return draft


def without_mtp(draft: Draft) -> Draft:
    draft.config["num_nextn_predict_layers"] = 0
    return draft


def with_shared_kv(draft: Draft) -> Draft:
    """K and V of the layers that use those of earlier ones, as Google's files have them."""
    for name in [n for n in draft.names() if n.startswith("model.layers.0.self_attn.") and ".q_" not in n]:
        for layer in (2, 3):
            draft[name.replace("layers.0", f"layers.{layer}", 1)] = draft[name]
    return draft


def with_buffers(draft: Draft) -> Draft:
    draft["transformer.h.0.attn.masked_bias"] = bf16(-1.0, ())
    draft["transformer.h.0.attn.bias"] = zeros("U8", 1, 1, 64, 64)
    return draft


def cross_attention(draft: Draft) -> Draft:
    nvfp4(draft, ignore=("proj_out",))
    draft["model.decoder.layers.0.encoder_attn.q_proj.weight_scale_2"] = f32(0.125)
    draft["model.decoder.layers.0.encoder_attn.q_proj.input_scale"] = f32(0.5)
    return draft


def targeted(draft: Draft, target: str) -> Draft:
    draft.config["quantization_config"]["config_groups"]["group_0"]["targets"] = [target]
    return draft


SOUND: dict[str, Callable[[], Draft]] = {
    "llama": lambda: plain("LlamaForCausalLM"),
    "mixtral": lambda: plain("MixtralForCausalLM"),
    "qwen3moe": lambda: plain("Qwen3MoeForCausalLM"),
    "qwen3moe in memory": lambda: plain("Qwen3MoeForCausalLM", memory=True),
    "gpt2 with buffers": lambda: with_buffers(plain("GPT2LMHeadModel")),
    "glm4moe with mtp": lambda: with_mtp(plain("Glm4MoeForCausalLM")),
    "deepseek with mtp": lambda: with_mtp(plain("DeepseekV3ForCausalLM")),
    "gemma4 with shared kv": lambda: with_shared_kv(plain("Gemma4ForCausalLM")),
    "gpt-oss mxfp4": lambda: mxfp4(plain("GptOssForCausalLM")),
    "llama awq": lambda: awq(plain("LlamaForCausalLM")),
    "llama gptq": lambda: gptq(plain("LlamaForCausalLM")),
    "mixtral awq": lambda: awq(plain("MixtralForCausalLM")),
    "llama nvfp4": lambda: nvfp4(plain("LlamaForCausalLM")),
    "qwen3moe nvfp4": lambda: nvfp4(plain("Qwen3MoeForCausalLM"), ignore=("lm_head", "model.layers.*.mlp.gate")),
    "qwen3moe nvfp4 with plain experts of one tensor each projection": lambda: nvfp4(
        plain("Qwen3MoeForCausalLM", memory=True), ignore=(*PLAIN_ROUTERS, "*.mlp.experts")
    ),
    "deepseek fp8 blocks": lambda: without_mtp(fp8_blocks(plain("DeepseekV3ForCausalLM"))),
    "llama compressed fp8": lambda: compressed_fp8(plain("LlamaForCausalLM")),
    "llama compressed fp8, a pattern": lambda: compressed_fp8(
        plain("LlamaForCausalLM"), ".0.self_attn", ignore=("re:.*lm_head", "re:model.layers.0.self_attn.*")
    ),
    "llama compressed fp8 of the mlp by its targets": lambda: targeted(
        compressed_fp8(plain("LlamaForCausalLM"), "self_attn", ignore=()), "re:.*mlp.*"
    ),
    "gemma3 vision nvfp4": lambda: renamed(
        nvfp4(plain("Gemma3ForConditionalGeneration"), "vision", ignore=("language_model.lm_head", "vision_tower*")),
        lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
    ),
    "qwen3moe quark fp8": lambda: quark_fp8(plain("Qwen3MoeForCausalLM"), exclude=("re:.*mlp.gate$",)),
    "lfm2 nvfp4, a dense mlp of w1, w2 and w3": lambda: nvfp4(plain("Lfm2ForCausalLM")),
    "lfm2 compressed fp8": lambda: compressed_fp8(plain("Lfm2ForCausalLM")),
    "whisper nvfp4 with another q": lambda: cross_attention(plain("WhisperForConditionalGeneration")),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_checkpoint_has_no_error(name: str, tmp_path: Path) -> None:
    report = checked(SOUND[name](), tmp_path)
    assert errors(report) == set()
    assert warnings(report) <= {"lm-head-stored"}


@pytest.mark.parametrize("name", ["glm4moe with mtp", "llama awq", "whisper nvfp4 with another q"])
def test_sound_checkpoint_is_rewritten_for_vllm_as_it_is(name: str, tmp_path: Path) -> None:
    SOUND[name]().write(tmp_path / "src")
    tierewrite.prepare_for_vllm(tmp_path / "src", tmp_path / "out")
    before, after = (Draft.read(tmp_path / where) for where in ("src", "out"))
    assert {n: before[n] for n in before.names() if n != "proj_out.weight"} == {n: after[n] for n in after.names()}
    assert before.config == after.config


# --- defects -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One kind of defect: what is found, and where; `fixed`: by `rewrite --for vllm`."""

    make: Callable[[], Draft]
    finding: str
    at: str = ""
    severity: str = "error"
    fixed: bool = False


def dropped(draft: Draft, *names: str) -> Draft:
    draft.drop(*names)
    return draft


def bare(name: str) -> str:
    return name.removeprefix("model.")


def other_scale(draft: Draft, module: str) -> Draft:
    draft[f"{module}.weight_scale_2"] = f32(4.0)
    return draft


def half_scales(draft: Draft) -> Draft:
    for module in linears(plain("Qwen3ForCausalLM")):
        scale = draft[f"{module}.weight_scale"]
        draft[f"{module}.weight_scale"] = ones(scale.shape[0], scale.shape[1] // 2)
    return draft


def kv_scales(draft: Draft, *kinds: str) -> Draft:
    for layer in range(2):
        for kind in kinds if layer == 0 else ("k", "v"):
            draft[f"model.layers.{layer}.self_attn.qkv_proj.{kind}_scale"] = f32(0.5)
    return draft


def one_more(architecture: str, layer: str, number: int) -> Draft:
    """The class' checkpoint with `layer` once more under another number."""
    draft = plain(architecture)
    head = layer.rstrip(".").rpartition(".")[0]
    for name in [n for n in draft.names() if n.startswith(layer)]:
        draft[f"{head}.{number}.{name.removeprefix(layer)}"] = draft[name]
    return draft


def rows_less(draft: Draft, name: str) -> Draft:
    """One row less of a weight."""
    dtype, (rows, *rest) = draft[name].dtype, draft[name].shape
    draft[name] = zeros(dtype, rows - 1, *rest)
    return draft


def other_shape(draft: Draft, name: str, *shape: int) -> Draft:
    """A tensor of zeros in the place of another."""
    draft[name] = zeros(draft[name].dtype, *shape)
    return draft


def with_kv(draft: Draft) -> Draft:
    for layer in range(2):
        for kind in ("k", "v"):
            draft[f"model.layers.{layer}.self_attn.{kind}_proj.{kind}_scale"] = f32(0.5)
    return draft


def listed(draft: Draft, entry: str, *modules: str | None) -> Draft:
    """The list of modules that are not quantized; None: a null in its place."""
    draft.config["quantization_config"][entry] = None if None in modules else list(modules)
    return draft


def declared_mtp(draft: Draft) -> Draft:
    draft.config["num_nextn_predict_layers"] = 1
    return draft


L0 = "model.layers.0"
ROUTERS = ("model.layers.0.mlp.gate", "model.layers.1.mlp.gate")
PLAIN_ROUTERS = ("lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate")
KINDS: dict[str, Kind] = {
    "llama without the base prefix": Kind(
        lambda: renamed(plain("LlamaForCausalLM"), bare), "names-not-read", "embed_tokens.weight"
    ),
    "qwen3moe nvfp4 without the base prefix": Kind(
        lambda: renamed(nvfp4(plain("Qwen3MoeForCausalLM"), ignore=PLAIN_ROUTERS), bare), "names-not-read"
    ),
    "mixtral under memory names": Kind(
        lambda: plain("MixtralForCausalLM", memory=True), "names-not-read", f"{L0}.mlp.gate.weight"
    ),
    "gemma3 under the vision names of transformers 5": Kind(
        lambda: plain("Gemma3ForConditionalGeneration"), "names-not-read"
    ),
    "llama without o_proj": Kind(
        lambda: dropped(plain("LlamaForCausalLM"), f"{L0}.self_attn.o_proj.weight"), "parameter-missing"
    ),
    "llama without q_proj": Kind(
        lambda: dropped(plain("LlamaForCausalLM"), f"{L0}.self_attn.q_proj.weight"), "fused-shard-missing"
    ),
    "llama without a norm": Kind(lambda: dropped(plain("LlamaForCausalLM"), "model.norm.weight"), "parameter-missing"),
    "qwen3moe nvfp4 without an expert": Kind(
        lambda: dropped(nvfp4(plain("Qwen3MoeForCausalLM"), ignore=PLAIN_ROUTERS), f"{L0}.mlp.experts.1."),
        "expert-missing",
        f"{L0}.mlp.experts.1",
    ),
    "mixtral without the last expert": Kind(
        lambda: dropped(plain("MixtralForCausalLM"), f"{L0}.block_sparse_moe.experts.3."), "expert-missing"
    ),
    "mixtral without w2 of one expert": Kind(
        lambda: dropped(plain("MixtralForCausalLM"), f"{L0}.block_sparse_moe.experts.1.w2.weight"),
        "parameter-missing",
        f"{L0}.block_sparse_moe.experts.1.w2.weight",
    ),
    "deepseek fp8 without up_proj of one expert": Kind(
        lambda: dropped(
            fp8_blocks(plain("DeepseekV3ForCausalLM")),
            "model.layers.1.mlp.experts.0.up_proj.",
        ),
        "fused-shard-missing",
        "model.layers.1.mlp.experts.0.up_proj.weight",
    ),
    "fp8 blocks without a scale": Kind(
        lambda: dropped(fp8_blocks(plain("LlamaForCausalLM")), f"{L0}.self_attn.o_proj.weight_scale_inv"),
        "scale-missing",
        f"{L0}.self_attn.o_proj.weight_scale_inv",
    ),
    "compressed fp8 without a scale": Kind(
        lambda: dropped(compressed_fp8(plain("LlamaForCausalLM")), f"{L0}.mlp.down_proj.weight_scale"), "scale-missing"
    ),
    "awq without zeros": Kind(
        lambda: dropped(awq(plain("LlamaForCausalLM")), f"{L0}.mlp.down_proj.qzeros"), "scale-missing"
    ),
    "compressed fp8 with q ignored": Kind(
        lambda: compressed_fp8(plain("LlamaForCausalLM"), ignore=("lm_head", f"{L0}.self_attn.q_proj")),
        "ignore-partly-fused",
        fixed=True,
    ),
    "compressed fp8 with routers not listed": Kind(
        lambda: compressed_fp8(plain("Qwen3MoeForCausalLM")),
        "unlisted-unquantized",
        f"{L0}.mlp.gate.weight",
        fixed=True,
    ),
    "fp8 blocks with attention not listed": Kind(
        lambda: fp8_blocks(plain("Qwen3ForCausalLM"), "self_attn"), "unlisted-unquantized", fixed=True
    ),
    "nvfp4 of the mlp, attention not listed": Kind(
        lambda: nvfp4(plain("Qwen3ForCausalLM"), "self_attn"), "unlisted-unquantized", fixed=True
    ),
    "nvfp4 with an empty list": Kind(
        lambda: nvfp4(plain("Qwen3ForCausalLM"), "self_attn", ignore=()), "unlisted-lm-head", fixed=True
    ),
    "nvfp4 with the vision tower not listed": Kind(
        lambda: nvfp4(plain("Qwen3VLForConditionalGeneration"), "visual"), "unlisted-unquantized", fixed=True
    ),
    "nvfp4 with q_a and kv_a of other scales": Kind(
        lambda: other_scale(
            without_mtp(nvfp4(plain("DeepseekV3ForCausalLM"), ignore=("lm_head", "model.layers.1.mlp.gate"))),
            f"{L0}.self_attn.q_a_proj",
        ),
        "fused-weight-scale-differs",
        f"{L0}.self_attn.q_a_proj.weight_scale_2",
        fixed=True,
    ),
    "nvfp4 with w1 and w3 of other scales": Kind(
        lambda: other_scale(
            nvfp4(plain("MixtralForCausalLM"), ignore=("lm_head", "*gate")), f"{L0}.block_sparse_moe.experts.0.w1"
        ),
        "fused-weight-scale-differs",
        fixed=True,
    ),
    "nvfp4 with half the block scales": Kind(lambda: half_scales(nvfp4(plain("Qwen3ForCausalLM"))), "wrong-shape"),
    "nvfp4 with w1 and w3 of a dense mlp of other scales": Kind(
        lambda: other_scale(nvfp4(plain("Lfm2ForCausalLM")), f"{L0}.feed_forward.w1"),
        "fused-weight-scale-differs",
        fixed=True,
    ),
    "lfm2 nvfp4 without a scale of w2": Kind(
        lambda: dropped(nvfp4(plain("Lfm2ForCausalLM")), f"{L0}.feed_forward.w2.weight_scale"),
        "scale-missing",
        f"{L0}.feed_forward.w2.weight_scale",
    ),
    "nvfp4 with plain experts of one tensor each projection, not listed": Kind(
        lambda: nvfp4(plain("Qwen3MoeForCausalLM", memory=True), ignore=PLAIN_ROUTERS),
        "unlisted-unquantized",
        f"{L0}.mlp.experts.gate_up_proj",
        fixed=True,
    ),
    "kv scale of a fused qkv missing": Kind(
        lambda: kv_scales(nvfp4(plain("Phi3ForCausalLM"), kv=True), "k"),
        "kv-scale-missing",
        f"{L0}.self_attn.qkv_proj.v_scale",
    ),
    "mtp declared and lost": Kind(lambda: declared_mtp(plain("Glm4MoeForCausalLM")), "mtp-missing", severity="warning"),
    "a list entry that matches nothing": Kind(
        lambda: nvfp4(plain("LlamaForCausalLM"), ignore=("lm_head", "model.visual*")),
        "ignore-matches-nothing",
        severity="warning",
    ),
    "a class that vLLM cannot use": Kind(lambda: plain("BartForConditionalGeneration"), "architectures"),
    "layer beyond the last": Kind(
        lambda: renamed(plain("LlamaForCausalLM"), lambda n: n.replace("layers.1.mlp", "layers.2.mlp")),
        "unexpected-tensor",
    ),
}


KINDS |= {
    f"{name} with a layer beyond the last": Kind(make, "unexpected-tensor", at)
    for name, make, at in (
        ("gpt2", lambda: one_more("GPT2LMHeadModel", "transformer.h.1.", 2), "transformer.h.2.ln_1.weight"),
        ("gpt-oss", lambda: one_more("GptOssForCausalLM", "model.layers.1.", 2), "model.layers.2.mlp.router.weight"),
        (
            "whisper",
            lambda: one_more("WhisperForConditionalGeneration", "model.decoder.layers.0.", 1),
            "model.decoder.layers.1.fc1.weight",
        ),
        (
            "glm4moe, behind its mtp layer,",
            lambda: one_more("Glm4MoeForCausalLM", "model.layers.1.", 3),
            "model.layers.3.input_layernorm.weight",
        ),
    )
}
KINDS |= {
    f"{make.__name__} with scales of shape {shape}": Kind(
        lambda make=make, leaf=leaf, shape=shape: other_shape(
            make(plain("LlamaForCausalLM")), f"{L0}.mlp.down_proj.{leaf}", *shape
        ),
        "wrong-shape",
        f"{L0}.mlp.down_proj.{leaf}",
    )
    for make, leaf, shape in (
        (compressed_fp8, "weight_scale", (64,)),
        (compressed_fp8, "weight_scale", (32, 1)),
        (compressed_fp8, "weight_scale", ()),
        (fp8_blocks, "weight_scale_inv", (2, 8)),
        (fp8_blocks, "weight_scale_inv", (1,)),
    )
}
KINDS |= {
    f"{name} with an expert of another size": Kind(make, "wrong-shape", at)
    for name, make, at in (
        (
            "mixtral",
            lambda: rows_less(plain("MixtralForCausalLM"), f"{L0}.block_sparse_moe.experts.1.w1.weight"),
            f"{L0}.block_sparse_moe.experts.1.w1.weight",
        ),
        (
            "qwen3moe fp8 blocks",
            lambda: rows_less(fp8_blocks(plain("Qwen3MoeForCausalLM")), f"{L0}.mlp.experts.3.down_proj.weight"),
            f"{L0}.mlp.experts.3.down_proj.weight",
        ),
        (
            "mixtral awq",
            lambda: rows_less(awq(plain("MixtralForCausalLM")), f"{L0}.block_sparse_moe.experts.1.w2.qweight"),
            f"{L0}.block_sparse_moe.experts.1.w2.qweight",
        ),
    )
}


KINDS |= {
    "llama with the base prefix twice": Kind(
        lambda: renamed(plain("LlamaForCausalLM"), lambda name: f"model.{name}"),
        "names-not-read",
        "model.model.norm.weight",
    ),
    "kv scales and no config": Kind(
        lambda: with_kv(plain("LlamaForCausalLM")), "unexpected-tensor", f"{L0}.self_attn.k_proj.k_scale"
    ),
    "fp8 blocks with an entry for one expert": Kind(
        lambda: listed(
            fp8_blocks(plain("Qwen3MoeForCausalLM")), "modules_to_not_convert", f"{L0}.mlp.experts.1.up_proj", *ROUTERS
        ),
        "ignore-one-expert",
        fixed=True,
    ),
    "quark fp8 with attention not listed": Kind(
        lambda: quark_fp8(plain("LlamaForCausalLM"), "self_attn"), "unlisted-unquantized", fixed=True
    ),
    "quark fp8 with q listed": Kind(
        lambda: quark_fp8(plain("LlamaForCausalLM"), exclude=(f"{L0}.self_attn.q_proj",)),
        "ignore-partly-fused",
        fixed=True,
    ),
    "quark fp8 without a scale": Kind(
        lambda: dropped(quark_fp8(plain("LlamaForCausalLM")), f"{L0}.mlp.down_proj.weight_scale"), "scale-missing"
    ),
    "quark fp8 with an entry for one expert": Kind(
        lambda: quark_fp8(plain("Qwen3MoeForCausalLM"), exclude=(*ROUTERS, f"{L0}.mlp.experts.2.down_proj")),
        "ignore-one-expert",
        fixed=True,
    ),
    "quark without a list": Kind(
        lambda: listed(quark_fp8(plain("LlamaForCausalLM")), "exclude", None), "quant-config-invalid"
    ),
    "compressed fp8 with a list of null": Kind(
        lambda: listed(compressed_fp8(plain("LlamaForCausalLM")), "ignore", None), "quant-config-invalid"
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_kind_of_defect_is_found(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    report = checked(kind.make(), tmp_path)
    assert (kind.finding, kind.severity) in {(f.id, f.severity) for f in report.findings}
    assert not kind.at or kind.at in where(report, kind.finding)
    assert "remove" not in " ".join(finding.fix for finding in report.errors)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.fixed])
def test_kind_of_defect_is_fixed_by_a_rewrite(name: str, tmp_path: Path) -> None:
    KINDS[name].make().write(tmp_path / "src")
    tierewrite.prepare_for_vllm(tmp_path / "src", tmp_path / "out")
    report = check(tmp_path / "out", "vllm", loader="off")
    assert (errors(report), warnings(report)) == (set(), set())
    verified = tierewrite.verify(tmp_path / "src", tmp_path / "out", consumer="vllm")
    assert verified.ok, verified.problems


def test_weights_of_other_formats_are_not_called_those_of_a_few(tmp_path: Path) -> None:
    draft = awq(plain("LlamaForCausalLM"))
    draft["model.embed_tokens.weight"] = zeros("F8_E4M3", *draft["model.embed_tokens.weight"].shape)
    assert "quant-algo-mismatch" not in errors(checked(draft, tmp_path))


UNFIXED = [name for name, kind in KINDS.items() if not kind.fixed and kind.severity == "error"]


@pytest.mark.parametrize("name", UNFIXED[::4])
def test_other_kinds_of_defects_are_refused_by_a_rewrite(name: str, tmp_path: Path) -> None:
    KINDS[name].make().write(tmp_path / "src")
    with pytest.raises(NotReady, match=KINDS[name].finding):
        tierewrite.prepare_for_vllm(tmp_path / "src", tmp_path / "out")


def test_what_is_missing_from_an_unquantized_checkpoint_is_noticed_only_if_it_is_a_norm(tmp_path: Path) -> None:
    draft = dropped(plain("LlamaForCausalLM"), "model.norm.weight", f"{L0}.self_attn.o_proj.weight")
    found = {f.where: f.consequence for f in checked(draft, tmp_path).errors}
    assert found == {
        ("model.norm.weight",): "vLLM refuses to load",
        (f"{L0}.self_attn.o_proj.weight",): "vLLM does not notice: uninitialised memory is used",
    }


@pytest.mark.parametrize("make", [compressed_fp8, fp8_blocks])
@pytest.mark.parametrize("leaf", ["self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_a_weight_of_one_byte_an_element_has_the_shape_of_its_parameter(
    make: Callable[[Draft], Draft], leaf: str, tmp_path: Path
) -> None:
    draft = make(plain("LlamaForCausalLM"))
    name = f"{L0}.{leaf}.weight"
    rows, columns = draft[name].shape
    draft[name] = zeros(draft[name].dtype, rows - 1, columns)
    assert where(checked(draft, tmp_path), "wrong-shape") == (name,)


@pytest.mark.parametrize(
    ("make", "which"),
    [
        (
            lambda: compressed_fp8(
                plain("Qwen3MoeForCausalLM"), "gate", ignore=("re:.*gate$", f"{L0}.self_attn.o_proj", "lm_head")
            ),
            "ignored-but-quantized",
        ),
        (lambda: undescribed(compressed_fp8(plain("Qwen3MoeForCausalLM"), "mlp")), "quant-config-missing"),
    ],
)
def test_scales_of_modules_that_are_built_plain_abort_not_every_class(
    make: Callable[[], Draft], which: str, tmp_path: Path
) -> None:
    (finding,) = [f for f in checked(make(), tmp_path).errors if f.id == which]
    assert "aborts at their scales" in finding.consequence
    assert "Qwen3-MoE's, take FP8 and INT8 weights unscaled" in finding.consequence


def undescribed(draft: Draft) -> Draft:
    del draft.config["quantization_config"]
    return draft


def test_setting_the_group_size_to_half_the_scales_makes_no_garbage_pass(tmp_path: Path) -> None:
    draft = half_scales(nvfp4(plain("Qwen3ForCausalLM")))
    for group in draft.config["quantization_config"]["config_groups"]["group_0"].values():
        if isinstance(group, dict):
            group["group_size"] = 32
    draft.config["quantization_config"]["group_size"] = 32
    report = checked(draft, tmp_path)
    assert errors(report) == {"wrong-shape"}
    assert not any("group_size" in finding.fix for finding in report.findings)


def test_modules_that_a_rewrite_lists_are_those_that_are_plain(tmp_path: Path) -> None:
    KINDS["nvfp4 of the mlp, attention not listed"].make().write(tmp_path / "src")
    tierewrite.prepare_for_vllm(tmp_path / "src", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    attention = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"]
    assert sorted(config["quantization_config"]["ignore"]) == sorted(["lm_head", *attention])


def declared(quantization: object) -> Draft:
    draft = plain("LlamaForCausalLM")
    draft.config["quantization_config"] = quantization
    return draft


@pytest.mark.parametrize(
    ("quantization", "found"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "vLLM 0.33 has no method 'bitsandbytes'"),
        ({"quant_method": "hqq"}, "vLLM 0.33 has no method 'hqq'"),
        ({"quant_method": "exl3", "bits": 4}, "vLLM 0.33 has no method 'exl3'"),
        ({"quant_method": "fp8_per_tensor"}, "vLLM 0.33 has no method 'fp8_per_tensor'"),
        ({"quant_method": "FBGEMM_FP8"}, "fbgemm_fp8 is deprecated in vLLM 0.33"),
        ({"quant_method": None}, "quant_method is no name"),
        ({"quant_method": 8}, "quant_method is no name"),
        ([{"quant_method": "fp8"}], "quantization_config is no object"),
        ("fp8", "quantization_config is no object"),
    ],
)
def test_a_method_that_vllm_does_not_take_is_an_error(quantization: object, found: str, tmp_path: Path) -> None:
    (finding,) = checked(declared(quantization), tmp_path).errors
    assert (finding.id, finding.found) == ("quant-config-invalid", found)


@pytest.mark.parametrize("quantization", [None, {}, {"quant_method": ""}, {"group_size": 64, "bits": 4}])
def test_a_config_without_a_method_harms_nobody_where_nothing_is_quantized(quantization: Any, tmp_path: Path) -> None:
    assert errors(checked(declared(quantization), tmp_path)) == set()


@pytest.mark.parametrize(
    "architecture", ["CodeGenForCausalLM", "MptForCausalLM", "MPTForCausalLM", "BaichuanForCausalLM", "XGLMForCausalLM"]
)
def test_a_class_that_vllm_refuses_by_name_is_an_error(architecture: str, tmp_path: Path) -> None:
    draft = plain("LlamaForCausalLM")
    draft.config |= {"architectures": [architecture], "auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}
    assert "architectures" in errors(checked(draft, tmp_path))


def undone(draft: Draft) -> Draft:
    """The config of a quantized checkpoint beside the plain weights."""
    original = plain(draft.config["architectures"][0])
    original.config["quantization_config"] = draft.config["quantization_config"]
    return original


@pytest.mark.parametrize("make", [nvfp4, fp8_blocks, compressed_fp8, quark_fp8])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3MoeForCausalLM"])
def test_a_config_of_quantized_weights_beside_plain_ones_is_an_error(
    make: Callable[[Draft], Draft], architecture: str, tmp_path: Path
) -> None:
    assert errors(checked(undone(make(plain(architecture))), tmp_path)) == {"quant-algo-mismatch"}


@pytest.mark.parametrize("ignore", ["*", "model.layers.*"])
def test_a_config_that_excludes_every_module_suits_plain_weights(ignore: str, tmp_path: Path) -> None:
    draft = undone(nvfp4(plain("LlamaForCausalLM"), ignore=(ignore, "lm_head")))
    assert errors(checked(draft, tmp_path)) == set()


# --- what is not known -------------------------------------------------------------------------------------


def unknown(architecture: str, **config: Any) -> Draft:
    draft = plain("LlamaForCausalLM")
    draft.config |= {"architectures": [architecture], **config}
    draft.drop(f"{L0}.self_attn.o_proj.weight")
    draft["mystery.weight"] = zeros("BF16", 4, 4)
    return draft


REMOTE = {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}, "model_type": "x"}


@pytest.mark.parametrize(
    ("architecture", "config", "said"),
    [
        ("LlamaForCausalLMEagle3", {"model_type": "x"}, "what vLLM's class LlamaForCausalLMEagle3 reads"),
        ("InternVLChatModel", REMOTE, "what vLLM's class InternVLChatModel reads"),
        ("SomebodysForCausalLM", REMOTE, "vLLM has no class of its own for SomebodysForCausalLM"),
    ],
)
def test_a_class_that_is_not_known_is_a_note(architecture: str, config: Any, said: str, tmp_path: Path) -> None:
    report = checked(unknown(architecture, **config), tmp_path)
    assert report.errors == ()
    assert any(said in note for note in report.notes)


def test_names_and_dtypes_of_a_class_that_vllm_does_not_have_are_notes(tmp_path: Path) -> None:
    """A head that was quantized beside its embedding, of a class that only transformers has: vLLM may keep it apart."""
    draft = plain("LlamaForCausalLM")
    draft.config = {
        "architectures": ["T5GemmaForConditionalGeneration"],
        "model_type": "t5gemma",
        "quantization_config": {"quant_method": "quark", "exclude": []},
    }
    draft["model.decoder.embed_tokens.weight"] = zeros("BF16", 16, 8)
    draft["lm_head.out_proj.weight"] = zeros("I8", 16, 8)
    report = checked(draft, tmp_path)
    assert report.errors == ()
    told = [note for note in report.notes if "lm_head.out_proj.weight" in note]
    assert any(note.startswith("names that are one parameter in transformers may be several") for note in told)
    assert any(note.startswith("whether vLLM's class has parameters for what are no floats") for note in told)


def test_a_class_that_nobody_knows_is_an_error(tmp_path: Path) -> None:
    report = checked(unknown("SomebodysForCausalLM", model_type="x"), tmp_path)
    assert errors(report) == {"architectures"}


def test_ignore_lists_of_an_unknown_class_stay_and_are_said_to_be_unchecked(tmp_path: Path) -> None:
    draft = nvfp4(plain("LlamaForCausalLM"), "self_attn", ignore=())
    draft.config |= {"architectures": ["InternVLChatModel"]} | REMOTE
    report = checked(draft, tmp_path, ties=None)
    assert report.errors == ()
    assert any("ignore lists were not checked" in note for note in report.notes)


def test_ties_are_carried_to_the_check_of_the_output(tmp_path: Path) -> None:
    draft = plain("LlamaForCausalLM")
    draft.config |= {"architectures": ["InternVLChatModel"], "tie_word_embeddings": True} | REMOTE
    draft["lm_head.weight"] = draft["model.embed_tokens.weight"]
    draft.write(tmp_path / "src")
    (tmp_path / "ties.json").write_text(json.dumps({"lm_head.weight": "model.embed_tokens.weight"}))
    report = tierewrite.prepare_for_vllm(tmp_path / "src", tmp_path / "out", ties=tmp_path / "ties.json")
    assert report.readiness is not None
    assert report.readiness.errors == ()
    assert "lm_head.weight" not in Draft.read(tmp_path / "out").names()
    assert not any(str(tmp_path) in text for text in (*report.readiness.notes, *map(str, report.readiness.findings)))
