"""What one declaration of ties is, as data: the ties, who made it, and what the model says of names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tierewrite.errors import ConfigError, TieFileError, shown
from tierewrite.stores.base import PathLike
from tierewrite.ties.renames import Renames

TiesGiven = PathLike | Mapping[str, str]
"""Ties that a caller gives: a JSON file {alias: canonical}, or the same as a mapping; {} says that nothing is tied."""

ConfigPath = tuple[str, ...]
"""Where a (sub)config is in config.json: the keys that lead to it, () for config.json itself."""

FLAG = "tie_word_embeddings"
"""The member of a (sub)config that switches the ties of the (sub)model that it describes."""


@dataclass(frozen=True, slots=True)
class Tie:
    """One declared tie of two parameters.

    Attributes:
        alias: the parameter that is stored under another name, as it is called in memory.
        canonical: the parameter whose name stays; never itself an alias (chains are followed to their root).
        origin: who declared it, for people: "class DiffusionGemmaModel at 'model'", "config.json", "ties.json".
    """

    alias: str
    canonical: str
    origin: str


@dataclass(frozen=True)
class ModelNames:
    """What the model class knows about names: plain data, no module and no weights.

    Attributes:
        class_name: the class that was asked.
        base_model_prefix: transformers' attribute of that name ("" if none).
        shapes: every parameter and persistent buffer by its name in memory, with its shape; empty where the class could
            not be built.
        renames: transformers' conversion mapping for the class.
        flags: alias -> places of the (sub)configs whose `tie_word_embeddings` switches its tie.
        optional: names in `shapes` that a checkpoint may lack: buffers, and what the class says it can do without.
        ignored: patterns of names in a checkpoint that the class passes over when it is loaded.
        embeddings: the weights of input and output embedding, where the class has both, of one shape, and neither it
            nor a part of it declares any tie.
        of_transformers: no part of the class is from elsewhere than the installed transformers and torch.
    """

    class_name: str
    base_model_prefix: str
    shapes: Mapping[str, tuple[int, ...]]
    renames: Renames
    flags: Mapping[str, tuple[ConfigPath, ...]] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()
    embeddings: tuple[str, str] | None = None
    of_transformers: bool = False


@dataclass(frozen=True)
class Declared:
    """What one source (a ties file, config.json, a model class) declares.

    Attributes:
        ties: the ties, each alias once, canonical names resolved to the root of their chain.
        source: which source spoke: "ties-file", "mapping", "config", "class" or "none".
        detail: the class or file that spoke.
        unpaired: aliases of legacy list declarations whose counterpart nothing names.
        warnings: what a reader of the report should know.
        model: names of the model's parameters for `on_disk`; None when no class was asked.
        instead_of: why the class that config.json names could not be asked, where another one was; else "".
        remembered: the class was not asked now; this is what it answered before.
    """

    ties: tuple[Tie, ...]
    source: str
    detail: str = ""
    unpaired: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    model: ModelNames | None = field(default=None, repr=False, compare=False)
    instead_of: str = ""
    remembered: bool = field(default=False, compare=False)


def rooted(
    pairs: Mapping[str, str],
    origins: Mapping[str, str],
    error: type[TieFileError] | type[ConfigError],
    file: Path | None,
) -> tuple[Tie, ...]:
    """Follow every chain to its root; a cycle is an error that names its members."""
    roots: dict[str, str] = {}
    for start in pairs:
        trail: dict[str, None] = {}
        name = start
        while name in pairs and name not in roots:
            if name in trail:
                members = list(trail)[list(trail).index(name) :]
                loop = " -> ".join(shown(n) for n in [*members, name])
                raise error(
                    f"the declared ties form a cycle: {loop}; one of these names must be the canonical one",
                    file=file,
                    details={"cycle": members},
                )
            trail[name] = None
            name = pairs[name]
        root = roots.get(name, name)
        for passed in trail:
            roots[passed] = root
    return tuple(Tie(alias, roots[alias], origins[alias]) for alias in pairs if roots[alias] != alias)
