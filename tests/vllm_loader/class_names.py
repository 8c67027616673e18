#!/usr/bin/env python3
"""The names that transformers gives the tensors of a class: in memory, on the hub, and its smallest config.

    class_names.py OUT.json ARCHITECTURE...            these, and every class of transformers that generates
    class_names.py OUT.json --only ARCHITECTURE...

Runs in any environment with transformers and needs nothing of the project. Classes are built on the meta device from
their default configs, cut to a few layers. One name stands for all that differ in numbers alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
with contextlib.suppress(ImportError):  # there is no torchvision here
    import shim  # noqa: F401
import torch
import transformers

LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers", "depth",
          "num_decoder_layers")  # fmt: skip
LAYERS_KEPT = 4
# What some default configs leave out, though their classes cannot be built without it.
NEEDED: dict[str, Callable[[Any], Any]] = {
    "num_key_value_heads": lambda config: config.num_attention_heads,
    "head_dim": lambda config: config.hidden_size // config.num_attention_heads,
    "layer_types": lambda config: ["full_attention"] * config.num_hidden_layers,
    "n_routed_experts": lambda config: 4,
    "n_shared_experts": lambda config: 1,
    "num_experts_per_tok": lambda config: 2,
}


def pattern(name: str) -> str:
    """The name with every numeric component replaced by *."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def small_config(config_class: Any) -> Any:
    """The default config with tall stacks cut and every part that it may have, where it can be built so."""
    default = config_class()

    def cut(config: Any) -> dict[str, Any]:
        return {n: LAYERS_KEPT for n in LAYERS if isinstance(v := getattr(config, n, 0), int) and v > LAYERS_KEPT + 2}

    wanted: dict[str, Any] = cut(default)
    absent: dict[str, Any] = {}
    for name, part_class in getattr(default, "sub_configs", {}).items():
        part = getattr(default, name, None)
        if part is not None and cut(part):
            wanted[name] = type(part)(**cut(part))
        elif part is None:
            with contextlib.suppress(Exception):
                absent[name] = part_class(**cut(part_class()))
    for entries in ({**absent, **wanted}, wanted, {}):
        try:
            return config_class(**entries)
        except Exception:
            continue
    return default


def whole_config(config_class: Any) -> Any:
    """The small config with what the default one leaves out."""
    config = small_config(config_class)
    for name, value in NEEDED.items():
        if getattr(config, name, 0) is None:
            setattr(config, name, value(config))
    return config


def build(config_class: Any, model_class: Any) -> tuple[Any, Any]:
    """(config, model on the meta device), of the small config or else of a whole or the default one."""
    last: Exception | None = None
    for make in (small_config, whole_config, lambda c: c()):
        try:
            config = make(config_class)
            with torch.device("meta"):
                return config, model_class(config)
        except Exception as e:
            last = e
    assert last is not None
    raise last


def entry(tensor: torch.Tensor) -> list[Any]:
    """[dtype, shape] as JSON."""
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def names_of(architecture: str) -> dict[str, Any]:
    """config, and one name of each pattern: in memory, on the hub, and which hub names each in memory becomes."""
    model_class = getattr(transformers, architecture)
    config, model = build(model_class.config_class, model_class)
    config.architectures = [architecture]
    state = {k: v.detach() for k, v in model.state_dict(keep_vars=True).items() if hasattr(v, "shape")}
    first: dict[str, str] = {}
    for name in state:
        first.setdefault(pattern(name), name)
    memory = {name: entry(state[name]) for name in first.values()}
    hub: dict[str, list[Any]] = {}
    becomes: dict[str, list[str]] = {}
    try:
        from transformers.core_model_loading import revert_weight_conversion

        for name in first.values():
            found = revert_weight_conversion(model, {name: state[name]})
            kept = {pattern(k): (k, v) for k, v in reversed(list(found.items()))}
            hub.update({k: entry(v) for k, v in kept.values()})
            becomes[pattern(name)] = sorted(kept)
    except ImportError:
        hub, becomes = dict(memory), {p: [p] for p in first}
    written = json.loads(config.to_json_string(use_diff=False))
    return {
        "transformers": transformers.__version__,
        "config": written,
        "prefix": model_class.base_model_prefix,
        "memory": memory,
        "hub": hub,
        "becomes": becomes,
    }


def generation_classes() -> set[str]:
    """The classes of transformers that generate."""
    from transformers.models.auto import modeling_auto as auto

    found: set[str] = set()
    for table in (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ):
        for value in table.values():
            found.update([value] if isinstance(value, str) else value)
    return found


def main() -> None:
    """Writes the names of every class that is asked for, or why there are none."""
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    target, *asked = sys.argv[1:]
    only = asked[:1] == ["--only"]
    wanted = sorted(asked[1:] if only else {*asked, *generation_classes()})
    found: dict[str, Any] = {}
    for architecture in wanted:
        try:
            if hasattr(transformers, architecture):
                found[architecture] = names_of(architecture)
        except Exception as e:
            found[architecture] = {"problem": f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"}
    Path(target).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
