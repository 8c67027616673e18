"""Memory -> disk: the name that a part of a parameter would have in a checkpoint, where no key says it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from tierewrite.ties.scopes import Scopes
from tierewrite.ties.tie import ModelNames
from tierewrite.ties.tie_group import WHOLE, Part
from tierewrite.ties.translator import Translator, fresh


class Speller:
    """Spells parameters of one model as one checkpoint would."""

    def __init__(self, model: ModelNames | None, translator: Translator, scopes: Scopes) -> None:
        self._model, self._translator, self._scopes = model, translator, scopes
        self._reverse: tuple[list[Any], list[Any]] | None = None
        self._prefix_differs: bool | None = None

    def spell(self, parameter: str, part: Part, beside: Mapping[str, str]) -> str:
        """The name on disk that `part` of `parameter` would have in this checkpoint.

        Of the names that load into it (under hub names, memory names, with and without the base model's prefix), the
        one of whose path the keys share most; among equals the one that is spelled as the sides that are there
        (`beside`: parameter -> name on disk), then the longest path, then the hub's.
        """
        spelled = self._spellings(parameter, part)
        right = {n: name for n, name in enumerate(spelled) if self._translator.locate(name) == (parameter, part)}
        if right:
            strange = {n: _strange(name, self._scopes) for n, name in right.items()}
            least = min(strange.values())
            best = [n for n in right if strange[n] == least]
            if len({right[n] for n in best}) > 1:
                votes = self._votes(part, beside)
                best.sort(key=lambda n: (-votes[n], -right[n].count(".")))
            return right[best[0]]
        if part == WHOLE:
            return parameter
        container = parameter.rpartition(".")[0]
        return f"{container}.{part[3]}.{part[1]}.{part[2]}" if part[0] == "expert" else parameter

    def _votes(self, part: Part, beside: Mapping[str, str]) -> Counter[int]:
        """Way of spelling, by its position in `_spellings` -> how many of the sides that are there are spelled so."""
        return Counter(
            n
            for other, name in beside.items()
            for n, candidate in enumerate(self._spellings(other, part))
            if candidate == name
        )

    def _spellings(self, parameter: str, part: Part) -> list[str]:
        """Every way to spell it, in one order for all parameters, the hub's first; names may repeat."""
        stem = f"{self._translator.prefix}." if self._translator.prefix else ""
        if self._prefix_differs is None:
            # The base model's prefix is missing or added in a checkpoint as a whole.
            expected = any(name.startswith(stem) for name in self._translator.known)
            self._prefix_differs = bool(stem) and (self._translator.prefix in self._scopes) != expected
        names = list(self._plain_spellings(parameter, part))
        if self._prefix_differs:
            names += [n.removeprefix(stem) if n.startswith(stem) else stem + n for n in names]
        return names

    def _plain_spellings(self, parameter: str, part: Part) -> Iterator[str]:
        from_hub = self._hub_names(parameter, part)
        if part and part[0] == "expert":
            _, projection, leaf, index = part
            for whole in (*self._hub_names(parameter, WHOLE), parameter):
                yield f"{whole.rpartition('.')[0]}.{index}.{projection}.{leaf}"
            return
        yield from from_hub
        yield parameter

    def _hub_names(self, parameter: str, part: Part) -> Iterator[str]:
        """Names that `save_pretrained` would write (transformers' transforms reversed), prefix changes both ways."""
        if self._model is None or self._translator.rename is None:
            return
        from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming

        if self._reverse is None:
            reversed_transforms = []
            for transform in reversed(self._model.hub_transforms):
                try:
                    reversed_transforms.append(fresh(transform).reverse_transform())
                except Exception:
                    # A transform that transformers cannot reverse names nothing on save.
                    continue
            self._reverse = (
                [t for t in reversed_transforms if isinstance(t, WeightRenaming)],
                [t for t in reversed_transforms if isinstance(t, WeightConverter)],
            )
        renamings, converters = self._reverse
        without = [t for t in renamings if not isinstance(t, PrefixChange)]
        for chosen in (without, renamings) if len(without) != len(renamings) else (renamings,):
            for converted in self._unconverted(parameter, part, converters):
                yield self._translator.rename(converted, chosen, [], None, None)[0]
        if part and part[0] == "converter":
            # Hub layout under memory paths.
            yield from self._unconverted(parameter, part, converters)

    def _unconverted(self, parameter: str, part: Part, converters: list[Any]) -> Iterator[str]:
        """`parameter` before the converter that makes it on load: the name of `part`, paths still as in memory."""
        for converter in converters:
            renamed, pattern = converter.rename_source_key(parameter)
            if pattern is None:
                continue
            targets = converter.target_patterns
            index = part[2] if part and part[0] == "converter" else 0
            if index < len(targets):
                name = renamed.replace(targets[0], targets[index])
                yield name.replace("*", str(part[3]) if part and part[0] == "converter" else "0")
            return
        yield parameter


def _strange(name: str, scopes: Scopes) -> int:
    """Number of trailing path segments of `name` (its own not counted) that no key shares."""
    scope = name.rpartition(".")[0]
    missing = 0
    while scope and scope not in scopes:
        scope = scope.rpartition(".")[0]
        missing += 1
    return missing
