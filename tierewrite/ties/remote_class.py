"""The classes that a checkpoint brings as Python files (`auto_map`), imported with leave."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tierewrite.errors import ConfigError, shown
from tierewrite.ties import meta_model
from tierewrite.ties.candidates import Candidate, versions
from tierewrite.ties.config_limits import CONFIG_FIX


def is_named(config: Mapping[str, Any]) -> bool:
    """Whether `auto_map` names a model class of its own."""
    return any(key.startswith("AutoModel") for key in config.get("auto_map") or {})


def imported(root: Path, config: Mapping[str, Any], names: Sequence[str], registered: Any, file: Path) -> Candidate:
    """The classes that `auto_map` names, imported.

    Args:
        root: the folder of the Python files.
        names: `architectures`; of several classes the first that is named there is taken.
        registered: transformers' config class of the model_type, for code that brings none.

    Raises:
        ConfigError: `auto_map` is malformed, or the code cannot be imported, or it is no model of transformers.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    auto_map = config.get("auto_map") or {}
    models = {key: value for key, value in auto_map.items() if key.startswith("AutoModel")}
    references = [r[0] if isinstance(r, (list, tuple)) and r else r for r in models.values()]
    if not all(isinstance(r, str) and "." in r for r in references):
        raise ConfigError(
            f"auto_map is {shown(json.dumps(models))}; expected 'file.Class' references: {CONFIG_FIX}",
            file=file,
        )
    chosen = next((r for name in names for r in references if r.rpartition(".")[2] == name), references[0])
    config_class, reference = registered, auto_map.get("AutoConfig")
    try:
        if isinstance(reference, str):
            config_class = get_class_from_dynamic_module(reference, str(root), local_files_only=True)
        model_class = get_class_from_dynamic_module(chosen, str(root), local_files_only=True)
    except BaseException as exc:
        meta_model.stop_if_fatal(exc)
        raise ConfigError(
            f"remote code {shown(chosen)} cannot be imported: {meta_model.in_one_line(exc)}; {versions(config)}",
            file=file,
        ) from exc
    if not (isinstance(model_class, type) and hasattr(model_class, "get_expanded_tied_weights_keys")):
        raise ConfigError(
            f"remote code {shown(chosen)} is no class of a transformers model (PreTrainedModel), and so cannot be "
            "asked what is tied; say it with --ties FILE",
            file=file,
        )
    if config_class is None:
        config_class = getattr(model_class, "config_class", None)
    if config_class is None or not hasattr(config_class, "from_dict"):
        raise ConfigError(f"remote code {shown(chosen)} names no config class; {versions(config)}", file=file)
    return Candidate(config_class, model_class)
