"""Memory -> disk: the name that a part of a parameter would have in a checkpoint, where no key says it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from tierewrite.ties.scopes import Scopes
from tierewrite.ties.tie_group import WHOLE, Part
from tierewrite.ties.translator import Translator


class Speller:
    """Spells parameters of one model as one checkpoint would."""

    def __init__(self, translator: Translator, scopes: Scopes) -> None:
        self._translator, self._scopes = translator, scopes
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

    def _hub_names(self, parameter: str, part: Part) -> tuple[str, ...]:
        """Names that `save_pretrained` would write; none where no class says how."""
        session = self._translator.session
        return () if session is None else session.saved(parameter, part)


def _strange(name: str, scopes: Scopes) -> int:
    """Number of trailing path segments of `name` (its own not counted) that no key shares."""
    scope = name.rpartition(".")[0]
    missing = 0
    while scope and scope not in scopes:
        scope = scope.rpartition(".")[0]
        missing += 1
    return missing
