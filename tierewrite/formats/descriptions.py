"""Descriptions of tensors by name, beside their headers: an entry goes, or is renamed, with the tensor it describes.

Sources:
- torchao 0.18, prototype/safetensors/safetensors_support.py `flatten_tensor_state_dict`: the header's `__metadata__`
  has an entry for every parameter, with the type, block size and such of a packed one, and `tensor_names`, the JSON
  list of all of them. Two sides with the same bytes and other entries are two weights.
- exllamav3 1.6, conversion/quant_config.py `create_quantization_config_json`: quantization_config.json has one for
  every module in `tensor_storage`, with its tensors by name in `stored_tensors`.

Not among them: optimum-quanto's quanto_qmap.json has an entry for every quantized module in memory, stored or not. Its
loader makes each of them a quantized one before it ties them; without an alias's entry loading fails (0.2.7 with
transformers 5.24, whose pattern of a tie then finds the scales of one side alone).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

TENSOR_NAMES = "tensor_names"
"""The member of torchao's `__metadata__` that lists the parameters it describes."""

MODULE_FILES: Mapping[str, str] = {"quantization_config.json": "tensor_storage"}
"""Side files that describe stored modules by name -> the member that does: {module: description}."""

Moved = Mapping[str, str]
"""Parameters that are no longer stored under their names -> the name of the tensor that stands for them."""


def described_names(metadata: Mapping[str, str]) -> list[str]:
    """The parameters that a header's metadata describes; none where it is not torchao's."""
    try:
        names = json.loads(metadata.get(TENSOR_NAMES, ""))
    except (ValueError, RecursionError):
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return []
    return names


def all_names(shards: Iterable[Mapping[str, str]]) -> list[str]:
    """The parameters that the metadata of any header describes, each once."""
    return list(dict.fromkeys(name for shard in shards for name in described_names(shard)))


def moved_modules(root: Any, member: str, moved: Moved) -> Any:
    """The content of one of `MODULE_FILES` after its modules `moved`; `root` itself where nothing changes."""
    found = root.get(member) if isinstance(root, Mapping) else None
    if not isinstance(found, Mapping):
        return root
    modules = {
        name.removesuffix(".weight"): new.removesuffix(".weight")
        for name, new in moved.items()
        if name.endswith(".weight")
    }
    if not any(module in modules for module in found):
        return root
    result = {module: entry for module, entry in found.items() if module not in modules}
    for module, entry in found.items():
        new = modules.get(module, module)
        if new not in found:
            result[new] = _renamed(entry, f"{module}.", f"{new}.")
    return {**root, member: result}


def _renamed(entry: Any, old: str, new: str) -> Any:
    """An entry, with the keys below the module `old` in it called as below `new`."""
    if not isinstance(entry, Mapping):
        return entry
    return {
        (new + key.removeprefix(old) if key.startswith(old) else key): _renamed(value, old, new)
        for key, value in entry.items()
    }


def described(shards: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """What the metadata of all headers says of parameters, by name; {} where it does not describe them."""
    return {name: shard[name] for shard in shards for name in described_names(shard) if name in shard}
