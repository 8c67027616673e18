"""Whether the names of a checkpoint are those of a model class: which are no parameter of it, and which it lacks.

One name of each kind is looked at: `layers.0.mlp.up_proj.weight` stands for all layers, so that a checkpoint of half a
million names costs no more than a few hundred. Names are read as if nothing were quantized.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tierewrite.formats.numbered import pattern_of
from tierewrite.source.table import as_names
from tierewrite.ties.patterns import parameters_of, safe_pattern, spellings
from tierewrite.ties.tie import Declared, ModelNames
from tierewrite.ties.translator import Translator
from tierewrite.ties.wrappers import unwrapped

_LAYER = re.compile(r"(?:^|\.)layers\.([0-9]+)\.")
# Buffers of older checkpoints that transformers passes over for all classes (`_adjust_missing_and_unexpected_keys`).
_FORMER_BUFFER = re.compile(r"rotary_emb\.inv_freq|(?:^|\.)position_ids$")
_MAIN = ("weight", "bias")


@dataclass(frozen=True)
class Fit:
    """How a checkpoint's names and a class's parameters fit.

    Attributes:
        unexpected: names of the checkpoint that are no parameter of the class, one of each kind.
        missing: parameters of the class that nothing in the checkpoint is loaded into, one of each kind; aliases of
            declared ties whose other side is there, and what the class can do without, do not count.
        ignored: names like `unexpected`, which the class says it passes over: a T5EncoderModel all of the decoder.
    """

    unexpected: tuple[str, ...]
    missing: tuple[str, ...]
    ignored: tuple[str, ...] = ()

    @property
    def strange(self) -> tuple[str, ...]:
        """Names of the checkpoint that are loaded into nothing."""
        return (*self.unexpected, *self.ignored)

    @property
    def whole(self) -> bool:
        """The class takes every name of the checkpoint, and lacks none of its own."""
        return not self.unexpected and not self.missing


def fit_of(declared: Declared, keys: Collection[str], config: Mapping[str, Any]) -> Fit:
    """How the class that `declared` something takes `keys`; it must have been built."""
    model = declared.model
    assert model is not None
    worn = unwrapped(keys)
    plain = _fit(model, declared, keys, config)
    if worn is None or plain.whole:
        return plain
    bare = _fit(model, declared, worn.names, config)
    return bare if len(bare.unexpected) < len(plain.unexpected) else plain


def _fit(model: ModelNames, declared: Declared, keys: Collection[str], config: Mapping[str, Any]) -> Fit:
    sample = one_of_each_kind(keys)
    spoken = parameters_of(sample)
    there = set(sample)
    translator = Translator(model, {})
    found: set[str] = set()
    strange: list[str] = []
    for name in translator.in_loading_order(list(spoken)):
        place = translator.locate(name)
        if place is not None:
            found.update(map(pattern_of, (place[0], *translator.covers.get(name, ()))))
        elif name in there or name.endswith(".weight"):  # others are guesses at fused experts
            strange.append(name)
    companions = {name: weight for name in strange if (weight := _weight_beside(name, model)) is not None}
    found.update(map(pattern_of, companions.values()))  # in whatever form: without it they would not be there
    strange = [name for name in strange if name not in companions and not is_no_evidence(name, config)]
    ignored = tuple(name for name in strange if is_ignored(name, model))
    unexpected = tuple(name for name in strange if name not in ignored)
    return Fit(unexpected, tuple(_missing(model, declared, found)), ignored)


def all_loaded(model: ModelNames, parameters: Collection[str], keys: Collection[str]) -> bool:
    """Whether something in the checkpoint is loaded into each of `parameters`."""
    for spelled in spellings(keys):
        translator = Translator(model, {})
        spoken = translator.in_loading_order(list(parameters_of(one_of_each_kind(spelled))))
        places = [place for place in map(translator.locate, spoken) if place is not None]
        if {place[0] for place in places}.issuperset(parameters):
            return True
    return False


def is_ignored(name: str, model: ModelNames) -> bool:
    """Whether the class says that it passes over such a name, where it has no parameter for it."""
    return any(re.search(safe_pattern(pattern), name) for pattern in model.ignored)


def is_former_buffer(name: str) -> bool:
    """Whether older checkpoints hold such a buffer, which transformers passes over without a word."""
    return _FORMER_BUFFER.search(name) is not None


def weights_around(name: str) -> list[str]:
    """The weights that a tensor may belong to: its module's, or that of the one above (`centroids.weight`)."""
    parent = name.rpartition(".")[0]
    return [f"{module}.weight" for module in (parent, parent.rpartition(".")[0]) if module]


def _weight_beside(name: str, model: ModelNames) -> str | None:
    """The weight to which a companion in a format that nobody knows belongs."""
    if name.rpartition(".")[2] in _MAIN:
        return None
    return next((weight for weight in weights_around(name) if weight in model.shapes), None)


def is_no_evidence(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a name without a parameter says nothing against the class: a table that is computed anyway, or layers
    that speculative decoding reads.
    """
    return is_former_buffer(name) or _predicts_further_tokens(name, config)


def _predicts_further_tokens(name: str, config: Mapping[str, Any]) -> bool:
    """Whether it belongs to layers for multi-token prediction, which releases keep beside the model."""
    if name.startswith(("mtp.", "model.mtp.")):
        return True
    layer = _LAYER.search(name)
    texts = (config, *(part for part in config.values() if isinstance(part, dict)))
    counts = [part["num_hidden_layers"] for part in texts if isinstance(part.get("num_hidden_layers"), int)]
    declared = any(part.get("num_nextn_predict_layers") for part in texts)
    return bool(layer and declared and counts and int(layer[1]) >= max(counts))


def _missing(model: ModelNames, declared: Declared, found: Collection[str]) -> list[str]:
    """Parameters of which no side is in the checkpoint, one of each kind."""
    sides: dict[str, list[str]] = {}
    for tie in declared.ties:
        sides.setdefault(tie.canonical, [tie.canonical]).append(tie.alias)
    group = {name: names for names in sides.values() for name in names}
    missing: dict[str, str] = {}
    for name in model.shapes:
        kind = pattern_of(name)
        if kind in found or kind in missing or name in model.optional:
            continue
        if not any(pattern_of(side) in found for side in group.get(name, ())):
            missing[kind] = name
    return list(missing.values())


def one_of_each_kind(keys: Collection[str]) -> list[str]:
    """The first of the keys that differ in numbers alone, in the order of `keys`."""
    table = as_names(keys)
    if not len(table):
        return []
    kinds: dict[str, int] = {}
    numbers = [kinds.setdefault(pattern_of(module), len(kinds)) for module in table.modules]
    rows = np.array(numbers, np.int64)[table.module] * max(len(table.leaves), 1) + table.leaf
    first: Sequence[int] = np.sort(np.unique(rows, return_index=True)[1]).tolist()
    return [table.names[row] for row in first]
