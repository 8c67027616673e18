"""The classes of the installed transformers that a config.json may mean: the one it names, and those of its model_type.

transformers' AutoModel classes go by `model_type` alone; `architectures` says who wrote the file. The two may differ:
transformers gives some types another family's class (EXAONE is a LlamaForCausalLM), and people write what they like.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from tierewrite.errors import ConfigError, shown
from tierewrite.ties import meta_model
from tierewrite.ties.config_limits import CONFIG_FIX, SAY_TIES
from tierewrite.ties.patterns import PLAIN_NAME


@dataclass(frozen=True)
class Candidate:
    """A model class, and the class of the config that it is built from.

    Attributes:
        base: it is what plain `AutoModel` takes for this config: it has no head.
    """

    config_class: Any
    model_class: Any
    base: bool = False


def versions(config: Mapping[str, Any]) -> str:
    """Which transformers wrote the config and which is installed, and what to do about it; the end of messages."""
    import transformers

    written = config.get("transformers_version")
    wrote = (
        f"config.json was written by transformers {shown(written)}"
        if written
        else "config.json names no transformers_version"
    )
    if written == transformers.__version__:
        return f"{wrote}, which is installed: {SAY_TIES}"
    return f"{wrote}, {transformers.__version__} is installed: install one that fits, or {SAY_TIES}"


def registered_config_class(config: Mapping[str, Any], file: Path) -> Any:
    """The config class of `model_type`, or None if transformers has none. Raises ConfigError: it cannot be imported."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        return None
    try:
        return CONFIG_MAPPING[model_type]
    except Exception as exc:
        meta_model.stop_if_fatal(exc)
        raise ConfigError(
            f"model_type '{shown(model_type)}': {meta_model.in_one_line(exc)}; {versions(config)}", file=file
        ) from exc


def registered_here(config: Mapping[str, Any]) -> bool:
    """Whether this process gave transformers classes of its own (`AutoModel.register`) that the config may mean.

    Imports nothing of transformers that is not imported already.
    """
    auto = sys.modules.get("transformers.models.auto.modeling_auto")
    members = list(vars(auto).values()) if auto is not None else []
    if any(getattr(getattr(member, "_model_mapping", None), "_extra_content", None) for member in members):
        return True
    configs = sys.modules.get("transformers.models.auto.configuration_auto")
    extra = getattr(getattr(configs, "CONFIG_MAPPING", None), "_extra_content", {})
    parts = (config, *(part for part in config.values() if isinstance(part, dict)))
    return any(isinstance(part.get("model_type"), str) and part["model_type"] in extra for part in parts)


def named(config: Mapping[str, Any], wanted: str, registered: Any, file: Path) -> Candidate:
    """The class called `wanted`, if the config is one that it takes.

    Args:
        registered: the config class of `model_type`, or None.

    Raises:
        ConfigError: transformers has no such class or cannot import it, or it takes other configs.
    """
    model_type, auto_map = config.get("model_type"), config.get("auto_map")
    try:
        model_class = native(wanted, registered)
    except Exception as exc:
        meta_model.stop_if_fatal(exc)
        raise ConfigError(
            f"{shown(wanted)} cannot be imported: {meta_model.in_one_line(exc)}; {versions(config)}", file=file
        ) from exc
    own: Any = getattr(model_class, "config_class", None)
    if registered is None and own is not None and own.model_type == model_type:
        return Candidate(own, model_class)  # a part of a model, whose type AutoConfig does not list
    if auto_map and (registered is None or model_class is None):
        raise needs_leave(wanted, config, file)
    if model_class is None:
        raise ConfigError(f"the class '{shown(wanted)}' is unknown; {versions(config)}", file=file)
    if registered is None:
        if model_type is not None or own is None:
            raise ConfigError(f"model_type '{shown(model_type)}' is unknown; {versions(config)}", file=file)
        return Candidate(own, model_class)
    found = _taking(registered, model_class, config)
    if found is not None:
        return found
    raise ConfigError(
        f"architectures names {shown(wanted)}, which takes a {own.__name__}, but model_type is "
        f"'{shown(model_type)}' ({registered.__name__}): {CONFIG_FIX}",
        file=file,
    )


def needs_leave(wanted: object, config: Mapping[str, Any], file: Path) -> ConfigError:
    """The refusal of remote code, which is in the folder or, as `org/name--module.Class`, in another repository."""
    named = [name for name in (config.get("auto_map") or {}).values() if isinstance(name, str)]
    elsewhere = sorted({name.partition("--")[0] for name in named if "--" in name})
    whose = f"of {shown(', '.join(elsewhere))} on the hub" if elsewhere else "in the folder"
    return ConfigError(
        f"{shown(wanted)} is defined by Python files {whose} (auto_map), which are not run "
        "without leave: use --trust-remote-code after reading them, or --ties FILE",
        file=file,
    )


def _taking(registered: Any, model_class: Any, config: Mapping[str, Any]) -> Candidate | None:
    """The class with the config class that it is built from; None if it takes no config of this model_type."""
    own: Any = getattr(model_class, "config_class", None)
    base = model_class in _classes_of(_auto_classes()["AutoModel"], registered)
    if own is None:
        return Candidate(registered, model_class, base)
    if part_for(own, config) is not None:
        return Candidate(own, model_class, base)
    if issubclass(registered, own) or issubclass(own, registered):
        return Candidate(registered, model_class, base)
    if any(model_class in _classes_of(auto, registered) for auto in _auto_classes().values()):
        return Candidate(registered, model_class, base)  # of another family, as AutoModel has it
    return None


def part_for(config_class: Any, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The part of a composite config that `config_class.from_pretrained` takes, or None; CLIPTextConfig does.

    By `base_config_key`, or where several models hold such a part, by its model_type.
    """
    key = getattr(config_class, "base_config_key", "")
    model_type = config_class.model_type
    if config.get("model_type") == model_type:
        return None
    named = config.get(key) if isinstance(key, str) and key else None
    typed = [part for part in config.values() if isinstance(part, dict) and part.get("model_type") == model_type]
    return named if isinstance(named, dict) else typed[-1] if typed and model_type else None


def of_model_type(config: Mapping[str, Any], registered: Any) -> Iterator[Candidate]:
    """Every class that an AutoModel class takes for this config, each once.

    The AutoModel classes that `auto_map` names come first, then AutoModel itself, then the others as transformers lists
    them.
    """
    autos = _auto_classes()
    meant = [name for name in config.get("auto_map") or {} if name in autos]
    seen: set[Any] = set()
    for name in dict.fromkeys((*meant, "AutoModel", *autos)):
        for model_class in _classes_of(autos[name], registered):
            if model_class not in seen:
                seen.add(model_class)
                yield Candidate(registered, model_class, name == "AutoModel")


def automodel(config: Mapping[str, Any], registered: Any, file: Path) -> Candidate:
    """The class that plain AutoModel takes. Raises ConfigError: it has none."""
    found = _classes_of(_auto_classes()["AutoModel"], registered)
    if found:
        return Candidate(registered, found[0], True)
    raise ConfigError(
        f"AutoModel has no class for model_type '{shown(config.get('model_type'))}'; {versions(config)}", file=file
    )


def native(name: str, module_of: Any = None) -> Any:
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


def _auto_classes() -> dict[str, Any]:
    """transformers' AutoModel classes by name, in the order of its module, those without `For` task names first."""
    from transformers.models.auto import modeling_auto

    found = {
        name: member
        for name, member in vars(modeling_auto).items()
        if name.startswith("AutoModel") and getattr(member, "_model_mapping", None) is not None
    }
    names = list(found)
    at = names.index("AutoModel")
    return {name: found[name] for name in (*names[at:], *names[:at])}


def _classes_of(auto: Any, config_class: Any) -> list[Any]:
    """The classes that one AutoModel class has for a config class; those that cannot be imported are left out."""
    try:
        found = auto._model_mapping[config_class]
    except KeyError:
        return []
    except Exception as exc:
        meta_model.stop_if_fatal(exc)
        return []
    return [one for one in (found if isinstance(found, (list, tuple)) else [found]) if isinstance(one, type)]
