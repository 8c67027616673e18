"""The ties of a model, and who is asked for them in which order.

A tie is `alias -> canonical`, both names of parameters in memory. The first source that speaks decides:

1. a ties file: JSON `{alias: canonical}`: names, module names or regular expressions, as transformers writes them;
2. `_tied_weights_keys` in config.json itself;
3. the model class that config.json names, built by the installed transformers on the meta device (names and shapes, no
   weights). transformers itself expands and gates the declarations: a (sub)config whose `tie_word_embeddings` is false
   declares nothing, whatever the values on disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tierewrite.errors import ConfigError, TieFileError, UsageError, shown
from tierewrite.source.open import rename_in_errors
from tierewrite.source.table import CONFIG_NAME, Checkpoint
from tierewrite.stores.places import local_file
from tierewrite.tables import Summary, count, table, text, ties_lines, warning_lines
from tierewrite.ties import meta_model, model_class, patterns
from tierewrite.ties.config_limits import CONFIG_FIX, check_config
from tierewrite.ties.tie import FLAG, Declared, Tie, TiesGiven, rooted

if TYPE_CHECKING:
    from rich.console import RenderableType


class DeclaresTies(Protocol):
    """A model of transformers: a `PreTrainedModel`."""

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Alias -> canonical name of every tie that its classes declare."""


class TieMap(Summary, Declared):
    """All active ties of one model, whoever declared them.

    Attributes:
        ties: each with `alias`, `canonical` and `origin`: parameters as they are called in memory, and who declared it.
        source: who spoke: "class", "config", "ties-file", "mapping" or "none".
        detail: the class or file that did.
        unpaired: aliases that are declared without a partner.
        warnings: what a person should know.
        model: names and shapes of the model's parameters; None when no class was asked.
        instead_of, remembered: as of `Declared`.
    """

    def one_line(self) -> str:
        """See `Summary`."""
        who = f"{self.source} {shown(self.detail)}".strip()
        return f"{count(len(self.ties), 'tie')}, declared by {who}"

    def lines(self) -> Iterator[RenderableType]:
        """See `Summary`."""
        yield from ties_lines(self.source, self.detail, self.unpaired)
        ties = table("alias", "canonical", "declared by", left=3)
        for tie in self.ties:
            ties.add_row(text(shown(tie.alias)), text(shown(tie.canonical)), text(shown(tie.origin)))
        yield ties
        yield from warning_lines(self.warnings)

    @classmethod
    def resolve(
        cls,
        root: Path,
        config: dict[str, Any],
        *,
        keys: Collection[str] = (),
        ties: TiesGiven | None = None,
        trust_remote_code: bool = False,
    ) -> TieMap:
        """Ask the sources in order for the ties of the checkpoint in `root`.

        Args:
            root: the checkpoint's folder (remote code is read from it; the network never).
            config: its config.json, parsed ({} without one).
            keys: the checkpoint's keys; a ties file and regular expressions in config.json are expanded over them.
            ties: a file of JSON {alias: canonical}, or such a mapping; speaks first and alone.
            trust_remote_code: run the Python files that config.json's `auto_map` names.

        Raises:
            TieFileError: the ties file is unreadable, malformed, cyclic or matches nothing of the checkpoint.
            ConfigError: config.json is malformed, or its class is unknown, cannot be built, or is remote code.
        """
        return cls(**vars(_first_to_speak(root, config, keys, ties, trust_remote_code)))

    @classmethod
    def of(cls, checkpoint: Checkpoint, ties: TiesGiven | None = None, trust_remote_code: bool = False) -> TieMap:
        """The ties of an open checkpoint, wherever it lies. Arguments and errors as of `resolve`."""
        with rename_in_errors(checkpoint.origin, checkpoint.root):
            return cls.resolve(
                checkpoint.root,
                checkpoint.config,
                keys=checkpoint.tensors,
                ties=ties,
                trust_remote_code=trust_remote_code,
            )

    @classmethod
    def from_model(cls, model: DeclaresTies) -> TieMap:
        """The ties of a live transformers model (any device; no weight is read).

        Raises:
            UsageError: it is none.
        """
        if not callable(getattr(model, "get_expanded_tied_weights_keys", None)):
            raise UsageError(f"the model is of type {type(model).__name__}; expected a model of transformers")
        pairs, origins, unpaired, warned = meta_model.declared_by(model, {})
        ties = rooted(pairs, origins, ConfigError, None)
        return cls(ties, "class", type(model).__name__, unpaired, warned, meta_model.names_of(model))

    @classmethod
    def from_mapping(cls, declared: Mapping[str, str], keys: Collection[str]) -> TieMap:
        """Ties as a mapping {alias: canonical}: names, module names or regular expressions, as in a ties file.

        Args:
            declared: the mapping.
            keys: what the names are expanded over.

        Raises:
            TieFileError: as for a ties file: not of names, cyclic, or it matches nothing of `keys`.
        """
        return cls(**vars(_given(declared, Path(), {}, keys, False)))

    def to_json(self) -> dict[str, Any]:
        """The ties as a JSON object, `{"source", "detail", "ties": [{alias, canonical, origin}], ...}`."""
        return {
            "source": self.source,
            "detail": self.detail,
            "ties": [{"alias": t.alias, "canonical": t.canonical, "origin": t.origin} for t in self.ties],
            "unpaired": list(self.unpaired),
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TieMap:
        """What `to_json` wrote; the model's names are not part of it, so disk names are taken as they stand."""
        return cls(
            tuple(Tie(t["alias"], t["canonical"], t["origin"]) for t in data["ties"]),
            data["source"],
            data.get("detail", ""),
            tuple(data.get("unpaired", ())),
            tuple(data.get("warnings", ())),
        )


def _first_to_speak(
    root: Path, config: dict[str, Any], keys: Collection[str], ties: TiesGiven | None, trust_remote_code: bool
) -> Declared:
    """The declarations of the first source that has any; see the top of this module for the order."""
    if ties is not None:
        return _given(ties, root, config, keys, trust_remote_code)
    check_config(root, config)
    declared = config.get("_tied_weights_keys")
    if declared is not None:
        found = _from_config(root, config, declared, keys, trust_remote_code)
        if found is not None:
            return found
    return model_class.from_class(root, config, trust_remote_code, keys)


def _given(
    ties: TiesGiven, root: Path, config: dict[str, Any], keys: Collection[str], trust_remote_code: bool
) -> Declared:
    """The ties of a file or mapping that the caller gives."""
    if isinstance(ties, Mapping):
        path, source, what = None, "mapping", "the mapping of ties"
        declared = patterns.checked_mapping(dict(ties), None, TieFileError, what)
    elif not isinstance(ties, (str, bytes, os.PathLike)):
        of_it = "; a TieMap's are {tie.alias: tie.canonical for tie in ties.ties}" if isinstance(ties, Declared) else ""
        raise UsageError(
            f"ties is a {type(ties).__name__}; expected a JSON file or a mapping {{alias: canonical}}{of_it}"
        )
    else:
        path, source, what = local_file(ties, "a ties file"), "ties-file", "the ties file"
        declared = patterns.read_ties(path)
    try:
        # A wrapper may be called like a part of the class (language_model): one side alone proves nothing.
        found = patterns.expanded_over_keys(declared, path, keys, what, both=True)
    except TieFileError as idle:
        if "idle" not in idle.details:
            raise
        try:
            known = _given_in_memory(declared, path, root, config, keys, trust_remote_code, idle)
        except TieFileError as error:
            if error is not idle:
                raise
            known = patterns.expanded_over_keys(declared, path, keys, what)
        # Nobody knows the names: nothing is wrong with a checkpoint that is canonical already.
        found = known or patterns.expanded_over_keys(declared, path, keys, what, done=True)
    says = [*([str(path)] if path is not None else []), *(["nothing is tied"] if not declared else [])]
    return replace(found, source=source, detail=": ".join(says))


def _given_in_memory(
    declared: dict[str, str],
    path: Path | None,
    root: Path,
    config: dict[str, Any],
    keys: Collection[str],
    trust_remote_code: bool,
    idle: TieFileError,
) -> Declared | None:
    """The same, where no alias is a key: they may be names in memory, which the class knows; None if it is not known.

    Raises:
        TieFileError: `idle`, where the class knows none of them.
    """
    try:
        check_config(root, config)
        names = model_class.from_class(root, config, trust_remote_code, keys).model
    except ConfigError:
        return None
    shapes = names.shapes if names is not None else {}
    pairs, _ = patterns.expand(declared, shapes, path, TieFileError)
    known = {a: c for a, c in pairs.items() if a in shapes and c in shapes}
    if not known:
        raise idle
    label = "the mapping of ties" if path is None else path.name
    return Declared(rooted(known, dict.fromkeys(known, label), TieFileError, path), "ties-file", model=names)


def _from_config(
    root: Path, config: dict[str, Any], declared: Any, keys: Collection[str], trust_remote_code: bool
) -> Declared | None:
    file = root / CONFIG_NAME
    if isinstance(declared, (list, tuple)):
        # The legacy form says which names are aliases, not of what: only the class can pair them.
        if not all(isinstance(name, str) for name in declared):
            raise ConfigError(f"_tied_weights_keys holds more than names; {CONFIG_FIX}", file=file)
        if not declared:
            return None
        asked = model_class.from_class(root, config, trust_remote_code, keys)
        found = {tie.alias for tie in asked.ties}
        unknown = [name for name in declared if name not in found]
        left = tuple(name for name, aliases in patterns.entries_matched(unknown, found, file) if not aliases)
        return Declared(asked.ties, asked.source, asked.detail, (*asked.unpaired, *left), asked.warnings, asked.model)
    declared = patterns.checked_mapping(declared, file, ConfigError, "_tied_weights_keys")
    off = next(_switched_off(config, ""), None)
    if off is not None:
        said = f"config.json declares ties and switches them off: it says {off}; all names are kept"
        return Declared((), "config", CONFIG_NAME, warnings=(said,))
    if not declared:
        return None
    rooted(declared, dict.fromkeys(declared, CONFIG_NAME), ConfigError, file)
    pairs: dict[str, str] = {}
    names: Collection[str] = ()
    for spelled in patterns.spellings(keys):
        names = patterns.parameters_of(spelled)
        pairs, _ = patterns.expand(patterns.parameters_declared(declared, spelled, names), names, file, ConfigError)
        if any(alias in names or canonical in names for alias, canonical in pairs.items()):
            break
    model = None
    if not any(alias in names or canonical in names for alias, canonical in pairs.items()):
        # Names of parameters that are called otherwise on disk: the class knows how.
        asked = model_class.from_class(root, config, trust_remote_code, keys)
        model = asked.model
        if model is not None and model.shapes:
            pairs, _ = patterns.expand(declared, model.shapes, file, ConfigError)
    ties = rooted(pairs, dict.fromkeys(pairs, CONFIG_NAME), ConfigError, file)
    return Declared(ties, "config", CONFIG_NAME, model=model)


def _switched_off(part: Any, path: str) -> Iterator[str]:
    """Where a config, or a (sub)model's in it, says that its embeddings are not tied. null is no yes to any loader.

    Which of the ties that config.json lists a submodel's flag is about, nobody says: one that is off keeps them all.
    """
    if isinstance(part, dict):
        if part.get(FLAG, True) is not True:
            yield f"{path}{FLAG}: {shown(json.dumps(part[FLAG]))}"
        for name, value in part.items():
            yield from _switched_off(value, f"{path}{shown(name)}.")
