"""The model class of a config.json, asked for its ties and names.

`architectures` names it; where transformers does not have that class for this `model_type`, or the file holds a head
that it lacks, the classes that AutoModel would take are tried, and the first that takes every name of the checkpoint is
asked, with a warning.

Refused: a class that transformers does not know or cannot build from this config, remote code without leave, and
configurations whose sizes no real model has. No tensor is read, the network is never touched, and transformers never
talks to the user. torch and transformers are imported only here and where a class is built (`meta_model`).
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tierewrite.errors import ConfigError, shown
from tierewrite.source.header import gc_paused
from tierewrite.source.table import CONFIG_NAME
from tierewrite.ties import candidates, class_memory, meta_model, remote_class
from tierewrite.ties.candidates import Candidate
from tierewrite.ties.config_limits import CONFIG_FIX
from tierewrite.ties.fit import Fit, all_loaded, fit_of
from tierewrite.ties.patterns import is_regex
from tierewrite.ties.renames import Renames
from tierewrite.ties.tie import FLAG, Declared, ModelNames, Tie, rooted
from tierewrite.ties.tied_in_code import tied_in_code

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


def _new_lock() -> None:
    """For a forked process: the thread that may have held the lock is not in it, and would never give it back."""
    global _BUILD_LOCK
    _BUILD_LOCK = threading.Lock()


os.register_at_fork(after_in_child=_new_lock)


def from_class(root: Path, config: dict[str, Any], trust_remote_code: bool, keys: Collection[str] = ()) -> Declared:
    """What the class that config.json names declares; where it names none that fits, the one that takes the keys.

    What a class of the installed transformers answered before is remembered (`class_memory`).

    Args:
        root: the checkpoint's folder; remote code is read from it.
        config: its config.json, parsed.
        trust_remote_code: run the Python files that `auto_map` names.
        keys: the names of all tensors; without them config.json alone decides.

    Raises:
        ConfigError: config.json is malformed, or its class is unknown, cannot be built, or is remote code, and no class
            of its model_type takes the keys. SystemFailure: torch or transformers cannot be imported.
    """
    asked = partial(_asked_now, root, config, trust_remote_code, keys)
    entry = class_memory.entry_of(root, config, keys, trust_remote_code)
    return asked() if entry is None else entry.answer(asked)


def _asked_now(root: Path, config: dict[str, Any], trust_remote_code: bool, keys: Collection[str]) -> Declared:
    """What `from_class` gives, asked of the class itself."""
    file = root / CONFIG_NAME
    names, warned = _classes_named(config, file)
    config = {**config, "architectures": list(names)} if names else config
    # Imports make a million objects that stay: collecting garbage meanwhile is a quarter of the time, and finds none.
    with _BUILD_LOCK, gc_paused(), meta_model.quiet(), meta_model.offline():
        registered = candidates.registered_config_class(config, file)
        if trust_remote_code and remote_class.is_named(config):
            remote = remote_class.imported(root, config, names, registered, file)
            declared = _asked(remote, config, file)
            if declared.model is not None and declared.model.shapes:
                warned = (*warned, f"{declared.detail} is remote code from {shown(root.name)}")
        else:
            declared = _of_transformers(config, names, registered, keys, file)
    return replace(declared, warnings=(*declared.warnings, *warned, *_undeclared(declared, config, keys)))


def _undeclared(declared: Declared, config: Mapping[str, Any], keys: Collection[str]) -> Iterator[str]:
    """What to say where config.json says that the embeddings are tied, and the class does not."""
    model = declared.model
    if model is None or model.embeddings is None or not _says_tied(config) or not len(keys):
        return
    tied = {name for tie in declared.ties for name in (tie.alias, tie.canonical)}
    said = any(name in warning for warning in declared.warnings for name in model.embeddings)
    if said or not tied.isdisjoint(model.embeddings) or not all_loaded(model, model.embeddings, keys):
        return
    first, second = map(shown, model.embeddings)
    yield (
        f"config.json says tie_word_embeddings true, and '{second}' and '{first}' are both stored, but "
        f"{declared.detail} declares no tie: both are kept. If they are meant to be one, say so with --ties FILE"
    )


def _says_tied(config: Mapping[str, Any]) -> bool:
    parts = (config, *(part for part in config.values() if isinstance(part, dict)))
    return any(part.get(FLAG) is True for part in parts)


def _classes_named(config: Mapping[str, Any], file: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(`architectures`, warnings); no names where only model_type or auto_map says what the model is.

    Raises:
        ConfigError: nothing says it, or one of the three is of another type.
    """
    if not config:
        raise ConfigError(
            "no config.json with content: nothing says which weights are tied; add it, or use --ties FILE",
            file=file,
        )
    architectures = config.get("architectures")
    warned: tuple[str, ...] = ()
    if isinstance(architectures, str) and architectures:
        warned = (f"architectures is the text '{shown(architectures)}'; it is read as a list of one name",)
        architectures = [architectures]
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
    return tuple(architectures or ()), warned


def _of_transformers(
    config: dict[str, Any], names: tuple[str, ...], registered: Any, keys: Collection[str], file: Path
) -> Declared:
    """What a class of the installed transformers declares: the one that is named, unless another takes the keys.

    Raises:
        ConfigError: the one that is named cannot be asked, and no other takes the keys.
    """
    chosen: Candidate | None = None
    first: Declared | None = None
    try:
        chosen = _first_choice(config, names, registered, file)
        first = _asked(chosen, config, file)
        why, fit, problem = *_doubt(first, keys, config), None
        if not why:
            return first
    except ConfigError as error:
        why, fit, problem = _unusable(config, names, registered, chosen), None, error
    for other in _others(config, names, registered, file) if len(keys) else ():
        if chosen is not None and other.model_class is chosen.model_class:
            continue
        found = _if_built(other, config, file)
        if found is not None and _takes(found, keys, config, all_of_it=first is not None):
            if first is not None and _pairs(found) == _pairs(first):
                return first  # a head more or less, and the same ties
            said = (
                f"{why}; {found.detail}, which transformers has for model_type '{shown(config.get('model_type'))}', "
                "takes all names of the checkpoint and was asked what is tied"
            )
            return replace(found, warnings=(*found.warnings, said), instead_of="" if problem is None else str(problem))
    if problem is not None:
        raise problem
    assert first is not None
    assert chosen is not None
    assert fit is not None
    if not fit.missing and not (fit.strange and chosen.base):
        return first  # a head that leaves names over, or a part of a checkpoint
    said = f"{why}, and no other class of its model_type takes all names of the checkpoint: a tie may be missed"
    return replace(first, ties=_without_renames(first, keys), warnings=(*first.warnings, said))


def _without_renames(declared: Declared, keys: Collection[str]) -> tuple[Tie, ...]:
    """The ties but those of which the alias alone is there: a class that does not fit renames nothing.

    The `lm_head.weight` of a part of a model may be tied to another tensor than that of the whole.
    """
    model = declared.model
    assert model is not None
    names = {name for tie in declared.ties for name in (tie.alias, tie.canonical)}
    there = {name for name in names if all_loaded(model, [name], keys)}
    return tuple(tie for tie in declared.ties if tie.alias not in there or tie.canonical in there)


def _takes(declared: Declared, keys: Collection[str], config: Mapping[str, Any], all_of_it: bool) -> bool:
    """Whether the class takes the keys; `all_of_it`: it does not even pass over any, as a T5EncoderModel a decoder."""
    fit = fit_of(declared, keys, config)
    return fit.whole and not (all_of_it and fit.ignored)


def _pairs(declared: Declared) -> set[tuple[str, str]]:
    return {(tie.alias, tie.canonical) for tie in declared.ties}


def _first_choice(config: dict[str, Any], names: tuple[str, ...], registered: Any, file: Path) -> Candidate:
    """The class that config.json says. Raises ConfigError: transformers does not have it, or not for this config."""
    if names:
        return candidates.named(config, names[0], registered, file)
    if registered is not None:
        return candidates.automodel(config, registered, file)
    if config.get("auto_map"):
        raise candidates.needs_leave(config.get("model_type"), config, file)
    raise ConfigError(
        f"model_type '{shown(config.get('model_type'))}' is unknown; {candidates.versions(config)}", file=file
    )


def _others(config: dict[str, Any], names: tuple[str, ...], registered: Any, file: Path) -> Iterator[Candidate]:
    """Further classes that may have written the file: the others that are named, then those of the model_type."""
    for name in names[1:]:
        with contextlib.suppress(ConfigError):
            yield candidates.named(config, name, registered, file)
    if registered is not None:
        yield from candidates.of_model_type(config, registered)


def _if_built(candidate: Candidate, config: dict[str, Any], file: Path) -> Declared | None:
    try:
        found = _asked(candidate, config, file)
    except ConfigError:
        return None
    return found if found.model is not None and found.model.shapes else None


def _doubt(declared: Declared, keys: Collection[str], config: Mapping[str, Any]) -> tuple[str, Fit]:
    """Why the class may not be the one that wrote the file, in words; "" if nothing speaks against it."""
    if not len(keys) or declared.model is None or not declared.model.shapes:
        return "", Fit((), ())
    fit = fit_of(declared, keys, config)
    if fit.strange:
        return f"{declared.detail} has no parameter for '{shown(fit.strange[0])}'", fit
    if fit.missing:
        return f"the checkpoint holds nothing for '{shown(fit.missing[0])}' of {declared.detail}", fit
    return "", fit


def _unusable(config: Mapping[str, Any], names: Sequence[str], registered: Any, chosen: Candidate | None) -> str:
    """Why the class that config.json says was not asked, in words."""
    import transformers

    if not names:
        return "config.json names no architectures"
    if chosen is not None:
        return f"{chosen.model_class.__name__} cannot be asked with this config"
    known = None
    with contextlib.suppress(Exception):
        known = candidates.native(names[0], registered)
    if known is None:
        return f"architectures names {shown(names[0])}, which transformers {transformers.__version__} does not have"
    model_type = shown(config.get("model_type"))
    return f"architectures names {shown(names[0])}, which takes no config of model_type '{model_type}'"


def _config_object(config_class: Any, config: dict[str, Any], file: Path) -> Any:
    """The class's own config object, without what only changes how a model runs."""
    try:
        return config_class.from_dict(_as_loaded(config_class, _without_run_time(config)))
    except BaseException as exc:
        meta_model.stop_if_fatal(exc)
        raise ConfigError(
            f"{config_class.__name__} does not accept this config: {meta_model.in_one_line(exc)}; "
            f"{candidates.versions(config)}",
            file=file,
        ) from exc


def _asked(candidate: Candidate, config: dict[str, Any], file: Path) -> Declared:
    """What the class declares once it is built, or at class level where it cannot be."""
    model_class = candidate.model_class
    built_config = _config_object(candidate.config_class, config, file)
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
        in_code = tied_in_code(model, pairs)
    except ConfigError:
        raise
    except Exception as exc:
        meta_model.stop_if_fatal(exc)
        raise ConfigError(
            f"{name} does not say what is tied: {meta_model.in_one_line(exc)}; {candidates.versions(config)}", file=file
        ) from exc
    origins |= dict.fromkeys(in_code.pairs, f"class {name} (its code)")
    ties = rooted({**pairs, **in_code.pairs}, origins, ConfigError, file)
    unpaired = tuple(alias for alias in unpaired if alias not in in_code.pairs)
    return Declared(ties, "class", name, unpaired, (*warned, *in_code.warnings), names)


def _without_run_time(value: Any) -> Any:
    if isinstance(value, dict):
        out = {k: _without_run_time(v) for k, v in value.items() if k not in _RUN_TIME_KEYS}
        if "use_pretrained_backbone" in out:  # its weights would be fetched; its names are the same without
            out["use_pretrained_backbone"] = False
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
    return candidates.part_for(config_class, config) or config


def _class_level(
    model_class: Any, built_config: Any, config: Mapping[str, Any], cause: BaseException, file: Path
) -> Declared:
    """The ties of a class that cannot be built: its own declarations, if they are plain full names."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    name = model_class.__name__
    why = meta_model.in_one_line(cause)
    declared = model_class._tied_weights_keys or {}
    if not getattr(built_config, FLAG, False):
        declared = {}
    plain = isinstance(declared, dict) and all(
        isinstance(n, str) and not is_regex(n) and n.rpartition(".")[2] in ("weight", "bias")
        for pair in declared.items()
        for n in pair
    )
    if not plain:
        raise ConfigError(
            f"{name} cannot be built ({why}), and its ties cannot be read without that; {candidates.versions(config)}",
            file=file,
        ) from cause
    hub = get_checkpoint_conversion_mapping(name) or get_checkpoint_conversion_mapping(config.get("model_type")) or []
    every = (*hub, *(get_checkpoint_conversion_mapping("legacy") or []))
    prefix = str(getattr(model_class, "base_model_prefix", "") or "")
    names = ModelNames(name, prefix, {}, Renames.of(every, hub))
    origins = dict.fromkeys(declared, f"class {name} (not built)")
    note = f"{name} cannot be built here ({why}); only its own class-level declarations are used"
    return Declared(rooted(declared, origins, ConfigError, file), "class", name, (), (note,), names)
