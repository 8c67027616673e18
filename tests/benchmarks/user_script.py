"""The script that a user would write for this job, as a measure for ours: everything in memory, one pass, no proof.

It knows DiffusionGemma's names by heart, compares with torch.equal, takes the larger input_scale and saves with
huggingface_hub or with safetensors itself. It flushes nothing.

    python user_script.py SRC DST [save_torch_state_dict|save_file]
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

ALIAS, CANONICAL = "model.encoder.language_model.", "model.decoder."


def main(source: Path, target: Path, writer: str) -> None:
    state: dict[str, torch.Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        state.update(load_file(shard))
    for alias in [name for name in state if name.startswith(ALIAS)]:
        canonical = alias.replace(ALIAS, CANONICAL)
        if alias.endswith("layer_scalar"):
            continue
        tensor = state.pop(alias)
        twin = state.get(canonical)
        if twin is None:
            state[canonical] = tensor
        elif alias.endswith("input_scale"):
            state[canonical] = torch.maximum(twin, tensor)
        elif not torch.equal(twin, tensor):
            raise SystemExit(f"{alias} and {canonical} differ")
    target.mkdir()
    if writer == "save_file":
        save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    else:
        save_torch_state_dict(state, target, max_shard_size="10GB")
    for file in source.iterdir():
        if ".safetensors" not in file.name:
            shutil.copy(file, target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "save_torch_state_dict")
