"""Quantize DiffusionGemma to NVFP4 with ModelOpt as it is: python recipe_quantize.py MODEL PROMPTS EXPORTED.

MODEL is a folder, PROMPTS a text file with a prompt a line. Calibrating through generate() reaches both sides.
"""

import shutil
import sys
from pathlib import Path

import modelopt.torch.quantization as mtq
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion

source, prompts, exported = map(Path, sys.argv[1:])
model = DiffusionGemmaForBlockDiffusion.from_pretrained(source, dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(source)
left_out = ("router", "self_conditioning", "embed_vision", "vision_tower", "lm_head")
rules = [*mtq.NVFP4_DEFAULT_CFG["quant_cfg"], *({"quantizer_name": f"*{x}*", "enable": False} for x in left_out)]


def calibrate(model: DiffusionGemmaForBlockDiffusion) -> None:
    for chat in ([{"role": "user", "content": line}] for line in prompts.read_text().splitlines()):
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        model.generate(**inputs.to(model.device), max_new_tokens=model.config.canvas_length)


export_hf_checkpoint(mtq.quantize(model, {**mtq.NVFP4_DEFAULT_CFG, "quant_cfg": rules}, calibrate), export_dir=exported)
# vLLM wants these too, and the exporter leaves them out.
for file in (file for kind in ("token*", "chat_template*", "*processor*") for file in source.glob(kind)):
    shutil.copy(file, exported)
