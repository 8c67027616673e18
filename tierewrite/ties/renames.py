"""What transformers makes of names for one class: asked with its own transforms, each answer remembered.

An answer that depends on a name alone is plain data, so it outlives the transforms that gave it (`class_memory`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from tierewrite.errors import UsageError
from tierewrite.ties.tie_group import Part

_BY_NAME_ALONE = frozenset(
    {"WeightRenaming", "WeightConverter", "PrefixChange", "LayerPairCollapse", "Inkling2IndexOffsetWeightRename"}
)
"""transformers' transforms that say the same of a name whatever they were asked before (core_model_loading.py)."""


@dataclass(frozen=True)
class Transform:
    """One of transformers' transforms, as data.

    Attributes:
        sources, targets: its patterns of names on disk and in memory, as it holds them.
        converts: it makes other tensors, too (`WeightConverter`); else it only renames.
        stacked: what it makes is a stack, each entry of which holds the rows of this many of its sources one after the
            other (an expert's gate and up); 0 where it does anything else.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    converts: bool
    stacked: int = 0


@dataclass
class Answers:
    """What transformers said of names.

    Attributes:
        loaded: name on disk -> (name in memory, pattern of the converter that matched or None).
        saved: (parameter, part) -> the names that `save_pretrained` would write, several ways.
    """

    loaded: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    saved: dict[tuple[str, Part], tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.loaded) + len(self.saved)


@dataclass(frozen=True)
class Live:
    """transformers' transforms for one class.

    Attributes:
        every: in the order of loading, legacy names included.
        hub: the same without the legacy names, which nothing writes any more.
    """

    every: tuple[Any, ...]
    hub: tuple[Any, ...]


def _elsewhere() -> Live:
    raise UsageError("these ties came from another process, and know no more names; ask the class here (TieMap.of)")


class Renames:
    """transformers' conversion mapping of one class.

    Attributes:
        transforms: as data, in the order of loading, legacy names included.
        in_order: what is said of a name depends on the names before it, which must come in transformers' order.
        by_name_alone: what is said of a name depends on nothing but the name.
        answers: what was said so far, of sessions of the model's own parameters.
    """

    def __init__(
        self,
        live: Callable[[], Live],
        transforms: tuple[Transform, ...],
        answers: Answers,
        *,
        in_order: bool = False,
        by_name_alone: bool = True,
    ) -> None:
        """`live`: gives transformers' own transforms, when a name comes that was not asked before."""
        self._ask = live
        self._live: Live | None = None
        self._keep: Callable[[], None] | None = None
        self._kept = 0
        self.transforms, self.answers = transforms, answers
        self.in_order, self.by_name_alone = in_order, by_name_alone

    @classmethod
    def of(cls, every: Sequence[Any], hub: Sequence[Any]) -> Renames:
        """Of transformers' transforms: see `Live`."""
        live = Live(tuple(every), tuple(hub))
        kinds = {type(transform).__name__ for transform in (*live.every, *live.hub)}
        return cls(
            lambda: live,
            tuple(_as_data(transform) for transform in every),
            Answers(),
            in_order="GroupWeightRename" in kinds,
            by_name_alone=kinds <= _BY_NAME_ALONE,
        )

    def __getstate__(self) -> dict[str, Any]:
        """For another process: what was said so far, without transformers' own transforms, which have no pickle."""
        return {**self.__dict__, "_ask": _elsewhere, "_live": None, "_keep": None}

    def __deepcopy__(self, memo: object) -> Renames:
        return self  # within a process, what one copy learns is true of the others

    def live(self) -> Live:
        """transformers' transforms."""
        if self._live is None:
            self._live = self._ask()
        return self._live

    def kept_by(self, keep: Callable[[], None], already: bool = False) -> None:
        """`keep` writes down what was said, now and whenever `settled` finds more.

        Args:
            already: what was said so far is kept.
        """
        self._keep, self._kept = keep, len(self.answers)
        if not already:
            keep()

    def settled(self) -> None:
        """A pass over names is done: what was said is kept, if somebody keeps it and there is more than before."""
        if self._keep is not None and len(self.answers) > self._kept:
            self._kept = len(self.answers)
            self._keep()


class Session:
    """One pass over the names of a checkpoint; transforms keep state that must not outlive it.

    Args:
        prefix: the base model's prefix, or "".
        known: the parameters in memory.
        own: `known` are the model's own parameters, so that answers may be remembered.
    """

    def __init__(self, renames: Renames, prefix: str, known: Mapping[str, Any], own: bool) -> None:
        self._renames, self._prefix, self._known = renames, prefix, known
        self._answers = renames.answers if own and renames.by_name_alone else Answers()
        self._loading: tuple[list[Any], list[Any]] | None = None
        self._saving: tuple[list[Any], list[Any]] | None = None

    def loaded(self, name: str) -> tuple[str, str | None]:
        """transformers' `rename_source_key`: the name in memory, and the pattern of the converter that matched."""
        found = self._answers.loaded.get(name)
        if found is None:
            found = self._answers.loaded[name] = self._loaded(name)
        return found

    def saved(self, parameter: str, part: Part) -> tuple[str, ...]:
        """Names that `save_pretrained` would write (transformers' transforms reversed), prefix changes both ways."""
        found = self._answers.saved.get((parameter, part))
        if found is None:
            found = self._answers.saved[parameter, part] = tuple(self._saved(parameter, part))
        return found

    def _loaded(self, name: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        if self._loading is None:
            self._loading = _by_kind([deepcopy(transform) for transform in self._renames.live().every])
        renamed, pattern = rename_source_key(name, *self._loading, self._prefix or None, self._known)
        return renamed, pattern

    def _saved(self, parameter: str, part: Part) -> Iterator[str]:
        from transformers.core_model_loading import PrefixChange, rename_source_key

        if self._saving is None:
            self._saving = _by_kind(list(_reversed(self._renames.live().hub)))
        renamings, converters = self._saving
        without = [t for t in renamings if not isinstance(t, PrefixChange)]
        for chosen in (without, renamings) if len(without) != len(renamings) else (renamings,):
            for converted in _unconverted(parameter, part, converters):
                yield rename_source_key(converted, chosen, [], None, None)[0]
        if part and part[0] == "converter":
            # Hub layout under memory paths.
            yield from _unconverted(parameter, part, converters)


def _as_data(transform: Any) -> Transform:
    from transformers.core_model_loading import WeightConverter

    sources, targets = tuple(transform.source_patterns), tuple(transform.target_patterns)
    return Transform(sources, targets, isinstance(transform, WeightConverter), _stacked(transform))


def _stacked(transform: Any) -> int:
    """See `Transform.stacked`."""
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in getattr(transform, "operations", ())]
    count = len(transform.source_patterns)
    if steps == [("MergeModulelist", 0), ("Concatenate", 1)]:
        return count
    return int(count == 1 and steps == [("MergeModulelist", 0)])


def _by_kind(transforms: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Those that rename, and those that convert."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    return (
        [t for t in transforms if isinstance(t, WeightRenaming)],
        [t for t in transforms if isinstance(t, WeightConverter)],
    )


def _reversed(transforms: Sequence[Any]) -> Iterator[Any]:
    for transform in reversed(transforms):
        try:
            yield deepcopy(transform).reverse_transform()
        except Exception:
            # A transform that transformers cannot reverse names nothing on save.
            continue


def _unconverted(parameter: str, part: Part, converters: Sequence[Any]) -> Iterator[str]:
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
