"""What no real config.json holds, refused before transformers sees it: huge counts, deep nesting, no object."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tierewrite.errors import ConfigError, shown
from tierewrite.source.table import CONFIG_NAME

# A count in a config (layers, experts, labels ...) above this is no real model's. The largest models today have a few
# hundred layers and under a thousand experts.
MAX_COUNT = 1_000_000
MAX_LAYERS = 4_096
MAX_CONFIG_DEPTH = 64
SAY_TIES = "say what is tied with --ties FILE ({} in it: nothing is)"
CONFIG_FIX = f"fix config.json, or {SAY_TIES}"

_LAYER_KEY = re.compile(r"(layers?|blocks?|stages?|depths?|hidden_layers|modules)$", re.IGNORECASE)
_COUNT_KEY = re.compile(r"^(num|n)_|_(num|count)$|experts?|labels?$", re.IGNORECASE)
_SIZE_KEY = re.compile(
    r"vocab|position|token|ctx|context|params?|frames|samples|steps|_id$|embeddings?$", re.IGNORECASE
)


def check_config(root: Path, config: Any) -> None:
    """Refuse, before transformers sees it, what no real config holds: huge counts, deep nesting, no object."""
    file = root / CONFIG_NAME
    if not isinstance(config, dict):
        raise ConfigError(f"expected a JSON object, found a {type(config).__name__}; {CONFIG_FIX}", file=file)
    stack: list[tuple[str, Any, int]] = [("", config, 0)]
    while stack:
        path, value, depth = stack.pop()
        if depth > MAX_CONFIG_DEPTH:
            raise ConfigError(
                f"nested more than {MAX_CONFIG_DEPTH} levels deep; no model is built from this (use --ties FILE)",
                file=file,
            )
        if isinstance(value, dict):
            if depth == 0 or not path.startswith("quantization_config"):
                stack.extend((f"{path}.{k}" if path else str(k), v, depth + 1) for k, v in value.items())
        elif isinstance(value, list):
            stack.extend((path, v, depth + 1) for v in value[:100_000])
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            name = path.rpartition(".")[2]
            limit = _limit_of(name)
            if limit is not None and value > limit:
                raise ConfigError(
                    f"{shown(path)} is {value}; more than {limit:,} is not believed and no model is built from it "
                    "(use --ties FILE to say what is tied)",
                    file=file,
                )


def _limit_of(name: str) -> int | None:
    """The largest value of a number called `name` that is believed; None where any is (a vocabulary is large)."""
    if _SIZE_KEY.search(name):
        return None
    if _LAYER_KEY.search(name):
        return MAX_LAYERS
    return MAX_COUNT if _COUNT_KEY.search(name) else None
