"""What SGLang's model classes do with ties, scales and leftover names: writes consumers/sglang/classes.json.

    VENV/bin/python tests/sglang_loader/classes.py [--write]        VENV as setup.sh makes it; some 10 minutes

For every architecture of SGLang's registry that transformers has a class for, checkpoints are made of headers alone
(the hub's names, two layers, tied) and loaded by consumers/sglang/dry_load.py: "measured". Of the others, and of those
that cannot be built without a GPU, only the text of their modules is searched: "read".
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tierewrite" / "consumers" / "sglang" / "dry_load.py"
TABLE = SCRIPT.parent / "classes.json"
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth",
          "encoder_num_hidden_layers", "decoder_num_layers")  # fmt: skip
BF16 = 2
HEADS = re.compile(r"(^|\.)(lm_head|embed_out|output_projection|output)\.weight$")
Headers = dict[str, tuple[str, tuple[int, ...]]]  # key -> dtype, shape


def main() -> int:
    sys.dont_write_bytecode = True
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(SCRIPT.parent))
    importlib.import_module("dry_load").Sglang().imports()  # transformers needs the same torchvision
    with tempfile.TemporaryDirectory() as home:
        classes, modules = registry()
        if "--only" in sys.argv:
            named = sys.argv[sys.argv.index("--only") + 1].split(",")
            classes = {name: classes[name] for name in named}
        made = {name: tied_checkpoint(name, Path(home) / name) for name in sorted(classes)}
        found = {name: read_in(name, modules) for name in sorted(classes)}
        for name, row in measured({n: h for n, h in made.items() if h}, Path(home)).items():
            found[name] = row
        table = {"sglang": version("sglang"), "transformers": version("transformers"), "classes": found}
    text = as_text(table)
    if "--write" in sys.argv:
        TABLE.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0


def as_text(table: dict[str, Any]) -> str:
    """The table as JSON, one line a class."""
    text = json.dumps(table, separators=(",", ":"), sort_keys=True)
    return text.replace('},"', '},\n"').replace('"classes":{', '"classes":{\n') + "\n"


def version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def registry() -> tuple[dict[str, Path], dict[str, str]]:
    """Architecture -> the module that has it; module -> its text. Read in the files: some do not import on a CPU."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "srt" / "models"
    classes: dict[str, Path] = {}
    texts: dict[str, str] = {}
    for path in sorted(folder.glob("*.py")):
        text = texts[path.stem] = path.read_text(encoding="utf-8")
        entry = re.search(r"^EntryClass\s*=\s*(\[[^\]]*\]|\w+)", text, re.MULTILINE)
        for name in re.findall(r"\b[A-Za-z]\w*\b", re.sub(r"#.*", "", entry[1])) if entry else ():
            classes[name] = path
    return classes, {name: texts[path.stem] for name, path in classes.items()}


def read_in(name: str, modules: dict[str, str]) -> dict[str, Any]:
    """What the text of a class's module says: a head of its own if it never mentions the tie."""
    text = modules[name]
    if "ParallelLMHead(" in text and "tie_word_embeddings" not in text:
        return {"how": "read", "head": "own"}
    return {"how": "not known", "head": None}


# --- checkpoints of headers --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """A small tied model.

    Attributes:
        hub: the names and shapes of a checkpoint on the hub.
        experts: those of experts that are stored as one tensor, where the hub has them one by one.
    """

    hub: Headers
    experts: Headers


def tied_checkpoint(architecture: str, folder: Path) -> Made | None:
    """The names of a small tied model, and its config.json in `folder`; None if transformers has no class."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    kind = getattr(transformers, architecture, None)
    if kind is None or getattr(kind, "config_class", None) is None:
        return None
    try:
        config = kind.config_class(**FIXTURE_CONFIGS.get(architecture, {}))
        for part in parts(config):
            shrink(part)
        config.architectures = [architecture]
        config.dtype = "bfloat16"
        with torch.device("meta"):
            model = kind._from_config(config, dtype=torch.bfloat16)
        memory = dict(model.state_dict())
        hub = memory
        with contextlib.suppress(Exception):
            hub = dict(revert_weight_conversion(model, dict(memory)))
        folder.mkdir()
        config.save_pretrained(folder)
    except Exception as e:
        print(f"{architecture}: transformers: {type(e).__name__}: {str(e)[:100]}", file=sys.stderr)
        return None
    names = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL", torch.float16: "F16"}
    fused = {k: t for k, t in memory.items() if k not in hub and ".experts." in k and t.dim() == 3}
    found = [{key: (names.get(t.dtype, "F32"), tuple(t.shape)) for key, t in each.items()} for each in (hub, fused)]
    return Made(found[0], found[1])


def parts(config: Any) -> Iterator[Any]:
    """A config and its sub-configs."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None and hasattr(part, "to_dict"):
            yield from parts(part)


def shrink(config: Any) -> None:
    """Two layers, and every tie on."""
    for name in LAYERS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, 2)
    for name in ("layer_types", "mlp_layer_types", "indexer_types"):
        if isinstance(getattr(config, name, None), list):
            with contextlib.suppress(AttributeError):  # some compute it
                setattr(config, name, getattr(config, name)[:2])
    if isinstance(getattr(config, "first_k_dense_replace", None), int):
        config.first_k_dense_replace = 1
    config.tie_word_embeddings = True


def write(folder: Path, source: Path, headers: Headers, edit: dict[str, Any] | None = None) -> Path:
    """A checkpoint of headers alone; the data is a hole."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**as_on_the_hub(config), **(edit or {})}), encoding="utf-8")
    size = {"F32": 4, "I64": 8, "BOOL": 1, "U8": 1, "F8_E4M3": 1}
    at, entries = 0, {}
    for key, (dtype, shape) in headers.items():
        end = at + math.prod(shape) * size.get(dtype, BF16)
        entries[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + at)
    return folder


def fixture_configs() -> dict[str, dict[str, Any]]:
    """Configs of this project's fixtures, by architecture: some classes cannot be built from their default."""
    found = {}
    for path in sorted((ROOT / "fixtures").glob("*bf16/naive/config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        if "quantization_config" not in config:
            found |= dict.fromkeys(config.get("architectures", ()), config)
    return found


FIXTURE_CONFIGS = fixture_configs()
# What config.json files of the hub have and transformers does not write any more.
HUB = {"full_attention_interval": 4, "position_embedding_type": "absolute", "in_chans": 3, "moe_layer_freq": 1}


def as_on_the_hub(config: dict[str, Any]) -> dict[str, Any]:
    """The config with what the hub's have, and nothing about layers that there are not."""
    made = {key: as_on_the_hub(value) if isinstance(value, dict) else value for key, value in config.items()}
    if isinstance(made.get("per_layer_config"), dict):
        made["per_layer_config"] = {
            k: v for k, v in made["per_layer_config"].items() if not k.isdecimal() or int(k) < 2
        }
    if "hidden_activation" in made:
        made["hidden_act"] = made["hidden_activation"]
    return {**HUB, **made} if "model_type" in made else made


QUANTIZATION = {
    "quantization_config": {
        "config_groups": {
            "group_0": {
                "input_activations": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
                "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
                "targets": ["Linear"],
            }
        },
        "ignore": ["lm_head"], "quant_algo": "NVFP4", "quant_method": "modelopt",
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": {"name": "modelopt", "version": "0.47.0"},
    }
}  # fmt: skip


FEW = {
    "kv_scales": ("k_proj.k_scale", "v_proj.v_scale"),
    "leftover_fused": ("q_proj.input_quantizer._amax",),
    "leftover": ("o_proj.input_quantizer._amax",),
}
"""What is loaded of a class alone, below the attention of the first layer: member of a row -> leaves."""


def variants(made: Made) -> dict[str, tuple[Headers, dict[str, Any]]]:
    """What is loaded of an architecture: name of the variant -> headers, and what is set in config.json."""
    found: dict[str, tuple[Headers, dict[str, Any]]] = {
        "bare": ({key: value for key, value in made.hub.items() if not HEADS.search(key)}, {})
    }
    if made.experts:
        found["experts"] = made.experts, {}
    layer = next((key for key in made.hub if re.search(r"layers\.0\.self_attn\.k_proj\.weight$", key)), None)
    if layer is not None:
        attention = layer.removesuffix("k_proj.weight")
        few = dict.fromkeys((attention + leaf for leaves in FEW.values() for leaf in leaves), ("F32", ()))
        found["quantized"], found["plain"] = (few, QUANTIZATION), (few, {})
    return found


# --- what the loader did -----------------------------------------------------------------------------------


def measured(made: dict[str, Made], home: Path) -> dict[str, dict[str, Any]]:
    """One row an architecture whose class could be built."""
    folders: list[Path] = []
    which: list[tuple[str, str]] = []
    for name, one in made.items():
        for variant, (kept, edit) in variants(one).items():
            folders.append(write(home / f"{name}-{variant}", home / name, kept, edit))
            which.append((name, variant))
    with (home / "loads.jsonl").open("w+") as out:
        subprocess.run(
            [sys.executable, "-B", str(SCRIPT), "--", *map(str, folders)], stdout=out, check=True,
            env={**os.environ, "TQDM_DISABLE": "1"},
        )  # fmt: skip
        out.seek(0)
        lines = out.read().splitlines()
    loads: dict[str, dict[str, Any]] = {}
    for (name, variant), line in zip(which, lines, strict=True):
        loads.setdefault(name, {})[variant] = json.loads(line)
    if "--debug" in sys.argv:
        Path("loads.json").write_text(json.dumps(loads))
    has_head = {name: any(map(HEADS.search, one.hub)) for name, one in made.items()}
    rows = {name: row_of(name, one, has_head[name]) for name, one in loads.items()}
    return {name: row for name, row in rows.items() if row is not None}


def row_of(name: str, loads: dict[str, Any], has_head: bool) -> dict[str, Any] | None:
    """What the loads of one architecture come to; None where its class was not built."""
    bare = loads["bare"]
    if bare["outcome"] != "loaded":
        print(f"{name}: {bare['outcome']}: {bare['reason'][:150]}", file=sys.stderr)
        return None
    row: dict[str, Any] = {"how": "measured", "head": head(bare["ranks"][0], has_head)}
    quantized = loads.get("quantized")
    if quantized is not None and quantized["outcome"] == "loaded":
        row["quantized"] = True
    elif quantized is not None and "NotImplementedError" in quantized["reason"]:
        row["quantized"] = False
    for variant, prefix in (("quantized", ""), ("plain", "plain_")):
        for member, leaves in FEW.items():
            row[prefix + member] = became(loads[variant], leaves) if variant in loads else None
    if "experts" in loads and loads["experts"]["outcome"] == "loaded":
        row["fused_experts"] = became(loads["experts"]) == "loaded"
    return {key: value for key, value in row.items() if value is not None}


def head(facts: dict[str, Any], has_head: bool) -> str | None:
    """Whether the head is filled once the embedding is."""
    if not has_head:
        return "none"
    embedded = any(re.search(r"emb|wte|shared", key) for keys in facts["written"].values() for key in keys)
    if facts["failed"] or not facts["refused_all"] or not embedded:
        return None
    return "own" if any(HEADS.search(one["parameter"]) for one in facts["unfilled"]) else "tied"


def became(load: dict[str, Any], leaves: tuple[str, ...] = ("",)) -> str | None:
    """What became of the keys that end in one of `leaves`: "loaded", "ignored" or "refused"."""
    if load["outcome"] != "loaded" or load["ranks"][0]["failed"]:
        return None
    facts = load["ranks"][0]
    if any(one["key"].endswith(leaves) for one in facts["refused"]):
        return "refused"
    return "loaded" if any(key.endswith(leaves) for keys in facts["written"].values() for key in keys) else "ignored"


if __name__ == "__main__":
    sys.exit(main())
