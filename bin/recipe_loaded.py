"""Judges bin/recipe: what vLLM's loader made of the served checkpoint, against what the exporter wrote.

python bin/recipe_loaded.py EXPORTED LOADS     LOADS holds load.py's files: file/exported.json, file/served.json and
                                               reverse/served.json, named after the order in which keys were fed

Exits 1 unless every key was taken, every parameter filled, no key overwrote another with other bytes in either order,
every activation scale is the larger of the two sides', and every other parameter has the bytes that the exporter gave.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open

DECODER, ENCODER = "model.decoder.", "model.encoder.language_model."


def activation_scales(folder: Path) -> dict[str, float]:
    """The scales that the exporter wrote, for each side that calibration reached."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            names = [name for name in shard.keys() if name.endswith(".input_scale")]  # noqa: SIM118 (no mapping)
            found |= {name: float(shard.get_tensor(name)) for name in names}
    return found


def problems(written: dict[str, float], exported: dict[str, Any], served: dict[str, Any]) -> list[str]:
    found = [f"{what}: {served[what]}" for what in ("unexpected", "ignored", "unloaded_params", "partial_params")
             if served[what]]  # fmt: skip
    found += [f"{c['first']} and {c['winner']} meet with other bytes" for c in served["conflicts"]["list"]
              if c["different"]]  # fmt: skip
    for name, digest in served["digests"].items():
        if not name.endswith("input_scale") and digest != exported["digests"].get(name):
            found.append(f"{name} is not what the exporter wrote")
    for value in (v for name, values in served["scales"].items() if name.endswith("input_scale") for v in values):
        sides = [value["key"], value["key"].replace(DECODER, ENCODER)]
        wanted = max((written[side] for side in sides if side in written), default=None)
        right = value["value"] == wanted if wanted is not None else 0 < value["value"] < math.inf  # filled in
        if not right:
            found.append(f"{value['key']} is {value['value']} in vLLM; the sides have at most {wanted}")
    return found


def main(exported: str, loads: str) -> int:
    files = ("file/exported", "file/served", "reverse/served")
    naive, *both = (json.loads(Path(loads, f"{name}.json").read_text()) for name in files)
    written = activation_scales(Path(exported))
    wrong = [problem for served in both for problem in problems(written, naive, served)]
    served = both[0]
    scales = sum(len(values) for name, values in served["scales"].items() if name.endswith("input_scale"))
    print(f"as exported: {naive['conflicts']['different']} values overwrite others, whichever comes last")
    print(
        f"served: vLLM {served['vllm']} took {served['accepted']} keys ({served['quant_algo']}) and filled "
        f"{len(served['digests'])} parameters; {scales} activation scales cover both sides, all else is as exported"
        if not wrong
        else "\n".join(["served: wrong", *wrong])
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
