"""Odd config.json files around every class of transformers: flags flipped, other names in architectures, wrappers.

The right answer is transformers' own: of a model built from the very same config.json and tied by transformers, what
`save_pretrained` leaves out (see zoo.py). Where config.json names another head, what that class leaves out of these
names is right, too: some heads tie more, or the other way round. An outcome is one of

    right    exactly these tensors are dropped, for these names
    refused  config.json is refused (exit 4)
    said     fewer are dropped, and a warning is given
    wrong    anything else
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import zoo

Config = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """A class, its AutoModel base class and another class with a head for the same config, by name ("" if none)."""

    name: str
    base: str
    other: str


@dataclass(frozen=True)
class Kind:
    """One way in which a config.json is odd.

    Attributes:
        change: gives the odd config.json; None where the class has no such thing.
        rebuilt: the oddity changes what transformers ties.
        prefix: what is put before every name on disk.
    """

    name: str
    change: Callable[[Config, Context], Config | None]
    rebuilt: bool = False
    prefix: str = ""


def _flipped(part: Config) -> Config:
    return {**part, "tie_word_embeddings": not part.get("tie_word_embeddings")}


def _top(config: Config, _: Context) -> Config | None:
    return _flipped(config)


def _parts(config: Config, _: Context) -> Config | None:
    parts = {key: _flipped(part) for key, part in config.items() if isinstance(part, dict) and "model_type" in part}
    return {**config, **parts} if parts else None


def _both(config: Config, context: Context) -> Config | None:
    parts = _parts(config, context)
    return None if parts is None else _flipped(parts)


def _without_flag(config: Config, _: Context) -> Config | None:
    return {key: value for key, value in config.items() if key != "tie_word_embeddings"}


def _without_any_flag(config: Config, context: Context) -> Config | None:
    found = _without_flag(config, context)
    assert found is not None
    parts = {key: _without_flag(part, context) for key, part in found.items() if isinstance(part, dict)}
    return {**found, **parts}


def _named(*names: str) -> Callable[[Config, Context], Config | None]:
    """architectures of these names, where {name}, {base} and {other} stand for those of the context."""

    def change(config: Config, context: Context) -> Config | None:
        filled = [name.format(**vars(context)) for name in names]
        return {**config, "architectures": filled} if all(filled) else None

    return change


def _without(*keys: str) -> Callable[[Config, Context], Config | None]:
    return lambda config, _: {key: value for key, value in config.items() if key not in keys}


def _another_family(config: Config, context: Context) -> Config | None:
    family = "Qwen2" if config.get("model_type") == "llama" else "Llama"
    return {**config, "architectures": [f"{family}ForCausalLM"]}


def _remote(config: Config, context: Context) -> Config | None:
    auto_map = {"AutoConfig": "configuration_x.XConfig", "AutoModel": "modeling_x.XModel"}
    return {**config, "architectures": [f"Hub{context.name}"], "auto_map": auto_map}


KINDS = (
    Kind("as it is", lambda config, _: config),
    Kind("flag flipped on top", _top, rebuilt=True),
    Kind("flag flipped in subconfigs", _parts, rebuilt=True),
    Kind("flag flipped everywhere", _both, rebuilt=True),
    Kind("flag null", lambda config, _: {**config, "tie_word_embeddings": None}, rebuilt=True),
    Kind("no flag on top", _without_flag, rebuilt=True),
    Kind("no flag anywhere", _without_any_flag, rebuilt=True),
    Kind("architectures absent", _without("architectures")),
    Kind("architectures a text", lambda config, context: {**config, "architectures": context.name}),
    Kind("architectures the base class", _named("{base}")),
    Kind("architectures another head", _named("{other}")),
    Kind("architectures unknown, then right", _named("NoSuchModel", "{name}")),
    Kind("architectures right, then another head", _named("{name}", "{other}")),
    Kind("architectures an early spelling", _named("Hub{name}")),
    Kind("architectures of another family", _another_family),
    Kind("unknown class in auto_map", _remote),
    Kind("model_type absent", _without("model_type")),
    Kind("compiled", lambda config, _: config, prefix="_orig_mod."),
    Kind("wrapped twice", lambda config, _: config, prefix="module._fsdp_wrapped_module."),
)


def all_classes(names: Collection[str] = ()) -> dict[str, str]:
    """Every exported PreTrainedModel class but the abstract ones of each family, or `names`: name -> module."""
    import transformers
    import transformers.models

    if names:
        return {name: getattr(transformers, name).__module__ for name in names}
    found: dict[str, str] = {}
    with zoo.quiet():
        for package in pkgutil.iter_modules(transformers.models.__path__):
            base = f"transformers.models.{package.name}"
            for module in pkgutil.iter_modules(importlib.import_module(base).__path__):
                if module.name.startswith("modeling_"):
                    found.update(_classes_in(f"{base}.{module.name}"))
    return found


def _classes_in(module: str) -> Iterator[tuple[str, str]]:
    import transformers

    try:
        loaded = importlib.import_module(module)
    except ImportError:
        return
    for name, member in vars(loaded).items():
        if (
            isinstance(member, type)
            and issubclass(member, transformers.PreTrainedModel)
            and member.__module__ == module
            and not name.endswith("PreTrainedModel")
            and getattr(member, "config_class", None) is not None
            and hasattr(transformers, name)
        ):
            yield name, module


def judge(name: str, module: str, folder: Path) -> list[dict[str, str]]:
    """The outcome of every kind of config for one class: records of class, kind, outcome and detail."""
    with zoo.quiet():
        model_class = getattr(importlib.import_module(module), name)
        try:
            written, model = _small(model_class)
            naive = _naive(model)
        except Exception as exc:
            why = f"{type(exc).__name__}: {' '.join(str(exc).split())[:150]}"
            return [{"class": name, "kind": "", "outcome": "skipped", "detail": why}]
        written["architectures"] = [name]
        context = _context(model_class, model.config)
        records = []
        for number, kind in enumerate(KINDS):
            config = kind.change(deepcopy(written), context)
            if config is None:
                continue
            at = folder / f"{name}-{number}"
            try:
                right = _naive(_built(model_class, config)) if kind.rebuilt else naive
            except Exception:
                continue  # transformers takes no such config
            outcome, detail = _outcome(right, kind.prefix, config, at)
            shutil.rmtree(at)
            if outcome == "wrong" and config.get("architectures") == [context.other]:
                drops = _naive(_built(getattr(sys.modules[module], context.other), config)).drops
                there = {alias: name for alias, name in drops.items() if {alias, name} <= right.entries.keys()}
                outcome, detail = _outcome(zoo.Naive(right.style, right.entries, there), kind.prefix, config, at)
                shutil.rmtree(at)
            records.append({"class": name, "kind": kind.name, "outcome": outcome, "detail": detail})
    return records


def _small(model_class: Any) -> tuple[Config, Any]:
    try:
        config, model = zoo.build(model_class, small=True)
    except Exception:
        config, model = zoo.build(model_class, small=False)
    return json.loads(config.to_json_string(use_diff=False)), model


def _built(model_class: Any, config: Config) -> Any:
    """The model that transformers makes of this config.json, tied, on the meta device."""
    import torch

    with torch.device("meta"):
        model = model_class(model_class.config_class.from_dict(deepcopy(config)))
        model.tie_weights(recompute_mapping=False)
    return model


def _naive(model: Any) -> zoo.Naive:
    """The naive checkpoint under the hub's names; under those in memory where transformers cannot say them."""
    state = {k: v for k, v in model.state_dict(keep_vars=True).items() if hasattr(v, "shape")}
    drops = zoo.shared_parameters(model, state)
    try:
        return zoo.hub_checkpoint(model, state, drops)
    except Exception:
        return zoo.Naive("memory", {k: zoo.entry_of(v) for k, v in state.items()}, drops)


def _context(model_class: Any, config: Any) -> Context:
    from transformers.models.auto import modeling_auto

    name = model_class.__name__
    autos = {n: m for n, m in vars(modeling_auto).items() if n.startswith("AutoModel") and hasattr(m, "_model_mapping")}
    found: dict[str, list[str]] = {}
    for auto, member in autos.items():
        try:
            classes = member._model_mapping[type(config)]
        except Exception:
            continue
        listed = classes if isinstance(classes, (list, tuple)) else [classes]
        found[auto] = [c.__name__ for c in listed if isinstance(c, type)]
    base = found.pop("AutoModel", [""])[0]
    others = [n for names in found.values() for n in names if n not in (name, base)]
    return Context(name, "" if base == name else base, others[0] if others else "")


def _outcome(naive: zoo.Naive, prefix: str, config: Config, folder: Path) -> tuple[str, str]:
    import tierewrite

    entries = {prefix + key: entry for key, entry in naive.entries.items()}
    drops = {prefix + alias: prefix + canonical for alias, canonical in naive.drops.items()}
    zoo.write_headers(folder, zoo.Naive(naive.style, entries, drops), config)
    try:
        plan = tierewrite.plan(folder)
    except tierewrite.ConfigError as error:
        return "refused", str(error).partition("config.json: ")[2][:200]
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {error}"[:300]
    changed = {key: (p.action.value, p.target) for key, p in plan.tensors.items() if p.action.value != "keep"}
    wanted = {alias: ("drop", canonical) for alias, canonical in drops.items()}
    unconfirmed = [group.id for group in plan.groups if group.status == "unconfirmed"]
    if changed == wanted and not unconfirmed:
        return "right", plan.ties_detail
    detail = f"{plan.ties_detail}: wanted {len(wanted)}, changed {len(changed)}, unconfirmed {unconfirmed[:3]}; "
    detail += "; ".join(plan.warnings)[:300]
    fewer = changed.items() < wanted.items() and not unconfirmed
    return ("said" if fewer and plan.warnings else "wrong"), detail
