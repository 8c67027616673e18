"""Compares a checkpoint with a list of names, dtypes, shapes and BLAKE3 digests (a fixture's right_answer.json)."""

import json
import sys
from pathlib import Path

import torch
from blake3 import blake3
from safetensors import safe_open


def main(folder: str, answer: str) -> int:
    want = json.loads(Path(answer).read_text())
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (safe_open is no mapping)
                header = shard.get_slice(name)
                data = shard.get_tensor(name).reshape(-1).view(torch.uint8).numpy()
                found[name] = {
                    "dtype": header.get_dtype(),
                    "shape": list(header.get_shape()),
                    "blake3": blake3(data).hexdigest(),
                }
    wrong = sorted(name for name in want.keys() | found.keys() if want.get(name) != found.get(name))
    print(f"{len(found)} tensors, {len(wrong)} of them different from the right answer {wrong[:5] or ''}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
