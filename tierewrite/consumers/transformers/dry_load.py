"""Lets transformers' own `from_pretrained` load checkpoint folders on the meta device, and prints what it misses.

    SCRIPT [--tensor-parallel-size N] [--trust-remote-code] -- FOLDER...

A script for a Python that has transformers and the package of the checkpoint's quantizer; it imports nothing of
tierewrite. The model class, the quantizer, its changes to the modules, all renamings and the tying of weights are
transformers' own. Replaced: the tensors, which are made from the headers and have no bytes. One line of JSON a folder,
of the form of consumers/loaded.py; of its facts only `unfilled` and `ignored` are told. Read in transformers 5.24.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

SCHEMA = "tierewrite/dry-load/1"
# Names in safetensors' headers -> torch's.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


def tensors_of(folder: Path) -> dict[str, Any]:
    """A tensor without bytes for every key of the folder's files."""
    import torch

    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for key, entry in header.items():
            if key != "__metadata__":
                dtype = getattr(torch, DTYPES[entry["dtype"]])
                found[key] = torch.empty(entry["shape"], dtype=dtype, device="meta")
    return found


def loaded(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """What `from_pretrained` does with the folder's names, as the members of a `DryLoad`."""
    import transformers

    began = time.process_time()
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    (name,) = config.architectures
    model_class = getattr(transformers, name)
    tensors = tensors_of(folder)
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=tensors, device_map={"": "meta"}, output_loading_info=True
    )
    shapes = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    unfilled = [_unfilled(name, shapes.get(name)) for name in sorted(info["missing_keys"])]
    rank = {"unfilled": unfilled, "ignored": sorted(info["unexpected_keys"])}
    return {"outcome": "loaded", "model_class": name, "ranks": [rank], "seconds": time.process_time() - began}


def _unfilled(name: str, tensor: Any) -> dict[str, Any]:
    shape = [] if tensor is None else list(tensor.shape)
    elements = 1 if tensor is None else tensor.numel()
    return {"parameter": name, "shape": shape, "missing": elements, "elements": elements}


def main() -> None:
    """Loads every folder that the command line names."""
    options = argparse.ArgumentParser()
    options.add_argument("--tensor-parallel-size", type=int, default=1)
    options.add_argument("--trust-remote-code", action="store_true")
    options.add_argument("folders", nargs="+", type=Path)
    chosen = options.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for folder in chosen.folders:
        version = ""
        with contextlib.suppress(ImportError):
            import transformers

            version = transformers.__version__
        try:
            found = loaded(folder, chosen.trust_remote_code)
        except Exception as error:
            found = {"outcome": "not-run", "reason": f"{type(error).__name__}: {error}"[:1000]}
        answers.write(json.dumps({"schema": SCHEMA, "consumer": "transformers", "version": version, **found}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
