"""Checkpoints of many classes: tiny models as transformers saves them, quantized by hand, and broken in one way each.

The breakages know nothing of a class: each looks for a tensor of a kind, and is left out where there is none.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.checkpoints import read_shard, write_shard
from tests.defects import Raw, f32

FILE = "model.safetensors"
PROJECTION = re.compile(r"\.(\w*_proj(_with_mqa)?|w[123]|fc[12]|dense\w*|query_key_value|in_proj\w*)$")
NEVER = re.compile(r"vision|visual|router|\.gate$|embed|lm_head|conv|multi_modal|linear_attn|mixer|shared_expert_gate")


@dataclass
class Checkpoint:
    """One file of raw tensors and a config, to be edited."""

    tensors: dict[str, Raw]
    config: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """A folder with one file."""
        found, _ = read_shard(folder / FILE)
        tensors = {name: Raw(t.dtype, tuple(t.shape), t.data) for name, t in found.items()}
        return cls(tensors, json.loads((folder / "config.json").read_text(encoding="utf-8")))

    def copy(self) -> Checkpoint:
        """Another to be edited."""
        return Checkpoint(dict(self.tensors), json.loads(json.dumps(self.config)))

    def write(self, folder: Path) -> Path:
        """As a folder."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        rows = {name: (t.dtype, t.shape, t.data) for name, t in self.tensors.items()}
        write_shard(folder / FILE, rows, {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config, indent=1), encoding="utf-8")
        return folder

    def quantizable(self) -> list[str]:
        """Modules that exporters quantize."""
        return [
            module
            for name, t in self.tensors.items()
            if name.endswith(".weight") and len(t.shape) == 2 and t.dtype == "BF16"
            and PROJECTION.search(module := name.removesuffix(".weight")) and not NEVER.search(module)
            and t.shape[1] % 16 == 0
        ]  # fmt: skip

    def _plain(self, quantized: set[str]) -> list[str]:
        matrices = (name for name, t in self.tensors.items() if name.endswith(".weight") and len(t.shape) == 2)
        found = [module for name in matrices if (module := name.removesuffix(".weight")) not in quantized]
        return [*found, "lm_head", "*.lm_head", "proj_out"]  # heads that are tied are not stored


def nvfp4(plain: Checkpoint) -> Checkpoint:
    """As ModelOpt exports NVFP4: packed weights, scales of blocks and of tensors, one scale for all activations."""
    made = plain.copy()
    modules = plain.quantizable()
    for module in modules:
        rows, columns = plain.tensors[f"{module}.weight"].shape
        made.tensors[f"{module}.weight"] = Raw("U8", (rows, columns // 2), b"\x21" * (rows * columns // 2))
        made.tensors[f"{module}.weight_scale"] = Raw("F8_E4M3", (rows, columns // 16), b"\x30" * (rows * columns // 16))
        made.tensors[f"{module}.weight_scale_2"] = f32(0.015)
        made.tensors[f"{module}.input_scale"] = f32(0.02)
    ignored = made._plain(set(modules))
    made.config["quantization_config"] = {
        "quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ignored, "kv_cache_scheme": None,
        "config_groups": {"group_0": {"input_activations": {"num_bits": 4, "type": "float", "group_size": 16},
                                      "weights": {"num_bits": 4, "type": "float", "group_size": 16},
                                      "targets": ["Linear"]}},
    }  # fmt: skip
    return made


def fp8(plain: Checkpoint) -> Checkpoint:
    """As ModelOpt exports FP8 with static scales."""
    made = plain.copy()
    modules = plain.quantizable()
    for module in modules:
        shape = plain.tensors[f"{module}.weight"].shape
        made.tensors[f"{module}.weight"] = Raw("F8_E4M3", shape, b"\x30" * math.prod(shape))
        made.tensors[f"{module}.weight_scale"] = f32(0.015)
        made.tensors[f"{module}.input_scale"] = f32(0.02)
    ignored = made._plain(set(modules))
    made.config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ignored}
    return made


def compressed_fp8(plain: Checkpoint) -> Checkpoint:
    """As compressed-tensors holds FP8 with a scale a channel and dynamic activations."""
    made = plain.copy()
    modules = plain.quantizable()
    for module in modules:
        shape = plain.tensors[f"{module}.weight"].shape
        made.tensors[f"{module}.weight"] = Raw("F8_E4M3", shape, b"\x30" * math.prod(shape))
        made.tensors[f"{module}.weight_scale"] = Raw("BF16", (shape[0], 1), b"\x80\x3c" * shape[0])
    made.config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": made._plain(set(modules)),
        "quantization_status": "compressed", "kv_cache_scheme": None,
        "config_groups": {"group_0": {
            "targets": ["Linear"], "output_activations": None,
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True,
                                  "dynamic": True},
        }},
    }  # fmt: skip
    return made


FORMATS: dict[str, Callable[[Checkpoint], Checkpoint]] = {
    "bf16": Checkpoint.copy, "nvfp4": nvfp4, "fp8": fp8, "ctfp8": compressed_fp8,
}  # fmt: skip
Edit = Callable[[Checkpoint], bool | None]
BREAKAGES: dict[str, Edit] = {}


def breakage(edit: Edit) -> Edit:
    """Registers one; it returns False where the checkpoint has nothing of the kind."""
    BREAKAGES[edit.__name__] = edit
    return edit


def broken(good: Checkpoint) -> Iterator[tuple[str, Checkpoint]]:
    """Every breakage that `good` has something for."""
    for name, edit in BREAKAGES.items():
        made = good.copy()
        if edit(made) is not False:
            yield name, made


def _drop(c: Checkpoint, pattern: str, whole: bool = False) -> bool:
    found = [name for name in c.tensors if re.search(pattern, name)]
    for name in found if whole else found[:1]:
        del c.tensors[name]
    return bool(found)


def _change(c: Checkpoint, pattern: str, change: Callable[[Raw], Raw]) -> bool:
    name = next((name for name in c.tensors if re.search(pattern, name)), None)
    if name is None:
        return False
    c.tensors[name] = change(c.tensors[name])
    return True


def _one_element(t: Raw) -> Raw:
    return Raw(t.dtype, (1,), t.data[: len(t.data) // math.prod(t.shape)])


def _bytes(t: Raw) -> Raw:
    return Raw("I8", t.shape, b"\1" * math.prod(t.shape))


def _rows_less(t: Raw) -> Raw:
    rows = t.shape[0] - 1
    return Raw(t.dtype, (rows, *t.shape[1:]), t.data[: len(t.data) // t.shape[0] * rows])


@breakage
def output_projection_missing(c: Checkpoint) -> bool:
    return _drop(c, r"(\.o_proj|\.out_proj|attention\.dense|attn\.c_proj)\.weight$")


@breakage
def q_missing(c: Checkpoint) -> bool:
    return _drop(c, r"\.(q_proj|q_a_proj|q)\.weight$")


@breakage
def v_missing(c: Checkpoint) -> bool:
    return _drop(c, r"\.v_proj\.weight$")


@breakage
def norm_missing(c: Checkpoint) -> bool:
    return _drop(c, r"(norm|ln_1|layer_norm)\w*\.weight$")


@breakage
def embedding_missing(c: Checkpoint) -> bool:
    return _drop(c, r"(embed_tokens|wte|embed_in|embeddings)\.weight$")


@breakage
def head_missing(c: Checkpoint) -> bool:
    return _drop(c, r"(lm_head|embed_out)\.weight$")


@breakage
def expert_down_missing(c: Checkpoint) -> bool:
    return _drop(c, r"experts\.1\.(down_proj|w2)\.weight$")


@breakage
def expert_gate_missing(c: Checkpoint) -> bool:
    return _drop(c, r"experts\.1\.(gate_proj|w1)\.weight$")


@breakage
def expert_dropped(c: Checkpoint) -> bool:
    return _drop(c, r"layers\.1\.\w+\.experts\.2\.", whole=True)


@breakage
def router_missing(c: Checkpoint) -> bool:
    return _drop(c, r"\.(gate|router)\.weight$")


@breakage
def mlp_down_missing(c: Checkpoint) -> bool:
    return _drop(c, r"(mlp\.down_proj|\.fc2|dense_4h_to_h|mlp\.c_proj)\.weight$")


@breakage
def layer_missing(c: Checkpoint) -> bool:
    return _drop(c, r"(?<!vision_model\.encoder\.)(layers|\.h)\.1\.", whole=True)


@breakage
def unknown_module(c: Checkpoint) -> bool:
    name = next(name for name in c.tensors if re.search(r"(layers|\.h)\.\d+\.", name))
    stem = re.match(r".*?(layers|\.h)\.\d+\.", name)
    assert stem is not None
    c.tensors[f"{stem.group()}mystery.weight"] = Raw("BF16", (2, 2), b"\0" * 8)
    return True


@breakage
def layer_beyond_the_last(c: Checkpoint) -> bool:
    more = {name.replace("layers.1.", "layers.77."): t for name, t in c.tensors.items() if "layers.1." in name}
    c.tensors.update(more)
    return bool(more)


@breakage
def expert_beyond_the_last(c: Checkpoint) -> bool:
    more = {name.replace("experts.1.", "experts.99."): t for name, t in c.tensors.items() if "experts.1." in name}
    c.tensors.update(more)
    return bool(more)


@breakage
def projection_too_short(c: Checkpoint) -> bool:
    return _change(c, r"(o_proj|out_proj|dense|c_proj)\.weight$", _rows_less)


@breakage
def fused_projection_too_short(c: Checkpoint) -> bool:
    return _change(c, r"(k_proj|query_key_value|c_attn|qkv_proj)\.weight$", _rows_less)


@breakage
def expert_too_short(c: Checkpoint) -> bool:
    return _change(c, r"experts\.1\.(gate_proj|w1)\.weight$", _rows_less)


@breakage
def norm_of_another_size(c: Checkpoint) -> bool:
    return _change(c, r"(norm|ln_1|layer_norm)\w*\.weight$", _one_element)


@breakage
def weight_as_bytes(c: Checkpoint) -> bool:
    return _change(c, r"(o_proj|out_proj|dense|c_proj)\.weight$", _bytes)


@breakage
def weight_scale_missing(c: Checkpoint) -> bool:
    return _drop(c, r"(o_proj|out_proj|dense)\.weight_scale$")


@breakage
def expert_weight_scale_missing(c: Checkpoint) -> bool:
    return _drop(c, r"experts\.\d\.(down_proj|w2)\.weight_scale$")


@breakage
def weight_scale_2_missing(c: Checkpoint) -> bool:
    return _drop(c, r"(down_proj|fc2|w2)\.weight_scale_2$")


@breakage
def input_scale_missing(c: Checkpoint) -> bool:
    return _drop(c, r"(o_proj|out_proj)\.input_scale$")


@breakage
def weight_scale_of_another_shape(c: Checkpoint) -> bool:
    return _change(c, r"(o_proj|down_proj|fc2)\.weight_scale$",
                   lambda t: _rows_less(t) if t.shape else Raw(t.dtype, (3,), t.data * 3))  # fmt: skip


@breakage
def amax_left_over(c: Checkpoint) -> bool:
    name = next((n for n in c.tensors if n.endswith("_proj.weight_scale")), None)
    if name is None:
        return False
    c.tensors[name.replace("weight_scale", "input_quantizer._amax")] = f32(1.0)
    return True


@breakage
def config_without_quantization(c: Checkpoint) -> bool:
    return c.config.pop("quantization_config", None) is not None


@breakage
def quantized_but_ignored(c: Checkpoint) -> bool:
    name = next((n for n in c.tensors if n.endswith("o_proj.weight_scale")), None)
    if name is None:
        return False
    c.config["quantization_config"]["ignore"].append(name.removesuffix(".weight_scale"))
    return True


@breakage
def ignore_list_empty(c: Checkpoint) -> bool:
    if "quantization_config" not in c.config:
        return False
    c.config["quantization_config"]["ignore"] = []
    return True
