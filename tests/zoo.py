"""Every class of the installed transformers that declares ties, and the checkpoint a naive exporter writes of each.

The right answers come from transformers alone: which parameters share storage is read off a model that transformers
built and tied (identity of parameters, no tie map), and the hub's names are what `revert_weight_conversion` makes of
its state dict, as `save_pretrained` calls it.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import pkgutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.checkpoints import write_sparse_shard
from tierewrite.source.folder import open_folder

DTYPES = {
    "torch.float32": "F32",
    "torch.float64": "F64",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
    "torch.complex64": "C64",
    "torch.float8_e4m3fn": "F8_E4M3",
}
SIZES = {"F64": 8, "I64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2}
"""Bytes of one element; those of all others have 1."""

Entry = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Naive:
    """One naive checkpoint, headers only.

    Attributes:
        style: "memory" or "hub": whose names it is written under.
        entries: every key with dtype and shape.
        drops: the keys that a rewrite must drop, each with the key that stands for it.
    """

    style: str
    entries: Mapping[str, Entry]
    drops: Mapping[str, str]


@dataclass(frozen=True)
class Case:
    """One class with its config.json and naive checkpoints, or the reason why there are none."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    naive: tuple[Naive, ...] = ()
    skipped: str | None = None
    active: bool = False


def declared_classes(first: int = 0, step: int = 1) -> dict[str, str]:
    """Exported classes with a `_tied_weights_keys` declaration, of each `step`-th package: name -> module."""
    import transformers
    import transformers.models

    found: dict[str, str] = {}
    with quiet():
        for package in list(pkgutil.iter_modules(transformers.models.__path__))[first::step]:
            base = f"transformers.models.{package.name}"
            for module in pkgutil.iter_modules(importlib.import_module(base).__path__):
                if not module.name.startswith("modeling_"):
                    continue
                try:
                    loaded = importlib.import_module(f"{base}.{module.name}")
                except ImportError:
                    continue
                for name, member in vars(loaded).items():
                    if (
                        isinstance(member, type)
                        and issubclass(member, transformers.PreTrainedModel)
                        and member.__module__ == loaded.__name__
                        and member._tied_weights_keys
                        and hasattr(transformers, name)
                    ):
                        found[name] = loaded.__name__
    return found


class quiet:
    """transformers says nothing inside."""

    def __enter__(self) -> None:
        self._level = logging.root.manager.disable
        logging.disable(logging.ERROR)
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *exc: object) -> None:
        self._warnings.__exit__(None, None, None)
        logging.disable(self._level)


def make_case(name: str, module: str) -> Case:
    """The case of one class, from its default config; never raises for a class that cannot be built."""
    with quiet():
        model_class = getattr(importlib.import_module(module), name)
        try:
            try:
                config, model = build(model_class, small=True)
            except Exception:
                config, model = build(model_class, small=False)
        except Exception as exc:
            return Case(name, skipped=f"{type(exc).__name__}: {' '.join(str(exc).split())[:150]}")
        written = json.loads(config.to_json_string(use_diff=False))
        written["architectures"] = [name]
        state = {k: v for k, v in model.state_dict(keep_vars=True).items() if hasattr(v, "shape")}
        drops = shared_parameters(model, state)
        naive = [Naive("memory", {k: entry_of(v) for k, v in state.items()}, drops)]
        try:
            naive.append(hub_checkpoint(model, state, drops))
        except Exception as exc:
            return Case(name, written, tuple(naive), f"hub names: {type(exc).__name__}: {exc}"[:200], bool(drops))
    return Case(name, written, tuple(naive), None, bool(drops))


def build(model_class: Any, *, small: bool) -> tuple[Any, Any]:
    """(config, tied model on the meta device) from the default config; `small` cuts tall stacks to four layers."""
    import torch

    config = model_class.config_class()
    if small:
        changes: dict[str, Any] = {"num_hidden_layers": 4} if getattr(config, "num_hidden_layers", 0) > 6 else {}
        for name in config.sub_configs:
            part = getattr(config, name, None)
            if part is not None and getattr(part, "num_hidden_layers", 0) > 6:
                changes[name] = type(part)(num_hidden_layers=4)
        config = model_class.config_class(**changes)
    with torch.device("meta"):
        model = model_class(config)
        model.tie_weights(recompute_mapping=False)
    return config, model


def shared_parameters(model: Any, state: Mapping[str, Any]) -> dict[str, str]:
    """alias -> canonical of a tied model, by identity of its parameters.

    Of the names of one parameter, the canonical one is the one that no active declaration names as an alias.
    """
    by_identity: dict[int, list[str]] = {}
    for name, tensor in state.items():
        by_identity.setdefault(id(tensor), []).append(name)
    declared = set(model.all_tied_weights_keys)
    drops: dict[str, str] = {}
    for names in by_identity.values():
        if len(names) < 2:
            continue
        roots = [n for n in names if n not in declared]
        if len(roots) != 1:
            # Modules shared by construction, without a declaration: not ours to touch.
            roots, names = (roots[:1], [roots[0], *(n for n in names if n in declared)]) if roots else ([], [])
        drops.update({n: roots[0] for n in names if roots and n != roots[0]})
    return drops


def hub_checkpoint(model: Any, state: Mapping[str, Any], drops: Mapping[str, str]) -> Naive:
    """The same checkpoint under the names that save_pretrained writes, and what it keeps of them."""
    from transformers.core_model_loading import revert_weight_conversion

    detached = {k: v.detach() for k, v in state.items()}
    every = revert_weight_conversion(model, dict(detached))
    kept = revert_weight_conversion(model, {k: v for k, v in detached.items() if k not in drops})
    # A tensor that is only renamed stays the same object; what is converted is asked one by one.
    renamed = {id(tensor): key for key, tensor in every.items()}

    def hub_names(name: str) -> list[str]:
        if id(detached[name]) in renamed:
            return [renamed[id(detached[name])]]
        return list(revert_weight_conversion(model, {name: detached[name]}))

    gone: dict[str, str] = {}
    for alias, canonical in drops.items():
        gone.update({a: c for a, c in zip(hub_names(alias), hub_names(canonical), strict=True) if a not in kept})
    if set(gone) != set(every) - set(kept):
        raise ValueError(
            f"names that save_pretrained drops do not add up: {sorted(set(gone) ^ (set(every) - set(kept)))}"
        )
    return Naive("hub", {k: entry_of(v) for k, v in every.items()}, gone)


def entry_of(tensor: Any) -> Entry:
    return DTYPES[str(tensor.dtype)], tuple(tensor.shape)


def write_headers(folder: Path, naive: Naive, config: dict[str, Any]) -> None:
    """config.json and one sparse model.safetensors whose data is a hole of the right length."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_sparse_shard(
        folder / "model.safetensors",
        {key: (dtype, shape, SIZES.get(dtype, 1) * math.prod(shape)) for key, (dtype, shape) in naive.entries.items()},
    )


def judge(name: str, module: str, folder: Path) -> dict[str, Any]:
    """Plan every naive checkpoint of one class and compare with the right answer; a JSON-like record."""
    from tierewrite.planning.policy import Policy
    from tierewrite.values.opened import Opened

    case = make_case(name, module)
    wrong: list[str] = []
    plans = 0
    ties: Any = None
    try:
        for naive in case.naive:
            at = folder / f"{name}-{naive.style}"
            write_headers(at, naive, case.config)
            opened = Opened.open(at)
            wrong += differences(naive, opened.plan(Policy()))
            plans += 1
            if naive.drops:
                only = without_canonicals(naive)
                write_headers(folder / f"{name}-{naive.style}-only", only, case.config)
                # The ties depend on the config alone: those of the first style are taken for both.
                ties = ties or opened.ties
                wrong += renaming_differences(only, folder / f"{name}-{naive.style}-only", ties)
                plans += 1
    except Exception as exc:
        wrong.append(f"{type(exc).__name__}: {exc}"[:500])
    return {"name": name, "skipped": case.skipped, "active": case.active, "plans": plans, "wrong": wrong}


def differences(naive: Naive, plan: Any) -> list[str]:
    """Where `plan` is not: drop exactly the aliases, keep every other key."""
    wrong = [f"{naive.style}: {g.id} is unconfirmed: {g.reason}" for g in plan.groups if g.status == "unconfirmed"]
    for key, planned in plan.tensors.items():
        want = ("drop", naive.drops[key]) if key in naive.drops else ("keep", key)
        if (planned.action.value, planned.target) != want:
            wrong.append(f"{naive.style}: {key} is {planned.action.value} -> {planned.target}, right is {want}")
    if plan.tensors.keys() != naive.entries.keys():
        wrong.append(f"{naive.style}: the plan speaks of other keys")
    return wrong


def without_canonicals(naive: Naive) -> Naive:
    """The checkpoint of an exporter that keeps the first name of shared tensors: aliases only."""
    gone = set(naive.drops.values())
    return Naive(naive.style, {k: v for k, v in naive.entries.items() if k not in gone}, naive.drops)


def renaming_differences(naive: Naive, folder: Path, ties: Any) -> list[str]:
    """Where the plan is not: one alias of each tie takes the canonical name, its siblings go, the rest stays."""
    from tierewrite.planning.policy import Policy
    from tierewrite.ties.on_disk import on_disk
    from tierewrite.values.opened import Opened

    checkpoint = open_folder(folder)
    plan = Opened(checkpoint, ties, on_disk(ties, checkpoint.tensors.keys())).plan(Policy())
    wrong = []
    renamed: dict[str, int] = {}
    for key, planned in plan.tensors.items():
        if key not in naive.drops:
            if (planned.action.value, planned.target) != ("keep", key):
                wrong.append(f"{naive.style}, aliases only: {key} is {planned.action.value} -> {planned.target}")
            continue
        if planned.target != naive.drops[key] or planned.action.value not in ("rename", "drop"):
            wrong.append(
                f"{naive.style}, aliases only: {key} is {planned.action.value} -> {planned.target}, "
                f"right is a rename to {naive.drops[key]}"
            )
        renamed[naive.drops[key]] = renamed.get(naive.drops[key], 0) + (planned.action.value == "rename")
    wrong += [f"{naive.style}, aliases only: {n} aliases take the name {key}" for key, n in renamed.items() if n != 1]
    return wrong
