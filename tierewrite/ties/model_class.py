"""The model class that config.json names, asked for its ties and names.

Refused: a class that transformers does not know or cannot build from this config, remote code without leave, and
configurations whose sizes no real model has. No tensor is read, the network is never touched, and transformers never
talks to the user. torch and transformers are imported only here and where a class is built (`meta_model`).
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from tierewrite.errors import ConfigError, shown
from tierewrite.ties import meta_model
from tierewrite.ties.config_limits import CONFIG_FIX
from tierewrite.ties.patterns import PLAIN_NAME, is_regex
from tierewrite.ties.tie import Declared, ModelNames, rooted

# What a config may carry that changes how a model runs, never which parameters it has. Each can make transformers
# import a kernel package or a quantizer, or fetch weights.
_RUN_TIME_KEYS = frozenset(
    {
        "quantization_config",
        "compression_config",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "experts_implementation",
        "_experts_implementation",
        "dtype",
        "torch_dtype",
        "gradient_checkpointing",
    }
)
_BUILD_LOCK = threading.Lock()


def _versions(config: Mapping[str, Any]) -> str:
    import transformers

    written = config.get("transformers_version")
    wrote = (
        f"config.json was written by transformers {shown(written)}"
        if written
        else "config.json names no transformers_version"
    )
    here = f"{transformers.__version__} is installed"
    return f"{wrote}, {here}: install one that fits, or say what is tied with --ties FILE"


def from_class(root: Path, config: dict[str, Any], trust_remote_code: bool) -> Declared:
    """What the class that config.json names declares.

    Args:
        root: the checkpoint's folder; remote code is read from it.
        config: its config.json, parsed.
        trust_remote_code: run the Python files that `auto_map` names.

    Raises:
        ConfigError: config.json is malformed, or its class is unknown, cannot be built, or is remote code.
    """
    file = root / "config.json"
    wanted = _class_named(config, file)
    with _BUILD_LOCK, meta_model.quiet(), meta_model.offline():
        config_class, model_class, remote = _classes(root, config, wanted, trust_remote_code)
        built_config = _config_object(config_class, config, file)
        if model_class is None:
            model_class = _auto_class(built_config, config, file)
        declared = _asked(model_class, built_config, config, file)
    if remote and declared.model is not None and declared.model.shapes:
        return replace(
            declared, warnings=(*declared.warnings, f"{declared.detail} is remote code from {shown(root.name)}")
        )
    return declared


def _class_named(config: Mapping[str, Any], file: Path) -> str | None:
    """The first of `architectures`; None where only model_type or auto_map says what the model is."""
    if not config:
        raise ConfigError(
            "no config.json with content: nothing says which weights are tied; add it, or use --ties FILE",
            file=file,
        )
    architectures = config.get("architectures")
    if architectures is not None and (
        not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures)
    ):
        raise ConfigError(
            f"architectures is {shown(json.dumps(architectures))}; expected a list of class names: {CONFIG_FIX}",
            file=file,
        )
    model_type = config.get("model_type")
    if model_type is not None and not isinstance(model_type, str):
        what = f"model_type is {shown(json.dumps(model_type))}; expected a string"
        raise ConfigError(f"{what}: {CONFIG_FIX}", file=file)
    auto_map = config.get("auto_map")
    if auto_map is not None and not isinstance(auto_map, dict):
        what = f"auto_map is {shown(json.dumps(auto_map))}; expected an object"
        raise ConfigError(f"{what}: {CONFIG_FIX}", file=file)
    if not architectures and not model_type and not auto_map:
        raise ConfigError(
            "names neither architectures nor model_type: nothing says which weights are tied; use --ties FILE",
            file=file,
        )
    return architectures[0] if architectures else None


def _config_object(config_class: Any, config: dict[str, Any], file: Path) -> Any:
    """The class's own config object, without what only changes how a model runs."""
    try:
        return config_class.from_dict(_as_loaded(config_class, _without_run_time(config)))
    except BaseException as exc:
        meta_model.stop_if_fatal(exc)
        raise ConfigError(
            f"{config_class.__name__} does not accept this config: {meta_model.in_one_line(exc)}; {_versions(config)}",
            file=file,
        ) from exc


def _asked(model_class: Any, built_config: Any, config: Mapping[str, Any], file: Path) -> Declared:
    """What the class declares once it is built, or at class level where it cannot be."""
    name = model_class.__name__
    try:
        model, legacy = meta_model.build(model_class, built_config)
    except meta_model.TooLarge as exc:
        raise ConfigError(f"{name}: {exc}; no model is built from this (use --ties FILE)", file=file) from exc
    except BaseException as exc:
        meta_model.stop_if_fatal(exc)
        return _class_level(model_class, built_config, config, exc, file)
    try:
        pairs, origins, unpaired, warned = meta_model.declared_by(model, legacy)
        names = meta_model.names_of(model)
    except ConfigError:
        raise
    except Exception as exc:
        meta_model.stop_if_fatal(exc)
        raise ConfigError(
            f"{name} does not say what is tied: {meta_model.in_one_line(exc)}; {_versions(config)}", file=file
        ) from exc
    return Declared(rooted(pairs, origins, ConfigError, file), "class", name, unpaired, warned, names)


def _without_run_time(value: Any) -> Any:
    if isinstance(value, dict):
        out = {k: _without_run_time(v) for k, v in value.items() if k not in _RUN_TIME_KEYS}
        for key in ("use_pretrained_backbone",):
            # Weights of a backbone would be fetched; its names are the same without.
            if key in out:
                out[key] = False
        return out
    if isinstance(value, list):
        return [_without_run_time(v) for v in value]
    return value


def _as_loaded(config_class: Any, config: dict[str, Any]) -> dict[str, Any]:
    """The dict that `config_class.from_pretrained` would take from this config.json.

    transformers writes infinities as {"__float__": "Infinity"}, and a class may take its own part of a composite config
    (`base_config_key`, e.g. CLIPTextModel from a CLIP checkpoint).
    """
    decode = getattr(config_class, "_decode_special_floats", None)
    if decode is not None:
        config = decode(config)
    part = config.get(getattr(config_class, "base_config_key", "") or "")
    if isinstance(part, dict) and config.get("model_type") != config_class.model_type:
        return part
    return config


def _native(name: str, module_of: Any = None) -> Any:
    """The class `name` of the installed transformers, or None; importing it may fail for want of its packages."""
    import transformers
    from transformers import PreTrainedModel

    found = None
    if PLAIN_NAME.match(name) and "." not in name:
        found = getattr(transformers, name, None)
        if found is None and module_of is not None:
            path = module_of.__module__.replace(".configuration_", ".modeling_")
            with contextlib.suppress(ImportError):
                found = getattr(import_module(path), name, None)
    if not isinstance(found, type):
        return None
    if getattr(found, "is_dummy", False) or not issubclass(found, PreTrainedModel):
        return None
    return found


def _classes(root: Path, config: dict[str, Any], wanted: str | None, trust_remote_code: bool) -> tuple[Any, Any, bool]:
    """(config class, model class or None for AutoModel's choice, is it remote code)."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    file = root / "config.json"
    model_type, auto_map = config.get("model_type"), config.get("auto_map") or {}
    remote_models = {k: v for k, v in auto_map.items() if k.startswith("AutoModel")}
    config_class = None
    if model_type in CONFIG_MAPPING:
        try:
            config_class = CONFIG_MAPPING[model_type]
        except Exception as exc:
            meta_model.stop_if_fatal(exc)
            raise ConfigError(
                f"model_type '{shown(model_type)}': {meta_model.in_one_line(exc)}; {_versions(config)}", file=file
            ) from exc
    model_class = None
    if wanted is not None:
        try:
            model_class = _native(wanted, config_class)
        except Exception as exc:
            meta_model.stop_if_fatal(exc)
            raise ConfigError(
                f"{shown(wanted)} cannot be imported: {meta_model.in_one_line(exc)}; {_versions(config)}", file=file
            ) from exc
    if auto_map and trust_remote_code and remote_models:
        return *_remote_classes(root, config, wanted, remote_models, config_class, file), True
    if auto_map and (config_class is None or (wanted is not None and model_class is None)):
        raise ConfigError(
            f"{shown(wanted or model_type)} is defined by Python files in the folder (auto_map), which are not run "
            "without leave: use --trust-remote-code after reading them, or --ties FILE",
            file=file,
        )
    if wanted is not None and model_class is None:
        raise ConfigError(f"the class '{shown(wanted)}' is unknown; {_versions(config)}", file=file)
    if config_class is None:
        config_class = getattr(model_class, "config_class", None)
        if model_type is not None or config_class is None:
            raise ConfigError(f"model_type '{shown(model_type)}' is unknown; {_versions(config)}", file=file)
    elif model_class is not None:
        own = getattr(model_class, "config_class", None)
        if own is not None and config.get(getattr(own, "base_config_key", "") or "") is not None:
            config_class = own
        elif own is not None and not issubclass(config_class, own) and not issubclass(own, config_class):
            raise ConfigError(
                f"architectures names {shown(wanted)}, which takes a {own.__name__}, but model_type is "
                f"'{shown(model_type)}' ({config_class.__name__}): {CONFIG_FIX}",
                file=file,
            )
    return config_class, model_class, False


def _remote_classes(
    root: Path,
    config: dict[str, Any],
    wanted: str | None,
    remote_models: Mapping[str, Any],
    config_class: Any,
    file: Path,
) -> tuple[Any, Any]:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    references = [r[0] if isinstance(r, (list, tuple)) and r else r for r in remote_models.values()]
    if not all(isinstance(r, str) and "." in r for r in references):
        raise ConfigError(
            f"auto_map is {shown(json.dumps(dict(remote_models)))}; expected 'file.Class' references: {CONFIG_FIX}",
            file=file,
        )
    chosen = next((r for r in references if wanted is not None and r.rpartition(".")[2] == wanted), references[0])
    config_reference = (config.get("auto_map") or {}).get("AutoConfig")
    try:
        if isinstance(config_reference, str):
            config_class = get_class_from_dynamic_module(config_reference, str(root), local_files_only=True)
        model_class = get_class_from_dynamic_module(chosen, str(root), local_files_only=True)
    except BaseException as exc:
        meta_model.stop_if_fatal(exc)
        raise ConfigError(
            f"remote code {shown(chosen)} cannot be imported: {meta_model.in_one_line(exc)}; {_versions(config)}",
            file=file,
        ) from exc
    if config_class is None:
        config_class = getattr(model_class, "config_class", None)
    if config_class is None or not hasattr(config_class, "from_dict"):
        raise ConfigError(f"remote code {shown(chosen)} names no config class; {_versions(config)}", file=file)
    return config_class, model_class


def _auto_class(built_config: Any, config: Mapping[str, Any], file: Path) -> Any:
    from transformers import MODEL_MAPPING

    try:
        found = MODEL_MAPPING[type(built_config)]
    except Exception as exc:
        meta_model.stop_if_fatal(exc)
        raise ConfigError(
            f"AutoModel has no class for model_type '{shown(config.get('model_type'))}'; {_versions(config)}",
            file=file,
        ) from exc
    return found[0] if isinstance(found, (list, tuple)) else found


def _class_level(
    model_class: Any, built_config: Any, config: Mapping[str, Any], cause: BaseException, file: Path
) -> Declared:
    """The ties of a class that cannot be built: its own declarations, if they are plain full names."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    name = model_class.__name__
    why = meta_model.in_one_line(cause)
    declared = model_class._tied_weights_keys or {}
    if not getattr(built_config, "tie_word_embeddings", False):
        declared = {}
    plain = isinstance(declared, dict) and all(
        not is_regex(n) and n.rpartition(".")[2] in ("weight", "bias") for pair in declared.items() for n in pair
    )
    if not plain:
        raise ConfigError(
            f"{name} cannot be built ({why}), and its ties cannot be read without that; {_versions(config)}",
            file=file,
        ) from cause
    hub = get_checkpoint_conversion_mapping(name) or get_checkpoint_conversion_mapping(config.get("model_type")) or []
    every = (*hub, *(get_checkpoint_conversion_mapping("legacy") or []))
    names = ModelNames(name, str(getattr(model_class, "base_model_prefix", "") or ""), {}, every, tuple(hub))
    origins = dict.fromkeys(declared, f"class {name} (not built)")
    note = f"{name} cannot be built here ({why}); only its own class-level declarations are used"
    return Declared(rooted(declared, origins, ConfigError, file), "class", name, (), (note,), names)
