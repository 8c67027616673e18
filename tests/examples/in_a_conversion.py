"""A conversion script that keeps ties: python in_a_conversion.py SRC DST casts a model to float16.

Casting makes a new tensor for every name, so the tied ones are no longer one, and nothing in the dict says they were.
"""

import sys

import torch
from transformers import AutoModelForCausalLM

import tierewrite

src, dst = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(src)
state_dict = {name: tensor.to(torch.float16) for name, tensor in model.state_dict().items()}

canonical, report = tierewrite.dedupe_state_dict(state_dict, model)
for group in report.groups:
    print(f"{', '.join(group.group.aliases)} -> {group.group.canonical}: {group.status}")

model.half()  # for the dtype in config.json
model.save_pretrained(dst, state_dict=canonical)
