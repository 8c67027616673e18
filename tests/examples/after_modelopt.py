"""Quantize and export with ModelOpt as it is, then store every tied weight once.

python after_modelopt.py MODEL CANONICAL           quantizes MODEL first (needs nvidia-modelopt)
python after_modelopt.py --exported DIR CANONICAL  takes what export_hf_checkpoint has written to DIR
"""

import sys
import tempfile

import tierewrite


def export(model_id: str, folder: str) -> None:
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_id, dtype="auto")
    mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, lambda m: m(torch.arange(64)[None]))  # your calibration data here
    export_hf_checkpoint(model, export_dir=folder)


*source, canonical = sys.argv[1:]
exported = source[-1] if source[0] == "--exported" else tempfile.mkdtemp(prefix="exported-")
if source[0] != "--exported":
    export(source[0], exported)
report = tierewrite.rewrite(exported, canonical, verify=True)
print(f"{report.before_bytes:,} -> {report.after_bytes:,} bytes, {len(report.scales)} activation scales merged")
